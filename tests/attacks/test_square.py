"""Square against the published code with the same draws, and the shapes of its squares."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from pyautoattack.square import SquareAttack

from dualhead.attacks import Query, attacks
from dualhead.attacks.square import Square, bump, sides
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import Recorder, drawn, images, network, run, run_staggered, streams

LINF, L2, L1 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5), ThreatModel("L1", 4.0)
ALL = pytest.mark.parametrize("threat", [LINF, L2, L1], ids=["Linf", "L2", "L1"])


class Scripted(SquareAttack):
    """The reference with our draws in the place of its own, for one image."""

    def __init__(self, model, threat, queries, draws, shape):
        super().__init__(model, norm=threat.norm, eps=threat.eps, n_queries=queries, resc_schedule=False, device="cpu")
        self.draws, (self.channels, _, self.width) = draws, shape
        self.started, self.number, self.place, self.tile = False, -1, 0, 0
        self.uniform = None

    def p_selection(self, it):  # called once at the start of each query
        self.started, self.number, self.place = True, it, 0
        self.uniform = self.draws.fork(torch.tensor([it])).uniform(5 + self.channels)[0]
        return super().p_selection(it)

    def random_int(self, low=0, high=1, shape=None):
        self.place += 1
        return (low + (high - low) * self.uniform[self.place - 1 : self.place]).long()

    def random_choice(self, shape):
        if self.started:
            signs = self.uniform[5:]
        elif self.norm == "Linf":
            signs = self.draws.fork("stripes").uniform(self.channels, self.width)
        else:
            signs = self.tiles()[self.tile - 1, 1:]
        return torch.where(signs < 0.5, -1.0, 1.0).reshape(shape)

    def rand(self, shape, **_):  # whether `eta` transposes
        assert list(shape) == [1]
        if self.started:
            return self.uniform[4:5]
        self.tile += 1
        return self.tiles()[self.tile - 1, :1]

    def tiles(self):
        return self.draws.fork("tiles").uniform(25, 1 + self.channels)[0]


@ALL
@pytest.mark.parametrize(("channels", "row"), [(1, 0), (3, 1), (3, 2)])
def test_follows_the_reference_query_by_query(threat, row, channels, monkeypatch):
    queries, side = 120, 10
    model = network(channels=channels, side=side, gain=1.0)
    x = images(3, channels, side, side)[row : row + 1]
    y = model(x).argmax(1)
    draws = streams(3)[torch.tensor([row])]
    theirs, ours = Recorder(model), Recorder(model)
    attack = Scripted(theirs, threat, queries, draws.fork(torch.zeros_like(y)), x.shape[1:])
    attack.init_hyperparam(x)
    with drawn(monkeypatch, rand=attack.rand):
        _, best = attack.attack_single_run(x, y)
    margins = []
    state, query = run(
        Square(queries=queries), ours, x, y, threat, draws, watch=lambda state: margins.append(state["margin"].item())
    )
    assert query.forward_passes == queries + 1
    for k, (a, b) in enumerate(zip(theirs.without, ours.without[1:], strict=False)):  # ours begins with the clean image
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6, msg=f"query {k}")
    assert len(set(margins)) > 5, "hardly a square was accepted: too weak a test"
    assert state["found"].item() == (len(theirs.without) < queries + 1)  # they stop there
    if not state["found"]:
        torch.testing.assert_close(state["adversarial"], best, rtol=0, atol=2e-6)


def test_sides_are_the_published_ones():
    assert sides(0.8, 32, 32, "Linf")[:8] == [29, 20, 14, 10, 7, 5, 4, 3]
    assert sides(0.8, 32, 32, "L2")[:8] == [29, 21, 15, 11, 7, 5, 5, 3]
    assert max(sides(0.8, 6, 40, "Linf")) == 6


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 29])
def test_windows_are_the_references(side, norm, monkeypatch):
    attack = SquareAttack(None, norm=norm, eps=1.0, device="cpu")
    with drawn(monkeypatch, rand=lambda *_, **__: torch.zeros(1)):
        expected = attack.eta(side)
    torch.testing.assert_close(bump(side, norm).float(), expected)


def scheduled(number, height, width, norm):
    """The side of the square that follows so many."""
    return sides(0.8, height, width, norm)[sum(number > b for b in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))]


@pytest.mark.parametrize("number", [0, 10, 11, 4000, 4001, 9000])
def test_a_proposal_changes_one_square_of_the_scheduled_side(number):
    x = torch.full((64, 3, 32, 32), 0.5)
    search, side = Square(), scheduled(number, 32, 32, "Linf")
    new = search.propose(x, x, torch.full((64,), number), streams(64), LINF)
    changed = (new != x).any(1)
    assert (changed.sum((1, 2)) == side * side).all()
    assert (changed.any(1).sum(1) == side).all()
    assert (changed.any(2).sum(1) == side).all()
    torch.testing.assert_close((new - x).abs().amax((1, 2, 3)), torch.full((64,), LINF.eps))
    assert len({tuple(rows) for rows in changed.any(2).tolist()}) > (1 if side == 29 else 2), "places do not vary"


@ALL
@pytest.mark.parametrize(("height", "width"), [(6, 40), (40, 7)])
@pytest.mark.parametrize("number", [0, 60, 1500])
def test_squares_lie_whole_in_images_that_are_not_square(threat, height, width, number):
    count, side = 64, scheduled(number, height, width, threat.norm)
    x, numbers = torch.full((count, 1, height, width), 0.5), torch.full((count,), number)
    places = streams(count).fork(numbers).uniform(6)
    squares = torch.zeros(2, count, height, width, dtype=torch.bool)
    for which, row in product(range(2), range(count)):
        top = int(places[row, 2 * which] * (height - side))
        left = int(places[row, 2 * which + 1] * (width - side))
        squares[which, row, top : top + side, left : left + side] = True
    assert (squares.sum((2, 3)) == side * side).all()
    first, second = squares
    new = Square().propose(x, x, numbers, streams(count), threat)
    assert torch.equal((new != x)[:, 0], first)
    if threat.norm == "L2":  # what was changed in the second is given up
        new = Square().propose(x, x + 0.01, numbers, streams(count), threat)
        assert torch.equal((new == x)[:, 0] & ~first, second & ~first)


@ALL
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 6, 40), (1, 40, 7), (3, 2, 3), (2, 14, 14), (3, 32, 32)])
def test_any_shape_of_image_stays_in_ball_and_box(threat, shape):
    x = images(4, *shape)
    weight = torch.randn(4, x[0].numel(), generator=torch.Generator().manual_seed(0))

    def model(z):
        assert (threat.distance(z, x) <= threat.eps + (x[0].numel() * 2.0**-25 if threat.norm == "L1" else 1e-6)).all()
        assert (z >= 0).all()
        assert (z <= 1).all()
        return z.flatten(1) @ weight.T

    y = model(x).argmax(1)
    state, _ = run(Square(queries=25), model, x, y, threat, streams(4))
    assert (state["margin"] > -torch.inf).all()


def test_images_must_have_rows_and_columns():
    with pytest.raises(UserError, match=r"\[B, C, H, W\]"):
        attacks.build("square-5")(lambda x: x, torch.eye(7)[:1], torch.zeros(1).long(), LINF, generator=streams(1))


@ALL
def test_the_margin_never_falls(threat):
    model, x = network(gain=1.0), images(5)
    margins = []

    def watch(state):
        margins.append(state["margin"].masked_fill(state["found"], torch.inf))  # from then on any example will do

    run(Square(queries=100), model, x, model(x).argmax(1), threat, streams(5), watch=watch)
    assert all((later >= earlier).all() for earlier, later in pairwise(margins))
    assert (margins[-1] > margins[1]).any()


@ALL
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(threat):
    model, x, search = network(), images(7), Square(queries=25)
    y = model(x).argmax(1)
    together = run_staggered(search, model, x, y, threat, streams(7), job=torch.zeros_like(y), slots=3)
    for row in range(7):
        one = slice(row, row + 1)
        state, _ = run(search, model, x[one], y[one], threat, streams(7)[torch.tensor([row])])
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=2e-6)
        assert together["found"][row] == state["found"]


def test_restarts_differ():
    model, x = network(), images(2)
    y, search = model(x).argmax(1), Square(restarts=2)
    starts = [search.begin(x, y, model(x), torch.full_like(y, job), LINF, streams(2))["start"] for job in range(2)]
    assert search.jobs(10) == 2
    assert not torch.equal(*starts)


def test_on_a_linear_model_fools_outside_the_margin_and_not_inside():
    # Its squares never cover the last row and column, where only the stripes are: it needs some room.
    x = images(3, 1, 10, 10) * 0.4 + 0.3
    margin = x.mean((1, 2, 3)) - 0.4  # of every value, to be moved down

    def model(z):
        return torch.stack((z.mean((1, 2, 3)), torch.full((len(z),), 0.4)), 1)

    for factor, fooled in ((0.98, False), (1.4, True)):
        for row in range(len(x)):
            one, threat = slice(row, row + 1), ThreatModel("Linf", factor * margin[row].item())
            x_adv = attacks.build("square-120")(model, x[one], torch.zeros(1).long(), threat, generator=streams(1))
            assert (threat.distance(x_adv, x[one]) <= threat.eps).all()
            assert (model(x_adv).argmax(1) != 0).item() == fooled


def test_passes_are_those_of_the_published_cost_where_no_sample_is_fooled():
    lead = torch.tensor([9.0] + [0.0] * 9)
    x, query = images(2), Query(lambda x: x.flatten(1)[:, :10] * 1e-3 + lead)
    attacks.build("square-100").search(query, x, torch.zeros(2, dtype=torch.long), LINF, streams(2))
    assert (query.forward_passes, query.backward_passes) == (2 * (1 + 101 + 1), 0)
    assert Square().max_steps() == 5001  # and two looks around it, where the published code takes one more


@ALL
@pytest.mark.parametrize("count", [2, 5, 64])
def test_looking_ahead_follows_the_same_path(threat, count):
    search, model, x = Square(queries=90), network(gain=1.0), images(6)
    y = model(x).argmax(1)

    def begin():
        return search.begin(x, y, model(x), torch.zeros_like(y), threat, streams(6))

    path, state = [], begin()
    for _ in range(search.max_steps()):
        state = search.step(state, Query(model), threat)
        path.append(state)
    changes = sum(float((a["adversarial"] != b["adversarial"]).any((1, 2, 3)).sum()) for a, b in pairwise(path))
    assert 6 < changes < 6 * 90, "too few or too many squares are kept for this to be a test"

    state, query = begin(), Query(model)
    for _ in range(search.max_steps()):
        before, state = state["iteration"], search.leap(state, query, threat, count)
        assert (state["iteration"] > before).logical_or(before == search.max_steps()).all()
        assert (state["iteration"] <= search.max_steps()).all()
        for row, number in enumerate(state["iteration"].tolist()):
            for key in ("adversarial", "margin", "found"):
                assert torch.equal(state[key][row], path[number - 1][key][row]), (key, number)
        if (state["iteration"] == search.max_steps()).all():
            break
    assert (state["iteration"] == search.max_steps()).all()
    assert query.forward_passes < 6 * search.max_steps() * count
