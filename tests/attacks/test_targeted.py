"""Targeted attacks: the wanted answer is found where it is in reach, and told apart from another wrong one."""

import json

import numpy as np
import pytest
import torch

from dualhead.attacks import attacks
from dualhead.attacks.pgd import PGD
from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Evaluation, evaluate, split_names
from dualhead.recipe import load_recipe
from dualhead.threats import ThreatModel
from helpers.attacks import images, network, streams
from helpers.evaluation import StopAfter, assert_same, patterns, trained

EACH = ["pgd-40", "pgd-40(loss=margin)", "apgd-ce-40", "apgd-dlr-40", "square-300"]


def with_target(spec, target):
    return attacks.build({**attacks.expand(spec), "target": target})


def opposed(norm, shape=(1, 4, 4)):
    """A linear model, an image in the middle of the box, and how far the answers 1 and 2 are.

    The logits are 0, s - 1, -s - 1 and -9, with s the slopes' product with the change, so no answer hides another.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).flatten()
    middle = torch.full((2, *shape), 0.5)

    def model(x):
        moved = 8 * ((x.flatten(1) - 0.5) @ weight)
        return torch.stack((torch.zeros_like(moved), moved - 1, -moved - 1, torch.full_like(moved, -9.0)), 1)

    dual = weight.norm(p={"Linf": 1, "L2": 2}[norm])
    return model, middle, torch.zeros(2, dtype=torch.int64), float(1 / (8 * dual))


@pytest.mark.parametrize(
    ("spec", "norm"), [*((spec, "Linf") for spec in EACH), *((spec, "L2") for spec in EACH if spec != "square-300")]
)
@pytest.mark.parametrize("target", [1, 2])
def test_on_a_linear_model_the_target_is_reached_just_where_it_can_be(spec, norm, target):
    model, x, y, radius = opposed(norm)
    attack = with_target(spec, target)
    slack = 2.0 if spec.startswith("square") else 1.05
    near, far = (
        model(attack(model, x, y, ThreatModel(norm, radius * share), generator=streams(2))).argmax(1)
        for share in (slack, 0.98)
    )
    assert near.tolist() == [target] * 2
    assert far.tolist() == [0] * 2


@pytest.mark.parametrize("spec", ["apgd-ce-40", "apgd-dlr-40"])
def test_under_l1_too(spec):
    model, x, y, _ = opposed("Linf")
    found = with_target(spec, 2)(model, x, y, ThreatModel("L1", 2.0), generator=streams(2))
    assert model(found).argmax(1).tolist() == [2, 2]


@pytest.mark.parametrize("spec", EACH)
def test_next_and_least_likely_are_what_they_say(spec):
    clean = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0], [1.0, 2.0, 9.0]])
    y = torch.tensor([0, 1, 2])
    assert with_target(spec, "next").goal(clean, y).tolist() == [1, 2, 0]
    assert with_target(spec, "least likely").goal(clean, y).tolist() == [1, 2, 0]
    assert with_target(spec, 2).goal(clean, y).tolist() == [2, 2, 2]
    assert attacks.build(spec).goal(clean, y) is None
    for written in ("least-likely", "LEAST_LIKELY"):
        assert with_target(spec, written) == with_target(spec, "least likely")
    assert with_target(spec, "2") == with_target(spec, 2)


def test_a_number_that_names_a_class_means_that_class_or_is_refused():
    attack = attacks.build("pgd-10(target=8)")
    assert attack.for_classes(["7", "8", "9"]).target == 1
    assert attack.for_classes(["7", "8", "9"]).label == attack.label
    assert attack.for_classes(list(map(str, range(10)))) is attack
    assert attack.for_classes(["cat", "dog"]) is attack  # no class of theirs; `parts` says so
    with pytest.raises(UserError, match="target 1: class 1 by its number is '2', and class 0 has that name"):
        attacks.build("pgd-10(target=1)").for_classes(["1", "2"])


def test_images_of_the_target_are_left_alone():
    model, x = network(4), images(8)
    y = model(x).argmax(1)
    target = int(y[0])
    found = attacks.build(f"pgd-10(target={target})")(model, x, y, ThreatModel("Linf", 0.3), generator=streams(8))
    same = y == target
    assert torch.equal(found[same], x[same])
    assert not torch.equal(found[~same], x[~same])


@pytest.mark.parametrize("spec", ["pgd-40(target=next)", "apgd-ce-50(target=next,restarts=2)", "square-9(target=3)"])
def test_the_name_says_it_and_is_read_back(spec):
    attack = attacks.build(spec)
    assert "target=" in attack.label
    assert attacks.build(attack.label) == attack
    assert attacks.build(attacks.describe(attack)) == attack
    assert "target" not in attacks.describe(attacks.build(spec.partition("(")[0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pgd-40(target=)", "target must be a class, next or least likely"),
        ({"name": "pgd", "target": -1}, "target must be a class"),
        ("pgd-40(loss=kl,target=next)", "use ce or margin"),
        ("pgd-40(target)", r"write NAME\(KEY=VALUE,...\)"),
        ("apgd-t(target=2)", "no such key"),
        ("cw(target=2)", "no such key"),
    ],
)
def test_what_cannot_be_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        attacks.build(spec)


def test_a_stage_refuses_a_target():
    with pytest.raises(UserError, match="target: is for measuring"):
        load_recipe("digits", ["stages.main_head.attack={name: pgd, steps: 2, target: next}"])


def test_the_command_line_splits_attacks_outside_of_brackets():
    assert split_names("pgd-40(target=next,restarts=2), square,") == ["pgd-40(target=next,restarts=2)", "square"]


# ---- evaluation

TARGETED = ["pgd-10(target=next,restarts=2)", "apgd-ce-5(target=least likely)", "square-20(target=0)"]


def measure(count=32, **options):
    x, y = patterns(count)
    settings = {"precision": "float32", "attacks": TARGETED, "threat": "Linf:0.12", "diagnostics": False, **options}
    return evaluate(trained(), x, y, **settings)


def test_progress_ends_at_robust_accuracy_also_where_images_of_the_target_are_not_attacked():
    progress = StopAfter()
    found = measure(progress=progress)
    assert (found.labels == 0).any()
    for name in found.verdicts:
        told = [robust for attack, _, _, robust in progress.told if attack == name]
        assert told[-1] == pytest.approx(found.robust_accuracy[name])


def test_success_is_told_apart_from_robust_accuracy(tmp_path):
    found = measure(output_dir=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    again = Evaluation.load(tmp_path)
    clean = found.clean_prediction == found.labels
    for name, verdict in found.verdicts.items():
        tried = verdict.target >= 0
        got = tried & (verdict.prediction == verdict.target)
        told = results["attacks"][name]["targeted"]
        assert told["attacked"] == tried.sum() > 0
        assert told["success"] == pytest.approx(got.sum() / tried.sum())
        assert told["interval"][0] <= told["success"] <= told["interval"][1]
        assert not (got & verdict.robust).any()
        assert (verdict.robust | ~clean | (verdict.prediction != found.labels)).all()
        assert (verdict.target[tried] != found.labels[tried]).all()
        np.testing.assert_array_equal(again.verdicts[name].target, verdict.target)
    assert sum(results["attacks"][name]["targeted"]["success"] for name in found.verdicts) > 0
    assert "targeted" not in measure(8, attacks=["pgd-5"]).results["attacks"]["pgd-5"]


def test_stopped_and_resumed_ends_the_same(tmp_path):
    whole, stops = measure(20), 0
    for looks in (2, 3, 4):
        left = iter(range(looks, -(10**6), -1))
        try:
            measure(20, output_dir=tmp_path, stop=lambda left=left: next(left) <= 0)
        except Interrupted:
            stops += 1
    assert stops
    again = measure(20, output_dir=tmp_path)
    assert_same(again, whole)
    for name, verdict in whole.verdicts.items():
        np.testing.assert_array_equal(again.verdicts[name].prediction, verdict.prediction)


def test_a_class_may_be_named_and_another_is_refused():
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    found = measure(8, attacks=["pgd-3(target=one)"], class_names=names)
    assert set(found.verdicts["pgd-3(target=one)"].target) <= {-1, 1}
    with pytest.raises(UserError, match="target eleven: no class of this model"):
        measure(8, attacks=["pgd-3(target=eleven)"], class_names=names)
    for none in ("99", "²"):
        with pytest.raises(UserError, match=f"target {none}: no class"):
            measure(8, attacks=[f"pgd-3(target={none})"])


def test_a_class_may_be_a_number_of_numpy():
    assert with_target("pgd-3", 1) == PGD(3, target=np.int64(1))
