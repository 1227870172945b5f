"""A short run of rubbish for every way in: it loads, or is refused with one line. `make fuzz` runs an hour of it."""

from __future__ import annotations

import logging

import fuzz_targets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEEDS = {name: seeds() for name, (_, seeds) in fuzz_targets.TARGETS.items()}
CUT, FLIP, REPEAT = range(3)
CHANGES = st.lists(st.tuples(st.sampled_from([CUT, FLIP, REPEAT]), st.floats(0, 1), st.binary(max_size=9)), max_size=4)


def changed(content: bytes, changes: list[tuple[int, float, bytes]]) -> bytes:
    """The content with pieces cut out, overwritten, or put in."""
    for kind, place, piece in changes:
        at = int(place * len(content))
        skipped = {CUT: 7 * len(piece), FLIP: len(piece), REPEAT: 0}[kind]
        content = content[:at] + (b"" if kind == CUT else piece) + content[at + skipped :]
    return content


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", "/dev/null")
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_what_is_well_formed_loads_or_is_refused(name):
    check, seeds = fuzz_targets.TARGETS[name]
    for content in seeds():
        check(content)
    check(b"")


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
@settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rubbish_is_refused_in_one_line(name, data):
    content = changed(data.draw(st.sampled_from(SEEDS[name])), data.draw(CHANGES))
    fuzz_targets.TARGETS[name][0](content)


FOUND = {
    "metadata that are no JSON": ("features", b'{"info": {'),
    "metadata of another shape": ("features", b'{"info": 3}'),
    "metadata that are no text": ("features", b'{"info": "\xd6"}'),
    "a feature that does not exist": ("features", b'{"info": {"features": {"img": {"_type": "Imagn"}}}}'),
    "a class label without names": ("features", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'),
    "a value without a type": ("features", b'{"info": {"features": {"label": {"_type": "Value"}}}}'),
    "class names from a file": (
        "features",
        b'{"info": {"features": {"img": {"_type": "Image"}, '
        b'"label": {"_type": "ClassLabel", "names_file": "/etc/hostname"}}}}',
    ),
    "a number too long to print": ("recipe", b"threat: {norm: Linf, eps: 0x" + b"f" * 5000 + b"}"),
    "anchors that double": (
        "recipe",
        b"a0: &a0 [1, 2]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)),
    ),
    "merges that double": (
        "recipe",
        b"a0: &a0 {x: 1, y: 2}\n"
        + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d], k%d: 1}\n" % (n, n, n - 1, n - 1, n) for n in range(1, 40)),
    ),
    "a key that steers a terminal": ("recipe", b'"\\e[2J\\n\\r": 1\ndata: 3'),
    "a parent whose name is too long for a file": ("recipe", b"extends: " + b"x" * 5000),
    "a parent whose name no file can have": ("recipe", b'extends: "a\\0b"'),
    "an empty number": ("recipe", b'data: !!int ""'),
    "stages whose name is a mapping": ("recipe", b"extends: digits\nstages: [{name: {a: 1}}]"),
    "a line break in a key": ("overrides", b'model.backbone={name: cnn, "a\\nb": 1}'),
}
"""What fuzzing, and thinking of it, has found: each was another exception, several lines, or had no end."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "content"), FOUND.values(), ids=list(FOUND))
def test_what_was_found_once(name, content):
    fuzz_targets.TARGETS[name][0](content)
