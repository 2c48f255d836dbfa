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
    last_cells = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        last_cells[cells[0]] = cells[-1].removeprefix("+")
    for name in drop_in.NETWORKS:
        assert f"{last_cells[name]} ({name})" in README
    ordinary = last_cells["ordinary"]
    assert last_cells["all but the predicting ones replaced"] == ordinary
    assert f"from {ordinary} to {last_cells['all replaced']}, and stays {ordinary}" in README
