"""Base class and registry of aggregators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Protocol, runtime_checkable

from torch import Tensor, nn

from dualhead.components.registry import Registry

MAX_CLASSES_OF_PAIRWISE_CNN: Final = 20
"""Up to here the paper's aggregator is in proportion (its last layer grows with C^3); beyond, `pairwise_shared`."""


class Aggregator(ABC):
    """How the heads' logits become one: a recipe's choice, from which the module is made.

    Subclasses are frozen dataclasses registered in `aggregators`.
    """

    registered_name: ClassVar[str]

    @abstractmethod
    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """A fresh module from head logits [B, H, C] to logits [B, C].

        Args:
            num_classes: C.
            heads: H, at least 2.

        Raises:
            UserError: if it cannot be used with that many classes or heads.
        """


@runtime_checkable
class Chosen(Protocol):
    """An aggregator's module whose parameters are chosen from a list, by a stage with `fit`, and not learnt."""

    def candidates(self) -> Sequence[Mapping[str, float]]:
        """Return the candidates to choose from."""

    def assign(self, settings: Mapping[str, float]) -> None:
        """Take one of them over."""

    def __call__(self, head_logits: Tensor) -> Tensor:
        """Logits [B, C] from head logits [B, H, C]."""


aggregators: Registry[Aggregator] = Registry("aggregator", "dualhead.heads.aggregators", Aggregator)


def default_aggregator(num_classes: int) -> str:
    """The name of the aggregator in use when none is asked for: the paper's as long as its size permits."""
    return "pairwise_cnn" if num_classes <= MAX_CLASSES_OF_PAIRWISE_CNN else "pairwise_shared"
