"""A classifier with two heads or more on one trunk, and what training needs of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Self, cast

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dualhead.errors import UserError
from dualhead.heads.aggregators.base import SeesFeatures
from dualhead.heads.aggregators.mean import MeanOfHeads
from dualhead.heads.joint_pass import Rows, joint_pass
from dualhead.heads.splitting import Cut, Features, How
from dualhead.heads.tied import moving_modules, share_tensors, tensors_by_name
from dualhead.names import (
    AGGREGATE,
    AGGREGATOR,
    MEAN,
    MODEL,
    TRUNK,
    head_id,
    is_head,
    is_merging,
    is_router,
    outputs_of,
    parts_of,
)


def _checked(kind: str, others: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if not is_head(name) and not is_router(name) and name not in others:
            raise UserError(f": must be {kind}, one of head1, head2, ..., {', '.join(others)}; got {name!r}")
        return name

    return AfterValidator(check)


Part = Annotated[str, _checked("a part", (TRUNK, AGGREGATOR, MODEL))]
"""A piece that learns or is frozen as one: trunk, a head, aggregator or one of its routers, or a plain model."""

Output = Annotated[str, _checked("an output", (MEAN, AGGREGATE))]
"""Whose logits a view gives: a head's, their mean's, a router's or the aggregate's."""


def depends_on(output: str, part: str) -> bool:
    """Whether an output runs a part. Of tied heads see `DualHeadClassifier.is_shaped_by` too."""
    if is_head(output):
        return part in (TRUNK, output)
    if part == TRUNK or is_head(part):
        return True
    return is_merging(part) if output == AGGREGATE else is_router(output) and part in (output, AGGREGATOR)


class _KeepFrozen:
    """A pre-hook by which a frozen part is in evaluation mode whenever it runs, whoever called `.train()` on what.

    Args:
        apart: modules inside that are parts of their own, and stay as they are.
    """

    def __init__(self, apart: Sequence[nn.Module] = ()) -> None:
        self.frozen = False
        self._apart = tuple(apart)

    def __call__(self, module: nn.Module, args: object) -> None:
        del args
        if self.frozen:
            self.hold(module)

    def hold(self, module: nn.Module) -> None:
        """Put the part into evaluation mode."""
        if not self._apart:
            module.eval()
            return
        others = {id(inside) for part in self._apart for inside in part.modules()}
        for inside in module.modules():
            if id(inside) not in others:
                inside.training = False


def mean_of(head_logits: Tensor) -> Tensor:
    """The mean [B, C] of head logits [B, H, C], at least in float32 whatever the heads compute in."""
    return head_logits.to(torch.promote_types(head_logits.dtype, torch.float32)).mean(1)


class DualHeadClassifier(nn.Module):
    """Two heads or more on one trunk, and an aggregator over their logits (Jiang et al. 2021, arXiv 2104.10377).

    To everybody who does not train it, it is an ordinary classifier: images [B, ...] to logits [B, C].

    Args:
        cut: the model that was cut; its tail becomes the first head.
        others: the heads after the first, at least one, each what crosses the cut to logits [B, C].
        aggregator: head logits [B, H, C] to logits [B, C]; a `SeesFeatures` gets what crosses the cut too.
        num_classes: C.
        tied: names of the tensors that each further head shares with the first; empty: heads of their own.

    Attributes:
        heads: names of the heads: `head1`, `head2`, ...
        routers: names of the aggregator's routers, if it has any: `router1`, `router2`, ...
        parts: of what it consists, in the order of a pass: `trunk`, the heads, the routers, `aggregator`.
        outputs: whose logits a view can give: the heads, `mean`, the routers, `aggregate`.
    """

    trunk: nn.Module
    head1: nn.Module
    head2: nn.Module
    aggregator: nn.Module

    def __init__(
        self,
        cut: Cut,
        others: Sequence[nn.Module],
        aggregator: nn.Module,
        num_classes: int,
        *,
        tied: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.tied = frozenset(tied)
        self.heads = tuple(map(head_id, range(1, len(others) + 2)))
        self.routers = aggregator.routers if isinstance(aggregator, SeesFeatures) else ()
        self.parts = parts_of(self.heads, self.routers)
        self.outputs = outputs_of(self.heads, self.routers)
        own = [part for part in self.parts if not is_router(part)]
        for name, module in zip(own, (cut.trunk, cut.tail, *others, aggregator), strict=True):
            self.add_module(name, module)
        self.num_classes = num_classes
        self.split_at = cut.at
        self.split_how: How = cut.how
        self._fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        routers = [self.part(name) for name in self.routers]
        self._freezers = {name: _KeepFrozen(routers if name == AGGREGATOR else ()) for name in self.parts}
        for name, freezer in self._freezers.items():
            self.part(name).register_forward_pre_hook(freezer)
        self._still = {head: _KeepFrozen() for head in self.heads[1:]}  # of layers whose statistics are head 1's
        for head, module in self._moving():
            module.register_forward_pre_hook(self._still[head])

    def _moving(self, heads: Collection[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
        """Further heads, each with every layer in it that would move head 1's buffers."""
        for head in self.heads[1:]:
            if self.tied and (heads is None or head in heads):
                yield from ((head, module) for module in moving_modules(self.get_submodule(head), self.tied))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, as `.to()` and its like do; tied tensors are one afterwards too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self._tie_to("head1")
        return self

    def _tie_to(self, source: str) -> None:
        """Torch moves the same buffer of two modules to two copies; put one head's tensors back into the others."""
        for head in self.heads:
            if self.tied and head != source:
                share_tensors(self.get_submodule(source), self.get_submodule(head), self.tied)

    @property
    def added_parameters(self) -> int:
        """Numbers in the parameters that the heads after the first have of their own."""
        known = {id(p) for part in ("trunk", "head1") for p in self.get_submodule(part).parameters()}
        further = {id(p): p.numel() for head in self.heads[1:] for p in self.get_submodule(head).parameters()}
        return sum(count for key, count in further.items() if key not in known)

    def is_shaped_by(self, output: str, part: str) -> bool:
        """Whether training a part changes an output: a part that it runs, or head 1, to which its heads are tied."""
        runs = depends_on(output, part) and (not is_head(part) or part in self.heads_of(output))
        return runs or bool(self.tied and part == "head1")

    @property
    def is_mean(self) -> bool:
        """Whether the aggregate is the mean of the heads' logits."""
        return isinstance(self.aggregator, MeanOfHeads)

    def part(self, name: str) -> nn.Module:
        """Return the module of a part; a router's lies in the aggregator."""
        return self.aggregator.get_submodule(name) if is_router(name) else self.get_submodule(name)

    def heads_of(self, output: str) -> tuple[str, ...]:
        """Return the heads that an output runs; a router may look at some of them alone."""
        if is_head(output):
            return (output,)
        return self.heads[: cast("SeesFeatures", self.part(output)).known] if is_router(output) else self.heads

    @property
    def sees_features(self) -> bool:
        """Whether the aggregator sees what crosses the cut beside the heads' logits."""
        return isinstance(self.aggregator, SeesFeatures)

    @property
    def shown_outputs(self) -> tuple[str, ...]:
        """The outputs that `all_logits` gives."""
        return (*self.heads, *self.routers, MEAN if self.is_mean else AGGREGATE)

    def features(self, x: Tensor) -> Features:
        """Run the trunk once on images [B, ...]; return what crosses the cut, a tensor or a tuple of tensors."""
        return self.trunk(x)

    def head(self, name: str, features: Features) -> Tensor:
        """Logits [B, C] of a head, `head1`, `head2`, ..., from what crosses the cut."""
        logits: Tensor = self.get_submodule(name)(features)
        return logits

    @property
    def shares_statistics(self) -> bool:
        """Whether tied heads have running statistics in common, so that in a joint pass they are of all rows."""
        return any(name.rpartition(".")[2] == "running_mean" for name in self.tied)

    @property
    def own_of_tied(self) -> frozenset[str]:
        """Names of the tensors that each tied head has of its own."""
        return frozenset(tensors_by_name(self.head1)) - self.tied

    def heads_together(self, heads: Sequence[str], features: Features, rows: Rows) -> Tensor:
        """Logits [B, C] of tied heads in one pass, each on the rows of its set of images (see `joint_pass`).

        Args:
            heads: the head of each set.
            features: what crosses the cut, the sets one after another.
            rows: how many are of each set, and which sets batch norm takes its statistics from.
        """
        with joint_pass([self.get_submodule(head) for head in heads], rows, self.own_of_tied) as first:
            logits: Tensor = first(features)
        return logits

    def merge(self, output: str, head_logits: Tensor, features: Features | None = None) -> Tensor:
        """Logits [B, C] of `mean`, a router or `aggregate`, at least in float32 whatever the heads compute in.

        Args:
            output: which one.
            head_logits: [B, H, C]; for a router those of `heads_of` suffice.
            features: what crosses the cut; needed if the aggregator sees it.
        """
        if output == MEAN:
            return mean_of(head_logits)
        return self._merge(self.part(output) if is_router(output) else self.aggregator, head_logits, features)

    def look(self, router: str, features: Features) -> None:
        """Run what a router makes of what crosses the cut, without any head: for hooks on its layers."""
        module = cast("SeesFeatures", self.part(router))
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            module.look(self._wide(features))

    def _wide(self, tensors: Any) -> Any:
        """Tensors in the type in which heads are merged, at least float32."""
        return tree_map(lambda tensor: tensor.to(self._merging_type(tensor)), tensors)

    def _merging_type(self, tensor: Tensor) -> torch.dtype:
        own = next(self.aggregator.parameters(), tensor).dtype  # logits may be of another type than weights
        return torch.promote_types(own, torch.float32)

    def _merge(self, merging: Callable[..., Tensor], head_logits: Tensor, features: Features | None) -> Tensor:
        # It costs little beside the heads, and bf16 turns gradients round where an aggregator's map is steep.
        with torch.autocast(head_logits.device.type, enabled=False):
            wide = self._wide(head_logits)
            if not self.sees_features:
                return merging(wide)
            assert features is not None, "an aggregator that sees features needs them"
            return merging(wide, self._wide(features))

    def aggregate(self, head_logits: Tensor, features: Features | None = None) -> Tensor:
        """Logits [B, C] of the aggregate; see `merge`."""
        return self.merge(AGGREGATE, head_logits, features)

    def _each(self, features: Features, output: str = MEAN) -> Tensor:
        """Logits of all heads that an output runs [B, H, C] from what crosses the cut."""
        return torch.stack([self.head(name, features) for name in self.heads_of(output)], 1)

    def head_logits(self, x: Tensor) -> Tensor:
        """Logits of all heads [B, H, C] from images [B, ...]; runs the trunk once."""
        return self._each(self.features(x))

    def before_merging(self, x: Tensor, output: str = AGGREGATE) -> tuple[Tensor, Features]:
        """All that an output merges, from a pass of images [B, ...]: head logits [B, H, C], and features."""
        features = self.features(x)
        return self._each(features, output), features

    def all_logits(self, x: Tensor) -> Tensor:
        """Logits of `shown_outputs` [B, O, C] from images [B, ...], from one pass: what attacks may see.

        Those of heads and routers may differ by a constant in each image from the outputs', see `SeesFeatures.shown`.
        """
        head_logits, features = self.before_merging(x)
        if isinstance(self.aggregator, SeesFeatures):
            return self._merge(self.aggregator.shown, head_logits, features)
        return torch.cat((head_logits, self.aggregate(head_logits)[:, None]), 1)  # of the wider type

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of the aggregate from images [B, ...]."""
        return self.aggregate(*self.before_merging(x))

    def view(self, output: Output) -> HeadView:
        """An ordinary classifier over these very modules, that runs only what its output needs.

        Args:
            output: a head, `mean` (of the heads' logits), a router or `aggregate`.

        Raises:
            UserError: for any other output.
        """
        if is_router(output):
            return RouterView(self, output)
        return MeanView(self, output) if output == MEAN else HeadView(self, output)

    def set_trainable(self, parts: AbstractSet[str]) -> None:
        """Train these parts and freeze all others.

        Frozen means: no parameter asks for a gradient or keeps one, and the part runs in evaluation mode whatever
        calls `.train()`, so that its buffers stay as they are. Parameters that the model fixed itself stay fixed.

        What tied heads share belongs to head 1, as what both run belongs to the trunk. So head 2 alone trains what it
        has of its own, while shared tensors are frozen (a layer whose statistics are shared runs in evaluation mode);
        head 1 alone trains all that it holds, and head 2 changes with it.

        Args:
            parts: any of `parts`.

        Raises:
            UserError: for an unknown part, or two parts that share weights of which only one would train, unless they
                are tied heads.
        """
        for name in parts:
            if name not in self.parts:
                raise UserError(f"{name!r} is no part of this classifier; its parts are {', '.join(self.parts)}")
        parts = self._meant(parts)
        self._refuse_half_frozen(parts)
        for name, freezer in self._freezers.items():
            freezer.frozen = name not in parts
        for still in self._still.values():
            still.frozen = "head1" not in parts
        trained = {id(tensor) for name in parts for tensor in self._held_by(name).values()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(id(parameter) in trained and name not in self._fixed)
            if not parameter.requires_grad:
                parameter.grad = None
        self.train(self.training)

    def _meant(self, parts: AbstractSet[str]) -> set[str]:
        """Return the parts, with the routers if the aggregator is among them: they lie in it."""
        return {*parts, *(self.routers if AGGREGATOR in parts else ())}

    def _refuse_half_frozen(self, parts: AbstractSet[str]) -> None:
        owners: dict[int, str] = {}
        for part in self.parts:
            for name, tensor in self._held_by(part).items():
                owner = owners.setdefault(id(tensor), part)
                if (owner in parts) != (part in parts):
                    raise UserError(
                        f"{owner} and {part} share {name}, which runs on both sides of the cut; train both or neither"
                    )

    def _held_by(self, part: str) -> dict[str, Tensor]:
        """Parameters and buffers that belong to a part alone, under its own names; tied ones are head 1's."""
        shared = self.tied if part in self.heads[1:] else frozenset()
        held = {name: t for name, t in tensors_by_name(self.part(part)).items() if name not in shared}
        if part == AGGREGATOR and self.routers:
            return {name: t for name, t in held.items() if name.partition(".")[0] not in self.routers}
        return held

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        self._keep_frozen(self.parts)
        return self

    def _keep_frozen(self, parts: Iterable[str]) -> None:
        """Put what is frozen of some parts into evaluation mode."""
        for name in parts:
            if self._freezers[name].frozen:
                self._freezers[name].hold(self.part(name))
        for head, module in self._moving(set(parts)):
            if self._still[head].frozen:
                module.eval()

    @torch.no_grad()
    def load_part(self, part: str, other: DualHeadClassifier) -> None:
        """Give a part the values that it has in another classifier of the same make.

        Of a tied head after the first, only what it has of its own; of the aggregator, its routers too.
        """
        for each in self._meant({part}):
            theirs = other._held_by(each)
            for name, tensor in self._held_by(each).items():
                tensor.copy_(theirs[name])

    def base_state_dict(self, head: str = "head1") -> dict[str, Tensor]:
        """The original model's state dict, from the trunk and a head, under its own keys.

        Args:
            head: which one; a further head must be a copy of the first one's layers.

        Raises:
            UserError: if there is no such head, or its keys are others than the model's.
        """
        if head not in self.heads:
            raise UserError(f"{head!r} is no head of this classifier; its heads are {', '.join(self.heads)}")
        own: dict[str, Any] = self.get_submodule(head).state_dict()
        if own.keys() != self.head1.state_dict().keys():
            raise UserError(f"{head} has other layers than the original model, so its weights have no place in it")
        return {**self.trunk.state_dict(), **own}

    def load_base_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the original model's state dict into trunk and head 1.

        Raises:
            UserError: if keys are missing, unknown, or of another shape; nothing is loaded then.
        """
        own = self.base_state_dict()
        wrong = {
            "missing": sorted(own.keys() - state.keys()),
            "unknown": sorted(state.keys() - own.keys()),
            "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
        }
        for what, keys in wrong.items():
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise UserError(f"the weights do not fit the model: {what}: {', '.join(keys[:3])}{more}")
        for part in (self.trunk, self.head1):
            part.load_state_dict({key: state[key] for key in part.state_dict()})


class HeadView(nn.Module):
    """One output of a dual-head classifier as a classifier of its own, on the same modules.

    Args:
        classifier: the classifier.
        output: whose logits `forward` gives.
    """

    def __init__(self, classifier: DualHeadClassifier, output: Output) -> None:
        super().__init__()
        if output not in classifier.outputs:
            raise UserError(
                f"{output!r} is no output of this classifier; its outputs are {', '.join(classifier.outputs)}"
            )
        self.output = output
        self._parts = tuple(part for part in classifier.parts if depends_on(output, part) and self._runs(part))
        self.num_classes = classifier.num_classes
        self.training = classifier.training
        self._classifier = (classifier,)  # in a tuple, so that its unused parts are not this module's
        for name in self._parts:
            self.add_module(name, classifier.part(name))

    def _runs(self, part: str) -> bool:
        """Whether the view holds a part: one that lies in another, or holds another, is left to that one."""
        return not is_router(part) if self.output == AGGREGATE else part != AGGREGATOR

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] from images [B, ...]."""
        (classifier,) = self._classifier
        if self.output == AGGREGATE:
            return cast("Tensor", classifier(x))
        return classifier.head(self.output, classifier.features(x))

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts."""
        super().train(mode)
        self._classifier[0]._keep_frozen(self._parts)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast; heads outside of this view go along with the tensors that they share with one in it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self._classifier[0]._tie_to(next(part for part in self._parts if is_head(part)))
        return self


class MeanView(HeadView):
    """The mean of the heads' logits, which shows the heads too: who attacks a merging of heads must see them."""

    is_mean = True

    def head_logits(self, x: Tensor) -> Tensor:
        """Logits of all heads [B, H, C]."""
        (classifier,) = self._classifier
        return classifier.head_logits(x)

    def aggregate(self, head_logits: Tensor) -> Tensor:
        """Their mean [B, C]."""
        return mean_of(head_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] from images [B, ...]."""
        return self.aggregate(self.head_logits(x))


class RouterView(HeadView):
    """One router's output, which shows the heads too, as `MeanView` does."""

    @property
    def shown_outputs(self) -> tuple[str, ...]:
        """The outputs that `all_logits` gives."""
        return (*self._classifier[0].heads, self.output)

    def head_logits(self, x: Tensor) -> Tensor:
        """Logits of all heads [B, H, C]."""
        return self._classifier[0].head_logits(x)

    def all_logits(self, x: Tensor) -> Tensor:
        """Logits of the heads and, last, of the router [B, H + 1, C]; see `DualHeadClassifier.all_logits`."""
        (classifier,) = self._classifier
        router = cast("SeesFeatures", classifier.part(self.output))
        return classifier._merge(router.shown, *classifier.before_merging(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] from images [B, ...]."""
        (classifier,) = self._classifier
        return classifier.merge(self.output, *classifier.before_merging(x, self.output))
