"""`compare` on runs in which threats arrived one after another: means over seeds, and specialists that come later."""

from __future__ import annotations

import numpy as np
import pytest

from dualhead.evaluation import Evaluation, Verdicts, Visit, describe_sequence
from dualhead.report import sequence_text
from dualhead.report.sequence import course, matrix
from dualhead.runs import Entry, sequences

THREATS = ["Linf", "L2"]


def evaluation(robust):
    """20 images, all right when clean, of which so many stand each threat."""
    nothing = np.full(20, np.nan)
    verdicts = {
        f"pgd@{threat}": Verdicts(np.arange(20) < count, *[nothing] * 6)
        for threat, count in zip(THREATS, robust, strict=True)
    }
    made = Evaluation(np.arange(20), np.zeros(20, dtype=np.int64), np.zeros(20, dtype=np.int64), verdicts, {})
    under = {threat: {"robust_accuracy": count / 20} for threat, count in zip(THREATS, robust, strict=True)}
    made.results = {
        "clean_accuracy": 1.0,
        "intervals": {"clean_accuracy": [0.8, 1.0]},
        "threat": {"union": THREATS},
        "threats": under,
    }
    return made


def run(seed, last):
    visits = [
        Visit("first", (("Linf",),), (("Linf",),), evaluation([12, 4]), 100.0, 1.0),
        Visit("second", (("L2",),), (("L2",),), evaluation(last), 50.0, 1.0),
    ]
    visits[-1].evaluation.results["sequence"] = describe_sequence(visits, THREATS)
    return Entry("group", "lwf", "model", True, seed, visits[-1].evaluation)


def test_seeds_are_averaged_and_told_with_their_spread():
    (found,) = sequences([run(0, [8, 10]), run(1, [6, 12])], [])
    assert (found["name"], found["seeds"], found["old_attacks"]) == ("lwf", [0, 1], "lost")
    assert found["means"]["forgetting"] == pytest.approx((4 + 6) / 2 / 20)
    assert found["means"]["robust L2"] == pytest.approx(11 / 20)
    assert found["means"]["forward_equivalents"] == 150.0
    assert found["spread"]["forgetting"] == pytest.approx(12.7062 * (2 / 20) / 2, rel=1e-3)  # t of one degree
    assert "plasticity" not in found["means"]


def test_specialists_that_come_later_tell_how_well_each_threat_was_learnt():
    made_for_one = [Entry(f"s{n}", "s", "model", True, 0, evaluation(r)) for n, r in enumerate(([14, 2], [1, 16]))]
    (found,) = sequences([run(0, [8, 10])], made_for_one)
    assert found["means"]["plasticity"] == pytest.approx(((12 - 14) + (10 - 16)) / 2 / 20)
    assert found["spread"]["plasticity"] is None
    assert sequences(made_for_one, []) == []


def test_pictures_and_text_hold_every_number():
    told = run(0, [8, 10]).evaluation.results["sequence"]
    drawn = matrix("a <b>", told)
    for number in ("60.0*", "50.0*", "40.0", "100.0"):
        assert number in str(drawn.svg)
    assert "lost: no later stage used them" in drawn.caption
    assert "first" in str(course("run", told).svg)
    text = sequence_text(told)
    assert text.splitlines()[1].split()[:2] == ["after", "stage"]
    assert "+20.0" in text


def test_threats_stand_in_the_order_in_which_they_were_learnt():
    visits = [
        Visit("first", (("L2",),), (("L2",),), evaluation([4, 12]), 100.0, 1.0),
        Visit("second", (("Linf",),), (("Linf",),), evaluation([10, 8]), 50.0, 1.0),
    ]
    visits[-1].evaluation.results["sequence"] = describe_sequence(visits, THREATS)
    (found,) = sequences([Entry("group", "lwf", "model", True, 0, visits[-1].evaluation)], [])
    assert (found["order"], found["threats"]) == (["L2", "Linf"], THREATS)


def test_seeds_that_agree_by_chance_leave_a_spread():
    (found,) = sequences([run(0, [8, 10]), run(1, [8, 10])], [])
    assert found["spread"]["union"] == pytest.approx(12.7062 / 20 / 2**0.5, rel=1e-3)
    assert found["spread"]["forward_equivalents"] == 0.0
