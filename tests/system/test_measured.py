"""Choices by measurement are made once for a machine and an architecture, and survive what may happen to their file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.system import arithmetic, measured
from dualhead.system.arithmetic import BF16, FLOAT32_CHANNELS_LAST, choose_arithmetic

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path))
    return tmp_path


def network(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


class Counted:
    """Measures something, another number each time."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"seconds": float(self.times)}


def ask(measure, model=None, example=IMAGES, fits=lambda found: True, **settings):
    return measured.kept("speed", model or network(), example, settings, measure, fits)


def test_what_was_measured_once_is_kept():
    measure = Counted()
    first = ask(measure)
    assert ask(measure) == first  # another network of the same architecture
    assert (measure.times, first.found) == (1, {"seconds": 1.0})
    assert first.when in first.told


def test_what_it_depends_on_is_measured_for_itself():
    measure = Counted()
    for question in (
        {}, {"model": network(stride=2)}, {"model": network(bias=False)}, {"example": IMAGES[:2]}, {"batch": 7},
    ):  # fmt: skip
        ask(measure, **question)
    assert measure.times == 5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        ask(measure)
    finally:
        torch.set_num_threads(threads)
    assert measure.times == 6


def test_an_architecture_is_its_modules_with_their_settings_and_shapes():
    class Own(nn.Module):
        def extra_repr(self):
            return f"activation={object()!r}"

    assert measured.signature(Own()) == measured.signature(Own())
    assert measured.signature(nn.Dropout(0.1)) != measured.signature(nn.Dropout(0.2))
    assert measured.signature(nn.Linear(2, 3)) != measured.signature(nn.Linear(2, 3).double())


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"found": null, "when": "today"}', '{"when": "today"}'])
def test_a_damaged_file_is_told_and_measured_again(folder, caplog, damage):
    measure = Counted()
    ask(measure)
    (file,) = (folder / "measured").iterdir()
    file.write_text(damage, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert ask(measure, fits=lambda found: isinstance(found, dict)).found == {"seconds": 2.0}
    assert "measured again" in caplog.text
    assert json.loads(file.read_text(encoding="utf-8"))["found"] == {"seconds": 2.0}


def test_a_folder_that_cannot_be_written_to_is_told_and_no_error(monkeypatch, caplog):
    monkeypatch.setenv("DUALHEAD_CACHE", "/dev/null")
    measure = Counted()
    with caplog.at_level(logging.WARNING):
        assert ask(measure).found == {"seconds": 1.0}
    assert "not kept" in caplog.text


def test_times_that_are_no_numbers_are_not_kept(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert ask(lambda: float("inf")).found == float("inf")
    assert "not kept" in caplog.text
    assert not list((folder / "measured").glob("*.json"))


def test_who_was_faster_counts():
    def measure():
        ask(lambda: "theirs")  # another process, meanwhile
        return "ours"

    assert ask(measure).found == "theirs"


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert measured.cache_folder() == tmp_path
    monkeypatch.delenv("DUALHEAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert measured.cache_folder() == tmp_path / "caches" / "dualhead"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert measured.cache_folder() == Path(tmp_path) / ".cache" / "dualhead"


def test_the_arithmetic_of_training_is_chosen_once(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    clock = iter([1.0, 0.5, 0.9])
    monkeypatch.setattr(arithmetic, "_seconds_per_pass", lambda *_: next(clock))
    first = choose_arithmetic("auto", model, IMAGES)
    assert first == FLOAT32_CHANNELS_LAST
    assert first.told.startswith("measured on ")
    assert choose_arithmetic("auto", model, IMAGES) == first  # the clock has nothing more to say


def test_the_environment_overrides_what_is_open_and_nothing_else(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    monkeypatch.setattr(arithmetic, "_seconds_per_pass", lambda *_: pytest.fail("measured"))
    monkeypatch.setenv("DUALHEAD_PRECISION", "bf16")
    chosen = choose_arithmetic("auto", model, IMAGES)
    assert chosen == BF16
    assert "DUALHEAD_PRECISION" in chosen.told
    assert choose_arithmetic("float32", model, IMAGES, "channels_last") == FLOAT32_CHANNELS_LAST
    monkeypatch.setenv("DUALHEAD_PRECISION", "fp8")
    with pytest.raises(UserError, match="DUALHEAD_PRECISION=fp8: write float32, bf16 or auto"):
        choose_arithmetic("auto", model, IMAGES)
