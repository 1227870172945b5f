"""What an evaluation is asked for: attacks, and measurements that are none, named in one list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Final, Self

from torch import nn

from dualhead.attacks import Attack
from dualhead.attacks import attacks as registry
from dualhead.components import plugins
from dualhead.errors import UserError
from dualhead.evaluation.measurements import Measurement, measurements
from dualhead.evaluation.own import OwnAttack, as_attack

Spec = str | Mapping[str, Any] | Attack | Measurement | OwnAttack
"""An attack or a measurement by name, by its fields, or itself; or a function that attacks."""
RESERVED: Final = frozenset({
    "num_samples", "images", "threat", "threats", "clean_accuracy", "robust_accuracy", "intervals",
    "balanced_accuracy", "average", "left_out", "calibration", "attacks", "curve", "per_class", "class_sizes",
    "diagnostics", "environment", "seconds", "seed", "command", "subject", "skipped_images", "transfer", "poison",
    "generation", "ood", "sequence",
})  # fmt: skip
"""Keys of `results.json` that no measurement may take."""


@dataclass(frozen=True)
class Asked:
    """The evaluations of a list, built.

    Args:
        each: in the order of the list.
    """

    each: tuple[Attack | Measurement, ...]

    @classmethod
    def of(cls, specs: Iterable[Spec] | Spec, where: str = "attacks") -> Self:
        """Build what a list names.

        Args:
            specs: the list, or a single one; text may name several, `pgd-10,square`.
            where: its key, for messages.

        Raises:
            UserError: if one is unknown, or two have one name.
        """
        built: dict[str, Attack | Measurement] = {}
        for place, spec in enumerate(_listed(specs)):
            found = _built(spec, f"{where}.{place}")
            label = found.label if isinstance(found, Attack) else found.registered_name
            if label in (*built, "worst", "clean"):
                raise UserError(f"{where}.{place}: {label} is named twice")
            if isinstance(found, Measurement) and label in RESERVED:
                raise UserError(f"{where}.{place}: {label} is a key of results.json; register it by another name")
            built[label] = found
        return cls(tuple(built.values()))

    def for_model(self, model: nn.Module, adaptive: Sequence[Spec] = ()) -> Self:
        """Return what a model can face: attacks that need heads only where it merges them.

        Args:
            model: images to logits; it merges heads if it has `head_logits`.
            adaptive: attacks that need heads, added for a model that merges them where attacks are asked for and none
                of these needs heads.
        """
        if not hasattr(model, "head_logits"):
            return replace(self, each=tuple(each for each in self.each if not each.needs_heads))
        if not self.attacks or self.for_heads:
            return self
        return replace(self, each=(*self.each, *self.of(adaptive).each))

    @property
    def for_heads(self) -> list[str]:
        """Return the labels of the attacks that only a model that merges heads can face."""
        return [label for label, attack in self.attacks.items() if attack.needs_heads]

    @property
    def attacks(self) -> dict[str, Attack]:
        """Return the attacks by label."""
        return {each.label: each for each in self.each if isinstance(each, Attack)}

    @property
    def measurements(self) -> dict[str, Measurement]:
        """Return the measurements by name."""
        return {each.registered_name: each for each in self.each if isinstance(each, Measurement)}


def split_names(text: str) -> list[str]:
    """Split names of attacks or threats at commas, but not between brackets: `pgd-40(target=next,eot=2),square`."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def _listed(specs: Iterable[Spec] | Spec) -> list[Spec]:
    if isinstance(specs, str):
        return [*split_names(specs)] or [specs]
    return [specs] if isinstance(specs, Mapping) or not isinstance(specs, Iterable) else list(specs)


def _built(spec: Spec, where: str) -> Attack | Measurement:
    """Build one of a list."""
    if spec is None:
        raise UserError(f"{where}: names no attack; write one, e.g. pgd-40")
    if isinstance(spec, Measurement):
        return spec
    name = spec if isinstance(spec, str) else str(spec.get("name")) if isinstance(spec, Mapping) else ""
    if _names_measurement(name):
        return measurements.build(spec, where)  # type: ignore[arg-type]  # a name or fields that name one
    try:
        return registry.build(as_attack(spec, where), where)
    except UserError as error:
        near = get_close_matches(name.lower(), measurements.names(), n=1)
        if near and "did you mean" not in str(error):
            raise UserError(f"{where}: unknown attack {name!r}; did you mean {near[0]!r}?") from None
        raise


def _names_measurement(name: str) -> bool:
    """Tell whether a name is a measurement's, or the address of one, whose code is run to see that."""
    if measurements.known_as(name) in measurements.names():
        return True
    if registry.known_as(name) in registry.names() or not plugins.split_address(name):
        return False
    try:
        _, found = plugins.find(name)
    except UserError:
        return False  # told as an attack that cannot be found
    return isinstance(found, type) and issubclass(found, Measurement)


def located(spec: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Return an attack or a measurement as it was written, with an address that means the same in any folder."""
    name = spec if isinstance(spec, str) else str(spec.get("name"))
    return measurements.located(spec) if _names_measurement(name) else registry.located(spec)
