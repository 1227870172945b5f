"""Data as people have them: parts by many names, tables with labels of any type, arrays, saved sets, and paths."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dualhead.data import Split, Storage, load_split, resolve
from dualhead.errors import UserError

NAMES = ("ant", "bee", "cow")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(value):
    return Image.fromarray(np.full((4, 5), value, np.uint8))


def png(value):
    stream = io.BytesIO()
    picture(value).save(stream, "PNG")
    return stream.getvalue()


def folders(root, layout):
    value = 0
    for place, count in layout.items():
        for _ in range(count):
            value += 1
            (root / place).mkdir(parents=True, exist_ok=True)
            picture(value).save(root / place / f"{value:03d}.png")
    return str(root)


def table(path, labels, images=None, image="image", label="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(labels)
    images = pa.array([{"bytes": png(n), "path": None} for n in range(count)], STRUCT) if images is None else images
    pq.write_table(pa.table({image: images, label: labels}), path)


def refused(words, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


def values(split):
    return split.images[:][:, 0, 0, 0].tolist()


# parts


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"), ("TRAIN", "TEST"), ("seg_train/seg_train", "seg_test/seg_test"),
        ("trainset", "testset"),
        ("train_images", "test_images"), ("TrainSet", "TestSet"), ("train", "eval"), ("train", "dev"),
        ("archive/data/train", "archive/data/val"), ("x-train", "x-valid"),
    ],
)  # fmt: skip
def test_parts_are_known_by_their_words(tmp_path, train, test):
    source = folders(tmp_path, {f"{train}/ant": 2, f"{train}/bee": 2, f"{test}/ant": 1, f"{test}/bee": 1})
    assert (values(load_split(source, "train")), values(load_split(source, "test"))) == ([1, 3, 2, 4], [5, 6])


def test_classes_whose_names_hold_such_words_are_classes(tmp_path):
    source = folders(tmp_path, {"bullet train": 2, "test tube": 2})
    assert load_split(source, "train").class_names == ("bullet train", "test tube")


def test_a_test_part_without_labels_gives_way_to_one_that_has_them(tmp_path, caplog):
    source = folders(tmp_path, {"train/ant": 2, "train/bee": 2, "test": 3, "val/ant": 1, "val/bee": 1})
    assert values(load_split(source, "test")) == [8, 9]
    assert "test/ has no class folders: val/ is the test part" in caplog.text


def test_a_test_part_of_one_folder_that_is_no_class_gives_way_too(tmp_path):
    source = folders(tmp_path, {"train/ant": 2, "train/bee": 2, "test/unknown": 3, "val/ant": 1, "val/bee": 1})
    assert values(load_split(source, "test")) == [8, 9]


@pytest.mark.parametrize("withheld", [[-1, -1], [None, None], "no column"])
def test_a_table_without_labels_gives_way_too(tmp_path, withheld):
    table(tmp_path / "train.parquet", pa.array([0, 1, 2]))
    table(tmp_path / "validation.parquet", pa.array([2, 1, 0, 0]))
    labels, name = (
        (pa.array([0, 1]), "number") if withheld == "no column" else (pa.array(withheld, pa.int64()), "label")
    )
    table(tmp_path / "test.parquet", labels, label=name)
    assert load_split(str(tmp_path), "test").labels.tolist() == [2, 1, 0, 0]


def test_what_systems_leave_among_images_is_not_read(tmp_path):
    layout = {"train/ant": 2, "train/bee": 2, "test/ant": 1, "test/bee": 1}
    junk = (
        "train/ant/@eaDir/001.png",
        "train/@eaDir",
        "__MACOSX/train/ant",
        "train/.ipynb_checkpoints",
        "train/bee/#recycle",
    )
    source = folders(tmp_path, layout | dict.fromkeys(junk, 1))
    split = load_split(source, "train")
    assert (values(split), split.class_names) == ([1, 3, 2, 4], ("ant", "bee"))


def test_folders_beside_the_parts_are_told(tmp_path, caplog):
    source = folders(tmp_path, {"train/ant": 2, "train/bee": 2, "test/ant": 1, "test/bee": 1, "more/ant": 3})
    assert len(load_split(source, "train")) == 4
    assert "left out 3 images in more/, which is no part" in caplog.text


def test_parts_inside_classes_are_refused(tmp_path):
    source = folders(tmp_path, {f"{name}/{part}": 2 for name in NAMES for part in ("train", "test")})
    refused(["ant/ holds the parts test, train", "put parts outermost"], load_split, source, "train")


def test_images_outside_class_folders_are_told_what_can_list_them(tmp_path):
    source = folders(tmp_path, {"train": 3, "test": 2})
    refused(["lies outside a class folder (3 such)", "metadata.csv"], load_split, source, "train")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_of_files_and_labels_is_read(tmp_path, form):
    for part, count in (("train", 6), ("test", 3)):
        source = folders(tmp_path, {part: count})
        files = sorted(path.name for path in (tmp_path / part).glob("*.png"))
        rows = [{"file_name": name, "label": NAMES[n % 3]} for n, name in enumerate(files)]
        text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        if form == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / part / f"metadata.{form}").write_text(text)
    assert (load_split(source, "test").labels.tolist(), load_split(source, "test").class_names) == ([0, 1, 2], NAMES)
    (tmp_path / "test" / f"metadata.{form}").write_text('{"a": 1}' if form == "jsonl" else "a,b\n1,2\n")
    refused("needs columns file_name and label", load_split, source, "test")


def test_a_corrected_list_is_read_anew(tmp_path):
    source, file = folders(tmp_path, {"train": 3}), tmp_path / "train" / "metadata.csv"
    for last, labels in (("ant", [0, 1, 0]), ("bee", [0, 1, 1])):  # the same classes, and the same order of files
        file.write_text(f"file_name,label\n001.png,ant\n002.png,bee\n003.png,{last}\n")
        assert load_split(source, "train").labels.tolist() == labels


@pytest.mark.parametrize("label", ["null", "NaN", '""', "[0, 1]"])
def test_a_list_needs_one_label_of_each_image(tmp_path, label):
    source = folders(tmp_path, {"train": 3, "test": 2, "val": 2})
    rows = '{"file_name": "001.png", "label": 0}\n{"file_name": "002.png", "label": 1}\n'
    (tmp_path / "train" / "metadata.jsonl").write_text(f'{rows}{{"file_name": "003.png", "label": {label}}}')
    told = "gives [0, 1] as a label" if label == "[0, 1]" else "row 2 of train/metadata.jsonl has no label"
    refused(told, load_split, source, "train")


def test_a_listed_part_without_labels_is_passed_over(tmp_path, caplog):
    source = folders(tmp_path, {"train": 2, "test": 2, "val": 2})
    for part, first, labels in (("train", 1, "01"), ("test", 3, ("", "")), ("val", 5, "10")):
        listed = "".join(f"00{first + n}.png,{label}\n" for n, label in enumerate(labels))
        (tmp_path / part / "metadata.csv").write_text(f"file_name,label\n{listed}")
    assert load_split(source, "test").labels.tolist() == [0, 1]
    assert "val/ is the test part" in caplog.text
    (tmp_path / "val" / "metadata.csv").write_text("file_name,label\n005.png,\n")
    refused("test/ lists images without labels", load_split, source, "test")


@pytest.mark.parametrize("stream", [False, True])
def test_a_list_may_name_files_by_their_absolute_paths(tmp_path, stream):
    folders(tmp_path / "elsewhere", {"": 2})
    (tmp_path / "set" / "train").mkdir(parents=True)
    listed = "".join(f"{tmp_path}/elsewhere/00{n + 1}.png,{n}\n" for n in range(2))
    (tmp_path / "set" / "train" / "metadata.csv").write_text(f"file_name,label\n{listed}")
    assert values(load_split(str(tmp_path / "set"), "train", storage=Storage(stream))) == [1, 2]


# splitting off


def test_a_test_part_is_split_off_of_all_classes_and_stays_the_same(tmp_path):
    source = folders(tmp_path, {"ant": 20, "bee": 10, "cow": 10})
    refused(["there is no test part", "or split one off with data.test=0.2"], load_split, source, "test")
    train, test = (load_split(source, part, test=0.2) for part in ("train", "test"))
    assert (test.labels.bincount().tolist(), train.labels.bincount().tolist()) == ([4, 2, 2], [16, 8, 8])
    assert sorted(values(train) + values(test)) == list(range(1, 41))
    assert values(load_split(source, "test", test=0.2)) == values(test)
    assert values(load_split(source, "train", test=0.2, limit=5)) == values(train)[:5]
    assert len(load_split(source, "test", test=10)) == 10
    streamed = load_split(source, "test", test=0.2, storage=Storage(True))
    assert values(streamed) == values(test)


def test_tables_and_arrays_are_split_too(tmp_path):
    labels = [n % 3 for n in range(30)]
    table(tmp_path / "table" / "train.parquet", pa.array(labels))
    np.savez(tmp_path / "a.npz", image=np.stack([np.full((4, 5), n, np.uint8) for n in range(30)]), label=labels)
    for source in (tmp_path / "table", tmp_path / "a.npz"):
        train, test = (load_split(str(source), part, test=0.2) for part in ("train", "test"))
        assert test.labels.bincount().tolist() == [2, 2, 2]
        assert sorted(values(train) + values(test)) == list(range(30))


def test_a_set_with_a_test_part_is_not_split(tmp_path):
    source = folders(tmp_path, {"train/ant": 4, "train/bee": 4, "test/ant": 1, "test/bee": 1})
    refused("data.test: there is a test part already (test); leave the key out", load_split, source, "train", test=0.2)


def test_a_share_that_cannot_be_is_refused(tmp_path):
    source = folders(tmp_path, {"ant": 4, "bee": 1})
    refused("data.test: cannot hold out: class 'bee' has 1 image", load_split, source, "test", test=0.2)


# labels


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["cow", "ant", "bee", "ant"], NAMES, [2, 0, 1, 0]),
        (pa.array(["cow", "ant", "bee", "ant"]).dictionary_encode(), NAMES, [2, 0, 1, 0]),
        (["10", "9", "10", "9"], ("9", "10"), [1, 0, 1, 0]),
        ([1.0, 0.0, 2.0, 1.0], ("0", "1", "2"), [1, 0, 2, 1]),
        ([True, False, True, False], ("False", "True"), [1, 0, 1, 0]),
        (pa.array([1, 0, 1, 0], pa.uint8()), ("0", "1"), [1, 0, 1, 0]),
        (pa.array(["b", "a", "b", "a"], pa.large_string()), ("a", "b"), [1, 0, 1, 0]),
    ],
)
def test_labels_of_any_type_are_classes(tmp_path, labels, names, expected):
    table(tmp_path / "train.parquet", labels if isinstance(labels, pa.Array) else pa.array(labels))
    split = load_split(str(tmp_path), "train")
    assert (split.labels.tolist(), split.class_names) == (expected, names)


def test_text_has_the_classes_of_both_parts(tmp_path):
    table(tmp_path / "train.parquet", pa.array(["bee", "cow", "ant"]))
    table(tmp_path / "test.parquet", pa.array(["cow", "cow"]))
    assert load_split(str(tmp_path), "test").labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.5, 1.0, 0.0], "column 'label' holds numbers such as 0.5: labels are whole numbers, or text"),
        ([[0, 1], [1, 0], [1, 1]], "column 'label' holds several labels of an image"),
        (["ant", None, "bee"], "row 1 of train.parquet has no label"),
    ],
)
def test_what_is_no_label_of_a_class_is_refused(tmp_path, labels, words):
    table(tmp_path / "train.parquet", pa.array(labels))
    refused(words, load_split, str(tmp_path), "train")


def test_gaps_in_labels_are_told_each_time(tmp_path, caplog):
    table(tmp_path / "train.parquet", pa.array([0, 7, 0, 7]))
    for _ in range(2):  # the second time its images come from the cache
        caplog.clear()
        assert load_split(str(tmp_path), "train").num_classes == 8
        assert "no image has 1, 2, 3, 4, 5, 6: 8 classes, of which 2 have images" in caplog.text


# images in tables


def test_pixels_in_lists_are_told_where_to_go(tmp_path):
    pixels = pa.array([[[1, 2], [3, 4]]] * 3)
    table(tmp_path / "train.parquet", pa.array([0, 1, 2]), pixels)
    refused("column 'image' holds pixels in lists; store encoded images", load_split, str(tmp_path), "train")


@pytest.mark.parametrize("stream", [False, True])
def test_paths_in_a_table_are_relative_to_it(tmp_path, stream, monkeypatch):
    folders(tmp_path / "set" / "files", {"": 3})
    paths = sorted(f"files/{path.name}" for path in (tmp_path / "set" / "files").iterdir())
    table(
        tmp_path / "set" / "train.parquet",
        pa.array([0, 1, 2]),
        pa.array([{"bytes": None, "path": p} for p in paths], STRUCT),
    )
    monkeypatch.chdir("/")
    assert values(load_split(str(tmp_path / "set"), "train", storage=Storage(stream))) == [1, 2, 3]
    table(tmp_path / "set" / "train.parquet", pa.array([0, 1, 2]), pa.array(paths), image="where")
    split = load_split(str(tmp_path / "set"), "train", image_column="where", storage=Storage(stream))
    assert values(split) == [1, 2, 3]


# what `datasets` saves


@pytest.mark.parametrize("stream", [False, True])
def test_saved_sets_are_read(tmp_path, stream):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})

    def part(count):
        rows = {
            "image": [{"bytes": png(n), "path": None} for n in range(count)],
            "label": [n % 3 for n in range(count)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": part(6), "test": part(3)}).save_to_disk(tmp_path / "both")
    part(4).save_to_disk(tmp_path / "one")
    part(5).save_to_disk(tmp_path / "apart" / "train")
    part(3).save_to_disk(tmp_path / "apart" / "test")
    for name, part_name, count in (
        ("both", "train", 6),
        ("both", "test", 3),
        ("one", "train", 4),
        ("apart", "test", 3),
    ):
        split = load_split(str(tmp_path / name), part_name, storage=Storage(stream))
        assert (values(split), split.class_names) == (list(range(count)), NAMES)
    refused(["no test part", "data.test=0.2"], load_split, str(tmp_path / "one"), "test")


# arrays


def arrays(count, channels_first=False, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return (pixels.transpose(0, 3, 1, 2) if channels_first else pixels), np.arange(count) % 3


FORMS = {
    "keras": lambda x, y, u, v: {"x_train": x, "y_train": y, "x_test": u, "y_test": v},
    "medmnist": lambda x, y, u, v: {
        "train_images": x, "train_labels": y[:, None], "val_images": x[:2], "val_labels": y[:2, None],
        "test_images": u, "test_labels": v[:, None],
    },
    "one-hot": lambda x, y, u, v: {"X_train": x, "Y_train": np.eye(3)[y], "X_test": u, "Y_test": np.eye(3)[v]},
    "channels first": lambda x, y, u, v: {
        "x_train": x.transpose(0, 3, 1, 2), "y_train": y, "x_test": u.transpose(0, 3, 1, 2), "y_test": v
    },
    "floats": lambda x, y, u, v: {"x_train": x / np.float32(255), "y_train": y, "x_test": u / 255, "y_test": v},
    "whole floats": lambda x, y, u, v: {"x_train": x.astype(np.float32), "y_train": y, "x_test": u, "y_test": v},
    "int64": lambda x, y, u, v: {"x_train": x.astype(np.int64), "y_train": y, "x_test": u, "y_test": v},
    "16 bits": lambda x, y, u, v: {
        "x_train": x.astype(np.uint16) * 257, "y_train": y, "x_test": u.astype(np.uint16) * 257, "y_test": v
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
def test_arrays_of_the_usual_names_are_read(tmp_path, form, kind):
    (x, y), (u, v) = arrays(7), arrays(4, seed=1)
    content = FORMS[form](x, y, u, v)
    source = tmp_path / "a.npz"
    if kind == "npy":
        source = tmp_path / "set"
        source.mkdir()
        for name, array in content.items():
            np.save(source / f"{name}.npy", array)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(source, **content)
    for part, pixels, labels in (("train", x, y), ("test", u, v)):
        split, expected = load_split(str(source), part), Split.from_arrays(pixels, labels)
        assert torch.equal(split.images, expected.images)
        assert torch.equal(split.labels, expected.labels)
        assert torch.equal(load_split(str(source), part, limit=2).images, expected.images[:2])


def test_the_layout_of_published_synthetic_images_is_read(tmp_path):
    x, y = arrays(9)
    np.savez(tmp_path / "1m.npz", image=x, label=y)
    split = load_split(str(tmp_path / "1m.npz"), "train", limit=4)
    assert torch.equal(split.images, Split.from_arrays(x, y).images[:4])
    refused(["no test part", "x_test"], load_split, str(tmp_path / "1m.npz"), "test")


def test_arrays_without_names_are_known_by_their_shapes_and_classes_by_theirs(tmp_path):
    x, y = arrays(9)
    np.savez(tmp_path / "a.npz", x, y, class_names=np.array(NAMES))
    assert load_split(str(tmp_path / "a.npz"), "train").class_names == NAMES
    np.savez(tmp_path / "b.npz", x=x, y=np.array(NAMES)[y])
    split = load_split(str(tmp_path / "b.npz"), "train")
    assert (split.class_names, split.labels.tolist()) == (NAMES, y.tolist())
    np.savez(tmp_path / "b.npz", x=x, y=np.array(NAMES)[y], class_names=["cow", "ant", "bee", "dog"])
    split = load_split(str(tmp_path / "b.npz"), "train")  # the order of the names counts, not that of letters
    assert (split.class_names, split.labels.tolist()) == (("cow", "ant", "bee", "dog"), ((y + 1) % 3).tolist())
    np.savez(tmp_path / "b.npz", x=x, y=np.array(NAMES)[y], class_names=["cow", "ant"])
    refused("'bee' is none of the class names (cow, ant)", load_split, str(tmp_path / "b.npz"), "train")
    np.savez(tmp_path / "c.npz", photo=x, kind=y, other=y)
    refused(["data.label_column", "kind int64 [9]"], load_split, str(tmp_path / "c.npz"), "train")
    named = load_split(str(tmp_path / "c.npz"), "train", image_column="photo", label_column="kind")
    assert torch.equal(named.labels, torch.from_numpy(y))


def test_names_of_images_are_no_names_of_classes(tmp_path):
    x, y = arrays(6)
    for names, expected in (
        (("a", "b", "c", "d"), ("a", "b", "c", "d")),
        ([f"{n}.png" for n in range(6)], tuple("012")),
    ):
        np.savez(tmp_path / "a.npz", x=x, y=y, names=names)
        assert load_split(str(tmp_path / "a.npz"), "train").class_names == expected


def test_no_image_and_an_infinite_label_are_told(tmp_path):
    x, y = arrays(4)
    np.savez(tmp_path / "a.npz", x=x[:0], y=y[:0])
    refused("holds no images", load_split, str(tmp_path / "a.npz"), "train")
    np.savez(tmp_path / "a.npz", x=x, y=[0, 1, np.inf, 1])
    refused("holds numbers such as inf", load_split, str(tmp_path / "a.npz"), "train")


def test_columns_of_labels_are_classes_also_without_an_image(tmp_path):
    x, y = arrays(6)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.eye(5)[y], x_test=x[:2], y_test=y[:2])
    for part in ("train", "test"):
        assert load_split(str(tmp_path / "a.npz"), part).class_names == tuple("01234")


def test_arrays_come_to_a_form_as_files_do(tmp_path):
    x, y = arrays(6)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    split = load_split(str(tmp_path / "a.npz"), "train", image_size=(3, 3), channels=1, resample="box")
    expected = [np.asarray(Image.fromarray(one).convert("L").resize((3, 3), Image.Resampling.BOX)) for one in x]
    assert split.images[:, 0].tolist() == np.stack(expected).tolist()


class Code:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": np.array([Code()], object), "y": np.zeros(1)}, "holds Python objects, and reading it would run code"),
        (
            {"x": np.zeros((4, 6, 6)) - 2.1, "y": np.arange(4) % 2},
            "floats from -2.1 to -2.1; images are floats in [0, 1]",
        ),
        ({"x": np.full((4, 6, 6), 4095, np.uint16), "y": np.arange(4) % 2}, "data.depth=12"),
        ({"x": np.zeros((4, 36), np.uint8), "y": np.arange(4) % 2}, "has shape [4, 36]; images are [N, H, W]"),
        ({"x": np.zeros((4, 6, 6), np.uint8), "y": np.arange(3) % 2}, "4 images, and 'y' 3 labels"),
        ({"x": np.zeros((4, 6, 6), np.uint8), "y": np.ones((4, 3))}, "gives several labels to an image"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path, content, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **content)
    refused(words, load_split, str(tmp_path / "a.npz"), "train")
    assert not (tmp_path / "ran").exists()


def test_damaged_arrays_are_one_line(tmp_path):
    x, y = arrays(4)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    refused("a.npz is not a readable file of numpy", load_split, str(tmp_path / "a.npz"), "train")
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((40_000, 32, 32, 3), np.uint8), y=np.zeros(40_000, np.uint8))
    refused("possibly a decompression bomb", load_split, str(tmp_path / "b.npz"), "train")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, values in (("x_train", x), ("y_train", y)):
        np.save(folder / f"{name}.npy", values)
    (folder / "x_train.npy").write_bytes((folder / "x_train.npy").read_bytes()[:-7])
    refused(
        f"x_train.npy is cut off: array 'x_train' has {x.nbytes - 7:,} of {x.nbytes:,} bytes",
        load_split,
        str(folder),
        "train",
    )
    np.savez(tmp_path / "c.npz", x=x, y=y)
    whole = bytearray((tmp_path / "c.npz").read_bytes())
    whole[300] ^= 255  # a byte of an image
    (tmp_path / "c.npz").write_bytes(whole)
    refused("c.npz is not a readable file of numpy: Bad CRC-32", load_split, str(tmp_path / "c.npz"), "train")


# paths and the Hub


@pytest.fixture
def no_hub(monkeypatch):
    import datasets

    def asked(name, config):
        raise AssertionError(f"the Hub was asked for {name}")

    monkeypatch.setattr(datasets, "load_dataset", asked)


@pytest.mark.parametrize("source", ["photos", "here/photos", "here/photos:small", "a/b/c", "photos.npz"])
def test_a_folder_that_is_missing_is_not_asked_for_at_the_hub(tmp_path, monkeypatch, no_hub, source):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("no such file or folder", load_split, source, "train")


def test_the_prefix_says_that_the_hub_is_meant(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "here" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: {"asked": 1 / 0 if name != "here/photos" else 1}["x"]
    )
    refused("the Hugging Face Hub does not give it: KeyError", load_split, "hf:here/photos", "train")


def test_a_relative_folder_keeps_its_meaning(tmp_path, monkeypatch, caplog):
    folders(tmp_path / "some" / "photos", {"ant": 1, "bee": 1})
    monkeypatch.chdir(tmp_path)
    assert resolve("some/photos") == str(tmp_path / "some" / "photos")
    assert "data.source some/photos: the folder here; hf:some/photos is that of the Hub" in caplog.text
    assert (resolve("digits"), resolve("hf:some/photos"), resolve("uoft-cs/cifar10")) == (
        "digits", "hf:some/photos", "uoft-cs/cifar10",
    )  # fmt: skip
