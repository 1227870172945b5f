"""Any network of this package with another layer in place of each batch norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dualhead.components.fields import at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.models.base import Backbone, ChannelStatistics, ImageShape, Preprocessing, backbones
from dualhead.models.normalize import Normalize

Norm = Literal["group", "sandwich", "none"]


class SandwichBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with a second affine map behind the first: g' (g x + b) + b', both at 1 and 0 to begin with.

    Between tied heads with `own: sandwich`, g and b are shared, while statistics, g' and b' are each route's own (Gong
    et al. 2022, Sandwich Batch Normalization, WACV).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.route_weight = nn.Parameter(torch.ones(channels))
        self.route_bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Reset both maps and the statistics."""
        super().reset_parameters()
        if hasattr(self, "route_weight"):  # torch resets a layer while it makes it
            nn.init.ones_(self.route_weight)
            nn.init.zeros_(self.route_bias)

    def after(self, x: Tensor) -> Tensor:
        """Apply the second map to [B, C, H, W]."""
        return x * self.route_weight[:, None, None] + self.route_bias[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, C, H, W] to features of the same shape."""
        normalised: Tensor = super().forward(x)
        return self.after(normalised).to(normalised.dtype)


def _made(norm: Norm, channels: int, groups: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(math.gcd(groups, channels), channels)
    return SandwichBatchNorm2d(channels) if norm == "sandwich" else nn.Identity()


@backbones.register("with_norm")
@dataclass(frozen=True)
class WithNorm(Backbone):
    """A network in which each two-dimensional batch norm is replaced; other weights start as they would.

    When: as a control of what batch norm has to do with a result, beside dual batch norm.

    Args:
        backbone: the network.
        norm: `group` (Wu and He 2018, arXiv 1803.08494), `sandwich` (two affine maps, for tied heads), or `none`.
        groups: of group norm; the greatest common divisor with a layer's channels is taken.
    """

    backbone: Annotated[Backbone, *component(backbones)]
    norm: Norm
    groups: int = 8

    attach_at: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        at_least(1, "groups", self.groups)
        object.__setattr__(self, "normalises", self.backbone.normalises)  # the network's word, not one of all of them

    def published_normalisation(self) -> ChannelStatistics | None:
        """As the network's."""
        return self.backbone.published_normalisation()

    def published_preprocessing(self) -> Preprocessing | None:
        """As the network's."""
        return self.backbone.published_preprocessing()

    def published_class_names(self) -> tuple[str, ...]:
        """As the network's."""
        return self.backbone.published_class_names()

    def weights_class_names(self, num_classes: int) -> tuple[str, ...]:
        """As the network's."""
        return self.backbone.weights_class_names(num_classes)

    def published_channels(self) -> int | None:
        """As the network's."""
        return self.backbone.published_channels()

    def on_its_own(self) -> Self:
        """Return it around the network that refers to no other file."""
        return replace(self, backbone=self.backbone.on_its_own())

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        model = self.backbone.create(num_classes, image_shape, normalize)
        found = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        if not found:
            raise UserError(f"with_norm: {self.backbone.registered_name} has no batch norm to replace")
        for name in found:
            parent, _, own = name.rpartition(".")
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.BatchNorm2d)
            setattr(model.get_submodule(parent), own, _made(self.norm, layer.num_features, self.groups))
        return model
