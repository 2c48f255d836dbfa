import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the processes that run the tests

import pytest
from tiny import Script, write_tiny_cifar10

MEMORY = 3 * 2**30  # bytes for each process


def pytest_xdist_auto_num_workers():
    """As many processes as there are cores, and as memory is enough for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY))


def pytest_addoption(parser):
    folder = os.environ.get("CIFAR10_DIR")
    parser.addoption("--data-dir", default=folder, help="folder of the real CIFAR-10")
    parser.addoption("--times", default=1, type=int, help="how often test_reliability tries things")


@pytest.fixture(scope="session")
def real_data_dir(request):
    """Folder that holds the real cifar-10-batches-py; tests that need it are skipped without."""
    folder = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs the real CIFAR-10: give its folder by --data-dir=FOLDER or CIFAR10_DIR")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return write_tiny_cifar10(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def script(tmp_path, tiny_data):
    return Script(tmp_path / "script", tiny_data)
