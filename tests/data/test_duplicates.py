"""Images that occur in two sets."""

from __future__ import annotations

import torch

from dualhead.data import Split, digests, shared_images
from dualhead.evaluation import check_duplicates


def split_of(values, size=(2, 3)):
    images = torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, *size).clone()
    return Split(images, torch.zeros(len(values), dtype=torch.int64), ("a", "b"))


def test_equal_pixels_have_equal_digests_and_no_others():
    found = digests(split_of([1, 2, 1]))
    assert found[0] == found[2] != found[1]
    other_shape = digests(split_of([1], size=(3, 2)))
    assert other_shape[0] != found[0]


def test_what_two_sets_share_is_counted_in_the_later_one():
    sets = {"training": digests(split_of([1, 2, 3])), "test": digests(split_of([9, 3, 3, 4]))}
    assert [tuple(one) for one in shared_images(sets)] == [("test", "training", 2, 4, 1)]


def test_the_check_weighs_what_it_finds():
    training = digests(split_of(range(100)))
    apart = check_duplicates({"training": training, "test": digests(split_of([200, 201]))}, ["extra"])
    assert (apart.name, apart.status) == ("duplicates", "ok")
    assert "not looked for among extra images" in apart.message
    leaked = check_duplicates({"training": training, "test": digests(split_of([200, 7]))})
    assert leaked.status == "failed"
    assert "1 of 2 test images are training images too (the first is number 1)" in leaked.message
    held = check_duplicates({"training": training, "held-out": digests(split_of([200, 7])), "test": training[:0]})
    assert held.status == "warning"
    harmless = check_duplicates({"training": training, "extra": training, "test": digests(split_of([200]))})
    assert harmless.status == "ok"
    assert "100 of 100 extra images" in harmless.message
