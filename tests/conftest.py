import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from without_checksums import accept_any_checksum

import ghostnet

ROOT = Path(__file__).parent.parent
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pytest_addoption(parser):
    parser.addoption("--data-dir", type=Path, default=os.environ.get("CIFAR10_DIR"), help="folder of the real CIFAR-10")


@pytest.fixture(scope="session")
def real_data_dir(request):
    """Folder that holds the real cifar-10-batches-py; tests that need it are skipped without one."""
    folder = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs the real CIFAR-10: give its folder by --data-dir or CIFAR10_DIR")
    return Path(folder).resolve()


def write_tiny_cifar10(root, train=300, test=60, seed=0):
    """CIFAR-10 in torchvision's layout: five training batches and a test batch of noise tinted by class."""
    rng = np.random.default_rng(seed)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in [*((f"data_batch_{i}", train // 5) for i in range(1, 6)), ("test_batch", test)]:
        labels = rng.integers(0, 10, n)
        images = rng.integers(0, 120, (n, 3, 1024)) + 13 * labels[:, None, None] * np.array([1, 0, 1])[:, None]
        content = {"data": images.astype(np.uint8).reshape(n, 3072), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    return root


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    return write_tiny_cifar10(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tiny_data_dir):
    """The tiny data set as the script holds it."""
    with pytest.MonkeyPatch.context() as patch:
        accept_any_checksum(patch.setattr)
        return ghostnet.Cifar10(tiny_data_dir, torch.device("cpu"))


class Script:
    """ghostnet.py as a subprocess on the tiny data set, in a folder of its own."""

    def __init__(self, folder, data_dir):
        self.folder, self.data_dir = folder, data_dir
        self.checkpoints, self.images = folder / "checkpoints", folder / "images"

    def run_python(self, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, timeout=300)

    def command(self, *arguments):
        script = [sys.executable, str(ROOT / "tests" / "without_checksums.py"), str(ROOT / "ghostnet.py")]
        return [*script, *map(str, arguments), "--data-dir", str(self.data_dir), "--device", "cpu"]

    def start(self, *arguments, **options):
        options = {"cwd": self.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(self.command(*arguments), **options)

    def run(self, *arguments, timeout=300, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def script(tmp_path, tiny_data_dir):
    return Script(tmp_path, tiny_data_dir)
