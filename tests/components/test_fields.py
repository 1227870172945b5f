"""Ranges of the numbers that components take."""

import dataclasses
import math
import typing

import numpy as np
import pytest

from dualhead.attacks import attacks
from dualhead.components.fields import above, at_least, whole
from dualhead.data import augmentations, poisons, streams
from dualhead.errors import UserError
from dualhead.evaluation import measurements
from dualhead.heads import aggregators
from dualhead.models import backbones
from dualhead.objectives import objectives
from dualhead.threats import threats
from dualhead.training.averaging import averagings
from dualhead.training.optimisation import optimisers, schedules

REGISTRIES = [
    aggregators, attacks, augmentations, averagings, backbones, measurements, objectives, optimisers, poisons,
    schedules, streams, threats,
]  # fmt: skip
REQUIRED = {
    "hat": {"weights": "standard"},
    "factory": {"path": "module:function"},
    "given": {"path": "model.py"},
    "hf": {"config": "config"},
    "robustbench": {"model": "Standard"},
    "timm": {"model": "resnet18"},
    "with_norm": {"backbone": "cnn", "norm": "group"},
    "remove": {"like": "patch"},
    "sham": {"like": "patch"},
    "torch": {"optimiser": "Adam"},
    "align": {"distance": "domain"},
}
NAMES = {"seed", "target"}
"""Numbers that say which one is meant, not how much."""


def built(registry, name):
    if registry is threats:
        return threats.get(name)(eps=4)
    return registry.build({"name": name, **REQUIRED.get(name, {})})


def is_number(kind):
    if typing.get_origin(kind) is typing.Annotated:
        return is_number(typing.get_args(kind)[0])
    return kind in (int, float) or (typing.get_origin(kind) is not tuple and any(map(is_number, typing.get_args(kind))))


def shipped(registry):
    return [name for name in registry.names() if registry.get(name).__module__.startswith("dualhead.")]


@pytest.mark.parametrize(
    ("registry", "name"), [(r, name) for r in REGISTRIES for name in shipped(r)], ids=lambda v: getattr(v, "kind", v)
)
def test_every_number_of_a_component_refuses_what_is_none_in_a_line_that_names_it(registry, name):
    component = built(registry, name)
    hints = typing.get_type_hints(type(component), include_extras=True)
    for field in dataclasses.fields(component):
        if field.init and field.name not in NAMES and is_number(hints[field.name]):
            with pytest.raises(UserError, match=rf"\b{field.name}\b|nan is not finite"):
                dataclasses.replace(component, **{field.name: math.nan})


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (at_least, -0.5, "weight must be at least 0, got -0.5; 1 is usual"),
        (at_least, math.nan, "weight must be at least 0 and finite, got nan; 1 is usual"),
        (above, 0, "weight must be greater than 0, got 0; 1 is usual"),
        (above, math.inf, "weight must be greater than 0 and finite, got inf; 1 is usual"),
    ],
)
def test_what_a_refusal_says(check, value, message):
    with pytest.raises(UserError) as refused:
        check(0, "weight", value, "1 is usual")
    assert str(refused.value) == message


def test_the_bound_itself_and_what_was_left_out_pass():
    at_least(0, "weight", 0)
    above(0, "weight", 1e-30)
    for check in (at_least, above):
        check(0, "weight", None)


def test_whole_numbers_are_told_from_others():
    for value in (0, 3, np.int64(3)):
        whole("steps", value, 0)
    whole("seed", -5)
    for value in (2.5, 2.0, True, "3", None, -1):
        with pytest.raises(UserError, match=r"^steps must be (a whole number|at least 0), got "):
            whole("steps", value, 0)
