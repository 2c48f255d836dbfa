"""Runs a script that downloads a CIFAR-10 which the tests made, and stalls while it is unpacked.

python tests/downloading.py ARCHIVE SECONDS ghostnet.py ARGUMENTS...
"""

import hashlib
import runpy
import shutil
import sys
import tarfile
import time
from pathlib import Path

import torchvision
from torchvision.datasets import CIFAR10


def fake_download(archive, seconds):
    """Let CIFAR-10 be this archive, whose files have checksums; it takes these seconds to unpack its second half."""
    with tarfile.open(archive) as tar:
        sums = {Path(m.name).name: hashlib.md5(tar.extractfile(m).read()).hexdigest() for m in tar if m.isfile()}
    CIFAR10.train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]
    CIFAR10.test_list = [[name, sums[name]] for name, _ in CIFAR10.test_list]
    CIFAR10.meta = CIFAR10.meta | {"md5": sums[CIFAR10.meta["filename"]]}

    def download(_url, root, filename, _md5):
        print("downloading", flush=True)
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(archive, Path(root) / filename)

    def unpack(archive, folder, _compression):
        with tarfile.open(archive) as tar:
            for number, member in enumerate(tar):
                if number == 4:
                    print("unpacking", flush=True)
                    time.sleep(seconds)
                tar.extract(member, folder, filter="data")

    torchvision.datasets.utils.download_url = download
    torchvision.datasets.utils._ARCHIVE_EXTRACTORS[".tar"] = unpack


if __name__ == "__main__":
    archive, seconds, *sys.argv = sys.argv[1:]
    fake_download(archive, float(seconds))
    runpy.run_path(sys.argv[0], run_name="__main__")
