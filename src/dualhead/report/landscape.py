"""Where outputs change their mind: in logits, and in the plane around an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.report.figures import WIDTH, Figure, horizontal_grid, scale, vertical_grid
from dualhead.report.svg import LETTER, Drawing, ticks
from dualhead.report.text import eps_text, shortened

RIGHT, WRONG, EVEN = (10, 125, 90), (192, 57, 43), (250, 250, 250)
"""Colours of a landscape; they are part of the picture, the same on dark and light pages."""


def landscapes(arrays: Mapping[str, NDArray[Any]], called: Sequence[str], names: Mapping[int, str]) -> list[Figure]:
    """Return margins of every output around those images of a gallery whose surroundings are mapped.

    Args:
        arrays: arrays of the gallery.
        called: names of the outputs.
        names: names of the classes.
    """
    found = []
    for number, row in enumerate(arrays["landscape_rows"].tolist()):
        label = int(arrays["label"][row])
        title = f"Sample {int(arrays['index'][row])}, label {shortened(names.get(label, str(label)), 24)}"
        found.append(_landscape(title, arrays["landscape"][number], called))
    return found


def margins(arrays: Mapping[str, NDArray[Any]], called: Sequence[str]) -> Figure:
    """Return margins of head 1 against those of head 2, on clean images and under the attack on the last output."""
    clean, attacked = arrays["clean_margin"], arrays["margin"][-1, -1]
    both = np.concatenate((clean, attacked))[:, :2]
    seen = both[np.isfinite(both)]
    ends = np.quantile(seen, (0.01, 0.99)) if len(seen) else np.zeros(2)
    span = float(ends[1] - ends[0]) or 1.0
    low, high = min(float(ends[0]), 0.0) - 0.06 * span, max(float(ends[1]), 0.0) + 0.06 * span
    left, right, top, bottom = 44.0, WIDTH - 12, 46.0, 330.0
    at_x, at_y = scale((low, high), (left, right)), scale((low, high), (bottom, top))
    eps = eps_text(float(arrays["eps"][-1]), str(arrays["norm"]))
    held = attacked[:, -1] > 0
    both_right = [_share((values[:, :2] > 0).all(axis=1)) for values in (clean, attacked)]
    told = (
        f"{len(clean)} images, clean and under the attack on {called[-1]} at eps {eps}. "
        f"Both heads right: clean {both_right[0]}, attacked {both_right[1]}. "
        f"{called[-1]} right under attack: {_share(held)}."
    )
    drawing = Drawing(WIDTH, bottom + 40, f"Margins of the heads. {told}")
    x = 12.0
    for style, words in (
        ("ring ink", "clean"), ("fill ok", f"attacked, {called[-1]} right"), ("fill alarm", "wrong"),
    ):  # fmt: skip
        drawing.circle(x, 12, 4, style)
        drawing.text(x + 9, 16, words)
        x += 26 + LETTER * len(words)
    values = ticks(low, high, 5)
    vertical_grid(drawing, values, at_x, top, bottom, lambda value: f"{value:g}")
    horizontal_grid(drawing, values, at_y, left, right, lambda value: f"{value:g}")
    drawing.line(at_x(0), top, at_x(0), bottom, "axis-line")
    drawing.line(left, at_y(0), right, at_y(0), "axis-line")
    drawing.text((left + right) / 2, bottom + 32, f"margin at {called[0]}", "axis", "middle")
    drawing.text(6, 35, f"margin at {called[1]}", "axis")

    def place(values: NDArray[Any]) -> tuple[float, float]:
        x, y = np.nan_to_num(values[:2]).clip(low, high).tolist()
        return at_x(x), at_y(y)

    for number, label in enumerate(arrays["label"].tolist()):
        tip = f"sample {int(arrays['index'][number])}, label {label}"
        start, end = place(clean[number]), place(attacked[number])
        drawing.line(*start, *end, "join faint")
        drawing.circle(*start, 2.6, "ring ink", f"{tip}, clean")
        drawing.circle(*end, 3.2, "fill ok" if held[number] else "fill alarm", f"{tip}, attacked")
    caption = (
        "A margin is the label's logit minus the highest other one: right of the upright axis head 1 is right, above "
        f"the level one head 2. A line leads from each clean image to what the attack on {called[-1]} made of it. "
        "Points beyond the frame are drawn on it."
    )
    return Figure("margins-of-the-heads", "What the attack does to both heads", drawing.markup(), caption)


def _share(flags: Any) -> str:
    return f"{100 * float(flags.mean()):.0f} %"


def _landscape(title: str, surface: NDArray[Any], called: Sequence[str]) -> Figure:
    """Return the margin of each output in the plane of the attack's direction and a random one."""
    count = len(called)
    gap, top = 10.0, 22.0
    side = (WIDTH - gap * (count + 1)) / max(count, 2)
    drawing = Drawing(WIDTH, top + side + 36, f"{title}. Around the image {_told(surface, called)}")
    reach = 1.5
    for number, (name, values) in enumerate(zip(called, surface, strict=True)):
        left = gap + number * (side + gap)
        drawing.text(left + side / 2, 14, name.removesuffix(" of heads"), "strong", "middle", tip=name)
        drawing.image(left, top, side, side, _colours(values))
        at_x, at_y = scale((-reach, reach), (left, left + side)), scale((-reach, reach), (top + side, top))
        for line in _boundary(values):
            points = [(at_x(reach * (2 * x - 1)), at_y(reach * (2 * y - 1))) for x, y in line]
            drawing.path(points, "boundary")
        drawing.circle(at_x(0), at_y(0), 3.2, "ring ink", "the clean image")
        drawing.circle(at_x(1), at_y(0), 3.2, "fill dark", "the attacked image")
        drawing.text(left + side / 2, top + side + 15, "attack's direction", "axis", "middle")
    drawing.text(gap, top + side + 31, "upwards: a random direction of length eps", "axis")
    return Figure("landscape-" + "".join(c if c.isalnum() and c.isascii() else "-" for c in title.lower())[:40], title,
                  drawing.markup())  # fmt: skip


def _told(surface: NDArray[Any], called: Sequence[str]) -> str:
    return "; ".join(
        f"{name} is right on {_share(values > 0)} of the plane" for name, values in zip(called, surface, strict=True)
    )


def _colours(values: NDArray[Any]) -> str:
    """Return a data URI of a surface, its first row at the bottom: the deeper a colour, the farther from zero."""
    from PIL import Image

    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    depth = (np.abs(finite) / (np.abs(finite).max() or 1.0))[..., None] ** 0.6 * 0.85 + 0.12 * (finite[..., None] != 0)
    towards = np.where(finite[..., None] > 0, np.array(RIGHT), np.array(WRONG))
    mixed = np.array(EVEN) * (1 - depth) + towards * depth
    stored = io.BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)[::-1].copy()).save(stored, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stored.getvalue()).decode()


def _boundary(values: NDArray[Any]) -> list[list[tuple[float, float]]]:
    """Trace where a surface is zero: pieces of lines in the unit square, by marching squares."""
    rows, columns = values.shape
    pieces = []
    for r in range(rows - 1):
        for c in range(columns - 1):
            corners = [(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1)]
            heights = [float(values[y, x]) for x, y in corners]
            crossings = []
            for (first, a), (second, b) in zip(
                zip(corners, heights, strict=True),
                zip(corners[1:] + corners[:1], heights[1:] + heights[:1], strict=True),
                strict=True,
            ):
                if (a > 0) != (b > 0) and np.isfinite(a) and np.isfinite(b):
                    share = a / (a - b)
                    x, y = (p + share * (q - p) for p, q in zip(first, second, strict=True))
                    crossings.append((x / (columns - 1), y / (rows - 1)))
            pieces += [crossings[n : n + 2] for n in range(0, len(crossings) - 1, 2)]
    return pieces
