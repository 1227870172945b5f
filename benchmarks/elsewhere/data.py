"""Other data for the comparison of guided distillation with its base method, in the layout of the Hugging Face Hub.

    python benchmarks/elsewhere/data.py tiny FOLDER_OF_PARQUET OUT
    python benchmarks/elsewhere/data.py fashion FOLDER_OF_IDX OUT

`tiny`: the first 20 classes of Tiny ImageNet at 32x32. `fashion`: Fashion-MNIST from its four `*-ubyte.gz` files. OUT
gets `data/`, a training part and a test part of 2,000 images, and `held_out/`, 1,000 training images under the name of
a test part: to choose on what neither training nor the test has seen. Tiny ImageNet has 1,000 test images of those
classes; the other 1,000 are training images, which are then in no other part.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset

CLASSES = 20
TEST = 2_000
HELD_OUT = 1_000
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def tiny(source: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test part of the first classes; rows keep their order, which is random."""

    def part(name: str) -> Dataset:
        files = sorted(str(path) for path in source.rglob(f"*{name}*.parquet"))
        if not files:
            sys.exit(f"{source} holds no parquet file of a {name} part")
        whole = load_dataset("parquet", data_files={name: files}, split=name)
        few = whole.filter(lambda labels: [label < CLASSES for label in labels], batched=True, input_columns="label")
        names = whole.features["label"].names[:CLASSES]
        return few.cast(Features({"image": Image(), "label": ClassLabel(names=names)}))

    train, test = part("train"), part("test")
    first = len(train) - (TEST - len(test))
    more, held_out = train.select(range(first, len(train))), train.select(range(first - HELD_OUT, first))
    return train.select(range(first - HELD_OUT)), held_out, concatenate_datasets([test, more])


def fashion(source: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test part; rows keep their order, which is random."""

    def array(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)

    def part(name: str, rows: slice) -> Dataset:
        images = array(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[rows]
        labels = array(f"{name}-labels-idx1-ubyte.gz", 8)[rows]
        features = Features({"image": Image(), "label": Value("int64")})
        found = Dataset.from_dict({"image": list(images), "label": labels.astype(np.int64)}, features)
        return found.cast_column("label", ClassLabel(names=list(FASHION)))

    return (
        part("train", slice(0, -HELD_OUT)),
        part("train", slice(-HELD_OUT, None)),
        part("t10k", slice(0, TEST)),
    )


def main() -> None:
    """Read, divide, write."""
    makers = {"tiny": tiny, "fashion": fashion}
    if len(sys.argv) != 4 or sys.argv[1] not in makers:
        sys.exit(__doc__)
    source, out = map(Path, sys.argv[2:])
    train, held_out, test = makers[sys.argv[1]](source)
    for folder, name, rows in (("data", "train", train), ("data", "test", test), ("held_out", "test", held_out)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        rows.to_parquet(out / folder / f"{name}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
