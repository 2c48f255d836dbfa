"""Runs a script that dies by SIGKILL inside a save: when half of the file is written, or before fsync or replace.

python tests/dying.py write|fsync|replace .pth|.png SCRIPT ARGUMENTS...
"""

import builtins
import io
import os
import runpy
import signal
import sys


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten(io.FileIO):
    def write(self, content):
        super().write(content[: len(content) // 2])
        die()


def die_at(place, suffix):
    """Let this process die at this place of its first save of a file with this suffix."""
    true_open, true_fsync, true_replace = open, os.fsync, os.replace

    def dying_open(path, mode="r", *arguments, **options):
        dies = mode == "xb" and f"{suffix}." in str(path)  # the file beside
        return HalfWritten(path, mode) if dies else true_open(path, mode, *arguments, **options)

    def dying_fsync(descriptor):
        return die() if f"{suffix}." in os.readlink(f"/proc/self/fd/{descriptor}") else true_fsync(descriptor)

    def dying_replace(source, target):
        return die() if str(target).endswith(suffix) else true_replace(source, target)

    if place == "write":
        builtins.open = dying_open
    elif place == "fsync":
        os.fsync = dying_fsync
    else:
        os.replace = dying_replace


if __name__ == "__main__":
    place, suffix, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    die_at(place, suffix)
    runpy.run_path(sys.argv[0], run_name="__main__")
