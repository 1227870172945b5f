"""How well a classifier's scores tell test images from others, as they are and under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Final

import torch
from torch import Tensor, nn

from dualhead.attacks import Maximiser, attacks, maximise_within
from dualhead.data import Split
from dualhead.errors import UserError
from dualhead.evaluation.generation import SCORES, Score, auroc, ood_score
from dualhead.evaluation.model import device_of, frozen, read_logits
from dualhead.noise import Streams
from dualhead.statistics import wilson
from dualhead.threats import Threat

MOST: Final = 1_000
"""Images on either side, at most."""
STEPS: Final = 20
BATCH: Final = 128


def measure_ood(
    model: nn.Module, test: Split, others: Mapping[str, Split], threat: Threat, *, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure how well three scores tell test images from images of other sources (AUROC).

    Under attack each other image climbs the very score that is measured, within the threat, and the best iterate
    counts; the test images stay as they are (Augustin et al. 2020, arXiv 2003.09461, section 4).

    Args:
        model: images to logits [B, K]; asked in eval mode.
        test: images in distribution.
        others: by name, images that are not, of the same shape.
        threat: of the attack.
        seed: of the attack's random start.

    Returns:
        JSON values, `ood` in `results.json`: by source and score `auroc` and `auroc_attacked` in [0, 1], with 95 %
        intervals over images; and the marginal energies of each source, float32 [N].

    Raises:
        UserError: for images of another shape.
    """
    inside = _some(test)
    device = device_of(model)
    inside_scores = {kind: ood_score(model, inside.to(device), kind).cpu() for kind in SCORES}
    found: dict[str, Any] = {}
    energies: dict[str, Tensor] = {}
    for name, split in others.items():
        if split.image_shape != test.image_shape:
            raise UserError(
                f"--ood {name}: its images are {'x'.join(map(str, split.image_shape))}, those of the model "
                f"{'x'.join(map(str, test.image_shape))}"
            )
        x = _some(split)
        scores = {}
        for kind in SCORES:
            outside = ood_score(model, x.to(device), kind).cpu()
            attacked = _attacked(model, x.to(device), kind, threat, seed).cpu()
            scores[kind] = {
                "auroc": auroc(inside_scores[kind], outside),
                "interval": auroc_interval(inside_scores[kind], outside),
                "auroc_attacked": auroc(inside_scores[kind], attacked),
                "interval_attacked": auroc_interval(inside_scores[kind], attacked),
            }
            if kind == "lse":
                energies[name] = outside
        found[name] = {"images": len(x), "scores": scores}
    facts = {
        "test_images": len(inside), "threat": threat.describe(), "attack": f"pgd-{STEPS} on each score", "seed": seed
    }  # fmt: skip
    return {**facts, "sources": found}, energies


def auroc_interval(inside: Tensor, outside: Tensor, confidence: float = 0.95) -> list[float]:
    """Return the interval of an AUROC over images (DeLong et al. 1988, normal approximation, cut to [0, 1]).

    Where scores are wholly apart, or all one, that has no width and would claim certainty, be it of five images; then
    it is Wilson's, of as many images as the smaller side has.
    """
    a, b = inside.double().sort().values, outside.double().sort().values

    def below(of: Tensor, values: Tensor) -> Tensor:
        left, right = (torch.searchsorted(of, values, right=side) for side in (False, True))
        return (left + right).double() / (2 * len(of))

    placed_out, placed_in = below(a, outside.double()), 1.0 - below(b, inside.double())
    variance = sum(float(p.var()) / len(p) if len(p) > 1 else math.inf for p in (placed_out, placed_in))
    if variance == 0:
        fewest = min(len(a), len(b))
        return list(wilson(round(float(placed_out.mean()) * fewest), fewest, confidence))
    middle, reach = float(placed_out.mean()), NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    return [max(middle - reach, 0.0), min(middle + reach, 1.0)]


def _attacked(model: nn.Module, x: Tensor, kind: Score, threat: Threat, seed: int) -> Tensor:
    """Scores [N] of the iterates that look most like images in distribution."""
    attack = attacks.build({"name": "pgd", "steps": STEPS})
    assert isinstance(attack, Maximiser)
    best = ood_score(model, x, kind)
    found = []
    with frozen(model):
        for first in range(0, len(x), BATCH):
            part, lowest = x[first : first + BATCH], best[first : first + BATCH].clone()

            def climb(images: Tensor, lowest: Tensor = lowest) -> Tensor:
                inner = _inlier(read_logits(model, images).float(), kind)
                reached = inner.detach()
                lowest.copy_(torch.minimum(lowest, -(reached.exp() if kind == "msp" else reached)))
                return inner

            where = Streams.of(seed, torch.arange(first, first + len(part), device=x.device))
            last = maximise_within(attack, climb, part, threat, where)
            found.append(torch.minimum(lowest, ood_score(model, last, kind)))
    return torch.cat(found)


def _inlier(logits: Tensor, kind: Score) -> Tensor:
    """Compute the climbed value [B]: minus the score, for `msp` its logarithm, whose gradient does not vanish."""
    if kind == "lse":
        return logits.logsumexp(1)
    return (logits.log_softmax(1) if kind == "msp" else logits).amax(1)


def _some(split: Split) -> Tensor:
    """The images of a split, at most MOST of them, float32 in [0, 1]."""
    if len(split) > MOST:
        split = split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:MOST].sort().values)
    return torch.as_tensor(split.images[:]).float().div(255.0)
