"""Recipes train the weights that they trained before the library was rebuilt, to the bit, with no kernel more.

`tools/freeze_recipes.py` made `data/recipe_digests.json` with the code as it was: for every recipe that ships, at
a tiny size, and for small recipes of settings that none of them uses, digests of the weights that each stage leaves,
and counts of the convolutions, batch norms and matrix products of its training steps. Bits depend on the processor's
instructions, so the runs take place in processes that use only what every x86-64 has; what still differs by the make
of the processor has weights of its own in `data/weights_by_vector_math.json`. A change that alters results on
purpose makes its cases anew with the same tool, and says so.
"""

from __future__ import annotations

import json
import platform

import pytest

from helpers.frozen_recipes import DIGESTS, FAST, OTHERS, SMALL, frozen_here, groups, measure_apart, shipped_names

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the digests are those of x86-64 processors"
)


@pytest.fixture(scope="module")
def frozen():
    return frozen_here()


def in_total(kernels, direction):
    return sum(count for kind, count in kernels.items() if kind.startswith(direction))


def differences(name, found, frozen):
    """What of a case is not as it was, in words."""
    weights, known = found["weights"], frozen["weights"]
    if known is not None and weights.keys() != known.keys():
        yield f"{name}: leaves {sorted(weights)}, and left {sorted(known)}"
        return
    yield from (f"{name}: other weights in {place}" for place in known or () if weights[place] != known[place])
    for stage, kernels in found["kernels"].items():
        for direction in ("forward", "backward"):
            now, before = in_total(kernels, direction), in_total(frozen["kernels"][stage], direction)
            if now > before:
                yield f"{name}: stage {stage} runs {now} {direction} kernels, and ran {before}"


@pytest.mark.slow  # `make bits` runs them
@pytest.mark.parametrize("group", groups())
def test_weights_are_the_same_to_the_bit_and_kernels_are_no_more(group, frozen):
    names = groups()[group]
    found = measure_apart(names)
    told = [line for name in names for line in differences(name, found[name], frozen[name])]
    assert not told, "\n".join(told)


@pytest.mark.slow
def test_digests_do_not_depend_on_threads(frozen):
    names = ["cifar10_cpu_guided", *FAST[::3]]
    found = measure_apart(names, threads=2)
    assert [name for name in names if frozen[name]["weights"] not in (None, found[name]["weights"])] == []


def test_every_case_is_frozen_and_counts_passes_in_both_directions(frozen):
    assert set(frozen) == {*shipped_names(), *SMALL}
    idle = [
        f"{name}: {stage}" for name, case in frozen.items() for stage, kernels in case["kernels"].items()
        if not (in_total(kernels, "forward") and in_total(kernels, "backward"))
    ]  # fmt: skip
    assert idle == ["cifar10_cpu_mixed: mix"]  # chosen by trying, on held-out images


def test_every_case_has_weights_on_some_processor():
    others = json.loads(OTHERS.read_text(encoding="utf-8"))
    frozen = json.loads(DIGESTS.read_text(encoding="utf-8"))
    told = {name for name, case in frozen.items() if case["weights"] is not None}.union(*others.values())
    assert told == set(frozen)
    assert all(weights != frozen[name]["weights"] for cases in others.values() for name, weights in cases.items())


def test_a_changed_weight_or_a_kernel_more_is_told(frozen):
    case = frozen["trades"]
    other = {**case["weights"], "model": "0" * 64}
    more = {"stage": {**case["kernels"]["stage"], "forward: convolution": 10**6}}
    assert list(differences("trades", case, case)) == []
    assert len(list(differences("trades", {"weights": other, "kernels": more}, case))) == 2
