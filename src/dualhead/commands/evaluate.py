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
from dualhead.data import Split, Storage, load_split
from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, EvaluationProgress, Gallery, evaluate, make_gallery
from dualhead.heads import LayerInfo, layers
from dualhead.models import Normalize, backbones
from dualhead.runs import GALLERY, load_stage, read_recipe
from dualhead.saving import CONFIG, Architecture, find_model, load, read_config, view
from dualhead.system.files import check_folder
from dualhead.system.processes import group
from dualhead.system.runtime import Precision, find_device, room_for_images
from dualhead.threats import Norm, Threat, build_threat
from dualhead.threats import threats as registered

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of `dualhead evaluate`; None or empty: as the run has it."""

    model: str
    attacks: tuple[str, ...] = ()
    eps: str | None = None
    norm: str | None = None
    threat: str | None = None
    data: str | None = None
    limit: int | None = None
    stage: str | None = None
    checkpoint: str | None = None
    output: str | None = None
    output_dir: Path | None = None
    image_size: str | None = None
    image_column: str | None = None
    label_column: str | None = None
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
        save_adversarial=request.save_adversarial,
        output_dir=folder,
        resume=not request.overwrite,
        progress=progress,
        command=request.command,
        subject={"stage": request.stage, "checkpoint": request.checkpoint, "output": request.output},
        stop=stop,
    )
    return folder, evaluation


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


def subject_of(request: Request) -> tuple[nn.Module, Split, Threat]:
    """The model that a request names, on its device and in eval mode, its test images, and its threat model.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    device = find_device(request.device)
    threat, _ = _threat(request)
    test = _test_images(request)
    return _model(request, test).to(device).eval(), test, threat


def crop_of(request: Request) -> float | None:
    """As `data.crop` of the recipe: how the images that the model is for come to size."""
    if request.is_run:
        return read_recipe(Path(request.model)).data.crop
    crop = None if ":" in request.model else read_config(find_model(request.model)).get("crop")
    return None if crop is None else float(crop)


def _threat(request: Request) -> tuple[Threat, list[str]]:
    """The threat, and the radii of a curve over eps, if several were given: the largest is the threat's."""
    known: dict[str, Any] = {}
    if request.is_run:
        known = read_recipe(Path(request.model)).threat.describe()
    elif ":" not in request.model:
        known = read_config(find_model(request.model)).get("threat", {})
    if "name" not in known:
        known = {"norm": "Linf", **{key: value for key, value in known.items() if key in ("norm", "eps")}}
    if request.threat is not None and request.norm is not None:
        raise UserError("--threat and --norm: give one of them, since a norm is a threat")
    own = {key: value for key, value in known.items() if key != "eps"}
    chosen: dict[str, Any] = own
    if request.threat is not None and request.threat != known.get("name"):
        chosen = {"name": request.threat}
    elif request.norm is not None:
        chosen = {"norm": request.norm}
    if request.eps is None and "eps" in known and chosen != own:
        ((key, kind),) = chosen.items()
        if kind in (*get_args(Norm), *registered.names()):
            radius = {"Linf": "8/255", "L2": "0.5"}.get(kind, "0.05")
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


def _test_images(request: Request) -> Split:
    """The images that are asked for, among the classes that the model knows."""
    return _among_known(request, _load_images(request))


def _load_images(request: Request) -> Split:
    room = room_for_images(find_device(request.device))
    size = None if request.image_size is None else _size(request.image_size)
    if request.is_run:
        told = {"image_column": request.image_column, "label_column": request.label_column, "image_size": size}
        given = {key: value for key, value in told.items() if value is not None}
        data = read_recipe(Path(request.model)).data.model_copy(update=given)
        return data.load("test", request.data, room=room)
    if request.data is None:
        raise UserError(f"--data is needed, since {request.model} is not a run; e.g. --data uoft-cs/cifar10")
    # A trained model says to what size images were brought for it; a factory takes them as they are.
    known = {} if ":" in request.model else read_config(find_model(request.model))
    return load_split(
        request.data, "test", image_column=request.image_column, label_column=request.label_column,
        image_size=size or known.get("image_size"), crop=known.get("crop"), storage=Storage(room=room),
    )  # fmt: skip


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
        return test
    else:
        folder = find_model(request.model)
    trained = Architecture.parse(read_config(folder)["architecture"], str(folder / CONFIG))
    channels = trained.image_shape[0]
    known = tuple(map(str, read_config(folder).get("class_names", ())))
    names = set(test.class_names)
    if (
        test.num_classes < trained.num_classes == len(known)
        and names <= set(known)
        and not all(map(str.isdigit, names))
    ):
        test = test.named(known)  # images of some classes only, as a folder of those that came in this week
    if (test.image_shape[0], test.num_classes) != (channels, trained.num_classes):
        raise UserError(
            f"{test.num_classes} classes of {test.image_shape[0]}-channel images do not fit {request.model}, "
            f"which is for {trained.num_classes} classes of {channels}-channel images; choose other --data"
        )
    _check_names(request, list(test.class_names), list(known))
    return test


def _check_names(request: Request, given: list[str], known: list[str]) -> None:
    """Labels are numbers: they say what the model means only if its classes have the same names in the same order."""
    if given == known or all(name.isdigit() for name in given) or all(name.isdigit() for name in known):
        return
    moved = [name for name in given if name in known and given.index(name) != known.index(name)]
    if moved:
        place, other = given.index(moved[0]), known.index(moved[0])
        raise UserError(
            f"{moved[0]!r} is class {place} of these images and class {other} of {request.model}, so right answers "
            "would count as wrong; use images of the classes that it was trained on, in their order"
        )
    place = next(place for place, names in enumerate(zip(given, known, strict=False)) if len(set(names)) > 1)
    _log.warning(
        "%s: class %d is called %r here and %r where it was trained; it is measured as if they were the same",
        request.model, place, given[place], known[place],
    )  # fmt: skip


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
    words = [request.stage, request.checkpoint, request.output, *request.attacks]
    words += [request.norm, request.threat, request.eps]
    words += [None if request.limit is None else f"first{request.limit}", (request.data or "")[-60:]]
    words += [
        f"seed{request.seed}" if request.seed else None,
        None if request.precision == "auto" else request.precision,
    ]
    words += [request.image_size, request.image_column, request.label_column]
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
