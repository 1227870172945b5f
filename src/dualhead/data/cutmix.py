"""CutMix (Yun et al. 2019, arXiv 1905.04899): a box of another image, and its share of the label."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import Field
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.components.sections import Section
from dualhead.noise import Streams


class CutMix(Section):
    """Each image gets a box of a partner's pixels; the label becomes shares by area, and the attack aims at those.

    As published the share of the image itself is lambda ~ Beta(1, 1), the box has sqrt(1 - lambda) of each side, its
    centre is uniform, what lies outside the image is cut off, and the label is counted by the area that remains.
    Unlike there, box and partner are drawn for each image, from its own stream and from the whole of the training
    images, so that the batch around it does not matter.
    """

    p: Real = Field(1.0, ge=0, le=1)
    """Share of the images that are mixed."""

    def partners(self, streams: Streams, images: int) -> Tensor:
        """Return the positions of the partners, int64 [B], in [0, images)."""
        return streams.fork("partner").integers(images, 1)[:, 0]

    def __call__(
        self, images: Tensor, others: Tensor, y: Tensor, other_y: Tensor, streams: Streams, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images and their labels.

        Args:
            images: uint8 [B, C, H, W].
            others: the partners, likewise.
            y: labels, int64 [B].
            other_y: labels of the partners.
            streams: streams of these samples.
            num_classes: K.

        Returns:
            uint8 [B, C, H, W], and shares float32 [B, K] that add up to 1.
        """
        inside = self._boxes(streams, *images.shape[2:])
        share = 1.0 - inside.flatten(1).float().mean(1)[:, None]
        labels = share * F.one_hot(y, num_classes) + (1.0 - share) * F.one_hot(other_y, num_classes)
        return torch.where(inside[:, None], others, images), labels

    def _boxes(self, streams: Streams, height: int, width: int) -> Tensor:
        """Return the pixels that come from the partner, bool [B, H, W]."""
        side = (1.0 - streams.fork("share").uniform(1)).sqrt()
        mixed = streams.fork("mixed").uniform(1) < self.p
        edges = []
        for name, length in (("row", height), ("column", width)):
            half = (side * length).floor()
            start = streams.fork(name).integers(length, 1) - torch.div(half, 2, rounding_mode="floor")
            at = torch.arange(length, device=side.device)
            edges.append((at >= start) & (at < start + half))
        return edges[0][:, :, None] & edges[1][:, None, :] & mixed[:, :, None]
