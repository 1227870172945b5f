"""One self-contained page of what runs left: nothing is loaded, and every string is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualhead.errors import UserError
from dualhead.report import comparison
from dualhead.report.calibration import calibration_table, reliability_diagrams
from dualhead.report.details import details
from dualhead.report.differences import difference
from dualhead.report.gallery import Album
from dualhead.report.lights import LIGHTS
from dualhead.report.sources import Measured, Source, read_sources
from dualhead.report.text import duration, percent, points
from dualhead.system.files import write_atomically

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
GLOSSARY = (
    ("clean", "images as they are"),
    ("eps", "how far an attack may change an image, in the norm that is named"),
    ("robust", "right before and after the attack"),
    ("base model", "trunk and head 1 before any other part was trained"),
    ("mean of heads", "the mean of their logits"),
    ("aggregate of heads", "what the aggregator makes of the heads' logits"),
    ("interval", "where the accuracy on all images of this kind lies, with 95 % certainty"),
)
"""Words of the tables, for who sees them first."""


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write a page about runs, side by side if there are several.

    It reads the folders alone, whatever is in them: a run without an evaluation, one that was stopped and one with
    damaged files are shown as far as they go, and the page says what is missing.

    Args:
        runs: folders of runs, of evaluations, or folders that hold several runs.
        output: the HTML file.

    Returns:
        The file.

    Raises:
        UserError: for a folder that holds neither run nor evaluation, or a file that cannot be written.
    """
    output = Path(output)
    if output.is_dir():
        raise UserError(f"-o {output}: is a folder; name a file, e.g. {output / 'report.html'}")
    page = _render(read_sources([Path(run) for run in runs]))
    try:
        write_atomically(output, lambda aside: aside.write_bytes(page.encode("utf-8", "replace")))
    except OSError as error:
        raise UserError(f"-o {output}: cannot be written ({error.strerror})") from None
    return output


def _render(sources: Sequence[Source]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        # Both files are the package's own. The digest lets the browser run this script and no other.
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        lights=LIGHTS,
        glossary=GLOSSARY,
        **_view(sources),
    )


def _breakable(text: str) -> Markup:
    """Let a name break after underscores, slashes and dots, as a sentence does between words."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(_|[/.](?=[A-Za-z]{2}))(?=\w)", r"\1<wbr>", str(escape(text))))  # escaped just before


def _view(found: Sequence[Source]) -> dict[str, Any]:
    sources = [comparison.once(source) for source in found]
    rows = [row for source in sources for row in source.rows]
    album = Album()
    return {
        "title": _listed([source.label for source in sources]) if len(sources) < 4 else f"{len(sources)} runs",
        "verdict": comparison.verdict(sources),
        "tiles": _tiles(sources[0]) if len(sources) == 1 else [],
        "accuracy": comparison.accuracy_figures(sources),
        "numbers": comparison.accuracy_table(rows) if rows else None,
        "conditions": comparison.conditions(rows),
        "changed": comparison.changed_tables([*rows, *(row for source in sources for row in source.further)]),
        "calibration": calibration_table(rows),
        "reliability": reliability_diagrams(rows),
        "downloads": comparison.downloads(rows) if rows else {},
        "differences": comparison.difference_table(sources),
        "trade_offs": comparison.trade_offs(sources),
        "over_eps": comparison.eps_figures(sources),
        "costs": comparison.cost_table(rows),
        "cost_unit": next((row.title for row in rows if row.flops), ""),
        "recipes": comparison.recipe_differences(sources),
        "runs": [details(source, album) for source in sources],
    }


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them: a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _tiles(source: Source) -> list[tuple[str, str, str]]:
    """Return the main numbers of a run: what, number, small print."""
    row = source.deployed or (source.rows[-1] if source.rows else None)
    if row is None or row.worst is None:
        return []
    tiles = [
        (
            "robust accuracy",
            f"{percent(row.worst.value)} %",
            f"95 %: {percent(row.worst.low)} to {percent(row.worst.high)}",
        ),
        (
            "clean accuracy",
            f"{percent(row.clean.value)} %",
            f"95 %: {percent(row.clean.low)} to {percent(row.clean.high)}",
        ),
        *_gain(source, row),
    ]
    statuses = [str(finding.get("status")) for finding in comparison.findings(row)]
    if statuses:
        bad = sum(status != "ok" for status in statuses)
        tiles.append(
            ("diagnostics", f"{len(statuses) - bad} of {len(statuses)} fine", "see Diagnostics" if bad else "")
        )
    if row.training_seconds is not None:
        tiles.append(("training time", duration(row.training_seconds), str(source.environment.get("device", ""))))
    return tiles


def _gain(source: Source, row: Measured) -> list[tuple[str, str, str]]:
    base = next((other for other in source.rows if other.role == "base" and other is not row), None)
    found = difference(row, base, "worst") if base else None
    if found is None:
        return []
    return [
        (
            "gain over base model",
            f"{points(found.difference)} points",
            "95 %: {} to {}".format(*map(points, found.interval)),
        )
    ]
