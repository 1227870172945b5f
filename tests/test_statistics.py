from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dualhead.errors import UserError
from dualhead.evaluation import interval_over_samples, mcnemar, mean_std, paired_shares, wilson
from dualhead.statistics import chance_drop, paired_t, student, student_reach


@given(st.integers(1, 5000), st.data())
def test_wilson_solves_its_defining_equation(total, data):
    successes = data.draw(st.integers(0, total))
    low, high = wilson(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    z = stats.norm.ppf(0.975)
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-6)


def test_wilson_is_not_degenerate_at_the_ends():
    assert wilson(0, 100)[0] == 0
    assert 0.03 < wilson(0, 100)[1] < 0.04
    assert wilson(100, 100)[1] == 1


def paired(both, only_first, only_second, neither):
    rows = [(1, 1)] * both + [(1, 0)] * only_first + [(0, 1)] * only_second + [(0, 0)] * neither
    return np.array(rows, bool).T


def test_mcnemar_counts_only_discordant_samples():
    few, many = mcnemar(*paired(10, 3, 9, 5)), mcnemar(*paired(500, 3, 9, 300))
    assert (few.only_first, few.only_second) == (3, 9)
    expected = 2 * sum(math.comb(12, k) for k in range(4)) / 2**12
    assert few.p_value == pytest.approx(expected)
    assert many.p_value == few.p_value
    assert few.difference == pytest.approx(6 / 27)


def test_the_interval_of_a_pair_by_hand():
    """Agresti and Min: half a sample in each cell, so 9 - 3 of 29 differ, of 13 that are discordant."""
    centre = 6 / 29
    reach = 1.959964 * math.sqrt(13 - 36 / 29) / 29
    assert mcnemar(*paired(10, 3, 9, 5)).interval == pytest.approx((centre - reach, centre + reach))


def test_swapping_the_two_mirrors_the_answer():
    first, second = paired(40, 2, 20, 10)
    ahead, behind = mcnemar(first, second), mcnemar(second, first)
    assert ahead.verdict == "gain"
    assert behind.verdict == "loss"
    assert ahead.difference == -behind.difference
    assert ahead.interval == pytest.approx((-behind.interval[1], -behind.interval[0]))
    assert ahead.p_value == behind.p_value


def test_no_difference_is_undecided():
    same = mcnemar(*paired(5, 0, 0, 5))
    assert same.p_value == 1
    assert same.verdict == "undecided"
    assert same.interval[0] < 0 < same.interval[1]


def test_interval_covers_the_true_difference_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    cells = np.array([0.5, 0.05, 0.1, 0.35])
    covered = 0
    for _ in range(400):
        low, high = mcnemar(*paired(*generator.multinomial(200, cells))).interval
        covered += low <= 0.05 <= high
    assert 0.92 <= covered / 400 <= 0.985


def test_interval_over_samples_covers_the_difference_that_fixed_classifiers_have():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):  # samples of two kinds, of which some that all of a side or none of it get right
        hard = generator.random(200) < 0.5
        first = generator.random((3, 200)) < np.where(hard, 0.1, 0.9)
        second = generator.random((2, 200)) < np.where(hard, 0.3, 0.9)
        low, high = interval_over_samples(first, second)
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_interval_over_samples_of_one_classifier_each_is_nearly_that_of_mcnemar():
    first, second = paired(400, 20, 60, 300)
    assert interval_over_samples([first], [second]) == pytest.approx(mcnemar(first, second).interval, abs=2e-3)
    assert interval_over_samples([first, first], [second]) == pytest.approx(interval_over_samples([first], [second]))
    assert interval_over_samples([[True]], [[False]]) == (-1.0, 1.0)


def test_samples_that_all_agree_leave_an_interval():
    right = np.ones((1, 10))
    assert interval_over_samples(np.zeros((1, 10)), right) == pytest.approx((1 - 1.959964 / 10, 1))
    low, high = interval_over_samples(right, right)
    assert -low == high == pytest.approx(1.959964 / 10)
    assert paired_shares([0.2, 0.4], [0.4, 0.6]).verdict == "undecided"  # equal but for rounding


def test_samples_must_match():
    with pytest.raises(UserError, match="same samples"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(UserError):
        mcnemar(np.ones(0, bool), np.ones(0, bool))


def test_mean_and_deviation_over_seeds():
    assert mean_std([0.4, 0.5, 0.6]) == pytest.approx((0.5, 0.1))
    mean, deviation = mean_std([0.5])
    assert mean == 0.5
    assert math.isnan(deviation)
    with pytest.raises(UserError):
        mean_std([])


@pytest.mark.parametrize(("only_second", "only_first"), [(5, 0), (14, 5), (60, 40), (9, 1), (30, 12), (0, 8)])
def test_a_verdict_never_contradicts_the_exact_test(only_second, only_first):
    first = np.arange(1000) < only_first
    second = (np.arange(1000) >= only_first) & (np.arange(1000) < only_first + only_second)
    found = mcnemar(first, second)
    assert (found.verdict == "undecided") == (found.p_value >= 0.05)


def test_shares_of_samples_are_paired_by_their_mean_difference():
    random = np.random.default_rng(0)
    first = random.random(400)
    second = (first + random.normal(0.02, 0.1, 400)).clip(0, 1)
    ahead, behind = paired_shares(first, second), paired_shares(second, first)
    assert ahead.difference == pytest.approx((second - first).mean())
    assert ahead.interval == interval_over_samples(first[None], second[None])
    assert ahead.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=0.2)
    assert (ahead.verdict, behind.verdict) == ("gain", "loss")
    assert (ahead.only_first, ahead.only_second) == (behind.only_second, behind.only_first)
    assert behind.interval == pytest.approx((-ahead.interval[1], -ahead.interval[0]))


def test_shares_that_differ_alike_everywhere():
    same = np.full(5, 0.5)
    assert (paired_shares(same, same).p_value, paired_shares(same, same).verdict) == (1.0, "undecided")
    few, many = paired_shares(same, same + 0.25), paired_shares(np.full(50, 0.5), np.full(50, 0.75))
    assert (few.verdict, many.verdict) == ("undecided", "gain")  # five images alone prove nothing
    assert few.interval == pytest.approx((0.25 - 1.959964 / 5, 0.25 + 1.959964 / 5))
    for wrong in (np.full(4, 0.5), np.full((5, 1), 0.5)):
        with pytest.raises(UserError, match="the same samples twice"):
            paired_shares(same, wrong)


@given(st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=8), st.floats(0.001, 0.5))
def test_a_floor_makes_the_paired_test_stricter_only(gains, floor):
    mean, (low, high), p_value = paired_t(gains)
    same, (lower, higher), larger = paired_t(gains, floor)
    assert same == mean == pytest.approx(np.mean(gains))
    assert lower <= low <= high <= higher
    assert p_value <= larger + 1e-12
    assert higher - lower >= 2 * stats.t.ppf(0.975, len(gains) - 1) * floor / math.sqrt(len(gains)) * (1 - 1e-9)
    assert (larger < 0.05) == (lower > 0 or higher < 0) or larger == pytest.approx(0.05)


def test_the_paired_test_is_students():
    gains = [0.1, 0.3, 0.15, 0.2]
    mean, ends, p_value = paired_t(gains)
    assert ends == student(gains) == pytest.approx(stats.t.interval(0.95, 3, mean, stats.sem(gains)))
    assert ends[1] - mean == pytest.approx(student_reach(gains))
    assert p_value == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
    with pytest.raises(UserError, match="two pairs at least, got 1"):
        paired_t([0.1])
    assert student([0.1]) is student_reach([0.1]) is None


def test_pairs_that_differ_alike_are_certain_only_without_a_floor():
    assert paired_t([0.25, 0.25]) == (0.25, [0.25, 0.25], 0.0)
    assert paired_t([0.0, 0.0]) == (0.0, [0.0, 0.0], 1.0)
    assert paired_t([0.25, 0.25], floor=0.01)[2] > 0


def test_chance_rarely_explains_a_drop_beyond_its_bound():
    """Shares of independent samples pass it as often as 95 % says; those of the same samples, which agree, do less."""
    generator, count = np.random.default_rng(0), 400
    apart, alike = [], []
    for _ in range(400):
        first, second = generator.random((2, count)) < 0.6
        apart.append(abs(first.mean() - second.mean()) <= chance_drop(first.mean(), second.mean(), count))
        flipped = np.where(generator.random(count) < 0.1, second, first)
        alike.append(abs(first.mean() - flipped.mean()) <= chance_drop(first.mean(), flipped.mean(), count))
    assert 0.92 <= np.mean(apart) <= 0.98
    assert np.mean(alike) > 0.99
    assert chance_drop(1.0, 0.99, 100) > 0.01  # one image of 100
