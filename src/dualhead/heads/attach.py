"""A second head for any classifier, or more."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_leaves

from dualhead.errors import UserError
from dualhead.heads.aggregators import Aggregator, aggregators, default_aggregator
from dualhead.heads.classifier import DualHeadClassifier
from dualhead.heads.reset import reset_tail
from dualhead.heads.splitting import Cut, guard_features, split_model
from dualhead.heads.splitting.base import reason, undisturbed
from dualhead.heads.splitting.cut import two_images
from dualhead.heads.tied import DEFAULT_OWN, refuse_reassigned, tie

Init = Literal["reset", "clone", "tied"]


def attach_second_head(
    model: nn.Module,
    at: str,
    *,
    example: Tensor,
    num_classes: int | None = None,
    heads: int = 2,
    init: Init | nn.Module = "reset",
    own: Sequence[str] | None = None,
    aggregator: str | Aggregator | nn.Module | None = None,
) -> DualHeadClassifier:
    """A dual-head classifier from a classifier: its layers up to `at` as the trunk, those behind it for each head.

    The model is copied and left as it is; the classifier is in the model's mode. Everything in it trains, except
    for parameters that the model has fixed.

    Args:
        model: images [B, ...] to logits, as a tensor or within what it returns (see `logits_of`).
        at: the submodule at whose output the further heads begin; `dualhead layers` lists them. `input`: the images, so
            that each head is a whole network.
        example: images [B, ...] that the model accepts.
        num_classes: C, checked against the model; None to take it from the model.
        heads: H, the first one included, at least 2.
        init: `reset`, the further heads start from fresh weights (see `reset_tail`); `clone`, from the first head's;
            `tied`, they share the first head's tensors for good, but for those in `own`; or a module from what crosses
            the cut to logits [B, C], the second head of two.
        own: of tied heads, what each has of its own, to begin with a copy of the first head's: `batch_norm`, `affine`,
            `statistics`, or patterns of names (see `own_names`). None: `batch_norm`.
        aggregator: name, component or module; None for the paper's up to 20 classes and `pairwise_shared` beyond.

    Raises:
        UserError: if the model cannot be cut there, has another number of classes, its head cannot be reset or tied, or
            the aggregator does not take so many heads.
    """
    _refuse_unknown(init, own)
    if heads < 2:
        raise UserError(f"heads must be at least 2, the model's own included; got {heads}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model = copy.deepcopy(model).requires_grad_()  # frozen as a whole, for evaluation: no wish for what trains here
    cut = split_model(model, at, example)
    num_outputs, shapes = _num_outputs(cut, cut.tail, example)
    if num_classes not in (None, num_outputs):
        raise UserError(
            f"num_classes is {num_classes}, but the model gives {num_outputs} logits; replace its last layer"
        )
    tied: frozenset[str] = frozenset()
    if isinstance(init, nn.Module):
        if heads != 2:
            raise UserError(f"a module as init is the second head of two, and heads is {heads}; use reset or clone")
        others = [init]
        if (given := _num_outputs(cut, init, example)[0]) != num_outputs:
            raise UserError(f"the second head given as init gives {given} logits; the model gives {num_outputs}")
        guard_features(cut, two_images(example), init)
    else:
        others = [cut.another_tail() for _ in range(heads - 1)]
        for head in others:
            if init == "reset":
                reset_tail(model, head)
            elif init == "tied":
                tied = tie(cut.tail, head, DEFAULT_OWN if own is None else own)
                refuse_reassigned(head, tied, two_images(example), cut.trunk)
    reference = next(model.parameters())
    if not isinstance(aggregator, nn.Module):
        component = aggregators.build(default_aggregator(num_outputs) if aggregator is None else aggregator)
        aggregator = component.create_over(shapes, num_outputs, heads)
        aggregator = aggregator.to(torch.promote_types(reference.dtype, torch.float32))  # as logits are merged
    aggregator = aggregator.to(reference.device)
    return DualHeadClassifier(cut, others, aggregator, num_outputs, tied=tied).train(model.training)


def _refuse_unknown(init: object, own: Sequence[str] | None) -> None:
    if not isinstance(init, nn.Module) and init not in get_args(Init):
        raise UserError(f"init {init!r} is not known; use reset, clone, tied or a module")
    if own is not None and init != "tied":
        raise UserError("own says what tied heads do not share, and other heads share nothing; use init='tied'")


def _num_outputs(cut: Cut, head: nn.Module, example: Tensor) -> tuple[int, list[Size]]:
    """Return how many logits a head gives, and the shape of one image's features for each tensor that it takes."""
    images = example[:2]
    with undisturbed(images, cut.trunk, head):
        features = cut.trunk.eval()(images.clone())
        try:
            logits = head.eval()(features)
        except Exception as error:  # whatever somebody else's head may raise
            crossing = [list(f.shape) for f in ((features,) if isinstance(features, Tensor) else features)]
            raise UserError(
                f"a head must take what crosses the cut, of shape {', '.join(map(str, crossing))}: {reason(error)}"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"a head must give logits [B, C]; got {shape} for {len(images)} images")
    return logits.shape[1], [tensor.shape[1:] for tensor in tree_leaves(features)]
