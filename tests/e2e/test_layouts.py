"""One set of pictures in the layouts in which people have them: the same accuracy to the image, or one line.

The pictures are of three classes that a model learns in part, so that any label or pixel that is read otherwise shows.
"""

from __future__ import annotations

import io
import json
import struct
import unicodedata
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.e2e import TINY, dualhead

NAMES = ("ant", "bée", "cow")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
RNG = np.random.default_rng(3)
COLOURS = np.array([[130, 90, 90], [90, 130, 90], [90, 90, 130]])


def pictures(count):
    labels = np.array([0, 1, 1, 2, 2, 2])[np.arange(count) % 6]  # other numbers of each: an exchange of classes shows
    noise = RNG.normal(0, 30, (count, 1, 1, 3)) + RNG.normal(0, 30, (count, 8, 8, 3))
    return (COLOURS[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8), labels


SETS = {"train": pictures(90), "test": pictures(60)}


def encoded(pixels, form="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def deep_png(pixels):
    """The same colours in 16 bits a channel."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def folders(root, ending=".png", form="PNG", train="train", test="test", names=NAMES, encode=encoded, **options):
    """Images in class folders; `form` is the format, whatever the ending."""
    for part, place in (("train", train), ("test", test)):
        for n, (pixels, label) in enumerate(zip(*SETS[part], strict=True)):
            folder = root / place / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            content = encode(pixels) if encode is not encoded else encoded(pixels, form, **options)
            (folder / f"{n:03d}{ending}").write_bytes(content)


def tables(root, labels, cells=None, schema=None):
    root.mkdir(parents=True)
    for part, (pixels, numbers) in SETS.items():
        images = (cells or inside)(root, part, pixels)
        table = pa.table({"image": pa.array(images, STRUCT), "label": labels(numbers)})
        pq.write_table(table.replace_schema_metadata(schema), root / f"{part}-00000.parquet")


def described(names):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def named(names):
    number = {name: place for place, name in enumerate(names)}
    return lambda numbers: pa.array([number[NAMES[n]] for n in numbers])


def inside(root, part, pixels):
    return [{"bytes": encoded(one), "path": None} for one in pixels]


def paths(root, part, pixels):
    (root / "files").mkdir(exist_ok=True)
    for n, one in enumerate(pixels):
        (root / "files" / f"{part}{n}.png").write_bytes(encoded(one))
    return [{"bytes": None, "path": f"files/{part}{n}.png"} for n in range(len(pixels))]


def saved(root):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    parts = {
        part: datasets.Dataset.from_dict(
            {"image": [{"bytes": encoded(one), "path": None} for one in pixels], "label": labels}, features=features
        )
        for part, (pixels, labels) in SETS.items()
    }
    datasets.DatasetDict(parts).save_to_disk(root)


def listed(root):
    for part, (pixels, labels) in SETS.items():
        (root / part).mkdir(parents=True)
        for n, one in enumerate(pixels):
            (root / part / f"{n}.png").write_bytes(encoded(one))
        rows = [f"{n}.png,{NAMES[label]}" for n, label in enumerate(labels)]
        (root / part / "metadata.csv").write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")


def unlabelled(root):
    folders(root, test="val")
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes(encoded(SETS["test"][0][0]))


def littered(root):
    folders(root / "archive")
    for place in ("archive/train/ant/@eaDir", "archive/test/ant/@eaDir", "archive/test/@eaDir", "__MACOSX/test/ant"):
        (root / place).mkdir(parents=True)
        (root / place / "1.png").write_bytes(encoded(SETS["test"][0][0]))


def npz(root, keys, change=lambda x, y: (x, y), save=np.savez):
    content = {}
    for part, (pixels, labels) in SETS.items():
        content |= dict(zip((key.format(part) for key in keys), change(pixels, labels), strict=True))
    save(root.with_suffix(".npz"), **content)
    return root.with_suffix(".npz")


def npy(root):
    root.mkdir()
    for part, (pixels, labels) in SETS.items():
        np.save(root / f"X_{part}.npy", pixels)
        np.save(root / f"y_{part}.npy", labels)


MIXED = ("cow", "ant", "bée")
LAYOUTS = {
    "png in train and test": folders,
    "Training and Testing": lambda root: folders(root, train="Training", test="Testing"),
    "seg_train in seg_train": lambda root: folders(root, train="seg_train/seg_train", test="seg_test/seg_test"),
    "an unlabelled test beside val": unlabelled,
    "what systems leave behind": littered,
    "names in the other form of Unicode": lambda root: folders(
        root, names=[unicodedata.normalize("NFD", name) for name in NAMES]
    ),
    "bmp": lambda root: folders(root, ".bmp", "BMP"),
    "tiff": lambda root: folders(root, ".tif", "TIFF", compression="tiff_lzw"),
    "webp": lambda root: folders(root, ".webp", "WEBP", lossless=True),
    "tga": lambda root: folders(root, ".tga", "TGA"),
    "qoi": lambda root: folders(root, ".qoi", "QOI"),
    "endings of another format": lambda root: folders(root, ".jpg", "PNG"),
    "no endings": lambda root: folders(root, "", "PPM"),
    "16-bit colours": lambda root: folders(root, encode=deep_png),
    "a csv file of labels": listed,
    "parquet with names": lambda root: tables(root, named(NAMES), schema=described(NAMES)),
    "parquet with names in another order": lambda root: tables(root, named(MIXED), schema=described(MIXED)),
    "parquet with text": lambda root: tables(root, lambda y: pa.array([NAMES[n] for n in y])),
    "parquet with categories": lambda root: tables(root, lambda y: pa.array([NAMES[n] for n in y]).dictionary_encode()),
    "parquet with numbers": lambda root: tables(root, pa.array),
    "parquet with floats": lambda root: tables(root, lambda y: pa.array(y.astype(float))),
    "parquet with paths": lambda root: tables(root, named(NAMES), cells=paths, schema=described(NAMES)),
    "save_to_disk": saved,
    "npz of keras": lambda root: npz(root, ("x_{}", "y_{}")),
    "npz of medmnist": lambda root: npz(root, ("{}_images", "{}_labels"), lambda x, y: (x, y[:, None])),
    "npz of floats, channels first": lambda root: npz(
        root, ("x_{}", "y_{}"), lambda x, y: (x.transpose(0, 3, 1, 2) / np.float32(255), np.eye(3)[y])
    ),
    "npz with text": lambda root: npz(
        root, ("x_{}", "y_{}"), lambda x, y: (x, np.array(NAMES)[y]), np.savez_compressed
    ),
    "npy files": npy,
}


def flat(root):
    (root / "test").mkdir(parents=True)
    (root / "test" / "ant_1.png").write_bytes(encoded(SETS["test"][0][0]))


def parts_in_classes(root):
    for n, (pixels, label) in enumerate(zip(*SETS["test"], strict=True)):
        folder = root / NAMES[label] / ("train", "test")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(encoded(pixels))


def pixels_in_rows(root):
    root.mkdir()
    pq.write_table(pa.table({"pixels": [[1, 2]], "label": [1]}), root / "test.parquet")


def objects(root):
    root.mkdir()
    np.save(root / "x_test.npy", np.array([{}], object))


REFUSED = {
    "labels in the names of files": (
        flat,
        "lies outside a class folder (1 such); move it to test/CLASS/, or list file",
    ),
    "no test part": (lambda root: folders(root, test="train"), "split one off with data.test=0.2"),
    "parts in classes": (parts_in_classes, "there is no test part"),
    "several labels": (
        lambda root: tables(root, lambda y: pa.array([[int(n)] for n in y])),
        "several labels of an image",
    ),
    "pixels in rows": (pixels_in_rows, "set data.image_column"),
    "a class that is not known": (
        lambda root: folders(root, names=("ant", "bée", "fox")),
        "'fox' is none of the classes",
    ),
    "objects of Python": (objects, "reading it would run code"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    folders(folder / "images")
    short = [pair for pair in TINY if not pair.startswith(("data.", "stages.*"))]
    settings = ["data.validation=6", "data.augment=[]", "stages.*.epochs=12", "stages.*.batch_size=16"]
    command = ["train", "digits_natural", *short, *settings, f"data.source={folder / 'images'}", "--quiet"]
    ended = dualhead(*command, "--run-dir", folder / "run")
    assert ended.status == 0, ended.err
    return folder


def measured(run, source, output):
    return dualhead(
        "evaluate", run / "run", "--data", source, "--attack", "fgsm", "--eps", "4/255", "--device", "cpu",
        "--output", output, "--overwrite", "--json",
    )  # fmt: skip


def facts(ended):
    found = json.loads(ended.out)
    by_class = {entry["class"]: (entry["num_samples"], entry["clean_accuracy"]) for entry in found["per_class"]}
    return found["num_samples"], found["clean_accuracy"], by_class


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    found = facts(measured(run, run / "images", tmp_path_factory.mktemp("expected")))
    assert 0.4 < found[1] < 0.98  # neither by chance nor whatever the pixels are
    assert {name: count for name, (count, _) in found[2].items()} == dict(zip(NAMES, (10, 20, 30), strict=True))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_accuracy_to_the_image(run, expected, tmp_path, layout, monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "cache"))
    source = LAYOUTS[layout](tmp_path / "set") or tmp_path / "set"
    ended = measured(run, source, tmp_path / "found")
    assert ended.status == 0, ended.err
    assert facts(ended) == expected


@pytest.mark.parametrize("layout", REFUSED)
def test_another_layout_is_one_line_with_what_would_read_it(run, tmp_path, layout, monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "cache"))
    make, words = REFUSED[layout]
    make(tmp_path / "set")
    ended = measured(run, tmp_path / "set", tmp_path / "found")
    assert ended.status == 2
    assert words in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_a_test_part_that_was_split_off_stays_the_run_s(tmp_path):
    """Other images under the same name would mix those that were trained on with those that are measured."""
    source, words = tmp_path / "set.npz", ["--run-dir", tmp_path / "run", "--quiet"]
    x = np.random.default_rng(0).integers(0, 256, (120, 8, 8), np.uint8)
    y = np.arange(120) % 3
    np.savez(source, image=x, label=y)
    overrides = [
        f"data.source={source}", "data.test=0.25", "data.train_limit=null", "data.validation=0", "stages.*.keep=last",
        "stages.*.epochs=1", "model.backbone=cnn-2", "evaluate.attacks=[fgsm]", "evaluate.gallery=0",
        "runtime.device=cpu", "runtime.lanes=1",
    ]  # fmt: skip
    ended = dualhead("train", "digits_natural", *overrides, *words)
    assert ended.status == 0, ended.err
    evaluate = ("evaluate", tmp_path / "run", "--attack", "fgsm", "--quiet")
    assert dualhead(*evaluate).status == 0
    np.savez(source, image=255 - x, label=y)
    for again in (evaluate, ("train", "digits_natural", *overrides, *words)):
        ended = dualhead(*again)
        assert ended.status == 2
        assert "has other images than those with which the run in" in ended.error_line
