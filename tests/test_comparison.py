"""benchmarks/comparison.py on runs whose accuracies, and networks whose kernels, are known."""

import re
from dataclasses import replace
from unittest import mock

import comparison
import matplotlib
import numpy
import pytest
import torch
from few import run_of
from tiny import ODD_STYLE, published, size_of_white_png
from torch import nn
from torchvision.datasets import CIFAR10

import ghostnet
from ghostnet import EXPERIMENTS

BASE = EXPERIMENTS["gr_cosine"]


def run(constants, accuracy, best=None, epochs=200, **history):
    """A run with these accuracies in its last and its best epoch, its history so ending."""
    accuracies = [*(epochs - 1) * [best or accuracy], accuracy]
    history = {"seconds": epochs * [36.0], **history}
    for name, end in history.items():
        history[name] = (epochs - len(end)) * [1.0] + end
    return run_of(constants, accuracies, **history)


@pytest.fixture
def printed(tmp_path, monkeypatch, tiny_data, capsys):
    """The lines that the script prints of runs, each space once, and its errors."""

    def run_script(checkpoints, refused=(), older=(), *options):
        folders = {"checkpoints": (checkpoints, dict(refused)), "batch128": (dict(older), {})}
        places = ["--data-dir", str(tiny_data), "--image-dir", str(tmp_path / "images")]
        monkeypatch.setattr("sys.argv", ["comparison.py", *places, *options])
        monkeypatch.setattr(ghostnet, "read_all", lambda folder: folders[folder.name])
        with mock.patch.multiple(CIFAR10, **published(tiny_data)):
            comparison.main()
        out, error = capsys.readouterr()
        return [" ".join(line.split()) for line in out.splitlines()], error

    return run_script


@matplotlib.rc_context(ODD_STYLE)
def test_finished_runs_stand_beside_what_others_report(tmp_path, printed):
    checkpoints = {
        "gr_cosine": run(BASE, 92.0, best=92.5),
        "gr_cosine-seed2": run(replace(BASE, seed=2), 93.0, best=93.25),
        "gr_cosine-seed3": run(BASE, 92.0, best=92.5),  # a copy
        "gr_multistep": run(EXPERIMENTS["gr_multistep"], 92.25),
        "gr_s3": run(EXPERIMENTS["gr_s3"], 99.0, epochs=199),
        "gv_cosine": run(EXPERIMENTS["gv_cosine"], 93.5),
        "gv_inside": run(EXPERIMENTS["gv_inside"], 93.75),
        "short": run(replace(EXPERIMENTS["resnet56"], epochs=30), 90.0, epochs=30),
        "resnet32": run(EXPERIMENTS["resnet32"], 93.25),
    }
    ordinary = {"resnet56": run(replace(EXPERIMENTS["resnet56"], batch_size=128), 93.75)}
    refused = {"notes": ghostnet.UserError("notes.pth is refused")}
    lines, error = printed(checkpoints, refused, ordinary)
    trained = "abacus | 2:00:00"
    ghost, ghost_cost = "ghost-resnet56 | 200", f"0.44M | 67.5M | {trained}"
    vgg, vgg_cost = "ghost-vgg16 | 200", f"7.65M | 159.2M | {trained}"
    resnet = f"resnet56 | 200 | 93.75 | 93.0 | 94.21 | 0.86M | 127.9M | {trained}"
    assert lines[2:10] == [
        f"| gr_cosine | {ghost} | 92.50 +- 0.71 (2) | 92.7 | - | {ghost_cost} |",
        f"| gr_multistep | {ghost} | 92.25 | 92.7 | - | {ghost_cost} |",
        f"| gv_cosine | {vgg} | 93.50 | 93.7 | - | {vgg_cost} |",
        f"| gv_inside | {vgg} | 93.75 | 93.7 | - | {vgg_cost} |",
        "| short | resnet56 | 30 | 90.00 | 93.0 | 94.21 | 0.86M | 127.9M | abacus | 0:18:00 |",
        f"| resnet32 | resnet32 | 200 | 93.25 | - | 93.41 | 0.47M | 70.4M | {trained} |",
        f"| batch128/resnet56 | {resnet} |",
        "",
    ]
    title = lines.index("**Best epochs**")
    assert lines[title + 4 : title + 11] == [
        "| gr_cosine | 92.50 | 92.88 | - | - | 92.7 | -0.20 |",
        "| gr_multistep | 92.25 | 92.25 | - | - | 92.7 | -0.45 |",
        "| gv_cosine | 93.50 | 93.50 | - | - | 93.7 | -0.20 |",
        "| gv_inside | 93.75 | 93.75 | - | - | 93.7 | +0.05 |",
        "| short | 90.00 | 90.00 | 94.21 | 94.37 | 93.0 | -3.00 |",
        "| resnet32 | 93.25 | 93.25 | 93.41 | 93.53 | - | - |",
        "| batch128/resnet56 | 93.75 | 93.75 | 94.21 | 94.37 | 93.0 | +0.75 |",
    ]
    assert error.count("\n") == 1 and "notes.pth is refused" in error
    assert re.match(r"gr_cosine: median correlation .* \(test image 12\)", lines[-1])
    width, height = size_of_white_png(tmp_path / "images" / "accuracy_vs_flops.png")
    assert width > height > 600


def test_each_run_and_each_network_of_others_has_a_line_in_the_picture(tmp_path):
    runs = {0: run(BASE, 92.0, best=93.0), 1: run(BASE, 93.0, best=93.5)}
    row = comparison.Row("mine", BASE, runs)
    with mock.patch("matplotlib.figure.Figure.savefig", autospec=True) as savefig:
        comparison.draw([row], tmp_path / "picture.png")
    (axes,) = savefig.call_args.args[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0].startswith("gv_s5, ") and names[-1].startswith("vgg16, ")  # by their FLOPs
    assert not any(name.startswith(("gr_cosine, ", "gr_s3, ", "gv_inside, ")) for name in names)

    def marked(name):
        (line,) = [line for line, label in enumerate(names) if label.startswith(f"{name}, ")]
        marks = {}
        for drawn in axes.lines:
            for accuracy, y in zip(*drawn.get_data(), strict=True):
                if y == line:
                    marks[drawn.get_label()] = accuracy
        return names[line].split(",  ")[1:], marks

    assert marked("mine") == (["ghost-resnet56", "67.5M"], {
        "ours, last epoch": 92.5, "ours, best epoch": 93.25, "paper": 92.7})
    assert marked("vgg16") == (["vgg16", "314.6M"], {
        "paper": 93.6, "public, last epoch": 94.06, "public, best epoch": 94.16})
    assert marked("gv_d1") == (["ghost-vgg16 d=1", "158.1M"], {"paper": 93.5})


def test_runs_that_differ_in_cheap_decay_alone_are_compared(printed):
    decayed = replace(BASE, cheap_weight_decay=5e-4)
    checkpoints = {
        "gr_cosine": run(BASE, 93.5, loss=[0.00254]),
        "less": run(replace(BASE, cheap_weight_decay=1e-4), 93.25),
        "alone": run(replace(decayed, ratio=3), 92.0),
        "another_batch": run(replace(decayed, batch_size=64), 92.0),
    }
    lines, _ = printed(checkpoints, older={"decayed": run(decayed, 93.0, best=93.125)})
    title = lines.index("**What weight decay does to ghosts**")
    assert lines[title + 4 : title + 7] == [
        "| gr_cosine | 0 | 0.0025 | 93.50 | 93.50 | 0 of 1064 |",
        "| batch128/decayed | 0.0005 | 193.0000 | 93.00 | 93.12 | 0 of 1064 |",
        "",
    ]


def test_times_are_those_of_the_file_in_seconds_an_epoch_and_hours_in_all(printed):
    long = run(BASE, 93.0, seconds=[3.5, *198 * [36.0], 160.0])
    unfinished = run(EXPERIMENTS["gr_s3"], 92.0, epochs=2, seconds=[1.0, 2.0])
    lines, _ = printed({"gr_cosine": long, "gr_s3": unfinished})
    title = lines.index("**Time**")
    assert lines[title + 4] == "| gr_cosine | 3.5 | 36.0 | 2.0 | 0.2 | abacus |"
    assert lines[title + 5] == "| gr_s3 | 1.0 | 1.5 | 0.0 | 0.0 | abacus |"


def test_every_file_is_tested_again(printed, monkeypatch):
    monkeypatch.setattr(ghostnet, "evaluate", lambda network, _data: len(network.blocks))
    older = {"resnet32": run(EXPERIMENTS["resnet32"], 93.0)}
    lines, _ = printed({"gr_cosine": run(BASE, 92.0)}, (), older, "--evaluate")
    assert lines[2:] == ["| gr_cosine | 92.00 | 27.00 |", "| batch128/resnet32 | 93.00 | 15.00 |"]


def test_runs_with_random_erasing_stand_apart_each_beside_the_same_without(printed):
    erasing = EXPERIMENTS["gr_erasing"]
    checkpoints = {
        "gr_cosine": run(BASE, 92.0, loss=[0.00254]),
        "gr_erasing": run(erasing, 93.0, loss=[0.02]),
        "gr_erasing-seed1": run(replace(erasing, seed=1), 94.0, loss=[0.03]),
        "resnet32_erasing": run(EXPERIMENTS["resnet32_erasing"], 95.0),
    }
    lines, _ = printed(checkpoints)
    title = lines.index("**With random erasing: not the paper's training**")
    assert [line for line in lines[:title] if "erasing" in line] == []
    ghost = "ghost-resnet56 | 200 | 93.50 +- 0.71 (2) | 92.00"
    assert lines[title + 4 : title + 7] == [
        f"| gr_erasing | {ghost} | 0.0250 | 0.0025 | abacus | 2:00:00 |",
        "| resnet32_erasing | resnet32 | 200 | 95.00 | - | 195.0000 | - | abacus | 2:00:00 |",
        "",
    ]


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


def test_kernels_of_ghosts_that_are_cut_off_do_not_count(network):
    assert comparison.emptied(network) == "2 of 7"


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
