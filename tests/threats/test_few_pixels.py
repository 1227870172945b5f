"""Few pixels and patches: exact projections, closed forms on linear models, and a search that finds the best places."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.attacks import attacks
from dualhead.errors import UserError
from dualhead.threats import build_threat
from dualhead.threats.l0 import L0
from dualhead.threats.patch import Patch
from helpers.attacks import images, network, streams

BOTH = [L0(2), Patch(2)]
both = pytest.mark.parametrize("threat", BOTH, ids=["L0", "patch"])


def supports(threat, height, width):
    """Every set of places that the budget allows, bool [M, H, W]."""
    places = torch.arange(height * width).reshape(height, width)
    if isinstance(threat, L0):
        sets = itertools.combinations(range(height * width), int(threat.eps))
    else:
        side = int(threat.eps)
        sets = [
            places[top : top + side, left : left + side].flatten().tolist()
            for top, left in itertools.product(range(height - side + 1), range(width - side + 1))
        ]
    found = [torch.isin(places, torch.tensor(one)) for one in sets]
    return torch.stack(found)


@both
@settings(max_examples=25)
@given(reach=st.floats(0.05, 20.0), seed=st.integers(0, 1000))
def test_no_allowed_image_is_nearer_than_the_projection(threat, reach, seed):
    x = images(1, 2, 3, 4, seed=seed)
    wanted = x + reach * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    found = threat.project(wanted, x)
    assert threat.distance(found, x) <= threat.eps
    nearest = torch.where(supports(threat, 3, 4)[:, None], wanted.clamp(0, 1), x)
    least = (nearest - wanted).double().square().flatten(1).sum(1).min()
    assert float((found - wanted).double().square().sum()) == pytest.approx(float(least), rel=1e-5)
    assert torch.equal(threat.project(found, x), found)


def linear(threat, channels=2, height=4, width=4, seed=0):
    """Two classes, an image, the largest rise of the second logit over the first, and the model of a gap to it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, height, width, generator=generator)
    x = images(1, channels, height, width, seed=seed)
    gain = torch.where(weight > 0, weight * (1 - x[0]), -weight * x[0]).sum(0)
    most = float((supports(threat, height, width) * gain).sum((1, 2)).max())

    def with_gap(gap):
        def model(z):
            moved = ((z - x) * weight).flatten(1).sum(1) - gap
            return torch.stack((torch.zeros_like(moved), moved), 1)

        return model

    return x, most, with_gap


@both
@pytest.mark.parametrize("attack", ["sparse-rs-400", "pgd-10(start=clean)", "apgd-ce-20"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_a_linear_model_what_is_in_reach_is_found_and_nothing_else(threat, attack, seed):
    x, most, with_gap = linear(threat, seed=seed)
    y = torch.zeros(1, dtype=torch.int64)
    # The search looks at one colour at a time, and comes near the best patch rather than to it.
    near = 0.6 if isinstance(threat, Patch) and attack.startswith("sparse-rs") else 0.99
    for share, expected in ((near, 1), (1.001, 0)):
        model = with_gap(share * most)
        found = attacks.build(attack)(model, x, y, threat, generator=streams(1))
        assert int(model(found).argmax(1)) == expected


@both
def test_distance_counts_places_and_not_channels(threat):
    x = torch.full((3, 3, 6, 7), 0.5)
    changed = x.clone()
    changed[0, :, 1, 2] = 0.1
    changed[1, 0, 1, 2], changed[1, 1, 4, 3] = 0.1, 1.0
    assert threat.distance(changed, x).tolist() == ([1, 2, 0] if isinstance(threat, L0) else [1, 4, 0])
    changed[2, 0, 0, 0] = torch.nan
    assert threat.distance(changed, x)[2].isnan()


@both
@pytest.mark.parametrize("attack", ["sparse-rs-40", "pgd-5", "apgd-ce-5", "random-search-40"])
def test_rendered_images_keep_to_the_budget_to_the_bit(threat, attack):
    model, x = network(4), images(16)
    found = attacks.build(attack)(model, x, model(x).argmax(1), threat, generator=streams(16))
    changed = (found != x).any(1)
    assert changed.any()
    for places in changed:
        if isinstance(threat, L0):
            assert places.sum() <= 2
        else:
            rows, columns = places.nonzero(as_tuple=True)
            assert not len(rows) or max(int(axis.max() - axis.min()) for axis in (rows, columns)) < 2
    assert ((found >= 0) & (found <= 1)).all()


def test_a_budget_is_a_whole_number_of_pixels():
    for eps in (0, 0.5, 2.5, -1):
        with pytest.raises(UserError, match="is a number of pixels, 1 or more"):
            L0(eps)
    with pytest.raises(UserError, match=r"L0 needs images of shape \[C, H, W\]"):
        L0(2).for_images((7,))
    assert build_threat("L0:20") == L0(20)
    assert build_threat("patch:5") == Patch(5)


def test_a_patch_larger_than_the_image_is_the_image():
    x = images(2, 1, 3, 5)
    threat = Patch(9)
    start = threat.start(x, streams(2), "ball")
    assert (start != x).any(1).all()
    assert (threat.distance(start, x) == 5).all()
