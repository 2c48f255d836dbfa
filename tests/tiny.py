"""What the tests of the script as a program share: a tiny CIFAR-10, and the script run on it."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
SLOW_PARTS = {  # of a run that is quick, and what stands in for them
    "thop.profile": lambda *_, **__: (1.0, 1.0, {}),
    "matplotlib.figure.Figure.savefig": lambda *_, **__: None,
}
NOWHERE = "http://127.0.0.1:9/nothing"  # no test uses the network


def write_tiny_cifar10(root, train=50, test=20):
    """Random images as CIFAR-10 is published: pickled batches in a folder, and their archive."""
    rng = np.random.default_rng(0)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    sizes = {"test_batch": test}
    for number in range(1, 6):
        sizes[f"data_batch_{number}"] = train // 5
    for name, size in sizes.items():
        images = rng.integers(0, 256, (size, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, size).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"0123456789"]}))
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    return root


def published(root):
    """The attributes of torchvision's CIFAR10 that make such a folder the data it knows."""

    def checksum(name):
        return hashlib.md5((root / name).read_bytes()).hexdigest()

    def checked(files):
        return [[name, checksum(f"{CIFAR10.base_folder}/{name}")] for name, _ in files]

    return {
        "url": NOWHERE,
        "tgz_md5": checksum(CIFAR10.filename),
        "train_list": checked(CIFAR10.train_list),
        "test_list": checked(CIFAR10.test_list),
        "meta": {**CIFAR10.meta, "md5": checksum(f"{CIFAR10.base_folder}/batches.meta")},
    }


class Script:
    """A copy of ghostnet.py in a folder of its own, with the tiny data beside it."""

    def __init__(self, folder, tiny_data):
        self.folder = folder
        self.tiny_data = tiny_data
        self.path = folder / "ghostnet.py"
        self.data = folder / "data"
        self.checkpoints = folder / "checkpoints"
        self.images = folder / "images"
        self.checkpoints.mkdir(parents=True)
        shutil.copytree(tiny_data, self.data)
        self.path.write_bytes((ROOT / "ghostnet.py").read_bytes())

    def edit(self, old, new):
        """Edit the file as its user does."""
        text = self.path.read_text()
        assert text.count(old) == 1, old
        self.path.write_text(text.replace(old, new))

    def start(self, *arguments, patches="quick", launcher=(), **environment):
        """The script in a process that is started from elsewhere, after patches by their names."""
        program = Path(__file__).with_name("run_patched.py")
        command = [sys.executable, *launcher, program, patches, self.path]
        command += ["--device", "cpu", *map(str, arguments)]
        # Lines come at once because the script writes them so, not because Python is told to.
        ours = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", "TINY": str(self.tiny_data)}
        environment = {**os.environ, **ours, **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd="/", env=environment, **pipes)

    def run(self, *arguments, **options):
        return finish(self.start(*arguments, **options))

    def call(self, *arguments, quick=True):
        """The same in this process, where the imports are done."""
        argv = [str(self.path), "--device", "cpu", *map(str, arguments)]
        code = 0
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(mock.patch.multiple(CIFAR10, **published(self.tiny_data)))
            stack.enter_context(mock.patch.object(sys, "argv", argv))
            for name, stand_in in SLOW_PARTS.items() if quick else ():
                stack.enter_context(mock.patch(name, stand_in))
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # as in the processes: more compute other last bits
            try:
                runpy.run_path(str(self.path), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def finish(process):
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def at_step(number, act, optimizer_class=torch.optim.SGD):
    """An optimizer's step before which, the time of this number, something happens."""
    step = optimizer_class.step
    taken = itertools.count(1)

    def acting(optimizer):
        if next(taken) == number:
            act(optimizer)
        step(optimizer)

    return acting


def interrupt(_):
    raise KeyboardInterrupt


def option_words(name, value):
    """The words of a command line that give a constant a value."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *str(value).strip("()").split(", ")]


ODD_STYLE = {"savefig.format": "pdf", "figure.facecolor": "red"}  # that a user may have


def size_of_white_png(path):
    """The width and the height of a picture that has no user's style."""
    import matplotlib.image  # not before a script that is run here

    picture = matplotlib.image.imread(path)
    assert (picture[0, 0] == 1).all()
    return picture.shape[1], picture.shape[0]


def files(folder):
    """What the files in a folder hold, by name; not the locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}
