"""Images that stay on disk: the same splits and batches as in memory, to the bit; and what may go wrong on the way."""

from __future__ import annotations

import io
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dualhead.data import CutMix, Loader, Storage, augmentations, batches, hold_out, load_split
from dualhead.errors import RunError, UserError
from dualhead.models import channel_statistics
from dualhead.recipe.yaml import load_recipe
from dualhead.system.processes import Group

STREAM = Storage(stream=True)
WORKERS = Storage(stream=True, workers=2)
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def photo(seed, size=None, *, grey=False):
    """A JPEG of its own size, unless one is given."""
    draw = np.random.default_rng(seed)
    height, width = size or draw.integers(20, 50, 2)
    pixels = draw.integers(0, 256, (height, width) if grey else (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def as_folder(root, count, **options):
    for number in range(count):
        for part in ("train", "test"):
            path = root / part / NAMES[number % 3] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(2 * number + (part == "test"), **options))
    return root


def as_parquet(root, count, labels=None, **options):
    """Two files of several row groups."""
    root.mkdir(parents=True, exist_ok=True)
    described = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(NAMES)}}
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    labels = labels or [number % 3 for number in range(count)]
    for shard, rows in enumerate(np.array_split(np.arange(count), 2)):
        images = [{"bytes": photo(int(row), **options), "path": None} for row in rows]
        table = pa.table({
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array([labels[row] for row in rows], pa.int64()),
        })  # fmt: skip
        pq.write_table(table.replace_schema_metadata(metadata), root / f"train-{shard}.parquet", row_group_size=3)
    return root


@pytest.fixture(scope="module", params=["folder", "parquet"])
def source(request, tmp_path_factory):
    make = as_folder if request.param == "folder" else as_parquet
    return str(make(tmp_path_factory.mktemp("data") / "set", 23))


def pair(source, storage=STREAM, **options):
    """The split in memory, and on disk."""
    options = {"image_size": [12, 10], **options}
    return load_split(source, "train", **options), load_split(source, "train", storage=storage, **options)


def assert_same_batches(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        for name in ("index", "x", "y"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.total == other.total


def refused(error, words, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ---- the split


@pytest.mark.parametrize(
    "options", [{}, {"crop": 0.875}, {"limit": 7}, {"limit": 7, "choice": "sample"}],
    ids=["whole", "cropped", "first", "sample"],
)  # fmt: skip
def test_what_is_on_disk_is_what_would_be_in_memory(source, options):
    memory, disk = pair(source, **options)
    assert (memory.is_stored, disk.is_stored) == (False, True)
    assert disk.image_shape == memory.image_shape == (3, 12, 10)
    assert disk.class_names == memory.class_names
    assert torch.equal(disk.labels, memory.labels)
    assert torch.equal(disk.images[:], memory.images)
    assert torch.equal(disk.images[torch.tensor([3, 1, 3])], memory.images[[3, 1, 3]])
    assert torch.equal(disk.show_middle(4, 6).images[:], memory.show_middle(4, 6).images)
    assert disk.show_middle(4, 6).image_shape == (3, 4, 6)


def test_parts_of_a_split_stay_on_disk(source):
    memory, disk = pair(source)
    for ours, theirs in zip(hold_out(disk, 6, 1), hold_out(memory, 6, 1), strict=True):
        assert ours.is_stored
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.images[:], theirs.images)


def test_a_set_of_grey_images_is_grey_and_names_one_that_is_not(tmp_path):
    root = as_folder(tmp_path / "set", 3, grey=True)
    memory, disk = pair(str(root))
    assert disk.image_shape == (1, 12, 10)
    assert torch.equal(disk.images[:], memory.images)
    (root / "train" / "ant" / "000.jpg").write_bytes(photo(1))
    refused(UserError, ["train/ant/000.jpg is coloured", "data.stream=false"], lambda: disk.images[:])


def test_statistics_do_not_depend_on_where_images_are(source):
    memory, disk = pair(source)
    assert channel_statistics(disk.images[torch.arange(n, n + 1)] for n in range(23)) == channel_statistics(
        memory.images
    )


# ---- batches


@given(
    batch=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 3), share=st.floats(0, 1),
    world=st.integers(1, 3), cutmix=st.booleans(), extra=st.sampled_from([None, "memory", "disk"]),
)  # fmt: skip
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_are_those_of_memory_to_the_bit(source, batch, seed, epoch, share, world, cutmix, extra):
    memory, disk = pair(source)
    more, stored = pair(source, limit=9)
    batch = max(batch, world)
    options = {
        "seed": seed, "device": "cpu", "cutmix": CutMix() if cutmix else None, "fraction": 0.4,
        "augment": [augmentations.build("flip"), augmentations.build({"name": "random_resized_crop", "size": [7, 8]})],
    }  # fmt: skip
    for rank in range(world):
        group = Group(rank, world)
        ours = Loader(disk, batch, extra={"memory": more, "disk": stored, None: None}[extra], group=group, **options)
        theirs = Loader(memory, batch, extra=more if extra else None, group=group, **options)
        step = int(share * (len(ours) - 1))  # resumed there
        assert_same_batches(ours.epoch(epoch, step), theirs.epoch(epoch, step))


def test_worker_processes_give_the_same_batches_and_leave_the_generator_alone(source):
    memory, disk = pair(source, WORKERS)
    options = {"seed": 3, "augment": [augmentations.build("pad_crop-1")], "device": "cpu"}
    state = torch.get_rng_state()
    ours, theirs = Loader(disk, 4, **options), Loader(memory, 4, **options)
    next(ours.epoch(1))  # an epoch that is left early
    assert_same_batches(ours.epoch(1, 2), theirs.epoch(1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_batches(batches(disk, 5, "cpu", slice(2, 21)), batches(memory, 5, "cpu", slice(2, 21)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(tmp_path, workers):
    root = as_folder(tmp_path / "set", 6)
    split = load_split(str(root), "train", image_size=[8, 8], storage=Storage(stream=True, workers=workers))
    (root / "train" / "bee" / "001.jpg").write_bytes(b"rubbish")
    refused(UserError, ["train/bee/001.jpg is not a readable image"], lambda: list(batches(split, 2, "cpu")))


def test_sizes_that_differ_are_told_when_they_are_met(tmp_path):
    root = as_folder(tmp_path / "set", 6, size=(9, 8))
    split = load_split(str(root), "train", storage=STREAM)
    (root / "train" / "cat" / "002.jpg").write_bytes(photo(0, (5, 6)))
    refused(UserError, ["cat/002.jpg is 5x6", "set data.image_size"], lambda: split.images[:])


def test_a_worker_process_that_dies_ends_the_run_in_one_line(tmp_path):
    disk = pair(str(as_folder(tmp_path / "set", 4)))[1]
    images = disk.images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(images), "_decode", _die)

        def use():
            return list(type(images)(Dying(), images.rows, images.framing, images.decoded, 1).in_turn(pieces, "cpu"))

        pieces = [torch.arange(2), torch.arange(2)]
        refused(RunError, ["a process that decodes images has died", "lower data.workers"], use)


def _die(self, rows, pool=None):
    raise AssertionError("only worker processes decode")


class Dying:
    """Encoded images that end the process which reads them."""

    def read(self, positions):
        del positions
        os.kill(os.getpid(), signal.SIGKILL)


# ---- when


def test_images_stream_where_they_would_take_more_than_there_is_room(source):
    needed = 23 * 3 * 12 * 10
    for room, expected in ((None, False), (needed, False), (needed - 1, True)):
        split = load_split(source, "train", image_size=[12, 10], storage=Storage(room=room))
        assert split.is_stored == expected
    few = load_split(source, "train", image_size=[12, 10], limit=2, storage=Storage(room=needed - 1))
    assert not few.is_stored


@pytest.mark.parametrize(
    ("word", "room", "stored"),
    [("auto", 10**9, False), ("auto", 10, True), ("true", 10**9, True), ("false", 10, False)],
)
def test_a_recipe_says_whether_images_stream(source, word, room, stored):
    overrides = [f"data.source={source}", "data.image_size=[8, 8]", "data.workers=3", f"data.stream={word}"]
    split = load_recipe("digits", overrides).data.load("train", room=room)
    assert split.is_stored == stored
    if stored:
        assert split.images.workers == 3


# ---- a set sorted by class


def test_a_limit_that_leaves_classes_out_is_refused_and_a_sample_is_not(tmp_path):
    root = as_parquet(tmp_path / "sorted", 24, [number // 8 for number in range(24)], size=(6, 6))
    overrides = [f"data.source={root}", "data.train_limit=9"]
    words = ["data.train_limit: the first 9 images show 2 of 3 classes", "data.train_choice=sample"]
    refused(UserError, words, load_recipe("digits", overrides).data.load, "train")
    data = load_recipe("digits", [*overrides, "data.train_choice=sample"]).data
    sample, whole = data.load("train"), load_split(str(root), "train")
    assert len(sample) == 9
    assert set(sample.labels.tolist()) == {0, 1, 2}
    found = [int((whole.images == image).flatten(1).all(1).nonzero()) for image in sample.images]
    assert found == sorted(set(found))
    assert found != list(range(9))
    assert torch.equal(data.load("train").images, sample.images)


# ---- sizes


def test_a_crop_shows_the_middle_and_keeps_proportions(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # a square in the middle
    for name in NAMES[:2]:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "a.png")
    cropped = load_split(str(tmp_path), "train", image_size=[20, 20], crop=1.0).images
    assert int(cropped[..., 1:-1, 1:-1].min()) == 255  # the square alone; the filter looks a little beyond its edge
    assert int(cropped.min()) > 200
    stretched = load_split(str(tmp_path), "train", image_size=[20, 20]).images
    assert stretched[0, 0, 10].tolist()[0] == 0
    half = load_split(str(tmp_path), "train", image_size=[10, 20], crop=0.5).images
    assert half.shape == (2, 3, 10, 20)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.crop=0.875"], "data.crop: needs image_size"),
        (["data.train_size=[8, 8]"], "data.train_size: needs image_size"),
        (["data.image_size=[9, 8]", "data.train_size=[8, 8]"], "data.train_size: must be at least image_size [9, 8]"),
        (["data.stream=maybe"], "data.stream"),
        (["data.workers=-1"], "data.workers"),
    ],
)
def test_impossible_keys_are_refused(words, says):
    refused(UserError, [says], load_recipe, "digits", words)
