"""benchmarks/comparison.py on runs whose accuracies, and networks whose kernels, are known."""

import re
from dataclasses import replace
from unittest import mock

import comparison
import matplotlib.image
import numpy
import pytest
import torch
from torch import nn

import ghostnet
from ghostnet import EXPERIMENTS

BASE = EXPERIMENTS["gr_cosine"]


def run(constants, accuracy, best=None, epochs=200):
    """A run's checkpoint with these accuracies after its last epoch and in its best one."""
    model = ghostnet.build_network(constants)
    accuracies = [*(epochs - 1) * [best or accuracy], accuracy]
    history = dict.fromkeys(ghostnet.HISTORY, accuracies)
    return ghostnet.Checkpoint(constants, history, "abacus", model.state_dict(), {})


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """The lines that the script prints of runs, each space once, and its errors."""

    def run_script(checkpoints, refused=(), older=()):
        folders = {"checkpoints": (checkpoints, dict(refused)), "batch128": (dict(older), {})}
        options = ["--data-dir", str(tmp_path), "--image-dir", str(tmp_path / "images")]
        monkeypatch.setattr("sys.argv", ["comparison.py", *options])
        monkeypatch.setattr(ghostnet, "read_all", lambda folder: folders[folder.name])
        comparison.main()
        out, error = capsys.readouterr()
        return [" ".join(line.split()) for line in out.splitlines()], error

    return run_script


def test_finished_runs_stand_beside_what_others_report(tmp_path, monkeypatch, printed):
    monkeypatch.setitem(matplotlib.rcParams, "savefig.format", "pdf")  # as a user may have it
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "red")
    checkpoints = {
        "gr_cosine-seed1": run(replace(BASE, seed=1), 92.0, best=92.5),
        "gr_cosine-seed2": run(replace(BASE, seed=2), 93.0, best=93.25),
        "gr_cosine-seed3": run(replace(BASE, seed=1), 92.0, best=92.5),  # a copy
        "gr_multistep": run(EXPERIMENTS["gr_multistep"], 92.25),
        "gr_s3": run(EXPERIMENTS["gr_s3"], 99.0, epochs=199),
        "gv_cosine": run(EXPERIMENTS["gv_cosine"], 93.5),
        "gv_inside": run(EXPERIMENTS["gv_inside"], 93.75),
        "short": run(replace(EXPERIMENTS["resnet56"], epochs=30), 90.0, epochs=30),
        "resnet32": run(EXPERIMENTS["resnet32"], 93.25),
    }
    lines, error = printed(checkpoints, {"notes": ghostnet.UserError("notes.pth is refused")})
    ghost = "ghost-resnet56 | 200"
    assert set(lines[10]) <= set("| -")
    assert [*lines[2:10], *lines[11:19]] == [
        f"| gr_cosine | {ghost} | 92.50 +- 0.71 (2) | 92.7 | -0.20 | - | - | 92.88 | 92.20 | - |",
        f"| gr_multistep | {ghost} | 92.25 | 92.7 | -0.45 | - | - | 92.25 | 92.55 | - |",
        "| gv_cosine | ghost-vgg16 | 200 | 93.50 | 93.7 | -0.20 | 93.60 | - | 93.50 | 93.63 | - |",
        "| gv_inside | ghost-vgg16 | 200 | 93.75 | 93.7 | +0.05 | - | - | 93.75 | - | - |",
        "| short | resnet56 | 30 | 90.00 | 93.0 | -3.00 | - | 94.21 | 90.00 | - | 94.37 |",
        "| resnet32 | resnet32 | 200 | 93.25 | - | - | - | 93.41 | 93.25 | - | 93.53 |",
        "",
        "| network | params, FLOPs | in the paper |",
        "| ghost-resnet56 | 0.44M, 67.5M | 0.43M, 63M |",
        "| ghost-vgg16 | 7.65M, 159.2M | 7.7M, 158M |",
        "| resnet56 | 0.86M, 127.9M | 0.85M, 125M |",
        "| resnet32 | 0.47M, 70.4M | - |",
        "",
        "gr_cosine-seed1: 0 of 1064 ghosts are empty",
        "gr_cosine-seed2: 0 of 1064 ghosts are empty",
        "gr_cosine-seed3: 0 of 1064 ghosts are empty",
    ]
    assert "notes.pth" in error and "gr_cosine: see --run" in error and error.count("\n") == 2
    picture = matplotlib.image.imread(tmp_path / "images" / "accuracy_vs_flops.png")
    height, width, _ = picture.shape
    assert width > height > 600
    assert (picture[0, 0] == 1).all()  # white


def test_each_run_and_each_network_of_others_has_a_line_in_the_picture(tmp_path):
    row = comparison.Row("mine", BASE, {0: 92.0, 1: 93.0}, {0: 93.0, 1: 93.5})
    with mock.patch("matplotlib.figure.Figure.savefig", autospec=True) as savefig:
        comparison.draw([row], tmp_path / "picture.png")
    (axes,) = savefig.call_args.args[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0].startswith("gr_s20, ") and names[-1].startswith("vgg16, ")  # by their FLOPs
    assert not any(name.startswith(("gr_cosine, ", "gr_inside, ", "gv_inside, ")) for name in names)

    def marked(name):
        (line,) = [line for line, label in enumerate(names) if label.startswith(f"{name}, ")]
        marks = {}
        for drawn in axes.lines:
            for accuracy, y in zip(*drawn.get_data(), strict=True):
                if y == line:
                    marks[drawn.get_label()] = accuracy
        return names[line].split(",  ")[1:], marks

    assert marked("mine") == (["ghost-resnet56", "67.5M"], {
        "ours, last epoch": 92.5, "ours, best epoch": 93.25,
        "paper": 92.7, "earlier reproduction, best epoch": 92.20})
    assert marked("vgg16") == (["vgg16", "314.6M"], {
        "paper": 93.6, "public recipe, last epoch": 94.06, "public recipe, best epoch": 94.16})
    assert marked("gv_d1") == (["ghost-vgg16 d=1", "158.1M"], {"paper": 93.5})


def test_runs_that_differ_in_batch_and_cheap_decay_alone_are_compared(printed):
    checkpoints = {
        "gr_cosine": run(BASE, 93.5),
        "less": run(replace(BASE, cheap_weight_decay=1e-4), 93.25),
        "alone": run(replace(BASE, cheap_weight_decay=5e-4, ratio=3), 92.0),
    }
    older = {
        "decayed": run(replace(BASE, cheap_weight_decay=5e-4), 93.0, best=93.125),
        "resnet56": run(replace(EXPERIMENTS["resnet56"], batch_size=64), 94.0),
        "small": run(replace(BASE, batch_size=64), 92.5),
    }
    older["small"].history["loss"] = [*199 * [1.0], 0.00254]
    lines, error = printed(checkpoints, older=older)
    first_table = lines[: lines.index("")]
    (line,) = [line for line in first_table if "batch128/" in line]
    accuracies = "94.00 | 93.0 | +1.00 | - | 94.21 | 94.00 | - | 94.37"
    assert line == f"| batch128/resnet56 | resnet56 | 200 | {accuracies} |"
    title = lines.index("**What weight decay and the batch do to ghosts**")
    batch = BASE.batch_size
    assert lines[title + 4 : title + 8] == [
        f"| gr_cosine | {batch} | 0 | 93.5000 | 93.50 | 93.50 | 0 of 1064 |",
        f"| batch128/decayed | {batch} | 0.0005 | 93.0000 | 93.00 | 93.12 | 0 of 1064 |",
        "| batch128/small | 64 | 0 | 0.0025 | 92.50 | 92.50 | 0 of 1064 |",
        "",
    ]
    assert re.match(r"gr_cosine: \d+% of the ghosts' kernels are low-pass", lines[title + 8])
    assert not any("correlation" in line for line in lines)
    assert "cifar-10-batches-py" in error and error.count("\n") == 1


def test_times_are_those_of_the_file_in_seconds_an_epoch_and_hours_in_all(printed):
    checkpoints = {"gr_cosine": run(BASE, 93.0), "gr_s3": run(EXPERIMENTS["gr_s3"], 92.0, epochs=2)}
    checkpoints["gr_cosine"].history["seconds"] = [3.5, *198 * [36.0], 160.0]
    checkpoints["gr_s3"].history["seconds"] = [1.0, 2.0]  # not finished
    lines, _ = printed(checkpoints)
    title = lines.index("**Time**")
    assert lines[title + 4] == "| gr_cosine | 3.5 | 36.0 | 2.0 | 0.2 | abacus |"
    assert lines[title + 5] == "| gr_s3 | 1.0 | 1.5 | 0.0 | 0.0 | abacus |"


def test_runs_with_random_erasing_stand_apart_each_beside_the_same_without(tmp_path, printed):
    erasing = EXPERIMENTS["gr_erasing"]
    checkpoints = {
        "gr_cosine": run(BASE, 92.0, best=92.5),
        "gr_erasing": run(erasing, 93.0, best=93.25),
        "gr_erasing-seed1": run(replace(erasing, seed=1), 94.0, best=94.25),
        "resnet32_erasing": run(EXPERIMENTS["resnet32_erasing"], 95.0),
    }
    checkpoints["gr_cosine"].history["loss"] = [*199 * [1.0], 0.00254]
    checkpoints["gr_erasing"].history["loss"] = [*199 * [1.0], 0.02]
    checkpoints["gr_erasing-seed1"].history["loss"] = [*199 * [1.0], 0.03]
    with mock.patch("matplotlib.figure.Figure.savefig", autospec=True) as savefig:
        lines, _ = printed(checkpoints)
    title = lines.index("**With random erasing: not the paper's training**")
    assert [line for line in lines[:title] if "erasing" in line] == []
    ghost = "ghost-resnet56 | 200 | 0.5 | 93.50 +- 0.71 (2) | 92.00 | +1.50 | 93.75 | 92.50"
    assert lines[title + 4 : title + 7] == [
        f"| gr_erasing | {ghost} | 0.0250 | 0.0025 |",
        "| resnet32_erasing | resnet32 | 200 | 0.5 | 95.00 | - | - | 95.00 | - | 95.0000 | - |",
        "",
    ]
    (axes,) = savefig.call_args.args[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    erased = {names.index(name) for name in names if "erasing" in name}
    assert [names[line] for line in sorted(erased)] == [
        "gr_erasing,  ghost-resnet56 with random erasing,  67.5M",
        "resnet32_erasing,  resnet32 with random erasing,  70.4M",
    ]
    for drawn in axes.lines:  # nothing of others stands beside them
        assert drawn.get_label().startswith("ours") or erased.isdisjoint(drawn.get_ydata())


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
