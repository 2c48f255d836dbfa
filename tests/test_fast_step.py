"""On a GPU: which one and in which precision, the step as a CUDA graph, and its gradients.

Without a GPU a small fake of CUDA graphs, and of what torch says of the hardware, tests what can be tested.
"""

import contextlib
import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostnet
from ghostnet import Arguments, Constants, Trainer

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [16, 16, 5, 16, 16, 16, 5, 16]  # of batches; the short ones stand for ends of epochs
RECORDED = 3  # steps before the recording


def small_network(dropout=0.0):
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)
    return nn.Sequential(*layers, nn.Linear(8 * 15 * 15, 10))


def damped_resnet56():
    """ResNet-56 with each block near the identity; as it begins otherwise, it magnifies rounding without bound."""
    model = ghostnet.ResNet(56)
    for block in model.blocks:
        nn.init.constant_(block.bn2.weight, 0.1)
    return model


NETWORKS = {"small": small_network, "dropout": lambda: small_network(0.5), "Ghost-ResNet-56": damped_resnet56}


def on(device, data):
    moved = copy.copy(data)
    vars(moved).update({k: v.to(device) for k, v in vars(data).items() if isinstance(v, torch.Tensor)})
    return moved


def trained(data, precision=torch.float32, record=False):
    """How far weights and statistics came, momentum, tally and loss scale, after steps with a falling rate."""
    trainer = Trainer(Constants(batch_size=16, lr=0.01), data, precision)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.model.train()
    for i, size in enumerate(SIZES):
        if i == RECORDED and record:
            trainer.model.eval()  # as an evaluation leaves it
            trainer.record()
        trainer.lr.fill_(0.01 * 0.5**i)
        trainer.take_step(data.epoch_plan()[:size].to(trainer.device))
    came = {name: (value - before[name]).double() for name, value in trainer.model.state_dict().items()}
    groups = {"weights": dict(trainer.model.named_parameters()), "statistics": dict(trainer.model.named_buffers())}
    result = {group: torch.cat([came[name].flatten() for name in names]) for group, names in groups.items()}
    result["momentum"] = torch.cat([value.flatten() for value in trainer.momentum.values()])
    result |= {"tally": trainer.tally, "scale": torch.tensor([trainer.scaler.get_scale()])}
    return {group: values.detach().double().cpu() for group, values in result.items()}


# ------------------------------------------------------------------------------------------------ CUDA graph, faked


class FakeGraph:
    """While a graph is recorded a step is noted and not run; replaying it runs what was recorded."""

    def __init__(self, monkeypatch, error=None):
        self.recording, self.error, self.log, self.searches, self.modes = False, error, [], [], []
        step = Trainer.step

        def recordable(trainer, plan):
            if self.recording:
                self.log.append("recorded")
                self.recorded = lambda: step(trainer, plan)  # the kernels know where this plan lies, not what it holds
            else:
                self.log.append(f"plain {len(plan)}")
                step(trainer, plan)
                self.searches.append(torch.backends.cudnn.benchmark)

        monkeypatch.setattr(Trainer, "step", recordable)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.record)

    @contextlib.contextmanager
    def record(self, graph, capture_error_mode="global"):
        assert graph is self
        self.modes.append(capture_error_mode)
        self.recording = True
        yield
        self.recording = False
        if self.error:
            raise self.error

    def replay(self):
        self.log.append("replayed")
        self.recorded()


def test_full_batches_are_replayed_and_the_weights_are_those_of_plain_steps(data, monkeypatch):
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", small_network)
    plain = trained(data)
    assert all(values.abs().sum() > 0 for values in plain.values())
    fake = FakeGraph(monkeypatch)
    torch.testing.assert_close(trained(data, record=True), plain)
    after = ["replayed" if size == 16 else f"plain {size}" for size in SIZES[RECORDED:]]
    assert fake.log == [*(f"plain {size}" for size in SIZES[:RECORDED]), "recorded", *after]
    assert fake.modes == ["thread_local"]


def test_cudnn_searches_for_kernels_in_full_batches_only(data, monkeypatch):
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", small_network)
    fake = FakeGraph(monkeypatch)
    with torch.backends.cudnn.flags(enabled=True):
        trained(data)
    assert fake.searches == [size == 16 for size in SIZES]


def test_a_failed_recording_ends_the_process_with_one_line_that_names_the_way_out(data, monkeypatch, capsys):
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", small_network)
    FakeGraph(monkeypatch, RuntimeError("CUDA error: operation not permitted\nCUDA kernel errors might be ..."))
    with pytest.raises(SystemExit) as end:
        trained(data, record=True)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "CUDA error: operation not permitted" in error and "--no-cuda-graph" in error


@pytest.mark.parametrize("cuda_graph, expected", [(True, [1, "recorded", 2, 3]), (True, [1]), (False, [1, 2, 3])])
def test_a_run_records_its_step_once_before_the_second_epoch_if_at_all(
    data, tmp_path, monkeypatch, cuda_graph, expected
):
    log, initialize = [], Trainer.__init__

    def on_a_gpu(trainer, *arguments):
        initialize(trainer, *arguments)
        trainer.device = torch.device("cuda")

    def epoch(_trainer, number, _title):
        log.append(number)
        return 1.0, 10.0

    monkeypatch.setattr(Trainer, "__init__", on_a_gpu)
    monkeypatch.setattr(Trainer, "epoch", epoch)
    monkeypatch.setattr(Trainer, "record", lambda _: log.append("recorded"))
    monkeypatch.setattr(ghostnet, "evaluate", lambda *_, **__: 10.0)
    monkeypatch.setattr(ghostnet, "hardware_name", lambda _: "GPU")
    arguments, constants = Arguments(cuda_graph=cuda_graph), Constants(network="resnet32", epochs=expected[-1])
    ghostnet.train(tmp_path / "run.pth", constants, data, torch.float32, arguments)
    assert log == expected


# ----------------------------------------------------------------------------------------------- CUDA, where it is


def skip_unless_native(precision):
    if precision == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")


@cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_cuda_graph_gives_the_weights_of_plain_steps(data, monkeypatch, network, precision):
    skip_unless_native(precision)
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", NETWORKS[network])
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain, fast = (trained(on("cuda", data), precision, record) for record in (False, True))
    # The same kernels in the same order: all that may differ is rounding, where a library chooses another in a graph.
    # What a graph can get wrong (plan, rate, mask or tally of an earlier step) makes at least 0.2 in one of the groups.
    limit = 0.01 if precision == torch.float32 else 0.15
    distances = {name: ((fast[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
    assert all(distance < limit for distance in distances.values()), distances


def gradients(data, device, precision):
    """Of Ghost-ResNet-56 and 64 images, by the step that trains it."""
    trainer = Trainer(ghostnet.EXPERIMENTS["gr_cosine"], on(device, data), precision)
    trainer.scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=precision == torch.float16)
    torch.manual_seed(1)
    trainer.model.train()
    trainer.step(data.epoch_plan()[:64].to(device))
    return {name: parameter.grad.double().cpu() for name, parameter in trainer.model.named_parameters()}


def plain_gradients(data):
    """The same in float64 and torch's default memory order."""
    torch.manual_seed(0)
    model = ghostnet.build_network(ghostnet.EXPERIMENTS["gr_cosine"]).double()
    torch.manual_seed(1)
    images, labels = data.train_batch(data.epoch_plan()[:64])
    F.cross_entropy(model(images.double().contiguous()), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "device, precision",
    [("cpu", torch.float32), *(pytest.param("cuda", precision, marks=cuda) for precision in PRECISIONS)],
)
def test_gradient_of_every_layer_points_where_that_of_plain_torch_does(data, monkeypatch, device, precision):
    """There is an open report of wrong depthwise gradients of cuDNN in channels_last on some GPUs."""
    if device == "cuda":
        skip_unless_native(precision)
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", damped_resnet56)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, theirs = gradients(data, device, precision), plain_gradients(data)
    cosines = {name: F.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0).item() for name in ours}
    least = 0.998 if precision == torch.float32 else 0.9
    wrong = {name: cosine for name, cosine in cosines.items() if not cosine > least}
    depthwise = {name: cosine for name, cosine in wrong.items() if "cheap_operation" in name}
    assert not wrong, f"cosines of depthwise layers: {depthwise}; of all: {wrong}"


# ---------------------------------------------------------------------------------------------- device and precision


@pytest.fixture
def hardware(monkeypatch):
    """Makes torch believe in GPUs, with or without bfloat16 of their own; all emulate it."""

    def have(gpus, native=True):
        def is_bf16_supported(including_emulation=True):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return have


@pytest.mark.parametrize(
    "native, asked, given",
    [
        (True, "auto", torch.bfloat16),
        (True, "bfloat16", torch.bfloat16),
        (True, "float16", torch.float16),
        (False, "auto", torch.float16),
        (False, "float16", torch.float16),
        (False, "float32", torch.float32),
    ],
)
def test_a_gpu_trains_in_the_best_precision_of_its_own_or_in_that_which_is_asked_for(hardware, native, asked, given):
    hardware(1, native)
    assert ghostnet.pick_hardware(Arguments(precision=asked)) == (torch.device("cuda", 0), given)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_bfloat16_that_a_gpu_only_emulates_is_refused_in_one_line(hardware, device):
    hardware(1, native=False)
    with pytest.raises(ghostnet.UserError, match=r"^[^\n]*bfloat16[^\n]*float16[^\n]*$"):
        ghostnet.pick_hardware(Arguments(precision="bfloat16", device=device))


@pytest.mark.parametrize("local_rank, gpus, index", [(0, 2, 0), (1, 2, 1), (3, 2, 1), (2, 1, 0)])
def test_processes_take_the_gpus_in_turn(hardware, monkeypatch, local_rank, gpus, index):
    hardware(gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device, _ = ghostnet.pick_hardware(Arguments())
    assert device == torch.device("cuda", index)


def test_a_device_that_is_not_there_is_refused(hardware):
    hardware(0)
    with pytest.raises(ghostnet.UserError, match="--device cuda"):
        ghostnet.pick_hardware(Arguments(device="cuda"))


@pytest.mark.parametrize(
    "device_file, nvidia_smi, device, lines",
    [
        (True, True, "auto", 1),
        (True, False, "auto", 1),
        (False, True, "auto", 1),
        (False, False, "auto", 0),
        (True, True, "cpu", 0),
    ],
)
def test_one_line_says_that_torch_cannot_use_the_gpu_that_is_here(
    hardware, monkeypatch, capsys, device_file, nvidia_smi, device, lines
):
    hardware(0)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda path: device_file and path == "/dev/nvidia0")
        patch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if nvidia_smi else None)
        picked, _ = ghostnet.pick_hardware(Arguments(device=device))
    error = capsys.readouterr().err
    assert picked == torch.device("cpu")
    assert error.count("\n") == lines == error.count("NVIDIA")
