"""GhostNet on CIFAR-10: Ghost-ResNet-56 and Ghost-VGG-16, trained, counted and drawn by one script.

In a ghost module an ordinary convolution makes a few intrinsic feature maps, and a cheap depthwise
convolution makes the others, their ghosts, from those: Han et al., "GhostNet: More Features from
Cheap Operations", https://arxiv.org/abs/1911.11907.

    python ghostnet.py                                   the three ghost runs that are shipped
    python ghostnet.py gr_cosine --epochs 30 --seed 1    one run with other constants

It shows what is trained, trains what is missing, draws pictures, prints a table and two reports:

    resnet-56   flops: 127.93M -> 67.50M (1.90x)    params: 0.86M -> 0.44M (1.95x)
    vgg-16      flops: 314.57M -> 159.22M (1.98x)   params: 14.99M -> 7.65M (1.96x)
"""

import importlib.util
import io
import math
import os
import platform
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Literal

if importlib.util.find_spec("matplotlib_inline") is None:
    os.environ.pop("MPLBACKEND", None)  # a notebook's, without which matplotlib cannot be imported

import filelock
import matplotlib.style
import thop
import torch
import torch.nn.functional as F
import torchvision
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm


# ---------- constants
@dataclass(frozen=True)
class Constants:
    """All that defines a run: edit a default here, or give it as an option."""

    network: Literal["resnet32", "resnet56", "vgg16"] = "resnet56"  # that becomes a ghost network
    ratio: int = 2  # s, all maps / intrinsic maps; 1 keeps the ordinary convolutions
    dw_kernel_size: int = 3  # d, kernel size of the cheap depthwise operation, odd
    schedule: Literal["cosine", "multistep"] = "cosine"  # cosine to zero, or steps down
    milestones: tuple[int, ...] = (100, 150)  # epochs after which multistep divides lr by 10
    epochs: int = 200  # passes over the training images
    lr: float = 0.1  # learning rate at the start
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = 5e-4  # L2 penalty on all parameters but the cheap kernels
    cheap_weight_decay: float = 0.0  # L2 penalty on the cheap kernels; 5e-4 empties many ghosts
    batch_size: int = 128  # images a step; the short last batch of an epoch is kept
    seed: int = 0  # of the initialization, the data order and the augmentation

    @property
    def architecture(self) -> str:
        """Its name, with s and d where they are not the paper's 2 and 3."""
        if self.ratio == 1:
            return self.network
        s = "" if self.ratio == 2 else f" s={self.ratio}"
        d = "" if self.dw_kernel_size == 3 else f" d={self.dw_kernel_size}"
        return f"ghost-{self.network}{s}{d}"


EXPERIMENTS = {
    "gr_cosine": Constants(),
    "gr_multistep": Constants(schedule="multistep"),
    "gv_cosine": Constants(network="vgg16"),
    "resnet32": Constants(network="resnet32", ratio=1),  # costs what Ghost-ResNet-56 costs
    "resnet56": Constants(ratio=1),
    "vgg16": Constants(network="vgg16", ratio=1),
    # The paper's tables 3 and 4; their d=3 and s=2 are gv_cosine.
    "gv_d1": Constants(network="vgg16", dw_kernel_size=1),
    "gv_d5": Constants(network="vgg16", dw_kernel_size=5),
    "gv_d7": Constants(network="vgg16", dw_kernel_size=7),
    "gv_s3": Constants(network="vgg16", ratio=3),
    "gv_s4": Constants(network="vgg16", ratio=4),
    "gv_s5": Constants(network="vgg16", ratio=5),
    "gr_s3": Constants(ratio=3),
    "gr_s5": Constants(ratio=5),
    "gr_s10": Constants(ratio=10, dw_kernel_size=5),
    "gr_s20": Constants(ratio=20, dw_kernel_size=5),
}
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arguments:
    """Ghost-ResNet-56 and Ghost-VGG-16 on CIFAR-10. A constant given here holds for every run."""

    experiments: tyro.conf.Positional[tuple[Literal[tuple(EXPERIMENTS)], ...]] = (
        "gr_cosine", "gr_multistep", "gv_cosine")
    constants: tyro.conf.OmitArgPrefixes[Constants] = field(default_factory=Constants)
    seeds: tuple[int, ...] = ()  # every run once with each of these seeds
    data_dir: Path = HERE / "data"  # where cifar-10-batches-py is or is downloaded to
    checkpoint_dir: Path = HERE / "checkpoints"  # folder of the runs' files
    image_dir: Path = HERE / "images"  # folder of the pictures
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU where there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: the best native
    cuda_graph: bool = True  # record the training step as one CUDA graph (CUDA only)
    fresh: bool = False  # train from the start, replacing what the run's file holds


MEAN = (0.4914, 0.4822, 0.4465)  # of all CIFAR-10 training pixels, scaled to [0, 1]
STD = (0.2470, 0.2435, 0.2616)
PADDING = 4  # zero pixels on each side, from which the random crop is taken
RECORD_AFTER = 3  # steps, in which cudnn has chosen its kernels
SAVE_SECONDS = 10  # at least between saves: epochs can be shorter than a save is worth
PICTURE_IMAGE = 12  # test image in the ghost picture: a dog
PICTURE_MODULE = 1  # its ghost module: of VGG-16 that of figure 4
START = time.time()
# Processes of torchrun share a list of runs; the first one prints the reports.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
PAPER = {  # top-1 accuracy in percent (tables 3, 4 and 5)
    "resnet56": 93.0,
    "ghost-resnet56": 92.7,
    "vgg16": 93.6,
    "ghost-vgg16": 93.7,
    "ghost-vgg16 d=1": 93.5,
    "ghost-vgg16 d=5": 93.4,
    "ghost-vgg16 d=7": 93.1,
    "ghost-vgg16 s=3": 93.4,
    "ghost-vgg16 s=4": 93.0,
    "ghost-vgg16 s=5": 92.9,
}


# ---------- ghost module
# What others read of a convolution, and a ghost module takes from its primary one.
OF_PRIMARY_CONV = (
    "in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)


class GhostModule(nn.Module):
    """Drop-in for nn.Conv2d that makes some of its maps by a cheap operation (paper, section 3.1).

    Takes the arguments of nn.Conv2d, which shape the primary convolution, and two more:
        ratio: s >= 1; ceil(out_channels / s) maps are intrinsic, at least one in each group,
            the others their ghosts
        dw_kernel_size: d, odd; kernel of the depthwise convolution that makes ghosts of them
    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W') as nn.Conv2d. The network's own
    normalization and activation follow; there are none inside. Raises ValueError for other ratios
    and kernels, and what nn.Conv2d raises. Stride, padding and so on are those of primary_conv:
    to set them here is an AttributeError.
    """

    __jit_unused_properties__ = OF_PRIMARY_CONV  # torch.jit.script cannot compile them

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
        bias=True, padding_mode="zeros", device=None, dtype=None, *, ratio=2, dw_kernel_size=3,
    ):
        super().__init__()
        if not isinstance(ratio, Integral) or ratio < 1:
            raise ValueError(f"ratio must be an integer from 1, not {ratio}")
        odd = isinstance(dw_kernel_size, Integral) and dw_kernel_size % 2 == 1
        if not odd or dw_kernel_size < 1:
            raise ValueError(f"dw_kernel_size must be odd and positive, not {dw_kernel_size}")
        shape = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        nn.Conv2d(in_channels, out_channels, *shape, device="meta")  # refuses wrong arguments
        self.out_channels = out_channels
        self.dw_kernel_size = int(dw_kernel_size)
        self.ratio = min(int(ratio), max(1, out_channels // groups))
        intrinsic = math.ceil(out_channels / (self.ratio * groups)) * groups
        ghosts = intrinsic * (self.ratio - 1)
        self.surplus = intrinsic + ghosts - out_channels  # ghosts that are made and not needed
        self.primary_conv = nn.Conv2d(in_channels, intrinsic, *shape, device, dtype)
        self.cheap_operation = None
        if ghosts > 0:
            d = self.dw_kernel_size
            cheap_shape = (d, 1, d // 2, 1, intrinsic, bias, padding_mode)
            self.cheap_operation = nn.Conv2d(intrinsic, ghosts, *cheap_shape, device, dtype)

    def forward(self, x):
        intrinsic = self.primary_conv(x)
        if self.cheap_operation is None:
            return intrinsic
        ghosts = self.cheap_operation(intrinsic)
        if self.surplus > 0:  # a cut that cuts nothing would cost a copy in its backward
            ghosts = ghosts.narrow(-3, 0, ghosts.shape[-3] - self.surplus)
        return torch.cat([intrinsic, ghosts], dim=-3)


for _name in OF_PRIMARY_CONV:
    _read = property(lambda ghost, name=_name: getattr(ghost.primary_conv, name))
    setattr(GhostModule, _name, _read)


def replace_conv_with_ghost(model: nn.Module, ratio: int = 2, dw_kernel_size: int = 3,
                            keep: str | Iterable[str] | Callable[..., bool] = ()) -> nn.Module:
    """Replace every dense nn.Conv2d of `model` by a GhostModule, in place, and return the model.

    Weights start anew; a bias goes where a batch norm follows in its nn.Sequential. Left alone are
    convolutions grouped, frozen, hooked (pruned), subclassed, sharing their weight or no cheaper as
    a ghost, and what to `keep`: names of layers or blocks, or a function of name and convolution.
    Raises ValueError, the model unchanged: bad arguments, a lazy convolution, nothing to replace.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    if callable(keep):
        keep = [name for name, m in layers.items() if isinstance(m, nn.Conv2d) and keep(name, m)]
    names = {keep} if isinstance(keep, str) else set(keep)
    if unknown := names - (layers.keys() - {""}):
        raise ValueError(f"keep names no layer of the model: {unknown}")
    kept = set()
    for name, layer in layers.items():
        if name in names or isinstance(layer, GhostModule):
            kept.update(layer.modules())
    normalized = set()  # convolutions that a batch norm follows
    owners = Counter()
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
        if getattr(type(module), "forward", None) is nn.Sequential.forward:
            pairs = pairwise(module)
            normalized.update(conv for conv, layer in pairs if isinstance(layer, nn.BatchNorm2d))
    ghosts = {}
    for conv in model.modules():
        if type(conv) not in (nn.Conv2d, nn.LazyConv2d) or conv.groups > 1 or conv in kept:
            continue
        weights = conv.weight.numel()  # multiply-adds at each position; ValueError where lazy
        hooked = any(value for name, value in vars(conv).items() if name.endswith("_hooks"))
        if hooked or not conv.weight.requires_grad or owners[conv.weight] > 1:
            continue
        bias = conv.bias is not None and conv not in normalized
        shape = {name: getattr(conv, name) for name in ("out_channels", *OF_PRIMARY_CONV)}
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        ghost = GhostModule(**shape, bias=bias, **like, ratio=ratio, dw_kernel_size=dw_kernel_size)
        if sum(p.numel() for p in ghost.parameters()) < weights + bias * conv.out_channels:
            ghosts[conv] = ghost.train(conv.training)
    if not ghosts:
        raise ValueError("the model holds no dense nn.Conv2d to replace by a cheaper ghost module")
    for conv, ghost in ghosts.items():  # inside the object: all that hold it then hold the ghost
        conv.__class__, conv.__dict__ = GhostModule, vars(ghost)
    return model


# ---------- networks
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes (He et al.)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        stride = out_channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers, stages of 16, 32, 64 maps: (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential()
        in_channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                self.blocks.append(BasicBlock(in_channels, width))
                in_channels = width
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.blocks(out)
        return self.fc(out.mean(dim=(2, 3)))


class VGG16(nn.Module):
    """VGG-16 with batch norm and the 512-512-10 classifier that the paper's counts fit."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential()
        in_channels = 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                self.features.append(nn.Conv2d(in_channels, width, 3, padding=1))
                self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU(inplace=True))
                in_channels = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def build_network(constants):
    """The network of a run, newly initialized."""
    if constants.network == "vgg16":
        model = VGG16()
    else:
        model = ResNet(int(constants.network.removeprefix("resnet")))
    if constants.ratio > 1:
        replace_conv_with_ghost(model, constants.ratio, constants.dw_kernel_size)
    # He's initialization. torch's own weights are 2.4 times smaller, which behind a batch norm is a
    # learning rate 6 times too large: VGG-16 then stays near chance for two epochs.
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


# ---------- data
class UserError(Exception):
    """Something that the user can mend: one line on stderr and exit code 2."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def load_cifar10(root):
    """Training and test images as torchvision has them; what is missing is unpacked or fetched."""
    dataset = torchvision.datasets.CIFAR10
    if root.name == dataset.base_folder:
        root = root.parent
    try:
        try:
            dataset(root)
        except RuntimeError:  # not all there; a folder that is complete may be read-only
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(root / ".cifar-10.lock"):
                dataset(root, download=True)
        return dataset(root, train=True), dataset(root, train=False)
    except Exception as error:  # a download can raise all kinds
        hint = f"put {dataset.filename} there or give --data-dir"
        raise UserError(f"no CIFAR-10 in {root} ({error}): {hint}") from None


class Cifar10:
    """CIFAR-10 as uint8 tensors on the device, where batches are cropped, mirrored, normalized."""

    def __init__(self, root, device):
        train, test = load_cifar10(root.resolve())
        self.classes = test.classes
        padding = (0, 0, PADDING, PADDING, PADDING, PADDING)
        self.train_images = F.pad(torch.from_numpy(train.data), padding).to(device)  # 40 x 40
        self.test_images = torch.from_numpy(test.data).to(device)  # (10000, 32, 32, 3)
        self.train_labels = torch.tensor(train.targets, device=device)
        self.test_labels = torch.tensor(test.targets, device=device)
        self.mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(3, 1, 1)

    def epoch_plan(self):
        """An epoch's random choices on the CPU: index, top, left, mirrored or not; (N, 4)."""
        n = len(self.train_images)
        top, left = torch.randint(2 * PADDING + 1, (2, n))
        return torch.stack([torch.randperm(n), top, left, torch.randint(2, (n,))], dim=1)

    def train_batch(self, plan):
        """The augmented images (n, 3, 32, 32) and labels (n,) of n rows of the plan."""
        index, top, left, mirrored = plan.unbind(1)
        span = torch.arange(32, device=plan.device)
        rows = top[:, None] + span
        columns = left[:, None] + torch.where(mirrored[:, None] == 1, 31 - span, span)
        picked = self.train_images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalize(picked), self.train_labels[index]

    def normalize(self, images):
        """uint8 (n, 32, 32, 3) -> float (n, 3, 32, 32), channels_last, zero mean, unit std."""
        return (images.permute(0, 3, 1, 2) - self.mean) / self.std


# ---------- checkpoints
HISTORY = ("loss", "train_accuracy", "test_accuracy", "seconds")  # accuracies in percent


@dataclass
class Checkpoint:
    """A run as far as it has come. Its file holds these fields, as tensors and plain data."""

    constants: Constants
    history: dict[str, list[float]]  # a number an epoch for each of HISTORY
    trained_on: str  # hardware, precision and version of torch; "; " between several
    model: dict[str, Tensor] = field(compare=False)  # state_dict; of a finished run in float16
    momentum: dict[str, Tensor] = field(compare=False)  # by parameter; of a finished run empty

    @property
    def epochs(self):
        return len(self.history["loss"])

    @property
    def finished(self):
        return self.epochs == self.constants.epochs

    @property
    def accuracy(self):
        return self.history["test_accuracy"][-1]

    def network(self, device):
        """The network with these weights, in float32 and channels_last on the device."""
        model = build_network(self.constants)
        model.load_state_dict(self.model)
        return model.to(device, memory_format=torch.channels_last)

    def is_finite(self):
        history = torch.tensor([self.history[name] for name in HISTORY])
        tensors = [history, *self.model.values(), *self.momentum.values()]
        return all(tensor.isfinite().all() for tensor in tensors)

    def save(self, path):
        fields = {**vars(self), "constants": asdict(self.constants)}
        write_atomically(path, lambda file: torch.save(fields, file))


def read_checkpoint(path):
    """The checkpoint, on the CPU. Raises UserError for what this script did not write."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            require(archive.testzip() is None, "a wrong checksum")
        fields = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(**fields)
        require(checkpoint.constants.keys() == asdict(Constants()).keys(), "other constants")
        checkpoint.constants = Constants(**checkpoint.constants)
        check_constants(checkpoint.constants)
        require(1 <= checkpoint.epochs <= checkpoint.constants.epochs, "another number of epochs")
        require(isinstance(checkpoint.accuracy, float), "a history of something else")
        require(isinstance(checkpoint.trained_on, str), "trained_on is no text")
        network = checkpoint.network(torch.device("cpu"))  # raises for another network's weights
        if not checkpoint.finished:
            for name, parameter in network.named_parameters():
                require(checkpoint.momentum[name].shape == parameter.shape, "other momentum")
        require(checkpoint.is_finite(), "numbers that are not finite")
        return checkpoint
    except Exception as error:  # a file by someone else can raise all kinds
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is no checkpoint of this script ({reason}): move it") from None


def read_all(folder):
    """The checkpoints in a folder by name, and why others are refused."""
    checkpoints = {}
    refused = {}
    for path in sorted(folder.glob("*.pth"), key=lambda path: path.stem):
        try:
            checkpoints[path.stem] = read_checkpoint(path)
        except UserError as error:
            refused[path.stem] = error
    return checkpoints, refused


def write_atomically(path, write):
    """Write beside and rename: a kill or a full disk leaves the previous file whole."""
    content = io.BytesIO()  # torch.save ends the process where a disk is full
    write(content)
    beside = path.with_name(f".{path.name}.tmp")  # always the same: what a kill leaves is reused
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}): what it held is kept") from None


# ---------- training
def learning_rate(constants, epoch):
    """Of an epoch, the first of which is 1."""
    if constants.schedule == "multistep":
        passed = sum(epoch > milestone for milestone in constants.milestones)
        return constants.lr * 0.1**passed
    return constants.lr * (1 + math.cos(math.pi * (epoch - 1) / constants.epochs)) / 2


def evaluate(model, data, precision=torch.float32):
    """Top-1 accuracy on the test images in percent."""
    model.eval()
    device = data.test_labels.device
    size = 250 if device.type == "cpu" else 2000  # what a CPU's cache holds, what fills a GPU
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    hits = 0
    with torch.inference_mode(), autocast, torch.backends.cudnn.flags(True, allow_tf32=False):
        batches = zip(data.test_images.split(size), data.test_labels.split(size), strict=True)
        for images, labels in batches:
            hits += (model(data.normalize(images)).argmax(1) == labels).sum()
    return 100 * hits.item() / len(data.test_labels)


class Trainer:
    """A network in training, with its SGD, its loss scale, and the tally of an epoch."""

    def __init__(self, constants, data, precision):
        self.constants = constants
        self.data = data
        self.precision = precision
        self.device = data.train_labels.device
        torch.manual_seed(10**6 * constants.seed)
        model = build_network(constants)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        # Batch norm makes the scale of a ghost irrelevant, so weight decay can empty it unopposed.
        decayed = {"params": [], "weight_decay": constants.weight_decay}
        cheap = {"params": [], "weight_decay": constants.cheap_weight_decay}
        for name, parameter in self.model.named_parameters():
            group = cheap if ".cheap_operation." in name else decayed
            group["params"].append(parameter)
        self.lr = torch.tensor(constants.lr, device=self.device)  # which a recorded step reads
        self.optimizer = torch.optim.SGD(
            [decayed, cheap], self.lr, constants.momentum,
            nesterov=constants.momentum > 0, fused=True,
        )
        self.momentum = {}  # by name; here from the start, so that a recorded step finds it
        for name, parameter in self.model.named_parameters():
            self.momentum[name] = torch.zeros_like(parameter)
            self.optimizer.state[parameter]["momentum_buffer"] = self.momentum[name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.tally = torch.zeros(2, device=self.device)  # loss, hits: a look makes a GPU wait
        self.plan = torch.zeros(constants.batch_size, 4, dtype=torch.long, device=self.device)
        self.graph = None

    def step(self, plan):
        """Augment, forward, backward, update."""
        torch.backends.cudnn.benchmark = len(plan) == len(self.plan)  # no search for a short one
        images, labels = self.data.train_batch(plan)
        enabled = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=enabled):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        hits = (logits.argmax(1) == labels).sum()
        self.tally += torch.stack([loss.detach() * len(labels), hits])

    def record(self):
        """Record the step as a CUDA graph: launching its kernels one by one takes longer."""
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step(self.plan)
        except RuntimeError as error:  # what this leaves behind is not to be trained on
            message = f"the step cannot be recorded ({error!s:.99}): go on with --no-cuda-graph"
            raise UserError(message) from None

    def take_step(self, plan):
        """A step by the graph, if it is recorded and the batch a full one."""
        if self.graph is None or len(plan) < len(self.plan):
            self.step(plan)
        else:
            self.plan.copy_(plan)
            self.graph.replay()

    def epoch(self, number, title, cuda_graph=True):
        """Train an epoch; mean loss and accuracy in percent, as the batches came."""
        # Seeded anew, so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed(10**6 * self.constants.seed + number)
        self.model.train()
        self.lr.fill_(learning_rate(self.constants, number))
        self.tally.zero_()
        plans = self.data.epoch_plan().to(self.device).split(self.constants.batch_size)
        may_record = cuda_graph and self.device.type == "cuda"
        for taken, plan in enumerate(tqdm(plans, title, leave=False, disable=None)):
            if may_record and self.graph is None and taken == RECORD_AFTER:
                self.record()
            self.take_step(plan)
        loss, hits = (self.tally / len(self.data.train_labels)).tolist()
        return loss, 100 * hits


def last_save(path, constants, arguments):
    """Where a run stands: at its file, or at epoch 0."""
    # --fresh does not hold for what another process has trained anew since this one started.
    if not path.exists() or (arguments.fresh and path.stat().st_mtime < START):
        return Checkpoint(constants, {name: [] for name in HISTORY}, "", {}, {})
    checkpoint = read_checkpoint(path)
    require(checkpoint.constants == constants, f"{path} holds another run: move it away")
    return checkpoint


def train(path, constants, data, precision, arguments):
    """Train a run from where its file stands to the last epoch; the checkpoint of that."""
    checkpoint = last_save(path, constants, arguments)
    if checkpoint.finished:
        return checkpoint
    trainer = Trainer(constants, data, precision)
    if checkpoint.epochs > 0:
        trainer.model.load_state_dict(checkpoint.model)
        for name, buffer in trainer.momentum.items():
            buffer.copy_(checkpoint.momentum[name])
    place = f"{hardware_name(trainer.device)}, {precision}, torch {torch.__version__}"
    if place not in checkpoint.trained_on.split("; "):
        checkpoint.trained_on = f"{checkpoint.trained_on}; {place}".removeprefix("; ")
    print(f"{path.stem}: training from epoch {checkpoint.epochs + 1}", flush=True)
    saved = -SAVE_SECONDS
    for epoch in range(checkpoint.epochs + 1, constants.epochs + 1):
        start = time.perf_counter()
        title = f"{path.stem}: epoch {epoch}/{constants.epochs}"
        loss, train_accuracy = trainer.epoch(epoch, title, arguments.cuda_graph)
        checkpoint.model = trainer.model.state_dict()
        checkpoint.momentum = trainer.momentum
        if epoch == constants.epochs:
            checkpoint.model = trainer.model.half().state_dict()
            checkpoint.momentum = {}
            trainer.model.float()  # measured is what the file holds
            precision = torch.float32
        test_accuracy = evaluate(trainer.model, data, precision)
        seconds = time.perf_counter() - start
        numbers = (loss, train_accuracy, test_accuracy, seconds)
        for name, number in zip(HISTORY, numbers, strict=True):
            checkpoint.history[name].append(number)
        require(checkpoint.is_finite(), f"the loss is not finite in epoch {epoch}: lower --lr")
        if checkpoint.finished or time.perf_counter() > saved + SAVE_SECONDS:
            checkpoint.save(path)
            saved = time.perf_counter()
        line = f"{title}, loss {loss:.4f}, train {train_accuracy:.2f}%, test {test_accuracy:.2f}%"
        left = timedelta(seconds=round((constants.epochs - epoch) * seconds))
        print(f"{line}, {seconds:.1f} s, {left} left", flush=True)
    return checkpoint


# ---------- report and table
def count(model, *inputs):
    """FLOPs (multiply-adds, as in the paper) and parameters of each module; "": of the whole."""
    flops, params, tree = thop.profile(model, inputs=inputs, verbose=False, ret_layer_info=True)
    counts = {"": (flops, params)}
    levels = [("", tree)]
    for prefix, children in levels:  # which grows on the way
        for name, (flops, params, grandchildren) in children.items():
            counts[prefix + name] = (flops, params)
            levels.append((f"{prefix}{name}.", grandchildren))
    return counts


def network_inside(model):
    """The network in a compiled or data-parallel one, which puts a prefix before its names."""
    for module in model.modules():  # the outermost one first
        parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        if not parallel and not hasattr(module, "_orig_mod"):  # of torch.compile
            return module


def report(name, ordinary, ghost, *inputs, per_layer=True):
    """Print FLOPs and parameters of a network and of its ghost network, for one pass of `inputs`.

    Raises ValueError where both are one object: replace_conv_with_ghost works in place.
    """
    ordinary = network_inside(ordinary)
    ghost = network_inside(ghost)
    replaced = {m: layer for layer, m in ghost.named_modules() if isinstance(m, GhostModule)}
    if ordinary is ghost or not replaced.keys().isdisjoint(ordinary.modules()):
        raise ValueError("both are one network: copy it before replacing layers (copy.deepcopy)")
    before = count(ordinary, *inputs)
    after = count(ghost, *inputs)
    if per_layer:
        for layer in replaced.values():
            (f0, p0), (f1, p1) = before[layer], after[layer]
            flops = f"flops {f0 / 1e6:.2f}M -> {f1 / 1e6:.2f}M"
            print(f"{layer or name}: {flops}, params {p0:,.0f} -> {p1:,.0f}")
    (f0, p0), (f1, p1) = before[""], after[""]
    print(f"measuring standard {name}...\n  flops: {f0 / 1e6:.2f}M\n  params: {p0 / 1e6:.2f}M\n")
    print(f"measuring ghost-{name}...\n  flops: {f1 / 1e6:.2f}M\n  params: {p1 / 1e6:.2f}M\n")
    print("results:")
    print(f"  flops reduction: {f0 / f1:.2f}x (paper claims ~2x)")
    print(f"  param reduction: {p0 / p1:.2f}x (paper claims ~2x)\n")


def hardware_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name} CPU, {torch.get_num_threads()} threads"


def markdown(rows):
    """The aligned Markdown table of rows, the first of which is the header."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def results_table(checkpoints):
    """The Markdown table of runs."""
    columns = "run|network|epochs|accuracy|paper|params|FLOPs|trained on|time"
    rows = [columns.split("|")]
    for name, checkpoint in checkpoints.items():
        constants = checkpoint.constants
        flops, params = count(build_network(constants), torch.zeros(1, 3, 32, 32))[""]
        hardware = [part.split(",")[0] for part in checkpoint.trained_on.split("; ")]
        rows.append((
            name,
            constants.architecture,
            f"{checkpoint.epochs}/{constants.epochs}",
            f"{checkpoint.accuracy:.2f}",
            PAPER.get(constants.architecture, "–"),
            f"{params / 1e6:.2f}M",
            f"{flops / 1e6:.1f}M",
            ", ".join(dict.fromkeys(hardware)),
            timedelta(seconds=round(sum(checkpoint.history["seconds"]))),
        ))
    return markdown(rows)


# ---------- pictures
def draw_ghosts(run, model, data, path):
    """A test image; intrinsic maps, kernels and ghosts of a ghost module (paper, figure 4)."""
    modules = model.named_modules()
    name, module = [(n, m) for n, m in modules if isinstance(m, GhostModule)][PICTURE_MODULE]
    maps = []
    module.register_forward_hook(lambda _module, _inputs, output: maps.append(output[0]))
    image = data.test_images[PICTURE_IMAGE]
    with torch.inference_mode():
        model.eval()(data.normalize(image[None]))
    intrinsic, ghosts = maps[0].cpu().tensor_split([module.primary_conv.out_channels])
    sources = intrinsic.repeat_interleave(module.ratio - 1, dim=0)  # of each ghost
    kernels = module.cheap_operation.weight.detach()[:, 0].cpu()
    limit = kernels.abs().max()
    columns = min(8, len(ghosts))

    figure = Figure(figsize=(15, 5.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.6))
    title = f"test image {PICTURE_IMAGE}: {data.classes[data.test_labels[PICTURE_IMAGE]]}"
    bare = {"xticks": [], "yticks": []}
    view = left.subplots(subplot_kw=bare)
    view.imshow(image.cpu().numpy())
    view.set_title(title)
    grid = right.subplots(3, columns, squeeze=False, subplot_kw=bare)
    grid[0, 0].set_ylabel("intrinsic map\n(primary_conv)", color="C0")
    grid[1, 0].set_ylabel("kernel\n(depthwise)")
    grid[2, 0].set_ylabel("ghost map\n(cheap_operation)", color="C2")
    for column in range(columns):
        top, middle, bottom = grid[:, column]
        top.imshow(sources[column].numpy(), cmap="gray")
        shown = middle.imshow(kernels[column].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        bottom.imshow(ghosts[column].numpy(), cmap="gray")
        pair = torch.stack([sources[column].flatten(), ghosts[column].flatten()])
        correlation = torch.corrcoef(pair)[0, 1].nan_to_num()  # of a blank ghost: 0
        bottom.set_xlabel(f"correlation\n{correlation:+.2f}")
    right.colorbar(shown, ax=grid[1], aspect=12)
    right.suptitle(f"{run}, layer {name}: {columns} of its {len(ghosts)} ghosts")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def draw_curves(checkpoints, path):
    """Test accuracy and training loss of every run by epoch; the paper's accuracies as lines."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    papers = {}
    for run, checkpoint in checkpoints.items():
        epochs = range(1, checkpoint.epochs + 1)
        label = f"{run}: {checkpoint.accuracy:.2f}%".replace("$", r"\$")  # no formula
        (line,) = accuracy.plot(epochs, checkpoint.history["test_accuracy"], label=label)
        loss.plot(epochs, checkpoint.history["loss"], color=line.get_color())
        papers.setdefault(checkpoint.constants.architecture, line.get_color())
    for name, color in papers.items():
        if name in PAPER:
            label = f"paper, {name}: {PAPER[name]}%"
            accuracy.axhline(PAPER[name], color=color, linestyle="--", linewidth=1, label=label)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    lowest = min(checkpoint.accuracy for checkpoint in checkpoints.values())
    accuracy.set_ylim(bottom=min(70, lowest - 5))  # the last tenths decide, not the first epochs
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    figure.legend(handles=accuracy.lines, loc="outside right upper", fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


# ---------- main
def check_constants(constants):
    """Raise UserError for constants that no run can have."""
    limits = {  # dw_kernel_size: from 15 on, its backward in bfloat16 hangs on a CPU
        "ratio": (1, 512), "dw_kernel_size": (1, 13), "epochs": (1, 10**5), "lr": (1e-9, 1e9),
        "momentum": (0.0, 0.9999), "weight_decay": (0.0, 1e3), "cheap_weight_decay": (0.0, 1e3),
        "batch_size": (1, 50_000), "seed": (0, 2**31 - 1),
    }
    for name, (low, high) in limits.items():
        value = getattr(constants, name)
        fits = isinstance(value, type(low) | int) and low <= value <= high
        require(fits, f"{name} must be of type {type(low).__name__}, from {low} to {high}")
    require(constants.dw_kernel_size % 2 == 1, "dw_kernel_size must be odd")
    require(constants.network in ("resnet32", "resnet56", "vgg16"), "there is no such network")
    require(constants.schedule in ("cosine", "multistep"), "there is no such schedule")
    milestones = constants.milestones
    numbers = isinstance(milestones, tuple) and all(isinstance(m, int) for m in milestones)
    require(numbers, "milestones must be integers in a tuple: (100,) is one")


def name_runs(arguments, checkpoints):
    """Constants of every run by its name, in which differences from the plain file's show."""
    runs = {}
    for experiment in arguments.experiments:
        plain = EXPERIMENTS[experiment]
        # Parsed once more, on top of the experiment: an option equal to a default counts too.
        constants = tyro.cli(Arguments, default=replace(arguments, constants=plain)).constants
        if experiment in checkpoints:
            plain = checkpoints[experiment].constants
        for seed in arguments.seeds or [constants.seed]:
            seeded = replace(constants, seed=seed)
            check_constants(seeded)
            run = experiment
            differences = []
            for key, value in asdict(seeded).items():
                before = getattr(plain, key)
                if value != before:
                    run += f"-{key}" + re.sub(r"[^\w.-]+", "_", str(value)).strip("_")
                    differences.append(f"{key} {value} instead of {before}")
            runs[run] = seeded
            if differences and RANK == 0:
                print(f"{run} is {experiment} with {', '.join(differences)}")
    return runs


def pick_hardware(arguments):
    """The device and the precision of the training; processes may share a GPU."""
    usable = torch.cuda.is_available()
    require(usable or arguments.device != "cuda", "--device cuda is not there: use auto or cpu")
    if usable and arguments.device != "cpu":
        device = torch.device("cuda", LOCAL_RANK % torch.cuda.device_count())
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it slowly
        precision = torch.bfloat16 if native else torch.float16
    else:
        # Not a Mac's mps, whose batch norm has wrong gradients (pytorch's issue 175189).
        device = torch.device("cpu")
        native = torch.cpu._is_avx512_bf16_supported()
        precision = torch.bfloat16 if native else torch.float32
        if arguments.device == "auto" and shutil.which("nvidia-smi"):
            complain("this torch cannot use the GPU that is here: see the README, older drivers")
    if arguments.precision != "auto":
        precision = getattr(torch, arguments.precision)
    return device, precision


def complete(run, constants, data, precision, arguments):
    """Train a run unless it is finished, and evaluate its file anew; False where that failed."""
    path = arguments.checkpoint_dir / f"{run}.pth"
    try:
        checkpoint = last_save(path, constants, arguments)
        if not checkpoint.finished:  # a finished one may lie in a folder that is read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(f".{run}.lock"), timeout=0):
                checkpoint = train(path, constants, data, precision, arguments)
        accuracy = evaluate(checkpoint.network(data.test_labels.device), data)
        when = f"{checkpoint.accuracy:.2f}% when trained ({checkpoint.trained_on})"
        print(f"{run}: test accuracy {accuracy:.2f}% now, {when}")
        return True
    except filelock.Timeout:
        print(f"{run}: passed over, another process is training it")
        return True
    except torch.OutOfMemoryError:
        complain(f"{run}: too little GPU memory: try a smaller --batch-size")
    except (UserError, OSError, NotImplementedError) as error:  # the last: a disk without locks
        complain(f"{run}: {error}")
    return False


def show(checkpoints, runs, data, images):
    """Print the table of all checkpoints; draw their curves, and the ghosts of the first run."""
    if not checkpoints:
        return
    print(f"\n{results_table(checkpoints)}\n\npictures in {images}\n")
    images.mkdir(parents=True, exist_ok=True)
    # A user's own style would change the pictures; several processes may draw at the same time.
    with matplotlib.style.context("default"), filelock.FileLock(images / ".pictures.lock"):
        draw_curves(checkpoints, images / "training_curves.png")
        for run in runs:
            if run in checkpoints and checkpoints[run].constants.ratio > 1:
                network = checkpoints[run].network(data.test_labels.device)
                draw_ghosts(run, network, data, images / "ghost_visualization.png")
                break


def complain(message):
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)


def run_as_script(main):
    try:
        main()
    except KeyboardInterrupt:
        complain("stopped; the same command (without --fresh) goes on from the last save")
        sys.exit(130)
    except (UserError, OSError, NotImplementedError) as error:
        complain(str(error))
        sys.exit(2)


def main():
    arguments = tyro.cli(Arguments)
    checkpoints, refused = read_all(arguments.checkpoint_dir)
    runs = name_runs(arguments, checkpoints)
    device, precision = pick_hardware(arguments)
    data = Cifar10(arguments.data_dir, device)
    if RANK == 0:
        print(f"{hardware_name(device)}, {precision}, torch {torch.__version__}")
        for name in refused.keys() - runs.keys():
            complain(f"{refused[name]}; it is left out of the table")
        for name, network in (("resnet-56", "resnet56"), ("vgg-16", "vgg16")):
            ordinary = build_network(Constants(network=network, ratio=1))
            ghost = build_network(Constants(network=network))
            report(name, ordinary, ghost, torch.zeros(1, 3, 32, 32), per_layer=False)
        show(checkpoints, runs, data, arguments.image_dir)
    succeeded = []
    for run, constants in runs.items():
        succeeded.append(complete(run, constants, data, precision, arguments))
    trained, _ = read_all(arguments.checkpoint_dir)
    if RANK == 0 and trained != checkpoints:
        show(trained, runs, data, arguments.image_dir)
    if not all(succeeded):
        sys.exit(2)


if __name__ == "__main__":
    run_as_script(main)
