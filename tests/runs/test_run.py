"""The order of events of a run is one function that fits a screen; each step is entered once."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from dualhead.recipe import load_recipe
from dualhead.runs import measure, prepare, run, stages
from helpers.e2e import TINY

MOST_LINES = 40
STEPS = ("prepare", "train_stages", "measure", "write_report")


def body_of(function):
    """The statements of a function, without its signature and docstring."""
    (node,) = ast.parse(inspect.getsource(function)).body
    return node.body[1:]


def calls(nodes):
    return [
        inner.func.id
        for node in nodes
        for inner in ast.walk(node)
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name)
    ]


def test_the_order_of_events_is_told_once_and_fits_a_screen():
    body = body_of(run.train)
    assert body[-1].end_lineno - body[0].lineno < MOST_LINES // 2
    assert [name for name in calls(body) if name in STEPS] == list(STEPS)


@pytest.mark.parametrize("module", [run, prepare, stages, measure], ids=lambda module: module.__name__)
def test_every_function_fits_a_screen(module):
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    for node in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        assert body[-1].end_lineno - body[0].lineno < MOST_LINES, f"{module.__name__}.{node.name}"


def test_steps_know_only_those_before_them():
    order = ["folder", "prepare", "stages", "measure", "run"]
    for place, name in enumerate(order):
        source = Path(run.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        known = {
            node.module.removeprefix("dualhead.runs.")
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dualhead.runs.")
        }
        assert known <= set(order[:place])


def test_nothing_is_written_before_training_begins(tmp_path):
    prepared = prepare.prepare(load_recipe("digits", TINY), tmp_path / "run")
    assert not prepared.folder.path.exists()
    assert (prepared.output, len(prepared.images.test)) == ("aggregate", len(prepared.images.test.labels))
