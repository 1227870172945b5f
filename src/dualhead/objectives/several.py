"""Base of methods that train against several threats: the threats, and a base method's passes under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dualhead.attacks import Attack, attacks, refuse_untrainable
from dualhead.errors import UserError, under
from dualhead.objectives.base import ATTACKED, Around, Inner, Labels, Need, Objective, Seen
from dualhead.threats import Threat, ThreatModel, build_threat


@dataclass(frozen=True)
class Contender:
    """A threat that a method trains against, and how it is attacked.

    Args:
        threat: what the adversary may do.
        attack: within that threat; None for the stage's.
    """

    threat: Threat
    attack: Attack | None = None

    def describe(self) -> dict[str, Any]:
        """Return the fields of the threat and, if there is one, the attack, as recipes write them."""
        own = {} if self.attack is None else {"attack": attacks.describe(self.attack)}
        return {**self.threat.describe(), **own}


USUAL = (
    Contender(ThreatModel("Linf", 8 / 255)),
    Contender(ThreatModel("L2", 0.5)),
    Contender(ThreatModel("L1", 12.0)),
)
"""Linf, L2 and L1 with the radii of E-AT and MSD on CIFAR-10."""


def contenders(specs: object, least: int = 2) -> tuple[Contender, ...]:
    """Read threats as a recipe lists them: `[Linf:8/255, {norm: L2, eps: 0.5, attack: pgd-10}]`.

    Raises:
        UserError: naming the place in the list and what is wrong there, or for fewer than `least` of them.
    """
    if not isinstance(specs, Sequence) or isinstance(specs, str):
        raise UserError(f"among: must list threats, as [Linf:8/255, L2:0.5]; got {specs!r}")
    found = []
    for place, spec in enumerate(specs):
        if isinstance(spec, Contender):
            found.append(spec)
            continue
        attack = None
        if isinstance(spec, Mapping) and spec.get("attack") is not None:
            attack = attacks.build(spec["attack"], f"among.{place}.attack")
            refuse_untrainable(attack, f"among.{place}.attack")
        plain = {key: value for key, value in spec.items() if key != "attack"} if isinstance(spec, Mapping) else spec
        found.append(Contender(build_threat(plain, f"among.{place}"), attack))
    if len(found) < least:
        raise UserError(f"among: names {len(found)}, and needs at least {least}, as [Linf:8/255, L2:0.5]")
    for contender in found:
        if contender.attack is not None:
            contender.attack.check(contender.threat)
    return tuple(found)


class Several(Around):
    """A base method under several threats: subclasses are dataclasses with the fields `base` and `among`.

    What the base method sees of attacked images is there once for each threat, under the images `attacked`, `attacked2`
    and so on; its other needs are there once.
    """

    among: tuple[Contender, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "among", contenders(self.among))
        refuse_base(self.base)
        inner = self.base.inner()[ATTACKED]
        for place, contender in enumerate(self.among):
            if contender.attack is not None:
                with under(f"among.{place}"):
                    inner.check(contender.attack, contender.threat)

    @property
    def active(self) -> Sequence[int]:
        """The numbers of the threats that this step trains against."""
        return range(len(self.among))

    def threats(self) -> Sequence[Threat | None]:
        """All that are named, also those that this step does not meet."""
        return tuple(dict.fromkeys(contender.threat for contender in self.among))

    @property
    def labels(self) -> list[str]:
        """Names of the threats in the log: their kinds, numbered where two share one."""
        kinds = [contender.threat.kind for contender in self.among]
        return [kind if kinds.count(kind) == 1 else f"{kind}_{n + 1}" for n, kind in enumerate(kinds)]

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs for each threat."""
        found: dict[str, Need] = {}
        for place in range(len(self.active)):
            for name, need in self.base.needs().items():
                own = need.on == ATTACKED and not isinstance(need, Labels)
                found[_of(name, place) if own else name] = replace(need, on=_of(ATTACKED, place)) if own else need
        return found

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attack within each threat."""
        inner, found = self.base.inner()[ATTACKED], {}
        for place, number in enumerate(self.active):
            contender = self.among[number]
            found[_of(ATTACKED, place)] = replace(
                inner,
                loss=self._climb(place),
                uses=[self._name(name, place) for name in inner.uses],
                attack=contender.attack,
                threat=contender.threat,
            )
        return found

    def _climb(self, place: int) -> Callable[[Tensor, Seen], Tensor]:
        inner = self.base.inner()[ATTACKED]
        return lambda y, seen: inner.loss(y, self.under(place, seen))

    def under(self, place: int, seen: Seen) -> dict[str, Tensor]:
        """Select the tensors that the base method sees under the threat at a place among the active ones."""
        names = {name: self._name(name, place) for name in self.base.needs()}
        return {name: seen[own] for name, own in names.items() if own in seen}

    def climbed(self, y: Tensor, seen: Seen, place: int) -> Tensor:
        """Compute the loss [B] that the attack within a threat climbs, at the images it found, without a graph."""
        return self.base.inner()[ATTACKED].loss(y, {k: v.detach() for k, v in self.under(place, seen).items()})

    def _name(self, name: str, place: int) -> str:
        need = self.base.needs()[name]
        return _of(name, place) if need.on == ATTACKED and not isinstance(need, Labels) else name


def _of(name: str, place: int) -> str:
    return name if place == 0 else f"{name}{place + 1}"


def refuse_base(base: Objective) -> None:
    """Refuse a base method that cannot be asked about one threat after another.

    Raises:
        UserError: if it does not make one set of attacked images, or makes further images of these.
    """
    if set(base.inner()) != {ATTACKED} or isinstance(base, Several) or type(base).views is not Objective.views:
        raise UserError("base: must be a method with one attack, as sat, trades or mart")
    if base.window():
        raise UserError("base: must be a method without a curriculum of its own, as sat, trades or mart")
