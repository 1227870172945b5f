"""Pictures as they come: formats, endings, bit depth, grey and colour, sizes, and files that cannot be read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dualhead.data import Framing, Storage, decode_single, load_split
from dualhead.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))


def bytes_of(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(mode="RGB", size=(8, 8)):
    return Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def write(root, files):
    for place, content in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(root / place)
        else:
            (root / place).write_bytes(content)
    return str(root)


def refused(words, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


def deep_tiff(values, turned):
    """A TIFF of 16 bits a channel, [H, W, 3], with an orientation."""
    height, width, _ = values.shape
    content = values.astype("<u2").tobytes()
    ends = 10 + 12 * 10 + 4  # of the entries; then come the depths of the channels, and the pixels
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, ends), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, ends + 6), (274, 3, 1, turned), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(content)),
    ]  # fmt: skip
    told = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return header + told + struct.pack("<IHHH", 0, 16, 16, 16) + content


def deep_png(values):
    """A PNG of 16 bits a channel, which Pillow does not write for colours: [H, W, 3]."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def two_classes(make, ending=".png"):
    return {f"train/{name}/{k}{ending}": make(n, k) for n, name in enumerate("ab") for k in range(3)}


# formats and endings

LOSSLESS = {
    ".png": "PNG", ".apng": "PNG", ".bmp": "BMP", ".dib": "DIB", ".tif": "TIFF", ".TIFF": "TIFF", ".ppm": "PPM",
    ".pnm": "PPM", ".tga": "TGA", ".pcx": "PCX", ".sgi": "SGI", ".qoi": "QOI", ".im": "IM", ".dds": "DDS",
    ".dat": "PNG", ".jpg": "PNG", "": "BMP", ".download": "TIFF",
}  # fmt: skip


@pytest.mark.parametrize("ending", LOSSLESS)
def test_a_format_is_known_by_its_content_whatever_the_ending(tmp_path, ending):
    pictures = {place: noise() for place in two_classes(lambda n, k: None)}
    files = {place.replace(".png", ending): bytes_of(image, LOSSLESS[ending]) for place, image in pictures.items()}
    split = load_split(write(tmp_path, files), "train")
    expected = [pictures[f"train/{'ab'[n % 2]}/{n // 2}.png"] for n in range(6)]
    assert torch.equal(split.images, torch.stack([torch.tensor(np.asarray(p)).permute(2, 0, 1) for p in expected]))


@pytest.mark.parametrize(
    ("ending", "form"), [(".jfif", "JPEG"), (".jpe", "JPEG"), (".webp", "WEBP"), (".avif", "AVIF")]
)
def test_a_lossy_format_is_read_under_each_of_its_endings(tmp_path, ending, form):
    split = load_split(write(tmp_path, two_classes(lambda n, k: bytes_of(noise(), form), ending)), "train")
    assert (len(split), split.class_names) == (6, ("a", "b"))


def test_what_is_passed_over_is_counted_and_told(tmp_path, caplog):
    junk = {
        "train/a/notes.txt": b"text",
        "train/a/more.txt": b"text",
        "train/b/x.heic": b"\0\0\0 ftypheic",
        "train/b/.x": b"",
    }
    split = load_split(write(tmp_path, two_classes(lambda n, k: noise()) | junk), "train")
    assert len(split) == 6
    assert "passed over 3 files in train/ that are no images: 2 .txt, 1 .heic" in caplog.text


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    source = write(tmp_path, two_classes(lambda n, k: noise()) | {"train/c/1.heic": b"\0\0\0 ftypheic"})
    refused(["class folder train/c/ holds no image", "1 .heic"], load_split, source, "train")


# files that cannot be read


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_images_are_listed_or_left_out_with_their_number(tmp_path, stream, caplog):
    broken = {"train/a/1.png": b"broken", "train/b/2.png": bytes_of(noise(), "PNG")[:60]}
    source = write(tmp_path, two_classes(lambda n, k: noise()) | broken)
    refused(
        ["2 images cannot be read: train/a/1.png", "train/b/2.png", "data.skip_unreadable"], load_split, source, "train"
    )
    for _ in range(2):  # once decoded, and once from the cache
        caplog.clear()
        split = load_split(source, "train", skip_unreadable=True, storage=Storage(stream))
        assert (len(split), split.labels.tolist(), len(split.skipped)) == (4, [0, 1, 1, 0], 2)
        assert len(split.images[:]) == 4
        assert "left out 2 images that cannot be read: train/a/1.png" in caplog.text
    assert len(split.take([0]).skipped) == 2


def test_a_class_that_skipping_empties_is_refused(tmp_path):
    source = write(tmp_path, two_classes(lambda n, k: noise() if n else b"broken"))
    refused("class 'a' has no image that can be read", load_split, source, "train", skip_unreadable=True)


def test_a_row_without_an_image_is_skipped_too(tmp_path):
    rows = [{"bytes": bytes_of(noise(), "PNG"), "path": None} if k else {"bytes": None, "path": None} for k in range(5)]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"image": pa.array(rows, struct_type), "label": [0, 1, 0, 1, 0]}), tmp_path / "train.parquet"
    )
    split = load_split(str(tmp_path), "train", skip_unreadable=True)
    assert (split.labels.tolist(), split.skipped) == ([1, 0, 1, 0], ("row 0 of train.parquet has no image",))


# bit depth


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15])
@pytest.mark.parametrize("stream", [False, True])
def test_unused_bits_are_found_and_scaled_by_the_key(tmp_path, bits, stream):
    top = 2**bits - 1
    values = {place: RNG.integers(0, top + 1, (8, 8)) for place in two_classes(lambda n, k: None)}
    values["train/a/0.png"][0, 0] = top
    files = {place: Image.fromarray(array.astype(np.uint16)) for place, array in values.items()}
    source, storage = write(tmp_path, files), Storage(stream)
    refused([f"largest value is {top}", f"data.depth={bits}"], load_split, source, "train", storage=storage)
    split = load_split(source, "train", depth=bits, storage=storage)
    expected = np.round(values["train/a/0.png"] * 255 / top)
    assert split.images[torch.tensor([0])][0, 0].tolist() == expected.tolist()
    dark = load_split(source, "train", depth=16, storage=storage)
    assert int(dark.images[:].max()) == round(top / 257)


def test_16_bits_that_are_used_come_out_as_they_always_did(tmp_path):
    values = RNG.integers(0, 65536, (8, 8))
    values[0, 0] = 65535
    source = write(tmp_path, two_classes(lambda n, k: Image.fromarray(values.astype(np.uint16))))
    for depth in (None, 16):
        split = load_split(source, "train", depth=depth)
        assert split.images[0, 0].tolist() == ((values + 128) // 257).tolist()


def test_colours_of_12_bits_in_16_are_found_and_scaled_too(tmp_path):
    values = RNG.integers(0, 4096, (8, 8, 3))
    values[0, 0] = 4095
    source = write(tmp_path, two_classes(lambda n, k: deep_png(values)))
    refused("data.depth=12", load_split, source, "train")
    split = load_split(source, "train", depth=12)
    assert split.images[0].permute(1, 2, 0).tolist() == np.round(values * 255 / 4095).tolist()


def test_a_value_beyond_the_depth_is_refused(tmp_path):
    values = np.full((8, 8), 5000, np.uint16)
    source = write(tmp_path, two_classes(lambda n, k: Image.fromarray(values)))
    refused("its value 5000 does not fit into the 12 bits of data.depth", load_split, source, "train", depth=12)


def test_masks_of_0_and_1_are_told_and_scaled_by_the_key(tmp_path, caplog):
    source = write(tmp_path, two_classes(lambda n, k: Image.fromarray(RNG.integers(0, 2, (8, 8), dtype=np.uint8))))
    load_split(source, "train")
    assert "the largest value of all images is 1 of 255, as where pixels have 1 bits" in caplog.text
    assert load_split(source, "train", depth=1).images.unique().tolist() == [0, 255]


def test_a_single_image_says_nothing_of_the_depth_of_a_set():
    content = bytes_of(Image.fromarray(np.full((8, 8), 4095, np.uint16)), "PNG")
    assert int(decode_single(content, (1, 8, 8)).max()) == 16
    assert int(decode_single(content, (1, 8, 8), Framing(depth=12)).max()) == 255


# grey and colour, sizes


@pytest.mark.parametrize("stream", [False, True])
def test_channels_bring_grey_and_colour_together(tmp_path, stream):
    source = write(tmp_path, two_classes(lambda n, k: noise("L" if n else "RGB")))
    for channels in (1, 3):
        split = load_split(source, "train", channels=channels, storage=Storage(stream))
        assert split.image_shape == (channels, 8, 8)
    grey = split.images[torch.tensor([1])][0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_crops_and_filters_are_those_of_pillow(tmp_path):
    picture = noise(size=(12, 20))
    source = write(tmp_path, two_classes(lambda n, k: picture))
    for resample in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
        for crop, squash, box in (
            (None, False, None), (1.0, False, (4, 0, 16, 12)), (0.5, False, (7, 3, 13, 9)), (0.5, True, (5, 3, 15, 9)),
        ):  # fmt: skip
            split = load_split(source, "train", image_size=(6, 6), crop=crop, resample=resample, squash=squash)
            expected = picture.resize((6, 6), Image.Resampling[resample.upper()], box)
            assert split.images[0].permute(1, 2, 0).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_ones_own_is_read_as_those_of_a_set(tmp_path, channels):
    picture, options = noise(size=(20, 30)), {"crop": 0.875, "resample": "bilinear"}
    source = write(tmp_path, two_classes(lambda n, k: picture))
    split = load_split(source, "train", image_size=(16, 12), channels=channels, **options)
    found = decode_single(bytes_of(picture, "PNG"), (channels, 16, 12), Framing(**options))
    assert split.images[0].tolist() == found.tolist()


def test_a_crop_of_all_is_within_the_image():
    for side, wanted in ((29, 28), (53, 49)):  # side / wanted * wanted is more than side
        assert Framing((wanted, wanted), 1.0).apply(noise(size=(side, side))).size == (wanted, wanted)


@pytest.mark.parametrize("depth", [None, 12])
@pytest.mark.parametrize("turned", [1, 3, 6])
def test_a_deep_tiff_is_turned_once(depth, turned):
    values = RNG.integers(0, 4096, (4, 6, 3), dtype=np.uint16) * (1 if depth else 16)
    shape = (3, 6, 4) if turned == 6 else (3, 4, 6)
    found = decode_single(deep_tiff(values, turned), shape, Framing(depth=depth)).transpose(1, 2, 0)
    expected = {1: values, 3: values[::-1, ::-1], 6: values[::-1].transpose(1, 0, 2)}[turned]
    top = 4095 if depth else 65535
    assert np.abs(found - 255 * (expected / top)).max() < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resample": "cubic"}, "data.resample 'cubic' is not known; use one of nearest, bilinear"),
        ({"channels": 2}, "data.channels must be 1 (grey) or 3 (colour), got 2"),
        ({"depth": 17}, "data.depth must lie in 1 to 16 bits, got 17"),
    ],
)
def test_impossible_readings_are_refused(options, words):
    refused(words, load_split, "digits", "train", **options)
