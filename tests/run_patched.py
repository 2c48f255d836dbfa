"""Run the script on the tiny data that lie in the folder TINY, after patches that are named.

    TINY=FOLDER python tests/run_patched.py PATCH,PATCH SCRIPT ARGUMENTS
"""

import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torchvision
from tiny import SLOW_PARTS, published


def quick():
    """Leave out what takes a process's time and is rarely tested."""
    for name, stand_in in SLOW_PARTS.items():
        mock.patch(name, stand_in).start()


def kill_inside_a_save():
    """End the process inside of its first save of a checkpoint, with a part of it written."""

    def die(descriptor):
        if ".pth" in os.readlink(f"/proc/self/fd/{descriptor}"):
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, int(random.random() * size))
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die


def meet():
    """Wait until NUMBER processes are in the folder MEETING; then be slow where they may meet."""
    meeting = Path(os.environ["MEETING"])
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < int(os.environ["NUMBER"]):
        time.sleep(0.01)

    def slow_download(_url, folder, filename, _md5):
        print("downloading", flush=True)
        time.sleep(1)
        shutil.copy(Path(os.environ["TINY"]) / filename, folder)

    def slow_sync(descriptor):
        if "png" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(1)

    torchvision.datasets.utils.download_url = slow_download
    os.fsync = slow_sync


patches = filter(None, sys.argv[1].split(","))
sys.argv = sys.argv[2:]
for name, value in published(Path(os.environ["TINY"])).items():
    setattr(torchvision.datasets.CIFAR10, name, value)
for patch in patches:
    globals()[patch]()
runpy.run_path(sys.argv[0], run_name="__main__")
