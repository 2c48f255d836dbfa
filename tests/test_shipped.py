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
    network = CHECKPOINTS[name].network(torch.device("cpu"))
    accuracy = ghostnet.evaluate(network, data)
    assert CHECKPOINTS[name].accuracy == pytest.approx(accuracy, abs=0.01 + 1e-9)  # one image


def run(seed, accuracy, epochs=2):
    history = {name: epochs * [60.0] for name in ghostnet.HISTORY}
    history["test_accuracy"][-1] = accuracy
    return Checkpoint(Constants(epochs=2, seed=seed), history, "abacus, float32", {}, {})


def test_each_seed_counts_once_in_a_row_and_an_unfinished_run_has_its_own():
    runs = {"a": run(0, 91.0), "a-seed1": run(1, 92.0), "a-seed2": run(2, 93.0)}
    runs["a-seed3"] = run(0, 91.0)  # a copy
    runs["a-seed4"] = run(4, 10.0, epochs=1)
    table = ghostnet.results_table(runs).splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    whole = [cell.strip() for cell in table[2].split("|")[1:-1]]
    unfinished = [cell.strip() for cell in table[3].split("|")[1:-1]]
    assert whole[:6] == ["a", "ghost-resnet56", "cosine", "2", "92.00 ± 1.00 (3)", "92.7"]
    assert whole[6:] == ["0.44M", "67.5M", "abacus", "0:02:00"]
    assert unfinished[3:5] == ["1 of 2", "10.00"]
