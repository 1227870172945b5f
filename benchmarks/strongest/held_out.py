"""The last training images as a test part of their own: to choose on what neither training nor the test has seen.

    python benchmarks/strongest/held_out.py FOLDER_OF_PARQUET OUT

Writes images 40,000 to 50,000 of CIFAR-10's training part; the recipes here for a CPU train on the first few thousand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import load_dataset

FIRST = 40_000


def main() -> None:
    """Read, select, write."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = map(Path, sys.argv[1:])
    files = sorted(str(path) for path in source.rglob("*train*.parquet"))
    if not files:
        sys.exit(f"{source} holds no parquet file of a training part")
    images = load_dataset("parquet", data_files={"train": files}, split="train")
    out.mkdir(parents=True, exist_ok=True)
    images.select(range(FIRST, len(images))).to_parquet(out / "test-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
