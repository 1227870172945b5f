"""Residual networks (He et al. 2016a) for small images, as published robust models use them, and for large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.models.base import Backbone, ImageShape, backbones
from dualhead.models.normalize import Normalize

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)
Stem = Literal["small", "imagenet"]


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return a projection where the shape changes, else nothing (an empty sequence is the identity)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features [B, C', H', W']."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, the last four times wider, beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features [B, C', H', W']."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """Parameters named as in `pytorch-cifar`, MART and RobustBench; weights start at torch's defaults, as there.

    The stem for small images is one 3x3 convolution of stride 1; that for ImageNet a 7x7 one of stride 2, and pooling.
    """

    def __init__(self, depth: int, num_classes: int, normalize: Normalize, stem: Stem = "small") -> None:
        super().__init__()
        block = BasicBlock if depth < 50 else Bottleneck
        self.normalize = normalize
        size, stride = (3, 1) if stem == "small" else (7, 2)
        self.conv1 = nn.Conv2d(normalize.channels, WIDTHS[0], size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.pools = stem == "imagenet"
        blocks, wider = BLOCKS[depth], block.expansion
        self.layer1 = _stage(block, WIDTHS[0], WIDTHS[0], blocks[0], 1)
        self.layer2 = _stage(block, WIDTHS[0] * wider, WIDTHS[1], blocks[1], 2)
        self.layer3 = _stage(block, WIDTHS[1] * wider, WIDTHS[2], blocks[2], 2)
        self.layer4 = _stage(block, WIDTHS[2] * wider, WIDTHS[3], blocks[3], 2)
        self.linear = nn.Linear(WIDTHS[3] * wider, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        x = F.relu(self.bn1(self.conv1(self.normalize(images))), inplace=True)
        if self.pools:
            x = F.max_pool2d(x, 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@backbones.register("resnet", numbers=("depth",))
@dataclass(frozen=True)
class ResNetBackbone(Backbone):
    """ResNet: `resnet-18` for small images.

    Args:
        depth: 18, 34 or 50.
        stem: `small`, or `imagenet`, which reduces the image to a quarter before the first block, as He et al. do.
            (Weights of that form are published under other names: take `timm:resnet50` for those.)
    """

    depth: Literal[18, 34, 50] = 18
    stem: Stem = "small"

    attach_at: ClassVar[str | None] = "layer1"

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return ResNet(self.depth, num_classes, normalize, self.stem)
