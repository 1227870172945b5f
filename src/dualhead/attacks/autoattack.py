"""AutoAttack: fixed suites of attacks, run in turn on what the ones before left (Croce and Hein 2020).

The members, their order and their parameters are part of the name: a suite has nothing to set, so that a number called
AutoAttack is one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dualhead.attacks.apgd import APGDCE, APGDDLR, APGDT
from dualhead.attacks.apgd_malt import APGDMALT
from dualhead.attacks.apgd_pm import APGDPM
from dualhead.attacks.base import Attack, Search, attacks
from dualhead.attacks.fab import FAB, FABT
from dualhead.attacks.square import Square
from dualhead.threats import Norm, Threat, norm_of


class _Suite(Attack):
    """Several searches in turn. Published for norms, so no number for another threat is called AutoAttack."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")

    @abstractmethod
    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """The searches under a norm, in order."""

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """The members."""
        return [
            part for member in self.members(norm_of(threat)) for part in member.parts(num_classes, threat, num_heads)
        ]

    def notes(self, num_classes: int) -> list[str]:
        """Those of the members."""
        return [note for member in self.members() for note in member.notes(num_classes)]


def _gradient_members(norm: Norm) -> tuple[Search, Search]:
    """The two forms of APGD in the standard version: under L1 with more restarts and fewer targets."""
    if norm == "L1":
        return APGDCE(restarts=5).labelled("apgd-ce"), APGDT(targets=5).labelled("apgd-t")
    return APGDCE(), APGDT()


@attacks.register("autoattack")
@dataclass(frozen=True)
class AutoAttack(_Suite):
    """The standard version: APGD-CE, targeted APGD-DLR, targeted FAB, Square.

    Under L1 as published for it (Croce and Hein 2021, Mind the box, arXiv 2103.01208): APGD-CE from 5 starts, and 5
    targets for APGD-DLR.

    When: for a number to publish, or to compare with RobustBench.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """See the class."""
        return (*_gradient_members(norm), FABT(), Square())


@attacks.register("autoattack-plus")
@dataclass(frozen=True)
class AutoAttackPlus(_Suite):
    """The standard version's members and APGD-DLR and untargeted FAB, with 5 restarts where they are untargeted.

    When: where the standard version leaves doubts, for instance after a warning of the diagnostics.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.
    """

    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """See the class."""
        del norm
        return (
            APGDCE(restarts=5).labelled("apgd-ce"),
            APGDDLR(restarts=5).labelled("apgd-dlr"),
            FAB(restarts=5).labelled("fab"),
            Square(),
            APGDT(),
            FABT(),
        )


@attacks.register("autoattack-rand")
@dataclass(frozen=True)
class AutoAttackRand(_Suite):
    """For models with random outputs: APGD-CE and APGD-DLR, each gradient the mean of 20.

    When: if the model's answers are random, which the diagnostics tell.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.
    """

    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """See the class."""
        del norm
        return (APGDCE(eot=20).labelled("apgd-ce"), APGDDLR(eot=20).labelled("apgd-dlr"))


@attacks.register("autoattack-fast")
@dataclass(frozen=True)
class AutoAttackFast(_Suite):
    """The first two members of the standard version, a fifth of its cost: an upper bound on its robust accuracy.

    When: while you work, for most of AutoAttack's verdict; say in a paper that it is not the standard version.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690, whose first two members
    these are.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")

    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """See the class."""
        return _gradient_members(norm)

    def notes(self, num_classes: int) -> list[str]:
        """That the result is a bound."""
        bound = f"{self.label}: an upper bound on robust accuracy, since it leaves out FAB-T and Square of autoattack"
        return [bound, *super().notes(num_classes)]


@attacks.register("autoattack-quick")
@dataclass(frozen=True)
class AutoAttackQuick(_Suite):
    """APGD-CE, APGD-T towards the 3 targets that MALT puts first, and APGD on the probability margin (PMA).

    An upper bound on AutoAttack's robust accuracy. Not a published suite: this project's own choice of members. On 500
    test images of each of five models (natural training, TRADES, MART, SAT, two merged heads; 10 and 200 classes) it
    left the images that AutoAttack left, in a quarter of the time or less where images survived. The number of targets
    was chosen on other images.

    When: while you work, or for many models; run `autoattack` itself for a number to publish.

    Paper: Melamed et al. 2024, MALT Powers Up Adversarial Attacks, arXiv 2407.02240, and Xie et al. 2024, Towards
    Million-Scale Adversarial Robustness Evaluation, arXiv 2411.15210, for what it adds to Croce and Hein 2020,
    arXiv 2003.01690.
    """

    def members(self, norm: Norm = "Linf") -> Sequence[Search]:
        """See the class."""
        del norm
        return (APGDCE(), APGDMALT(targets=3, candidates=50).labelled("apgd-malt"), APGDPM())

    def notes(self, num_classes: int) -> list[str]:
        """That the result is a bound."""
        bound = (
            f"{self.label}: an upper bound on robust accuracy; it is not the standard version, autoattack, which left "
            "the same images on five models of this project, 500 images each"
        )
        return [bound, *super().notes(num_classes)]
