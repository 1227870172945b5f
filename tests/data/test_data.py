from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dualhead.data import Loader, Split, augmentations, batches, cache, hold_out, load_split, to_bytes
from dualhead.errors import UserError
from dualhead.system.processes import Group

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DUALHEAD_CACHE", str(folder))
    return folder


def pixels_of(count, height=6, width=4, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.squeeze(image))).save(stream, form, **options)
    return stream.getvalue()


def hub_metadata(features):
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write_parquet(path, images, labels, *, image="image", label="label", names=NAMES, more=None, metadata=True):
    """A parquet file as the Hub lays it out: struct<bytes, path>, integers, and the features in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row if isinstance(row, dict | None) else {"bytes": row, "path": None} for row in images]
    columns = {
        image: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label: pa.array(labels, pa.int64()),
        **(more or {}),
    }
    described = {"_type": "Value", "dtype": "int64"}
    if names:
        described = {"_type": "ClassLabel", "names": list(names)}
    features = {image: {"_type": "Image"}, label: described}
    features |= {key: {"_type": "Value", "dtype": str(column.type)} for key, column in (more or {}).items()}
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(hub_metadata(features) if metadata else None), path)
    return path


def write_pngs(path, pixels, labels, **options):
    return write_parquet(path, [encoded(p) for p in pixels], labels, **options)


def write_folder(root, layout, size=(6, 4)):
    """Images `{"train/cat": 3}` whose pixels all hold a number of their own."""
    value = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            value += 1
            Image.fromarray(np.full((*size, 3), value, np.uint8)).save(root / folder / f"{number:03d}.png")
    return root


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.class_names == b.class_names


def refused(words, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words if isinstance(words, list) else [words]:
        assert word in message, message


def tiny_split(labels, names=NAMES):
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3).clone()
    return Split(images, torch.tensor(labels), tuple(names))


# Split


def test_split_describes_itself_and_takes():
    split = tiny_split([0, 1, 2, 1])
    assert (len(split), split.num_classes, split.image_shape) == (4, 3, (1, 2, 3))
    taken = split.take([3, 0])
    assert taken.labels.tolist() == [1, 0]
    assert taken.images[:, 0, 0, 0].tolist() == [3, 0]
    assert same(split.first(2), split.take(torch.tensor([0, 1])))
    assert same(split.first(99), split)
    assert (split.count(2), split.count(None), split.count(99)) == (2, len(split), len(split))
    assert same(split.spread(99), split)
    assert same(split.spread(2), split.take([0, 2]))
    refused("at least 1, got 0", split.first, 0)


def test_bytes_are_the_nearest_and_lie_between_0_and_255():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(levels.float() / 255), levels)
    assert torch.equal(to_bytes(levels.float() / 255 + 0.4 / 255), levels)
    assert to_bytes(torch.tensor([-0.01, 1.01])).tolist() == [0, 255]
    assert to_bytes(levels) is levels


@pytest.mark.parametrize(
    ("images", "labels", "names", "words"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), NAMES, "uint8 [N, C, H, W], got float32 [2, 1, 2, 2]"),
        (torch.zeros(2, 2, 2).byte(), torch.zeros(2).long(), NAMES, "got uint8 [2, 2, 2]"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2), NAMES, "labels must be int64 [N], got float32 [2]"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(3).long(), NAMES, "2 images and 3 labels"),
        (torch.zeros(0, 1, 2, 2).byte(), torch.zeros(0).long(), NAMES, "at least one image"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2).long(), ("one",), "at least 2 classes, got 1"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.tensor([0, 3]), NAMES, "label 3 of image 1 must lie in 0..2"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.tensor([0, -1]), NAMES, "label -1 of image 1"),
    ],
)
def test_split_refuses_what_it_cannot_be(images, labels, names, words):
    refused(words, Split, images, labels, names)


def test_arrays_of_every_documented_form_give_the_same_split():
    pixels = pixels_of(5)
    labels = np.array([0, 1, 2, 1, 0], np.int32)
    last = Split.from_arrays(pixels, labels, NAMES)
    assert last.image_shape == (3, 6, 4)
    assert torch.equal(last.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert same(last, Split.from_arrays(pixels.transpose(0, 3, 1, 2), labels, NAMES))
    assert same(last, Split.from_arrays(torch.from_numpy(pixels), torch.from_numpy(labels), NAMES))
    grey = Split.from_arrays(pixels[..., 0], labels.tolist())
    assert grey.image_shape == (1, 6, 4)
    assert grey.class_names == ("0", "1", "2")
    assert same(grey, Split.from_arrays(pixels[..., :1], labels))


def test_arrays_are_copied():
    pixels = pixels_of(2)
    split = Split.from_arrays(pixels, [0, 1])
    before = split.images.clone()
    pixels[:] = 0
    assert torch.equal(split.images, before)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 4, 4), np.float32), [0, 1], "float32; if they lie in [0, 1]"),
        (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0], "labels must be integers"),
        (np.zeros((2, 4, 4), np.uint8), [[0], [1]], "labels must be integers [N]"),
        (np.zeros((2, 3, 4, 3), np.uint8), [0, 1], "either axis could be"),
        (np.zeros((2, 4, 4, 4), np.uint8), [0, 1], "neither axis can be"),
        (np.zeros((2, 4), np.uint8), [0, 1], "got shape [2, 4]"),
        (np.zeros((2, 4, 4), np.uint8), [0, 0], "at least 2 classes"),
        (np.zeros((3, 4, 4), np.uint8), [0, 1, -1], "label -1 of image 2"),
    ],
)
def test_arrays_of_other_forms_are_refused(images, labels, words):
    refused(words, Split.from_arrays, images, labels)


# hold_out


@given(st.lists(st.integers(0, 12), min_size=2, max_size=6), st.data())
@settings(max_examples=150)
def test_hold_out_parts_every_class(counts, data):
    counts = [count + (count == 1) for count in counts]
    present = sum(count > 0 for count in counts)
    assume(present)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    labels = data.draw(st.permutations(labels))
    split = tiny_split(labels, [f"c{i}" for i in range(len(counts))])
    number = data.draw(st.integers(present, len(labels) - present))
    train, validation = hold_out(split, number, seed=data.draw(st.integers(0, 99)))
    assert len(validation) == number
    ids = [part.images[:, 0, 0, 0].tolist() for part in (train, validation)]
    assert sorted(ids[0] + ids[1]) == list(range(len(labels)))
    assert ids == [sorted(ids[0]), sorted(ids[1])]
    for part in (train, validation):
        assert part.labels.tolist() == [labels[i] for i in part.images[:, 0, 0, 0].tolist()]
        assert [n > 0 for n in np.bincount(part.labels, minlength=len(counts))] == [n > 0 for n in counts]


@given(st.integers(2, 7), st.integers(2, 30), st.data())
@settings(max_examples=60)
def test_hold_out_of_a_balanced_split_is_balanced(classes, each, data):
    split = tiny_split([i % classes for i in range(classes * each)], [str(i) for i in range(classes)])
    number = data.draw(st.integers(classes, classes * (each - 1)))
    counts = np.bincount(hold_out(split, number, 0)[1].labels, minlength=classes)
    assert counts.max() - counts.min() <= 1


def test_hold_out_keeps_proportions_and_counts_a_fraction():
    split = tiny_split([0] * 100 + [1] * 40 + [2] * 60)
    train, validation = hold_out(split, 0.25, 0)
    assert (len(train), len(validation)) == (150, 50)
    assert np.abs(np.bincount(validation.labels) - [25, 10, 15]).max() <= 1


def test_hold_out_is_fixed_by_its_seed():
    split = tiny_split([i % 3 for i in range(90)])
    assert same(hold_out(split, 30, 4)[1], hold_out(split, 30, 4)[1])
    assert not same(hold_out(split, 30, 4)[1], hold_out(split, 30, 5)[1])


@pytest.mark.parametrize(
    ("labels", "amount", "words"),
    [
        ([0, 0, 1, 1, 2, 2], 2, "fewer than 1 image for each of 3 classes; hold out 3 to 3"),
        ([0, 0, 1, 1, 2, 2], 4, "on the training side; hold out 3 to 3"),
        ([0, 0, 1, 1, 2], 3, "class 'owl' has 1 image"),
        ([0, 1, 2], 0, "cannot hold out 0 of 3"),
        ([0, 1, 2], 3, "cannot hold out 3 of 3"),
        ([0, 1, 2], 1.0, "between 0 and 1, got 1.0"),
        ([0, 1, 2], -0.1, "between 0 and 1"),
        ([0, 1, 2], float("nan"), "between 0 and 1"),
        ([0, 0, 1, 1, 2, 2], 0.01, "cannot hold out 0 of 6"),
        ([0, 1, 2], True, "must be a number"),
    ],
)
def test_hold_out_refuses_the_impossible(labels, amount, words):
    refused(words, hold_out, tiny_split(labels), amount, 0)


# parquet


def test_parquet_round_trip(tmp_path):
    pixels, labels = pixels_of(7), [0, 1, 2, 2, 1, 0, 1]
    write_pngs(tmp_path / "train-00000-of-00001.parquet", pixels, labels)
    split = load_split(str(tmp_path), "train")
    assert torch.equal(split.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert split.labels.tolist() == labels
    assert split.class_names == NAMES


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"),
        ("cifar_train.parquet", "cifar_val.parquet"),
        ("Training/a.parquet", "valid/a.parquet"),
    ],
)
def test_parts_are_found_by_name(tmp_path, names):
    for seed, name in enumerate(names):
        write_pngs(tmp_path / name, pixels_of(3, seed=seed), [0, 1, 2])
    for seed, part in enumerate(("train", "test")):
        expected = torch.from_numpy(pixels_of(3, seed=seed)).permute(0, 3, 1, 2)
        assert torch.equal(load_split(str(tmp_path), part).images, expected)


def test_test_is_preferred_to_validation(tmp_path):
    for seed, name in enumerate(("train", "valid", "val", "test", "validation")):
        write_pngs(tmp_path / f"{name}.parquet", pixels_of(3, seed=seed), [0, 1, 2])
    for name, seed in (("test", 3), ("validation", 4), ("valid", 1), ("val", 2)):
        expected = torch.from_numpy(pixels_of(3, seed=seed)).permute(0, 3, 1, 2)
        assert torch.equal(load_split(str(tmp_path), "test").images, expected)
        (tmp_path / f"{name}.parquet").unlink()
    refused(["there is no test part", "only train"], load_split, str(tmp_path), "test")


def test_shards_are_joined_in_order_and_limited(tmp_path):
    pixels, labels = pixels_of(9), [0, 1, 2] * 3
    for shard in range(3):
        rows = slice(3 * shard, 3 * shard + 3)
        write_pngs(tmp_path / f"train-{shard:05d}-of-00003.parquet", pixels[rows], labels[rows])
    expected = Split.from_arrays(pixels, labels, NAMES)
    assert same(load_split(str(tmp_path), "train"), expected)
    assert same(load_split(str(tmp_path), "train", limit=4), expected.first(4))
    assert same(load_split(str(tmp_path), "train", limit=99), expected)


def test_one_file_is_the_part_that_its_name_says_else_train(tmp_path):
    path = write_pngs(tmp_path / "mine.parquet", pixels_of(3), [0, 1, 2])
    expected = Split.from_arrays(pixels_of(3), [0, 1, 2], NAMES)
    assert same(load_split(str(path), "train"), expected)
    refused(["no test part", "only train"], load_split, str(path), "test")
    other = path.rename(tmp_path / "test-mine.parquet")
    assert same(load_split(str(other), "test"), expected)
    refused(["no train part", "only test"], load_split, str(other), "train")


def test_a_folder_without_parts_is_the_part_that_its_name_says(tmp_path):
    for name, part, missing in (("mine", "train", "test"), ("test", "test", "train")):
        write_pngs(tmp_path / name / "0000.parquet", pixels_of(3), [0, 1, 2])
        assert len(load_split(str(tmp_path / name), part)) == 3
        refused(f"no {missing} part", load_split, str(tmp_path / name), missing)
        assert len(load_split(str(tmp_path / name / "0000.parquet"), part)) == 3


def test_files_that_name_no_part_are_left_out_with_a_note(tmp_path, caplog):
    write_pngs(tmp_path / "train.parquet", pixels_of(3), [0, 1, 2])
    write_pngs(tmp_path / "extra.parquet", pixels_of(5), [0, 1, 2, 0, 1])
    with caplog.at_level(logging.WARNING):
        assert len(load_split(str(tmp_path), "train")) == 3
    assert "extra.parquet" in caplog.text


def test_hidden_files_are_not_read(tmp_path):
    write_pngs(tmp_path / "train.parquet", pixels_of(3), [0, 1, 2])
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.parquet").write_bytes(b"rubbish")
    assert len(load_split(str(tmp_path), "train")) == 3


def test_two_sets_in_one_folder_are_refused(tmp_path):
    for name in ("a", "b"):
        write_pngs(tmp_path / name / "train.parquet", pixels_of(3), [0, 1, 2])
    refused("several folders (a, b)", load_split, str(tmp_path), "train")


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "labels"), ("picture", "species")])
def test_columns_are_found_by_type_and_name(tmp_path, image, label):
    more = {"id": pa.array([7, 8, 9]), "note": pa.array(["a", "b", "c"])}
    write_pngs(tmp_path / "train.parquet", pixels_of(3), [0, 1, 2], image=image, label=label, more=more)
    assert load_split(str(tmp_path), "train").labels.tolist() == [0, 1, 2]


def test_the_fine_label_is_found_beside_the_coarse_one(tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    fine, coarse = ClassLabel(names=["cat", "dog", "oak"]), ClassLabel(names=["animal", "plant"])
    features = Features({"img": ImageFeature(), "fine_label": fine, "coarse_label": coarse})
    rows = [{"bytes": encoded(p), "path": None} for p in pixels_of(3)]
    columns = {"img": rows, "fine_label": [0, 1, 2], "coarse_label": [0, 0, 1]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    assert load_split(str(tmp_path), "train").class_names == ("cat", "dog", "oak")
    named = load_split(str(tmp_path), "train", label_column="coarse_label")
    assert (named.labels.tolist(), named.class_names) == ([0, 0, 1], ("animal", "plant"))


def test_columns_without_metadata_are_found(tmp_path):
    write_pngs(tmp_path / "train.parquet", pixels_of(3), [0, 1, 2], metadata=False)
    assert load_split(str(tmp_path), "train").class_names == ("0", "1", "2")
    table = pa.table({"image": [encoded(p) for p in pixels_of(3)], "label": pa.array([0, 1, 2], pa.uint8())})
    pq.write_table(table, tmp_path / "train.parquet")
    expected = Split.from_arrays(pixels_of(3), [0, 1, 2])
    assert same(load_split(str(tmp_path), "train"), expected)


def test_columns_missing_or_unclear_are_named(tmp_path):
    path = tmp_path / "train.parquet"
    numbers = pa.array([0, 1, 2])
    write_pngs(path, pixels_of(3), [0, 1, 2], more={"labels": numbers})
    refused(["not clear (label or labels)", "data.label_column"], load_split, str(path), "train")
    assert load_split(str(path), "train", label_column="labels").class_names == ("0", "1", "2")
    write_pngs(path, pixels_of(3), [0, 1, 2], label="weight", names=None)
    refused(["no label column", "image (Image), weight (int64)"], load_split, str(path), "train")
    pq.write_table(pa.table({"label": numbers, "a": numbers}), path)
    refused(["no image column", "data.image_column", "label (int64), a (int64)"], load_split, str(path), "train")
    write_pngs(path, pixels_of(3), [0, 1, 10**12], label="id", names=None)
    refused(["'id' holds numbers up to 1000000000000", "not class"], load_split, str(path), "train", label_column="id")
    write_pngs(path, pixels_of(3), [0, 1, 2], more={"text": pa.array(["a", "b", "c"])})
    refused("there is no column 'x'; there are: image", load_split, str(path), "train", image_column="x")
    assert load_split(str(path), "train", label_column="text").class_names == ("a", "b", "c")
    refused("'label' cannot be used", load_split, str(path), "train", image_column="label")


def test_labels_counted_from_one_are_noted(tmp_path, caplog):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}-0.parquet", [encoded(p) for p in pixels_of(3)], [1, 2, 3], names=None)
    with caplog.at_level("WARNING"):
        assert load_split(str(tmp_path), "train").num_classes == 4
    assert "no image has label 0; counted from 0 to 3, class 0 has none" in caplog.text


def test_classes_without_names_are_those_of_both_parts(tmp_path):
    write_pngs(tmp_path / "train.parquet", pixels_of(4), [0, 3, 1, 2], names=None)
    write_pngs(tmp_path / "test.parquet", pixels_of(2), [1, 0], names=None)
    for part in ("train", "test"):
        assert load_split(str(tmp_path), part).class_names == ("0", "1", "2", "3")
        assert load_split(str(tmp_path), part, limit=1).class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([0, 1, -1], NAMES, "row 2 of train.parquet has label -1 (-1 often marks"),
        ([0, 1, -1], None, "row 2 of train.parquet has label -1"),
        ([0, 3, 1], NAMES, "row 1 of train.parquet has label 3; labels must lie in 0..2"),
        ([0, None, 1], NAMES, "row 1 of train.parquet has no label"),
        ([0, 0, 0], None, "has 1 class"),
        ([0, 0, 0], ("one",), "has 1 class"),
    ],
)
def test_impossible_labels_are_named_with_their_row(tmp_path, labels, names, words):
    write_pngs(tmp_path / "train.parquet", pixels_of(3), labels, names=names)
    refused(words, load_split, str(tmp_path), "train")


def test_rows_are_counted_in_their_own_file(tmp_path):
    write_pngs(tmp_path / "train-0.parquet", pixels_of(3), [0, 1, 2])
    write_pngs(tmp_path / "train-1.parquet", pixels_of(3), [0, 5, 2])
    refused("row 1 of train-1.parquet has label 5", load_split, str(tmp_path), "train")
    assert len(load_split(str(tmp_path), "train", limit=4)) == 4


def test_shards_that_differ_and_empty_ones_are_refused(tmp_path):
    write_pngs(tmp_path / "train-0.parquet", pixels_of(3), [0, 1, 2])
    write_pngs(tmp_path / "train-1.parquet", pixels_of(3), [0, 1, 2], names=("dog", "cat", "owl"))
    refused("train-1.parquet and train-0.parquet differ", load_split, str(tmp_path), "train")
    (tmp_path / "train-1.parquet").unlink()
    write_pngs(tmp_path / "train-0.parquet", [], [])
    refused("train-0.parquet has no rows", load_split, str(tmp_path), "train")


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PAR1 and then rubbish PAR1"])
def test_damaged_parquet_is_named(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    refused("train.parquet is not a readable parquet file", load_split, str(tmp_path), "train")


def test_parquet_with_damaged_pages_is_named(tmp_path):
    path = write_pngs(tmp_path / "train.parquet", pixels_of(200, 16, 16), [0, 1] * 100)
    content = bytearray(path.read_bytes())
    content[4:64] = b"\xff" * 60
    path.write_bytes(content)
    refused("train.parquet", load_split, str(path), "train")


# images


def first_image(tmp_path, image, others=(), **options):
    """What becomes of one encoded image, in a set with others."""
    rows = [image, *others] if others else [image, image]
    write_parquet(tmp_path / "train.parquet", rows, [0, 1] + [0] * (len(rows) - 2))
    return load_split(str(tmp_path), "train", **options).images[0].numpy()


def test_grey_stays_grey_in_every_mode(tmp_path):
    grey = pixels_of(1)[0, ..., 0]
    expected = grey[None]
    assert np.array_equal(first_image(tmp_path, encoded(grey)), expected)
    alpha = np.stack([grey, grey[::-1]], -1)
    assert np.array_equal(first_image(tmp_path, encoded(Image.fromarray(alpha, "LA"))), expected)
    assert np.array_equal(first_image(tmp_path, encoded(Image.fromarray(grey).convert("1"))) % 255, 0 * expected)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(first_image(tmp_path, encoded(grey.astype(np.uint16) * 257, form)), expected)
    deep = np.array([[0, 127, 129, 256], [65535, 65406, 32768, 386]], np.uint16)
    scaled = np.rint(deep / 257).astype(np.uint8)
    assert np.array_equal(first_image(tmp_path, encoded(deep))[0], scaled)
    assert np.array_equal(first_image(tmp_path, encoded(deep.astype(np.int32), "TIFF"))[0], scaled)


def test_colour_becomes_rgb_in_every_mode(tmp_path):
    colour = pixels_of(1)[0]
    expected = colour.transpose(2, 0, 1)
    assert np.array_equal(first_image(tmp_path, encoded(colour)), expected)
    alpha = np.concatenate([colour, colour[..., :1]], 2)
    assert np.array_equal(first_image(tmp_path, encoded(alpha)), expected)
    palette = Image.fromarray(colour).quantize(8)
    assert palette.mode == "P"
    rgb = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(first_image(tmp_path, encoded(palette)), rgb)
    cmyk = Image.fromarray(colour).convert("CMYK")
    assert first_image(tmp_path, encoded(cmyk, "JPEG")).shape == (3, 6, 4)


@pytest.mark.parametrize("position", [0, 599])
def test_one_colour_image_makes_the_whole_set_rgb(tmp_path, position):
    grey = pixels_of(600, channels=1)
    images = [encoded(p) for p in grey]
    images[position] = encoded(pixels_of(1)[0])
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 300)
    split = load_split(str(tmp_path), "train")
    assert split.image_shape == (3, 6, 4)
    for index in {0, 300, 598} - {position}:
        assert np.array_equal(split.images[index].numpy(), np.repeat(grey[index].transpose(2, 0, 1), 3, 0))


def test_the_orientation_of_a_camera_is_applied(tmp_path):
    colour = pixels_of(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    turned = np.rot90(colour, -1).transpose(2, 0, 1)
    assert np.array_equal(first_image(tmp_path, encoded(colour, exif=exif)), turned)


def test_sizes_that_differ_are_refused_or_resized(tmp_path):
    small, large = pixels_of(1, 6, 4)[0], pixels_of(1, 12, 16)[0]
    images = [encoded(small), encoded(large)]
    write_parquet(tmp_path / "train.parquet", images, [0, 1])
    words = ["row 0 of train.parquet is 6x4", "row 1 of train.parquet is 12x16", "data.image_size"]
    refused(words, load_split, str(tmp_path), "train")
    split = load_split(str(tmp_path), "train", image_size=[6, 4])
    assert np.array_equal(split.images[0].numpy(), small.transpose(2, 0, 1))
    bicubic = np.asarray(Image.fromarray(large).resize((4, 6), Image.Resampling.BICUBIC))
    assert np.array_equal(split.images[1].numpy(), bicubic.transpose(2, 0, 1))


def test_resizing_does_not_alias(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
    grey = first_image(tmp_path, encoded(stripes), image_size=[8, 8])
    assert np.abs(grey.astype(int) - 127).max() <= 20


@pytest.mark.parametrize("size", [[32], [0, 32], [32, 32, 3]])
def test_impossible_image_sizes_are_refused(tmp_path, size):
    refused("data.image_size must be [height, width]", load_split, str(tmp_path), "train", image_size=size)


def png_of_declared_size(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


BROKEN = {
    "empty": (b"", "not a readable image (known: PNG"),
    "rubbish": (b"rubbish" * 99, "not a readable image (known: PNG"),
    "cut": (encoded(pixels_of(1, 64, 64)[0], "JPEG")[:900], "not a readable image: "),
    "pixels missing": (png_of_declared_size(64, 64), "not a readable image: "),
    "floats": (encoded(np.zeros((6, 4), np.float32), "TIFF"), "floats of unknown range"),
    "32 bits": (encoded(np.full((6, 4), 70000, np.int32), "TIFF"), "exceed 16 bits"),
    "runs a program": (encoded(pixels_of(1)[0], "EPS"), "not a readable image (known: PNG"),
    "bomb, warned of": (png_of_declared_size(10_000, 10_000), "decompression bomb"),
    "bomb": (png_of_declared_size(60_000, 60_000), "decompression bomb"),
    "null": (None, "row 1 of train.parquet has no image"),
    "neither bytes nor path": ({"bytes": None, "path": None}, "row 1 of train.parquet has no image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named(tmp_path, name):
    broken, words = BROKEN[name]
    good = [encoded(p) for p in pixels_of(2)]
    write_parquet(tmp_path / "train.parquet", [good[0], broken, good[1]], [0, 1, 2])
    refused(["row 1 of train.parquet", words], load_split, str(tmp_path), "train")


def test_large_images_are_decoded_by_threads_to_the_same(tmp_path):
    pixels = pixels_of(12, 80, 90)
    files = [encoded(p) for p in pixels]
    assert min(map(len, files)) > 8192
    write_parquet(tmp_path / "train.parquet", files, [0, 1, 2] * 4)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(load_split(str(tmp_path), "train").images, expected)
    files[7] = png_of_declared_size(10_000, 10_000) + bytes(20_000)
    write_parquet(tmp_path / "train.parquet", files, [0, 1, 2] * 4)
    refused(["row 7", "decompression bomb"], load_split, str(tmp_path), "train")


def test_an_image_given_by_its_path_is_opened(tmp_path):
    pixels = pixels_of(2)
    rows = []
    for number, image in enumerate(pixels):
        (tmp_path / f"{number}.png").write_bytes(encoded(image))
        rows.append({"bytes": None, "path": str(tmp_path / f"{number}.png")})
    write_parquet(tmp_path / "train.parquet", rows, [0, 1])
    assert same(load_split(str(tmp_path), "train"), Split.from_arrays(pixels, [0, 1], NAMES))


# image folders


def test_image_folder_with_parts(tmp_path):
    write_folder(tmp_path, {"train/dog": 1, "train/cat": 3, "val/cat": 1, "val/dog": 1})
    train = load_split(str(tmp_path), "train")
    assert train.class_names == ("cat", "dog")
    assert train.images[:, 0, 0, 0].tolist() == [2, 1, 3, 4]  # class after class in turn
    assert train.labels.tolist() == [0, 1, 0, 0]
    test = load_split(str(tmp_path), "test")
    assert (test.images[:, 0, 0, 0].tolist(), test.labels.tolist()) == ([5, 6], [0, 1])
    assert same(load_split(str(tmp_path), "train", limit=2), train.first(2))


def test_a_class_that_the_test_part_lacks_keeps_its_label(tmp_path):
    write_folder(tmp_path, {"train/ant": 1, "train/bee": 1, "train/cat": 1, "test/cat": 2})
    test = load_split(str(tmp_path), "test")
    assert (test.labels.tolist(), test.class_names) == ([2, 2], ("ant", "bee", "cat"))
    write_folder(tmp_path, {"test/cow": 1})
    refused("test/cow is a class that train/ does not have", load_split, str(tmp_path), "test")


def test_classes_called_like_parts(tmp_path):
    write_folder(tmp_path, {"train/test": 1, "train/train": 2, "test/train": 1, "test/test": 1})
    train, test = (load_split(str(tmp_path), part) for part in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [0, 1])


def test_image_folder_without_parts(tmp_path):
    for name, part, missing in (("mine", "train", "test"), ("test", "test", "train")):
        write_folder(tmp_path / name, {"cat": 1, "dog/old": 2})
        assert load_split(str(tmp_path / name), part).labels.tolist() == [0, 1, 1]
        refused([f"no {missing} part", f"{name}/{missing}/CLASS/"], load_split, str(tmp_path / name), missing)


def test_image_folder_ignores_what_is_no_image_and_names_what_is_broken(tmp_path):
    write_folder(tmp_path, {"train/cat": 2, "train/dog": 2})
    for junk in ("train/cat/.hidden.png", "train/cat/notes.txt", "train/readme.txt", "train/.DS_Store"):
        (tmp_path / junk).write_bytes(b"junk")
    assert load_split(str(tmp_path), "train").class_names == ("cat", "dog")
    (tmp_path / "train" / "empty").mkdir()
    refused("class folder train/empty/ holds no image", load_split, str(tmp_path), "train")
    (tmp_path / "train" / "empty").rmdir()
    (tmp_path / "train" / "dog" / "zzz.jpg").write_bytes(b"junk")
    refused("train/dog/zzz.jpg is not a readable image", load_split, str(tmp_path), "train")
    (tmp_path / "train" / "stray.png").write_bytes(b"junk")
    refused("stray.png in train/ lies outside a class folder", load_split, str(tmp_path), "train")


def test_image_folder_that_is_linked(tmp_path):
    write_folder(tmp_path / "real", {"train/cat": 1, "train/dog": 1})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "real" / "train")
    assert len(load_split(str(tmp_path / "linked"), "train")) == 2


def test_links_to_folders_inside_a_class_folder_are_followed_once(tmp_path):
    write_folder(tmp_path, {"train/cat": 2, "train/dog": 2})
    write_folder(tmp_path / "elsewhere", {"train/more": 3})
    (tmp_path / "set" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).rename(tmp_path / "set" / "train" / name)
    (tmp_path / "set" / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "train" / "more")
    (tmp_path / "set" / "train" / "dog" / "again").symlink_to(tmp_path / "set" / "train" / "dog")
    assert load_split(str(tmp_path / "set"), "train").labels.bincount().tolist() == [5, 2]


def test_folders_without_data_are_refused(tmp_path):
    refused("neither parquet files nor class folders", load_split, str(tmp_path), "train")
    (tmp_path / "train").mkdir()
    refused("train/ holds neither", load_split, str(tmp_path), "train")


# source


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "mine.parquet", "~/nowhere/at/all", ""])
def test_paths_that_do_not_exist(source):
    refused(f"data.source {source!r}: no such file or folder", load_split, source, "train")


def test_other_files_parts_and_limits_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    refused("a file must be parquet, .npz or .npy, got .zip", load_split, str(tmp_path / "a.zip"), "train")
    refused("part 'val' is not known; use one of train, test", load_split, "digits", "val")
    refused("data.limit must be at least 1, got 0", load_split, "digits", "train", limit=0)


def hub_stand_in(monkeypatch, tmp_path, layout):
    """Has the name of a data set on the Hub lead to a local folder; `datasets` itself does the rest."""
    import datasets

    for seed, (name, labels) in enumerate(layout.items()):
        write_pngs(tmp_path / "hub" / f"{name}-00000.parquet", pixels_of(len(labels), seed=seed), labels, image="img")
    real = datasets.load_dataset
    asked = []

    def load(name, config):
        asked.append((name, config))
        return real(str(tmp_path / "hub"), cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_name_on_the_hub_gives_what_its_files_give(monkeypatch, tmp_path):
    asked = hub_stand_in(monkeypatch, tmp_path, {"train": [0, 1, 2, 1], "test": [2, 1]})
    for part in ("train", "test"):
        split = load_split("someone/animals:small", part)
        assert same(split, load_split(str(tmp_path / "hub"), part))
        assert same(split, load_split("someone/animals:small", part))
        assert same(split.first(1), load_split("someone/animals:small", part, limit=1))
    assert set(asked) == {("someone/animals", "small")}


def test_a_test_part_of_the_hub_that_withholds_its_labels_is_passed_over(monkeypatch, tmp_path, caplog):
    hub_stand_in(monkeypatch, tmp_path, {"train": [0, 1, 2, 1], "test": [-1, -1], "validation": [2, 1, 0]})
    assert load_split("someone/animals", "test").labels.tolist() == [2, 1, 0]
    assert "its test part has no labels (-1): the validation part is used" in caplog.text
    assert len(load_split("someone/animals", "train")) == 4


def test_a_lone_test_part_without_labels_is_refused(monkeypatch, tmp_path):
    hub_stand_in(monkeypatch, tmp_path, {"train": [0, 1, 2, 1], "test": [-1, -1]})
    refused("-1 often marks a part without labels", load_split, "someone/animals", "test")


def test_faults_of_the_hub_are_one_line(monkeypatch, tmp_path):
    import datasets

    hub_stand_in(monkeypatch, tmp_path, {"train": [0, 1, 5, 1]})
    refused("row 2 of its train part has label 5", load_split, "someone/animals", "train")
    refused(["no test part", "only train"], load_split, "someone/animals", "test")

    def fail(name, config):
        raise ConnectionError(f"could not reach\n{name}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    words = "Hub does not give it either: ConnectionError: could not reach someone/animals"
    refused(words, load_split, "someone/animals", "train")


def test_digits_are_embedded():
    train, test = load_split("digits", "train"), load_split("digits", "test")
    assert (len(train), len(test)) == (1397, 400)
    assert train.image_shape == test.image_shape == (1, 8, 8)
    assert train.class_names == test.class_names == tuple("0123456789")
    assert int(train.images.max()) == 255
    assert np.bincount(test.labels).min() >= 38
    both = {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    assert not both


def test_digits_are_what_the_tool_makes(tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "tools" / "make_digits.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.write(tmp_path)
    for part in ("train", "test"):
        assert same(load_split(str(tmp_path), part), load_split("digits", part))


@pytest.mark.parametrize(("name", "classes"), [("cifar10-jpeg75", 10), ("tiny-imagenet-32-jpeg75", 200)])
def test_real_data(name, classes):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.exists():
        pytest.skip("not here")
    split = load_split(str(folder), "test", limit=500)
    assert (len(split), split.image_shape, split.num_classes) == (500, (3, 32, 32), classes)


# cache


def test_the_second_load_does_not_decode_and_gives_the_same(tmp_path, cache_folder, monkeypatch):
    write_pngs(tmp_path / "train.parquet", pixels_of(5), [0, 1, 2, 0, 1])
    first = load_split(str(tmp_path), "train")
    assert [path.suffix for path in cache_folder.iterdir()] == [".safetensors"]
    monkeypatch.setattr("dualhead.data.reading.decode_readable", None)
    assert same(load_split(str(tmp_path), "train"), first)
    assert same(load_split(str(tmp_path / "train.parquet"), "train"), first)


def test_the_cache_tells_options_apart(tmp_path):
    write_pngs(tmp_path / "train.parquet", pixels_of(5), [0, 1, 2, 0, 1])
    assert len(load_split(str(tmp_path), "train")) == 5
    assert len(load_split(str(tmp_path), "train", limit=2)) == 2
    assert load_split(str(tmp_path), "train", image_size=[3, 3]).image_shape == (3, 3, 3)


def test_the_cache_sees_a_change_that_keeps_the_size(tmp_path):
    path = tmp_path / "train.parquet"
    sizes = []
    for seed in range(2):
        write_parquet(path, [encoded(p, "BMP") for p in pixels_of(3, seed=seed)], [0, 1, 2])
        os.utime(path, ns=(0, seed * 10**9))
        sizes.append(path.stat().st_size)
        assert same(load_split(str(path), "train"), Split.from_arrays(pixels_of(3, seed=seed), [0, 1, 2], NAMES))
    assert sizes[0] == sizes[1]


def test_the_cache_sees_a_change_that_keeps_the_time(tmp_path):
    path = tmp_path / "train.parquet"
    for count in (3, 4):
        write_pngs(path, pixels_of(count), [0, 1, 2, 0][:count])
        os.utime(path, ns=(0, 0))
        assert len(load_split(str(path), "train")) == count


def test_the_cache_follows_the_classes_of_the_other_part(tmp_path):
    write_folder(tmp_path, {"train/bee": 1, "train/cat": 1, "test/cat": 1})
    assert load_split(str(tmp_path), "test").labels.tolist() == [1]
    write_folder(tmp_path, {"train/ant": 1})
    assert load_split(str(tmp_path), "test").labels.tolist() == [2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "rubbish", "folder"])
def test_a_damaged_cache_is_ignored_with_a_note(tmp_path, cache_folder, caplog, damage):
    write_pngs(tmp_path / "train.parquet", pixels_of(5), [0, 1, 2, 0, 1])
    first = load_split(str(tmp_path), "train")
    (stored,) = cache_folder.iterdir()
    content = bytearray(stored.read_bytes())
    content[-3] ^= 1
    stored.unlink()
    if damage == "folder":
        stored.mkdir()
    else:
        contents = {"cut": content[:-50], "flipped": content, "empty": b"", "rubbish": b"rubbish" * 50}
        stored.write_bytes(contents[damage])
    with caplog.at_level(logging.WARNING):
        assert same(load_split(str(tmp_path), "train"), first)
    assert "ignored the cached images" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, cache_folder, monkeypatch, caplog):
    write_pngs(tmp_path / "train.parquet", pixels_of(3), [0, 1, 2])
    (cache_folder / "file").write_bytes(b"")
    monkeypatch.setenv("DUALHEAD_CACHE", str(cache_folder / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert len(load_split(str(tmp_path), "train")) == 3
    assert "not kept for the next run" in caplog.text


def test_a_failed_write_leaves_nothing_behind(cache_folder, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(cache, "save_file", fail)
    with caplog.at_level(logging.WARNING):
        cache.write("key", tiny_split([0, 1, 2]))
    assert "no space left" in caplog.text
    assert not list(cache_folder.iterdir())


def test_the_cache_lies_in_the_users_folder_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("DUALHEAD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "dualhead"


# loader


def skewed_loader(**options):
    """20 images of class 0, 7 of class 2, 3 of class 1."""
    labels = [0] * 20 + [2] * 7 + [1] * 3
    return torch.tensor(labels), Loader(tiny_split(labels), 6, seed=3, device="cpu", **options)


def test_balanced_sampling_shows_each_class_equally_often_and_each_image_as_often_as_its_neighbours():
    labels, loader = skewed_loader(balanced=True)
    seen = torch.zeros(30, dtype=torch.int64)
    for epoch in range(20):
        order = loader.order(epoch)
        assert labels[order].bincount().tolist() == [10, 10, 10]
        counts = order.bincount(minlength=30)
        for label in range(3):
            own = counts[labels == label]
            assert own.max() - own.min() <= 1
        seen += counts
        batches = [batch.y for batch in loader.epoch(epoch)]
        assert len(batches) == len(loader) == 5 and torch.equal(torch.cat(batches), labels[order])
    assert (seen > 0).all() and not torch.equal(loader.order(0), loader.order(1))
    rest = [batch.index.tolist() for batch in loader.epoch(2, 3)]
    assert rest == [batch.index.tolist() for batch in loader.epoch(2)][3:]


def test_a_class_without_images_has_no_share_and_the_odd_image_goes_around():
    labels = [0] * 5 + [2] * 3
    loader = Loader(tiny_split([*labels, 2]), 3, seed=3, device="cpu", balanced=True)
    found = [torch.tensor([*labels, 2])[loader.order(epoch)].bincount().tolist() for epoch in range(2)]
    assert found == [[5, 0, 4], [4, 0, 5]]


def test_balanced_sampling_leaves_a_second_source_alone():
    extra = tiny_split([0] * 9)
    batches = [
        torch.cat([batch.index for batch in skewed_loader(balanced=balanced, extra=extra, fraction=0.5)[1].epoch(0)])
        for balanced in (False, True)
    ]
    assert torch.equal(*(index[index >= 30] for index in batches)) and not torch.equal(*batches)


def loader_of(count=23, batch=4, **options):
    split = Split.from_arrays(pixels_of(count), [i % 3 for i in range(count)], NAMES)
    augment = [augmentations.build("pad_crop-1"), augmentations.build("flip")]
    return split, Loader(split, batch, **{"seed": 5, "augment": augment, "device": "cpu", **options})


def equal_batches(a, b):
    return torch.equal(a.index, b.index) and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_an_epoch_visits_every_image_at_most_once():
    split, loader = loader_of()
    seen = list(loader.epoch(0))
    assert [len(batch) for batch in seen] == [4] * len(loader) == [4] * 5
    index = torch.cat([batch.index for batch in seen])
    assert len(set(index.tolist())) == 20
    assert sorted(loader.order(0).tolist()) == list(range(23))
    for batch in seen:
        assert torch.equal(batch.y, split.labels[batch.index])
        assert batch.x.dtype == torch.float32
        assert 0.0 <= float(batch.x.min()) <= float(batch.x.max()) <= 1.0


def test_without_augmentation_a_batch_is_the_images():
    split, loader = loader_of(augment=())
    for batch in loader.epoch(3):
        assert torch.equal((batch.x * 255).round().byte(), split.images[batch.index])


def test_epochs_and_seeds_differ_and_repeat():
    _, loader = loader_of()
    _, other = loader_of(seed=6)
    first = next(loader.epoch(0))
    assert equal_batches(first, next(loader.epoch(0)))
    assert not torch.equal(loader.order(0), loader.order(1))
    assert not torch.equal(loader.order(0), other.order(0))


def test_augmentation_belongs_to_the_sample_and_the_epoch():
    _, small = loader_of(batch=2)
    _, large = loader_of(batch=11)
    x = {int(i): image for batch in small.epoch(1) for i, image in zip(batch.index, batch.x, strict=True)}
    for batch in large.epoch(1):
        for i, image in zip(batch.index.tolist(), batch.x, strict=True):
            assert torch.equal(x[i], image)
    again = {int(i): image for batch in small.epoch(2) for i, image in zip(batch.index, batch.x, strict=True)}
    assert any(not torch.equal(x[i], again[i]) for i in x.keys() & again.keys())


def test_two_augmentations_of_one_kind_draw_apart():
    split, loader = loader_of(count=64, batch=64, augment=[augmentations.build("flip")] * 2)
    (batch,) = loader.epoch(0)
    flipped = (batch.x * 255).round().byte() == split.images[batch.index].flip(3)
    assert flipped.flatten(1).all(1).any()  # the same draw twice would leave every image as it was


@pytest.mark.parametrize("step", range(6))
def test_going_on_at_a_step_gives_the_rest(step):
    _, loader = loader_of()
    rest, whole = list(loader.epoch(2, step)), list(loader.epoch(2))[step:]
    assert len(rest) == 5 - step
    assert all(equal_batches(a, b) for a, b in zip(rest, whole, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_the_global_batch(world):
    _, alone = loader_of()
    shards = [list(loader_of(group=Group(rank, world))[1].epoch(0)) for rank in range(world)]
    for whole, *parts in zip(alone.epoch(0), *shards, strict=True):
        assert {len(part) for part in parts} <= {4 // world, -(-4 // world)}
        assert {part.total for part in parts} == {4}
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)


def test_a_split_smaller_than_a_batch_is_one_batch():
    _, loader = loader_of(count=3, batch=64)
    assert (len(loader), [len(batch) for batch in loader.epoch(0)]) == (1, [3])


def test_impossible_batches_are_refused():
    refused("batch_size must be at least 1, got 0", loader_of, batch=0)
    refused("a batch of 4 is less than an image for each of 5 processes", loader_of, group=Group(0, 5))
    refused("a batch of 5 (the split has 5 images) is", loader_of, count=5, batch=8, group=Group(0, 6))
    refused("batch_size must be at least 1", next, batches(tiny_split([0, 1]), 0, "cpu"))
    with pytest.raises(ValueError, match="first_step"):
        loader_of()[1].epoch(0, 6)


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 6))
@settings(max_examples=40)
def test_processes_share_a_split_without_a_gap_or_an_image_twice(count, size, world):
    split = tiny_split([i % 3 for i in range(count)])
    shares = [Group(rank, world).share_of(count) for rank in range(world)]
    seen = [batch.index for share in shares for batch in batches(split, size, "cpu", share)]
    assert torch.cat(seen).tolist() == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 20), st.integers(1, 25))
@settings(max_examples=40)
def test_batches_are_the_split_in_order(count, size):
    split = tiny_split([i % 3 for i in range(count)])
    seen = list(batches(split, size, "cpu"))
    assert torch.cat([batch.index for batch in seen]).tolist() == list(range(count))
    assert torch.equal(torch.cat([batch.y for batch in seen]), split.labels)
    assert torch.equal((torch.cat([batch.x for batch in seen]) * 255).round().byte(), split.images)
    assert all(len(batch) == size for batch in seen[:-1])
