"""What weighs routers, each router and the controls, as terminals read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualhead.names import name_of
from dualhead.report.text import percent, points


def router_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each classifier in `routers.json`, as `comparison.json` holds them; `worst` is the union.

    Args:
        found: its content.
    """
    named = {"deployed": found["deployed"], "weighed alike": found["uniform"]}
    named |= {name_of(router): told for router, told in found["routers"].items()}
    rows = []
    for name, told in named.items():
        ends = told["intervals"]
        robust = {**told["threats"], "worst": told["union"]}
        intervals = {**ends, "worst": ends["union"]}
        row = {"name": name, "clean_accuracy": told["clean_accuracy"], "robust_accuracy": robust}
        rows.append({**row, "intervals": intervals, "checks": told["checks"]})
    return rows


def router_lines(found: Mapping[str, Any]) -> list[str]:
    """Return sentences on the best router, the oracle, and what the sentinel gains.

    Args:
        found: content of `routers.json`.
    """
    best, oracle = found["best_fixed"], found["oracle"]
    chosen = ", ".join(f"{threat}: {name_of(router)}" for threat, router in oracle["router"].items())
    gains = {"routers weighed alike": "over_uniform", "the best fixed router": "over_best_fixed"}
    return [
        f"best fixed router, of {found['held_out']} held-out images: {name_of(best['router'])}, right under all "
        f"{percent(best['union'])} %",
        f"oracle, which knows the threat ({chosen}), a bound and no defence: {percent(oracle['union'])} %",
        *(
            f"the sentinel over {what}: {points(found['gain'][key]['difference'])} points, "
            f"{found['gain'][key]['verdict']}"
            for what, key in gains.items()
        ),
    ]
