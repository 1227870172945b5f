"""What objectives find in the log of a run reaches the checks of its samples."""

from __future__ import annotations

import json

import yaml

from dualhead.commands.quality import _further_checks
from dualhead.commands.resolve import Request
from dualhead.data import load_split
from dualhead.recipe import load_recipe
from helpers.plugins import nothing_from_outside

MINE = '''
from dataclasses import dataclass
import torch.nn.functional as F
from dualhead.objectives import Logits, LossTerms, Objective

@dataclass(frozen=True)
class WithADoubt(Objective):
    """Natural training with a curriculum of its own."""

    def needs(self):
        return {"p": Logits()}

    def loss(self, y, seen):
        return LossTerms.sum_of(clean=F.cross_entropy(seen["p"], y))

    def checks(self, lines):
        return {"my_curriculum": (len(lines) > 2, f"{len(lines)} epochs")}
'''


def test_an_objective_of_ones_own_judges_the_log_of_its_stage_alone(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = tmp_path / "run"
    run.mkdir()
    with nothing_from_outside():
        recipe = load_recipe("digits", [f"stages.main_head.objective={tmp_path / 'mine.py'}:WithADoubt"])
        (run / "config.yaml").write_text(yaml.safe_dump(recipe.resolved()))
        stages = ["main_head", "main_head", "second_head", "second_head", "second_head"]
        (run / "metrics.jsonl").write_text("".join(json.dumps({"stage": stage}) + "\n" for stage in stages))
        (found,) = _further_checks(Request(model=str(run)), "gaussian", load_split("digits", "train"))
    assert (found.name, found.status, found.message) == ("my_curriculum", "warning", "2 epochs")
