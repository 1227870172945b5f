"""Images that samples of CIFAR-10 start from: Tiny ImageNet at 32x32 without the classes that CIFAR-10 has.

    python benchmarks/generation/seeds.py FOLDER_OF_PARQUET OUT

The images must be compressed as those of CIFAR-10 are, or the energy learns to tell compressions.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset, load_dataset

SHARED = (
    "bullfrog", "tailed frog", "goose", "black stork", "king penguin", "albatross", "crane", "Chihuahua",
    "Yorkshire terrier", "golden retriever", "Labrador retriever", "German shepherd", "standard poodle", "tabby",
    "Persian cat", "Egyptian cat", "cougar", "lion", "gazelle", "bighorn", "ox", "Arabian camel", "beach wagon",
    "bullet train", "convertible", "freight car", "go-kart", "gondola", "jinrikisha", "lifeboat", "limousine",
    "moving van", "police van", "projectile", "school bus", "sports car", "tractor", "trolleybus",
)  # fmt: skip
"""Classes of Tiny ImageNet that show, or look like, what a class of CIFAR-10 shows."""


def others(source: Path, part: str) -> Dataset:
    """Images of the other classes; rows keep their order, and labels the numbers of all classes."""
    files = sorted(str(path) for path in source.rglob(f"*{part}*.parquet"))
    if not files:
        sys.exit(f"{source} holds no parquet file of a {part} part")
    whole = load_dataset("parquet", data_files={part: files}, split=part)
    names = whole.features["label"].names
    unknown = set(SHARED) - set(names)
    if unknown:
        sys.exit(f"{source} is not Tiny ImageNet: it has no class {sorted(unknown)[0]}")
    left_out = {names.index(name) for name in SHARED}
    return whole.filter(lambda labels: [label not in left_out for label in labels], batched=True, input_columns="label")


def main() -> None:
    """Write OUT/train and OUT/test as parquet."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        others(source, part).to_parquet(out / f"{part}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
