"""The table of results, and what is shipped in checkpoints/, evaluated again on the real data."""

import textwrap
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import comparison
import pytest
import torch
import tyro
from tiny import option_words

import ghostnet
from ghostnet import Checkpoint, Constants

ROOT = Path(ghostnet.__file__).parent
CHECKPOINTS, REFUSED = ghostnet.read_all(ROOT / "checkpoints")
OLDER, OLDER_REFUSED = ghostnet.read_all(ROOT / "checkpoints" / "batch128")
README = (ROOT / "README.md").read_text()
SHIPPED = {name: (CHECKPOINTS, name) for name in CHECKPOINTS}
SHIPPED |= {f"batch128/{name}": (OLDER, name) for name in OLDER}


@pytest.fixture(scope="module")
def data(real_data_dir):
    return ghostnet.Cifar10(real_data_dir, torch.device("cpu"))


def test_no_shipped_file_is_refused():
    assert REFUSED == OLDER_REFUSED == {}
    assert len(CHECKPOINTS) >= 3
    assert len(OLDER) >= 3


def test_files_are_of_todays_recipe_and_those_in_a_folder_of_their_own_of_the_older():
    assert {run.constants.batch_size for run in CHECKPOINTS.values()} == {256}
    assert {run.constants.batch_size for run in OLDER.values()} == {128}


@pytest.mark.parametrize("folder, name", SHIPPED.values(), ids=SHIPPED)
def test_a_shipped_run_is_finished_and_named_as_the_script_names_it(folder, name, monkeypatch):
    assert folder[name].finished
    constants = folder[name].constants
    command = ["ghostnet.py", name.split("-")[0]]
    for key, value in asdict(constants).items():
        command += option_words(key, value)
    monkeypatch.setattr("sys.argv", command)
    assert ghostnet.name_runs(tyro.cli(ghostnet.Arguments), folder) == {name: constants}


def test_the_tables_in_the_readme_are_those_that_the_command_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ghostnet, "draw_curves", lambda *_: None)
    ghostnet.print_and_draw(CHECKPOINTS, {}, None, tmp_path)
    tables, _ = capsys.readouterr().out.split("\n\npictures in ")
    assert tables.strip() in README
    assert max(map(len, tables.splitlines())) <= 130


def test_the_tables_of_comparisons_in_the_readme_are_those_that_comparison_py_prints():
    text = " ".join(README.split())
    older = {f"batch128/{name}": run for name, run in OLDER.items()}
    _, ghosts = comparison.ordinary_and_ghosts(CHECKPOINTS)
    older_ordinary, older_ghosts = comparison.ordinary_and_ghosts(older)
    rows = comparison.rows_of(CHECKPOINTS | older_ordinary)
    assert comparison.accuracy_table(rows) in README
    if any(row.constants.erasing > 0 for row in rows):
        assert comparison.erasing_table(rows) in README
    assert comparison.ablation(ghosts | older_ghosts) in README
    on_h200 = OLDER["gr_multistep-cheap_weight_decay0.0005"].history["seconds"]
    assert f"takes {min(on_h200):.1f} s on an H200 without other runs" in text
    short, long = CHECKPOINTS["gr_cosine-epochs30"], CHECKPOINTS["gr_cosine"]
    assert f"{short.accuracy:.2f}% by 30 epochs and {long.accuracy:.2f}% by 200" in text
    hours = [run.epochs * min(run.history["seconds"]) / 3600 for run in (short, long)]
    assert f"these take {hours[0]:.1f} and {hours[1]:.1f} hours" in text
    share = comparison.low_pass_share(CHECKPOINTS["gr_cosine"].network("cpu"))
    assert f"{share:.0%} of the kernels are low-pass" in text


def test_the_docstring_ends_with_the_lines_that_the_bare_command_ends_with(monkeypatch, capsys):
    """As they are where the files' networks have the accuracies that the files say."""
    arguments = ghostnet.Arguments()
    data = SimpleNamespace(device=torch.device("cpu"))
    for run in arguments.experiments:
        checkpoint = CHECKPOINTS[run]
        accuracy = checkpoint.accuracy
        monkeypatch.setattr(ghostnet, "evaluate", lambda *_, accuracy=accuracy: accuracy)
        ghostnet.finish_and_test(run, checkpoint.constants, data, torch.float32, arguments)
    lines = capsys.readouterr().out
    assert ghostnet.__doc__.endswith("\n\n" + textwrap.indent(lines, "    "))


@pytest.mark.parametrize("folder, name", SHIPPED.values(), ids=SHIPPED)
def test_shipped_weights_have_the_accuracy_that_their_file_says(folder, name, data):
    """Within 15 of 10,000 images, as bfloat16 is used where it is fast."""
    device, precision = ghostnet.pick_hardware(ghostnet.Arguments(device="cpu"))
    accuracy = ghostnet.evaluate(folder[name].network(device), data, precision)
    assert folder[name].accuracy == pytest.approx(accuracy, abs=0.15)


def test_an_unfinished_run_is_in_the_table_with_all_that_it_was_trained_on():
    history = {name: [90.0, 60.0] for name in ghostnet.HISTORY}
    hardware = "NVIDIA H200, torch.bfloat16, torch 1; "
    hardware += "Intel(R) Xeon(R) CPU @ 2.20GHz CPU, 2 threads, torch.float32, torch 2; "
    hardware += "NVIDIA H200, torch.bfloat16, torch 2"
    checkpoint = Checkpoint(Constants(epochs=3), history, hardware, {}, {})
    table = ghostnet.results_table({"a": checkpoint, "a longer name": checkpoint}).splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:5] == ["a", "ghost-resnet56", "2/3", "60.00", "92.7"]
    assert cells[5:] == ["0.44M", "67.5M", "H200, Xeon", "0:02:30"]
