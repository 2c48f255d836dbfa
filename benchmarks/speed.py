"""How fast ghostnet.py is and where ghost modules pay here: tables and images/ghost_speed.png.

    python benchmarks/speed.py --quick

What is compared is timed by turns (A, B, A, B, ...). Tables show medians and, in parentheses, the
lowest and the highest ratio of a turn. "ours" is the step of ghostnet.Trainer, on CUDA as one CUDA
graph. "usual" is the loop of most CIFAR-10 scripts, with the same recipe: DataLoader with 2
workers, PIL transforms, float32, NCHW, torch's plain SGD, cudnn's defaults, loss.item() every step.
It begins a turn with batches made ahead, which favours it a little. A layer is a 3x3 convolution
with batch norm and ReLU, which stand after the ghost module, or inside it as in the authors' code;
its training is a forward and a backward pass.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import matplotlib.figure
import matplotlib.style
import torch
import torch.nn.functional as F
import torch.utils.benchmark
import torchvision
import tyro
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet

ROOT = Path(ghostnet.__file__).resolve().parent
RUNS = ("resnet32", "resnet56", "gr_cosine", "vgg16", "gv_cosine")
LAYERS = [  # channels and side of the maps
    ("ResNet", 16, 32), ("ResNet", 32, 16), ("ResNet", 64, 8),
    ("VGG-16", 64, 32), ("VGG-16", 128, 16), ("VGG-16", 256, 8), ("VGG-16", 512, 4),
]
BATCH = ghostnet.Constants().batch_size
PADDING = ghostnet.Constants().padding
WORKERS = 2
SHORTEST = 1.0  # seconds that a timing takes at least
WARM = 5  # plain steps before a recording, in which cudnn chooses its kernels


@dataclass(frozen=True)
class Arguments:
    """Time ghostnet.py against the usual loop, and ghost modules against ordinary convolutions."""

    data_dir: Path = ROOT / "data"  # folder of cifar-10-batches-py, downloaded when it is missing
    image_dir: Path = ROOT / "images"  # folder of the picture
    device: Literal["auto", "cuda", "cpu"] = "auto"  # as in ghostnet.py
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of ours
    quick: bool = False  # fewer turns


def usual_steps(constants: ghostnet.Constants, data_dir: Path, device) -> Iterator[float]:
    """Takes a training step whenever its loss is asked for."""
    augmentation = [transforms.RandomCrop(32, padding=PADDING), transforms.RandomHorizontalFlip()]
    scaling = [transforms.ToTensor(), transforms.Normalize(ghostnet.MEAN, ghostnet.STD)]
    transform = transforms.Compose(augmentation + scaling)
    dataset = torchvision.datasets.CIFAR10(data_dir, transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS,
        persistent_workers=True, pin_memory=torch.cuda.is_available(),
    )
    model = ghostnet.build_network(constants).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), constants.lr, constants.momentum,
        weight_decay=constants.weight_decay, nesterov=True,
    )
    while True:
        for images, labels in loader:
            with torch.backends.cudnn.flags(enabled=True):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            yield loss.item()


def layer_forms(channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """An ordinary layer, with a ghost module, and with one that has norm and ReLU inside."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    ordinary = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    ghost = ghostnet.replace_conv_with_ghost(copy.deepcopy(ordinary))
    inside = copy.deepcopy(ghost[:1])
    inside[0].put_inside(nn.BatchNorm2d)
    inside[0].put_inside(lambda _maps: nn.ReLU())
    return ordinary, ghost, inside


def flops_ratio(channels: int) -> float:
    """FLOPs of an ordinary layer's convolution over those of its ghost module."""
    image = torch.zeros(1, channels, 4, 4)
    ordinary, ghost, _ = [ghostnet.count(model, image)["0"][0] for model in layer_forms(channels)]
    return ordinary / ghost


def by_turns(turns: int, *runs: Callable) -> list[list[float]]:
    """Seconds that a call of each run takes in each turn."""
    options = {"stmt": "run()", "num_threads": torch.get_num_threads()}
    times = [[] for _ in runs]
    for _ in range(turns):
        for run, taken in zip(runs, times, strict=True):
            timer = torch.utils.benchmark.Timer(globals={"run": run}, **options)
            taken.append(timer.blocked_autorange(min_run_time=SHORTEST).mean)
    return times


def ratio(slow: list[float], fast: list[float]) -> str:
    turns = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f}x ({min(turns):.2f}-{max(turns):.2f})"


def milliseconds(slow: list[float], fast: list[float]) -> list[str]:
    return [f"{1000 * median(slow):.2f}", f"{1000 * median(fast):.2f}", ratio(slow, fast)]


def print_table(title: str, columns: str, rows: list[tuple]) -> None:
    print(f"\n**{title}**\n\n{ghostnet.markdown([columns.split('|'), *rows])}", flush=True)


class Benchmark:
    def __init__(self, arguments: Arguments):
        self.device, self.precision = ghostnet.pick_hardware(arguments)
        _, self.auto = ghostnet.pick_hardware(replace(arguments, precision="auto"))
        self.cuda = self.device.type == "cuda"
        mixed = self.precision != torch.float32
        self.autocast = partial(torch.autocast, self.device.type, self.precision, enabled=mixed)
        turns = 3 if arguments.quick else 5
        self.by_turns = partial(by_turns, turns)
        hardware = f"{ghostnet.hardware_name(self.device)} ({os.cpu_count()} cores)"
        precisions = f"ours in {self.precision}, usual in float32".replace("torch.", "")
        print(f"{hardware}, torch {torch.__version__}, {precisions}, batch {BATCH}, {turns} turns")
        self.data = ghostnet.Cifar10(arguments.data_dir, self.device)
        self.data_dir = arguments.data_dir
        self.trainers = {}
        for run in RUNS:
            constants = ghostnet.EXPERIMENTS[run]
            self.trainers[constants.architecture] = self.trainer(constants, self.precision)

    def endless_plans(self) -> Iterator[Tensor]:
        """Plans of full batches, drawn as an epoch draws them."""
        while True:
            plans = self.data.epoch_plan(PADDING, erasing=0.0).to(self.device).split(BATCH)
            yield from plans[:-1]

    def trainer(self, constants: ghostnet.Constants, precision) -> ghostnet.Trainer:
        """A trainer that takes its steps as in an epoch after the first."""
        trainer = ghostnet.Trainer(constants, self.data, precision)
        if self.cuda:
            plans = self.endless_plans()
            for _ in range(WARM):
                trainer.step(next(plans))
            trainer.record(next(plans))
        return trainer

    def recorded(self, run: Callable) -> Callable:
        """The run as a CUDA graph: launching a lone layer's kernels takes longer than they do."""
        if not self.cuda:
            return run
        for _ in range(WARM):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def train(self, model: nn.Module, images: Tensor) -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self.autocast():
                output = model(images)
            torch.autograd.grad(output, (images, *model.parameters()), images.detach())

    def infer(self, model: nn.Module, images: Tensor) -> None:
        """Infer as ghostnet.evaluate does."""
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact, self.autocast():
            model(images)

    def end_to_end(self) -> None:
        rows = []
        for name, trainer in self.trainers.items():
            our_steps = map(trainer.take_step, self.endless_plans())
            others = usual_steps(trainer.constants, self.data_dir, self.device)
            ours, usual = self.by_turns(partial(next, our_steps), partial(next, others))
            speeds = (f"{BATCH / median(ours):,.0f}", f"{BATCH / median(usual):,.0f}")
            rows.append((name, *speeds, ratio(usual, ours)))
        print_table("1. Training end to end, images/s", "network|ours|usual|ours / usual", rows)

    def layer_times(self, channels: int, side: int) -> dict[str, list[list[float]]]:
        """Times of each form of a layer, in training and in inference."""
        images = torch.randn(BATCH, channels, side, side, device=self.device, dtype=self.precision)
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        runs = {"training": [], "inference": []}
        for model in layer_forms(channels):
            model.to(self.device, memory_format=torch.channels_last)
            evaluated = copy.deepcopy(model).eval()
            runs["training"].append(self.recorded(partial(self.train, model, images)))
            runs["inference"].append(self.recorded(partial(self.infer, evaluated, images)))
        return {what: self.by_turns(*forms) for what, forms in runs.items()}

    def layers(self, path: Path) -> None:
        rows = []
        curves = {}
        for network, channels, side in LAYERS:
            times = self.layer_times(channels, side)
            cells = []
            for what, (ordinary, ghost, inside) in times.items():
                cells += [*milliseconds(ordinary, ghost), ratio(ordinary, inside)]
                curve = curves.setdefault((network, what), {})
                curve[channels] = median(ordinary) / median(ghost)
            flops = f"{flops_ratio(channels):.2f}x"
            rows.append((network, f"{channels}, {side}x{side}", *cells, flops))
        columns = "layer of|channels, map"
        for what in times:
            columns += f"|{what}: ordinary, ms|ghost, ms|ordinary / ghost|ordinary / norm inside"
        columns += "|FLOPs: ordinary / ghost"
        print_table("2. A layer, ordinary and ghost, by its width", columns, rows)
        hardware = ghostnet.hardware_name(self.device)
        title = f"{hardware}, {self.precision}, batch {BATCH}".replace("torch.", "")
        draw(curves, title, path)

    def networks(self) -> None:
        rows = []
        for name in ("resnet56", "vgg16"):
            pair = [self.trainers[name], self.trainers[f"ghost-{name}"]]
            rows.append((name, *self.training_cells(pair)))
        columns = "network|ordinary, ms|ghost, ms|ordinary / ghost"
        print_table("3. A training step of networks, ordinary and ghost", columns, rows)

    def training_cells(self, pair: list[ghostnet.Trainer]) -> list[str]:
        runs = []
        for trainer in pair:
            plan = next(self.endless_plans())
            runs.append(partial(trainer.take_step, plan))
        return milliseconds(*self.by_turns(*runs))

    def precisions(self) -> None:
        """Both precisions where both are the hardware's own, and which one auto takes."""
        if not (self.cuda or torch.cpu._is_avx512_bf16_supported()):
            return
        half = self.auto if self.cuda else torch.bfloat16
        rows = []
        for name, trainer in self.trainers.items():
            pair = [self.trainer(trainer.constants, p) for p in (torch.float32, half)]
            rows.append((name, *self.training_cells(pair)))
        title = f"4. A training step by precision; auto takes {self.auto}"
        columns = f"network|float32, ms|{half}, ms|float32 / {half}"
        print_table(title.replace("torch.", ""), columns.replace("torch.", ""), rows)


@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def draw(curves: dict[tuple[str, str], dict[int, float]], title: str, path: Path) -> None:
    """Ratios of time and FLOPs against the layer's width."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=1)
    channels = sorted({channels for _, channels, _ in LAYERS})
    axes.plot(channels, [flops_ratio(width) for width in channels], color="0.6", label="FLOPs")
    for (network, what), curve in curves.items():
        style = {"ResNet": "o-", "VGG-16": "s--"}[network]
        color = {"training": "C0", "inference": "C1"}[what]
        label = f"time in {what}, layers of {network}"
        axes.plot(curve.keys(), curve.values(), style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(channels, channels)
    axes.set(xlabel="channels", ylabel="ordinary layer / ghost layer", ylim=(0, None))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150, format="png"))
    print(f"\nsaved {path}", flush=True)


def main() -> None:
    arguments = tyro.cli(Arguments)
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(arguments)
    benchmark.end_to_end()
    benchmark.layers(arguments.image_dir / "ghost_speed.png")
    benchmark.networks()
    benchmark.precisions()


if __name__ == "__main__":
    ghostnet.run_as_script(main)
