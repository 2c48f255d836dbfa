"""How much ghostnet.py survives on this machine: one Markdown table, and exit code 1 if anything was lost.

    python benchmarks/reliability.py                          about ten minutes on two cores
    python benchmarks/reliability.py --kills 200 --flips 5000

Three runs are trained for 20 epochs (or as many as --kills) on a tiny CIFAR-10: uninterrupted, and at the same time by
one command that SIGKILL ends again and again, by turns at a random moment and inside a save: while the file is written,
before it is synced and before it is renamed. A kill is survived if all checkpoints load after it with no epoch less. At
the end all must equal the uninterrupted runs to the bit, without the measured seconds.

A start without data is killed while it unpacks them, which is survived if the next start finishes; and two processes
start at once without data.

Then one bit of a checkpoint is flipped, which is survived if the file is refused by one line or loads to the same
tensors. Damaged files (cut, without a part, of another network) and hostile ones (pickles that run code) must be
refused by one line. Values in half-trained and finished checkpoints are replaced by ones of other kinds: constants and
histories by each of them, tensors by some. Such a file, and an archive that lies about its sizes, must be refused by
one line and stay as it is, or end as the true one to the bit, in a process of its own and without taking a gigabyte.
Random command lines must give runs or one line.

Memory growth is that of an epoch's peak resident set in an uninterrupted run, from the median of the first third of the
epochs to that of the last. A tenth of the latter counts as lost. It is read from /proc, so this needs Linux.
"""

import contextlib
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from statistics import median

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from harness import (
    PLACES,
    Script,
    accept_any_checksum,
    edited,
    edits,
    few_images,
    ghostnet,
    hostile_archives,
    hostile_files,
    is_one_line,
    random_arguments,
    random_flips,
    real_files,
    refusal,
    result,
    same,
    saved,
    survives_flip,
    tried,
    try_command_line,
    wait_for_epoch,
    write_archive,
    write_tiny_cifar10,
)

RUNS = ["gr_cosine", "resnet56", "gv_cosine"]
FEW = ["--batch-size", "10", "--lr", "0.01"]
DYING = Path(__file__).resolve().parent.parent / "tests" / "dying.py"


@dataclass(frozen=True)
class Arguments:
    kills: int = 20
    """SIGKILLs, half of them inside a save"""
    flips: int = 500
    """single bits of a checkpoint, each flipped in a copy"""
    edits: int = 100
    """edited tensors in each of three checkpoints; all other values are edited in all ways in one of them"""
    downloads: int = 12
    """kills while the data are unpacked"""
    command_lines: int = 300
    """random command lines"""
    seed: int = 0
    """of all random choices"""


class Tally:
    """The rows of the table."""

    def __init__(self):
        self.rows = {}

    def add(self, what: str, survived: bool) -> None:
        tried, lost = self.rows.get(what, (0, 0))
        self.rows[what] = tried + 1, lost + (not survived)

    def __str__(self):
        lines = ["| what | tried | survived | lost |", "| --- | --- | --- | --- |"]
        lines += [f"| {what} | {tried} | {tried - lost} | {lost} |" for what, (tried, lost) in self.rows.items()]
        return "\n".join(lines)

    @property
    def lost(self) -> int:
        return sum(lost for _, lost in self.rows.values())


def epochs_held(script: Script) -> dict[str, float]:
    """The number of epochs in every checkpoint; not a number where one does not load."""
    held = {}
    for path in script.checkpoints.glob("*.pth"):
        try:
            held[path.name] = ghostnet.read_checkpoint(path).epochs
        except ghostnet.UserError:
            held[path.name] = math.nan
    return held


def soak(script: Script, command: list[str], kills: int, rng: random.Random, tally: Tally) -> None:
    """Start the command and kill it, again and again, then let it finish."""
    for number in range(kills):
        before = epochs_held(script)
        if number % 2:
            process = script.run(*command, launcher=[DYING, rng.choice(PLACES), ".pth"])
        else:
            process = script.start(*command)
            for _ in range(rng.randint(0, 2)):
                wait_for_epoch(process)
            time.sleep(rng.uniform(0, 1))
            process.kill()
            process.communicate()
        after = epochs_held(script)
        if process.returncode == -SIGKILL:  # else it was finished before
            whole = not any(map(math.isnan, after.values()))
            no_less = all(after.get(name, 0) >= epochs for name, epochs in before.items())
            tally.add(f"SIGKILL {'inside a save' if number % 2 else 'at a random moment'}", whole and no_less)
    tally.add("start after the last kill, finishes", script.run(*command).returncode == 0)


def peak_mib(process: subprocess.Popen) -> float:
    """The largest resident set that a process has had since the last call."""
    proc = Path(f"/proc/{process.pid}")
    peak = re.search(r"VmHWM:\s*(\d+) kB", (proc / "status").read_text())[1]
    (proc / "clear_refs").write_text("5")
    return int(peak) / 1024


def memory_growth(process: subprocess.Popen, epochs: int) -> tuple[float, float]:
    """MiB by which the median peak of an epoch grows from the first to the last third, and the latter; waits."""
    _, *peaks = [peak_mib(process) for _ in range(epochs - 1) if wait_for_epoch(process)]
    process.communicate()
    first, last = median(peaks[: epochs // 3]), median(peaks[-(epochs // 3) :])
    return last - first, last


def first_starts(folder: Path, data_dir: Path, number: int, tally: Tally) -> None:
    """Start without data: killed while unpacking and started again; and two at once."""
    archive, command = write_archive(data_dir, folder / "archive.tar"), ["gr_cosine", "--epochs", "1", *FEW]
    trained = Script(folder / "first", folder / "first" / "data")
    trained.folder.mkdir()
    trained.download(archive, 0, *command).wait()

    def script(number, data):
        script = Script(folder / f"start{number}", folder / data)
        script.checkpoints.mkdir(parents=True)
        for path in trained.checkpoints.glob("*.pth"):  # which is evaluated: that is quick
            (script.checkpoints / path.name).write_bytes(path.read_bytes())
        return script

    for i in range(number):
        started = script(i, f"data{i}")
        process = started.download(archive, 60, *command)
        unpacking = process.wait_for("unpacking")
        process.send_signal((SIGKILL, SIGINT, SIGTERM)[i % 3])
        process.wait()
        again = started.download(archive, 0, *command).wait()
        whole = again.returncode == 0 and not again.stderr and "test accuracy" in again.stdout
        tally.add("kill while unpacking, then a start", unpacking and whole)
    for i in range(number // 3):
        first = script(f"{i}a", f"shared{i}").download(archive, 1, *command)
        second = script(f"{i}b", f"shared{i}").download(archive, 1, *command)
        for process in (first.wait(), second.wait()):
            whole = process.returncode == 0 and not process.stderr and "test accuracy" in process.stdout
            tally.add("process of two at the first start", whole)


def edit(folder: Path, data_dir: Path, number: int, rng: random.Random, tally: Tally) -> None:
    """Edit contents of real checkpoints and try what comes of it: all that is no tensor in all ways, else by chance."""
    data, path = few_images(ghostnet.Cifar10(data_dir, torch.device("cpu"))), folder / "edited.pth"
    for run, plain in (("resnet32", None), ("gr_cosine", number)):
        (folder / run).mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            files = real_files(folder / run, replace(ghostnet.EXPERIMENTS[run], epochs=2), data)
        if plain is None:
            del files["finished"]
        for kind, (whole, use) in files.items():
            checkpoint, lies = torch.load(whole, weights_only=True), hostile_archives(whole)
            pairs = edits(checkpoint, plain, number, rng)
            for what in [*pairs, *lies]:
                content = lies[what] if what in lies else saved(edited(checkpoint, *what))
                answer = tried(content, path, use)
                row = "archive that lies" if what in lies else f"edited value in a {kind} file"
                tally.add(row, answer in ("refused", "equal"))
                if answer not in ("refused", "equal"):
                    say(f"{run}, {row}, {what}: {answer}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Arguments) -> int:
    rng, tally, epochs = random.Random(arguments.seed), Tally(), max(20, arguments.kills)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        data_dir = write_tiny_cifar10(folder / "data", train=50, test=20)
        killed, uninterrupted = (Script(folder / name, data_dir) for name in ("killed", "uninterrupted"))
        for script in (killed, uninterrupted):
            script.folder.mkdir()
        options = ["--epochs", str(epochs), *FEW]
        soaked = pool.submit(soak, killed, RUNS + options, arguments.kills, random.Random(arguments.seed), tally)

        growths = []
        for run in RUNS:
            say(f"training {run} for {epochs} epochs, uninterrupted and killed")
            growths.append(memory_growth(uninterrupted.start(run, *options), epochs))
        paths = sorted(uninterrupted.checkpoints.glob("*.pth"))

        say("flipping bits")
        whole, path, marker = paths[0], folder / "run.pth", folder / "marker"
        content, expected = whole.read_bytes(), ghostnet.read_checkpoint(whole)
        for position, bit in random_flips(content, arguments.flips, rng):
            tally.add("flipped bit in a checkpoint", survives_flip(content, position, bit, expected, path))
        for content in hostile_files(whole, marker).values():
            path.write_bytes(content)
            line = refusal(path)
            tally.add("damaged or hostile file", line is not None and is_one_line(line))
        tally.add("code in a file, not run", not marker.exists())

        say("trying command lines")
        for _ in range(arguments.command_lines):
            answer = try_command_line(random_arguments(rng))
            tally.add("random command line", isinstance(answer, tuple) or is_one_line(answer))

        say("waiting for the killed runs")
        soaked.result()
        for path in paths:
            equal = same(result(path), result(killed.checkpoints / path.name))
            tally.add("run equal to the uninterrupted one, to the bit", equal)
        largest = f"memory growth, at most {max(growths)[0]:.1f} MiB"
        for growth, peak in growths:
            tally.add(largest, growth < peak / 10)

        torch.set_num_threads(1)  # as in the processes that are forked
        say("starting without data")
        first_starts(folder, data_dir, arguments.downloads, tally)
        say("editing checkpoints")
        accept_any_checksum()
        edit(folder, data_dir, arguments.edits, rng, tally)
    print(tally)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
