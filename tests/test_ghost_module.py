"""GhostModule against plain convolutions, the paper's equations and nn.Conv2d itself."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostnet import GhostModule, count

GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2, "bias": False},
    "5x2, uneven": {"kernel_size": (5, 2), "padding": (3, 1), "stride": (2, 1)},
    "same, dilated": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1), "bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
@pytest.mark.parametrize("d", [1, 3, 5])
@pytest.mark.parametrize("groups, out_channels", [(1, 1), (1, 7), (1, 12), (3, 6), (3, 15)])
def test_output_is_intrinsic_maps_and_their_ghosts(geometry, ratio, d, groups, out_channels):
    options = {**geometry, "groups": groups}
    module = GhostModule(3, out_channels, ratio=ratio, dw_kernel_size=d, **options).double()
    x = torch.rand(2, 3, 13, 12, dtype=torch.float64)
    del options["kernel_size"]
    options.pop("bias", None)
    maps = F.conv2d(x, module.primary_conv.weight, module.primary_conv.bias, **options)
    s = min(ratio, out_channels // groups)  # one map of a group makes no ghost
    intrinsic = groups * -(-out_channels // (s * groups))
    assert (module.ratio, maps.shape[1]) == (s, intrinsic)
    expected = [maps]
    for ghost in range(intrinsic * (s - 1)):
        source = maps[:, ghost // (s - 1), None]
        cheap = F.conv2d(source, module.cheap_operation.weight[ghost, None], padding=d // 2)
        if module.cheap_operation.bias is not None:
            cheap = cheap + module.cheap_operation.bias[ghost]
        expected.append(cheap)
    expected = torch.cat(expected, dim=1)[:, :out_channels]
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[0]), expected[0])  # without a batch dimension
    last = torch.channels_last
    assert module.to(memory_format=last)(x.to(memory_format=last)).is_contiguous(memory_format=last)


@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize("d, k", [(1, 1), (1, 3), (3, 1), (5, 3)])
def test_module_costs_what_the_papers_equations_say(s, d, k):
    c, n, h, w = 6, 24, 5, 4
    with torch.device("meta"):
        module = GhostModule(c, n, k, padding=k // 2, bias=False, ratio=s, dw_kernel_size=d)
        flops, size = count(module, torch.zeros(1, c, h, w))[""]
    assert size == n // s * c * k * k + (s - 1) * n // s * d * d
    assert flops == n // s * h * w * c * k * k + (s - 1) * n // s * h * w * d * d


def test_layers_put_inside_follow_the_convolutions_in_the_order_in_which_they_come():
    module = GhostModule(3, 7, 3, padding=1, ratio=3, dw_kernel_size=5)  # 3 intrinsic, 4 ghosts
    alone = GhostModule(3, 7, 3, padding=1, ratio=1)  # no ghosts
    for ghost in (module, alone):
        ghost.put_inside(lambda maps: nn.GroupNorm(maps, maps))
        ghost.put_inside(lambda maps: nn.PReLU(maps, init=0.1))
    x = torch.rand(2, 3, 6, 6)

    def inside(maps):
        return F.leaky_relu(F.instance_norm(maps), 0.1)

    intrinsic = inside(F.conv2d(x, **dict(module.primary_conv.named_parameters()), padding=1))
    cheap = dict(module.cheap_operation.named_parameters())
    ghosts = inside(F.conv2d(intrinsic, **cheap, padding=2, groups=3)[:, :4])
    torch.testing.assert_close(module(x), torch.cat([intrinsic, ghosts], dim=1))
    ordinary = F.conv2d(x, **dict(alone.primary_conv.named_parameters()), padding=1)
    torch.testing.assert_close(alone(x), inside(ordinary))


ANY_BATCH = ({0: torch.export.Dim("batch")},)


def compiled(module, x):
    torch.compiler.reset()  # a function is compiled a few times only, and other tests count
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def exported(module, x):
    return torch.export.export(module, (x,), dynamic_shapes=ANY_BATCH).module()


def onnx_session(module, x):
    pytest.importorskip("onnxscript", reason="see requirements-dev.txt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="see requirements-dev.txt")
    file = io.BytesIO()
    options = {"dynamo": True, "verbose": False, "dynamic_shapes": ANY_BATCH}
    torch.onnx.export(module, (x,), **options).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


CONVERSIONS = {
    "compile": compiled,
    "export": exported,
    "trace": torch.jit.trace,
    "script": lambda module, x: torch.jit.script(module),
    "onnx": onnx_session,
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_converted_module_computes_the_same_on_another_batch(convert):
    """All ways through forward: with a cut and norms inside, without, and without ghosts."""
    cut = GhostModule(3, 7, 3, stride=2, padding=1, ratio=3)
    if convert is not onnx_session:  # of torch 2.6, which knows no batch norm
        cut.put_inside(nn.BatchNorm2d)
        cut.put_inside(lambda _maps: nn.ReLU(inplace=True))
    module = nn.Sequential(cut, GhostModule(7, 8, 1), GhostModule(8, 3, 1, ratio=1)).eval()
    x = torch.rand(4, 3, 6, 6)
    converted = convert(module, x[:2])
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_shape_and_attributes_are_those_of_a_convolution(geometry, padding_mode):
    conv = nn.Conv2d(3, 15, groups=3, padding_mode=padding_mode, **geometry)
    module = GhostModule(3, 15, groups=3, padding_mode=padding_mode, **geometry)
    x = torch.rand(2, 3, 9, 8)
    assert module(x).shape == conv(x).shape
    names = [name for name in module.state_dict() if name.endswith("weight")]
    assert names == ["primary_conv.weight", "cheap_operation.weight"]
    assert module.out_channels == conv.out_channels
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(module, name) == getattr(conv, name), name
        with pytest.raises(AttributeError):  # it would change nothing
            setattr(module, name, 1)


@pytest.mark.parametrize("arguments, message", [
    ({"ratio": 0}, "ratio must be .* not 0"),
    ({"ratio": 2.5}, "ratio must be .* not 2.5"),
    ({"ratio": None}, "ratio must be .* not None"),
    ({"dw_kernel_size": 2}, "dw_kernel_size must be odd .* not 2"),
    ({"dw_kernel_size": -3}, "dw_kernel_size must be .* positive, not -3"),
    ({"dw_kernel_size": 3.0}, "dw_kernel_size must be"),
    ({"groups": 4}, "out_channels must be divisible by groups"),
    ({"padding_mode": "mirror"}, "padding_mode must be one of"),
])
def test_bad_argument_is_a_value_error_that_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        GhostModule(4, 6, 3, **arguments)
