"""Every finished run beside what others report, and what became of its ghosts.

    python benchmarks/comparison.py

prints Markdown tables and draws images/accuracy_vs_flops.png. Accuracies are those after the last
epoch; those of the best epoch on the test images stand apart, as others report them. Runs that
differ in their seeds alone share a row: mean +- standard deviation (number of seeds). Runs with
random erasing, which is not the paper's training, stand in a table of their own, beside the same
runs without it. The folder of an older recipe's runs adds their ordinary networks to the first
table and their ghosts to the last one. A ghost is empty if weight decay has left its kernel such
small weights that batch norm's epsilon drowns its map.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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


EARLIER = {  # the reproduction that this one follows
    "ghost-resnet56": Accuracies(best=92.20),
    "ghost-resnet56 multistep": Accuracies(best=92.55),
    "ghost-resnet56 s=3": Accuracies(best=91.54),
    "ghost-resnet56 s=5": Accuracies(best=90.62),
    "ghost-resnet56 s=10 d=5": Accuracies(best=88.47),
    "ghost-resnet56 s=20 d=5": Accuracies(best=84.30),
    "ghost-vgg16": Accuracies(93.60, 93.63),
}
PUBLIC = {  # github.com/chenyaofo/pytorch-cifar-models: the logs of its runs, and its README
    "resnet32": Accuracies(93.41, 93.53),
    "resnet56": Accuracies(94.21, 94.37),
    "vgg16": Accuracies(94.06, 94.16),
}
PAPER_COSTS = {
    "resnet56": "0.85M, 125M", "ghost-resnet56": "0.43M, 63M",
    "vgg16": "15.0M, 313M", "ghost-vgg16": "7.7M, 158M",
    "ghost-vgg16 d=1": "7.6M, 157M", "ghost-vgg16 d=5": "7.7M, 160M",
    "ghost-vgg16 d=7": "7.7M, 163M", "ghost-vgg16 s=3": "5.2M, 107M",
    "ghost-vgg16 s=4": "4.0M, 80M", "ghost-vgg16 s=5": "3.3M, 65M",
}
EMPTY = 1e-3  # largest weight of an empty ghost; a 3x3 kernel begins with a deviation of 0.47
ROOT = Path(ghostnet.__file__).resolve().parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arguments:
    """Every finished run beside what others report, and what became of its ghosts."""

    run: str = "gr_cosine"  # ghost run whose kernels are measured
    checkpoint_dir: Path = ROOT / "checkpoints"  # folder of the runs' files
    older_dir: Path = ROOT / "checkpoints/batch128"  # folder of the older recipe's runs
    image_dir: Path = ROOT / "images"  # folder of the picture
    data_dir: Path = ROOT / "data"  # folder of cifar-10-batches-py, which is not downloaded here


@dataclass
class Row:
    """Finished runs that differ in their seeds alone, and what others report of their network."""

    name: str
    constants: Constants
    last: dict[int, float] = field(default_factory=dict)  # accuracy after the last epoch, by seed
    best: dict[int, float] = field(default_factory=dict)  # that of the best epoch
    loss: dict[int, float] = field(default_factory=dict)  # training loss of the last epoch

    @property
    def network(self) -> str:
        """What others may have trained; nobody reports a network with random erasing."""
        erased = " with random erasing" if self.constants.erasing > 0 else ""
        return f"{self.constants.architecture}{erased}"

    @property
    def ours(self) -> Accuracies:
        if not self.last:
            return Accuracies()
        return Accuracies(mean(self.last.values()), mean(self.best.values()))

    @property
    def paper(self) -> Accuracies:
        return Accuracies(PAPER.get(self.network))

    @property
    def earlier(self) -> Accuracies:
        if self.constants.norm_inside:  # it has no such ghost module
            return Accuracies()
        scheduled = f"{self.network} {self.constants.schedule}"
        return EARLIER.get(scheduled.removesuffix(" cosine"), Accuracies())

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
            row.last[checkpoint.constants.seed] = checkpoint.accuracy
            row.best[checkpoint.constants.seed] = best_accuracy(checkpoint)
            row.loss[checkpoint.constants.seed] = checkpoint.history["loss"][-1]
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
    deviation = f" +- {stdev(row.last.values()):.2f} ({len(row.last)})" if len(row.last) > 1 else ""
    return percent(row.ours.last) + deviation


def difference(ours: float, theirs: float | None) -> str:
    return "-" if theirs is None else f"{ours - theirs:+.2f}"


def training_loss(row: Row) -> str:
    return f"{mean(row.loss.values()):.4f}" if row.loss else "-"


def accuracy_table(rows: list[Row]) -> str:
    """Runs of the paper's kind of training beside what others report."""
    columns = "run|network|epochs|ours|paper|difference|earlier|public|"
    columns += "ours, best|earlier, best|public, best"
    lines = [columns.split("|")]
    for row in rows:
        if row.constants.erasing > 0:
            continue
        lines.append((
            row.name,
            row.network,
            row.constants.epochs,
            spread(row),
            row.paper.last or "-",
            difference(row.ours.last, row.paper.last),
            percent(row.earlier.last),
            percent(row.public.last),
            percent(row.ours.best),
            percent(row.earlier.best),
            percent(row.public.best),
        ))
    return ghostnet.markdown(lines)


def erasing_table(rows: list[Row]) -> str:
    """Runs with random erasing, each beside the one that differs in nothing else."""
    columns = "run|network|epochs|erasing|ours|without|difference|ours, best|without|"
    columns += "training loss|without"
    lines = [columns.split("|")]
    by_constants = {row.constants: row for row in rows}
    for row in rows:
        if row.constants.erasing == 0:
            continue
        without = by_constants.get(replace(row.constants, erasing=0.0), Row("", row.constants))
        lines.append((
            row.name,
            row.constants.architecture,
            row.constants.epochs,
            f"{row.constants.erasing:g}",
            spread(row),
            spread(without),
            difference(row.ours.last, without.ours.last),
            percent(row.ours.best),
            percent(without.ours.best),
            training_loss(row),
            training_loss(without),
        ))
    return ghostnet.markdown(lines)


def cost_table(rows: list[Row]) -> str:
    lines = [("network", "params, FLOPs", "in the paper")]
    for row in rows:
        flops, parameters = cost(row.constants)
        ours = f"{parameters:.2f}M, {flops:.1f}M"
        network = row.constants.architecture
        line = (network, ours, PAPER_COSTS.get(network, "-"))
        if line not in lines:
            lines.append(line)
    return ghostnet.markdown(lines)


def time_table(checkpoints: dict[str, Checkpoint]) -> str:
    """What an epoch took. The shortest one tells of a device without other runs or pauses."""
    columns = "run|shortest epoch, s|median, s|all epochs, h|if all were the shortest, h|trained on"
    lines = [columns.split("|")]
    for name, checkpoint in checkpoints.items():
        seconds = checkpoint.history["seconds"]
        lines.append((
            name,
            f"{min(seconds):.1f}",
            f"{median(seconds):.1f}",
            f"{sum(seconds) / 3600:.1f}",
            f"{len(seconds) * min(seconds) / 3600:.1f}",
            ghostnet.short_hardware(checkpoint.trained_on),
        ))
    return ghostnet.markdown(lines)


def ghost_kernels(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every ghost module that makes ghosts, and their kernels (ghosts, d * d)."""
    for module in model.modules():
        if isinstance(module, ghostnet.GhostModule) and module.cheap_operation is not None:
            ghosts = module.out_channels - module.primary_conv.out_channels
            yield module, module.cheap_operation.weight.detach()[:ghosts].flatten(1)


def is_empty(kernels: Tensor) -> Tensor:
    return kernels.abs().amax(1) <= EMPTY


def emptied(model: nn.Module) -> str:
    empty = torch.cat([is_empty(kernels) for _, kernels in ghost_kernels(model)])
    return f"{empty.sum()} of {len(empty)}"


def ordinary_and_ghosts(checkpoints: dict[str, Checkpoint]) -> tuple[dict, dict]:
    """The finished runs, those of ordinary networks and those of ghost networks apart."""
    ordinary = {}
    ghosts = {}
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished:
            found = ordinary if checkpoint.constants.ratio == 1 else ghosts
            found[name] = checkpoint
    return ordinary, ghosts


def ablation(ghosts: dict[str, Checkpoint]) -> str:
    """The runs whose constants differ in nothing but the batch and the decay on the cheap kernels.

    The initialization is no constant. Between the two folders it changed together with the batch.
    """
    alike = {}
    for name, checkpoint in ghosts.items():
        constants = checkpoint.constants
        if constants.cheap_weight_decay in (0, constants.weight_decay):
            the_rest = replace(constants, batch_size=1, cheap_weight_decay=0.0)
            alike.setdefault(the_rest, []).append(name)
    columns = "run|batch|decay on cheap kernels|training loss|accuracy|best|ghosts empty"
    lines = [columns.split("|")]
    for names in alike.values():
        if len(names) > 1:
            for name in names:
                constants = ghosts[name].constants
                lines.append((
                    name,
                    constants.batch_size,
                    f"{constants.cheap_weight_decay:g}",
                    f"{ghosts[name].history['loss'][-1]:.4f}",
                    percent(ghosts[name].accuracy),
                    percent(best_accuracy(ghosts[name])),
                    emptied(ghosts[name].network(CPU)),
                ))
    return ghostnet.markdown(lines)


def low_pass_share(model: nn.Module) -> float:
    """Share of the kernels whose weights hardly cancel: these blur, the others find edges."""
    kernels = torch.cat([kernels for _, kernels in ghost_kernels(model)])
    kernels = kernels[~is_empty(kernels)]
    low_pass = kernels.sum(1).abs() > kernels.abs().sum(1) / 2
    return low_pass.float().mean().item()


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


def print_kernels(run: str, model: nn.Module, data_dir: Path) -> None:
    share = low_pass_share(model)
    print(f"\n{run}: {share:.0%} of the ghosts' kernels are low-pass, the others edge-like")
    if not (data_dir / "cifar-10-batches-py").exists():
        ghostnet.complain(f"no correlations: {data_dir} has no cifar-10-batches-py, see --data-dir")
        return
    data = ghostnet.Cifar10(data_dir, CPU)
    image = data.test_images[ghostnet.PICTURE_IMAGE]
    found = correlations(model, data.normalize(image[None]))
    print(f"{run}: median correlation of a ghost with the map that it is made from "
          f"{median(found):+.2f} (test image {ghostnet.PICTURE_IMAGE})")


@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def draw(rows: list[Row], path: Path) -> None:
    """Accuracies, a line for each of our rows and each experiment that only others have trained."""
    shown = {(row.network, row.constants.schedule) for row in rows}
    for name, constants in ghostnet.EXPERIMENTS.items():
        row = Row(name, constants)
        key = row.network, constants.schedule
        if constants.erasing == 0 and key not in shown:
            rows = [*rows, row]
            shown.add(key)
    rows = sorted(rows, key=lambda row: cost(row.constants))
    figure = matplotlib.figure.Figure(figsize=(12, 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for source, marker, color, accuracies in (
        ("paper", "s", "C0", [row.paper for row in rows]),
        ("earlier reproduction", "^", "C1", [row.earlier for row in rows]),
        ("public recipe", "v", "C2", [row.public for row in rows]),
        ("ours", "o", "C3", [row.ours for row in rows]),
    ):
        for epoch, fill in (("last", color), ("best", "none")):
            values = []
            lines = []
            for line, pair in enumerate(accuracies):
                value = getattr(pair, epoch)
                if value is not None:
                    values.append(value)
                    lines.append(line)
            if values:
                label = source if source == "paper" else f"{source}, {epoch} epoch"
                options = {"color": color, "markerfacecolor": fill, "label": label}
                axes.plot(values, lines, marker, **options)
    labels = []
    for row in rows:
        flops, _ = cost(row.constants)
        labels.append(f"{row.name},  {row.network},  {flops:.1f}M")
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set(xlabel="test accuracy (%)", ylabel="run, network, FLOPs (multiply-adds)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150, format="png"))


def main() -> None:
    arguments = tyro.cli(Arguments)
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    checkpoints, refused = ghostnet.read_all(arguments.checkpoint_dir)
    older, refused_too = ghostnet.read_all(arguments.older_dir)
    for error in [*refused.values(), *refused_too.values()]:
        ghostnet.complain(f"{error}; it is left out")
    older = {f"{arguments.older_dir.name}/{name}": run for name, run in older.items()}
    _, ghosts = ordinary_and_ghosts(checkpoints)
    older_ordinary, older_ghosts = ordinary_and_ghosts(older)
    rows = rows_of(checkpoints | older_ordinary)
    print(f"{accuracy_table(rows)}\n\n{cost_table(rows)}\n")
    if any(row.constants.erasing > 0 for row in rows):
        print(f"**With random erasing: not the paper's training**\n\n{erasing_table(rows)}\n")
    path = arguments.image_dir / "accuracy_vs_flops.png"
    draw(rows, path)
    for name, checkpoint in ghosts.items():
        print(f"{name}: {emptied(checkpoint.network(CPU))} ghosts are empty")
    print(f"\n**Time**\n\n{time_table(checkpoints | older)}")
    print("\n**What weight decay and the batch do to ghosts**\n")
    print(ablation(ghosts | older_ghosts))
    if arguments.run in ghosts:
        print_kernels(arguments.run, ghosts[arguments.run].network(CPU), arguments.data_dir)
    else:
        ghostnet.complain(f"no finished ghost run is named {arguments.run}: see --run")
    print(f"\nsaved {path}")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
