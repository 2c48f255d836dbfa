"""The networks against torchvision's, known counts, He's initialization, the authors' module."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

import ghostnet
from ghostnet import Constants, GhostModule, build_network, count


@pytest.mark.parametrize("in_channels, stride", [(16, 1), (8, 2)])
def test_a_block_computes_what_torchvisions_does(in_channels, stride):
    ours = ghostnet.BasicBlock(in_channels, 16)
    projection = copy.deepcopy(ours.shortcut)
    theirs = torchvision.models.resnet.BasicBlock(in_channels, 16, stride, projection)
    state = {name.replace("shortcut", "downsample"): t for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(2, in_channels, 8, 8)
    assert_close(ours(x), theirs(x))


def test_a_resnet_classifies_by_the_mean_of_each_map():
    model = ghostnet.ResNet(8)
    x = torch.randn(2, 3, 32, 32)
    maps = model.blocks(F.relu(model.bn1(model.conv1(x))))
    assert maps.shape == (2, 64, 8, 8)
    means = F.adaptive_avg_pool2d(maps, 1).flatten(1)
    assert_close(model(x), F.linear(means, model.fc.weight, model.fc.bias))


def test_the_features_of_vgg16_are_torchvisions_and_dropout_precedes_its_linear_layers():
    ours = ghostnet.VGG16()
    theirs = torchvision.models.vgg16_bn(num_classes=1).features
    theirs.load_state_dict(ours.features.state_dict())
    x = torch.randn(4, 3, 32, 32)
    features = theirs(x).flatten(1)
    assert_close(ours.features(x).flatten(1), features)
    hidden, last = ours.classifier[1], ours.classifier[4]
    torch.manual_seed(0)
    logits = ours.classifier(features)
    torch.manual_seed(0)
    assert_close(logits, last(F.dropout(F.relu(hidden(F.dropout(features, 0.5))), 0.5)))


def test_experiments_are_what_their_names_say_in_one_recipe():
    for name, run in ghostnet.EXPERIMENTS.items():
        ghost = name.startswith(("gr_", "gv_"))
        network = {"gr": "resnet56", "gv": "vgg16"}[name[:2]] if ghost else name.split("_")[0]
        sweep, number = re.search(r"_([sd]?)(\d*)", f"{name}_").groups()
        ratio = int(number) if sweep == "s" and number else 2 if ghost else 1
        d = int(number) if sweep == "d" and number else 5 if ratio >= 10 else 3
        assert run == Constants(
            network, ratio, d, norm_inside=name.endswith("_inside"),
            schedule="multistep" if name == "gr_multistep" else "cosine",
            erasing=0.5 if name.endswith("_erasing") else 0.0,
        )


@pytest.mark.parametrize("network, ratio, d, size, flops", [
    ("resnet56", 1, 3, 855_770, "127.927M"),
    ("resnet56", 2, 3, 439_914, "67.505M"),
    ("resnet56", 10, 5, 156_203, "32.110M"),  # two layers stay, which ghosts would make dearer
    ("resnet56", 20, 5, 118_890, "24.146M"),  # one
    ("vgg16", 1, 3, 14_990_922, "314.570M"),
    ("vgg16", 2, 1, 7_633_578, "158.110M"),
    ("vgg16", 2, 3, 7_650_474, "159.216M"),
    ("vgg16", 2, 7, 7_734_314, "164.024M"),  # the first layer stays
    ("vgg16", 3, 3, 5_218_440, "108.346M"),
])
def test_network_has_the_known_counts(network, ratio, d, size, flops):
    with torch.device("meta"):
        model = build_network(Constants(network=network, ratio=ratio, dw_kernel_size=d))
        counted = count(model, torch.zeros(1, 3, 32, 32))[""]
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert (f"{counted[0] / 1e6:.3f}M", counted[1]) == (flops, size)


@pytest.mark.parametrize("network", ["resnet56", "vgg16"])
def test_convolutions_of_a_new_network_have_he_s_standard_deviation(network):
    """sqrt(2 / fan_in), inside ghost modules too; a lone ghost module has torch's, as nn.Conv2d."""
    torch.manual_seed(0)
    convolutions = 0
    for layer in build_network(Constants(network=network)).modules():
        if isinstance(layer, nn.Conv2d):
            convolutions += 1
            fan_in = layer.weight[0].numel()
            margin = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors
            std = layer.weight.square().mean().sqrt().item()
            assert std == pytest.approx(math.sqrt(2 / fan_in), rel=margin)
        elif isinstance(layer, nn.Linear):  # torch's own
            assert layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features)
    assert convolutions == {"resnet56": 2 * 57, "vgg16": 2 * 13}[network]
    alone = GhostModule(64, 64, 3).primary_conv.weight
    assert alone.std().item() == pytest.approx(1 / math.sqrt(3 * 9 * 64), rel=0.05)


def authors_module(ghost, x, relu):
    """What the authors' ghost module computes: batch norm, and ReLU, after each convolution."""

    def after(maps, norm):
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        maps = F.batch_norm(maps, mean, variance, norm.weight, norm.bias, norm.training)
        return maps.clamp(min=0) if relu else maps

    conv, cheap = ghost.primary_conv, ghost.cheap_operation
    maps = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    intrinsic = after(maps, ghost.primary_norm[0])
    n, d = intrinsic.shape[1], cheap.kernel_size[0]
    maps = F.conv2d(intrinsic, cheap.weight, None, padding=d // 2, groups=n)
    ghosts = after(maps[:, : ghost.out_channels - n], ghost.cheap_norm[0])
    return torch.cat([intrinsic, ghosts], dim=1)


@pytest.mark.parametrize("network", ["resnet56", "vgg16"])
@pytest.mark.parametrize("ratio, d", [(2, 3), (3, 5), (10, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_with_norms_inside_every_ghost_module_is_the_authors(network, ratio, d, training):
    constants = Constants(network, ratio, d, norm_inside=True)
    model = build_network(constants).double().train(training)  # double, as their maps are large
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GhostModule):
            layer.register_forward_hook(lambda *call, name=name: seen.update({name: call}))
    with torch.no_grad():
        expected = copy.deepcopy(model)
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        for name, (_, (x,), maps) in seen.items():
            relu = not name.endswith(("conv2", "shortcut.0"))
            assert_close(maps, authors_module(expected.get_submodule(name), x, relu))
    assert len(seen) >= {"resnet56": 54, "vgg16": 12}[network]  # up to three layers stay


def test_what_follows_another_layer_than_a_ghost_module_stays_where_it_is():
    ghost, other, norm, relu = GhostModule(4, 4, 1), nn.MaxPool2d(1), nn.BatchNorm2d(4), nn.ReLU()
    for order, inside in (((ghost, other, norm, relu), []), ((ghost, norm, other, relu), [norm])):
        model = copy.deepcopy(nn.Sequential(*order))
        ghostnet.move_norms_inside(model)
        assert [type(layer) for layer in model[0].cheap_norm] == [type(layer) for layer in inside]
        stays = [nn.Identity if layer in inside else type(layer) for layer in order]
        assert [type(layer) for layer in model] == stays


@pytest.mark.parametrize("name", ghostnet.EXPERIMENTS)
def test_norms_inside_change_no_count_and_no_weight_of_a_convolution_at_the_start(name):
    networks = []
    for inside in (False, True):
        torch.manual_seed(0)
        constants = replace(ghostnet.EXPERIMENTS[name], norm_inside=inside)
        networks.append(build_network(constants))
    counts = [count(network, torch.zeros(1, 3, 32, 32))[""] for network in networks]
    assert counts[0] == counts[1]
    weights = []
    for network in networks:
        named = network.named_parameters()
        weights.append({name: weight for name, weight in named if weight.ndim > 1})
    assert_close(*weights, rtol=0, atol=0)
