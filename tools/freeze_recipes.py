"""Write down the weights and kernel counts of all recipes as this checkout makes them, for rebuilt code to keep.

    python tools/freeze_recipes.py                    # tests/numerics/data/recipe_digests.json
    python tools/freeze_recipes.py "two lanes" digits # these cases anew, the others as they are

Run it only where results change on purpose. Each case is trained in the environment of
`tests/helpers/frozen_recipes.py`, in which x86-64 processors agree but for MKL's vector math. On a processor that has
its place in `weights_by_vector_math.json` beside it, weights that are new go there, and the case is written without
weights: those of other processors are not known.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers import frozen_recipes  # from the folder of tests


def main() -> None:
    target, beside, chosen = frozen_recipes.DIGESTS, frozen_recipes.OTHERS, sys.argv[1:]
    before = json.loads(target.read_text(encoding="utf-8"))
    others = json.loads(beside.read_text(encoding="utf-8"))
    found = {}
    for group, names in frozen_recipes.groups().items():
        wanted = [name for name in names if not chosen or name in chosen]
        if wanted:
            print(f"{group}: {len(wanted)} cases", flush=True)
            found |= frozen_recipes.measure_apart(wanted)
    here = others.get(frozen_recipes.vector_math())
    if here is not None:
        for name, case in found.items():
            here.pop(name, None)
            if case["weights"] != before.get(name, {}).get("weights"):
                here[name], case["weights"] = case["weights"], None
        write(beside, others)
    write(target, (before if chosen else {}) | found)


def write(target: Path, content: object) -> None:
    """Write JSON whose lines say what changed."""
    target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
