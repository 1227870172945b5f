"""Projected gradient descent (Madry et al. 2018), for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.base import (
    Climb,
    Query,
    State,
    attacks,
    per_slot,
    require_at_least_one,
    slope,
)
from dualhead.attacks.targeted import Targeted, reached
from dualhead.components.fields import Real, above, unless_given
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat

Start = Literal["uniform", "gaussian", "clean"]
Loss = Literal["ce", "kl", "margin"]


def beside(x: Tensor, threat: Threat, streams: Streams) -> Tensor:
    """Return x + 0.001 N(0, 1) within the budget, where TRADES begins: its divergence has no slope at x itself."""
    return threat.project(x + 0.001 * streams.normal(*x.shape[1:]).to(x.dtype), x)


@attacks.register("pgd", numbers=("steps",))
@dataclass(frozen=True)
class PGD(Targeted):
    """Steepest ascent with projection.

    In evaluations an ascent ends where it comes back to a point that it has looked at (Doldo et al. 2025, Stop Walking
    in Circles, arXiv 2503.19347): from there on it would only repeat itself, so the verdict is the same. That needs a
    model whose answers are the same every time and in every batch.

    When: in training, and for a quick look while you work. Not as the only evidence for robustness.

    Paper: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.

    Args:
        steps: gradient steps, at least 1; the short form `pgd-40` sets it.
        step_size: length of a step in the units of eps; None for 2.5 eps / steps (Madry et al. 2018, section 5.1).
        start: `uniform` in the ball; `gaussian`, x + 0.001 N(0, 1) as in TRADES; `clean`, x itself.
        loss: `ce`, `kl` (from the clean prediction) or `margin`. Training uses its objective's loss instead.
        restarts: independent starts, at least 1.
        target: for evaluation: the answer wanted, `next` (the class after the label's), `least likely` or a class;
            None for any wrong one. The loss of the target is then descended.
    """

    always_numbered: ClassVar[bool] = True
    stops_at_cycles: ClassVar[bool] = True

    steps: int = 40
    step_size: Real | None = None
    start: Start = "uniform"
    loss: Loss = "ce"
    restarts: int = 1
    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "restarts")
        for name, value, known in (("start", self.start, get_args(Start)), ("loss", self.loss, get_args(Loss))):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.settle_target(self)
        if self.loss == "kl" and self.begins_clean:
            raise UserError("loss: kl has no slope at the clean image; write start: uniform or gaussian")
        if self.target is not None and self.loss == "kl":
            raise UserError("target: the loss kl leads away from the clean answer, to no class; use ce or margin")
        above(0, "step_size", self.step_size, "write e.g. 2/255")

    @property
    def single_step(self) -> bool:
        """With one step."""
        return self.steps == 1

    @property
    def begins_clean(self) -> bool:
        """If `start` says so."""
        return self.start == "clean"

    def step_length(self, threat: Threat) -> float:
        """The step size in use under a threat model."""
        return 2.5 * threat.eps / self.steps if self.step_size is None else self.step_size

    def start_point(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """The point where the ascent begins, within the budget."""
        if self.start == "uniform":
            return threat.start(x, streams, "ball")
        return beside(x, threat, streams) if self.start == "gaussian" else x.clone()

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """The last iterate, as adversarial training uses it: `steps` forward and backward passes, no more.

        See `Maximiser.maximise`.
        """
        assert self.target is None, "a stage refuses it, since objectives climb losses of their own"
        x_adv, length = self.start_point(x, threat, streams), self.step_length(threat)
        for _ in range(self.steps):
            x_adv = threat.project(threat.ascend(x_adv, slope(climb, x_adv), length), x)
        return x_adv

    def jobs(self, num_classes: int) -> int:
        """One per restart."""
        del num_classes
        return self.restarts

    def max_steps(self) -> int:
        """The gradient steps, and one look at the last iterate."""
        return self.steps + 1

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`."""
        start = self.start_point(x, threat, streams.fork(job))
        state = {
            "x": x,
            "y": y,
            "clean": clean,
            "iterate": start,
            "landmark": start.clone(),
            "landmark_at": torch.zeros_like(y),
            "over": torch.zeros_like(y, dtype=torch.bool),
            "adversarial": x.clone(),
            "best_loss": torch.full_like(clean[:, 0], -torch.inf),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
        }
        return self.with_goal(state, clean, y)

    def notes(self, num_classes: int) -> list[str]:
        """That it is targeted, if it is."""
        del num_classes
        return self.target_notes()

    def _loss(self, logits: Tensor, state: State) -> Tensor:
        if self.loss == "kl":
            return losses.kl_from_clean(logits, state["clean"])
        loss = losses.cross_entropy if self.loss == "ce" else losses.margin
        return -loss(logits, state["goal"]) if "goal" in state else loss(logits, state["y"])

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Look at the iterate, keep it if it is the worst so far for the model, and climb."""
        iterate, x = state["iterate"], state["x"]
        logits, loss, gradient = query.gradient(iterate, lambda z: self._loss(z, state))
        fooled = reached(logits, state)
        better = torch.where(fooled == state["found"], loss > state["best_loss"], fooled)
        following = threat.project(threat.ascend(iterate, gradient, self.step_length(threat)), x)
        return {
            **state,
            **(self._watch(state, following, fooled) if query.repeatable else {}),
            "iterate": following,
            "adversarial": torch.where(per_slot(better, x), iterate, state["adversarial"]),
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "found": state["found"] | fooled,
            "iteration": state["iteration"] + 1,
        }

    def _watch(self, state: State, following: Tensor, fooled: Tensor) -> State:
        """Compare the next iterate with a landmark, an earlier one that is renewed at growing intervals (Brent 1980).

        Where they are equal the ascent goes round in circles, and has looked at every point of the circle. A landmark
        behind a point that fools the model counts for nothing: whoever runs the attack may ask for that point again.
        """
        count = state["iteration"] + 1
        over = state["over"] | (~fooled & (following == state["landmark"]).flatten(1).all(1))
        renewed = fooled | (2 * count >= 3 * state["landmark_at"] + 2)
        return {
            "over": over,
            "landmark": torch.where(per_slot(renewed, following), following, state["landmark"]),
            "landmark_at": torch.where(renewed, count, state["landmark_at"]),
        }
