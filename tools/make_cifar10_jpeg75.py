"""Make "CIFAR-10, JPEG-75" from CIFAR-10 as it lies on the Hugging Face Hub.

    python tools/make_cifar10_jpeg75.py path/to/cifar10 path/to/cifar10-jpeg75

The first folder holds the Hub's parquet files (`uoft-cs/cifar10`: `plain_text/train-*.parquet`, `test-*.parquet`, PNG
images). Each image is encoded anew as JPEG of quality 75; rows keep their order, columns and labels. `data.source` and
`--data` read the second folder.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

QUALITY = 75


def as_jpeg(stored: bytes) -> bytes:
    """Return an encoded picture as JPEG of quality 75 with Pillow's other defaults (4:2:0, baseline)."""
    with Image.open(io.BytesIO(stored)) as picture:
        if picture.mode not in ("RGB", "L"):
            raise ValueError(f"expected 8-bit colour or grey pictures, got mode {picture.mode}")
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


def converted(table: pa.Table) -> pa.Table:
    """Return the table with every picture of its column of pictures encoded anew.

    Raises:
        ValueError: if no column, or more than one, holds pictures as the Hub stores them, bytes and path.
    """
    pictures = [
        name for name in table.column_names
        if pa.types.is_struct(kind := table.schema.field(name).type) and kind.get_field_index("bytes") >= 0
    ]  # fmt: skip
    if len(pictures) != 1:
        raise ValueError(f"expected one column of pictures with their bytes, found {pictures or 'none'}")
    place = table.schema.get_field_index(pictures[0])
    old = table.schema.field(place)
    rows = [{"bytes": as_jpeg(picture["bytes"]), "path": None} for picture in table.column(place).to_pylist()]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return table.set_column(place, pa.field(old.name, kind, metadata=old.metadata), pa.array(rows, kind))


def main(source: Path, target: Path) -> int:
    """Convert every parquet file of a folder into another one; return an exit status."""
    files = sorted(source.rglob("*.parquet"))
    if not files:
        print(f"{source}: holds no parquet files; get them with `hf download uoft-cs/cifar10 --repo-type dataset`")
        return 2
    if target.exists() and any(target.iterdir()):
        print(f"{target}: is not empty; name a new folder")
        return 2
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            table = converted(pq.read_table(file))
        except (ValueError, OSError) as error:
            print(f"{file}: {error}")
            return 2
        pq.write_table(table, target / file.name)
        print(f"{target / file.name}: {table.num_rows} images")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
