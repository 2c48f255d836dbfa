"""What the tests and benchmarks/reliability.py share: a tiny CIFAR-10, the script on it, and what may go wrong."""

import contextlib
import copy
import dataclasses
import io
import itertools
import math
import os
import pickle
import random
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
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
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

    def run_and_die(self, place, suffix, *arguments):
        """Run until SIGKILL at this place inside the first save of a file with this suffix."""

        def before():
            accept_any_checksum() if suffix == ".png" else without_summary()
            die_at(place, suffix)

        return self.fork(*arguments, before=before).wait()

    def download(self, archive, seconds, *arguments):
        """Start where there is no data: what is downloaded takes these seconds to unpack."""

        def before():
            without_summary()
            fake_download(archive, seconds)

        return self.fork(*arguments, before=before)


def without_summary():
    """Leave out of this process's script what takes its time: reports and pictures."""
    accept_any_checksum()
    for name in ("report", "draw_curves", "draw_ghosts"):
        setattr(ghostnet, name, lambda *_, **__: None)


def wait_for_epoch(process):
    """Return when the process has saved an epoch; False when it ended instead."""
    return any(": epoch " in line for line in process.stdout)


# ----------------------------------------------------------------------------------- training inside of this process


def few_images(data):
    """40 and 20 images of a data set."""
    few = copy.copy(data)
    few.train_images, few.train_labels = data.train_images[:40], data.train_labels[:40]
    few.test_images, few.test_labels = data.test_images[:20], data.test_labels[:20]
    return few


def train(path, constants, data):
    return ghostnet.train(path, constants, data, torch.float32, ghostnet.Arguments())


def train_one_epoch(path, constants, data):
    """Train and stop after the first epoch, which is saved."""
    with mock.patch.object(data, "epoch_plan", side_effect=[data.epoch_plan()]), contextlib.suppress(StopIteration):
        train(path, constants, data)


def real_files(folder, constants, data):
    """A half-trained and a finished file, and what is done with an edited one: "equal" where that changes nothing."""
    half, whole, finished = folder / "half.pth", folder / "whole.pth", folder / "finished.pth"
    at_once = dataclasses.replace(constants, epochs=1)
    train_one_epoch(half, constants, data)
    whole.write_bytes(half.read_bytes())
    train(whole, constants, data)
    ends, holds = result(whole), dataclasses.asdict(train(finished, at_once, data))

    def use_half(path):
        train(path, constants, data)
        return "equal" if same(result(path), ends) else "different"

    def use_finished(path):
        checkpoint = train(path, at_once, data)
        ghostnet.results_table({path.stem: checkpoint})
        checkpoint.network(torch.device("cpu"))
        return "equal" if same(dataclasses.asdict(checkpoint), holds) else "different"

    return {"half-trained": (half, use_half), "finished": (finished, use_finished)}


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


def is_one_line(text):
    """Whether a text, or what the script says of an error, is one line."""
    if isinstance(text, Exception):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            ghostnet.complain(str(text))
        text = said.getvalue()
    return len(text.splitlines()) == 1


def complaint(process, code):
    """The one line on stderr of a process that ended with this exit code."""
    assert process.returncode == code, process.stderr
    assert process.stderr.startswith("ghostnet.py: ")
    assert is_one_line(process.stderr)
    return process.stderr


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


def packed(content, change=lambda name, entry: entry):
    """The same archive with changed entries and right checksums."""
    file = io.BytesIO()
    options = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w", **options) as copied:
        for entry in archive.infolist():
            copied.writestr(entry.filename, change(entry.filename, archive.read(entry)))
    return file.getvalue()


def two_directories(seen, hidden):
    """One archive of two: `seen` where the directory is looked for by its size, `hidden` where by its offset."""
    with zipfile.ZipFile(io.BytesIO(seen)) as archive, zipfile.ZipFile(io.BytesIO(hidden)) as other:
        start, other_start = archive.start_dir, other.start_dir
    directory, end = bytearray(seen[start:-22]), bytearray(seen[-22:])
    before = hidden[:other_start].ljust(start)  # then no offset below is negative
    struct.pack_into("<L", end, 16, len(before))
    position = 0
    while position < len(directory):
        (offset,) = struct.unpack_from("<L", directory, position + 42)
        struct.pack_into("<L", directory, position + 42, offset + len(before) - start)
        position += 46 + sum(struct.unpack_from("<3H", directory, position + 28))
    return before + hidden[other_start:-22] + seen[:start] + bytes(directory + end)


class Claim:
    """A tensor of another size than its storage."""

    def __init__(self, *size):
        self.size = size

    def __reduce__(self):
        strides = torch.empty(self.size, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (torch.zeros(1)._typed_storage(), 0, self.size, strides, False, {})


def hostile_archives(whole):
    """Contents with right checksums that would take memory or time, or that lie about what they hold."""

    def records(change):
        return packed(content, lambda name, entry: change(entry) if "/data/" in name else entry)

    def pickled(code):
        return packed(content, lambda name, entry: code if name.endswith("data.pkl") else entry)

    def claims(*size):
        return saved(checkpoint | {"model": checkpoint["model"] | {last: Claim(*size)}})

    content, checkpoint = whole.read_bytes(), torch.load(whole, weights_only=True)
    last, attribute = [*checkpoint["model"]][-1], copy.deepcopy(checkpoint)
    attribute["model"]._metadata = 5
    gigabyte = packed(content, lambda name, entry: bytes(2**30) if name.endswith("data/1") else entry)
    lists = pickled(b"\x80\x02" + b"]" * 10**8 + b".")
    allocates = pickled(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.")
    upper = pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.").replace(b"data.pkl", b"data.PKL")
    nested_key = b"\x80\x02})" + 64 * b"q\x01h\x01\x86" + b"Ns."
    return {
        "unpacks to a gigabyte": gigabyte,
        "hides what unpacks to a gigabyte": two_directories(packed(content), gigabyte),
        "a pickle of a hundred million lists": lists,
        "hides such a pickle": two_directories(packed(content), lists),
        "a pickle that allocates gigabytes": allocates,
        "such a pickle with a name in capitals": upper,
        "a key that cannot be hashed in a lifetime": pickled(nested_key),
        "a tensor larger than its storage": claims(*checkpoint["model"][last].shape),
        "a tensor of gigabytes": claims(2**31),
        "a tensor of a terabyte": claims(2**38),
        "records cut short": records(lambda entry: entry[:99]),
        "records twice as long": records(lambda entry: 2 * entry),
        "no records": records(lambda entry: b""),
        "a state_dict with an attribute": saved(attribute),
    }


def tried(content, path, use, timeout=20):
    """What becomes of a file with this content in a process of its own: "refused", what `use` answers, or trouble."""
    path.write_bytes(content)

    def work():
        before = peak()
        try:
            answer = use(path)
        except ghostnet.UserError as error:
            whole = is_one_line(error) and str(path) in str(error) and path.read_bytes() == content
            answer = "refused" if whole else f"refused by {error}"
        print(answer if peak() - before < LARGEST_GROWTH else f"took {(peak() - before) >> 20} MiB")

    done = Forked(work).wait(timeout)
    if done.returncode == 0 and not done.stderr:
        return done.stdout.splitlines()[-1]
    return "hung" if done.returncode is None else f"exit code {done.returncode}: {done.stderr[-300:]}"


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------------------------ edited contents


def nested(container):
    """Twice the same in itself, 64 deep: 2**64 items for whom does not see that they are the same."""
    inner = container(())
    for _ in range(64):
        inner = container((inner, inner))
    return inner


STRANGE = {  # what a value is replaced by; functions are of the tensor that stands there, or of another one
    "None": None,
    "text": "text",
    "two lines": "a\nb",
    "long text": 10**5 * "x",
    "bytes": b"bytes",
    "an empty list": [],
    "an empty dictionary": {},
    "an empty tuple": (),
    "a set": {1},
    "a nested tuple": nested(tuple),
    "a nested list": nested(list),
    "a huge integer": 10**400,
    "a huge number": 1e300,
    "a negative number": -1,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a complex number": 1j,
    "a truth value": True,
    "a type": torch.float32,
    "a size": torch.Size([3]),
    "a number as tensor": torch.tensor(1.0),
    "a parameter": lambda t: torch.nn.Parameter(t.float()),
    "a smaller tensor": lambda t: t.flatten()[1:].clone(),
    "a larger tensor": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "an empty tensor": lambda t: t.new_empty(0),
    "another shape": lambda t: t[None],
    "float64": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "complex64": lambda t: t.to(torch.complex64),
    "no number in each place": lambda t: t * float("nan"),
    "infinity in one place": lambda t: torch.cat([t.new_tensor([1]) * float("inf"), t.flatten()[1:]]).view(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "expanded": lambda t: t.new_zeros(()).expand(t.shape if t.ndim else 3),
    "expanded to gigabytes": lambda t: t.new_zeros(()).expand(2**29),
    "expanded to a terabyte": lambda t: t.new_zeros(()).expand(2**38),
    "a part of a storage": lambda t: torch.cat([t.flatten(), t.flatten()])[: t.numel()].view(t.shape),
    "with a gradient": lambda t: t.float().requires_grad_(),
}
MISSING, ADDED = "an item less", "an item more"


def places(tree, at=()):
    """The paths of all leaves and containers in a checkpoint."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [at, *itertools.chain.from_iterable(places(item, (*at, key)) for key, item in items)]


def edits(checkpoint, plain, tensors, rng):
    """Pairs of a place and what is done there: so many outside of the tensors and so many of them (None: all)."""
    within = [place for place in places(checkpoint) if len(place) == 2 and place[0] in ("model", "momentum")]
    outside = [place for place in places(checkpoint) if place not in within]
    kinds, pairs = rng.sample([*STRANGE, MISSING, ADDED], len(STRANGE) + 2), []
    for group, number in ((outside, plain), (within, tensors)):
        group, period = rng.sample(group, len(group)), math.lcm(len(group), len(kinds))
        for i in range(len(group) * len(kinds) if number is None else number):  # each pair once in the end
            pairs.append((group[i % len(group)], kinds[(i + i // period) % len(kinds)]))
    return [pair for pair in pairs if pair != (("trained_on",), "text")]  # which is a line of text as any other


def edited(tree, place, kind):
    """A checkpoint in which one value is another one."""
    if place:
        key, *rest = place
        items = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
        items[key] = edited(tree[key], rest, kind)
        return tuple(items) if isinstance(tree, tuple) else items
    if kind in (MISSING, ADDED) and isinstance(tree, dict):
        return {**tree, "more": 1.0} if kind == ADDED else dict([*tree.items()][:-1])
    if kind in (MISSING, ADDED):
        items = [*tree] if isinstance(tree, (list, tuple)) else [tree]
        items = [*items, 1.0] if kind == ADDED else items[:-1]
        return tuple(items) if isinstance(tree, tuple) else items
    tensor = tree if isinstance(tree, torch.Tensor) else torch.zeros(3)
    return STRANGE[kind](tensor) if callable(STRANGE[kind]) else STRANGE[kind]


# -------------------------------------------------------------------------------------------------- command lines


def spelled(values):
    return [f"{option} {value}".split() for option, all_values in values.items() for value in all_values]


GOOD = spelled({
    "": [*ghostnet.EXPERIMENTS, "gr_cosine resnet56", "gv_cosine gv_cosine"],
    "--network": ["resnet32", "resnet56", "vgg16"],
    "--ratio": ["1", "2", "3", "16", "20", "512"],
    "--dw-kernel-size": ["1", "3", "5", "13"],
    "--schedule": ["cosine", "multistep"],
    "--milestones": ["", "1", "12 3", "1 23", "1 2 3", "123", "100 150"],
    "--epochs": ["1", "10", "200", "1000000"],
    "--lr": ["0.1", "1e-1", "0.01", "1", "10", "1e9", "1e-9"],
    "--momentum": ["0", "0.5", "9e-1", "0.9", "0.99"],
    "--weight-decay": ["0", "-0.0", "5e-4", "0.0005"],
    "--batch-size": ["1", "128", "50000"],
    "--seed": ["0", "1", "2147483647"],
    "--seeds": ["", "0", "1 0", "0 1 2", "1 1"],
    "--data-dir": ["data", ".", "/", "é/☃"],
    "--checkpoint-dir": ["checkpoints", "a/b/../c"],
    "--image-dir": ["images"],
    "--device": ["auto", "cpu", "cuda", "mps"],
    "--precision": ["auto", "bfloat16", "float16", "float32"],
    "--cuda-graph": [""],
    "--no-cuda-graph": [""],
    "--fresh": [""],
    "--": [""],
})
BAD = spelled({
    "": ["resnet101", "../gr_cosine", "0.1", "--frehs", "-x", "--lr=0.1=0.2", "--constants.lr 0.1", "--nesterov"],
    "--network": ["alexnet", "resnet20", ""],
    "--ratio": ["513", "0", "-1", "1.5", "9" * 500],
    "--dw-kernel-size": ["2", "0", "-3", "15", "63"],
    "--schedule": ["one_cycle"],
    "--milestones": ["0 5", "5 5", "9999999 10000000", "1,2", "3 2 1"],
    "--epochs": ["1000001", "0", "1e3", "1 2"],
    "--lr": ["1e309", "1e30", "1e-320", "0", "-1", "nan", "inf", "-inf", "0,1"],
    "--momentum": ["1", "-0.1", "nan"],
    "--weight-decay": ["inf", "-1e-4", "nan"],
    "--batch-size": ["50001", "0", "-128"],
    "--seed": ["2147483648", "-1", "9" * 5000],
    "--seeds": ["-1", "x", "0 1 -1"],
    "--device": ["", "cuda:99", "tpu", "meta"],
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
