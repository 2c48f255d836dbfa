"""Every finished run beside what others report, and what became of its ghosts.

    python benchmarks/comparison.py

prints Markdown tables and draws images/accuracy_vs_flops.png. Runs that differ in their seeds alone
share a row, as mean ± standard deviation (their number). A ghost is empty if weight decay has left
its kernel such small weights that batch norm's epsilon drowns the map.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib.figure
import matplotlib.style
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet
from ghostnet import PAPER, Checkpoint, Constants

# Top-1 accuracy in percent. The earlier reproduction is the one that this one follows: the best
# epoch on the test images for ResNet-56, the last for VGG-16.
EARLIER = {
    "ghost-resnet56": 92.20, "ghost-resnet56 multistep": 92.55,
    "ghost-resnet56 s=3": 91.54, "ghost-resnet56 s=5": 90.62,
    "ghost-resnet56 s=10 d=5": 88.47, "ghost-resnet56 s=20 d=5": 84.30,
    "ghost-vgg16": 93.60,
}
PUBLIC = {"resnet32": 93.53, "resnet56": 94.37, "vgg16": 94.16}  # of chenyaofo/pytorch-cifar-models
PAPER_COSTS = {
    "resnet56": "0.85M, 125M", "ghost-resnet56": "0.43M, 63M",
    "vgg16": "15.0M, 313M", "ghost-vgg16": "7.7M, 158M",
    "ghost-vgg16 d=1": "7.6M, 157M", "ghost-vgg16 d=5": "7.7M, 160M",
    "ghost-vgg16 d=7": "7.7M, 163M", "ghost-vgg16 s=3": "5.2M, 107M",
    "ghost-vgg16 s=4": "4.0M, 80M", "ghost-vgg16 s=5": "3.3M, 65M",
}
PLACES = {  # of names that would lie on others at the left: offset from the mark, in points
    ("paper", "ghost-vgg16 d=5"): (6, 0), ("paper", "ghost-vgg16 d=7"): (6, 0),
    ("paper", "ghost-vgg16 s=4"): (6, 0), ("ours, last epoch", "resnet32"): (6, 0),
    ("ours, last epoch", "gr_cosine"): (6, 0), ("ours, last epoch", "gr_multistep"): (6, 0),
    ("ours, last epoch", "gv_cosine-cheap_wd0.0005"): (0, -9),
}
EMPTY = 1e-3  # largest weight of an empty ghost; a kernel of 3x3 begins with weights up to 0.33
TEST_IMAGE = 12  # that of the ghost picture
ROOT = Path(ghostnet.__file__).resolve().parent
CPU = torch.device("cpu")

Run = tuple[str, Constants, list[float]]  # name, constants, and the accuracy of each seed


@dataclass(frozen=True)
class Arguments:
    """Every finished run beside what others report, and what became of its ghosts."""

    run: str = "gr_cosine"  # ghost run whose kernels are measured
    checkpoint_dir: Path = ROOT / "checkpoints"  # folder of the runs' files
    image_dir: Path = ROOT / "images"  # folder of the picture
    data_dir: Path = ROOT / "data"  # folder of cifar-10-batches-py, which is not downloaded here


def measured(checkpoints: dict[str, Checkpoint]) -> list[Run]:
    """The finished runs; each seed counts once, so that a copy of a file is no second one."""
    names = {}
    accuracies = {}
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished:
            constants = replace(checkpoint.constants, seed=0)
            names.setdefault(constants, re.sub(r"-seed\d+$", "", name))
            seeds = accuracies.setdefault(constants, {})
            seeds[checkpoint.constants.seed] = checkpoint.accuracy
    return [(names[run], run, list(seeds.values())) for run, seeds in accuracies.items()]


@cache
def cost(constants: Constants) -> tuple[float, float]:
    """FLOPs (multiply-adds) and parameters, in millions."""
    with torch.device("meta"):
        network = ghostnet.build_network(constants)
        flops, parameters = ghostnet.count(network, torch.zeros(1, 3, 32, 32))[""]
    return flops / 1e6, parameters / 1e6


def table(runs: list[Run]) -> str:
    columns = "run|network|epochs|ours|paper|earlier|public|params, FLOPs|paper's"
    rows = [columns.split("|")]
    for name, constants, accuracies in runs:
        network = constants.architecture
        ours = f"{mean(accuracies):.2f}"
        if len(accuracies) > 1:
            ours += f" ± {stdev(accuracies):.2f} ({len(accuracies)})"
        others = [PAPER.get(network, "–")]
        scheduled = f"{network} {constants.schedule}".removesuffix(" cosine")
        for accuracy in (EARLIER.get(scheduled), PUBLIC.get(network)):
            others.append(f"{accuracy:.2f}" if accuracy else "–")
        flops, parameters = cost(constants)
        costs = (f"{parameters:.2f}M, {flops:.1f}M", PAPER_COSTS.get(network, "–"))
        rows.append((name, network, constants.epochs, ours, *others, *costs))
    return ghostnet.markdown(rows)


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


def print_weight_decay(ghosts: dict[str, Checkpoint]) -> None:
    """The runs that exist with and without weight decay on the cheap kernels, else alike."""
    twins = {}
    for name, checkpoint in ghosts.items():
        constants = asdict(checkpoint.constants)
        decay = constants.pop("cheap_weight_decay")
        if decay in (0, constants["weight_decay"]):
            twins.setdefault(tuple(constants.items()), {})[decay] = name
    rows = [("run", "weight decay on the cheap kernels", "accuracy", "ghosts empty")]
    for pair in twins.values():
        if len(pair) == 2:
            for decay, name in sorted(pair.items(), reverse=True):
                empty = emptied(ghosts[name].network(CPU))
                rows.append((name, f"{decay:g}", f"{ghosts[name].accuracy:.2f}", empty))
    if len(rows) > 1:
        print(f"\n**What weight decay does to ghosts**\n\n{ghostnet.markdown(rows)}")


def low_pass_share(model: nn.Module) -> float:
    """Share of the kernels whose weights hardly cancel: these blur, the others find edges."""
    kernels = torch.cat([kernels for _, kernels in ghost_kernels(model)])
    kernels = kernels[~is_empty(kernels)]
    low_pass = kernels.sum(1).abs() > kernels.abs().sum(1) / 2
    return low_pass.float().mean().item()


def correlations(model: nn.Module, images: Tensor) -> list[float]:
    """Of the ghosts of the first image with the intrinsic maps that they are made from."""
    outputs = {}
    for module, _ in ghost_kernels(model):
        module.register_forward_hook(lambda module, _, maps: outputs.update({module: maps[0]}))
    with torch.inference_mode():
        model.eval()(images)
    found = []
    for module, kernels in ghost_kernels(model):
        maps = outputs[module].flatten(1)
        intrinsic = maps[: module.primary_conv.out_channels]
        ghosts = maps[len(intrinsic):]
        sources = intrinsic.repeat_interleave(module.ratio - 1, 0)[: len(ghosts)]
        for source, ghost, empty in zip(sources, ghosts, is_empty(kernels), strict=True):
            correlation = torch.corrcoef(torch.stack([source, ghost]))[0, 1]
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
    found = correlations(model, data.normalize(data.test_images[TEST_IMAGE, None]))
    print(f"{run}: median correlation of a ghost with the map that it is made from "
          f"{median(found):+.2f} (test image {TEST_IMAGE})")


def plot(axes, label: str, marker: str, points: list[tuple[str, float, float]]) -> None:
    xs = [x for _, x, _ in points]
    ys = [y for _, _, y in points]
    axes.plot(xs, ys, marker, label=label, markersize=7)
    for name, x, y in points:
        place = PLACES.get((label, name), (6, 0) if label == "earlier reproduction" else (-6, 0))
        text = axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=7)
        alignment = {-6: "right", 0: "center", 6: "left"}[place[0]]
        text.set(ha=alignment, va="center", parse_math=False)


@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def draw(runs: list[Run], path: Path) -> None:
    """Accuracy against FLOPs."""
    figure = matplotlib.figure.Figure(figsize=(13.5, 10.5), layout="constrained")
    axes = figure.subplots()
    networks = {constants.architecture: constants for constants in ghostnet.EXPERIMENTS.values()}
    for label, marker, accuracies in (
        ("paper", "s", PAPER),
        ("earlier reproduction", "^", EARLIER),
        ("ordinary, strongest public recipe", "v", PUBLIC),
    ):
        points = []
        for name, accuracy in accuracies.items():
            flops, _ = cost(networks[name.removesuffix(" multistep")])
            points.append((name, flops, accuracy))
        plot(axes, label, marker, points)
    ours = []
    for name, constants, accuracies in runs:
        short = name.replace("weight_decay", "wd")  # a longer one would lie on other points
        ours.append((short, cost(constants)[0], mean(accuracies)))
    plot(axes, "ours, last epoch", "o", ours)
    axes.set(xlabel="FLOPs (multiply-adds, M)", ylabel="test accuracy (%)", xscale="log")
    ticks = [20, 30, 50, 70, 100, 160, 300]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150, format="png"))


def main() -> None:
    arguments = tyro.cli(Arguments)
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    checkpoints, refused = ghostnet.read_all(arguments.checkpoint_dir)
    for error in refused.values():
        ghostnet.complain(f"{error}; it is left out")
    runs = measured(checkpoints)
    print(table(runs), end="\n\n")
    path = arguments.image_dir / "accuracy_vs_flops.png"
    draw(runs, path)
    ghosts = {}
    for name, checkpoint in checkpoints.items():
        if checkpoint.finished and checkpoint.constants.ratio > 1:
            ghosts[name] = checkpoint
            print(f"{name}: {emptied(checkpoint.network(CPU))} ghosts are empty")
    print_weight_decay(ghosts)
    if arguments.run in ghosts:
        print_kernels(arguments.run, ghosts[arguments.run].network(CPU), arguments.data_dir)
    else:
        ghostnet.complain(f"no finished ghost run is named {arguments.run}: see --run")
    print(f"\nsaved {path}")


if __name__ == "__main__":
    ghostnet.run_as_script(main)
