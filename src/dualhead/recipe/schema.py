"""The recipe as data: its sections and their keys, validated before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from dualhead.attacks import Attack, attacks
from dualhead.components import plugins as outside
from dualhead.components.fields import Real, parse_real
from dualhead.components.registry import Registry, first_error
from dualhead.components.sections import Section, component
from dualhead.data import Augmentation, Poison, Resample, Split, Storage, augmentations, load_split, poisons, resolve
from dualhead.errors import UserError, under
from dualhead.evaluation import Asked, located, measurements
from dualhead.heads import DEFAULT_OWN, Aggregator, aggregators
from dualhead.models import Backbone, backbones
from dualhead.names import MODEL, head_id, outputs_of, parts_of
from dualhead.objectives import check_weighable, objectives
from dualhead.threats import THREAT, Threat, threats
from dualhead.training.averaging import averagings
from dualhead.training.optimisation import optimisers, schedules
from dualhead.training.stage import Stage

REGISTRIES: dict[str, Registry[Any]] = {
    "aggregators": aggregators,
    "attacks": attacks,
    "augmentations": augmentations,
    "averages": averagings,
    "backbones": backbones,
    "measurements": measurements,
    "objectives": objectives,
    "optimisers": optimisers,
    "poisons": poisons,
    "schedules": schedules,
    "threats": threats,
}
"""Everything that a recipe can name, by the word for it."""


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
    """Share of each batch; 0.7 is usual for generated images. An epoch keeps its number of steps."""
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
    """Share of the training images held out to choose checkpoints: a fraction, or a number of images."""
    train_limit: int | None = Field(None, gt=0)
    """Use only so many training images (the held-out ones included)."""
    train_choice: Literal["first", "sample"] = "first"
    """Which: the first ones, or a random sample, always the same, for a set that is sorted by class."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """`balanced`: each class is shown equally often, images of rare ones several times an epoch; the length of an epoch
    stays. Images of `extra` and of an objective's streams are drawn as before."""
    class_weights: Literal["balanced"] | dict[str, Real] | None = None
    """By which the loss of an image is multiplied in training: `balanced`, N / (K n) for a class with n of the N images
    and K classes; or by the name of the class, e.g. {rare: 5}, 1 for those that are not named. None: all are equal.
    What attacks climb is of one image, so that it does not change."""
    augment: tuple[Annotated[Augmentation, *component(augmentations)], ...] = ()
    stream: Literal["auto"] | bool = "auto"
    """Read images from disk while training, rather than decode all into memory before; the batches are the same.
    `auto`: where they would take more than a quarter of the free memory, of the machine or of the accelerator."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that decode streamed images, for each process that trains; `auto`: its share of the processors."""

    extra: Extra | None = None
    """None is held out of it: validation sees images of the first source only."""
    poison: Annotated[Poison, *component(poisons)] | None = None
    """A change of training images or labels, for a study of what training makes of it. It comes before images are held
    out, so that validation is as poisoned as training; never to test images, nor to `extra`. Its seed is its own."""
    clean_validation: bool = False
    """Hold out the images as they were before the poison, as of somebody who has some that can be trusted."""

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str) -> str:
        return resolve(source)

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_by_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            found = {str(name): parse_real(weight) for name, weight in value.items()}
            bad = next((name for name, weight in found.items() if not 0 < weight < math.inf), None)
            if bad is not None:
                raise UserError(f".{bad}: a weight must be greater than 0, got {value.get(bad, found[bad])}")
            return found
        if value is not None and value != "balanced":
            raise UserError(f": must be balanced, or weights by the classes' names, e.g. {{rare: 5}}; got {value!r}")
        return value

    @model_validator(mode="after")
    def _corrected_once(self) -> Self:
        if self.sampling == "balanced" and self.class_weights == "balanced":
            raise UserError(
                ".class_weights: balanced evens out what sampling: balanced has evened out already; choose one of them"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size is None and (self.crop is not None or self.train_size is not None):
            key = "crop" if self.crop is not None else "train_size"
            raise UserError(f".{key}: needs image_size, what the model sees; e.g. image_size: [224, 224]")
        sizes = zip(self.train_size or (), self.image_size or (), strict=False)
        if any(kept < seen for kept, seen in sizes):
            raise UserError(f".train_size: must be at least image_size {list(self.image_size or ())}")
        return self

    @model_validator(mode="after")
    def _poison_fits(self) -> Self:
        if self.clean_validation and self.poison is None:
            raise UserError(
                ".clean_validation: says what becomes of a poison, and data.poison is not set; leave it out"
            )
        if self.poison is not None and self.poison.changes_pixels and self.train_size is not None:
            raise UserError(
                f".poison: {self.poison.registered_name} changes images of the size that the model sees, and "
                "train_size keeps larger ones; leave train_size out"
            )
        return self

    @classmethod
    def read(cls, content: Any) -> Self:
        """Validate the section alone, given as plain data.

        Raises:
            UserError: naming the key that is wrong.
        """
        try:
            return cls.model_validate(content if content is not None else {})
        except ValidationError as error:
            raise UserError(first_error(error, "data")) from None

    def load(
        self, split: Literal["train", "test"], source: str | None = None, *, room: int | None = None, workers: int = 0
    ) -> Split:
        """Load the images of a split, of this source or of another one read in the same way.

        Args:
            split: which.
            source: another one.
            room: bytes that they may take in memory, with `stream: auto`; None: any number.
            workers: processes that decode what is streamed, with `workers: auto`.

        Raises:
            UserError: if they cannot be read, or `train_limit` leaves classes without an image.
        """
        train = split == "train"
        images = self._load(
            source or self.source, split, limit=self.train_limit if train else None,
            choice=self.train_choice if train else "first", storage=self._storage(room, workers),
        )  # fmt: skip
        if train and self.train_limit is not None and self.train_choice == "first":
            shown = int(images.labels.bincount(minlength=images.num_classes).count_nonzero())
            if shown < images.num_classes:
                raise UserError(
                    f"data.train_limit: the first {len(images)} images show {shown} of {images.num_classes} classes, "
                    "as in a set that is sorted by class; set data.train_choice=sample, or a larger limit"
                )
        return images

    def load_extra(self, *, room: int | None = None, workers: int = 0) -> Split | None:
        """Load the second source; None if there is none. Arguments and errors as those of `load`."""
        if self.extra is None:
            return None
        return self._load(
            self.extra.source, "train", limit=self.extra.limit, choice="first", storage=self._storage(room, workers)
        )

    def load_other(self, source: str, *, room: int | None = None, workers: int = 0) -> Split:
        """Images of a further stream, whose labels are not these. Further arguments and errors as those of `load`."""
        return self._load(source, "train", limit=None, choice="first", storage=self._storage(room, workers))

    def _load(
        self, source: str, split: Literal["train", "test"], *, limit: int | None, choice: Literal["first", "sample"],
        storage: Storage,
    ) -> Split:  # fmt: skip
        larger = split == "train" and self.train_size is not None
        return load_split(
            source,
            split,
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


def _listed(value: object) -> object:
    """One word for a list of one."""
    return (value,) if isinstance(value, str) else value


class Model(Section):
    """The network."""

    backbone: Annotated[Backbone, *component(backbones)]
    attach_at: Annotated[str | None, BeforeValidator(_layer)] = None
    """Layer whose output feeds the second head; `input`: the images do, so that each head is a whole network; None: no
    second head, and stages train `model`."""
    heads: int = Field(2, ge=2, le=20)
    """How many, where `attach_at` is set, the backbone's own included."""
    aggregator: Annotated[Aggregator, *component(aggregators)] | None = None
    """None: the paper's, up to the number of classes where its size is in proportion."""
    second_head: Literal["reset", "clone", "tied"] = "reset"
    """Whether the second head, and any further one, starts from fresh weights or from those of the first, when its
    first stage begins, unless that stage's `init` has weights for it; `tied`: it shares the first one's tensors for
    good, but for those in `own`, which start likewise from the first one's. Shared tensors are head 1's: to train head
    2 alone trains what is its own."""
    own: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    """Tensors of each tied head alone: `batch_norm` (dual batch norm), `affine`, `statistics`, or names of layers
    and tensors with wildcards. None: `batch_norm` if heads are tied."""
    normalize: Annotated[Literal["data", "none"] | Statistics | None, BeforeValidator(_statistics)] = None
    """Inside the model: by the statistics of the training images, not at all, or by given ones. None: `none` for a
    backbone whose model takes images in [0, 1] as they are, such as `package.module:factory`, `data` for others."""

    @property
    def tied(self) -> tuple[str, ...] | None:
        """Tensors that tied heads have of their own; None if heads share nothing."""
        return (self.own or DEFAULT_OWN) if self.second_head == "tied" else None

    @model_validator(mode="after")
    def _own_is_of_tied_heads(self) -> Self:
        if self.own is not None and self.second_head != "tied":
            raise UserError(
                f".own: says what tied heads do not share; set second_head: tied, or leave it out ({self.second_head} "
                "shares nothing)"
            )
        if self.own == ():
            raise UserError(".own: must name something, e.g. [batch_norm]; heads that share all are one head")
        if self.second_head == "tied" and self.attach_at is None:
            raise UserError(
                ".second_head: tied needs attach_at, the layer in front of what is tied; input is the images"
            )
        return self


class Validation(Section):
    """How checkpoints are chosen: by robust accuracy on the held-out training images."""

    attack: Annotated[Attack, *component(attacks)] = Field("pgd-10", validate_default=True)
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch of a stage is always validated."""
    under: Literal["recipe", "stage"] = "recipe"
    """The recipe's threat, or what the stage trains against: of several threats the mean of the robust accuracies."""


class Evaluate(Section):
    """Measurements on the test images when training is over."""

    attacks: tuple[str | dict[str, Any], ...] = ("pgd-40",)
    """`corruptions` among them is no attack: accuracy under common corruptions stands apart."""
    threats: tuple[Annotated[Threat, *THREAT], ...] = ()
    """Several threats, `[Linf:8/255, L2:0.5]`, each with columns of its own; empty: the recipe's threat."""
    outputs: Literal["all", "deployed"] = "all"
    """Measure every output of several heads and the base model, or what is deployed alone, which is quicker."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many test images."""
    clean_model: str | None = None
    """A run or saved model that learnt from clean data: the success rate of a poison's trigger stands beside its."""
    batch_size: int = Field(256, ge=1)
    gallery: int = Field(48, ge=0)
    """So many of the first test images are shown under attack in the report."""

    @field_validator("clean_model")
    @classmethod
    def _absolute(cls, place: str | None) -> str | None:
        return str(Path(place).absolute()) if place is not None and Path(place).exists() else place

    @field_validator("attacks")
    @classmethod
    def _attacks_are_found_anywhere(cls, specs: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        return tuple(located(spec) for spec in specs)

    @model_validator(mode="after")
    def _attacks_exist(self) -> Self:
        if not self.attacks:
            raise UserError(".attacks: must name at least one, e.g. [pgd-40]; clean accuracy is measured besides")
        asked = Asked.of(self.attacks, ".attacks")
        if not asked.attacks:
            named = next(iter(asked.measurements))
            raise UserError(f".attacks: {named} are no attack; name one beside them, e.g. [pgd-40, {named}]")
        if len(self.threats) == 1:
            raise UserError(".threats: names one; write it as the recipe's threat, or name two or more here")
        kinds = [threat.describe() for threat in self.threats]
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                raise UserError(f".threats.{index}: is named twice")
        return self

    @property
    def asked(self) -> Asked:
        """The attacks, and the measurements that are none."""
        return Asked.of(self.attacks, "evaluate.attacks")


class ThreatSequence(Section):
    """Threats that arrive one after another: the network is measured under all of them after each stage."""

    stages: tuple[str, ...] = ()
    """Names of the stages after which it is measured, in order, the last one among them; empty: all stages."""
    threats: tuple[Annotated[Threat, *THREAT], ...] = ()
    """What it is measured under; empty: all that these stages train against, in the order in which they do so first."""
    specialists: tuple[str, ...] = ()
    """Folders of runs that were each made for one of the threats, and measured under all of them likewise: the measure
    of how well each threat was learnt."""

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, content: Any) -> Any:
        return {"stages": content} if isinstance(content, list | tuple) else content

    @model_validator(mode="after")
    def _once(self) -> Self:
        for key in ("stages", "threats"):
            values = getattr(self, key)
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise UserError(f".{key}.{index}: is named twice")
        return self


class Runtime(Section):
    """Keys that do not belong to the method: device, arithmetic, seed, saving, logging."""

    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16", "auto"] = "auto"
    """`bf16`: autocast with channels-last; `auto`: bf16 or float32, whichever is faster on this device, measured once
    for the architecture and kept; evaluations then take gradients in float32. `tf32`: float32 whose products a GPU
    rounds; `float32` never does that, and evaluations never do."""
    layout: Literal["contiguous", "channels_last", "auto"] = "auto"
    """Memory order of images and convolutions. `auto`: in bf16 channels-last where the model takes it, in float32 the
    faster one, measured once for the architecture and kept. The last bits of a result depend on it."""
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


class Recipe(Section):
    """A run from data to evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: Data
    model: Model
    threat: Annotated[Threat, *THREAT]
    stages: tuple[Stage, ...] = Field(min_length=1)
    validation: Validation = Validation()
    evaluate: Evaluate = Evaluate()
    sequence: ThreatSequence | None = None
    """Threats one after another; in short the names of stages, `[linf, l2, l1]`."""
    runtime: Runtime = Runtime()
    plugins: tuple[str, ...] = ()
    """Files (`my_file.py`) or modules (`my_package.module`) that register components by name. They are run."""

    @model_validator(mode="before")
    @classmethod
    def _plugins_come_first(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or "plugins" not in content:
            return content
        names = content["plugins"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UserError(f".plugins: must list files or modules, e.g. [my_file.py]; got {names!r}")
        with under(".plugins"):
            found = list(dict.fromkeys(outside.located(name) for name in names))
            for name in found:
                outside.load(name)
        return {**content, "plugins": found}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [stage.name for stage in self.stages]
        heads = tuple(map(head_id, range(1, self.model.heads + 1)))
        routers = self.model.aggregator.router_names if self.model.aggregator is not None else ()
        parts = parts_of(heads, routers) if self.model.attach_at else (MODEL,)
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
            changed = next((teacher for teacher in stage.objective.frozen() if teacher != head_id(1)), None)
            if self.model.tied and head_id(1) in stage.train and changed is not None:
                raise UserError(
                    f".stages.{index}.train: head1 must not be trained: {changed}, which is tied to it and the "
                    "teacher, would change"
                )
            if self.model.attach_at:
                with under(f".stages.{index}"):
                    stage.check_parts(tied=self.model.tied is not None)
            known = outputs_of(heads, routers)
            for output in (*stage.objective.outputs, *([stage.deploy] if stage.deploy else [])):
                if output not in known:
                    raise UserError(f".stages.{index}: {output!r} is no output of the model; it has {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _clean_model_is_of_use(self) -> Self:
        if self.evaluate.clean_model is not None and self.data.poison is None:
            raise UserError(
                ".evaluate.clean_model: is compared under a poison's trigger; set data.poison, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _interpolations_have_ends(self) -> Self:
        for index, stage in enumerate(self.stages):
            earlier = [other.name for other in self.stages[:index]]
            for name in stage.interpolate.between if stage.interpolate is not None else ():
                if name not in earlier:
                    known = ", ".join(earlier) or "none"
                    raise UserError(f".stages.{index}.interpolate.between: {name!r} is no earlier stage ({known})")
        return self

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        if self.sequence is None:
            return self
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(self.sequence.stages):
            if name not in names:
                raise UserError(f".sequence.stages.{index}: no stage is called {name!r}; there are {', '.join(names)}")
        listed = [names.index(name) for name in self.sequence.stages] or [len(names) - 1]
        if listed != sorted(listed) or listed[-1] != len(names) - 1:
            raise UserError(
                f".sequence.stages: must name stages in their order, with {names[-1]}, the last one, at the end"
            )
        if self.evaluate.threats:
            raise UserError(
                ".evaluate.threats: a sequence is measured under its own threats; leave it out, and name further ones "
                "in sequence.threats"
            )
        if len(self.threats_measured) < 2:
            raise UserError(
                ".sequence: has one threat alone; give stages a threat each, as stages.NAME.threat=L2:0.5, or name "
                "sequence.threats"
            )
        return self

    @property
    def sequence_stages(self) -> tuple[Stage, ...]:
        """The stages after which a sequence is measured; none without one."""
        if self.sequence is None:
            return ()
        return tuple(s for s in self.stages if not self.sequence.stages or s.name in self.sequence.stages)

    @property
    def threats_measured(self) -> tuple[Threat, ...]:
        """Several threats under which the finished model is measured; none: the recipe's own alone."""
        if self.sequence is None:
            return self.evaluate.threats
        met = (threat for stage in self.stages for threat in stage.met(self.threat))
        return self.sequence.threats or tuple(dict.fromkeys(met))

    def validated_under(self, stage: Stage) -> tuple[Threat, ...]:
        """Return the threats within which held-out images are attacked, by which the epochs of a stage are judged."""
        return (stage.met(self.threat) or (self.threat,)) if self.validation.under == "stage" else (self.threat,)

    @model_validator(mode="after")
    def _weights_fit_losses(self) -> Self:
        for index, stage in enumerate(self.stages if self.data.class_weights is not None else ()):
            try:
                check_weighable(stage.objective)
            except UserError as error:
                raise UserError(f".stages.{index}.objective: {error}; leave data.class_weights out") from None
        return self

    @model_validator(mode="after")
    def _attacks_fit_threats(self) -> Self:
        uses: list[tuple[str, Callable[[Threat], object]]]
        uses = [(f"stages.{index}", stage.against) for index, stage in enumerate(self.stages)]
        if not self.threats_measured:
            named = enumerate(self.evaluate.asked.each)
            uses += [(f"evaluate.attacks.{n}", each.check) for n, each in named if isinstance(each, Attack)]
        if self.data.validation:
            uses.append(("validation.attack", self.validation.attack.check))
            others = dict.fromkeys(t for stage in self.stages for t in self.validated_under(stage) if t != self.threat)
            uses += [("validation.attack", _for_another(self.validation.attack, threat)) for threat in others]
        for place, check in uses:
            with under(f".{place}"):
                check(self.threat)
        key = "sequence" if self.sequence is not None else "evaluate"
        for index, threat in enumerate(self.threats_measured):
            if not any(attack.takes(threat) for attack in self.evaluate.asked.attacks.values()):
                raise UserError(f".{key}.threats.{index}: no attack of evaluate.attacks is defined for {threat.kind}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the recipe in full, as plain data that `load_recipe` reads back."""
        return self.model_dump(mode="json")


def _for_another(attack: Attack, threat: Threat) -> Callable[[Threat], object]:
    """A check of an attack within a threat that is not the recipe's."""
    return lambda _: attack.check(threat)


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data.

    Raises:
        UserError: one line naming the key, what is wrong with it, and what would be right.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error)}") from None
