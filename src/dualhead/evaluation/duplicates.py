"""The check for images that a model was trained on among those that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from dualhead.data import Digests, shared_images
from dualhead.evaluation.diagnostics import Finding

NAME: Final = "duplicates"
_FEW: Final = 0.001  # of the test images: less than the accuracy that a table shows
_MANY: Final = 0.01
_MEASURED: Final = ("held-out", "test")


def check_duplicates(sets: Mapping[str, Digests], unread: Sequence[str] = ()) -> Finding:
    """Look for images that occur in two sets, pixel by pixel; the same picture compressed anew is not found.

    Args:
        sets: `digests` of `training`, `extra`, `held-out` and `test` images, in this order, as far as there are any.
        unread: names of those that are not among them since their images stay on disk.
    """
    found = shared_images(sets)
    if not found:
        left = f"; not looked for among {', '.join(unread)} images, which stay on disk" if unread else ""
        return Finding(NAME, "ok", f"no image occurs in two of: {', '.join(sets)}{left}")
    worst = max(found, key=lambda one: (one.of in _MEASURED, one.of == "test", one.number / one.total))
    told = "; ".join(
        f"{one.number:,} of {one.total:,} {one.of} images are {one.also} images too (the first is number {one.first})"
        for one in found
    )
    share = max((one.number / one.total for one in found if one.of == "test"), default=0.0)
    if worst.of not in _MEASURED or worst.number / worst.total < _FEW:
        return Finding(NAME, "ok", told)
    advice = "remove them: accuracy counts what was learnt by heart"
    return Finding(NAME, "failed" if share >= _MANY else "warning", f"{told}; {advice}")
