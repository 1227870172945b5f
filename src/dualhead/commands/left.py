"""How long a run will still take, judged by what its steps have taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from dualhead.recipe import Recipe

_PASSES_OF_OTHERS: Final = 500
"""Forward and backward passes that an attack without a number of steps is taken to need for an image."""
_TEST_SHARE: Final = 0.2
"""Test images for each training image, where a recipe does not limit them."""


class TimeLeft:
    """Time left of all stages and the evaluation, in proportion to passes: one for an image in each step of an attack.

    Passes of a part of the network count like whole ones until the part is trained, so this is a guess that grows
    better towards the end. No time is told before a few steps are done.

    Args:
        recipe: of the run.
        clock: in seconds.
    """

    def __init__(self, recipe: Recipe, clock: Callable[[], float] = time.monotonic) -> None:
        self._recipe = recipe
        self._clock = clock
        self._images = 0
        self._later = 0.0
        self._here = self._done = self._unit = 0.0
        self._passed = 0.0  # in this process, passes whose time is known
        self._began: float | None = None

    def stage(self, number: int, steps: int, done: int) -> None:
        """Take note that a stage (from 0) begins or goes on, of so many steps an epoch, some of which are done."""
        stage = self._recipe.stages[number]
        self._images = steps * stage.batch_size or self._images
        self._unit = stage.batch_size * _passes_of_step(stage)
        self._here, self._done = stage.epochs * steps * self._unit, done * self._unit
        later = sum(s.epochs * self._images * _passes_of_step(s) for s in self._recipe.stages[number + 1 :])
        self._later = later + self._evaluation()
        self._began = self._began or self._clock()

    def step(self) -> None:
        """Take note of a step."""
        self._done += self._unit
        self._passed += self._unit

    def seconds(self) -> float | None:
        """Return about how many seconds are left; None before anything is known."""
        if self._began is None or not self._passed:
            return None
        left = max(0.0, self._here - self._done) + self._later
        return (self._clock() - self._began) * left / self._passed

    def _evaluation(self) -> float:
        recipe = self._recipe
        images = recipe.evaluate.limit or _TEST_SHARE * self._images
        outputs = recipe.model.heads + 2 if recipe.model.attach_at else 1
        asked = recipe.evaluate.asked
        passes = sum(_steps(attack) for attack in asked.attacks.values())
        return images * outputs * (passes + sum(each.forward_passes for each in asked.measurements.values()))


def _passes_of_step(stage: Any) -> float:
    if not stage.trains:
        return 0.0
    if stage.free is not None:
        return float(stage.free.replays)
    return 1.0 + (_steps(stage.attack) if stage.objective.adversarial else 0.0)


def _steps(attack: Any) -> float:
    return float(getattr(attack, "steps", _PASSES_OF_OTHERS) * (getattr(attack, "restarts", 1) or 1))
