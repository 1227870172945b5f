"""Images made against another network: measured apart, reproduced by hand, and no part of robust accuracy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, evaluate
from helpers.attacks import network
from helpers.evaluation import patterns, trained


def measure(tmp_path=None, source=None, threat="Linf:0.1", **options):
    x, y = patterns(24)
    settings = {"precision": "float32", "diagnostics": False, "attacks": ["pgd-5", "fgsm"], **options}
    return evaluate(trained(), x, y, threat=threat, output_dir=tmp_path, transfer_from=source, **settings)


def test_it_is_the_accuracy_on_what_an_evaluation_of_the_other_finds(tmp_path):
    source = network(4, seed=5)
    found = measure(tmp_path, source, transfer_name="clean")
    x, y = patterns(24)
    options = {"threat": "Linf:0.1", "attacks": ["pgd-5", "fgsm"], "precision": "float32", "diagnostics": False}
    made = evaluate(source, x, y, return_adversarial=True, **options)
    clean = (trained()(x.float() / 255).argmax(1) == y).numpy()
    told = json.loads((tmp_path / "results.json").read_text())["transfer"]
    together = clean.copy()
    for name in ("pgd-5", "fgsm"):
        right = clean & (trained()(made.adversarial(name)).argmax(1) == y).numpy()
        np.testing.assert_array_equal(found.transferred[name], right)
        assert told["attacks"][name]["accuracy"] == pytest.approx(right.mean())
        together &= right
    assert told["accuracy"] == pytest.approx(together.mean())
    assert told["from"] == "clean"
    assert "no attack saw this model" in told["note"]
    again = Evaluation.load(tmp_path)
    np.testing.assert_array_equal(again.transferred["fgsm"], found.transferred["fgsm"])


def test_robust_accuracy_does_not_count_it():
    alone, with_transfer = measure(), measure(source=network(4, seed=5))
    assert with_transfer.robust_accuracy == alone.robust_accuracy
    assert with_transfer.results["images"] == alone.results["images"]
    assert "transfer" not in alone.results


def test_made_against_itself_it_is_the_adaptive_number():
    found = measure(source=trained())
    for name, verdict in found.verdicts.items():
        np.testing.assert_array_equal(found.transferred[name], verdict.robust)


def test_under_several_threats_it_stands_under_all_of_them(tmp_path):
    found = measure(tmp_path, network(4, seed=5), threat=["Linf:0.1", "L2:0.5"], attacks=["pgd-3"])
    told = found.results["transfer"]
    assert set(told["attacks"]) == {"pgd-3@Linf", "pgd-3@L2"}
    together = np.logical_and.reduce(list(found.transferred.values()))
    assert told["accuracy"] == pytest.approx(together.mean())


def test_neither_network_is_left_changed():
    source = nn.Sequential(nn.Dropout(0.5), network(4, seed=5)).train()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    measure(source=source, attacks=["fgsm"])
    assert source.training
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())


def test_a_network_that_an_attack_cannot_face_is_refused_before_the_model_is_attacked(tmp_path):
    x, y = patterns(8)
    other = nn.Sequential(nn.Flatten(), nn.Linear(7, 4))  # for images of another size
    options = {"threat": "Linf:0.1", "attacks": ["fgsm"], "precision": "float32", "diagnostics": False}
    with pytest.raises(UserError):
        evaluate(trained(), x, y, output_dir=tmp_path, transfer_from=other, **options)
    assert not list((tmp_path / "progress").glob("tries*"))
    measure(tmp_path / "ends", source=network(4, seed=5), attacks=["fgsm"])
    assert list((tmp_path / "ends" / "progress").glob("tries*"))  # where attacks on the model leave their trace


class TwoHeads(nn.Module):
    """Two heads, and their mean."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([network(4, seed=1), network(4, seed=2)])

    def head_logits(self, x):
        return torch.stack([head(x) for head in self.heads], 1)

    def forward(self, x):
        return self.head_logits(x).mean(1)


def test_a_network_without_heads_is_not_attacked_by_what_needs_them():
    x, y = patterns(8)
    options = {"threat": "Linf:0.1", "precision": "float32", "diagnostics": False, "transfer_from": network(4, seed=5)}
    found = evaluate(TwoHeads(), x, y, attacks=["fgsm", "multihead-2"], **options)
    assert set(found.results["transfer"]["attacks"]) == {"fgsm"}
    assert set(found.results["attacks"]) == {"fgsm", "multihead-2"}
    with pytest.raises(UserError, match="multihead needs a model that shows"):
        evaluate(TwoHeads(), x, y, attacks=["multihead-2"], **options)
