"""Threats from what recipes, results and callers write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args

from pydantic import BeforeValidator, PlainSerializer

from dualhead.components.fields import parse_real
from dualhead.errors import UserError
from dualhead.threats.base import Threat, threats
from dualhead.threats.lp import TYPICAL_EPS, Norm, ThreatModel, norm_named


def build_threat(spec: Mapping[str, Any] | Threat | str, where: str = "") -> Threat:
    """Build a threat from its fields, or return it as it is.

    Args:
        spec: `{"norm": "L2", "eps": 0.5}`, where the norm may be left out for Linf; or `{"name": "flow", "eps": 0.05}`;
            or the short form of either, `"L2:0.5"`; or `{"name": "L2:0.5", "eps": 1}`, as an override leaves that.
        where: the key of the recipe that holds it, for messages; `"."` where the caller knows it.

    Raises:
        UserError: one line that names the key and what is wrong with it.
    """
    if isinstance(spec, Threat):
        return spec
    place = where.removesuffix(".")
    if isinstance(spec, str) and spec.rpartition(":")[0]:
        spec = _in_full(spec)
    elif isinstance(spec, Mapping) and _is_short(spec.get("name")):
        spec = {**_in_full(spec["name"]), **{key: value for key, value in spec.items() if key != "name"}}
    if not isinstance(spec, Mapping):
        raise UserError(
            f"{place}: must be {{norm: ..., eps: ...}}, {{name: ..., eps: ...}} or short, as L2:0.5; got {spec!r}"
        )
    if "eps" not in spec:
        raise UserError(f"{place}.eps: missing; this key is required, e.g. 8/255")
    if "name" in spec and "norm" in spec:
        raise UserError(f"{place}: has both name ({spec['name']}) and norm ({spec['norm']}); leave one of them out")
    if "name" in spec:
        named = norm_named(spec["name"])
        if named in get_args(Norm):
            raise UserError(f"{place}.name: {spec['name']} is a norm; write norm: {named}")
        return threats.build(spec, where)
    unknown = set(spec) - {"norm", "eps"}
    if unknown:
        raise UserError(f"{place}.{sorted(map(str, unknown))[0]}: unknown key (known: norm, eps; or name, eps)")
    norm = spec.get("norm", "Linf")
    if threats.known_as(str(norm)) in threats.names():
        raise UserError(f"{place}.norm: {norm} is no norm; write name: {threats.known_as(str(norm))}")
    try:
        return ThreatModel(norm, spec["eps"])
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None


def _in_full(short: str) -> dict[str, str]:
    kind, _, eps = short.rpartition(":")
    return {"norm" if norm_named(kind) in get_args(Norm) else "name": kind, "eps": eps}


def _is_short(name: object) -> bool:
    """Tell a threat with its radius, `L2:0.5`, from the address of one, `my_file.py:MyThreat`."""
    kind, _, eps = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    try:
        return bool(kind) and parse_real(eps) >= 0
    except UserError:
        return False


def typical_eps(family: str) -> str | None:
    """Return a budget of usual size, as text, of a norm or of a threat by its name; None of neither."""
    if family in threats.names():
        return threats.get(family).typical_eps
    return TYPICAL_EPS.get(family)


THREAT: Final = (
    BeforeValidator(lambda spec: build_threat(spec, where=".")),
    PlainSerializer(lambda threat: threat.describe()),
)
"""Annotations of a recipe's field that holds a threat."""
