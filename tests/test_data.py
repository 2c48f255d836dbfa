"""The data set on the device, against torchvision's own transforms and the real files."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from few import few_images
from PIL import Image
from tiny import published
from torchvision.datasets import CIFAR10
from torchvision.transforms import RandomErasing

import ghostnet


def normalized(picture):
    tensor = tv.to_tensor(picture)
    return tv.normalize(tensor, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def test_the_sets_are_torchvisions_and_a_network_is_tested_on_normalized_test_images(tiny_data):
    with mock.patch.multiple(CIFAR10, **published(tiny_data)):
        data = ghostnet.Cifar10(tiny_data, torch.device("cpu"))
        train, test = CIFAR10(tiny_data, train=True), CIFAR10(tiny_data, train=False)
    assert torch.equal(data.train_images, torch.from_numpy(train.data))
    assert data.train_labels.tolist() == train.targets
    answers = torch.tensor(test.targets)
    answers[:5] = (answers[:5] + 1) % 10
    model = mock.Mock(return_value=F.one_hot(answers, 10))
    assert ghostnet.evaluate(model, data) == 75  # 15 of 20
    (images,) = model.call_args.args
    torch.testing.assert_close(images, torch.stack([normalized(picture) for picture, _ in test]))


@pytest.mark.parametrize("padding, size", [
    (0, (32, 32)), (1, (32, 32)), (4, (32, 32)), (4, (40, 48)),
])
def test_every_crop_and_mirror_equals_torchvisions(padding, size):
    positions = torch.arange(2 * padding + 1)
    choices = torch.cartesian_prod(positions, positions, torch.arange(2))
    data = few_images(train=len(choices), size=size)
    plan = torch.column_stack([torch.arange(len(choices)).flip(0), choices])
    images, labels = data.train_batch(plan, padding)
    assert torch.equal(labels, data.train_labels.flip(0))
    for ours, (index, top, left, mirrored) in zip(images, plan.tolist(), strict=True):
        original = Image.fromarray(data.train_images[index].numpy())
        picture = tv.crop(tv.pad(original, padding), top, left, *size)
        if mirrored:
            picture = tv.hflip(picture)
        torch.testing.assert_close(ours, normalized(picture), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 4])
def test_an_epoch_takes_every_image_once_and_every_crop_and_mirror_equally_often(padding):
    width = 2 * padding + 1
    number = 2000 * width**2
    data = few_images()
    data.train_images = torch.empty(number, 0)
    index, top, left, mirrored = data.epoch_plan(padding, 0.0).unbind(1)
    assert torch.equal(index.sort().values, torch.arange(number))
    assert not torch.equal(index, torch.arange(number))
    drawn = torch.bincount((top * width + left) * 2 + mirrored)
    assert len(drawn) == 2 * width**2
    assert (drawn - 1000).abs().max() < 250  # eight standard deviations


def distributions(rectangles):
    """Of each measure of rectangles, the share of those that are at most 0, 1, ..., 1024."""
    top, left, bottom, right = rectangles.T
    measures = {"top": top, "left": left, "bottom": bottom, "right": right}
    measures |= {"height": bottom - top, "width": right - left}
    measures["area"] = measures["height"] * measures["width"]
    counts = {name: np.bincount(values, minlength=1025) for name, values in measures.items()}
    return {name: np.cumsum(count) / len(rectangles) for name, count in counts.items()}


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_rectangles_are_distributed_as_torchvisions(size):
    torch.manual_seed(0)
    defaults = RandomErasing()
    theirs = []
    for _ in range(20_000):
        top, left, height, width, _ = RandomErasing.get_params(
            torch.empty(3, *size), defaults.scale, defaults.ratio, [defaults.value]
        )
        theirs.append((top, left, top + height, left + width))
    ours = distributions(ghostnet.draw_rectangles(200_000, size, 1.0).numpy())
    for name, expected in distributions(np.array(theirs)).items():
        # Equal distributions differ by more in one of a thousand such comparisons.
        assert abs(ours[name] - expected).max() < 0.0144, name


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_so_many_images_are_erased_and_each_has_a_rectangle_of_its_own(probability):
    torch.manual_seed(0)
    rectangles = ghostnet.draw_rectangles(100_000, (32, 32), probability)
    erased = (rectangles[:, 2:] > rectangles[:, :2]).all(dim=1)
    assert erased.float().mean().item() == pytest.approx(probability, abs=0.008)
    assert len(rectangles[erased].unique(dim=0)) > 0.5 * erased.sum()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_pixels_in_an_image_s_rectangle_are_zero_and_all_others_as_without_erasing(size):
    data = few_images(train=300, size=size)
    plan = data.epoch_plan(4, 0.5)
    images, _ = data.train_batch(plan, 4)
    expected, _ = data.train_batch(plan[:, :4], 4)
    assert images.stride() == expected.stride()  # channels_last
    expected = expected.numpy()
    erased = 0
    for image, (top, left, bottom, right) in zip(expected, plan[:, 4:].tolist(), strict=True):
        for row in range(top, bottom):
            for column in range(left, right):
                image[:, row, column] = 0
                erased += 1
    np.testing.assert_array_equal(images.numpy(), expected)
    assert erased > expected[:, 0].size / 20  # about a twelfth


def test_every_epoch_draws_other_rectangles_after_all_else():
    data = few_images(train=300)
    torch.manual_seed(0)
    plain = data.epoch_plan(4, 0.0)
    torch.manual_seed(0)
    first = data.epoch_plan(4, 1.0)
    second = data.epoch_plan(4, 1.0)
    assert torch.equal(first[:, :4], plain)
    assert (first[:, 4:] != second[:, 4:]).any(dim=1).float().mean() > 0.9


def test_the_mean_and_std_of_the_real_images_are_the_constants(real_data_dir):
    data = ghostnet.Cifar10(real_data_dir, torch.device("cpu"))
    levels = torch.arange(256).double() / 255
    for channel in range(3):
        pixels = data.train_images[..., channel].flatten()
        share = torch.bincount(pixels, minlength=256) / len(pixels)
        mean = (share * levels).sum()
        std = (share * (levels - mean) ** 2).sum().sqrt()
        assert mean.item() == pytest.approx(ghostnet.MEAN[channel], abs=5e-5)
        assert std.item() == pytest.approx(ghostnet.STD[channel], abs=5e-5)


def test_the_classes_are_those_of_the_real_files_and_the_picture_is_of_a_dog(real_data_dir):
    _, test = ghostnet.load_cifar10(real_data_dir)
    assert list(ghostnet.CLASSES) == test.classes
    assert ghostnet.CLASSES[test.targets[ghostnet.PICTURE_IMAGE]] == "dog"
