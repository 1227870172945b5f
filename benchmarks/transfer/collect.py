"""Finished runs of benchmarks/transfer/run.sh, each in a small file, and what they say together.

    python benchmarks/transfer/collect.py keep RUN FILE [FOUND...]   # FOUND: folders in the run's evaluations
    python benchmarks/transfer/collect.py rate KEPT                  # the learning rate that held-out images choose
    python benchmarks/transfer/collect.py tell KEPT JSON             # KEPT/METHOD-IMAGES/seed=N.json

README.md beside it has the cells, the questions and the rules.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import Variant, alike, answer, compared, differences, keep, over_seeds, paired, read, table

RATES = ("0.1", "0.03", "0.01")
SIZES = (2250, 500, 9000)
QUESTIONS = {
    "T1, the trunk helps, at equal cost after pre-training": ("scratch", "tuned"),
    "T1, the trunk helps, with pre-training counted": ("scratch-long", "tuned"),
    "T2, guided distillation": ("tuned", "distilled"),
    "T2, DH-AT, trunk thawed": ("tuned", "dhat-thawed"),
    "T2, DH-AT, trunk frozen": ("tuned", "dhat-frozen"),
}
"""Base and method of each question, at every number of images."""


def rate(kept: Path) -> str | None:
    """Return the rate with the most robust held-out images, of several the most accurate; None while one is missing."""
    known = read(kept)
    found = {each: known[f"rate-{each}"].runs for each in RATES if f"rate-{each}" in known}
    if len(found) < len(RATES):
        return None

    def reached(each: str) -> tuple[float, float]:
        held_out = next(iter(found[each].values()))["held_out"]
        return held_out["robust"], held_out["clean"]

    return max(found, key=reached)


def asked(known: Mapping[str, Variant]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the differences that the questions are about, those of 2,250 images first."""
    found = {}
    for images in SIZES:
        for question, names in QUESTIONS.items():
            base, method = (known.get(f"{name}-{images}") for name in names)
            pair = paired(base.entries(), method.entries()) if base and method else None
            if base and method and pair:
                found[f"{images} images, {question}: {method.name} less {base.name}"] = pair
    return found


def tell(kept: Path) -> dict[str, Any]:
    """Return rows, differences and answers, and what the trunks reached and cost."""
    known = read(kept)
    trunks = known.pop("trunk", None)
    measured = {name: variant for name, variant in known.items() if not name.startswith("rate-")}
    alike(list(measured.values()))
    found = asked(measured)
    made: dict[str, Any] = {
        "rates": {name: next(iter(known[name].runs.values()))["held_out"] for name in known if name not in measured},
        **(compared([variant.entries() for variant in measured.values()]) if measured else {"rows": [], "pairs": []}),
        "differences": found,
        "answers": {name: answer(pair) for name, pair in found.items()},
    }
    if trunks is not None:
        runs = trunks.runs.values()
        made["trunk"] = {
            "seeds": list(trunks.runs),
            **{key: over_seeds([run["held_out"][key] for run in runs]) for key in ("clean", "robust")},
            "flops": over_seeds([run["cost"]["flops"] for run in runs]),
        }
    return made


def main(words: Sequence[str]) -> None:
    """Keep, choose or tell."""
    match words:
        case ["keep", run, file, *found]:
            keep(Path(run), Path(file), found)
        case ["rate", kept]:
            chosen = rate(Path(kept))
            if chosen is None:
                sys.exit(f"{kept}: not every rate is measured; `run.sh` goes on with them")
            print(chosen)
        case ["tell", kept, target]:
            made = tell(Path(kept))
            Path(target).write_text(json.dumps(made, indent=1) + "\n")
            print(f"{table(made['rows'])}\n\n{differences(made['differences'])}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
