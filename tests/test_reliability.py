"""Kills, full disks, odd command lines, two processes on one run: nothing is lost."""

import itertools
import random
import re
import resource
import shutil
import time
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
import torch
from harness import (
    BAD,
    GOOD,
    PLACES,
    Script,
    complaint,
    is_one_line,
    result,
    same,
    saved,
    train,
    train_one_epoch,
    try_command_line,
    without_summary,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ghostnet
from ghostnet import Arguments, Constants, UserError

FEW = ["--batch-size", 30, "--lr", 0.01]  # two steps an epoch
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.fixture
def script(tmp_path, fifty_images):
    return Script(tmp_path, fifty_images)


@pytest.fixture
def twin(tmp_path, script):
    folder = tmp_path / "twin"
    folder.mkdir()
    return Script(folder, script.data_dir)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    """The file of gr_cosine --epochs 1."""
    path = tmp_path_factory.mktemp("finished") / "gr_cosine-epochs1.pth"
    train(path, Constants(epochs=1), few)
    return path


@pytest.fixture(scope="module")
def half(few, tmp_path_factory):
    """The file of gr_cosine --epochs 2 after the first of them."""
    path = tmp_path_factory.mktemp("half") / "gr_cosine-epochs2.pth"
    train_one_epoch(path, Constants(epochs=2), few)
    return path


def write(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def files(folder):
    """The contents of all files in a folder by name, without the locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def on_a_full_disk(size):
    """For a process that can write no file above this size."""

    def before():
        without_summary()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


# ------------------------------------------------------------------------------------------------ resume and saves


@pytest.mark.parametrize(
    ("run", "epochs", "stops"),
    [
        ("gr_cosine", 7, ["write", SIGKILL, "fsync", SIGTERM]),
        ("vgg16", 4, ["replace", SIGINT]),
    ],
)
def test_a_run_stopped_in_every_way_ends_as_one_never_stopped(run, epochs, stops, script, twin):
    command = [run, "--epochs", epochs, *FEW]
    uninterrupted = twin.fork(*command, before=without_summary)
    path = script.checkpoints / f"{run}-epochs{epochs}-lr0.01-batch_size30.pth"
    for stop in stops:
        before, left = path.read_bytes() if path.exists() else None, {*path.parent.glob("*.tmp")}
        if stop in PLACES:
            assert script.run_and_die(stop, ".pth", *command).returncode == -SIGKILL
            assert {*path.parent.glob(f".{path.name}.????????.tmp")} - left  # it was inside a save
            assert (path.read_bytes() if path.exists() else None) == before
            continue
        process = script.fork(*command, before=without_summary)
        assert process.wait_for(": epoch ")
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(stop)
        process = process.wait()
        if stop == SIGKILL:
            assert process.returncode == -SIGKILL
        else:
            assert f"stopped by {stop.name}; the same command" in complaint(process, 128 + stop)
        assert not ghostnet.read_checkpoint(path).finished

    last = script.run(*command)
    assert (last.returncode, last.stderr) == (0, "")
    assert "epoch 1/" not in last.stdout
    uninterrupted = uninterrupted.wait()
    assert (uninterrupted.returncode, uninterrupted.stderr) == (0, "")
    assert same(result(path), result(twin.checkpoints / path.name))


def test_a_run_may_change_its_precision(few, half, tmp_path):
    shutil.copy(half, tmp_path)
    done = ghostnet.train(tmp_path / half.name, Constants(epochs=2), few, torch.float16, Arguments())
    assert "float16" in done.trained_on


def test_a_full_disk_keeps_the_checkpoint(script, half):
    held = {half.name: half.read_bytes()}
    write(script.checkpoints, held)
    line = complaint(script.fork("gr_cosine", "--epochs", 2, before=on_a_full_disk(100_000)).wait(), 2)
    assert f"{half.name} cannot be written (File too large): what it held is kept" in line
    assert files(script.checkpoints) == held


def test_a_full_disk_and_a_kill_keep_the_pictures(script, finished):
    held = {"training_curves.png": b"previous", "ghost_visualization.png": b"previous"}
    write(script.checkpoints, {finished.name: finished.read_bytes()})
    write(script.images, held)

    def before():
        draw = ghostnet.draw_curves
        on_a_full_disk(10_000)()
        ghostnet.draw_curves = draw

    line = complaint(script.fork("gr_cosine", "--epochs", 1, before=before).wait(), 2)
    assert "training_curves.png cannot be written (File too large): what it held is kept" in line
    assert files(script.images) == held
    assert script.run_and_die("write", ".png", "gr_cosine", "--epochs", 1).returncode == -SIGKILL
    (left,) = files(script.images).keys() - held.keys()
    assert re.fullmatch(r"\.training_curves\.png\.[0-9a-f]{8}\.tmp", left)  # it was inside a save
    assert files(script.images).items() >= held.items()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(script, half):
    checkpoint = torch.load(half, weights_only=True)
    checkpoint["constants"]["lr"] = 1e9
    name = "gr_cosine-epochs2-lr1000000000.0.pth"
    held = {name: saved(checkpoint)}
    write(script.checkpoints, held)
    command = ["gr_cosine", "--epochs", 2, "--lr", 1e9, "--precision", "float32"]
    line = complaint(script.fork(*command, before=without_summary).wait(), 2)
    assert "the loss is not finite in epoch 2: try a smaller --lr" in line
    assert files(script.checkpoints) == held
    assert ghostnet.read_checkpoint(script.checkpoints / name).epochs == 1


def test_a_loss_that_is_never_finite_saves_nothing(few, tmp_path):
    with pytest.raises(UserError, match="not finite in epoch 1"):
        train(tmp_path / "run.pth", Constants(epochs=1, lr=1e9, batch_size=10), few)
    assert files(tmp_path) == {}


def test_a_run_does_not_continue_from_a_part_of_its_state(few, half, tmp_path):
    checkpoint = torch.load(half, weights_only=True)
    for part in checkpoint:
        held = {half.name: saved({key: checkpoint[key] for key in checkpoint if key != part})}
        write(tmp_path, held)
        with pytest.raises(UserError, match=f"not a checkpoint of this script .*{part}"):
            train(tmp_path / half.name, Constants(epochs=2), few)
        assert files(tmp_path) == held


# ---------------------------------------------------------------------------------------------------- command line

NAMES = {}  # of all runs that the test below saw, with their constants
TEXT = st.text(st.characters(exclude_categories=(), exclude_characters="\0")).map(lambda word: [word])
TROUBLE = st.one_of(st.sampled_from([*BAD, ["--help"]]), TEXT)
OPTIONS = st.tuples(st.lists(st.sampled_from(GOOD), max_size=4), st.lists(TROUBLE, max_size=1))
ARGUMENTS = (
    OPTIONS.map(lambda options: options[0] + options[1]).flatmap(st.permutations).map(itertools.chain.from_iterable)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ARGUMENTS.map(list))
def test_any_command_line_is_runs_with_names_of_their_own_or_one_line(words):
    try:
        answer = try_command_line(words)
    except SystemExit as stop:
        assert stop.code == 0  # --help
        return
    if isinstance(answer, UserError):
        assert is_one_line(answer)
        return
    arguments, runs = answer
    assert len(runs) == len(set(arguments.experiments)) * max(1, len(set(arguments.seeds)))
    for name, constants in runs.items():
        assert re.fullmatch(r"[\w.+-]+", name)
        assert NAMES.setdefault(name, constants) == constants


def test_every_bad_option_is_refused():
    answers = {" ".join(words): try_command_line(["resnet56", *words]) for words in BAD}
    assert [words for words, answer in answers.items() if not isinstance(answer, UserError)] == []


def test_a_bad_command_line_costs_one_line_and_no_file(script):
    (script.folder / "file").touch()
    bad = [["resnet101"], ["--device", "no\nsuch"], ["gr_cosine", "--checkpoint-dir", "file"], ["--image-dir", "file"]]
    for process in [script.fork(*words).wait() for words in bad]:
        complaint(process, 2)
    assert [path.name for path in script.folder.rglob("*") if path.is_file()] == ["file"]


# ------------------------------------------------------------------------------------------------ several processes


def test_one_run_is_trained_by_one_process(script, twin):
    command = ["gr_cosine", "--epochs", 3, *FEW]
    uninterrupted, first = (each.fork(*command, before=without_summary) for each in (twin, script))
    assert first.wait_for(": epoch ")
    first.send_signal(SIGSTOP)  # and keeps the run
    second = script.fork(*command, before=without_summary).wait()
    first.send_signal(SIGCONT)
    assert "is being trained by another process" in complaint(second, 2)
    for process in (uninterrupted.wait(), first.wait()):
        assert (process.returncode, process.stderr) == (0, "")
    (name,) = files(twin.checkpoints)
    assert same(result(script.checkpoints / name), result(twin.checkpoints / name))


def test_torchrun_spreads_the_runs_and_names_the_one_that_failed(script, twin):
    command = ["resnet32", "--seeds", 0, 1, 2, "--epochs", 1, *FEW]
    alone = twin.fork(*command, before=without_summary)
    together = script.run(*command, launcher=TORCHRUN)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("| run ") == 1
    assert alone.wait().returncode == 0
    names = files(twin.checkpoints).keys()
    assert len(names) == 3
    assert files(script.checkpoints).keys() == names
    assert all(same(result(script.checkpoints / name), result(twin.checkpoints / name)) for name in names)

    damaged, missing = sorted(names)[:2]
    (script.checkpoints / damaged).write_bytes(b"damaged")
    (script.checkpoints / missing).unlink()
    process = script.run(*command, launcher=TORCHRUN)
    assert process.returncode == 1  # torchrun's own
    ours = [line for line in process.stderr.splitlines() if line.startswith("ghostnet.py: ")]
    assert len(ours) == 1
    assert f"checkpoints/{damaged} is not a checkpoint" in ours[0]
    assert process.stdout.count("| run ") == 2  # of what is known, and of all
    assert (script.checkpoints / damaged).read_bytes() == b"damaged"
    assert same(result(script.checkpoints / missing), result(twin.checkpoints / missing))
