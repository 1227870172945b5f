"""Evaluation under a threat that is no norm: flow fields, from the first step to what is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Evaluation, compare, evaluate, make_gallery
from dualhead.threats import ThreatModel
from dualhead.threats.flow import Flow
from helpers.evaluation import assert_same, patterns, trained

FLOW = Flow(0.4)
ATTACKS = ["fgsm", "pgd-10", "apgd-ce-10", {"name": "apgd-t", "steps": 5, "targets": 2}]


def measure(count=32, threat=FLOW, **options):
    images, labels = patterns(count)
    settings = {"precision": "float32", "attacks": ATTACKS, **options}
    return evaluate(trained(), images, labels, threat=threat, **settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    return folder, measure(output_dir=folder, save_adversarial=True, eps=[0, 0.1, 0.4])


def test_what_is_written_names_the_threat(measured):
    folder, evaluation = measured
    results = json.loads((folder / "results.json").read_text())
    assert results["threat"] == {"name": "flow", "eps": 0.4}
    assert [point["eps"] for point in results["curve"]] == [0.0, 0.1, 0.4]
    curve = [point["robust_accuracy"]["worst"] for point in results["curve"]]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < curve[0]
    assert Evaluation.load(folder).robust_accuracy == evaluation.robust_accuracy
    checks = {entry["name"]: entry for entry in results["diagnostics"]}
    assert checks["large_eps"]["message"].startswith("not checked")
    assert checks["more_steps"]["status"] == "ok"


def test_stored_examples_are_images_that_fool_the_model_and_distances_keep_to_the_budget(measured):
    folder, evaluation = measured
    images, labels = patterns(32)
    with np.load(folder / "samples.npz") as stored:
        for name, verdict in evaluation.verdicts.items():
            rows = torch.from_numpy(stored[f"adversarial_rows_{name}"])
            examples = torch.from_numpy(stored[f"adversarial_{name}"])
            assert len(rows) == (~np.isnan(verdict.distance)).sum()
            assert examples.shape[1:] == images.shape[1:]
            assert ((examples >= 0) & (examples <= 1)).all()
            assert (trained()(examples).argmax(1) != labels[rows]).all()
            assert (verdict.distance[rows] <= FLOW.eps).all()
    assert (~evaluation.verdicts["pgd-10"].robust).sum() > 0
    change = np.abs(examples.numpy() - images[rows].numpy() / 255).reshape(len(rows), -1).max(1)
    assert (change > 8 / 255).all()  # far beyond what a norm would allow: pixels are moved, not noise added


def test_neither_batches_nor_order_change_a_verdict():
    alone = measure(20)
    assert_same(measure(20, batch_size=8), alone)
    images, labels = patterns(20)
    order = torch.tensor(np.random.default_rng(0).permutation(20))
    mixed = evaluate(
        trained(), images[order], labels[order], threat=FLOW, attacks=ATTACKS, index=order, precision="float32"
    )
    for name, verdict in mixed.verdicts.items():
        np.testing.assert_array_equal(verdict.robust, alone.verdicts[name].robust[order])
        np.testing.assert_array_equal(verdict.distance, alone.verdicts[name].distance[order])


def test_an_evaluation_goes_on_where_it_was_stopped(tmp_path):
    whole, stops = measure(20), 0
    for looks in (2, 3, 4):
        left = iter(range(looks, -(10**6), -1))
        try:
            measure(20, output_dir=tmp_path, stop=lambda left=left: next(left) <= 0)
        except Interrupted:
            stops += 1
    assert stops >= 1
    assert_same(measure(20, output_dir=tmp_path), whole)


def test_a_folder_of_another_threat_is_refused(tmp_path):
    measure(8, output_dir=tmp_path, attacks=["fgsm"])
    with pytest.raises(UserError, match="differs in norm"):
        measure(8, output_dir=tmp_path, attacks=["fgsm"], threat=ThreatModel("Linf", 0.4))
    measure(8, output_dir=tmp_path / "linf", attacks=["fgsm"], threat=ThreatModel("Linf", 0.4))
    with pytest.raises(UserError, match="differs in threat"):
        measure(8, output_dir=tmp_path / "linf", attacks=["fgsm"])


def test_a_threat_may_be_given_by_its_fields():
    assert_same(measure(8, threat={"name": "flow", "eps": 0.4}), measure(8))
    assert measure(8, threat={"eps": "8/255"}, attacks=["fgsm"]).results["threat"] == {"norm": "Linf", "eps": 8 / 255}


@pytest.mark.parametrize("attack", ["square", "fab-t", "cw", "autoattack", "autoattack-rand"])
def test_attacks_for_norms_are_refused_before_anything_runs(attack):
    with pytest.raises(UserError, match=f"attack {attack} is defined for Linf, .*use apgd-ce, .*random-search"):
        measure(8, attacks=["pgd-10", attack])


def test_evaluations_under_two_threats_are_not_compared(measured):
    _, evaluation = measured
    with pytest.raises(UserError, match=r"the first evaluation was measured under flow 0.4, the second .* Linf"):
        compare(evaluation, measure(32, threat=ThreatModel("Linf", 0.4), attacks=["fgsm"]))


def test_the_gallery_shows_images(measured):
    images, labels = patterns(6)
    made = make_gallery(trained(), images, labels, threat=FLOW, landscapes=[0])
    assert (str(made.norm), made.eps.tolist()) == ("flow", pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert made.adversarial.shape == (1, 4, *made.original.shape)
    assert made.landscape.shape[:2] == (1, 1)
    middle = made.landscape.shape[-1] // 2
    assert made.landscape[0, 0, middle, middle] == pytest.approx(made.clean_margin[0, 0], abs=1e-4)
    asked = torch.from_numpy(made.adversarial[0, -1]).float() / 255
    assert (trained()(asked).argmax(1).numpy() == made.prediction[0, -1, :, 0]).mean() > 0.8
