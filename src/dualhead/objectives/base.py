"""Objectives: the loss that training descends and that its attack climbs, as functions of the tensors they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, cast

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Size, Tensor, nn, vmap

from dualhead.attacks import Attack
from dualhead.components.registry import Registry
from dualhead.data import Stream
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat

OWN: Final = ""
"""The output that a stage trains: the aggregate, else the last head that learns, or a plain model's logits."""
CLEAN: Final = "clean"
ATTACKED: Final = "attacked"
"""The usual names of images: those of the batch, and what the attack makes of them."""

EPOCH: Final = -1
"""The window that is an epoch."""

BEFORE: Final = "before"
"""The teacher that is the network as the stage began."""

Seen = Mapping[str, Tensor]
"""Tensors that meet the needs of an objective, by their names."""


@dataclass(frozen=True)
class Logits:
    """Logits [B, C] of an output on some images.

    Args:
        output: `head1`, ..., `mean`, `aggregate`, the name of a teacher, or `OWN`.
        on: the images: `clean`, those that an inner maximisation makes, a stream of the data, or a view.
    """

    output: str = OWN
    on: str = CLEAN

    def of(self, output: str) -> Logits:
        """Return the same need with `OWN` as the given output."""
        return replace(self, output=output) if self.output == OWN else self


@dataclass(frozen=True)
class Features:
    """Output of a part of the network on some images, or of a layer in it: a tensor with a row for each image.

    Args:
        part: `trunk`, a head, or `model` for a plain one.
        on: the images, as for `Logits`.
        layer: name of a module inside the part; None for the trunk's features, which cross the cut.
        through: one of the objective's own heads, applied to the features.
        reversal: factor of the gradient that comes back through that head, which then has the other sign, as for a
            domain head (Ganin and Lempitsky 2015, arXiv 1409.7495); the head itself descends. None: as it is.
    """

    part: str = "trunk"
    on: str = CLEAN
    layer: str | None = None
    through: str | None = None
    reversal: float | None = None

    def of(self, output: str) -> Features:
        """Return the need itself."""
        del output
        return self


@dataclass(frozen=True)
class Labels:
    """Labels int64 [B] of the images of a stream, which has its own.

    Args:
        on: the stream.
    """

    on: str

    def of(self, output: str) -> Labels:
        """Return the need itself."""
        del output
        return self


@dataclass(frozen=True)
class Images:
    """The images themselves, float32 [B, ...]: for what a loss must know of how they were made.

    It costs no pass. Inner maximisations cannot use it.

    Args:
        on: the images.
    """

    on: str

    def of(self, output: str) -> Images:
        """Return the need itself."""
        del output
        return self


@dataclass(frozen=True)
class Slope:
    """Gradient [B, ...] of each image's own cross-entropy with respect to the image.

    It costs a pass of its own, forward and back to the images, with the parts that learn in train mode, which is never
    compiled. Inner maximisations cannot use it. A loss on it is differentiated twice, so that the stage cannot compute
    activations again.

    Args:
        output: as for `Logits`.
        on: the images, which have the labels of the batch.
        constant: leave out the graph to the weights: the loss does not learn through it.
    """

    output: str = OWN
    on: str = CLEAN
    constant: bool = False

    def of(self, output: str) -> Slope:
        """Return the same need with `OWN` as the given output."""
        return replace(self, output=output) if self.output == OWN else self


Passed = Logits | Features
"""Needs that a pass through the network meets; the others are at hand, or take gradients of their own."""
Need = Logits | Features | Labels | Images | Slope


def passed(needs: Mapping[str, Need]) -> dict[str, Passed]:
    """Return those of some needs that a pass through the network gives."""
    return {name: need for name, need in needs.items() if isinstance(need, Logits | Features)}


@dataclass(frozen=True)
class Inner:
    """An inner maximisation: how images are made that the loss is to see.

    Args:
        loss: labels and what is seen to one number for each image [B], climbed.
        uses: names of needs. Those on the images that are made are searched through; all others are targets, taken
            once, without a graph, in the mode in which the attack runs.
        start: the images that are perturbed.
        attack: None for the stage's.
        threat: None for the stage's.
        through: further needs on the images that are made, by name, which this maximisation alone sees: logits of what
            need not learn, such as an output that the stage leaves as it is.
        flat: whether the loss has no slope at the images that are perturbed, as a divergence from the prediction there.
    """

    loss: Callable[[Tensor, Seen], Tensor]
    uses: Sequence[str]
    start: str = CLEAN
    attack: Attack | None = None
    threat: Threat | None = None
    through: Mapping[str, Logits] = field(default_factory=dict)
    flat: bool = False

    def check(self, attack: Attack, threat: Threat) -> None:
        """Refuse an attack that cannot climb the loss within a threat.

        Raises:
            UserError: saying why not.
        """
        attack.check(threat)
        if self.flat and attack.begins_clean:
            raise UserError(
                f"attack {attack.label} begins at the images themselves, where a divergence from the prediction has no "
                "slope, and would leave images as they are; write start: gaussian or uniform"
            )


@dataclass(frozen=True)
class LossTerms:
    """A loss and the named parts it is the sum of.

    Args:
        total: scalar, with its graph.
        terms: scalars by name, weighted as they enter the total; for the log.
        figures: further scalars that are logged and that `Objective.advance` is given, but not descended.
        constraint: scalar with its graph, a loss that no update is to raise: where the gradient of the total points
            against its gradient, that part is taken away (A-GEM). It holds for the whole total, whatever terms that
            has. None: no constraint.
    """

    total: Tensor
    terms: dict[str, Tensor]
    figures: dict[str, Tensor] = field(default_factory=dict)
    constraint: Tensor | None = None

    @classmethod
    def sum_of(cls, **terms: Tensor) -> LossTerms:
        """Return the sum of the terms."""
        return cls(sum(terms.values(), start=next(iter(terms.values())).new_zeros(())), terms)

    def plus(self, **terms: Tensor) -> LossTerms:
        """Return the same loss with further terms; one whose name is taken is added to that term."""
        named = {name: self.terms[name] + term if name in self.terms else term for name, term in terms.items()}
        return replace(self, total=sum(terms.values(), start=self.total), terms={**self.terms, **named})

    def with_figures(self, **figures: Tensor) -> LossTerms:
        """Return the same loss with further figures for the log."""
        return replace(self, figures={**self.figures, **figures})


@dataclass(frozen=True)
class Before:
    """The network as a stage begins, for objectives that remember something of it.

    Args:
        weights: the parameters that learn, by name, without a graph.
        logits: weights and images [B, ...] to logits [B, C] of the output that the stage trains, float32, in eval mode.
        images: so many of the first training images, this process's share, a few at a time: images float32 [B, ...] in
            [0, 1], labels int64 [B], and their randomness.
        attack: the stage's.
        add_up: sums tensors over all processes, in place.
        earlier: what the last stage remembered that remembered anything; empty: there was none.
    """

    weights: Mapping[str, Tensor]
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    images: Callable[[int], Iterator[tuple[Tensor, Tensor, Streams]]]
    attack: Attack
    add_up: Callable[[Sequence[Tensor]], None]
    earlier: Mapping[str, Tensor]


class Objective(ABC):
    """A method of adversarial training: what it needs to see, what its attacks climb, and what it descends.

    Subclasses are frozen dataclasses registered in `objectives`. Which passes a step makes follows from the needs:
    for each set of images the trunk once, a head once and only on images for which it is needed, merging once. Equal
    needs are one; what no trained part feeds is a constant, computed once for target and loss.
    """

    registered_name: ClassVar[str]

    @property
    def per_image(self) -> bool:
        """Whether the loss is a mean over images of what depends on that image alone.

        Else it is another one for pieces of a batch, and a stage refuses `micro_batch`.
        """
        return True

    @abstractmethod
    def needs(self) -> Mapping[str, Need]:
        """Return what the loss and the attacks see, by name.

        Passes on different images run in the order in which the images are first named here.
        """

    def inner(self) -> Mapping[str, Inner]:
        """Return the inner maximisations by the name of the images that they make, in the order in which they run."""
        return {}

    @abstractmethod
    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute what training descends, averaged over the batch.

        Args:
            y: labels, int64 [B], or shares of the classes [B, C].
            seen: what `needs` asks for, under its names, float32.
        """

    # ---- rarely needed

    def streams(self) -> Mapping[str, Stream]:
        """Return further images of each step, as many as the batch has, by name: from the data, or noise."""
        return {}

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return images made of others, by name: of the clean ones, the streams and what inner maximisations made."""
        del images
        return {}

    def heads(self, shapes: Mapping[str, Size]) -> Mapping[str, nn.Module]:
        """Return modules that learn in this stage and are dropped after it, by the names in `Features.through`.

        Args:
            shapes: shape of one image's features [...] for each need of features, without the batch.
        """
        del shapes
        return {}

    def teachers(self) -> Mapping[str, str]:
        """Return models outside the network that are asked, by name.

        Each is an earlier stage of the recipe, a run or exported model, or `before`: the network as this stage began.
        """
        return {}

    def frozen(self) -> Sequence[str]:
        """Return outputs that must not learn meanwhile, as those that others learn from."""
        return ()

    def window(self) -> int:
        """Return the number of steps between two calls of `advance`, or `EPOCH`; 0: it is never called."""
        return 0

    def begin(self) -> Mapping[str, float]:
        """Return the state with which a stage begins; it lies in the checkpoint."""
        return {}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return the objective in an epoch of its stage, counted from 0, and in a state; most do not change.

        An objective that equals the one before takes over its plan of passes, and its attacks. So a field that only
        `loss` reads, and that changes often, is best left out of comparisons: `field(compare=False)`.
        """
        del epoch, state
        return self

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the state after a window of steps.

        Args:
            state: the one before.
            means: of the loss, its terms and figures over these steps and all processes, without steps that were
                dropped.
        """
        del means
        return state

    def recall(self, before: Before) -> Mapping[str, Tensor]:
        """Return tensors to remember through the stage, by name; they lie beside its weights and are asked for once.

        Args:
            before: the network as the stage begins.
        """
        del before
        return {}

    def checks(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, tuple[bool, str]]:
        """Look for signs in the log of a stage that its training went wrong.

        Args:
            lines: one for each epoch of the stage, as `metrics.jsonl` holds them: the loss, its terms and figures.

        Returns:
            By the name of a check, whether it is passed, and what was seen, with advice if it is not.
        """
        del lines
        return {}

    def penalty(self, weights: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return terms of the loss that depend on the weights alone, scalars by name; added once a step.

        Args:
            weights: the parameters that learn, by name, with a graph.
            memory: what `recall` gave.
        """
        del weights, memory
        return {}

    def threats(self) -> Sequence[Threat | None]:
        """Return the threats within which it ever attacks, each once; None stands for the stage's own."""
        return tuple(dict.fromkeys(inner.threat for inner in self.inner().values()))

    # ---- what follows from these

    @property
    def adversarial(self) -> bool:
        """Whether it attacks."""
        return bool(self.inner())

    @property
    def judged(self) -> str:
        """The need whose accuracy is logged: the last logits of attacked images, else the last logits of the model."""
        teachers = self.teachers()
        asked = {n: need for n, need in self.needs().items() if isinstance(need, Logits)}
        own = [n for n, need in asked.items() if need.output not in teachers]
        return ([n for n in own if asked[n].on == ATTACKED] or own)[-1]

    @property
    def judged_output(self) -> str:
        """The output that is judged, `OWN` if it is the one that the stage trains."""
        need = self.needs()[self.judged]
        assert isinstance(need, Logits)
        return need.output

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs of a dual-head model that it names, in the order of its needs; empty if the stage's own is all."""
        named = [need.output for need in self.needs().values() if isinstance(need, Logits)]
        return tuple(dict.fromkeys(output for output in named if output != OWN and output not in self.teachers()))


class Around(Objective):
    """A base method and something more: subclasses are dataclasses with a field `base`, and add to what it gives."""

    base: Objective

    def refuse_itself(self, instead: str = "raise its weight instead") -> None:
        """Refuse a base method of this kind, or one around such a one: their needs have the same names.

        Args:
            instead: the advice.

        Raises:
            UserError: with it.
        """
        inside = self.base
        while isinstance(inside, Around):
            if isinstance(inside, type(self)):
                raise UserError(f"{self.registered_name} is its own base method; {instead}")
            inside = inside.base

    def require_attack(self, *, one_output: bool = False) -> None:
        """Refuse a base method that makes no attacked images.

        Args:
            one_output: whether it must not name outputs either.

        Raises:
            UserError: naming methods that fit.
        """
        if ATTACKED not in self.base.inner() or (one_output and self.base.outputs):
            fitting = " of one output, as sat, trades or mart" if one_output else ", as sat, trades or any_of"
            raise UserError(f"{self.registered_name} needs an adversarial base method{fitting}")

    @property
    def per_image(self) -> bool:
        """As the base method."""
        return self.base.per_image

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs."""
        return self.base.needs()

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attacks."""
        return self.base.inner()

    def streams(self) -> Mapping[str, Stream]:
        """Those of the base method."""
        return self.base.streams()

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of the base method."""
        return self.base.views(images)

    def heads(self, shapes: Mapping[str, Size]) -> Mapping[str, nn.Module]:
        """Those of the base method."""
        return self.base.heads(shapes)

    def teachers(self) -> Mapping[str, str]:
        """Those of the base method."""
        return self.base.teachers()

    def frozen(self) -> Sequence[str]:
        """Those of the base method."""
        return self.base.frozen()

    def window(self) -> int:
        """As the base method."""
        return self.base.window()

    def begin(self) -> Mapping[str, float]:
        """As the base method."""
        return self.base.begin()

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it around the base method in this epoch and state."""
        return cast("Objective", replace(cast("Any", self), base=self.base.at(epoch, state)))

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """As the base method."""
        return self.base.advance(state, means)

    def recall(self, before: Before) -> Mapping[str, Tensor]:
        """As the base method."""
        return self.base.recall(before)

    def checks(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, tuple[bool, str]]:
        """As the base method."""
        return self.base.checks(lines)

    def penalty(self, weights: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As the base method."""
        return self.base.penalty(weights, memory)

    def threats(self) -> Sequence[Threat | None]:
        """Those of the base method, and those of what is added to it."""
        return tuple(dict.fromkeys((*self.base.threats(), *super().threats())))


def check_label_smoothing(value: float) -> None:
    """Refuse what is no share of a label.

    Raises:
        UserError: outside [0, 1).
    """
    if not 0 <= value < 1:
        raise UserError(f"label_smoothing must lie in [0, 1), got {value:g}; 0.1 is usual")


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) for each image [B], from logits [B, C]."""
    log_p, log_q = p_logits.log_softmax(1), q_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)  # not F.kl_div, the same to the bit, which vmap takes row by row


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for each image [B], from logits [B, C] and labels int64 [B] or shares [B, C]."""
    return F.cross_entropy(logits, y, reduction="none")


def under(name: str, seen: Seen) -> dict[str, Tensor]:
    """Return the tensors seen under `NAME.`, by the names that an objective inside another one gives them."""
    return {key.removeprefix(f"{name}."): value for key, value in seen.items() if key.startswith(f"{name}.")}


def check_weighable(objective: Objective) -> None:
    """Refuse an objective whose loss weights of classes do not fit.

    Raises:
        UserError: if its loss is no mean over images, or sees images of streams, which have labels of their own.
    """
    name = objective.registered_name
    if not objective.per_image:
        raise UserError(f"the loss of {name!r} is no mean over images, whose weights there could be")
    if objective.streams():
        raise UserError(f"{name!r} draws images of its own, whose classes the weights do not know")


def weighted(objective: Objective, weights: Tensor, y: Tensor, seen: Seen) -> LossTerms:
    """Compute an objective's loss with the loss of each image multiplied by the weight of its class.

    Args:
        objective: whose loss is a mean over images, see `check_weighable`.
        weights: float32 [C].
        y: labels, int64 [B], or shares of the classes [B, C], whose weight is the mean by share.
        seen: as `Objective.loss` takes it.

    Returns:
        Mean over the batch of weight times loss, and its terms and constraint likewise; figures are means without
        weights.
    """

    def of_one(label: Tensor, one: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Any]:
        loss = objective.loss(label[None], {name: value[None] for name, value in one.items()})
        return loss.total, loss.terms, loss.figures, () if loss.constraint is None else (loss.constraint,)

    totals, terms, figures, constraints = cast("Any", vmap(of_one))(y, dict(seen))
    each = weights[y] if y.dim() == 1 else y.to(weights.dtype) @ weights
    return LossTerms(
        (each * totals).mean(),
        {name: (each * term).mean() for name, term in terms.items()},
        {name: figure.mean() for name, figure in figures.items()},
        (each * constraints[0]).mean() if constraints else None,
    )


objectives: Registry[Objective] = Registry("objective", "dualhead.objectives", Objective)
