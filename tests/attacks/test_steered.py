"""The attack that steers gates: what it climbs, and that it finds what the ordinary gradient does not."""

from __future__ import annotations

import pytest
import torch

from dualhead.attacks import attacks, losses
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import images, network, run, streams

LINF = ThreatModel("Linf", 8 / 255)


class Gated:
    """Two networks and a gate by a third; shows shares as `after_dder` does."""

    def __init__(self, sharpness=1.0):
        self.members = [network(5, seed=seed) for seed in (0, 1)]
        self.gate, self.sharpness = network(2, seed=2), sharpness

    def outputs(self, x):
        each = torch.stack([member(x).log_softmax(1) for member in self.members], 1)
        shares = (self.sharpness * self.gate(x)).log_softmax(1)
        whole = (shares.exp()[:, :, None] * each).sum(1)
        return torch.cat((each + shares[:, :, None], whole[:, None]), 1)

    def __call__(self, x):
        return self.outputs(x)[:, -1]


def search(heads=2, **fields):
    (found,) = attacks.build({"name": "steered", **fields}).parts(5, LINF, heads)
    return found


def test_there_is_a_try_for_each_head_and_router_and_restart():
    assert search(7, steps=4, restarts=2).jobs(5) == 14
    assert search(7, steps=4).max_steps() == 15


def test_it_climbs_the_share_first_then_fools_there_then_fools_the_whole():
    model, x = Gated(), images(6)
    y, seen = model(x).argmax(1), []
    run(
        search(steps=8), model, x, y, LINF, streams(6), outputs=model.outputs,
        watch=lambda state: seen.append({key: value.clone() for key, value in state.items()}),
    )  # fmt: skip

    def share(points, member):
        return model.outputs(points)[:, member].logsumexp(1)

    first = seen[9]  # after the look at its last step, the first ascent is over: the next begins at the highest share
    assert (share(first["iterate"], 0) > share(x, 0)).all()
    shares = torch.stack([share(state["iterate"], 0) for state in seen[:9]])
    assert (share(first["iterate"], 0) >= shares.amax(0) - 1e-5).all()
    last = seen[-1]
    assert (losses.margin(model(last["adversarial"]), y) >= losses.margin(model(x), y)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_its_examples_lie_within_the_budget_and_the_model_decides(norm):
    threat = ThreatModel(norm, {"Linf": 0.05, "L2": 0.5, "L1": 4.0}[norm])
    model, x = Gated(4.0), images(8)
    y = model(x).argmax(1)
    attack = attacks.build("steered-6")
    found = attack(model, x, y, threat, generator=torch.Generator().manual_seed(0), outputs_fn=model.outputs)
    assert (threat.distance(found, x) <= threat.eps).all()
    assert (model(found).argmax(1) != y).any()


def test_a_model_with_one_head_is_refused():
    with pytest.raises(UserError, match="steered needs a model that shows the logits of 2 heads"):
        attacks.build("steered").parts(10, LINF, 1)
