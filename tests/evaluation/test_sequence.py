"""Threats one after another: the measures by hand, and what counts as kept, lost and learnt."""

from __future__ import annotations

import numpy as np
import pytest

from dualhead.evaluation.results import Evaluation, Verdicts, accuracies
from dualhead.evaluation.sequence import Visit, arrivals, describe_sequence, measures, old_attacks, plasticity

THREATS = ["Linf", "L2", "L1"]
MATRIX = [[0.5, 0.4, 0.1], [0.45, 0.6, 0.2], [0.3, 0.5, 0.4]]
ONE_BY_ONE = {"Linf": 0, "L2": 1, "L1": 2}


def test_measures_by_hand():
    first, second, last = measures(MATRIX, THREATS, ONE_BY_ONE, {"Linf": 0.55, "L2": 0.6, "L1": 0.5})
    assert (first["average_seen"], first["forgetting"]) == (0.5, None)
    assert first["forward_transfer"] == pytest.approx((0.4 + 0.1) / 2)
    assert second["forgetting"] == pytest.approx(0.05)
    assert last["average_seen"] == last["average_all"] == pytest.approx(0.4)
    assert last["forgetting"] == pytest.approx(((0.5 - 0.3) + (0.6 - 0.5)) / 2)
    assert last["backward_transfer"] == pytest.approx(((0.3 - 0.5) + (0.5 - 0.6)) / 2)
    assert last["plasticity"] == pytest.approx(((0.5 - 0.55) + (0.6 - 0.6) + (0.4 - 0.5)) / 3)
    assert last["forward_transfer"] is None


def test_a_network_that_stays_as_it_is_forgets_nothing():
    rows = measures([MATRIX[0]] * 3, THREATS, ONE_BY_ONE)
    assert [row["forgetting"] for row in rows] == [None, 0.0, 0.0]
    assert rows[-1]["plasticity"] is None
    # A threat that no stage trains against is never learnt, and so is not forgotten.
    (row,) = measures([[0.5, 0.1]], ["Linf", "flow"], {"Linf": 0})
    assert (row["average_seen"], row["forward_transfer"]) == (0.5, 0.1)


def test_old_attacks_are_kept_lost_or_known_from_the_start():
    one_by_one = [["Linf"], ["L2"], ["L1"]]
    assert old_attacks(one_by_one, one_by_one) == [None, "lost", "lost"]
    seen = [["Linf"], ["Linf", "L2"], ["Linf", "L2", "L1"]]
    assert old_attacks(seen, seen) == [None, "kept", "kept"]
    assert arrivals(seen, THREATS) == ONE_BY_ONE
    assert old_attacks([THREATS], [THREATS]) == ["all known"]
    # A stage that goes on with the newest threat uses no old one; one that chooses its epoch by an old one does.
    assert old_attacks([["Linf"], ["L2"], ["L2"]], [["Linf"], ["L2", "Linf"], ["L2"]]) == [None, "kept", "lost"]


def evaluation(seed, accuracy):
    generator = np.random.default_rng(seed)
    labels = np.zeros(40, dtype=np.int64)
    clean = np.where(generator.random(40) < 0.9, 0, 1)
    none = np.full(40, np.nan)
    verdicts = {
        f"{attack}@{threat}": Verdicts(
            (clean == 0) & (generator.random(40) < accuracy), none, none, none, none, none, none
        )
        for threat in THREATS
        for attack in ("pgd", "square")
    }
    made = Evaluation(generator.permutation(40), labels, clean, verdicts, {})
    made.results = accuracies(made.correct)
    return made


def test_an_image_counts_under_a_threat_and_in_the_union_if_it_stands_every_attack():
    found = [evaluation(n, 0.9 - 0.1 * n) for n in range(3)]
    visits = [Visit(f"s{n}", ((THREATS[n],),), ((THREATS[n],),), one, 10.0, 1.0) for n, one in enumerate(found)]
    told = describe_sequence(visits, THREATS, {"Linf": 0.5})
    for row, one in zip(told["rows"], found, strict=True):
        right = [one.verdicts[f"pgd@{t}"].robust & one.verdicts[f"square@{t}"].robust for t in THREATS]
        assert row["robust_accuracy"] == {t: r.mean() for t, r in zip(THREATS, right, strict=True)}
        assert row["union"] == np.logical_and.reduce(right).mean() == one.robust_accuracy["worst"]
    assert [row["training_cost"]["forward_equivalents"] for row in told["rows"]] == [10.0, 20.0, 30.0]
    assert told["old_attacks"] == "lost"
    assert told["arrived"] == {"Linf": "s0", "L2": "s1", "L1": "s2"}
    best = max(row["union"] for row in told["rows"][:-1])
    assert told["rows"][-1]["union_forgetting"] == pytest.approx(max(best - told["rows"][-1]["union"], 0.0))
    assert plasticity(told, {"Linf": 0.5}) == pytest.approx(told["rows"][-1]["plasticity"])


@pytest.mark.parametrize(
    ("stages", "old"), [([THREATS], "all known"), ([["Linf"], ["L2"], ["L1"]], "lost"), ([["Linf"], THREATS], "kept")]
)
def test_stages_that_no_visit_parts_still_come_one_after_another(stages, old):
    by_stage = tuple(map(tuple, stages))
    told = describe_sequence([Visit("last", by_stage, by_stage, evaluation(0, 0.5), 10.0, 1.0)], THREATS)
    assert told["old_attacks"] == told["rows"][0]["old_attacks"] == old
