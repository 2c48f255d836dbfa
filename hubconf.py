"""For torch.hub: Ghost-ResNet-56 and Ghost-VGG-16, untrained or with the weights of a run.

    torch.hub.load("OWNER/ghostnet", "ghost_resnet56", pretrained=True, run="gr_multistep")
"""

import ghostnet
from ghostnet import GhostModule, replace_conv_with_ghost  # noqa: F401  # to be loaded as well

dependencies = ["filelock", "matplotlib", "thop", "torch", "torchvision", "tqdm", "tyro"]


def ghost_resnet56(pretrained=False, run="gr_cosine"):
    """Ghost-ResNet-56, for images normalized by ghostnet.MEAN, STD: (N, 3, H, W) -> (N, 10).

    With `pretrained` it has the weights of a run in checkpoints/, and is in evaluation mode.
    Raises ValueError for a run that is not there or is another network's.
    """
    return _network(ghostnet.EXPERIMENTS["gr_cosine"], pretrained, run)


def ghost_vgg16(pretrained=False, run="gv_cosine"):
    """Ghost-VGG-16, as ghost_resnet56, but for images of 32x32 pixels."""
    return _network(ghostnet.EXPERIMENTS["gv_cosine"], pretrained, run)


def _network(constants, pretrained, run):
    if not pretrained:
        return ghostnet.build_network(constants)
    folder = ghostnet.HERE / "checkpoints"
    runs = sorted(path.stem for path in folder.glob("*.pth"))
    if run in runs:
        checkpoint = ghostnet.read_checkpoint(folder / f"{run}.pth")
        if checkpoint.constants.architecture == constants.architecture:
            return checkpoint.network("cpu")
    raise ValueError(f"{run} is no run of {constants.architecture}: {folder} has {runs}")
