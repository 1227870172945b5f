"""Ids of outputs and what people read of them lead to one another, in files of any version."""

from __future__ import annotations

import pytest

from dualhead.names import AGGREGATE, BASE, MEAN, MODEL, described, head_id, id_of, id_of_row, name_of, read_id

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
