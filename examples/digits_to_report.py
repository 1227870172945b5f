"""Train on the digits that come with the package, by a recipe with a few overrides, and write the report.

python examples/digits_to_report.py [FOLDER] [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import dualhead
from dualhead.report import write_report

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/example")
result = dualhead.train("digits", ["stages.*.epochs=3", *sys.argv[2:]], run_dir=folder)
for row in result.rows:
    low, high = row.evaluation.intervals["worst"]
    print(f"{row.name}: robust {row.evaluation.robust_accuracy['worst']:.1%} [{low:.1%}, {high:.1%}]")
print(write_report([folder], folder / "report.html"))
