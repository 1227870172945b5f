"""What adversarial training descends, and what the attack inside it climbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.registry import Registry
from dualhead.errors import UserError


@dataclass(frozen=True)
class LossTerms:
    """A loss and the named parts it is the sum of.

    Args:
        total: scalar, with its graph.
        terms: scalars by name, weighted as they enter the total; for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def sum_of(cls, **terms: Tensor) -> LossTerms:
        """The sum of the terms."""
        return cls(sum(terms.values(), start=next(iter(terms.values())).new_zeros(())), terms)


class Objective(ABC):
    """A base method of adversarial training.

    Subclasses are frozen dataclasses registered in `objectives`. The class attributes tell the loop which forward
    passes it can leave out.
    """

    registered_name: ClassVar[str]
    adversarial: ClassVar[bool] = True
    """Whether the loss uses logits of attacked images."""
    clean: ClassVar[bool] = True
    """Whether the loss uses logits of clean images."""
    clean_target: ClassVar[bool] = False
    """Whether `inner_loss` uses the clean logits, taken once a batch in the mode in which the attack runs."""
    apart: ClassVar[bool] = True
    """Whether the loss is a mean over images of what depends on that image alone. Else it is another one for pieces of
    a batch, as `micro_batch` and several processes make them."""

    outputs: ClassVar[tuple[str, ...]] = ()
    """Outputs of a dual-head model that the loss is a function of, the deployed one last: logits are [B, outputs, C]
    then. Empty: the one output that a stage trains, [B, C]."""
    only_clean: ClassVar[tuple[str, ...]] = ()
    """Those of `outputs` whose logits of attacked images the loss does not use; they are left at 0, and no pass is
    made for them."""
    only_attacked: ClassVar[tuple[str, ...]] = ()
    """Likewise those whose logits of clean images it does not use."""
    teachers: ClassVar[tuple[str, ...]] = ()
    """Those of `outputs` that the others learn from and that learn nothing; a stage must not train them. If there are
    any, `inner_loss` is given their logits of clean images, and else those of `attacked`."""
    attacked: ClassVar[tuple[str, ...]] = ()
    """Outputs that `inner_loss` is a function of, as `outputs` are those of `loss`."""

    def at(self, epoch: int) -> Objective:
        """The objective in an epoch of its stage, counted from 0; most do not change."""
        del epoch
        return self

    @abstractmethod
    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """What the attack climbs, one number per image [B].

        Args:
            adv_logits: logits [B, C] of the attacked images.
            clean_logits: logits [B, C] of the clean images, detached; None unless `clean_target`.
            y: labels, int64 [B], or shares of the classes [B, C].
        """

    @abstractmethod
    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """What training descends, averaged over the batch.

        Args:
            clean_logits: logits [B, C] of the clean images; None unless `clean`.
            adv_logits: logits [B, C] of the attacked images; None unless `adversarial`.
            y: labels, int64 [B], or shares of the classes [B, C].
        """


def check_label_smoothing(value: float) -> None:
    """Refuse what is no share of a label.

    Raises:
        UserError: outside [0, 1).
    """
    if not 0 <= value < 1:
        raise UserError(f"label_smoothing must lie in [0, 1), got {value:g}; 0.1 is usual")


def given(logits: Tensor | None) -> Tensor:
    """The logits that an objective's class attributes have asked for."""
    assert logits is not None, "the loop must pass the logits that the objective asks for"
    return logits


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) per image [B], from logits [B, C]."""
    return F.kl_div(q_logits.log_softmax(1), p_logits.log_softmax(1), reduction="none", log_target=True).sum(1)


objectives: Registry[Objective] = Registry("objective", "dualhead.objectives", Objective)
