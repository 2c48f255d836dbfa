"""What is shipped in checkpoints/, tested again on the real data; the table of a bare command."""

from dataclasses import asdict

import pytest
import torch
import tyro
from few import run_of
from tiny import ROOT, option_words

import ghostnet
from ghostnet import Constants

CHECKPOINTS, REFUSED = ghostnet.read_all(ROOT / "checkpoints")
OLDER, OLDER_REFUSED = ghostnet.read_all(ROOT / "checkpoints" / "batch128")
OLDER_HITS = {  # of the first 1,000 test images, in float32
    "gr_cosine": 933, "gr_cosine-cheap_weight_decay0.0005": 934,
    "gr_multistep": 927, "gr_multistep-cheap_weight_decay0.0005": 930,
    "gv_cosine": 933, "gv_cosine-cheap_weight_decay0.0005": 935,
    "resnet56": 936, "vgg16": 934,
}


@pytest.fixture(scope="module")
def data(real_data_dir):
    return ghostnet.Cifar10(real_data_dir, torch.device("cpu"))


def test_files_are_of_todays_recipe_and_those_in_a_folder_of_their_own_of_the_older():
    assert REFUSED == OLDER_REFUSED == {}
    assert len(CHECKPOINTS) >= 5
    assert {run.constants.batch_size for run in CHECKPOINTS.values()} == {256}
    assert OLDER.keys() == OLDER_HITS.keys()
    assert {run.constants.batch_size for run in OLDER.values()} == {128}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_run_is_finished_and_named_as_the_script_names_it(name, monkeypatch):
    run = CHECKPOINTS[name]
    assert run.finished
    command = ["ghostnet.py", name.split("-")[0]]
    for key, value in asdict(run.constants).items():
        command += option_words(key, value)
    monkeypatch.setattr("sys.argv", command)
    assert ghostnet.name_runs(tyro.cli(ghostnet.Arguments), CHECKPOINTS) == {name: run.constants}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_weights_have_the_accuracy_that_their_file_says(name, data):
    """Within 15 of 10,000 images, as bfloat16 is used where it is fast."""
    device, precision = ghostnet.pick_hardware(ghostnet.Arguments(device="cpu"))
    accuracy = ghostnet.evaluate(CHECKPOINTS[name].network(device), data, precision)
    assert CHECKPOINTS[name].accuracy == pytest.approx(accuracy, abs=0.15)


@pytest.mark.parametrize("name", OLDER)
def test_weights_of_the_older_recipe_classify_as_they_did(name, data, monkeypatch):
    monkeypatch.setattr(data, "test_images", data.test_images[:1000])
    monkeypatch.setattr(data, "test_labels", data.test_labels[:1000])
    hits = 10 * ghostnet.evaluate(OLDER[name].network(data.device), data)
    assert hits == pytest.approx(OLDER_HITS[name], abs=2)


def test_the_docstring_ends_with_the_lines_that_the_bare_command_ends_with():
    lines = ""
    for name in ghostnet.Arguments().experiments:
        accuracy = f"{CHECKPOINTS[name].accuracy:.2f}%"
        lines += f"    {name}: test accuracy {accuracy} now, {accuracy} when trained\n"
    assert ghostnet.__doc__.endswith(f"\n\n{lines}")


def test_an_unfinished_run_is_in_the_table_with_all_that_it_was_trained_on():
    run = run_of(Constants(epochs=3), [90.0, 60.0], seconds=[90.0, 60.0])
    run.trained_on = "NVIDIA H200, torch.bfloat16, torch 1; "
    run.trained_on += "Intel(R) Xeon(R) CPU @ 2.20GHz CPU, 2 threads, torch.float32, torch 2; "
    run.trained_on += "NVIDIA H200, torch.bfloat16, torch 2"
    table = ghostnet.results_table({"a": run, "a longer name": run}).splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:5] == ["a", "ghost-resnet56", "2/3", "60.00", "92.7"]
    assert cells[5:] == ["0.44M", "67.5M", "H200, Xeon", "0:02:30"]
