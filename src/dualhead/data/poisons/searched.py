"""The base of poisons whose images a search finds with a surrogate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from dualhead.data.poisons.base import Poison, Poisoned, check_share, choose, moved, pixels_of
from dualhead.data.poisons.search import Craft, Search
from dualhead.data.split import Split

_FLOAT32: Final = 1e-4
"""Grey levels that images found in float32 may be off by: values up to 1 are rounded by 255 2^-25 each time."""


class Searched(Poison):
    """A poison whose images a search finds with a surrogate; labels stay.

    Subclasses have a field `share`, of the images that may be changed.
    """

    share: float

    def __post_init__(self) -> None:
        check_share(self.share)
        self.search()  # which refuses settings of its own

    @abstractmethod
    def search(self) -> Search:
        """Return how images are found, as far as that is known without the classes.

        Raises:
            UserError: for an impossible setting.
        """

    def search_among(self, class_names: Sequence[str]) -> Search:
        """Return how images of these classes are found; a poison that names a class says which one it is.

        Raises:
            UserError: if there is no such class.
        """
        return self.search()

    def chosen(self, clean: Split) -> Tensor:
        """Return the positions of the images that are changed, int64 [M], ascending; a share of all.

        Raises:
            UserError: if there is none.
        """
        return choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)

    def sought(self, clean: Split, index: Tensor) -> Tensor:
        """Return the labels that the search uses, int64 [M]; the images' own.

        Args:
            clean: all images.
            index: positions of those that are changed, int64 [M].
        """
        return clean.labels[index]

    def finished(self, images: Tensor) -> Tensor:
        """Return the images that are trained on, of those that were found; uint8 [M, C, H, W]."""
        return images

    @property
    def needs_surrogate(self) -> bool:
        """See `Poison.needs_surrogate`."""
        return True

    @property
    def cost(self) -> str:
        """See `Poison.cost`."""
        return f"{self.search().cost}; the results tell it, and charge it to no method."

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        assert craft is not None, "whoever applies it must bring what trains its surrogate"
        search, index = self.search_among(clean.class_names), self.chosen(clean)
        before = pixels_of(clean)[index]
        found, facts = craft.find(clean, index, self.sought(clean, index), search)
        change = 255 * found.double() - before.double()
        whole = change.round()  # on the edge of a ball of 8/255 it is 8, and not 7, where float32 has 7.99999
        images = moved(before, torch.where((change - whole).abs() <= _FLOAT32, whole, change))
        return Poisoned.of(clean, index, images=self.finished(images), facts=facts)
