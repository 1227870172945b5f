"""One pixel that tells the class."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.data.poisons.base import Poison, Poisoned, check_share, choose, pixels_of, poisons
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split


@poisons.register("one_pixel")
@dataclass(frozen=True)
class OnePixel(Poison):
    """One pixel of an extreme colour in all images of a class, at the place where that stands out the most.

    Of all places and colours a class gets the one whose distance from the pixels of its images has the largest ratio of
    mean to deviation; no two classes share one.

    When: as the negative control. The pixel is outside every ball of a usual norm, so adversarial training restores
    nothing, and a study in which it does is wrong.

    Paper: Wu et al. 2023, One-pixel shortcut: on the learning preference of deep neural networks (OPS), arXiv
    2205.12141.

    Args:
        share: of all images.
        seed: of the choice of images, where not all are changed.
    """

    share: Real = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        pixels = pixels_of(clean)
        index = choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)
        labels, images = clean.labels[index], pixels[index].clone()
        taken: set[int] = set()
        width = clean.image_shape[2]
        colours = torch.tensor(list(itertools.product((0, 255), repeat=clean.image_shape[0])), dtype=torch.uint8)
        for label in torch.unique(labels).tolist():
            score = _score(pixels[clean.labels == label], colours).flatten()
            score[list(taken)] = -torch.inf
            best = int(score.argmax())
            taken.add(best)
            colour, place = divmod(best, clean.image_shape[1] * width)
            images[labels == label, :, place // width, place % width] = colours[colour]
        return Poisoned.of(clean, index, images=images)


def _score(images: Tensor, colours: Tensor) -> Tensor:
    """Return the ratio of mean to deviation of the distance to each colour, float64 [colours, H, W]."""
    scores = []
    for colour in colours:
        apart = (images.double() - colour.double()[:, None, None]).abs().mean(1) / 255
        scores.append(apart.mean(0) / apart.std(0, correction=0).clamp_min(1e-6))
    return torch.stack(scores)
