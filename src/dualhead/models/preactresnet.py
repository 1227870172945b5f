"""Pre-activation residual networks for small images (He et al. 2016b), in the variants that robust models use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.models.base import Backbone, ImageShape, backbones
from dualhead.models.normalize import Normalize

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, project_activated: bool) -> None:
        super().__init__()
        self.project_activated = project_activated
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features [B, C', H', W']."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated if self.project_activated else x)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        added: Tensor = self.conv2(out) + shortcut
        return added


def _stage(in_channels: int, width: int, blocks: int, stride: int, project_activated: bool) -> nn.Sequential:
    first = PreActBlock(in_channels, width, stride, project_activated)
    return nn.Sequential(first, *(PreActBlock(width, width, 1, project_activated) for _ in range(blocks - 1)))


class PreActResNet(nn.Module):
    """Parameters named as in `pytorch-cifar` and RobustBench; weights start at torch's defaults, as there."""

    def __init__(
        self, depth: int, final_norm: bool, project_activated: bool, num_classes: int, normalize: Normalize
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(normalize.channels, WIDTHS[0], 3, padding=1, bias=False)
        blocks = BLOCKS[depth]
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks[0], 1, project_activated)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks[1], 2, project_activated)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks[2], 2, project_activated)
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], blocks[3], 2, project_activated)
        self.bn = nn.BatchNorm2d(WIDTHS[3]) if final_norm else None
        self.linear = nn.Linear(WIDTHS[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        x = self.conv1(self.normalize(images))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn is not None:
            x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@backbones.register("preactresnet", numbers=("depth",))
@dataclass(frozen=True)
class PreActResNetBackbone(Backbone):
    """Pre-activation ResNet for small images: `preactresnet-18`.

    The defaults are the network of Rice et al. 2020 and of AWP (Wu et al. 2020): batch norm and ReLU before pooling,
    projections of the activated features, 11,172,170 parameters for 10 classes. Fast AT (Wong et al. 2020) and
    Andriushchenko and Flammarion 2020 publish `final_norm: false, shortcut: raw` (11,171,146).

    Args:
        depth: 18 or 34.
        final_norm: batch norm (`bn`) and ReLU before pooling.
        shortcut: input of a shortcut's convolution: the `activated` features, or the `raw` input of the block.
            Parameter names do not tell the two apart, so weights of one load into the other and are then wrong.
    """

    depth: Literal[18, 34] = 18
    final_norm: bool = True
    shortcut: Literal["activated", "raw"] = "activated"

    attach_at: ClassVar[str | None] = "layer1"

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return PreActResNet(self.depth, self.final_norm, self.shortcut == "activated", num_classes, normalize)
