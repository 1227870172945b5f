"""Where a run stands, in a few facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualhead.errors import UserError
from dualhead.report.lights import lights
from dualhead.report.sources import Source, read_sources
from dualhead.report.table import described
from dualhead.report.training import best_line


def summary(folder: Path) -> dict[str, Any]:
    """Read the files of one run as plain values; anything missing or damaged becomes a note.

    Returns:
        `run`, `recipe`, `threat`, `state` (`training`, `evaluating` or `finished`), `stages` with their epochs,
        seconds and accuracies on held-out images, `rows` with failed and warning checks,
        accuracies on test images and whether they are of what is `deployed`, and `notes`.

    Raises:
        UserError: for a folder that is no single run.
    """
    sources = read_sources([folder])
    if len(sources) != 1 or not sources[0].is_run:
        raise UserError(f"{folder}: holds no single run (config.yaml); name one, e.g. runs/digits")
    source = sources[0]
    stages = [_stage(source, recipe) for recipe in source.stages]
    trained = all(stage["state"] == "finished" for stage in stages)
    measured = (folder / "comparison.json").is_file()
    threat = source.recipe.get("threat")
    return {
        "run": folder.as_posix(),
        "recipe": source.recipe.get("name"),
        "threat": threat if isinstance(threat, Mapping) else None,
        "state": "training" if not trained else "finished" if measured else "evaluating",
        "device": source.environment.get("device"),
        "stages": stages,
        "rows": [
            {**described(row), "deployed": row.deployed, "checks": lights(row.results.get("diagnostics"))}
            for row in source.rows
        ],
        "notes": source.notes,
    }


def _stage(source: Source, recipe: Mapping[str, Any]) -> dict[str, Any]:
    name = recipe["name"]
    lines, done = source.lines(name), source.summaries.get(name)
    last, best = (lines[-1] if lines else {}), best_line(lines)
    seconds = (done or last).get("seconds")
    return {
        "name": name,
        "state": "finished" if done else "begun" if lines else "not begun",
        "epoch": last.get("epoch", 0),
        "epochs": recipe.get("epochs"),
        "seconds": seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else None,
        "last": _accuracies(last),
        "best": None if best is None else {"epoch": best["epoch"], **_accuracies(best)},
    }


def _accuracies(line: Mapping[str, Any]) -> dict[str, float | None]:
    values = {"clean": line.get("validation_clean"), "robust": line.get("validation_robust")}
    return {k: v if isinstance(v, int | float) and math.isfinite(v) else None for k, v in values.items()}
