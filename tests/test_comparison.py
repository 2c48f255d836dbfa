"""The table and the picture of benchmarks/comparison.py, from runs whose accuracies are known."""

from dataclasses import asdict, replace

import comparison
import matplotlib.image
import torch

import ghostnet


def write_run(folder, run, constants, accuracy):
    record = {"epoch": 1, "lr": 0.1, "loss": 1.0, "train_accuracy": 50.0, "test_accuracy": accuracy, "seconds": 1.0}
    history = [record | {"epoch": epoch} for epoch in range(1, constants.epochs + 1)]
    labels = dict.fromkeys(("hardware", "precision", "torch", "date"), "abacus")
    fields = {"version": ghostnet.VERSION, "run": run, "constants": asdict(constants), "history": history}
    torch.save(fields | {"mirrored_accuracy": accuracy} | labels, folder / f"{run}.pth")


def test_experiments_stand_beside_what_others_report(tmp_path, monkeypatch, capsys):
    for seed, accuracy in enumerate([92.0, 93.0]):
        write_run(tmp_path, f"gr_cosine-seed{seed}", replace(ghostnet.GR, seed=seed), accuracy)
    write_run(tmp_path, "gr_cosine-ratio4", replace(ghostnet.GR, ratio=4), 91.0)  # no experiment of the table
    write_run(tmp_path, "gr_s3-holdout5000", replace(ghostnet.EXPERIMENTS["gr_s3"], holdout=5000), 99.0)
    folders = ["--checkpoint-dir", str(tmp_path), "--image-dir", str(tmp_path / "images")]
    monkeypatch.setattr("sys.argv", ["comparison.py", *folders])
    comparison.main()
    rows = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["| gr_cosine"] == (
        "| gr_cosine | ghost-resnet56 | 2 | 3 | 0.44M, 67.5M | 0.43M, 63M "
        "| 200 | 92.50 ± 0.71 (n=2) | 92.7 | 92.20 | – |"
    )
    assert rows["| gr_s3"].endswith("| 0.31M, 50.3M | – | 200 | not measured | – | 91.54 | – |")
    assert rows["| resnet32"].endswith("| – | – | 0.47M, 70.4M | – | 200 | not measured | – | – | 93.53 |")
    assert len([name for name in rows if name[2:] in ghostnet.EXPERIMENTS]) == len(ghostnet.EXPERIMENTS)
    height, width, _ = matplotlib.image.imread(tmp_path / "images" / "accuracy_vs_flops.png").shape
    assert width > 1.5 * height > 600
