"""Images under attack for people to look at: every output of a model, attacked at several budgets.

These are illustrations beside an evaluation, not a part of it: a fixed attack (`pgd-20`) on some of the images, each
output in turn as its target, whether it succeeds or not. What every output says of each image is kept with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks import LogitsFn, Query, attacks, predictions
from dualhead.attacks.losses import margin
from dualhead.data import to_bytes
from dualhead.errors import UserError
from dualhead.evaluation.journal import write_arrays
from dualhead.evaluation.model import (
    check_images,
    device_of,
    frozen,
    outputs_of,
    pad_rows,
    read_logits,
    refuse_labels,
    told_if_unfit,
)
from dualhead.evaluation.scheduler import Samples
from dualhead.names import AGGREGATE, MEAN, MODEL, head_id
from dualhead.noise import Streams
from dualhead.system.devices import float32_products
from dualhead.system.outputs import without_inference_tensors
from dualhead.threats import Threat, build_threat

ATTACK = "pgd-20"
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Budgets of the gallery, as shares of the threat model's eps."""
LANDSCAPES = 3
"""Samples whose surroundings are mapped, if nobody chooses."""
SIDE, REACH = 25, 1.5
"""Points to a side of a landscape, and how far it reaches, in lengths of the attack's perturbation."""


@dataclass(frozen=True)
class Gallery:
    """Some images under attack.

    O outputs (the heads and, last, what merges them; or the model alone), each also a target, S budgets, M samples.

    Args:
        outputs: their names [O].
        attack: what was used.
        norm: of the threat model, or the name of a threat that is no norm.
        eps: float64 [S], ascending.
        index: int64 [M], names of the samples.
        label: int64 [M].
        original: uint8 [M, C, H, W], the clean images.
        adversarial: uint8 [O, S, M, C, H, W], by target and budget, rounded for the eye; what the outputs say is of the
            float32 image before that.
        clean_prediction: int64 [M, O]; -1 where logits are not numbers.
        clean_probability: float32 [M, O, 2], of the predicted class and of the label.
        clean_margin: float32 [M, O], the label's logit minus the highest other one.
        prediction: int64 [O, S, M, O], by target, budget, sample and output.
        probability: float32 [O, S, M, O, 2].
        margin: float32 [O, S, M, O].
        landscape_rows: int64 [L], positions of the samples whose surroundings are mapped.
        landscape: float32 [L, O, SIDE, SIDE], margins of the outputs around each image: along the last axis the
            perturbation that the attack found at the largest budget against the last output, along the one before a
            random direction of length eps, both from -REACH to REACH.
    """

    outputs: NDArray[np.str_]
    attack: NDArray[np.str_]
    norm: NDArray[np.str_]
    eps: NDArray[np.float64]
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    original: NDArray[np.uint8]
    adversarial: NDArray[np.uint8]
    clean_prediction: NDArray[np.int64]
    clean_probability: NDArray[np.float32]
    clean_margin: NDArray[np.float32]
    prediction: NDArray[np.int64]
    probability: NDArray[np.float32]
    margin: NDArray[np.float32]
    landscape_rows: NDArray[np.int64]
    landscape: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write the arrays to an npz file, atomically."""
        write_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})


def _merged(model: nn.Module) -> str:
    """Return the id of a model's last output: an aggregator that takes the mean is called so."""
    return MEAN if getattr(model, "is_mean", False) else AGGREGATE


@float32_products()  # what it shows agrees with the verdicts
def make_gallery(
    model: nn.Module,
    images: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any] | Sequence[int],
    *,
    threat: Threat | Mapping[str, Any],
    index: Sequence[int] | None = None,
    landscapes: Sequence[int] | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    batch_size: int = 64,
) -> Gallery:
    """Attack each output of a model on some images, at several budgets, and keep what there is to see.

    It costs about 20 passes forward and back per image, output and budget. Nothing depends on the batch size, as far as
    the model's kernels allow.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits; its heads are shown if it has `head_logits`.
        images: uint8, or floating in [0, 1], [M, C, H, W] with one or three channels.
        labels: integers [M].
        threat: what the adversary may do, with the largest budget; as in `evaluate`.
        index: a number per sample that names it; None for 0 to M - 1.
        landscapes: names of the samples whose surroundings are mapped; None for those on which outputs under attack
            disagree, and the first others.
        shares: budgets, ascending, as shares of the threat model's eps.
        seed: of all random numbers.
        batch_size: images at once.

    Raises:
        UserError: for images or labels that do not fit the model or each other, or a landscape of a sample that is not
            there.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    images, labels = check_images(images, labels)
    model = without_inference_tensors(model)
    threat = build_threat(threat, "threat").for_images(images.shape[1:])
    names = torch.arange(len(images)) if index is None else torch.as_tensor(index)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        return _Visit(model, images, labels, names, threat, seed, batch_size).gallery(landscapes, shares)


@dataclass
class _Said:
    """Answers of the outputs to images: predictions [M, O], probabilities [M, O, 2] and margins [M, O]."""

    prediction: Tensor
    probability: Tensor
    margin: Tensor


class _Visit:
    """One call of `make_gallery`."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        names: Tensor,
        threat: Threat,
        seed: int,
        batch_size: int,
    ) -> None:
        self.threat, self.names, self.seed, self.batch_size = threat, names, seed, batch_size
        device = device_of(model)
        self.x = Samples.images_at(images, torch.arange(len(images)), device)
        self.origin = threat.lift(self.x)
        self.y = labels.to(device, torch.int64)
        heads = outputs_of(model, None)
        ask: LogitsFn = heads or (lambda x: read_logits(model, x)[:, None])
        self.outputs: LogitsFn = lambda x: ask(x.clone())  # a model may change the images that it is given
        self.streams = Streams.of(seed, names.to(device)).fork("gallery")
        with told_if_unfit(model, images):
            logits = self._logits(self.x)
        refuse_labels(labels, logits.shape[2])
        self.clean = self._read(logits, self.y)
        count = self.clean.margin.shape[1]
        shown: tuple[str, ...] | None = getattr(model, "shown_outputs", None)
        self.ids = list(shown or (*map(head_id, range(1, count)), _merged(model))) if heads else [MODEL]

    def _ask(self, x: Tensor) -> Tensor:
        """Logits [B, O, K] of all outputs."""
        return self.outputs(pad_rows(x))[: len(x)].float()

    def _logits(self, x: Tensor) -> Tensor:
        """Return the same of many images, without a graph."""
        with torch.no_grad():
            return torch.cat([self._ask(part) for part in torch.split(x, self.batch_size)])

    def _said(self, x: Tensor, y: Tensor) -> _Said:
        return self._read(self._logits(x), y)

    @staticmethod
    def _read(logits: Tensor, y: Tensor) -> _Said:
        """Return what logits [M, O, K] say."""
        outputs = logits.shape[1]
        flat, labels = logits.flatten(0, 1), y.repeat_interleave(outputs)
        shares, predicted = flat.softmax(1), predictions(flat)
        both = torch.stack((predicted.clamp_min(0), labels), 1)  # of no class no share is known: NaN, as all of them
        return _Said(
            predicted.reshape(-1, outputs),
            shares.gather(1, both).reshape(-1, outputs, 2),
            -margin(flat, labels).reshape(-1, outputs),
        )

    def _attack(self, target: int, threat: Threat) -> Tensor:
        """Points [M, ...] of the threat that an attack on one output leads to."""
        attack, found = attacks.build(ATTACK), []
        query = Query(lambda x: self._ask(x)[:, target]).through(threat.render)
        for rows in torch.split(torch.arange(len(self.x), device=self.x.device), self.batch_size):
            streams = self.streams[rows].fork(target)
            found.append(attack.search_points(query, self.origin[rows], self.y[rows], threat, streams))
        return torch.cat(found)

    def gallery(self, landscapes: Sequence[int] | None, shares: Sequence[float]) -> Gallery:
        """Attack, ask, and map."""
        threats = [self.threat.within(share * self.threat.eps) for share in shares]
        shown: list[list[NDArray[Any]]] = []
        said: list[list[_Said]] = []
        points = self.origin
        for target in range(len(self.ids)):
            shown.append([])
            said.append([])
            for threat in threats:
                points = self._attack(target, threat)
                adversarial = torch.cat([threat.render(part) for part in torch.split(points, self.batch_size)])
                shown[-1].append(to_bytes(adversarial).cpu().numpy())
                said[-1].append(self._said(adversarial, self.y))
        rows = self._chosen(landscapes, said[-1][-1] if shares else self.clean)
        return Gallery(
            outputs=np.array(self.ids),
            attack=np.array(ATTACK),
            norm=np.array(self.threat.kind),
            eps=np.array([threat.eps for threat in threats]),
            index=self.names.cpu().numpy().astype(np.int64),
            label=self.y.cpu().numpy(),
            original=to_bytes(self.x).cpu().numpy(),
            adversarial=np.array(shown),
            **{f"clean_{name}": value.cpu().numpy() for name, value in vars(self.clean).items()},
            **{
                name: np.array([[getattr(one, name).cpu().numpy() for one in row] for row in said])
                for name in vars(self.clean)
            },
            landscape_rows=np.array(rows, np.int64),
            landscape=np.array([self._landscape(row, points[row]) for row in rows], np.float32),
        )

    def _chosen(self, landscapes: Sequence[int] | None, attacked: _Said) -> list[int]:
        """Positions of the samples to map."""
        if landscapes is not None:
            places = {int(name): place for place, name in enumerate(self.names)}
            missing = [name for name in landscapes if name not in places]
            if missing:
                raise UserError(f"landscape of sample {missing[0]}: it is not among the {len(places)} of the gallery")
            return [places[name] for name in landscapes]
        right = attacked.margin > 0
        interest = (right.any(1) & ~right.all(1)).int() * 2 + (self.clean.margin > 0).all(1).int()
        interest += (
            4 * (self.clean.margin[:, -1] > 0).int()
        )  # what is wrong already is not attacked: no direction to map
        return sorted(interest.argsort(descending=True, stable=True)[:LANDSCAPES].tolist())

    def _landscape(self, row: int, point: Tensor) -> NDArray[Any]:
        """Margins of the outputs [O, SIDE, SIDE] on a plane through an image's origin among the threat's points."""
        origin, streams = self.origin[row], self.streams[torch.tensor([row], device=self.x.device)].fork("landscape")
        aside = self.threat.direction(origin, streams)
        steps = torch.linspace(-REACH, REACH, SIDE, device=origin.device)
        ahead = (point - origin) * steps.reshape(-1, *(1 for _ in origin.shape))
        plane = self.threat.render(torch.cat([origin + ahead + step * aside for step in steps])).clamp(0.0, 1.0)
        said = self._said(plane, self.y[row].expand(len(plane)))
        return said.margin.T.reshape(-1, SIDE, SIDE).cpu().numpy()
