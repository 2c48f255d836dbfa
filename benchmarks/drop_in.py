"""What becomes of the first loss of a network whose predicting layers are replaced too.

    python benchmarks/drop_in.py

It needs no data: images are random, and networks newly initialized. Half a minute on a CPU.
"""

import sys
from pathlib import Path

import torch
from torchvision.models import detection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ghostnet

PREDICTING = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")


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
    rows = [
        ("convolutions", "loss"),
        ("ordinary", f"{first_loss(False):,.1f}"),
        ("all replaced", f"{first_loss(True):,.1f}"),
        ("all but the predicting ones replaced", f"{first_loss(True, PREDICTING):,.1f}"),
    ]
    print("**First loss of retinanet_resnet50_fpn**\n")
    print(ghostnet.markdown(rows))


if __name__ == "__main__":
    ghostnet.run_as_script(main)
