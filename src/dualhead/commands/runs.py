"""The runs under a folder, a record each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualhead.errors import UserError
from dualhead.report import summary
from dualhead.runs import RunFolder
from dualhead.system.lock import owner_of


def list_of(folder: Path) -> list[dict[str, Any]]:
    """Return a record for each run under a folder, at any depth, in order of their paths.

    Each holds `run`, `recipe`, `state` (`training`, `evaluating`, `finished`, or `damaged`), `at_work`, `epochs` done
    and in all, `clean_accuracy` and `robust_accuracy` of the deployed model with their `intervals` (None before it
    has been evaluated), `checks` that failed or warn, and `notes`.

    Raises:
        UserError: if there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that holds your runs (by default they go to runs/)")
    places = sorted(path.parent for path in folder.rglob("config.yaml") if RunFolder(path.parent).checkpoints.is_dir())
    if not places:
        raise UserError(f"{folder}: holds no run; `dualhead train digits` makes one in runs/digits")
    return [_record(place) for place in places]


def _record(place: Path) -> dict[str, Any]:
    record: dict[str, Any] = {
        "run": place.as_posix(), "recipe": None, "state": "damaged", "at_work": owner_of(place) is not None,
        "epoch": 0, "epochs": 0, "clean_accuracy": None, "robust_accuracy": None, "intervals": None, "checks": [],
        "notes": [],
    }  # fmt: skip
    try:
        facts = summary(place)
    except UserError as error:
        return {**record, "notes": [str(error)]}
    record |= {key: facts[key] for key in ("recipe", "state", "notes")}
    record["epoch"] = sum(stage["epoch"] for stage in facts["stages"])
    record["epochs"] = sum(stage["epochs"] or 0 for stage in facts["stages"])
    deployed = next((row for row in facts["rows"] if row["deployed"]), None)
    if deployed is not None:
        record |= {key: deployed[key] for key in ("clean_accuracy", "robust_accuracy", "intervals")}
    record["checks"] = [check for row in facts["rows"] for check in row["checks"]]
    return record
