"""Floating-point operations, counted as they are dispatched: the unit in which costs of training are compared."""

from __future__ import annotations

from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountFlops(TorchDispatchMode):
    """Adds up the operations of convolutions and matrix products, forward and backward, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` also sorts them by module, for which it hooks into the backward pass;
    that does not work with `torch.autograd.grad` to an input, which is what attacks call.

    Attributes:
        total: so far.
    """

    total: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.total = 0

    def __enter__(self) -> Self:
        """Begin to count."""
        super().__enter__()  # type: ignore[no-untyped-call]  # likewise
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        del types
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
