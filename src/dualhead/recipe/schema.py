"""The recipe: what a run is, as data. A file of YAML plus dotted overrides, validated before anything starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from dualhead.attacks import Attack, attacks
from dualhead.components.fields import Real, parse_real
from dualhead.components.registry import Registry, first_error
from dualhead.components.sections import Section, component
from dualhead.data import Augmentation, Resample, Split, Storage, augmentations, load_split, resolve
from dualhead.errors import UserError
from dualhead.heads import Aggregator, aggregators
from dualhead.models import Backbone, backbones
from dualhead.objectives import objectives
from dualhead.threats import ThreatModel
from dualhead.training.averaging import averagings
from dualhead.training.optimisation import optimisers, schedules
from dualhead.training.stage import Stage

REGISTRIES: dict[str, Registry[Any]] = {
    "aggregators": aggregators,
    "attacks": attacks,
    "augmentations": augmentations,
    "averages": averagings,
    "backbones": backbones,
    "objectives": objectives,
    "optimisers": optimisers,
    "schedules": schedules,
}
"""Everything that a recipe can name, by the word for it."""
LARGEST_RECIPE = 2**20
"""Bytes of a file."""
LARGEST_CONTENT = 100_000
"""Values in a recipe, each use of an anchor counted."""
_TOO_MUCH = f"holds more than {LARGEST_CONTENT:,} values, each use of an anchor counted, so it is no recipe"


def _amount(value: object) -> int | float:
    number = value if isinstance(value, int) and not isinstance(value, bool) else parse_real(value)
    if number < 0 or (isinstance(number, float) and number >= 1):
        raise UserError(f": must be a fraction in [0, 1) or a whole number of images, got {value!r}")
    return number


class Extra(Section):
    """A second source of training images, extra or generated, of the same classes and shape."""

    source: str
    """As `data.source`; columns and size are those of the first."""
    fraction: Real = Field(0.7, gt=0, lt=1)
    """Of each batch; 0.7 is usual for generated images. An epoch keeps its number of steps."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many of its images."""

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        return resolve(source)


class Data(Section):
    """The images."""

    source: str
    """`digits`, a Hub name (`hf:OWNER/NAME`), a folder or file of parquet or numpy, a folder that `datasets` saved, or
    an image folder. A path that exists becomes absolute, so that it names the same images wherever a run is used."""
    image_column: str | None = None
    label_column: str | None = None
    image_size: tuple[int, int] | None = None
    """[height, width] to resize to; None: all images must have one size."""
    resample: Resample = "bicubic"
    """The filter of resizing to `image_size`, by Pillow's name."""
    channels: Literal[1, 3] | None = None
    """1: read colours as grey; 3: read grey as colours (a pretrained network for X-rays, a grey test part beside
    coloured training images); None: as the images are."""
    depth: Annotated[int, Field(ge=1, le=16)] | None = None
    """Bits of a pixel where files hold fewer than they could, as 12-bit X-rays in 16-bit files; None: the files' own.
    16-bit images of which none uses the highest bit are refused until this says which they are."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, with a word and their number in the results, rather than refuse the set."""
    test: Annotated[int | float, BeforeValidator(_amount)] | None = None
    """Part of the training images that is the test part where a set has none: a fraction, or a number of images; of all
    classes in proportion, and the same whatever `runtime.seed`. None: a set without a test part is refused."""
    crop: Annotated[Real, Field(gt=0, le=1)] | None = None
    """None: images are stretched to `image_size`. A fraction: their middle is taken, in the proportions of `image_size`
    and as large as fits into this part of the image; 0.875 is customary for ImageNet."""
    train_size: tuple[int, int] | None = None
    """[height, width] at which training images are kept where they are larger than what the model sees, for an
    augmentation that cuts `image_size` out of them (random_resized_crop); with `crop` they show all that fits."""
    validation: Annotated[int | float, BeforeValidator(_amount)] = 0.02
    """Part of the training images held out to choose checkpoints: a fraction, or a number of images."""
    train_limit: int | None = Field(None, gt=0)
    """Use only so many training images (the held-out ones included)."""
    train_choice: Literal["first", "sample"] = "first"
    """Which: the first ones, or a random sample, always the same, for a set that is sorted by class."""
    augment: tuple[Annotated[Augmentation, *component(augmentations)], ...] = ()
    stream: Literal["auto"] | bool = "auto"
    """Read images from disk while training, rather than decode all into memory before; the batches are the same.
    `auto`: where they would take more than a quarter of the free memory, of the machine or of the accelerator."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that decode streamed images, for each process that trains; `auto`: its share of the processors."""

    extra: Extra | None = None
    """None is held out of it: validation sees images of the first source only."""

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        return resolve(source)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size is None and (self.crop is not None or self.train_size is not None):
            key = "crop" if self.crop is not None else "train_size"
            raise UserError(f".{key}: needs image_size, what the model sees; e.g. image_size: [224, 224]")
        sizes = zip(self.train_size or (), self.image_size or (), strict=False)
        if any(kept < seen for kept, seen in sizes):
            raise UserError(f".train_size: must be at least image_size {list(self.image_size or ())}")
        return self

    def load(
        self, part: Literal["train", "test"], source: str | None = None, *, room: int | None = None, workers: int = 0
    ) -> Split:
        """The images of a part, of this source or of another one read in the same way.

        Args:
            part: which.
            source: another one.
            room: bytes that they may take in memory, with `stream: auto`; None: any number.
            workers: processes that decode what is streamed, with `workers: auto`.

        Raises:
            UserError: if they cannot be read, or `train_limit` leaves classes without an image.
        """
        train = part == "train"
        split = self._load(
            source or self.source, part, limit=self.train_limit if train else None,
            choice=self.train_choice if train else "first", storage=self._storage(room, workers),
        )  # fmt: skip
        if train and self.train_limit is not None and self.train_choice == "first":
            shown = int(split.labels.bincount(minlength=split.num_classes).count_nonzero())
            if shown < split.num_classes:
                raise UserError(
                    f"data.train_limit: the first {len(split)} images show {shown} of {split.num_classes} classes, "
                    "as in a set that is sorted by class; set data.train_choice=sample, or a larger limit"
                )
        return split

    def load_extra(self, *, room: int | None = None, workers: int = 0) -> Split | None:
        """The second source; None if there is none. Arguments and errors as those of `load`."""
        if self.extra is None:
            return None
        return self._load(
            self.extra.source, "train", limit=self.extra.limit, choice="first", storage=self._storage(room, workers)
        )

    def _load(
        self, source: str, part: Literal["train", "test"], *, limit: int | None, choice: Literal["first", "sample"],
        storage: Storage,
    ) -> Split:  # fmt: skip
        larger = part == "train" and self.train_size is not None
        return load_split(
            source,
            part,
            image_column=self.image_column,
            label_column=self.label_column,
            image_size=self.train_size if larger else self.image_size,
            crop=1.0 if larger and self.crop is not None else self.crop,
            resample=self.resample,
            channels=self.channels,
            depth=self.depth,
            skip_unreadable=self.skip_unreadable,
            test=self.test if source == self.source else None,
            limit=limit,
            choice=choice,
            storage=storage,
        )

    def reading(self) -> dict[str, Any]:
        """How images come to the form that the model sees, to be kept with it: what is as by default is left out."""
        told = {"resample": self.resample, "channels": self.channels, "depth": self.depth}
        defaults = {key: type(self).model_fields[key].default for key in told}
        kept = {key: value for key, value in told.items() if value != defaults[key]}
        return {"image_size": self.image_size, "crop": self.crop, **kept}

    def _storage(self, room: int | None, workers: int) -> Storage:
        stream = None if self.stream == "auto" else self.stream
        return Storage(stream, room, workers if self.workers == "auto" else self.workers)


class Statistics(Section):
    """Mean and standard deviation of each channel, for images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def _statistics(value: object) -> object:
    if isinstance(value, Mapping):
        try:
            return Statistics.model_validate(value)
        except ValidationError as error:
            raise UserError(first_error(error, ".")) from None
    if value is None or isinstance(value, Statistics) or value in ("data", "none"):
        return value
    raise UserError(f": must be data, none or {{mean: [...], std: [...]}}, got {value!r}")


def _layer(value: object) -> object:
    """A layer's name; nn.Sequential names its layers by number, which YAML reads as one."""
    if isinstance(value, float):
        raise UserError(f": is read as the number {value}; write the layer's name in quotes")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Model(Section):
    """The network."""

    backbone: Annotated[Backbone, *component(backbones)]
    attach_at: Annotated[str | None, BeforeValidator(_layer)] = None
    """Layer whose output feeds the second head; None: no second head, and stages train `model`."""
    heads: int = Field(2, ge=2, le=20)
    """How many, where `attach_at` is set, the backbone's own included."""
    aggregator: Annotated[Aggregator, *component(aggregators)] | None = None
    """None: the paper's, up to the number of classes where its size is in proportion."""
    second_head: Literal["reset", "clone"] = "reset"
    """Whether the second head, and any further one, starts from fresh weights or from those of the first, when its
    first stage begins."""
    normalize: Annotated[Literal["data", "none"] | Statistics | None, BeforeValidator(_statistics)] = None
    """Inside the model: by the statistics of the training images, not at all, or by given ones. None: `none` for a
    `package.module:factory`, whose model takes images in [0, 1] as they are, `data` for every other backbone."""


class Validation(Section):
    """What chooses checkpoints: robust accuracy on the held-out part of the training images."""

    attack: Annotated[Attack, *component(attacks)] = Field("pgd-10", validate_default=True)
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch of a stage is always validated."""


class Evaluate(Section):
    """What is measured on the test images when training is over."""

    attacks: tuple[str | dict[str, Any], ...] = ("pgd-40",)
    limit: int | None = Field(None, gt=0)
    """Use only the first so many test images."""
    batch_size: int = Field(256, ge=1)
    gallery: int = Field(48, ge=0)
    """So many of the first test images are shown under attack in the report."""

    @model_validator(mode="after")
    def _attacks_exist(self) -> Self:
        if not self.attacks:
            raise UserError(".attacks: must name at least one, e.g. [pgd-40]; clean accuracy is measured besides")
        labels: list[str] = []
        for index, spec in enumerate(self.attacks):
            label = attacks.build(spec, where=f".attacks.{index}").label
            if label in labels:
                raise UserError(f".attacks.{index}: {label} is named twice")
            labels.append(label)
        return self


class Runtime(Section):
    """Where and how the run computes; none of it is part of the method."""

    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16", "auto"] = "auto"
    """`bf16`: autocast with channels-last; `auto`: bf16 or float32, whichever is faster on this device, measured at the
    start. `tf32`: float32 whose products a GPU rounds; `float32` never does that, and evaluations never do."""
    layout: Literal["contiguous", "channels_last", "auto"] = "auto"
    """Of images and convolutions in memory. `auto`: in bf16 channels-last where the model takes it, in float32 the
    faster one, measured at the start. The last bits of a result depend on it."""
    lanes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """In how many threads, each with images of its own, a CPU runs attacks in training; 1 leaves threads to torch.
    `auto`: as many as torch has if that is faster, measured at the start. The last bits of a result depend on it."""
    compile: bool = False
    """`torch.compile` for the passes of training steps: minutes at the start of each stage, then faster ones. The last
    bits of a result depend on it. Compiled attacks run in one lane."""
    seed: int = Field(0, ge=0, le=2**62)
    save_minutes: float = Field(5.0, gt=0)
    """Longest time between two saved states within an epoch; one is saved after every epoch besides."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Statistics of batch norm that trains, where several processes share a batch: each its own share's (running ones
    are the mean over processes), or the whole batch's, which needs GPUs."""
    tensorboard: bool = False

    @model_validator(mode="after")
    def _compiled_in_one_lane(self) -> Self:
        if self.compile and self.lanes not in (1, "auto"):
            raise UserError(f".lanes: compiled attacks run in one lane; write 1 or auto, got {self.lanes}")
        return self


def _threat(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    unknown = set(value) - {"norm", "eps"}
    if unknown:
        raise UserError(f".{sorted(unknown)[0]}: unknown key (known: norm, eps)")
    if "eps" not in value:
        raise UserError(".eps: missing; this key is required, e.g. 8/255")
    return ThreatModel(value.get("norm", "Linf"), value["eps"])


class Recipe(Section):
    """A run from data to evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: Data
    model: Model
    threat: Annotated[ThreatModel, BeforeValidator(_threat)]
    stages: tuple[Stage, ...] = Field(min_length=1)
    validation: Validation = Validation()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [stage.name for stage in self.stages]
        heads = [f"head{number}" for number in range(1, self.model.heads + 1)]
        parts = ("trunk", *heads, "aggregator") if self.model.attach_at else ("model",)
        if self.model.heads != 2 and not self.model.attach_at:
            raise UserError(".model.heads: needs model.attach_at, the layer from which each head has a tail of its own")
        for index, stage in enumerate(self.stages):
            if names.count(stage.name) > 1:
                raise UserError(f".stages.{index}.name: two stages are called {stage.name!r}; give each its own name")
            for part in stage.train:
                if part not in parts:
                    why = "has no second head (model.attach_at is not set)"
                    why = f"has {len(heads)} heads" if self.model.attach_at else why
                    raise UserError(
                        f".stages.{index}.train: the model {why}, so its parts are {', '.join(parts)}; got {part!r}"
                    )
            known = (*heads, "mean", "aggregate")
            for output in (*stage.objective.outputs, *([stage.deploy] if stage.deploy else [])):
                if output not in known:
                    raise UserError(f".stages.{index}: {output!r} is no output of the model; it has {', '.join(known)}")
        return self

    def resolved(self) -> dict[str, Any]:
        """The recipe in full, as plain data that `load_recipe` reads back."""
        return self.model_dump(mode="json")


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("dualhead.recipe.shipped")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read(name: str) -> tuple[dict[str, Any], str]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or _is_file(path):
        if not _is_file(path):
            raise UserError(f"recipe {name}: no such file")
        text, label = _text_of(path, f"recipe {name}"), re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem)
    elif name in shipped_recipes():
        text, label = (resources.files("dualhead.recipe.shipped") / f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        near = get_close_matches(name, shipped_recipes(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"recipe {name!r} is neither a file nor shipped; {hint}shipped: {', '.join(shipped_recipes())}")
    content = _parse_yaml(text, f"recipe {name}")
    if not isinstance(content, dict):
        raise UserError(f"recipe {name}: must be a mapping with keys data, model, threat, stages")
    return content, label


def _is_file(path: Path) -> bool:
    """Whether there is such a file; there is none of a name that cannot be."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a character that no name has
        return False


def _text_of(path: Path, where: str) -> str:
    if path.stat().st_size > LARGEST_RECIPE:
        raise UserError(f"{where}: is larger than {LARGEST_RECIPE:,} bytes, so it is no recipe")
    return path.read_text(encoding="utf-8", errors="replace")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in a mapping, and mappings merged without end."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"line {line}: key {key.value!r} stands in line {lines[key.value]} already; remove one")
            lines[key.value] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LARGEST_CONTENT:  # merges of merges, each of which doubles
            raise UserError(f"line {node.start_mark.line + 1}: {_TOO_MUCH}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return _unshared(yaml.load(text, _Loader), [0])  # a safe one
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: {line}is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply, or an anchor holds itself") from None
    except Exception as error:  # YAML takes 2021-02-30 for a date and !!int for a number, and fails in many ways
        raise UserError(f"{where}: holds a value that is not valid YAML: {error}") from None


def _unshared(content: Any, count: list[int]) -> Any:
    """The content with a copy for each use of an anchor, so that to change one is not to change them all.

    Args:
        content: as YAML gave it.
        count: of values so far, in a list of one; anchors within anchors grow without end.
    """
    count[0] += 1
    if count[0] > LARGEST_CONTENT:
        raise UserError(_TOO_MUCH)
    if isinstance(content, int) and content.bit_length() > 1024:  # not even written in a message by Python
        raise UserError("holds a number of more than 300 digits")
    if isinstance(content, dict):
        return {str(key): _unshared(value, count) for key, value in content.items()}
    return [_unshared(item, count) for item in content] if isinstance(content, list) else content


def _merge(base: Any, change: Any) -> Any:
    """`change` laid over `base`: mappings key by key, stages by name, anything else replaced."""
    if isinstance(base, dict) and isinstance(change, dict) and change.get("name", base.get("name")) == base.get("name"):
        return {**base, **{key: _merge(base[key], value) if key in base else value for key, value in change.items()}}
    named = [
        x
        for x in (base, change)
        if isinstance(x, list) and x and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in x)
    ]
    if len(named) == 2 and {s["name"] for s in change} <= {s["name"] for s in base}:
        changes = {stage["name"]: stage for stage in change}
        return [_merge(stage, changes.get(stage["name"], {})) for stage in base]
    return change


def _extended(name: str, chain: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    content, label = _read(name)
    parent = content.pop("extends", None)
    if parent is None:
        return content, label
    if not isinstance(parent, str) or parent in chain:
        raise UserError(f"recipe {name}: extends must name one other recipe, without a circle; got {parent!r}")
    beside = Path(name).parent / parent
    found = str(beside) if _is_file(Path(name)) and _is_file(beside) else parent
    try:
        base = _extended(found, (*chain, name, parent))[0]
    except UserError as error:
        raise UserError(f"recipe {name}: extends: {error}") from None
    own = {"name": content.pop("name")} if "name" in content else {}  # a recipe's name tells no components apart
    base.pop("name", None)
    return {**_merge(base, content), **own}, label


def _assign(target: Any, path: Sequence[str], value: Any, override: str) -> None:
    key, *rest = path
    if isinstance(target, list):
        places = [p for p, item in enumerate(target) if isinstance(item, dict) and key in ("*", item.get("name"))]
        if key.isdigit() and int(key) < len(target):
            places = [int(key)]
        if not places:
            known = ", ".join(str(item.get("name")) for item in target if isinstance(item, dict))
            raise UserError(f"{override}: no item {key!r} in the list; write its position, its name ({known}) or *")
        if not rest:
            raise UserError(f"{override}: name the key to change inside {key!r}")
        for place in places:
            target[place] = _opened(target[place], key, override)
            _assign(target[place], rest, copy.deepcopy(value), override)
        return
    if not rest:
        target[key] = value
        return
    inner = target.get(key)
    target[key] = {} if inner is None else _opened(inner, key, override)
    _assign(target[key], rest, value, override)


def _opened(item: Any, key: str, override: str) -> Any:
    """What holds keys: a component in its short form does too, attack=pgd-10 attack.step_size=2/255."""
    if isinstance(item, str):
        return {"name": item}
    if not isinstance(item, dict | list):
        raise UserError(f"{override}: {key!r} holds {item!r}, which has no keys")
    return item


def read_recipe_file(path: Path) -> Recipe:
    """A recipe in full, as `resolved` gave it and a file holds it.

    Raises:
        UserError: if the file is no such recipe.
    """
    content = _parse_yaml(_text_of(path, str(path)), str(path))
    return parse_recipe(content, str(path))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of a shipped one or by path, with overrides.

    Args:
        name: `cifar10_cpu`, or a path to a YAML file. A recipe may say `extends: OTHER` and give only what differs.
        overrides: `KEY=VALUE` with a dotted key, `stages.main_head.epochs=5`; `*` stands for all items of a list.
            Values are read as YAML.

    Raises:
        UserError: one line naming the key, what is wrong with it, and what would be right.
    """
    content, label = _extended(name)
    content.setdefault("name", label)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {override!r} is not understood; write KEY=VALUE, e.g. data.source=digits")
        _assign(content, key.split("."), _parse_yaml(text, f"override {override!r}"), override)
    return parse_recipe(content, f"recipe {name}")


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data.

    Raises:
        UserError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error)}") from None
