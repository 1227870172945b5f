"""Drawings as SVG: every string is escaped by the XML writer, colours come from the page's style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from markupsafe import Markup

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold."""

LETTER = 6.3
"""About the width of a letter at the size that drawings use."""


class Drawing:
    """An SVG image of a fixed width that scales with the page.

    Args:
        width: width in units; text is 12 units high.
        height: height in units.
        description: its content in words, for those who do not see it.
    """

    def __init__(self, width: float, height: float, description: str) -> None:
        self.width, self.height = width, height
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {width:g} {height:g}",
                "role": "img",
                "aria-label": printable(description),
            },
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Draw a straight line."""
        self._add("line", style, x1=x1, y1=y1, x2=x2, y2=y2)

    def rectangle(
        self, x: float, y: float, width: float, height: float, style: str, tip: str = "", opacity: str = "1"
    ) -> None:
        """Draw a rectangle, with words that show when it is pointed at."""
        more = {} if opacity == "1" else {"fill-opacity": opacity}
        self._add("rect", style, tip, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **more)

    def circle(self, x: float, y: float, radius: float, style: str, tip: str = "") -> None:
        """Draw a disc, with words that show when it is pointed at."""
        self._add("circle", style, tip, cx=x, cy=y, r=radius)

    def image(self, x: float, y: float, width: float, height: float, data: str) -> None:
        """Place a picture, by its data URI, stretched to a rectangle."""
        self._add("image", "", x=x, y=y, width=width, height=height, href=data, preserveAspectRatio="none")

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draw a line through points, or an area bounded by it, as the style says."""
        words = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        ElementTree.SubElement(self._root, "path", {"class": style, "d": words})

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start", tip: str = "") -> None:
        """Write words; `anchor` is start, middle or end."""
        element = self._add("text", style, x=x, y=y, **{"text-anchor": anchor})
        if tip:
            ElementTree.SubElement(element, "title").text = printable(tip)
        ElementTree.SubElement(element, "tspan").text = printable(words)

    def upright(self, x: float, y: float, words: str, style: str, tip: str = "") -> None:
        """Write words that run downwards from a point."""
        element = self._add("text", style, x=x, y=y, transform=f"rotate(90 {x - 4:.1f} {y:.1f})")
        ElementTree.SubElement(element, "title").text = printable(tip or words)
        ElementTree.SubElement(element, "tspan").text = printable(words)

    def _add(self, tag: str, style: str, tip: str = "", **attributes: float | str) -> ElementTree.Element:
        given = {k: v if isinstance(v, str) else f"{v:.1f}".removesuffix(".0") for k, v in attributes.items()}
        element = ElementTree.SubElement(self._root, tag, {"class": style, **given} if style else given)
        if tip:
            ElementTree.SubElement(element, "title").text = printable(tip)
        return element

    def markup(self) -> Markup:
        """Return the image, for the page."""
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))  # escaped by the writer


def printable(text: str) -> str:
    """Escape text so that every reader of XML takes it."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from low to high, both of which lie within their reach."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(count, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
