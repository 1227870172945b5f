"""Models whose robustness is an illusion are told apart from an honest one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.attacks.apgd import APGDCE
from dualhead.attacks.autoattack import AutoAttackRand
from dualhead.errors import Interrupted
from dualhead.evaluation import diagnostics, evaluate
from dualhead.evaluation.diagnostics import check_black_box, check_curve
from dualhead.evaluation.model import ROWS, Subject
from dualhead.evaluation.scheduler import Samples
from dualhead.heads import aggregators
from dualhead.threats.lp import ThreatModel
from helpers.evaluation import THREAT, patterns, trained


class Masked(nn.Module):
    """The trained network behind a step that hides its gradients."""

    def __init__(self, mask, *, on_images=False):
        super().__init__()
        self.network, self.mask, self.on_images = trained(), mask, on_images

    def forward(self, x):
        return self.network(self.mask(x)) if self.on_images else self.mask(self.network(x))


def findings(model, *, count=80, **options):
    images, labels = patterns(count)
    settings = {"threat": THREAT, "attacks": ["pgd-10"], "precision": "float32", **options}
    result = evaluate(model, images, labels, **settings)
    return result, {entry["name"]: entry for entry in result.results["diagnostics"]}


def fired(found):
    return {name for name, entry in found.items() if entry["status"] != "ok"}


def test_an_honest_model_raises_no_alarm():
    _, found = findings(trained())
    assert fired(found) == set()
    assert {"more_steps", "large_eps", "randomness", "zero_gradient"} <= set(found)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda z: (z * 50).tanh() * 5, id="saturated"),
        pytest.param(lambda z: (z * 4).round() / 4, id="quantised"),
        pytest.param(lambda z: z * 1e4, id="scaled"),
    ],
)
def test_masked_outputs_are_caught(mask):
    honest, _ = findings(trained())
    masked, found = findings(Masked(mask))
    assert masked.robust_accuracy["pgd-10"] > honest.robust_accuracy["pgd-10"] + 0.2
    assert {"zero_gradient", "large_eps"} <= fired(found)


def test_blocked_gradients_are_caught():
    result, found = findings(Masked(lambda z: z.detach()))
    assert result.robust_accuracy["pgd-10"] > 0.9
    assert {found[name]["status"] for name in ("gradient_flow", "zero_gradient", "large_eps")} == {"failed"}


def test_quantised_images_are_caught():
    _, found = findings(Masked(lambda x: (x * 32).round() / 32, on_images=True))
    assert {"zero_gradient", "large_eps"} <= fired(found)


def test_a_random_model_is_caught():
    _, found = findings(Masked(lambda z: z + 3.0 * torch.randn_like(z)))
    assert found["randomness"]["status"] == "failed"
    assert "autoattack-rand" in found["randomness"]["message"]


class Lucky(nn.Module):
    """The trained network, which every so often answers something else, whatever the image."""

    def __init__(self, share):
        super().__init__()
        self.network, self.share = trained(), share

    def forward(self, x):
        logits = self.network(x)
        return torch.where(torch.rand(len(x), 1) < self.share, logits.flip(1), logits)


def test_what_luck_alone_loses_is_the_line_for_a_random_model():
    torch.manual_seed(0)
    model = Lucky(0.2)
    images, labels = patterns(400)
    samples = Samples(images, labels, trained()(images.float() / 255).detach(), torch.arange(400))
    sure = diagnostics.right_under_draws(Subject(trained(), None, 64), samples, 5)
    assert sure.all()
    lucky = diagnostics.right_under_draws(Subject(model, None, 64), samples, 5)
    assert lucky.mean() == pytest.approx((1 - 0.2**2) ** 5, abs=0.06)  # lost are those that are wrong twice in a row


def test_between_draws_it_is_asked_whether_to_stop():
    images, labels = patterns(20)
    samples = Samples(images, labels, trained()(images.float() / 255).detach(), torch.arange(20))
    answers = iter([False, False, True])
    with pytest.raises(Interrupted, match="the same command goes on"):
        diagnostics.right_under_draws(Subject(Lucky(0.2), None, 64), samples, 5, lambda: next(answers))
    assert not list(answers)


def test_a_random_model_is_judged_by_as_many_draws_as_the_attack_takes(monkeypatch):
    torch.manual_seed(0)
    asked = []
    right = diagnostics.right_under_draws

    def counted(subject, samples, draws, stop):
        asked.append(draws)
        return right(subject, samples, draws, stop)

    monkeypatch.setattr(diagnostics, "right_under_draws", counted)
    result, found = findings(Lucky(0.2).eval())
    assert asked == [11]  # ten steps, and a look at where the last one led
    told = found["randomness"]["message"]
    assert "Asked 11 times without any attack" in told
    assert f"robust accuracy {result.robust_accuracy['worst']:.1%}" in told
    assert found["batch_independence"]["status"] == "ok"


def test_the_suite_that_was_run_is_not_the_advice(monkeypatch):
    monkeypatch.setattr(AutoAttackRand, "members", lambda *_: (APGDCE(steps=5, eot=2),))
    torch.manual_seed(0)
    noisy = Masked(lambda z: z + 0.5 * torch.randn_like(z))
    _, found = findings(noisy, attacks=["autoattack-rand"])
    assert found["randomness"]["status"] == "warning"
    assert "autoattack-rand" not in found["randomness"]["message"]
    assert "seed" in found["randomness"]["message"]
    _, found = findings(Masked(lambda z: z.detach()), attacks=["square-20"])
    assert "square" not in found["zero_gradient"]["message"]
    assert "autoattack" in found["zero_gradient"]["message"]


class Constant(nn.Module):
    """One answer to everything; the gradient is there or not."""

    def __init__(self, *, blind):
        super().__init__()
        self.network, self.blind = trained(), blind

    def forward(self, x):
        logits = 0.0 * self.network(x) if self.blind else 1e-3 * self.network(x)
        return logits + torch.tensor([0.0, 0.0, 9.0, 0.0])


@pytest.mark.parametrize("blind", [False, True])
def test_a_constant_is_called_one_and_not_masked(blind):
    result, found = findings(Constant(blind=blind).eval())
    assert result.robust_accuracy["worst"] == result.clean_accuracy > 0
    assert fired(found) == {"one_class", "clean_accuracy"}
    assert found["one_class"]["status"] == "failed"
    assert "one class, 2" in found["one_class"]["message"]
    assert "masked" not in " ".join(entry["message"] for entry in found.values())
    assert result.checks[0]["name"] == "one_class"


def test_accuracy_is_held_against_the_largest_class():
    """Three quarters of the images are of class 1: what is right about those alone is a constant's accuracy."""
    images, labels = patterns(400)
    kept = torch.cat(((labels == 1).nonzero()[:60, 0], (labels != 1).nonzero()[:20, 0]))
    images, labels = images[kept], labels[kept]
    right = evaluate(trained(), images, labels, threat=THREAT, attacks=["pgd-2"])
    assert right.clean_accuracy > 0.75
    assert "clean_accuracy" not in {check["name"] for check in right.checks}
    labels[60:] = torch.where(labels[60:] == 2, 3, 2)
    found = evaluate(trained(), images, labels, threat=THREAT, attacks=["pgd-2"])
    assert 0.5 < found.clean_accuracy <= 0.75
    (check,) = [check for check in found.checks if check["name"] == "clean_accuracy"]
    assert "largest class gives, 75.0%" in check["message"]


def test_images_of_one_class_are_told():
    images, labels = patterns(200)
    only = (labels == 1).nonzero()[:40, 0]
    result = evaluate(trained(), images[only], labels[only], threat=THREAT, attacks=["pgd-2"])
    assert "labels" in {check["name"] for check in result.checks}
    assert not {"one_class", "clean_accuracy"} & {check["name"] for check in result.checks}


def test_dropout_that_ignores_eval_mode_is_caught():
    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            self.training = True
            return self

    model = nn.Sequential(Stubborn(0.5), trained())
    _, found = findings(model)
    assert {"train_mode", "randomness"} <= fired(found)
    assert found["train_mode"]["status"] == "failed"


def test_batch_statistics_are_caught():
    class Batch(nn.Module):
        def forward(self, x):
            return trained()(x - x.mean(0, keepdim=True) + 0.5)

    _, found = findings(Batch())
    assert "batch_independence" in fired(found)
    assert "randomness" not in fired(found)


def test_a_model_in_train_mode_is_put_in_eval_mode_which_is_no_cause_for_doubt():
    model = nn.Sequential(trained()).train()
    try:
        _, found = findings(model)
        assert not fired(found)
        assert found["train_mode"]["status"] == "ok"
        assert model.training
    finally:
        model.eval()


def test_probabilities_are_caught():
    _, found = findings(Masked(lambda z: z.softmax(1)))
    assert "logits" in fired(found)
    assert "softmax" in found["logits"]["message"]


def test_infinite_logits_are_caught():
    _, found = findings(Masked(lambda z: torch.where(z > 2, torch.inf, z)))
    assert found["finite_logits"]["status"] == "failed"


def test_images_divided_twice_and_wrong_labels_are_noted():
    images, labels = patterns(80)
    result = evaluate(trained(), images.float() / 255 / 255, labels, threat=THREAT, attacks=["pgd-2"])
    found = {entry["name"]: entry for entry in result.results["diagnostics"]}
    assert "value_range" in fired(found)
    wrong = evaluate(trained(), images, (labels + 1) % 4, threat=THREAT, attacks=["pgd-2"])
    assert {entry["name"] for entry in wrong.results["diagnostics"] if entry["status"] != "ok"} == {"clean_accuracy"}


def test_black_box_beating_white_box_is_noted():
    white, black = np.zeros(100, bool), np.zeros(100, bool)
    white[:40], black[:41] = True, True
    assert check_black_box(white, black)[0].status == "ok"
    black[:43] = True
    assert check_black_box(white, black)[0].status == "warning"
    black[:60] = True
    assert check_black_box(white, black)[0].status == "failed"
    white, black = np.zeros(1000, bool), np.zeros(1000, bool)
    black[:2] = True
    assert check_black_box(white, black)[0].status == "ok"
    black[:3] = True
    assert check_black_box(white, black)[0].status == "warning"


@pytest.mark.parametrize(("few", "many", "status"), [(20, 10, "warning"), (12, 10, "warning"), (11, 10, "ok")])
def test_more_steps_that_find_less_are_noted(monkeypatch, few, many, status):
    monkeypatch.setattr(diagnostics, "_fooled", lambda search, *more: {10: few, 40: many}.get(search.steps, 32))
    _, found = findings(trained())
    assert found["more_steps"]["status"] == status


def test_a_black_box_attack_alone_proves_nothing_about_gradients():
    _, found = findings(trained(), attacks=["square-100"])
    assert "black_box" not in found
    _, found = findings(trained(), attacks=["square-100", "pgd-10"])
    assert found["black_box"]["status"] == "ok"


def test_checks_keep_to_the_batch_size():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.most = trained(), 0

        def forward(self, x):
            self.most = max(self.most, len(x))
            return self.network(x)

    model = Counts()
    images, labels = patterns(80)
    evaluate(model, images, labels, threat=THREAT, attacks=["fgsm"], batch_size=ROWS)
    assert model.most == ROWS


def test_robust_accuracy_that_rises_with_eps_is_noted():
    curve = [{"eps": e, "robust_accuracy": {"pgd": r, "worst": r}} for e, r in ((0.1, 0.5), (0.2, 0.3), (0.3, 0.29))]
    assert check_curve(curve, 100)[0].status == "ok"
    curve[2]["robust_accuracy"]["pgd"] = 0.4
    assert check_curve(curve, 100)[0].status == "warning"
    assert "from eps 0.2 to 0.3" in check_curve(curve, 100)[0].message


class TwoHeads(nn.Module):
    """The trained network twice, once slightly changed, and what `aggregate` makes of their logits."""

    def __init__(self, aggregate):
        super().__init__()
        self.first, self.second = trained(), copy.deepcopy(trained())
        with torch.no_grad():
            self.second[-1].weight.mul_(1.1)
        self.aggregate = aggregate

    def head_logits(self, x):
        return torch.stack((self.first(x), self.second(x)), 1)

    def forward(self, x):
        return self.aggregate(self.head_logits(x))


def test_the_shared_aggregator_masks_no_gradients():
    """Also with few rivals and with read-outs that weigh as much as the mean of the heads."""
    torch.manual_seed(0)
    mean, found = findings(TwoHeads(lambda heads: heads.mean(1)).eval(), count=48)
    for rivals in (1, 10):
        aggregator = aggregators.build({"name": "pairwise_shared", "rivals": rivals}).create(4).eval()
        torch.nn.init.normal_(aggregator.readout, std=0.5)
        whole, found = findings(TwoHeads(aggregator).eval(), attacks=["pgd-10", "multihead-5"], count=48)
        assert not fired(found), found
        assert whole.robust_accuracy["worst"] <= mean.robust_accuracy["pgd-10"] + 0.1


def test_a_saturated_aggregate_is_brought_down_by_the_adaptive_attack():
    honest, _ = findings(TwoHeads(lambda heads: heads.mean(1)).eval())
    model = TwoHeads(lambda heads: (50 * heads.mean(1)).tanh() + 1e-4 * heads.mean(1).detach()).eval()
    masked, found = findings(model, attacks=["pgd-10", "multihead-10"])
    assert {"zero_gradient", "large_eps"} <= fired(found)
    assert masked.robust_accuracy["pgd-10"] > honest.robust_accuracy["pgd-10"] + 0.2
    assert masked.robust_accuracy["worst"] <= honest.robust_accuracy["pgd-10"] + 0.03
    assert masked.results["attacks"]["multihead-10"]["fooled"] > 0


def test_quantised_logits_do_not_stop_square():
    options = {"attacks": ["pgd-10", "square-300"], "threat": ThreatModel("Linf", "24/255")}
    honest, _ = findings(trained(), **options)
    masked, found = findings(Masked(lambda z: (z * 4).round() / 4 + 1e-4 * z.detach()), **options)
    assert masked.robust_accuracy["pgd-10"] > honest.robust_accuracy["pgd-10"] + 0.5
    assert abs(masked.robust_accuracy["square-300"] - honest.robust_accuracy["square-300"]) <= 0.03
    assert masked.robust_accuracy["worst"] < masked.robust_accuracy["pgd-10"]
    assert found["black_box"]["status"] == "failed"
    assert "masked" in found["black_box"]["message"]
