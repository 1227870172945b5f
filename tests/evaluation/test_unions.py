"""Several threats in one evaluation: each column as measured apart, and what stands under all of them."""

from __future__ import annotations

import inspect
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Evaluation, Finding, against_specialists, compare, evaluate, harness
from dualhead.evaluation.progress import Silent
from dualhead.recipe import parse_recipe
from dualhead.report import threat_text
from dualhead.threats import ThreatModel, build_threat
from dualhead.threats.flow import Flow
from helpers.evaluation import patterns, trained

THREATS = ["Linf:13/255", "L2:0.47", "L1:2.9"]
ATTACKS = ["pgd-5", "apgd-ce-5"]


def measure(threat, count=48, **options):
    images, labels = patterns(count)
    return evaluate(trained(), images, labels, threat=threat, precision="float32", **{"attacks": ATTACKS, **options})


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    folder = tmp_path_factory.mktemp("union")
    return folder, measure(THREATS, output_dir=folder, diagnostics=False)


def test_and_per_image_is_that_of_the_evaluations_apart(union):
    folder, evaluation = union
    apart = {text.partition(":")[0]: measure(text, diagnostics=False) for text in THREATS}
    for label, alone in apart.items():
        for name in ATTACKS:
            together = evaluation.verdicts[f"{name}@{label}"]
            assert np.array_equal(together.robust, alone.verdicts[name].robust)
            assert np.array_equal(together.distance, alone.verdicts[name].distance, equal_nan=True)
        assert evaluation.results["threats"][label]["robust_accuracy"] == alone.robust_accuracy["worst"]
        assert evaluation.results["threats"][label]["interval"] == list(alone.intervals["worst"])
    right = np.logical_and.reduce([alone.correct["worst"] for alone in apart.values()])
    assert np.array_equal(evaluation.correct["worst"], right)
    assert evaluation.robust_accuracy["worst"] == right.mean()
    each = [alone.robust_accuracy["worst"] for alone in apart.values()]
    assert right.mean() < min(each), "one threat decides all: too weak a test"
    assert evaluation.results["average"] == pytest.approx(np.mean(each))
    assert evaluation.results["balanced_accuracy"] == evaluation.balanced_accuracy
    assert set(evaluation.robust_accuracy) == {f"{n}@{t}" for n, t in itertools.product(ATTACKS, apart)} | {"worst"}
    for label, alone in apart.items():  # each threat's own evaluation lies beside, and is one
        assert Evaluation.load(folder / "threats" / label).robust_accuracy == alone.robust_accuracy


def test_what_is_written_is_read_back_and_compared(union):
    folder, evaluation = union
    results = json.loads((folder / "results.json").read_text())
    assert results["threat"] == {"union": [build_threat(text).describe() for text in THREATS]}
    assert threat_text(results["threat"]) == "Linf eps 13/255, L2 eps 0.47, L1 eps 2.9"
    under_one = json.loads((folder / "threats" / "L2" / "results.json").read_text())
    assert results["images"] == under_one["images"] == measure("L2:0.47", diagnostics=False).results["images"]
    again = Evaluation.load(folder)
    assert all(np.array_equal(again.correct[name], column) for name, column in evaluation.correct.items())
    assert compare(folder, evaluation)["worst"].p_value == 1
    with pytest.raises(UserError, match="threat models differ"):
        compare(folder, folder / "threats" / "L2")


def test_a_stopped_one_goes_on(tmp_path, union):
    asked = itertools.count()
    with pytest.raises(Interrupted):
        measure(THREATS, output_dir=tmp_path, diagnostics=False, stop=lambda: next(asked) > 25)
    done = measure(THREATS, output_dir=tmp_path, diagnostics=False)
    assert done.robust_accuracy == union[1].robust_accuracy


def test_an_attack_runs_under_the_threats_that_it_is_defined_for_and_the_rest_is_told():
    found = measure([ThreatModel("L2", 0.3), Flow(0.1)], attacks=["pgd-2", "square-5"], diagnostics=False)
    assert set(found.verdicts) == {"pgd-2@L2", "square-5@L2", "pgd-2@flow"}
    assert found.results["left_out"] == ["square-5 is not defined for flow and was not run under it"]
    with pytest.raises(UserError, match="attack square is defined for Linf"):
        measure([ThreatModel("L2", 0.3), Flow(0.1)], attacks=["square-5"])


def test_every_argument_reaches_the_evaluation_under_each_threat(monkeypatch, tmp_path):
    model, (images, labels) = nn.Sequential(trained()), patterns(8)
    given = {
        "model": model, "images": images, "labels": labels, "threat": THREATS, "attacks": ["fgsm"], "eps": (),
        "index": torch.arange(8).flip(0), "batch_size": 16, "seed": 3, "precision": "float32",
        "device": torch.device("cpu"),
        "class_names": list("abcd"), "skipped": 2, "checks": [Finding("mine", "warning", "odd")],
        "heads": lambda x: model(x)[:, None], "return_adversarial": True, "save_adversarial": True,
        "output_dir": tmp_path, "resume": False, "diagnostics": False, "progress": Silent(), "command": "words",
        "subject": {"output": "mean"}, "transfer_from": trained(), "transfer_name": "other", "stop": lambda: False,
    }  # fmt: skip
    assert given.keys() == inspect.signature(evaluate).parameters.keys(), "name the new one here"
    seen, real = [], harness._under_one
    monkeypatch.setattr(harness, "_under_one", lambda settings: seen.append(settings) or real(settings))
    evaluate(**given)
    own = [settings for settings in seen if settings.model is model]
    assert [settings.threat for settings in own] == [build_threat(text) for text in THREATS]
    assert [settings.output_dir for settings in own] == [tmp_path / "threats" / name for name in ("Linf", "L2", "L1")]
    assert all([*settings.attacks] == ["fgsm"] for settings in own)
    for name in given.keys() - {"threat", "attacks", "eps", "output_dir"}:  # with several threats there is no curve
        for settings in own:
            reached, asked = getattr(settings, name), given[name]
            assert torch.equal(reached, asked) if isinstance(asked, torch.Tensor) else reached == asked, name


def test_adversarial_images_are_returned_by_attack_and_threat():
    (images, labels), threats = patterns(48), [build_threat(text) for text in THREATS]
    found = measure(THREATS, diagnostics=False, return_adversarial=True)
    for threat, attack in itertools.product(threats, ATTACKS):
        made = found.adversarial(f"{attack}@{threat.kind}")
        right = trained()(made).argmax(1) == labels
        assert torch.equal(right, torch.from_numpy(found.verdicts[f"{attack}@{threat.kind}"].robust)), (attack, threat)
        moved = (made - images.float() / 255).flatten(1).norm(p=float(threat.kind[1:]), dim=1)
        assert 0 < moved.max() <= threat.eps + 1e-5
    with pytest.raises(UserError, match="name one of pgd-5@Linf, apgd-ce-5@Linf, pgd-5@L2"):
        found.adversarial("pgd-5")


def test_checks_are_told_once_with_their_worst_outcome():
    found = measure(["Linf:8/255", "L2:0.3"], count=16, attacks=["pgd-2"])
    names = [entry["name"] for entry in found.results["diagnostics"]]
    assert len(set(names)) == len(names) > 5


def test_threats_of_one_kind_are_told_apart_by_their_budgets():
    found = measure(["L2:0.1", "L2:0.3"], attacks=["pgd-2"], count=16, diagnostics=False)
    assert list(found.verdicts) == ["pgd-2@L2 0.1", "pgd-2@L2 0.3"]


@pytest.mark.parametrize(
    ("threat", "options", "words"),
    [
        (["L2:0.3"], {}, "two threats or more"),
        (["L2:0.3", "L2:0.3"], {}, "threat L2 0.3 is named twice"),
        (["L2:0.3", "L3:1"], {}, "unknown threat 'L3'"),
        (["L2:0.3", "L1"], {}, "threat.1: must be"),
        (THREATS, {"eps": [0.1]}, "a curve over eps is of one threat"),
        (THREATS, {"attacks": []}, "there is no attack to try under several; name one alone"),
    ],
)
def test_what_does_not_fit_is_refused(threat, options, words):
    with pytest.raises(UserError, match=words):
        measure(threat, **options)


def told(clean, **robust):
    """An evaluation under several threats that says so much."""
    threats = {label: {"robust_accuracy": value} for label, value in robust.items()}
    results = {"threat": {"union": sorted(robust)}, "threats": threats, "clean_accuracy": clean}
    return Evaluation(np.arange(1), np.arange(1), np.arange(1), {}, results)


def test_shares_of_specialists_by_hand():
    specialists = [told(0.8, Linf=0.4, L2=0.5), told(0.9, Linf=0.2, L2=0.6)]
    found = against_specialists(told(0.72, Linf=0.3, L2=0.66), specialists)
    expected = {"clean": 0.8, "Linf": 0.75, "L2": 1.1, "average": (0.8 + 0.75 + 1.1) / 3, "worst": 0.75}
    assert found == pytest.approx(expected)
    assert against_specialists(specialists[0], specialists[:1])["worst"] == 1.0
    with pytest.raises(UserError, match="no specialist is right in a single image under Linf"):
        against_specialists(told(0.7, Linf=0.1, L2=0.1), [told(0.7, Linf=0.0, L2=0.1)])


def test_a_specialist_of_other_images_or_threats_is_refused():
    model, first, second = (told(0.8, Linf=0.4, L2=0.5) for _ in range(3))
    for each, sha256 in ((model, "a"), (first, "a"), (second, "b")):
        each.results["images"] = {"shape": [3, 8, 8], "sha256": sha256}
    with pytest.raises(UserError, match="specialist 2 was measured on other images of the same indices"):
        against_specialists(model, [first, second])
    second.index = np.arange(7, 8)  # another choice of samples is no other data
    assert against_specialists(model, [first, second])["worst"] == 1.0
    first.results["threat"] = {"norm": "L2", "eps": 0.5}
    model.results["threat"] = {"norm": "Linf", "eps": 0.1}
    with pytest.raises(UserError, match=r"specialist 1 was measured under L2 eps 0.5"):
        against_specialists(model, [first, second])


def test_a_recipe_names_several_and_refuses_what_does_not_fit():
    recipe = {
        "name": "several", "data": {"source": "digits"}, "model": {"backbone": "cnn"}, "threat": "Linf:0.1",
        "stages": [{"name": "only", "train": ["model"], "objective": "sat", "epochs": 1}],
        "evaluate": {"attacks": ["square-5"], "threats": ["Linf:0.1", {"norm": "L1", "eps": 3}]},
    }  # fmt: skip
    parsed = parse_recipe(recipe)
    assert parsed.evaluate.threats == (ThreatModel("Linf", 0.1), ThreatModel("L1", 3))
    assert parse_recipe(parsed.resolved()) == parsed
    for threats, words in (
        (["Linf:0.1"], "evaluate.threats: names one"),
        (["Linf:0.1", "Linf:0.1"], "evaluate.threats.1: is named twice"),
        (["Linf:0.1", "flow:0.1"], "evaluate.threats.1: no attack of evaluate.attacks is defined for flow"),
    ):
        with pytest.raises(UserError, match=words):
            parse_recipe({**recipe, "evaluate": {"attacks": ["square-5"], "threats": threats}})
