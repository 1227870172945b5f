"""Classes have names, and names decide."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualhead.data import Split, among, load_split, match
from dualhead.data.names import in_order
from dualhead.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "bée") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))


def folders(root, layout):
    """A grey image in each folder for each value that the layout gives it."""
    for place, values in layout.items():
        (root / place).mkdir(parents=True)
        for value in values:
            Image.fromarray(np.full((4, 4), value, np.uint8)).save(root / place / f"{value}.png")
    return str(root)


def split_of(labels, names):
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return Split(images, torch.tensor(labels), names)


@given(st.permutations(range(120)))
def test_numbers_are_numbered_by_value(order):
    assert in_order(map(str, order)) == [str(number) for number in range(120)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a10", "a2"], ["a10", "a2", "b"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["010", "2", "1"], ["1", "2", "010"]),
        (["1", "01"], ["01", "1"]),
        (["²", "1"], ["1", "²"]),
    ],
)
def test_other_names_are_numbered_by_their_letters(names, expected):
    assert in_order(names) == expected


@given(st.lists(st.text("abcé", min_size=1, max_size=3), min_size=2, unique=True), st.data())
def test_matching_undoes_any_order_and_any_form(names, data):
    shuffled = data.draw(st.permutations(names))
    places = match([unicodedata.normalize("NFD", name) for name in shuffled], names)
    assert [names[place] for place in places] == shuffled


def test_numbers_match_by_value_and_ambiguous_names_do_not():
    assert match(["07", "3"], [str(n) for n in range(10)]) == [7, 3]
    assert match(["crane", "owl"], ["crane", "owl", "crane"]) is None
    assert match(["crane", "owl", "crane"], ["crane", "owl", "crane"]) == [0, 1, 2]
    assert match(["owl"], ["crane", "owl", "crane"]) == [1]


def test_a_split_is_brought_among_other_names():
    found = among(split_of([0, 1, 1], ("cat", "owl")), ("owl", "ape", "cat"), "the model")
    assert (found.labels.tolist(), found.class_names) == ([2, 0, 0], ("owl", "ape", "cat"))


@pytest.mark.parametrize(
    ("given_names", "known", "words"),
    [
        (("cat", "owl"), (), "the model does not name its classes: their order is trusted, so 0 is taken for 'cat'"),
        (("cat", "owl"), ("0", "1"), "their order is trusted, so 'cat' is taken for '0', 'owl' for '1'"),
        (("0", "1"), ("cat", "owl"), "their order is trusted, so '0' is taken for 'cat', '1' for 'owl'"),
        (("1", "2"), (), "their order is trusted, so 0 is taken for '1'"),
        (("katze", "eule"), ("cat", "owl"), "class 0 is called 'katze' here and 'cat' where it was trained"),
    ],
)
def test_where_names_cannot_decide_the_order_is_trusted_with_a_word(given_names, known, words, caplog):
    split = split_of([0, 1], given_names)
    found = among(split, known, "the model")
    assert found.labels.tolist() == [0, 1]
    assert found.class_names == (known if given_names == ("0", "1") else given_names)
    assert words in caplog.text


def test_names_of_which_some_are_known_are_refused():
    with pytest.raises(UserError, match="'fox' is none of the classes of the model, which has others of these"):
        among(split_of([0, 1], ("cat", "fox")), ("cat", "owl"), "the model")


def test_numbers_for_a_model_without_names_need_no_word(caplog):
    split = split_of([0, 1, 2], ("0", "1", "2"))
    assert among(split, (), "the model") is split
    assert not caplog.text


def test_names_of_which_some_are_known_elsewhere_are_refused():
    with pytest.raises(UserError, match="'owl' is class 0 of these images and class 1 of the model"):
        among(split_of([0, 1], ("owl", "ape")), ("cat", "owl"), "the model")


def test_folders_that_are_numbers_have_their_values_as_labels(tmp_path):
    source = folders(tmp_path, {f"train/{n}": [n] for n in range(12)} | {f"test/{n}": [n] for n in range(12)})
    for part in ("train", "test"):
        split = load_split(source, part)
        assert split.labels.tolist() == split.images[:, 0, 0, 0].tolist() == list(range(12))
        assert split.class_names == tuple(map(str, range(12)))


def test_parts_whose_numbers_are_padded_otherwise_have_the_same_classes(tmp_path):
    source = folders(tmp_path, {f"train/{n:02d}": [n] for n in range(11)} | {f"test/{n}": [n] for n in (10, 2)})
    test = load_split(source, "test")
    assert sorted(zip(test.images[:, 0, 0, 0].tolist(), test.labels.tolist(), strict=True)) == [(2, 2), (10, 10)]


def test_forms_of_one_name_are_one_class(tmp_path):
    layout = {f"train/{NFC}": [1], f"train/{NFD}": [2], "train/ant": [3], f"test/{NFD}": [4], "test/ant": [5]}
    source = folders(tmp_path, layout)
    train, test = load_split(source, "train"), load_split(source, "test")
    assert train.class_names == test.class_names == ("ant", NFC)
    assert train.labels[train.images[:, 0, 0, 0] < 3].tolist() == [1, 1]
    assert test.labels[test.images[:, 0, 0, 0] == 4].tolist() == [1]
