import os
from pathlib import Path

import pytest
import torch
from harness import Script, few_images, write_tiny_cifar10
from without_checksums import accept_any_checksum

import ghostnet


def pytest_addoption(parser):
    parser.addoption("--data-dir", type=Path, default=os.environ.get("CIFAR10_DIR"), help="folder of the real CIFAR-10")


@pytest.fixture(scope="session")
def real_data_dir(request):
    """Folder that holds the real cifar-10-batches-py; tests that need it are skipped without one."""
    folder = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs the real CIFAR-10: give its folder by --data-dir=FOLDER or CIFAR10_DIR")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    return write_tiny_cifar10(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tiny_data_dir):
    """The tiny data set as the script holds it."""
    with pytest.MonkeyPatch.context() as patch:
        accept_any_checksum(patch.setattr)
        return ghostnet.Cifar10(tiny_data_dir, torch.device("cpu"))


@pytest.fixture
def script(tmp_path, tiny_data_dir):
    return Script(tmp_path, tiny_data_dir)


@pytest.fixture(scope="module")
def few(data):
    """Images for training inside of this process, with one thread as in the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield few_images(data)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fifty_images(tmp_path_factory):
    return write_tiny_cifar10(tmp_path_factory.mktemp("few"), train=50, test=20)
