"""Every finished run beside what others report for its network: a Markdown table and images/accuracy_vs_flops.png.

    python benchmarks/comparison.py

Runs that differ in their seeds alone are one, as mean ± standard deviation (their number). Below the table stands how
many ghosts of every ghost run weight decay has emptied: batch norm's epsilon drowns a map that is made by such small
weights.
"""

import re
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

import matplotlib.figure
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet
from ghostnet import PAPER, Constants

# Top-1 accuracy in percent. The earlier reproduction is the one that this one follows; its numbers for ResNet-56 are
# those of the best epoch on the test set, that for VGG-16 is of the last. The public recipe is the strongest for the
# ordinary networks, that of github.com/chenyaofo/pytorch-cifar-models.
EARLIER = {("ghost-resnet56", "cosine"): 92.20, ("ghost-resnet56", "multistep"): 92.55,
           ("ghost-vgg16", "cosine"): 93.60, ("ghost-resnet56 s=3", "cosine"): 91.54,
           ("ghost-resnet56 s=5", "cosine"): 90.62, ("ghost-resnet56 s=10 d=5", "cosine"): 88.47,
           ("ghost-resnet56 s=20 d=5", "cosine"): 84.30}
PUBLIC = {"resnet32": 93.53, "resnet56": 94.37, "vgg16": 94.16}
PAPER_COSTS = {"resnet56": "0.85M, 125M", "ghost-resnet56": "0.43M, 63M", "vgg16": "15.0M, 313M",
               "ghost-vgg16": "7.7M, 158M", "ghost-vgg16 d=1": "7.6M, 157M", "ghost-vgg16 d=5": "7.7M, 160M",
               "ghost-vgg16 d=7": "7.7M, 163M", "ghost-vgg16 s=3": "5.2M, 107M", "ghost-vgg16 s=4": "4.0M, 80M",
               "ghost-vgg16 s=5": "3.3M, 65M"}
EMPTY = 1e-3  # the largest weight of an empty ghost at most; a kernel of 3x3 begins with weights up to 0.33
ARCHITECTURES = {constants.architecture: constants for constants in ghostnet.EXPERIMENTS.values()}


@dataclass(frozen=True)
class Arguments:
    """Every finished run beside what others report: a Markdown table, and accuracy against FLOPs as a picture."""

    checkpoint_dir: Path = Path("checkpoints")  # folder of the runs' files
    image_dir: Path = Path("images")  # folder of the picture


def measured(checkpoints: dict[str, ghostnet.Checkpoint]) -> list[tuple[str, Constants, list[float]]]:
    """Name, constants and the accuracies of all seeds of every finished run."""
    runs = {}
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished:
            run = runs.setdefault(replace(checkpoint.constants, seed=0), (re.sub(r"-seed\d+$", "", name), []))
            run[1].append(checkpoint.accuracy)
    return [(name, constants, accuracies) for constants, (name, accuracies) in runs.items()]


def emptied(model: torch.nn.Module) -> tuple[int, int]:
    """How many ghosts of a network are empty, and of how many."""
    peaks = []
    for module in model.modules():
        if isinstance(module, ghostnet.GhostModule) and module.cheap_operation is not None:
            kernels = module.cheap_operation.weight[: module.out_channels - module.primary_conv.out_channels]
            peaks += kernels.abs().amax((1, 2, 3)).tolist()
    return sum(peak <= EMPTY for peak in peaks), len(peaks)


@cache
def cost(constants: Constants) -> tuple[float, float]:
    """FLOPs (multiply-adds) and parameters, in millions."""
    with torch.device("meta"):
        flops, params = ghostnet.count(ghostnet.build_network(constants), torch.zeros(1, 3, 32, 32))[""]
    return flops / 1e6, params / 1e6


def table(runs: list[tuple[str, Constants, list[float]]]) -> str:
    """The Markdown table of the runs."""
    rows = [("run", "network", "epochs", "ours", "paper", "earlier", "public", "params, FLOPs", "paper's")]
    for name, constants, accuracies in runs:
        network, n, (flops, params) = constants.architecture, len(accuracies), cost(constants)
        ours = f"{mean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f} ({n})" if n > 1 else "")
        others = (EARLIER.get((network, constants.schedule)), PUBLIC.get(network))
        others = (f"{accuracy:.2f}" if accuracy else "–" for accuracy in others)
        rows.append((name, network, constants.epochs, ours, PAPER.get(network, "–"), *others,
                     f"{params:.2f}M, {flops:.1f}M", PAPER_COSTS.get(network, "–")))
    return ghostnet.markdown(rows)


def draw(runs: list[tuple[str, Constants, list[float]]], path: Path) -> None:
    """Accuracy against FLOPs."""
    figure = matplotlib.figure.Figure(figsize=(13.5, 8.5), layout="constrained")
    axes = figure.subplots()
    earlier = [(network if schedule == "cosine" else f"{network} {schedule}", ARCHITECTURES[network], accuracy)
               for (network, schedule), accuracy in EARLIER.items()]
    paper, public = ([(name, ARCHITECTURES[name], accuracy) for name, accuracy in others.items()]
                     for others in (PAPER, PUBLIC))
    series = {
        "paper": paper,
        "earlier reproduction": earlier,
        "ordinary, strongest public recipe": public,
        "ours, last epoch": [(name, constants, mean(accuracies)) for name, constants, accuracies in runs],
    }
    crowded = {("paper", "ghost-vgg16 d=5"), ("paper", "ghost-vgg16 d=7"), ("paper", "ghost-vgg16 s=4"),
               ("ours, last epoch", "resnet32")}  # on the left
    for (label, points), marker in zip(series.items(), "s^vo", strict=True):
        flops = [cost(constants)[0] for _, constants, _ in points]
        axes.plot(flops, [accuracy for *_, accuracy in points], marker, label=label, markersize=7)
        for x, (name, _, accuracy) in zip(flops, points, strict=True):
            left = points is not earlier and (label, name) not in crowded
            aside = {"ha": "right", "xytext": (-6, 0)} if left else {"ha": "left", "xytext": (6, 0)}
            text = name.replace("$", r"\$")  # which would start a formula
            axes.annotate(text, (x, accuracy), textcoords="offset points", va="center", fontsize=7, **aside)
    axes.set(xlabel="FLOPs (multiply-adds, M)", ylabel="test accuracy (%)", xscale="log")
    axes.set_xticks(ticks := [20, 30, 50, 70, 100, 160, 300], ticks)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150))


def main() -> None:
    arguments = ghostnet.parse(Arguments())
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    checkpoints, refused = ghostnet.read_all(arguments.checkpoint_dir)
    for error in refused.values():
        ghostnet.complain(f"{error}; it is left out")
    runs = measured(checkpoints)
    print(table(runs), end="\n\n")
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished and checkpoint.constants.ratio > 1:
            empty, ghosts = emptied(checkpoint.network(torch.device("cpu")))
            print(f"{name}: {empty} of {ghosts} ghosts are empty")
    draw(runs, path := arguments.image_dir / "accuracy_vs_flops.png")
    print(f"saved {path}")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
