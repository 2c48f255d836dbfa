"""GhostNet on CIFAR-10: Ghost-ResNet-56 and Ghost-VGG-16, trained, counted and drawn by one script.

A ghost module replaces a convolution: an ordinary convolution makes a few intrinsic feature maps, and a cheap
depthwise convolution makes the others, their ghosts, from those. The idea, the networks and the numbers to compare
with are those of Han et al., "GhostNet: More Features from Cheap Operations", https://arxiv.org/abs/1911.11907.

    python ghostnet.py                                      the three ghost runs: gr_cosine, gr_multistep, gv_cosine
    python ghostnet.py gr_cosine --epochs 30 --seed 1       one run with other constants, kept in a file of its own
    python ghostnet.py --help                               every constant and its default
    torchrun --nproc-per-node 2 ghostnet.py --seeds 0 1 2   many runs, spread over processes and GPUs

A run continues where it was stopped, and a finished one is evaluated instead of trained again. At the end stand

    resnet-56   flops: 127.93M -> 67.50M (1.90x)    params: 0.86M -> 0.44M (1.95x)
    vgg-16      flops: 314.57M -> 159.22M (1.98x)   params: 14.99M -> 7.65M (1.96x)

in the form of two reports, the Markdown table of all runs in checkpoints/, and the pictures in images/.
"""

import contextlib
import copy
import io
import itertools
import math
import os
import pickle
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import filelock
import matplotlib.figure
import thop
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------ constants


class UserError(ValueError):
    """Something that the user can mend: on the command line it is one line on stderr and exit code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Constants:
    """All that defines a run: runs with equal constants are the same run."""

    network: Literal["resnet20", "resnet32", "resnet56", "vgg16"] = "resnet56"
    """the ordinary network whose convolutions become ghost modules"""
    ratio: int = 2
    """s, all maps / intrinsic maps; 1 keeps the ordinary convolutions"""
    dw_kernel_size: int = 3
    """d, kernel size of the cheap depthwise operation, odd"""
    initialization: Literal["default", "he", "he_zero"] = "default"
    """of the convolutions: PyTorch's, or He's by fan-out; he_zero: and each residual block begins as its shortcut"""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """of the learning rate: cosine to zero, or divided by 10 at each milestone"""
    milestones: tuple[int, ...] = (100, 150)
    """epochs after which the multistep schedule divides the learning rate"""
    epochs: int = 200
    """passes over the training images"""
    warmup_epochs: int = 0
    """of these, the first ones, in which the learning rate rises linearly"""
    lr: float = 0.1
    """learning rate after the warm-up"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = False
    """SGD with Nesterov's momentum"""
    weight_decay: float = 1e-4
    """L2 penalty on the parameters"""
    decay_norm_and_bias: bool = True
    """whether the penalty is also on batch norm and biases"""
    batch_size: int = 128
    """images a step; the short last batch of an epoch is kept"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes"""
    cutout: int = 0
    """side in pixels of the square that is blanked out in each training image"""
    ema: float = 0.0
    """decay a step of the moving average of the weights that is evaluated and kept; 0: the weights themselves"""
    holdout: int = 0
    """last training images to evaluate on in place of the test images, for choosing constants"""
    seed: int = 0
    """of the initialization, the data order and the augmentation"""

    def __post_init__(self):
        ranges = {
            "ratio": (1, 512), "dw_kernel_size": (1, 63), "epochs": (1, 10**6), "warmup_epochs": (0, self.epochs - 1),
            "lr": (1e-9, 1e9), "momentum": (0, 0.9999), "weight_decay": (0, 1e3), "batch_size": (1, 50_000),
            "label_smoothing": (0, 0.9999), "cutout": (0, 32), "ema": (0, 0.999999), "holdout": (0, 49_999),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in ranges.items():
            value, option = getattr(self, name), name.replace("_", "-")
            require(low <= value <= high, f"--{option} must be from {low} to {high}, not {value}")
        require(self.dw_kernel_size % 2 == 1, f"--dw-kernel-size must be odd, not {self.dw_kernel_size}")
        require(self.momentum > 0 or not self.nesterov, "--nesterov needs a --momentum above 0")
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.milestones, 10**7)))
        require(ascending, f"--milestones must be positive and ascending, not {' '.join(map(str, self.milestones))}")

    @property
    def architecture(self) -> str:
        return f"ghost-{self.network} s={self.ratio} d={self.dw_kernel_size}" if self.ratio > 1 else self.network


GR, GV = Constants(), Constants(network="vgg16", weight_decay=5e-4)
BEST = {"nesterov": True}  # the levers that gain more than twice their standard error in benchmarks/ablation.py
EXPERIMENTS = {
    "gr_cosine": GR,
    "gr_multistep": replace(GR, schedule="multistep"),
    "gv_cosine": GV,
    "resnet32": replace(GR, network="resnet32", ratio=1),  # costs what Ghost-ResNet-56 costs
    "resnet56": replace(GR, ratio=1),
    "vgg16": replace(GV, ratio=1),
    "gr_best": replace(GR, **BEST),
    "gv_best": replace(GV, **BEST),
    "resnet32_best": replace(GR, network="resnet32", ratio=1, **BEST),
    "gr_fast": replace(GR, epochs=40, **BEST),
    **{f"gv_d{d}": replace(GV, dw_kernel_size=d) for d in (1, 5, 7)},  # the paper's table 3; d=3 is gv_cosine
    **{f"gv_s{s}": replace(GV, ratio=s) for s in (3, 4, 5)},  # its table 4; s=2 is gv_cosine
    **{f"gr_s{s}": replace(GR, ratio=s) for s in (3, 5)},  # the earlier reproduction's sweep
    **{f"gr_s{s}": replace(GR, ratio=s, dw_kernel_size=5) for s in (10, 20)},
}


@dataclass(frozen=True)
class Arguments:
    """Ghost-ResNet-56 and Ghost-VGG-16 on CIFAR-10. A constant given here overrides that of every named run."""

    experiments: tyro.conf.Positional[tuple[Literal[*EXPERIMENTS], ...]] = ("gr_cosine", "gr_multistep", "gv_cosine")
    """the runs"""
    constants: tyro.conf.OmitArgPrefixes[Constants] = field(default_factory=Constants)
    seeds: tuple[int, ...] = ()
    """every named run once with each of these seeds"""
    data_dir: Path = Path("data")
    """folder of cifar-10-batches-py, which is downloaded when it is missing"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the runs' files"""
    image_dir: Path = Path("images")
    """folder of the pictures"""
    device: str = "auto"
    """cuda, mps, cpu, or auto: the first of these that is there"""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """of the training arithmetic; auto: bfloat16 where it is native, else float16 on CUDA and float32 elsewhere"""
    cuda_graph: bool = True
    """record the training step as one CUDA graph (CUDA only)"""
    fresh: bool = False
    """train from the start, replacing what the run's file holds"""


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels, scaled to [0, 1]
PADDING = 4  # zero pixels on each side, from which the random crop is taken
PICTURE_IMAGE = 12  # test image in the ghost picture: a dog
PICTURE_MODULE = 1  # its ghost module: the first block's first in ResNet-56, the second layer in VGG-16 (figure 4)

# The paper's top-1 accuracy in percent (tables 3, 4 and 5); benchmarks/comparison.py has what others report.
PAPER = {"resnet56": 93.0, "ghost-resnet56 s=2 d=3": 92.7, "vgg16": 93.6, "ghost-vgg16 s=2 d=1": 93.5,
         "ghost-vgg16 s=2 d=3": 93.7, "ghost-vgg16 s=2 d=5": 93.4, "ghost-vgg16 s=2 d=7": 93.1,
         "ghost-vgg16 s=3 d=3": 93.4, "ghost-vgg16 s=4 d=3": 93.0, "ghost-vgg16 s=5 d=3": 92.9}

# --------------------------------------------------------------------------------------------------- ghost module


class GhostModule(nn.Module):
    """Drop-in for nn.Conv2d that makes a part of its feature maps by a cheap operation (paper, section 3.1).

    Takes the arguments of nn.Conv2d, which shape the primary convolution, and two more:
        ratio: s >= 1; ceil(out_channels / s) maps are intrinsic, the others their ghosts
        dw_kernel_size: d, odd; kernel of the depthwise convolution that makes the ghosts from the intrinsic maps
    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W') as nn.Conv2d. With groups, the number of intrinsic
    maps is rounded up to a multiple of groups. There is no normalization or activation inside: the network's follow.
    Raises ValueError for a ratio below 1, an even dw_kernel_size, and whatever nn.Conv2d refuses.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", device=None, dtype=None, *, ratio=2, dw_kernel_size=3):
        super().__init__()
        require(isinstance(ratio, int) and ratio >= 1, f"ratio must be an integer from 1, not {ratio}")
        odd = isinstance(dw_kernel_size, int) and dw_kernel_size > 0 and dw_kernel_size % 2 == 1
        require(odd, f"dw_kernel_size must be odd and positive, not {dw_kernel_size}")
        self.out_channels, self.ratio, self.dw_kernel_size = out_channels, ratio, dw_kernel_size
        require(isinstance(groups, int) and groups > 0, f"groups must be a positive integer, not {groups}")
        require(out_channels % groups == 0, f"out_channels must be divisible by groups, not {out_channels} by {groups}")
        both = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        intrinsic = -(-out_channels // (ratio * groups)) * groups
        self.primary_conv = nn.Conv2d(in_channels, intrinsic, kernel_size, stride, padding, dilation, groups, **both)
        if ratio > 1:
            ghosts, padding = intrinsic * (ratio - 1), dw_kernel_size // 2
            self.cheap_operation = nn.Conv2d(
                intrinsic, ghosts, dw_kernel_size, padding=padding, groups=intrinsic, **both
            )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.primary_conv(x)
        if self.ratio > 1:
            ghosts = self.cheap_operation(maps)
            maps = torch.cat([maps, ghosts.narrow(-3, 0, self.out_channels - self.primary_conv.out_channels)], dim=-3)
        return maps


def replace_conv_with_ghost(
    model: nn.Module,
    ratio: int = 2,
    dw_kernel_size: int = 3,
    keep: Collection[str] | Callable[[str, nn.Conv2d], bool] = (),
) -> nn.Module:
    """Replace every dense nn.Conv2d inside `model` by a GhostModule, in place, and return the model.

    Kernel, stride, padding, dilation, device, dtype, mode and requires_grad stay; the weights start anew. A bias stays
    too, except before a batch norm, which cancels it. Grouped and depthwise convolutions, subclasses of nn.Conv2d and
    the insides of ghost modules are left alone, and so is what to `keep`: a collection of names of layers, each with
    all that it contains, or a function of name and convolution. Raises ValueError or TypeError, the model unchanged,
    for bad arguments, a ratio above a layer's out_channels, a lazy convolution, and when there is nothing to replace.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    kept = keep
    if not callable(keep):
        if isinstance(keep, str) or not isinstance(keep, Collection):
            raise TypeError(f"keep must be a collection of layer names or a function, not {keep!r}")
        unknown = set(keep) - {name for name, _ in modules}
        require(not unknown, f"keep names layers that the model has not: {', '.join(sorted(map(str, unknown)))}")
        kept = lambda name, _conv: any(f"{name}.".startswith(f"{layer}.") for layer in keep)  # noqa: E731
    inside = tuple(f"{name}." if name else "" for name, module in modules if isinstance(module, GhostModule))
    uses = {}  # of each dense convolution: the names of its places and what follows there
    for (name, conv), (_, follower) in itertools.pairwise([*modules, ("", None)]):
        dense = name and type(conv) in (nn.Conv2d, nn.LazyConv2d) and conv.groups == 1
        if dense and not name.startswith(inside):
            uses.setdefault(conv, {})[name] = follower
    places = {}  # a convolution used in several places becomes one ghost module in as many
    for conv, followers in uses.items():
        if any(kept(name, conv) for name in followers):
            continue
        name = next(iter(followers))
        require(type(conv) is nn.Conv2d, f"{name} is a lazy convolution: run a batch through the model first")
        norms = [isinstance(f, nn.BatchNorm2d) and f.num_features == conv.out_channels for f in followers.values()]
        try:
            require(ratio <= conv.out_channels, f"it has {conv.out_channels} channels: lower ratio {ratio} or keep it")
            ghost = GhostModule(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                conv.groups, conv.bias is not None and not all(norms), conv.padding_mode, conv.weight.device,
                conv.weight.dtype, ratio=ratio, dw_kernel_size=dw_kernel_size
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"{name} cannot be replaced: {error}") from None
        ghost.train(conv.training).requires_grad_(conv.weight.requires_grad)
        places |= dict.fromkeys(followers, ghost)
    require(bool(places), "the model holds no dense nn.Conv2d to replace")
    for name, ghost in places.items():
        model.set_submodule(name, ghost)
    return model


# ------------------------------------------------------------------------------------------------------- networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 projection where the shape changes (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers in stages of 16, 32 and 64 channels: (N, 3, 32, 32) -> logits (N, 10).

    ResNet(56) has 855,770 parameters, and 439,914 with ghost modules (s=2, d=3). Raises ValueError for another depth.
    """

    def __init__(self, depth: int):
        super().__init__()
        require(depth % 6 == 2 and depth > 2, f"the depth of a ResNet must be 6n + 2, not {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, in_channels = [], 16
        for out_channels in (16, 32, 64):
            for _ in range(depth // 6):
                blocks.append(BasicBlock(in_channels, out_channels, stride=out_channels // in_channels))
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
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
    classifier = [nn.Dropout(), nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, 10)]
    parts = OrderedDict(features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=nn.Sequential(*classifier))
    return nn.Sequential(parts)


NETWORKS = {f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 56)} | {"vgg16": vgg16}


def build_network(constants: Constants) -> nn.Module:
    model, ratio, d = NETWORKS[constants.network](), constants.ratio, constants.dw_kernel_size
    if ratio > 16 and constants.network != "vgg16":  # of a layer of 16 channels, one is intrinsic at least
        replace_conv_with_ghost(model, 16, d, keep=lambda _name, conv: conv.out_channels > 16)
    return replace_conv_with_ghost(model, ratio, d) if ratio > 1 else model


def initialize(model: nn.Module, how: str) -> None:
    """He's normal initialization by fan-out, in which a depthwise kernel counts its own maps only (He et al., 2015)."""
    for module in model.modules() if how != "default" else ():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.numel() / module.in_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif how == "he_zero" and isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)


# ----------------------------------------------------------------------------------------------------------- data


class Cifar10:
    """CIFAR-10 as uint8 tensors on the device; batches are cropped, mirrored and normalized there by indexing."""

    def __init__(self, root: Path, device: torch.device):
        folder = root / torchvision.datasets.CIFAR10.base_folder
        missing = not folder.exists()
        try:
            train, test = (torchvision.datasets.CIFAR10(root, part, download=missing) for part in (True, False))
        except Exception as error:  # a RuntimeError for damage, all kinds for a download that fails
            damaged = f"{folder} is damaged or incomplete: delete it, and the next start downloads it again"
            absent = f"CIFAR-10 is not in {root} and cannot be downloaded ({error}): give its folder by --data-dir"
            raise UserError(absent if missing else damaged) from None
        self.classes = test.classes
        self.train_images = F.pad(torch.from_numpy(train.data), (0, 0, *[PADDING] * 4)).to(device)  # (50000, 40, 40, 3)
        self.test_images = torch.from_numpy(test.data).to(device)  # (10000, 32, 32, 3)
        self.train_labels, self.test_labels = (torch.tensor(part.targets, device=device) for part in (train, test))
        self.mean, self.std = (255 * torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD))

    def hold_out(self, n: int) -> "Cifar10":
        """The data with the last n training images in the place of the test images."""
        if n == 0:
            return self
        part, kept = copy.copy(self), len(self.train_images) - n
        require(kept > 0, f"--holdout must leave some of the {len(self.train_images)} training images, not {n}")
        part.train_images, held = self.train_images.split([kept, n])
        part.train_labels, part.test_labels = self.train_labels.split([kept, n])
        part.test_images = held[:, PADDING:-PADDING, PADDING:-PADDING]
        return part

    def epoch_plan(self, cutout: bool = False) -> Tensor:
        """The random choices of one epoch, a row an image: its index, top and left of the crop, whether it is mirrored,
        and where it is cut out, row and column of the centre; (N, 4 or 6), on the CPU."""
        n = len(self.train_images)
        top, left = torch.randint(2 * PADDING + 1, (2, n))
        plan = torch.stack([torch.randperm(n), top, left, torch.randint(2, (n,))], dim=1)
        return torch.cat([plan, torch.randint(32, (n, 2))], dim=1) if cutout else plan

    def train_batch(self, plan: Tensor, cutout: int = 0) -> tuple[Tensor, Tensor]:
        """The augmented images (n, 3, 32, 32) and labels (n,) for n rows of the plan."""
        index, top, left, mirrored = plan[:, :4].unbind(1)
        span = torch.arange(32, device=plan.device)
        rows = top[:, None] + span
        columns = left[:, None] + torch.where(mirrored[:, None] == 1, 31 - span, span)
        images = self.train_images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = self.normalize(images)
        if cutout:  # a square around a random pixel, cut off at the border (DeVries and Taylor, 2017)
            offset = span - plan[:, 4:, None] + cutout // 2
            y, x = ((offset >= 0) & (offset < cutout)).unbind(1)
            images = images.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0)
        return images, self.train_labels[index]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (n, 32, 32, 3) -> float (n, 3, 32, 32) in channels_last order, zero mean and unit std."""
        return (images.permute(0, 3, 1, 2) - self.mean) / self.std


# ---------------------------------------------------------------------------------------------------- checkpoints

VERSION = 1  # of a checkpoint's layout
SAVE_SECONDS = 10  # between saves at least, where epochs are so short that saving each would take a good part of them


def write_atomically(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write beside and rename, so that a kill or a full disk leaves the previous file whole."""
    beside, content = path.with_name(f"{path.name}.tmp"), io.BytesIO()
    write(content)
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): what it held is kept") from None


@contextlib.contextmanager
def reading(path: Path):
    """Whatever is wrong with a checkpoint is one clear line, and the file stays as it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain data and is not loaded: move it away") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is no whole checkpoint of this script ({reason}): move it away") from None


def read_checkpoint(path: Path) -> dict:
    """The checkpoint, on the CPU. Raises UserError where it is damaged, holds more than data, or is too new."""
    with reading(path):
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:  # torch.load leaves the checksums that torch.save wrote unread
            damaged = archive.testzip()
        require(damaged is None, f"damaged (checksum of {damaged}): move it away")
        content.seek(0)
        checkpoint = dict(torch.load(content, map_location="cpu", weights_only=True))
        newer = checkpoint["version"] > VERSION
        require(not newer, f"version {checkpoint['version']} is newer than {VERSION}: update this script")
        checkpoint["constants"] = constants = Constants(**checkpoint["constants"])
        hash(constants)  # a TypeError where a constant is of another kind
        itemgetter("run", "hardware", "precision", "torch", "date")(checkpoint)  # a KeyError where one is missing
        for record in checkpoint["history"]:
            itemgetter("epoch", "lr", "loss", "train_accuracy", "test_accuracy", "seconds")(record)
        require(len(checkpoint["history"]) <= constants.epochs, "more epochs than its run has: move it away")
        with torch.device("meta"):
            network = build_network(constants).state_dict()
        shapes = [{k: v.shape for k, v in weights.items()} for weights in (network, checkpoint.get("model", network))]
        require(shapes[0] == shapes[1], "the weights of another network: move it away")
        checkpoint["finished"] = len(checkpoint["history"]) == constants.epochs
        require("mirrored_accuracy" in checkpoint or not checkpoint["finished"], "no mirrored_accuracy: move it away")
        checkpoint["seconds"] = sum(record["seconds"] for record in checkpoint["history"])
        checkpoint["accuracy"] = checkpoint["history"][-1]["test_accuracy"]
    return checkpoint


def load_checkpoint(path: Path, constants: Constants) -> dict | None:
    """The checkpoint of the run with these constants; None where there is no file."""
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path)
    ours, theirs = asdict(constants), asdict(checkpoint["constants"])
    other = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]
    remedy = "--fresh replaces it, another --checkpoint-dir keeps it"
    require(not other, f"{path} was trained with other constants ({'; '.join(other)}): {remedy}")
    return checkpoint


def load_network(path: Path, checkpoint: dict, device: torch.device) -> nn.Module:
    """The network in training form with the checkpoint's weights, float32 and channels_last on the device."""
    model = build_network(checkpoint["constants"])
    with reading(path):
        model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- training


SIGNALS = []  # numbers of the SIGINT and SIGTERM that came


def check_signals() -> None:
    """Stop at a step boundary, where nothing is half done."""
    if SIGNALS:
        name = signal.Signals(SIGNALS[0]).name
        print(f"ghostnet.py: stopped by {name}; the same command (without --fresh) continues", file=sys.stderr)
        sys.exit(128 + SIGNALS[0])


def pick_device(name: str) -> torch.device:
    """The device of --device; under torchrun LOCAL_RANK picks the GPU, and processes may share one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        require(device.type in ("cuda", "mps", "cpu"), f"--device must be auto, cuda, mps or cpu, not {name}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not there ({str(error).splitlines()[0]}): use auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # a T4 emulates bfloat16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, threads = torch.cpu.get_capabilities().get("cpu_name", platform.machine()), torch.get_num_threads()
    return f"{name} {device.type.upper()}, {threads} thread{'s' * (threads > 1)}"


def duration(seconds: float) -> str:
    unit, length = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 60 else ("s", 1)
    return f"{seconds / length:.1f} {unit}"


def learning_rate(c: Constants, epoch: int) -> float:
    """Learning rate of an epoch, which are counted from 0 here."""
    if epoch < c.warmup_epochs:
        return c.lr * (epoch + 1) / (c.warmup_epochs + 1)
    if c.schedule == "multistep":
        return c.lr * 0.1 ** sum(epoch >= milestone for milestone in c.milestones)
    done = (epoch - c.warmup_epochs) / (c.epochs - c.warmup_epochs)
    return c.lr * (1 + math.cos(math.pi * done)) / 2


def evaluate(model: nn.Module, data: Cifar10, precision: torch.dtype = torch.float32, mirrored: bool = False) -> float:
    """Top-1 accuracy in percent on the test images; `mirrored`: by the summed logits of each and its mirror image."""
    model.eval()
    device = data.test_labels.device
    size = 250 if device.type == "cpu" else 2000  # what a CPU's cache holds, and what fills a GPU
    correct = torch.zeros((), dtype=torch.long, device=device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for images, labels in zip(data.test_images.split(size), data.test_labels.split(size), strict=True):
            check_signals()
            images = data.normalize(images)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(images) + model(images.flip(3)) if mirrored else model(images)
            correct += (logits.argmax(1) == labels).sum()
    return 100 * correct.item() / len(data.test_labels)


class TrainingStep:
    """A network, its SGD, and one step of training on the device: augment, forward, backward, update."""

    def __init__(self, constants: Constants, data: Cifar10, precision: torch.dtype):
        device = data.train_labels.device
        self.constants, self.data, self.precision = constants, data, precision
        self.model = build_network(constants)
        initialize(self.model, constants.initialization)
        self.model.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model) if constants.ema else self.model
        self.values, self.averages = (
            [value for value in model.state_dict().values() if value.is_floating_point()]
            for model in (self.model, self.average)
        )
        self.lr = torch.tensor(constants.lr, device=device)  # a tensor, so that a recorded step sees it change
        weights, others = [], []  # batch norms and biases are vectors
        for parameter in self.model.parameters():
            (weights if parameter.ndim > 1 or constants.decay_norm_and_bias else others).append(parameter)
        groups = [{"params": weights, "weight_decay": constants.weight_decay}, {"params": others}]
        options = {"momentum": constants.momentum, "nesterov": constants.nesterov, "fused": True}
        self.optimizer = torch.optim.SGD(groups, self.lr, **options)
        for parameter in self.model.parameters():  # torch leaves it undefined if float16 overflows in the first step
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.tally = torch.zeros(2, device=device)  # summed loss and hits, read once an epoch: a look makes a GPU wait

    def __call__(self, plan: Tensor) -> None:
        images, labels = self.data.train_batch(plan, self.constants.cutout)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.constants.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.constants.ema:
            get_ema_multi_avg_fn(self.constants.ema)(self.averages, self.values, None)
        self.tally += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])


class CudaGraphStep:
    """The same step as one CUDA graph. A reader may skip it: it changes the speed and nothing else.

    These networks are bound by kernel launches, and a recorded step launches once. The first full batches run plainly,
    while cudnn chooses its kernels; then the step is recorded, which executes nothing, and from there on replayed. Plan
    and learning rate reach the recorded kernels through tensors that keep their place. A batch of another size, the
    last of an epoch, runs plainly.
    """

    def __init__(self, step: TrainingStep):
        self.step, self.graph, self.plain_steps = step, None, 5
        columns = 6 if step.constants.cutout else 4
        self.plan = torch.zeros(step.constants.batch_size, columns, dtype=torch.long, device="cuda")

    def __call__(self, plan: Tensor) -> None:
        if self.graph is None and len(plan) == len(self.plan):
            self.plain_steps -= 1
            if self.plain_steps < 0:
                self.record()
        if self.graph is None or len(plan) != len(self.plan):
            return self.step(plan)
        self.plan.copy_(plan)
        self.graph.replay()

    def record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step(self.plan)
            self.graph = graph
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            print(f"ghostnet.py: no CUDA graph, training goes on without it ({reason})", file=sys.stderr)
            self.plain_steps = math.inf


def train(run: str, constants: Constants, data: Cifar10, arguments: Arguments) -> dict:
    """Train a run from where its checkpoint stands, or from the start, to the last epoch; returns that checkpoint."""
    device, path = data.train_images.device, arguments.checkpoint_dir / f"{run}.pth"
    precision = pick_precision(arguments.precision, device)
    checkpoint = None if arguments.fresh else load_checkpoint(path, constants)
    if checkpoint and checkpoint["finished"]:
        return checkpoint
    torch.manual_seed(constants.seed)
    step = plain_step = TrainingStep(constants, data, precision)
    if device.type == "cuda" and arguments.cuda_graph:
        step = CudaGraphStep(plain_step)
    model, average, optimizer = plain_step.model, plain_step.average, plain_step.optimizer
    stateful = {"model": model, "average": average, "optimizer": optimizer, "scaler": plain_step.scaler}
    rng = {"cpu": torch} if device.type == "cpu" else {"cpu": torch, device.type: getattr(torch, device.type)}
    history = []
    if checkpoint:
        with reading(path):
            history = checkpoint["history"]
            for name, value in stateful.items():
                if checkpoint[name]:  # a scaler's is empty where the precision needed none
                    value.load_state_dict(checkpoint[name])
            for name in rng.keys() & checkpoint["rng"].keys():
                rng[name].set_rng_state(checkpoint["rng"][name])
        for group in optimizer.param_groups:
            group["lr"] = plain_step.lr
    n, saved, due = len(data.train_labels), len(history), -math.inf
    progress = {"desc": run, "initial": len(history) * n, "total": constants.epochs * n, "unit": "img"}
    quiet = True if "RANK" in os.environ else None  # None: tqdm asks whether there is a terminal
    with tqdm(**progress, unit_scale=True, disable=quiet) as bar:
        for epoch in range(len(history) + 1, constants.epochs + 1):
            start, lr = time.perf_counter(), learning_rate(constants, epoch - 1)
            model.train()
            plain_step.lr.fill_(lr)
            plain_step.tally.zero_()
            for plan in data.epoch_plan(constants.cutout > 0).to(device).split(constants.batch_size):
                check_signals()
                step(plan)
                bar.update(len(plan))
            loss, train_accuracy = (plain_step.tally / n).tolist()
            speed = n / (time.perf_counter() - start)
            finished = epoch == constants.epochs
            if finished:
                average.half().float()  # the file will hold float16: what is measured is what that can do
            floats = [value for value in average.state_dict().values() if value.is_floating_point()]
            if not math.isfinite(loss + torch.nn.utils.get_total_norm(floats)):
                kept = f"{path} keeps epoch {saved}" if saved else "nothing was saved"
                raise UserError(f"{run}: the loss is not finite in epoch {epoch}; {kept}: try a smaller --lr")
            test_accuracy = evaluate(average, data, torch.float32 if finished else precision)
            seconds = time.perf_counter() - start
            history.append({"epoch": epoch, "lr": lr, "loss": loss, "train_accuracy": 100 * train_accuracy,
                            "test_accuracy": test_accuracy, "seconds": seconds})
            if finished or time.perf_counter() >= due:
                checkpoint = {"version": VERSION, "run": run, "constants": asdict(constants), "history": history,
                              "hardware": hardware_name(device), "precision": str(precision).removeprefix("torch."),
                              "torch": str(torch.__version__), "date": date.today().isoformat()}
                if finished:
                    checkpoint["mirrored_accuracy"] = evaluate(average, data, mirrored=True)
                    weights = average.state_dict()
                    checkpoint["model"] = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
                else:
                    checkpoint |= {name: value.state_dict() for name, value in stateful.items()}
                    checkpoint["rng"] = {name: module.get_rng_state() for name, module in rng.items()}
                write_atomically(path, partial(torch.save, checkpoint))
                saved, due = epoch, time.perf_counter() + SAVE_SECONDS
            left = duration((constants.epochs - epoch) * seconds)
            line = f"epoch {epoch}/{constants.epochs}, loss {loss:.4f}, train {100 * train_accuracy:.2f}%, "
            line += f"{'held out' if constants.holdout else 'test'} {test_accuracy:.2f}%"
            bar.set_postfix_str(line)
            if bar.disable:
                print(f"{run}: {line}, {speed:,.0f} img/s, {left} left", flush=True)
            if epoch == 1 and (constants.epochs - 1) * seconds > 3600:
                tqdm.write(f"{run}: {constants.epochs} epochs take about {left} here; --epochs sets a shorter schedule")
    return read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ report and table


def count(model: nn.Module, *inputs) -> dict[str, tuple[float, float]]:
    """FLOPs (multiply-adds, as in the paper) and parameters of every module by name, "" for the whole (by thop)."""
    flops, params, tree = thop.profile(model, inputs=inputs, verbose=False, ret_layer_info=True)
    counts = {"": (flops, params)}

    def walk(prefix: str, children: dict) -> None:
        for name, (flops, params, grandchildren) in children.items():
            counts[prefix + name] = flops, params
            walk(f"{prefix}{name}.", grandchildren)

    walk("", tree)
    return counts


def report(name: str, ordinary: nn.Module, ghost: nn.Module, *inputs, per_layer: bool = True) -> None:
    """Print FLOPs and parameters of a network and of the same network with ghost modules, for one pass of inputs."""
    before, after = count(ordinary, *inputs), count(ghost, *inputs)
    if per_layer:
        for layer in (layer for layer, module in ghost.named_modules() if isinstance(module, GhostModule)):
            (f0, p0), (f1, p1) = before[layer], after[layer]
            print(f"{layer}: flops {f0 / 1e6:.2f}M -> {f1 / 1e6:.2f}M, params {p0:,.0f} -> {p1:,.0f}")
    (f0, p0), (f1, p1) = before[""], after[""]
    for title, f, p in ((f"standard {name}", f0, p0), (f"ghost-{name}", f1, p1)):
        print(f"measuring {title}...\n  flops: {f / 1e6:.2f}M\n  params: {p / 1e6:.2f}M\n")
    print(f"results:\n  flops reduction: {f0 / f1:.2f}x (paper claims ~2x)")
    print(f"  param reduction: {p0 / p1:.2f}x (paper claims ~2x)\n")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (n)."""
    mean, n = f"{statistics.mean(values):.2f}", len(values)
    return mean if n == 1 else f"{mean} ± {statistics.stdev(values):.2f} (n={n})"


def by_run(checkpoints: list[dict]) -> list[tuple[Constants, list[dict]]]:
    """The checkpoints of each run with all its seeds."""
    groups = {}
    for checkpoint in checkpoints:
        groups.setdefault((replace(checkpoint["constants"], seed=0), len(checkpoint["history"])), []).append(checkpoint)
    return [(constants, seeds) for (constants, _), seeds in groups.items()]


def markdown(rows: list[dict]) -> str:
    """The Markdown table of rows with the same keys."""
    lines = [row.keys() for row in rows[:1]] + [["---"] * len(row) for row in rows[:1]] + [r.values() for r in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def results_table(checkpoints: list[dict]) -> str:
    """The Markdown table of all runs; the seeds of one run share a row as mean ± standard deviation (n)."""
    rows = []
    for number, (c, seeds) in enumerate(by_run(checkpoints), start=1):
        flops, params = count(build_network(c), torch.zeros(1, 3, 32, 32))[""]
        epochs, mirrored = len(seeds[0]["history"]), [s["mirrored_accuracy"] for s in seeds if s["finished"]]
        rows.append({
            "no.": number,
            "network": c.architecture.split()[0],
            "ratio(s)": c.ratio if c.ratio > 1 else "–",
            "kernel(d)": c.dw_kernel_size if c.ratio > 1 else "–",
            "optimizer": "SGD",
            "lr_scheduler": "CosineAnnealing" if c.schedule == "cosine" else f"MultiStepLR{c.milestones}",
            "measured on": f"{c.holdout} held out" if c.holdout else "test",
            "accuracy(ours), last epoch": spread([seed["accuracy"] for seed in seeds]),
            "with mirrored view": spread(mirrored) if mirrored else "–",
            "best epoch, chosen by looking": spread([max(r["test_accuracy"] for r in s["history"]) for s in seeds]),
            "accuracy(paper)": PAPER.get(c.architecture, "–"),
            "params": f"{params / 1e6:.2f}M",
            "MACs": f"{flops / 1e6:.1f}M",
            "epochs": epochs if epochs == c.epochs else f"{epochs} of {c.epochs}",
            "trained on": seeds[0]["hardware"],
            "time": duration(statistics.mean(seed["seconds"] for seed in seeds)),
            "file": f"{seeds[0]['run']}.pth",
        })
    return markdown(rows)


# ------------------------------------------------------------------------------------------------------- pictures


def draw_ghosts(run: str, model: nn.Module, data: Cifar10, path: Path) -> None:
    """One test image and the intrinsic maps, learned kernels and ghosts of one ghost module (paper, figure 4)."""
    name, module = [(n, m) for n, m in model.named_modules() if isinstance(m, GhostModule)][PICTURE_MODULE]
    outputs = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].float().cpu()))
    model.eval()
    with torch.inference_mode():
        logits = model(data.normalize(data.test_images[PICTURE_IMAGE, None]))
    hook.remove()
    probability, predicted = logits[0].softmax(0).max(0)
    m = module.primary_conv.out_channels
    intrinsic, ghosts = outputs[0][:m], outputs[0][m:]
    kernels = module.cheap_operation.weight.detach()[:, 0].float().cpu()
    columns, limit = min(8, len(ghosts)), kernels.abs().max()

    figure = matplotlib.figure.Figure(figsize=(15, 5.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.6))
    photo = left.subplots()
    photo.imshow(data.test_images[PICTURE_IMAGE].cpu())
    photo.set_title(f"test image {PICTURE_IMAGE}: {data.classes[data.test_labels[PICTURE_IMAGE]]}", fontsize=13)
    photo.set_xlabel(f"predicted: {data.classes[predicted]} ({100 * probability:.1f}%)", fontsize=13)
    photo.set(xticks=[], yticks=[])
    grid = right.subplots(3, columns, squeeze=False)
    for i in range(columns):
        source, d = intrinsic[i // (module.ratio - 1)], module.dw_kernel_size
        correlation = torch.corrcoef(torch.stack([source.flatten(), ghosts[i].flatten()]))[0, 1]
        grid[0, i].imshow(source, cmap="gray")
        kernel = grid[1, i].imshow(kernels[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
        grid[2, i].imshow(ghosts[i], cmap="gray")
        grid[2, i].set_xlabel(f"correlation\n{correlation:+.2f}", fontsize=11)
        titles = ("intrinsic map\n(primary_conv)", f"{d}×{d} kernel\n(depthwise)", "ghost map\n(cheap_operation)")
        for axes, title, color in zip(grid[:, i], titles, ("C0", "black", "C2"), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=color, linewidth=2)
            if i == 0:
                axes.set_ylabel(title, color=color, fontsize=12)
    right.colorbar(kernel, ax=grid[1, :], aspect=12)
    right.suptitle(f"{run}, layer {name}: {columns} of its {len(ghosts)} ghosts", fontsize=13)
    write_atomically(path, partial(figure.savefig, dpi=150))


def draw_curves(checkpoints: list[dict], path: Path) -> None:
    """Test accuracy and training loss of every run by epoch, with the paper's accuracies as lines."""
    figure = matplotlib.figure.Figure(figsize=(13, 5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for checkpoint in checkpoints:
        epochs = [record["epoch"] for record in checkpoint["history"]]
        for axes, key in ((accuracy, "test_accuracy"), (loss, "loss")):
            axes.plot(epochs, [record[key] for record in checkpoint["history"]], label=checkpoint["run"])
    for name in sorted(PAPER.keys() & {checkpoint["constants"].architecture for checkpoint in checkpoints}):
        label = f"paper, {name}: {PAPER[name]}%"
        accuracy.axhline(PAPER[name], linestyle="--", linewidth=1, color="0.4", label=label)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    accuracy.legend(loc="lower right")
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    write_atomically(path, partial(figure.savefig, dpi=150))


# ----------------------------------------------------------------------------------------------------------- main


def parse(default):
    """The dataclass `default` with what the command line says; a mistake there is a UserError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    boxed = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()).splitlines()[1:]  # title, text, hints
    text = " ".join(line.strip("│╰╯─ ") for line in boxed)
    text = re.split("Argument helptext|For full helptext", text)[0].removeprefix("Error parsing constants: ")
    raise UserError(f"{text.strip()}; see --help")


def command_line() -> tuple[Arguments, dict[str, Constants]]:
    """The arguments, and the constants of every run by its name, in which each overridden constant shows."""
    arguments = parse(Arguments())
    runs = {}
    for experiment in arguments.experiments:
        constants = parse(replace(arguments, constants=EXPERIMENTS[experiment])).constants
        with torch.device("meta"):  # refuses what the network cannot be, before anything starts
            build_network(constants)
        for seed in arguments.seeds or [constants.seed]:
            seeded, base = replace(constants, seed=seed), EXPERIMENTS[experiment]
            changed = {key: value for key, value in asdict(seeded).items() if value != getattr(base, key)}
            parts = (f"-{k}{'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items())
            run = experiment + "".join(parts)
            require(len(run) <= 200, "the overridden constants make too long a file name: edit them in EXPERIMENTS")
            runs[run] = seeded
    return arguments, runs


def prepare_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): name another folder by {option}") from None


def complete(run: str, constants: Constants, data: Cifar10, arguments: Arguments) -> None:
    """Train the run unless its file is finished, then evaluate the weights in that file, and say what came out."""
    path, data = arguments.checkpoint_dir / f"{run}.pth", data.hold_out(constants.holdout)
    try:
        with filelock.FileLock(path.with_name(f".{run}.lock"), timeout=0):
            done = train(run, constants, data, arguments)
    except filelock.Timeout:
        raise UserError(f"{run} is being trained by another process: let that one finish it") from None
    how = f"{done['hardware']}, {done['precision']}, torch {done['torch']}, {done['date']}"
    print(f"{run}: complete, {constants.epochs} epochs in {duration(done['seconds'])} ({how}); --fresh trains it anew")
    what = "held-out" if constants.holdout else "test"
    if "model" in done:
        accuracy = evaluate(load_network(path, done, data.test_images.device), data)
        print(f"{run}: {what} accuracy {accuracy:.2f}% now, {done['accuracy']:.2f}% when trained", flush=True)
    else:
        print(f"{run}: {what} accuracy {done['accuracy']:.2f}% when trained; the file holds no weights", flush=True)


def summarize(runs: dict[str, Constants], data: Cifar10, arguments: Arguments) -> None:
    """Print the reports and the table of all runs in the checkpoint folder, and draw the pictures."""
    image = torch.zeros(1, 3, 32, 32)
    report("resnet-56", ResNet(56), replace_conv_with_ghost(ResNet(56)), image, per_layer=False)
    report("vgg-16", vgg16(), replace_conv_with_ghost(vgg16()), image, per_layer=False)
    checkpoints = {}
    for path in sorted(arguments.checkpoint_dir.glob("*.pth")):
        try:
            checkpoints[path.stem] = read_checkpoint(path)
        except UserError as error:
            if path.stem not in runs:  # else it has been said
                print(f"ghostnet.py: left out of the table: {error}", file=sys.stderr)
    print(results_table(list(checkpoints.values())), end="\n\n")
    if tested := [checkpoint for checkpoint in checkpoints.values() if not checkpoint["constants"].holdout]:
        path = arguments.image_dir / "training_curves.png"
        draw_curves(tested, path)
        print(f"saved {path}")
    ghosts = [run for run, constants in runs.items() if constants.ratio > 1 and run in checkpoints]
    for run in [run for run in ghosts if checkpoints[run]["finished"] and "model" in checkpoints[run]][:1]:
        file, path = arguments.checkpoint_dir / f"{run}.pth", arguments.image_dir / "ghost_visualization.png"
        draw_ghosts(run, load_network(file, checkpoints[run], data.test_images.device), data, path)
        print(f"saved {path}")


def run_as_script(main: Callable[[], None]) -> None:
    """What the user can mend ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before training began
        sys.exit(128 + signal.SIGINT)


def main() -> None:
    arguments, runs = command_line()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device = pick_device(arguments.device)
    prepare_folder(arguments.checkpoint_dir, "--checkpoint-dir")
    prepare_folder(arguments.image_dir, "--image-dir")
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=365))
    if rank > 0:  # the first process downloads, the others wait
        dist.barrier()
    data = Cifar10(arguments.data_dir, device)
    if rank == 0 and world > 1:
        dist.barrier()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: SIGNALS.append(number))
    failed = 0
    for run, constants in list(runs.items())[rank::world]:
        try:
            complete(run, constants, data, arguments)
        except UserError as error:  # the other runs go on
            print(f"ghostnet.py: {error}", file=sys.stderr, flush=True)
            failed += 1
    if world > 1:  # the first process waits for all before it prints the table
        total = torch.tensor(failed)
        try:
            dist.all_reduce(total)
        except RuntimeError:
            raise UserError("another process ended early; the same command continues") from None
        failed = total.item()
    if rank == 0:
        summarize(runs, data, arguments)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run_as_script(main)
