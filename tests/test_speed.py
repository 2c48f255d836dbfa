"""benchmarks/speed.py on tiny networks and the tiny data; what it computes against closed forms."""

import itertools
from functools import partial

import matplotlib
import pytest
import speed
import torch
from few import small_network
from tiny import ODD_STYLE, published, size_of_white_png
from torchvision.datasets import CIFAR10

import ghostnet


@pytest.mark.parametrize("channels", [16, 512])
def test_a_ghost_layer_has_half_of_the_flops_and_one_cheap_kernel_a_ghost(channels):
    ordinary = 9 * channels**2  # multiply-adds a pixel
    ghost = 9 * channels * channels // 2 + 9 * channels // 2
    assert speed.flops_ratio(channels) == pytest.approx(ordinary / ghost)


def test_runs_take_turns(monkeypatch):
    monkeypatch.setattr(speed, "SHORTEST", 1e-9)
    calls = []
    times = speed.by_turns(3, partial(calls.append, "a"), partial(calls.append, "b"))
    assert [run for run, _ in itertools.groupby(calls)] == ["a", "b"] * 3
    assert [len(turns) for turns in times] == [3, 3]


def test_a_ratio_is_of_medians_and_its_range_of_turns():
    assert speed.ratio([2.0, 4.0, 6.0], [1.0, 4.0, 2.0]) == "2.00x (1.00-3.00)"


@matplotlib.rc_context(ODD_STYLE)
def test_all_tables_and_the_picture(tiny_data, tmp_path, monkeypatch, capsys):
    for name, value in published(tiny_data).items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for name, value in {"BATCH": 4, "SHORTEST": 1e-9, "WORKERS": 1}.items():
        monkeypatch.setattr(speed, name, value)
    folders = ["--data-dir", str(tiny_data), "--image-dir", str(tmp_path / "new")]
    options = ["--quick", "--device", "cpu", "--precision", "float32"]
    monkeypatch.setattr("sys.argv", ["speed.py", *options, *folders])
    speed.main()
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 * 2 + 5 + 7 + 2 + 5
    _, auto = ghostnet.pick_hardware(ghostnet.Arguments(device="cpu"))
    assert f"auto takes {auto}**\n".replace("torch.", "") in out
    width, height = size_of_white_png(tmp_path / "new" / "ghost_speed.png")
    assert width > height > 500
