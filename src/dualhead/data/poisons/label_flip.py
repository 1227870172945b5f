"""Wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    ClassName,
    Poison,
    Poisoned,
    check_share,
    choose,
    class_number,
    members,
    poisons,
)
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams


@poisons.register("label_flip")
@dataclass(frozen=True)
class LabelFlip(Poison):
    """Wrong labels on images that stay as they are: to any other class at random, or from one class to another.

    When: labels come from a crowd or a search engine. Adversarial training overfits to wrong labels for as long as it
    trains, so look at the best epoch beside the last one.

    Paper: Biggio et al. 2011, Support vector machines under adversarial label noise; symmetric noise as in Patrini et
    al. 2017, arXiv 1609.03683.

    Args:
        share: of all images, or with `pairs` of the images of each first class; in (0, 1]. A new label is always
            another one: in a tenth of the cases "uniform over ten classes" would change nothing.
        pairs: `[[cat, dog], ...]`: images of the first class of each pair get the label of the second. Empty: any.
        seed: of the choice.
    """

    share: Real = 0.2
    pairs: tuple[tuple[ClassName, ClassName], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        _check_pairs(self.pairs)

    @property
    def changes_pixels(self) -> bool:
        """See `Poison.changes_pixels`."""
        return False

    def pairs_of(self, class_names: Sequence[str]) -> list[tuple[int, int]]:
        """See `Poison.pairs_of`."""
        found = [(class_number(a, class_names, "pairs"), class_number(b, class_names, "pairs")) for a, b in self.pairs]
        _check_pairs(found)  # a name and a number may be one class
        return found

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        if not self.pairs:
            index = choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)
            step = 1 + Streams.of(self.seed, index).fork("new label").integers(clean.num_classes - 1, 1)[:, 0]
            return Poisoned.of(clean, index, labels=(clean.labels[index] + step) % clean.num_classes)
        labels, chosen = clean.labels.clone(), []
        for first, second in self.pairs_of(clean.class_names):
            candidates = members(clean, first)
            index = choose(candidates, round(self.share * len(candidates)), self.seed)
            labels[index] = second
            chosen.append(index)
        index = torch.cat(chosen).sort().values
        return Poisoned.of(clean, index, labels=labels[index])


def _check_pairs(pairs: Sequence[tuple[ClassName, ClassName]]) -> None:
    firsts = [first for first, _ in pairs]
    if len(set(firsts)) < len(firsts) or any(first == second for first, second in pairs):
        raise UserError("pairs: each first class once, and its second another one, e.g. [[cat, dog], [deer, horse]]")
