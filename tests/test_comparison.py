"""The table and the picture of benchmarks/comparison.py, from runs whose accuracies are known."""

from dataclasses import asdict, replace

import comparison
import matplotlib.figure
import matplotlib.image
import pytest
import torch
from torch import nn

import ghostnet
from ghostnet import EXPERIMENTS


@pytest.fixture
def folder(tmp_path):
    """Two seeds of one run, a run with another ratio, one of few epochs, an unfinished one and no checkpoint at all."""
    base, sweep = EXPERIMENTS["gr_cosine"], EXPERIMENTS["gr_s3"]
    runs = {
        "gr_cosine-seed1": (replace(base, seed=1), 92.0, 200),
        "gr_cosine-seed2": (replace(base, seed=2), 93.0, 200),
        "gr_multistep": (EXPERIMENTS["gr_multistep"], 92.25, 200),
        "gr_cosine-ratio5": (replace(base, ratio=5), 91.0, 200),
        "resnet56-epochs30": (replace(EXPERIMENTS["resnet56"], epochs=30), 90.0, 30),
        "gr_s3": (sweep, 99.0, 199),
    }
    for name, (constants, accuracy, epochs) in runs.items():
        model, momentum = ghostnet.build_network(constants), {}
        if epochs == constants.epochs:
            model.half()
        else:
            momentum = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
        history = {column: epochs * [accuracy] for column in ghostnet.HISTORY}
        checkpoint = ghostnet.Checkpoint(constants, history, "abacus", model.state_dict(), momentum)
        torch.save(asdict(checkpoint), tmp_path / f"{name}.pth")
    (tmp_path / "notes.pth").write_text("no checkpoint")
    return tmp_path


def test_finished_runs_stand_beside_what_others_report(folder, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(matplotlib.figure, "Figure", remember(matplotlib.figure.Figure, figures))
    folders = ["--checkpoint-dir", str(folder), "--image-dir", str(folder / "images")]
    monkeypatch.setattr("sys.argv", ["comparison.py", *folders])
    comparison.main()
    out, error = capsys.readouterr()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert cells[0] == ["run", "network", "epochs", "ours", "paper", "earlier", "public", "params, FLOPs", "paper's"]
    assert sorted(cells[2:]) == [
        ["gr_cosine", "ghost-resnet56", "200", "92.50 ± 0.71 (2)", "92.7", "92.20", "–", "0.44M, 67.5M", "0.43M, 63M"],
        ["gr_cosine-ratio5", "ghost-resnet56 s=5", "200", "91.00", "–", "90.62", "–", "0.20M, 35.0M", "–"],
        ["gr_multistep", "ghost-resnet56", "200", "92.25", "92.7", "92.55", "–", "0.44M, 67.5M", "0.43M, 63M"],
        ["resnet56-epochs30", "resnet56", "30", "90.00", "93.0", "–", "94.37", "0.86M, 127.9M", "0.85M, 125M"],
    ]
    assert error.count("\n") == 1 and "notes.pth" in error
    ghosts = [line.split(":")[0] for line in out.splitlines() if "ghosts are empty" in line]
    assert sorted(ghosts) == ["gr_cosine-ratio5", "gr_cosine-seed1", "gr_cosine-seed2", "gr_multistep"]

    (axes,) = figures[0].axes
    points = {line.get_label(): sorted(map(tuple, line.get_xydata().round(1))) for line in axes.lines}
    assert points["ours, last epoch"] == [(35.0, 91.0), (67.5, 92.2), (67.5, 92.5), (127.9, 90.0)]
    assert points["ordinary, strongest public recipe"] == [(70.4, 93.5), (127.9, 94.4), (314.6, 94.2)]
    assert len(points["paper"]) == 10 and (158.1, 93.5) in points["paper"]
    assert len(points["earlier reproduction"]) == 7 and (35.0, 90.6) in points["earlier reproduction"]
    height, width, _ = matplotlib.image.imread(folder / "images" / "accuracy_vs_flops.png").shape
    assert width > 1.5 * height > 600


def test_a_ghost_is_empty_if_its_kernel_has_no_weight_above_the_limit():
    model = ghostnet.replace_conv_with_ghost(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 7, 3)))
    for module in model:
        nn.init.constant_(module.cheap_operation.weight, 1.0)
    with torch.no_grad():
        model[0].cheap_operation.weight[1] = -0.0009
        model[0].cheap_operation.weight[2] = 0.0
        model[0].cheap_operation.weight[2, 0, 1, 1] = -0.0011
        model[1].cheap_operation.weight[3] = 0.0  # the kernel of a ghost that the eighth channel would have had
    assert comparison.emptied(model) == (1, 4 + 3)


def remember(function, results):
    def remembering(*arguments, **options):
        results.append(function(*arguments, **options))
        return results[-1]

    return remembering


def test_every_number_of_others_is_of_a_network_that_an_experiment_has():
    networks = {constants.architecture for constants in EXPERIMENTS.values()}
    assert networks >= {*ghostnet.PAPER, *comparison.PUBLIC, *(network for network, _ in comparison.EARLIER)}
    assert comparison.PAPER_COSTS.keys() == ghostnet.PAPER.keys()
