"""A small convolutional network for small images: digits, Fashion-MNIST, trials on CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dualhead.components.fields import at_least
from dualhead.errors import UserError
from dualhead.models.base import Backbone, ImageShape, backbones
from dualhead.models.initialisation import init_he_fan_out
from dualhead.models.normalize import Normalize


def _stage(in_channels: int, out_channels: int, convolutions: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        source, step = (in_channels, stride) if index == 0 else (out_channels, 1)
        layers += [
            nn.Conv2d(source, out_channels, 3, step, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class CNN(nn.Module):
    """Stages `stage1`, `stage2`, ... of 3x3 convolutions with batch norm, global average pooling, and `fc`.

    Each stage after the first halves the resolution and doubles the width. Convolutions start at N(0, 2 / (k k out))
    (He et al. 2015, fan-out), biases of `fc` at 0.
    """

    def __init__(self, width: int, stages: int, convolutions: int, num_classes: int, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.stages = stages
        channels = normalize.channels
        for index in range(stages):
            stage = _stage(channels, width << index, convolutions, 1 if index == 0 else 2)
            self.add_module(f"stage{index + 1}", stage)
            channels = width << index
        self.fc = nn.Linear(channels, num_classes)
        init_he_fan_out(self)

    def reset_head_parameters(self, head: nn.Module) -> None:
        """Initialise a second head, whose layers have been reset by their own classes, as the network was."""
        init_he_fan_out(head)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        x = self.normalize(images)
        for index in range(self.stages):
            x = getattr(self, f"stage{index + 1}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@backbones.register("cnn", numbers=("width",))
@dataclass(frozen=True)
class CNNBackbone(Backbone):
    """A small CNN: `cnn-32` starts with 32 channels.

    Args:
        width: channels of the first stage, at least 1; each further stage has twice as many.
        stages: resolutions, 2 to 6; 3 suits images of 8 to 32 pixels.
        convolutions: convolutions per stage, at least 1.
    """

    width: int = 32
    stages: int = 3
    convolutions: int = 2

    attach_at: ClassVar[str | None] = "stage1"

    def __post_init__(self) -> None:
        for name in ("width", "convolutions"):
            at_least(1, name, getattr(self, name))
        if not 2 <= self.stages <= 6:
            raise UserError(f"stages must lie between 2 and 6, got {self.stages}")

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return CNN(self.width, self.stages, self.convolutions, num_classes, normalize)
