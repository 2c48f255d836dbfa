"""Every finished run beside what others report, and what became of its ghosts.

    python benchmarks/comparison.py               tables, and images/accuracy_vs_flops.png
    python benchmarks/comparison.py --evaluate    tests every file again: minutes on a CPU

Accuracies are those after the last epoch, if nothing else is said. Runs that differ in their seeds
alone share a row: mean +- standard deviation (number of seeds). Runs with random erasing, which is
not the paper's training, stand beside the same runs without it. Of an older recipe's runs, ordinary
networks are in the first tables and all in the last two. A ghost is empty if weight decay has left
its kernel such small weights that batch norm's epsilon drowns its map.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import matplotlib.figure
import matplotlib.style
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet
from ghostnet import PAPER, Checkpoint, Constants


class Accuracies(NamedTuple):
    """Top-1 accuracies in percent, as far as they are known."""

    last: float | None = None  # after the last epoch
    best: float | None = None  # of the best epoch on the test images


PUBLIC = {  # github.com/chenyaofo/pytorch-cifar-models: the logs of its runs, and its README
    "resnet32": Accuracies(93.41, 93.53),
    "resnet56": Accuracies(94.21, 94.37),
    "vgg16": Accuracies(94.06, 94.16),
}
EMPTY = 1e-3  # largest weight of an empty ghost; a 3x3 kernel begins with a deviation of 0.47
ROOT = Path(ghostnet.__file__).resolve().parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arguments:
    """Every finished run beside what others report, and what became of its ghosts."""

    run: str = "gr_cosine"  # ghost run whose ghosts are compared with their intrinsic maps
    checkpoint_dir: Path = ROOT / "checkpoints"  # folder of the runs' files
    older_dir: Path = ROOT / "checkpoints/batch128"  # folder of the older recipe's runs
    image_dir: Path = ROOT / "images"  # folder of the picture
    data_dir: Path = ROOT / "data"  # folder of cifar-10-batches-py, downloaded if missing
    evaluate: bool = False  # test the network in every file, instead of all else


@dataclass
class Row:
    """Finished runs that differ in their seeds alone, and what others report of their network."""

    name: str
    constants: Constants
    runs: dict[int, Checkpoint] = field(default_factory=dict)  # by seed

    @property
    def network(self) -> str:
        """What others may have trained; nobody reports a network with random erasing."""
        erased = " with random erasing" if self.constants.erasing > 0 else ""
        return f"{self.constants.architecture}{erased}"

    @property
    def ours(self) -> Accuracies:
        if not self.runs:
            return Accuracies()
        last = mean(run.accuracy for run in self.runs.values())
        return Accuracies(last, mean(map(best_accuracy, self.runs.values())))

    @property
    def paper(self) -> Accuracies:
        return Accuracies(PAPER.get(self.network))

    @property
    def public(self) -> Accuracies:
        return PUBLIC.get(self.network, Accuracies())


def best_accuracy(checkpoint: Checkpoint) -> float:
    """The accuracy of the best epoch on the test images."""
    return max(checkpoint.history["test_accuracy"])


def rows_of(checkpoints: dict[str, Checkpoint]) -> list[Row]:
    """The finished runs; a copy of a file is no second seed."""
    rows = {}
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished:
            constants = replace(checkpoint.constants, seed=0)
            row = rows.setdefault(constants, Row(re.sub(r"-seed\d+$", "", name), constants))
            row.runs[checkpoint.constants.seed] = checkpoint
    return list(rows.values())


@cache
def cost(constants: Constants) -> tuple[float, float]:
    """FLOPs (multiply-adds) and parameters, in millions."""
    with torch.device("meta"):
        network = ghostnet.build_network(constants)
        flops, parameters = ghostnet.count(network, torch.zeros(1, 3, 32, 32))[""]
    return flops / 1e6, parameters / 1e6


def percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}"


def spread(row: Row) -> str:
    """The accuracy after the last epoch, with the deviation of several seeds."""
    accuracies = [run.accuracy for run in row.runs.values()]
    several = f" +- {stdev(accuracies):.2f} ({len(accuracies)})" if len(accuracies) > 1 else ""
    return percent(row.ours.last) + several


def training_loss(row: Row) -> str:
    losses = [run.history["loss"][-1] for run in row.runs.values()]
    return f"{mean(losses):.4f}" if losses else "-"


def trained(row: Row) -> tuple[str, timedelta]:
    """The devices, and the time that a run took, with all pauses of a shared device."""
    hardware = "; ".join(run.trained_on for run in row.runs.values())
    seconds = mean(sum(run.history["seconds"]) for run in row.runs.values())
    return ghostnet.short_hardware(hardware), timedelta(seconds=round(seconds))


def table(columns: str, rows: list[tuple]) -> str:
    return ghostnet.markdown([columns.split("|"), *rows])


def results_table(rows: list[Row]) -> str:
    """Runs of the paper's kind of training."""
    lines = []
    for row in rows:
        if row.constants.erasing == 0:
            flops, parameters = cost(row.constants)
            costs = (f"{parameters:.2f}M", f"{flops:.1f}M")
            others = (row.paper.last or "-", percent(row.public.last))
            run = (row.name, row.network, row.constants.epochs, spread(row))
            lines.append((*run, *others, *costs, *trained(row)))
    return table("run|network|epochs|accuracy|paper|public|params|FLOPs|trained on|time", lines)


def erasing_table(rows: list[Row]) -> str:
    """Runs with random erasing, each beside the one that differs in nothing else."""
    by_constants = {row.constants: row for row in rows}
    lines = []
    for row in rows:
        if row.constants.erasing > 0:
            without = by_constants.get(replace(row.constants, erasing=0.0), Row("", row.constants))
            run = (row.name, row.constants.architecture, row.constants.epochs)
            losses = (training_loss(row), training_loss(without))
            lines.append((*run, spread(row), spread(without), *losses, *trained(row)))
    columns = "run|network|epochs|accuracy|without|training loss|without|trained on|time"
    return table(columns, lines)


def best_table(rows: list[Row]) -> str:
    """Last and best epochs beside those of others; the paper does not say which it means."""
    lines = []
    for row in rows:
        ours, paper = row.ours, row.paper.last
        difference = "-" if paper is None else f"{ours.last - paper:+.2f}"
        numbers = map(percent, (ours.last, ours.best, row.public.last, row.public.best))
        lines.append((row.name, *numbers, paper or "-", difference))
    return table("run|ours, last|best|public, last|best|paper|ours, last - paper", lines)


def time_table(checkpoints: dict[str, Checkpoint]) -> str:
    """What an epoch took. The shortest one tells of a device without other runs or pauses."""
    lines = []
    for name, checkpoint in checkpoints.items():
        seconds = checkpoint.history["seconds"]
        hours = (sum(seconds) / 3600, len(seconds) * min(seconds) / 3600)
        numbers = (f"{number:.1f}" for number in (min(seconds), median(seconds), *hours))
        lines.append((name, *numbers, ghostnet.short_hardware(checkpoint.trained_on)))
    columns = "run|shortest epoch, s|median, s|all epochs, h|if all were the shortest, h|trained on"
    return table(columns, lines)


def ghost_kernels(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every ghost module that makes ghosts, and their kernels (ghosts, d * d)."""
    for module in model.modules():
        if isinstance(module, ghostnet.GhostModule) and module.cheap_operation is not None:
            yield module, module.cheap_operation.weight.detach()[: module.ghosts].flatten(1)


def is_empty(kernels: Tensor) -> Tensor:
    return kernels.abs().amax(1) <= EMPTY


def emptied(model: nn.Module) -> str:
    empty = torch.cat([is_empty(kernels) for _, kernels in ghost_kernels(model)])
    return f"{empty.sum()} of {len(empty)}"


def decay_table(ghosts: dict[str, Checkpoint]) -> str:
    """The runs whose constants differ in nothing but the decay on the cheap kernels."""
    alike = {}
    for name, run in ghosts.items():
        if run.constants.cheap_weight_decay in (0, run.constants.weight_decay):
            the_rest = replace(run.constants, cheap_weight_decay=0.0)
            alike.setdefault(the_rest, {})[name] = run
    lines = []
    for runs in alike.values():
        for name, run in runs.items():
            if len(runs) > 1:
                decay = f"{run.constants.cheap_weight_decay:g}"
                loss = f"{run.history['loss'][-1]:.4f}"
                accuracies = (percent(run.accuracy), percent(best_accuracy(run)))
                lines.append((name, decay, loss, *accuracies, emptied(run.network(CPU))))
    return table("run|decay on cheap kernels|training loss|accuracy|best|ghosts empty", lines)


def correlations(model: nn.Module, image: Tensor) -> list[float]:
    """The correlation of every ghost of an image (1, 3, 32, 32) with its intrinsic map."""
    found = []
    for module, kernels in ghost_kernels(model):
        ghosts, sources = ghostnet.ghosts_and_sources(model, module, image)
        for ghost, source, empty in zip(ghosts, sources, is_empty(kernels), strict=True):
            pair = torch.stack([source.flatten(), ghost.flatten()])
            correlation = torch.corrcoef(pair)[0, 1]
            if not empty and correlation.isfinite():  # there is none with a blank map
                found.append(correlation.item())
    return found


@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def draw(rows: list[Row], path: Path) -> None:
    """Accuracies, a line for each of our rows and each network that only others have trained."""
    shown = {row.network for row in rows}
    for name, constants in ghostnet.EXPERIMENTS.items():
        row = Row(name, constants)
        if row.network in PAPER.keys() | PUBLIC.keys() and row.network not in shown:
            rows = [*rows, row]
            shown.add(row.network)
    rows = sorted(rows, key=lambda row: cost(row.constants))
    figure = matplotlib.figure.Figure(figsize=(12, 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for source, marker, color in (("paper", "s", "C0"), ("public", "v", "C2"), ("ours", "o", "C3")):
        for epoch, fill in (("last", color), ("best", "none")):
            accuracies = [getattr(getattr(row, source), epoch) for row in rows]
            known = [line for line, accuracy in enumerate(accuracies) if accuracy is not None]
            if known:
                label = source if source == "paper" else f"{source}, {epoch} epoch"
                options = {"color": color, "markerfacecolor": fill, "label": label}
                axes.plot([accuracies[line] for line in known], known, marker, **options)
    labels = [f"{row.name},  {row.network},  {cost(row.constants)[0]:.1f}M" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="test accuracy (%)", ylabel="run, network, FLOPs (multiply-adds)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150, format="png"))


def evaluation_table(checkpoints: dict[str, Checkpoint], data: ghostnet.Cifar10) -> str:
    lines = []
    for name, run in checkpoints.items():
        now = ghostnet.evaluate(run.network(CPU, torch.channels_last), data)
        lines.append((name, percent(run.accuracy), percent(now)))
    return table("run|accuracy in the file|now, in float32", lines)


def main() -> None:
    arguments = tyro.cli(Arguments)
    checkpoints, refused = ghostnet.read_all(arguments.checkpoint_dir)
    older, refused_too = ghostnet.read_all(arguments.older_dir)
    for error in [*refused.values(), *refused_too.values()]:
        ghostnet.complain(f"{error}; it is left out")
    older = {f"{arguments.older_dir.name}/{name}": run for name, run in older.items()}
    every = checkpoints | older
    if arguments.evaluate:
        print(evaluation_table(every, ghostnet.Cifar10(arguments.data_dir, CPU)))
        return
    ordinary = {name: run for name, run in older.items() if run.constants.ratio == 1}
    ghosts = {n: run for n, run in every.items() if run.finished and run.constants.ratio > 1}
    rows = rows_of(checkpoints | ordinary)
    print(results_table(rows))
    if any(row.constants.erasing > 0 for row in rows):
        print(f"\n**With random erasing: not the paper's training**\n\n{erasing_table(rows)}")
    print(f"\n**Best epochs**\n\n{best_table(rows)}")
    print(f"\n**Time**\n\n{time_table(every)}")
    print(f"\n**What weight decay does to ghosts**\n\n{decay_table(ghosts)}\n")
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.image_dir / "accuracy_vs_flops.png"
    draw(rows, path)
    print(f"saved {path}")
    ghostnet.require(arguments.run in ghosts, f"no finished ghost run is named {arguments.run}")
    data = ghostnet.Cifar10(arguments.data_dir, CPU)
    image = data.normalize(data.test_images[ghostnet.PICTURE_IMAGE][None])
    found = correlations(ghosts[arguments.run].network(CPU), image)
    print(f"{arguments.run}: median correlation of a ghost with the map that it is made from "
          f"{median(found):+.2f} (test image {ghostnet.PICTURE_IMAGE})")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
