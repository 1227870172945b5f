"""Other balls, other attacks, and settings that one stage may have for itself."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml

from dualhead.attacks import attacks
from dualhead.data import augmentations
from dualhead.errors import UserError
from dualhead.runs import stages
from dualhead.runs.prepare import prepare
from dualhead.runs.run import train
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.flops import CountFlops
from dualhead.threats.flow import Flow
from dualhead.threats.lp import ThreatModel
from dualhead.training import Passes, StageRun
from dualhead.training.step import TrainingStep
from helpers.resume import recipe
from helpers.training import attacked, batch, plain_model, stage_of, streams_of


def test_l2_training_attacks_within_the_ball_and_lowers_the_loss():
    model, data, threat = plain_model(), batch(0, 16), ThreatModel("L2", 128 / 255)
    stage = stage_of({"name": "trades", "beta": 6}, ("model",), start="gaussian", lr=0.02)
    program = Passes.of(model, stage)
    step = TrainingStep(program, stage, threat, stage.optimiser.create(program.parameters()), FLOAT32)
    x_adv = attacked(step, data)
    distance = threat.distance(x_adv, data.x)
    assert float(distance.max()) <= threat.eps + 1e-6
    assert float(distance.min()) > 0.1 * threat.eps
    losses = [float(step(data, streams_of(data)).terms["loss"].detach()) for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["stages.main_head.attack.step_size=0.01"], ["stages.0.attack: steps=2 of 0.01 reach 0.02, and eps is 0.15"]),
        (["stages.main_head.attack.step_size=0.01", "stages.main_head.eps=0.02"], []),
        (["stages.main_head.attack.step_size=0.01", "stages.main_head.objective=natural"], []),
        (["validation.attack.step_size=0.1"], ["validation.attack: steps=1 of 0.1 reach 0.1, and eps is 0.15"]),
        (
            ["stages.main_head.attack={name: fgsm, step_size: 0.1, start: uniform}"],
            ["stages.0.attack: steps=1 of 0.1 reach 0.1"],
        ),
        (["stages.*.attack.step_size=null", "validation.attack.step_size=null", "threat.norm=L2", "threat.eps=2"], []),
        (["stages.main_head.awp={}"], ["stage main_head: awp.start is 10, and the stage has 2 epochs"]),
        (["stages.main_head.awp={start: 1}"], []),
        (["stages.main_head.average={name: swa, start: 2}"], ["stage main_head: average.start is 2, and the"]),
        (["stages.main_head.schedule={name: cosine, warmup: 2}"], ["stage main_head: schedule.warmup is 2, and the"]),
    ],
)  # fmt: skip
def test_settings_that_come_to_nothing_are_told(tmp_path, caplog, overrides, told):
    settled = ["stages.*.attack.step_size=0.1", "validation.attack.step_size=0.2"]
    with caplog.at_level("WARNING"):
        prepare(recipe(*settled, *overrides), tmp_path / "run")
    found = [record.getMessage() for record in caplog.records]
    assert [words for words in found if "reach" in words or "the stage has" in words] == [
        next((words for words in found if words.startswith(start)), start) for start in told
    ]


@pytest.mark.parametrize("attack", ["fgsm", {"name": "pgd", "start": "clean"}])
@pytest.mark.parametrize(
    ("objective", "flat"),
    [
        ("trades", True), ("ikl", True), ("reverse_smoothing", True), ({"name": "avg", "base": "trades"}, True),
        ({"name": "joint", "head1": "trades", "head2": "ikl"}, True),
        ({"name": "joint", "head1": "trades", "head2": "sat", "attack": "sum"}, False), ("sat", False), ("mart", False),
    ],
)  # fmt: skip
def test_an_attack_that_begins_where_its_loss_has_no_slope_is_refused(objective, flat, attack):
    """From there images with a gradient of 0 would be trained on as attacked, and as they are."""
    parts = ("model",) if objective in ("trades", "ikl", "sat", "mart") else ("trunk", "head1", "head2")
    stage = stage_of(objective, parts, attack=attacks.build(attack))
    if flat:
        with pytest.raises(UserError, match=r"begins at the images themselves, .* write start: gaussian or uniform"):
            stage.against(ThreatModel("Linf", 0.1))
    else:
        stage.against(ThreatModel("Linf", 0.1))
    random = stage.model_copy(update={"attack": attacks.build({"name": "pgd", "start": "gaussian"})})
    random.against(ThreatModel("Linf", 0.1))


def test_a_step_of_fast_adversarial_training_costs_five_forward_passes():
    """One for the attack and one back to the image, one for the loss and two back."""
    model, data = plain_model(), batch(0, 4)
    fgsm = attacks.build({"name": "fgsm", "step_size": "10/255", "start": "uniform"})
    stage = stage_of("sat", ("model",), attack=fgsm)
    program = Passes.of(model, stage)
    threat = ThreatModel("Linf", 8 / 255)
    step = TrainingStep(program, stage, threat, stage.optimiser.create(program.parameters()), FLOAT32)
    start = threat.ball_point(data.x, streams_of(data)).requires_grad_()
    with CountFlops() as counted:
        step(data, streams_of(data))
    with CountFlops() as forward, torch.no_grad():
        model(data.x)
    assert 4 < counted.total / forward.total <= 5
    fresh = plain_model().eval()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(fresh(start), data.y), start)
    expected = threat.project(start.detach() + 10 / 255 * gradient.sign(), data.x)
    same = TrainingStep(Passes.of(fresh, stage), stage, threat, stage.optimiser.create(fresh.parameters()), FLOAT32)
    found = attacked(same, data)
    assert float((found - expected).abs().gt(1e-6).float().mean()) < 1e-3


def test_a_stage_may_have_its_own_radius_and_augmentation(monkeypatch, tmp_path):
    seen = []

    class Watched(StageRun):
        def __init__(self, stage, program, loader, **settings):
            seen.append((stage.name, settings["threat"].eps, settings["validator"].threat.eps, loader._augment))
            super().__init__(stage, program, loader, **settings)

    monkeypatch.setattr(stages, "StageRun", Watched)
    changes = ["stages.second_head.eps=0.05", "stages.second_head.augment=[]", "stages.*.epochs=0"]
    own = recipe(*changes, "evaluate.limit=8", "evaluate.attacks=[pgd-1]", "evaluate.gallery=0")
    train(own, run_dir=tmp_path / "run")
    shifts = (augmentations.build({"name": "pad_crop", "padding": 1}),)
    assert seen == [
        ("main_head", 0.15, 0.15, shifts), ("second_head", 0.05, 0.15, ()), ("aggregator", 0.15, 0.15, shifts),
    ]  # fmt: skip


FLOW = ("threat={name: flow, eps: 0.1}",)


def test_a_stage_may_have_its_own_threat(monkeypatch, tmp_path):
    seen = []

    class Watched(StageRun):
        def __init__(self, stage, program, loader, **settings):
            seen.append((settings["threat"], settings["validator"].threat))
            super().__init__(stage, program, loader, **settings)

    monkeypatch.setattr(stages, "StageRun", Watched)
    changes = ["stages.main_head.threat={norm: L2, eps: 0.5}", "stages.second_head.threat={name: flow, eps: 0.1}"]
    own = recipe(*changes, "stages.*.epochs=0", "evaluate.limit=8", "evaluate.attacks=[pgd-1]", "evaluate.gallery=0")
    train(own, run_dir=tmp_path / "run")
    linf = ThreatModel("Linf", 0.15)
    assert seen == [(ThreatModel("L2", 0.5), linf), (Flow(0.1), linf), (linf, linf)]
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [stage["threat"] for stage in kept["stages"]] == [
        {"norm": "L2", "eps": 0.5}, {"name": "flow", "eps": 0.1}, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["stages.0.threat={norm: L2, eps: 0.5}", "stages.0.eps=0.1"], "stages.0: eps and threat both"),
        (["stages.0.threat={name: flow, eps: 0.5}", "stages.0.free={}"], "stages.0: free carries a change of pixels"),
        ([*FLOW, "stages.aggregator.free={}"], "stages.aggregator: free carries a change of pixels, and threat flow"),
        (["stages.0.threat={name: flow, eps: 0}"], "stages.0.threat: eps must be greater than 0"),
        (["stages.0.threat={norm: L3, eps: 1}"], "stages.0.threat: norm 'L3' is not known"),
        ([*FLOW, "evaluate.attacks=[pgd-1, square]"], "evaluate.attacks.1: attack square is defined for Linf"),
        ([*FLOW, "validation.attack=cw"], "validation.attack: attack cw is defined for Linf, L2, not for"),
    ],
)  # fmt: skip
def test_threats_that_do_not_fit_a_stage_are_refused_before_anything_runs(changes, told):
    with pytest.raises(UserError) as refused:
        recipe(*changes)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("threat", [Flow(0.2), ThreatModel("L2", 0.5)])
def test_a_step_trains_on_what_the_threat_makes_of_the_images(threat):
    """One step against the loop of Madry et al. 2018 in the threat's own space, written down."""
    model, data = plain_model(), batch(0, 8)
    fresh = copy.deepcopy(model)
    stage = stage_of("sat", ("model",), lr=0.1)
    passes = Passes.of(model, stage)
    step = TrainingStep(passes, stage, threat, stage.optimiser.create(passes.parameters()), FLOAT32)
    step(data, streams_of(data))

    fresh.eval()
    threat = threat.for_images(data.x.shape[1:])
    origin = threat.lift(data.x)
    point = threat.start(origin, streams_of(data), "ball")
    for _ in range(10):
        point = point.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(fresh(threat.render(point)), data.y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = threat.project(threat.ascend(point.detach(), gradient, 2 / 255), origin)
    fresh.train()
    optimiser = stage.optimiser.create(fresh.parameters())
    torch.nn.functional.cross_entropy(fresh(threat.render(point.detach())), data.y).backward()
    optimiser.step()
    for (name, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


OWN_THREATS = "stages.main_head.objective={name: any_of, among: [Linf:0.1, L2:0.5]}"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eps=0.05", ["stage main_head: eps changes nothing, since objective any_of names the threats"]),
        ("threat=L2:0.7", ["stage main_head: threat changes nothing, since objective any_of names the threats"]),
        ("threat=L2:0.5", []),
    ],
)
def test_a_radius_that_the_objective_does_not_look_at_is_told(tmp_path, caplog, override, told):
    with caplog.at_level("WARNING"):
        prepare(recipe(OWN_THREATS, f"stages.main_head.{override}"), tmp_path / "run")
    found = [words for words in (record.getMessage() for record in caplog.records) if "changes nothing" in words]
    assert [words.split(" that it")[0] for words in found] == told


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("{name: lwf, base: {name: any_of, choose: worst}}", ["lwf"]),
        ("{name: logit_pairing, base: avg}", ["logit_pairing"]),
        ("{name: lwf, base: {name: any_of, choose: adaptive}}", []),
        ("{name: any_of, choose: worst}", []),
        ("lwf", []),
    ],
)
def test_a_method_that_looks_at_one_of_several_threats_is_told(tmp_path, caplog, objective, told):
    with caplog.at_level("WARNING"):
        prepare(recipe(f"stages.main_head.objective={objective}"), tmp_path / "run")
    found = [record.getMessage() for record in caplog.records if "at once, and what" in record.getMessage()]
    assert [words.split("and what ")[1].split(" adds")[0] for words in found] == told


SMALL = ("data.image_size=[4, 4]", "stages.*.augment=[]", "data.augment=[]")
"""The last block of the network has one pixel then."""


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ((*SMALL, "stages.*.batch_size=1"), "head1.block3"),
        ((*SMALL, "stages.*.batch_size=33", "stages.*.micro_batch=32"), "head1.block3"),
        (("stages.*.batch_size=1", "stages.main_head.objective={name: align, predictor: true}"), "align0"),
        ((*SMALL, "stages.*.batch_size=2"), None),
        ((*SMALL, "stages.*.batch_size=1", "stages.*.batch_norm=frozen"), None),
        (("stages.*.batch_size=1",), None),
    ],
)
def test_one_image_at_once_is_refused_where_batch_norm_would_see_one_value(tmp_path, changes, layer):
    if layer is None:
        prepare(recipe(*changes), tmp_path / "run")
        return
    with pytest.raises(UserError, match=f"stages.0.batch_size: one image at once leaves the batch norm {layer}"):
        prepare(recipe(*changes), tmp_path / "run")
