"""The whole script as its user runs it, on a tiny CIFAR-10; and its refusals."""

import io
import re
import sys
from contextlib import redirect_stdout
from signal import SIGTERM

import matplotlib.image
import pytest
import torch
from harness import few_images, train, without_summary

import ghostnet
from ghostnet import Checkpoint, Constants

REPORTS = [
    "flops: 127.93M", "params: 0.86M", "flops: 67.50M", "params: 0.44M",
    "flops reduction: 1.90x (paper claims ~2x)", "param reduction: 1.95x (paper claims ~2x)",
    "flops: 314.57M", "params: 14.99M", "flops: 159.22M", "params: 7.65M",
    "flops reduction: 1.98x (paper claims ~2x)", "param reduction: 1.96x (paper claims ~2x)",
]  # fmt: skip


def test_import_only_defines(script):
    code = "import ghostnet, pathlib; assert not list(pathlib.Path().iterdir())"
    assert script.run_python("-c", code).returncode == 0


def reports(out):
    return [line.strip() for line in out.splitlines() if re.match(" +(flops|params?)\\b", line)]


def table(out):
    """The rows of the last table by run."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines() if line[:1] == "|"]
    last = max(i for i, row in enumerate(rows) if row[0] == "run")
    header, _, *rows = rows[last:]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_bare_command_trains_reports_draws_and_the_next_one_only_evaluates(script):
    first = script.run("--epochs", 1)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    names = ["gr_cosine-epochs1", "gr_multistep-epochs1", "gv_cosine-epochs1"]
    assert sorted(path.stem for path in script.checkpoints.glob("*.pth")) == names
    opening = first.stdout.splitlines()[0]
    assert "CPU" in opening and "float" in opening and f"torch {torch.__version__}" in opening
    assert reports(first.stdout) == REPORTS
    rows = table(first.stdout)
    assert rows.keys() == set(names)
    for name in names:
        assert re.search(rf"^{name}: epoch 1/1, loss \d.*train .*test .* img/s$", first.stdout, re.MULTILINE)
        accuracy = ghostnet.read_checkpoint(script.checkpoints / f"{name}.pth").accuracy
        assert rows[name]["accuracy"] == f"{accuracy:.2f}"
    for picture in ("ghost_visualization.png", "training_curves.png"):
        height, width, _ = matplotlib.image.imread(script.images / picture).shape
        assert width > 1.5 * height > 600

    before = {path: path.read_bytes() for path in script.checkpoints.glob("*.pth")}
    second = script.fork("--epochs", 1).wait()
    assert (second.returncode, second.stderr) == (0, "")
    assert "img/s" not in second.stdout
    assert second.stdout.count("| run ") == 1
    for name in names:
        accuracy = ghostnet.read_checkpoint(script.checkpoints / f"{name}.pth").accuracy
        assert re.search(rf"^{name}: complete, 1 epochs", second.stdout, re.MULTILINE)
        assert f"{name}: test accuracy {accuracy:.2f}% now, {accuracy:.2f}% when trained" in second.stdout
    assert before == {path: path.read_bytes() for path in script.checkpoints.glob("*.pth")}


def test_what_is_known_is_shown_before_what_is_missing_is_trained(script, data):
    script.checkpoints.mkdir()
    train(script.checkpoints / "gr_cosine-epochs3.pth", Constants(epochs=3), few_images(data))
    command = ["resnet32", "gr_cosine", "--epochs", 3]
    process = script.fork(*command)
    assert process.wait_for("epoch 1/3")
    known = process.printed()
    assert (script.images / "training_curves.png").exists()
    assert (script.images / "ghost_visualization.png").exists()
    done = process.wait()
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout.removeprefix(known)
    order = ["CPU", "param reduction: 1.96x", "gr_cosine-epochs3: test accuracy", "| gr_cosine-epochs3 ", "epoch 1/3"]
    assert [known.index(text) for text in order] == sorted(known.index(text) for text in order)
    assert table(known).keys() == {"gr_cosine-epochs3"}
    assert table(out).keys() == {"gr_cosine-epochs3", "resnet32-epochs3"}
    takes = r"resnet32-epochs3: 3 epochs take about 0:\d\d:\d\d here; Ctrl-C stops, the same command continues"
    assert sum(bool(re.fullmatch(takes, line)) for line in done.stdout.splitlines()) == 1
    epochs = [line.split(",")[0] for line in done.stdout.splitlines() if ": epoch " in line]
    assert epochs == [f"resnet32-epochs3: epoch {number}/3" for number in (1, 2, 3)]


def test_the_same_command_continues_and_shows_how_far_it_was(script):
    process = script.fork("resnet32", "--epochs", 3, before=without_summary)
    assert process.wait_for(": epoch 1/3")
    process.send_signal(SIGTERM)
    assert process.wait().returncode == 143
    again = script.fork("resnet32", "--epochs", 3, before=without_summary).wait()
    assert again.returncode == 0
    assert "epoch 1/3" not in again.stdout
    assert re.search(r"\| [12] of 3 ", again.stdout)  # what is known
    assert table(again.stdout)["resnet32-epochs3"]["epochs"] == "3"


def test_fresh_trains_anew_and_a_trial_leaves_the_named_file_alone(script):
    script.checkpoints.mkdir()
    named = script.checkpoints / "resnet32.pth"
    named.write_bytes(b"kept")
    command = ["resnet32", "--epochs", 1, "--lr", 0.01, "--milestones", 3, 5]
    assert script.fork(*command).wait().returncode == 0
    path = script.checkpoints / "resnet32-milestones3_5-epochs1-lr0.01.pth"
    assert torch.load(path, weights_only=True)["constants"]["lr"] == 0.01
    again = script.fork(*command, "--fresh").wait()
    assert "epoch 1/1" in again.stdout
    assert named.read_bytes() == b"kept"
    (line,) = again.stderr.splitlines()
    assert "checkpoints/resnet32.pth is not a checkpoint" in line
    assert "left out of the table" in line


def test_seeds_share_a_row_with_mean_and_deviation():
    def run(seed, accuracy):
        history = {"loss": [1.0, 1.0], "train_accuracy": [50.0, 60.0], "seconds": [60.0, 61.0]}
        history["test_accuracy"] = [95.0, accuracy]
        return Checkpoint(Constants(epochs=2, seed=seed), history, "abacus, float32", {}, {})

    runs = {f"gr_cosine-epochs2-seed{seed}": run(seed, 91.0 + seed) for seed in range(3)}
    text = ghostnet.results_table(runs)
    assert len(text.splitlines()) == 3
    assert len({len(line) for line in text.splitlines()}) == 1
    (row,) = table(text).values()
    assert row == {
        "run": "gr_cosine-epochs2", "network": "ghost-resnet56", "schedule": "cosine", "epochs": "2",
        "accuracy": "92.00 ± 1.00 (3)", "paper": "92.7", "params": "0.44M", "FLOPs": "67.5M",
        "trained on": "abacus", "time": "0:02:01",
    }  # fmt: skip


def test_a_run_that_goes_on_has_a_row_of_its_own_and_the_table_fits_a_terminal():
    def run(epochs):
        history = {name: epochs * [90.12] for name in ghostnet.HISTORY}
        return Checkpoint(Constants(epochs=200), history, "Tesla T4, float16, torch 2.14, 2026-01-01", {}, {})

    text = ghostnet.results_table({"gr_cosine": run(200), "gr_cosine-seed1": run(200), "gr_cosine-seed2": run(9)})
    assert [line.split(" | ")[3].strip() for line in text.splitlines()[2:]] == ["200", "9 of 200"]
    assert max(map(len, text.splitlines())) <= 130  # 120 without the deviation


def test_reports_need_no_terminal(capsys):
    image, ghost = torch.zeros(1, 3, 32, 32), ghostnet.build_network(Constants())
    with redirect_stdout(io.StringIO()) as out:
        ghostnet.report("resnet-56", ghostnet.ResNet(56), ghost, image)
    assert reports(out.getvalue()) == REPORTS[:6]
    assert capsys.readouterr().err == ""


BAD_COMMANDS = {
    "no_such_run": "gr_cosine",
    "--bogus 1": "--bogus",
    "--network alexnet": "resnet56",
    "--ratio 0": "--ratio",
    "--ratio two": "--ratio",
    "--ratio 513": "--ratio",
    "--dw-kernel-size 4": "--dw-kernel-size",
    "--dw-kernel-size -1": "--dw-kernel-size",
    "--dw-kernel-size 15": "--dw-kernel-size",
    "--epochs 0": "--epochs",
    "--epochs -2": "--epochs",
    "--batch-size 0": "--batch-size",
    "--batch-size -128": "--batch-size",
    "--milestones 150 100": "--milestones",
    "--milestones 0 100": "--milestones",
    "--lr 0": "--lr",
    "--lr nan": "--lr",
    "--momentum 1": "--momentum",
    "--nesterov": "--nesterov",
    "--weight-decay -1": "--weight-decay",
    "--seed -1": "--seed",
    "--seeds 0 -1": "--seed",
    "--device tpu": "--device",
    "--device meta": "--device",
    "--device cuda:99": "--device",
    "--device mps": "--device mps is not there",
    "--image-dir /dev/null": "/dev/null",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_input_is_refused_in_one_line_that_names_it(command, script, monkeypatch, capsys):
    monkeypatch.chdir(script.folder)
    monkeypatch.setattr(sys, "argv", ["ghostnet.py", *script.options(*command.split())])
    with pytest.raises((ghostnet.UserError, OSError)) as refusal:
        ghostnet.main()
    assert capsys.readouterr() == ("", "")
    assert not list(script.folder.rglob("*.*"))
    ghostnet.complain(str(refusal.value))
    line = capsys.readouterr().err
    assert BAD_COMMANDS[command] in line
    assert len(line.splitlines()) == 1


def test_a_refusal_is_one_line_on_stderr_and_exit_code_2(script):
    result = script.run("gr_cosine", "--epochs", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"ghostnet\.py: --epochs must be .*\n", result.stderr)
