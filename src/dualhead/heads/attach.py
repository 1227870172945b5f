"""A second head for any classifier."""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.heads.aggregators import Aggregator, aggregators, default_aggregator
from dualhead.heads.classifier import DualHeadClassifier
from dualhead.heads.reset import reset_tail
from dualhead.heads.splitting import Split, split_model
from dualhead.heads.splitting.base import undisturbed

Init = Literal["reset", "clone"]


def attach_second_head(
    model: nn.Module,
    at: str,
    *,
    example: Tensor,
    num_classes: int | None = None,
    init: Init | nn.Module = "reset",
    aggregator: str | Aggregator | nn.Module | None = None,
) -> DualHeadClassifier:
    """A dual-head classifier from a classifier: its layers up to `at` as the trunk, those behind it twice.

    The model is copied and left as it is; the classifier is in the model's mode. Everything in it trains, except
    for parameters that the model has fixed.

    Args:
        model: images [B, ...] to logits, as a tensor or within what it returns (see `as_logits`).
        at: the submodule at whose output the second head begins; `dualhead layers` lists them.
        example: images [B, ...] that the model accepts.
        num_classes: C, checked against the model; None to take it from the model.
        init: `reset`, the second head starts from fresh weights (see `reset_tail`); `clone`, from the first head's; or
            a module from what crosses the cut to logits [B, C].
        aggregator: name, component or module; None for the paper's up to 20 classes and `pairwise_shared` beyond.

    Raises:
        UserError: if the model cannot be cut there, has another number of classes, or its head cannot be reset.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model = copy.deepcopy(model).requires_grad_()  # frozen as a whole, for evaluation: no wish for what trains here
    split = split_model(model, at, example)
    num_outputs = _num_outputs(split, split.tail, example)
    if num_classes not in (None, num_outputs):
        raise UserError(
            f"num_classes is {num_classes}, but the model gives {num_outputs} logits; replace its last layer"
        )
    if isinstance(init, nn.Module):
        head2 = init
        if (given := _num_outputs(split, head2, example)) != num_outputs:
            raise UserError(f"the second head given as init gives {given} logits; the model gives {num_outputs}")
    elif init in ("reset", "clone"):
        head2 = split.second_tail()
        if init == "reset":
            reset_tail(model, head2)
    else:
        raise UserError(f"init {init!r} is not known; use reset, clone or a module")
    if not isinstance(aggregator, nn.Module):
        component = aggregators.build(default_aggregator(num_outputs) if aggregator is None else aggregator)
        aggregator = component.create(num_outputs)
    reference = next(model.parameters())
    aggregator = aggregator.to(reference.device)
    return DualHeadClassifier(split, head2, aggregator, num_outputs).train(model.training)


def _num_outputs(split: Split, head: nn.Module, example: Tensor) -> int:
    images = example[:2]
    with undisturbed(images, split.trunk, head):
        logits = head.eval()(split.trunk.eval()(images))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"a head must give logits [B, C]; got {shape} for {len(images)} images")
    return logits.shape[1]
