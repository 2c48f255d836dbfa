"""Kills, full disks, damaged files, several processes, odd command lines: nothing is lost.

    python -m pytest tests/test_reliability.py --times=10

kills a run 20 times, half of them inside of a save, flips 600 bits of two checkpoints, tries 400
command lines and starts 8 processes at once.
"""

import contextlib
import fcntl
import io
import math
import os
import pickle
import random
import re
import resource
import shutil
import sys
import time
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from unittest import mock

import filelock
import pytest
import torch
import tyro
from tiny import Script, at_step, files, finish, interrupt, option_words
from torchvision.datasets import CIFAR10

import ghostnet

RUN = ("resnet32", "--epochs", 1)
HALF = ("resnet32", "--epochs", 2, "--batch-size", 25)  # two steps an epoch
HALF_NAME = "resnet32-epochs2-batch_size25.pth"
DIRECTORY = 60_000  # bytes at the end of a checkpoint that hold the directory of its archive


@pytest.fixture
def times(request):
    """How often as much as usual is tried."""
    return request.config.getoption("--times")


def complaint(done, code=2):
    """The one line on stderr of a process that ended with this exit code."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ghostnet.py: ")
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """Two finished runs, and one that has trained one epoch of two."""
    script = Script(tmp_path_factory.mktemp("trained") / "script", tiny_data)
    script.call("resnet32", "gr_cosine", "--epochs", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", at_step(3, interrupt))
        script.call(*HALF)
    return script


@pytest.fixture
def known(script, trained):
    """The script beside those files."""
    shutil.copytree(trained.checkpoints, script.checkpoints, dirs_exist_ok=True)
    return script


# -------------------------------------------------------------------------------- stopped, failing


def contents(path):
    """All that a repeated run must repeat to the bit: not the measured seconds."""
    checkpoint = ghostnet.read_checkpoint(path)
    bits = []
    for name, tensor in [*checkpoint.model.items(), *checkpoint.momentum.items()]:
        bits.append((name, tensor.dtype, tensor.numpy().tobytes()))
    return checkpoint.constants, {**checkpoint.history, "seconds": None}, bits


def test_a_run_stopped_at_random_and_inside_of_saves_ends_as_one_never_stopped(script, times):
    script.edit("SAVE_SECONDS = 10", "SAVE_SECONDS = 0")
    epochs = 24 * times
    command = ("resnet32", "--batch-size", 25, "--epochs", epochs)
    path = script.checkpoints / f"resnet32-epochs{epochs}-batch_size25.pth"
    rng = random.Random(0)
    before = 0
    for _ in range(times):
        stop = rng.choice([SIGKILL, SIGTERM])
        process = script.start(*command)
        assert any(": epoch " in line for line in process.stdout)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(stop)
        assert finish(process).returncode == -stop
        reached = ghostnet.read_checkpoint(path).epochs
        assert before < reached < epochs
        before = reached
        assert script.run(*command, patches="quick,kill_inside_a_save").returncode == -SIGKILL
        assert path.with_name(f".{path.name}.tmp").exists()
        assert ghostnet.read_checkpoint(path).epochs == before
    done = script.call(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1/" not in done.stdout
    assert not list(script.checkpoints.glob("*.tmp"))
    stopped = contents(path)
    path.unlink()
    script.call(*command)
    assert contents(path) == stopped


def test_ctrl_c_is_one_line_and_ends_nothing_but_the_script(script, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", at_step(2, interrupt))
    done = script.call("resnet32", "--epochs", 2)  # inside of this process, as by %run
    assert "stopped; the same command" in complaint(done, 130)
    assert ": epoch 2/2" in script.call("resnet32", "--epochs", 2).stdout


def test_a_full_disk_keeps_the_checkpoint(known):
    before = files(known.checkpoints)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        done = known.call(*HALF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{HALF_NAME} cannot be written" in complaint(done)
    assert files(known.checkpoints) == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(known, monkeypatch):
    def spoil(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    before = files(known.checkpoints)
    monkeypatch.setattr(torch.optim.SGD, "step", at_step(2, spoil))
    assert "the loss is not finite in epoch 2: lower --lr" in complaint(known.call(*HALF))
    assert files(known.checkpoints) == before


def test_a_run_that_fails_is_one_line_and_an_exit_code_and_a_cluster_s_processes_all_report(
    known, monkeypatch
):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    monkeypatch.setenv("RANK", "1")  # without torchrun
    monkeypatch.setattr(torch.optim.SGD, "step", at_step(1, fail))
    done = known.call("resnet56", "resnet32", "--epochs", 1)
    assert "resnet56-epochs1: CUDA out of memory. Tried to allocate 20.00 MiB" in complaint(done)
    assert "| resnet32-epochs1 " in done.stdout
    assert "resnet32-epochs1: test accuracy" in done.stdout


# ----------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", [HALF_NAME, "gr_cosine-epochs1.pth"])
def test_a_flipped_bit_is_refused_or_changes_nothing(name, trained, times):
    """Every other one is in the directory of the archive, which ends the file."""
    expected = contents(trained.checkpoints / name)
    content = (trained.checkpoints / name).read_bytes()
    path = trained.folder / "flipped"
    rng = random.Random(0)
    for attempt in range(30 * times):
        flipped = bytearray(content)
        span = DIRECTORY if attempt % 2 else len(content)
        flipped[-1 - rng.randrange(span)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert contents(path) == expected
        except ghostnet.UserError:
            assert path.read_bytes() == flipped


class Bomb:
    """Unpickled, it ends the process."""

    def __reduce__(self):
        return sys.exit, ("code in a file was run",)


def foreign_files(whole):
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


def test_each_bad_file_is_one_line_and_the_other_runs_go_on(known, recwarn):
    bad = foreign_files(known.checkpoints / HALF_NAME)
    for seed, content in enumerate(bad.values(), 1):
        (known.checkpoints / f"resnet32-epochs1-seed{seed}.pth").write_bytes(content)
    before = files(known.checkpoints)
    for seeds, code in (([0], 0), (range(len(bad) + 1), 2)):
        done = known.call(*RUN, "--seeds", *seeds)
        assert done.returncode == code
        lines = done.stderr.splitlines()
        said = [line for line in lines if "is no checkpoint of this script" in line]
        assert len(said) == len(lines) == len(bad)
        assert code == 2 or lines == sorted(lines)  # in the order of the files
        assert not re.search("Checkpoint|Constants|UserError", done.stderr)
        assert "resnet32-epochs1: test accuracy" in done.stdout
        assert files(known.checkpoints) == before
    assert not [warning for warning in recwarn if "ghostnet" in warning.filename]


def test_the_file_of_another_seed_is_refused_and_stays(known):
    path = known.checkpoints / "resnet32-epochs1-seed1.pth"
    shutil.copy(known.checkpoints / "resnet32-epochs1.pth", path)
    before = files(known.checkpoints)
    done = known.call(*RUN, "--seeds", 1, 0)
    assert f"{path} holds another run: move it away" in complaint(done)
    assert "resnet32-epochs1: test accuracy" in done.stdout
    assert files(known.checkpoints) == before


# ------------------------------------------------------------------------ several processes, data


def test_processes_share_a_first_start_and_a_list_of_runs_and_train_each_once(script, times):
    script.call("resnet32", "--epochs", 1)
    shutil.rmtree(script.data)
    (script.folder / "meeting").mkdir()
    number = min(2 * times, 8)
    meeting = {"MEETING": str(script.folder / "meeting"), "NUMBER": str(number)}
    command = ("resnet32", "--epochs", 1, "--seeds", *range(number))
    processes = [script.start(*command, patches="quick,meet", **meeting) for _ in range(number)]
    outs = []
    for process in processes:
        done = finish(process)
        assert (done.returncode, "| resnet32-epochs1 " in done.stdout) == (0, True)
        outs.append(done.stdout)
    assert "".join(outs).count("downloading") == 1
    assert "".join(outs).count(": epoch 1/1") == number - 1


def test_processes_of_torchrun_share_runs_of_which_one_fails_and_the_last_to_end_shows_all(script):
    for run, epochs in (("resnet56", 9), ("resnet32", 1)):
        script.edit(f'    "{run}": Constants(', f'    "{run}": Constants(epochs={epochs}, ')
    bad = script.checkpoints / "resnet32-seed1.pth"
    bad.write_bytes(b"")  # whoever takes it fails
    (script.folder / "meeting").mkdir()
    done = script.run(
        *("resnet56", "resnet32", "--seeds", 0, 1),
        patches="quick,meet",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
        MEETING=str(script.folder / "meeting"),
        NUMBER="3",
    )
    assert done.returncode == 0  # torchrun would end the other processes by a failure
    assert f"{bad} is no checkpoint" in done.stderr
    # One of the processes reports: on two networks, and on what two runs are.
    assert done.stdout.count("results:") == 2
    assert done.stdout.count(" with seed 1 instead of 0") == 2
    last_table = done.stdout[done.stdout.rindex("| run ") :]
    for run, epochs in (("resnet56", 9), ("resnet56-seed1", 9), ("resnet32", 1)):
        assert done.stdout.count(f"{run}: epoch {epochs}/{epochs}") == 1
        assert re.search(rf"^\| {run} .* {epochs}/{epochs} ", last_table, re.M)
    assert {path.name for path in script.images.glob("*.png")} == {"training_curves.png"}


def test_a_locked_run_is_passed_over_and_a_finished_one_tested_without_its_lock(known):
    with contextlib.ExitStack() as stack:
        for run in ("resnet56-epochs1", "resnet32-epochs1"):
            lock = stack.enter_context(open(known.checkpoints / f".{run}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = known.call("resnet56", "resnet32", "--epochs", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet56-epochs1: passed over, another process is training it" in done.stdout
    assert "resnet32-epochs1: test accuracy" in done.stdout
    assert not (known.checkpoints / "resnet56-epochs1.pth").exists()


def test_a_disk_without_locks_is_one_line(known, monkeypatch):
    def fail(_):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "_acquire", fail)
    assert "ghostnet.py: no locks here" in complaint(known.call(*RUN))  # of the pictures
    shutil.rmtree(known.checkpoints)
    assert "resnet32-epochs1: no locks here" in complaint(known.call(*RUN))


def test_complete_data_are_never_written_to(known):
    def times():
        paths = (known.data, *known.data.rglob("*"))
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    assert known.call(*RUN).returncode == 0
    assert known.call(*RUN, "--data-dir", known.data / CIFAR10.base_folder).returncode == 0
    assert times() == before  # not even a lock was made and removed again


def test_a_link_may_stand_for_the_folder_of_the_data(known):
    (known.data / CIFAR10.filename).unlink()
    link = known.folder / "link"
    link.symlink_to(known.data / CIFAR10.base_folder)
    assert known.call(*RUN, "--data-dir", link).returncode == 0
    link.unlink()
    (known.data / CIFAR10.base_folder).rename(known.folder / "elsewhere")
    (known.data / CIFAR10.base_folder).symlink_to(known.folder / "elsewhere")
    assert known.call(*RUN, "--data-dir", known.data / CIFAR10.base_folder).returncode == 0


@pytest.mark.parametrize("torn", [False, True])
def test_an_archive_that_is_there_is_unpacked_without_a_network(torn, known):
    if torn:
        os.truncate(known.data / CIFAR10.base_folder / "data_batch_2", 1000)
    else:
        shutil.rmtree(known.data / CIFAR10.base_folder)
    done = known.call(*RUN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet32-epochs1: test accuracy" in done.stdout


def test_no_data_or_a_file_in_the_place_of_a_folder_is_one_line(known):
    file = known.folder / "file"
    file.touch()
    for option in ("--data-dir", "--checkpoint-dir", "--image-dir"):
        assert str(file) in complaint(known.call(*RUN, option, file))
    shutil.rmtree(known.data)
    line = complaint(known.call(*RUN))  # there is no network either
    assert f"no CIFAR-10 in {known.data}" in line


# ------------------------------------------------------------------------- command lines, constants


CHANGED = {
    "network": "vgg16", "ratio": 3, "dw_kernel_size": 5, "norm_inside": True,
    "schedule": "multistep", "milestones": (1, 2), "epochs": 30, "lr": 0.05, "momentum": 0.8,
    "weight_decay": 1e-4, "cheap_weight_decay": 5e-4, "batch_size": 64, "padding": 2,
    "erasing": 0.25, "seed": 1,
}


def try_command_line(words):
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
            assert stop.code == 2
    return err.getvalue()


def test_every_constant_that_is_changed_is_in_the_name_of_the_run():
    assert CHANGED.keys() == vars(ghostnet.Constants()).keys()
    for key, value in CHANGED.items():
        runs = try_command_line(["gr_cosine", *option_words(key, value)])
        expected = replace(ghostnet.Constants(), **{key: value})
        text = "1_2" if key == "milestones" else value
        assert runs == {f"gr_cosine-{key}{text}": expected}
    multistep = ghostnet.Constants(schedule="multistep")
    assert try_command_line(["gr_multistep"]) == {"gr_multistep": multistep}
    runs = try_command_line(["gr_multistep", "--schedule", "cosine"])  # the default
    assert runs == {"gr_multistep-schedulecosine": ghostnet.Constants()}


OPTIONS = [f"--{name.replace('_', '-')}" for name in CHANGED]
OPTIONS += ["gr_cosine", "resnet32", "gv_s3", "--seeds", "--image-dir", "--device", "--frehs"]
VALUES = ["1", "3", "512", "0.5", "1e-3", "1 2", "vgg16", "cosine", "cpu"]
VALUES += ["", "0", "-1", "nan", "inf", "1e400", "9" * 5000, "two\nlines", "-x"]


def test_any_command_line_is_runs_with_names_of_their_own_or_a_refusal(times):
    """Up to three options each, with values that may be theirs, or with random characters."""
    rng = random.Random(0)
    names = {}
    refused = 0
    for _ in range(40 * times):
        words = []
        for _ in range(rng.randint(0, 3)):
            noise = "".join(map(chr, rng.choices(range(1, 0xD800), k=5)))
            words += [rng.choice(OPTIONS), *rng.choice([*VALUES, noise]).split(" ")]
        answer = try_command_line(words)
        if isinstance(answer, str):
            assert answer.strip()
            refused += 1
        else:
            assert all(names.setdefault(name, answer[name]) == answer[name] for name in answer)
    assert names and refused > 0
    for words in ("resnet101", "../gr_cosine", "--fresh", "--lr=0.1=0.2", "--network",
                  "--epochs 1 2", "--seeds -1"):
        assert isinstance(try_command_line(["resnet56", *words.split()]), str), words


@pytest.mark.parametrize("old, new", [
    ("epochs: int = 1 ", 'epochs: int = "two" '),
    ('= "resnet56"', '= "resnet20"'),
    ('= "cosine"', '= "linear"'),
    ("(100, 150)", "100"),
])
@pytest.mark.filterwarnings("ignore:The field")  # of tyro, about the types
def test_a_constant_of_another_type_or_choice_is_refused(script, old, new):
    script.edit("epochs: int = 200", "epochs: int = 1")  # where it is not, soon ended
    script.edit(old, new)
    done = script.call("gr_cosine")
    assert done.returncode == 2
    assert done.stderr.startswith("ghostnet.py: ")
    assert "training from epoch" not in done.stdout
