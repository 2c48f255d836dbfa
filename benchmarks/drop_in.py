"""What ghost modules change in other networks beside FLOPs and parameters: two tables.

    python benchmarks/drop_in.py

It needs no data: images are random, and networks newly initialized. A minute on a CPU.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.models import detection, get_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet

NETWORKS = ("vgg16_bn", "resnet18", "resnet50")
PREDICTING = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")


def activation_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes of all that a forward pass saves for the backward pass but the model's own tensors."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # once, however often it is saved
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(images)
    for tensor in (*model.parameters(), *model.buffers()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def memory_row(name: str) -> tuple:
    ordinary = get_model(name, weights=None)
    ghost = ghostnet.replace_conv_with_ghost(copy.deepcopy(ordinary))
    image = torch.rand(2, 3, 224, 224)
    before, after = [activation_bytes(model, image) / len(image) for model in (ordinary, ghost)]
    return name, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before - 1:+.0%}"


def first_loss(replace: bool, keep: tuple[str, ...] = ()) -> float:
    """The loss of a new RetinaNet on two random images with a box each."""
    torch.manual_seed(0)
    images = list(torch.rand(2, 3, 256, 256))
    target = {"boxes": torch.tensor([[16.0, 16.0, 160.0, 200.0]]), "labels": torch.tensor([1])}
    model = detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=256, max_size=256
    )
    if replace:
        ghostnet.replace_conv_with_ghost(model, keep=keep)
    with torch.inference_mode():
        return sum(model(images, [target, target]).values()).item()


def main() -> None:
    rows = [("network", "ordinary", "ghost", "difference"), *map(memory_row, NETWORKS)]
    print("**Activations that training keeps, MB an image of 224x224, float32**\n")
    print(ghostnet.markdown(rows))
    rows = [
        ("convolutions", "loss"),
        ("ordinary", f"{first_loss(False):,.1f}"),
        ("all replaced", f"{first_loss(True):,.1f}"),
        ("all but the predicting ones replaced", f"{first_loss(True, PREDICTING):,.1f}"),
    ]
    print("\n**First loss of retinanet_resnet50_fpn**\n")
    print(ghostnet.markdown(rows))


if __name__ == "__main__":
    ghostnet.run_as_script(main)
