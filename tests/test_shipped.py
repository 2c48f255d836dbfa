"""What is shipped in checkpoints/ is what the README says, measured again on the real data."""

import comparison
import pytest
import torch
from harness import ROOT

import ghostnet

SHIPPED = sorted((ROOT / "checkpoints").glob("*.pth"))


def test_every_file_in_checkpoints_is_a_finished_run():
    checkpoints, refused = ghostnet.read_all(ROOT / "checkpoints")
    assert not refused and all(checkpoint.finished for checkpoint in checkpoints.values())
    assert [f"{name}.pth" for name in checkpoints] == [path.name for path in SHIPPED] != []


def test_shipped_runs_carry_the_names_that_the_script_gives_them():
    for path in SHIPPED:
        experiment, *changes = path.stem.split("-")
        constants = ghostnet.read_checkpoint(path).constants
        base = ghostnet.EXPERIMENTS[experiment]
        changed = [name for name in vars(base) if getattr(constants, name) != getattr(base, name)]
        assert changes == [f"{name}{getattr(constants, name)}" for name in changed]


def test_the_tables_in_the_readme_are_those_that_the_commands_print():
    readme = (ROOT / "README.md").read_text()
    checkpoints, _ = ghostnet.read_all(ROOT / "checkpoints")
    assert ghostnet.results_table(checkpoints) in readme
    assert comparison.table(comparison.measured(checkpoints)) in readme


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_have_the_accuracy_that_their_file_and_so_the_table_says(path, real_data_dir):
    data, checkpoint = ghostnet.Cifar10(real_data_dir, torch.device("cpu")), ghostnet.read_checkpoint(path)
    model = ghostnet.build_network(checkpoint.constants)
    model.load_state_dict(checkpoint.model)
    model.eval().to(memory_format=torch.channels_last)  # the faster order on a CPU
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (ghostnet.MEAN, ghostnet.STD))
    hits = 0
    with torch.inference_mode():
        for images, labels in zip(data.test_images.split(100), data.test_labels.split(100), strict=True):
            logits = model((images.permute(0, 3, 1, 2) / 255 - mean) / std)
            hits += int((logits.argmax(1) == labels).sum())
    assert checkpoint.accuracy == pytest.approx(hits / 100, abs=0.01 + 1e-9)  # of 10,000 images, in percent
