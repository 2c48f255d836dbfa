"""The step as a CUDA graph, by a stand-in or on a GPU by a real one; precision and loss scale."""

import platform
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from few import few_images, small_network, weights
from torch.fx.experimental.proxy_tensor import make_fx

import ghostnet
from ghostnet import Arguments, Constants, Trainer, UserError

reason = "needs an NVIDIA GPU that torch can use"
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)
CPU = torch.device("cpu")
FLOAT32 = torch.float32
BFLOAT16 = torch.bfloat16
FLOAT16 = torch.float16
SMALL = Constants(batch_size=16, lr=0.01)
ERASING = replace(SMALL, erasing=0.5)


def two_epochs(constants, device, precision, cuda_graph):
    """How far two epochs of six full batches and a short one move the weights; their losses."""
    trainer = Trainer(constants, few_images(train=6 * 16 + 5, device=device), precision)
    start = weights(trainer.model)
    losses = [trainer.epoch(number, "", cuda_graph)[0] for number in (1, 2)]
    return weights(trainer.model) - start, losses


@pytest.fixture
def events(monkeypatch):
    """Sizes of the plain steps, and what is recorded and replayed: by a stand-in, on the CPU."""
    events = []
    step = Trainer.step

    def plain_step(trainer, plan):
        events.append(len(plan))
        step(trainer, plan)

    def record(trainer, plan):
        def replay():
            events.append("replayed")
            step(trainer, trainer.plan)

        events.append("recorded")
        trainer.plan = plan.clone()
        trainer.graph = mock.Mock(replay=replay)

    monkeypatch.setattr(Trainer, "step", plain_step)
    monkeypatch.setattr(Trainer, "record", record)
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    return events


@pytest.mark.parametrize("constants", [SMALL, ERASING])
def test_full_batches_are_replayed_and_train_as_plain_steps(events, constants):
    plain, plain_losses = two_epochs(constants, CPU, FLOAT32, cuda_graph=False)
    assert events == 2 * [16, 16, 16, 16, 16, 16, 5]
    events.clear()
    moved, losses = two_epochs(constants, CPU, FLOAT32, cuda_graph=True)
    assert events == [16, 16, 16, "recorded", *3 * ["replayed"], 5, *6 * ["replayed"], 5]
    assert torch.equal(moved, plain)
    assert losses == plain_losses


def test_the_tensors_that_a_graph_reads_and_writes_stay_where_they_are(events):
    def addresses():
        tensors = [trainer.lr, trainer.plan, trainer.tally, *trainer.momentum.values()]
        tensors += [group["lr"] for group in trainer.optimizer.param_groups]
        tensors += [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
        tensors += trainer.model.state_dict().values()
        return [tensor.data_ptr() for tensor in tensors]

    trainer = Trainer(SMALL, few_images(train=80), FLOAT32)
    trainer.epoch(1, "", cuda_graph=True)
    before = addresses()
    trainer.epoch(2, "", cuda_graph=True)
    assert "recorded" in events
    assert addresses() == before


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_recorded_batch_is_that_of_the_plan_of_its_replay(erasing):
    """Recorded by torch's tracer, which refuses what waits for a GPU, as a tensor's item()."""
    data = few_images(train=40)
    recorded, replayed = data.epoch_plan(4, erasing).split(20)
    batch = make_fx(partial(data.train_batch, padding=4))(recorded)
    for ours, expected in zip(batch(replayed), data.train_batch(replayed, 4), strict=True):
        assert torch.equal(ours, expected)


def test_what_is_recorded_is_a_step_on_the_plan_that_a_replay_fills(monkeypatch):
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    monkeypatch.setattr(torch.cuda, "graph", graph := mock.MagicMock())
    trainer = Trainer(SMALL, few_images(), FLOAT32)
    first = trainer.data.epoch_plan(4, 0.5)[:16]

    def step(plan):
        assert plan is trainer.plan
        assert torch.equal(plan, first)
        assert plan.data_ptr() != first.data_ptr()  # the epoch's plan stays as it is
        graph.return_value.__enter__.assert_called_once()
        graph.return_value.__exit__.assert_not_called()
        raise RuntimeError("not permitted")

    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(UserError, match=r"not permitted.*--no-cuda-graph"):
        trainer.record(first)
    graph.assert_called_once_with(trainer.graph, capture_error_mode="thread_local")


@pytest.mark.parametrize("device, wanted, recorded", [
    ("cuda", True, True), ("cuda", False, False), ("cpu", True, False),
])
def test_a_run_is_recorded_on_a_gpu_unless_it_is_told_not_to(tmp_path, device, wanted, recorded):
    data = SimpleNamespace(device=torch.device(device))
    arguments = Arguments(checkpoint_dir=tmp_path, cuda_graph=wanted)
    with mock.patch.object(ghostnet, "train", side_effect=UserError("enough")) as train:
        assert not ghostnet.finish_and_test("run", SMALL, data, FLOAT32, arguments)
    assert train.call_args.args[-1] is recorded


@cuda
@pytest.mark.parametrize("constants", [SMALL, ERASING])
@pytest.mark.parametrize("precision, limit", [(FLOAT32, 0.01), (BFLOAT16, 0.15), (FLOAT16, 0.15)])
def test_a_cuda_graph_trains_as_plain_steps(monkeypatch, precision, limit, constants):
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    device = torch.device("cuda")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain, plain_losses = two_epochs(constants, device, precision, cuda_graph=False)
        moved, losses = two_epochs(constants, device, precision, cuda_graph=True)
    # A library may choose another kernel in a graph; an old plan, rate or mask makes 0.2 and more.
    assert (moved - plain).norm() < limit * plain.norm()
    assert losses == pytest.approx(plain_losses, rel=limit)


def test_a_step_that_overflows_float16_changes_no_weight_and_halves_the_scale(monkeypatch):
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    trainer = Trainer(SMALL, few_images(), FLOAT16)
    start = weights(trainer.model)
    assert trainer.scaler.is_enabled()
    assert not Trainer(SMALL, few_images(), BFLOAT16).scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler("cpu", 2.0**40)
    trainer.step(trainer.data.epoch_plan(4, 0.0)[:16])
    assert torch.equal(weights(trainer.model), start)
    assert trainer.scaler.get_scale() == 2.0**39


INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) CPU @ 2GHz\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\n"
NO_FILE = None  # as on a Mac


@pytest.mark.parametrize("cpuinfo, avx512_bf16, amx, best, name", [
    (INTEL, True, True, BFLOAT16, "Intel(R) Xeon(R) CPU @ 2GHz"),
    (INTEL, True, False, FLOAT32, "Intel(R) Xeon(R) CPU @ 2GHz"),  # where it is the slower one
    (AMD, True, False, BFLOAT16, "AMD EPYC 9R14"),
    (AMD, False, False, FLOAT32, "AMD EPYC 9R14"),
    (ARM, False, False, FLOAT32, platform.machine()),
    (NO_FILE, True, False, FLOAT32, platform.machine()),
])
def test_a_cpu_trains_in_bfloat16_where_it_is_fast_and_in_what_is_asked_for(
    monkeypatch, tmp_path, cpuinfo, avx512_bf16, amx, best, name
):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not NO_FILE:
        path.write_text(cpuinfo)
    monkeypatch.setattr(ghostnet, "Path", lambda name: {"/proc/cpuinfo": path}[name])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and not what is asked for
    assert ghostnet.pick_hardware(Arguments(device="cpu")) == (CPU, best)
    for asked in (BFLOAT16, FLOAT16, FLOAT32):
        arguments = Arguments(device="cpu", precision=str(asked).removeprefix("torch."))
        assert ghostnet.pick_hardware(arguments) == (CPU, asked)
    assert ghostnet.hardware_name(CPU) == f"{name} CPU, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("native, given", [(True, BFLOAT16), (False, FLOAT16)])
@pytest.mark.parametrize("tasks", [  # processes take the GPUs in turn
    {"LOCAL_RANK": "3"}, {"SLURM_LOCALID": "1"}, {"LOCAL_RANK": "1", "SLURM_LOCALID": "0"},
])
def test_a_gpu_trains_in_the_best_precision_that_it_does_not_emulate(
    monkeypatch, native, given, tasks
):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device := mock.Mock())
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    assert ghostnet.pick_hardware(Arguments()) == (torch.device("cuda", 1), given)
    set_device.assert_called_once_with(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda is not there"):
        ghostnet.pick_hardware(Arguments(device="cuda"))
