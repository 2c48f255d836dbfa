"""The whole script as its user runs it, on a tiny CIFAR-10; and its refusals."""

import re
import sys

import matplotlib.image
import pytest
import torch

import ghostnet


def test_import_only_defines(script):
    code = "import ghostnet, pathlib; assert not list(pathlib.Path().iterdir())"
    assert script.run_python("-c", code).returncode == 0


def test_the_bare_command_trains_reports_draws_and_the_next_one_only_evaluates(script):
    first = script.run("--epochs", 1)
    assert first.returncode == 0, first.stderr
    names = ["gr_cosine-epochs1", "gr_multistep-epochs1", "gv_cosine-epochs1"]
    assert sorted(path.stem for path in script.checkpoints.glob("*.pth")) == names
    for line in (
        "flops: 127.93M",
        "params: 0.86M",
        "flops: 67.50M",
        "params: 0.44M",
        "flops reduction: 1.90x (paper claims ~2x)",
        "param reduction: 1.95x (paper claims ~2x)",
        "flops: 314.57M",
        "params: 14.99M",
        "flops: 159.22M",
        "params: 7.65M",
        "flops reduction: 1.98x (paper claims ~2x)",
        "param reduction: 1.96x (paper claims ~2x)",
    ):
        assert re.search(rf"^ +{re.escape(line)}$", first.stdout, re.MULTILINE), line
    for name in names:
        assert re.search(rf"^{name}: epoch 1/1, loss \d.*train .*test .* img/s", first.stdout, re.MULTILINE)
        row = next(line for line in first.stdout.splitlines() if line.endswith(f"| {name}.pth |"))
        accuracy = ghostnet.read_checkpoint(script.checkpoints / f"{name}.pth")["accuracy"]
        assert row.count(f"| {accuracy:.2f} ") >= 2
    for picture in ("ghost_visualization.png", "training_curves.png"):
        height, width, _ = matplotlib.image.imread(script.images / picture).shape
        assert width > 1.5 * height > 600

    before = {path: path.read_bytes() for path in script.checkpoints.glob("*.pth")}
    second = script.run("--epochs", 1)
    assert second.returncode == 0, second.stderr
    assert "img/s" not in second.stdout
    for name in names:
        accuracy = ghostnet.read_checkpoint(script.checkpoints / f"{name}.pth")["accuracy"]
        assert re.search(rf"^{name}: complete, 1 epochs", second.stdout, re.MULTILINE)
        assert f"{name}: test accuracy {accuracy:.2f}% now, {accuracy:.2f}% when trained" in second.stdout
    assert before == {path: path.read_bytes() for path in script.checkpoints.glob("*.pth")}


def test_fresh_trains_anew_and_a_trial_leaves_the_named_file_alone(script):
    script.checkpoints.mkdir()
    named = script.checkpoints / "resnet56.pth"
    named.write_bytes(b"kept")
    trial = script.run("resnet56", "--epochs", 1, "--lr", 0.01, "--milestones", 3, 5)
    assert trial.returncode == 0
    path = script.checkpoints / "resnet56-milestones3_5-epochs1-lr0.01.pth"
    finished = torch.load(path, weights_only=True)
    assert finished["constants"]["lr"] == 0.01
    again = script.run("resnet56", "--epochs", 1, "--lr", 0.01, "--milestones", 3, 5, "--fresh")
    assert "epoch 1/1" in again.stdout
    assert named.read_bytes() == b"kept"
    assert f"left out of the table: {named.relative_to(script.folder)}" in again.stderr


def test_a_finished_file_without_weights_still_serves_the_table(script):
    script.run("gr_cosine", "--epochs", 1)
    path = script.checkpoints / "gr_cosine-epochs1.pth"
    finished = torch.load(path, weights_only=True)
    del finished["model"]
    torch.save(finished, path)
    result = script.run("gr_cosine", "--epochs", 1)
    assert result.returncode == 0
    assert "the file holds no weights" in result.stdout
    assert "| gr_cosine-epochs1.pth |" in result.stdout


def test_seeds_share_a_row_with_mean_and_deviation():
    def run(seed, accuracies):
        history = [{"test_accuracy": a, "seconds": 60.0, "epoch": i, "loss": 1.0} for i, a in enumerate(accuracies, 1)]
        constants = ghostnet.Constants(epochs=2, seed=seed)
        fields = {"run": f"gr_cosine-epochs2-seed{seed}", "hardware": "abacus", "seconds": 120.0, "finished": True}
        fields["mirrored_accuracy"] = accuracies[-1] + 0.5
        return {"constants": constants, "history": history, "accuracy": accuracies[-1], **fields}

    table = ghostnet.results_table([run(0, [90.0, 91.0]), run(1, [93.5, 92.0]), run(2, [90.0, 93.0])])
    assert len(table.splitlines()) == 3
    assert "| test | 92.00 ± 1.00 (n=3) | 92.50 ± 1.00 (n=3) | 92.50 ± 1.32 (n=3) |" in table
    assert "| 0.44M | 67.5M | 2 | abacus | 2.0 min | gr_cosine-epochs2-seed0.pth |" in table


BAD_COMMANDS = {
    "no_such_run": "gr_cosine",
    "--bogus 1": "--bogus",
    "--network alexnet": "resnet56",
    "--ratio 0": "--ratio",
    "--ratio two": "--ratio",
    "gr_cosine --ratio 65": "conv",
    "--dw-kernel-size 4": "--dw-kernel-size",
    "--dw-kernel-size -1": "--dw-kernel-size",
    "--epochs 0": "--epochs",
    "--epochs -2": "--epochs",
    "--batch-size 0": "--batch-size",
    "--batch-size -128": "--batch-size",
    "--milestones 150 100": "--milestones",
    "--milestones 0 100": "--milestones",
    "--lr 0": "--lr",
    "--lr nan": "--lr",
    "--momentum 1": "--momentum",
    "--momentum 0 --nesterov": "--nesterov",
    "--warmup-epochs 200": "--warmup-epochs",
    "--label-smoothing 1": "--label-smoothing",
    "--ema 1": "--ema",
    "--cutout 33": "--cutout",
    "--holdout 50000": "--holdout",
    "--initialization xavier": "he_zero",
    "--weight-decay -1": "--weight-decay",
    "--seed -1": "--seed",
    "--seeds 0 -1": "--seed",
    "--device tpu": "--device tpu",
    "--device meta": "--device",
    "--device cuda:99": "--device cuda:99",
    "--checkpoint-dir /dev/null/x": "--checkpoint-dir",
    "--image-dir /dev/null": "--image-dir",
    "--data-dir no_such_folder": "--data-dir",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_bad_input_is_refused_in_one_line_that_names_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ghostnet.py", "--device", "cpu", *command.split()])
    with pytest.raises(ghostnet.UserError) as refusal:
        ghostnet.main()
    message = str(refusal.value)
    assert BAD_COMMANDS[command] in message and "\n" not in message
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.rglob("*.*"))


def test_a_refusal_is_one_line_on_stderr_and_exit_code_2(script):
    result = script.run("gr_cosine", "--epochs", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"ghostnet\.py: --epochs must be .*\n", result.stderr)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_data_is_refused(tmp_path, tiny_data_dir, monkeypatch, damage):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (tiny_data_dir / "cifar-10-batches-py").iterdir():  # real names, contents that are not the real ones
        if damage == "changed" or path.name != "data_batch_2":
            (folder / path.name).write_bytes(path.read_bytes())
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(sys, "argv", ["ghostnet.py", "--device", "cpu", "--data-dir", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ghostnet.UserError, match="damaged or incomplete: delete it"):
        ghostnet.main()
    assert before == sorted(path.name for path in folder.iterdir())
