"""The table of results, and what is shipped in checkpoints/, evaluated again on the real data."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import tyro

import ghostnet
from ghostnet import Checkpoint, Constants

ROOT = Path(ghostnet.__file__).parent
CHECKPOINTS, REFUSED = ghostnet.read_all(ROOT / "checkpoints")


@pytest.fixture(scope="module")
def data(real_data_dir):
    return ghostnet.Cifar10(real_data_dir, torch.device("cpu"))


def test_no_shipped_file_is_refused():
    assert REFUSED == {}
    assert len(CHECKPOINTS) >= 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_run_is_finished_and_named_as_the_script_names_it(name, monkeypatch):
    assert CHECKPOINTS[name].finished
    constants = CHECKPOINTS[name].constants
    command = ["ghostnet.py", name.split("-")[0]]
    for key, value in asdict(constants).items():
        command.append("--" + key.replace("_", "-"))
        command.extend(str(value).strip("()").split(", "))
    monkeypatch.setattr("sys.argv", command)
    assert ghostnet.name_runs(tyro.cli(ghostnet.Arguments), CHECKPOINTS) == {name: constants}


def test_the_tables_in_the_readme_are_those_that_the_commands_print():
    readme = (ROOT / "README.md").read_text()
    assert ghostnet.results_table(CHECKPOINTS) in readme


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_weights_have_the_accuracy_that_their_file_says(name, data):
    """To 15 images, in bfloat16 where that is native; `python ghostnet.py` takes its time."""
    device, precision = ghostnet.pick_hardware(ghostnet.Arguments(device="cpu"))
    accuracy = ghostnet.evaluate(CHECKPOINTS[name].network(device), data, precision)
    assert CHECKPOINTS[name].accuracy == pytest.approx(accuracy, abs=0.15)


def test_an_unfinished_run_is_in_the_table_with_all_that_it_was_trained_on():
    history = {name: [60.0, 90.0] for name in ghostnet.HISTORY}
    places = "abacus, float32, torch 1; Tesla T4, float16, torch 2; abacus, float32, torch 2"
    checkpoint = Checkpoint(Constants(epochs=3), history, places, {}, {})
    table = ghostnet.results_table({"a": checkpoint, "a longer name": checkpoint}).splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:5] == ["a", "ghost-resnet56", "2/3", "90.00", "92.7"]
    assert cells[5:] == ["0.44M", "67.5M", "abacus, Tesla T4", "0:02:30"]
