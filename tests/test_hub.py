"""hubconf.py, as torch.hub loads it from another folder and in a process of its own."""

import subprocess
import sys

import pytest
import torch
from few import weights
from tiny import ROOT

import ghostnet
from ghostnet import GhostModule


def load(name, *arguments, **options):
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)


def test_networks_and_layers_are_loaded_from_elsewhere_and_nothing_else_happens(tmp_path):
    """Beside a folder that has the name of the script, as a clone of the repository has."""
    (tmp_path / "ghostnet").mkdir()
    program = f"""
import torch
network = torch.hub.load({str(ROOT)!r}, "ghost_resnet56", pretrained=True, source="local")
torch.save(network(torch.ones(2, 3, 32, 32)), "logits")
from ghostnet import CLASSES, MEAN, STD
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"ghostnet", "logits"}
    shipped = ghostnet.read_checkpoint(ROOT / "checkpoints" / "gr_cosine.pth").network("cpu")
    expected = shipped(torch.ones(2, 3, 32, 32))
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, run, other", [
    ("ghost_resnet56", "gr_multistep", "gv_cosine"), ("ghost_vgg16", "gv_cosine", "resnet32"),
])
def test_a_network_has_the_weights_of_a_run_or_none_and_a_wrong_run_is_told(name, run, other):
    trained, untrained = load(name, pretrained=True, run=run), load(name)
    shipped = ghostnet.read_checkpoint(ROOT / "checkpoints" / f"{run}.pth").network("cpu")
    assert torch.equal(weights(trained), weights(shipped))
    assert not torch.equal(weights(untrained), weights(shipped))
    assert (trained.training, untrained.training) == (False, True)
    for wrong in (other, "abacus", f"../checkpoints/{run}"):
        with pytest.raises(ValueError, match=rf"{wrong} is no run of .*'{run}'"):
            load(name, pretrained=True, run=wrong)


def test_the_ghost_module_and_the_replacement_are_loaded_by_their_names():
    model = load("replace_conv_with_ghost", torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)))
    assert type(model[0]) is type(load("GhostModule", 4, 8, 3)) is GhostModule
