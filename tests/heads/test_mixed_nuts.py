"""MixedNUTS: its formula, its gradients, and the choice of its parameters on held-out images."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from torch import nn

from dualhead.attacks import attacks
from dualhead.data import Split, load_split
from dualhead.errors import UserError
from dualhead.evaluation import evaluate
from dualhead.heads import attach_second_head
from dualhead.heads.aggregators import aggregators
from dualhead.noise import Streams
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.run import train
from dualhead.saving.models import load
from dualhead.system.arithmetic import FLOAT32
from dualhead.threats.lp import ThreatModel
from dualhead.training import Position, Selection, Validator
from dualhead.training.choices import Fit
from helpers.resume import outcome, train_until

SETTINGS = {"alpha": 0.9, "scale": 1.5, "power": 2.0, "shift": -0.5, "temperature": 0.5}


def head_logits(batch=6, classes=5, scale=3.0, seed=0):
    return scale * torch.randn(batch, 2, classes, generator=torch.Generator().manual_seed(seed)).double()


def mixed_by_hand(z, alpha, scale, power, shift, temperature):
    """The docstring's formula in plain Python, one image [2, C] at a time."""

    def softmax(values):
        weights = [math.exp(value) for value in values]
        return [weight / sum(weights) for weight in weights]

    robust, accurate = z.tolist()
    mean = sum(robust) / len(robust)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in robust) / len(robust) + 1e-5)
    shifted = [(value - mean) / deviation + shift for value in robust]
    clamped = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in shifted]
    q = softmax([scale * math.copysign(abs(value) ** power, value) for value in clamped])
    g = softmax([value / temperature for value in accurate])
    return [math.log((1 - alpha) * b + alpha * a) for a, b in zip(q, g, strict=True)]


def test_the_formula_by_hand():
    z = head_logits()
    module = aggregators.build({"name": "mixed_nuts", **SETTINGS}).create(5).double()
    for settings in (SETTINGS, {**SETTINGS, "alpha": 0.3, "shift": 0.2, "power": 3.0}):
        module.assign(settings)
        expected = torch.tensor([mixed_by_hand(image, **settings) for image in z], dtype=torch.float64)
        torch.testing.assert_close(module(z), expected)
        torch.testing.assert_close(module(z).exp().sum(1), torch.ones(6).double())


def test_it_ends_at_the_heads():
    z = head_logits()
    module = aggregators.build({"name": "mixed_nuts", "alpha": 1 - 1e-12, "shift": 0}).create(5).double()
    assert torch.equal(module(z).argmax(1), z[:, 0].argmax(1))
    module = aggregators.build({"name": "mixed_nuts", "alpha": 1e-12}).create(5).double()
    torch.testing.assert_close(module(z), z[:, 1].log_softmax(1))


def test_a_sure_head_1_overrules_head_2_and_a_doubtful_one_does_not():
    z = torch.zeros(2, 2, 5)
    z[:, 0, 0] = 4.0
    z[:, 1, 1] = 8.0
    z[1, 0, 2:] = torch.tensor([3.9, 3.8, -1.0])  # class 0 leads by little
    assert aggregators.build("mixed_nuts").create(5)(z).argmax(1).tolist() == [0, 1]


def test_gradients_are_finite_and_reach_every_image_also_where_logits_are_large_or_equal():
    module = aggregators.build("mixed_nuts").create(10)
    z = torch.cat([head_logits(64, 10, scale).float() for scale in (0.01, 1.0, 10.0)])
    z[0] = 0.0
    z.requires_grad_()
    labels = module(z).argmax(1)  # where it is right and sure, the gradient is smallest
    gradient = torch.autograd.grad(nn.functional.cross_entropy(module(z), labels, reduction="sum"), z)[0]
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1}, r"alpha must lie in \(0, 1\), got 1"),
        ({"power": 0.5}, "power must be at least 1"),
        ({"scale": 0}, "scale must be greater than 0"),
        ({"temperature": -1}, "temperature must be greater than 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        aggregators.build({"name": "mixed_nuts", **fields})


def test_two_classes_are_refused_since_head_1_would_have_no_gradient():
    with pytest.raises(UserError, match="at least 3 classes"):
        aggregators.build("mixed_nuts").create(2)


# ---- the choice


class Brightness(nn.Module):
    """Head 1 or 2 of a task with a known answer: three features, each an image's channel mean."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, features):
        return features @ self.weights.T


def task(size=120):
    """Images whose channels 0 to 2 tell the class robustly but only for three of four images, channels 3 to 5 always,
    by less than the attack can move."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    images = torch.full((size, 6, 4, 4), 0.4)
    rows = torch.arange(size)
    told = torch.rand(size, generator=generator) < 0.75
    images[rows[told], labels[told]] = 0.7
    images[rows, 3 + labels] = 0.42
    images[:, :3] += 0.02 * torch.rand(size, 3, 1, 1, generator=generator)
    return Split((255 * images).round().to(torch.uint8), labels, ("a", "b", "c"))


def model_of_task():
    strong = [[9.0 * (i == j) for j in range(6)] for i in range(3)]
    weak = [[200.0 * (i + 3 == j) for j in range(6)] for i in range(3)]
    base = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Brightness(strong))
    return attach_second_head(
        base, "1", example=torch.rand(2, 6, 4, 4), init=Brightness(weak), aggregator="mixed_nuts"
    ).eval()


def accuracies(model, split, threat):
    """Clean accuracy, and robust accuracy under attacks on each output, tried on each."""
    x, y = split.images.float() / 255, split.labels
    views = {name: model.view(name) for name in ("head1", "head2", "mean", "aggregate")}
    found = [
        x,
        *(attacks.build("pgd-20")(view, x, y, threat, generator=dualhead_streams(len(y))) for view in views.values()),
    ]
    right = {name: torch.stack([view(image).argmax(1) == y for image in found]) for name, view in views.items()}
    return {name: (float(r[0].float().mean()), float(r.all(0).float().mean())) for name, r in right.items()}


def dualhead_streams(count):
    return Streams.of(3, torch.arange(count))


def test_the_choice_gains_head_2s_accuracy_at_the_price_allowed():
    split, threat, model = task(), ThreatModel("Linf", 0.05), model_of_task()
    validator = Validator(split, attacks.build("pgd-10"), 1, threat, seed=0)
    finished = Selection(model, Fit(max_loss=0.02), validator, FLOAT32, torch.device("cpu")).run(Position(stage=2))
    found = accuracies(model, split, threat)
    clean, robust = found["aggregate"]
    assert (found["head1"][0], found["head2"][0], found["head2"][1]) == (pytest.approx(0.83, abs=0.08), 1.0, 0.0)
    assert clean > found["head1"][0] + 0.05
    assert robust >= found["head1"][1] - 0.03
    assert finished.best["validation_clean"] == pytest.approx(clean)
    assert finished.best["validation_robust"] == pytest.approx(robust, abs=0.03)
    assert finished.flops > 0
    assert finished.stage == 2


def test_the_price_allowed_is_what_moves_the_choice():
    """With all of the robustness to give away, the most accurate mixture is taken; with none, a robust one."""
    split, threat = task(), ThreatModel("Linf", 0.05)
    validator = Validator(split, attacks.build("pgd-10"), 1, threat, seed=0)
    chosen = {}
    for price in (0.0, 1.0):
        fit = Fit(max_loss=price)
        chosen[price] = Selection(model_of_task(), fit, validator, FLOAT32, torch.device("cpu")).run(Position()).best
    assert chosen[1.0]["validation_clean"] == 1.0 > chosen[0.0]["validation_clean"]
    assert chosen[0.0]["validation_robust"] > chosen[1.0]["validation_robust"] + 0.3


class Sharp(nn.Module):
    """Head 1, or else head 2, the more accurate one, so sure that no probability of another class is left."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sharp", torch.zeros(()))

    def candidates(self):
        return [{"sharp": 0.0}, {"sharp": 1.0}]

    def assign(self, settings):
        self.sharp.fill_(settings["sharp"])

    def forward(self, z):
        sure = 1000.0 * nn.functional.one_hot(z[:, 1].argmax(1), 3).to(z.dtype)
        return torch.where(self.sharp > 0, sure, z[:, 0])


def test_what_makes_probabilities_vanish_is_not_chosen_however_accurate():
    model = model_of_task()
    model.aggregator = Sharp()
    validator = Validator(task(60), attacks.build("pgd-2"), 1, ThreatModel("Linf", 0.05), seed=0)
    best = Selection(model, Fit(max_loss=1.0), validator, FLOAT32, torch.device("cpu")).run(Position()).best
    assert best["sharp"] == 0.0


def mixed_recipe(folder, **fit):
    """The digits recipe with a natural second head and a mixture in place of the trained aggregator."""
    plain = load_recipe("digits").resolved()
    plain["model"]["aggregator"] = "mixed_nuts"
    plain["stages"][1]["objective"] = "natural"
    plain["stages"][2] = {"name": "mix", "train": ["aggregator"], "fit": fit}
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


SMALL = [
    "data.train_limit=256", "data.validation=64", "model.backbone=cnn-2", "validation.attack.steps=2",
    "stages.main_head.epochs=1", "stages.second_head.epochs=1", "evaluate.limit=16", "evaluate.attacks=[pgd-2]",
    "evaluate.gallery=0", "runtime.device=cpu", "runtime.lanes=1",
]  # fmt: skip


def test_a_run_keeps_what_was_chosen_and_says_so(tmp_path):
    recipe = load_recipe(mixed_recipe(tmp_path, rounds=2), SMALL)
    run = train(recipe, run_dir=tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["stage"] == "mix"
    module = load(tmp_path / "run").aggregator
    for name in ("scale", "power", "shift", "temperature"):
        assert float(getattr(module, name)) == pytest.approx(line[name])
    assert float(module.log_odds.sigmoid()) == pytest.approx(line["alpha"])
    assert [row.name for row in run.rows][-1] == "aggregate of heads"
    costs = {row.name: row.flops for row in run.rows}
    assert costs["aggregate of heads"] > costs["mean of heads"]  # the attacks of the choice count
    assert "Chosen on the held-out images: alpha" in (tmp_path / "run" / "report.html").read_text()


def test_stopped_at_every_chance_a_choice_is_the_same(tmp_path):
    settings = ["data.validation=32", "model.aggregator=mixed_nuts", *STAGES]
    assert train_until(tmp_path / "whole", lambda: False, *settings)
    asked = []

    def within_the_choice():
        asked.append(None)
        return len(asked) in (7, 9, 12, 16)

    ends = [train_until(tmp_path / "stopped", within_the_choice, *settings) for _ in range(5)]
    assert ends == [False] * 4 + [True]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


STAGES = [
    "stages.aggregator.objective=natural", "stages.aggregator.fit={rounds: 2}", "stages.*.epochs=1",
    "stages.aggregator.epochs=0", "stages.second_head.objective=natural",
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.aggregator=mean"], "stages.2.fit: fit is for an aggregator whose parameters are chosen"),
        (["data.validation=0", "stages.*.keep=last"], "stages.2.fit: needs held-out images"),
        (["stages.mix.epochs=3"], r"stages.mix: a stage with fit trains nothing: write train: \[aggregator\]"),
        (["stages.mix.train=[head2]"], r"stages.mix: a stage with fit trains nothing: write train: \[aggregator\]"),
        (["stages.mix.objective=sat"], "stages.mix: a stage with fit trains nothing; leave its objective out"),
        (["stages.mix.fit.rounds=0"], "stages.mix.fit.rounds"),
    ],
)
def test_a_fit_that_cannot_be_is_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(mixed_recipe(tmp_path), settings, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # trains two heads on digits: about 30 s
def test_on_digits_no_gradient_is_masked(tmp_path):
    """The evaluation's checks, among them Square against what uses gradients, find nothing wrong."""
    small = [*SMALL, "data.train_limit=1000", "stages.main_head.epochs=12", "stages.second_head.epochs=6"]
    larger = ["model.backbone=cnn-8", "data.validation=200", "validation.attack.steps=20", "threat.eps=0.1"]
    recipe = load_recipe(mixed_recipe(tmp_path), [*small, *larger])
    run = train(recipe, run_dir=tmp_path / "run")
    test = load_split("digits", "test", limit=96)
    used = ["pgd-20", {"name": "square", "queries": 300}]
    settings = {"threat": recipe.threat, "batch_size": 96}
    mixed = evaluate(run.model, test.images, test.labels, attacks=[*used, "multihead"], **settings)
    first = evaluate(load(tmp_path / "run", "head1"), test.images, test.labels, attacks=used, **settings)
    assert {finding["status"] for finding in mixed.results["diagnostics"]} == {"ok"}
    assert mixed.clean_accuracy >= first.clean_accuracy - 0.05  # it was chosen on other images
    assert mixed.robust_accuracy["worst"] >= first.robust_accuracy["worst"] - 0.1
    assert first.robust_accuracy["worst"] > 0.2
