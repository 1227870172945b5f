"""What `dualhead evaluate` is given: names of models, data and attacks, turned into an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from dualhead.attacks import attacks
from dualhead.components.fields import parse_real
from dualhead.data import Framing, Resample, Split, Storage, among, digests, load_split
from dualhead.errors import UserError
from dualhead.evaluation import (
    Evaluation,
    EvaluationProgress,
    Finding,
    Gallery,
    check_duplicates,
    evaluate,
    make_gallery,
)
from dualhead.heads import LayerInfo, layers
from dualhead.models import Normalize, backbones
from dualhead.runs import GALLERY, load_stage, read_digests, read_recipe
from dualhead.saving import CONFIG, Architecture, find_model, load, read_config, view
from dualhead.system.files import check_folder
from dualhead.system.processes import group
from dualhead.system.runtime import Precision, find_device, room_for_images
from dualhead.threats import Norm, ThreatModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of `dualhead evaluate`; None or empty: as the run has it."""

    model: str
    attacks: tuple[str, ...] = ()
    eps: str | None = None
    norm: str | None = None
    data: str | None = None
    limit: int | None = None
    stage: str | None = None
    checkpoint: str | None = None
    output: str | None = None
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
    overwrite: bool = False
    command: str | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        extra = [word for word in (self.stage, self.output) if word]
        return " ".join([Path(self.model).name, *extra])

    @property
    def is_run(self) -> bool:
        """Whether the model is a run's."""
        return (Path(self.model) / "config.yaml").is_file()


def assess(
    request: Request, progress: EvaluationProgress | None = None, stop: Callable[[], bool] = lambda: False
) -> tuple[Path, Evaluation]:
    """Evaluate what was asked for.

    Args:
        request: the options.
        progress: told how far it is.
        stop: as in `evaluate`.

    Returns:
        The folder with the results, and the evaluation.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    if request.precision not in ("auto", "float32", "bf16"):
        raise UserError(f"--precision {request.precision}: use auto, float32 or bf16")
    device = group().agreed(lambda: find_device(request.device))
    threat, curve = _threat(request)
    test = group().in_turn(lambda: _test_images(request))
    model = _model(request, test)
    test = _by_its_names(request, model, test)
    count = min(request.limit or len(test), len(test))
    if group().first:
        test.warn_if_sorted(count, "--limit")
    folder = request.output_dir or _default_folder(request)
    check_folder(folder, "--output")
    evaluation = evaluate(
        model.to(device).eval(),  # a factory hands it out in train mode
        test.images[:count],
        test.labels[:count],
        threat=threat,
        attacks=_attacks(request, model),
        eps=curve,
        batch_size=request.batch_size,
        seed=request.seed,
        precision=cast("Precision", request.precision),
        class_names=list(test.class_names),
        skipped=len(test.skipped),
        checks=_duplicates(request, test.first(count)),
        save_adversarial=request.save_adversarial,
        output_dir=folder,
        resume=not request.overwrite,
        progress=progress,
        command=request.command,
        subject={"stage": request.stage, "checkpoint": request.checkpoint, "output": request.output},
        stop=stop,
    )
    return folder, evaluation


def _duplicates(request: Request, test: Split) -> list[Finding]:
    """Whether a run learnt from some of the images that it is measured on; what others learnt from is not known."""
    learnt = read_digests(Path(request.model)) if request.is_run else {}
    return [check_duplicates({**learnt, "test": digests(test)})] if learnt and not test.is_stored else []


def exhibit(request: Request, landscapes: Sequence[int] | None = None) -> tuple[Path, Gallery]:
    """Make a gallery of the first `limit` test images, and put it where the report looks for it.

    Args:
        request: what is asked for; attacks and precision are not.
        landscapes: positions of the samples whose surroundings are mapped; None for some that are worth it.

    Returns:
        The file, and what is in it.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    model, test, threat = subject_of(request)
    count = min(request.limit or len(test), len(test))
    folder = request.output_dir or (Path(request.model) / "evaluation" if request.is_run else _default_folder(request))
    check_folder(folder, "--output")
    gallery = make_gallery(
        model, test.images[:count], test.labels[:count], threat=threat, landscapes=landscapes,
        seed=request.seed, batch_size=request.batch_size,
    )  # fmt: skip
    gallery.save(folder / GALLERY)
    return folder / GALLERY, gallery


def subject_of(request: Request) -> tuple[nn.Module, Split, ThreatModel]:
    """The model that a request names, on its device and in eval mode, its test images, and its threat model.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    device = find_device(request.device)
    threat, _ = _threat(request)
    test = _test_images(request)
    model = _model(request, test)
    return model.to(device).eval(), _by_its_names(request, model, test), threat


def framing_of(request: Request) -> Framing:
    """How images come to the form that the model is for, as the data's do."""
    told = {**_known_reading(request), **_told_reading(request)}
    return Framing(
        size=told.get("image_size"), crop=told.get("crop"), resample=told.get("resample") or "bicubic",
        squash=bool(told.get("squash")), depth=told.get("depth"),
    )  # fmt: skip


def _threat(request: Request) -> tuple[ThreatModel, list[str]]:
    """The threat model, and the radii of a curve over eps, if several were given: the largest is the threat's."""
    known: dict[str, Any] = {}
    if request.is_run:
        threat = read_recipe(Path(request.model)).threat
        known = {"norm": threat.norm, "eps": threat.eps}
    elif ":" not in request.model:
        known = read_config(find_model(request.model)).get("threat", {})
    norm = request.norm or known.get("norm", "Linf")
    if request.eps is None and "eps" in known and norm in get_args(Norm) and norm != known["norm"]:
        radius = "0.5" if norm == "L2" else "8/255"
        raise UserError(f"--norm {norm}: --eps is needed, since the model's is of {known['norm']}; e.g. --eps {radius}")
    if request.eps is None and "eps" not in known:
        raise UserError("--eps is needed, since the model does not say for what it was trained; e.g. --eps 8/255")
    radii = [part.strip() for part in (str(known["eps"]) if request.eps is None else request.eps).split(",")]
    threats = [ThreatModel(cast("Norm", norm), cast("float", radius)) for radius in radii if parse_real(radius)]
    if not threats:
        raise UserError(f"--eps {request.eps}: at least one radius must be greater than 0")
    return max(threats, key=lambda threat: threat.eps), radii if len(radii) > 1 else []


def _test_images(request: Request) -> Split:
    """The images that are asked for, among the classes that the model knows."""
    return _among_known(request, _load_images(request))


def _load_images(request: Request) -> Split:
    room = room_for_images(find_device(request.device))
    told = _told_reading(request)
    if request.is_run:
        data = read_recipe(Path(request.model)).data.model_copy(update=told)
        return data.load("test", request.data, room=room)
    if request.data is None:
        raise UserError(f"--data is needed, since {request.model} is not a run; e.g. --data uoft-cs/cifar10")
    # A trained model says to what form images were brought for it; a factory takes them as they are.
    known = _known_reading(request)
    test = load_split(request.data, "test", storage=Storage(room=room), **{**known, **told})
    if ":" in request.model and known:
        size, crop = "x".join(map(str, known["image_size"])), known["crop"]
        how = "stretched" if crop is None else f"the middle {crop:.3g} of each"
        _log.warning(
            "%s: its publisher brings images to %s, %s, %s; --image-size, --crop and --resample override that",
            request.model, size, how, known["resample"],
        )  # fmt: skip
    return test


def _told_reading(request: Request) -> dict[str, Any]:
    """How images are to be read, as far as the options say it, by the names of `load_split`."""
    resample, crop = request.resample, request.crop
    if resample is not None and resample not in get_args(Resample):
        raise UserError(f"--resample {resample}: use one of {', '.join(get_args(Resample))}")
    if request.channels not in (None, 1, 3):
        raise UserError(f"--channels {request.channels}: use 1 (grey) or 3 (colour)")
    share = None if crop in (None, "none") else parse_real(str(crop))
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--crop {crop}: write a fraction in (0, 1], e.g. 0.875, or none to stretch images")
    told = {
        "image_column": request.image_column, "label_column": request.label_column,
        "image_size": None if request.image_size is None else _size(request.image_size), "resample": resample,
        "channels": request.channels, "depth": request.depth, "skip_unreadable": request.skip_unreadable or None,
    }  # fmt: skip
    found = {key: value for key, value in told.items() if value is not None}
    return found if crop is None else {**found, "crop": share}


def _known_reading(request: Request) -> dict[str, Any]:
    """How images came to form where the model was trained, as far as it says so."""
    if request.is_run:
        return read_recipe(Path(request.model)).data.reading()
    if ":" not in request.model:
        keys = ("image_size", "crop", "resample", "channels", "depth")
        known = read_config(find_model(request.model))
        return {key: known[key] for key in keys if known.get(key) is not None}
    found = backbones.build(request.model, where="model").published_preprocessing()
    if found is None:
        return {}
    return {"image_size": found.size, "crop": found.crop, "squash": found.squash, "resample": found.resample}


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--image-size {text}: write HEIGHTxWIDTH, e.g. 224x224")
    return int(parts[0]), int(parts[1])


def _among_known(request: Request, test: Split) -> Split:
    """A factory makes what fits the images; a trained model has to fit them. Other sizes are up to the network."""
    if request.is_run:
        folder = Path(request.model) / "checkpoints"
        if not (folder / CONFIG).is_file():
            return test  # what is missing is said where the run is loaded
    elif ":" in request.model:
        published = backbones.build(request.model, where="model")
        channels, names = published.published_channels(), published.published_class_names()
        if channels not in (None, test.image_shape[0]):
            raise UserError(_other_channels(request, test, channels))
        return among(test, names, request.model) if names else test
    else:
        folder = find_model(request.model)
    config = read_config(folder)
    trained = Architecture.parse(config["architecture"], str(folder / CONFIG))
    channels = trained.image_shape[0]
    if test.image_shape[0] != channels:
        raise UserError(_other_channels(request, test, channels))
    # The names of a trained model are as many as its classes, or it does not say them.
    test = among(test, tuple(map(str, config.get("class_names", ()))), request.model)
    if test.num_classes != trained.num_classes:
        raise UserError(
            f"{test.num_classes} classes of {channels}-channel images do not fit {request.model}, "
            f"which is for {trained.num_classes} classes of {channels}-channel images; choose other --data"
        )
    return test


def _other_channels(request: Request, test: Split, channels: int | None) -> str:
    key = f"--channels {channels} reads them so" if channels in (1, 3) else "choose other --data"
    return (
        f"{test.num_classes} classes of {test.image_shape[0]}-channel images do not fit {request.model}, which is for "
        f"{channels}-channel images; {key}"
    )


def _by_its_names(request: Request, model: nn.Module, test: Split) -> Split:
    """The images among the classes that a published model names itself, with a word if it names none."""
    if request.is_run or ":" not in request.model:
        return test
    names = backbones.build(request.model, where="model").published_class_names()
    if names:
        return test  # its images were brought among these before it was built
    named: Any = getattr(model, "class_names", ())
    return among(test, tuple(named), request.model)


def _model(request: Request, test: Split) -> nn.Module:
    if request.is_run:
        model, trained = load_stage(Path(request.model), request.stage, request.checkpoint)
        return view(model, request.output or trained)
    for option, value in (("--stage", request.stage), ("--checkpoint", request.checkpoint)):
        if value is not None:
            raise UserError(f"{option} is for runs, and {request.model} is none")
    if ":" in request.model:
        return backbones.build(request.model, where="model").published(test.num_classes, test.image_shape)
    return load(request.model, request.output)


def _attacks(request: Request, model: nn.Module) -> tuple[Any, ...]:
    """Those asked for; else the run's, and for a model that merges heads the attack that knows of them."""
    if request.attacks:
        return request.attacks
    chosen = read_recipe(Path(request.model)).evaluate.attacks if request.is_run else ("pgd-40",)
    for_heads = [attack for attack in chosen if attacks.build(attack).needs_heads]
    if not hasattr(model, "head_logits"):
        return tuple(attack for attack in chosen if attack not in for_heads)
    return chosen if for_heads else (*chosen, "multihead")


def _default_folder(request: Request) -> Path:
    """Beside the run's own evaluation, in a folder that names the options: another question is another folder."""
    base = Path(request.model) if request.is_run else Path("evaluations") / request.label.replace(":", ".")
    words = [request.stage, request.checkpoint, request.output, *request.attacks, request.norm, request.eps]
    words += [None if request.limit is None else f"first{request.limit}", (request.data or "")[-60:]]
    words += [
        f"seed{request.seed}" if request.seed else None,
        None if request.precision == "auto" else request.precision,
    ]
    words += [request.image_size, request.image_column, request.label_column, request.resample]
    numbers = (("crop", request.crop), ("channels", request.channels), ("depth", request.depth))
    words += [None if value is None else f"{name}{value}" for name, value in numbers]
    words += ["adversarial" if request.save_adversarial else None]
    name = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word) for word in words if word)
    return base / "evaluations" / name if request.is_run else base / (name or "default")


def list_layers(name: str, image_shape: str, classes: int) -> list[LayerInfo]:
    """The layers of a model at which a second head can start.

    Args:
        name: a backbone, `package.module:factory`, a run, an exported model or a Hub name.
        image_shape: `CHANNELSxHEIGHTxWIDTH`, for a backbone or a factory.
        classes: for a backbone or a factory.

    Raises:
        UserError: if there is no such model or shape.
    """
    if Path(name).is_dir() or ("/" in name and ":" not in name):
        folder = find_model(name)
        architecture = Architecture.parse(read_config(folder)["architecture"], str(folder))
        architecture = architecture.model_copy(update={"attach_at": None, "aggregator": None})
        model, shape = architecture.create(), architecture.image_shape
    else:
        parts = image_shape.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"--image-shape {image_shape}: write CHANNELSxHEIGHTxWIDTH, e.g. 3x32x32")
        shape = (int(parts[0]), int(parts[1]), int(parts[2]))
        model = backbones.build(name, where="model").create(classes, shape, Normalize.identity(shape[0]))
    return layers(model, torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
