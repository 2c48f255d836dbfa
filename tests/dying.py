"""Runs a script that dies by SIGKILL inside the first file it saves: when half is written, or before fsync or replace.

python tests/dying.py write|fsync|replace SCRIPT ARGUMENTS...
"""

import builtins
import io
import os
import runpy
import signal
import sys


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten(io.FileIO):
    def write(self, content):
        super().write(content[: len(content) // 2])
        die()


def dying_open(path, mode="r", *arguments, _open=open, **options):
    return HalfWritten(path, mode) if mode == "xb" else _open(path, mode, *arguments, **options)


def die_at(place):
    if place == "write":
        builtins.open = dying_open
    else:
        setattr(os, place, die)


if __name__ == "__main__":
    place, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    die_at(place)
    runpy.run_path(sys.argv[0], run_name="__main__")
