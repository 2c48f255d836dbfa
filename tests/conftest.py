import os
from pathlib import Path

import pytest
from tiny import Script, write_tiny_cifar10


def pytest_addoption(parser):
    folder = os.environ.get("CIFAR10_DIR")
    parser.addoption("--data-dir", default=folder, help="folder of the real CIFAR-10")


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
