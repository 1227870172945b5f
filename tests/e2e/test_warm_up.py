"""A base model may be trained in several stages: what is compared is what the last of them left."""

from __future__ import annotations

import json

import pytest
import torch

from dualhead.runs.folder import load_stage
from dualhead.saving.models import view
from helpers.e2e import TINY, dualhead

RECIPE = """
extends: digits
stages:
  - {name: warm_up, train: [trunk, head1], objective: natural, attack: pgd-2, keep: last, epochs: 1}
  - {name: main_head, train: [trunk, head1], objective: {name: trades, beta: 6}, attack: pgd-2, keep: last, epochs: 1}
  - {name: second_head, train: [head2], objective: {name: trades, beta: 3}, attack: pgd-2, keep: last, epochs: 1}
"""


def test_the_base_model_is_what_the_stages_before_the_second_head_left(tmp_path):
    (tmp_path / "warm.yaml").write_text(RECIPE)
    ended = dualhead("train", tmp_path / "warm.yaml", *TINY, "--run-dir", tmp_path / "run", "--quiet", "--json")
    assert ended.status == 0, ended.err
    rows = {row["name"]: row for row in json.loads(ended.out)["rows"]}
    base, head1 = rows["base model"], rows["head 1"]
    # Logits of a whole network and of one that was cut agree up to rounding, which shows in means of probabilities.
    error = pytest.approx(head1["calibration_error"], abs=1e-6)
    assert base == {**head1, "name": "base model", "output": "base", "calibration_error": error}
    summaries = [
        json.loads((tmp_path / "run" / "checkpoints" / stage / "summary.json").read_text())
        for stage in ("warm_up", "main_head", "second_head")
    ]
    assert base["training_cost"]["seconds"] == round(sum(s["seconds"] for s in summaries[:2]), 1)
    # The stages differ, so that the wrong one would show.
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    warm, main = (view(load_stage(tmp_path / "run", s)[0], "head1").eval() for s in ("warm_up", "main_head"))
    assert not torch.equal(warm(images), main(images))
