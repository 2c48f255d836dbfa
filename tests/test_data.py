"""The data set on the device, against torchvision's own transforms and the raw files."""

import pickle

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

import ghostnet


def test_every_crop_and_mirror_equals_torchvisions(data, monkeypatch):
    pictures = data.train_images[:, 4:36, 4:36].numpy()
    top, left, mirrored = (t.flatten() for t in torch.meshgrid(*map(torch.arange, (9, 9, 2)), indexing="ij"))
    index = torch.arange(len(top)) % len(pictures)
    ours, labels = data.train_batch(torch.stack([index, top, left, mirrored], dim=1))
    for i in range(len(top)):
        monkeypatch.setattr(transforms.RandomCrop, "get_params", lambda *_, i=i: (int(top[i]), int(left[i]), 32, 32))
        pipeline = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(p=float(mirrored[i])),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )
        picture = Image.fromarray(pictures[index[i]])
        torch.testing.assert_close(ours[i], pipeline(picture), atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, data.train_labels[index])
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_takes_every_image_once_at_uniform_offsets(data):
    n = 50_000
    many = ghostnet.Cifar10.__new__(ghostnet.Cifar10)
    many.train_images = torch.empty(n, 0)
    torch.manual_seed(0)
    index, top, left, mirrored = many.epoch_plan().unbind(1)
    assert torch.equal(index.sort().values, torch.arange(n))
    cells = torch.bincount(top * 18 + left * 2 + mirrored, minlength=162).double()
    assert len(cells) == 162
    chi_squared = ((cells - n / 162) ** 2 / (n / 162)).sum()
    assert chi_squared < 161 + 5 * (2 * 161) ** 0.5  # five standard deviations above the mean


def test_epochs_differ_and_a_seed_repeats_them(data):
    torch.manual_seed(3)
    first, second = data.epoch_plan(), data.epoch_plan()
    torch.manual_seed(3)
    assert torch.equal(first, data.epoch_plan())
    assert not torch.equal(first, second)


def test_test_images_are_the_central_view(data, tiny_data_dir):
    raw = pickle.loads((tiny_data_dir / "cifar-10-batches-py" / "test_batch").read_bytes())
    images = torch.from_numpy(raw["data"].reshape(-1, 3, 32, 32)) / 255
    expected = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))(images)
    torch.testing.assert_close(data.normalize(data.test_images), expected, atol=1e-5, rtol=1e-5)
    assert data.test_labels.tolist() == raw["labels"]


def test_real_cifar10_is_whole_and_its_mean_and_std_are_the_constants(real_data_dir):
    data = ghostnet.Cifar10(real_data_dir, torch.device("cpu"))
    assert data.train_images.shape == (50_000, 40, 40, 3) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (10_000, 32, 32, 3)
    inner = data.train_images[:, 4:36, 4:36]
    assert int(data.train_images.sum()) == int(inner.sum())  # the padding is zero
    pixels = inner.numpy() / np.float32(255)
    np.testing.assert_allclose(pixels.mean((0, 1, 2), dtype=np.float64), ghostnet.MEAN, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2), dtype=np.float64), ghostnet.STD, atol=5e-5)
    raw = pickle.loads((real_data_dir / "cifar-10-batches-py" / "data_batch_3").read_bytes(), encoding="latin1")
    image = torch.from_numpy(raw["data"][7].reshape(3, 32, 32)).permute(1, 2, 0)
    assert torch.equal(inner[20_007], image)
    assert data.train_labels[20_007] == raw["labels"][7]
    assert data.classes[data.test_labels[ghostnet.PICTURE_IMAGE]] == "dog"
