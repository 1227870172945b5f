"""Base class and registry of aggregators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch
from torch import Size, Tensor, nn

from dualhead.components.registry import Registry

MAX_CLASSES_OF_PAIRWISE_CNN: Final = 20
"""Up to here the paper's aggregator is in proportion (its last layer grows with C^3); beyond, `pairwise_shared`."""
DH_AT: Final = "DH-AT, Jiang et al. 2021, arXiv 2104.10377"
"""The paper that aggregators over pairs of classes are of, or go back to."""


class Aggregator(ABC):
    """How the heads' logits become one: a recipe's choice, from which the module is made.

    Subclasses are frozen dataclasses registered in `aggregators`.
    """

    registered_name: ClassVar[str]
    paper: ClassVar[str] = ""
    """A source that the card of a model cites in place of the aggregator's name."""

    @abstractmethod
    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """A fresh module from head logits [B, H, C] to logits [B, C].

        Args:
            num_classes: C.
            heads: H, at least 2.

        Raises:
            UserError: if it cannot be used with that many classes or heads, or sees features, see `create_over`.
        """

    def create_over(self, features: Sequence[Size], num_classes: int, heads: int = 2) -> nn.Module:
        """A fresh module for a trunk: `create`'s, or a `SeesFeatures` where the aggregator needs features too.

        Args:
            features: shape of one image's features [...], for each tensor that crosses the cut.
            num_classes: C.
            heads: H, at least 2.

        Raises:
            UserError: if it cannot be used with these.
        """
        del features
        return self.create(num_classes, heads)

    @property
    def router_names(self) -> tuple[str, ...]:
        """Names of its routers, see `SeesFeatures`; most have none."""
        return ()


class SeesFeatures(nn.Module):
    """Base of aggregators' modules that see what crosses the cut beside the heads' logits.

    Such a module may have routers: submodules `router1`, `router2`, ..., each of which merges the heads in its own way.
    A router is a part of the classifier, which trains apart from the others, and one of its outputs.

    Attributes:
        routers: names of the routers; empty if there are none.
        known: a router may look at so many of the heads, from the first on, and then takes logits of these alone too;
            None: at all of them.
    """

    routers: tuple[str, ...] = ()
    known: int | None = None

    def forward(self, head_logits: Tensor, features: Any) -> Tensor:
        """Return logits [B, C].

        Args:
            head_logits: [B, H, C].
            features: what crosses the cut, a tensor [B, ...] or a tuple of tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def evenly(self) -> SeesFeatures:
        """Return the same module on the same tensors, with routers weighed alike whatever the image: the control."""
        raise NotImplementedError(f"{type(self).__name__} has no routers")

    def look(self, features: Any) -> None:
        """Run the layers that see features alone, for hooks on them: objectives may need what these give."""

    def shown(self, head_logits: Tensor, features: Any) -> Tensor:
        """Return what attacks may see, from one pass: logits of heads, routers and, last, its own [B, H + R + 1, C].

        A constant may be added to the logits of a head or router in each image, as the logarithm of its share.
        """
        assert not self.routers, "a module with routers shows their logits too"
        return torch.cat((head_logits, self(head_logits, features)[:, None]), 1)


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
