"""What `evaluate` promises: exact verdicts on closed forms, and verdicts that depend on nothing but the sample."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dualhead.attacks import Attack, Query, Search, attacks
from dualhead.attacks.square import Square
from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, evaluate
from dualhead.evaluation.journal import Journal, Outcome, data_fingerprint
from dualhead.evaluation.model import Subject, outputs_of
from dualhead.heads import attach_second_head
from dualhead.noise import Streams
from dualhead.system.arithmetic import BF16, FLOAT32
from dualhead.threats import build_threat
from dualhead.threats.lp import ThreatModel
from helpers.evaluation import THREAT, StopAfter, StoppedError, assert_same, patterns, trained

ATTACKS = ["pgd-10", {"name": "pgd", "steps": 4, "restarts": 3}]
LABELS = ["pgd-10", "pgd-4(restarts=3)"]


def measure(count=60, **options):
    images, labels = patterns(count)
    settings = {"threat": THREAT, "attacks": ATTACKS, "precision": "float32", "diagnostics": False}
    return evaluate(trained(), images, labels, **{**settings, **options})


@pytest.fixture(scope="module")
def reference():
    return measure()


# ---- the budget


@pytest.mark.parametrize("eps", ["16/255", 16 / 255, np.float64(16 / 255), ["16/255"]])
@pytest.mark.parametrize("threat", [{}, {"threat": None}, {"threat": "Linf"}, {"threat": {"norm": "Linf"}}])
def test_eps_alone_is_the_budget_of_linf(eps, threat):
    images, labels = patterns(12)
    asked = {"attacks": ["fgsm"], "precision": "float32", "diagnostics": False}
    found = evaluate(trained(), images, labels, eps=eps, **threat, **asked)
    expected = evaluate(trained(), images, labels, threat=THREAT, **asked)
    assert found.results["threat"] == expected.results["threat"]
    assert found.results["curve"] == []
    assert_same(found, expected)


def test_the_largest_of_several_is_the_budget():
    images, labels = patterns(12)
    asked = {"attacks": ["fgsm"], "precision": "float32", "diagnostics": False}
    found = evaluate(trained(), images, labels, threat="L2", eps=[0, "0.5", 0.25], **asked)
    expected = evaluate(trained(), images, labels, threat="L2:0.5", eps=[0, "0.5", 0.25], **asked)
    assert found.results["threat"] == {"norm": "L2", "eps": 0.5}
    assert found.results["curve"] == expected.results["curve"]
    again = evaluate(trained(), images, labels, threat="L2", eps=np.array([0, 0.5, 0.25], np.float32), **asked)
    assert again.results["curve"] == expected.results["curve"]
    beside = evaluate(trained(), images, labels, threat="L2:0.5", eps=0.25, **asked)  # a curve of one point
    assert [point["eps"] for point in beside.results["curve"]] == [0.25]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "threat: give threat=ThreatModel\\('Linf', '8/255'\\), or eps='8/255' for Linf"),
        ({"threat": "L2"}, "threat: 'L2' has no budget; give"),
        ({"eps": "8/0"}, "not a number"),
        ({"eps": torch.tensor(0.1)}, "not a number"),
        ({"eps": 0}, "greater than 0"),
        ({"threat": "nothing", "eps": 1}, "unknown threat 'nothing'"),
    ],
)
def test_a_budget_that_is_missing_or_none_is_told_in_a_line(given, message):
    with pytest.raises(UserError, match=message):
        evaluate(trained(), *patterns(4), attacks=["fgsm"], **given)


# ---- exact verdicts


@dataclass
class Problem:
    """A linear classifier of two classes whose distance to the boundary is known."""

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    distance: torch.Tensor


def linear(norm, count=24):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 5 * 4, generator=generator)
    images = 0.5 + 0.2 * (torch.rand(count, 3, 5, 4, generator=generator) - 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    model[1].weight.data, model[1].bias.data = weight, -(weight @ torch.full((60,), 0.5))
    logits = model(images).detach()
    labels = logits.argmax(1)
    difference = weight[0] - weight[1]
    length = difference.abs().sum() if norm == "Linf" else difference.norm()
    return Problem(model, images, labels, (logits[:, 0] - logits[:, 1]).abs() / length)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_linear_model_is_robust_exactly_within_its_margin(norm):
    problem = linear(norm)
    eps = float(problem.distance.median()) * 1.0001
    result = evaluate(
        problem.model, problem.images, problem.labels, threat=ThreatModel(norm, eps), attacks=["pgd-20"], batch_size=5,
        precision="float32", diagnostics=False,
    )  # fmt: skip
    clear = (problem.distance / eps - 1).abs() > 1e-3
    assert clear.sum() >= 20
    np.testing.assert_array_equal(result.verdicts["pgd-20"].robust[clear], (problem.distance > eps)[clear])
    found = result.verdicts["pgd-20"].distance
    assert np.nanmax(found) <= eps
    fooled = ~result.verdicts["pgd-20"].robust
    assert (found[fooled] >= problem.distance.numpy()[fooled] * (1 - 1e-4)).all()
    assert (result.verdicts["pgd-20"].margin[fooled] > 0).all()


def test_examples_kept_are_inside_ball_and_box_and_fool_the_model():
    images, labels = patterns(40)
    result = measure(40, save_adversarial=True)
    for verdict in result.verdicts.values():
        rows = verdict.adversarial_rows
        assert sorted(rows) == np.flatnonzero(~np.isnan(verdict.distance)).tolist()
        example, x = torch.from_numpy(verdict.adversarial), images[rows].float() / 255
        assert example.dtype == torch.float32
        assert float(example.min()) >= 0
        assert float(example.max()) <= 1
        distance = THREAT.distance(example, x)
        assert float(distance.max()) <= THREAT.eps
        np.testing.assert_array_equal(distance.numpy(), verdict.distance[rows])
        with torch.no_grad():
            assert (trained()(example).argmax(1) != labels[rows]).all()


def test_predictions_are_the_models_own_of_what_each_attack_left():
    result = measure(40, save_adversarial=True)
    for verdict in result.verdicts.values():
        rows = verdict.adversarial_rows
        with torch.no_grad():
            taken = trained()(torch.from_numpy(verdict.adversarial)).argmax(1).numpy()
        np.testing.assert_array_equal(verdict.prediction[rows], taken)
        assert (verdict.prediction[rows] != result.labels[rows]).all()
        others = np.setdiff1d(np.arange(40), rows)
        np.testing.assert_array_equal(verdict.prediction[others], result.clean_prediction[others])


def test_scheduler_follows_the_attack_called_alone(reference):
    images, labels = patterns(60)
    attack = attacks.build(ATTACKS[1])
    streams = Streams.of(0, torch.arange(60)).fork("pgd")
    with torch.no_grad():
        examples = attack(trained(), images.float() / 255, labels, THREAT, generator=streams)
        robust = trained()(examples).argmax(1) == labels
    np.testing.assert_array_equal(reference.verdicts[LABELS[1]].robust, robust)


@dataclass(frozen=True)
class Twice(Attack):
    """A suite of one search, twice."""

    registered_name: ClassVar[str] = "twice"
    short_numbers: ClassVar[tuple[str, ...]] = ()

    def parts(self, num_classes, threat, num_heads=1):
        return [attacks.build("pgd-4").labelled(name) for name in ("one", "two")]


def test_parts_of_a_suite_draw_apart_and_as_the_suite_called_alone():
    images, labels = patterns(60)
    labels[:6] = (labels[:6] + 1) % 4
    options = {"threat": THREAT, "attacks": [Twice()], "precision": "float32", "diagnostics": False}
    result = evaluate(trained(), images, labels, **options)
    verdict, clean = result.verdicts["twice"], result.correct["clean"]
    assert (verdict.part == 1).any()  # another start finds what the first did not
    streams = Streams.of(0, torch.arange(60)).fork("twice")
    with torch.no_grad():
        examples = Twice()(trained(), images.float() / 255, labels, THREAT, generator=streams)
        robust = trained()(examples).argmax(1) == labels
    np.testing.assert_array_equal(verdict.robust, robust.numpy() & clean)
    told = [part["robust_accuracy"] for part in result.results["attacks"]["twice"]["parts"]]
    assert told == [(clean & (verdict.part != 0)).mean(), (clean & (verdict.part == -1)).mean()]
    assert told[-1] == result.robust_accuracy["twice"]


def test_the_first_job_that_succeeds_is_recorded(reference):
    images, labels = patterns(60)
    x = images.float() / 255
    search = attacks.build(ATTACKS[1])
    streams = Streams.of(0, torch.arange(60)).fork("pgd").fork(0)
    clean = trained()(x).detach()
    expected = torch.full((60,), -1)
    for job in reversed(range(3)):
        single = attacks.build({"name": "pgd", "steps": 4})
        state = search.begin(x, labels, clean, torch.full((60,), job), THREAT, streams)
        query = Query(trained())
        for _ in range(single.max_steps()):
            state = search.step(state, query, THREAT)
        expected[state["found"]] = job
    verdict = reference.verdicts[LABELS[1]]
    np.testing.assert_array_equal(verdict.job, expected)
    assert len(set(expected.tolist())) >= 3


def test_passes_of_samples_that_stay_robust_are_exact():
    result = measure(30, threat=ThreatModel("Linf", 1e-4), batch_size=16)
    assert result.robust_accuracy["worst"] == result.clean_accuracy == 1
    for name, steps in zip(LABELS, (11, 15), strict=True):
        record = result.results["attacks"][name]
        assert record["forward_passes"] == record["backward_passes"] == 30 * steps
        assert record["verification_passes"] == record["fooled"] == 0


def test_fooled_samples_leave_at_once():
    weak = measure(60, threat=ThreatModel("Linf", "64/255"), attacks=["pgd-40"])
    record = weak.results["attacks"]["pgd-40"]
    assert record["fooled"] == 60
    assert record["verification_passes"] == 60
    assert record["forward_passes"] < 60 * 10


def test_samples_that_are_wrong_already_are_not_attacked():
    images, labels = patterns(20)
    labels[:5] = (labels[:5] + 1) % 4
    result = evaluate(
        trained(),
        images,
        labels,
        threat=ThreatModel("Linf", 1e-4),
        attacks=["pgd-3"],
        precision="float32",
        diagnostics=False,
    )
    assert result.clean_accuracy == result.robust_accuracy["pgd-3"] == 0.75
    assert result.results["attacks"]["pgd-3"]["forward_passes"] == 15 * 4


# ---- invariances


@pytest.mark.parametrize("batch_size", [1, 7, 16, 24])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_verdicts_do_not_depend_on_batch_size(reference, batch_size, precision):
    expected = reference if precision == "float32" else measure(precision="bf16")
    assert_same(measure(batch_size=batch_size, precision=precision), expected)
    assert reference.results["environment"]["batch_invariant"]


def test_verdicts_do_not_depend_on_order_or_shards(reference):
    images, labels = patterns(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for share in (order, order[:13], order[13:14], order[14:]):
        result = evaluate(
            trained(), images[share], labels[share], threat=THREAT, attacks=ATTACKS, index=share, precision="float32",
            batch_size=7, diagnostics=False,
        )  # fmt: skip
        for name in LABELS:
            for column in ("robust", "distance", "job", "steps", "margin"):
                np.testing.assert_array_equal(
                    getattr(result.verdicts[name], column), getattr(reference.verdicts[name], column)[share]
                )


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_attack_is_independent_of_its_batch(norm, precision):
    suite = ["apgd-ce-8", "apgd-t-5", "fab-t-5", "square-40", "cw" if norm == "L2" else "cw-8"]
    suite = [attack if attack != "cw" else {"name": "cw", "steps": 8} for attack in suite]
    threat = ThreatModel(norm, "12/255" if norm == "Linf" else 0.6)
    options = {"attacks": suite, "threat": threat, "precision": precision}
    whole = measure(40, batch_size=64, **options)
    assert 0 < whole.robust_accuracy["worst"] < 1
    assert_same(measure(40, batch_size=7, **options), whole)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_looking_ahead_gives_the_same_verdicts(precision, monkeypatch):
    suite = {"attacks": ["apgd-ce-8", "square-60"], "precision": precision}
    alone, asked, plain = measure(60, batch_size=8, **suite), [], Square.leap

    def settle(self, precision, x, y, work):
        self.use(BF16 if precision == "bf16" else FLOAT32, x)
        self.forward_batch_size = 256
        return {"precision": precision, "chosen": "as asked for", "seconds_per_image": {}}

    monkeypatch.setattr(Square, "leap", lambda self, *args: asked.append(args[-1]) or plain(self, *args))
    monkeypatch.setattr(Subject, "settle", settle)
    assert_same(measure(60, batch_size=64, **suite), alone)
    assert max(asked) > 4


def test_looking_less_often_gives_the_same_verdicts(reference, monkeypatch):
    from dualhead.evaluation import work

    monkeypatch.setattr(work, "check_interval", lambda device: 5)
    again = measure(batch_size=16)
    for name in LABELS:
        for column in ("robust", "job", "distance", "margin"):
            np.testing.assert_array_equal(
                getattr(again.verdicts[name], column), getattr(reference.verdicts[name], column)
            )


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_turned_gradients_off(reference, off):
    with off():
        result = measure()
    assert_same(result, reference)


def test_another_seed_draws_other_starts(reference):
    other = measure(seed=1)
    assert not np.array_equal(other.verdicts[LABELS[0]].margin, reference.verdicts[LABELS[0]].margin, equal_nan=True)


def test_worst_is_right_under_all(reference):
    both = reference.verdicts[LABELS[0]].robust & reference.verdicts[LABELS[1]].robust
    assert reference.robust_accuracy["worst"] == both.mean()
    np.testing.assert_array_equal(reference.correct["worst"], both)


# ---- resume


@pytest.mark.parametrize("moments", [(1,), (17, 23), (3, 40, 9)])
def test_interrupted_anywhere_and_resumed_is_as_if_uninterrupted(reference, tmp_path, moments, monkeypatch):
    added = collections.Counter()
    plain = Journal.add

    def counted(self, part, found):
        added[part, found.sample, found.job] += 1
        plain(self, part, found)

    monkeypatch.setattr(Journal, "add", counted)
    for moment in moments:
        with pytest.raises(StoppedError):
            measure(output_dir=tmp_path, progress=StopAfter(moment), batch_size=16)
        assert not (tmp_path / "results.json").exists()
    result = measure(output_dir=tmp_path, batch_size=7)
    assert_same(result, reference)
    assert max(added.values()) == 1
    assert_same(Evaluation.load(tmp_path), reference)


@pytest.mark.parametrize("batch_sizes", [(16, 16), (24, 8), (8, 48)])
def test_tries_under_way_go_on_where_they_were(reference, tmp_path, monkeypatch, batch_sizes):
    left = [12, 11]
    plain = Journal.write_flight

    def write_then_stop(self, *args):
        plain(self, *args)
        if left:
            left[-1] -= 1
            if not left[-1]:
                left.pop()
                raise StoppedError

    monkeypatch.setattr(Journal, "write_flight", write_then_stop)
    monkeypatch.setattr(Journal, "flight_due", lambda self: self.folder is not None)
    for batch_size in batch_sizes:
        with pytest.raises(StoppedError):
            measure(output_dir=tmp_path, batch_size=batch_size)
    result = measure(output_dir=tmp_path, batch_size=48)
    assert_same(result, reference)
    if batch_sizes == (16, 16):
        one = result.results["attacks"]["pgd-10"]
        whole = reference.results["attacks"]["pgd-10"]
        assert one["forward_passes"] == whole["forward_passes"]


def test_of_several_tries_that_succeed_the_first_is_recorded(tmp_path):
    options = {"resume": True, "rank": 0, "world": 1, "examples": False}
    journal, part = Journal(tmp_path, {}, **options), ("task", 0)
    tries = ((3, 2, True), (3, 0, False), (3, 1, True), (5, 4, True), (5, 1, False), (7, 0, False), (8, 0, True))
    for sample, job, fooled in tries:
        journal.add(part, Outcome(sample, job, fooled, 1))
    journal.write()
    for each in (journal, Journal(tmp_path, {}, **options)):
        found = each.first_successes(part, [3, 5, 7])
        assert {sample: outcome.job for sample, outcome in found.items()} == {3: 1, 5: 4}


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_of_damaged_files_what_they_held_is_done_again(tmp_path, caplog, kept):
    def cut(path):
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

    options = {"resume": True, "rank": 0, "world": 1, "examples": False}
    journal, part = Journal(tmp_path, {"seed": 0}, **options), ("task", 0)
    for sample in range(2):
        journal.add(part, Outcome(sample, 0, True, 1))
        journal.write()
    journal.fact("batch", lambda: 8)
    journal.write_flight(part, {"sample": np.arange(3)})
    for path in (min(tmp_path.glob("tries-*")), *tmp_path.glob("flight-*"), tmp_path / "facts.json"):
        cut(path)
    again = Journal(tmp_path, {"seed": 0}, **options)
    assert list(again.known(part)) == [(1, 0)]
    assert again.flight(part) == []
    assert again.fact("batch", lambda: 4) == 4
    assert caplog.text.count(": damaged (") == 3
    cut(tmp_path / "identity.json")
    with pytest.raises(UserError, match=r"identity\.json: damaged"):
        Journal(tmp_path, {"seed": 0}, **options)


@pytest.mark.slow
def test_a_thousand_samples_interrupted_three_times(tmp_path):
    moments = np.random.default_rng(0).integers(1, 900, 3).tolist()
    for moment in moments:
        with pytest.raises(StoppedError):
            measure(1000, output_dir=tmp_path, progress=StopAfter(moment))
    assert_same(measure(1000, output_dir=tmp_path), measure(1000))


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch, reference):
    before = measure(output_dir=tmp_path, save_adversarial=True)
    asked = []
    monkeypatch.setattr(Search, "parts", lambda self, *args: asked.append(self) or (self,))
    again = measure(output_dir=tmp_path, save_adversarial=True)
    assert asked
    assert_same(again, before)
    for name, record in before.results["attacks"].items():
        assert again.results["attacks"][name]["forward_passes"] == record["forward_passes"]
        np.testing.assert_array_equal(again.verdicts[name].adversarial, before.verdicts[name].adversarial)


def test_an_attack_can_be_added_later(tmp_path, reference):
    measure(output_dir=tmp_path, attacks=ATTACKS[:1])
    progress = StopAfter()
    assert_same(measure(output_dir=tmp_path, progress=progress), reference)
    assert {told[0] for told in progress.told} == {LABELS[1]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed"),
        ({"threat": ThreatModel("L2", 0.5)}, "norm"),
        ({"save_adversarial": True}, "adversarial examples"),
        ({"count": 59}, "data"),
    ],
)
def test_results_of_another_evaluation_are_refused(tmp_path, change, named):
    measure(20, output_dir=tmp_path, attacks=["pgd-2"])
    ways_out = r"choose another folder \(--output, output_dir\), or begin anew \(--overwrite, resume=False\)"
    with pytest.raises(UserError, match=f"differs in {named}; {ways_out}"):
        measure(**{"count": 20, "output_dir": tmp_path, "attacks": ["pgd-2"], **change})
    changed = measure(**{"count": 20, "output_dir": tmp_path, "attacks": ["pgd-2"], "resume": False, **change})
    assert_same(Evaluation.load(tmp_path), changed)


def test_the_fingerprint_of_data_tells_images_labels_and_names():
    images, labels, index = torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6) % 2, torch.arange(6)
    data = [
        (images, labels, index), (images + 1, labels, index), (images, 1 - labels, index), (images, labels, index + 1),
        (images.float(), labels, index),
    ]  # fmt: skip
    assert len({data_fingerprint(*each) for each in data}) == len(data)


def test_other_weights_are_noticed(tmp_path):
    images, labels = patterns(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    options = {"threat": THREAT, "attacks": ["pgd-2"], "output_dir": tmp_path}
    evaluate(model, images, labels, **options)
    model[1].bias.data[0] += 1e-3
    with pytest.raises(UserError, match="differs in weights"):
        evaluate(model, images, labels, **options)


class Normalised(nn.Module):
    """The trained network on images less a mean that no state dict holds."""

    def __init__(self, mean):
        super().__init__()
        self.network, self.mean = trained(), mean

    def forward(self, x):
        return self.network(x - self.mean)


def test_a_model_that_answers_otherwise_with_the_same_weights_is_noticed(tmp_path):
    images, labels = patterns(10)
    options = {
        "threat": THREAT,
        "attacks": ["pgd-2"],
        "output_dir": tmp_path,
        "diagnostics": False,
        "precision": "float32",
    }
    evaluate(Normalised(0.1), images, labels, **options)
    with pytest.raises(
        UserError, match=r"gave other logits for the same images with the same weights; choose another folder"
    ):
        evaluate(Normalised(0.0), images, labels, **options)
    anew = evaluate(Normalised(0.0), images, labels, **options, resume=False)
    assert_same(anew, evaluate(trained(), images, labels, **{**options, "output_dir": None}))
    assert_same(anew, evaluate(Normalised(0.0), images, labels, **options))


def test_an_evaluation_of_a_random_model_can_go_on(tmp_path):
    class Random(nn.Module):
        def forward(self, x):
            return trained()(x) + torch.randn(len(x), 4)

    images, labels = patterns(10)
    options = {"threat": THREAT, "attacks": ["pgd-2"], "output_dir": tmp_path, "diagnostics": False}
    first = evaluate(Random(), images, labels, **options)
    again = evaluate(Random(), images, labels, **{**options, "attacks": ["pgd-2", "fgsm"]})
    assert set(again.verdicts) == {"pgd-2", "fgsm"}
    assert first.verdicts.keys() == {"pgd-2"}


# ---- verification


@dataclass(frozen=True)
class Liar(Search):
    """Claims at every step that the clean image is adversarial, and from its fifth step on offers a true example."""

    registered_name: ClassVar[str] = "liar"
    short_numbers: ClassVar[tuple[str, ...]] = ()

    def max_steps(self):
        return 9

    def begin(self, x, y, clean, job, threat, streams):
        zero = torch.zeros_like(y)
        return {"x": x, "y": y, "adversarial": x.clone(), "found": zero.bool(), "iteration": zero.clone()}

    def step(self, state, query, threat):
        x, late = state["x"], state["iteration"] >= 4
        _, _, gradient = query.gradient(x, lambda z: torch.nn.functional.cross_entropy(z, state["y"], reduction="none"))
        real = threat.project(threat.ascend(x, gradient, threat.eps), x)
        return {
            **state,
            "adversarial": torch.where(late.reshape(-1, 1, 1, 1), real, x),
            "found": torch.ones_like(late),
            "iteration": state["iteration"] + 1,
        }


def test_only_what_the_float32_model_confirms_counts():
    result = measure(attacks=[Liar()], threat=ThreatModel("Linf", "24/255"))
    verdict = result.verdicts["liar"]
    fooled = ~verdict.robust
    assert 0.5 < fooled.mean() <= 1
    assert set(verdict.steps[fooled]) == {5}
    one_step = measure(attacks=["fgsm"], threat=ThreatModel("Linf", "24/255"))
    np.testing.assert_array_equal(verdict.robust, one_step.verdicts["fgsm"].robust)


@dataclass(frozen=True)
class Late(Liar):
    """Claims nothing but the true example, which comes one step after its last."""

    registered_name: ClassVar[str] = "late"

    def max_steps(self):
        return 4

    def step(self, state, query, threat):
        return {**super().step(state, query, threat), "found": state["iteration"] >= 4}


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_steps_beyond_the_last_find_nothing(monkeypatch, interval):
    from dualhead.evaluation import work

    monkeypatch.setattr(work, "check_interval", lambda device: interval)
    result = measure(attacks=[Late()], threat=ThreatModel("Linf", "24/255"))
    assert result.robust_accuracy["late"] == result.clean_accuracy


class LiesInLowPrecision(nn.Module):
    """Gives wrong answers only where autocast is on."""

    def forward(self, x):
        logits = trained()(x)
        return logits.roll(1, 1) if torch.is_autocast_enabled(x.device.type) else logits


def test_a_lying_low_precision_search_fools_nobody():
    images, labels = patterns(20)
    result = evaluate(
        LiesInLowPrecision(), images, labels, threat=ThreatModel("Linf", 1e-4), attacks=["pgd-3"], precision="bf16"
    )
    record = result.results["attacks"]["pgd-3"]
    assert result.robust_accuracy["pgd-3"] == result.clean_accuracy
    assert record["verification_passes"] == 20 * 4


class SureInLowPrecision(nn.Module):
    """Sure of class 0 where autocast is on: a search there has a slope to climb and never an example."""

    def forward(self, x):
        logits = trained()(x)
        sure = torch.tensor([60.0, 0.0, 0.0, 0.0])
        return logits + sure if torch.is_autocast_enabled(x.device.type) else logits


def test_the_last_example_of_a_low_precision_search_is_asked_about_too():
    images, labels = patterns(80)
    images, labels = images[labels == 0], labels[labels == 0]
    options = {"threat": THREAT, "attacks": [{"name": "pgd", "steps": 10, "loss": "margin"}], "diagnostics": False}
    low, full = (
        evaluate(SureInLowPrecision(), images, labels, precision=precision, **options).robust_accuracy["worst"]
        for precision in ("bf16", "float32")
    )
    assert full < 0.8
    assert low <= full + 0.1


def test_the_attack_on_heads_sees_the_aggregate_as_precisely_as_others_do():
    model = attach_second_head(trained(), "3", example=torch.rand(2, 3, 8, 8)).eval()
    x = torch.rand(8, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, merged = outputs_of(model, None)(x), model(x)
    assert merged.dtype == torch.float32
    assert torch.equal(outputs[:, -1], merged)


def test_low_precision_finds_what_float32_finds(reference):
    low = measure(precision="bf16")
    assert low.results["environment"]["precision"] == "bf16"
    for name in LABELS:
        assert abs(low.robust_accuracy[name] - reference.robust_accuracy[name]) <= 0.05


class Rooted(nn.Module):
    """A linear classifier of the roots of the images, whose slope at black is infinite."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(48, 3)
        with torch.no_grad():
            self.last.weight.copy_(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) * 0.5)

    def forward(self, x):
        return self.last(x.sqrt().flatten(1))


@pytest.mark.parametrize("name", ["pgd-10", "apgd-ce-10", "apgd-t-10", "fab-10", "fab-t-10", "cw-10"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_infinite_slopes_neither_invent_examples_nor_blind_the_attack(norm, name):
    images = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images[images < 0.1] = 0.0
    model = Rooted()
    labels = model(images).argmax(1)
    robust = {}
    for eps in (1e-5, 0.5):
        threat = ThreatModel(norm, eps)
        result = evaluate(
            model, images, labels, threat=threat, attacks=[name], save_adversarial=True, diagnostics=False
        )
        verdict = result.verdicts[name]
        examples, clean = torch.from_numpy(verdict.adversarial), images[verdict.adversarial_rows]
        assert (threat.distance(examples, clean) <= eps).all()
        assert (model(examples).argmax(1) != labels[verdict.adversarial_rows]).all()
        robust[eps] = result.robust_accuracy[name]
    assert robust[1e-5] > 0.9
    assert robust[0.5] < 0.6


def brighter(model, x, y):
    return x + 0.05


@pytest.mark.parametrize("attack", ["pgd-5", "apgd-ce-5", "fab-t-5", "cw-5", "square-20", brighter])
def test_where_the_model_has_no_answer_it_is_fooled_whatever_the_class(attack):
    class Overflows(nn.Module):
        """Right and without any slope that helps, but for pixels brighter than half, of which it makes NaN."""

        def forward(self, x):
            dark = x[:, 0, 0, 0] < 0.3
            logits = torch.stack((dark, ~dark, dark & ~dark), 1).float() + x.mean((1, 2, 3))[:, None]
            return torch.where((x[:, :, 1:, 1:].amax((1, 2, 3)) > 0.5)[:, None], torch.nan, logits)

    images = torch.full((20, 3, 4, 4), 0.49)
    images[:10, 0, 0, 0], images[10:, 0, 0, 0] = 0.1, 0.45
    labels = torch.arange(2).repeat_interleave(10)
    result = evaluate(
        Overflows(), images, labels, threat=ThreatModel("Linf", 0.05), attacks=[attack], diagnostics=False
    )
    assert result.clean_accuracy == 1
    ((name, verdict),) = result.verdicts.items()
    robust = verdict.robust
    assert robust[:10].mean() == robust[10:].mean()
    if name in ("square-20", "brighter"):
        assert not robust.any()


@pytest.mark.parametrize("text", ["L1:2", "L0:3", "patch:2"])
def test_a_function_attacks_under_every_threat_whose_points_are_images(text):
    def white(model, x, y):
        return torch.ones_like(x)

    images, labels = patterns(8)
    result = evaluate(
        trained(), images, labels, threat=text, attacks=[white], return_adversarial=True, diagnostics=False
    )
    threat, x = build_threat(text), images.float() / 255
    distance = threat.distance(result.adversarial("white"), x)
    assert (distance <= threat.eps).all()
    assert (distance > 0).tolist() == (result.correct["clean"] & ~result.verdicts["white"].robust).tolist()


def test_not_a_number_is_not_correct():
    class Overflows(nn.Module):
        def forward(self, x):
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.4, torch.nan, 0.0) + torch.tensor([1.0, 0.0])

    images = torch.full((4, 1, 2, 2), 0.2)
    images[2:] = 0.6
    result = evaluate(
        Overflows(), images, torch.zeros(4, dtype=torch.long), threat=ThreatModel("Linf", 0.01), attacks=["pgd-2"]
    )
    assert result.clean_accuracy == 0.5
    statuses = {finding["name"]: finding["status"] for finding in result.results["diagnostics"]}
    assert statuses["finite_logits"] == "failed"


# ---- any model


class Output(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, None)],
    ids=["attribute", "dict", "tuple"],
)
def test_outputs_that_carry_logits(reference, wrap):
    images, labels = patterns(60)
    result = evaluate(
        Output(trained(), wrap), images, labels, threat=THREAT, attacks=ATTACKS, precision="float32", diagnostics=False
    )
    assert_same(result, reference)


class Flattens(nn.Module):
    """Reads images as they lie in memory, which fails where channels come last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 4)

    def forward(self, x):
        return self.linear(x.view(x.shape[0], -1))


class Uncopied(nn.Module):
    def forward(self, x):
        return trained()(x)

    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("model", "layout"), [(Flattens, "contiguous_format"), (Uncopied, "contiguous_format"), (trained, "channels_last")]
)
def test_models_that_cannot_be_laid_out_anew_are_asked_as_they_are(model, layout, precision):
    images, labels = patterns(20)
    result = evaluate(model(), images, labels, threat=THREAT, attacks=["pgd-3"], precision=precision, diagnostics=False)
    assert result.results["environment"]["layout"] == layout
    assert result.results["environment"]["precision"] == precision


def test_two_classes_grey_and_not_square():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 7, 2))
    images = torch.randint(0, 256, (10, 1, 5, 9), dtype=torch.uint8)
    labels = model(images / 255).argmax(1)
    result = evaluate(
        model, images.numpy(), labels.tolist(), threat=ThreatModel("Linf", 0.3), attacks=["pgd-5", "fgsm"]
    )
    assert result.clean_accuracy == 1
    assert result.robust_accuracy["worst"] <= min(result.robust_accuracy["pgd-5"], result.robust_accuracy["fgsm"])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_floating_images_are_as_good_as_bytes(reference, kind):
    images, labels = patterns(60)
    floating = images.to(torch.float32).div(255).to(kind)
    result = evaluate(
        trained(), floating, labels, threat=THREAT, attacks=ATTACKS, precision="float32", diagnostics=False
    )
    for name in LABELS:
        np.testing.assert_array_equal(result.verdicts[name].robust, reference.verdicts[name].robust)


def test_the_model_is_left_as_it_was():
    images, labels = patterns(10)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4)
    ).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    strides = [p.stride() for p in model.parameters()]
    asked = []
    model[4].register_forward_hook(
        lambda module, given, out: asked.append((module.training, module.weight.requires_grad))
    )
    evaluate(model, images, labels, threat=THREAT, attacks=["pgd-2"], precision="bf16")
    with pytest.raises(StoppedError):
        evaluate(
            model, images, model.eval()(images / 255).argmax(1), threat=THREAT, attacks=["pgd-2"], progress=StopAfter(1)
        )
    model.train()
    model[1].eval()
    evaluate(model, images, labels, threat=THREAT, attacks=["pgd-2"], precision="auto")
    assert set(asked[:-1]) <= {(False, False), (False, True)}
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert strides == [p.stride() for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---- eps, progress, errors


def test_robust_accuracy_over_eps():
    result = measure(attacks=["pgd-10"], eps=[0, "8/255", "24/255", 16 / 255])
    curve = result.results["curve"]
    assert [entry["eps"] for entry in curve] == [0, 8 / 255, 16 / 255, 24 / 255]
    robust = [entry["robust_accuracy"]["worst"] for entry in curve]
    assert robust[0] == result.clean_accuracy
    assert robust[2] == result.robust_accuracy["worst"]
    assert robust == sorted(robust, reverse=True)
    assert robust[0] > robust[1] > robust[3]
    for entry in curve:
        assert entry["intervals"]["worst"][0] <= entry["robust_accuracy"]["worst"] <= entry["intervals"]["worst"][1]


def test_progress_falls_to_the_robust_accuracy(reference):
    progress = StopAfter()
    measure(progress=progress)
    for name in LABELS:
        told = [entry[1:] for entry in progress.told if entry[0] == name]
        assert told[-1][0] == told[-1][1]
        assert told[-1][2] == reference.robust_accuracy[name]
        assert all(a[0] <= b[0] and a[2] >= b[2] for a, b in pairwise(told))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 8)}, r"\[N, C, H, W\]"),
        ({"images": torch.zeros(0, 3, 8, 8), "labels": torch.zeros(0, dtype=torch.long)}, "no images"),
        ({"images": torch.full((4, 3, 8, 8), 3.0)}, r"\[0, 1\].*divide by 255"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, r"\[0, 1\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "one per image"),
        ({"labels": torch.full((4,), 0.5)}, "integers"),
        ({"labels": torch.full((4,), 4)}, "0 to 3"),
        ({"labels": torch.full((4,), -1)}, "0 to 3"),
        ({"attacks": ["pgd-4", {"name": "pgd", "steps": 4}]}, "twice"),
        ({"attacks": ["pgq"]}, r"attacks\.0.*pgd"),
        ({"attacks": None}, r"attacks\.0: names no attack"),
        ({"attacks": ""}, r"attacks\.0"),
        ({"attacks": [5]}, r"attacks\.0: must be an attack, its name or fields, or a function that attacks; got 5"),
        ({"attacks": Square}, r"attacks\.0: .*; got the class Square; give Square\(...\)"),
        (
            {"labels": ["ant", "bee", "cat", "dog"]},
            r"labels: must be integers.*order of the model's logits; got \['ant'",
        ),
        ({"images": [torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)]}, "images: must be .* of one shape, got list"),
        ({"images": DataLoader(TensorDataset(*patterns(4)))}, "images: DataLoader beside labels; .* leave labels out"),
        ({"images": TensorDataset(*patterns(4))}, "images: TensorDataset beside labels; .* leave labels out"),
        ({"images": "photos"}, "images: "),
        ({"model": "runs/g"}, r"model: must be a torch.nn.Module, got str; dualhead.load\('runs/g'\) gives"),
        ({"model": trained}, r"model: .* got .*; the order is evaluate\(model, images, labels\)"),
        ({"model": None}, "model: must be a torch.nn.Module, got NoneType"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()}, r"are torch.float64, .* give model.float"),
        ({"model": nn.Linear}, r"model: must be a torch.nn.Module, got type; that is a class; give Linear\(...\)"),
        ({"transfer_from": "runs/base"}, r"transfer_from: .*; dualhead.load\('runs/base'\) gives"),
        ({"device": "gpu"}, "device 'gpu' is not usable here; write auto, cpu, cuda"),
        ({"progress": True}, r"progress: must have update\(.*\), got True; leave it out"),
        (
            {"images": torch.zeros(4, 1, 8, 8)},
            r"Sequential: the model fails on one image of shape \(1, 8, 8\): Runtime",
        ),
        (
            {"images": torch.zeros(4, 3, 9, 9)},
            r"Sequential: the model fails on one image of shape \(3, 9, 9\): Runtime",
        ),
        ({"index": [0, 1, 1, 2]}, "once"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 64.0}, "batch_size must be a whole number, got 64.0"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"class_names": ["a", "b"]}, "2 class names"),
        ({"eps": [0, "8/255", 8]}, "exceeds 1"),
        ({"eps": [-1]}, "greater than 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    images, labels = patterns(4)
    given = {"model": trained(), "images": images, "labels": labels, "threat": THREAT, "attacks": ["pgd-2"], **change}
    with pytest.raises(UserError, match=message) as caught:
        evaluate(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_told_in_one_line():
    with pytest.raises(UserError, match="device 'cuda' is not usable here"):
        measure(4, device="cuda")


@pytest.mark.parametrize(
    "change",
    [
        {"attacks": "pgd-2"},
        {"attacks": "pgd-2,"},
        {"attacks": attacks.build("pgd-2")},
        {"attacks": {"name": "pgd", "steps": 2}},
        {"images": list},
        {"images": lambda images: list(images.numpy())},
        {"labels": lambda labels: tuple(labels.tolist())},
        {"device": "cpu"},
        {"device": torch.device("cpu")},
    ],
)
def test_arguments_as_newcomers_write_them_mean_the_same(change):
    images, labels = patterns(12)
    given = {"images": images, "labels": labels, "attacks": ["pgd-2"]}
    asked = {key: value(given[key]) if key in ("images", "labels") else value for key, value in change.items()}
    options = {"threat": THREAT, "precision": "float32", "diagnostics": False}
    assert_same(evaluate(trained(), **{**given, **asked}, **options), evaluate(trained(), **given, **options))


def test_text_may_name_several_attacks_with_commas_in_brackets():
    found = measure(4, attacks="pgd-2(restarts=2,loss=margin), fgsm")
    assert list(found.verdicts) == ["pgd-2(loss=margin,restarts=2)", "fgsm"]


def test_an_error_that_is_not_of_the_images_is_raised_as_it_is():
    class Limited(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise MemoryError("too many")
            return trained()(x)

    images, labels = patterns(20)
    with pytest.raises(MemoryError, match="too many"):
        evaluate(Limited(), images, labels, threat=THREAT, attacks=["fgsm"])


@pytest.mark.slow
def test_the_standard_suite_costs_what_it_should_on_robust_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    images = torch.rand(9, 3, 2, 2)
    labels = model(images).argmax(1)
    threat = ThreatModel("Linf", 1e-6)
    result = evaluate(
        model, images, labels, threat=threat, attacks=["autoattack"], precision="float32", diagnostics=False
    )
    assert result.robust_accuracy["autoattack"] == 1
    passes = {  # besides those that looked ahead in vain, few here
        part["name"]: (part["forward_passes"] - part["vain_passes"], part["backward_passes"])
        for part in result.results["attacks"]["autoattack"]["parts"]
    }
    at_most = {"apgd-ce": (103, 101), "apgd-t": (920, 909), "fab-t": (1829, 900), "square": (5004, 0)}
    for name, (forward, backward) in at_most.items():
        assert 0.97 * 9 * forward <= passes[name][0] <= 9 * forward, name
        assert passes[name][1] == 9 * backward, name
    vain = [part["vain_passes"] for part in result.results["attacks"]["autoattack"]["parts"]]
    assert vain[:3] == [0, 0, 0]
    assert 0 < vain[3] < 0.1 * 9 * 5004
    assert [part["fooled"] for part in result.results["attacks"]["autoattack"]["parts"]] == [0, 0, 0, 0]
