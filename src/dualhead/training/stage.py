"""One stage of training as a recipe writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from dualhead.attacks import Attack, Maximiser, attacks, refuse_untrainable
from dualhead.components.fields import Real
from dualhead.components.sections import Section, component
from dualhead.data import Augmentation, CutMix, augmentations
from dualhead.errors import UserError
from dualhead.heads import Output, Part
from dualhead.names import AGGREGATOR, MODEL
from dualhead.objectives import ATTACKED, CLEAN, OWN, Objective, objectives
from dualhead.threats import THREAT, Threat
from dualhead.training.averaging import Averaging, averagings
from dualhead.training.awp import AWP
from dualhead.training.choices import Fit, Interpolate
from dualhead.training.free import Free
from dualhead.training.optimisation import Optimiser, Schedule, optimisers, schedules
from dualhead.training.parts import refuse_unmet, trained_output

RESET: Final = "reset"
"""Value of `init` for fresh weights."""
IDLE: Final = "natural"
"""Objective of stages that choose among what was trained, and train nothing themselves: every stage has one."""


class Stage(Section):
    """One stage of training."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    train: tuple[Part, ...] = Field(min_length=1)
    """The parts that learn; the others are frozen."""
    objective: Annotated[Objective, *component(objectives)]
    attack: Annotated[Attack, *component(attacks)] = Field("pgd-10", validate_default=True)
    free: Free | None = None
    """Replays of each batch in place of `attack`, one backward pass for weights and images (Free AT)."""
    attack_mode: Literal["eval", "train"] = "eval"
    """Mode of the trained parts while the attack runs."""
    batch_norm: Literal["train", "frozen"] = "train"
    """`frozen`: batch norm keeps its running statistics and uses them in training; scale and shift still learn."""
    forward: Literal["separate", "joint", "joint_clean"] = "separate"
    """Clean and attacked images in two forwards, as published, or in one: joint batch-norm statistics, and faster;
    `joint_clean`: in one, all rows normalised by the statistics of the clean images. Of tied heads, a batch norm whose
    statistics are shared sees the rows of both."""
    epochs: int = Field(ge=0)
    batch_size: int = Field(128, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    """Images in memory at once; gradients add up to the whole batch's. None: the batch. Trained batch norm sees the
    statistics of a piece, then."""
    checkpoint_activations: bool = False
    """Compute activations twice rather than keep them: less memory for about a third more time; same results."""
    optimiser: Annotated[Optimiser, *component(optimisers)] = Field("sgd", validate_default=True)
    schedule: Annotated[Schedule, *component(schedules)] = Field("step", validate_default=True)
    layer_decay: Real | None = Field(None, gt=0, le=1)
    """For transformers: factor of the learning rate from each block to the one before it, towards the images; 0.65 to
    0.9 are customary in fine-tuning. None: all layers have the same rate."""
    clip_norm: Real | None = Field(None, gt=0)
    """Longest gradient, over all trained parameters together; a longer one is shortened to it."""
    average: Annotated[Averaging, *component(averagings)] | None = None
    """Average of the weights over training (`ema`, `swa`), validated and kept in place of the live ones."""
    awp: AWP | None = None
    """Adversarial weight perturbation."""
    eps: Real | None = Field(None, gt=0)
    """Radius of the attack while this stage trains; None: the threat model's. Validation keeps that one."""
    threat: Annotated[Threat, *THREAT] | None = None
    """Threat of this stage in place of the recipe's; not beside `eps`. Validation keeps the
    recipe's."""
    augment: tuple[Annotated[Augmentation, *component(augmentations)], ...] | None = None
    """Augmentations of this stage; None: `data.augment`."""
    cutmix: CutMix | None = None
    """Boxes of other images, and shares of their labels."""
    fit: Fit | None = None
    """Choose the aggregator's parameters on the held-out images, in place of training; `train` is the aggregator alone,
    and objective, attack and epochs are left out."""
    interpolate: Interpolate | None = None
    """Choose weights between those of two earlier stages on the held-out images, in place of training; objective,
    attack and epochs are left out."""
    init: str | None = None
    """Weights to start the trained network from: a file, an exported model or a run; `reset`: the parts that this stage
    trains begin afresh, with the weights that the run began with, and not with those of the stage before."""
    replace_classifier: bool | str = False
    """Take from `init` all but the layer that gives the logits, which starts afresh, for other classes; true finds that
    layer, a name (`fc`, `model.head`) says which it is."""
    deploy: Output | None = None
    """Which output of a dual-head model is validated and, after the last stage, is the result: `mean` needs no stage of
    its own. None: the aggregate if it is trained, else the head that is."""
    keep: Literal["best", "last"] = "best"
    """The checkpoint that the next stage and the evaluation use."""

    @model_validator(mode="before")
    @classmethod
    def _helper_is_an_objective(cls, content: Any) -> Any:
        """Read `helper`, as runs that are finished already have it, as objective `hat`."""
        if isinstance(content, Mapping) and isinstance(content.get("helper"), Mapping) and "objective" in content:
            rest = {key: value for key, value in content.items() if key not in ("helper", "objective")}
            return {**rest, "objective": {"name": "hat", **content["helper"], "base": content["objective"]}}
        if isinstance(content, Mapping) and "helper" in content and content["helper"] is None:
            return {key: value for key, value in content.items() if key != "helper"}
        return content

    @model_validator(mode="before")
    @classmethod
    def _fit_trains_nothing(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and any(content.get(key) is not None for key in ("fit", "interpolate")):
            return {"objective": IDLE, "epochs": 0, **content}
        return content

    @model_validator(mode="after")
    def _attack_fits(self) -> Self:
        if self.fit is not None and (self.train != (AGGREGATOR,) or self.epochs):
            raise UserError("a stage with fit trains nothing: write train: [aggregator], without epochs")
        if self.fit is not None and self.objective != objectives.build(IDLE):
            raise UserError("a stage with fit trains nothing; leave its objective out")
        inner = self.objective.inner()
        if inner or isinstance(self.attack, Maximiser):
            refuse_untrainable(self.attack)
        for each in inner.values():
            if each.attack is not None:
                refuse_untrainable(each.attack)
        if self.micro_batch is not None and self.micro_batch < self.batch_size and not self.objective.per_image:
            raise UserError(
                f"micro_batch: the loss of {self.objective.registered_name!r} is another one for pieces of a batch; "
                "leave it out, and use checkpoint_activations to save memory"
            )
        if self.replace_classifier and self.init in (None, RESET):
            raise UserError("replace_classifier is for weights that init names; set init too")
        if self.threat is not None and self.eps is not None:
            raise UserError("eps and threat both say how far the attack may go; leave eps out, and write threat.eps")
        if len(set(self.train)) != len(self.train):
            raise UserError(f"train names a part twice: {', '.join(self.train)}")
        self.check_parts()
        return self

    @model_validator(mode="after")
    def _free_fits(self) -> Self:
        if self.free is None:
            return self
        inner, name = self.objective.inner(), self.objective.registered_name
        if set(inner) != {ATTACKED}:
            has = "has none" if not inner else f"has {', '.join(inner)}"
            raise UserError(f"free moves attacked images, and objective {name!r} {has}")
        if any(each.attack is not None or each.threat is not None for each in inner.values()):
            raise UserError(
                f"free moves images within the stage's threat, and objective {name!r} attacks in its own way"
            )
        if self.objective.window() > 0:  # later ones would be given the attacked images
            raise UserError(f"free moves attacked images alone, and objective {name!r} may make others as it goes on")
        if self.awp is not None:
            raise UserError("free takes one backward pass for all, and awp needs one of its own; choose one of them")
        return self

    @model_validator(mode="after")
    def _interpolation_trains_nothing(self) -> Self:
        if self.interpolate is not None and (self.fit is not None or self.epochs or self.init is not None):
            raise UserError("a stage with interpolate trains nothing: leave out fit, init and epochs")
        if self.interpolate is not None and self.objective != objectives.build(IDLE):
            raise UserError("a stage with interpolate trains nothing; leave its objective out")
        return self

    @model_validator(mode="after")
    def _statistics_stay(self) -> Self:
        if self.batch_norm == "frozen" and self.average is not None and self.average.batch_norm == "reestimate":
            raise UserError(
                f"batch_norm: frozen keeps the statistics, and average {self.average.registered_name!r} would estimate "
                "them anew; set average.batch_norm=average"
            )
        return self

    def against(self, threat: Threat) -> Threat:
        """Return the stage's threat in a recipe with this one: its own threat, or its own radius, if it has one.

        Raises:
            UserError: if the stage's attack cannot be used with that.
        """
        threat = self.threat or (threat if self.eps is None else threat.within(self.eps))
        if self.objective.adversarial and self.trains:
            if self.free is not None:
                self.free.check(threat)
                return threat
            for inner in self.objective.inner().values():
                inner.check(inner.attack or self.attack, inner.threat or threat)
        return threat

    @property
    def trains(self) -> bool:
        """Whether it trains, and does not choose among what was trained."""
        return self.fit is None and self.interpolate is None

    def met(self, threat: Threat) -> tuple[Threat, ...]:
        """Return the threats that its training attacks within, in a recipe with this threat; none if it attacks not."""
        own = self.against(threat)
        if not self.trains or not self.objective.adversarial:
            return ()
        found = (None,) if self.free is not None else self.objective.threats()
        return tuple(dict.fromkeys(own if each is None else each for each in found))

    @property
    def single_step(self) -> bool:
        """Whether the images that it trains on are attacked with one gradient each, as with `free`."""
        made = self.objective.inner().values()
        attacking = [inner for inner in made if (inner.uses or inner.through) and inner.start == CLEAN]
        if self.fit is not None or not attacking:
            return False
        return self.free is not None or any((inner.attack or self.attack).single_step for inner in attacking)

    @property
    def output(self) -> str:
        """Output that the stage deploys: as it says, else the one that learns."""
        return self.learner if self.deploy is None else self.deploy

    @property
    def learner(self) -> str:
        """Output that learns: the last of the objective's, or the one that the stage's parts train."""
        output = self.objective.judged_output
        return trained_output(self.train) if output == OWN else output

    def check_parts(self, *, tied: bool = True) -> None:
        """Refuse a loss that the parts which learn do not fit.

        Args:
            tied: heads are tied to head 1, or may be.

        Raises:
            UserError: see `refuse_unmet`; and if the model has no second head, which the objective or `deploy` needs.
        """
        if MODEL in self.train:
            if self.objective.outputs:
                raise UserError(f"objective {self.objective.registered_name!r} needs a model with two heads")
            if self.deploy is not None:
                raise UserError(f"deploy: {self.deploy} is an output of a model with two heads")
            return
        refuse_unmet(self.objective, self.train, tied=tied)
