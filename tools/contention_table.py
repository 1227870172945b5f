"""Write the table of docs/speed.md from what benchmarks/contention.py measured.

python tools/contention_table.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "contention.json", ROOT / "docs" / "speed.md"
BEGIN = "<!-- contention: written by `python tools/contention_table.py` from benchmarks/results/contention.json -->\n"
END = "<!-- end of contention -->"


def told(results: dict[str, Any] | None) -> str:
    """Return the table and where it was measured; a sentence where nothing was."""
    if results is None:
        return "No result is committed yet.\n"
    spec = importlib.util.spec_from_file_location("contention", ROOT / "benchmarks" / "contention.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    where = results["environment"]
    facts = (
        f"Medians of {results['runs']} rounds, and lowest to highest of the ratios; {where['cores']} CPU cores with "
        f"{where['cpu_capability']}, torch {where['torch']}, {results['begun'][:10]}, commit `{results['commit']}`.\n"
    )
    return f"{facts}\n{benchmark.table(results)}\n"


def made(page: str, results: dict[str, Any] | None) -> str:
    """Return the page with the table in its place."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{told(results)}{END}{rest.split(END, 1)[1]}"


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else None
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
