"""One attack on some images, for whoever wants the adversarial images and no measurement."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks import Attack, Search, attacks
from dualhead.components.fields import whole
from dualhead.errors import UserError
from dualhead.evaluation.diagnostics import PROBES, input_gradient
from dualhead.evaluation.given import tensors_of
from dualhead.evaluation.model import Subject, check_images, check_module, frozen, refuse_labels, told_if_unfit
from dualhead.evaluation.own import OwnAttack, as_attack
from dualhead.noise import Streams
from dualhead.system.devices import float32_products
from dualhead.system.outputs import without_inference_tensors
from dualhead.threats import Threat, build_threat

_log = logging.getLogger(__name__)


@float32_products()
def attack(
    model: nn.Module,
    images: Tensor | NDArray[Any] | Sequence[Any],
    labels: Tensor | NDArray[Any] | Sequence[int],
    attack: str | Mapping[str, Any] | Attack | OwnAttack = "pgd-40",
    *,
    eps: float | str | None = None,
    norm: str = "Linf",
    threat: Threat | Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Return adversarial images, within the budget, for a batch or a data set.

    An image that is misclassified already stays as it is. Where nothing that fools the model is found, the last search
    leaves its strongest try. What comes out depends on the image, its place, the seed and the model, and not on
    `batch_size`.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K]; asked in eval mode and left as it was found.
        images: uint8, or floating in [0, 1], [N, C, H, W], or a list of tensors [C, H, W].
        labels: integers [N].
        attack: a name (`pgd-40`), a mapping, an attack, or a function of (model, images, labels) to images.
        eps: radius, 0.03 or `8/255`.
        norm: `Linf`, `L2` or `L1`.
        threat: in place of eps and norm, as `evaluate` takes it.
        batch_size: images at once at most.
        seed: of all random numbers.

    Returns:
        Float32 [N, C, H, W] in [0, 1], on the device of `images`.

    Raises:
        UserError: for a model, images, labels, an attack or a threat that do not fit.
    """
    check_module(model, "model", "the order is attack(model, images, labels)")
    if isinstance(attack, list | tuple):
        raise UserError("attack: is one attack, as in attack(model, images, labels, 'pgd-40'); call it for each")
    if (threat is None) == (eps is None):
        raise UserError("give eps, e.g. eps='8/255', or threat" if eps is None else "give eps or threat, not both")
    whole("batch_size", batch_size, 1)
    whole("seed", seed)
    pixels, numbers = check_images(*tensors_of(images, labels))
    chosen = attacks.build(as_attack(attack, "attack"), "attack")
    against = build_threat({"norm": norm, "eps": eps} if threat is None else threat, "threat")
    against = against.for_images(pixels.shape[1:])
    chosen.check(against)
    model, came = without_inference_tensors(model), pixels.device
    found: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        subject = Subject(model, None, batch_size)
        for rows in torch.split(torch.arange(len(pixels)), subject.batch_size):
            some = pixels[rows.to(came)].to(subject.device)
            x = some.float() / 255 if some.dtype == torch.uint8 else some.float()
            y = numbers[rows.to(numbers.device)].to(subject.device, torch.int64)
            with told_if_unfit(model, x):
                classes = subject.logits(x[:1]).shape[1]
            refuse_labels(y, classes)
            if not found:
                parts = chosen.parts(classes, against, subject.query().num_heads(x[:1]))
                _warn_of_blindness(parts, subject, x[:PROBES], y[:PROBES], chosen.label)
            streams = Streams.of(seed, rows.to(subject.device))
            found.append(chosen.search(subject.query(), x, y, against, streams).detach())
    return torch.cat(found).to(came)


def _warn_of_blindness(parts: Sequence[Search], subject: Subject, x: Tensor, y: Tensor, label: str) -> None:
    """Tell where gradients lead an attack nowhere: its images are then noise, and accuracy on them looks robust."""
    if not any(part.uses_gradients for part in parts):
        return
    gradient = input_gradient(subject, x, y)
    if gradient is None or not bool(gradient.any()):
        _log.warning(
            "attack: no gradient of the model reaches the images (detach, no_grad, rounded or saturated outputs), so "
            "%s searches blindly: accuracy on what it returns says nothing of robustness; attack with square, or a "
            "model without that step", label,
        )  # fmt: skip
