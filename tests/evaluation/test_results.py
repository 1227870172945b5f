from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, balanced, compare, evaluate, wilson
from helpers.evaluation import THREAT, assert_same, evaluation_of, patterns, trained

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    images, labels = patterns(50)
    labels[:6] = (labels[:6] + 1) % 4
    result = evaluate(
        trained(),
        images,
        labels,
        threat=THREAT,
        attacks=["pgd-5", "fgsm"],
        eps=[0, "8/255"],
        class_names=NAMES,
        output_dir=folder,
        save_adversarial=True,
        precision="float32",
        command="dualhead evaluate",
    )
    return folder, result, labels.numpy()


def test_results_hold_the_keys_that_others_read(written):
    folder, _, _ = written
    results = json.loads((folder / "results.json").read_text())
    assert results["num_samples"] == 50
    assert results["threat"] == {"norm": "Linf", "eps": 16 / 255}
    assert set(results["robust_accuracy"]) == {"pgd-5", "fgsm", "worst"}
    assert set(results["intervals"]) == {"clean_accuracy", "pgd-5", "fgsm", "worst"}
    for record in results["attacks"].values():
        assert {"seconds", "forward_passes", "backward_passes", "verification_passes", "parts"} <= set(record)
    for finding in results["diagnostics"]:
        assert set(finding) == {"name", "status", "message"}
    assert {finding["status"] for finding in results["diagnostics"]} == {"ok"}
    assert results["environment"]["precision"] == "float32"
    assert results["environment"]["torch"] == torch.__version__
    assert results["command"] == "dualhead evaluate"
    assert results["seed"] == 0
    assert [entry["class"] for entry in results["per_class"]] == NAMES
    assert [entry["eps"] for entry in results["curve"]] == [0, 8 / 255]


def test_failed_checks_stand_above_the_numbers_with_their_intervals():
    images, labels = patterns(40)
    told = evaluate(trained(), images, labels, threat=THREAT, attacks=["pgd-2", "fgsm"], diagnostics=False)
    light = {"name": "large_eps", "status": "failed", "message": "gradients < nothing"}
    told.results["diagnostics"] = [light]
    above, head, numbers = str(told).splitlines()
    assert above == "failed: large_eps: gradients < nothing"
    assert re.split(r" {2,}", head)[1:5] == ["clean", "pgd-2", "fgsm", "worst"]
    for name, share in {"clean_accuracy": told.clean_accuracy, **told.robust_accuracy}.items():
        low, high = (f"{100 * end:.1f}" for end in told.intervals[name])
        assert f"{100 * share:.1f} [{low}, {high}]" in numbers
    assert told._repr_html_().index("gradients &lt; nothing") < told._repr_html_().index("<table>")
    assert repr(told).endswith(", failed: large_eps)")


def test_clean_accuracy_alone_is_shown_as_such():
    images, labels = patterns(8)
    told = evaluate(trained(), images, labels, threat=THREAT, attacks=[], diagnostics=False)
    assert repr(told) == f"Evaluation(8 samples, clean {told.clean_accuracy:.1%})"
    assert re.split(r" {2,}", str(told).splitlines()[0])[1] == "clean"
    assert "worst" not in str(told)


def test_numbers_follow_from_the_samples(written):
    folder, _, labels = written
    results = json.loads((folder / "results.json").read_text())
    with np.load(folder / "samples.npz") as samples:
        clean = samples["clean_prediction"] == samples["label"]
        robust = {name: samples[f"robust_{name}"] for name in ("pgd-5", "fgsm")}
        np.testing.assert_array_equal(samples["index"], np.arange(50))
        np.testing.assert_array_equal(samples["label"], labels)
        for name, column in robust.items():
            assert column.dtype == bool
            assert not (column & ~clean).any()
            np.testing.assert_array_equal(np.isnan(samples[f"distance_{name}"]), column | ~clean)
    assert results["clean_accuracy"] == clean.mean() == 44 / 50
    for name, column in {**robust, "worst": robust["pgd-5"] & robust["fgsm"]}.items():
        assert results["robust_accuracy"][name] == column.mean()
        assert results["intervals"][name] == list(wilson(column.sum(), 50))
    for entry in results["per_class"]:
        rows = labels == entry["label"]
        assert entry["num_samples"] == rows.sum()
        assert entry["clean_accuracy"] == clean[rows].mean()
        assert entry["robust_accuracy"]["pgd-5"] == robust["pgd-5"][rows].mean()


def test_balanced_accuracy_is_the_mean_over_the_classes_that_occur():
    labels = np.array([0] * 6 + [3] * 2 + [5])
    right = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    found = balanced({"clean": right, "worst": np.zeros(9, bool)}, labels)
    assert found["balanced_accuracy"] == {"clean": pytest.approx((5 / 6 + 1 / 2 + 0) / 3), "worst": 0}
    assert found["class_sizes"] == [1, 6]


def test_results_hold_balanced_accuracies_as_their_classes_have_them(written):
    folder, result, labels = written
    results = json.loads((folder / "results.json").read_text())
    classes = results["per_class"]
    assert set(results["balanced_accuracy"]) == {"clean", "pgd-5", "fgsm", "worst"}
    by_class = [entry["robust_accuracy"]["pgd-5"] for entry in classes]
    assert results["balanced_accuracy"]["pgd-5"] == pytest.approx(sum(by_class) / len(by_class))
    assert result.balanced_accuracy == results["balanced_accuracy"]
    sizes = np.bincount(labels)
    assert results["class_sizes"] == [sizes[sizes > 0].min(), sizes.max()]
    assert all(set(point["balanced_accuracy"]) == {"clean", "pgd-5", "fgsm", "worst"} for point in results["curve"])


def test_what_is_loaded_is_what_was_saved(written):
    folder, result, _ = written
    loaded = Evaluation.load(folder)
    assert_same(loaded, result)
    assert loaded.robust_accuracy == result.robust_accuracy
    assert loaded.intervals == result.intervals
    for name, verdict in result.verdicts.items():
        np.testing.assert_array_equal(loaded.verdicts[name].adversarial, verdict.adversarial)


def test_no_name_of_the_machine_is_written(written):
    import platform

    folder, _, _ = written
    assert platform.node() not in (folder / "results.json").read_text()


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is missing"):
        Evaluation.load(tmp_path)


def test_comparison_pairs_samples_by_index(written):
    folder, result, labels = written
    images, _ = patterns(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    weaker = evaluate(
        trained(),
        images[order],
        labels[order],
        index=order,
        threat=THREAT,
        attacks=["fgsm", "pgd-20"],
        precision="float32",
    )
    found = compare(folder, weaker)
    assert list(found) == ["clean", "fgsm"]
    assert found["clean"].only_first == found["clean"].only_second == 0
    assert found["fgsm"].only_first == found["fgsm"].only_second == 0
    assert list(compare(result, folder)) == ["clean", "pgd-5", "fgsm", "worst"]


def test_a_gain_is_one_of_the_second_over_the_first():
    found = compare(evaluation_of(120, 60), evaluation_of(150, 40))
    assert {name: pair.verdict for name, pair in found.items()} == {"clean": "gain", "pgd-40": "loss", "worst": "loss"}
    assert found["clean"].difference == pytest.approx(30 / 200)
    assert (found["pgd-40"].only_first, found["pgd-40"].only_second) == (20, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threat": type(THREAT)("Linf", "8/255")}, "threat models differ"),
        ({"index": range(1, 51)}, "{folder} and the second evaluation were measured on different samples, by"),
        ({"labels": torch.zeros(50, dtype=torch.long)}, "{folder} and the second evaluation have different labels"),
        ({"images": patterns(50)[0].flip(3)}, "{folder} and the second evaluation were measured on different images"),
    ],
)
def test_comparison_refuses_what_is_not_paired(written, change, message):
    folder, _, labels = written
    images, _ = patterns(50)
    settings = {
        "images": images, "labels": labels, "threat": THREAT, "attacks": ["fgsm"], "precision": "float32", **change,
    }  # fmt: skip
    if "index" in settings:
        settings["index"] = list(settings["index"])
    other = evaluate(trained(), **settings)
    with pytest.raises(UserError, match=re.escape(message.format(folder=folder))):
        compare(folder, other)


def test_comparison_names_the_threats_of_both_and_the_numbers_of_samples():
    first, fewer, other = evaluation_of(120, 60), evaluation_of(60, 30, n=100), evaluation_of(120, 60)
    other.results["threat"] = {"norm": "L2", "eps": 0.5}
    with pytest.raises(UserError, match=r"the first evaluation was measured under Linf eps 0.03, .* L2 eps 0.5;"):
        compare(first, other)
    with pytest.raises(UserError, match=r"different samples \(200 and 100\)"):
        compare(first, fewer)


def test_results_tell_images_however_they_are_held():
    def told(images, labels, **more):
        asked = {"threat": THREAT, "attacks": ["fgsm"], "precision": "float32", "diagnostics": False, **more}
        return evaluate(trained(), images, labels, **asked).results["images"]

    images, labels = patterns(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    reciprocal = images.float() * torch.tensor(1 / 255)  # as accelerators divide by a number
    assert not torch.equal(reciprocal, images.float() / 255), "too weak a test"
    expected = told(images, labels)
    assert expected["shape"] == [3, 8, 8]
    for same in (images.float() / 255, images.double() / 255, (images.float() / 255).half(), reciprocal):
        assert told(same, labels) == expected
    assert told(images[order], labels[order], index=order) == expected
    more, more_labels = torch.cat([images, images]), torch.cat([labels, labels])
    assert told(more[:20], more_labels[:20]) == expected
    assert told(more, more_labels) != expected
    changed = images.clone()
    changed[-1, -1, -1, -1] ^= 1
    assert told(changed, labels) != expected
    assert told(images[order], labels[order]) != expected


def test_results_that_do_not_tell_their_images_stay_comparable(written):
    folder, _, labels = written
    asked = {"threat": THREAT, "attacks": ["fgsm"], "precision": "float32"}
    other = evaluate(trained(), patterns(50)[0].flip(3), labels, **asked)
    del other.results["images"]
    assert list(compare(folder, other)) == ["clean", "fgsm"]


def test_the_same_pictures_at_another_size_stay_comparable(written):
    folder, _, labels = written
    larger = patterns(50)[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(2), trained())
    other = evaluate(model, larger, labels, threat=THREAT, attacks=["fgsm"], precision="float32")
    assert list(compare(folder, other)) == ["clean", "fgsm"]
