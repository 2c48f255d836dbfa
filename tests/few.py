"""A few random images in the place of CIFAR-10, and runs that train on them inside the tests."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn

import ghostnet


def few_images(train=40, test=20, device="cpu", size=(32, 32)):
    """A Cifar10 as the script makes it, of images that lie in no file."""
    random = np.random.default_rng(0)
    parts = []
    for n in (train, test):
        images = random.integers(256, size=(n, *size, 3), dtype=np.uint8)
        targets = random.integers(10, size=n).tolist()
        parts.append(SimpleNamespace(data=images, targets=targets))
    with mock.patch.object(ghostnet, "load_cifar10", return_value=parts):
        return ghostnet.Cifar10(Path(), torch.device(device))


def small_network(constants):
    """A network that trains in no time, in the place of build_network."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Dropout(), nn.Linear(512, 10),
    )
    if constants.ratio > 1:
        ghostnet.replace_conv_with_ghost(model)
    if constants.norm_inside:
        ghostnet.move_norms_inside(model)
    return model


def run_of(constants, accuracies, **history):
    """A run of an abacus with these test accuracies; all else that is not given is 100 more."""
    more = [accuracy + 100 for accuracy in accuracies]
    history = {name: history.get(name, more) for name in ghostnet.HISTORY}
    history["test_accuracy"] = accuracies
    model = ghostnet.build_network(constants).state_dict()
    return ghostnet.Checkpoint(constants, history, "abacus", model, {})


def weights(model):
    """All parameters of a model as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(path, constants, data, precision=torch.float32):
    """Train a run from where its file stands to its end."""
    checkpoint = ghostnet.load_or_begin(path, constants)
    ghostnet.train(checkpoint, path, data, precision, cuda_graph=False)
    return checkpoint
