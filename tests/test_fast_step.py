"""CudaGraphStep runs the same steps another way: with a small fake of CUDA graphs, and with CUDA where it is there."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import ghostnet
from ghostnet import Constants, CudaGraphStep, TrainingStep

SIZES = [16] * 2 + [5] + [16] * 5 + [5] + [16] * 10 + [5]  # of 20 batches; the short ones stand for ends of epochs
PLAIN = ["plain 16"] * 2 + ["plain 5"] + ["plain 16"] * 3
FAST = [*PLAIN, "recorded", "replayed", "replayed", "plain 5", *["replayed"] * 10, "plain 5"]


class FakeCuda:
    """While a graph is captured a step is recorded and not run; replaying it runs what was recorded."""

    def __init__(self, monkeypatch, error=None):
        self.capturing, self.error, self.log = False, error, []
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextlib.contextmanager
    def capture(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        if self.error:
            raise self.error

    def replay(self):
        self.log.append("replayed")
        self.recorded()

    def fast(self, step):
        def recordable(plan):
            if self.capturing:
                self.log.append("recorded")
                self.recorded = lambda: step(plan)  # the kernels were recorded with this tensor
            else:
                self.log.append(f"plain {len(plan)}")
                step(plan)

        recordable.constants = step.constants
        return CudaGraphStep(recordable)


def small_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10))


def twenty_steps(data, monkeypatch, wrap=lambda step: step, **constants):
    """Weights, statistics, momentum, average and tally of a small ghost network after 20 steps with a falling rate."""
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", small_network)
    torch.manual_seed(0)
    step = TrainingStep(Constants(batch_size=16, **constants), data, torch.float32)
    run = wrap(step)
    for i, size in enumerate(SIZES):
        step.lr.fill_(0.5 ** (4 + i // 4))
        run(data.epoch_plan(cutout="cutout" in constants)[:size].to(data.train_labels.device))
    momentum = [step.optimizer.state[parameter]["momentum_buffer"] for parameter in step.model.parameters()]
    states = (*step.model.state_dict().values(), *step.average.state_dict().values(), *momentum, step.tally)
    return [value.clone() for value in states]


LEVERS = {"nesterov": True, "decay_norm_and_bias": False, "label_smoothing": 0.1, "cutout": 8, "ema": 0.9}


@pytest.mark.parametrize("levers", [{}, LEVERS])
def test_full_batches_are_recorded_once_and_replayed_and_the_weights_are_those_of_plain_steps(
    data, monkeypatch, levers
):
    plain = twenty_steps(data, monkeypatch, **levers)
    cuda = FakeCuda(monkeypatch)
    torch.testing.assert_close(twenty_steps(data, monkeypatch, cuda.fast, **levers), plain)
    assert cuda.log == FAST


def test_a_failed_recording_is_one_line_and_training_goes_on_plainly(data, monkeypatch, capsys):
    plain = twenty_steps(data, monkeypatch)
    cuda = FakeCuda(monkeypatch, RuntimeError("CUDA error: operation not permitted\nCUDA kernel errors might be ..."))
    torch.testing.assert_close(twenty_steps(data, monkeypatch, cuda.fast), plain)
    assert cuda.log == [*PLAIN, "recorded", *(f"plain {size}" for size in SIZES[6:])]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "CUDA error: operation not permitted" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: a real graph")
@pytest.mark.parametrize("levers", [{}, LEVERS])
def test_cuda_graph_gives_the_weights_of_plain_steps(data, monkeypatch, capsys, levers):
    on_cuda, graphs = copy.copy(data), []
    vars(on_cuda).update({k: v.to("cuda") for k, v in vars(data).items() if isinstance(v, torch.Tensor)})

    def fast(step):
        graphs.append(CudaGraphStep(step))
        return graphs[0]

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain = twenty_steps(on_cuda, monkeypatch, **levers)
        torch.testing.assert_close(twenty_steps(on_cuda, monkeypatch, fast, **levers), plain, rtol=1e-3, atol=1e-4)
    assert graphs[0].graph is not None and capsys.readouterr().err == ""
