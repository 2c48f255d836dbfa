"""How fast ghostnet.py is, and how fast ghost modules are, on this machine: four Markdown tables.

    python benchmarks/speed.py                                  all five networks
    python benchmarks/speed.py --quick --networks vgg16 ghost-vgg16

What is compared is timed by turns (A, B, A, B, ...). Tables show medians, in parentheses the range of a turn's ratios.

"ours" is the step that ghostnet.train takes: TrainingStep, on CUDA within CudaGraphStep. A pass draws its plan as an
epoch does; progress bar, check for signals, evaluation and checkpoint are not timed. "usual" is the loop of most
CIFAR-10 scripts: DataLoader with 2 workers, PIL transforms, float32, NCHW, eager, plain SGD, cudnn's defaults,
loss.item() every step. Its workers stay alive and warm; they rest before each turn, so that a few batches lie ready
when its time starts, which favours it.

Memory is the peak above what is held before the call (weights, momentum, data), as torch's allocator counts it: on CUDA
torch.cuda.max_memory_allocated of the step without its graph, on CPU the allocations that torch.profiler records, which
are exact where resident set sizes are not (what oneDNN allocates past torch is not in them); nan on MPS.

The bound of a step is the larger of two times. Arithmetic: 3 (forward, and two products backward) x 2 x MACs x batch,
at the speed of a large matrix product in the training precision. Memory, at the speed of a large copy: each output of a
convolution, batch norm, pool or linear layer and its gradient, written once and read once in the training precision
(ReLU, sum and concatenation count as fused into them), and gradient, weight and momentum of every parameter, written
and read once in float32. Only caches that hold activations between layers could make a step faster.
"""

import copy
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet

RUNS = {"resnet32": "resnet32", "resnet56": "resnet56", "ghost-resnet56": "gr_cosine", "vgg16": "vgg16",
        "ghost-vgg16": "gv_cosine"}
BATCH, WORKERS = 128, 2


@dataclass(frozen=True)
class Arguments:
    """Time ghostnet.py against the usual loop, and ghost modules against ordinary convolutions."""

    networks: tuple[Literal[*RUNS], ...] = tuple(RUNS)
    """ghost is compared with ordinary where both are named"""
    data_dir: Path = Path("data")
    """folder of cifar-10-batches-py, which is downloaded when it is missing"""
    device: str = "auto"
    """cuda, mps, cpu, or auto: the first of these that is there"""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """of our arithmetic, as in ghostnet.py; the usual loop computes in float32"""
    quick: bool = False
    """fewer batches and turns"""


def usual_batches(data_dir: Path):
    """Batches of images and labels without end, epoch after epoch from the same workers."""
    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = [*augmentation, transforms.ToTensor(), transforms.Normalize(ghostnet.MEAN, ghostnet.STD)]
    images = torchvision.datasets.CIFAR10(data_dir, transform=transforms.Compose(transform))
    options = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": torch.cuda.is_available()}
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True, **options)
    while True:
        yield from loader


def usual_step(constants: ghostnet.Constants, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    model, c = ghostnet.build_network(constants).to(device).train(), constants
    optimizer = torch.optim.SGD(model.parameters(), c.lr, c.momentum, weight_decay=c.weight_decay)

    def step(images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def work_of_a_step(constants: ghostnet.Constants, precision: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes that one training step needs at least (see the top of this file)."""
    model, image, numbers = ghostnet.build_network(constants).eval(), torch.zeros(1, 3, 32, 32), []
    macs, parameters = ghostnet.count(copy.deepcopy(model), image)[""]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)):
            module.register_forward_hook(lambda _module, _inputs, output: numbers.append(output.numel()))
    model(image)
    return 3 * 2 * macs * BATCH, 2 * 2 * sum(numbers) * BATCH * precision.itemsize + 3 * 2 * 4 * parameters


def ratio(slow: list[float], fast: list[float]) -> str:
    turns = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f}x ({min(turns):.2f}–{max(turns):.2f})"


def print_table(title: str, header: str, rows: list[tuple]) -> None:
    lines = [f"\n**{title}**\n", f"| {header} |", "|" + " --- |" * len(header.split(" | "))]
    if rows:
        print(*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), sep="\n", flush=True)


def now(device: torch.device) -> float:
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


class PartedStep(ghostnet.TrainingStep):
    """The training step with a mark before each of its four parts and one after the last."""

    def __init__(self, constants: ghostnet.Constants, data: ghostnet.Cifar10, precision: torch.dtype):
        super().__init__(constants, copy.copy(data), precision)
        self.device = data.train_labels.device
        self.cuda = self.device.type == "cuda"  # external: these events can be recorded within a CUDA graph, too
        self.marks = [torch.cuda.Event(enable_timing=True, external=True) if self.cuda else 0.0 for _ in range(5)]
        begins = (self.data, "train_batch"), (self, "model"), (self.optimizer, "zero_grad"), (self.scaler, "step")
        for i, (owner, name) in enumerate(begins):
            setattr(owner, name, partial(self.mark, i, getattr(owner, name)))

    def mark(self, i: int, part: Callable, *arguments):
        if self.cuda:
            self.marks[i].record()
        else:
            self.marks[i] = now(self.device)
        return part(*arguments)

    def __call__(self, plan: Tensor) -> None:
        super().__call__(plan)
        self.mark(4, lambda: None)

    def milliseconds(self) -> list[float]:
        now(self.device)  # by then the events have come
        return [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in itertools.pairwise(self.marks)]


class Benchmark:
    def __init__(self, arguments: Arguments):
        self.quick, self.turns = arguments.quick, 3 if arguments.quick else 7
        self.device = ghostnet.pick_device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.precision = ghostnet.pick_precision(arguments.precision, self.device)
        self.data = ghostnet.Cifar10(arguments.data_dir, self.device)
        self.usual_batches = usual_batches(arguments.data_dir)
        self.trainings = {}
        for network in arguments.networks:
            constants = ghostnet.EXPERIMENTS[RUNS[network]]
            plain = ghostnet.TrainingStep(constants, self.data, self.precision)
            self.trainings[network] = SimpleNamespace(constants=constants, plain=plain, step=self.fast(plain))
        parts = [f"{ghostnet.hardware_name(self.device)} ({os.cpu_count()} cores)", f"torch {torch.__version__}",
                 f"ours in {self.precision}", "usual in float32", f"batch {BATCH}", f"{self.turns} turns"]
        print(", ".join(parts).replace("torch.", ""), flush=True)

    def plans(self, batches: int) -> tuple[Tensor, ...]:
        return self.data.epoch_plan()[: batches * BATCH].to(self.device).split(BATCH)

    def fast(self, step: ghostnet.TrainingStep) -> Callable[[Tensor], None]:
        """The step as ghostnet.train takes it, warm: CudaGraphStep records it at the sixth batch."""
        step = ghostnet.CudaGraphStep(step) if self.cuda else step
        for plan in self.plans(8 if self.cuda else 1):
            step(plan)
        return step

    def by_turns(self, *runs: Callable[[], object], passes: bool = False) -> list[list[float]]:
        """Seconds a call of each run in each turn.

        Short runs are called so often that a timing takes about 0.2 s. Passes (over many batches, with the usual loop
        among them) are called once, after half a second in which its workers come to rest.
        """

        def seconds(run: Callable[[], object], calls: int = 1) -> float:
            time.sleep(0.5 if passes else 0)
            start = now(self.device)
            for _ in range(calls):
                run()
            return (now(self.device) - start) / calls

        for run in runs:
            run()
        calls = [1 if passes else max(1, round(0.2 / seconds(run))) for run in runs]
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
        def ours() -> None:
            for plan in self.plans(batches):
                our_step(plan)

        def usual() -> None:
            with torch.backends.cudnn.flags(enabled=True):
                for images, labels in itertools.islice(self.usual_batches, batches):
                    usual_step(images.to(self.device), labels.to(self.device))

        a, b = self.by_turns(ours, usual, passes=True)
        return [*(f"{batches * BATCH / median(times):,.0f}" for times in (a, b)), ratio(b, a)]

    def end_to_end(self) -> None:
        batches = ((390, 100) if self.cuda else (6, 3))[self.quick]
        rows = []
        for network, training in self.trainings.items():
            step = usual_step(training.constants, self.device)
            rows.append((network, *self.against_usual(batches, training.step, step)))
        title = f"1. Training end to end, images/s over passes of {batches} batches"
        print_table(title, "network | ours | usual | ours / usual", rows)

    def ghost_against_ordinary(self) -> None:
        (plan,), rows = self.plans(1), []

        def infer(images: Tensor, training: SimpleNamespace) -> None:  # as ghostnet.evaluate does
            autocast = torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)
            with torch.inference_mode(), autocast:
                training.plain.model(images)

        for network in ("resnet56", "vgg16"):
            pair = [self.trainings[name] for name in (network, f"ghost-{network}") if name in self.trainings]
            kinds = [("training step", BATCH, lambda t: t.step(plan), lambda t: t.plain(plan))]
            for batch in (1, 128, 1000):
                run = partial(infer, self.data.normalize(self.data.test_images[:batch]))
                kinds.append(("inference", batch, run, run))
            for what, batch, run, plain in kinds if len(pair) == 2 else []:
                for training in pair:
                    training.plain.model.train(what != "inference")
                times = self.by_turns(*(partial(run, training) for training in pair))
                for training in pair:
                    training.plain.optimizer.zero_grad()
                before, after = (self.peak_megabytes(partial(plain, training)) for training in pair)
                rows.append((network, what, batch, *(f"{1000 * median(t):.2f}" for t in times), ratio(*times),
                             f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}x"))
            for training in pair:
                training.plain.model.train()
        columns = ("network", "what", "batch", "ordinary, ms", "ghost, ms", "ordinary / ghost", "ordinary, MB",
                   "ghost, MB", "ordinary / ghost")
        print_table("2. Ordinary convolutions and ghost modules: time and peak memory", " | ".join(columns), rows)

    def data_alone(self) -> None:
        batches = 40 if self.quick else 100
        row = self.against_usual(batches, self.data.train_batch, lambda _images, _labels: None)
        title = f"3. Data alone, images/s on the device over passes of {batches} batches"
        print_table(title, "ours | usual | ours / usual", [row])

    def parts_of_a_step(self) -> None:
        n, numbers = (8192, 2**28) if self.cuda else (2048, 2**26)
        factor = torch.randn(n, n, device=self.device).to(self.precision)
        original = torch.ones(numbers, device=self.device)
        target = torch.empty_like(original)
        products, copies = self.by_turns(lambda: factor @ factor, lambda: target.copy_(original))
        arithmetic, memory = 2 * n**3 / median(products), 2 * 4 * numbers / median(copies)
        (plan,), rows = self.plans(1), []
        for network, training in self.trainings.items():
            parted, parts = PartedStep(training.constants, self.data, self.precision), []
            step = self.fast(parted)

            def marked(step=step, parted=parted, parts=parts) -> None:
                step(plan)
                parts.append(parted.milliseconds())

            whole = median(self.by_turns(partial(training.step, plan), marked)[0])
            parts = [median(times) for times in zip(*parts, strict=True)]
            flops, moved = work_of_a_step(training.constants, self.precision)
            bound, which = max((flops / arithmetic, "arithmetic"), (moved / memory, "memory"))
            rows.append((network, *(f"{part:.2f} ({100 * part / sum(parts):.0f}%)" for part in parts),
                         f"{sum(parts):.2f}", f"{1000 * whole:.2f}", f"{flops / 1e9:.1f}", f"{moved / 1e9:.2f}",
                         f"{1000 * bound:.2f} ({which})", f"{whole / bound:.1f}x"))
        title = f"4. One training step, ms (ceilings: {arithmetic / 1e12:.2f} TFLOP/s, {memory / 1e9:.1f} GB/s)"
        columns = ("network", "augmentation", "forward", "backward", "update", "their sum", "step", "GFLOP", "GB",
                   "bound", "step / bound")
        print_table(title, " | ".join(columns), rows)


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler is to be quiet
    benchmark = Benchmark(ghostnet.parse(Arguments()))
    benchmark.end_to_end()
    benchmark.ghost_against_ordinary()
    benchmark.data_alone()
    benchmark.parts_of_a_step()


if __name__ == "__main__":
    ghostnet.run_as_script(main)
