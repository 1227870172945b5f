"""Ids of outputs and what people read of them lead to one another, in files of any version."""

from __future__ import annotations

import pytest
from torch import Size, nn

from dualhead.heads import Cut, DualHeadClassifier, aggregators
from dualhead.names import (
    AGGREGATE,
    AGGREGATOR,
    BASE,
    MEAN,
    MODEL,
    TRUNK,
    described,
    head_id,
    id_of,
    id_of_row,
    is_head,
    is_router,
    name_of,
    number_of,
    outputs_of,
    parts_of,
    read_id,
    router_id,
)

OUTPUTS = (BASE, head_id(1), head_id(2), head_id(12), MEAN, AGGREGATE)


@pytest.mark.parametrize("output", OUTPUTS)
def test_ids_and_names_lead_to_one_another(output):
    name = name_of(output, "digits")
    assert id_of(name) == read_id(name) == read_id(output) == output
    assert id_of_row({"name": name}) == id_of_row({"name": "anything", "output": output}) == output


def test_a_classifier_without_a_second_head_is_called_by_its_recipe():
    assert (name_of(MODEL, "digits"), name_of(MODEL)) == ("digits", "model")
    assert id_of_row({"name": "digits"}) == id_of_row({"name": "digits", "output": MODEL}) == MODEL


@pytest.mark.parametrize("recipe", [*OUTPUTS, MODEL])
def test_a_recipe_named_like_an_id_is_no_such_output(recipe):
    assert id_of_row({"name": recipe}) == MODEL


@pytest.mark.parametrize("damaged", ["", "head0", "head", 'x" onclick="', None, 3])
def test_a_damaged_row_is_some_model(damaged):
    assert id_of_row({"name": "digits", "output": damaged}) == MODEL


def test_cards_describe_outputs():
    assert described("head2", 3) == "Head 2 of a classifier of 3 heads"
    assert described(MEAN, 3) == "The mean of 3 heads"
    assert described(MODEL, 2) == "A single-head classifier"


@pytest.mark.parametrize("number", [1, 9, 20, 99])
def test_heads_and_routers_are_told_by_their_ids(number):
    assert is_head(head_id(number)) and not is_router(head_id(number))
    assert is_router(router_id(number)) and not is_head(router_id(number))
    assert number_of(head_id(number)) == number_of(router_id(number)) == number


@pytest.mark.parametrize(
    "name", ["head", "head0", "head01", "heads", "router", "router0", "xhead1", "head1 ", MEAN, TRUNK]
)
def test_nothing_else_is_a_head_or_a_router(name):
    assert not is_head(name) and not is_router(name)


def test_a_classifier_has_the_parts_and_outputs_that_its_heads_and_routers_tell():
    cut = Cut(nn.Identity(), nn.Linear(4, 3), "own", "input")
    merging = aggregators.build({"name": "after_dder", "routers": 2}).create_over([Size([4])], 3)
    classifier = DualHeadClassifier(cut, [nn.Linear(4, 3)], merging, 3)
    heads, routers = [head_id(1), head_id(2)], [router_id(1), router_id(2)]
    assert classifier.parts == parts_of(heads, routers) == (TRUNK, *heads, *routers, AGGREGATOR)
    assert classifier.outputs == outputs_of(heads, routers) == (*heads, MEAN, *routers, AGGREGATE)
    assert all(isinstance(classifier.part(part), nn.Module) for part in classifier.parts)
