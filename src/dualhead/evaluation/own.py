"""A plain function as an attack."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dualhead.attacks import Attack, Query, Search, State, predictions
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat

OwnAttack = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""(model, images float32 [B, C, H, W] in [0, 1], labels int64 [B]) to images of that shape. `model` gives logits [B, K]
and lets gradients through; it counts its passes."""


def as_attack(spec: Any, where: str) -> str | Mapping[str, Any] | Attack:
    """Return the spec, or for a function the attack that calls it.

    Args:
        spec: what was given for an attack.
        where: the argument that holds it, for messages.

    Raises:
        UserError: for anything else.
    """
    if isinstance(spec, str | Mapping | Attack):
        return spec
    if callable(spec) and not isinstance(spec, type):
        return FunctionAttack.of(spec)
    told = f"the class {spec.__name__}; give {spec.__name__}(...)" if isinstance(spec, type) else repr(spec)
    raise UserError(f"{where}: must be an attack, its name or fields, or a function that attacks; got {told}")


@dataclass(frozen=True)
class FunctionAttack(Search):
    """One call of somebody's function; what it returns is confined to the budget and then judged.

    The function sees images in batches of any size and order, and draws random numbers of its own.

    Args:
        name: the function's.
        call: of this evaluation alone, since nothing tells whether the function is the same another time.
    """

    registered_name: ClassVar[str] = "function"
    short_numbers: ClassVar[tuple[str, ...]] = ()
    norms: ClassVar[tuple[str, ...] | None] = ("Linf", "L2", "L1", "L0", "patch")
    """Those whose points are images."""

    name: str
    call: str
    function: OwnAttack = dataclasses.field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, function: OwnAttack) -> Self:
        """Return the attack that calls a function."""
        name = str(getattr(function, "__name__", type(function).__name__))
        made = cls("function" if name == "<lambda>" else name, uuid.uuid4().hex)
        object.__setattr__(made, "function", function)
        return made

    @property
    def label(self) -> str:
        """Return the function's name."""
        return self.name

    def max_steps(self) -> int:
        """One."""
        return 1

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """The clean images."""
        del clean, job, threat, streams
        none = torch.zeros(len(x), device=x.device)
        return {
            "x": x.clone(),
            "y": y.clone(),
            "adversarial": x.clone(),
            "found": none.bool(),
            "iteration": none.long(),
        }

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Call the function."""
        x, y = state["x"], state["y"]
        with torch.enable_grad():
            made = self.function(query.ask, x.clone(), y.clone())
        if not isinstance(made, Tensor) or made.shape != x.shape:
            shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UserError(f"attack {self.label}: must return images {list(x.shape)}, got {shape}")
        made = made.detach().to(x)
        if not bool(made.isfinite().all()):
            raise UserError(f"attack {self.label}: returned images with NaN or infinite values")
        adversarial = threat.confine(made, x)
        wrong = predictions(query.logits(adversarial)) != y
        return {**state, "adversarial": adversarial, "found": wrong, "iteration": state["iteration"] + 1}
