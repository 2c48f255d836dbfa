"""The table of benchmarks/ablation.py, from histories whose gains are known."""

from dataclasses import asdict, replace

import ablation
import torch

import ghostnet


def write_history(folder, lever, seed, accuracy, epochs=1):
    shape = {"network": "resnet20", "epochs": epochs, "holdout": 5000, "seed": seed}
    record = {"epoch": 1, "lr": 0.1, "loss": 1.0, "train_accuracy": 50.0, "test_accuracy": accuracy, "seconds": 1.0}
    run = f"resnet20_{epochs}-{lever}-seed{seed}"
    checkpoint = {
        "version": ghostnet.VERSION,
        "run": run,
        "constants": asdict(replace(ghostnet.GR, **shape, **ablation.LEVERS[lever])),
        "history": [record],
        "mirrored_accuracy": accuracy + 1,
        **dict.fromkeys(("hardware", "precision", "torch", "date"), "abacus"),
    }
    torch.save(checkpoint, folder / f"{run}.pth")


def test_gains_are_paired_by_seed_and_unfinished_runs_are_left_out(tmp_path):
    for seed, accuracy in enumerate([50.0, 60.0, 70.0]):
        write_history(tmp_path, "nothing", seed, accuracy)
    for seed, accuracy in enumerate([51.0, 62.0, 73.0]):  # gains 1, 2, 3
        write_history(tmp_path, "he", seed, accuracy)
    for seed, accuracy in enumerate([52.0, 60.0]):
        write_history(tmp_path, "nesterov", seed, accuracy)
        write_history(tmp_path, "nesterov+decay", seed, accuracy + 1 + seed)  # 1 and 2 more than without the decay
    write_history(tmp_path, "ema", 2, 69.5)
    write_history(tmp_path, "cutout", 0, 40.0, epochs=2)
    assert ablation.table(tmp_path).splitlines()[2:] == [
        "| ghost-resnet20 s=2 d=3 | 1 | nothing | 60.00 ± 10.00 (n=3) | – | 61.00 ± 10.00 (n=3) | abacus |",
        "| ghost-resnet20 s=2 d=3 | 1 | initialization he | 62.00 ± 11.00 (n=3) | +2.00 ± 0.58 "
        "| 63.00 ± 11.00 (n=3) | abacus |",
        "| ghost-resnet20 s=2 d=3 | 1 | nesterov True | 56.00 ± 5.66 (n=2) | +1.00 ± 1.00 "
        "| 57.00 ± 5.66 (n=2) | abacus |",
        "| ghost-resnet20 s=2 d=3 | 1 | ema 0.99 | 69.50 | -0.50 | 70.50 | abacus |",
        "| ghost-resnet20 s=2 d=3 | 1 | nesterov True + weight_decay 0.0005, decay_norm_and_bias False "
        "| 57.50 ± 6.36 (n=2) | +1.50 ± 0.50 | 58.50 ± 6.36 (n=2) | abacus |",
    ]


def test_finished_histories_need_neither_data_nor_training(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        write_history(tmp_path, "nothing", seed, 50.0)
    words = ["--levers", "nothing", "--seeds", "0", "1", "--epochs", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ablation.py", *words, "--data-dir", str(tmp_path / "none")])
    ablation.main()
    assert "| nothing | 50.00 ± 0.00 (n=2) |" in capsys.readouterr().out
