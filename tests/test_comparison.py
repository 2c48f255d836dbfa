"""benchmarks/comparison.py on runs whose accuracies, and networks whose kernels, are known."""

import re
from dataclasses import replace

import comparison
import matplotlib.image
import numpy
import pytest
import torch
from torch import nn

import ghostnet
from ghostnet import EXPERIMENTS

BASE = EXPERIMENTS["gr_cosine"]


def run(constants, accuracy, epochs=200):
    model = ghostnet.build_network(constants)
    history = {column: epochs * [accuracy] for column in ghostnet.HISTORY}
    return ghostnet.Checkpoint(constants, history, "abacus", model.state_dict(), {})


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """The lines that the script prints of runs, each space once, and its errors."""

    def run_script(checkpoints, refused):
        folders = ["--data-dir", str(tmp_path), "--image-dir", str(tmp_path / "images")]
        monkeypatch.setattr("sys.argv", ["comparison.py", *folders])
        monkeypatch.setattr(ghostnet, "read_all", lambda folder: (checkpoints, refused))
        comparison.main()
        out, error = capsys.readouterr()
        return [" ".join(line.split()) for line in out.splitlines()], error

    return run_script


def test_finished_runs_stand_beside_what_others_report(tmp_path, monkeypatch, printed):
    monkeypatch.setitem(matplotlib.rcParams, "savefig.format", "pdf")  # as a user may have it
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "red")
    checkpoints = {
        "gr_cosine-seed1": run(replace(BASE, seed=1), 92.0),
        "gr_cosine-seed2": run(replace(BASE, seed=2), 93.0),
        "gr_cosine-seed3": run(replace(BASE, seed=1), 92.0),  # a copy
        "gr_multistep": run(EXPERIMENTS["gr_multistep"], 92.25),
        "gr_s3": run(EXPERIMENTS["gr_s3"], 99.0, epochs=199),
        "short": run(replace(EXPERIMENTS["resnet56"], epochs=30), 90.0, epochs=30),
    }
    lines, error = printed(checkpoints, {"notes": ghostnet.UserError("notes.pth is refused")})
    ghost = "| 0.44M, 67.5M | 0.43M, 63M |"
    assert lines[2:11] == [
        f"| gr_cosine | ghost-resnet56 | 200 | 92.50 ± 0.71 (2) | 92.7 | 92.20 | – {ghost}",
        f"| gr_multistep | ghost-resnet56 | 200 | 92.25 | 92.7 | 92.55 | – {ghost}",
        "| short | resnet56 | 30 | 90.00 | 93.0 | – | 94.37 | 0.86M, 127.9M | 0.85M, 125M |",
        "",
        "gr_cosine-seed1: 0 of 1064 ghosts are empty",
        "gr_cosine-seed2: 0 of 1064 ghosts are empty",
        "gr_cosine-seed3: 0 of 1064 ghosts are empty",
        "gr_multistep: 0 of 1064 ghosts are empty",
        "",
    ]
    assert "notes.pth" in error and "gr_cosine: see --run" in error and error.count("\n") == 2
    picture = matplotlib.image.imread(tmp_path / "images" / "accuracy_vs_flops.png")
    height, width, _ = picture.shape
    assert width > height > 600
    assert (picture[0, 0] == 1).all()  # white


@pytest.mark.filterwarnings("ignore")  # of matplotlib, that the legend is of nothing
def test_every_number_is_drawn_at_the_cost_of_its_network(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(comparison, "plot", lambda _, label, __, points: drawn.update(
        {label: {name: (round(flops, 1), accuracy) for name, flops, accuracy in points}}))
    comparison.draw([("mine", BASE, [92.0, 93.0])], tmp_path / "picture.png")
    assert drawn["ours, last epoch"] == {"mine": (67.5, 92.5)}
    assert drawn["paper"].keys() == comparison.PAPER_COSTS.keys()
    assert drawn["paper"]["ghost-vgg16 d=1"] == (158.1, 93.5)
    assert drawn["earlier reproduction"]["ghost-resnet56 multistep"] == (67.5, 92.55)
    assert drawn["ordinary, strongest public recipe"]["vgg16"] == (314.6, 94.16)


def test_weight_decay_is_compared_where_nothing_else_differs(printed):
    checkpoints = {
        "gr_cosine": run(BASE, 93.5),
        "decayed": run(replace(BASE, cheap_weight_decay=5e-4), 93.0),
        "less": run(replace(BASE, cheap_weight_decay=1e-4), 93.25),
        "alone": run(replace(BASE, cheap_weight_decay=5e-4, ratio=3), 92.0),
    }
    lines, error = printed(checkpoints, {})
    title = lines.index("**What weight decay does to ghosts**")
    assert lines[title + 4 : title + 7] == [
        "| decayed | 0.0005 | 93.00 | 0 of 1064 |", "| gr_cosine | 0 | 93.50 | 0 of 1064 |", ""]
    assert re.match(r"gr_cosine: \d+% of the ghosts' kernels are low-pass", lines[title + 7])
    assert not any("correlation" in line for line in lines)
    assert "cifar-10-batches-py" in error and error.count("\n") == 1


@pytest.fixture
def network():
    """Two ghost modules with 3 and 2 intrinsic maps, of which 5 and 2 ghosts are made."""
    convolutions = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)
    model = ghostnet.replace_conv_with_ghost(nn.Sequential(*convolutions), ratio=3)
    first, second = [module.cheap_operation.weight.data.zero_() for module in model]
    first[0] = 1.0
    first[1, 0, 1] = torch.tensor([1.0, -2.0, 1.0])
    first[2, 0, 1, 1] = 0.0009
    first[3, 0, 1, 1] = -0.0011
    first[4, 0, 1] = torch.tensor([-3.0, 0.0, 1.0])  # sums to exactly half
    first[5] = 1.0  # of a ghost that is cut off
    second[0, 0, 1, 1] = 2.0
    return model


def test_empty_kernels_and_those_of_ghosts_that_are_cut_off_count_in_nothing(network):
    assert comparison.emptied(network) == "2 of 7"
    assert comparison.low_pass_share(network) == pytest.approx(3 / 5)


def test_correlations_are_of_a_ghost_and_the_map_above_it(network):
    images = torch.randn(1, 3, 8, 8)
    found = comparison.correlations(network, images)
    first = network[0](images)
    second = network[1](first)
    expected = []
    for maps, above, ghost in ((first, 0, 3), (first, 0, 4), (first, 1, 6), (first, 2, 7),
                               (second, 0, 2)):
        flat = maps[0].detach().flatten(1).numpy()
        expected.append(numpy.corrcoef(flat[above], flat[ghost])[0, 1])
    assert found == pytest.approx(expected, abs=1e-5)
    assert [found[2], found[4]] == pytest.approx([-1, 1])
