"""The state of an objective over a stage, moved every few steps by what was measured in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualhead.objectives import EPOCH, Objective


class Curriculum:
    """Keeps an objective's state, and the means that its next advance needs.

    Args:
        objective: of the stage, as its recipe says.
        steps: in an epoch.

    Attributes:
        state: the objective's, as it stands.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self._objective = objective
        window = objective.window()
        self._window = steps if window == EPOCH else window
        self.state: dict[str, float] = dict(objective.begin())
        self._sums: dict[str, Tensor] = {}
        self._taken: Tensor | float = 0.0
        self._steps = 0

    def add(self, terms: Mapping[str, Tensor], taken: Tensor) -> bool:
        """Take in a step; at the end of a window the host waits for the device, and the state moves.

        Args:
            terms: scalars of the step, over all processes.
            taken: bool scalar; a step that was dropped does not count.

        Returns:
            Whether the state is another one now.
        """
        if not self._window:
            return False
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(taken, value.float(), 0.0)
        self._taken = self._taken + taken.float()
        self._steps += 1
        if self._steps < self._window:
            return False
        count, before = float(self._taken), dict(self.state)
        if count:
            means = {name: float(value) / count for name, value in self._sums.items()}
            self.state = dict(self._objective.advance(self.state, means))
        self._sums, self._taken, self._steps = {}, 0.0, 0
        return self.state != before

    def state_dict(self) -> dict[str, Any]:
        """Return all that determines what comes next."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"state": dict(self.state), "sums": sums, "taken": float(self._taken), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.state, self._steps = dict(state["state"]), int(state["steps"])
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self._taken = torch.tensor(float(state["taken"]), device=device)
