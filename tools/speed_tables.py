"""Write the tables of docs/speed.md from what benchmarks/contention.py and benchmarks/quick.py measured.

python tools/speed_tables.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "speed.md"
BLOCKS = ("contention", "quick")
"""Each is a file of results and a place in the page."""
MODELS = {
    "trades": "TRADES", "merged": "guided distillation, mean of two heads", "natural": "natural training",
    "mart": "MART", "sat": "SAT, 200 classes",
}  # fmt: skip
"""Of benchmarks/quick.py."""


def _markers(name: str) -> tuple[str, str]:
    begin = f"<!-- {name}: written by `python tools/speed_tables.py` from benchmarks/results/{name}.json -->\n"
    return begin, f"<!-- end of {name} -->"


def contention(results: dict[str, Any]) -> str:
    """Return the table of busy machines and where it was measured."""
    spec = importlib.util.spec_from_file_location("contention", ROOT / "benchmarks" / "contention.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    where = results["environment"]
    pairs = len(results["pairs"]["seconds"]["training"][benchmark.OURS]) if "pairs" in results else 0
    facts = (
        f"Medians of {results['runs']} rounds{f' and {pairs} further pairs alone' if pairs else ''}, and lowest to "
        f"highest of the ratios; {where['cores']} CPU cores with "
        f"{where['cpu_capability']}, torch {where['torch']}, {results['begun'][:10]}, commit `{results['commit']}`.\n"
    )
    return f"{facts}\n{benchmark.table(results)}"


def quick(results: dict[str, Any]) -> str:
    """Return the tables of cheaper evaluations and where they were measured."""
    targets, suites, precisions, cycles = (
        {name: results[check][name] for name in MODELS if name in results.get(check, {})}
        for check in ("targets", "quick", "precision", "cycles")
    )
    where = next(iter(suites.values()))["environment"]
    count, long = (next(iter(rows.values()))["images"] for rows in (suites, cycles))
    parts = [
        f"WRN-10-1 with `stem_stride: 2`; seed {results['seed']}; the first {count} test images, {long:,} for PGD; "
        f"threads: {where['threads']}, {where['cpu_capability']}, torch {where['torch']}, other work beside it; "
        f"suites on {_processors(targets, suites)}, the last two tables on {_processors(precisions, cycles)}.\n",
        "| model | robust under AutoAttack | under autoattack-quick | missed | processor time, whole over quick |\n"
        "|---|---|---|---|---|",
    ]
    parts += [f"| {MODELS[name]} | {_suite(row)} |" for name, row in suites.items()]
    first = next(iter(targets.values()))
    parts += [
        "",
        f"The choice of the number of targets, on {first['images']} training images that no model has learnt from, "
        f"with {', '.join(first['targets'])} targets:\n",
        "| model | robust under AutoAttack | missed | processor time, whole over quick |\n|---|---|---|---|",
    ]
    parts += [f"| {MODELS[name]} | {_targets(row)} |" for name, row in targets.items()]
    parts += [
        "",
        "| model | other verdicts by default | search time, float32 over default | other verdicts, queries in bf16 | "
        "search time, float32 over that |\n|---|---|---|---|---|",
    ]
    parts += [f"| {MODELS[name]} | {_precision(row)} |" for name, row in precisions.items()]
    parts += ["", "| model | attack | robust | other verdicts | forward passes saved |\n|---|---|---|---|---|"]
    for name, row in cycles.items():
        for attack, each in row["attacks"].items():
            robust, other = each["full"]["robust"], len(each["other_verdicts"])
            parts.append(f"| {MODELS[name]} | {attack} | {robust} | {other} | {100 * each['passes_saved']:.0f} % |")
    return "\n".join(parts) + "\n"


def _processors(*checks: dict[str, Any]) -> str:
    found = {row["environment"]["cpu"] for rows in checks for row in rows.values()}
    return " and ".join(sorted(found))


def _suite(row: dict[str, Any]) -> str:
    whole, short = (row[name]["robust"] for name in ("autoattack", "autoattack-quick"))
    missed = ", ".join(f"image {each['index']} ({each['found_by']})" for each in row["missed"]) or "none"
    ratio = row["process_time_ratio"]
    return f"{whole} of {row['images']} | {short} | {missed} | {'-' if ratio is None else f'{ratio:.1f}'}"


def _targets(row: dict[str, Any]) -> str:
    tried = row["targets"].values()
    missed = ", ".join(str(each["missed"]) for each in tried)
    ratios = ", ".join("-" if (ratio := each["process_time_ratio"]) is None else f"{ratio:.1f}" for each in tried)
    return f"{row['robust']} of {row['images']} | {missed} | {ratios}"


def _precision(row: dict[str, Any]) -> str:
    full, usual, reduced = (_searching(row[name]) for name in ("float32", "auto", "queries_in_bf16"))
    by_default, in_bf16 = (len(row[key]) for key in ("other_verdicts", "other_verdicts_in_bf16"))
    return f"{by_default} | {full / usual:.2f} | {in_bf16} | {full / reduced:.2f}"


def _searching(row: dict[str, Any]) -> float:
    """Seconds of an attack's parts and of the audit."""
    return float(sum(part["seconds"] for part in row["parts"]) + row.get("audit", {}).get("seconds", 0.0))


def found() -> dict[str, dict[str, Any]]:
    """Return the committed results by block."""
    files = {name: RESULTS / f"{name}.json" for name in BLOCKS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def made(page: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the page with the tables in their places; a sentence where nothing was measured."""
    for name, write in zip(BLOCKS, (contention, quick), strict=True):
        begin, end = _markers(name)
        before, rest = page.split(begin)
        told = write(results[name]) if name in results else "No result is committed yet.\n"
        page = f"{before}{begin}{told}{end}{rest.split(end, 1)[1]}"
    return page


def main() -> None:
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8"), found()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
