"""How fast ghostnet.py is and where ghost modules pay, on this machine: Markdown tables and images/ghost_speed.png.

    python benchmarks/speed.py                                  all five networks
    python benchmarks/speed.py --quick --networks vgg16 ghost-vgg16

What is compared is timed by turns (A, B, A, B, ...). Tables show medians, in parentheses the range of a turn's ratios.

"ours" is the step that ghostnet.Trainer takes, on CUDA as one CUDA graph; progress bar, evaluation and checkpoint are
not timed. "usual" is the loop of most CIFAR-10 scripts, with the same recipe: DataLoader with 2 workers, PIL
transforms, float32, NCHW, eager, torch's plain SGD, cudnn's defaults, loss.item() every step. A pass of ours draws its
plan as an epoch does; on CUDA it is an epoch, and that of the usual loop 100 batches. The usual workers rest before
each pass with the batches that they have made ahead, which favours that loop where passes are short.

A layer is a 3x3 convolution with batch norm and ReLU, at batch 128, at a size that one of the networks has. Training
is its forward and backward, in the training's precision and memory order, on CUDA as a CUDA graph. The FLOPs are those
of the convolution.

Memory is the peak above what is held before the call (weights, momentum, data), as torch's allocator counts it: on CUDA
torch.cuda.max_memory_allocated of the step without its graph, on CPU the allocations that torch.profiler records, which
are exact where resident set sizes are not (what oneDNN allocates past torch is not in them); nan on MPS.

The bound of a step is the larger of two times. Arithmetic: 3 (forward, and two products backward) x 2 x MACs x batch,
at the speed of a large matrix product in the training precision. Memory, at the speed of a large copy: each output of a
convolution, batch norm, pool or linear layer and its gradient, written once and read once in the training precision
(ReLU, sum and concatenation count as fused into them), and gradient, weight and momentum of every parameter, written
and read once in float32. This is no bound where one layer's activations stay in the cache until the next layer reads
them: in bfloat16 they have 4 MB in a ResNet and 17 MB in VGG-16, and the cache of a large GPU holds 50 MB.
"""

import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import matplotlib.figure
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet

EXPERIMENTS = [ghostnet.EXPERIMENTS[name] for name in ("resnet32", "resnet56", "gr_cosine", "vgg16", "gv_cosine")]
NETWORKS = {constants.architecture: constants for constants in EXPERIMENTS}
LAYERS = [("ResNet", 16, 32), ("ResNet", 32, 16), ("ResNet", 64, 8),  # channels and side of the maps
          ("VGG-16", 64, 32), ("VGG-16", 128, 16), ("VGG-16", 256, 8), ("VGG-16", 512, 4)]
BATCH, WORKERS = 128, 2
SHORTEST, REST = 0.2, 0.5  # seconds that a timing takes at least, and before a pass
WARM = 5  # plain steps before a recording, in which cudnn chooses its kernels


@dataclass(frozen=True)
class Arguments:
    """Time ghostnet.py against the usual loop, and ghost modules against ordinary convolutions."""

    networks: tuple[Literal[*NETWORKS], ...] = tuple(NETWORKS)  # ghost is compared with ordinary where both are named
    data_dir: Path = Path("data")  # folder of cifar-10-batches-py, which is downloaded when it is missing
    image_dir: Path = Path("images")  # folder of the picture
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # as in ghostnet.py
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of ours; the usual loop is in float32
    quick: bool = False  # fewer batches and turns


def usual_batches(data_dir: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels without end, epoch after epoch from the same workers."""
    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = [*augmentation, transforms.ToTensor(), transforms.Normalize(ghostnet.MEAN, ghostnet.STD)]
    images = torchvision.datasets.CIFAR10(data_dir, transform=transforms.Compose(transform))
    options = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": torch.cuda.is_available()}
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True, **options)
    while True:
        yield from loader


def usual_step(constants: ghostnet.Constants, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    model, c = ghostnet.build_network(constants).to(device), constants
    optimizer = torch.optim.SGD(model.parameters(), c.lr, c.momentum, weight_decay=c.weight_decay, nesterov=True)

    def step(images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def layer(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def flops_ratio(channels: int) -> float:
    image, layers = torch.zeros(1, channels, 4, 4), (layer(channels), ghostnet.replace_conv_with_ghost(layer(channels)))
    ordinary, ghost = (ghostnet.count(model, image)["0"][0] for model in layers)
    return ordinary / ghost


def work_of_a_step(constants: ghostnet.Constants, precision: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes that one training step needs at least (see the top of this file)."""
    model, image, numbers = ghostnet.build_network(constants).eval(), torch.zeros(1, 3, 32, 32), []
    macs, parameters = ghostnet.count(copy.deepcopy(model), image)[""]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)):
            module.register_forward_hook(lambda _module, _inputs, output: numbers.append(output.numel()))
    model(image)
    return 3 * 2 * macs * BATCH, 2 * 2 * sum(numbers) * BATCH * precision.itemsize + 3 * 2 * 4 * parameters


def milliseconds(times: list[float]) -> str:
    return f"{1000 * median(times):.2f}"


def ratio(slow: list[float], fast: list[float]) -> str:
    turns = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f}x ({min(turns):.2f}–{max(turns):.2f})"


def print_table(title: str, header: str, rows: list[tuple]) -> None:
    if rows:
        print(f"\n**{title}**\n\n{ghostnet.markdown([header.split(' | '), *rows])}", flush=True)


def now(device: torch.device) -> float:
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


class MarkedTrainer(ghostnet.Trainer):
    """Its step has a mark before each of its four parts and one after the last."""

    def __init__(self, constants: ghostnet.Constants, data: ghostnet.Cifar10, precision: torch.dtype):
        super().__init__(constants, copy.copy(data), precision)
        self.cuda = self.device.type == "cuda"  # external: these events can be recorded within a CUDA graph, too
        self.marks = [torch.cuda.Event(enable_timing=True, external=True) if self.cuda else 0.0 for _ in range(5)]
        owners = self.data, self.model, self.optimizer, self.scaler
        for i, (owner, name) in enumerate(zip(owners, ("train_batch", "forward", "zero_grad", "step"), strict=True)):
            setattr(owner, name, partial(self.mark, i, getattr(owner, name)))

    def mark(self, i: int, part: Callable, *arguments):
        if self.cuda:
            self.marks[i].record()
        else:
            self.marks[i] = now(self.device)
        return part(*arguments)

    def step(self, plan: Tensor) -> None:
        super().step(plan)
        self.mark(4, lambda: None)

    def parts(self) -> list[float]:
        """Seconds of each part of the last step."""
        now(self.device)  # by then the events have come
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in itertools.pairwise(self.marks)]


class Benchmark:
    def __init__(self, arguments: Arguments):
        self.quick, self.turns = arguments.quick, 3 if arguments.quick else 5
        self.device, self.precision = ghostnet.pick_hardware(arguments)
        self.cuda = self.device.type == "cuda"
        self.data = ghostnet.Cifar10(arguments.data_dir, self.device)
        self.usual_batches = usual_batches(arguments.data_dir)
        self.trainers = {name: self.trainer(NETWORKS[name]) for name in arguments.networks}
        parts = [f"{ghostnet.hardware_name(self.device)} ({os.cpu_count()} cores)", f"torch {torch.__version__}",
                 f"ours in {self.precision}", "usual in float32", f"batch {BATCH}", f"{self.turns} turns"]
        print(", ".join(parts).replace("torch.", ""), flush=True)

    def trainer(self, constants: ghostnet.Constants, kind: type = ghostnet.Trainer) -> ghostnet.Trainer:
        """One that takes its steps as in an epoch after the first."""
        trainer = kind(constants, self.data, self.precision)
        if self.cuda:
            for plan in self.plans(WARM):
                trainer.step(plan)
            trainer.record()
        return trainer

    def recorded(self, run: Callable[[], object]) -> Callable[[], object]:
        """The run as a CUDA graph, which leaves out the time of its launches; the run itself where there is no CUDA."""
        if not self.cuda:
            return run
        for _ in range(WARM):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def pairs(self) -> dict[str, list[ghostnet.Trainer]]:
        """The ordinary and the ghost network of each kind of which both are named."""
        pairs = {name: [self.trainers.get(name), self.trainers.get(f"ghost-{name}")] for name in ("resnet56", "vgg16")}
        return {name: pair for name, pair in pairs.items() if all(pair)}

    def plans(self, batches: int) -> tuple[Tensor, ...]:
        return self.data.epoch_plan()[: batches * BATCH].to(self.device).split(BATCH)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def train(self, model: nn.Module, images: Tensor) -> None:
        """Forward and backward of a layer with as many maps as its input has."""
        inputs = images.detach().requires_grad_()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self.autocast():
                output = model(inputs)
            torch.autograd.grad(output, (inputs, *model.parameters()), images)

    def infer(self, model: nn.Module, images: Tensor) -> None:
        """As ghostnet.evaluate does."""
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), self.autocast():
            model(images)

    def by_turns(self, *runs: Callable[[], object], passes: bool = False) -> list[list[float]]:
        """Seconds a call of each run in each turn.

        Short runs are called so often that a timing is long enough. Passes (over many batches, with the usual loop
        among them) are called once, after a pause in which its workers come to rest.
        """

        def seconds(run: Callable[[], object], calls: int = 1) -> float:
            time.sleep(REST if passes else 0)
            start = now(self.device)
            for _ in range(calls):
                run()
            return (now(self.device) - start) / calls

        for run in runs:
            run()
        calls = [1 if passes else max(1, round(SHORTEST / seconds(run))) for run in runs]
        turns = [[seconds(run, n) for run, n in zip(runs, calls, strict=True)] for _ in range(self.turns)]
        return [list(times) for times in zip(*turns, strict=True)]

    def peak_megabytes(self, run: Callable[[], object]) -> float:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(records, key=lambda event: event.start_ns()))
        return max(itertools.accumulate(changes, initial=0)) / 1e6 if self.device.type == "cpu" else float("nan")

    def against_usual(self, batches: int, our_step: Callable, usual_step: Callable) -> list[str]:
        """Images/s of ours and of the usual loop, and their ratio, in passes of so many batches (ours on CUDA: all)."""
        epoch = len(self.data.train_labels)
        our_batches, our_images = (math.ceil(epoch / BATCH), epoch) if self.cuda else (batches, batches * BATCH)

        def ours() -> None:
            for plan in self.plans(our_batches):
                our_step(plan)

        def usual() -> None:
            with torch.backends.cudnn.flags(enabled=True):
                for images, labels in itertools.islice(self.usual_batches, batches):
                    usual_step(images.to(self.device), labels.to(self.device))

        ours_took, usual_took = self.by_turns(ours, usual, passes=True)
        a, b = [t / our_images for t in ours_took], [t / (batches * BATCH) for t in usual_took]
        return [f"{1 / median(a):,.0f}", f"{1 / median(b):,.0f}", ratio(b, a)]

    def end_to_end(self) -> None:
        rows = []
        for name, trainer in self.trainers.items():
            usual = usual_step(trainer.constants, self.device)
            batches = 100 if self.cuda else 2 if self.quick else 3
            rows.append((name, *self.against_usual(batches, trainer.take_step, usual)))
        print_table("1. Training end to end, images/s", "network | ours | usual | ours / usual", rows)

    def widths(self, path: Path) -> None:
        rows, points = [], {}
        for network, channels, side in LAYERS:
            images = torch.randn(BATCH, channels, side, side, device=self.device, dtype=self.precision)
            images = images.contiguous(memory_format=torch.channels_last)
            pair = [layer(channels), ghostnet.replace_conv_with_ghost(layer(channels))]
            for model in pair:
                model.to(self.device, memory_format=torch.channels_last)
            training = self.by_turns(*(self.recorded(partial(self.train, model.train(), images)) for model in pair))
            inference = self.by_turns(*(self.recorded(partial(self.infer, model.eval(), images)) for model in pair))
            points[network, channels] = [median(a) / median(b) for a, b in (training, inference)]
            rows.append((network, f"{channels}, {side}x{side}", *map(milliseconds, training), ratio(*training),
                         *map(milliseconds, inference), ratio(*inference), f"{flops_ratio(channels):.2f}x"))
        columns = ("layer of", "channels, map", "training: ordinary, ms", "ghost, ms", "ordinary / ghost",
                   "inference: ordinary, ms", "ghost, ms", "ordinary / ghost", "FLOPs: ordinary / ghost")
        print_table("2. A layer, ordinary and ghost, by its width", " | ".join(columns), rows)
        conditions = f"{ghostnet.hardware_name(self.device)}, {self.precision}, batch {BATCH}".replace("torch.", "")
        draw_widths(points, conditions, path)

    def ghost_against_ordinary(self) -> None:
        (plan,), rows = self.plans(1), []
        for network, pair in self.pairs().items():
            kinds = [("training step", BATCH, lambda t: t.take_step(plan), lambda t: t.step(plan))]
            for batch in (1, 128, 1000) if self.cuda else (1, 128):
                images = self.data.normalize(self.data.test_images[:batch])
                kinds.append(("inference", batch, *[lambda t, images=images: self.infer(t.model, images)] * 2))
            for what, batch, run, plain in kinds:
                for trainer in pair:
                    trainer.model.train(what != "inference")
                times = self.by_turns(*(partial(run, trainer) for trainer in pair))
                for trainer in pair:
                    trainer.optimizer.zero_grad()
                before, after = (self.peak_megabytes(partial(plain, trainer)) for trainer in pair)
                rows.append((network, what, batch, *map(milliseconds, times), ratio(*times),
                             f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}x"))
            for trainer in pair:
                trainer.model.train()
        columns = ("network", "what", "batch", "ordinary, ms", "ghost, ms", "ordinary / ghost", "ordinary, MB",
                   "ghost, MB", "ordinary / ghost")
        print_table("3. Ordinary convolutions and ghost modules: time and peak memory", " | ".join(columns), rows)

    def narrow_layers_kept(self) -> None:
        if "resnet56" not in self.pairs():
            return
        kept = "16-channel layers ordinary, the others ghosts"  # a network of this name, for as long as this process
        ghostnet.NETWORKS[kept] = lambda: ghostnet.replace_conv_with_ghost(
            ghostnet.NETWORKS["resnet56"](), keep=lambda _name, conv: conv.out_channels <= 16)
        trainers = {"ordinary": self.trainers["resnet56"],
                    kept: self.trainer(ghostnet.Constants(network=kept, ratio=1)),
                    "ghosts": self.trainers["ghost-resnet56"]}
        (plan,), rows = self.plans(1), []
        times = self.by_turns(*(partial(trainer.take_step, plan) for trainer in trainers.values()))
        for (name, trainer), seconds in zip(trainers.items(), times, strict=True):
            flops, parameters = ghostnet.count(ghostnet.build_network(trainer.constants), torch.zeros(1, 3, 32, 32))[""]
            rows.append((name, f"{flops / 1e6:.1f}M", f"{parameters / 1e6:.2f}M", milliseconds(seconds),
                         ratio(times[0], seconds), ratio(times[2], seconds)))
        columns = "ResNet-56 with | FLOPs | params | training step, ms | ordinary / this | ghosts / this"
        print_table("4. What leaving narrow layers alone gains", columns, rows)

    def parts_of_a_step(self) -> None:
        n, numbers = (8192, 2**28) if self.cuda else (2048, 2**26)
        factor = torch.randn(n, n, device=self.device).to(self.precision)
        original = torch.ones(numbers, device=self.device)
        target = torch.empty_like(original)
        products, copies = self.by_turns(lambda: factor @ factor, lambda: target.copy_(original))
        arithmetic, memory = 2 * n**3 / median(products), 2 * 4 * numbers / median(copies)
        (plan,), rows = self.plans(1), []
        for network, trainer in self.trainers.items():
            marked, parts = self.trainer(trainer.constants, MarkedTrainer), []

            def step(marked=marked, parts=parts) -> None:
                marked.take_step(plan)
                parts.append(marked.parts())

            whole = self.by_turns(partial(trainer.take_step, plan), step)[0]
            parts = [median(times) for times in zip(*parts, strict=True)]
            flops, moved = work_of_a_step(trainer.constants, self.precision)
            bound, which = max((flops / arithmetic, "arithmetic"), (moved / memory, "memory"))
            rows.append((network, *(f"{1000 * part:.2f} ({100 * part / sum(parts):.0f}%)" for part in parts),
                         milliseconds([sum(parts)]), milliseconds(whole), f"{flops / 1e9:.1f}", f"{moved / 1e9:.2f}",
                         f"{1000 * bound:.2f} ({which})", f"{median(whole) / bound:.1f}x"))
        title = f"5. One training step, ms (ceilings: {arithmetic / 1e12:.2f} TFLOP/s, {memory / 1e9:.1f} GB/s)"
        columns = ("network", "augmentation", "forward", "backward", "update", "their sum", "step", "GFLOP", "GB",
                   "bound", "step / bound")
        print_table(title, " | ".join(columns), rows)

    def data_alone(self) -> None:
        row = self.against_usual(40 if self.quick else 200, self.data.train_batch, lambda _images, _labels: None)
        print_table("6. Data alone, images/s on the device", "ours | usual | ours / usual", [row])


def draw_widths(points: dict[tuple[str, int], list[float]], title: str, path: Path) -> None:
    """Ratios of time in training and inference, by network and channels, and of FLOPs, against the channels."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes, channels = figure.subplots(), sorted({channels for _, channels in points})
    axes.axhline(1, color="black", linewidth=1)
    axes.plot(channels, [*map(flops_ratio, channels)], "-", color="0.6", label="FLOPs")
    for network, style in (("ResNet", "o-"), ("VGG-16", "s--")):
        widths = [channels for name, channels in points if name == network]
        for i, what in enumerate(("training", "inference")):
            ratios = [points[network, channels][i] for channels in widths]
            axes.plot(widths, ratios, style, color=f"C{i}", label=f"time in {what}, layers of {network}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(channels, channels)
    axes.set(xlabel="channels", ylabel="ordinary layer / ghost layer", ylim=(0, None))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    ghostnet.write_atomically(path, partial(figure.savefig, dpi=150))
    print(f"\nsaved {path}", flush=True)


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler is to be quiet
    arguments = ghostnet.parse(Arguments())
    arguments.image_dir.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(arguments)
    benchmark.end_to_end()
    benchmark.widths(arguments.image_dir / "ghost_speed.png")
    benchmark.ghost_against_ordinary()
    benchmark.narrow_layers_kept()
    benchmark.parts_of_a_step()
    benchmark.data_alone()


if __name__ == "__main__":
    ghostnet.run_as_script(main)
