"""The passes of a stage, planned from what its objective needs to see: no part runs twice on the same images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, Rows, joint_pass, refuse_unroutable
from dualhead.names import (
    AGGREGATE,
    MEAN,
    MODEL,
    TRUNK,
    is_head,
    is_merging,
)
from dualhead.objectives import Features, Logits, Need
from dualhead.system.modes import in_eval_mode
from dualhead.training.parts import feeds, trained_output
from dualhead.training.stage import Stage

Crossing = Any
"""Features that cross from the frozen prefix to what learns: a tensor with a row for each image, or a tuple of such."""


class Passes:
    """The pass from images to what an objective needs, cut where learning begins.

    The frozen prefix runs without a graph, once an image, whatever uses its result; so the loss's backward pass ends
    where learning begins.

    Args:
        model: a plain classifier, or a dual-head one.
        parts: the parts that learn: `{"model"}`, or some of trunk, head1, head2, ..., aggregator.
        deployed: the output that is judged; None: the one that the parts train.
        heads: modules of the objective's own, by name; they learn too.
        teachers: models that are asked and do not learn, by name.

    Attributes:
        output: the deployed one.
        trained: the one that the parts train, which needs call `OWN`.

    Raises:
        UserError: if the parts are not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Collection[str],
        *,
        deployed: str | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.parts = frozenset(parts)
        self.trained = trained_output(parts)
        self.output = deployed or self.trained
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.teachers = {name: teacher.eval() for name, teacher in (teachers or {}).items()}
        self.prefix: Callable[[Tensor], Crossing] = lambda x: x
        if isinstance(model, DualHeadClassifier):
            model.set_trainable(set(parts))
            if self.merging_alone:
                self.prefix = model.before_merging if model.sees_features else model.head_logits
            elif TRUNK not in self.parts:
                self.prefix = model.features
        elif self.parts != {MODEL}:
            raise UserError(f"a model without a second head trains as 'model', not {', '.join(sorted(self.parts))}")
        self._final = self.look({"": Logits(self.output)})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        stage: Stage,
        *,
        teachers: Mapping[str, nn.Module] | None = None,
        example: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        """Return the passes of a stage through a model, with new heads of the objective's own if it has any.

        Args:
            model: a plain classifier, or a dual-head one.
            stage: what learns, and the objective.
            teachers: models that the objective asks, by name.
            example: an image [1, ...] of the shape that the model takes, on its device; needed for own heads.
            seed: of the own heads' first weights; torch's generator stays where it is.
        """
        bare = cls(model, stage.train, deployed=stage.output, teachers=teachers)
        needs = stage.objective.needs()
        if not any(isinstance(need, Features) and need.through for need in needs.values()):
            return bare
        assert example is not None, "own heads are made for the features of an example"
        with torch.random.fork_rng(devices=[]), in_eval_mode(model):
            torch.manual_seed(seed)
            heads = stage.objective.heads(bare.shapes(needs, example))
            heads = {name: head.to(example.device) for name, head in heads.items()}
        return cls(model, stage.train, deployed=stage.output, heads=heads, teachers=teachers)

    @property
    def merging_alone(self) -> bool:
        """Whether only the aggregator or routers of it learn, so that the heads belong to the prefix."""
        return bool(self.parts) and all(map(is_merging, self.parts))

    @property
    def learners(self) -> nn.Module:
        """The model, and beside it the objective's own heads if there are any."""
        return nn.ModuleList([self.model, self.heads]) if len(self.heads) else self.model

    def parameters(self) -> list[nn.Parameter]:
        """Return what learns, each tensor once."""
        return [parameter for parameter in self.learners.parameters() if parameter.requires_grad]

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of the deployed output for images [B, ...], differentiable to the images."""
        return self._final.raw({"clean": self.prefix(x)})[""]

    def functional(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Compute logits [B, C] of the output that the parts train, float32, with other weights.

        Args:
            weights: by their names in the model; those that are left out are the model's own.
            x: images [B, ...].
        """
        outer = _Output(self.model, self.trained)
        held = {f"model.{name}": tensor for name, tensor in weights.items()}
        made: Tensor = torch.func.functional_call(outer, held, (x,))
        return made.float()

    def constant(self, x: Tensor) -> Crossing:
        """Run the prefix without a graph."""
        with torch.no_grad():
            return self.prefix(x)

    def is_constant(self, need: Need) -> bool:
        """Tell whether nothing that learns has a share in a need; features are left to the pass that gives them."""
        if not isinstance(need, Logits):
            return False
        need = need.of(self.trained)
        return need.output in self.teachers or not any(self._moves(part, need) for part in self.parts)

    def _moves(self, part: str, need: Logits) -> bool:
        """Whether training a part changes an output; heads that are tied to head 1 change with it."""
        if isinstance(self.model, DualHeadClassifier) and need.output in self.model.outputs:
            return self.model.is_shaped_by(need.output, part)
        return feeds(part, need)

    def told(self, needs: Mapping[str, Need], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ask the teachers for those of the needs that are theirs; with a graph to the images, if gradients are on."""
        asked = {n: need for n, need in needs.items() if isinstance(need, Logits) and need.output in self.teachers}
        answers = {need: self.teachers[need.output](images[need.on]).float() for need in dict.fromkeys(asked.values())}
        return {name: answers[need] for name, need in asked.items()}

    def look(
        self, needs: Mapping[str, Need], together: Collection[str] = (), *, counted: Collection[str] | None = None
    ) -> Look:
        """Plan the passes that give some needs, none of a teacher.

        Args:
            needs: by name.
            together: images that run in one pass, with batch-norm statistics of their union; the others run one after
                another, in the order in which the needs name them.
            counted: those of `together` whose statistics batch norm takes for all of them; None: all.

        Raises:
            UserError: for a need that the model or the objective's own heads cannot meet.
        """
        return Look(self, {name: need.of(self.trained) for name, need in needs.items()}, together, counted)

    def shapes(self, needs: Mapping[str, Need], example: Tensor) -> dict[str, Size]:
        """Measure one image's features for each need of features, before any head of the objective's own.

        Args:
            needs: by name.
            example: images [B, ...] of the shape that the model takes.
        """
        bare = {n: Features(need.part, "clean", need.layer) for n, need in needs.items() if isinstance(need, Features)}
        if not bare:
            return {}
        with torch.no_grad():
            return {n: value.shape[1:] for n, value in self.look(bare)({"clean": self.prefix(example)}).items()}


@dataclass(frozen=True)
class _Pass:
    """One pass over some images.

    Args:
        images: their names, in the order of the rows.
        needs: what it gives, by name.
        heads: on which of the images each head runs.
        merged: on which of them each merging of the heads runs.
        looked: on which of them each router shows its layers, without the heads.
        layers: (part, layer) whose output is wanted.
        counted: those of the images that batch norm takes its statistics from.
    """

    images: tuple[str, ...]
    needs: dict[str, Need]
    heads: dict[str, tuple[str, ...]]
    merged: dict[str, tuple[str, ...]]
    looked: dict[str, tuple[str, ...]]
    layers: tuple[tuple[str, str], ...]
    counted: frozenset[str]


class Look:
    """Function that meets some needs: from the prefix's features of images to tensors by the needs' names.

    Args:
        passes: of the stage.
        needs: with `OWN` resolved.
        together: images that run in one pass.
        counted: those of them whose statistics batch norm takes; None: all.
    """

    def __init__(
        self,
        passes: Passes,
        needs: Mapping[str, Need],
        together: Collection[str],
        counted: Collection[str] | None = None,
    ) -> None:
        self._passes, self.needs, self._counted = passes, dict(needs), counted
        self._refuse()
        order = list(dict.fromkeys(need.on for need in needs.values()))
        both = [on for on in order if on in together]
        first = both[:1]
        groups = [both if on in first else [on] for on in order if on in first or on not in both]
        self._plan = [self._pass(group) for group in groups]
        self._refuse_unroutable()

    def _refuse(self) -> None:
        passes, model = self._passes, self._passes.model
        dual = isinstance(model, DualHeadClassifier)
        for name, need in self.needs.items():
            if isinstance(need, Logits):
                outputs = model.outputs if isinstance(model, DualHeadClassifier) else (MODEL,)
                if need.output not in outputs:
                    raise UserError(f"{name}: needs the output {need.output}; this model has {', '.join(outputs)}")
            if not isinstance(need, Features):
                continue
            parts = model.parts[:-1] if isinstance(model, DualHeadClassifier) else (MODEL,)
            if need.part not in parts:
                raise UserError(f"{name}: needs features of {need.part}; this model has {', '.join(parts)}")
            if need.layer is None and need.part != TRUNK:
                raise UserError(f"{name}: name a layer of {need.part}; only the trunk's features need none")
            inside = model.part(need.part) if isinstance(model, DualHeadClassifier) else model
            if need.layer is not None and need.layer not in dict(inside.named_modules()):
                known = ", ".join(n for n, _ in inside.named_children())
                raise UserError(f"{name}: {need.part} has no layer {need.layer!r}; it has {known}")
            if dual and need.layer is not None and need.part == TRUNK and TRUNK not in passes.parts:
                raise UserError(f"{name}: the trunk is frozen; its features are to be had where it ends, without layer")
            if dual and passes.merging_alone and not is_merging(need.part):
                raise UserError(f"{name}: a stage that trains the aggregator alone sees logits of the heads only")
            if need.through is not None and need.through not in passes.heads:
                raise UserError(f"{name}: the objective has no head {need.through!r}")

    def _refuse_unroutable(self) -> None:
        """Refuse layers that cannot be told whose their rows are, in a pass that tells them."""
        model = self._passes.model
        for step in filter(self._tells_rows, self._plan):
            all_count = step.counted == set(step.images)
            routed = self._is_routed(step)
            uncounted = [head for head, images in step.heads.items() if not step.counted & set(images)]
            if uncounted and not routed:
                raise UserError(
                    f"forward: joint_clean: {uncounted[0]} sees no clean image and has statistics of its own; use "
                    "heads that are tied with statistics in common (own: affine), or forward: joint"
                )
            refuse_unroutable(model, (), all_count=all_count)
            if routed and isinstance(model, DualHeadClassifier):
                refuse_unroutable(model.head1, model.own_of_tied, all_count=all_count)
                inside = next((part for part, _ in step.layers if is_head(part)), None)
                if inside is not None:
                    raise UserError(
                        f"forward: joint: tied heads run as one, so layers inside {inside} are not its alone; "
                        "use forward: separate"
                    )

    def _is_routed(self, step: _Pass) -> bool:
        """Whether tied heads run as one: what they share is to see the rows of all."""
        model = self._passes.model
        if not isinstance(model, DualHeadClassifier) or self._passes.merging_alone:
            return False
        return len(step.images) > 1 and len(step.heads) > 1 and model.shares_statistics

    def _tells_rows(self, step: _Pass) -> bool:
        return self._is_routed(step) or step.counted != set(step.images)

    @property
    def tells_rows(self) -> bool:
        """Whether layers are told whose their rows are, which cannot be compiled nor computed again."""
        return any(map(self._tells_rows, self._plan))

    def _pass(self, images: Sequence[str]) -> _Pass:
        model = self._passes.model
        needs = {name: need for name, need in self.needs.items() if need.on in images}
        layers = {(n.part, n.layer): None for n in needs.values() if isinstance(n, Features) and n.layer is not None}
        heads: dict[str, tuple[str, ...]] = {}
        merged: dict[str, tuple[str, ...]] = {}
        looked: dict[str, tuple[str, ...]] = {}
        if isinstance(model, DualHeadClassifier):

            def on(asks: Callable[[Need], bool]) -> tuple[str, ...]:
                asked = {need.on for need in needs.values() if asks(need)}
                return tuple(name for name in images if name in asked)

            merged = {output: on(partial(_gives, output)) for output in (MEAN, *model.routers, AGGREGATE)}
            merged = {output: names for output, names in merged.items() if names}
            heads = {head: on(partial(_runs, model, head)) for head in model.heads}
            heads = {head: names for head, names in heads.items() if names}
            looked = {router: on(partial(_looks_into, router)) for router in model.routers}
            looked = {router: names for router, names in looked.items() if names}
        counted = frozenset(images if self._counted is None else self._counted) & frozenset(images)
        if len(images) == 1 or not counted:
            counted = frozenset(images)
        return _Pass(tuple(images), needs, heads, merged, looked, tuple(layers), counted)

    @property
    def has_layers(self) -> bool:
        """Whether it looks inside parts, which cannot be compiled."""
        return any(step.layers for step in self._plan)

    def __call__(self, crossing: Mapping[str, Crossing]) -> dict[str, Tensor]:
        """Compute what is needed, float32.

        Args:
            crossing: by the images' names, what the prefix makes of them.
        """
        return {name: value.float() for name, value in self.raw(crossing).items()}

    def raw(self, crossing: Mapping[str, Crossing]) -> dict[str, Tensor]:
        """Compute what is needed, in whatever type the model computes in."""
        found: dict[str, Tensor] = {}
        for step in self._plan:
            found |= self._run(step, crossing)
        return {name: found[name] for name in self.needs}

    def _run(self, step: _Pass, crossing: Mapping[str, Crossing]) -> dict[str, Tensor]:
        model, values = self._passes.model, {}
        tapped: dict[tuple[str, str], Tensor] = {}
        with ExitStack() as hooks:
            for key in step.layers:
                hooks.callback(self._tap(key, tapped))
            if isinstance(model, DualHeadClassifier):
                middle = self._middle(model, step, crossing)
                logits = self._heads(model, step, middle)
                logits |= self._merged(model, step, middle, logits)
                self._look_into_routers(model, step, middle)
            else:
                middle = {}
                whole = self._whole(step, model, crossing, step.images)
                logits = {MODEL: _split(whole, crossing, step.images)}
        for name, need in step.needs.items():
            if isinstance(need, Features):
                values[name] = self._features(step, need, crossing, middle, tapped)
            elif isinstance(need, Logits):
                values[name] = logits[need.output][need.on]
        return values

    def _middle(self, model: DualHeadClassifier, step: _Pass, crossing: Mapping[str, Crossing]) -> dict[str, Crossing]:
        """Return the features that cross the cut, for each set of images."""
        if TRUNK not in self._passes.parts:
            return {on: crossing[on] for on in step.images}
        trunk = self._whole(step, model.trunk, crossing, step.images)
        return _split(trunk, crossing, step.images)

    def _rows_of(self, step: _Pass, like: Mapping[str, Crossing], images: Sequence[str]) -> Rows:
        return Rows(tuple(_rows(like[on]) for on in images), tuple(on in step.counted for on in images))

    def _whole(self, step: _Pass, module: nn.Module, values: Mapping[str, Crossing], images: Sequence[str]) -> Crossing:
        """Run a module on the rows of several images."""
        rows = self._rows_of(step, values, images)
        if all(rows.counted):
            return module(_cat(values, images))
        with joint_pass([module] * len(images), rows) as told:
            return told(_cat(values, images))

    def _heads(
        self, model: DualHeadClassifier, step: _Pass, middle: Mapping[str, Crossing]
    ) -> dict[str, dict[str, Tensor]]:
        """Logits of the heads, each on the images that it is needed for."""
        if self._passes.merging_alone:
            logits = {on: crossed[0] if model.sees_features else crossed for on, crossed in middle.items()}
            return {h: {on: logits[on][:, model.heads.index(h)] for on in images} for h, images in step.heads.items()}
        if self._is_routed(step):
            return self._routed(model, step, middle)
        return {
            head: _split(self._whole(step, model.get_submodule(head), middle, images), middle, images)
            for head, images in step.heads.items()
        }

    def _routed(
        self, model: DualHeadClassifier, step: _Pass, middle: Mapping[str, Crossing]
    ) -> dict[str, dict[str, Tensor]]:
        """Logits of tied heads that run as one."""
        pairs = [(head, on) for head, images in step.heads.items() for on in images]
        heads, images = [head for head, _ in pairs], [on for _, on in pairs]
        rows = self._rows_of(step, middle, images)
        features = tree_map(lambda *tensors: torch.cat(tensors), *(middle[on] for on in images))
        logits: dict[str, dict[str, Tensor]] = {head: {} for head in heads}
        for (head, on), part in zip(pairs, rows.split(model.heads_together(heads, features, rows)), strict=True):
            logits[head][on] = part
        return logits

    def _merged(
        self,
        model: DualHeadClassifier,
        step: _Pass,
        middle: Mapping[str, Crossing],
        heads: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, dict[str, Tensor]]:
        """Logits of the mean, the routers and the aggregate, each merging once."""
        merged = {}
        for output, images in step.merged.items():
            rows = [torch.stack([heads[head][on] for head in model.heads_of(output)], 1) for on in images]
            every = rows[0] if len(rows) == 1 else torch.cat(rows)
            features = self._seen_by_routers(middle, images) if model.sees_features else None
            merged[output] = _split(model.merge(output, every, features), middle, images)
        return merged

    def _seen_by_routers(self, middle: Mapping[str, Crossing], images: Sequence[str]) -> Crossing:
        """Features at the cut, of several images; heads' logits cross beside it where they belong to the prefix."""
        alone = self._passes.merging_alone
        return _cat({on: middle[on][1] if alone else middle[on] for on in images}, images)

    def _look_into_routers(self, model: DualHeadClassifier, step: _Pass, middle: Mapping[str, Crossing]) -> None:
        """Run what routers make of features alone, last, so that it is what their taps keep."""
        for router, images in step.looked.items():
            model.look(router, self._seen_by_routers(middle, images))

    def _tap(self, key: tuple[str, str], tapped: dict[tuple[str, str], Tensor]) -> Callable[[], None]:
        """Keep what a layer gives; return what ends it."""
        part, layer = key
        model = self._passes.model
        inside = model.part(part) if isinstance(model, DualHeadClassifier) else model

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            del module, args
            tapped[key] = output

        return inside.get_submodule(layer).register_forward_hook(keep).remove

    def _features(
        self,
        step: _Pass,
        need: Features,
        crossing: Mapping[str, Crossing],
        middle: Mapping[str, Crossing],
        tapped: Mapping[tuple[str, str], Tensor],
    ) -> Tensor:
        if need.layer is None:
            value = middle[need.on]
        else:
            images = step.looked.get(need.part) or step.heads.get(need.part, step.images)
            value = _split(tapped[need.part, need.layer], crossing, images)[need.on]
        if not isinstance(value, Tensor):
            raise UserError("several tensors cross the cut of this model; name a layer whose features are one tensor")
        if need.through is None:
            return value
        head: nn.Module = self._passes.heads.get_submodule(need.through)
        if need.reversal is not None:
            value = _reversed(value, need.reversal)
        made: Tensor = head(value)
        return made


class _Output(nn.Module):
    """One output of a model."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self._output = model, output

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.model, DualHeadClassifier):
            made: Tensor = self.model.view(self._output)(x)
        else:
            made = self.model(x)
        return made


class _Reversal(torch.autograd.Function):
    """The identity, with a gradient of the other sign."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def _reversed(value: Tensor, factor: float) -> Tensor:
    """A value whose gradient is multiplied by -factor on its way back."""
    made: Tensor = _Reversal.apply(value, factor)  # type: ignore[no-untyped-call]
    return made


def _gives(output: str, need: Need) -> bool:
    return isinstance(need, Logits) and need.output == output


def _looks_into(part: str, need: Need) -> bool:
    return isinstance(need, Features) and need.part == part


def _runs(model: DualHeadClassifier, head: str, need: Need) -> bool:
    """Whether a head must run for a need."""
    if isinstance(need, Logits):
        return head in model.heads_of(need.output)
    return _looks_into(head, need)


def _rows(value: Crossing) -> int:
    return len(tree_leaves(value)[0])


def _cat(values: Mapping[str, Crossing], images: Sequence[str]) -> Crossing:
    """The rows of several images one after another; those of one are passed on as they are."""
    if len(images) == 1:
        return values[images[0]]
    return tree_map(lambda *tensors: torch.cat(tensors), *(values[on] for on in images))


def _split(whole: Crossing, like: Mapping[str, Crossing], images: Sequence[str]) -> dict[str, Any]:
    """Undo `_cat`."""
    if len(images) == 1:
        return {images[0]: whole}
    leaves, form = tree_flatten(whole)
    pieces = zip(*(torch.split(leaf, [_rows(like[on]) for on in images]) for leaf in leaves), strict=True)
    return {on: tree_unflatten(list(piece), form) for on, piece in zip(images, pieces, strict=True)}
