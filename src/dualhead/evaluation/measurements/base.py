"""The contract of an evaluation that is no attack: images in fixed renderings, shown to the model and counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.components.registry import Registry
from dualhead.data import to_bytes
from dualhead.errors import UserError
from dualhead.statistics import interval_over_samples


class Measurement(ABC):
    """Accuracy on changed images, named among the attacks of an evaluation though it is none.

    Nobody searches and no budget holds, so it has no threat and no verdicts: every image is shown in `levels`
    renderings of each kind, misclassified ones too, and `worst` leaves them out. Results hold it under its registered
    name. Subclasses are frozen dataclasses, registered in `measurements`.
    """

    registered_name: ClassVar[str]
    levels: ClassVar[int]
    """Renderings of each kind, the mildest first."""
    needs_heads: ClassVar[bool] = False
    """As of an attack: none shows the model's heads one by one."""

    @property
    def forward_passes(self) -> int:
        """Return how many passes an image costs."""
        return len(self.kinds()) * self.levels

    @abstractmethod
    def kinds(self) -> Sequence[str]:
        """Return the names of the changes, in their order."""

    @abstractmethod
    def check(self, image_shape: Sequence[int]) -> None:
        """Refuse images [C, H, W] that cannot be changed.

        Raises:
            UserError: saying which can.
        """

    @abstractmethod
    def render(self, image: NDArray[np.uint8], kind: str, level: int, key: tuple[int, int]) -> NDArray[np.uint8]:
        """Return an image [C, H, W] changed.

        Args:
            image: uint8 [C, H, W].
            kind: one of `kinds()`.
            level: from 1 to `levels`.
            key: seed of the evaluation and name of the sample, both at least 0, by which randomness is drawn.
        """

    @abstractmethod
    def facts(self, image_shape: Sequence[int]) -> Mapping[str, Any]:
        """Return what results say beside accuracies, JSON values: `name`, as people read it, and more."""


measurements: Registry[Measurement] = Registry("measurement", "dualhead.evaluation.measurements", Measurement)


def right_when_changed(
    measurement: Measurement,
    answer: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    kind: str,
    seed: int,
    size: int,
) -> NDArray[np.bool_]:
    """Tell which images are classified correctly when changed, bool [N, L] by level.

    Args:
        measurement: changes them.
        answer: images float32 [B, C, H, W] on the CPU to classes int64 [B].
        images: uint8, or floating in [0, 1], which is rounded to 8 bits, [N, C, H, W].
        labels: int64 [N].
        keys: int64 [N], names of the samples, by which randomness is drawn.
        kind: of the changes.
        seed: of the evaluation.
        size: images at once.
    """
    right = np.zeros((len(images), measurement.levels), bool)
    for rows in torch.split(torch.arange(len(images)), size):
        pixels = to_bytes(images[rows]).numpy()
        # A seed or a key may be negative; numpy's seeds are not.
        named = [(seed % 2**64, int(key) % 2**64) for key in keys[rows]]
        for level in range(1, measurement.levels + 1):
            worn = [measurement.render(image, kind, level, key) for image, key in zip(pixels, named, strict=True)]
            for image in worn:
                if image.dtype != np.uint8 or image.shape != pixels.shape[1:]:
                    raise UserError(
                        f"{measurement.registered_name}: render must return uint8 {list(pixels.shape[1:])}; "
                        f"got {image.dtype} {list(image.shape)}"
                    )
            given = torch.from_numpy(np.stack(worn)).float().div_(255.0)
            right[rows.numpy(), level - 1] = (answer(given) == labels[rows]).numpy()
    return right


def summary(measurement: Measurement, right: NDArray[np.bool_], image_shape: Sequence[int]) -> dict[str, Any]:
    """Return what `results.json` says of a measurement.

    Args:
        measurement: the one that was done.
        right: bool [N, K, L], by kind and level.
        image_shape: of an image, [C, H, W].
    """
    return {
        **measurement.facts(image_shape),
        **_mean(right.mean((1, 2))),
        "kinds": {
            kind: {**_mean(right[:, number].mean(1)), "severities": [float(s) for s in right[:, number].mean(0)]}
            for number, kind in enumerate(measurement.kinds())
        },
    }


def _mean(shares: NDArray[np.float64]) -> dict[str, Any]:
    """The mean over images of the share of renderings that are right, and its 95 % interval."""
    low, high = interval_over_samples(np.zeros((1, len(shares))), shares[None])
    return {"accuracy": float(shares.mean()), "interval": [max(low, 0.0), high]}
