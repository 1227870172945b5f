"""Streams: what a sample draws depends on its key alone, and looks like what it is called."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dualhead.noise import Streams

DRAWS = {
    "uniform": lambda s: s.uniform(3, 5),
    "normal": lambda s: s.normal(3, 5),
    "integers": lambda s: s.integers(17, 3, 5),
    "bits": lambda s: s.bits(7),
    "fork": lambda s: s.fork("word", 3).uniform(4),
}


def streams(count, seed=0):
    return Streams.of(seed, torch.arange(count))


@pytest.mark.parametrize("name", DRAWS)
@settings(max_examples=20)
@given(order=st.permutations(range(12)), cut=st.integers(1, 11))
def test_a_draw_is_the_same_in_any_batch_and_order(name, order, cut):
    draw = DRAWS[name]
    whole = draw(streams(12))
    order = torch.tensor(order)
    assert torch.equal(draw(Streams.of(0, order)), whole[order])
    assert torch.equal(draw(streams(12)[order[:cut]]), whole[order[:cut]])
    parts = [draw(Streams.of(0, part)) for part in (torch.arange(cut), torch.arange(cut, 12))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", DRAWS)
def test_drawing_is_pure(name):
    s = streams(5)
    keys = s.keys.clone()
    first = DRAWS[name](s)
    torch.manual_seed(1)
    assert torch.equal(DRAWS[name](s), first)
    assert torch.equal(s.keys, keys)


def test_no_draw_touches_torchs_generator():
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(streams(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_the_dtype_of_the_indices_does_not_matter(dtype):
    assert torch.equal(Streams.of(3, torch.arange(9, dtype=dtype)).keys, Streams.of(3, torch.arange(9)).keys)


def test_the_indices_given_are_left_alone():
    samples = torch.arange(4)
    Streams.of(7, samples).fork(1).uniform(2)
    assert torch.equal(samples, torch.arange(4))


def test_the_default_dtype_does_not_matter():
    before = torch.get_default_dtype()
    expected = streams(4).normal(6)
    try:
        torch.set_default_dtype(torch.float64)
        found = streams(4).normal(6)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_seeds_samples_and_forks_all_differ():
    s = streams(1000)
    families = [s, streams(1000, 1), s.fork("a"), s.fork("b"), s.fork(0), s.fork(1), s.fork("a", "b"), s.fork("b", "a")]
    families.append(s.fork(torch.arange(10, 1010)))
    keys = torch.cat([family.keys for family in families])
    assert len(keys.unique()) == len(keys)


def test_forks_with_a_number_per_sample_equal_forks_one_by_one():
    numbers = torch.tensor([5, 0, 2**40, 7])
    together = streams(4).fork(numbers).keys
    alone = [streams(4)[torch.tensor([row])].fork(int(number)).keys for row, number in enumerate(numbers)]
    assert torch.equal(together, torch.cat(alone))


def test_a_fork_by_several_parts_is_a_chain():
    s = streams(6)
    assert torch.equal(s.fork("attack", 3).keys, s.fork("attack").fork(3).keys)


@pytest.mark.parametrize(("a", "b"), list(combinations(["samples", "seeds", "forks", "counter"], 2)))
def test_neighbours_are_uncorrelated(a, b):
    """Samples, seeds, forks and draws that follow one another: correlation of 2**16 pairs within 5 sigma of 0."""
    n = 2**16
    families = {
        "samples": streams(n + 1).uniform(1)[1:, 0],
        "seeds": streams(n, 1).uniform(1)[:, 0],
        "forks": streams(n).fork(0).uniform(1)[:, 0],
        "counter": streams(n).uniform(2)[:, 1],
    }
    base = streams(n).uniform(1)[:, 0]
    for first, second in ((families[a], families[b]), (families[a], base), (families[b], base)):
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(n)


def test_two_numbers_of_one_sample_share_no_digits():
    n = 2**16
    u, v = streams(n).uniform(2).double().T
    for shift in range(24):
        for one, other in ((u, v), (v, u)):
            digits = (one * 2.0**shift).frac()
            assert abs(torch.corrcoef(torch.stack([digits, other]))[0, 1]) < 5 / math.sqrt(n), shift


@pytest.mark.parametrize("along", ["samples", "draws"])
def test_every_bit_is_fair_and_independent_of_its_neighbour(along):
    bits = streams(2**15).bits(1)[:, 0] if along == "samples" else streams(1).bits(2**15)[0]
    table = torch.stack([(bits >> k) & 1 for k in range(64)]).double()
    sigma = 0.5 / math.sqrt(bits.numel())
    assert ((table.mean(1) - 0.5).abs() < 5 * sigma).all()
    correlations = torch.corrcoef(table) - torch.eye(64)
    assert correlations.abs().max() < 6 / math.sqrt(bits.numel())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layout", ["many samples", "one sample"])
def test_uniform_is_uniform(seed, layout):
    s = streams(30_000, seed) if layout == "many samples" else streams(1, seed)
    values = s.uniform(1 if layout == "many samples" else 30_000).flatten()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.double().numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layout", ["many samples", "one sample"])
def test_normal_is_normal(seed, layout):
    s = streams(15_000, seed) if layout == "many samples" else streams(1, seed)
    values = s.normal(2 if layout == "many samples" else 30_000)
    assert stats.kstest(values.flatten().double().numpy(), "norm").pvalue > 1e-4
    if layout == "many samples":  # the two that Box and Muller make of one pair
        assert abs(torch.corrcoef(values.T)[0, 1]) < 5 / math.sqrt(15_000)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_shapes_and_dtypes(count):
    s = streams(3)
    assert s.uniform(count, 2).shape == s.normal(count, 2).shape == s.integers(5, count, 2).shape == (3, count, 2)
    assert s.uniform(count).dtype == s.normal(count).dtype == torch.float32
    assert s.integers(5, count).dtype == s.bits(count).dtype == torch.int64
    assert s.uniform().shape == s.integers(5).shape == (3,)
    assert len(s) == 3
    assert s.normal(count).isfinite().all()


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000, 2**20])
def test_integers_are_uniform(high):
    values = streams(100).integers(high, 500).flatten()
    assert values.min() >= 0
    assert values.max() < high
    cells = min(high, 20)
    counts = torch.bincount(values * cells // high, minlength=cells)
    expected = torch.bincount(torch.arange(high) * cells // high, minlength=cells).double() / high * values.numel()
    assert stats.chisquare(counts, expected).pvalue > 1e-4 if cells > 1 else counts[0] == values.numel()


def test_integers_with_a_bound_per_sample():
    highs = torch.tensor([1, 2, 7, 1000])
    values = streams(4).integers(highs, 2000)
    assert (values >= 0).all()
    assert (values.amax(1) < highs).all()
    for row, high in enumerate(highs.tolist()):
        alone = streams(4)[torch.tensor([row])].integers(high, 2000)
        assert torch.equal(values[row], alone[0])
        if high <= 7:
            assert set(values[row].tolist()) == set(range(high))
    assert streams(4).integers(highs).shape == (4,)


def test_streams_from_a_generator_repeat_with_its_seed_and_pass_streams_through():
    def drawn(seed):
        return Streams.drawn_from(torch.Generator().manual_seed(seed), 6, torch.device("cpu"))

    assert torch.equal(drawn(0).keys, drawn(0).keys)
    assert not torch.equal(drawn(0).keys, drawn(1).keys)
    assert len(drawn(0).keys.unique()) == 6
    s = streams(6)
    assert Streams.drawn_from(s, 6, torch.device("cpu")) is s


def test_seeds_of_any_size_name_streams_and_small_ones_name_the_same_as_ever():
    samples = torch.arange(3)
    assert Streams.of(7, samples).keys.tolist() == [4095345163953262787, -8461108137986639655, 6738214707609799231]
    keys = [tuple(Streams.of(seed, samples).keys.tolist()) for seed in (0, -1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 + 5)]
    assert len(set(keys)) == len(keys)
