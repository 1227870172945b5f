"""Noise that mixes up the features of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.data.poisons.base import poisons
from dualhead.data.poisons.search import BATCH, Projected, Surrogate, Workbench
from dualhead.data.poisons.searched import Searched
from dualhead.data.split import Split
from dualhead.threats import ThreatModel

_SAT = Surrogate("sat", eps=4 / 255)


@poisons.register("entangled")
@dataclass(frozen=True)
class Entangled(Searched):
    """Images whose features in a robust network lie far from their class's centre, or near another's; labels stay.

    With `push` they are driven from the mean of the features of their class, with `pull` to the nearest mean of another
    class. Features that a robust network uses no longer tell the classes apart, so that adversarial training loses what
    it restores under other noise. The published search has another step rule than the projected gradient here.

    When: against a method that is adversarial training itself; most other noise is made against natural training.

    Paper: Wen et al. 2023, Is adversarial training really a silver bullet for mitigating data poisoning? (EntF),
    ICLR 2023.

    Args:
        way: `push` or `pull`.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient.
        step_size: length of a step, in the units of eps; None for 2.5 eps / steps.
        share: of all images.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network whose features are mixed up; its output must
            be one network, not merged heads.
        seed: of the random start, and of the choice of images.
    """

    way: Literal["push", "pull"] = "push"
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 8 / 255
    steps: int = 300
    step_size: Real | None = None
    share: Real = 1.0
    surrogate: Surrogate = _SAT
    seed: int = 0

    def search(self) -> Entangling:
        """See `Searched.search`."""
        threat = ThreatModel(self.norm, self.eps)
        towards = self.way == "pull"
        return Entangling(self.surrogate, threat, self.seed, self.steps, self.step_size, towards=towards)


@dataclass(frozen=True)
class Entangling(Projected):
    """A search for images whose features lie among those of another class (EntF).

    With `towards` the squared distance to the nearest centre of another class is descended, else that to the centre of
    the own class is climbed. The centre of a class is the mean of the features of its clean images.
    """

    def climbed(self, clean: Split, bench: Workbench) -> Callable[[Tensor, Tensor], Tensor]:
        """See `Projected.climbed`.

        Raises:
            UserError: for a surrogate that has no features of its own.
        """
        centres = class_centres(clean, bench)
        return lambda x, labels: self.distance(bench.features(x), labels, centres)

    def distance(self, features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
        """Return the mean squared distance [B] to the centre of the own class, or its negative to the nearest other.

        Args:
            features: [B, D], with a graph.
            labels: int64 [B].
            centres: [K, D].
        """
        if not self.towards:
            return (features - centres[labels]).square().mean(1)
        apart = torch.cdist(features.detach(), centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = apart.scatter(1, labels[:, None], torch.inf).argmin(1)
        return -(features - centres[nearest]).square().mean(1)


def class_centres(clean: Split, bench: Workbench) -> Tensor:
    """Return the mean of the features of each class, [K, D]; of a class without images it is infinitely far.

    Raises:
        UserError: for a surrogate that has no features of its own.
    """
    with torch.no_grad():
        every = torch.split(torch.arange(len(clean)), BATCH)
        seen = torch.cat([bench.features(clean.images[rows].to(bench.device).float() / 255) for rows in every])
    labels = clean.labels.to(bench.device)
    return torch.stack(
        [
            seen[labels == label].mean(0) if bool((labels == label).any()) else torch.full_like(seen[0], torch.inf)
            for label in range(clean.num_classes)
        ]
    )
