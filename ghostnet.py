"""GhostNet on CIFAR-10: Ghost-ResNet-56 and Ghost-VGG-16, trained, counted and drawn by one script.

A ghost module replaces a convolution: an ordinary convolution makes a few intrinsic feature maps, and a cheap
depthwise convolution makes the others, their ghosts, from those. The idea, the networks and the numbers to compare
with are those of Han et al., "GhostNet: More Features from Cheap Operations", https://arxiv.org/abs/1911.11907.

    python ghostnet.py                                      the three ghost runs: gr_cosine, gr_multistep, gv_cosine
    python ghostnet.py gr_cosine --epochs 30 --seed 1       one run with other constants, kept in a file of its own
    torchrun --nproc-per-node 2 ghostnet.py --seeds 0 1 2   many runs, spread over processes and GPUs

It shows what is trained already, then trains what is missing. It draws pictures, prints a table and, in two reports,

    resnet-56   flops: 127.93M -> 67.50M (1.90x)    params: 0.86M -> 0.44M (1.95x)
    vgg-16      flops: 314.57M -> 159.22M (1.98x)   params: 14.99M -> 7.65M (1.96x)
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the imports below take their seconds is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import io
import itertools
import math
import os
import pickletools
import platform
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Literal

import filelock
import matplotlib.figure
import thop
import torch
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor, nn
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------ constants
@dataclass(frozen=True)
class Constants:
    """All that defines a run: runs with equal constants are the same run."""

    network: Literal["resnet32", "resnet56", "vgg16"] = "resnet56"  # the ordinary network to make a ghost network of
    ratio: int = 2  # s, all maps / intrinsic maps; 1 keeps the ordinary convolutions
    dw_kernel_size: int = 3  # d, kernel size of the cheap depthwise operation, odd
    schedule: Literal["cosine", "multistep"] = "cosine"  # cosine to zero, or divided by 10 at each milestone
    milestones: tuple[int, ...] = (100, 150)  # epochs after which multistep divides the learning rate
    epochs: int = 200  # passes over the training images
    lr: float = 0.1  # learning rate at the start
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = 5e-4  # L2 penalty on all parameters
    batch_size: int = 128  # images a step; the short last batch of an epoch is kept
    seed: int = 0  # of the initialization, the data order and the augmentation

    @property
    def architecture(self) -> str:
        """Name of the network, with s and d where they are not the paper's 2 and 3."""
        s, d = f" s={self.ratio}" * (self.ratio != 2), f" d={self.dw_kernel_size}" * (self.dw_kernel_size != 3)
        return f"ghost-{self.network}{s}{d}" if self.ratio > 1 else self.network


EXPERIMENTS = {
    "gr_cosine": Constants(),
    "gr_multistep": Constants(schedule="multistep"),
    "gv_cosine": Constants(network="vgg16"),
    "resnet32": Constants(network="resnet32", ratio=1),  # costs what Ghost-ResNet-56 costs
    "resnet56": Constants(ratio=1),
    "vgg16": Constants(network="vgg16", ratio=1),
    **{f"gv_d{d}": Constants(network="vgg16", dw_kernel_size=d) for d in (1, 5, 7)},  # table 3; d=3 is gv_cosine
    **{f"gv_s{s}": Constants(network="vgg16", ratio=s) for s in (3, 4, 5)},  # table 4; s=2 is gv_cosine
    **{f"gr_s{s}": Constants(ratio=s, dw_kernel_size=d) for s, d in ((3, 3), (5, 3), (10, 5), (20, 5))},
}


@dataclass(frozen=True)
class Arguments:
    """Ghost-ResNet-56 and Ghost-VGG-16 on CIFAR-10. A constant given here overrides that of every named run."""

    experiments: tyro.conf.Positional[tuple[Literal[*EXPERIMENTS], ...]] = ("gr_cosine", "gr_multistep", "gv_cosine")
    constants: tyro.conf.OmitArgPrefixes[Constants] = field(default_factory=Constants)
    seeds: tuple[int, ...] = ()  # every named run once with each of these seeds
    data_dir: Path = Path("data")  # folder of cifar-10-batches-py, which is downloaded when it is missing
    checkpoint_dir: Path = Path("checkpoints")  # folder of the runs' files
    image_dir: Path = Path("images")  # folder of the pictures
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of the others that is there
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the training; auto: the best native one
    cuda_graph: bool = True  # record the training step as one CUDA graph (CUDA only)
    fresh: bool = False  # train from the start, replacing what the run's file holds


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels, scaled to [0, 1]
PADDING = 4  # zero pixels on each side, from which the random crop is taken
SAVE_SECONDS = 10  # between saves at least: where epochs are short, saving each would take a good part of them
LARGEST_FILE = 2**27  # bytes; VGG-16 in training needs 120 million, for weights and momentum in float32
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # it gives each of its processes a rank
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)
PICTURE_IMAGE = 12  # test image in the ghost picture: a dog
PICTURE_MODULE = 1  # its ghost module: the first block's first in ResNet-56, the second layer in VGG-16 (figure 4)
# The paper's top-1 accuracy in percent (tables 3, 4 and 5); benchmarks/comparison.py has what others report.
PAPER = {"resnet56": 93.0, "ghost-resnet56": 92.7, "vgg16": 93.6, "ghost-vgg16": 93.7, "ghost-vgg16 d=1": 93.5,
         "ghost-vgg16 d=5": 93.4, "ghost-vgg16 d=7": 93.1, "ghost-vgg16 s=3": 93.4, "ghost-vgg16 s=4": 93.0,
         "ghost-vgg16 s=5": 92.9}


# --------------------------------------------------------------------------------------------------- ghost module
class GhostModule(nn.Module):
    """Drop-in for nn.Conv2d that makes a part of its feature maps by a cheap operation (paper, section 3.1).

    Takes the arguments of nn.Conv2d, which shape the primary convolution, and two more:
        ratio: s >= 1; ceil(out_channels / s) maps are intrinsic, one in each group at least, the others their ghosts
        dw_kernel_size: d, odd; kernel of the depthwise convolution that makes the ghosts from the intrinsic maps
    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W') as nn.Conv2d. The network's own normalization and
    activation follow; there are none inside. Raises ValueError for other ratios and kernels, and what nn.Conv2d raises.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", device=None, dtype=None, *, ratio=2, dw_kernel_size=3):
        super().__init__()
        if not (isinstance(ratio, Integral) and ratio >= 1):
            raise ValueError(f"ratio must be an integer from 1, not {ratio}")
        if not (isinstance(dw_kernel_size, Integral) and dw_kernel_size > 0 and dw_kernel_size % 2 == 1):
            raise ValueError(f"dw_kernel_size must be odd and positive, not {dw_kernel_size}")
        shape = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        replaced = nn.Conv2d(in_channels, out_channels, *shape, device="meta")  # checks the arguments
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(replaced, name))  # what others read of a convolution
        self.ratio, self.dw_kernel_size = min(int(ratio), out_channels // groups or 1), int(dw_kernel_size)
        intrinsic = math.ceil(out_channels / (self.ratio * groups)) * groups
        self.primary_conv = nn.Conv2d(in_channels, intrinsic, *shape, device, dtype)
        ghosts, d = intrinsic * (self.ratio - 1), self.dw_kernel_size
        cheap = (intrinsic, ghosts, d, 1, d // 2, 1, intrinsic, bias, padding_mode, device, dtype)
        self.cheap_operation = nn.Conv2d(*cheap) if ghosts > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        intrinsic = self.primary_conv(x)
        if self.cheap_operation is None:
            return intrinsic
        ghosts = self.cheap_operation(intrinsic)
        needed = self.out_channels - self.primary_conv.out_channels
        if self.cheap_operation.out_channels > needed:  # a cut that cuts nothing would cost a copy in its backward
            ghosts = ghosts.narrow(-3, 0, needed)
        return torch.cat([intrinsic, ghosts], dim=-3)


def replace_conv_with_ghost(model: nn.Module, ratio: int = 2, dw_kernel_size: int = 3,
                            keep: str | Iterable[str] | Callable[[str, nn.Conv2d], bool] = ()) -> nn.Module:
    """Replace every dense nn.Conv2d inside `model` by a GhostModule, in place, and return the model.

    Kernel, stride, padding, dilation, device, dtype, mode and requires_grad stay; the weights start anew. A bias stays
    unless a batch norm, which cancels it, follows in the same nn.Sequential. Left alone are grouped convolutions,
    subclasses of nn.Conv2d, the insides of ghost modules, and what to `keep`: names of layers, each with all that it
    contains, or a function of name and convolution. Raises ValueError or TypeError, the model unchanged, for bad
    arguments, a lazy convolution, and when there is nothing to replace.
    """
    places = {}  # of each module: the names of all places where it is used
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    layers = () if callable(keep) else {keep} if isinstance(keep, str) else {*keep}
    if unknown := {*layers} - {*itertools.chain(*places.values())}:
        raise ValueError(f"keep names layers that the model has not: {', '.join(sorted(map(str, unknown)))}")
    kept = keep if callable(keep) else lambda name, _: any(f"{name}.".startswith(f"{layer}.") for layer in layers)
    inside = {part for module in places if isinstance(module, GhostModule) for part in module.modules()}
    sequences = [module for module in places if type(module).forward is nn.Sequential.forward]
    pairs = itertools.chain(*map(itertools.pairwise, sequences))
    normalized = [layer for layer, follower in pairs if isinstance(follower, nn.BatchNorm2d)]
    ghosts = {}  # one for each convolution, in however many places
    for conv, names in places.items():
        dense = type(conv) in (nn.Conv2d, nn.LazyConv2d) and conv.groups == 1 and conv is not model
        if not dense or conv in inside or any(kept(name, conv) for name in names):
            continue
        if type(conv) is nn.LazyConv2d:
            raise ValueError(f"{names[0]} is a lazy convolution: run a batch through the model first")
        bias = conv.bias is not None and normalized.count(conv) < len(names)
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1)
        options = {"device": conv.weight.device, "dtype": conv.weight.dtype, "ratio": ratio}
        ghosts[conv] = GhostModule(*shape, bias, conv.padding_mode, **options, dw_kernel_size=dw_kernel_size)
        ghosts[conv].train(conv.training).requires_grad_(conv.weight.requires_grad)
    if not ghosts:
        raise ValueError("the model holds no dense nn.Conv2d to replace")
    for conv, ghost in ghosts.items():
        for name in places[conv]:
            model.set_submodule(name, ghost)
    return model


# ------------------------------------------------------------------------------------------------------- networks
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 projection where the shape changes (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        stride = out_channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        projection = (nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Sequential(*projection if stride > 1 else ())

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers in stages of 16, 32 and 64 channels: (N, 3, 32, 32) -> logits (N, 10)."""

    def __init__(self, depth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, *(width for width in (16, 32, 64) for _ in range(depth // 6))]
        self.blocks = nn.Sequential(*itertools.starmap(BasicBlock, itertools.pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(out.mean(dim=(2, 3)))


def vgg16() -> nn.Module:
    """The ordinary VGG-16 with batch norm: 14,990,922 parameters, 7,650,474 with ghost modules (s=2, d=3)."""
    layers, in_channels = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            in_channels = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential()
    model.features, model.flatten = nn.Sequential(*layers), nn.Flatten()
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 10))
    return model


NETWORKS = {"resnet32": partial(ResNet, 32), "resnet56": partial(ResNet, 56), "vgg16": vgg16}


def build_network(constants: Constants) -> nn.Module:
    model = NETWORKS[constants.network]()
    return replace_conv_with_ghost(model, constants.ratio, constants.dw_kernel_size) if constants.ratio > 1 else model


# ----------------------------------------------------------------------------------------------------------- data
class UserError(Exception):
    """Something that the user can mend: one line on stderr and exit code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


class Cifar10:
    """CIFAR-10 as uint8 tensors on the device; batches are cropped, mirrored and normalized there by indexing."""

    def __init__(self, root: Path, device: torch.device):
        dataset, beside = torchvision.datasets.CIFAR10, root / "cifar-10-download"
        folder = root / dataset.base_folder
        try:
            if not folder.exists():  # fetched beside and renamed: a start after a kill goes on, a second process waits
                root.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(root / ".cifar-10.lock"):
                    if not folder.exists():
                        dataset(beside, download=True)
                        (beside / dataset.filename).unlink(missing_ok=True)
                        os.replace(beside / dataset.base_folder, folder)
                        beside.rmdir()
            for name in [*dict(dataset.train_list), *dict(dataset.test_list), dataset.meta["filename"]]:
                open(folder / name, "rb").close()  # says what is wrong, where torchvision says "corrupted"
            train, test = dataset(root, train=True), dataset(root, train=False)
        except Exception as error:  # a download can raise all kinds, a wrong checksum a RuntimeError
            damaged = isinstance(error, RuntimeError) and folder.exists()
            hint = "delete it, and the next start downloads it again" if damaged else "name another by --data-dir"
            raise UserError(f"{folder} cannot be used ({error!r}): {hint}") from None
        self.classes = test.classes
        self.train_images = F.pad(torch.from_numpy(train.data), (0, 0, *[PADDING] * 4)).to(device)  # (50000, 40, 40, 3)
        self.test_images = torch.from_numpy(test.data).to(device)  # (10000, 32, 32, 3)
        self.train_labels, self.test_labels = (torch.tensor(part.targets, device=device) for part in (train, test))
        self.mean, self.std = (255 * torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD))

    def epoch_plan(self) -> Tensor:
        """An epoch's random choices, a row an image: index, top, left, whether it is mirrored; (N, 4), on the CPU."""
        n = len(self.train_images)
        top, left = torch.randint(2 * PADDING + 1, (2, n))
        return torch.stack([torch.randperm(n), top, left, torch.randint(2, (n,))], dim=1)

    def train_batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented images (n, 3, 32, 32) and labels (n,) for n rows of the plan."""
        index, top, left, mirrored = plan.unbind(1)
        span = torch.arange(32, device=plan.device)
        rows = top[:, None] + span
        columns = left[:, None] + torch.where(mirrored[:, None] == 1, 31 - span, span)
        images = self.train_images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalize(images), self.train_labels[index]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (n, 32, 32, 3) -> float (n, 3, 32, 32) in channels_last order, zero mean and unit std."""
        return (images.permute(0, 3, 1, 2) - self.mean) / self.std


# ---------------------------------------------------------------------------------------------------- checkpoints
HISTORY = ("loss", "train_accuracy", "test_accuracy", "seconds")  # of each epoch; accuracies in percent


@dataclass
class Checkpoint:
    """A run as far as it has come. Its file holds these fields, as tensors and plain data, and nothing else."""

    constants: Constants
    history: dict[str, list[float]]  # a number an epoch for each of HISTORY
    trained_on: str  # hardware, precision, version of torch, date
    model: dict[str, Tensor]  # the network's state_dict; in float16 when the run is finished
    momentum: dict[str, Tensor]  # of each parameter by name; empty when finished

    def __post_init__(self):  # the fields may come from a stranger's file: first the check, then what follows from them
        check_constants(self.constants)
        self.epochs = len(self.history.get("loss"))
        self.finished = self.epochs == self.constants.epochs
        require(self.history.keys() == {*HISTORY} and 1 <= self.epochs <= self.constants.epochs, "another history")
        for name, numbers in self.history.items():
            alike = type(numbers) is list and len(numbers) == self.epochs and {*map(type, numbers)} == {float}
            require(alike and all(0 <= n <= 1e9 for n in numbers), f"its {name} is no list of such numbers")
        require(bool(re.fullmatch("[ -~]{1,200}", self.trained_on)), "its trained_on is no line of text")
        self.accuracy, self.seconds = self.history["test_accuracy"][-1], sum(self.history["seconds"])

    def check_tensors(self) -> None:
        """Raise, a UserError or whatever a stranger's values raise, unless these are tensors of a run's network."""
        with torch.device("meta"):
            network = build_network(self.constants)
        momentum = {} if self.finished else dict(network.named_parameters())
        model = (network.half() if self.finished else network).state_dict()
        for tensors, expected in ((self.model, model), (self.momentum, momentum)):
            require(tensors.keys() == expected.keys(), "its tensors are another network's")
            for name, t in tensors.items():
                alike = (t.shape, t.dtype, t.requires_grad) == (expected[name].shape, expected[name].dtype, False)
                whole = alike and t.untyped_storage().nbytes() == t.nbytes and t.isfinite().all()
                require(bool(whole), f"its {name} is no such tensor as this network's")

    def network(self, device: torch.device) -> nn.Module:
        """The network with these weights, in float32 and channels_last on the device."""
        model = build_network(self.constants)
        model.load_state_dict(dict(self.model))
        return model.to(device, memory_format=torch.channels_last)


def write_atomically(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write beside and rename, so that a kill or a full disk leaves the previous file whole."""
    content, beside = io.BytesIO(), path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    write(content)
    try:
        with open(beside, "xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): what it held is kept") from None


def check_pickle(content: bytes) -> None:
    """Raise for what torch.load would take though no checkpoint has it: other names, tuples that hold one another."""
    ops = [(op.name, argument) for op, argument, _ in pickletools.genops(content)]
    ours = "collections OrderedDict|torch._utils _rebuild_tensor_v2|torch (Float|Half|Long)Storage"
    foreign = [argument for op, argument in ops if op == "GLOBAL" and not re.fullmatch(ours, argument)]
    tuples = {arg for (last, _), (op, arg) in itertools.pairwise(ops) if "PUT" in op and re.search("TUPLE|PUT", last)}
    again = [argument for op, argument in ops if "GET" in op and argument in tuples]
    require(not foreign and not again, "it holds more than tensors and plain data")


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint, on the CPU. Raises UserError for what this script did not write or the system does not read."""
    try:
        require(path.is_file() and path.stat().st_size <= LARGEST_FILE, "it is no file, or larger than any checkpoint")
        checked = io.BytesIO()  # torch.load looks at no checksum, and could find in the archive what zipfile does not
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            require(sum(sizes.values()) <= LARGEST_FILE, "it unpacks to more than any checkpoint")
            for name, size in sizes.items():
                content = archive.read(name)  # raises for a wrong checksum
                if name.lower().endswith(".pkl"):
                    require(size <= 2**22, "it holds more than the text of a checkpoint")
                    check_pickle(content)
                copy.writestr(name, content)
        checked.seek(0)
        plain = torch.load(checked, map_location="cpu", weights_only=True)
        require(type(plain) is dict and plain["constants"].keys() == asdict(Constants()).keys(), "other constants")
        checkpoint = Checkpoint(**plain | {"constants": Constants(**plain["constants"])})
        checkpoint.check_tensors()
        return checkpoint
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a file by someone else can raise all kinds
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is not a checkpoint of this script ({reason}): move it away") from None


# ------------------------------------------------------------------------------------------------------- training
def learning_rate(constants: Constants, epoch: int) -> float:
    """Learning rate of an epoch, the first of which is 1."""
    if constants.schedule == "multistep":
        return constants.lr * 0.1 ** sum(epoch > milestone for milestone in constants.milestones)
    return constants.lr * (1 + math.cos(math.pi * (epoch - 1) / constants.epochs)) / 2


def evaluate(model: nn.Module, data: Cifar10, precision: torch.dtype = torch.float32) -> float:
    """Top-1 accuracy on the test images in percent."""
    model.eval()
    device, labels = data.test_labels.device, data.test_labels
    size = 250 if device.type == "cpu" else 2000  # what a CPU's cache holds, and what fills a GPU
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with torch.inference_mode(), autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        predicted = torch.cat([model(data.normalize(images)).argmax(1) for images in data.test_images.split(size)])
    return 100 * (predicted == labels).sum().item() / len(labels)


class Trainer:
    """A network in training on the device, with its SGD, its loss scale, and the tally of an epoch."""

    def __init__(self, constants: Constants, data: Cifar10, precision: torch.dtype):
        self.constants, self.data, self.precision = constants, data, precision
        self.device = data.train_labels.device
        torch.manual_seed(10**6 * constants.seed)
        self.model = build_network(constants).to(self.device, memory_format=torch.channels_last)
        self.lr = torch.tensor(constants.lr, device=self.device)  # a tensor, so that a recorded step sees it change
        options = {"weight_decay": constants.weight_decay, "nesterov": constants.momentum > 0, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), self.lr, constants.momentum, **options)
        self.momentum = {}
        for name, parameter in self.model.named_parameters():
            self.momentum[name] = self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.tally = torch.zeros(2, device=self.device)  # summed loss and hits, read once: a look makes a GPU wait
        self.plan, self.graph = torch.zeros(constants.batch_size, 4, dtype=torch.long, device=self.device), None

    def step(self, plan: Tensor) -> None:
        """Augment, forward, backward, update."""
        torch.backends.cudnn.benchmark = len(plan) == self.constants.batch_size  # no search for the short last batch
        images, labels = self.data.train_batch(plan)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.tally += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    def record(self) -> None:
        """Record the step as a CUDA graph: these networks are bound by kernel launches, and a graph launches once."""
        self.model.train()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may go on
                self.step(self.plan)
        except RuntimeError as error:  # what this leaves behind is not to be trained on
            complain(f"the step cannot be recorded as a CUDA graph ({error!s:.99}): continue with --no-cuda-graph")
            sys.exit(2)

    def take_step(self, plan: Tensor) -> None:
        """A step by the graph, if it is recorded and the batch a full one."""
        if self.graph is None or len(plan) < len(self.plan):
            return self.step(plan)
        self.plan.copy_(plan)
        self.graph.replay()

    def epoch(self, number: int, title: str) -> tuple[float, float]:
        """Train an epoch under a bar with this title; mean loss, and accuracy in percent, as the batches came."""
        torch.manual_seed(10**6 * self.constants.seed + number)  # so a resumed run draws as an uninterrupted one
        self.model.train()
        self.lr.fill_(learning_rate(self.constants, number))
        self.tally.zero_()
        plans = self.data.epoch_plan().to(self.device).split(self.constants.batch_size)
        for plan in tqdm(plans, title, leave=False, disable=WORLD > 1 or not sys.stderr.isatty()):
            self.take_step(plan)
        loss, hits = (self.tally / len(self.data.train_labels)).tolist()
        return loss, 100 * hits


def train(path: Path, constants: Constants, data: Cifar10, precision: torch.dtype, arguments: Arguments) -> Checkpoint:
    """Train a run from where its checkpoint stands, or from the start, to the last epoch; returns that checkpoint."""
    checkpoint = read_checkpoint(path) if os.path.lexists(path) and not arguments.fresh else None
    if checkpoint:
        require(checkpoint.constants == constants, f"{path} is of {checkpoint.constants}: --fresh replaces it")
    if checkpoint and checkpoint.finished:
        return checkpoint
    run, trainer, history = path.stem, Trainer(constants, data, precision), {name: [] for name in HISTORY}
    if checkpoint:  # a loss scale, which is not in it, finds its size anew in a few steps
        history = checkpoint.history
        trainer.model.load_state_dict(dict(checkpoint.model))
        for name, buffer in trainer.momentum.items():
            buffer.copy_(checkpoint.momentum[name])
    model, first, due = trainer.model, len(history["loss"]) + 1, -math.inf
    for epoch in range(first, constants.epochs + 1):
        if epoch == first + 1 and trainer.device.type == "cuda" and arguments.cuda_graph:
            trainer.record()  # cudnn has chosen its kernels by now
        start, finished = time.perf_counter(), epoch == constants.epochs
        loss, train_accuracy = trainer.epoch(epoch, f"{run} {epoch}/{constants.epochs}")
        speed = len(data.train_labels) / (time.perf_counter() - start)
        if finished:
            model.half().float()  # the file will hold float16: what is measured is what that can do
        norm = torch.nn.utils.get_total_norm([value for value in model.state_dict().values() if value.ndim > 0])
        require(loss + norm.item() < 1e9, f"the loss is not finite in epoch {epoch}: try a smaller --lr")
        test_accuracy = evaluate(model, data, torch.float32 if finished else precision)
        seconds = time.perf_counter() - start
        for name, value in zip(HISTORY, (loss, train_accuracy, test_accuracy, seconds), strict=True):
            history[name].append(value)
        if finished or time.perf_counter() >= due:
            how = f"{hardware_name(trainer.device)}, {str(precision).removeprefix('torch.')}, torch {torch.__version__}"
            weights, momentum = (model.half().state_dict(), {}) if finished else (model.state_dict(), trainer.momentum)
            checkpoint = Checkpoint(constants, history, f"{how}, {date.today()}", weights, momentum)
            write_atomically(path, partial(torch.save, asdict(checkpoint)))
            due = time.perf_counter() + SAVE_SECONDS
        line = f"loss {loss:.4f}, train {train_accuracy:.2f}%, test {test_accuracy:.2f}%, {speed:,.0f} img/s"
        if epoch > first:  # the first one in a process is no measure: cudnn searches in it
            line += f", {timedelta(seconds=round((constants.epochs - epoch) * seconds))} left"
        print(f"{run}: epoch {epoch}/{constants.epochs}, {line}")
        if epoch == first + 1:
            whole = timedelta(seconds=round(constants.epochs * seconds))
            print(f"{run}: {constants.epochs} epochs take about {whole} here; Ctrl-C stops, the same command continues")
    return read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ report and table
def count(model: nn.Module, *inputs) -> dict[str, tuple[float, float]]:
    """FLOPs (multiply-adds, as in the paper) and parameters of every module by name, "" for the whole (by thop)."""
    flops, params, tree = thop.profile(model, inputs=inputs, verbose=False, ret_layer_info=True)
    counts, levels = {"": (flops, params)}, [("", tree)]
    for prefix, children in levels:  # which grows on the way
        for name, (flops, params, grandchildren) in children.items():
            counts[prefix + name] = flops, params
            levels.append((f"{prefix}{name}.", grandchildren))
    return counts


def report(name: str, ordinary: nn.Module, ghost: nn.Module, *inputs, per_layer: bool = True) -> None:
    """Print FLOPs and parameters of a network and of the same network with ghost modules, for one pass of inputs."""
    before, after = count(ordinary, *inputs), count(ghost, *inputs)
    for layer, module in ghost.named_modules() if per_layer else ():
        if isinstance(module, GhostModule):
            (f0, p0), (f1, p1) = before[layer], after[layer]
            print(f"{layer}: flops {f0 / 1e6:.2f}M -> {f1 / 1e6:.2f}M, params {p0:,.0f} -> {p1:,.0f}")
    (f0, p0), (f1, p1) = before[""], after[""]
    for title, f, p in ((f"standard {name}", f0, p0), (f"ghost-{name}", f1, p1)):
        print(f"measuring {title}...\n  flops: {f / 1e6:.2f}M\n  params: {p / 1e6:.2f}M\n")
    print(f"results:\n  flops reduction: {f0 / f1:.2f}x (paper claims ~2x)")
    print(f"  param reduction: {p0 / p1:.2f}x (paper claims ~2x)\n")


def hardware_name(device: torch.device) -> str:
    name, threads = torch.cpu.get_capabilities().get("cpu_name", platform.machine()), torch.get_num_threads()
    processor = f"{name} {device.type.upper()}, {threads} thread{'s' * (threads > 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor


def markdown(rows: list[tuple]) -> str:
    """The aligned Markdown table of rows, the first of which is the header."""
    lines = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def results_table(checkpoints: dict[str, Checkpoint]) -> str:
    """The Markdown table of runs by name; the seeds of one share a row as mean ± standard deviation (their number)."""
    header = ("run", "network", "schedule", "epochs", "accuracy", "paper", "params", "FLOPs", "trained on", "time")
    runs, rows = {}, [header]
    for name, checkpoint in checkpoints.items():
        runs.setdefault((re.sub(r"-seed\d+$", "", name), checkpoint.epochs), []).append(checkpoint)
    for (name, epochs), seeds in runs.items():
        c, n, accuracies = seeds[0].constants, len(seeds), torch.tensor([seed.accuracy for seed in seeds])
        accuracy = f"{accuracies.mean():.2f}" + (f" ± {accuracies.std():.2f} ({n})" if n > 1 else "")
        flops, params = count(build_network(c), torch.zeros(1, 3, 32, 32))[""]
        done = epochs if epochs == c.epochs else f"{epochs} of {c.epochs}"
        hardware, seconds = seeds[0].trained_on.split(",")[0], sum(seed.seconds for seed in seeds) / n
        rows.append((name, c.architecture, c.schedule, done, accuracy, PAPER.get(c.architecture, "–"),
                     f"{params / 1e6:.2f}M", f"{flops / 1e6:.1f}M", hardware, timedelta(seconds=round(seconds))))
    return markdown(rows)


# ------------------------------------------------------------------------------------------------------- pictures
def draw_ghosts(run: str, model: nn.Module, data: Cifar10, path: Path) -> None:
    """One test image and the intrinsic maps, learned kernels and ghosts of one ghost module (paper, figure 4)."""
    name, module = [(n, m) for n, m in model.named_modules() if isinstance(m, GhostModule)][PICTURE_MODULE]
    outputs = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].float().cpu()))
    with torch.inference_mode():
        model.eval()(data.normalize(data.test_images[PICTURE_IMAGE, None]))
    intrinsic, ghosts = outputs[0].tensor_split([module.primary_conv.out_channels])
    kernels = module.cheap_operation.weight.detach()[:, 0].float().cpu()
    columns, limit, d = min(8, len(ghosts)), kernels.abs().max(), module.dw_kernel_size
    figure = matplotlib.figure.Figure(figsize=(15, 5.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.6))
    view, grid = left.subplots(), right.subplots(3, columns, squeeze=False)
    view.imshow(data.test_images[PICTURE_IMAGE].cpu())
    view.set(xticks=[], yticks=[], title=f"test image {PICTURE_IMAGE}: {data.classes[data.test_labels[PICTURE_IMAGE]]}")
    sources, gray = intrinsic.repeat_interleave(module.ratio - 1, 0), {"cmap": "gray"}
    rows = (("intrinsic map\n(primary_conv)", "C0", sources, gray),
            (f"{d}×{d} kernel\n(depthwise)", "black", kernels, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
            ("ghost map\n(cheap_operation)", "C2", ghosts, gray))
    for row, (title, color, pictures, style) in zip(grid, rows, strict=True):
        row[0].set_ylabel(title, color=color, fontsize=12)
        for axes, picture in zip(row, pictures, strict=False):
            axes.imshow(picture, **style).axes.set(xticks=[], yticks=[])
    right.colorbar(grid[1, 0].images[0], ax=grid[1], aspect=12)
    for axes, source, kernel, ghost in zip(grid.T, sources, kernels, ghosts, strict=False):
        axes[1].set_xlabel(f"up to {kernel.abs().max():.1g}", fontsize=11)
        correlation = torch.corrcoef(torch.stack([source.flatten(), ghost.flatten()]))[0, 1].nan_to_num()  # blank: 0
        axes[2].set_xlabel(f"correlation\n{correlation:+.2f}", fontsize=11)
    right.suptitle(f"{run}, layer {name}: {columns} of its {len(ghosts)} ghosts", fontsize=13)
    write_atomically(path, partial(figure.savefig, dpi=150))


def draw_curves(checkpoints: dict[str, Checkpoint], path: Path) -> None:
    """Test accuracy and training loss of every run by epoch, with the paper's accuracies as lines."""
    figure = matplotlib.figure.Figure(figsize=(14, 5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for axes, column, title in ((accuracy, "test_accuracy", "test accuracy (%)"), (loss, "loss", "training loss")):
        for run, checkpoint in checkpoints.items():
            label = run.replace("$", r"\$")  # no formula
            axes.plot(range(1, checkpoint.epochs + 1), checkpoint.history[column], label=label)
        axes.set(xlabel="epoch", ylabel=title)
        axes.grid(alpha=0.3)
    loss.set_yscale("log")
    for name in sorted(PAPER.keys() & {checkpoint.constants.architecture for checkpoint in checkpoints.values()}):
        accuracy.axhline(PAPER[name], linestyle="--", linewidth=1, color="0.4", label=f"paper, {name}: {PAPER[name]}%")
    figure.legend(handles=accuracy.lines, loc="outside right upper", fontsize="small")
    write_atomically(path, partial(figure.savefig, dpi=150))


# ----------------------------------------------------------------------------------------------------------- main
def check_constants(constants: Constants) -> None:
    """Raise UserError for constants that no run can have."""
    limits = {"ratio": (1, 512), "epochs": (1, 10**5), "lr": (1e-9, 1e9), "momentum": (0.0, 0.9999),
              "weight_decay": (0.0, 1e3), "batch_size": (1, 50_000), "seed": (0, 2**31 - 1),
              "dw_kernel_size": (1, 13)}  # from 15 on, its backward in bfloat16 hangs on a CPU
    for name, (low, high) in limits.items():
        value = getattr(constants, name)
        within = type(value) in (int, type(low)) and low <= value <= high
        require(within, f"--{name.replace('_', '-')} must be of type {type(low).__name__}, from {low} to {high}")
    require(constants.dw_kernel_size % 2 == 1, "--dw-kernel-size must be odd")
    require(constants.network in NETWORKS and constants.schedule in ("cosine", "multistep"), "unknown --network")
    numbers = type(constants.milestones) is tuple and all(type(epoch) is int for epoch in constants.milestones)
    ascending = numbers and all(a < b for a, b in itertools.pairwise((0, *constants.milestones, 10**7)))
    require(ascending, "--milestones must be positive and ascending")


def parse(default):
    """The dataclass `default` with what the command line says; a mistake there is a UserError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{3,}", " ", complaint.getvalue())  # without colours and frames
    raise UserError(re.split("Argument helptext|For full helptext", text)[0] + "(see --help)")


def command_line() -> tuple[Arguments, dict[str, Constants]]:
    """The arguments, and the constants of every run by its name, in which each overridden constant shows."""
    arguments, runs = parse(Arguments()), {}
    for experiment in arguments.experiments:
        base = EXPERIMENTS[experiment]
        constants = parse(replace(arguments, constants=base)).constants
        for seed in arguments.seeds or [constants.seed]:
            seeded = replace(constants, seed=seed)
            check_constants(seeded)
            changed = {key: value for key, value in asdict(seeded).items() if value != getattr(base, key)}
            parts = (f"-{k}{'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items())
            runs[experiment + "".join(parts)] = seeded
    return arguments, runs


def pick_hardware(arguments: Arguments) -> tuple[torch.device, torch.dtype]:
    """The device and the precision; under torchrun LOCAL_RANK picks the GPU, and processes may share one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if arguments.device == "auto" else arguments.device
    if arguments.device == "auto" and name == "cpu" and (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        complain("this torch cannot use the NVIDIA GPU that is here: the README tells of builds for older drivers")
    require(there[name], f"--device {name} is not there: use auto or cpu")
    device, native = torch.device(name), name == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it, slowly
        require(native or arguments.precision != "bfloat16", "this GPU has no --precision bfloat16: use float16")
    automatic = "bfloat16" if native else "float16" if name == "cuda" else "float32"
    return device, getattr(torch, automatic if arguments.precision == "auto" else arguments.precision)


def complete(run: str, constants: Constants, data: Cifar10, precision: torch.dtype, arguments: Arguments) -> bool:
    """Train the run unless its file is finished, then evaluate the weights in it; False where that failed."""
    path = arguments.checkpoint_dir / f"{run}.pth"
    try:
        with filelock.FileLock(path.with_name(f".{run}.lock"), timeout=2):
            done = train(path, constants, data, precision, arguments)
        accuracy, took = evaluate(done.network(data.test_labels.device), data), timedelta(seconds=round(done.seconds))
        print(f"{run}: complete, {constants.epochs} epochs in {took} ({done.trained_on}); --fresh trains it anew")
        print(f"{run}: test accuracy {accuracy:.2f}% now, {done.accuracy:.2f}% when trained")
        return True
    except filelock.Timeout:
        complain(f"{run} is being trained by another process: let that one finish it")
    except (UserError, OSError, NotImplementedError) as error:  # the last where a file system has no locks
        complain(f"{run}: {error}")
    except (RuntimeError, MemoryError) as error:
        if not re.search("(?i)out of memory|alloc|MemoryError", repr(error)):
            raise
        complain(f"{run}: too little memory: try a smaller --batch-size")
    return False


def read_all(folder: Path) -> tuple[dict[str, Checkpoint], dict[str, UserError]]:
    """The checkpoints in a folder by name, and why others are refused."""
    checkpoints, refused = {}, {}
    for path in sorted(folder.glob("*.pth")):
        try:
            checkpoints[path.stem] = read_checkpoint(path)
        except UserError as error:
            refused[path.stem] = error
    return checkpoints, refused


def complain(message: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # of a closed pipe, of a signal inside another print
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def stop(number: int, _frame) -> None:
    """Saves are atomic, so a signal may end the process anywhere."""
    if RANK == 0:
        complain(f"stopped by {signal.Signals(number).name}; the same command (without --fresh) continues")
    os._exit(128 + number)


def run_as_script(main: Callable[[], None]) -> None:
    """What the user can mend ends in one line on stderr and exit code 2."""
    sys.stdout, sys.stderr = (stream or io.TextIOWrapper(io.BytesIO()) for stream in (sys.stdout, sys.stderr))  # closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)
    actions = {"SIGINT": stop, "SIGTERM": stop, "SIGPIPE": signal.SIG_DFL}  # SIGPIPE: who read the output has gone
    for name in actions.keys() & vars(signal).keys():  # Windows has no SIGPIPE
        signal.signal(getattr(signal, name), actions[name])
    try:
        main()
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:  # under torchrun all meet the same
        if RANK == 0:
            complain(str(error) or repr(error))
        sys.exit(2)


def main() -> None:
    arguments, runs = command_line()
    device, precision = pick_hardware(arguments)
    folder, images = arguments.checkpoint_dir, arguments.image_dir
    images.mkdir(parents=True, exist_ok=True)
    data = Cifar10(arguments.data_dir, device)
    checkpoints, refused = read_all(folder)
    known = refused.keys() | {run for run, checkpoint in checkpoints.items() if checkpoint.finished}
    missing = [run for run in runs if arguments.fresh or run not in known]
    if WORLD > 1:  # all know what is missing before one trains it
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))
        torch.distributed.barrier()
    if RANK == 0:
        print(f"{hardware_name(device)}, {precision}, torch {torch.__version__}")
        for name in refused.keys() - runs.keys():
            complain(f"{refused[name]}; it is left out of the table")
        report("resnet-56", ResNet(56), replace_conv_with_ghost(ResNet(56)), torch.zeros(1, 3, 32, 32), per_layer=False)
        report("vgg-16", vgg16(), replace_conv_with_ghost(vgg16()), torch.zeros(1, 3, 32, 32), per_layer=False)
    successes = []
    for part in ([run for run in runs if run not in missing], missing):
        successes += [complete(run, runs[run], data, precision, arguments) for run in part[RANK::WORLD]]
        if WORLD > 1:
            torch.distributed.barrier()
        checkpoints, _ = read_all(folder)
        if RANK == 0 and checkpoints and (missing or part is not missing):
            print(results_table(checkpoints), f"pictures in {images}/", sep="\n\n", end="\n\n")
            draw_curves(checkpoints, images / "training_curves.png")
            for run in [run for run in runs if run in checkpoints and checkpoints[run].constants.ratio > 1][:1]:
                draw_ghosts(run, checkpoints[run].network(device), data, images / "ghost_visualization.png")
    sys.exit(0 if all(successes) else 2)


if __name__ == "__main__":
    run_as_script(main)
