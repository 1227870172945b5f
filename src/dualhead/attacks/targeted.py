"""Targeted attacks: they want one answer, not just any wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Self, cast

import torch
from torch import Tensor

from dualhead.attacks.base import Search, State, predictions
from dualhead.errors import UserError
from dualhead.threats import Threat

NEXT, LEAST_LIKELY = "next", "least likely"


class Targeted(Search):
    """A search whose field `target` turns it into one for a wanted class; None leaves it as it is.

    `next` is the class after the label's, the first after the last; `least likely` the one with the lowest logit of the
    clean image (Kurakin et al. 2017, Adversarial Machine Learning at Scale, arXiv 1611.01236); else a class by its
    number or name. Images of the target class itself are not attacked.
    """

    target: int | str | None

    @classmethod
    def settle_target(cls, attack: Self) -> None:
        """Read the field `target` of a frozen attack: numbers given as text, and names with - or _ for the space.

        Raises:
            UserError: for an empty or negative one.
        """
        target = attack.target
        if isinstance(target, str):
            word = " ".join(target.lower().replace("-", " ").replace("_", " ").split())
            target = word if word in (NEXT, LEAST_LIKELY) else int(target) if target.isdecimal() else target
        elif isinstance(target, Integral) and not isinstance(target, bool):  # numpy has integers of its own
            target = int(target)
        object.__setattr__(attack, "target", target)
        if isinstance(target, bool | float) or target == "" or (isinstance(target, int) and target < 0):
            raise UserError(f"target must be a class, {NEXT} or {LEAST_LIKELY}; got {target!r}")

    def for_classes(self, names: Sequence[str]) -> Self:
        """See `Attack.for_classes`: a target's name becomes its number, and the label keeps the name.

        Raises:
            UserError: for a number that is the name of another class.
        """
        if self.target in (None, NEXT, LEAST_LIKELY) or str(self.target) not in names:
            return self
        place = names.index(str(self.target))
        if place == self.target:
            return self
        if isinstance(self.target, int) and self.target < len(names):
            raise UserError(
                f"target {self.target}: class {self.target} by its number is {names[self.target]!r}, and class {place} "
                "has that name; give the classes names that are no numbers"
            )
        return cast("Self", replace(cast("Any", self), target=place)).labelled(self.label)

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """See `Attack.parts`.

        Raises:
            UserError: for a target that is no class of the model.
        """
        known = isinstance(self.target, int) and self.target < num_classes
        if self.target not in (None, NEXT, LEAST_LIKELY) and not known:
            raise UserError(
                f"target {self.target}: no class of this model; write {NEXT}, {LEAST_LIKELY}, a number from 0 to "
                f"{num_classes - 1} or, where the evaluation knows the classes' names, one of these"
            )
        return super().parts(num_classes, threat, num_heads)

    def goal(self, clean: Tensor, y: Tensor) -> Tensor | None:
        """See `Search.goal`."""
        if self.target is None:
            return None
        if self.target == NEXT:
            return (y + 1) % clean.shape[1]
        if self.target == LEAST_LIKELY:
            return clean.argmin(1)
        assert isinstance(self.target, int), "parts has refused all else"
        return torch.full_like(y, self.target)

    def with_goal(self, state: State, clean: Tensor, y: Tensor) -> State:
        """Return a fresh state with the wanted classes in it, if there are any."""
        goal = self.goal(clean, y)
        return state if goal is None else {**state, "goal": goal.clone()}

    def target_notes(self) -> list[str]:
        """Say what the column of a targeted attack counts."""
        if self.target is None:
            return []
        return [
            f"{self.label}: targeted; robust accuracy counts whatever wrong answer it ended with, and an attack that "
            "may end with any of them finds more"
        ]


def reached(logits: Tensor, state: State) -> Tensor:
    """Tell where the model answers as the attack wants: with the goal or, without one, with anything but the label."""
    return predictions(logits) == state["goal"] if "goal" in state else predictions(logits) != state["y"]
