"""GhostNet on CIFAR-10: Ghost-ResNet-56 and Ghost-VGG-16, trained, counted and drawn by one script.

A ghost module makes a few intrinsic feature maps by an ordinary convolution and all others, their
ghosts, from those by a cheap depthwise convolution: Han et al., "GhostNet: More Features from
Cheap Operations", https://arxiv.org/abs/1911.11907.

    python ghostnet.py                                   the three ghost runs that are shipped
    python ghostnet.py gr_cosine --epochs 30 --seed 1    one run with other constants

It trains what is missing and tests what is there. With the shipped files it ends with these lines:

    gr_cosine: test accuracy 92.65% now, 92.65% when trained
    gr_multistep: test accuracy 92.55% now, 92.55% when trained
    gv_cosine: test accuracy 93.34% now, 93.34% when trained
"""

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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_type_hints

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # a notebook's may not be installed here; none is needed

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
# A comment at the end of a line is also the help of its option. The zero of a constant that you add
# (0.0, False) must mean "as before": files that lack it are read with zero.
@dataclass(frozen=True)
class Constants:
    """All that defines a run: edit a default here, or give it as an option."""

    network: Literal["resnet32", "resnet56", "vgg16"] = "resnet56"  # network with ghost modules
    ratio: int = 2  # s in the paper: all maps / intrinsic maps; 1 keeps the ordinary convolutions
    dw_kernel_size: int = 3  # d in the paper: kernel size of the cheap convolution, odd
    norm_inside: bool = False  # batch norm and ReLU in the ghost modules, as in the authors' code
    schedule: Literal["cosine", "multistep"] = "cosine"  # learning rate: cosine to zero, or steps
    milestones: tuple[int, ...] = (100, 150)  # epochs after which multistep divides lr by 10
    epochs: int = 200  # passes over the training images
    lr: float = 0.1  # learning rate of the first epoch
    momentum: float = 0.9  # Nesterov momentum
    weight_decay: float = 5e-4  # L2 penalty on all parameters but the cheap kernels
    cheap_weight_decay: float = 0.0  # L2 penalty on the cheap kernels; 5e-4 empties many ghosts
    batch_size: int = 256  # images in a step; an epoch's last step takes the rest
    padding: int = 4  # zero pixels on each side of an image, from which random crops are taken
    erasing: float = 0.0  # probability that a random rectangle of an image is erased
    seed: int = 0  # seed of the initialization, the data order and the augmentation

    @property
    def architecture(self):
        """The network's name, with s and d where they are not the paper's 2 and 3."""
        if self.ratio == 1:
            return self.network
        s = "" if self.ratio == 2 else f" s={self.ratio}"
        d = "" if self.dw_kernel_size == 3 else f" d={self.dw_kernel_size}"
        return f"ghost-{self.network}{s}{d}"


# gr is Ghost-ResNet-56 and gv is Ghost-VGG-16; s is the ratio and d the cheap kernel's size.
EXPERIMENTS = {
    "gr_cosine": Constants(),
    "gr_multistep": Constants(schedule="multistep"),
    "gv_cosine": Constants(network="vgg16"),
    "resnet32": Constants(network="resnet32", ratio=1),  # costs about what Ghost-ResNet-56 costs
    "resnet56": Constants(ratio=1),
    "vgg16": Constants(network="vgg16", ratio=1),
    # The sweeps of the paper's tables 3 and 4; gv_cosine is d=3 and s=2.
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
    "gr_inside": Constants(norm_inside=True),  # with the authors' own ghost module
    "gv_inside": Constants(network="vgg16", norm_inside=True),
    # With random erasing, which is not the paper's training (Zhong et al., arXiv 1708.04896).
    "gr_erasing": Constants(erasing=0.5),
    "gv_erasing": Constants(network="vgg16", erasing=0.5),
    "resnet32_erasing": Constants(network="resnet32", ratio=1, erasing=0.5),
}
PICTURE_IMAGE = 12  # index of the test image in the ghost picture: a dog
PICTURE_MODULE = 1  # index of the ghost module in it; in Ghost-VGG-16 the layer of figure 4
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arguments:
    """Ghost-ResNet-56 and Ghost-VGG-16 on CIFAR-10. A constant given here holds for every run."""

    experiments: tyro.conf.Positional[tuple[Literal[tuple(EXPERIMENTS)], ...]] = tuple(
        run for run in ("gr_cosine", "gr_multistep", "gv_cosine") if run in EXPERIMENTS)
    constants: tyro.conf.OmitArgPrefixes[Constants] = Constants()
    seeds: tuple[int, ...] = ()  # seeds that every run is trained with
    data_dir: Path = HERE / "data"  # folder of cifar-10-batches-py, downloaded if missing
    checkpoint_dir: Path = HERE / "checkpoints"  # folder of the runs' files
    image_dir: Path = HERE / "images"  # folder of the pictures
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: best native one
    cuda_graph: bool = True  # record the training step as a CUDA graph


# ---------- ghost module
class GhostModule(nn.Module):
    """Drop-in for nn.Conv2d that makes some of its maps by a cheap operation (paper, section 3.1).

    Takes the arguments of nn.Conv2d, which shape the primary convolution, and two more:
        ratio: s >= 1; ceil(out_channels / s) maps are intrinsic, at least one in each group, and
            the others are their ghosts
        dw_kernel_size: d, odd; kernel size of the depthwise convolution that makes the ghosts
    Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W') as nn.Conv2d. Normalization and
    activation are not inside, unless put_inside puts them there: the network's own follow. Raises
    ValueError for other ratios and kernel sizes, and what nn.Conv2d raises.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
        bias=True, padding_mode="zeros", device=None, dtype=None, *, ratio=2, dw_kernel_size=3,
    ):
        super().__init__()
        d = dw_kernel_size
        if not isinstance(ratio, int) or ratio < 1:
            raise ValueError(f"ratio must be an integer from 1, not {ratio}")
        if not isinstance(d, int) or d < 1 or d % 2 == 0:
            raise ValueError(f"dw_kernel_size must be odd and positive, not {d}")
        options = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        # The ordinary convolution, without memory, refuses wrong arguments.
        nn.Conv2d(in_channels, out_channels, *options, device="meta")
        self.out_channels = out_channels
        self.ratio = min(ratio, max(1, out_channels // groups))  # at most the maps of a group
        intrinsic = math.ceil(out_channels / (self.ratio * groups)) * groups
        self.ghosts = out_channels - intrinsic
        self.primary_conv = nn.Conv2d(in_channels, intrinsic, *options, device, dtype)
        self.cheap_operation = None
        if self.ghosts > 0:
            # Depthwise: a ghost is made from one intrinsic map. forward() cuts off those too many.
            made = intrinsic * (self.ratio - 1)
            self.cheap_operation = nn.Conv2d(
                intrinsic, made, d, padding=d // 2, groups=intrinsic, bias=bias,
                padding_mode=padding_mode, device=device, dtype=dtype,
            )
        self.primary_norm = nn.Sequential()  # put_inside fills them
        self.cheap_norm = nn.Sequential()

    def put_inside(self, make_layer):
        """Put make_layer(number of maps), as nn.BatchNorm2d, after each of the two convolutions."""
        self.primary_norm.append(make_layer(self.primary_conv.out_channels))
        if self.cheap_operation is not None:
            self.cheap_norm.append(make_layer(self.ghosts))

    def forward(self, x):
        intrinsic = self.primary_norm(self.primary_conv(x))
        if self.cheap_operation is None:
            return intrinsic
        ghosts = self.cheap_operation(intrinsic)
        # Narrowing nothing would cost a copy in the backward pass.
        if self.cheap_operation.out_channels > self.ghosts:
            ghosts = ghosts.narrow(-3, 0, self.ghosts)
        return torch.cat([intrinsic, self.cheap_norm(ghosts)], dim=-3)


# What other code asks of an nn.Conv2d, the primary one answers. Setting it would change nothing.
for attribute in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
    answer = property(lambda ghost, attribute=attribute: getattr(ghost.primary_conv, attribute))
    setattr(GhostModule, attribute, torch.jit.unused(answer))


def replace_conv_with_ghost(model, ratio=2, dw_kernel_size=3, keep=()):
    """Replace every dense nn.Conv2d of `model` by a GhostModule, in place, and return the model.

    Weights start anew; attributes of your own, as `layer.index = 3`, stay. A bias is dropped where
    a batch norm follows in the same nn.Sequential. A convolution is left alone if
        - you `keep` it: by names of layers or blocks, or by a function of a name and a convolution
        - it is grouped, frozen or a subclass's, or another layer has the same weight
        - it has a hook, a forward of its own, or a parameter, buffer or part more (as pruned ones)
        - it would be no cheaper as a ghost module
    Raises ValueError, the model unchanged, for bad arguments or nothing to replace.
    """
    kept = modules_to_keep(model, keep)
    holders = Counter()  # number of modules that hold a parameter
    normalized = set()  # layers that a batch norm follows
    for module in model.modules():
        holders.update(module.parameters(recurse=False))
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for layer, next_layer in pairwise(module):
                if isinstance(next_layer, nn.modules.batchnorm._BatchNorm):
                    normalized.add(layer)
    ghosts = {}
    for conv in model.modules():
        if type(conv) is not nn.Conv2d or conv.groups > 1 or conv in kept:
            continue
        frozen = not conv.weight.requires_grad
        shared = holders[conv.weight] > 1
        hooked = any(hooks for name, hooks in vars(conv).items() if name.endswith("_hooks"))
        patched = vars(conv).keys() & {"forward", "_conv_forward"}
        extended = conv._modules or conv._buffers or conv._parameters.keys() - {"weight", "bias"}
        if frozen or shared or hooked or patched or extended:
            continue
        bias = conv.bias is not None and conv not in normalized
        ghost = GhostModule(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, bias, conv.padding_mode, conv.weight.device,
            conv.weight.dtype, ratio=ratio, dw_kernel_size=dw_kernel_size,
        )
        # Each parameter is used once at each position: fewer of them are fewer multiply-adds.
        size = conv.weight.numel() + bias * conv.out_channels
        if sum(p.numel() for p in ghost.parameters()) < size:
            ghosts[conv] = ghost.train(conv.training)
    if not ghosts:
        raise ValueError("no dense nn.Conv2d to replace: see the docstring")
    for conv, ghost in ghosts.items():
        # The object itself becomes the ghost, for all that hold it, and keeps your attributes.
        standard = vars(ghost.primary_conv)
        yours = {name: value for name, value in vars(conv).items() if name not in standard}
        conv.__class__, conv.__dict__ = GhostModule, yours | vars(ghost)
    return model


def modules_to_keep(model, keep):
    """The modules that `keep` selects and all inside them, and ghost modules with their parts."""
    layers = dict(model.named_modules(remove_duplicate=False))
    if callable(keep):
        keep = [name for name, m in layers.items() if isinstance(m, nn.Conv2d) and keep(name, m)]
    names = {keep} if isinstance(keep, str) else set(keep)
    unknown = names - (layers.keys() - {""})  # the empty name is the model's own
    if unknown:
        raise ValueError(f"keep names no layer of the model: {unknown}")
    kept = set()
    for name, layer in layers.items():
        if name in names or isinstance(layer, GhostModule):
            kept.update(layer.modules())
    return kept


# ---------- networks
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes (He et al.)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        stride = out_channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of 6n + 2 layers, stages of 16, 32, 64 maps: (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.blocks = nn.Sequential()
        in_channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                self.blocks.append(BasicBlock(in_channels, width))
                in_channels = width
        self.fc = nn.Linear(64, len(CLASSES))

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
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
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, len(CLASSES))
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def move_norms_inside(block):
    """Move the batch norm and ReLU that a block registers after a ghost module into the module.

    They work map by map, so all that this changes is what the cheap operation reads.
    """
    makers = {nn.BatchNorm2d: nn.BatchNorm2d, nn.ReLU: lambda _maps: nn.ReLU(inplace=True)}
    ghost = None
    for name, layer in block.named_children():
        if isinstance(layer, GhostModule):
            ghost = layer
        elif ghost is not None and type(layer) in makers:
            ghost.put_inside(makers[type(layer)])
            setattr(block, name, nn.Identity())
        else:
            ghost = None


def build_network(constants):
    """The network of a run, newly initialized."""
    name = constants.network
    depth = re.fullmatch(r"resnet(\d+)", name)
    if depth and int(depth[1]) in range(8, 10**4, 6):
        model = ResNet(int(depth[1]))
    elif name == "vgg16":
        model = VGG16()
    else:
        raise UserError(f"build_network cannot build {name}: add it there")
    if constants.ratio > 1:
        replace_conv_with_ghost(model, constants.ratio, constants.dw_kernel_size)
        if constants.norm_inside:
            model.apply(move_norms_inside)
    # He's initialization. torch's own weights are 2.4 times smaller, which before a batch norm acts
    # as a 6 times higher learning rate.
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


# ---------- errors
class UserError(Exception):
    """Something that the user can mend: one line on stderr and exit code 2, no traceback."""


# Told in one line, too. NotImplementedError is raised by a disk without locks.
MENDABLE = (UserError, OSError, NotImplementedError, torch.OutOfMemoryError)


def require(condition, message):
    if not condition:
        raise UserError(message)


def complain(message):
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)


# ---------- data
# No constants of a run: whatever is trained expects images that are normalized by these.
MEAN = (0.4914, 0.4822, 0.4465)  # of all training pixels in each channel, scaled to [0, 1]
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(root):
    """torchvision's training and test sets; missing files are unpacked or downloaded."""
    dataset = torchvision.datasets.CIFAR10
    for folder in (root.absolute(), root.resolve()):  # root may be that folder, or a link to it
        if folder.name == dataset.base_folder:
            root = folder.parent
    try:
        try:
            dataset(root)  # only reads: a complete folder may be read-only
        except RuntimeError:
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(root / ".cifar-10.lock"):
                dataset(root, download=True)
        return dataset(root, train=True), dataset(root, train=False)
    except Exception as error:  # a download can raise anything
        hint = f"put {dataset.filename} there or give --data-dir"
        raise UserError(f"no CIFAR-10 in {root} ({error}): {hint}") from None


def draw_rectangles(n, size, probability):
    """Rectangles in n images, as torchvision's RandomErasing draws them; (n, 4): see inside()."""
    limits = torch.tensor(size).view(2, 1)  # height and width of an image
    sizes = limits.repeat(1, n)  # of the rectangles, too large as yet
    while (too_large := (sizes >= limits).any(dim=0)).any():
        missing = int(too_large.sum())
        area = limits.prod() * torch.empty(missing).uniform_(0.02, 0.33)
        aspect = torch.empty(missing).uniform_(math.log(0.3), math.log(3.3)).exp()
        sizes[:, too_large] = torch.stack([area * aspect, area / aspect]).sqrt().round().long()
    start = (torch.rand(2, n) * (limits + 1 - sizes)).long()
    end = start + sizes * (torch.rand(n) < probability)  # elsewhere the rectangle is empty
    return torch.cat([start, end]).T


def inside(rectangles, size):
    """Whether a pixel lies in its image's rectangle: (n, 4) -> (n, 1, height, width)."""
    top, left, bottom, right = rectangles.view(-1, 4, 1, 1, 1).unbind(1)
    row = torch.arange(size[0], device=rectangles.device).view(-1, 1)
    column = torch.arange(size[1], device=rectangles.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


class Cifar10:
    """CIFAR-10 as uint8 tensors on a device, where batches are cropped, mirrored, normalized."""

    def __init__(self, root, device):
        train, test = load_cifar10(root)
        self.device = device
        self.train_images = torch.from_numpy(train.data).to(device)  # (50000, 32, 32, 3)
        self.test_images = torch.from_numpy(test.data).to(device)  # (10000, 32, 32, 3)
        self.train_labels = torch.tensor(train.targets, device=device)
        self.test_labels = torch.tensor(test.targets, device=device)
        self.size = tuple(self.train_images.shape[1:3])  # height and width
        self.mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(3, 1, 1)

    def epoch_plan(self, padding, erasing):
        """The random choices of an epoch, drawn on the CPU: (N, 4), with erasing (N, 8)."""
        n = len(self.train_images)
        top, left = torch.randint(2 * padding + 1, (2, n))
        plan = torch.stack([torch.randperm(n), top, left, torch.randint(2, (n,))], dim=1)
        if erasing > 0:
            plan = torch.cat([plan, draw_rectangles(n, self.size, erasing)], dim=1)
        return plan

    def train_batch(self, plan, padding):
        """Augmented images (n, 3, height, width) and labels (n,) for n rows of a plan."""
        index, top, left, mirrored = plan[:, :4].unbind(1)
        padded = F.pad(self.train_images[index], (0, 0, padding, padding, padding, padding))
        crops = padded.unfold(1, self.size[0], 1).unfold(2, self.size[1], 1)  # all, as views
        image = torch.arange(len(plan), device=plan.device)
        images = crops[image, top, left].permute(0, 2, 3, 1)  # a view: memory is NHWC throughout
        images = torch.where(mirrored.view(-1, 1, 1, 1) == 1, images.flip(2), images)
        images = self.normalize(images)
        if plan.shape[1] > 4:
            images.masked_fill_(inside(plan[:, 4:], self.size), 0)  # zero, the mean color
        return images, self.train_labels[index]

    def normalize(self, images):
        """uint8 (n, h, w, 3) -> float (n, 3, h, w), channels_last, zero mean, unit std."""
        return (images.permute(0, 3, 1, 2) - self.mean) / self.std


# ---------- training
RECORD_AFTER = 3  # plain steps before the graph is recorded, in which cudnn chooses its kernels


def pick_hardware(arguments):
    """The device and the precision; processes of torchrun and Slurm take the GPUs in turn."""
    usable = torch.cuda.is_available()
    require(usable or arguments.device != "cuda", "--device cuda is not there")
    if usable and arguments.device != "cpu":
        task = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        device = torch.device("cuda", int(task) % torch.cuda.device_count())
        try:
            torch.cuda.set_device(device)
            torch.ones(2, device=device).sum().item()  # it may be too old, too new, full or taken
        except RuntimeError as error:
            raise UserError(f"GPU unusable ({error!s:.150}): see README or --device cpu") from None
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it slowly
        precision = torch.bfloat16 if native else torch.float16
    else:
        # Not a Mac's GPU: batch norm has wrong gradients there (pytorch issue 175189).
        device = torch.device("cpu")
        precision = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        if arguments.device == "auto" and shutil.which("nvidia-smi"):
            complain("this torch cannot use the GPU that is here: see README, older drivers")
    if arguments.precision != "auto":
        precision = getattr(torch, arguments.precision)
    return device, precision


def cpuinfo(key):
    """What Linux tells of the CPU, "" elsewhere."""
    path = Path("/proc/cpuinfo")
    found = path.exists() and re.search(rf"{key}\s*: (.+)", path.read_text())
    return found[1] if found else ""


def has_fast_bfloat16():
    """Whether this CPU trains faster in bfloat16 than in float32."""
    # Intel's without AMX, usual in virtual machines, are 1.15 to 1.4 times slower in bfloat16.
    amx = torch.cpu._is_amx_tile_supported()
    avx512 = torch.cpu._is_avx512_bf16_supported()
    return amx or (avx512 and cpuinfo("vendor_id") not in ("", "GenuineIntel"))


def hardware_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpuinfo("model name") or platform.machine()
    return f"{name} CPU, {torch.get_num_threads()} threads"


def learning_rate(constants, epoch):
    """The learning rate of an epoch, counted from 1."""
    if constants.schedule == "multistep":
        passed = sum(epoch > milestone for milestone in constants.milestones)
        return constants.lr * 0.1**passed
    return constants.lr * (1 + math.cos(math.pi * (epoch - 1) / constants.epochs)) / 2


def evaluate(model, data, precision=torch.float32):
    """Top-1 accuracy on the test images in percent."""
    model.eval()
    device = data.device.type
    batch_size = 250 if device == "cpu" else 2000  # 250 fit a CPU's cache, 2000 fill a GPU
    autocast = torch.autocast(device, precision, enabled=precision != torch.float32)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # alike on all GPUs
    predictions = []
    with torch.inference_mode(), autocast, exact:
        for images in data.test_images.split(batch_size):
            predictions.append(model(data.normalize(images)).argmax(1))
    hits = (torch.cat(predictions) == data.test_labels).sum()
    return 100 * hits.item() / len(data.test_labels)


class Trainer:
    """A network in training, with its optimizer, its loss scale and the tally of an epoch."""

    def __init__(self, constants, data, precision):
        self.constants = constants
        self.data = data
        self.precision = precision
        torch.manual_seed(10**6 * constants.seed)  # epoch n is seeded with this plus n
        self.model = build_network(constants).to(data.device, memory_format=torch.channels_last)
        self.scaler = torch.amp.GradScaler(data.device.type, enabled=precision == torch.float16)
        self.graph = None  # the step, recorded as a CUDA graph
        # The graph holds the addresses of these tensors: they are changed in place, not replaced.
        self.lr = torch.tensor(constants.lr, device=data.device)
        self.tally = torch.zeros(2, device=data.device)  # loss and hits, read once an epoch
        parameters = dict(self.model.named_parameters())
        # Batch norm makes the scale of a ghost irrelevant, so weight decay can empty it unopposed.
        cheap = {name: p for name, p in parameters.items() if ".cheap_operation." in name}
        others = [p for name, p in parameters.items() if name not in cheap]
        self.optimizer = torch.optim.SGD(
            [{"params": others, "weight_decay": constants.weight_decay},
             {"params": cheap.values(), "weight_decay": constants.cheap_weight_decay}],
            self.lr, constants.momentum, nesterov=constants.momentum > 0, fused=True,
        )
        # SGD would make these in its first step; a run that goes on fills them before.
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        # AdamW (capturable=True on a GPU): leave this loop out; a resume then begins it anew.
        for name, buffer in self.momentum.items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer

    def step(self, plan):
        # cudnn's search for the fastest kernels takes longer than an epoch's one short batch.
        torch.backends.cudnn.benchmark = len(plan) == self.constants.batch_size
        images, labels = self.data.train_batch(plan, self.constants.padding)
        enabled = self.precision != torch.float32
        with torch.autocast(self.data.device.type, self.precision, enabled=enabled):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        hits = (logits.argmax(1) == labels).sum()
        self.tally += torch.stack([loss.detach() * len(labels), hits])

    def record(self, plan):
        """Record the step as a CUDA graph: launching its kernels one by one takes longer."""
        # A random number of Python's or numpy's is recorded too: draw it with torch on the device.
        self.plan = plan.clone()  # each replay reads what it holds then
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step(self.plan)
        except RuntimeError as error:
            # No plain step can follow: a failed recording leaves the state undefined.
            message = f"the step cannot be recorded ({error!s:.99}): go on with --no-cuda-graph"
            raise UserError(message) from None

    def take_step(self, plan):
        """Take a step, by the graph if it is recorded and the batch is a full one."""
        if self.graph is None or len(plan) < self.constants.batch_size:
            self.step(plan)
        else:
            self.plan.copy_(plan)
            self.graph.replay()

    def epoch(self, number, title, cuda_graph):
        """Train an epoch; mean loss and accuracy in percent of its batches, as they came."""
        # Seeded anew: a resumed run draws what it would have drawn without a stop.
        torch.manual_seed(10**6 * self.constants.seed + number)
        self.model.train()
        self.lr.fill_(learning_rate(self.constants, number))
        self.tally.zero_()
        plans = self.data.epoch_plan(self.constants.padding, self.constants.erasing)
        plans = plans.to(self.data.device).split(self.constants.batch_size)
        for steps_taken, plan in enumerate(tqdm(plans, title, leave=False, disable=None)):
            if cuda_graph and self.graph is None and steps_taken == RECORD_AFTER:
                self.record(plan)
            self.take_step(plan)
        loss, hits = (self.tally / len(self.data.train_labels)).tolist()
        return loss, 100 * hits


# ---------- runs and their files
# A run is a set of constants with a name of its own. It is saved to a file and goes on from it.
HISTORY = ("loss", "train_accuracy", "test_accuracy", "seconds")  # accuracies in percent
ADDED_LATER = {"padding": 4}  # of a constant that older files lack, the value that is not zero
SAVE_SECONDS = 10  # shortest time between saves; on a fast GPU an epoch takes less than a save
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
FIRST_PROCESS = not TORCHRUN or os.environ["RANK"] == "0"  # the one that reports


def check_constants(constants):
    """Raise UserError for constants that no run can have."""
    limits = {  # a CPU hangs in the bfloat16 backward pass of a depthwise kernel of 15 or more
        "ratio": (1, 512), "dw_kernel_size": (1, 13), "epochs": (1, 10**5), "lr": (1e-9, 1e9),
        "momentum": (0.0, 0.9999), "weight_decay": (0.0, 1e3), "cheap_weight_decay": (0.0, 1e3),
        "batch_size": (1, 50_000), "padding": (0, 31), "erasing": (0.0, 1.0),
        "seed": (0, 2**31 - 1), "norm_inside": (False, True),
    }
    for name, (low, high) in limits.items():
        value = getattr(constants, name)
        fits = isinstance(value, type(low) | int) and low <= value <= high
        require(fits, f"{name} must be {type(low).__name__}, from {low} to {high}")
    require(constants.dw_kernel_size % 2 == 1, "dw_kernel_size must be odd")
    for name in ("network", "schedule"):
        choices = get_args(get_type_hints(Constants)[name])
        require(getattr(constants, name) in choices, f"{name} must be one of {choices}")
    require(isinstance(constants.milestones, tuple), "milestones must be a tuple, as (100,) is")


def name_runs(arguments, checkpoints):
    """Every run's constants by its name, which tells what was edited or given as an option."""
    runs = {}
    for experiment in arguments.experiments:
        base = EXPERIMENTS[experiment]
        # Parsed again on top of this experiment: an option counts even if it equals a default.
        constants = tyro.cli(Arguments, default=replace(arguments, constants=base)).constants
        if experiment in checkpoints:  # a trained run keeps its name, whatever is edited
            base = checkpoints[experiment].constants
        old = vars(base)
        for seed in arguments.seeds or [constants.seed]:
            seeded = replace(constants, seed=seed)
            check_constants(seeded)
            run = experiment
            changes = []
            for key, new in vars(seeded).items():
                if new != old[key]:
                    value = re.sub(r"[^\w.-]+", "_", str(new)).strip("_")  # (1, 2) becomes 1_2
                    run += f"-{key}{value}"
                    changes.append(f"{key} {new} instead of {old[key]}")
            runs[run] = seeded
            if changes and FIRST_PROCESS:
                print(f"{run} is {experiment} with {', '.join(changes)}")
    return runs


@dataclass
class Checkpoint:
    """A run as far as it has come. Its file holds these fields, as tensors and plain data."""

    constants: Constants
    history: dict[str, list[float]]  # for each of HISTORY a number an epoch
    trained_on: str  # hardware, precision and version of torch; "; " between several
    model: dict[str, Tensor] = field(compare=False)  # state_dict; in float16 when finished
    momentum: dict[str, Tensor] = field(compare=False)  # by parameter name; empty when finished

    @property
    def epochs(self):
        return len(self.history["loss"])

    @property
    def finished(self):
        return self.epochs == self.constants.epochs

    @property
    def accuracy(self):
        return self.history["test_accuracy"][-1]

    def network(self, device, memory_format=torch.contiguous_format):
        """The network with these weights, ready for use: in evaluation mode and float32."""
        model = build_network(self.constants)
        model.load_state_dict(self.model)
        return model.eval().to(device, memory_format=memory_format)

    def is_finite(self):
        history = torch.tensor([self.history[name] for name in HISTORY])
        tensors = [history, *self.model.values(), *self.momentum.values()]
        return all(tensor.isfinite().all() for tensor in tensors)

    def check(self):
        """Raise an error if this is no state of a run."""
        check_constants(self.constants)
        require(1 <= self.epochs <= self.constants.epochs, "wrong number of epochs")
        require(isinstance(self.accuracy, float), "history holds no numbers")
        require(isinstance(self.trained_on, str), "trained_on is no text")
        network = self.network("cpu")  # raises for another network's weights
        if not self.finished:
            for name, parameter in network.named_parameters():
                require(self.momentum[name].shape == parameter.shape, "wrong momentum")
        require(self.is_finite(), "numbers that are not finite")

    def save(self, path):
        fields = {**vars(self), "constants": vars(self.constants)}
        write_atomically(path, lambda file: torch.save(fields, file))


def read_checkpoint(path):
    """The checkpoint in a file, on the CPU. Raises UserError if this script did not write it."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself looks at no checksum
            require(archive.testzip() is None, "wrong checksum")
        fields = torch.load(path, map_location="cpu", weights_only=True)
        require(fields.keys() == get_type_hints(Checkpoint).keys(), "other contents")
        checkpoint = Checkpoint(**fields)
        zeros = {name: type(default)() for name, default in vars(Constants()).items()}
        constants = zeros | ADDED_LATER | checkpoint.constants  # the last are the file's
        unknown = constants.keys() - zeros.keys()
        require(not unknown, f"unknown constants {unknown}")
        checkpoint.constants = Constants(**constants)
        checkpoint.check()
        return checkpoint
    except Exception as error:  # a foreign file can raise anything
        message = f"{path} is no checkpoint of this script ({error!s:.150}): move it"
        raise UserError(message) from None


def read_all(folder):
    """The checkpoints in a folder by name, and the errors of the files that are refused."""
    checkpoints = {}
    refused = {}
    for path in sorted(folder.glob("*.pth"), key=lambda path: path.stem):
        try:
            checkpoints[path.stem] = read_checkpoint(path)
        except UserError as error:
            refused[path.stem] = error
    return checkpoints, refused


def write_atomically(path, write):
    """Write to another file and rename it: a kill or a full disk leaves the old file whole."""
    content = io.BytesIO()  # on a full disk, torch.save to a file ends the process
    write(content)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}): what it held is kept") from None


def load_or_begin(path, constants):
    """A run's checkpoint: that in its file or, where there is none, one of no epochs."""
    if not path.exists():
        return Checkpoint(constants, {name: [] for name in HISTORY}, "", {}, {})
    checkpoint = read_checkpoint(path)
    require(checkpoint.constants == constants, f"{path} holds another run: move it away")
    return checkpoint


def train(checkpoint, path, data, precision, cuda_graph):
    """Train a run from where its checkpoint stands to the last epoch, and save it to its file."""
    constants = checkpoint.constants
    trainer = Trainer(constants, data, precision)
    if checkpoint.epochs > 0:
        trainer.model.load_state_dict(checkpoint.model)
        for name, buffer in trainer.momentum.items():
            buffer.copy_(checkpoint.momentum[name])
    hardware = f"{hardware_name(data.device)}, {precision}, torch {torch.__version__}"
    if hardware not in checkpoint.trained_on.split("; "):
        checkpoint.trained_on = "; ".join(filter(None, [checkpoint.trained_on, hardware]))
    # The tensors in training themselves: a save writes what they hold by then.
    checkpoint.model = trainer.model.state_dict()
    checkpoint.momentum = trainer.momentum
    print(f"{path.stem}: training from epoch {checkpoint.epochs + 1}")
    saved_at = -math.inf
    for epoch in range(checkpoint.epochs + 1, constants.epochs + 1):
        start = time.perf_counter()
        title = f"{path.stem}: epoch {epoch}/{constants.epochs}"
        loss, train_accuracy = trainer.epoch(epoch, title, cuda_graph)
        if epoch < constants.epochs:
            test_accuracy = evaluate(trainer.model, data, precision)
        else:  # a finished file is small, and its accuracy that of what it holds
            half = {name: p.detach().half() for name, p in trainer.model.named_parameters()}
            checkpoint.model = trainer.model.state_dict() | half
            checkpoint.momentum = {}
            test_accuracy = evaluate(checkpoint.network(data.device, torch.channels_last), data)
        seconds = time.perf_counter() - start
        numbers = (loss, train_accuracy, test_accuracy, seconds)
        for name, number in zip(HISTORY, numbers, strict=True):
            checkpoint.history[name].append(number)
        require(checkpoint.is_finite(), f"the loss is not finite in epoch {epoch}: lower --lr")
        if checkpoint.finished or time.perf_counter() > saved_at + SAVE_SECONDS:
            checkpoint.save(path)
            saved_at = time.perf_counter()
        line = f"{title}, loss {loss:.4f}, train {train_accuracy:.2f}%, test {test_accuracy:.2f}%"
        left = timedelta(seconds=round((constants.epochs - epoch) * seconds))
        print(f"{line}, {seconds:.1f} s, {left} left")
        # To stop early: checkpoint.save(path), then break. The same command goes on from there.


def finish_and_test(run, constants, data, precision, arguments):
    """Train a run unless it is finished, and test its network; False where that failed."""
    path = arguments.checkpoint_dir / f"{run}.pth"
    try:
        checkpoint = load_or_begin(path, constants)
        if not checkpoint.finished:  # a finished run needs no lock: its folder may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_name(f".{path.stem}.lock"), timeout=0):
                # Read again: another process may have trained it before the lock was taken.
                checkpoint = load_or_begin(path, constants)
                if not checkpoint.finished:
                    cuda_graph = arguments.cuda_graph and data.device.type == "cuda"
                    train(checkpoint, path, data, precision, cuda_graph)
        now = evaluate(checkpoint.network(data.device, torch.channels_last), data)
        print(f"{run}: test accuracy {now:.2f}% now, {checkpoint.accuracy:.2f}% when trained")
        return True
    except filelock.Timeout:
        print(f"{run}: passed over, another process is training it")
        return True
    except MENDABLE as error:
        complain(f"{run}: {error}")
    return False


# ---------- report
PAPER = {  # top-1 accuracy in percent, from tables 3 (d), 4 (s) and 5
    "resnet56": 93.0, "ghost-resnet56": 92.7, "vgg16": 93.6, "ghost-vgg16": 93.7,
    "ghost-vgg16 d=1": 93.5, "ghost-vgg16 d=5": 93.4, "ghost-vgg16 d=7": 93.1,
    "ghost-vgg16 s=3": 93.4, "ghost-vgg16 s=4": 93.0, "ghost-vgg16 s=5": 92.9,
}


def count(model, *inputs):
    """FLOPs (multiply-adds, as in the paper) and parameters of each module; "" is the model."""
    counts = {}

    def add(name, flops, params, children):
        counts[name] = (flops, params)
        for child, counted in children.items():
            add(f"{name}.{child}" if name else child, *counted)

    add("", *thop.profile(model, inputs=inputs, verbose=False, ret_layer_info=True))
    return counts


def report(name, ordinary, ghost, *inputs, per_layer=True, claim=""):
    """Print FLOPs and parameters of a network and of its ghost network, for one pass of `inputs`.

    `claim` is printed behind the reductions. Raises ValueError where both are one network.
    """
    if ordinary is ghost:
        raise ValueError("both are one network: copy.deepcopy it before replacing layers")
    ordinary_counts = count(ordinary, *inputs)
    ghost_counts = count(ghost, *inputs)
    for layer, module in ghost.named_modules():
        if per_layer and isinstance(module, GhostModule):
            flops, params = ordinary_counts[layer]
            ghost_flops, ghost_params = ghost_counts[layer]
            print(f"{layer or name}: flops {flops / 1e6:.2f}M -> {ghost_flops / 1e6:.2f}M, "
                  f"params {params:,.0f} -> {ghost_params:,.0f}")
    flops, params = ordinary_counts[""]
    ghost_flops, ghost_params = ghost_counts[""]
    print(f"measuring standard {name}...")
    print(f"  flops: {flops / 1e6:.2f}M\n  params: {params / 1e6:.2f}M\n")
    print(f"measuring ghost-{name}...")
    print(f"  flops: {ghost_flops / 1e6:.2f}M\n  params: {ghost_params / 1e6:.2f}M\n")
    print("results:")
    print(f"  flops reduction: {flops / ghost_flops:.2f}x{claim}")
    print(f"  param reduction: {params / ghost_params:.2f}x{claim}\n")


def markdown(rows):
    """The aligned Markdown table of rows, the first of which is the header."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def short_hardware(trained_on):
    """The devices that a run was trained on, without their makers: "H200, Xeon"."""
    left_out = r"\(.*?\)|NVIDIA|AMD|Intel|Processor|CPU.*|,.*"
    names = [re.sub(left_out, "", hardware).split() for hardware in trained_on.split("; ")]
    return ", ".join(dict.fromkeys(map(" ".join, names)))


def results_table(checkpoints):
    """The Markdown table of runs."""
    columns = "run|network|epochs|accuracy|paper|params|FLOPs|trained on|time"
    rows = [columns.split("|")]
    for name, checkpoint in checkpoints.items():
        constants = checkpoint.constants
        flops, params = count(build_network(constants), torch.zeros(1, 3, 32, 32))[""]
        rows.append((
            name,
            constants.architecture,
            f"{checkpoint.epochs}/{constants.epochs}",
            f"{checkpoint.accuracy:.2f}",
            PAPER.get(constants.architecture, "-"),
            f"{params / 1e6:.2f}M",
            f"{flops / 1e6:.1f}M",
            short_hardware(checkpoint.trained_on),
            timedelta(seconds=round(sum(checkpoint.history["seconds"]))),
        ))
    return markdown(rows)


# ---------- pictures
def ghosts_and_sources(model, module, image):
    """The ghosts that a module makes of an image, and each one's intrinsic map: (n, H, W) both."""
    outputs = []
    hook = module.register_forward_hook(lambda _module, _inputs, maps: outputs.append(maps[0]))
    with torch.inference_mode():
        model(image)
    hook.remove()
    intrinsic, ghosts = outputs[0].cpu().tensor_split([module.primary_conv.out_channels])
    sources = intrinsic.repeat_interleave(module.ratio - 1, dim=0)
    return ghosts, sources[: len(ghosts)]


def draw_ghosts(run, model, data, path):
    """A test image; intrinsic maps, kernels and ghosts of a ghost module (paper, figure 4)."""
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, GhostModule)]
    require(PICTURE_MODULE in range(len(modules)), f"PICTURE_MODULE must be below {len(modules)}")
    require(PICTURE_IMAGE in range(len(data.test_images)), "there is no test image PICTURE_IMAGE")
    name, module = modules[PICTURE_MODULE]
    image = data.test_images[PICTURE_IMAGE]
    ghosts, sources = ghosts_and_sources(model, module, data.normalize(image[None]))
    kernels = module.cheap_operation.weight.detach()[:, 0].cpu()
    limit = kernels.abs().max()
    columns = min(8, len(ghosts))

    figure = Figure(figsize=(15, 5.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.6))
    bare = {"xticks": [], "yticks": []}
    picture = left.subplots(subplot_kw=bare)
    picture.imshow(image.cpu().numpy())
    picture.set_title(f"test image {PICTURE_IMAGE}: {CLASSES[data.test_labels[PICTURE_IMAGE]]}")
    grid = right.subplots(3, columns, squeeze=False, subplot_kw=bare)
    grid[0, 0].set_ylabel("intrinsic map\n(primary_conv)", color="C0")
    grid[1, 0].set_ylabel("kernel\n(depthwise)")
    grid[2, 0].set_ylabel("ghost map\n(cheap_operation)", color="C2")
    for column in range(columns):
        top, middle, bottom = grid[:, column]
        top.imshow(sources[column].numpy(), cmap="gray")
        colors = middle.imshow(kernels[column].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        bottom.imshow(ghosts[column].numpy(), cmap="gray")
        pair = torch.stack([sources[column].flatten(), ghosts[column].flatten()])
        correlation = torch.corrcoef(pair)[0, 1].nan_to_num()  # 0 for a blank ghost
        bottom.set_xlabel(f"correlation\n{correlation:+.2f}")
    right.colorbar(colors, ax=grid[1], aspect=12)
    title = f"{run}, layer {name}: {columns} of its {len(ghosts)} ghosts"
    inside = " and ".join(type(layer).__name__ for layer in module.cheap_norm)
    right.suptitle(f"{title}, after {inside}" if inside else title)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def draw_curves(checkpoints, path):
    """Test accuracy and training loss of every run by epoch; the paper's accuracies as lines."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    color_of = {}
    for run, checkpoint in checkpoints.items():
        epochs = range(1, checkpoint.epochs + 1)
        label = f"{run}: {checkpoint.accuracy:.2f}%"
        style = "o" if checkpoint.epochs == 1 else "-"
        (line,) = accuracy.plot(epochs, checkpoint.history["test_accuracy"], style, label=label)
        loss.plot(epochs, checkpoint.history["loss"], style, color=line.get_color())
        color_of.setdefault(checkpoint.constants.architecture, line.get_color())
    for network, color in color_of.items():
        if network in PAPER:
            label = f"paper, {network}: {PAPER[network]}%"
            accuracy.axhline(PAPER[network], color=color, linestyle="--", linewidth=1, label=label)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    lowest = min(checkpoint.accuracy for checkpoint in checkpoints.values())
    accuracy.set_ylim(bottom=min(70, lowest - 5))  # the last epochs decide
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    figure.legend(handles=accuracy.lines, loc="outside right upper", fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


# ---------- main
def print_and_draw(checkpoints, runs, data, folder):
    """The table and the curves of all checkpoints, and the ghosts of the first of the runs."""
    if not checkpoints:
        return
    for title, erased in ("", False), ("with random erasing: not the paper's training\n\n", True):
        shown = {run: c for run, c in checkpoints.items() if (c.constants.erasing > 0) == erased}
        if shown:
            print(f"\n{title}{results_table(shown)}")
    print(f"\npictures in {folder}\n")
    folder.mkdir(parents=True, exist_ok=True)
    # A user's own style would change pictures; several processes may draw at the same time.
    with matplotlib.style.context("default"), filelock.FileLock(folder / ".pictures.lock"):
        draw_curves(checkpoints, folder / "training_curves.png")
        for run in runs:
            if run in checkpoints and checkpoints[run].constants.ratio > 1:
                network = checkpoints[run].network(data.device, torch.channels_last)
                draw_ghosts(run, network, data, folder / "ghost_visualization.png")
                break


def main():
    arguments = tyro.cli(Arguments)
    checkpoints, refused = read_all(arguments.checkpoint_dir)
    runs = name_runs(arguments, checkpoints)
    device, precision = pick_hardware(arguments)
    data = Cifar10(arguments.data_dir, device)
    if FIRST_PROCESS:
        print(f"{hardware_name(device)}, {precision}, torch {torch.__version__}")
        for name, error in refused.items():
            if name not in runs:  # else its run complains
                complain(f"{error}; it is left out of the table")
        for name, network in (("resnet-56", "resnet56"), ("vgg-16", "vgg16")):
            constants = Constants(network=network)
            ordinary = build_network(replace(constants, ratio=1))
            ghost = build_network(constants)
            claim = " (paper claims ~2x)" if constants.ratio == 2 else ""
            report(name, ordinary, ghost, torch.zeros(1, 3, 32, 32), per_layer=False, claim=claim)
        print_and_draw(checkpoints, runs, data, arguments.image_dir)
    succeeded = [finish_and_test(run, c, data, precision, arguments) for run, c in runs.items()]
    checkpoints_now, _ = read_all(arguments.checkpoint_dir)
    if checkpoints_now != checkpoints:  # of several processes, the last to end shows all
        print_and_draw(checkpoints_now, runs, data, arguments.image_dir)
    if not all(succeeded) and not TORCHRUN:  # which would end the other processes
        sys.exit(2)


def run_as_script(main):
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A console may lack letters of a path, and a log shows each line at once.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        complain("stopped; the same command goes on from the last save")
        sys.exit(130)
    except MENDABLE as error:
        complain(str(error))
        sys.exit(2)


if __name__ == "__main__":
    run_as_script(main)
