"""Waits until NUMBER processes have come to the folder MEETING; then downloads and draws slowly.

So the processes get in each other's way.
"""

import os
import shutil
import time
from pathlib import Path

import torchvision.datasets.utils

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
