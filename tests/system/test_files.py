"""Files that are either whole or not there."""

import json
import math
import os

import pytest
import torch

from dualhead.models.weights import write_state
from dualhead.system.files import shortened_name, write_atomically, write_json, write_text


def test_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "a" / "b" / "text", "grün\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "grün\n".encode()
    content = {"z": [1, 2.5, None], "a": {"k": "v"}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert list(json.loads(text)) == ["z", "a"]
    assert text.endswith("}\n")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def write(aside):
        aside.write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(aside):
        aside.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_who_may_read_a_file_is_what_the_umask_says_also_of_weights(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "a")
        write_state({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o666 & ~umask] * 2


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_does_not_have_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": number})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("letter", ["a", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "\N{CJK UNIFIED IDEOGRAPH-5B57}"])
def test_a_name_that_is_too_long_is_cut_and_still_its_own(tmp_path, letter):
    assert shortened_name("seed=0") == "seed=0"
    names = [shortened_name(letter * count) for count in range(150, 400)]
    assert len(set(names)) == len(names)
    assert max(len(name.encode()) for name in names) <= 200
    write_text(tmp_path / names[-1], "it fits")
