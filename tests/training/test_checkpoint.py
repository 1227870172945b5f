"""Saved states: the last few stay, a damaged one is named and the one before it taken."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dualhead.errors import RunError
from dualhead.training import CheckpointStore, Position


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "states", keep=3)


def save(store, number):
    """A state whose weights and position tell which it is."""
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, float(number))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimiser.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    position = Position(stage=1, epoch=number, step=2, sums={"loss": 0.1}, best={"validation_robust": 0.5})
    store.save(position, model, optimiser)
    return position, model, optimiser


def files(store):
    return sorted(store.folder.iterdir())


def test_a_folder_without_states_has_none(store):
    assert store.load() is None


def test_what_is_loaded_is_what_was_saved(store):
    torch.manual_seed(3)
    position, model, optimiser = save(store, 7)
    drawn = torch.rand(4)
    saved = store.load()
    assert saved.position == position
    assert all(torch.equal(value, saved.model[name]) for name, value in model.state_dict().items())
    before, after = optimiser.state_dict(), saved.optimiser
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], state["momentum_buffer"])
    saved.restore_generators(torch.device("cpu"))
    assert torch.equal(torch.rand(4), drawn)


def test_the_last_few_stay_and_the_newest_is_loaded(store):
    for number in range(1, 6):
        save(store, number)
    assert [path.name[:8] for path in files(store)] == ["00000003", "00000004", "00000005"]
    assert store.load().position.epoch == 5


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(store, damage, caplog):
    for number in (1, 2, 3):
        save(store, number)
    newest = files(store)[-1]
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert store.load().position.epoch == 2
    assert str(newest) in caplog.text
    save(store, 4)
    assert store.load().position.epoch == 4


def test_every_single_flipped_byte_is_noticed(store):
    save(store, 1)
    save(store, 2)
    newest = files(store)[-1]
    whole = newest.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 200)):
        newest.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        assert store.load().position.epoch == 1


def test_when_all_are_damaged_the_run_ends_and_says_so(store):
    for number in (1, 2):
        save(store, number)
    for path in files(store):
        cut(path)
    with pytest.raises(RunError, match=r"all 2 checkpoints are damaged"):
        store.load()


def test_a_state_that_would_run_code_is_refused(store, tmp_path, caplog):
    class Malicious:
        def __reduce__(self):
            return (print, ("code ran",))

    save(store, 1)
    save(store, 2)
    newest = files(store)[-1]
    import hashlib

    torch.save({"position": Malicious()}, tmp_path / "state.pt")
    content = (tmp_path / "state.pt").read_bytes()
    newest.unlink()
    (store.folder / f"00000002-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.load().position.epoch == 1


def test_a_disk_that_is_full_loses_nothing_earlier(store, monkeypatch):
    save(store, 1)
    before = {path.name: path.read_bytes() for path in files(store)}

    def no_space(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in files(store)} == before
    assert store.load().position.epoch == 1


def test_other_files_in_the_folder_are_left_alone(store):
    save(store, 1)
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "00000009-short.pt").write_text("not a state")
    for number in (2, 3, 4):
        save(store, number)
    assert store.load().position.epoch == 4
    assert {"notes.txt", "00000009-short.pt"} <= {path.name for path in files(store)}
