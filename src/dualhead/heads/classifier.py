"""A classifier with two heads or more on one trunk, and what training needs of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Final, Self, cast

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.heads.aggregators.mean import MeanOfHeads
from dualhead.heads.splitting import Cut, Features, How

_HEAD: Final = re.compile(r"head[1-9][0-9]?")


def is_head(name: str) -> bool:
    """Whether a part or an output is a head: `head1`, `head2`, ..."""
    return _HEAD.fullmatch(name) is not None


def _checked(kind: str, others: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if not is_head(name) and name not in others:
            raise UserError(f": must be {kind}, one of head1, head2, ..., {', '.join(others)}; got {name!r}")
        return name

    return AfterValidator(check)


Part = Annotated[str, _checked("a part", ("trunk", "aggregator", "model"))]
"""What learns or is frozen as one: the trunk, a head or the aggregator, or a plain model as a whole."""

Output = Annotated[str, _checked("an output", ("mean", "aggregate"))]
"""Whose logits a view gives: a head's, their mean's or the aggregate's."""


def depends_on(output: str, part: str) -> bool:
    """Whether an output depends on a part."""
    if is_head(output):
        return part in ("trunk", output)
    return part == "trunk" or is_head(part) or (output, part) == ("aggregate", "aggregator")


class _KeepFrozen:
    """A pre-hook by which a frozen part is in evaluation mode whenever it runs, whoever called `.train()` on what."""

    def __init__(self) -> None:
        self.frozen = False

    def __call__(self, module: nn.Module, args: object) -> None:
        del args
        if self.frozen:
            module.eval()


def mean_of(head_logits: Tensor) -> Tensor:
    """The mean [B, C] of head logits [B, H, C], at least in float32 whatever the heads compute in."""
    return head_logits.to(torch.promote_types(head_logits.dtype, torch.float32)).mean(1)


class DualHeadClassifier(nn.Module):
    """Two heads or more on one trunk, and an aggregator over their logits (Jiang et al. 2021, arXiv 2104.10377).

    To everybody who does not train it, it is an ordinary classifier: images [B, ...] to logits [B, C].

    Args:
        cut: the model that was cut; its tail becomes the first head.
        others: the heads after the first, at least one, each what crosses the cut to logits [B, C].
        aggregator: head logits [B, H, C] to logits [B, C].
        num_classes: C.

    Attributes:
        heads: names of the heads: `head1`, `head2`, ...
        parts: of what it consists, in the order of a pass: `trunk`, the heads, `aggregator`.
        outputs: whose logits a view can give: the heads, `mean`, `aggregate`.
    """

    trunk: nn.Module
    head1: nn.Module
    head2: nn.Module
    aggregator: nn.Module

    def __init__(self, cut: Cut, others: Sequence[nn.Module], aggregator: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.heads = tuple(f"head{number}" for number in range(1, len(others) + 2))
        self.parts = ("trunk", *self.heads, "aggregator")
        self.outputs = (*self.heads, "mean", "aggregate")
        for name, module in zip(self.parts, (cut.trunk, cut.tail, *others, aggregator), strict=True):
            self.add_module(name, module)
        self.num_classes = num_classes
        self.split_at = cut.at
        self.split_how: How = cut.how
        self._fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self._freezers = {name: _KeepFrozen() for name in self.parts}
        for name, freezer in self._freezers.items():
            self.get_submodule(name).register_forward_pre_hook(freezer)

    @property
    def is_mean(self) -> bool:
        """Whether the aggregate is the mean of the heads' logits."""
        return isinstance(self.aggregator, MeanOfHeads)

    def features(self, x: Tensor) -> Features:
        """What crosses the cut, from images [B, ...]: a tensor, or a tuple of tensors. Runs the trunk once."""
        return self.trunk(x)

    def head(self, name: str, features: Features) -> Tensor:
        """Logits [B, C] of a head, `head1`, `head2`, ..., from what crosses the cut."""
        logits: Tensor = self.get_submodule(name)(features)
        return logits

    def aggregate(self, head_logits: Tensor) -> Tensor:
        """Logits [B, C] from head logits [B, H, C], at least in float32 whatever the heads compute in."""
        # It costs little beside the heads, and bf16 turns gradients round where an aggregator's map is steep.
        with torch.autocast(head_logits.device.type, enabled=False):
            own = next(self.aggregator.parameters(), head_logits).dtype  # logits may be of another type than weights
            wide = head_logits.to(torch.promote_types(own, torch.float32))
            logits: Tensor = self.aggregator(wide)
        return logits

    def head_logits(self, x: Tensor) -> Tensor:
        """Logits of all heads [B, H, C] from images [B, ...]; runs the trunk once."""
        features = self.features(x)
        return torch.stack([self.head(name, features) for name in self.heads], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of the aggregate from images [B, ...]."""
        return self.aggregate(self.head_logits(x))

    def view(self, output: Output) -> HeadView:
        """An ordinary classifier over these very modules, that runs only what its output needs.

        Args:
            output: a head, `mean` (of the heads' logits) or `aggregate`.

        Raises:
            UserError: for any other output.
        """
        return MeanView(self, output) if output == "mean" else HeadView(self, output)

    def set_trainable(self, parts: AbstractSet[str]) -> None:
        """Train these parts and freeze all others.

        Frozen means: no parameter asks for a gradient or keeps one, and the part runs in evaluation mode whatever
        calls `.train()`, so that its buffers stay as they are. Parameters that the model fixed itself stay fixed.

        Args:
            parts: any of `parts`.

        Raises:
            UserError: for an unknown part, or two parts that share weights of which only one would train.
        """
        for name in parts:
            if name not in self.parts:
                raise UserError(f"{name!r} is no part of this classifier; its parts are {', '.join(self.parts)}")
        self._refuse_half_frozen(parts)
        for name, freezer in self._freezers.items():
            freezer.frozen = name not in parts
        trained = {id(p) for name in parts for p in self.get_submodule(name).parameters()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(id(parameter) in trained and name not in self._fixed)
            if not parameter.requires_grad:
                parameter.grad = None
        self.train(self.training)

    def _refuse_half_frozen(self, parts: AbstractSet[str]) -> None:
        owners: dict[int, str] = {}
        for part in self.parts:
            module = self.get_submodule(part)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                owner = owners.setdefault(id(tensor), part)
                if (owner in parts) != (part in parts):
                    raise UserError(
                        f"{owner} and {part} share {name}, which runs on both sides of the cut; train both or neither"
                    )

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for name, freezer in self._freezers.items():
            if freezer.frozen:
                self.get_submodule(name).eval()
        return self

    def base_state_dict(self) -> dict[str, Tensor]:
        """The original model's state dict, from trunk and head 1, under its own keys."""
        return {**self.trunk.state_dict(), **self.head1.state_dict()}

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
        self._parts = tuple(part for part in classifier.parts if depends_on(output, part))
        self.num_classes = classifier.num_classes
        self.training = classifier.training
        self._classifier = (classifier,)  # in a tuple, so that its unused parts are not this module's
        for name in self._parts:
            self.add_module(name, classifier.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] from images [B, ...]."""
        (classifier,) = self._classifier
        if self.output == "aggregate":
            return cast("Tensor", classifier(x))
        return classifier.head(self.output, classifier.features(x))

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts."""
        super().train(mode)
        for name in self._parts:
            if self._classifier[0]._freezers[name].frozen:
                self.get_submodule(name).eval()
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
