"""How much ghostnet.py survives on this machine: counts, and exit code 1 if anything was lost.

    python tests/reliability.py        a few minutes on two cores

A run is ended again and again, at random moments and inside of saves: its file must then load with
no epoch less, and in the end equal a run never stopped, to the bit. A checkpoint with a flipped bit
must be refused or hold the same; a file that was cut or is no run's must be refused; a command line
must be runs or a message. Processes that start at once without data must share one download and one
list of runs. The tests do the same a few times.
"""

import contextlib
import io
import math
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import Script, finish, write_tiny_cifar10

import ghostnet

KILLS = 20  # of one run, half of them inside a save
FLIPS = 300  # of single bits, half of them in each of two checkpoints
DIRECTORY = 60_000  # bytes at the end of a checkpoint that hold the directory of its archive
COMMAND_LINES = 300
PROCESSES = 8  # that start at once
Attempts = Iterator[tuple[str, bool]]  # what was tried, and whether nothing was lost


def contents(path: Path) -> tuple:
    """All that a repeated run must repeat to the bit: not the measured seconds."""
    checkpoint = ghostnet.read_checkpoint(path)
    bits = []
    for name, tensor in [*checkpoint.model.items(), *checkpoint.momentum.items()]:
        bits.append((name, tensor.dtype, tensor.numpy().tobytes()))
    return checkpoint.constants, {**checkpoint.history, "seconds": None}, bits


def epochs_in(path: Path) -> int:
    """How far a run has come; less than nothing where its file cannot be read."""
    if not path.exists():
        return 0
    try:
        return ghostnet.read_checkpoint(path).epochs
    except ghostnet.UserError:
        return -1


def kills(script: Script, number: int, rng: random.Random) -> Attempts:
    """Start a run and end it, again and again; let it finish; train it once without a stop."""
    script.edit("SAVE_SECONDS = 10", "SAVE_SECONDS = 0")
    command = ("resnet32", "--batch-size", 25, "--epochs", 8 * number)
    path = script.checkpoints / f"resnet32-epochs{8 * number}-batch_size25.pth"
    for attempt in range(number):
        before = epochs_in(path)
        if attempt % 2:
            done = script.run(*command, patches="quick,kill_inside_a_save")
            inside = path.with_name(f".{path.name}.tmp").exists()
            ended = done.returncode == -SIGKILL and inside
            yield "killed inside a save", ended and epochs_in(path) == before
        else:
            stop = rng.choice([SIGKILL, SIGTERM])
            process = script.start(*command)
            assert any(": epoch " in line for line in process.stdout)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(stop)
            ended = finish(process).returncode == -stop
            yield f"{stop.name} at random", ended and before < epochs_in(path) < 8 * number
    done = script.call(*command)
    yield "goes on in the end", (done.returncode, done.stderr) == (0, "")
    yield "goes on where it was", "epoch 1/" not in done.stdout
    yield "leaves nothing behind", not list(script.checkpoints.glob("*.tmp"))
    stopped = contents(path)
    path.unlink()
    script.call(*command)
    yield "equals a run never stopped", contents(path) == stopped


def first_starts(script: Script, number: int) -> Attempts:
    """Start processes at once where there is a finished run, others are missing, and no data."""
    script.call("resnet32", "--epochs", 1)
    shutil.rmtree(script.data)
    (script.folder / "meeting").mkdir()
    meeting = {"MEETING": str(script.folder / "meeting"), "NUMBER": str(number)}
    command = ("resnet32", "--epochs", 1, "--seeds", *range(number))
    trained = 0
    downloads = 0
    processes = [script.start(*command, patches="quick,meet", **meeting) for _ in range(number)]
    for process in processes:
        done = finish(process)
        shown = "| resnet32-epochs1 " in done.stdout
        yield "one of several first starts", done.returncode == 0 and shown
        trained += done.stdout.count(": epoch 1/1")
        downloads += done.stdout.count("downloading")
    yield "one download", downloads == 1
    yield "each run trained once", trained == number - 1


def flips(whole: Path, number: int, rng: random.Random) -> Attempts:
    """Flip bits, every other one in the directory of the archive, which ends the file."""
    expected = contents(whole)
    content = whole.read_bytes()
    path = whole.with_name("flipped")
    for attempt in range(number):
        flipped = bytearray(content)
        span = DIRECTORY if attempt % 2 else len(content)
        flipped[-1 - rng.randrange(span)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            yield "flipped bits", contents(path) == expected
        except ghostnet.UserError:
            yield "flipped bits", path.read_bytes() == flipped


class Bomb:
    """Unpickled, it ends the process."""

    def __reduce__(self):
        return sys.exit, ("code in a file was run",)


def foreign_files(whole: Path) -> dict[str, bytes]:
    """Contents that no run may go on from, by what is wrong."""
    content = whole.read_bytes()
    fields = torch.load(whole, weights_only=True)
    constants = fields["constants"]
    history = fields["history"]
    model = fields["model"]
    files = {"empty": b"", "a web page": b"<html>", "code": pickle.dumps(Bomb())}
    for length in (1, 100, len(content) // 2, len(content) - 22, len(content) - 1):
        files[f"cut to {length} bytes"] = content[:length]
    changed = {
        "another network": {"constants": {**constants, "network": "vgg16"}},
        "a constant that no run has": {"constants": {**constants, "lr": -1.0}},
        "an unknown constant": {"constants": {**constants, "dropout": 0.5}},
        "more epochs than there are": {"history": {name: 9 * history[name] for name in history}},
        "no epochs": {"history": {name: [] for name in history}},
        "a ragged history": {"history": {**history, "seconds": [1.0, 1.0, 1.0]}},
        "an infinite loss": {"history": {**history, "loss": [math.inf]}},
        "a nested history": {"history": {name: [history[name]] for name in history}},
        "a weight less": {"model": dict([*model.items()][1:])},
        "no numbers": {"model": {name: t * math.nan for name, t in model.items()}},
        "code in a known place": {"trained_on": Bomb()},
        "one field more": {"more": 1},
    }
    momentum = fields["momentum"]
    if momentum:  # of a run that is not finished
        changed["no momentum"] = {"momentum": {}}
        changed["another momentum"] = {"momentum": dict.fromkeys(momentum, torch.ones(1))}
    saved = {"a tensor": torch.zeros(3), "weights alone": model}
    for name, change in changed.items():
        saved[name] = {**fields, **change}
    for part in fields:
        saved[f"nothing as {part}"] = {**fields, part: None}
        saved[f"without {part}"] = {key: fields[key] for key in fields if key != part}
    for name, value in saved.items():
        file = io.BytesIO()
        torch.save(value, file)
        files[name] = file.getvalue()
    return files


def foreigners(whole: Path) -> Attempts:
    path = whole.with_name("foreign")
    for content in foreign_files(whole).values():
        path.write_bytes(content)
        yield "cut and foreign files", epochs_in(path) < 0 and path.read_bytes() == content


OPTIONS = [f"--{name.replace('_', '-')}" for name in vars(ghostnet.Constants())]
OPTIONS += ["gr_cosine", "resnet32", "gv_s3", "--seeds", "--image-dir", "--device", "--frehs"]
VALUES = ["1", "3", "512", "0.5", "1e-3", "1 2", "vgg16", "cosine", "cpu"]
VALUES += ["", "0", "-1", "nan", "inf", "1e400", "9" * 5000, "two\nlines", "-x"]


def try_command_line(words: list[str]) -> dict | str:
    """The runs of a command line, or the text that refuses it; whatever else is raised is a bug."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", ["ghostnet.py", *words]),
    ):
        try:
            return ghostnet.name_runs(tyro.cli(ghostnet.Arguments), {})
        except ghostnet.UserError as error:
            return str(error)
        except SystemExit as stop:
            assert stop.code == 2, stop.code
    return err.getvalue()


def command_lines(number: int, rng: random.Random) -> Attempts:
    """Up to three options each, with values that may be theirs, or with random characters."""
    names = {}
    for _ in range(number):
        words = []
        for _ in range(rng.randint(0, 3)):
            noise = "".join(map(chr, rng.choices(range(1, 0xD800), k=5)))
            words += [rng.choice(OPTIONS), *rng.choice([*VALUES, noise]).split(" ")]
        answer = try_command_line(words)
        if isinstance(answer, str):
            yield "command lines, refused", len(answer.strip()) > 0
        else:
            same = all(names.setdefault(name, answer[name]) == answer[name] for name in answer)
            yield "command lines, runs with names of their own", same


def main() -> int:
    tried = Counter()
    lost = Counter()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tiny_cifar10(folder / "tiny")
        whole = Script(folder / "whole", data)
        whole.call("resnet32", "gr_cosine", "--epochs", 1)
        attempts = [command_lines(COMMAND_LINES, rng)]
        for path in whole.checkpoints.glob("*.pth"):
            attempts += [flips(path, FLIPS // 2, rng), foreigners(path)]
        attempts.append(kills(Script(folder / "killed", data), KILLS, rng))
        attempts.append(first_starts(Script(folder / "started", data), PROCESSES))
        for kind in attempts:
            for what, survived in kind:
                tried[what] += 1
                lost[what] += not survived
    for what in tried:
        print(f"{what}: {tried[what]}, lost: {lost[what]}")
    print("something was lost" if lost.total() else "nothing was lost")
    return int(lost.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
