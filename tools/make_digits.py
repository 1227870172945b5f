"""Make the embedded digits data set: src/dualhead/data/digits/{train,test}-00000-of-00001.parquet.

    python tools/make_digits.py [FOLDER]

Needs scikit-learn, which the package itself does not. The same versions of the libraries write the same bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from numpy.typing import NDArray
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_IMAGES = 400
SEED = 0
FOLDER = Path(__file__).resolve().parents[1] / "src" / "dualhead" / "data" / "digits"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A grey image [H, W] as PNG."""
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def pixels_and_labels() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All 1,797 digits, uint8 [N, 8, 8]: the counts 0..16 of set pixels scaled to 0..255."""
    digits = load_digits()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)


def write(folder: Path) -> None:
    pixels, labels = pixels_and_labels()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SEED, shuffle=True
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", train), ("test", test)):
        columns = {
            "image": [{"bytes": png(pixels[i]), "path": None} for i in chosen],
            "label": [int(labels[i]) for i in chosen],
        }
        path = folder / f"{part}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path)
        print(f"{path}: {len(chosen)} images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
