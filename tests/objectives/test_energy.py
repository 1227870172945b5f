"""The energy beside a base method: its loss by hand, its curriculum, and statistics of batch norm that stay."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dualhead.data import StreamImages, load_split
from dualhead.errors import UserError
from dualhead.evaluation import noise_seeds
from dualhead.objectives import objectives
from dualhead.system.arithmetic import FLOAT32
from dualhead.training import Passes
from dualhead.training.step import TrainingStep
from helpers.training import THREAT, batch, dual_model, plain_model, stage_of, streams_of


def build(**settings):
    return objectives.build({"name": "energy", **settings})


def further():
    real, seeds = batch(1), batch(2)
    return {"real": StreamImages(real.x, real.y), "seeds": StreamImages(seeds.x)}


def step(model, objective, parts=("model",), state=None, **settings):
    """A model after one step, and its outcome."""
    model = copy.deepcopy(model)
    stage = stage_of(objective, parts, **settings)
    passes = Passes.of(model, stage)
    made = TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), FLOAT32)
    made.begin(0, state or stage.objective.begin())
    outcome = made(batch(0), streams_of(batch(0)), further())
    return model, made, outcome


def seen_by_hand():
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.0, -0.5]])
    made = torch.tensor([[-2.0, 0.1, 0.4], [3.0, 1.0, 0.0]])
    return {"q": logits, "real": logits, "real_y": torch.tensor([2, 0]), "made": made}


def test_the_loss_by_hand_is_half_the_papers_sum():
    seen, y = seen_by_hand(), torch.tensor([0, 1])

    def lse(row):
        return math.log(sum(math.exp(value) for value in row))

    data = [math.log1p(math.exp(-lse(row))) for row in seen["real"].tolist()]
    samples = [math.log1p(math.exp(lse(row))) for row in seen["made"].tolist()]
    mean_of_all = (sum(data) + sum(samples)) / 4  # binary cross-entropy over images and samples together
    halved, whole = build().loss(y, seen), build(weight=1.0).loss(y, seen)
    assert float(halved.terms["energy"]) == pytest.approx(mean_of_all, rel=1e-6)
    assert float(whole.terms["energy"]) == pytest.approx(2 * mean_of_all, rel=1e-6)
    assert torch.equal(halved.terms["adversarial"], whole.terms["adversarial"])


def test_the_auc_compares_the_climbed_logit_within_a_slot_and_ties_count_half():
    seen = seen_by_hand()
    assert float(build().loss(torch.tensor([0, 1]), seen).figures["auc"]) == 0.5  # 2 > 0.4, 1.5 < 3
    seen["made"] = seen["real"].clone()
    assert float(build().loss(torch.tensor([0, 1]), seen).figures["auc"]) == 0.5


def test_without_steps_the_samples_are_the_seeds():
    model = plain_model()
    _, made, _ = step(model, build())
    images, _, _ = made._make(batch(0), streams_of(batch(0)), further())
    assert "contrast" not in images
    assert made._plan.needs["made"].on == "seeds"


@pytest.mark.parametrize("climb", ["class", "marginal"])
def test_samples_climb_what_was_asked_for_by_steps_of_the_given_length(climb):
    model = plain_model()
    _, made, _ = step(model, build(climb=climb), state={"steps": 2.0}, lr=1e-30)
    images, _, _ = made._make(batch(0), streams_of(batch(0)), further())
    seeds, samples = further()["seeds"].x, images["contrast"]
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert (samples - seeds).flatten(1).norm(dim=1).max() <= 0.2 + 1e-5
    frozen = model.eval()
    before, after = frozen(seeds), frozen(samples)
    if climb == "class":
        y = further()["real"].y[:, None]
        before, after = before.gather(1, y), after.gather(1, y)
    else:
        before, after = before.logsumexp(1), after.logsumexp(1)
    assert after.mean() > before.mean()


def test_the_curriculum_rises_at_the_threshold_and_ends_at_its_cap():
    objective = build(auc=0.75, max_steps=2)
    state = objective.begin()
    assert objective.advance(state, {"auc": 0.74}) == {"steps": 0.0}
    for expected in (1.0, 2.0, 2.0):
        state = objective.advance(state, {"auc": 0.75})
        assert state == {"steps": expected}
    assert objective.at(3, state).inner()["contrast"].attack.steps == 2


def test_frozen_batch_norm_keeps_its_statistics_to_the_bit_while_scale_and_shift_move():
    model = plain_model()
    frozen, _, _ = step(model, build(), batch_norm="frozen")
    moving, _, _ = step(model, build())
    old, new, free = model.state_dict(), frozen.state_dict(), moving.state_dict()
    statistics = [name for name in old if "running_" in name or "num_batches" in name]
    affine = [f"{name}.{kind}" for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
              for kind in ("weight", "bias")]  # fmt: skip
    assert statistics
    assert all(torch.equal(old[name], new[name]) for name in statistics)
    assert not any(torch.equal(old[name], new[name]) for name in affine)
    assert not all(torch.equal(old[name], free[name]) for name in statistics)


@pytest.mark.parametrize("base", ["trades", "hybrid"])
def test_with_frozen_statistics_it_does_not_matter_whose_images_joint_clean_counts(base):
    model = plain_model()
    settings = {"batch_norm": "frozen", "state": {"steps": 1.0}}
    apart, _, _ = step(model, build(base=base), forward="separate", **settings)
    joint, _, _ = step(model, build(base=base), forward="joint_clean", **settings)
    old, one, other = (m.state_dict() for m in (model, apart, joint))
    assert all(torch.equal(old[name], other[name]) for name in old if "running_" in name)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in old)
    assert not all(torch.equal(old[name], other[name]) for name in old)


@pytest.mark.parametrize("output", ["head2", "mean"])
def test_the_energy_of_another_output_beside_classes_on_head_1(output):
    classes = {"name": "hybrid", "alpha": 0.0, "clean": "head1", "robust": "head1"}
    objective = build(base=classes, output=output)
    model = dual_model()
    stage = stage_of(objective, ("trunk", "head1", "head2"))
    assert stage.output == "head1"
    trained, _, outcome = step(model, objective, ("trunk", "head1", "head2"), state={"steps": 1.0})
    moved = {n.split(".")[0] for n, p in trained.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved == {"trunk", "head1", "head2"}
    assert {"auc", "steps", "lse_real", "lse_made", "energy"} <= outcome.terms.keys()


@pytest.mark.parametrize("steps", [0, 2])
def test_the_ascent_from_seeds_is_no_threat_that_training_meets(steps):
    """Else held-out images would be attacked within the whole box, with `validation.under: stage`."""
    assert stage_of(build(start_steps=steps), ("model",)).met(THREAT) == (THREAT,)


def test_micro_batches_add_up_to_the_whole():
    model = plain_model()
    whole, _, one = step(model, build(), state={"steps": 1.0}, batch_norm="frozen")
    pieces, _, other = step(model, build(), state={"steps": 1.0}, batch_norm="frozen", micro_batch=5)
    assert float(one.terms["auc"]) == pytest.approx(float(other.terms["auc"]))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": 0}, "weight must be greater than 0"),
        ({"auc": 0.4}, "auc must lie in"),
        ({"start_steps": 60}, "start_steps must be"),
        ({"every": 0}, "every must be at least 1"),
        ({"real": "uniform"}, "real must be a stream of images"),
        ({"base": "energy"}, "energy"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        build(**settings)


def test_frozen_statistics_are_not_estimated_anew():
    with pytest.raises(ValueError, match="would estimate them anew"):
        stage_of(build(), ("model",), batch_norm="frozen", average="swa")


def test_seeds_with_a_full_covariance_have_that_of_the_images_and_belong_to_their_numbers():
    training, numbers = load_split("digits", "train"), torch.arange(3000)
    drawn = noise_seeds(training, numbers)
    pixels = training.images[torch.arange(len(training))].double().div(255).flatten(1)
    assert torch.allclose(drawn.double().flatten(1).mean(0), pixels.mean(0), atol=0.06)  # clipped to [0, 1]
    found, expected = drawn.double().flatten(1).T.corrcoef(), pixels.T.corrcoef()
    known = expected.isfinite() & (pixels.std(0)[:, None] > 0.2) & (pixels.std(0) > 0.2)
    assert (found - expected)[known].abs().max() < 0.2
    assert torch.equal(noise_seeds(training, numbers[17:20]), drawn[17:20])


@pytest.mark.parametrize(
    ("auc", "steps", "level", "bad"),
    [(0.7, 20, 0.2, set()), (0.99, 40, 0.2, {"curriculum"}), (0.99, 20, 0.2, set()), (0.4, 20, 0.2, {"curriculum"}),
     (0.7, 20, 9.0, {"energy_level"})],
)  # fmt: skip
@pytest.mark.parametrize("around", [None, "lwf", "ewc"])
def test_the_log_tells_of_a_curriculum_that_went_wrong(around, auc, steps, level, bad):
    lines = [{"auc": 0.9, "steps": 1, "lse_real": 8.0}, *[{"auc": auc, "steps": steps, "lse_real": level}] * 3]
    objective = build(max_steps=40)
    if around is not None:
        objective = objectives.build({"name": around, "base": objective})
    assert {name for name, (good, _) in objective.checks(lines).items() if not good} == bad
    assert objective.checks([{"loss": 1.0}]) == {}
