"""The data set on the device, against torchvision's own transforms and the real files."""

import pytest
import torch
import torchvision.transforms.functional as tv
from few import few_images
from PIL import Image

import ghostnet


def test_every_crop_and_mirror_equals_torchvisions():
    data = few_images(train=162)
    choices = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    plan = torch.column_stack([torch.arange(162).flip(0), choices])
    images, labels = data.train_batch(plan)
    assert torch.equal(labels, data.train_labels.flip(0))
    for ours, (index, top, left, mirrored) in zip(images, plan.tolist(), strict=True):
        original = data.train_images[index, 4:36, 4:36].numpy()
        picture = tv.crop(tv.pad(Image.fromarray(original), 4), top, left, 32, 32)
        if mirrored:
            picture = tv.hflip(picture)
        theirs = tv.to_tensor(picture)
        theirs = tv.normalize(theirs, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_epoch_takes_every_image_once_and_every_crop_and_mirror_equally_often():
    data = few_images()
    data.train_images = torch.empty(162_000, 0)
    index, top, left, mirrored = data.epoch_plan().unbind(1)
    assert torch.equal(index.sort().values, torch.arange(162_000))
    assert not torch.equal(index, torch.arange(162_000))
    drawn = torch.bincount(top * 18 + left * 2 + mirrored)
    assert len(drawn) == 162
    assert (drawn - 1000).abs().max() < 250  # eight standard deviations


def test_the_mean_and_std_of_the_real_images_are_the_constants(real_data_dir):
    data = ghostnet.Cifar10(real_data_dir, torch.device("cpu"))
    inner = data.train_images[:, 4:36, 4:36]
    levels = torch.arange(256).double() / 255
    for channel in range(3):
        share = torch.bincount(inner[..., channel].flatten(), minlength=256) / inner[..., 0].numel()
        mean = (share * levels).sum()
        std = (share * (levels - mean) ** 2).sum().sqrt()
        assert mean.item() == pytest.approx(ghostnet.MEAN[channel], abs=5e-5)
        assert std.item() == pytest.approx(ghostnet.STD[channel], abs=5e-5)
    assert data.classes[data.test_labels[ghostnet.PICTURE_IMAGE]] == "dog"
