"""`dualhead sample` and `dualhead counterfactual` on a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import dualhead as library
from dualhead.commands import judge
from dualhead.commands.generate import chosen
from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.evaluation import weights_fingerprint
from helpers.e2e import dualhead

TINY = (
    "data.train_limit=80", "data.validation=16", "model.backbone=cnn-4", "stages.*.epochs=1", "evaluate.limit=8",
    "evaluate.gallery=0", "evaluate.attacks=[fgsm]", "validation.attack.steps=1", "runtime.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    ended = dualhead("train", "digits_natural", *TINY, "--run-dir", folder, "--quiet")
    assert ended.status == 0, ended.err
    return folder


def test_samples_have_their_classes_and_do_not_depend_on_what_is_drawn_beside_them(run, tmp_path):
    ended = dualhead(
        "sample", run, "--classes", "2-4", "--count", "3", "--steps", "2", "--output", tmp_path / "a", "--json"
    )
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["samples"] == 9
    with np.load(tmp_path / "a" / "samples.npz") as many:
        assert many["images"].shape == (9, 1, 8, 8)
        assert many["images"].dtype == np.uint8
        assert many["label"].tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4]
        assert (
            dualhead("sample", run, "--classes", "3", "--count", "2", "--steps", "2", "--output", tmp_path / "b").status
            == 0
        )
        with np.load(tmp_path / "b" / "samples.npz") as few:
            assert np.array_equal(few["images"], many["images"][3:5])
    for name in ("sheet.png", "strip.png"):
        with Image.open(tmp_path / "a" / name) as sheet:
            assert sheet.size == (3 * 68 + 4, 3 * 68 + 4)


def test_counterfactuals_say_how_far_they_went(run, tmp_path):
    words = ("--to", "1,7", "--limit", "4", "--radius", "0.5", "--steps", "3", "--output", tmp_path / "c")
    ended = dualhead("counterfactual", run, *words)
    assert ended.status == 0, ended.err
    with np.load(tmp_path / "c" / "counterfactuals.npz") as found:
        assert found["path"].shape == (4, 8, 1, 8, 8)
        assert found["target"].tolist() == [1, 7] * 4
        assert found["index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert (found["distance"] <= 0.5 + 1e-5).all()
        assert np.allclose(found["probabilities"].sum(1), 1, atol=1e-5)


def test_classes_are_read_by_number_range_or_name():
    names = ("cat", "dog", "t-shirt")
    assert chosen(None, names) == [0, 1, 2]
    assert chosen("t-shirt, 0-1,cat", names) == [2, 0, 1]
    for words in ("3", "2-1", "fish", ","):
        with pytest.raises(UserError, match="class"):
            chosen(words, names)


def test_samples_are_training_images_by_the_name_of_their_file(run, tmp_path):
    assert dualhead("sample", run, "--count", "4", "--steps", "1", "--output", tmp_path).status == 0
    file = tmp_path / "samples.npz"
    found = load_split(str(file), "train")
    with np.load(file) as stored:
        assert np.array_equal(found.images[:], stored["images"])
        assert np.array_equal(found.labels, stored["label"])
    assert found.class_names == load_split("digits", "train").class_names
    more = (f"data.extra={{source: {file}, fraction: 0.5}}", "stages.*.batch_size=16")
    ended = dualhead("train", "digits_natural", *TINY, *more, "--run-dir", tmp_path / "more", "--quiet")
    assert ended.status == 0, ended.err


@pytest.fixture
def hasty(monkeypatch, tmp_path):
    """A judge that takes one epoch, kept for this test alone."""
    monkeypatch.setattr(judge, "EPOCHS", 1)
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "cache"))


WORDS = ("--generation", "--samples", "40", "--sample-steps", "1,2", "--judge", "cnn-4", "--attack", "fgsm",
         "--limit", "60", "--ood", "uniform")  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_the_checkpoint_is_chosen_by_samples_on_held_out_images(tmp_path):
    folder = tmp_path / "run"
    short = [word.replace("epochs=1", "epochs=3") for word in TINY]
    assert dualhead("train", "digits_natural", *short, "--run-dir", folder, "--quiet").status == 0
    words = ("--generation", "--samples", "40", "--sample-steps", "1,2", "--judge", "cnn-4", "--attack", "fgsm",
             "--limit", "60")  # fmt: skip
    alone = {}
    for which in ("best", "last"):
        ended = dualhead("evaluate", folder, *words, "--checkpoint", which, "--json")
        assert ended.status == 0, ended.err
        alone[which] = json.loads(ended.out)
    least = {which: min(p["held_out"] for p in told["generation"]["curve"]) for which, told in alone.items()}
    ended = dualhead("evaluate", folder, *words, "--checkpoint", "by-samples", "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    checkpoint = found["generation"].pop("checkpoint")
    assert checkpoint["chosen"] == min(least, key=least.get)
    assert {which: each["distance"] for which, each in checkpoint["held_out"].items()} == pytest.approx(least)
    expected = alone[checkpoint["chosen"]]
    assert found["generation"] == expected["generation"]
    assert found["clean_accuracy"] == expected["clean_accuracy"]  # all is of the one network
    assert found["subject"]["checkpoint"] == checkpoint["chosen"]
    (place,) = (folder / "evaluations").glob("*by-samples*")
    assert json.loads((place / "results.json").read_text())["generation"]["checkpoint"] == checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_samples_and_images_out_of_distribution_are_measured_kept_and_shown(run, tmp_path):
    ended = dualhead("evaluate", run, *WORDS, "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert told["generation"]["steps"] in (1, 2)
    assert told["generation"]["seeds"] == "gaussian"
    assert told["generation"]["judge"]["training_images"] == 80
    assert set(told["ood"]["sources"]["uniform"]["scores"]) == {"lse", "msp", "max_logit"}
    folder = next((run / "evaluations").glob("*generation_ood"))
    assert json.loads((folder / "results.json").read_text())["generation"] == told["generation"]
    judges = list((tmp_path / "cache" / "judges").iterdir())
    assert len(judges) == 1

    again = dualhead("evaluate", run, *WORDS)  # from what is kept, with tables
    assert again.status == 0, again.err
    assert "trains a judge" not in again.err
    assert "Frechet distance" in again.out
    assert "AUROC" in again.out
    assert dualhead("report", run, "-o", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    for words in ("Samples by class", "From seed to sample", "Nearest training images", "Images out of distribution"):
        assert words in page


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_python_measures_what_the_command_does(run):
    ended = dualhead("evaluate", run, *WORDS[:-2], "--json", "--overwrite")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)["generation"]
    train, test = load_split("digits", "train", limit=80), load_split("digits", "test").first(60)
    model = library.load(run)
    found = library.evaluate_generation(
        model, (train.images, train.labels), (test.images, test.labels), samples=40, steps=(1, 2), judge="cnn-4",
        class_names=train.class_names, augment=[{"name": "pad_crop", "padding": 1}],
    )  # fmt: skip
    assert found["samples"] == told["samples"]
    assert [point["test"] for point in found["curve"]] == pytest.approx([point["test"] for point in told["curve"]])
    others = library.evaluate_ood(model, test.images, {"train": train.images}, "L2:0.5")
    assert 0 <= others["sources"]["train"]["scores"]["lse"]["auroc"] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_a_saved_classifier_judges(run, tmp_path):
    again = ("--sample-steps", "1", "--attack", "fgsm", "--limit", "40", "--generation", "--samples", "40")
    ended = dualhead("evaluate", run, *again, "--judge", run / "model")
    assert ended.status == 0, ended.err
    assert "trains a judge" not in ended.err
    told = json.loads(dualhead("evaluate", run, *again, "--judge", run / "model", "--json").out)["generation"]["judge"]
    assert f"judge model ({told['digest']})" in " ".join(ended.out.split())
    assert dualhead("report", run, "-o", tmp_path / "page.html").status == 0
    assert f"The judge is model ({told['digest']}), as given, " in (tmp_path / "page.html").read_text("utf-8")
    assert told["folder"] == str(run / "model")
    assert told["digest"] == weights_fingerprint(library.load(run))[:16]
    train = load_split("digits", "train", limit=80)
    three = (train.images, train.labels % 3)
    library.fit("cnn-4", three, three, recipe=judge._recipe([], 0, "cpu"), run_dir=tmp_path / "other", progress=False)
    refused = dualhead("evaluate", run, *again, "--judge", tmp_path / "other")
    assert refused.status == 2
    assert "tells 3 classes, but the images have 10" in refused.err


def test_another_judge_in_the_same_folder_is_another_judge(run, tmp_path):
    """Kept measures answer for the judge that made them alone."""
    model, found = library.load(run), []
    for _ in range(2):
        library.save(model, tmp_path / "judge")
        found.append(judge.identity_of(str(tmp_path / "judge")))
        next(model.parameters()).data.add_(1)
    assert found[0] != found[1]
    assert judge.identity_of("cnn-4") == "cnn-4"


@pytest.mark.usefixtures("hasty")
def test_a_checkpoint_is_chosen_by_samples_alone(run):
    ended = dualhead("evaluate", run, "--checkpoint", "by-samples")
    assert ended.error_line == "--checkpoint by-samples: chooses by samples; give --generation too"
    ended = dualhead("evaluate", "a.b:c", "--checkpoint", "by-samples", "--generation", "--data", "digits")
    assert ended.error_line == "--checkpoint is for runs, and a.b:c is none"


def test_options_of_generation_that_do_not_fit_are_told(run):
    for words, message in (
        (("--generation", "--sample-steps", "a"), "--sample-steps"),
        (("--generation", "--samples", "12"), "samples"),
        (("--ood", "nothing/here.npz"), "nothing/here.npz"),
        (("--ood", "uniform", "--routes", "all"), "--routes"),
    ):
        ended = dualhead("evaluate", run, "--attack", "fgsm", "--limit", "20", *words)
        assert ended.status == 2
        assert message in ended.err
