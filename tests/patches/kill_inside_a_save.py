"""Ends the process inside of its first save of a checkpoint, with a part of the file written."""

import os
import random
import signal


def die(descriptor):
    if ".pth" in os.readlink(f"/proc/self/fd/{descriptor}"):
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, int(random.random() * size))
        os.kill(os.getpid(), signal.SIGKILL)


os.fsync = die
