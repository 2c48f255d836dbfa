"""What the tests and benchmarks/reliability.py share: a tiny CIFAR-10, the script on it, and what may go wrong."""

import io
import itertools
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ghostnet  # noqa: E402

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PLACES = ["write", "fsync", "replace"]  # inside a save, where dying.py kills


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


class Script:
    """ghostnet.py as a subprocess on the tiny data set, in a folder of its own, with one thread as under torchrun."""

    def __init__(self, folder, data_dir):
        self.folder, self.data_dir = folder, data_dir
        self.checkpoints, self.images = folder / "checkpoints", folder / "images"

    def run_python(self, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, timeout=300)

    def command(self, *arguments, launcher=()):
        """The command line; launcher: what python runs, so that this runs the script, and its arguments."""
        script = [*launcher, ROOT / "tests" / "without_checksums.py", ROOT / "ghostnet.py"]
        return [sys.executable, *map(str, [*script, "--data-dir", self.data_dir, "--device", "cpu", *arguments])]

    def start(self, *arguments, launcher=(), **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"cwd": self.folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}} | pipes | options
        return subprocess.Popen(self.command(*arguments, launcher=launcher), **options)

    def run(self, *arguments, timeout=300, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_and_die(self, place, *arguments):
        """Run until SIGKILL at this place inside the first save."""
        return self.run(*arguments, launcher=[ROOT / "tests" / "dying.py", place])


def wait_for_epoch(process):
    """Return when the process has saved an epoch; False when it ended instead."""
    return any(": epoch " in line for line in process.stdout)


# ---------------------------------------------------------------------------------------------------- comparisons


def result(path):
    """All that a repeated run must repeat to the bit: its checkpoint without the measured seconds."""
    checkpoint = torch.load(path, weights_only=True)
    for record in checkpoint["history"]:
        del record["seconds"]
    return checkpoint


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


# -------------------------------------------------------------------------------------- damaged and hostile files


def refusal(path):
    """The message that refuses a checkpoint or its weights; None where both load."""
    try:
        ghostnet.load_network(path, ghostnet.read_checkpoint(path), torch.device("cpu"))
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
        return same(ghostnet.read_checkpoint(path), expected)
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
    constants, first = checkpoint["constants"], checkpoint["history"][0]
    changes = {
        "newer version": {"version": ghostnet.VERSION + 1},
        "version of another kind": {"version": "1"},
        "no epochs": {"history": []},
        "more epochs than there are": {"history": (constants["epochs"] + 1) * [first]},
        "weights of another network": {"model": ghostnet.vgg16().state_dict()},
        "weights of another kind": {"model": [1, 2, 3]},
        "unknown network": {"constants": constants | {"network": "alexnet"}},
        "unknown constant": {"constants": constants | {"dropout": 0.5}},
        "constant out of range": {"constants": constants | {"lr": -0.1}},
        "constant of another kind": {"constants": constants | {"milestones": [100, 150]}},
        "ratio that the network cannot have": {"constants": constants | {"ratio": 512}},
        "code in a known place": {"version": Bomb(marker)},
        "code in a new place": {"more": Bomb(marker)},
    }
    changes |= {f"history without {key}": {"history": [{k: first[k] for k in first if k != key}]} for key in first}
    files = {name: saved(checkpoint | change) for name, change in changes.items()}
    for key in checkpoint.keys() - {"model"}:  # a file without weights still tells what came out
        files[f"without {key}"] = saved({k: checkpoint[k] for k in checkpoint if k != key})
    others = {"tensor": torch.zeros(3), "weights": checkpoint["model"], "list": [checkpoint], "nothing": None}
    files |= {f"a torch file of something else: {name}": saved(other) for name, other in others.items()}
    files |= {"empty": b"", "web page": b"<html>Not found</html>\n", "pickle": pickle.dumps(first)}
    files |= {"code in a pickle": pickle.dumps(Bomb(marker)), "followed by garbage": content + bytes(range(256)) * 300}
    lengths = [1, 100, len(content) // 2, len(content) - 100_000, len(content) - 22, len(content) - 1]
    return files | {f"cut to {length} bytes": content[:length] for length in lengths}


# -------------------------------------------------------------------------------------------------- command lines


def spelled(values):
    return [f"{option} {value}".split() for option, all_values in values.items() for value in all_values]


GOOD = spelled({
    "": [*ghostnet.EXPERIMENTS, "gr_cosine resnet56", "gv_cosine gv_cosine"],
    "--network": ["resnet20", "resnet32", "resnet56", "vgg16"],
    "--initialization": ["default", "he", "he_zero"],
    "--ratio": ["1", "2", "3", "16", "20"],
    "--dw-kernel-size": ["1", "3", "5", "63"],
    "--schedule": ["cosine", "multistep"],
    "--warmup-epochs": ["0"],
    "--nesterov": [""],
    "--no-decay-norm-and-bias": [""],
    "--label-smoothing": ["0", "0.1"],
    "--cutout": ["0", "8", "32"],
    "--ema": ["0", "0.999"],
    "--holdout": ["0", "5000"],
    "--milestones": ["", "1", "12 3", "1 23", "1 2 3", "123", "100 150"],
    "--epochs": ["1", "10", "200", "1000000"],
    "--lr": ["0.1", "1e-1", "0.01", "1", "10", "1e9", "1e-9"],
    "--momentum": ["0.5", "9e-1", "0.9", "0.99"],
    "--weight-decay": ["0", "-0.0", "5e-4", "0.0005"],
    "--batch-size": ["1", "128", "50000"],
    "--seed": ["0", "1", "9223372036854775807"],
    "--seeds": ["", "0", "1 0", "0 1 2", "1 1"],
    "--data-dir": ["data", ".", "/", "é/☃"],
    "--checkpoint-dir": ["checkpoints", "a/b/../c"],
    "--image-dir": ["images"],
    "--device": ["auto", "cpu", "cuda:99"],
    "--precision": ["auto", "bfloat16", "float16", "float32"],
    "--cuda-graph": [""],
    "--no-cuda-graph": [""],
    "--fresh": [""],
    "--": [""],
})
BAD = spelled({
    "": ["resnet101", "../gr_cosine", "0.1", "--frehs", "-x", "--lr=0.1=0.2", "--constants.lr 0.1"],
    "--network": ["alexnet", ""],
    "--ratio": ["65", "512", "0", "-1", "1.5", "9" * 500],
    "--dw-kernel-size": ["2", "0", "-3", "65"],
    "--initialization": ["xavier"],
    "--schedule": ["one_cycle"],
    "--warmup-epochs": ["1000000", "-1", "0.5"],
    "--nesterov": ["x"],
    "--label-smoothing": ["1", "-0.1", "nan"],
    "--cutout": ["33", "-1"],
    "--ema": ["1", "-0.9", "inf"],
    "--holdout": ["50000", "-1"],
    "--milestones": ["0 5", "5 5", "9999999 10000000", "1,2", "3 2 1"],
    "--epochs": ["1000001", "0", "1e3", "1 2"],
    "--lr": ["1e309", "1e30", "1e-320", "0", "-1", "nan", "inf", "-inf", "0,1"],
    "--momentum": ["1", "-0.1", "nan"],
    "--weight-decay": ["inf", "-1e-4", "nan"],
    "--batch-size": ["50001", "0", "-128"],
    "--seed": ["9223372036854775808", "-1", "9" * 5000],
    "--seeds": ["-1", "x", "0 1 -1"],
    "--device": [""],
    "--precision": ["float64"],
    "--no-cuda-graph": ["x"],
    "--fresh": ["yes"],
})


def random_arguments(rng: random.Random):
    """Up to four good options and at most one bad one, in random order."""
    options = rng.choices(GOOD, k=rng.randint(0, 4)) + rng.choices(BAD, k=rng.randint(0, 1))
    return [word for option in rng.sample(options, len(options)) for word in option]


def try_command_line(arguments):
    """The Arguments and the runs of a command line, or the UserError that refuses it; anything else is raised."""
    with mock.patch.object(sys, "argv", ["ghostnet.py", *arguments]):
        try:
            return ghostnet.command_line()
        except ghostnet.UserError as error:
            return error
