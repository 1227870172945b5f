"""One update: attack the batch, one forward, one backward, one step of the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from dualhead.attacks import Maximiser
from dualhead.data import Batch
from dualhead.noise import Streams
from dualhead.objectives import LossTerms
from dualhead.system.processes import group
from dualhead.system.replicas import LEAST_ROWS, pool, twins
from dualhead.system.runtime import Arithmetic, compiled, in_eval_mode
from dualhead.threats import ThreatModel
from dualhead.training.activation_checkpointing import blocks, recomputed, still_buffers
from dualhead.training.free import CarriedPerturbation
from dualhead.training.guard import StepGuard
from dualhead.training.helper import HelperExamples, HelperTerm
from dualhead.training.passes import Features, LossForward, Program
from dualhead.training.stage import Stage


@dataclass(frozen=True)
class StepOutcome:
    """What a step leaves for the log, over all processes, as tensors on the device: reading them is up to the log."""

    terms: dict[str, Tensor]
    """Scalars: the loss and its parts."""
    taken: Tensor
    """Whether the update was made: bool scalar, False where loss or gradient was not finite."""
    correct: Tensor
    """How many of the batch's images, attacked if the objective attacks, were classified correctly."""


@dataclass(frozen=True)
class _Piece:
    """Part of a batch, ready for the loss: what the frozen prefix makes of it clean and attacked, and labels."""

    clean: Features | None
    attacked: Features | None
    y: Tensor
    helped: HelperExamples | None = None


class TrainingStep:
    """The step of a stage, with as few passes as its objective allows.

    The clean target of an objective is computed once a batch; the attack asks for input gradients only; a frozen
    prefix is run once for the clean batch and once for the attacked one.

    With `micro_batch`, the batch is attacked piece by piece and gradients add up over the pieces: exactly those of the
    whole batch for losses that are means over images, except for batch norm that trains, whose statistics are then
    those of a piece. With `checkpoint_activations` they are exact for any network.

    Args:
        program: what of the network runs.
        stage: objective, attack and their settings.
        threat: ball and box.
        optimiser: over `program.parameters()`.
        arithmetic: number format of the passes.
        forward: `LossForward` of the program, or a wrapper around it.
        helper: the model that the stage's `helper` names; None if it names none.

    Attributes:
        guard: drops updates that are not finite, and counts them.
        carried: the perturbation that goes on from step to step; None unless the stage trains for free.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        threat: ThreatModel,
        optimiser: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        forward: nn.Module | None = None,
        helper: nn.Module | None = None,
    ) -> None:
        self._program = program
        self._stage = stage
        self._threat = threat
        self._optimiser = optimiser
        self._arithmetic = arithmetic
        self.guard = StepGuard(program.model, optimiser, stage.clip_norm)
        self.carried = None if stage.free is None else CarriedPerturbation(stage.free, threat)
        self._perturbs = False
        self._objective = stage.objective
        self._helper = None
        if stage.helper is not None:
            assert helper is not None, "the run must give the model that the stage asks for"
            self._helper = HelperTerm(stage.helper, helper, program, arithmetic)
        self._forward = forward or LossForward(program, joint=stage.forward == "joint")
        self._forgetful = blocks(program.model) if stage.checkpoint_activations else []
        self._in_lanes: list[Program] = []
        self._counted = False
        # A count of operations sees nothing of a compiled pass, so both forms stay.
        self._fast_forward: Callable[..., tuple[Tensor | None, Tensor | None]] = self._forward
        self._fast_attacked = program.attacked_logits
        if arithmetic.compiled:
            self._fast_forward = compiled(self._forward, "the passes of the loss")
            self._fast_attacked = compiled(program.attacked_logits, "the passes of the attack")
        if arithmetic.lanes > 1 and stage.attack_mode == "eval" and not stage.checkpoint_activations:
            copies = twins(program.model, arithmetic.lanes)  # in eval mode for good
            self._in_lanes = [Program.of(copied, stage) for copied in copies]
            for copied in copies:
                copied.eval()

    def begin(self, epoch: int) -> bool:
        """Prepare for an epoch, counted from 0; whether its steps differ in cost from those of the one before."""
        awp = self._stage.awp
        self._objective = self._stage.objective.at(epoch)
        self._perturbs = awp is not None and epoch >= awp.start
        return awp is not None and epoch == awp.start

    def __call__(self, batch: Batch, streams: Streams, *, one_thread: bool = False) -> StepOutcome:
        """Train on a batch.

        Args:
            batch: images float32 [B, C, H, W] in [0, 1] and labels int64 [B].
            streams: the randomness of these samples in this epoch.
            one_thread: ask the model in the caller's thread only and as it is, not compiled, so that whoever counts
                there sees all passes.
        """
        self._counted = one_thread
        images = batch.total or len(batch)
        self._program.model.train()
        self.guard.remember()
        attacked = None if self.carried is None else self.carried.attacked(batch.x)
        with recomputed(self._forgetful):
            pieces = [self._prepare(piece, part, given) for piece, part, given in self._cut(batch, streams, attacked)]
            with self._perturbed(pieces, images):
                self._optimiser.zero_grad(set_to_none=True)
                terms, correct = self._descend(pieces, images)
        self.guard.settle()
        self._add_up(terms, correct, len(batch) / images)
        with record_function("update"):
            taken = self.guard.step(terms["loss"])
            if self.carried is not None and attacked is not None:
                self.carried.ascend(batch.x, attacked, taken)
        return StepOutcome(terms, taken, correct)

    def _cut(
        self, batch: Batch, streams: Streams, attacked: Tensor | None
    ) -> Iterator[tuple[Batch, Streams, Tensor | None]]:
        size = self._stage.micro_batch or len(batch)
        if size >= len(batch):
            yield batch, streams, attacked
            return
        for rows in torch.split(torch.arange(len(batch), device=batch.y.device), size):
            given = None if attacked is None else attacked[rows]
            yield Batch(batch.index[rows], batch.x[rows], batch.y[rows]), streams[rows], given

    def _prepare(self, piece: Batch, streams: Streams, given: Tensor | None = None) -> _Piece:
        """Attack a piece, unless its attacked images are given, and run the frozen prefix."""
        objective = self._objective
        x = self._arithmetic.images(piece.x)
        clean = attacked = helped = None
        if objective.clean or objective.clean_target:
            clean = self._constant(x)
        if objective.adversarial:
            if given is None:
                with record_function("attack"):
                    x_adv = self._attack(x, clean, piece.y, streams)
                attacked = self._constant(x_adv)
            else:  # what is given takes a gradient, through the prefix too
                x_adv = self._arithmetic.images(given)
                with self._arithmetic.autocast(x.device):
                    attacked = self._program.prefix(x_adv)
            helped = self._helper.examples(x, x_adv) if self._helper is not None else None
        return _Piece(clean if objective.clean else None, attacked, piece.y, helped)

    def _constant(self, x: Tensor) -> Features:
        with record_function("frozen prefix"), self._arithmetic.autocast(x.device):
            return self._program.constant(x)

    def _descend(self, pieces: Sequence[_Piece], images: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the mean loss, in `.grad`; the loss and its terms, and the number of correct images."""
        sums: dict[str, Tensor] = {}
        correct = torch.zeros((), dtype=torch.int64, device=pieces[0].y.device)
        for piece in pieces:
            share = len(piece.y) / images
            with record_function("loss: forward"):
                with self._arithmetic.autocast(piece.y.device):
                    forward = self._forward if self._counted else self._fast_forward
                    clean_logits, adv_logits = forward(piece.clean, piece.attacked)
                loss = self._objective.loss(clean_logits, adv_logits, piece.y)
                if self._helper is not None and piece.helped is not None:
                    term = self._helper.loss(piece.helped)
                    loss = LossTerms(loss.total + term, {**loss.terms, "helper": term})
            with record_function("loss: backward"):
                torch.autograd.backward(loss.total * share)
            for name, term in {"loss": loss.total, **loss.terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share
            judged = cast("Tensor", clean_logits if adv_logits is None else adv_logits)
            judged = judged[:, -1] if judged.dim() == 3 else judged
            labels = piece.y if piece.y.dim() == 1 else piece.y.argmax(1)
            correct += (judged.argmax(1) == labels).sum()
        return sums, correct

    @contextmanager
    def _perturbed(self, pieces: Sequence[_Piece], images: int) -> Iterator[None]:
        """The weights moved to where the loss on these pieces is higher, if the stage perturbs them."""
        awp = self._stage.awp
        if awp is None or not self._perturbs:
            yield
            return
        self._optimiser.zero_grad(set_to_none=True)
        with still_buffers(self._program.model):
            self._descend(pieces, images)
        group().sum_(self._gradients())
        with awp.ascended(self._program.parameters()):
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
        processes.sum_([*self._gradients(), *moved, *terms.values(), correct])

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._program.parameters() if p.grad is not None]

    def _attack(self, x: Tensor, clean: Features | None, y: Tensor, streams: Streams) -> Tensor:
        if self._stage.attack_mode == "train":
            return self._climb(self._program, x, clean, y, streams)
        if not self._counted and self._in_lanes and len(y) >= len(self._in_lanes) * LEAST_ROWS:
            return self._climb_in_lanes(x, clean, y, streams)
        with in_eval_mode(self._program.model):
            return self._climb(self._program, x, clean, y, streams)

    def _climb_in_lanes(self, x: Tensor, clean: Features | None, y: Tensor, streams: Streams) -> Tensor:
        """The whole attack on a share of the batch in each thread: in eval mode, images do not know of one another."""
        count = len(self._in_lanes)
        edges = [len(y) * lane // count for lane in range(count + 1)]

        def climb(program: Program, first: int, end: int) -> Tensor:
            rows = slice(first, end)
            features = None if clean is None else tree_map(lambda values: values[rows], clean)
            return self._climb(program, x[rows], features, y[rows], Streams(streams.keys[rows]))

        return torch.cat(list(pool(count).map(climb, self._in_lanes, edges[:-1], edges[1:])))

    def _climb(self, program: Program, x: Tensor, clean: Features | None, y: Tensor, streams: Streams) -> Tensor:
        objective, target = self._objective, None
        if objective.clean_target:
            with torch.no_grad(), self._arithmetic.autocast(x.device):
                target = program.target_suffix(clean).float()
        attack = cast("Maximiser", self._stage.attack)
        as_it_is = self._counted or program is not self._program  # a lane's
        logits_fn = self._arithmetic.wrap(program.attacked_logits if as_it_is else self._fast_attacked)
        with self._arithmetic.reuse_casts(x.device):
            return attack.maximise(
                lambda images: objective.inner_loss(logits_fn(images), target, y), x, self._threat, streams
            )
