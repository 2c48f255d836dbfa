"""benchmarks/drop_in.py against closed forms, and the README's numbers against its tables."""

from pathlib import Path

import drop_in
import torch
from torch import nn

from ghostnet import GhostModule

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_activations_are_the_input_and_what_each_layer_keeps():
    x = torch.rand(2, 3, 8, 8)
    conv = nn.Conv2d(3, 6, 3, padding=1)
    maps = 4 * 2 * 6 * 8 * 8  # bytes of all maps
    assert drop_in.activation_bytes(conv, x) == x.nbytes
    layer = nn.Sequential(conv, nn.ReLU(inplace=True))  # the ReLU keeps the output, once
    assert drop_in.activation_bytes(layer, x) == x.nbytes + maps
    ghost = GhostModule(3, 6, 3, padding=1)  # half of the maps are the cheap convolution's input
    assert drop_in.activation_bytes(ghost, x) == x.nbytes + maps / 2


def test_the_readme_states_what_the_benchmark_prints(capsys):
    drop_in.main()
    tables = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines()]
    rows = {row[0]: row[1:] for row in rows}
    for name in drop_in.NETWORKS:
        assert f"{rows[name][-1].removeprefix('+')} ({name})" in README
    ordinary, replaced = rows["ordinary"][0], rows["all replaced"][0]
    assert rows["all but the predicting ones replaced"] == [ordinary]
    assert f"from {ordinary} to {replaced}" in README
