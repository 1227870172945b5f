"""Images made once against another network: the static protocol, told apart from attacks on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.evaluation.results import interval, share

TRANSFER = "transfer"
"""Key of results."""
NOTE = "images were made against {source} alone; no attack saw this model, so the number flatters it"


def transfer_results(
    source: str,
    right: Mapping[str, NDArray[np.bool_]],
    fooled: Mapping[str, NDArray[np.bool_]],
    clean: NDArray[np.bool_],
) -> dict[str, Any]:
    """Return what `results.json` holds as `transfer`.

    Args:
        source: what the other network is called.
        right: bool [N] by attack: whether the model is right on the clean image and on the one made by the attack.
        fooled: bool [N] by attack: whether the image fooled the network that it was made against.
        clean: bool [N]: whether the model is right on the clean image.

    Returns:
        `accuracy` over all attacks together, `interval`, and by attack these and `fooled_source`, in [0, 1].
    """
    together = np.logical_and.reduce([clean, *right.values()])
    return {
        "from": source,
        "accuracy": share(together),
        "interval": interval(together),
        "attacks": {
            name: {
                "accuracy": share(column),
                "interval": interval(column),
                "fooled_source": share(fooled[name]),
            }
            for name, column in right.items()
        },
        "note": NOTE.format(source=source),
    }
