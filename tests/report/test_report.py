"""The report: it says what the files say, copes with what they lack, and no string of theirs becomes markup."""

import base64
import csv
import io
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image

from dualhead.commands.cli import app
from dualhead.commands.runs import list_of
from dualhead.errors import UserError
from dualhead.evaluation.gallery import Gallery
from dualhead.evaluation.results import Evaluation, Verdicts, accuracies, per_class
from dualhead.names import id_of
from dualhead.report import write_report
from dualhead.report.calibration import calibration_of, reliability_diagrams
from dualhead.report.comparison import as_csv, as_records, cost_table, difference_table, trade_offs, verdict
from dualhead.report.differences import difference
from dualhead.report.figures import SERIES, pareto
from dualhead.report.gallery import change, picture, spread
from dualhead.report.sources import Estimate, read_sources, role_of
from dualhead.report.summary import summary
from dualhead.report.svg import Drawing, ticks
from dualhead.report.text import component_text, eps_text, eps_texts, large, squeezed
from dualhead.statistics import mcnemar

ROLE_CLASSES = (["head1"], ["head2"], ["aggregate"])
ROWS = ("base model", "head 1", "head 2", "mean of heads", "aggregate of heads")
HOSTILE = ["<script>alert(1)</script>", "\N{OWL} & \"quoted\" 'x'", "n" * 200, "</title><img src=x onerror=alert(2)>"]


# ---- folders as training and evaluation leave them


def evaluation(folder, seed, *, classes=4, names=None, count=60, eps=0.1, images=False, attacks=("pgd-40",), **more):
    """An evaluation with random outcomes, written by the code that writes them in earnest."""
    names = names or [f"class {number}" for number in range(classes)]
    random, labels = np.random.default_rng(seed), np.arange(count) % classes
    clean = np.where(random.random(count) < 0.9, labels, (labels + 1) % classes)
    verdicts = {}
    for attack in attacks:
        robust = (clean == labels) & (random.random(count) < 0.6)
        fooled = (clean == labels) & ~robust
        unknown = np.full(count, -1)
        verdicts[attack] = Verdicts(
            robust, np.where(fooled, eps, np.nan), unknown, unknown, np.where(fooled, 3, -1),
            np.where(fooled, 0.5, np.nan), np.where(fooled, (labels + 1) % classes, clean),
        )  # fmt: skip
    held = Evaluation(np.arange(count), labels, clean, verdicts, {})
    held.results = {
        "num_samples": count,
        "threat": {"norm": "Linf", "eps": eps},
        **accuracies(held.correct),
        "attacks": {
            a: {"seconds": 1.5, "forward_passes": 7, "backward_passes": 6, "fooled": 5, "needs_heads": a == "multihead"}
            for a in attacks
        },
        "curve": [],
        "per_class": per_class(held.correct, labels, names),
        "diagnostics": [{"name": "randomness", "status": "ok", "message": "the same logits"}],
        "environment": {"device": "cpu"},
        "command": "dualhead train toy",
        **more,
    }
    held.save(folder)
    if images:
        gallery(folder, classes)
    return held


def gallery(folder, names=4, *, count=12, side=8, eps=(0.05, 0.1), outputs=("head 1", "head 2", "aggregate"),
            landscapes=2, smooth=False):  # fmt: skip
    """Images under attack with random outcomes, written by the code that writes them in earnest."""
    random, o, s, classes = np.random.default_rng(count), len(outputs), len(eps), names
    original = random.integers(0, 256, (count, 3, side, side), np.uint8)
    if smooth:  # as compressible as photographs
        wave = np.linspace(0, 3, side)
        base = 128 + 80 * np.sin(wave[:, None] * random.random((count, 3, 1, 1)) * 3 + wave)
        original = (base + random.normal(0, 5, base.shape)).clip(0, 255).astype(np.uint8)
    reach = np.array([round(255 * e) for e in eps]).reshape(1, -1, 1, 1, 1, 1)
    noise = random.integers(-reach, reach + 1, (o, s, *original.shape))
    margins = random.normal(0, 1, (o, s, count, o)).astype(np.float32)
    label = np.arange(count) % classes
    wrong = (label + 1) % classes
    share = random.random((o, s, count, o, 2)).astype(np.float32)
    clean = np.abs(margins[0, 0])
    Gallery(
        outputs=np.array(outputs), attack=np.array("pgd-20"), norm=np.array("Linf"), eps=np.array(eps),
        index=np.arange(count), label=label, original=original,
        adversarial=(original + noise).clip(0, 255).astype(np.uint8),
        clean_prediction=np.repeat(label[:, None], o, 1), clean_probability=share[0, 0], clean_margin=clean,
        prediction=np.where(margins > 0, label[:, None], wrong[:, None]), probability=share, margin=margins,
        landscape_rows=np.arange(landscapes),
        landscape=random.normal(0, 1, (landscapes, o, 25, 25)).astype(np.float32),
    ).save(folder / "gallery.npz")  # fmt: skip


def pixels(uri):
    """Levels [H, W, 3] of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def metrics(stage, epochs, robust=lambda epoch: 0.1 + 0.05 * epoch):
    return [
        {"stage": stage, "epoch": e, "step": 5 * e, "learning_rate": 0.1, "loss": 2.0 / e, "divergence": 0.1,
         "train_accuracy": 0.5, "validation_clean": 0.9, "validation_robust": robust(e), "seconds": 2.0 * e}
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def make_run(folder, *, stages=("main_head", "aggregator"), finished=2, lines=None, evaluated=True, seed=0, **more):
    folder.mkdir(parents=True)
    recipe = {
        "name": "toy", "data": {"source": "digits", "validation": 200},
        "threat": {"norm": "Linf", "eps": 0.1},
        "stages": [{"name": s, "train": ["head1"], "objective": {"name": "trades", "beta": 6.0}, "epochs": 6}
                   for s in stages],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "torch": "2"}))
    lines = [line for stage in stages for line in metrics(stage, 6)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in stages[:finished]:
        place = folder / "checkpoints" / stage
        place.mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps({"epochs": 6, "seconds": 12.0, "flops": 1e9, "kept": "best"}))
    if not evaluated:
        return folder
    rows = []
    for number, name in enumerate(ROWS):
        last = number == len(ROWS) - 1
        place = folder / "evaluation" if last else folder / "evaluation" / "rows" / name.replace(" ", "_")
        held = evaluation(place, seed + number, **{**more, "images": last and more.get("images", False)})
        rows.append({
            "name": name, "clean_accuracy": held.clean_accuracy, "robust_accuracy": held.robust_accuracy,
            "intervals": held.intervals, "parameters": 1000 + number,
            "training_cost": {"forward_equivalents": 5e6, "seconds": 60.0 + number},
        })  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps({"rows": rows}))
    return folder


# ---- reading the page


class Page(HTMLParser):
    """Tags with their attributes, and the text that is read."""

    def __init__(self, path):
        super().__init__()
        self.source = Path(path).read_text(encoding="utf-8")
        self.tags, self.words, self._inside = [], [], []
        self.feed(self.source.replace("<wbr>", ""))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while tag in self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside[-1:]):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def report(*runs, at):
    return Page(write_report(runs, at / "report.html"))


def light_of(page):
    """The verdict's colour."""
    found = next(section["class"] for section in page.all("section") if section.get("aria-label") == "Verdict")
    return found.removeprefix("verdict ")


# ---- what it says


def test_verdict_names_accuracy_interval_and_difference(tmp_path):
    run = make_run(tmp_path / "run", count=400)
    page = report(run, at=tmp_path)
    stored = json.loads((run / "evaluation" / "results.json").read_text())
    low, high = stored["intervals"]["worst"]
    robust = stored["robust_accuracy"]["worst"]
    expected = (
        f"Under pgd-40 (Linf eps 0.1), aggregate of heads still gets {100 * robust:.1f} % of 400 test images right"
    )
    assert f"{expected} (95 % interval {100 * low:.1f} to {100 * high:.1f})" in page.text
    assert f"and {100 * stored['clean_accuracy']:.1f} % without attack" in page.text
    assert "its base model (interval" in page.text
    assert "Measured later" not in page.text
    assert "AutoAttack" in page.text  # pgd alone is an upper bound


@pytest.mark.parametrize(("attack", "bound"), [("pgd-40", True), ("autoattack-fast", True), ("autoattack", False)])
def test_only_the_standard_suites_need_no_word_of_stronger_attacks(tmp_path, attack, bound):
    said = verdict(read_sources([make_run(tmp_path / "run", count=40, attacks=(attack,))])).caveats
    assert any("upper bound" in caveat for caveat in said) == bound


@pytest.mark.parametrize(("second", "bound"), [("autoattack", False), ("pgd-40", True)])
def test_a_standard_suite_under_each_of_several_threats_needs_no_word_of_stronger_attacks(tmp_path, second, bound):
    union = {"union": [{"norm": "Linf", "eps": 0.1}, {"norm": "L2", "eps": 1.0}]}
    evaluation(tmp_path / "u", 0, attacks=("autoattack@Linf", f"{second}@L2"), threat=union)
    caveats = verdict(read_sources([tmp_path / "u"])).caveats
    assert any("upper bound" in caveat for caveat in caveats) == bound


def test_an_evaluation_without_attacks_is_not_called_unmeasured(tmp_path):
    check = {"name": "value_range", "status": "warning", "message": "said"}
    evaluation(tmp_path / "c", 0, attacks=(), diagnostics=[check])
    found = verdict(read_sources([tmp_path / "c"]))
    assert found.sentence.startswith("No attack has been run on test images. Without one, c gets ")
    assert (found.caveats, found.light) == (["Take care: said."], "warning")
    write_report([tmp_path / "c"], tmp_path / "page.html")
    assert "cannot be read" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_most_robust_is_named_though_another_is_more_accurate(tmp_path):
    sources = read_sources([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=9)])
    for source, clean, robust in zip(sources, (0.9, 0.8), (0.3, 0.4), strict=True):
        worst = Estimate(robust, robust - 0.1, robust + 0.1)
        told = {"clean": Estimate(clean, clean, clean), "robust": {"pgd-40": worst, "worst": worst}}
        source.rows[-1] = replace(source.rows[-1], **told)
    assert f"{sources[1].deployed.title} still gets 40.0 %" in verdict(sources).sentence


def test_a_summary_says_what_the_files_say(tmp_path):
    lines = metrics("main_head", 6, robust=lambda epoch: 0.5 if epoch == 3 else 0.4)
    run = make_run(tmp_path / "run", stages=("main_head",), finished=1, lines=lines, attacks=("pgd-40", "cw"))
    facts = summary(run)
    (stage,) = facts["stages"]
    assert (stage["state"], stage["epoch"], stage["epochs"]) == ("finished", 6, 6)
    assert stage["last"] == {"clean": 0.9, "robust": 0.4}
    assert stage["best"] == {"epoch": 3, "clean": 0.9, "robust": 0.5}
    stored = json.loads((run / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in facts["rows"]] == list(ROWS)
    for row, told in zip(stored, facts["rows"], strict=True):
        assert told["clean_accuracy"] == row["clean_accuracy"]
        assert told["robust_accuracy"] == row["robust_accuracy"]
        assert {name: list(ends) for name, ends in told["intervals"].items()} == row["intervals"]


def test_a_later_and_harder_evaluation_is_named_beside_the_verdict(tmp_path):
    run = make_run(tmp_path / "run", count=400)
    before = dict(np.load(run / "evaluation" / "samples.npz"))
    place = run / "evaluations" / "harder"
    evaluation(place, 4, count=400, attacks=("autoattack-fast",))  # the seed of the final output: its clean predictions
    after = dict(np.load(place / "samples.npz"))
    after["robust_autoattack-fast"] = before["robust_pgd-40"] & (np.arange(400) % 3 > 0)
    np.savez(place / "samples.npz", **after)
    robust, fell = int(before["robust_pgd-40"].sum()), int((before["robust_pgd-40"] & (np.arange(400) % 3 == 0)).sum())
    text = report(run, at=tmp_path).text
    assert f"autoattack-fast fooled {fell} of the {robust} images that count as robust here" in text
    assert f"Of the 400 images that all attacks met, {(robust - fell) / 4:.1f} % withstand all" in text
    results = json.loads((place / "results.json").read_text())
    for subject, told in (({"output": None}, True), ({"output": "aggregate"}, True), ({"output": "head1"}, False),
                          ({"output": None, "stage": "main_head"}, False)):  # fmt: skip
        (place / "results.json").write_text(json.dumps({**results, "subject": subject}))
        assert ("Measured later" in report(run, at=tmp_path).text) == told
    evaluated = run / "evaluation" / "results.json"
    evaluated.write_text(json.dumps({**json.loads(evaluated.read_text()), "images": {"shape": [1], "sha256": "x"}}))
    for sha256 in "xy":  # on other data, of the same labels and predictions, it says nothing of these images
        later = {**results, "images": {"shape": [1], "sha256": sha256}}
        (place / "results.json").write_text(json.dumps(later))
        assert ("Measured later" in report(run, at=tmp_path).text) == (sha256 == "x")
    (place / "results.json").write_text(json.dumps(results))
    after["clean_prediction"] = (after["clean_prediction"] + 1) % 4  # another model, of which this says nothing
    np.savez(place / "samples.npz", **after)
    assert "Measured later" not in report(run, at=tmp_path).text


def test_several_later_evaluations_make_one_number(tmp_path):
    run = make_run(tmp_path / "run", count=400)
    before = dict(np.load(run / "evaluation" / "samples.npz"))
    for third, (name, count) in enumerate({"autoattack": 400, "multihead-20": 200}.items()):
        place = run / "evaluations" / name
        evaluation(place, 4, count=count, attacks=(name,))
        after = dict(np.load(place / "samples.npz"))
        for key in ("index", "label", "clean_prediction"):
            after[key] = before[key][:count]
        after[f"robust_{name}"] = before["robust_pgd-40"][:count] & (np.arange(count) % 3 != third)
        np.savez(place / "samples.npz", **after)
    both = before["robust_pgd-40"][:200]
    left = (both & (np.arange(200) % 3 == 2)).sum()
    text = report(run, at=tmp_path).text
    assert f"autoattack, multihead-20 fooled {both.sum() - left} of the {both.sum()} images that" in text
    assert f"Of the 200 images that all attacks met, {left / 2:.1f} % withstand all; trust that number" in text
    assert text.count("Measured later") == 1
    assert "Robust accuracy is an upper bound" not in text


def test_costs_stand_in_one_unit(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("narrow", "wide")]
    for run, forward in zip(runs, (1e3, 4e3), strict=True):
        comparison = json.loads((run / "comparison.json").read_text())
        for row in comparison["rows"]:
            row["training_cost"]["flops"] = 5e6 * forward
        (run / "comparison.json").write_text(json.dumps(comparison))
    rows = [row for source in read_sources(runs) for row in source.rows]
    told = cost_table(rows).rows
    assert [cells[3].order for cells in told] == [5e6] * len(ROWS) + [2e7] * len(ROWS)
    assert [cells[2].text for cells in told] == ["1.00 x"] * len(ROWS) + ["4.00 x"] * len(ROWS)


def test_probabilities_that_are_none_leave_the_page_whole(tmp_path):
    run = make_run(tmp_path / "run", images=True)
    stored = dict(np.load(run / "evaluation" / "gallery.npz"))
    for key in ("probability", "clean_probability"):
        stored[key] = np.full_like(stored[key], np.nan)
    np.savez(run / "evaluation" / "gallery.npz", **stored)
    page = report(run, at=tmp_path)
    assert "NaN" not in page.source
    assert "nan %" not in page.text


def test_a_failed_diagnostic_comes_before_everything(tmp_path):
    doubt = [{"name": "zero_gradient", "status": "failed", "message": "gradients are masked"}]
    page = report(make_run(tmp_path / "run", diagnostics=doubt), at=tmp_path)
    assert "This result cannot be believed: gradients are masked" in page.text
    assert light_of(page) == "failed"
    assert "This result cannot be believed" not in report(make_run(tmp_path / "fine"), at=tmp_path).text


def coin(gained, lost):
    """Chance that a fair coin falls as unevenly as this, or more so, to either side."""
    tosses, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(tosses, heads) for heads in range(fewer + 1)) / 2**tosses)


FINE = {"name": "randomness", "status": "ok", "message": "the same logits"}


@pytest.mark.parametrize(
    ("checks", "light"),
    [
        ([FINE], "ok"),
        ([], "none"),
        ([FINE, {"name": "labels", "status": "warning", "message": "few"}], "warning"),
        ([{"name": "labels", "status": "warning", "message": "few"}, {**FINE, "status": "failed"}], "failed"),
    ],
)
def test_the_verdict_has_the_colour_of_its_worst_check(tmp_path, checks, light):
    assert light_of(report(make_run(tmp_path / "run", diagnostics=checks), at=tmp_path)) == light


def test_a_model_that_guesses_under_attack_is_never_green(tmp_path):
    evaluation(tmp_path / "found", 0, classes=2, diagnostics=[FINE])  # about half of two classes
    page = report(tmp_path / "found", at=tmp_path)
    assert light_of(page) == "failed" and "no more often than a guess" in page.text


def test_a_later_attack_that_finds_more_takes_the_green_away(tmp_path):
    run = make_run(tmp_path / "run", count=400)
    held = evaluation(run / "evaluations" / "harder", 0, count=400, attacks=("pgd-100",))
    deployed = dict(np.load(run / "evaluation" / "samples.npz"))
    held.verdicts["pgd-100"].robust[:] = deployed["robust_pgd-40"] & (np.arange(400) % 20 > 0)
    held.clean_prediction[:] = deployed["clean_prediction"]
    held.save(run / "evaluations" / "harder")
    assert light_of(report(run, at=tmp_path)) == "warning"


@pytest.mark.parametrize("statuses", [("ok", "failed"), ("failed", "ok")])
def test_a_check_that_was_made_twice_counts_once_and_at_its_worst(tmp_path, statuses):
    checks = [{"name": "randomness", "status": status, "message": f"it is {status}"} for status in statuses]
    evaluation(tmp_path / "one", 3, diagnostics=checks)
    page = report(tmp_path / "one", at=tmp_path)
    assert "0 of 1 fine" in page.text and "1 check " in page.text and "it is failed" in page.text


def test_checks_stand_between_the_verdict_and_the_numbers(tmp_path):
    page = report(make_run(tmp_path / "run"), at=tmp_path)
    assert [tag.get("id") for tag in page.all("section")][1:3] == ["diagnostics", "accuracy"]


def test_a_model_of_two_names_has_one_row(tmp_path):
    run = make_run(tmp_path / "run")
    rows = run / "evaluation" / "rows"
    stored = dict(np.load(rows / "base_model" / "samples.npz"))
    stored["margin_pgd-40"] = stored["margin_pgd-40"] * (1 + 1e-6)  # computed beside the other head
    np.savez(rows / "head_1" / "samples.npz", **stored)
    compared = json.loads((run / "comparison.json").read_text())
    compared["rows"][1]["parameters"] = compared["rows"][0]["parameters"]
    (run / "comparison.json").write_text(json.dumps(compared))
    heads = re.findall(r"<th scope=row>([^<]*)</th>", report(run, at=tmp_path).source)
    assert "base model = head 1" in heads and not {"base model", "head 1"} & set(heads) and "head 2" in heads


def test_one_point_far_off_leaves_room_for_the_others(tmp_path):
    (source,) = read_sources([make_run(tmp_path / "run")])
    near = [replace(row, clean=Estimate(0.9 + n / 100, 0.89, 0.95)) for n, row in enumerate(source.rows)]
    far = replace(near[0], title="far", clean=Estimate(0.9, 0.89, 0.95), robust={"pgd-40": Estimate(0.0, 0.0, 0.01)})
    (alone,), (beside,) = (trade_offs([replace(source, rows=rows)]) for rows in (near, [*near, far]))
    places = [re.findall(r'<circle cx="[^"]*" cy="([^"]*)" r="2.5"', figure.svg) for figure in (alone, beside)]
    assert places[0] == places[1][: len(near)] and "beyond the axes" in beside.caption
    assert "beyond the axes" not in alone.caption


def test_differences_are_those_of_the_paired_test(tmp_path):
    source = read_sources([make_run(tmp_path / "run", count=300)])[0]
    first, second = source.rows[0], source.rows[4]
    for what in ("clean", "pgd-40", "worst"):
        a, b = first.correct(what), second.correct(what)
        gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
        found = difference(second, first, what)
        assert found.difference == pytest.approx(b.mean() - a.mean())
        assert found.p_value == pytest.approx(coin(gained, lost))
        assert found.interval[0] < found.difference < found.interval[1]
        assert found == mcnemar(a, b)


def test_differences_do_not_depend_on_the_order_of_samples(tmp_path):
    source = read_sources([make_run(tmp_path / "run", count=50)])[0]
    first, second = source.rows[0], source.rows[1]
    before = difference(first, second, "worst")
    shuffle = np.random.default_rng(0).permutation(50)
    for name, array in list(second.samples.items()):
        second.samples[name] = array[shuffle]
    assert difference(first, second, "worst") == before


def test_results_of_a_few_runs_are_compared_each_with_each_at_the_most_equal_cost_first(tmp_path):
    runs = [make_run(tmp_path / name, seed=10 * number) for number, name in enumerate("abc")]
    for run, flops in zip(runs, (5e7, 1e9, 1.1e9), strict=True):
        comparison = json.loads((run / "comparison.json").read_text())
        comparison["rows"][-1]["training_cost"]["flops"] = flops
        (run / "comparison.json").write_text(json.dumps(comparison))
    table = difference_table(read_sources(runs))
    called = {name: f"{name}: aggregate of heads" for name in "abc"}
    expected = [("c", "b", "1.10 x"), ("b", "a", "20.00 x"), ("c", "a", "22.00 x")]
    told = [(row[0].text, row[1].text, row[-1].text) for row in table.rows[:3]]
    assert told == [(called[first], called[second], cost) for first, second, cost in expected]
    assert table.rows[3][1].text == "a: base model" and table.rows[3][-1].text == "n/a"
    assert table.columns[-1] == "training cost"


def test_each_of_many_runs_is_compared_with_the_first(tmp_path):
    runs = [make_run(tmp_path / name, seed=10 * number) for number, name in enumerate("abcde")]
    rows = difference_table(read_sources(runs)).rows
    assert [row[1].text for row in rows[:4]] == ["a: aggregate of heads"] * 4


def test_calibration_is_told_and_drawn(tmp_path):
    bins = [{"confidence": 0.5, "accuracy": 0.75, "images": 20}, {"confidence": 0.9, "accuracy": 0.8, "images": 40}]
    found = {"error": (0.25 * 20 + 0.1 * 40) / 60, "bins": bins}
    evaluation(tmp_path / "one", 3, calibration=found)
    page = report(tmp_path / "one", at=tmp_path)
    assert {"href": "#calibration"} in page.all("a")
    assert "Calibration" in page.text and "error 15.0 points" in page.text
    (row,) = read_sources([tmp_path / "one"])[0].rows
    told = calibration_of(row)
    assert told.error == pytest.approx(0.15) and told.confidence == pytest.approx((10 + 36) / 60)
    (figure,) = reliability_diagrams([row])
    assert figure.svg.count("<circle") == 2 and "40 images: confidence 90.0, accuracy 80.0" in figure.svg


@pytest.mark.parametrize(
    "found",
    [None, 3, {}, {"error": "x", "bins": []}, {"error": 0.1, "bins": []}, {"error": 0.1, "bins": [{"confidence": 2}]},
     {"error": 0.1, "bins": [{"confidence": 0.5, "accuracy": 0.5, "images": 0}]}, {"error": math.nan, "bins": [{}]}],
)  # fmt: skip
def test_results_without_a_sound_calibration_say_nothing_of_it(tmp_path, found):
    evaluation(tmp_path / "one", 3, calibration=found)
    assert "Calibration" not in report(tmp_path / "one", at=tmp_path).text


def test_names_break_after_underscores_and_numbers_do_not(tmp_path):
    page = report(make_run(tmp_path / "guided_distillation"), make_run(tmp_path / "b"), at=tmp_path)
    assert "guided_<wbr>distillation: head 1" in page.source
    assert not re.search(r"\d\.<wbr>|\d/<wbr>", page.source.partition("<main")[2])


def test_components_within_components_are_written_like_others():
    joint = {"name": "joint", "head1": {"name": "trades", "beta": 6.0, "clean": ""}, "head2": None}
    assert component_text(joint) == "joint (head1 trades (beta 6))"


def test_other_samples_threats_or_attacks_are_not_compared(tmp_path):
    base = make_run(tmp_path / "a", count=40)
    others = [
        make_run(tmp_path / "b", count=44),
        make_run(tmp_path / "c", count=40, eps=0.2),
        make_run(tmp_path / "d", count=40, attacks=("pgd-40", "cw")),
    ]
    first, *rest = (source.deployed for source in read_sources([base, *others]))
    assert all(difference(first, other, "clean") is None for other in rest)
    page = report(base, *others, at=tmp_path)
    assert "different threat models or attacks" in page.text


def test_samples_of_the_same_names_that_are_other_images_are_not_compared(tmp_path):
    def told(name, seed, sha256, shape=(3, 8, 8)):
        held = evaluation(tmp_path / name, seed)
        held.results |= {"images": {"shape": list(shape), "sha256": sha256}} if sha256 else {}
        held.save(tmp_path / name)
        return tmp_path / name

    folders = [told("a", 1, "x"), told("b", 2, "x"), told("other", 3, "y"), told("old", 4, None)]
    folders.append(told("larger", 5, "z", (3, 16, 16)))
    first, same, other, old, larger = (source.deployed for source in read_sources(folders))
    assert difference(first, other, "clean") is None
    assert all(difference(first, each, "clean") is not None for each in (same, old, larger))
    assert "not measured on the same samples" in report(*folders[:3], at=tmp_path).text
    assert "not measured on the same samples" not in report(*folders[:2], at=tmp_path).text


def test_what_only_merged_heads_can_face_keeps_nobody_from_being_compared(tmp_path):
    merged, single = make_run(tmp_path / "merged", count=400), make_run(tmp_path / "single", count=400, seed=9)
    evaluation(merged / "evaluation", 4, count=400, attacks=("pgd-40", "multihead"))
    sources = read_sources([single, merged])
    first, second = (source.deployed for source in sources)
    assert second.attacks == ["pgd-40", "multihead"]
    for what in ("clean", "worst"):
        expected = mcnemar(first.correct(what), second.correct(what))
        assert difference(second, first, what).difference == pytest.approx(expected.difference)
    assert [figure for figure in trade_offs(sources) if "multihead (merged heads alone)" in figure.title]
    best = max((first, second), key=lambda row: row.worst.value)
    assert best.title + " still gets" in verdict(sources).sentence
    page = report(single, merged, at=tmp_path)
    assert "different threat models or attacks" not in page.text


@pytest.mark.parametrize(("drop", "overfits"), [(0.0, False), (0.09, False), (0.11, True), (0.3, True)])
def test_robust_overfitting_is_told_from_chance(tmp_path, drop, overfits):
    # Of 200 images half are right: 1.96 sqrt(2 / 4 / 200) = 0.098 may lie between two epochs.
    lines = metrics("main_head", 6, robust=lambda epoch: 0.5 if epoch == 3 else 0.5 - drop)
    page = report(make_run(tmp_path / "run", lines=lines, evaluated=False), at=tmp_path)
    assert ("explain by chance: robust overfitting" in page.text) == overfits
    assert "Best epoch 3: robust 50.0 %" in page.text or drop == 0


@pytest.mark.parametrize("pgd", [0.02, 0.5])
def test_catastrophic_overfitting_is_told_and_drawn(tmp_path, pgd):
    lines = [{**line, "watched_fgsm": 0.6, "watched_pgd": pgd} for line in metrics("main_head", 6)]
    text = report(make_run(tmp_path / "run", lines=lines, evaluated=False), at=tmp_path).text
    told = "Catastrophic overfitting, last in epoch 6: of a few images 60.0 % stay right under one step of FGSM, 2.0 %"
    assert (told in text) == (pgd == 0.02)
    assert "a few images, PGD-5" in text


@pytest.mark.parametrize(
    ("validation", "images", "overfits"), [(0.1, 2000, True), (0.1, 100, False), (0.1, None, False)]
)
def test_robust_overfitting_is_told_of_held_out_images_that_are_a_fraction(tmp_path, validation, images, overfits):
    lines = metrics("main_head", 6, robust=lambda epoch: 0.5 if epoch == 3 else 0.38)
    run = make_run(tmp_path / "run", lines=lines, evaluated=False)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["data"]["validation"] = validation
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    told = {} if images is None else {"data": {"images": images}}
    (run / "checkpoints" / "config.json").write_text(json.dumps({"class_names": ["a", "b"], **told}))
    page = report(run, at=tmp_path)
    assert ("explain by chance: robust overfitting" in page.text) == overfits
    assert "The last is 12.0 points less robust than the best" in page.text


def test_a_stage_that_fits_names_neither_attack_nor_optimiser_and_every_choice(tmp_path):
    lines = [{"stage": "main_head", "epoch": 1, "shift": 0.0, "alpha": 0.9, "validation_clean": 0.9,
              "validation_robust": 0.5}]  # fmt: skip
    run = make_run(tmp_path / "run", stages=("main_head",), finished=1, lines=lines, evaluated=False)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["stages"][0] |= {
        "fit": {"max_loss": 0.01}, "train": ["aggregator"], "objective": {"name": "natural"}, "epochs": 0,
        "attack": {"name": "pgd", "steps": 10}, "optimiser": {"name": "sgd", "lr": 0.1},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    text = report(run, at=tmp_path).text
    assert "trains nothing: fits the aggregator" in text
    assert "pgd (steps" not in text
    assert "Chosen on the held-out images: shift 0, alpha 0.9." in text


def test_a_stage_without_attacks_names_none(tmp_path):
    run = make_run(tmp_path / "run", stages=("main_head",), finished=1, evaluated=False)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    attack = {"attack": {"name": "pgd", "steps": 10, "loss": "ce"}}
    for objective, named in ((recipe["stages"][0]["objective"], True), ({"name": "natural"}, False)):
        recipe["stages"][0] |= {**attack, "objective": objective}
        (run / "config.yaml").write_text(yaml.safe_dump(recipe))
        text = report(run, at=tmp_path).text
        assert ("attack pgd (steps 10)" in text) == named
        assert "attack pgd (steps 10, loss ce)" not in text


def test_downloads_hold_every_number(tmp_path):
    run = make_run(tmp_path / "run", attacks=("pgd-40", "cw"))
    rows = read_sources([run])[0].rows
    page = report(run, at=tmp_path)
    links = {link["download"]: link["href"] for link in page.all("a") if "download" in link}
    content = {name: base64.b64decode(uri.partition("base64,")[2]).decode() for name, uri in links.items()}
    records = json.loads(content["results.json"])
    assert [record["model"] for record in records] == list(ROWS)
    table = list(csv.DictReader(io.StringIO(content["results.csv"])))
    for row, record, line in zip(rows, records, table, strict=True):
        for name, value in {"clean": row.clean, **row.robust}.items():
            ends = [value.value, value.low, value.high]
            keys = [name, f"{name} low", f"{name} high"]
            assert [record[key] for key in keys] == ends
            assert [float(line[key]) for key in keys] == ends


def test_csv_keeps_columns_that_only_some_rows_have(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", attacks=("cw",))]
    records = as_records([row for source in read_sources(runs) for row in source.rows])
    first = next(csv.DictReader(io.StringIO(as_csv(records))))
    assert first["cw"] == ""
    assert float(first["pgd-40"]) == records[0]["pgd-40"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_holds_what_nothing_beats(values):
    front = pareto(values)
    for number, (x, y) in enumerate(values):
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in values)
        assert (number in front) != beaten
    assert [values[n] for n in front] == sorted(values[n] for n in front)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_lie_evenly_within_their_reach(low, span, count):
    found = ticks(low, low + span, count)
    assert len(found) <= count + 1
    slack = 1e-6 * span + 4 * math.ulp(abs(low) + span)  # as near as floats of that size come
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    steps = np.diff(found)
    assert len(steps) == 0 or np.allclose(steps, steps[0])


def test_eps_is_written_in_steps_of_a_255th_for_all_or_none():
    assert eps_texts([0, 2 / 255, 8 / 255], "Linf") == ["0", "2/255", "8/255"]
    assert eps_texts([0, 0.1, 0.2], "Linf") == ["0", "0.1", "0.2"]  # 0.2 alone would be 51/255
    assert eps_texts([0.2, 0.6, 1.0], "L2") == ["0.2", "0.6", "1"]
    assert [eps_text(eps, "Linf") for eps in (1e-9, 1.0, 2.0, 254 / 255)] == ["1e-09", "1", "2", "254/255"]


@pytest.mark.parametrize("norm", ["L2", "L1", "flow", None])
def test_eps_of_no_single_pixel_is_told_as_it_is(norm):
    """0.6 is 153/255 as well, and nobody says so of a distance over all pixels."""
    assert eps_text(0.6, norm) == "0.6"
    assert eps_text(8 / 255, norm) == "0.0313725"


def test_names_that_are_cut_keep_the_ends_that_tell_them_apart():
    names = [f"digits_guided_distillation: head {number}" for number in (1, 2)]
    cut = [squeezed(name, 33) for name in names]
    assert [len(name) for name in cut] == [33, 33] and cut[0] != cut[1]
    assert squeezed("short", 33) == "short"


def test_counts_are_rounded_before_their_unit_is_chosen():
    assert [large(number) for number in (999_499, 999_600, 999_600_000, 1.5e12)] == ["999,499", "1 M", "1 G", "1.5 T"]


def test_further_evaluations_say_under_what_they_were_made(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation(run / "evaluations" / "harder", 4, count=40, eps=0.3)
    write_report([run], tmp_path / "report.html")
    section = (tmp_path / "report.html").read_text().partition("Further evaluations</h")[2].partition("</section>")[0]
    assert "Linf eps 0.3, 40 test images" in section


def test_a_gallery_for_which_there_is_no_room_is_left_out_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("dualhead.report.gallery.MOST_BYTES", 100)
    run = make_run(tmp_path / "run", images=True)
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "its gallery is left out, since the page is full" in text
    assert "0 of 0 shown" not in text
    assert "Images under attack" not in text


# ---- what it survives


def test_every_string_stays_text(tmp_path):
    run = make_run(tmp_path / "x <b>&", names=HOSTILE, images=True)
    (run / "checkpoints" / "config.json").write_text(json.dumps({"class_names": HOSTILE}))
    results = json.loads((run / "evaluation" / "results.json").read_text())
    evil = "</script><script>alert(3)</script>"
    results["diagnostics"] = [{"name": evil, "status": evil, "message": evil}]
    results["command"], results["environment"] = evil, {evil: evil}
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    lines = [{**line, "<img src=x onerror=alert(4)>": 1.0} for line in metrics("main_head", 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run, at=tmp_path)
    assert [tag.get("type") for tag in page.all("script")] == ["application/json", None]
    assert not [tag for tag in page.all("img") if not tag["src"].startswith("data:image/webp")]
    assert not [value for _, tag in page.tags for key, value in tag.items() if key.startswith("on")]
    for name in HOSTILE:
        assert name in page.text.replace("\n", " ") or " ".join(name.split()) in page.text
        assert str(escape(name)) in page.source or name.isalnum()
    assert evil in page.text


def test_nothing_is_loaded_and_no_other_script_may_run(tmp_path):
    page = report(make_run(tmp_path / "run", images=True), at=tmp_path)
    for tag, attributes in page.tags:
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:")), f"<{tag} {key}={value[:60]}>"
    assert not re.search(r"@import|url\(", page.source)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]+';", policy)


def test_the_page_can_be_read_without_seeing_it(tmp_path):
    page = report(make_run(tmp_path / "run", images=True), at=tmp_path)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"].strip() for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"].strip() for svg in page.all("svg"))
    assert all(
        d.get("tabindex") == "0" and d.get("aria-label") for d in page.all("div") if "scroll" in d.get("class", "")
    )
    named = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(named) == len(set(named))
    assert {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")} <= set(named)


@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(tmp_path, classes):
    run = tmp_path / "run"
    evaluation(run, 1, classes=classes, count=2 * classes)
    samples = dict(np.load(run / "samples.npz"))
    samples["prediction_pgd-40"] = (samples["label"] + ~samples["robust_pgd-40"]) % classes
    np.savez(run / "samples.npz", **samples)
    page = report(run, at=tmp_path)
    assert len(page.source) < 2_000_000
    assert f"class {classes - 1}" in page.text
    if classes > 24:
        assert "The 24 least robust of 1,000 classes" in page.text
        assert "taken for, under pgd-40" in page.text
    else:
        wrong = int((~samples["robust_pgd-40"] & (samples["label"] == 0)).sum())
        assert f"class 0 taken for class 1: {wrong} of {int((samples['label'] == 0).sum())}" in page.text


def test_confusion_that_is_not_stored_is_explained(tmp_path):
    evaluation(tmp_path / "one", 1)
    samples = dict(np.load(tmp_path / "one" / "samples.npz"))
    del samples["prediction_pgd-40"]
    np.savez(tmp_path / "one" / "samples.npz", **samples)
    assert "Confusion under attack is not shown" in report(tmp_path / "one", at=tmp_path).text


def test_a_run_without_evaluation_says_so(tmp_path):
    page = report(make_run(tmp_path / "run", evaluated=False), at=tmp_path)
    assert "Nothing has been measured on test images yet" in page.text
    assert "40.0 % robust and 90.0 % clean accuracy on held-out training images" in page.text


def test_an_interrupted_run_says_where_it_stands(tmp_path):
    lines = [*metrics("main_head", 6), *metrics("aggregator", 2)]
    page = report(make_run(tmp_path / "run", finished=1, lines=lines, evaluated=False), at=tmp_path)
    assert "1 of 2 stages are done, and stage aggregator has finished 2 of 6 epochs" in page.text
    just_begun = make_run(tmp_path / "begun", finished=0, lines=[], evaluated=False)
    assert "no epoch has been finished" in report(just_begun, at=tmp_path).text


def test_an_interrupted_evaluation_shows_the_rows_that_are_done(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "comparison.json").unlink()
    (run / "evaluation" / "results.json").unlink()
    page = report(run, at=tmp_path)
    assert "stopped before the final output was measured" in page.text
    names = re.findall(r"<th scope=row>([^<]*)</th>", page.source)
    assert "mean of heads" in names and "aggregate of heads" not in names


def test_a_list_of_runs_takes_no_other_output_for_the_deployed_one(tmp_path):
    run = make_run(tmp_path / "run")
    accuracies = [(row["deployed"], row["clean_accuracy"]) for row in summary(run)["rows"]]
    assert [deployed for deployed, _ in accuracies] == [False] * (len(ROWS) - 1) + [True]
    assert list_of(tmp_path)[0]["clean_accuracy"] == accuracies[-1][1]
    (run / "comparison.json").unlink()
    (run / "evaluation" / "results.json").unlink()
    (told,) = list_of(tmp_path)
    assert (told["state"], told["clean_accuracy"], told["robust_accuracy"]) == ("evaluating", None, None)


def test_metrics_that_are_no_numbers_leave_a_gap_and_a_note(tmp_path):
    lines = metrics("main_head", 6)
    lines[2]["loss"], lines[3]["validation_robust"], lines[4]["loss"] = math.nan, math.nan, math.inf
    page = report(make_run(tmp_path / "run", stages=["main_head"], lines=lines), at=tmp_path)
    assert "main_head epoch 3 (loss)" in page.text
    assert "nan" not in "".join(str(tag.get("d")) for tag in page.all("path"))
    losses = [tag for tag in page.all("path") if tag["class"] == "curve series1"]
    assert len(losses) >= 2  # cut in pieces around the gaps
    blind = [{**line, "validation_robust": math.nan} for line in metrics("main_head", 4)]
    run = make_run(tmp_path / "blind", stages=["main_head"], lines=blind)
    assert "No accuracy on held-out images is a number" in report(run, at=tmp_path).text
    every = [{**line, "loss": math.nan} for line in metrics("main_head", 4)]
    assert (
        "loss has no finite value"
        in report(make_run(tmp_path / "all", stages=["main_head"], lines=every), at=tmp_path).source
    )


@pytest.mark.parametrize("file", ["comparison.json", "evaluation/results.json", "evaluation/samples.npz",
                                  "metrics.jsonl", "config.yaml", "environment.json",
                                  "checkpoints/main_head/summary.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"rows": 3, "intervals": null}'])
def test_damaged_files_become_notes(tmp_path, file, content):
    run = make_run(tmp_path / "run", images=True)
    (run / file).write_bytes(content)
    page = report(run, at=tmp_path)
    whole = content.endswith(b"null}") and file.endswith(("environment.json", "summary.json"))
    if not whole:
        assert any("notes" in tag.get("class", "") for tag in page.all("div"))


def test_what_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong, words in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "holds neither a run")):
        with pytest.raises(UserError, match=words):
            write_report([wrong], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report([make_run(tmp_path / "run")], tmp_path)
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


def test_a_stage_without_epochs_says_that_its_weights_are_kept(tmp_path):
    run = make_run(tmp_path / "run", lines=metrics("aggregator", 6))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["stages"][0]["epochs"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert "no epochs Not trained: the weights that it starts from are kept." in report(run, at=tmp_path).text


def test_rows_are_known_by_their_ids_and_those_of_earlier_versions_by_their_names(tmp_path):
    ids = ["base", "head1", "head2", "mean", "aggregate"]
    run = make_run(tmp_path / "run")
    assert [row.output for row in read_sources([run])[0].rows] == [id_of(name) for name in ROWS]
    comparison = json.loads((run / "comparison.json").read_text())
    comparison["rows"][-1]["name"] = "DH-AT"  # what the aggregate was called
    (run / "comparison.json").write_text(json.dumps(comparison))
    assert [row.name for row in read_sources([run])[0].rows] == list(ROWS)
    for row, output in zip(comparison["rows"], ids, strict=True):
        row.update(name=f"renamed {output}", output=output)
    (run / "comparison.json").write_text(json.dumps(comparison))
    assert [(row.name, row.output) for row in read_sources([run])[0].rows] == list(zip(ROWS, ids, strict=True))


def test_names_that_lead_out_of_the_run_are_not_followed(tmp_path):
    evaluation(tmp_path / "secret", 9)
    run = make_run(tmp_path / "run")
    comparison = json.loads((run / "comparison.json").read_text())
    comparison["rows"][0]["name"] = "../../../secret"
    (run / "comparison.json").write_text(json.dumps(comparison))
    found = read_sources([run])[0].rows[0]
    assert not found.samples
    assert found.gallery is None


# ---- several


def test_a_folder_of_runs_and_an_evaluation_stand_side_by_side(tmp_path):
    make_run(tmp_path / "demo" / "b", seed=1)
    make_run(tmp_path / "demo" / "a", seed=2)
    evaluation(tmp_path / "alone", 7)
    page = report(tmp_path / "demo", tmp_path / "alone", at=tmp_path)
    for name in ("a: aggregate of heads", "b: aggregate of heads", "a: base model", "alone"):
        assert name in page.text
    same = read_sources([tmp_path / "demo", tmp_path / "demo" / "a"])
    assert [source.label for source in same] == ["a", "b"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    assert [source.label for source in read_sources(runs)] == ["x/run", "y/run"]


def test_recipes_show_where_they_differ(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    assert "What differs between the recipes" not in report(*runs, at=tmp_path).text
    text = (runs[1] / "config.yaml").read_text().replace("beta: 6.0", "beta: 3.5", 1)
    (runs[1] / "config.yaml").write_text(text)
    assert "stages.main_head.objective.beta 6.0 3.5" in report(*runs, at=tmp_path).text


def test_robustness_over_eps_is_drawn_from_later_evaluations(tmp_path):
    run = make_run(tmp_path / "run")
    curve = [
        {"eps": eps, "robust_accuracy": {"worst": value}, "intervals": {"worst": [value - 0.05, value + 0.05]}}
        for eps, value in ((0.0, 0.9), (0.1, 0.5), (0.2, 0.1))
    ]
    evaluation(run / "evaluations" / "sweep", 4, curve=curve)  # of the same model as the final output
    evaluation(run / "evaluations" / "other", 99, curve=curve)
    page = report(run, at=tmp_path)
    drawn = next(svg["aria-label"] for svg in page.all("svg") if "0 90.0, 0.1 50.0, 0.2 10.0" in svg["aria-label"])
    assert "aggregate of heads, pgd-40: 0 90.0" in drawn
    assert "other, pgd-40: 0 90.0" in drawn  # whose folder is all that is known of it
    assert "Further evaluations" in page.text


# ---- gallery


def test_gallery_shows_each_image_and_what_outputs_say(tmp_path):
    run = make_run(tmp_path / "run", images=True)
    stored = dict(np.load(run / "evaluation" / "gallery.npz"))
    page = report(run, at=tmp_path)
    cards = [tag for tag in page.all("li") if tag.get("class") == "card"]
    assert len(cards) == 12
    said = [tag["class"].split() for tag in page.all("li") if tag.get("class", "").split()[:1] in ROLE_CLASSES]
    right = stored["margin"][-1, -1] > 0  # the final output attacked at the largest eps is what is shown first
    assert [("wrong" not in words) for words in said] == right.ravel().tolist()
    data = json.loads(re.search(r'class="gallery-data">(.*?)</script>', page.source, re.DOTALL)[1])
    assert [step for step, _ in data["steps"]] == [-1, 0, 1]
    for key, opinions in data["data"]["said"].items():
        where = tuple(map(int, key.split(","))) if key != "clean" else ()
        expected = stored["margin"][where] > 0 if where else stored["clean_margin"] > 0
        assert [[bool(flag) for *_, flag in row] for row in opinions] == expected.tolist()


def test_images_that_were_wrong_before_the_attack_come_last(tmp_path):
    run = make_run(tmp_path / "run", images=True)
    stored = dict(np.load(run / "evaluation" / "gallery.npz"))
    stored["clean_margin"][[0, 5], -1] = -1.0
    np.savez(run / "evaluation" / "gallery.npz", **stored)
    page = report(run, at=tmp_path)
    shown = [int(tag["data-sample"]) for tag in page.all("li") if tag.get("class") == "card"]
    assert shown == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 0, 5]


def test_confusion_is_shown_under_the_attack_that_fools_most(tmp_path):
    run = tmp_path / "run"
    held = evaluation(run, 1, attacks=("pgd-40", "cw"))
    weaker, stronger = sorted(("pgd-40", "cw"), key=lambda name: -held.robust_accuracy[name])
    text = report(run, at=tmp_path).text
    assert f"Confusion under {stronger}" in text
    assert f"Confusion under {weaker}" not in text


def test_clean_image_and_change_give_the_attacked_image(tmp_path):
    run = make_run(tmp_path / "run", images=True)
    stored = dict(np.load(run / "evaluation" / "gallery.npz"))
    for target, step, row in itertools.product(range(3), range(2), range(12)):
        data, scale = change(stored["original"][row], stored["adversarial"][target, step, row])
        levels = (pixels(data).astype(int) - 128) // scale
        attacked = pixels(picture(stored["original"][row])).astype(int) + levels
        assert np.array_equal(attacked.transpose(2, 0, 1), stored["adversarial"][target, step, row])
    assert change(stored["original"][0], stored["original"][0]) == ("", 1)


def test_logits_and_landscapes_are_drawn_and_told(tmp_path):
    page = report(make_run(tmp_path / "run", images=True), at=tmp_path)
    told = [svg["aria-label"] for svg in page.all("svg")]
    assert any(words.startswith("Margins of the heads. 12 images") for words in told)
    assert sum("is right on" in words and words.startswith("Sample ") for words in told) == 2


@pytest.mark.parametrize("damage", ["shape", "missing", "rows"])
def test_a_gallery_that_does_not_fit_is_left_out_with_a_note(tmp_path, damage):
    run = make_run(tmp_path / "run", images=True)
    path = run / "evaluation" / "gallery.npz"
    stored = dict(np.load(path))
    if damage == "shape":
        stored["prediction"] = stored["prediction"][:1]
    elif damage == "missing":
        del stored["eps"]
    else:
        stored["landscape_rows"] = stored["landscape_rows"] + 1000
    np.savez(path, **stored)
    assert "its gallery cannot be shown" in report(run, at=tmp_path).text


def test_a_page_of_many_large_images_stays_small(tmp_path):
    evaluation(tmp_path / "one", 3)
    gallery(tmp_path / "one", count=300, side=64)
    page = report(tmp_path / "one", at=tmp_path)
    assert len(page.source) < 5_000_000
    assert re.search(r"\d+ of 300 images are shown", page.text)


def test_five_hundred_small_images_are_all_shown_with_several_eps(tmp_path):
    evaluation(tmp_path / "one", 3)
    gallery(tmp_path / "one", count=500, side=32, smooth=True, eps=(4 / 255, 8 / 255))
    page = report(tmp_path / "one", at=tmp_path)
    assert len(page.source) < 5_000_000
    assert len([tag for tag in page.all("li") if tag.get("class") == "card"]) == 500
    data = json.loads(re.search(r'class="gallery-data">(.*?)</script>', page.source, re.DOTALL)[1])
    assert len(data["steps"]) >= 3


@given(st.integers(1, 500), st.integers(1, 100))
def test_shown_examples_are_spread_over_all(count, most):
    found = spread(count, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    assert found[-1] < count


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_their_pixels(channels):
    levels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7))
    data = picture(levels.astype(np.uint8))
    assert np.array_equal(pixels(data)[..., :channels], levels.transpose(1, 2, 0))


def test_drawings_escape_and_hold_no_characters_that_xml_cannot():
    from xml.etree import ElementTree

    drawing = Drawing(10, 10, "a < b \x00 & \ud800")
    drawing.text(0, 0, "<b>\x07", tip='"&')
    root = ElementTree.fromstring(str(drawing.markup()))
    assert root.attrib["aria-label"] == "a < b \N{REPLACEMENT CHARACTER} & \N{REPLACEMENT CHARACTER}"
    assert "<b>\N{REPLACEMENT CHARACTER}" in "".join(root.itertext())


# ---- the command


def test_command_writes_the_page(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    app(["report", str(run), "-o", str(tmp_path / "page.html")], standalone_mode=False)
    assert "page.html" in capsys.readouterr().out
    assert "aggregate of heads" in Page(tmp_path / "page.html").text


@pytest.mark.parametrize(
    ("output", "role"),
    [(name, name) for name in ("base", "head1", "head2", "mean", "aggregate", "model")]
    + [("head3", "further"), ("head12", "further")],
)
def test_every_output_has_a_colour(output, role):
    assert role_of(output) == role
    style = resources.files("dualhead.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    assert f".{role} {{ --tone: var(--{role}); }}" in style


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_series_can_be_seen_and_have_the_colour_of_no_output(scheme):
    style = resources.files("dualhead.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    light, dark = style.split("prefers-color-scheme: dark")[:2]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", {"light": light, "dark": dark}[scheme]))
    outputs = {colours[role] for role in ("base", "head1", "head2", "further", "mean", "aggregate", "model")}
    assert len({colours[name] for name in SERIES} - outputs) == len(SERIES)
    for name in SERIES:
        low, high = sorted(luminance(colours[each]) for each in (name, "card"))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
        assert f".{name} {{ --tone: var(--{name}); }}" in style


def test_curves_that_are_no_outputs_do_not_look_like_one(tmp_path):
    page = report(make_run(tmp_path / "run"), at=tmp_path)
    assert {tag["class"].split()[-1] for tag in page.all("path") if tag["class"].startswith("curve")} <= set(SERIES)
