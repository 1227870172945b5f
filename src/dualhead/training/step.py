"""One update: attack the batch, one forward, one backward, one step of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from dualhead.attacks import Attack, Maximiser, maximise_within
from dualhead.data import Batch, StreamImages
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.objectives import (
    ATTACKED,
    CLEAN,
    Images,
    Inner,
    Labels,
    Logits,
    LossTerms,
    Need,
    Objective,
    Slope,
    passed,
    weighted,
)
from dualhead.system.arithmetic import Arithmetic, compiled
from dualhead.system.modes import hold_statistics, in_eval_mode
from dualhead.system.processes import group
from dualhead.system.replicas import LEAST_ROWS, pool, twins
from dualhead.threats import Threat
from dualhead.training.activation_checkpointing import blocks, recomputed, still_buffers
from dualhead.training.free import CarriedPerturbation
from dualhead.training.guard import StepGuard
from dualhead.training.passes import Crossing, Look, Passes
from dualhead.training.stage import Stage


@dataclass(frozen=True)
class StepOutcome:
    """Losses and figures of a step over all processes, as tensors on the device: the log decides when to read them."""

    terms: dict[str, Tensor]
    """Scalars: the loss and its parts."""
    taken: Tensor
    """Whether the update was made: bool scalar, False where loss or gradient was not finite."""
    correct: Tensor
    """How many of the batch's images, attacked if the objective attacks, were classified correctly."""


@dataclass(frozen=True)
class _Piece:
    """Part of a batch, ready for the loss.

    Args:
        crossing: by the images' names, what the frozen prefix makes of them.
        known: needs that are constants: what teachers and frozen parts say, labels of streams, and images.
        y: labels.
        images: by name, those whose slopes are needed.
    """

    crossing: dict[str, Crossing]
    known: dict[str, Tensor]
    y: Tensor
    images: dict[str, Tensor]


@dataclass(frozen=True)
class _Plan:
    """Passes that an objective needs, with what has been found out about them.

    Args:
        objective: it is the plan of all that are equal to this one.
        needs: of its loss, by name.
        inner: the maximisations that make its attacked images, by these images' names.
        constant: needs that no trained part feeds.
        crossing: names of the images for which the frozen prefix is run.
        look: pass of the loss through what learns.
        fast_look: the same, compiled if the run compiles. A count of operations sees nothing of a compiled pass, so
            both forms stay.
        slopes: of each slope that is needed, name, need and the pass to its logits.
        estimates: pass by which statistics of batch norm are estimated.
        climbs: the maximisations through the step's own passes.
        climbs_in_lanes: the same through those of each lane.
        looks: passes to constants, by their names; made when they are first needed.
        costs: floating-point operations of a step over all processes, by whether it perturbs weights, once counted.
    """

    objective: Objective
    needs: Mapping[str, Need]
    inner: Mapping[str, Inner]
    constant: Mapping[str, Need]
    crossing: Sequence[str]
    look: Look
    fast_look: Callable[[Mapping[str, Crossing]], dict[str, Tensor]]
    slopes: Sequence[tuple[str, Slope, Look]]
    estimates: Look
    climbs: Mapping[str, _Climb]
    climbs_in_lanes: Sequence[Mapping[str, _Climb]]
    looks: dict[tuple[str, ...], Look] = field(default_factory=dict)
    costs: dict[bool, int] = field(default_factory=dict)


_MOST_PLANS = 16
"""So many plans are kept; an objective that alternates between a few forms is planned once for each."""


class TrainingStep:
    """The step of a stage, with as few passes as its objective allows.

    A target of an attack is computed once a batch; the attack asks for input gradients only; a frozen prefix is run
    once for each set of images; what no trained part feeds is computed once for target and loss.

    With `micro_batch`, the batch is attacked piece by piece and gradients add up over the pieces: exactly those of the
    whole batch for losses that are means over images, except for batch norm that trains, whose statistics are then
    those of a piece. With `checkpoint_activations` they are exact for any network.

    Args:
        passes: through the network.
        stage: objective, attack and their settings.
        threat: what the adversary may do.
        optimiser: over `passes.parameters()`.
        arithmetic: number format of the passes.
        class_weights: float32 [C], by which an image's loss is multiplied; None: by nothing.
        memory: what the objective remembers of the network as the stage began.

    Attributes:
        guard: drops updates that are not finite, and counts them.
        carried: the perturbation that goes on from step to step; None unless the stage trains for free.
    """

    def __init__(
        self,
        passes: Passes,
        stage: Stage,
        threat: Threat,
        optimiser: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        class_weights: Tensor | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._passes = passes
        self._memory = dict(memory or {})
        self._reference: list[Tensor] = []
        self._class_weights = class_weights
        self._stage = stage
        self._threat = threat
        self._arithmetic = arithmetic
        self._optimiser = optimiser
        self.guard = StepGuard(passes.learners, optimiser, stage.clip_norm)
        self.carried = None if stage.free is None else CarriedPerturbation(stage.free, threat)
        self._perturbs = False
        for teacher in passes.teachers.values():
            arithmetic.lay_out(teacher)
        self._forgetful = blocks(passes.model) if stage.checkpoint_activations else []
        self._in_lanes: list[Passes] = []
        self._counted = False
        if arithmetic.lanes > 1 and stage.attack_mode == "eval" and not stage.checkpoint_activations:
            self._in_lanes = _lanes(passes, stage, arithmetic.lanes)
        self._plans: list[_Plan] = []
        self._objective = stage.objective
        self._plan = self._plan_of(stage.objective)

    def _plan_of(self, objective: Objective) -> _Plan:
        """Plan the passes that an objective needs, or take the plan of one that was seen lately."""
        for plan in self._plans:
            if plan.objective == objective:
                return plan
        plan = self._planned(objective)
        self._plans = [*self._plans, plan][-_MOST_PLANS:]
        return plan

    def _planned(self, objective: Objective) -> _Plan:
        needs, inner = dict(objective.needs()), dict(objective.inner())
        teachers, passes = self._passes.teachers, self._passes
        told = {n for n, need in needs.items() if isinstance(need, Logits) and need.output in teachers}
        constant = {n: need for n, need in needs.items() if passes.is_constant(need)}
        asked = [need for n, need in passed(needs).items() if n not in told]
        learning: dict[str, Need] = {n: need for n, need in passed(needs).items() if n not in constant}
        together = [CLEAN, *(made for made, of in inner.items() if of.start == CLEAN)]
        forward = self._stage.forward
        if forward == "separate":
            together = []
        counted = (CLEAN,) if forward == "joint_clean" else None
        look = passes.look(learning, together, counted=counted)
        routed = look.tells_rows
        if routed and self._forgetful:
            raise UserError(
                f"checkpoint_activations: not with forward: {forward}, whose layers are told whose their rows are; use "
                "micro_batch"
            )
        slopes = [
            (n, need, passes.look({n: Logits(need.output, need.on)}))
            for n, need in needs.items()
            if isinstance(need, Slope)
        ]
        if slopes and self._forgetful:
            raise UserError(
                "checkpoint_activations: not with an objective whose loss sees gradients of images; use micro_batch"
            )
        # Statistics that routes have in common are estimated as they are trained: of the rows of all.
        estimates = passes.look(_estimated(learning), together if routed else (), counted=counted if routed else None)
        fast_look: Callable[[Mapping[str, Crossing]], dict[str, Tensor]] = look
        if self._arithmetic.compiled:
            if look.has_layers:
                raise UserError(
                    "objective: looks inside parts of the model, which cannot be compiled; set runtime.compile=false"
                )
            if routed:
                raise UserError(
                    f"forward: {forward}: layers are told whose their rows are, which cannot be compiled; set "
                    "runtime.compile=false"
                )
            fast_look = compiled(look, "the passes of the loss")
        climbs = {made: _Climb(passes, needs, made, of) for made, of in inner.items()}
        in_lanes = [{made: _Climb(lane, needs, made, of) for made, of in inner.items()} for lane in self._in_lanes]
        if self._arithmetic.compiled:
            for climb in climbs.values():
                climb.compile()
        return _Plan(
            objective=objective,
            needs=needs,
            inner=inner,
            constant=constant,
            crossing=list(dict.fromkeys(need.on for need in asked)),
            look=look,
            fast_look=fast_look,
            slopes=slopes,
            estimates=estimates,
            climbs=climbs,
            climbs_in_lanes=in_lanes,
        )

    @property
    def cost(self) -> int:
        """Floating-point operations of such a step, over all processes; 0 until they have been counted."""
        return self._plan.costs.get(self._perturbs, 0)

    @cost.setter
    def cost(self, flops: int) -> None:
        self._plan.costs[self._perturbs] = flops

    def begin(self, epoch: int, state: Mapping[str, float] | None = None) -> bool:
        """Prepare for an epoch, counted from 0, or for a new state of the objective.

        Returns:
            Whether the steps that come differ in cost from those before.
        """
        awp = self._stage.awp
        objective = self._stage.objective.at(epoch, state or {})
        changed = objective != self._objective
        if changed:
            self._plan = self._plan_of(objective)
        self._objective = objective  # an equal one may differ in what only its loss reads
        self._perturbs = awp is not None and epoch >= awp.start
        return (awp is not None and epoch == awp.start) or (changed and bool(state))

    def __call__(
        self,
        batch: Batch,
        streams: Streams,
        further: Mapping[str, StreamImages] | None = None,
        *,
        one_thread: bool = False,
    ) -> StepOutcome:
        """Train on a batch.

        Args:
            batch: images float32 [B, C, H, W] in [0, 1] and labels int64 [B].
            streams: the randomness of these samples in this epoch.
            further: images of the objective's own streams, by name, [B, C, H, W] each.
            one_thread: ask the model in the caller's thread only and as it is, not compiled, so that whoever counts
                there sees all passes.
        """
        self._counted = one_thread
        images = batch.total or len(batch)
        self._passes.learners.train()
        if self._stage.batch_norm == "frozen":
            hold_statistics(self._passes.model)
        self.guard.remember()
        attacked = None if self.carried is None else self.carried.attacked(batch.x)
        with recomputed(self._forgetful):
            pieces = [self._prepare(*piece) for piece in self._cut(batch, streams, further or {}, attacked)]
            with self._perturbed(pieces, images):
                self._optimiser.zero_grad(set_to_none=True)
                terms, correct = self._descend(pieces, images)
        self.guard.settle()
        self._add_up(terms, correct, len(batch) / images)
        self._respect()
        with record_function("update"):
            taken = self.guard.step(terms["loss"])
            if self.carried is not None and attacked is not None:
                self.carried.ascend(batch.x, attacked, taken)
        return StepOutcome(terms, taken, correct)

    def estimate(self, batch: Batch, streams: Streams, further: Mapping[str, StreamImages]) -> None:
        """Run each output without a graph, in the mode in which the model is, to estimate statistics of batch norm.

        An output that trains on clean images, alone or among others, sees these; one that does not sees what it trains
        on, attacked as in a step.
        """
        device = batch.x.device
        if {need.on for need in self._plan.estimates.needs.values()} <= {CLEAN}:
            with self._arithmetic.autocast(device):
                crossing = {CLEAN: self._passes.constant(self._arithmetic.images(batch.x))}
        else:
            with in_eval_mode(self._passes.learners):
                crossing = self._prepare(batch, streams, further).crossing
        with torch.no_grad(), self._arithmetic.autocast(device):
            self._plan.estimates(crossing)

    def _cut(
        self, batch: Batch, streams: Streams, further: Mapping[str, StreamImages], attacked: Tensor | None
    ) -> Iterator[tuple[Batch, Streams, Mapping[str, StreamImages], Tensor | None]]:
        size = self._stage.micro_batch or len(batch)
        if size >= len(batch):
            yield batch, streams, further, attacked
            return
        for rows in torch.split(torch.arange(len(batch), device=batch.y.device), size):
            given = None if attacked is None else attacked[rows]
            beside = {
                name: StreamImages(of.x[rows], None if of.y is None else of.y[rows]) for name, of in further.items()
            }
            yield Batch(batch.index[rows], batch.x[rows], batch.y[rows]), streams[rows], beside, given

    def _prepare(
        self, piece: Batch, streams: Streams, further: Mapping[str, StreamImages], given: Tensor | None = None
    ) -> _Piece:
        """Make all images of a piece, run the frozen prefix on them, and take what is constant."""
        images, crossing, known = self._make(piece, streams, further, given)
        self._cross(images, crossing)
        known |= self._take(images, crossing, {n: need for n, need in self._plan.constant.items() if n not in known})
        known |= {n: images[need.on] for n, need in self._plan.needs.items() if isinstance(need, Images)}
        return _Piece(crossing, known, piece.y, {need.on: images[need.on] for _, need, _ in self._plan.slopes})

    def _make(
        self, piece: Batch, streams: Streams, further: Mapping[str, StreamImages], given: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Crossing], dict[str, Tensor]]:
        """Make all images of a piece.

        Returns:
            The images by name; what the frozen prefix makes of those that were needed on the way; and constants that
            were taken on the way.
        """
        x = self._arithmetic.images(piece.x)
        images = {CLEAN: x, **{name: self._arithmetic.images(of.x) for name, of in further.items()}}
        labels = {name: of.y for name, of in further.items() if of.y is not None}
        known = {n: labels[need.on] for n, need in self._plan.needs.items() if isinstance(need, Labels)}
        crossing: dict[str, Crossing] = {}
        self._cross(images, crossing)
        for made, inner in self._plan.inner.items():
            if given is None:
                known |= self._take(images, crossing, {n: t for n, t in self._targets(made) if n not in known})
                with record_function("attack"):
                    images[made] = self._attack(made, inner, images, crossing, known, piece.y, streams)
                self._cross(images, crossing)
            else:  # what is given takes a gradient, through the prefix too
                images[made] = self._arithmetic.images(given)
                with self._arithmetic.autocast(x.device):
                    crossing[made] = self._passes.prefix(images[made])
        with torch.no_grad():
            images |= self._objective.views(images)
        return images, crossing, known

    def _targets(self, made: str) -> Iterator[tuple[str, Need]]:
        """Constants that the loss of an attack is given."""
        uses = self._plan.inner[made].uses
        return ((n, need) for n, need in self._plan.constant.items() if n in uses and need.on != made)

    def _cross(self, images: Mapping[str, Tensor], crossing: dict[str, Crossing]) -> None:
        """Run the frozen prefix on the images that are new, where anything behind it is needed."""
        for name in self._plan.crossing:
            if name in images and name not in crossing:
                with record_function("frozen prefix"), self._arithmetic.autocast(images[name].device):
                    crossing[name] = self._passes.constant(images[name])

    def _take(
        self, images: Mapping[str, Tensor], crossing: Mapping[str, Crossing], needs: Mapping[str, Need]
    ) -> dict[str, Tensor]:
        """Constants: what teachers and frozen parts say."""
        if not needs:
            return {}
        with torch.no_grad(), self._arithmetic.autocast(images[CLEAN].device):
            taken = self._passes.told(needs, images)
            rest = tuple(n for n in needs if n not in taken)
            if rest and rest not in self._plan.looks:
                self._plan.looks[rest] = self._passes.look({n: needs[n] for n in rest})
            return {**taken, **(self._plan.looks[rest](crossing) if rest else {})}

    def _descend(self, pieces: Sequence[_Piece], images: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the mean loss, in `.grad`; the loss, its terms and figures, and the number of correct images."""
        sums: dict[str, Tensor] = {}
        self._reference = []
        correct = torch.zeros((), dtype=torch.int64, device=pieces[0].y.device)
        for piece in pieces:
            share = len(piece.y) / images
            with record_function("loss: forward"):
                with self._arithmetic.autocast(piece.y.device):
                    look = self._plan.look if self._counted else self._plan.fast_look
                    seen = {**piece.known, **look(piece.crossing)}
                seen |= self._slopes_of(piece)
                loss = self._loss(piece.y, seen)
            if loss.constraint is not None:
                self._add_reference(loss.constraint * share)
            with record_function("loss: backward"):
                torch.autograd.backward(loss.total * share)
            for name, term in {"loss": loss.total, **loss.terms, **loss.figures}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share
            labels = piece.y if piece.y.dim() == 1 else piece.y.argmax(1)
            correct += (seen[self._objective.judged].argmax(1) == labels).sum()
        if self._memory:
            share = sum(len(piece.y) for piece in pieces) / images  # over all processes they add up to 1
            terms = self._objective.penalty(self._weights(), self._memory)
            for name, term in terms.items():
                torch.autograd.backward(term * share)
                for of in (name, "loss"):
                    sums[of] = sums.get(of, 0.0) + term.detach() * share
        return sums, correct

    def _weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._passes.model.named_parameters() if p.requires_grad}

    def _add_reference(self, constraint: Tensor) -> None:
        """Add the gradient of a loss that the update is not to raise."""
        parameters = self._passes.parameters()
        found = torch.autograd.grad(constraint, parameters, retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        if self._reference:
            torch._foreach_add_(self._reference, gradients)
        else:
            self._reference = gradients

    def _respect(self) -> None:
        """Take away the part of the gradient that would raise the constraint (Chaudhry et al. 2019, A-GEM, eq. 11)."""
        if not self._reference:
            return
        parameters = self._passes.parameters()
        both = [(p.grad, r) for p, r in zip(parameters, self._reference, strict=True) if p.grad is not None]
        along = torch.stack([(gradient * reference).sum() for gradient, reference in both]).sum()
        length = torch.stack([reference.square().sum() for reference in self._reference]).sum()
        factor = along.clamp_max(0.0) / length.clamp_min(torch.finfo(length.dtype).tiny)
        for gradient, reference in both:
            gradient.sub_(factor * reference)

    def _slopes_of(self, piece: _Piece) -> dict[str, Tensor]:
        """Gradients of the cross-entropy with respect to images, with a graph to what learns unless constant."""
        found = {}
        for name, need, look in self._plan.slopes:
            x = piece.images[need.on].detach().requires_grad_()
            with self._arithmetic.autocast(x.device):
                logits = look({need.on: self._passes.prefix(x)})[name]
            loss = F.cross_entropy(logits, piece.y, reduction="sum")
            (found[name],) = torch.autograd.grad(loss, x, create_graph=not need.constant)
        return found

    def _loss(self, y: Tensor, seen: Mapping[str, Tensor]) -> LossTerms:
        """The loss of a piece, with each image's share weighted by its class."""
        if self._class_weights is None:
            loss = self._objective.loss(y, seen)
            if not isinstance(loss, LossTerms):
                name, got = self._objective.registered_name, type(loss).__name__
                raise UserError(f"objective {name}: loss must return LossTerms, as LossTerms.sum_of gives; got {got}")
            return loss
        return weighted(self._objective, self._class_weights, y, seen)

    @contextmanager
    def _perturbed(self, pieces: Sequence[_Piece], images: int) -> Iterator[None]:
        """The weights moved to where the loss on these pieces is higher, if the stage perturbs them."""
        awp = self._stage.awp
        if awp is None or not self._perturbs:
            yield
            return
        self._optimiser.zero_grad(set_to_none=True)
        with still_buffers(self._passes.learners):
            self._descend(pieces, images)
        group().sum_(self._gradients())
        with awp.ascended(self._passes.parameters()):
            yield

    def _add_up(self, terms: dict[str, Tensor], correct: Tensor, share: float) -> None:
        """Gradients, terms and counts of the whole batch in every process, from those of its shares.

        One exchange a step and not DistributedDataParallel, which exchanges at every backward pass, so again for each
        micro-batch, and knows of parameters alone: here loss, counts and the statistics of batch norm travel along, so
        that all processes take or drop the step alike and attack the same network. What DDP would hide, the exchange
        behind the backward pass, is little: an adversarial step has ten and more passes for each exchange.

        Args:
            terms: of the loss, weighted by share, in place.
            correct: images, in place.
            share: of this process in the batch, in (0, 1].
        """
        processes = group()
        if processes.world == 1:
            return
        moved = self.guard.moved  # the mean over processes: running statistics are linear in those of a batch
        for statistic in moved:
            statistic.mul_(share)
        processes.sum_([*self._gradients(), *self._reference, *moved, *terms.values(), correct])

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._passes.parameters() if p.grad is not None]

    def _attack(
        self,
        made: str,
        inner: Inner,
        images: Mapping[str, Tensor],
        crossing: Mapping[str, Crossing],
        known: Mapping[str, Tensor],
        y: Tensor,
        streams: Streams,
    ) -> Tensor:
        """Make images by an inner maximisation: the whole batch, or a share of it in each lane."""
        if made != ATTACKED:  # several maximisations draw apart
            streams = streams.fork(made)
        within = (inner.attack or self._stage.attack, inner.threat or self._threat)
        climb = self._plan.climbs[made]
        given = climb.given(images, crossing, known)
        if self._stage.attack_mode == "train":
            return climb(*within, self._arithmetic, given, y, streams, plain=self._counted)
        if not self._counted and self._in_lanes and len(y) >= len(self._in_lanes) * LEAST_ROWS:
            return self._attack_in_lanes(made, within, given, y, streams)
        with in_eval_mode(self._passes.learners):
            return climb(*within, self._arithmetic, given, y, streams, plain=self._counted)

    def _attack_in_lanes(
        self, made: str, within: tuple[Attack, Threat], given: _Given, y: Tensor, streams: Streams
    ) -> Tensor:
        """The whole attack on a share of the batch in each thread: in eval mode, images do not know of one another."""
        count = len(self._in_lanes)
        edges = [len(y) * lane // count for lane in range(count + 1)]

        def share(climbs: Mapping[str, _Climb], first: int, end: int) -> Tensor:
            rows = slice(first, end)
            own = Streams(streams.keys[rows])
            return climbs[made](*within, self._arithmetic, given[rows], y[rows], own, plain=True)

        return torch.cat(list(pool(count).map(share, self._plan.climbs_in_lanes, edges[:-1], edges[1:])))


@dataclass(frozen=True)
class _Given:
    """Inputs of an attack on one set of images.

    Args:
        start: images that are perturbed.
        crossing: what targets are computed from, by the images' names.
        known: targets that are constants.
    """

    start: Tensor
    crossing: dict[str, Crossing]
    known: dict[str, Tensor]

    def __getitem__(self, rows: slice) -> _Given:
        crossing, known = (tree_map(lambda tensor: tensor[rows], of) for of in (self.crossing, self.known))
        return _Given(self.start[rows], crossing, known)


class _Climb:
    """An inner maximisation through some passes.

    Args:
        passes: the step's own, or those of a lane.
        needs: of the objective.
        made: name of the images that it makes.
        inner: how.
    """

    def __init__(self, passes: Passes, needs: Mapping[str, Need], made: str, inner: Inner) -> None:
        used = {**{name: needs[name] for name in inner.uses}, **inner.through}
        self._passes, self._made, self._inner = passes, made, inner
        own = {n: need for n, need in used.items() if need.on == made}
        self._asked = {
            n: need for n, need in own.items() if isinstance(need, Logits) and need.output in passes.teachers
        }
        self._look = passes.look({n: need for n, need in own.items() if n not in self._asked})
        self._constant = [n for n, need in used.items() if need.on != made and passes.is_constant(need)]
        targets = {n: need for n, need in used.items() if need.on != made and n not in self._constant}
        self._labels = [n for n, need in targets.items() if isinstance(need, Labels)]
        self._target = passes.look({n: need for n, need in targets.items() if n not in self._labels})
        self._fast: Callable[[Tensor], dict[str, Tensor]] = self._through

    def compile(self) -> None:
        """Let torch compile the pass that is climbed through."""
        self._fast = compiled(self._through, "the passes of the attack")

    def given(
        self, images: Mapping[str, Tensor], crossing: Mapping[str, Crossing], known: Mapping[str, Tensor]
    ) -> _Given:
        """Choose what it begins with from all that there is."""
        seen = {need.on for need in self._target.needs.values()}
        constants = {n: known[n] for n in (*self._constant, *self._labels)}
        return _Given(images[self._inner.start], {on: crossing[on] for on in seen}, constants)

    def _through(self, images: Tensor) -> dict[str, Tensor]:
        return self._look({self._made: self._passes.prefix(images)})

    def __call__(
        self,
        attack: Attack,
        threat: Threat,
        arithmetic: Arithmetic,
        given: _Given,
        y: Tensor,
        streams: Streams,
        *,
        plain: bool,
    ) -> Tensor:
        """Search; `plain`: not compiled."""
        device = given.start.device
        with torch.no_grad(), arithmetic.autocast(device):
            target = {**given.known, **(self._target(given.crossing) if self._target.needs else {})}
        through = self._through if plain else self._fast

        def climb(images: Tensor) -> Tensor:
            with arithmetic.autocast(device):
                laid = arithmetic.images(images)
                seen = through(laid)
                if self._asked:
                    seen |= self._passes.told(self._asked, {self._made: laid})
            values = self._inner.loss(y, {**target, **seen})
            if values.shape != y.shape[:1]:  # labels may be shares of classes
                raise UserError(
                    f"the loss that makes {self._made} images must give one value an image, [{len(y)}]; "
                    f'got {list(values.shape)}; write reduction="none"'
                )
            return values

        with arithmetic.reuse_casts(device):
            return maximise_within(cast("Maximiser", attack), climb, given.start, threat, streams)


def _estimated(needs: Mapping[str, Need]) -> dict[str, Need]:
    """The logits on which statistics of batch norm are estimated: of clean images, else of all that an output sees."""
    seen = {n: need for n, need in needs.items() if isinstance(need, Logits)}
    clean = {need.output for need in seen.values() if need.on == CLEAN}
    return {n: need for n, need in seen.items() if need.on == CLEAN or need.output not in clean}


def _lanes(passes: Passes, stage: Stage, count: int) -> list[Passes]:
    """Copies of the passes that share their tensors, in eval mode for good."""
    whole = nn.ModuleDict({"model": passes.model, "heads": passes.heads, "teachers": nn.ModuleDict(passes.teachers)})
    made = []
    for copied in twins(whole, count):
        model, heads, teachers = (copied.get_submodule(name) for name in ("model", "heads", "teachers"))
        beside = {"heads": dict(heads.named_children()), "teachers": dict(teachers.named_children())}
        made.append(Passes(model, stage.train, deployed=stage.output, **beside))
        copied.eval()
    return made
