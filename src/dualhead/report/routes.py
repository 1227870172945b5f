"""Routes of tied heads, as tables read them: each a classifier of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def route_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each classifier in `routes.json`, as `comparison.json` holds them.

    Args:
        found: its content.
    """
    roles = {found.get("clean"): "clean", found.get("robust"): "robust"}
    rows = []
    for name, route in found.get("routes", {}).items():
        statistics, affine = (roles.get(route[key], route[key]) for key in ("statistics", "affine"))
        own = route["statistics"] == route["affine"]
        called = f"{affine} route ({name})" if own else f"{statistics} statistics, {affine} affine"
        rows.append({**route, "name": called})
    rows += [{**merged, "name": f"merged: {name}"} for name, merged in found.get("merged", {}).items()]
    rows += [{**point, "name": f"between, t = {point['t']:g}"} for point in found.get("curve", [])]
    return rows
