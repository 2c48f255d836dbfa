"""Every experiment beside what others report for its network: a Markdown table and images/accuracy_vs_flops.png.

    python benchmarks/comparison.py

"Ours" are the finished files in the checkpoint folder. In the table those of an experiment as it is named, mean ±
standard deviation over its seeds; in the picture also those with overridden constants, such as fewer epochs.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import matplotlib.figure
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet
from ghostnet import EXPERIMENTS, PAPER

# Top-1 accuracy in percent. The earlier reproduction is the one that this one follows; its numbers for ResNet-56 are
# those of the best epoch on the test set, that for VGG-16 is of the last. The public recipe is the strongest for the
# ordinary networks, that of github.com/chenyaofo/pytorch-cifar-models.
EARLIER = {"gr_cosine": 92.20, "gr_multistep": 92.55, "gv_cosine": 93.60, "gr_s3": 91.54, "gr_s5": 90.62,
           "gr_s10": 88.47, "gr_s20": 84.30}
PUBLIC = {"resnet32": 93.53, "resnet56": 94.37, "vgg16": 94.16}
PAPER_COSTS = {
    "resnet56": "0.85M, 125M", "ghost-resnet56 s=2 d=3": "0.43M, 63M", "vgg16": "15.0M, 313M",
    "ghost-vgg16 s=2 d=1": "7.6M, 157M", "ghost-vgg16 s=2 d=3": "7.7M, 158M", "ghost-vgg16 s=2 d=5": "7.7M, 160M",
    "ghost-vgg16 s=2 d=7": "7.7M, 163M", "ghost-vgg16 s=3 d=3": "5.2M, 107M", "ghost-vgg16 s=4 d=3": "4.0M, 80M",
    "ghost-vgg16 s=5 d=3": "3.3M, 65M",
}
FIRST = {constants.architecture: name for name, constants in reversed(EXPERIMENTS.items())}  # experiment with each


@dataclass(frozen=True)
class Arguments:
    """The experiments beside what others report: a Markdown table, and accuracy against multiply-adds as a picture."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder of the runs' files"""
    image_dir: Path = Path("images")
    """folder of the picture"""


@cache
def cost(network: str, ratio: int, dw_kernel_size: int) -> tuple[float, float]:
    """Multiply-adds and parameters, in millions."""
    model = ghostnet.build_network(ghostnet.Constants(network=network, ratio=ratio, dw_kernel_size=dw_kernel_size))
    return tuple(count / 1e6 for count in ghostnet.count(model, torch.zeros(1, 3, 32, 32))[""])


def table(checkpoints: list[dict]) -> str:
    """The Markdown table of all experiments; those without a finished run are not measured."""
    rows = []
    for name, c in EXPERIMENTS.items():
        ours = [run["accuracy"] for run in checkpoints if replace(run["constants"], seed=0) == c]
        macs, params = cost(c.network, c.ratio, c.dw_kernel_size)
        rows.append({
            "experiment": name,
            "network": c.architecture.split()[0],
            "s": c.ratio if c.ratio > 1 else "–",
            "d": c.dw_kernel_size if c.ratio > 1 else "–",
            "params, MACs": f"{params:.2f}M, {macs:.1f}M",
            "params, MACs (paper)": PAPER_COSTS.get(c.architecture, "–"),
            "epochs": c.epochs,
            "ours": ghostnet.spread(ours) if ours else "not measured",
            "paper": PAPER.get(c.architecture, "–"),
            "earlier reproduction": f"{EARLIER[name]:.2f}" if name in EARLIER else "–",
            "public recipe": PUBLIC.get(name, "–"),
        })
    return ghostnet.markdown(rows)


def draw(checkpoints: list[dict], path: Path) -> None:
    """Accuracy against multiply-adds."""
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    paper = {FIRST[architecture]: accuracy for architecture, accuracy in PAPER.items()}
    others = {"paper": paper, "earlier reproduction": EARLIER, "ordinary, strongest public recipe": PUBLIC}
    series = {label: [(name, EXPERIMENTS[name], accuracy) for name, accuracy in accuracies.items()]
              for label, accuracies in others.items()}
    series["ours, last epoch"] = [(seeds[0]["run"], c, statistics.mean(seed["accuracy"] for seed in seeds))
                                  for c, seeds in ghostnet.by_run(checkpoints) if not c.holdout]
    for (label, points), marker in zip(series.items(), "s^vo", strict=True):
        x = [cost(c.network, c.ratio, c.dw_kernel_size)[0] for _, c, _ in points]
        axes.plot(x, [accuracy for _, _, accuracy in points], marker, label=label, markersize=7)
        for macs, (name, _, accuracy) in zip(x, points, strict=True):
            left = label == "paper" and name not in ("gv_d5", "gv_d7")  # where there is room
            aside = {"ha": "right", "xytext": (-6, 0)} if left else {"ha": "left", "xytext": (6, 0)}
            axes.annotate(name, (macs, accuracy), textcoords="offset points", va="center", fontsize=7, **aside)
    axes.set(xlabel="multiply-adds (M)", ylabel="test accuracy (%)", xscale="log")
    axes.set_xticks(ticks := [20, 30, 50, 70, 100, 160, 300], ticks)
    axes.minorticks_off()
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150))


def main() -> None:
    arguments = ghostnet.parse(Arguments())
    ghostnet.prepare_folder(arguments.image_dir, "--image-dir")
    runs = [ghostnet.read_checkpoint(path) for path in sorted(arguments.checkpoint_dir.glob("*.pth"))]
    runs = [run for run in runs if run["finished"]]
    print(table(runs), end="\n\n")
    draw(runs, path := arguments.image_dir / "accuracy_vs_flops.png")
    print(f"saved {path}")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
