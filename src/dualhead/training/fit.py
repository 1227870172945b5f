"""A stage without training: parameters of an aggregator chosen by trying them on the held-out images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dualhead.attacks import predictions
from dualhead.data import Batch, batches
from dualhead.errors import Interrupted, UserError
from dualhead.heads import Chosen, DualHeadClassifier, Output
from dualhead.names import AGGREGATE
from dualhead.noise import Streams
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.flops import CountFlops
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.training.checkpoint import Position
from dualhead.training.choices import Fit
from dualhead.training.validation import Validator

logger = logging.getLogger(__name__)

LEAST_LOG_PROBABILITY = -80.0
"""A probability below exp of it vanishes in float32, and its gradient with it."""


class Selection:
    """Chooses, for a model, among its aggregator's candidates.

    Args:
        model: whose heads are trained; its aggregator is given what is chosen.
        fit: how.
        validator: held-out images, and the attack.
        arithmetic: number format of the passes.
        device: where the model is.
        stop: asked before every attack; when true the selection ends with `Interrupted`, and begins anew next time.

    Raises:
        UserError: if the aggregator has no candidates.
    """

    def __init__(
        self,
        model: DualHeadClassifier,
        fit: Fit,
        validator: Validator,
        arithmetic: Arithmetic,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_choosable(model)
        self._model, self._aggregator, self._fit = model, cast("Chosen", model.aggregator), fit
        self._validator, self._arithmetic, self._device, self._stop = validator, arithmetic, device, stop
        self._flops = 0
        self._known: list[Tensor] = []
        """Head logits [n, H, C] of this process's images, clean and under each attack so far."""

    def run(self, position: Position) -> Position:
        """Choose.

        Args:
            position: at the stage's beginning.

        Returns:
            The position at its end; `best` holds what was chosen and its accuracies on the held-out images.
        """
        began, tried = time.monotonic(), []
        with in_eval_mode(self._model):
            self._known = [self._of_clean()]
            self._labels = torch.cat([batch.y for batch in self._batches()])
            self._known += [self._under_attack(output) for output in self._model.outputs[:-1]]
            candidates = self._aggregator.candidates()
            for _ in range(self._fit.rounds):
                chosen = self._best(candidates)
                if chosen in tried:
                    break
                tried.append(chosen)
                self._aggregator.assign(chosen)
                self._known.append(self._under_attack(AGGREGATE))
            best = self._best(tried)
            self._aggregator.assign(best)
            clean, robust, _ = self._counts([best]).tolist()[0]
            reference = self._reference()
        count = len(self._validator.split)
        if robust < self._least(reference):
            logger.warning(
                "no candidate keeps the robust accuracy of head 1 (%.3f) but for %g; the most robust one is taken, "
                "with %.3f", reference / count, self._fit.max_loss, robust / count,
            )  # fmt: skip
        line: dict[str, Any] = {
            **best, "attacked_candidates": len(tried),
            "validation_clean": clean / count, "validation_robust": robust / count,
        }  # fmt: skip
        flops = position.flops + sum(group().gather(self._flops))
        return replace(position, flops=flops, seconds=position.seconds + time.monotonic() - began, best=line)

    def _batches(self) -> Iterator[Batch]:
        split = self._validator.split
        return batches(split, self._validator.batch_size, self._device, group().share_of(len(split)))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with CountFlops() as counter:
            yield
        self._flops += counter.total

    def _of_clean(self) -> Tensor:
        head_logits = self._arithmetic.wrap(self._model.head_logits)
        with self._counted(), torch.no_grad():
            return torch.cat([head_logits(batch.x) for batch in self._batches()])

    def _under_attack(self, output: Output) -> Tensor:
        if group().any(self._stop())[0]:
            raise Interrupted("stopped while fitting the aggregator; the same command begins this stage anew")
        validator, found = self._validator, []
        head_logits = self._arithmetic.wrap(self._model.head_logits)
        logits_fn = self._arithmetic.wrap(self._model.view(output))
        for batch in self._batches():
            streams = Streams.of(validator.seed, batch.index).fork("fit", output)
            with self._counted():
                x_adv = validator.attack(logits_fn, batch.x, batch.y, validator.threat, generator=streams)
                with torch.no_grad():
                    found.append(head_logits(x_adv))
        return torch.cat(found)

    def _counts(self, candidates: Sequence[Mapping[str, float]]) -> Tensor:
        """Count for each candidate images right when clean and under everything, and vanishing probabilities."""
        known = torch.cat(self._known)
        rows = torch.zeros(len(candidates), 3, device=self._device)
        with torch.no_grad():
            for row, settings in zip(rows, candidates, strict=True):
                self._aggregator.assign(settings)
                logits = self._aggregator(known)
                right = (predictions(logits).view(len(self._known), -1) == self._labels).float()
                row[0], row[1] = right[0].sum(), right.amin(0).sum()
                row[2] = (logits.log_softmax(1) < LEAST_LOG_PROBABILITY).sum()
        group().sum_([rows])
        return rows.to(torch.int64)

    def _reference(self) -> int:
        """Count the images that head 1 gets right under everything."""
        right = torch.stack([predictions(logits[:, 0]) == self._labels for logits in self._known])
        robust = right.all(0).sum().float()
        group().sum_([robust])
        return int(robust)

    def _least(self, reference: int) -> float:
        return reference - self._fit.max_loss * len(self._validator.split)

    def _best(self, candidates: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        least = self._least(self._reference())

        def rank(place: int) -> tuple[bool, bool, int, int]:
            clean, robust, vanishing = counts[place]
            kept = robust >= least
            return vanishing == 0, kept, clean if kept else robust, robust

        counts = self._counts(candidates).tolist()
        return candidates[max(range(len(candidates)), key=rank)]


def check_choosable(model: object) -> None:
    """Refuse a model whose aggregator a stage with `fit` cannot choose.

    Raises:
        UserError: if its aggregator has no candidates.
    """
    if not isinstance(model, DualHeadClassifier) or not isinstance(model.aggregator, Chosen):
        raise UserError("fit is for an aggregator whose parameters are chosen, mixed_nuts; train the others")
