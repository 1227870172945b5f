"""Nothing inside what is read is run, and nothing unpacks to more than it should."""

from __future__ import annotations

import io
import json
import logging
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.errors import UserError, one_line
from dualhead.models import read_state
from dualhead.recipe.schema import parse_recipe
from dualhead.recipe.yaml import load_recipe


def test_an_archive_that_unpacks_to_far_more_is_refused_by_its_size(tmp_path):
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, stream)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(stream) as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in small.infolist():
            bomb.writestr(entry.filename, small.read(entry))
        bomb.writestr("archive/data/1", bytes(200 * 2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="possibly a decompression bomb"):
        read_state(path)


def test_a_whole_file_of_torch_is_no_bomb(tmp_path):
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "zeros.pt")
    assert read_state(tmp_path / "zeros.pt")["weight"].shape == (1000, 1000)


def test_code_that_a_model_names_is_said_before_it_is_run(caplog, tmp_path, monkeypatch):
    from dualhead.models import Normalize, backbones

    (tmp_path / "somebodys.py").write_text("def fails(): raise RuntimeError('run')")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="run"):
        backbones.build("somebodys:fails").create(2, (1, 8, 8), Normalize.identity(1))
    assert "code from outside is run: module somebodys" in caplog.text


@given(st.text())
def test_a_message_is_one_printable_line_whatever_it_quotes(text):
    message = str(UserError(f"key {text} is wrong"))
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    assert len(message) < 10_000
    assert one_line(message) == message or len(message) > 1000


@settings(max_examples=10)
@given(
    st.integers(0, 500),
    st.integers(1, 4096),
    st.floats(1e-4, 1.0),
    st.sampled_from(["sat", {"name": "trades", "beta": 2.5}, {"name": "mart", "beta": 3.5}]),
    st.sampled_from(["pgd-7", {"name": "pgd", "steps": 3, "step_size": "2/255"}, {"name": "fgsm", "start": "uniform"}]),
    st.sampled_from(["best", "last"]),
)
def test_a_recipe_comes_back_from_what_is_written_of_it(epochs, batch, eps, objective, attack, keep):
    words = [
        f"stages.*.epochs={epochs}",
        f"stages.*.batch_size={batch}",
        f"threat.eps={eps!r}",
        f"stages.*.keep={keep}",
    ]
    words += [f"stages.*.objective={json.dumps(objective)}", f"stages.*.attack={json.dumps(attack)}"]
    recipe = load_recipe("digits", words)
    assert parse_recipe(json.loads(json.dumps(recipe.resolved()))) == recipe
