import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import ghostnet
from ghostnet import Constants, GhostModule


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are tiny: threads only wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(module, *shape, dtype=torch.float32, seed=0):
    """The module with weights, and an input of that shape, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype), torch.randn(shape, generator=generator).to(dtype)


# --------------------------------------------------------------------------------------------------- computation


def convolve(x, weight, bias, stride, padding, dilation, groups):
    """Convolution in numpy: the sum over the kernel of shifted, strided images times one weight matrix each."""
    out_channels, group_width, *kernel = weight.shape
    span = [step * (k - 1) for step, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        sides = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in span]
    else:
        sides = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), (0, 0), *sides])
    height, width = ((n - s - 1) // step + 1 for n, s, step in zip(x.shape[2:], span, stride, strict=True))
    grouped = x.reshape(len(x), groups, group_width, *x.shape[2:])
    weight = weight.reshape(groups, out_channels // groups, group_width, *kernel)
    out = np.zeros((len(x), groups, out_channels // groups, height, width))
    for i, j in np.ndindex(*kernel):
        top, left = i * dilation[0], j * dilation[1]
        rows, columns = np.s_[top :: stride[0]], np.s_[left :: stride[1]]
        shifted = grouped[..., rows, columns][..., :height, :width]
        out += np.einsum("ngchw,goc->ngohw", shifted, weight[..., i, j])
    out = out.reshape(len(x), out_channels, height, width)
    return out if bias is None else out + bias[:, None, None]


def as_numpy(conv):
    return conv.weight.detach().numpy(), None if conv.bias is None else conv.bias.detach().numpy()


GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride 2, no bias": {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "5x2, uneven padding": {"kernel_size": (5, 2), "padding": (3, 1), "bias": False},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "valid, stride 2": {"kernel_size": 3, "padding": "valid", "stride": 2, "bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("d", [1, 3, 5, 7])
@pytest.mark.parametrize("groups, out_channels", [(1, 1), (1, 7), (1, 12), (3, 15)])
def test_output_equals_numpy_computation(geometry, ratio, d, groups, out_channels):
    module = GhostModule(3, out_channels, groups=groups, ratio=ratio, dw_kernel_size=d, **geometry)
    module, x = seeded(module, 2, 3, 9, 8, dtype=torch.float64)
    s = min(ratio, out_channels // groups)  # with one map in a group there is nothing to make a ghost of
    intrinsic = groups * -(-out_channels // (s * groups))
    stride, dilation, padding = (geometry.get(key, 1) for key in ("stride", "dilation", "padding"))
    pairs = [value if isinstance(value, tuple | str) else (value, value) for value in (stride, dilation, padding)]
    stride, dilation, padding = pairs if "padding" in geometry else (*pairs[:2], (0, 0))
    primary = convolve(x.numpy(), *as_numpy(module.primary_conv), stride, padding, dilation, groups)
    assert primary.shape[1] == intrinsic
    expected = primary
    if s > 1:
        ghosts = convolve(primary, *as_numpy(module.cheap_operation), (1, 1), (d // 2, d // 2), (1, 1), intrinsic)
        assert ghosts.shape[1] == intrinsic * (s - 1)
        expected = np.concatenate([primary, ghosts], axis=1)[:, :out_channels]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("layer", [nn.Conv2d, GhostModule])
def test_without_any_map_it_can_be_made_and_not_be_called_like_a_convolution(layer):
    with pytest.raises(RuntimeError, match=r"weight of size \[0, 3, 3, 3\]"):
        layer(3, 0, 3)(torch.zeros(1, 3, 6, 5))


@pytest.mark.parametrize("out_channels, ratio", [(8, 2), (7, 2), (7, 4)])
def test_input_without_batch_dimension_gives_the_maps_of_a_batch_of_one(out_channels, ratio):
    module, x = seeded(GhostModule(3, out_channels, 3, padding=1, ratio=ratio), 1, 3, 6, 5)
    torch.testing.assert_close(module(x[0]), module(x)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("out_channels", [6, 7])
def test_output_is_contiguous_like_that_of_a_convolution(out_channels, memory_format):
    module, x = seeded(GhostModule(3, out_channels, 3), 2, 3, 6, 6)
    out = module.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("ratio, d, options", [(1, 3, {}), (2, 3, {}), (3, 1, {"stride": 2}), (2, 5, {"bias": False})])
def test_gradients_equal_finite_differences(ratio, d, options):
    module, x = seeded(GhostModule(2, 5, 3, padding=1, ratio=ratio, dw_kernel_size=d, **options), 2, 2, 4, 3)
    module, x = module.double(), x.double().requires_grad_()

    def forward(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    names, parameters = zip(*module.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(forward, (x, *parameters))


def backward_steps(out):
    """Names of all nodes in the graph behind a tensor."""
    nodes = [out.grad_fn]
    for node in nodes:  # which grows on the way
        nodes += [before for before, _ in node.next_functions if before is not None and before not in nodes]
    return {node.name() for node in nodes}


@pytest.mark.parametrize(
    "out_channels, ratio, groups, cut",
    [(8, 2, 1, False), (9, 3, 1, False), (12, 2, 3, False), (1, 2, 1, False), (7, 2, 1, True), (8, 3, 1, True)],
)
def test_a_cut_that_would_cut_nothing_is_not_made(out_channels, ratio, groups, cut):
    module = GhostModule(3, out_channels, 3, groups=groups, ratio=ratio)
    steps = backward_steps(module(torch.rand(2, 3, 6, 6)))
    assert any("Slice" in step or "Narrow" in step for step in steps) == cut
    assert not any("Copy" in step or "Clone" in step for step in steps)


@pytest.mark.parametrize("dtype, tolerance", [(torch.half, 5e-3), (torch.bfloat16, 4e-2), (torch.double, 1e-5)])
def test_output_has_the_dtype_of_the_module_and_the_values_of_float32(dtype, tolerance):
    module = GhostModule(3, 7, 3, padding=1, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    module, x = seeded(module, 2, 3, 6, 6, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    expected = module.float()(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


# -------------------------------------------------------------------------------------------------------- counts


def multiply_adds(model, x):
    """Multiply-adds of the convolutions and linear layers alone, from the shapes that pass through them."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        positions = output.numel() // output.shape[1]
        total += positions * module.weight.numel()  # one multiply-add a weight at each position, grouped or not

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model(x)
    return total


COUNTS = [  # network, ratio, dw_kernel_size, parameters, multiply-adds (M), flops by thop (M)
    ("resnet56", 1, 3, 855_770, "125.748", "127.927"),
    ("vgg16", 1, 3, 14_990_922, "313.464", "314.570"),
    ("vgg16", 2, 1, 7_633_578, "157.004", "158.110"),
    ("vgg16", 2, 3, 7_650_474, "158.110", "159.216"),
    ("vgg16", 2, 5, 7_684_266, "160.322", "161.427"),
    ("vgg16", 2, 7, 7_734_954, "163.639", "164.745"),
    ("vgg16", 3, 3, 5_218_440, "107.240", "108.346"),
    ("vgg16", 4, 3, 3_982_362, "80.433", "81.539"),
    ("vgg16", 5, 3, 3_269_625, "65.665", "66.771"),
    ("resnet56", 2, 3, 439_914, "65.326", "67.505"),
    ("resnet56", 3, 3, 312_038, "48.113", "50.292"),
    ("resnet56", 5, 3, 198_646, "32.798", "34.977"),
    ("resnet32", 1, 3, 466_906, "69.125", "70.386"),
]


@pytest.mark.parametrize("network, ratio, d, parameters, macs, thop", COUNTS)
def test_network_has_the_known_counts(network, ratio, d, parameters, macs, thop):
    with torch.device("meta"):
        model = ghostnet.build_network(Constants(network=network, ratio=ratio, dw_kernel_size=d))
        x = torch.zeros(1, 3, 32, 32)
    flops, counted = ghostnet.count(model, x)[""]
    assert (counted, f"{flops / 1e6:.3f}") == (parameters, thop)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert f"{multiply_adds(model, x) / 1e6:.3f}" == macs


PAPER_COLUMNS = {  # tables 3, 4 and 5: parameters (M), FLOPs (M)
    "vgg16": ("15.0", 313),
    "gv_d1": ("7.6", 157),
    "gv_cosine": ("7.7", 158),
    "gv_d5": ("7.7", 160),
    "gv_d7": ("7.7", 163),
    "gv_s3": ("5.2", 107),
    "gv_s4": ("4.0", 80),
    "gv_s5": ("3.3", 65),
    "resnet56": ("0.9", 125),
}


@pytest.mark.parametrize("experiment", PAPER_COLUMNS)
def test_experiments_have_the_papers_counts(experiment):
    """The paper's FLOPs are those of convolutions and linear layers, cut to whole millions."""
    with torch.device("meta"):
        model = ghostnet.build_network(ghostnet.EXPERIMENTS[experiment])
        macs = multiply_adds(model, torch.zeros(1, 3, 32, 32))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (f"{parameters / 1e6:.1f}", int(macs / 1e6)) == PAPER_COLUMNS[experiment]


@pytest.mark.parametrize("s, d", [(10, 5), (20, 5), (20, 3)])
def test_a_ratio_above_the_channels_of_a_layer_leaves_it_one_intrinsic_map(s, d):
    with torch.device("meta"):
        model = ghostnet.build_network(Constants(ratio=s, dw_kernel_size=d))
        ordinary = ghostnet.ResNet(56)
    expected = sum(parameter.numel() for parameter in ordinary.parameters())
    for conv in (module for module in ordinary.modules() if isinstance(module, nn.Conv2d)):
        ratio = min(s, conv.out_channels)
        intrinsic = -(-conv.out_channels // ratio)
        dense = intrinsic * conv.weight[0].numel()
        expected += dense + intrinsic * (ratio - 1) * d * d - conv.weight.numel()
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    ghosts = [module for module in model.modules() if isinstance(module, GhostModule)]
    assert len(ghosts) == 57


@pytest.mark.parametrize("s, d, k", [*itertools.product([2, 3, 4], [1, 3, 5], [1, 3])])
def test_module_costs_what_the_papers_equations_say(s, d, k):
    c, n, h, w = 6, 24, 5, 4
    module = GhostModule(c, n, k, padding=k // 2, bias=False, ratio=s, dw_kernel_size=d, device="meta")
    flops, parameters = ghostnet.count(module, torch.zeros(1, c, h, w, device="meta"))[""]
    assert parameters == n // s * c * k * k + (s - 1) * n // s * d * d
    assert flops == n // s * h * w * c * k * k + (s - 1) * n // s * h * w * d * d


# ---------------------------------------------------------------------------------------- copies and conversions


def test_deepcopy_computes_the_same_and_shares_no_weights():
    module, x = seeded(GhostModule(3, 7, 3), 1, 3, 5, 5)
    clone, expected = copy.deepcopy(module), module(x)
    torch.testing.assert_close(clone(x), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(x), expected)


@pytest.mark.parametrize("ratio", [1, 3])
def test_state_dict_goes_through_a_file_into_a_new_module(ratio):
    module, x = seeded(GhostModule(3, 7, 3, ratio=ratio), 1, 3, 5, 5)
    convolutions = ["primary_conv", "cheap_operation"][: 1 + (ratio > 1)]
    assert list(module.state_dict()) == [f"{conv}.{name}" for conv in convolutions for name in ("weight", "bias")]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = GhostModule(3, 7, 3, ratio=ratio)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), module(x))


def exported(module, x):
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


def onnx_session(module, x):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}, see requirements-dev.txt")
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


CONVERSIONS = {
    "compile": lambda module, x: torch.compile(module, fullgraph=True),
    "export": exported,
    "trace": torch.jit.trace,
    "script": lambda module, x: torch.jit.script(module),
    "onnx": onnx_session,
}


@pytest.mark.parametrize(
    "convert, ratio, out_channels", [*((how, 3, 7) for how in CONVERSIONS), ("script", 1, 7), ("script", 2, 8)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_converted_module_computes_the_same_on_another_batch(convert, ratio, out_channels):
    module, x = seeded(GhostModule(3, out_channels, 3, stride=2, padding=1, ratio=ratio), 4, 3, 6, 6)
    module.eval()
    converted = CONVERSIONS[convert](module, x[:2])
    with torch.inference_mode():
        torch.testing.assert_close(converted(x), module(x), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- arguments


READ = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]  # of convolutions


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ratio", [1, 4])
def test_module_has_the_attributes_of_the_convolution_that_it_replaces(geometry, groups, ratio):
    arguments = {"in_channels": 3, "out_channels": 15, "groups": groups} | geometry
    conv, module = nn.Conv2d(**arguments), GhostModule(**arguments, ratio=ratio)
    assert [getattr(module, name) for name in READ] == [getattr(conv, name) for name in READ]


@pytest.mark.parametrize(
    "groups, out_channels, ratio, clamped", [(1, 1, 2, 1), (1, 3, 5, 3), (2, 6, 4, 3), (3, 3, 2, 1)]
)
def test_ratio_is_at_most_the_maps_of_a_group(groups, out_channels, ratio, clamped):
    module = GhostModule(6, out_channels, 3, groups=groups, ratio=ratio)
    assert (module.ratio, module.primary_conv.out_channels) == (clamped, groups)
    assert (module.cheap_operation is None) == (clamped == 1)
    assert module(torch.zeros(1, 6, 5, 5)).shape[1] == out_channels


def test_integers_of_numpy_are_integers():
    modules = [GhostModule(3, 9, 3, ratio=kind(3), dw_kernel_size=kind(5)) for kind in (int, np.int64, np.uint8)]
    assert len({str(module) for module in modules}) == 1
    assert {(type(module.ratio), type(module.dw_kernel_size)) for module in modules} == {(int, int)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 0}, "ratio must be .* not 0"),
        ({"ratio": -1}, "ratio must be .* not -1"),
        ({"ratio": 2.5}, "ratio must be .* not 2.5"),
        ({"ratio": "2"}, "ratio must be"),
        ({"ratio": None}, "ratio must be .* not None"),
        ({"dw_kernel_size": 2}, "dw_kernel_size must be odd .* not 2"),
        ({"dw_kernel_size": 0}, "dw_kernel_size must be .* positive, not 0"),
        ({"dw_kernel_size": -3}, "dw_kernel_size must be .* positive, not -3"),
        ({"dw_kernel_size": 3.0}, "dw_kernel_size must be"),
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"groups": 4}, "out_channels must be divisible by groups"),
        ({"groups": 0}, "groups must be a positive integer"),
        ({"groups": -2}, "groups must be a positive integer"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"padding": "full"}, "Invalid padding string"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    ],
)
def test_bad_argument_is_a_value_error_that_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        GhostModule(4, 6, 3, **arguments)


def one_or_two(low, high):
    return st.integers(low, high) | st.tuples(st.integers(low, high), st.integers(low, high))


@given(
    arguments=st.fixed_dictionaries(
        {
            "in_channels": st.integers(1, 6),
            "out_channels": st.integers(1, 9),
            "kernel_size": one_or_two(1, 4),
            "stride": one_or_two(1, 3),
            "padding": one_or_two(0, 3) | st.sampled_from(["same", "valid"]),
            "dilation": one_or_two(1, 2),
            "groups": st.sampled_from([1, 1, 1, 2, 3, 4, 0]),
            "bias": st.booleans(),
            "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        }
    ),
    ratio=st.integers(-1, 6),
    d=st.integers(-1, 7),
    batch=st.sampled_from([(), (1,), (3,)]),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_module_refuses_what_conv2d_refuses_or_has_its_shape_and_begins_with_the_primary_maps(
    arguments, ratio, d, batch, size
):
    try:
        conv = nn.Conv2d(**arguments)
    except ValueError:
        conv = None
    if conv is None or ratio < 1 or d % 2 == 0 or d < 0:
        with pytest.raises(ValueError):
            GhostModule(**arguments, ratio=ratio, dw_kernel_size=d)
        return
    module, x = seeded(GhostModule(**arguments, ratio=ratio, dw_kernel_size=d), *batch, arguments["in_channels"], *size)
    shape = conv(x).shape
    # reflect and circular take the padding from the map, which must be large enough
    assume(arguments["padding_mode"] in ("zeros", "replicate") or min(shape[-2:]) > d // 2)
    out, primary = module(x), module.primary_conv(x)
    assert out.shape == shape
    torch.testing.assert_close(out.narrow(-3, 0, primary.shape[-3]), primary)
