"""IKL, the improved form of the decoupled KL divergence (Cui et al. 2024, NeurIPS, arXiv 2305.13948)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.objectives.base import (
    ATTACKED,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    check_label_smoothing,
    kl_divergence,
    objectives,
)


@objectives.register("ikl")
@dataclass(frozen=True)
class IKL(Objective):
    """TRADES with its divergence taken apart and improved.

    The gradient of KL(p || p') is that of a weighted mean square error between the differences of logits, which moves
    the clean prediction alone, plus a cross-entropy, which moves the attacked one alone. Here the first moves both, and
    is weighted by the mean prediction m for the image's class rather than by the image's own. With logits z, z' and
    d = z - z', p held constant in the last term:

        CE(f(x), y) + mse/4 sum_jk m_j m_k (d_j - d_k)^2 - ce sum_j p_j log p'_j

    The attack climbs KL(p || p'), as published. m is a constant, of softmax(z / temperature): the mean over the images
    of the class in the batch, where the public code takes that of the epoch before; so the loss has no memory, and a
    run that goes on is the run that was not stopped. With several processes it is the mean over a process's share of
    the batch; `micro_batch` is refused, since it would change the loss.

    When: in place of TRADES, with weight averaging or AWP as published; not with few images of a class in a batch.

    Paper: Cui et al. 2024, Decoupled Kullback-Leibler Divergence Loss, arXiv 2305.13948.

    Args:
        mse: weight of the square error, at least 0.
        ce: weight of the cross-entropy, at least 0.
        temperature: of the class means, greater than 0.
        label_smoothing: share s in [0, 1) of each label that is spread over all classes, on clean
            images: (1 - s) CE + s mean(-log p); 0.1 is usual.
    """

    mse: Real = 20.0
    ce: Real = 4.0
    temperature: Real = 4.0
    label_smoothing: Real = 0.0

    def __post_init__(self) -> None:
        for name in ("mse", "ce"):
            at_least(0, name, getattr(self, name))
        above(0, "temperature", self.temperature, "1 to 4 are usual")
        check_label_smoothing(self.label_smoothing)

    @property
    def per_image(self) -> bool:
        """False: the means over a class are those of the batch."""
        return False

    def needs(self) -> Mapping[str, Need]:
        """Logits p of clean and q of attacked images."""
        return {"p": Logits(), "q": Logits(on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb KL(p || p')."""
        return {ATTACKED: Inner(lambda y, seen: kl_divergence(seen["p"], seen["q"]), uses=("p", "q"), flat=True)}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the sum above."""
        clean, adv = seen["p"], seen["q"]
        weights = class_means((clean.detach() / self.temperature).softmax(1), y)
        soft_labels = -(clean.detach().softmax(1) * adv.log_softmax(1)).sum(1)
        return LossTerms.sum_of(
            clean=F.cross_entropy(clean, y, label_smoothing=self.label_smoothing),
            square_error=self.mse * weighted_square_error(clean - adv, weights).mean(),
            soft_labels=self.ce * soft_labels.mean(),
        )


def class_means(probabilities: Tensor, y: Tensor) -> Tensor:
    """For each image the mean prediction of its class in the batch, [B, C] from [B, C].

    Args:
        probabilities: [B, C].
        y: labels, int64 [B], or shares of the classes [B, C], which weigh means alike.
    """
    # Not one_hot, which waits for the device to look at the labels.
    shares = y.to(probabilities.dtype) if y.dim() == 2 else torch.zeros_like(probabilities).scatter(1, y[:, None], 1.0)
    means = shares.T @ probabilities / shares.sum(0).clamp_min(1e-12)[:, None]
    return shares @ means


def weighted_square_error(difference: Tensor, weights: Tensor) -> Tensor:
    """1/4 sum_jk w_j w_k (d_j - d_k)^2 per image [B], from d [B, C] and w [B, C], which sums to 1 over the classes.

    It is half of d's variance under w, which needs no pairs.
    """
    centred = difference - (weights * difference).sum(1, keepdim=True)
    return 0.5 * (weights * centred.square()).sum(1)
