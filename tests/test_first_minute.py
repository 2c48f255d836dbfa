"""The first start, an odd machine, a second process: killed downloads, bad data, no memory, closed streams, signals."""

import contextlib
import copy
import errno
import fcntl
import io
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import matplotlib.figure
import pytest
import torch
import torchvision
from harness import (
    ROOT,
    Forked,
    Script,
    complaint,
    few_images,
    is_one_line,
    train,
    without_summary,
    write_archive,
    write_tiny_cifar10,
)
from without_checksums import accept_any_checksum

import ghostnet
from ghostnet import Checkpoint, Constants, UserError

EVALUATE = ["gr_cosine", "--epochs", 1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.fixture(scope="module")
def archive(fifty_images):
    return write_archive(fifty_images, fifty_images / "archive.tar")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The file of gr_cosine --epochs 1."""
    path, threads = tmp_path_factory.mktemp("finished") / "gr_cosine-epochs1.pth", torch.get_num_threads()
    torch.set_num_threads(1)
    train(path, Constants(epochs=1), few_images(data))
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def script(tmp_path, fifty_images):
    return Script(tmp_path, fifty_images)


@pytest.fixture
def known(script, finished):
    """The script in a folder that holds a finished run, which it evaluates."""
    script.checkpoints.mkdir()
    (script.checkpoints / finished.name).write_bytes(finished.read_bytes())
    return script


# ------------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("stop", [SIGINT, SIGTERM, SIGKILL])
def test_a_start_after_one_stopped_while_unpacking_goes_on(stop, finished, archive, tmp_path):
    script = Script(tmp_path, tmp_path / "data")
    script.checkpoints.mkdir()
    (script.checkpoints / finished.name).write_bytes(finished.read_bytes())
    first = script.download(archive, 60, *EVALUATE)
    assert first.wait_for("unpacking")
    first.send_signal(stop)
    process = first.wait()
    if stop == SIGKILL:
        assert process.returncode == -SIGKILL
    else:
        assert f"stopped by {stop.name}; the same command" in complaint(process, 128 + stop)
    second = script.download(archive, 0, *EVALUATE).wait()
    assert (second.returncode, second.stderr) == (0, "")
    assert "test accuracy" in second.stdout
    third = script.download(archive, 0, *EVALUATE).wait()
    assert third.returncode == 0
    assert "downloading" not in third.stdout
    assert {path.name for path in script.data_dir.iterdir()} <= {"cifar-10-batches-py", ".cifar-10.lock"}


def test_of_two_first_starts_one_downloads_and_the_other_waits(known, finished, archive, tmp_path):
    other = Script(tmp_path / "other", tmp_path / "data")
    known.data_dir = other.data_dir
    other.checkpoints.mkdir(parents=True)
    (other.checkpoints / finished.name).write_bytes(finished.read_bytes())
    first = known.download(archive, 2, *EVALUATE)
    assert first.wait_for("unpacking")
    second = other.download(archive, 0, *EVALUATE)
    processes = [first.wait(), second.wait()]
    assert [(process.returncode, process.stderr) for process in processes] == [(0, ""), (0, "")]
    assert ["downloading" in process.stdout for process in processes] == [True, False]


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)
    with pytest.raises(UserError, match="Network is unreachable"):
        ghostnet.Cifar10(tmp_path / "data", torch.device("cpu"))


def spoil(folder, monkeypatch, how):
    """Make data that are right be what cannot be read; the words that say why."""
    if how == "a folder in a file's place":
        (folder / "data_batch_2").unlink()
        (folder / "data_batch_2").mkdir()
        return "Is a ?[dD]irectory"
    if how == "a file is missing":
        (folder / "data_batch_2").unlink()
        return "No such file"
    if how == "a file in the folder's place":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.touch()
        return "Not a directory"
    if how == "no memory":
        monkeypatch.setattr("numpy.vstack", lambda *_: bytearray(2**62))
        return "MemoryError"
    opened, denied = open, PermissionError(errno.EACCES, "Permission denied")

    def refuse(path, *arguments, **options):  # root may read everything
        if Path(path).name == "data_batch_2":
            raise denied
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    return "Permission denied"


HOWS = ["a folder in a file's place", "a file is missing", "a file in the folder's place", "no memory", "no permission"]


@pytest.mark.parametrize("how", HOWS)
def test_data_that_cannot_be_read_say_why_and_stay(how, tmp_path, monkeypatch):
    write_tiny_cifar10(tmp_path, 20, 10)
    accept_any_checksum(monkeypatch.setattr)
    folder = tmp_path / "cifar-10-batches-py"
    reason = spoil(folder, monkeypatch, how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=reason) as refusal:
        ghostnet.Cifar10(tmp_path, torch.device("cpu"))
    assert "delete" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert is_one_line(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_a_wrong_checksum_suggests_deleting(tmp_path):
    write_tiny_cifar10(tmp_path, 20, 10)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"cifar-10-batches-py .*delete it"):
        ghostnet.Cifar10(tmp_path, torch.device("cpu"))
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------- memory, locks, writes


def test_too_little_memory_costs_one_line_and_one_run(known, tiny_data_dir):
    def before():
        accept_any_checksum()
        taken = 1024 * int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, taken + 2**29))

    known.data_dir = tiny_data_dir  # a batch of all its images takes gigabytes
    big, command = ["--batch-size", 300], ["--epochs", 1, "--precision", "float32"]
    line = complaint(known.fork("gr_cosine", *command, *big, before=before).wait(), 2)
    assert "too little memory" in line
    assert "--batch-size" in line


ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has\na capacity of 1 GiB")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
IN_CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
FAILURES = {"step": [ON_GPU, ON_CPU, IN_CUDNN], "evaluate": [ON_GPU, MemoryError()]}


@pytest.mark.parametrize(("where", "error"), [(where, error) for where in FAILURES for error in FAILURES[where]])
def test_memory_that_fails_anywhere_lets_the_other_runs_go_on(error, where, known):
    def before():
        without_summary()
        owner = ghostnet.Trainer if where == "step" else ghostnet
        true = getattr(owner, where)

        def fail(self_or_model, *arguments, **options):
            network = self_or_model.model if where == "step" else self_or_model
            if sum(parameter.numel() for parameter in network.parameters()) == 466_906:  # of ResNet-32
                raise error
            return true(self_or_model, *arguments, **options)

        setattr(owner, where, fail)

    process = known.fork("resnet32", "gr_cosine", "--epochs", 1, before=before).wait()
    line = complaint(process, 2)
    assert "resnet32-epochs1: too little memory" in line
    assert "--batch-size" in line
    assert "gr_cosine-epochs1: test accuracy" in process.stdout


def test_an_error_of_ours_is_no_lack_of_memory(known):
    def before():
        without_summary()

        def fail(*_):
            raise RuntimeError("a mistake in the script")

        ghostnet.Trainer.step = fail

    process = known.fork("resnet32", "--epochs", 1, before=before).wait()
    assert "RuntimeError: a mistake in the script" in process.stderr


def test_an_error_in_a_folder_with_such_a_name_is_no_lack_of_memory(script):
    script.checkpoints = script.folder / "allocations"
    script.checkpoints.mkdir()
    (script.checkpoints / "gr_cosine-epochs1.pth").write_bytes(b"damaged")
    line = complaint(script.fork(*EVALUATE, "--checkpoint-dir", "allocations").wait(), 2)
    assert "is not a checkpoint" in line
    assert "memory" not in line


@pytest.mark.parametrize("reason", ["a folder is in its place", "no locks here", "someone else's"])
def test_a_lock_that_cannot_be_taken_costs_one_line_and_one_run(reason, known):
    def before():
        without_summary()
        flock, opened = fcntl.flock, os.open

        def fail(descriptor, *arguments):
            if "resnet32" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOLCK, "No locks available")
            return flock(descriptor, *arguments)

        def refuse(path, *arguments, **options):  # root may open everything
            if str(path).endswith(".resnet32-epochs1.lock"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *arguments, **options)

        if reason == "no locks here":
            fcntl.flock = fail
        if reason == "someone else's":
            os.open = refuse

    if reason == "a folder is in its place":
        (known.checkpoints / ".resnet32-epochs1.lock").mkdir()
    process = known.fork("resnet32", "gr_cosine", "--epochs", 1, before=before).wait()
    assert "resnet32-epochs1" in complaint(process, 2)
    assert "gr_cosine-epochs1: test accuracy" in process.stdout


def test_two_processes_write_the_same_file_and_it_is_never_torn(tmp_path):
    path, size = tmp_path / "picture.png", 2_000_000

    def write(letter):
        for _ in range(40):
            ghostnet.write_atomically(path, lambda file: file.write(letter * size))

    processes = [Forked(lambda letter=letter: write(letter)) for letter in (b"a", b"b")]
    while not path.exists():
        time.sleep(0.001)
    seen = {path.read_bytes() for _ in range(100)}
    assert [process.wait().returncode for process in processes] == [0, 0]
    assert seen | {path.read_bytes()} <= {b"a" * size, b"b" * size}
    assert [*tmp_path.iterdir()] == [path]


# ------------------------------------------------------------------------------------------------ streams and signals


def test_an_output_that_cannot_encode_says_the_rest(known, finished):
    (known.checkpoints / "gr_cosine-epochs1-seed1.pth").write_bytes(finished.read_bytes())
    started = {}
    for encoding, words in (("ascii", EVALUATE), ("latin-1", ["é☃"])):
        options = {"encoding": encoding, "text": None, "environment": {"PYTHONIOENCODING": encoding}}
        started[known.start(*words, "--image-dir", encoding, **options)] = encoding, words
    for process, (encoding, words) in started.items():
        out, process.stderr = process.communicate()
        if words != EVALUATE:
            assert "gr_cosine" in complaint(process, 2)
            continue
        assert (process.returncode, process.stderr) == (0, "")
        assert re.search(r"\| gr_cosine-epochs1 .* (±|\?) .* \(2\)", out)  # mean and deviation of two seeds
        pictures = {path.name for path in (known.folder / encoding).iterdir()}
        assert pictures == {"training_curves.png", "ghost_visualization.png"}


def close_error():
    os.close(2)


def test_closed_streams_change_no_exit_code(known):
    good = known.start(*EVALUATE, preexec_fn=close_error)
    bad = known.start("resnet101", preexec_fn=lambda: (os.close(1), close_error()))
    out, _ = good.communicate()
    assert good.returncode == 0
    assert "test accuracy" in out
    bad.communicate()
    assert bad.returncode == 2


def test_who_stops_reading_ends_the_script_without_a_traceback(known):
    for process in [known.start(*command) for command in (EVALUATE, ["--help"])]:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (141, -signal.SIGPIPE, 0)  # it may have written all before


def test_variables_of_a_cluster_are_not_torchrun(known):
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere.invalid"}
    process, stopped = (known.start(*command, environment=environment) for command in (EVALUATE, ["--epochs", 1]))
    assert wait_for_line(stopped, "measuring")
    stopped.send_signal(SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "| gr_cosine-epochs1 |" in out
    _, stopped.stderr = stopped.communicate()
    assert "stopped by SIGTERM" in complaint(stopped, 143)


def wait_for_line(process, text):
    return any(text in line for line in process.stdout)


def test_missing_data_under_torchrun_is_one_line(script):
    (script.folder / "file").touch()
    script.data_dir = script.folder / "file"
    process = script.run(*EVALUATE, launcher=TORCHRUN)
    assert process.returncode == 1  # torchrun's own, which says more
    ours = [line for line in process.stderr.splitlines() if line.startswith("ghostnet.py: ")]
    assert len(ours) == 1
    assert "--data-dir" in ours[0]
    assert not re.search(r"File .*ghostnet\.py", process.stderr)


def test_an_interrupt_during_the_imports_is_no_traceback(script):
    delays, processes = (0.4, 0.8, 1.6, 2.4), []
    for delay in delays:
        command = [sys.executable, ROOT / "ghostnet.py", *script.options(*EVALUATE)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=script.folder, **pipes)
        time.sleep(delay)
        process.send_signal(SIGINT)
        processes.append(process)
        out, err = process.communicate()
        assert process.returncode in (-SIGINT, 128 + SIGINT)
        assert "Traceback" not in out + err
    assert -SIGINT in {process.returncode for process in processes}  # one was early enough


PARTS = ["count", "evaluate", "results_table", "draw_curves", "draw_ghosts"]


@pytest.mark.parametrize(("place", "stop"), [*zip(PARTS, itertools.cycle([SIGINT, SIGTERM]), strict=False)])
def test_a_signal_ends_the_evaluation_and_the_summary_at_once(place, stop, known):
    def before():
        def stall(*_, **__):
            print("stalls", flush=True)
            while True:
                with contextlib.suppress(Exception, KeyboardInterrupt):  # as a library may
                    time.sleep(60)

        if place == "evaluate":
            without_summary()
        accept_any_checksum()
        setattr(ghostnet, place, stall)

    process = known.fork(*EVALUATE, before=before)
    assert process.wait_for("stalls")
    process.send_signal(stop)
    start = time.monotonic()
    assert f"stopped by {stop.name}; the same command" in complaint(process.wait(30), 128 + stop)
    assert time.monotonic() - start < 5


# ------------------------------------------------------------------------------------------------------- the curves


@pytest.mark.parametrize("number", [1, 7, 20])
def test_the_legend_of_the_curves_covers_nothing(number, tmp_path, monkeypatch):
    figures, new = [], matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **options: figures.append(new(**options)) or figures[-1])
    column = [50.0, 80.0, 90.0]
    history = {name: column for name in ghostnet.HISTORY}
    names = [f"{name}-epochs3-weight_decay0.0001-seed{seed}" for seed in range(2) for name in ghostnet.EXPERIMENTS]
    run = Checkpoint(Constants(epochs=3), history, "abacus", {}, {})
    ghostnet.draw_curves({name: copy.copy(run) for name in names[:number]}, tmp_path / "curves.png")
    (figure,) = figures
    figure.savefig(io.BytesIO())
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert set(texts) >= set(names[:number])
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert min(axes.bbox.width for axes in figure.axes) > figure.bbox.width / 5
    assert min(axes.bbox.height for axes in figure.axes) > figure.bbox.height / 2
