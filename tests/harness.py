"""What the tests and benchmarks/reliability.py share: a tiny CIFAR-10, the script on it, and what may go wrong."""

import contextlib
import copy
import dataclasses
import io
import itertools
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from downloading import fake_download
from dying import die_at
from without_checksums import accept_any_checksum

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ghostnet  # noqa: E402

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PLACES = ["write", "fsync", "replace"]  # inside a save, where dying.py kills
LARGEST_GROWTH = 2**30  # bytes of memory that a process may take for a file, training included


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


def write_archive(data_dir, archive):
    """What there is to download: the data set as one archive."""
    with tarfile.open(archive, "w") as tar:
        tar.add(data_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    return archive


class Forked:
    """A function in a process of its own, forked from this one: nothing is imported anew, and a crash is seen."""

    def __init__(self, work):
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.pid = os.fork()
        if self.pid > 0:
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for number, file in enumerate((self.out, self.err), 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # noqa: SIM115
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def printed(self):
        return os.pread(self.out.fileno(), 2**20, 0).decode(errors="replace")

    def wait_for(self, text, timeout=60):
        """Return when it has printed this; False when it did not."""
        end = time.monotonic() + timeout
        while text not in self.printed() and time.monotonic() < end:
            time.sleep(0.01)
        return text in self.printed()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=120):
        """What came out; the exit code is None where it had to be ended."""
        end, code = time.monotonic() + timeout, None
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        else:
            code = os.waitstatus_to_exitcode(ended[1])
        with self.out, self.err:
            errors = os.pread(self.err.fileno(), 2**20, 0).decode(errors="replace")
            return subprocess.CompletedProcess(None, code, self.printed(), errors)


class Script:
    """ghostnet.py as a subprocess on the tiny data set, in a folder of its own, with one thread as under torchrun."""

    def __init__(self, folder, data_dir):
        self.folder, self.data_dir = folder, data_dir
        self.checkpoints, self.images = folder / "checkpoints", folder / "images"

    def run_python(self, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, timeout=300)

    def options(self, *arguments):
        return [str(word) for word in ("--data-dir", self.data_dir, "--device", "cpu", *arguments)]

    def command(self, *arguments, launcher=()):
        """The command line; launcher: what python runs, so that this runs the script, and its arguments."""
        script = [*launcher, ROOT / "tests" / "without_checksums.py", ROOT / "ghostnet.py"]
        return [sys.executable, *map(str, script), *self.options(*arguments)]

    def start(self, *arguments, launcher=(), environment=(), **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment)
        options = {"cwd": self.folder, "env": environment} | pipes | options
        return subprocess.Popen(self.command(*arguments, launcher=launcher), **options)

    def run(self, *arguments, timeout=300, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def fork(self, *arguments, before=accept_any_checksum):
        """The same in a fork of this process, in which `before` is called."""

        def work():
            os.chdir(self.folder)
            sys.argv = ["ghostnet.py", *self.options(*arguments)]
            before()
            ghostnet.run_as_script(ghostnet.main)

        return Forked(work)

    def run_and_die(self, place, *arguments):
        """Run until SIGKILL at this place inside the first save."""

        def before():
            accept_any_checksum()
            die_at(place)

        return self.fork(*arguments, before=before).wait()

    def download(self, archive, seconds, *arguments):
        """Start where there is no data: what is downloaded takes these seconds to unpack."""
        return self.fork(*arguments, before=lambda: fake_download(archive, seconds))


def wait_for_epoch(process):
    """Return when the process has saved an epoch; False when it ended instead."""
    return any(": epoch " in line for line in process.stdout)


# ---------------------------------------------------------------------------------------------------- comparisons


def result(path):
    """All that a repeated run must repeat to the bit: its checkpoint without the measured seconds and the date."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["history"]["seconds"], checkpoint["trained_on"]
    return checkpoint


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


# -------------------------------------------------------------------------------------- damaged and hostile files


def refusal(path):
    """The message that refuses a checkpoint or its weights; None where both load."""
    try:
        ghostnet.read_checkpoint(path).network(torch.device("cpu"))
    except ghostnet.UserError as error:
        return str(error)


def random_flips(content, number, rng):
    """Positions and bits to flip; every other one in the directory of the archive, which stands at the end."""
    sizes = itertools.cycle([len(content), 60_000])
    return [(len(content) - 1 - rng.randrange(size), rng.randrange(8)) for size in itertools.islice(sizes, number)]


def survives_flip(content, position, bit, expected, path):
    """Whether a checkpoint, with this bit of its content flipped, is refused or still loads as expected."""
    flipped = bytearray(content)
    flipped[position] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        return same(dataclasses.asdict(ghostnet.read_checkpoint(path)), dataclasses.asdict(expected))
    except ghostnet.UserError as error:
        return is_one_line(error)


def is_one_line(error):
    return len(str(error).splitlines()) == 1


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def hostile_files(whole, marker):
    """Contents that must be refused, by name; those that would run code would create the file `marker`."""
    content, checkpoint = whole.read_bytes(), torch.load(whole, weights_only=True)
    constants, history = checkpoint["constants"], checkpoint["history"]
    changes = {
        "no epochs": {"history": {key: [] for key in history}},
        "more epochs than there are": {"history": {key: (constants["epochs"] + 1) * history[key] for key in history}},
        "columns of different lengths": {"history": history | {"loss": 2 * history["loss"]}},
        "weights of another network": {"model": ghostnet.vgg16().half().state_dict()},
        "weights of another kind": {"model": [1, 2, 3]},
        "unknown network": {"constants": constants | {"network": "alexnet"}},
        "unknown constant": {"constants": constants | {"dropout": 0.5}},
        "constant out of range": {"constants": constants | {"lr": -0.1}},
        "constant of another kind": {"constants": constants | {"milestones": [100, 150]}},
        "ratio of another network": {"constants": constants | {"ratio": 512}},
        "code in a known place": {"trained_on": Bomb(marker)},
        "code in a new place": {"more": Bomb(marker)},
    }
    changes |= {f"history without {key}": {"history": {k: history[k] for k in history if k != key}} for key in history}
    changes |= {f"without {key}": {"constants": {k: constants[k] for k in constants if k != key}} for key in constants}
    files = {name: saved(checkpoint | change) for name, change in changes.items()}
    for key in checkpoint:
        files[f"without {key}"] = saved({k: checkpoint[k] for k in checkpoint if k != key})
    others = {"tensor": torch.zeros(3), "weights": checkpoint["model"], "list": [checkpoint], "nothing": None}
    files |= {f"a torch file of something else: {name}": saved(other) for name, other in others.items()}
    files |= {"empty": b"", "web page": b"<html>Not found</html>\n", "pickle": pickle.dumps(constants)}
    files |= {"code in a pickle": pickle.dumps(Bomb(marker)), "followed by garbage": content + bytes(range(256)) * 300}
    lengths = [1, 100, len(content) // 2, len(content) - 100_000, len(content) - 22, len(content) - 1]
    return files | {f"cut to {length} bytes": content[:length] for length in lengths}


def packed(content, change=lambda name, entry: entry, compression=zipfile.ZIP_DEFLATED):
    """The same archive with changed entries and right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w", compression) as copied:
        for entry in archive.infolist():
            copied.writestr(entry.filename, change(entry.filename, archive.read(entry)))
    return file.getvalue()


def two_directories(content, bomb):
    """An archive that is `content` for whom finds its directory by size, `bomb` for whom does by offset."""
    content, start, bomb_start = bytearray(content), *(directory_of(archive) for archive in (content, bomb))
    directory, end, gap = content[start:-22], content[-22:], len(bomb) - 22  # where the end record's offset leads
    if len(directory) != len(bomb[bomb_start:-22]):
        raise ValueError("the directories differ in size")
    before = bomb[:-22].ljust(max(len(bomb), start))  # then no offset below is negative
    bomb_at, shift = bomb_start, len(before) - (len(before) + start - bomb_start)
    position = 0
    while position < len(directory):
        lengths = struct.unpack_from("<3H", directory, position + 28)
        (offset,) = struct.unpack_from("<L", directory, position + 42)
        struct.pack_into("<L", directory, position + 42, offset + shift)
        position += 46 + sum(lengths)
    struct.pack_into("<L", end, 16, bomb_at)
    return bytes(before + content[:start] + directory + end), gap


def directory_of(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.start_dir
