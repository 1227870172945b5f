"""Poisons: training images and labels in, changed ones out, with a record of every change."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.components.registry import Registry
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams

ClassName = int | str
"""A class by its number, or by its name."""
REMOVED: Final = -1
"""The new label of an image that is left out."""
_EXACT: Final = 1e-6
"""Share of a grey level that a product such as 8/255 times 255 may lack of a whole number."""


@dataclass(frozen=True, eq=False)
class Poisoned:
    """Poisoned training images, and what was done to them.

    Args:
        split: the images and labels that are trained on.
        index: positions, in the images as they were, of those that were changed, relabelled or left out; int64 [M],
            ascending.
        old_label: their labels before, int64 [M].
        new_label: their labels after, int64 [M]; -1 for an image that is left out.
        linf: largest change of a value of each, float64 [M], images in [0, 1]; NaN where it is left out.
        l2: Euclidean length of its change, likewise.
        rows: the position of each image of `split` in the images as they were, int64 [N].
        facts: what else there is to tell, JSON values, such as the cost of a surrogate.
    """

    split: Split
    index: Tensor
    old_label: Tensor
    new_label: Tensor
    linf: Tensor
    l2: Tensor
    rows: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, clean: Split, index: Tensor, *, images: Tensor | None = None, labels: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Poisoned:  # fmt: skip
        """Put changed images and labels in their places.

        Args:
            clean: the images as they were.
            index: positions of those that change, int64 [M], ascending.
            images: what they become, uint8 [M, C, H, W]; None if they stay as they are.
            labels: their new labels, int64 [M]; None if these stay.
            facts: see the class.

        Raises:
            UserError: for images that are as they were.
        """
        old = clean.labels[index]
        new = old if labels is None else labels
        every = clean.labels.clone()
        every[index] = new
        split, zero = replace(clean, labels=every), torch.zeros(len(index), dtype=torch.float64)
        linf, l2 = zero, zero.clone()
        if images is not None:
            pixels = pixels_of(clean)
            linf, l2 = distances(pixels[index], images)
            if not bool((linf > 0).any()):
                raise UserError(
                    "changes no pixel of any image: by less than one of 255 grey levels, or to what is there already; "
                    "choose a larger one, or another"
                )
            pixels = pixels.clone()
            pixels[index] = images
            split = replace(split, images=pixels)
        return cls(split, index, old, new, linf, l2, torch.arange(len(clean)), dict(facts or {}))

    @classmethod
    def without(cls, clean: Split, index: Tensor) -> Poisoned:
        """Leave images out.

        Raises:
            UserError: if none would be left.
        """
        left = torch.ones(len(clean), dtype=torch.bool)
        left[index] = False
        rows = left.nonzero()[:, 0]
        if not len(rows):
            raise UserError("leaves no training image")
        nothing = torch.full((len(index),), torch.nan, dtype=torch.float64)
        return cls(
            clean.take(rows),
            index,
            clean.labels[index],
            torch.full_like(index, REMOVED),
            nothing,
            nothing.clone(),
            rows,
        )

    def manifest(self) -> dict[str, NDArray[Any]]:
        """Return the record of every change, by name: `index`, `old_label`, `new_label`, `linf`, `l2`."""
        names = ("index", "old_label", "new_label", "linf", "l2")
        return {name: getattr(self, name).numpy() for name in names}

    def digest(self) -> str:
        """Return a name for what is trained on: of the record, and of the pixels of changed images."""
        known = hashlib.sha256()
        for name, values in self.manifest().items():
            known.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        if not self.split.is_stored:
            places = torch.isin(self.rows, self.index).nonzero()[:, 0]
            known.update(self.split.images[places].numpy().tobytes())
        return known.hexdigest()


class Poison(ABC):
    """A change of training images or labels.

    The result for an image depends on the whole set and the poison's own seed, never on the run's. Subclasses are
    frozen dataclasses registered in `poisons`, with a field `seed`.
    """

    registered_name: ClassVar[str]
    seed: int

    @abstractmethod
    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """Poison training images.

        Args:
            clean: images in memory, unless labels alone change; they are left as they are.
            craft: trains a surrogate; given where `needs_surrogate`.

        Raises:
            UserError: for a class that is not there, a share of no image, or images that do not fit.
        """

    def target_of(self, class_names: Sequence[str]) -> int | None:
        """Return the class that triggered images are to be taken for; None where nothing triggers.

        Raises:
            UserError: if there is no such class.
        """
        return None

    def trigger(self, images: Tensor) -> Tensor:
        """Return test images with the trigger, uint8 [B, C, H, W]; as they are where nothing triggers."""
        return images

    def aims_at(self, class_names: Sequence[str]) -> tuple[int, int] | None:
        """Return the position of a test image and the class that it is to be taken for; None where none is aimed at."""
        return None

    def pairs_of(self, class_names: Sequence[str]) -> list[tuple[int, int]]:
        """Return the classes whose images get the label of another one, and that one; none for other poisons."""
        return []

    @property
    def needs_surrogate(self) -> bool:
        """Whether a network must be trained to make it."""
        return False

    @property
    def changes_pixels(self) -> bool:
        """Whether it changes images, which must then lie in memory."""
        return True

    @property
    def cost(self) -> str:
        """Return what making it costs, in words."""
        return "no pass of a network."


poisons: Registry[Poison] = Registry("poison", "dualhead.data.poisons", Poison)
"""Poisons by name."""


# ---- what poisons share


def triggered(poison: Poison, split: Split) -> tuple[Tensor, Split] | None:
    """Return test images of all classes but the target's, with the trigger; None for a poison without one.

    Args:
        poison: it.
        split: test images.

    Returns:
        Their positions in `split`, int64 [M], and the images with their true labels.
    """
    target = poison.target_of(split.class_names)
    if target is None:
        return None
    rows = (split.labels != target).nonzero()[:, 0]
    chosen = split.take(rows)
    return rows, replace(chosen, images=poison.trigger(chosen.images[:]))


def pixels_of(split: Split) -> Tensor:
    """Return the images of a split in memory.

    Raises:
        UserError: if they are on disk.
    """
    if split.is_stored:
        raise UserError("changes pixels, and these images stay on disk; set data.stream=false to decode them")
    return split.images[:]


def class_number(name: ClassName, class_names: Sequence[str], key: str) -> int:
    """Return the number of a class that is named, or numbered.

    Raises:
        UserError: if there is none, or a number is the name of another class.
    """
    known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    if isinstance(name, str) and name in class_names:
        return list(class_names).index(name)
    if isinstance(name, int) and not 0 <= name < len(class_names):
        raise UserError(f"{key}: there is no class {name}; classes are 0 to {len(class_names) - 1} ({known})")
    if isinstance(name, str):
        raise UserError(f"{key}: {name!r} is no class of these images; they are {known}")
    if str(name) in class_names and class_names[name] != str(name):
        raise UserError(
            f"{key}: class {name} by its number is {class_names[name]!r}, and another one has that name; write the "
            f'name of the one that is meant in quotes, "{class_names[name]}" or "{name}"'
        )
    return name


def check_share(share: float, key: str = "share") -> None:
    """Refuse a share that is not in (0, 1].

    Raises:
        UserError: saying so.
    """
    if not 0 < share <= 1:
        raise UserError(f"{key} must lie in (0, 1], got {share:g}")


def choose(candidates: Tensor, count: int, seed: int, purpose: str = "poison") -> Tensor:
    """Draw positions at random, the same for one seed whatever else is drawn.

    Args:
        candidates: positions, int64 [N].
        count: how many.
        seed: of the poison.
        purpose: what they are drawn for.

    Returns:
        int64 [count], ascending.

    Raises:
        UserError: if that is none, or more than there are.
    """
    if not 1 <= count <= len(candidates):
        raise UserError(f"would change {count} of {len(candidates)} images; choose another share")
    lot = Streams.of(seed, candidates).fork(purpose).bits(1)[:, 0]
    return candidates[lot.argsort(stable=True)[:count]].sort().values


def members(split: Split, label: int) -> Tensor:
    """Return the positions of the images of a class, int64 [N].

    Raises:
        UserError: if there is none.
    """
    found = (split.labels == label).nonzero()[:, 0]
    if not len(found):
        raise UserError(f"class {split.class_names[label]!r} has no training image")
    return found


def moved(images: Tensor, change: Tensor) -> Tensor:
    """Add a change to images, rounded towards the clean pixel, so that no bound on it is exceeded.

    Args:
        images: uint8 [B, C, H, W].
        change: in grey levels of 255, floating [B, C, H, W], or [C, H, W] for all.

    Returns:
        uint8 [B, C, H, W].
    """
    change = change.to(torch.float64)
    whole = (change.abs() + _EXACT).floor() * change.sign()
    return (images.to(torch.float64) + whole).clamp(0, 255).to(torch.uint8)


def distances(clean: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest change and the Euclidean length of the change of each image, float64 [B], in [0, 1]."""
    change = (changed.to(torch.float64) - clean.to(torch.float64)).flatten(1) / 255
    return change.abs().amax(1), change.norm(dim=1)


def class_vectors(classes: int, seed: int, purpose: str, *shape: int) -> Tensor:
    """Return a normal vector for each class, float32 [K, *shape], that depends on seed and class alone."""
    return Streams.of(seed, torch.arange(classes)).fork(purpose).normal(*shape)
