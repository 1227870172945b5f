"""Wide residual networks (Zagoruyko and Komodakis 2016), as published robust CIFAR models use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.components.fields import at_least
from dualhead.errors import UserError
from dualhead.models.base import Backbone, ImageShape, backbones
from dualhead.models.initialisation import init_he_fan_out
from dualhead.models.normalize import Normalize


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, beside a shortcut [B, C, H, W] to [B, C', H', W']."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        # The shortcut is a convolution where the width changes, and only there; published names spell it so.
        changes = in_channels != out_channels
        self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features [B, C', H', W']."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.conv1(activated)
        out = self.dropout(F.relu(self.bn2(out), inplace=True))
        added: Tensor = shortcut + self.conv2(out)
        return added


class WideStage(nn.Module):
    """Blocks of one resolution; the sequence is called `layer` in published parameter names."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride, dropout)
        rest = (WideBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features [B, C', H', W']."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width with parameters named as in the code of TRADES (Zhang et al. 2019) and RobustBench.

    Attributes:
        unused_in_published: published checkpoints of TRADES and its heirs hold a `sub_block1`, a second copy of
            `block1` that their forward never calls. `load_state` leaves it out where it repeats `block1` exactly.
    """

    unused_in_published: ClassVar[dict[str, str]] = {"sub_block1": "block1"}

    def __init__(
        self, depth: int, width: float, dropout: float, num_classes: int, normalize: Normalize, stem_stride: int = 1
    ) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16, *(round(channels * width) for channels in (16, 32, 64)))
        self.normalize = normalize
        self.conv1 = nn.Conv2d(normalize.channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.block1 = WideStage(blocks, widths[0], widths[1], 1, dropout)
        self.block2 = WideStage(blocks, widths[1], widths[2], 2, dropout)
        self.block3 = WideStage(blocks, widths[2], widths[3], 2, dropout)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_he_fan_out(self)

    def reset_head_parameters(self, head: nn.Module) -> None:
        """Initialise a second head, whose layers have been reset by their own classes, as the network was."""
        init_he_fan_out(head)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        x = self.conv1(self.normalize(images))
        x = self.block3(self.block2(self.block1(x)))
        x = F.relu(self.bn1(x), inplace=True).mean((2, 3))
        logits: Tensor = self.fc(x)
        return logits


@backbones.register("wideresnet", numbers=("depth", "width"))
@dataclass(frozen=True)
class WideResNetBackbone(Backbone):
    """WRN-depth-width for small images: `wideresnet-34-10` is the network of TRADES and of DH-AT.

    Args:
        depth: 6 n + 4 for n blocks per stage: 10, 16, 22, 28, 34, ...
        width: how many times wider than the ResNet of 16, 32 and 64 channels, at least 1; fractions are rounded.
        dropout: probability inside the blocks, in [0, 1); robust models are published with 0.
        stem_stride: 1, as published, or 2: half the resolution from the first layer on, a quarter of the arithmetic.
    """

    depth: int = 34
    width: int | float = 10
    dropout: float = 0.0
    stem_stride: int = 1

    attach_at: ClassVar[str | None] = "block1"

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(f"depth must be 6 n + 4 with n at least 1, such as 10, 16, 28 or 34, got {self.depth}")
        at_least(1, "width", self.width)
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout:g}")
        if self.stem_stride not in (1, 2):
            raise UserError(f"stem_stride must be 1 or 2, got {self.stem_stride}")

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return WideResNet(self.depth, self.width, self.dropout, num_classes, normalize, self.stem_stride)
