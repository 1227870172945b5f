"""How numbers and components are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def unequal(class_sizes: object) -> bool:
    """Tell whether classes differ so much in size that accuracy and balanced accuracy are two things.

    Args:
        class_sizes: images of the smallest class and of the largest, as results hold them; anything else, as what
            earlier versions wrote, says nothing.

    Returns:
        Whether the largest has more than one and a half times as many as the smallest.
    """
    if not isinstance(class_sizes, Sequence) or len(class_sizes) != 2:
        return False
    return bool(class_sizes[1] > 1.5 * class_sizes[0])


def eps_text(eps: float, norm: object) -> str:
    """A radius; of Linf in steps of 1/255, a pixel's levels, where it is a whole number of them and less than 1."""
    levels = eps * 255 if norm == "Linf" else 0.0
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 and 0 < round(levels) < 255 else f"{eps:g}"


def eps_texts(radii: Sequence[float], norm: object) -> list[str]:
    """Several radii of one norm, all of them in steps of 1/255 or none."""
    words = [eps_text(radius, norm) if radius else "0" for radius in radii]
    return words if all(word == "0" or "/" in word for word in words) else [f"{radius:g}" for radius in radii]


def threat_name(threat: Mapping[str, Any]) -> str:
    """The norm of a threat, or its name with what was set but eps; of several those of each."""
    if "union" in threat:
        return " and ".join(threat_name(each) for each in threat["union"])
    return str(threat["norm"]) if "norm" in threat else component_text({**threat, "eps": None})


def threat_text(threat: Mapping[str, Any] | None) -> str:
    """Norm and radius of a threat, or name and budget: `Linf eps 8/255`, `flow 0.05`; of several, each in turn."""
    if not threat:
        return "threat model not recorded"
    if "union" in threat:
        return ", ".join(threat_text(each) for each in threat["union"])
    budget = f"eps {eps_text(threat['eps'], threat['norm'])}" if "norm" in threat else f"{threat['eps']:g}"
    return f"{threat_name(threat)} {budget}"


def component_text(component: Mapping[str, Any]) -> str:
    """A component of a recipe: its name and what was set. Of an address in a file, `my_file.py:Class` is shown."""
    name = str(component["name"]).replace("\\", "/").rpartition("/")[2]
    told = {key: value for key, value in component.items() if key != "name" and value is not None and value != ""}
    fields = ", ".join(f"{key} {_value_text(value)}" for key, value in told.items())
    return f"{name} ({fields})" if fields else name


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return component_text(value) if isinstance(value, Mapping) and "name" in value else shortened(str(value), 80)


def attack_text(stage: Mapping[str, Any], norm: object = None) -> str:
    """Name a stage's attack, without the settings that only measuring uses; empty if it has none.

    Args:
        stage: of a recipe.
        norm: of the recipe's threat, for a stage that has a radius of its own; None if unknown.
    """
    objective, free = stage.get("objective"), stage.get("free")
    chooses = any(stage.get(key) is not None for key in ("fit", "interpolate"))
    while isinstance(objective, Mapping) and isinstance(objective.get("base"), Mapping):
        objective = objective["base"]
    if chooses or (isinstance(objective, Mapping) and objective.get("name") == "natural"):
        return ""
    if isinstance(free, Mapping):
        told = component_text({"name": "free", **free})
    else:
        told = component_text({key: value for key, value in stage["attack"].items() if key not in ("loss", "restarts")})
    if stage.get("threat") is not None:
        return f"{told} within {threat_text(stage['threat'])}"
    return told if stage.get("eps") is None else f"{told} within eps {eps_text(stage['eps'], norm)}"


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign."""
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """A difference of fractions in points, with its sign."""
    told = f"{100 * difference:+.1f}" if abs(difference) >= 0.0005 else f"{100 * difference:+.2f}"
    return "0.0" if float(told) == 0 else told


def times_text(times: float) -> str:
    """A multiple of a cost, such as `0.98 x`."""
    return f"{times:.2f} x" if times >= 0.1 else f"{times:.2g} x"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people would choose."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def large(number: float | None) -> str:
    """A count, to three digits from a million on."""
    if number is None or not math.isfinite(number):
        return "n/a"
    rounded = float(f"{number:.3g}")
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{number:,.0f}"


def shortened(text: str, length: int) -> str:
    """Text of at most so many characters; what is cut shows as an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def squeezed(text: str, length: int) -> str:
    """Text of at most so many characters, cut in the middle: names of a run's models differ at their ends."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return text[: length - 1 - end].rstrip() + "\N{HORIZONTAL ELLIPSIS}" + text[-end:].lstrip()
