"""What is fed rubbish: a function of bytes for each way in, and well-formed bytes to start from.

Each function returns if the bytes load or are refused as they should be, with one line of a `UserError` (for states of
a run, `RunError`); any other exception is a finding. Time and memory are watched by whoever calls.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from PIL import Image

from dualhead.data import load_split
from dualhead.errors import RunError, UserError
from dualhead.models import read_state
from dualhead.recipe.schema import parse_recipe
from dualhead.recipe.yaml import load_recipe, shipped_recipes
from dualhead.saving.architecture import CONFIG, Architecture, read_config
from dualhead.training import CheckpointStore, Position

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def refused_in_one_line(error: Exception) -> None:
    message = str(error)
    assert message, "no message"
    assert len(message.splitlines()) == 1, f"several lines: {message!r}"
    assert message.isprintable(), f"not printable: {message!r}"


def file_of(data: bytes, name: str) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---- recipes


def recipe(data: bytes) -> None:
    """A file of YAML; what loads comes back the same from what is written of it."""
    try:
        loaded = load_recipe(str(file_of(data, "recipe.yaml")))
    except UserError as error:
        refused_in_one_line(error)
        return
    written = yaml.safe_dump(loaded.resolved(), sort_keys=False)
    assert parse_recipe(yaml.safe_load(written)).resolved() == loaded.resolved()


def overrides(data: bytes) -> None:
    """`KEY=VALUE`, one a line."""
    try:
        load_recipe("digits", data.decode(errors="surrogateescape").split("\n"))
    except UserError as error:
        refused_in_one_line(error)


def recipes() -> list[bytes]:
    folder = resources.files("dualhead.recipe.shipped")
    texts = [(folder / f"{name}.yaml").read_text() for name in shipped_recipes()]
    resolved = [yaml.safe_dump(load_recipe(name).resolved()) for name in ("digits", "cifar10_wrn34_mart")]
    anchors = "a: &a [1, 2]\nb: &b {<<: {c: *a}}\ndata: {<<: *b, source: digits}\n"
    return [text.encode() for text in (*texts, *resolved, anchors)]


def some_overrides() -> list[bytes]:
    return [
        b"threat.eps=8/255\nstages.*.epochs=1",
        b"model.backbone=wideresnet-10-1\nmodel.attach_at=block1",
        b"stages.0.attack={name: pgd, steps: 3}\nstages.main_head.objective.beta=1e3",
        b"evaluate.attacks=[pgd-40, {name: apgd-ce}]\ndata.augment=[flip, pad_crop]",
        b"validation.attack=pgd-5\nvalidation.attack.step_size=1/255\nruntime.seed=0x1f",
    ]


# ---- data


def parquet(data: bytes) -> None:
    """A file of parquet."""
    load(file_of(data, "images/train-0.parquet"))


def load(path: Path) -> None:
    try:
        split = load_split(str(path), "train", limit=64)
    except UserError as error:
        refused_in_one_line(error)
        return
    assert split.images.dtype == torch.uint8
    assert int(split.labels.min()) >= 0
    assert int(split.labels.max()) < split.num_classes
    assert all(isinstance(name, str) for name in split.class_names)


def features(data: bytes) -> None:
    """What a parquet file says of its columns: the text that `datasets` keeps in its metadata."""
    rows = table([picture("PNG")] * 4)
    path = FOLDER / "features" / "train-0.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(rows.replace_schema_metadata({"huggingface": data}), path)
    load(path)


def image(data: bytes) -> None:
    """An encoded image in a sound table."""
    path = FOLDER / "image" / "train-0.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table([picture("PNG"), data]), path)
    load(path)


def picture(kind: str, size: int = 6, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).convert(mode).save(stream, kind)
    return stream.getvalue()


def table(images: list[bytes]) -> pa.Table:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [row % 2 for row in range(len(images))]
    return pa.table({"img": pa.array([{"bytes": i, "path": None} for i in images], struct), "label": labels})


def described() -> dict[str, object]:
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    return {"info": {"features": {"img": {"_type": "Image"}, "label": label}}}


def parquets() -> list[bytes]:
    found = []
    for compression in ("none", "snappy", "zstd"):
        for metadata in ({}, {"huggingface": json.dumps(described())}):
            stream = io.BytesIO()
            rows = table([picture("PNG"), picture("JPEG")] * 3).replace_schema_metadata(metadata)
            pq.write_table(rows, stream, compression=compression)
            found.append(stream.getvalue())
    return found


def descriptions() -> list[bytes]:
    plain = {"info": {"features": {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}
    return [json.dumps(described()).encode(), json.dumps(plain).encode()]


def images() -> list[bytes]:
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P")]
    kinds += [("BMP", "RGB"), ("TIFF", "RGB"), ("PPM", "RGB"), ("WEBP", "RGB")]
    return [picture(kind, mode=mode) for kind, mode in kinds]


# ---- weights and states


def weights(data: bytes) -> None:
    """A file of safetensors or of `torch.save`."""
    try:
        state = read_state(file_of(data, "weights"))
    except UserError as error:
        refused_in_one_line(error)
        return
    assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def states(data: bytes) -> None:
    """A saved state whose checksum is right although its content is not."""
    folder = FOLDER / "states"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / f"00000001-{hashlib.sha256(data).hexdigest()[:16]}.pt").write_bytes(data)
    try:
        CheckpointStore(folder).load()
    except RunError as error:
        refused_in_one_line(error)


def model_config(data: bytes) -> None:
    """A model's `config.json`."""
    try:
        config = read_config(file_of(data, f"model/{CONFIG}").parent)
        Architecture.parse(config["architecture"], "model")
    except UserError as error:
        refused_in_one_line(error)


def tensors() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.ones(2, 3, 3, 3), "conv.bias": torch.zeros(2), "bn.num_batches_tracked": torch.ones(1)}


def saved_weights() -> list[bytes]:
    found = [safetensors.torch.save(tensors()), safetensors.torch.save(tensors(), {"format": "pt"})]
    for content in (tensors(), {"state_dict": tensors(), "epoch": 3}):
        for new in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=new)
            found.append(stream.getvalue())
    return found


def saved_states() -> list[bytes]:
    folder = FOLDER / "made"
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    store = CheckpointStore(folder)
    store.save(Position(epoch=1, sums={"loss": 1.0}), model, optimiser)
    return [path.read_bytes() for path in folder.glob("*.pt")]


def configs() -> list[bytes]:
    architecture = {
        "backbone": {"name": "cnn", "width": 4},
        "attach_at": "stage1",
        "aggregator": {"name": "mean"},
        "num_classes": 10,
        "image_shape": [1, 8, 8],
        "mean": [0.5],
        "std": [0.5],
    }
    return [json.dumps({"architecture": architecture, "output": "aggregate"}).encode()]


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "recipe": (recipe, recipes),
    "overrides": (overrides, some_overrides),
    "parquet": (parquet, parquets),
    "features": (features, descriptions),
    "image": (image, images),
    "weights": (weights, saved_weights),
    "states": (states, saved_states),
    "model_config": (model_config, configs),
}
