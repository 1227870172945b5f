"""Finished runs of benchmarks/elsewhere/run.sh: each in a small file, choices among them, and all told together.

    python benchmarks/elsewhere/collect.py keep RUN FILE FOUND...   # FOUND: folders in the run's evaluations
    python benchmarks/elsewhere/collect.py length KEPT/DATA         # epochs at which TRADES has converged
    python benchmarks/elsewhere/collect.py betas KEPT/DATA EPOCHS   # of TRADES and of guided distillation
    python benchmarks/elsewhere/collect.py tell KEPT JSON           # KEPT/DATA/PHASE/VARIANT/seed=N.json

README.md beside it has the rules of the choices and of the answers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import Variant, alike, answer, compared, differences, keep, paired, read, table

DATA = ("tiny", "fashion")
LENGTHS, BETAS, LENGTH_BETA = (40, 80, 160), (3, 6, 12), 6
COSTS = {1.0: "equal cost", 0.5: "base at half the cost"}
"""By the length of the base method, in that which guided distillation costs."""
NEAR = 0.005
"""A length whose robust accuracy is within this of the best has converged."""


def held_out(variant: Variant) -> dict[str, float]:
    """Return accuracies of seed 0 on the held-out images."""
    found = variant.runs[0]["evaluations"]["held_out"]
    return {"clean": found["clean_accuracy"], "robust": found["robust_accuracy"]["worst"]}


def converged(robust: Mapping[int, float]) -> int:
    """Return the shortest length whose robust accuracy is near the best."""
    return min(epochs for epochs, share in robust.items() if share >= max(robust.values()) - NEAR - 1e-9)


def best(found: Mapping[int, Mapping[str, float]]) -> int:
    """Return the beta with the highest robust accuracy, of several the most accurate one."""
    return max(found, key=lambda beta: (found[beta]["robust"], found[beta]["clean"]))


def _chosen(folder: Path, names: Mapping[int, str]) -> dict[int, dict[str, float]] | None:
    """Return what the runs of a choice have on held-out images; None while one of them is missing."""
    known = read(folder / "choose")
    if not all(name in known and 0 in known[name].runs for name in names.values()):
        return None
    return {key: held_out(known[name]) for key, name in names.items()}


def length(folder: Path) -> int | None:
    """Return the length that the kept runs lead to; None while it is open."""
    found = _chosen(folder, {epochs: f"base-{epochs}-beta-{LENGTH_BETA}" for epochs in LENGTHS})
    return None if found is None else converged({epochs: each["robust"] for epochs, each in found.items()})


def betas(folder: Path, epochs: int) -> tuple[int | None, int | None]:
    """Return the betas of TRADES and of guided distillation at twice a length; None of one that is open."""
    base, guided = (
        _chosen(folder, {beta: f"{method}-beta-{beta}" for beta in BETAS})
        for method in (f"base-{2 * epochs}", f"guided-{2 * epochs}")
    )
    return base and best(base), guided and best(guided)


def _length_of(name: str) -> int:
    return int(re.fullmatch(r"\w+-(\d+)-beta-\d+", name)[1])  # type: ignore[index]  # run.sh names them so


def comparison(known: Mapping[str, Variant]) -> dict[str, Any]:
    """Return rows, differences from TRADES and answers, for the mean of both heads and for head 2 alone."""
    alike(list(known.values()))
    groups = {name: variant.entries() for name, variant in known.items()}
    guided = [name for name in known if name.startswith("guided-")]
    groups |= {f"{name}, head 2": known[name].entries("head2", f"{name}, head 2") for name in guided}
    found = {}
    for name in guided:
        for base in sorted((b for b in known if b.startswith("base-")), key=_length_of, reverse=True):
            cost = COSTS.get(_length_of(base) / _length_of(name), "other cost")
            for output in (name, f"{name}, head 2"):
                found[f"{output} less {base} ({cost})"] = paired(groups[base], groups[output])
    return {
        **compared([entries for entries in groups.values() if entries]),
        "differences": found,
        "answers": {name: answer(pair) for name, pair in found.items()},
    }


def tell(kept: Path) -> dict[str, Any]:
    """Return by data what was chosen on held-out images, and what was found on test images."""
    made: dict[str, Any] = {}
    for data in DATA:
        chosen, known = read(kept / data / "choose"), read(kept / data / "compare")
        if chosen:
            made.setdefault(data, {})["choose"] = {name: held_out(variant) for name, variant in chosen.items()}
        if known:
            made.setdefault(data, {})["compare"] = comparison(known)
    return made


def write(kept: Path, target: Path) -> None:
    """Write all that is kept, and print its tables."""
    made = tell(kept)
    target.write_text(json.dumps(made, indent=1) + "\n")
    for data, told in made.items():
        for name, each in told.get("choose", {}).items():
            print(f"{data}, held out: {name}: clean {100 * each['clean']:.1f}, robust {100 * each['robust']:.1f}")
        if "compare" in told:
            print(f"\n{data}:\n\n{table(told['compare']['rows'])}\n\n{differences(told['compare']['differences'])}")


def main(words: Sequence[str]) -> None:
    """Keep, choose or tell."""
    match words:
        case ["keep", run, file, *found] if found:
            keep(Path(run), Path(file), found)
        case ["length", folder]:
            epochs = length(Path(folder))
            if epochs is None:
                sys.exit(f"{folder}: not every length is measured; `run.sh choose` goes on with them")
            print(epochs)
        case ["betas", folder, at]:
            chosen = betas(Path(folder), int(at))
            if None in chosen:
                sys.exit(f"{folder}: not every beta is measured at {at} epochs; `run.sh choose` goes on with them")
            print(*chosen)
        case ["tell", kept, target]:
            write(Path(kept), Path(target))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
