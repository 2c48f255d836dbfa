"""benchmarks/speed.py on tiny networks and the tiny data; what it computes against closed forms."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import speed
import torch
from test_fast_step import FakeGraph
from torch import nn
from without_checksums import accept_any_checksum

import ghostnet

CPU = SimpleNamespace(device=torch.device("cpu"), cuda=False, turns=3)  # what these methods know of a Benchmark


@pytest.mark.parametrize("channels", [16, 512])
def test_a_ghost_layer_has_half_of_the_flops_and_one_cheap_kernel_a_ghost(channels):
    ordinary = 9 * channels**2  # multiply-adds a pixel
    ghost = 9 * channels * channels // 2 + 9 * channels // 2
    assert speed.flops_ratio(channels) == pytest.approx(ordinary / ghost)


def test_bound_counts_products_activations_and_parameters(monkeypatch):
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10))

    monkeypatch.setitem(ghostnet.NETWORKS, "toy", network)
    monkeypatch.setattr(speed, "BATCH", 7)
    flops, moved = speed.work_of_a_step(ghostnet.Constants(network="toy", ratio=1), torch.bfloat16)
    assert flops == 7 * 3 * 2 * (32 * 32 * 4 * 27 + 4096 * 10)
    activations, parameters = 32 * 32 * 4 + 10, 4 * 27 + 4096 * 10 + 10
    assert moved == 7 * activations * 2 * (2 + 2) + parameters * 3 * (4 + 4)


def test_peak_memory_is_of_what_is_held_at_one_time():
    def run():
        a = torch.ones(10**6)  # 4 MB each
        for _ in range(3):
            a = a + 1

    assert speed.Benchmark.peak_megabytes(CPU, run) == pytest.approx(8, abs=0.1)
    assert speed.Benchmark.peak_megabytes(CPU, lambda: torch.ones(10**6)) == pytest.approx(4, abs=0.1)


def test_runs_take_turns(monkeypatch):
    monkeypatch.setattr(speed, "REST", 0)
    calls = []
    times = speed.Benchmark.by_turns(CPU, partial(calls.append, "a"), partial(calls.append, "b"), passes=True)
    assert calls == ["a", "b"] * 4  # the first ones to warm up
    assert [len(turns) for turns in times] == [3, 3]


def test_a_step_with_marks_can_be_recorded_as_a_cuda_graph(data, monkeypatch):
    FakeGraph(monkeypatch)
    trainer = speed.MarkedTrainer(ghostnet.Constants(network="resnet32", batch_size=16), data, torch.float32)
    trainer.record()
    trainer.take_step(data.epoch_plan()[:16])
    assert all(seconds > 0 for seconds in trainer.parts()[:3])  # the last mark is none that this fake replays


def titles_and_columns(text):
    """Of the Markdown tables under numbered titles, without what a title says in parentheses."""
    tables = re.findall(r"^\*+(\d\. [^*(]+).*\n\n\|(.*)\|$", text, re.MULTILINE)
    return {title.strip(): " ".join(columns.split()) for title, columns in tables}


def test_all_tables_and_the_picture(tiny_data_dir, tmp_path, monkeypatch, capsys):
    accept_any_checksum(monkeypatch.setattr)
    toy = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    for name in ("resnet32", "resnet56"):
        monkeypatch.setitem(ghostnet.NETWORKS, name, partial(ghostnet.ResNet, 8))
    monkeypatch.setitem(ghostnet.NETWORKS, "vgg16", lambda: nn.Sequential(*toy))
    for name, value in {"BATCH": 4, "SHORTEST": 0, "REST": 0, "WORKERS": 1}.items():
        monkeypatch.setattr(speed, name, value)
    folders = ["--data-dir", str(tiny_data_dir), "--image-dir", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", ["speed.py", "--quick", "--device", "cpu", "--precision", "float32", *folders])
    speed.main()
    out = capsys.readouterr().out
    readme = titles_and_columns((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"))
    assert len(readme) == 3
    assert readme.items() <= titles_and_columns(out).items()
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 6 * 2 + 5 + 7 + 2 * 3 + 3 + 1 + 5
    kept = next(row for row in rows if "16-channel layers ordinary" in row)
    network = ghostnet.ResNet(8)
    ghostnet.replace_conv_with_ghost(network.blocks[1:])  # the stages of 32 and 64 channels, in place
    flops, parameters = ghostnet.count(network, torch.zeros(1, 3, 32, 32))[""]
    assert f"| {flops / 1e6:.1f}M | {parameters / 1e6:.2f}M |" in " ".join(kept.split())
    height, width, _ = matplotlib.image.imread(tmp_path / "new" / "ghost_speed.png").shape
    assert width > height > 500
