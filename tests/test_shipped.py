"""What is shipped in checkpoints/ and benchmarks/ablation/ is what the README says, measured again on the real data."""

import ablation
import comparison
import pytest
import torch
from harness import ROOT

import ghostnet

README = (ROOT / "README.md").read_text()
SHIPPED = sorted((ROOT / "checkpoints").glob("*.pth"))
WITH_WEIGHTS = [path for path in SHIPPED if "model" in torch.load(path, weights_only=True)]


def test_the_tables_in_the_readme_are_those_that_the_commands_print():
    runs = [ghostnet.read_checkpoint(path) for path in SHIPPED]
    assert ghostnet.results_table(runs) in README
    assert comparison.table(runs) in README
    assert ablation.table(ROOT / "benchmarks" / "ablation") in README


def test_shipped_runs_are_finished_and_carry_the_names_of_their_files():
    for path in [*SHIPPED, *(ROOT / "benchmarks" / "ablation").glob("*.pth")]:
        checkpoint = ghostnet.read_checkpoint(path)
        assert checkpoint["finished"] and checkpoint["run"] == path.stem


@pytest.mark.parametrize("path", WITH_WEIGHTS, ids=lambda path: path.stem)
def test_shipped_weights_have_the_accuracies_that_their_files_and_so_the_tables_say(path, real_data_dir):
    data, checkpoint = ghostnet.Cifar10(real_data_dir, torch.device("cpu")), ghostnet.read_checkpoint(path)
    model = ghostnet.load_network(path, checkpoint, torch.device("cpu")).eval()
    with torch.inference_mode():
        one = torch.cat([model(data.normalize(images)) for images in data.test_images.split(500)])
        other = torch.cat([model(data.normalize(images.flip(2))) for images in data.test_images.split(500)])
    for key, logits in (("accuracy", one), ("mirrored_accuracy", one + other)):
        accuracy = 100 * (logits.argmax(1) == data.test_labels).double().mean().item()
        assert checkpoint[key] == pytest.approx(accuracy, abs=0.01 + 1e-9)
    accuracy = ghostnet.evaluate(model, data)
    assert checkpoint["accuracy"] == pytest.approx(accuracy, abs=0.01 + 1e-9)
    assert ghostnet.evaluate(model, data, torch.bfloat16) == pytest.approx(accuracy, abs=0.1)
