import contextlib
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, get_model, list_models, regnet, segmentation

from ghostnet import GhostModule, replace_conv_with_ghost, report

ROOT = Path(__file__).parent.parent


def network(**layers):
    return nn.Sequential(OrderedDict(layers))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def snapshot(model):
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    return modules, [(key, id(value)) for key, value in model.state_dict(keep_vars=True).items()]


@contextlib.contextmanager
def unchanged(model):
    before = snapshot(model)
    yield
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------ torchvision's networks


@pytest.fixture
def meta(monkeypatch):
    """Networks are built without memory; RegNet computes its widths with tensors, which need some."""
    block_params = regnet.BlockParams.from_init_params

    def block_params_on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return block_params(*args, **kwargs)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", block_params_on_cpu)
    with torch.device("meta"):
        yield


def dense_convolutions(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Conv2d and m.groups == 1]


def replace_all(model, ratio):
    """Replace every dense convolution: fewer parameters, and no ratio above a layer's channels."""
    channels = {name: model.get_submodule(name).out_channels for name in dense_convolutions(model)}
    size = parameters(model)
    assert channels
    assert replace_conv_with_ghost(model, ratio) is model
    ghosts = {name: module for name, module in model.named_modules() if isinstance(module, GhostModule)}
    assert {name: min(ratio, n) for name, n in channels.items()} == {name: m.ratio for name, m in ghosts.items()}
    assert parameters(model) < size


def shapes(model, x):
    out = model.eval()(x)
    return {key: tuple(value.shape) for key, value in out.items()} if isinstance(out, dict) else tuple(out.shape)


SEGMENTATION = list_models(module=segmentation)
IMAGE_SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit": 224}  # least that they take; others 64


def image(name, batch=1):
    size = next((size for start, size in IMAGE_SIZES.items() if name.startswith(start)), 64)
    return torch.rand(batch, 3, size, size)


@pytest.mark.parametrize("name", [*list_models(module=torchvision.models), *SEGMENTATION])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_network_keeps_its_output_shapes_with_fewer_parameters(name, meta):
    options = {"weights_backbone": None} if name in SEGMENTATION else {}
    model, x = get_model(name, weights=None, **options), image(name)
    before = shapes(model, x)
    replace_all(model, ratio=2)
    assert shapes(model, x) == before


@pytest.mark.parametrize("name", list_models(module=detection))
def test_detection_network_has_finite_losses_with_more_ghosts_than_some_of_its_layers_have_maps(name):
    torch.manual_seed(0)
    small = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    model = get_model(name, weights=None, weights_backbone=None, **small)
    replace_all(model, ratio=4)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    target |= {"masks": torch.ones(1, 64, 64, dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3)}
    losses = model(2 * [torch.rand(3, 64, 64)], 2 * [target])
    assert len(losses) >= 2 and all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_network_trains_every_parameter_after_replacement(name):
    torch.manual_seed(0)
    model = replace_conv_with_ghost(get_model(name, weights=None, num_classes=5))
    out = model(image(name, batch=4))
    assert out.shape == (4, 5)
    nn.functional.cross_entropy(out, torch.tensor([0, 1, 2, 3])).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert any(grad.abs().max() > 0 for key, grad in gradients.items() if "cheap_operation" in key)


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double])
def test_device_and_dtype_are_kept(device, dtype):
    model = replace_conv_with_ghost(network(conv=nn.Conv2d(3, 8, 3, device=device, dtype=dtype)))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    assert len(list(model.parameters())) == 4


def test_mode_of_each_module_is_kept():
    model = network(frozen=nn.Conv2d(3, 8, 3).eval(), free=nn.Conv2d(8, 8, 3))
    replace_conv_with_ghost(model)
    assert model.training
    assert {module.training for module in model.frozen.modules()} == {False}
    assert {module.training for module in model.free.modules()} == {True}


def test_requires_grad_of_each_convolution_is_kept():
    model = network(frozen=nn.Conv2d(3, 8, 3).requires_grad_(False), free=nn.Conv2d(8, 8, 3))
    replace_conv_with_ghost(model)
    assert {p.requires_grad for p in model.frozen.parameters()} == {False}
    assert {p.requires_grad for p in model.free.parameters()} == {True}


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 5, "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_geometry_is_kept(geometry):
    conv, x = nn.Conv2d(3, 7, **geometry), torch.rand(2, 3, 9, 8)
    ghost = replace_conv_with_ghost(network(conv=conv)).conv
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(ghost.primary_conv, name) == getattr(conv, name), name
    assert ghost.cheap_operation.padding_mode == conv.padding_mode
    assert ghost(x).shape == conv(x).shape


def biases(ghost):
    return [conv.bias is not None for conv in (ghost.primary_conv, ghost.cheap_operation)]


@pytest.mark.parametrize(
    "bias, follower, kept",
    [
        (True, nn.ReLU(), True),
        (True, nn.BatchNorm2d(8), False),
        (True, nn.GroupNorm(2, 8), True),
        (False, nn.ReLU(), False),
        (False, nn.BatchNorm2d(8), False),
    ],
)
def test_bias_is_kept_except_before_a_batch_norm(bias, follower, kept):
    model = replace_conv_with_ghost(network(conv=nn.Conv2d(3, 8, 3, bias=bias), follower=follower))
    assert biases(model.conv) == [kept, kept]


class Reversed(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


class Attributes(nn.Module):
    def __init__(self, conv, bn):
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x):
        return self.conv(self.bn(x))


@pytest.mark.parametrize(
    "block",
    [
        Attributes,
        Reversed,
        lambda conv, bn: nn.ModuleList([conv, bn]),
        lambda conv, bn: network(conv=conv, last=network(bn=bn)),
    ],
    ids=["attributes", "reversed", "list", "nested"],
)
def test_bias_is_kept_before_a_batch_norm_that_is_merely_registered_next(block):
    model = replace_conv_with_ghost(block(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    (ghost,) = (module for module in model.modules() if isinstance(module, GhostModule))
    assert biases(ghost) == [True, True]


def test_bias_is_dropped_in_a_sequential_that_has_another_name():
    block = torchvision.ops.Conv2dNormActivation(3, 8, bias=True)
    assert type(block) is not nn.Sequential and block[0].bias is not None
    assert biases(replace_conv_with_ghost(block)[0]) == [False, False]


def test_grouped_depthwise_and_subclassed_convolutions_are_left_alone():
    class Special(nn.Conv2d):
        pass

    others = {
        "grouped": nn.Conv2d(8, 8, 3, groups=2),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "special": Special(8, 8, 3),
        "transposed": nn.ConvTranspose2d(8, 8, 3),
        "flat": nn.Conv1d(8, 8, 3),
    }
    model = replace_conv_with_ghost(network(dense=nn.Conv2d(3, 8, 3), **others))
    assert isinstance(model.dense, GhostModule)
    assert all(getattr(model, name) is module for name, module in others.items())


def shared(follower=None):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    return network(first=conv, follower=follower or nn.ReLU(), block=network(second=conv))


def test_convolution_in_two_places_becomes_one_ghost_module_in_both():
    model = replace_conv_with_ghost(shared())
    assert isinstance(model.first, GhostModule)
    assert model.first is model.block.second


@pytest.mark.parametrize("name", ["first", "block.second"])
def test_convolution_kept_by_one_of_its_names_is_kept_in_all_its_places(name):
    model = shared()
    model.other = nn.Conv2d(8, 8, 3)
    conv = model.first
    replace_conv_with_ghost(model, keep=[name])
    assert isinstance(model.other, GhostModule)
    assert model.first is conv
    assert model.block.second is conv


def test_bias_of_a_convolution_is_kept_when_a_batch_norm_follows_only_one_of_its_places():
    assert replace_conv_with_ghost(shared(nn.BatchNorm2d(8))).first.primary_conv.bias is not None


@pytest.mark.parametrize(
    "keep",
    [
        ["block.conv"],
        ["block"],
        {"block.conv"},
        {"block.conv": "as in a dict"},
        ("block.conv", "block"),
        "block",
        (name for name in ["block.conv"]),
        lambda name, conv: name.startswith("block") and conv.in_channels == 8,
        lambda name, conv: conv.kernel_size == (1, 1),
    ],
)
def test_layers_to_keep_are_kept_and_the_others_replaced(keep):
    stem = network(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8))
    model = network(stem=stem, block=network(conv=nn.Conv2d(8, 8, 1)), last=nn.Conv2d(8, 4, 3))
    kept = model.block.conv
    replace_conv_with_ghost(model, keep=keep)
    assert model.block.conv is kept
    assert isinstance(model.stem.conv, GhostModule)
    assert isinstance(model.last, GhostModule)


@pytest.mark.parametrize("keep", ["10", ["10"]])
def test_a_layer_is_kept_by_its_number_and_not_by_its_digits(keep):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(11)))
    replace_conv_with_ghost(model, keep=keep)
    assert [name for name, layer in model.named_children() if not isinstance(layer, GhostModule)] == ["10"]


def test_ratio_and_kernel_reach_every_ghost_module():
    model = replace_conv_with_ghost(network(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 9, 3)), ratio=4, dw_kernel_size=5)
    assert [(m.ratio, m.primary_conv.out_channels, m.cheap_operation.kernel_size) for m in model] == [
        (4, 2, (5, 5)),
        (4, 3, (5, 5)),
    ]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "model",
    [
        network(linear=nn.Linear(3, 3)),
        network(depthwise=nn.Conv2d(4, 4, 3, groups=4)),
        network(ghost=GhostModule(3, 8, 3)),
        GhostModule(3, 8, 3),
    ],
    ids=["no convolution", "depthwise", "ghost module inside", "ghost module itself"],
)
def test_nothing_to_replace_is_a_value_error(model):
    with unchanged(model), pytest.raises(ValueError, match=r"no dense nn\.Conv2d to replace"):
        replace_conv_with_ghost(model)


def test_second_call_is_a_value_error_that_leaves_the_ghost_network_unchanged():
    model = replace_conv_with_ghost(get_model("squeezenet1_1", weights=None))
    with unchanged(model), pytest.raises(ValueError, match=r"no dense nn\.Conv2d to replace"):
        replace_conv_with_ghost(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 0}, "ratio must be .*0"),
        ({"ratio": -2}, "ratio must be .*-2"),
        ({"ratio": 2.5}, "ratio must be .*2.5"),
        ({"ratio": "2"}, "ratio must be"),
        ({"dw_kernel_size": 2}, "dw_kernel_size must be odd"),
        ({"dw_kernel_size": -3}, "dw_kernel_size must be .*positive"),
        ({"keep": 3}, None),
        ({"keep": None}, None),
        ({"keep": "gone"}, "keep .*: gone$"),
        ({"keep": ["first", "block.lost", "gone"]}, r"keep .*: block\.lost, gone$"),
        ({"keep": ["first", "block.last"]}, "no dense nn.Conv2d to replace"),
        ({"keep": lambda name, conv: True}, "no dense nn.Conv2d to replace"),
    ],
)
def test_bad_argument_is_refused_and_leaves_the_network_unchanged(arguments, message):
    last = nn.Conv2d(8, 4, 3)
    model = network(first=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), block=network(last=last))
    with unchanged(model), pytest.raises((ValueError, TypeError), match=message):
        replace_conv_with_ghost(model, **arguments)


def test_lazy_convolution_is_refused_by_name_and_replaced_after_a_batch():
    model = network(first=nn.Conv2d(3, 8, 3), later=nn.LazyConv2d(6, 3))
    with unchanged(model), pytest.raises(ValueError, match=r"later .*lazy"):
        replace_conv_with_ghost(model)
    model(torch.zeros(1, 3, 8, 8))
    replace_conv_with_ghost(model)
    assert isinstance(model.later, GhostModule)
    assert model.later.primary_conv.in_channels == 8


# ---------------------------------------------------------------------------------------------------------- report


def test_report_lists_every_replaced_layer_and_the_totals(capsys):
    with torch.device("meta"):
        ordinary, ghost = (get_model("resnet18", weights=None) for _ in range(2))
        layers = dense_convolutions(ordinary)
        report("resnet-18", ordinary, replace_conv_with_ghost(ghost), torch.zeros(1, 3, 64, 64))
    out = capsys.readouterr().out
    line = r"^(\S+): flops (\d+\.\d\d)M -> (\d+\.\d\d)M, params ([\d,]+) -> ([\d,]+)$"
    rows = {name: (float(f0), float(f1), p0, p1) for name, f0, f1, p0, p1 in re.findall(line, out, re.MULTILINE)}
    assert list(rows) == layers
    for name, row in rows.items():
        assert row[2:] == tuple(f"{parameters(m.get_submodule(name)):,}" for m in (ordinary, ghost))
    primary, cheap, positions = 64 * 9 * 32, 9 * 32, 16 * 16  # of layer1.0.conv1: 64 -> 64 channels, maps of 16 x 16
    expected = [f"{macs / 1e6:.2f}" for macs in (64 * 9 * 64 * positions, (primary + cheap) * positions)]
    assert [f"{value:.2f}" for value in rows["layer1.0.conv1"][:2]] == expected

    totals = re.findall(r"^  (.+): (\d+\.\d\d)[Mx]", out, re.MULTILINE)
    assert [name for name, _ in totals] == ["flops", "params", "flops", "params", "flops reduction", "param reduction"]
    f0, p0, f1, p1, flops_reduction, params_reduction = (float(value) for _, value in totals)
    assert (p0, p1) == (round(parameters(ordinary) / 1e6, 2), round(parameters(ghost) / 1e6, 2))
    saved = sum(before - after for before, after, *_ in rows.values())
    assert f0 - f1 == pytest.approx(saved, abs=0.01 * len(rows))  # both sides are sums of rounded numbers
    assert flops_reduction == pytest.approx(f0 / f1, abs=0.01)
    assert params_reduction == pytest.approx(parameters(ordinary) / parameters(ghost), abs=0.005)


def test_report_without_layers_prints_the_totals_and_leaves_the_networks_as_they_were(capsys):
    ordinary, ghost = (network(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8).eval()) for _ in range(2))
    replace_conv_with_ghost(ghost)
    with unchanged(ordinary), unchanged(ghost):
        report("tiny", ordinary, ghost, torch.zeros(1, 3, 8, 8), per_layer=False)
    out = capsys.readouterr().out
    assert "measuring ghost-tiny..." in out
    assert "->" not in out


def test_readme_example_on_resnet18_prints_the_savings_that_the_readme_states(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", example]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    totals = re.findall(r"^ +.*: (\d+\.\d+[Mx])", result.stdout, re.MULTILINE)
    assert len(totals) == 6
    assert not [total for total in totals if total not in readme]
