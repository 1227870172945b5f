"""Random search: candidates are drawn from the best point so far, and kept where the margin grows."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.base import Query, State, per_slot
from dualhead.attacks.targeted import Targeted, reached
from dualhead.noise import Streams
from dualhead.threats import Threat


class Proposals(Targeted):
    """A search without gradients that looks at one candidate a step.

    As long as no candidate is kept the next ones are known, so several can be one query: see `LooksAhead`.
    """

    uses_gradients = False

    restarts: int

    def jobs(self, num_classes: int) -> int:
        """One per restart."""
        del num_classes
        return self.restarts

    @abstractmethod
    def first(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return the points that are looked at first."""

    @abstractmethod
    def propose(self, x: Tensor, best: Tensor, number: Tensor, streams: Streams, threat: Threat) -> Tensor:
        """Return a candidate for each slot.

        Args:
            x: origins.
            best: the best points so far.
            number: how many candidates were proposed before, int64 [B].
            streams: the slots' own; a candidate's are `streams.fork(number)`.
            threat: what the adversary may do.
        """

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`."""
        streams = streams.fork(job)
        state = {
            "x": x,
            "y": y,
            "keys": streams.keys,
            "start": self.first(x, threat, streams),
            "adversarial": x.clone(),
            "margin": torch.full_like(clean[:, 0], -torch.inf),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
        }
        return self.with_goal(state, clean, y)

    def notes(self, num_classes: int) -> list[str]:
        """That it is targeted, if it is."""
        del num_classes
        return self.target_notes()

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Draw a candidate, look at it, and keep it where the margin grew or the model is fooled."""
        return self.leap(state, query, threat, 1)

    def leap(self, state: State, query: Query, threat: Threat, count: int) -> State:
        """See `LooksAhead.leap`: candidates that follow one another as long as none of them is kept."""
        ahead = torch.arange(count, device=state["y"].device)
        number = state["iteration"][:, None] + ahead
        rows = torch.arange(len(state["y"]), device=ahead.device).repeat_interleave(count)
        needed = ("x", "start", "adversarial", "keys")
        repeated = {key: state[key] if count == 1 else state[key][rows] for key in needed}
        candidates = self._candidates(repeated, number.flatten(), threat)
        asked: State = {key: state[key][rows] for key in ("y", "goal") if key in state}
        logits = query.logits(candidates)
        gap = -losses.margin(logits, asked["goal"]) if "goal" in asked else losses.margin(logits, asked["y"])
        margin, fooled = gap.view_as(number), reached(logits, asked).view_as(number)
        kept = ((margin > state["margin"][:, None]) | fooled) & (number < self.max_steps())
        first = torch.where(kept, ahead, count).amin(1)
        any_kept, place = first < count, first.clamp_max(count - 1)[:, None]
        chosen = candidates[torch.arange(0, len(rows), count, device=ahead.device) + place[:, 0]]
        left = (self.max_steps() - state["iteration"]).clamp_min(0)
        return {
            **state,
            "adversarial": torch.where(per_slot(any_kept, chosen), chosen, state["adversarial"]),
            "margin": torch.where(any_kept, margin.gather(1, place)[:, 0], state["margin"]),
            "found": state["found"] | (any_kept & fooled.gather(1, place)[:, 0]),
            "iteration": state["iteration"] + torch.minimum((first + 1).clamp_max(count), left),
        }

    def _candidates(self, state: State, number: Tensor, threat: Threat) -> Tensor:
        """Propose the candidates of step `number`, int64 [B], if the best so far is still the best then."""
        drawn = self.propose(state["x"], state["adversarial"], number - 1, Streams(state["keys"]), threat)
        return torch.where(per_slot(number == 0, drawn), state["start"], drawn)
