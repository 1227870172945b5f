"""Failed and warning checks as lines: what is told, in which order, and of whom."""

from __future__ import annotations

import inspect
import re

import pytest

from dualhead.evaluation import diagnostics, duplicates
from dualhead.report.lights import CHECKS, MOST_NAMED, believable, light_lines, lights


def check(name, status, message="do this"):
    return {"name": name, "status": status, "message": message}


def test_failures_come_first_and_causes_before_consequences():
    found = lights([
        check("curve", "warning"), check("large_eps", "failed"), check("logits", "ok"), check("one_class", "failed"),
        check("of_another_version", "failed"),
    ])  # fmt: skip
    assert [entry["name"] for entry in found] == ["one_class", "large_eps", "of_another_version", "curve"]
    assert not believable(found)
    assert believable(found[-1:])


@pytest.mark.parametrize("held", [None, {}, "failed", [None, 3, {"status": "failed"}], [check("curve", "ok")]])
def test_what_holds_no_light_gives_none(held):
    assert lights(held) == []
    assert believable(lights(held))


def test_one_line_a_check_names_its_models():
    lines = light_lines([
        ("a", lights([check("curve", "warning"), check("large_eps", "failed", "left 3 %\nof 32")])),
        ("b", lights([check("large_eps", "failed", "left 4 %")])),
    ])  # fmt: skip
    assert lines == ["failed: large_eps (a, b): left 3 % of 32 (numbers of a)", "warning: curve (a): do this"]
    assert light_lines([("", lights([check("curve", "warning")]))]) == ["warning: curve: do this"]
    many = [(str(n), lights([check("curve", "warning")])) for n in range(MOST_NAMED + 3)]
    assert light_lines(many) == ["warning: curve (0, 1, 2, 3 and 3 more): do this"]


def test_every_check_of_the_diagnostics_has_a_purpose():
    """Names are read from the code that finds them; those of samples have a section of their own."""
    assert all(purpose.endswith(".") for purpose in CHECKS.values())
    code = "".join(inspect.getsource(module) for module in (diagnostics, duplicates))
    found = set(re.findall(r"[Ff]inding\(\s*\"(\w+)\"", code))
    assert {"more_steps", "precision", "randomness"} <= found <= CHECKS.keys()
