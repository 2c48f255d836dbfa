"""replace_conv_with_ghost and report, on torchvision's networks and on layers of every kind."""

import copy
import pickle
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torchvision.models import get_model

from ghostnet import GhostModule, count, replace_conv_with_ghost, report

IMAGE = torch.zeros(1, 3, 8, 8)
NOTHING = r"no dense nn\.Conv2d"


def ghosts(model):
    return [name for name, module in model.named_modules() if isinstance(module, GhostModule)]


def snapshot(model):
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    return modules, [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]


def check_refused(model, message, **arguments):
    """Replacing raises this error and leaves the model as it is."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        replace_conv_with_ghost(model, **arguments)
    assert snapshot(model) == before


FAMILIES = ["resnet18", "densenet121", "efficientnet_b0", "mobilenet_v3_small", "regnet_x_400mf",
            "googlenet", "convnext_tiny", "swin_t", "deeplabv3_resnet50"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_just_the_layers_that_get_cheaper_are_replaced(name):
    segments = {"weights_backbone": None} if name.startswith("deeplab") else {}
    model = get_model(name, weights=None, **segments).eval()
    expected = []
    for layer, conv in model.named_modules():
        if type(conv) is nn.Conv2d and conv.groups == 1 and conv.out_channels > 1:
            half = -(-conv.out_channels // 2)  # maps are intrinsic, each with a ghost
            if half * conv.weight[0].numel() + half * 3 * 3 < conv.weight.numel():
                expected.append(layer)
    assert replace_conv_with_ghost(model) is model
    assert ghosts(model) == expected != []
    out = model(torch.zeros(1, 3, 64, 64))
    assert out["out"].shape == (1, 21, 64, 64) if segments else out.shape == (1, 1000)


def test_a_detection_network_has_finite_losses_after_replacement():
    torch.manual_seed(0)
    size = {"min_size": 64, "max_size": 64}
    model = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, **size)
    assert len(ghosts(replace_conv_with_ghost(model, ratio=4))) > 10
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 64).byte()
    losses = model(2 * [torch.rand(3, 64, 64)], 2 * [target])
    assert [loss.isfinite().item() for loss in losses.values()] == len(losses) * [True] != [True]


class Block(nn.Module):
    """Runs its convolution from a list, and holds it in a Sequential and a dictionary too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.conv.index = 3
        self.conv.ratio = "mine"  # which a ghost module has itself
        self.steps = [self.conv, nn.ReLU()]
        self.again = nn.Sequential(nn.ReLU(), self.conv)
        self.table = {"conv": self.conv}

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_whoever_holds_a_convolution_holds_its_one_ghost_with_what_was_noted_on_it():
    model = replace_conv_with_ghost(Block())
    for block in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ghosts(block) == ["conv"]
        for held in (block.steps[0], block.again[1], block.table["conv"]):
            assert held is block.conv
        assert (block.conv.index, block.conv.ratio) == (3, 2)
        assert vars(block.conv).keys() - vars(GhostModule(3, 8, 3)) == {"index"}
        block(torch.rand(2, 3, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())


def test_a_model_that_is_a_compiled_convolution_becomes_a_compiled_ghost():
    model = nn.Conv2d(3, 8, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGE)
    assert replace_conv_with_ghost(model) is model
    assert len(ghosts(compiled)) == 1
    torch.testing.assert_close(compiled(IMAGE), model.forward(IMAGE))


@pytest.mark.parametrize("convert", [torch.jit.script, lambda m: torch.jit.trace(m, IMAGE)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_parts_stay(convert):
    part = convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    assert ghosts(replace_conv_with_ghost(nn.Sequential(nn.Conv2d(3, 3, 3), part))) == ["0"]
    check_refused(part, NOTHING)


def changed(change):
    conv = nn.Conv2d(8, 8, 3)
    change(conv)
    return conv


def sharing_weight(conv, layer):
    layer.weight = conv.weight
    return nn.Sequential(conv, layer)


LEFT_ALONE = {
    "grouped": nn.Conv2d(8, 8, 3, groups=2),
    "subclass": type("Special", (nn.Conv2d,), {})(8, 8, 3),
    "lazy": nn.LazyConv2d(8, 3),
    "ghost": GhostModule(8, 8, 3),
    "frozen": nn.Conv2d(8, 8, 3).requires_grad_(False),
    "hooked": changed(lambda conv: conv.register_forward_hook(print)),
    "another forward": changed(lambda conv: setattr(conv, "forward", print)),
    "another _conv_forward": changed(lambda conv: setattr(conv, "_conv_forward", print)),
    "with a buffer": changed(lambda conv: conv.register_buffer("mask", torch.ones(3, 3))),
    "with a part": changed(lambda conv: conv.register_module("adapter", nn.Linear(8, 8))),
    "with a parameter": changed(lambda conv: conv.register_parameter("gain", conv.bias)),
    "spectral_norm": spectral_norm(nn.Conv2d(8, 8, 3)),
    "parametrized": parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    "pruned": prune.random_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5),
    "shared": sharing_weight(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)),
    "single output": nn.Conv2d(8, 1, 3),
    "1x1 with 9 inputs": nn.Conv2d(9, 60, 1),
    "gray 3x3": nn.Conv2d(1, 64, 3),
    "one weight less, two biases more": nn.Conv2d(10, 26, 1),
}


@pytest.mark.parametrize("part", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_must_not_be_replaced_stays_and_the_rest_is_replaced(part):
    check_refused(part, NOTHING, ratio=4)
    before = snapshot(part)
    model = nn.Sequential(nn.Conv2d(10, 28, 1), part)
    assert type(replace_conv_with_ghost(model, ratio=4)[0]) is GhostModule
    assert snapshot(part) == before


@pytest.mark.parametrize("keep", [
    "block",
    {"block.conv": "as in a dict"},
    (name for name in ["same"]),
    lambda name, conv: name.startswith("block.") and conv.in_channels == 8,
])
def test_layers_to_keep_are_kept_and_the_others_replaced(keep):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model.same = nn.Conv2d(8, 8, 3)
    model.block = nn.Sequential()
    model.block.conv = model.same
    model.block2 = nn.Conv2d(8, 8, 3)
    replace_conv_with_ghost(model, keep=keep)
    assert ghosts(model) == ["0", "block2"]


def test_arguments_and_all_but_the_weights_reach_the_ghost():
    options = {"device": "meta", "dtype": torch.half, "padding_mode": "reflect"}
    conv = nn.Conv2d(3, 9, (3, 5), (2, 1), (1, 2), (1, 2), **options).eval()
    ghost = replace_conv_with_ghost(nn.Sequential(copy.deepcopy(conv)), 3, dw_kernel_size=1)[0]
    assert (ghost.ratio, ghost.primary_conv.out_channels) == (3, 3)
    assert ghost.cheap_operation.kernel_size == (1, 1)
    assert {(p.device.type, p.dtype) for p in ghost.parameters()} == {("meta", torch.half)}
    assert {module.training for module in ghost.modules()} == {False}
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(ghost, name) == getattr(conv, name), name
    assert ghost.primary_conv.padding_mode == ghost.cheap_operation.padding_mode == "reflect"


OwnForward = type("OwnForward", (nn.Sequential,), {"forward": lambda self, x: self[0](self[1](x))})


@pytest.mark.parametrize("norm, kept", [
    (nn.BatchNorm2d(8), False),
    (nn.SyncBatchNorm(8), False),
    (nn.LazyBatchNorm2d(), False),
    (nn.GroupNorm(2, 8), True),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), True),
])
def test_bias_is_kept_except_before_a_batch_norm_in_a_sequential(norm, kept):
    for kind, stays in ((nn.Sequential, kept), (OwnForward, True)):
        ghost = replace_conv_with_ghost(kind(nn.Conv2d(3, 8, 3), norm))[0]
        assert (ghost.primary_conv.bias is not None) == stays
        assert (ghost.cheap_operation.bias is not None) == stays
    listed = nn.ModuleList([nn.Conv2d(3, 8, 3), norm])
    assert replace_conv_with_ghost(listed)[0].primary_conv.bias is not None


@pytest.mark.parametrize("arguments, message", [
    ({"ratio": 0}, "ratio must be .*0"),
    ({"dw_kernel_size": 2}, "dw_kernel_size must be odd"),
    ({"keep": ""}, "keep names no layer of the model: {''}"),
    ({"keep": ["0", "2.9"]}, "keep names no layer of the model: {'2.9'}"),
    ({"keep": ["0", "2"]}, NOTHING),
    ({"keep": lambda name, conv: True}, NOTHING),
])
def test_bad_argument_is_refused_and_leaves_the_network_unchanged(arguments, message):
    block = nn.Sequential(nn.Conv2d(8, 4, 3))
    check_refused(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), block), message, **arguments)


def test_report_lists_every_replaced_layer_and_the_totals(capsys):
    with torch.device("meta"):
        ordinary = torchvision.models.resnet18()
        ghost = replace_conv_with_ghost(copy.deepcopy(ordinary))
        x = torch.zeros(1, 3, 64, 64)
    report("resnet-18", ordinary, ghost, x)
    out = capsys.readouterr().out
    rows = re.findall(r"^(\S+): flops (\S+)M -> (\S+)M, params (\S+) -> (\S+)$", out, re.M)
    assert [row[0] for row in rows] == ghosts(ghost)
    # 64 -> 64 channels on 16 x 16 positions: 36,864 weights become 32 * 9 * 64 + 32 * 9
    assert rows[1] == ("layer1.0.conv1", "9.44", "4.79", "36,864", "18,720")
    f0, f1 = (count(model, x)[""][0] for model in (ordinary, ghost))
    p0, p1 = (sum(p.numel() for p in model.parameters()) for model in (ordinary, ghost))
    totals = [float(total) for total in re.findall(r"^  .+: (\S+)[Mx]", out, re.M)]
    expected = [f0 / 1e6, p0 / 1e6, f1 / 1e6, p1 / 1e6, f0 / f1, p0 / p1]
    assert totals == [round(value, 2) for value in expected]
    report("resnet-18", ordinary, ghost, x, per_layer=False)
    assert capsys.readouterr().out == out[out.index("measuring"):]
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        report("resnet-18", ghost, ghost, x)


def test_a_layer_that_is_used_twice_is_one_line_with_the_cost_of_both(capsys):
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    report("twice", model, replace_conv_with_ghost(copy.deepcopy(model)), torch.zeros(2, 8, 32, 64))
    lines = capsys.readouterr().out.splitlines()
    # Twice in 2 images of 2,048 positions: 8 * 8 * 9 weights become 4 * 8 * 9 + 4 * 9.
    assert lines[0] == "0: flops 4.72M -> 2.65M, params 576 -> 324"
    assert lines[1] == "measuring standard twice..."
