"""Cutting a model at a named layer, checked against the model."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.heads.splitting.base import (
    CannotCut,
    Cut,
    Features,
    How,
    keep_in_evaluation,
    kept_in_evaluation,
    reason,
    undisturbed,
)
from dualhead.heads.splitting.direct import OWN_NOT_OFFERED, own_split, sequential_split, whole_split
from dualhead.heads.splitting.functional import functional_split
from dualhead.heads.splitting.tracing import traced_split
from dualhead.system.generators import all_generator_states, seed_generators
from dualhead.system.outputs import logits_of

_RELATIVE, _ABSOLUTE, _ROUNDING = 1e-4, 1e-5, 1e-6
_NEAREST, _TRIES = 2, 8
NOTHING_BEHIND = "nothing that could be trained lies behind it"
INPUT: Final = "input"
"""The place in front of the first layer, unless the model has a layer of that name."""


def split_model(model: nn.Module, at: str, example: Tensor) -> Cut:
    """Cut a model at the output of a submodule.

    Four ways are tried in turn, and the first whose result equals the model on the example serves: the model's own
    `split(at)`; nn.Sequential; a torch.fx trace of only the containers on the way to the layer; and whole forward
    passes in which the tail replaces what runs behind the cut, at the price of a second trunk pass per head, about
    which a warning is given. Equal means, in training and in evaluation mode: the same logits to float tolerance (on
    two batch sizes), the same gradients with respect to the images and all parameters (on two images), the same buffers
    afterwards, and the same use of random numbers.

    A trace decides branches on image sizes as the example does: the cut is for images of the example's size.

    Args:
        model: any module from images to logits (see `logits_of` for what it may return); left as it is.
        at: the submodule's name, as in `model.named_modules()`, or `input`: nothing is in front of that cut.
        example: images [B, ...] that the model accepts.

    Raises:
        UserError: if the model fails on the example, has no such layer, or cannot be cut there: why, and the nearest
            layers that can.
    """
    whole = at == INPUT and INPUT not in dict(model.named_modules())
    at = at if whole else _canonical(model, at)
    images = two_images(example)
    for mode, batch in itertools.product((True, False), (torch.cat((images, images[:1])), images)):
        try:
            with undisturbed(images, model):
                logits = logits_of(model.train(mode)(batch.clone()))  # a forward may work on them in place
        except UserError:
            raise
        except Exception as error:  # any code of any model may run here
            raise UserError(
                f"the model fails on the example in {'training' if mode else 'evaluation'} mode, as "
                f"{list(batch.shape)}: {reason(error)}"
            ) from error
    if logits.ndim != 2 or len(logits) != len(images):
        raise UserError(
            f"the model gives logits of shape {list(logits.shape)} for {len(images)} images; expected [B, C]"
        )
    if whole:
        cut = whole_split(model, at)
        guard_features(cut, images)
        return cut
    order = call_order(model, images)
    found = attempt_checked(model, at, images, order.count(at))
    if isinstance(found, Cut):
        if found.how == "functional":
            warnings.warn(
                f"layer {at!r} is cut by running the whole forward pass once per head, so the trunk is paid twice; "
                f"`dualhead layers` lists layers that are cut without this",
                stacklevel=2,
            )
        return found
    near = list(_nearest(model, at, images, order))
    advice = f"; the nearest layers that work: {', '.join(map(repr, near))}" if near else "; no layer near it works"
    raise UserError(f"cannot cut the model at {at!r}: {found}{advice}")


def _canonical(model: nn.Module, at: str) -> str:
    """The first name of the submodule, which is how traces and hooks see it."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    known = [name for name in names.values() if name]
    try:
        module = model.get_submodule(at) if at else None
    except AttributeError:
        module = None
    if not isinstance(module, nn.Module):
        near = get_close_matches(at, known, n=3) or known[:3]
        raise UserError(f"the model has no layer {at!r}; did you mean {', '.join(map(repr, near))}?")
    return names[module]


def two_images(example: Tensor) -> Tensor:
    """Two images of the example: what batch norm needs in training mode, and no more."""
    return example[:2] if len(example) >= 2 else example.repeat(2, *(1 for _ in example.shape[1:]))


def attempt(
    model: nn.Module, at: str, images: Tensor, modes: Sequence[bool], check: Callable[[Cut], None]
) -> Cut | str:
    """The first cut that serves and passes a check, or the reasons why there is none.

    Args:
        model: the model.
        at: name of a layer that runs once in a forward pass.
        images: a few images.
        modes: whether in training mode; in these, containers are traced.
        check: raises `CannotCut` for a cut that does not equal the model.
    """
    ways: dict[How, Callable[[], Cut]] = {
        "own": lambda: own_split(model, at),
        "sequential": lambda: sequential_split(model, at),
        "traced": lambda: traced_split(model, at, images, modes),
        "functional": lambda: functional_split(model, at, images),
    }
    kept = kept_in_evaluation(model, images)
    reasons: dict[How, str] = {}
    for how, way in ways.items():
        try:
            cut = way()
            check_keys(model, cut)
            keep_in_evaluation(cut, kept)
            check(cut)
        except CannotCut as why_not:
            reasons[how] = str(why_not)
            if NOTHING_BEHIND in str(why_not):
                return NOTHING_BEHIND
            if how == "own" and OWN_NOT_OFFERED not in str(why_not):
                warnings.warn(f"the model's own split at {at!r} is passed over: {why_not}", stacklevel=4)
        else:
            return cut
    return f"traced: {reasons['traced']}; functional: {reasons['functional']}"


def attempt_checked(model: nn.Module, at: str, images: Tensor, calls: int) -> Cut | str:
    """As `attempt`, with the full check, for a layer that runs `calls` times in a forward pass."""
    if (complaint := calls_complaint(calls)) is not None:
        return complaint

    def check(cut: Cut) -> None:
        guard_features(cut, images)
        check_equal(model, cut, images)

    return attempt(model, at, images, (True, False), check)


def calls_complaint(calls: int) -> str | None:
    """Say why a layer that runs so often in a forward pass cannot be cut at."""
    if calls == 1:
        return None
    if calls == 0:
        return "it is not called in a forward pass"
    return f"it is called {calls} times in a forward pass, so its output is ambiguous"


def check_keys(model: nn.Module, cut: Cut) -> None:
    """The halves' keys together are the model's.

    Raises:
        CannotCut: naming keys that were lost or made up.
    """
    keys, given = set(model.state_dict()), {*cut.trunk.state_dict(), *cut.tail.state_dict()}
    if keys != given:
        odd = sorted(keys ^ given)
        raise CannotCut(f"the two halves lose or add the keys {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}")
    if next(cut.tail.parameters(), None) is None:
        raise CannotCut(NOTHING_BEHIND)


class _CloneChanged:
    """A pre-hook that gives a tail copies of what it would change in place, since the other head needs it unchanged."""

    def __init__(self, changed: tuple[int, ...]) -> None:
        self.changed = changed

    def __call__(self, module: nn.Module, args: tuple[Features, ...]) -> tuple[Features, ...]:
        del module
        (features,) = args
        if isinstance(features, Tensor):
            return (features.clone(),)
        return (tuple(f.clone() if i in self.changed else f for i, f in enumerate(features)),)


def guard_features(cut: Cut, images: Tensor, head: nn.Module | None = None) -> None:
    """Make the tail, or another head behind the cut, leave its input alone where it begins with an operation in place.

    Raises:
        CannotCut: if what crosses the cut cannot be shared out by images.
    """
    head = cut.tail if head is None else head
    more = torch.cat((images, images[:1]))  # a table may by chance be as long as one of them
    changed: set[int] = set()
    for mode, batch in itertools.product((True, False), (images, more)):
        with undisturbed(images, cut.trunk, head):
            features = cut.trunk.train(mode)(batch.clone())
            held = (features,) if isinstance(features, Tensor) else features
            if not isinstance(held, tuple | list) or not all(isinstance(f, Tensor) for f in held):
                raise CannotCut("something else than tensors crosses the cut")
            if any(f.dim() == 0 or len(f) != len(batch) for f in held):
                raise CannotCut("something that belongs to no image crosses the cut, such as a table of positions")
            versions = [f._version for f in held]
            head.train(mode)(features)
            changed |= {i for i, f in enumerate(held) if f._version != versions[i]}
    if changed:
        head.register_forward_pre_hook(_CloneChanged(tuple(sorted(changed))))


class Pass(NamedTuple):
    """Results of a pass: logits, gradients by name, buffers afterwards, and the random state that it leaves."""

    logits: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    drawn: Any


def pass_of(model: nn.Module | Cut, images: Tensor, mode: bool, *, backward: bool) -> Pass:
    """A pass of a model, or of one that is cut, from the same random numbers always; nothing is left behind.

    Args:
        model: which one.
        images: [B, ...].
        mode: whether in training mode.
        backward: whether gradients are enabled, and taken.
    """
    if backward:
        model = copy.deepcopy(model)  # what a forward stores, or computes once and keeps, would hold on to its graph
    parts = (model.trunk, model.tail) if isinstance(model, Cut) else (model,)
    with undisturbed(images, *parts), torch.inference_mode(False), torch.set_grad_enabled(backward):
        seed_generators(0, images.device)
        for part in parts:
            part.train(not mode).train(mode)  # what is kept for a mode, as LeViT keeps its biases, is computed anew
        leaf = images.clone().requires_grad_(backward and images.is_floating_point())
        output: Any = leaf.clone()  # on which a forward may work in place
        for part in parts:
            output = part(output)
        logits = logits_of(output)
        gradients = _gradients(logits, leaf, parts) if backward else {}
        buffers = {name: buffer.detach().clone() for part in parts for name, buffer in part.named_buffers()}
        return Pass(logits.detach().clone(), gradients, buffers, all_generator_states(images.device))


def _gradients(logits: Tensor, images: Tensor, parts: tuple[nn.Module, ...]) -> dict[str, Tensor | None]:
    """Gradients of a random projection of the logits by the images and by each parameter; None where there is none.

    Nothing is accumulated: no tensor's `grad` is touched.
    """
    tensors: dict[str, Tensor] = {"the images": images}
    for part in parts:
        tensors.update(part.named_parameters(remove_duplicate=False))
    gradients: dict[str, Tensor | None] = dict.fromkeys(tensors)
    wanted = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if wanted and logits.requires_grad:
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        found = torch.autograd.grad(logits, [tensors[name] for name in wanted], direction, allow_unused=True)
        gradients.update(zip(wanted, found, strict=True))
    return gradients


def close(found: Tensor, expected: Tensor, absolute: float) -> bool:
    """Whether two tensors agree to float tolerance."""
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=_RELATIVE, atol=absolute, equal_nan=True
    )


def _other_gradient(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> str | None:
    """The first name whose gradients differ by more than sums in another order do."""
    scales = {name: g.abs().max().item() for name, g in expected.items() if g is not None and g.numel()}
    largest = max(scales.values(), default=0.0)
    for name, gradient in expected.items():
        own = found.get(name)
        if gradient is None or own is None:
            if gradient is not own:
                return name
            continue
        # Beside the largest: one that is zero but for rounding, such as of a bias before batch norm, has no scale.
        absolute = _RELATIVE * scales.get(name, 0.0) + _ROUNDING * largest
        if not close(own, gradient, absolute):
            return name
    return None


def check_pass(cut: Cut, images: Tensor, mode: bool, expected: Pass) -> None:
    """A pass of a model that is cut gives what the model's gave, with gradients where that has some.

    Raises:
        CannotCut: saying in which mode and respect it differs.
    """
    backward = bool(expected.gradients)
    try:
        found = pass_of(cut, images, mode, backward=backward)
    except Exception as error:  # any code of any model may run here
        raise CannotCut(f"the cut model fails on {len(images)} images: {reason(error)}") from error
    name = f"{'training' if mode else 'evaluation'} mode{' with gradients' if backward else ''}"
    if not close(found.logits, expected.logits, _ABSOLUTE * max(1.0, expected.logits.abs().max().item())):
        raise CannotCut(f"the cut model gives other logits in {name} on {len(images)} images")
    if found.drawn != expected.drawn:
        raise CannotCut(f"the cut model draws other random numbers in {name}")
    for key, buffer in expected.buffers.items():
        if key in found.buffers and not close(found.buffers[key], buffer, _ABSOLUTE):
            raise CannotCut(f"the cut model leaves another {key} in {name}")
    if (tensor := _other_gradient(found.gradients, expected.gradients)) is not None:
        raise CannotCut(f"the cut model has another gradient with respect to {tensor} in {name}")


def backward_of(model: nn.Module, images: Tensor, mode: bool) -> Pass | None:
    """A model's pass with gradients; None if it fails, as it may in a model that is not made to be trained."""
    try:
        return pass_of(model, images, mode, backward=True)
    except Exception:  # any code of any model may run here
        return None


def check_equal(model: nn.Module, cut: Cut, images: Tensor) -> None:
    """The cut computes what the model does, and has its gradients where the model has some.

    Raises:
        CannotCut: saying in which mode and respect it differs.
    """
    more = torch.cat((images, images[:1]))
    for mode in (True, False):
        # The one with gradients comes first: what a hook stores elsewhere is then without a graph in the end.
        with_gradients = backward_of(model, images, mode)
        expected = [(batch, pass_of(model, batch, mode, backward=False)) for batch in (images, more)]
        if with_gradients is not None:
            expected.insert(0, (images, with_gradients))
        for batch, outcome in expected:
            check_pass(cut, batch, mode, outcome)


def _nearest(model: nn.Module, at: str, images: Tensor, order: list[str]) -> Iterator[str]:
    """Up to two layers near one that cannot be cut, in the order of the forward pass."""
    place = next((i for i, name in enumerate(order) if name == at or name.startswith(at + ".")), 0)
    ranked = sorted(dict.fromkeys(order), key=lambda name: abs(order.index(name) - place))
    found = 0
    for name in [name for name in ranked if name != at][:_TRIES]:
        cut = attempt_checked(model, name, images, order.count(name))
        if isinstance(cut, Cut) and cut.how != "functional":
            yield name
            found += 1
        if found == _NEAREST:
            return


def call_order(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the submodules in the order in which their calls end, each as often as it is called."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with undisturbed(images, model):
            model.eval()(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return order
