"""Run the script on the tiny data that lie in the folder TINY, after patches from tests/patches.

    TINY=FOLDER python tests/run_patched.py PATCH,PATCH SCRIPT ARGUMENTS
"""

import importlib
import os
import runpy
import sys
from pathlib import Path

from tiny import published
from torchvision.datasets import CIFAR10

patches = sys.argv[1].split(",")
sys.argv = sys.argv[2:]
for name, value in published(Path(os.environ["TINY"])).items():
    setattr(CIFAR10, name, value)
for patch in patches:
    importlib.import_module(f"patches.{patch}")
runpy.run_path(sys.argv[0], run_name="__main__")
