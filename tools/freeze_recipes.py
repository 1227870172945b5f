"""Write down the weights and kernel counts of all recipes as this checkout makes them, for rebuilt code to keep.

    python tools/freeze_recipes.py                    # tests/numerics/data/recipe_digests.json
    python tools/freeze_recipes.py "two lanes" digits # these cases anew, the others as they are

Run it only where results change on purpose. Each case is trained in the environment of
`tests/helpers/frozen_recipes.py`, in which all x86-64 processors agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers import frozen_recipes  # from the folder of tests


def main() -> None:
    target, chosen = frozen_recipes.DIGESTS, sys.argv[1:]
    frozen = json.loads(target.read_text(encoding="utf-8")) if chosen else {}
    for group, names in frozen_recipes.groups().items():
        wanted = [name for name in names if not chosen or name in chosen]
        if wanted:
            print(f"{group}: {len(wanted)} cases", flush=True)
            frozen |= frozen_recipes.measure_apart(wanted)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(frozen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
