"""Resolve the name of a model, once: a run, a saved model or a factory, with the images that it is measured on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from torch import nn

from dualhead.attacks import Attack
from dualhead.components.fields import parse_real
from dualhead.data import Framing, Resample, Split, Storage, among, load_split
from dualhead.errors import UserError, under
from dualhead.evaluation import Asked, Measurement
from dualhead.models import Backbone, backbones, maker
from dualhead.runs import RunFolder, data_facts, load_stage, read_recipe, refuse_other_data
from dualhead.saving import CONFIG, Architecture, find_model, load, read_config, view
from dualhead.system.devices import find_device, room_for_images
from dualhead.system.files import shortened_name
from dualhead.system.processes import group
from dualhead.threats import Norm, Threat, build_threat, norm_named, typical_eps

_log = logging.getLogger(__name__)

AttackSpec = str | dict[str, Any]
"""An attack by name, or its section of a recipe."""
BY_SAMPLES: Final = "by-samples"
"""The checkpoint whose samples are nearest to held-out images, for `--checkpoint`."""
DEFAULT_ATTACKS = ("pgd-40",)
"""Attacks on a model that no run tells how to measure."""
ADAPTIVE: Final = ("multihead",)
"""Attacks on merged heads where a run's recipe names none that knows of heads."""


@dataclass(frozen=True)
class Request:
    """The options of `dualhead evaluate`; None or empty: as the run has it."""

    model: str
    attacks: tuple[str, ...] = ()
    eps: str | None = None
    norm: str | None = None
    threat: str | None = None
    threats: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    stage: str | None = None
    checkpoint: str | None = None
    output: str | None = None
    routes: str | None = None
    routers: bool = False
    output_dir: Path | None = None
    image_size: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    crop: str | None = None
    resample: str | None = None
    channels: int | None = None
    depth: int | None = None
    skip_unreadable: bool = False
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    save_adversarial: bool = False
    transfer_from: str | None = None
    overwrite: bool = False
    command: str | None = None
    generation: bool = False
    samples: int = 1_000
    sample_steps: str | None = None
    step_size: float = 0.2
    seeds: str | None = None
    judge: str | None = None
    ood: tuple[str, ...] = ()
    poison: str | None = None
    clean_model: str | None = None

    @property
    def label(self) -> str:
        """Return what tables call the model."""
        extra = [word for word in (self.stage, self.output) if word]
        return " ".join([Path(self.model).name, *extra])

    @property
    def is_run(self) -> bool:
        """Tell whether the model is a run's."""
        return RunFolder(Path(self.model)).begun

    @property
    def size(self) -> tuple[int, int] | None:
        """Return height and width of `image_size`; None if it is left out.

        Raises:
            UserError: if it is no size.
        """
        if self.image_size is None:
            return None
        parts = self.image_size.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"--image-size {self.image_size}: write HEIGHTxWIDTH, e.g. 224x224")
        return int(parts[0]), int(parts[1])

    @property
    def reading(self) -> dict[str, Any]:
        """Return how images are to be read, as far as the options say it, by the names of `load_split`.

        Raises:
            UserError: if an option is impossible.
        """
        if self.resample is not None and self.resample not in get_args(Resample):
            raise UserError(f"--resample {self.resample}: use one of {', '.join(get_args(Resample))}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--channels {self.channels}: use 1 (grey) or 3 (colour)")
        share = None if self.crop in (None, "none") else parse_real(str(self.crop))
        if share is not None and not 0 < share <= 1:
            raise UserError(f"--crop {self.crop}: write a fraction in (0, 1], e.g. 0.875, or none to stretch images")
        told = {
            "image_column": self.image_column, "label_column": self.label_column, "image_size": self.size,
            "resample": self.resample, "channels": self.channels, "depth": self.depth,
            "skip_unreadable": self.skip_unreadable or None,
        }  # fmt: skip
        found = {key: value for key, value in told.items() if value is not None}
        return found if self.crop is None else {**found, "crop": share}


@dataclass(frozen=True)
class Resolved:
    """A model with all that measuring it takes.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, num_classes]; on its device, in eval mode.
        images: test images, with labels among the classes that the model knows.
        threat: the threat model; of several, the first.
        threats: all of them where there are several, else empty.
        radii: of a curve over eps, as they were asked for; empty for none. The largest is the threat's.
        attacks: those to measure it by.
        results: where an evaluation of this request goes.
        gallery: the folder where a gallery of it goes.
        framing: how the images came to their form.
    """

    model: nn.Module
    images: Split
    threat: Threat
    threats: Sequence[Threat]
    radii: Sequence[str]
    attacks: Sequence[Attack | Measurement]
    results: Path
    gallery: Path
    framing: Framing


@dataclass(frozen=True)
class _Source:
    """Target of a model's name, before anything large is loaded.

    Args:
        threat: `norm` and `eps` that it was trained for; empty if nothing tells.
        attacks: those to measure it by if none are asked for.
        images: loads the images that are asked for.
        model: loads the model that fits given images.
        trained: the folder whose `config.json` tells what it was trained on; None for what fits any images.
        reading: how images come to form for it, by the names of `load_split`.
        published: the backbone that names classes and channels itself; None for what was trained here.
        results: the folder in which evaluations go, each in its own.
        gallery: the folder of galleries; None for that of the evaluation.
        threats: those to measure it under if none are asked for; empty for `threat` alone.
    """

    threat: Mapping[str, Any]
    attacks: tuple[AttackSpec, ...]
    images: Callable[[], Split]
    model: Callable[[Split], nn.Module]
    trained: Path | None
    reading: Mapping[str, Any]
    results: Path
    gallery: Path | None = None
    threats: tuple[Threat, ...] = ()
    published: Backbone | None = None


def resolve(request: Request) -> Resolved:
    """Load the model that a request names, and all that measuring it takes.

    In a group of processes each calls this with the same request.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    device = group().agreed(lambda: find_device(request.device))
    room = room_for_images(device)
    if request.is_run:
        source = _of_run(request, room)
    else:
        for option, value in (("--stage", request.stage), ("--checkpoint", request.checkpoint)):
            if value is not None:
                raise UserError(f"{option} is for runs, and {request.model} is none")
        source = _of_factory(request, room) if ":" in request.model else _of_saved(request, room)
    threats = _several(request, source)
    threat, radii = (threats[0], []) if threats else _threat(request, source.threat)
    images = group().in_turn(lambda: _among_known(request.model, source, source.images()))
    model = source.model(images).to(device).eval()  # a factory hands it out in train mode
    if source.published is not None and not source.published.published_class_names():
        named: Any = getattr(model, "class_names", ())
        images = among(images, tuple(named), request.model)
    results = request.output_dir or source.results / _folder_name(request)
    gallery = request.output_dir or source.gallery or results
    adaptive = () if request.routers else ADAPTIVE  # routers have adaptive attacks of their own
    asked = Asked.of(request.attacks) if request.attacks else Asked.of(source.attacks).for_model(model, adaptive)
    framing = _framing({**source.reading, **request.reading})
    return Resolved(
        model, images, threat, threats if len(threats) > 1 else (), radii, asked.each, results, gallery, framing
    )


def _framing(reading: Mapping[str, Any]) -> Framing:
    """Return how images come to form, without the columns that hold them."""
    return Framing(
        size=reading.get("image_size"), crop=reading.get("crop"), resample=reading.get("resample") or "bicubic",
        squash=bool(reading.get("squash")), depth=reading.get("depth"),
    )  # fmt: skip


# ---- three makers


def _of_run(request: Request, room: int) -> _Source:
    """Find a run: its recipe tells everything, unless the request does."""
    folder = RunFolder(Path(request.model))
    recipe = read_recipe(folder.path)

    def images() -> Split:
        data = recipe.data.model_copy(update=request.reading)
        found = data.load("test", request.data, room=room)
        if request.data is None and not request.reading and data.test is not None:
            refuse_other_data(folder.path, data_facts(found), data.source, "data.test")
        return found

    def model(images: Split) -> nn.Module:
        network, trained = load_stage(folder.path, request.stage, request.checkpoint)
        return view(network, request.output or trained)

    return _Source(
        threat=recipe.threat.describe(),
        attacks=recipe.evaluate.attacks,
        images=images,
        model=model,
        # What is missing is said where the run is loaded.
        trained=folder.checkpoints if (folder.checkpoints / CONFIG).is_file() else None,
        reading=recipe.data.reading(),
        results=folder.evaluations,
        gallery=folder.evaluation,
        threats=recipe.threats_measured,
    )


def _of_saved(request: Request, room: int) -> _Source:
    """Find a saved model: it tells what it was trained for, and to what size images were brought for it."""
    folder = find_model(request.model)
    config = read_config(folder)
    keys = ("image_size", "crop", "resample", "channels", "depth")
    reading = {key: config[key] for key in keys if config.get(key) is not None}
    return _Source(
        threat=config.get("threat", {}),
        attacks=DEFAULT_ATTACKS,
        images=lambda: _load_images(request, room, reading),
        model=lambda images: load(folder, request.output),
        trained=folder,
        reading=reading,
        results=_own_folder(request),
    )


def _of_factory(request: Request, room: int) -> _Source:
    """Find a factory: it makes what fits the images, which it takes as they are, or as its publisher says."""
    if maker() is not None:
        raise UserError(f"--factory is for runs and saved models; {request.model} says itself how it is made")
    backbone = backbones.build(request.model, where="model")
    found = backbone.published_preprocessing()
    reading: dict[str, Any] = {}
    if found is not None:
        reading = {"image_size": found.size, "crop": found.crop, "squash": found.squash, "resample": found.resample}

    def images() -> Split:
        test = _load_images(request, room, reading)
        if found is not None:
            _log.warning(
                "%s: its publisher brings images to %dx%d, %s, %s; --image-size, --crop and --resample override that",
                request.model, *found.size,
                "stretched" if found.crop is None else f"the middle {found.crop:.0%} of each", found.resample,
            )  # fmt: skip
        return test

    return _Source(
        threat={},
        attacks=DEFAULT_ATTACKS,
        images=images,
        model=lambda images: backbone.published(images.num_classes, images.image_shape),
        trained=None,
        reading=reading,
        results=_own_folder(request),
        published=backbone,
    )


def _load_images(request: Request, room: int, reading: Mapping[str, Any]) -> Split:
    """Load the images that a request names, for a model that is no run's."""
    if request.data is None:
        raise UserError(f"--data is needed, since {request.model} is not a run; e.g. --data uoft-cs/cifar10")
    return load_split(request.data, "test", storage=Storage(room=room), **{**reading, **request.reading})


# ---- what is asked of it


def _several(request: Request, source: _Source) -> tuple[Threat, ...]:
    """Return the threats of `--threat KIND:EPS`, given once or more, or those of the run; empty for neither."""
    if not request.threats:
        asked = (request.threat, request.norm, request.eps)
        return source.threats if asked == (None, None, None) else ()
    if request.norm is not None or request.eps is not None:
        raise UserError("--threat KIND:EPS says norm and budget itself; leave --norm and --eps out")
    for text in request.threats:
        if not text.rpartition(":")[0]:
            raise UserError(f"--threat {text}: write its budget too, as in --threat Linf:8/255 --threat L2:0.5")
    with under("--threat"):
        return tuple(build_threat(text) for text in request.threats)


def _threat(request: Request, known: Mapping[str, Any]) -> tuple[Threat, list[str]]:
    """Return the threat, and the radii of a curve over eps, if several were given: the largest is the threat's.

    Args:
        request: what is asked for.
        known: the threat that the model was trained for, as `Threat.describe` writes it; empty if nothing tells.
    """
    if "name" not in known:
        known = {"norm": "Linf", **{key: value for key, value in known.items() if key in ("norm", "eps")}}
    if norm_named(request.threat) in get_args(Norm):
        raise UserError(f"--threat {request.threat}: write its budget too, as in --threat {request.threat}:0.5")
    if request.threat is not None and request.norm is not None:
        raise UserError("--threat and --norm: give one of them, since a norm is a threat")
    own = {key: value for key, value in known.items() if key != "eps"}
    chosen: dict[str, Any] = own
    if request.threat is not None and request.threat != known.get("name"):
        chosen = {"name": request.threat}
    elif request.norm is not None:
        chosen = {"norm": norm_named(request.norm)}
    if request.eps is None and "eps" in known and chosen != own:
        ((key, kind),) = chosen.items()
        if (radius := typical_eps(kind)) is not None:
            of = known.get("norm") or known.get("name")
            option = "--norm" if key == "norm" else "--threat"
            raise UserError(f"{option} {kind}: --eps is needed, since the model's is of {of}; e.g. --eps {radius}")
    if request.eps is None and "eps" not in known:
        raise UserError("--eps is needed, since the model does not say for what it was trained; e.g. --eps 8/255")
    radii = [part.strip() for part in (str(known["eps"]) if request.eps is None else request.eps).split(",")]
    threats = [build_threat({**chosen, "eps": radius}) for radius in radii if parse_real(radius)]
    if not threats:
        raise UserError(f"--eps {request.eps}: at least one radius must be greater than 0")
    return max(threats, key=lambda threat: threat.eps), radii if len(radii) > 1 else []


def _among_known(name: str, source: _Source, test: Split) -> Split:
    """Return images with labels among the classes that a model knows; of another size with a warning.

    Args:
        name: of the model.
        source: where it comes from.
        test: the images.

    Raises:
        UserError: if they are of other classes or channels.
    """
    if source.published is not None:
        _refuse_other_channels(name, test, source.published.published_channels())
        known = source.published.published_class_names()
        return among(test, known, name) if known else test
    if source.trained is None:
        return test
    config = read_config(source.trained)
    architecture = Architecture.parse(config["architecture"], str(source.trained / CONFIG))
    channels = architecture.image_shape[0]
    _refuse_other_channels(name, test, channels)
    test = among(test, tuple(map(str, config.get("class_names", ()))), name)
    if test.num_classes != architecture.num_classes:
        raise UserError(
            f"{test.num_classes} classes of {channels}-channel images do not fit {name}, "
            f"which is for {architecture.num_classes} classes of {channels}-channel images; choose other --data"
        )
    seen, given = ("x".join(map(str, shape[1:])) for shape in (architecture.image_shape, test.image_shape))
    if seen != given:
        _log.warning(
            "%s was trained on images of %s and is measured on images of %s, as they are; --image-size %s resizes them",
            name, seen, given, seen,
        )  # fmt: skip
    return test


def _refuse_other_channels(name: str, test: Split, channels: int | None) -> None:
    if channels not in (None, test.image_shape[0]):
        key = f"--channels {channels} reads them so" if channels in (1, 3) else "choose other --data"
        raise UserError(
            f"{test.num_classes} classes of {test.image_shape[0]}-channel images do not fit {name}, which is for "
            f"{channels}-channel images; {key}"
        )


# ---- where results go


def run_results(request: Request) -> Path:
    """Return where an evaluation of a run goes."""
    return request.output_dir or RunFolder(Path(request.model)).evaluations / _folder_name(request)


def _own_folder(request: Request) -> Path:
    """Return the folder for evaluations of a model that is no run's."""
    return Path("evaluations") / request.label.replace(":", ".")


def _folder_name(request: Request) -> str:
    """Return a name made of the options: another question is another folder."""
    words = [request.stage, request.checkpoint, "routes" if request.routes else request.output, *request.attacks]
    words += ["routers" if request.routers else None]
    words += [request.norm, request.threat, *request.threats, request.eps]
    words += [None if request.limit is None else f"first{request.limit}", (request.data or "")[-60:]]
    words += [
        f"seed{request.seed}" if request.seed else None,
        None if request.precision == "auto" else request.precision,
    ]
    words += [request.image_size, request.image_column, request.label_column, request.resample]
    numbers = (("crop", request.crop), ("channels", request.channels), ("depth", request.depth))
    words += [None if value is None else f"{name}{value}" for name, value in numbers]
    words += [None if request.transfer_from is None else f"transfer-{request.transfer_from[-40:]}"]
    words += ["adversarial" if request.save_adversarial else None, "generation" if request.generation else None]
    words += ["ood"] if request.ood else []
    words += [None if request.poison is None else f"poison-{request.poison[:60]}"]
    named = ("".join(c if c.isalnum() or c in ".-" else "-" for c in word) for word in words if word)
    name = shortened_name("_".join(named))
    return name if request.is_run else name or "default"
