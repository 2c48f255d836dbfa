"""Which constants pay: short runs that change one constant each, measured on images held out of the training set.

    python benchmarks/ablation.py                              trains what is missing, then prints the table
    python benchmarks/ablation.py --seeds 0 --levers he ema    a part of it; two processes may take two parts

Every run is gr_cosine on a shallower network, for fewer epochs, trained on 45,000 of the training images and measured
after its last epoch on the other 5,000; the test images are not looked at. The histories stay in benchmarks/ablation/,
without the weights, so that the table needs no training. "Gain" is the mean over the seeds of the difference from the
run with the same seed and without the (last) change, ± its standard error.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
import ghostnet  # noqa: E402

LEVERS = {
    "nothing": {},
    "he": {"initialization": "he"},
    "he_zero": {"initialization": "he_zero"},
    "decay": {"weight_decay": 5e-4, "decay_norm_and_bias": False},
    "nesterov": {"nesterov": True},
    "warmup": {"warmup_epochs": 1},
    "lr": {"lr": 0.2},
    "smoothing": {"label_smoothing": 0.1},
    "ema": {"ema": 0.99},
    "cutout": {"cutout": 8},
}
LEVERS["nesterov+decay"] = LEVERS["nesterov"] | LEVERS["decay"]


@dataclass(frozen=True)
class Arguments:
    """Train short runs on 45,000 images, measure them on the other 5,000, and print what each lever gains."""

    levers: tuple[Literal[*LEVERS], ...] = tuple(LEVERS)
    """what to change, each in runs of its own"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """each lever once with each of these seeds"""
    network: Literal["resnet20", "resnet56"] = "resnet20"
    """the ordinary network whose convolutions become ghost modules"""
    epochs: int = 3
    """length of each run and of its schedule"""
    folder: Path = ROOT / "ablation"
    """of the histories"""
    data_dir: Path = Path("data")
    """folder of cifar-10-batches-py, which is downloaded when it is missing"""
    device: str = "auto"
    """cuda, mps, cpu, or auto: the first of these that is there"""


def finished(path: Path) -> bool:
    return path.exists() and ghostnet.read_checkpoint(path)["finished"]


def drop_weights(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    ghostnet.write_atomically(path, partial(torch.save, {k: v for k, v in checkpoint.items() if k != "model"}))


def table(folder: Path) -> str:
    """The Markdown table of all finished runs in the folder."""
    runs = {}
    for path in sorted(folder.glob("*.pth")):
        checkpoint = ghostnet.read_checkpoint(path)
        if checkpoint["finished"]:
            c, lever = checkpoint["constants"], path.stem.split("-")[1]
            runs.setdefault((c.architecture, c.epochs, lever), []).append(checkpoint)
    rows = []
    for architecture, epochs, lever in sorted(runs, key=lambda run: (*run[:2], [*LEVERS].index(run[2]))):
        seeds = runs[architecture, epochs, lever]
        without = runs.get((architecture, epochs, lever.rpartition("+")[0] or "nothing"), [])
        base = {run["constants"].seed: run["accuracy"] for run in without}
        gains = [s["accuracy"] - base[s["constants"].seed] for s in seeds if s["constants"].seed in base]
        error = f" ± {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        changes = (", ".join(f"{key} {value}" for key, value in LEVERS[part].items()) for part in lever.split("+"))
        rows.append({
            "network": architecture,
            "epochs": epochs,
            "changed": " + ".join(changes) or "nothing",
            "held-out accuracy": ghostnet.spread([seed["accuracy"] for seed in seeds]),
            "gain": f"{mean(gains):+.2f}{error}" if gains and lever != "nothing" else "–",
            "with mirrored view": ghostnet.spread([seed["mirrored_accuracy"] for seed in seeds]),
            "trained on": seeds[0]["hardware"],
        })
    return ghostnet.markdown(rows)


def main() -> None:
    arguments = ghostnet.parse(Arguments())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    options = ghostnet.Arguments(checkpoint_dir=arguments.folder, data_dir=arguments.data_dir)
    data = None
    for seed in arguments.seeds:
        for lever in arguments.levers:
            shape = {"network": arguments.network, "epochs": arguments.epochs, "holdout": 5000, "seed": seed}
            constants = replace(ghostnet.GR, **shape, **LEVERS[lever])
            run = f"{arguments.network}_{arguments.epochs}-{lever}-seed{seed}"
            path = arguments.folder / f"{run}.pth"
            if finished(path):
                continue
            data = data or ghostnet.Cifar10(arguments.data_dir, ghostnet.pick_device(arguments.device))
            ghostnet.complete(run, constants, data, options)
            drop_weights(path)
    print(f"\n{table(arguments.folder)}")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
