"""CIFAR-10 from the Hub's layout becomes "CIFAR-10, JPEG-75": JPEG of quality 75, order and labels as they were."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from dualhead.data import load_split

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("make_cifar10_jpeg75", ROOT / "tools" / "make_cifar10_jpeg75.py")
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


def encoded(pixels, kind, **settings):
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, kind, **settings)
    return stored.getvalue()


@pytest.fixture
def hub(tmp_path):
    """Twelve smooth images in the Hub's layout, and their pixels."""
    ramp = np.add.outer(np.arange(32), np.arange(32))[..., None]
    pixels = [np.uint8(ramp * (number % 4 + 1) + [0, number * 5, 40]) for number in range(12)]
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog", "ship"])})
    folder = tmp_path / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    for part, numbers in (("train", range(9)), ("test", range(9, 12))):
        rows = {
            "img": [{"bytes": encoded(pixels[n], "PNG"), "path": None} for n in numbers],
            "label": [n % 3 for n in numbers],
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return tmp_path / "cifar10", pixels


def test_images_are_jpeg_of_quality_75_and_order_and_labels_stay(hub, tmp_path):
    source, pixels = hub
    assert TOOL.main(source, tmp_path / "out") == 0
    for part, numbers in (("train", range(9)), ("test", range(9, 12))):
        table = pq.read_table(tmp_path / "out" / f"{part}-00000-of-00001.parquet")
        assert table["label"].to_pylist() == [n % 3 for n in numbers]
        stored = [picture["bytes"] for picture in table["img"].to_pylist()]
        assert stored == [encoded(pixels[n], "JPEG", quality=75) for n in numbers]
        split = load_split(str(tmp_path / "out"), part)
        assert tuple(split.class_names) == ("cat", "dog", "ship")
        assert len(split) == len(numbers)


def test_what_is_no_such_folder_is_refused_in_one_line(hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert TOOL.main(tmp_path / "empty", tmp_path / "out") == 2
    assert "holds no parquet files" in capsys.readouterr().out
    assert TOOL.main(hub[0], hub[0]) == 2
    assert "is not empty" in capsys.readouterr().out
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "empty" / "train.parquet")
    assert TOOL.main(tmp_path / "empty", tmp_path / "out") == 2
    assert "expected one column of pictures" in capsys.readouterr().out
