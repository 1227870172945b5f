"""A part of Tiny ImageNet: its first classes, 10,000 training images in all, and all of their test images.

    python benchmarks/domains/classes.py FOLDER OUT CLASSES

FOLDER is any source that `data.source` takes; OUT/tiny.npz is one too. The first 20 classes are among the first 100. As
many images for any number of classes mean as many steps of training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dualhead.data import Split, load_split

IMAGES = 10_000


def first(split: Split, classes: int, each: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] of the first classes and their labels, in order; `each`: at most so many of a class."""
    labels = split.labels.numpy()
    rows = [np.flatnonzero(labels == label)[:each] for label in range(classes)]
    chosen = np.sort(np.concatenate(rows))
    return split.images[chosen].numpy().transpose(0, 2, 3, 1), labels[chosen]


def main() -> None:
    """Read, select, write."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, out, classes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    train, test = (load_split(source, part) for part in ("train", "test"))
    if not 2 <= classes <= train.num_classes:
        sys.exit(f"CLASSES must be 2 to {train.num_classes}")
    x_train, y_train = first(train, classes, IMAGES // classes)
    x_test, y_test = first(test, classes, None)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "tiny.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


if __name__ == "__main__":
    main()
