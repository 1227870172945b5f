"""Settings of stages that train nothing, and choose on the held-out images."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from dualhead.components.fields import Real
from dualhead.components.sections import Section
from dualhead.errors import UserError
from dualhead.threats import THREAT, Threat


class Fit(Section):
    """The parameters of an aggregator such as `mixed_nuts`, chosen on the held-out images.

    Among the candidates, the one of highest clean accuracy whose robust accuracy is at most `max_loss` below head 1's.
    Robust means: right under every attack known so far, at first those on each head and on their mean. The candidate
    that is best by these is attacked itself (by `validation.attack`) and chosen anew under one attack more, until the
    choice stands; only what has been attacked itself is ever kept.
    """

    max_loss: Real = Field(0.01, ge=0, le=1)
    """Robust accuracy that may be given up against head 1, a fraction of the held-out images."""
    rounds: int = Field(6, ge=1)
    """Candidates attacked, at most; each costs what a validation does."""


class Interpolate(Section):
    """Weights between those that two earlier stages keep, (1 - a) first + a second.

    The share a is the one with the highest robust accuracy on the held-out images, as the mean over `threats`; of equal
    ones the one with the highest clean accuracy. Running statistics of batch norm are interpolated too. It costs as
    many validations as there are shares, and no training. After Wortsman et al. 2022, Robust fine-tuning of zero-shot
    models, CVPR, arXiv 2109.01903.
    """

    between: tuple[str, str]
    """Names of two earlier stages."""
    shares: tuple[Annotated[Real, Field(ge=0, le=1)], ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Those that are tried."""
    threats: tuple[Annotated[Threat, *THREAT], ...] = ()
    """What choosing looks at; empty: the stage's own threat."""

    @model_validator(mode="after")
    def _has_shares(self) -> Self:
        if not self.shares:
            raise UserError(".shares: must hold at least one, e.g. [0, 0.5, 1]")
        if self.between[0] == self.between[1]:
            raise UserError(f".between: names {self.between[0]} twice; name two earlier stages")
        return self
