"""What is drawn into the pictures."""

from unittest import mock

import numpy
import pytest
import torch
from few import few_images, run_of
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

import ghostnet
from ghostnet import Constants


@pytest.fixture
def figures(monkeypatch):
    """The figures by the names of the files that they would be saved to."""
    figures = {}

    def keep(path, write):
        with mock.patch.object(Figure, "savefig", autospec=True) as savefig:
            write(None)
        figures[path.name] = savefig.call_args.args[0]

    monkeypatch.setattr(ghostnet, "write_atomically", keep)
    return figures


def pixels(axes):
    return numpy.asarray(axes.images[0].get_array())


def test_the_ghosts_drawn_are_those_of_the_first_ghost_run_of_a_command(tmp_path, figures):
    names = ["resnet32", "gr_s5", "gr_cosine"]
    checkpoints = {name: run_of(ghostnet.EXPERIMENTS[name], [90.0]) for name in reversed(names)}
    runs = ["a missing one", *names]
    ghostnet.print_and_draw(checkpoints, runs, few_images(), tmp_path)
    (title,) = figures["ghost_visualization.png"].subfigs[1].texts
    assert title.get_text() == "gr_s5, layer blocks.0.conv1: 8 of its 12 ghosts"
    assert len(figures["training_curves.png"].axes) == 2


def test_below_each_intrinsic_map_are_a_kernel_and_the_ghost_that_it_makes(tmp_path, figures):
    constants = Constants(ratio=3)
    checkpoint = run_of(constants, [90.0])
    kernels = checkpoint.model["blocks.0.conv1.cheap_operation.weight"]
    kernels[1] = 0.0  # of a blank ghost
    data = few_images()
    ghostnet.print_and_draw({"gr_s3": checkpoint}, ["gr_s3"], data, tmp_path)
    view, *grid = figures["ghost_visualization.png"].axes

    image = data.test_images[ghostnet.PICTURE_IMAGE]
    assert numpy.array_equal(pixels(view), image)
    label = ghostnet.CLASSES[data.test_labels[ghostnet.PICTURE_IMAGE]]
    assert view.get_title() == f"test image {ghostnet.PICTURE_IMAGE}: {label}"
    model = checkpoint.network("cpu").eval()
    with torch.inference_mode():  # the second ghost module, of 6 intrinsic maps and 10 ghosts
        x = model.bn1(model.conv1(data.normalize(image[None]))).relu()
        maps = model.blocks[0].conv1(x)[0].numpy()
    for column in range(8):
        source, kernel, ghost = grid[column:24:8]
        above, below = maps[column // 2], maps[6 + column]
        assert_allclose(pixels(source), above, atol=1e-5)
        assert_allclose(pixels(kernel), kernels[column, 0])
        assert kernel.images[0].norm.vmax == -kernel.images[0].norm.vmin == kernels.abs().max()
        assert_allclose(pixels(ghost), below, atol=1e-5)
        correlation = 0.0 if column == 1 else numpy.corrcoef(above.ravel(), below.ravel())[0, 1]
        printed = float(ghost.get_xlabel().removeprefix("correlation\n"))
        assert printed == pytest.approx(correlation, abs=0.006)


def test_the_title_says_what_is_done_to_the_maps_inside_of_a_ghost_module(
    tmp_path, figures, monkeypatch
):
    checkpoint = run_of(Constants(norm_inside=True), [90.0])
    # The two modules of the first block: a ReLU follows in it after the first alone.
    for module, inside in ((1, "BatchNorm2d and ReLU"), (2, "BatchNorm2d")):
        monkeypatch.setattr(ghostnet, "PICTURE_MODULE", module)
        ghostnet.print_and_draw({"gr_inside": checkpoint}, ["gr_inside"], few_images(), tmp_path)
        (title,) = figures["ghost_visualization.png"].subfigs[1].texts
        expected = f"gr_inside, layer blocks.0.conv{module}: 8 of its 8 ghosts, after {inside}"
        assert title.get_text() == expected


def test_curves_are_the_test_accuracy_and_the_loss_of_each_run_by_epoch(tmp_path, figures):
    checkpoints = {
        "a": run_of(Constants(epochs=3), [50.0, 62.0], loss=[2.0, 1.0]),
        "b": run_of(Constants("resnet32", ratio=1), [60.0, 61.0, 59.0], loss=[3.0, 2.0, 1.0]),
        "point": run_of(Constants(seed=1), [90.0], loss=[0.1]),
    }
    ghostnet.draw_curves(checkpoints, tmp_path / "curves.png")
    accuracy, loss = figures["curves.png"].axes
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("test accuracy (%)", "training loss")
    assert (accuracy.get_yscale(), loss.get_yscale()) == ("linear", "log")
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert drawn == {
        "a: 62.00%": [50.0, 62.0], "b: 59.00%": [60.0, 61.0, 59.0], "point: 90.00%": [90.0],
        "paper, ghost-resnet56: 92.7%": [92.7, 92.7],
    }
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1], [3, 2, 1], [0.1]]
    for axes in (accuracy, loss):
        assert [list(line.get_xdata()) for line in axes.lines[:3]] == [[1, 2], [1, 2, 3], [1]]
        assert [line.get_marker() for line in axes.lines[:3]] == ["None", "None", "o"]
        assert [line.get_linestyle() for line in axes.lines[:3]] == ["-", "-", "None"]
    colors = [line.get_color() for line in accuracy.lines]
    assert colors[:3] == [line.get_color() for line in loss.lines]
    assert colors[3] == colors[0]
    assert accuracy.get_ylim()[0] <= 54  # the lowest last accuracy is in sight
    (legend,) = figures["curves.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == list(drawn)
