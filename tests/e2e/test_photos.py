"""A folder of photographs of several sizes: trained on, and then renamed, reordered, or not what the model knows."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dualhead.data import Split
from dualhead.errors import UserError
from dualhead.runs.folder import GALLERY, data_facts, refuse_other_data
from dualhead.saving.architecture import CONFIG
from helpers.e2e import TINY, dualhead

SHORT = [
    *(pair for pair in TINY if not pair.startswith(("data.", "stages.*.attack"))),
    "data.validation=4",
    "data.image_size=[8, 8]",
]


def photos(folder, classes, sizes=((12, 9), (8, 16)), count=8):
    """Each class has a colour of its own, so that a model that has learnt anything tells them apart."""
    for part, number in (("train", count), ("test", 3)):
        for name, colour in classes.items():
            (folder / part / name).mkdir(parents=True)
            for k in range(number):
                height, width = sizes[k % len(sizes)]
                pixels = np.full((height, width, 3), colour, np.uint8) + np.uint8(k)
                Image.fromarray(pixels).save(folder / part / name / f"{k}.png")
    return folder


CLASSES = {"cat": (200, 30, 30), "dog": (30, 30, 200)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photos(folder / "images", CLASSES)
    ended = dualhead(
        "train", "digits_natural", *SHORT, f"data.source={folder / 'images'}", "--run-dir", folder / "run", "--quiet"
    )
    assert ended.status == 0, ended.err
    assert dualhead("export", folder / "run", "--to", folder / "model").status == 0
    return folder


def measured(model, data, tmp_path, *more):
    ended = dualhead(
        "evaluate", model, "--data", data, "--attack", "fgsm", "--device", "cpu", "--output", tmp_path / "found",
        "--overwrite", "--json", *more,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    return json.loads(ended.out), ended.err


def test_a_run_and_what_is_exported_of_it_are_measured_on_the_same_images(run, tmp_path):
    large = photos(tmp_path / "large", CLASSES, sizes=((32, 32), (20, 40)))
    for data in (run / "images", large):
        (of_run, _), (of_model, _) = (measured(run / place, data, tmp_path) for place in ("run", "model"))
        for key in ("clean_accuracy", "robust_accuracy", "per_class", "num_samples"):
            assert of_run[key] == of_model[key]


def test_the_card_of_a_naturally_trained_model_does_not_call_it_robust(run):
    card = (run / "model" / "README.md").read_text()
    assert "Not trained, but evaluated, against perturbations of Linf norm" in card
    assert "attack pgd" not in card


def test_classes_of_which_some_are_others_are_refused(run, tmp_path):
    swapped = photos(tmp_path / "swapped", {"ape": (0, 200, 0), "cat": (200, 30, 30)})
    for model in ("run", "model"):
        ended = dualhead("evaluate", run / model, "--data", swapped, "--attack", "fgsm")
        assert ended.status == 2
        assert "'cat' is class 1 of these images and class 0 of" in ended.error_line


def test_classes_in_any_order_are_measured_by_their_names(run, tmp_path):
    rows = [("dog", k) for k in range(3)] + [("cat", k) for k in range(3)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    table = pa.table({
        "image": pa.array([{"bytes": (run / f"images/test/{n}/{k}.png").read_bytes(), "path": None} for n, k in rows]),
        "label": [["dog", "cat"].index(name) for name, _ in rows],
    })  # fmt: skip
    (tmp_path / "turned").mkdir()
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "turned" / "test-0.parquet")
    for model in ("run", "model"):
        (turned, _), (straight, _) = (measured(run / model, d, tmp_path) for d in (tmp_path / "turned", run / "images"))
        assert turned["per_class"] == straight["per_class"]


def test_a_run_that_is_used_from_elsewhere_keeps_to_its_images(tmp_path, monkeypatch):
    photos(tmp_path / "here" / "images", CLASSES)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = ["train", "digits_natural", *SHORT, "data.source=images", "--run-dir", tmp_path / "run", "--quiet"]
    assert dualhead(*command).status == 0
    monkeypatch.chdir(tmp_path / "there")
    photos(tmp_path / "there" / "images", {"cat": (0, 200, 0), "dog": (0, 0, 0)})  # others of the same name
    first = dualhead("evaluate", tmp_path / "run", "--attack", "fgsm", "--device", "cpu", "--json", "--output", "a")
    monkeypatch.chdir(tmp_path / "here")
    second = dualhead("evaluate", tmp_path / "run", "--attack", "fgsm", "--device", "cpu", "--json", "--output", "b")
    assert json.loads(first.out)["per_class"] == json.loads(second.out)["per_class"]


def test_a_run_says_what_it_left_out_and_what_it_was_shown_before(tmp_path):
    images = photos(tmp_path / "images", CLASSES)
    for number in range(3):  # the same pictures in both parts
        shutil.copy(images / "train" / "cat" / f"{number}.png", images / "test" / "cat" / f"{number}.png")
    (images / "test" / "dog" / "broken.png").write_bytes(b"broken")
    command = ["train", "digits_natural", *SHORT, f"data.source={images}", "--run-dir", tmp_path / "run", "--quiet"]
    assert "test/dog/broken.png is not a readable image" in dualhead(*command).error_line
    assert dualhead(*command, "data.skip_unreadable=true").status == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert results["skipped_images"] == 1
    (found,) = (check for check in results["diagnostics"] if check["name"] == "duplicates")
    assert found["status"] == "failed"
    again, _ = measured(tmp_path / "run", images, tmp_path, "--skip-unreadable")
    assert "failed" in [check["status"] for check in again["diagnostics"] if check["name"] == "duplicates"]


def test_a_factory_may_name_its_classes(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    body = (
        "import torch\n"
        "class Red(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.stack([x[:, 2].mean((1, 2)), x[:, 1].mean((1, 2)), x[:, 0].mean((1, 2))], 1)\n"
    )
    (tmp_path / "telling.py").write_text(
        body + "def make():\n    m = Red()\n    m.class_names = ['dog', 'frog', 'cat']\n    return m\n"
    )
    named = "def make():\n    return Red()\nmake.class_names = ('dog', 'frog', 'cat')\n"
    (tmp_path / "naming.py").write_text(body + named)
    images = photos(tmp_path / "images", CLASSES)
    for module in ("telling", "naming"):  # images of two of the three classes, in another order
        found, _ = measured(f"{module}:make", images, tmp_path, "--eps", "1/255", "--image-size", "8x8")
        assert found["clean_accuracy"] == 1
        assert [entry["class"] for entry in found["per_class"]] == ["dog", "cat"]
    (tmp_path / "silent.py").write_text(body.replace("x[:, 1].mean((1, 2)), ", "") + "def make():\n    return Red()\n")
    with caplog.at_level("WARNING"):
        found, _ = measured("silent:make", images, tmp_path, "--eps", "1/255", "--image-size", "8x8")
    assert "silent:make does not name its classes: their order is trusted, so 0 is taken for 'cat'" in caplog.text
    assert found["clean_accuracy"] == 0


def test_images_of_some_of_the_classes_are_measured_by_their_names(run, tmp_path):
    several = photos(tmp_path / "several", {**CLASSES, "ape": (0, 200, 0)})
    command = ["train", "digits_natural", *SHORT, "data.validation=6", f"data.source={several}", "--quiet"]
    assert dualhead(*command, "--run-dir", tmp_path / "run").status == 0
    assert dualhead("export", tmp_path / "run", "--to", tmp_path / "model").status == 0
    for model in ("run", "model"):
        found, _ = measured(tmp_path / model, run / "images", tmp_path)  # it knows ape, cat and dog
        assert [(entry["class"], entry["label"]) for entry in found["per_class"]] == [("cat", 1), ("dog", 2)]
        whole, _ = measured(tmp_path / model, several, tmp_path)
        of_both = [entry for entry in whole["per_class"] if entry["class"] != "ape"]
        assert [entry["clean_accuracy"] for entry in found["per_class"]] == [e["clean_accuracy"] for e in of_both]


def test_what_the_data_need_to_be_read_can_be_said_for_any_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\ndef make(num_classes):\n    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), "
        "torch.nn.Flatten(), torch.nn.Linear(3, num_classes))\n"
    )
    images = photos(tmp_path / "images", CLASSES)
    ended = dualhead("evaluate", "own:make", "--data", images, "--attack", "fgsm", "--eps", "8/255")
    assert "images differ in size" in ended.error_line
    assert "(evaluate, gallery, play: --image-size)" in ended.error_line
    found, _ = measured("own:make", images, tmp_path, "--eps", "8/255", "--image-size", "8x8")
    assert found["num_samples"] == 6
    made = tmp_path / "made"
    exhibit = ["gallery", "own:make", "--data", images, "--eps", "8/255", "--output", made, "--landscape", ""]
    assert dualhead(*exhibit, "--image-size", "8x12").status == 0
    assert np.load(made / GALLERY)["original"].shape[-2:] == (8, 12)
    ended = dualhead("evaluate", "own:make", "--data", images, "--eps", "8/255", "--image-size", "8")
    assert "--image-size 8: write HEIGHTxWIDTH" in ended.error_line
    encoded = [(tmp_path / "images" / "test" / name / "0.png").read_bytes() for name in CLASSES] * 4
    table = pa.table({
        "picture": pa.array([{"bytes": one, "path": None} for one in encoded]),
        "category": [0] * 4 + [1] * 4, "number": [0, 1] * 4,
    })  # fmt: skip
    (tmp_path / "rows").mkdir()
    pq.write_table(table, tmp_path / "rows" / "test-0.parquet")
    ended = dualhead("evaluate", "own:make", "--data", tmp_path / "rows", "--attack", "fgsm", "--eps", "8/255")
    assert "(evaluate, gallery, play: --label-column)" in ended.error_line
    columns = ["--label-column", "category", "--image-column", "picture"]
    found, _ = measured("own:make", tmp_path / "rows", tmp_path, "--eps", "8/255", *columns)
    assert [entry["num_samples"] for entry in found["per_class"]] == [4, 4]


def test_a_limit_that_leaves_out_classes_is_told(run, tmp_path, caplog):
    rows = [(name, k) for name in CLASSES for k in range(3)] * 3
    rows = sorted(rows)  # by class
    table = pa.table({
        "image": pa.array([{"bytes": (run / f"images/test/{n}/0.png").read_bytes(), "path": None} for n, _ in rows]),
        "label": [list(CLASSES).index(name) for name, _ in rows],
    })  # fmt: skip
    (tmp_path / "sorted").mkdir()
    pq.write_table(table, tmp_path / "sorted" / "test-0.parquet")
    with caplog.at_level("WARNING"):
        measured(run / "run", tmp_path / "sorted", tmp_path, "--limit", "9")
    assert "--limit: the first 9 test images show 1 of the 2 classes" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        measured(run / "run", tmp_path / "sorted", tmp_path, "--limit", "10")
    assert "test images show" not in caplog.text


def test_another_norm_needs_a_radius_of_its_own(run, tmp_path):
    for model in ("run", "model"):
        ended = dualhead("evaluate", run / model, "--data", run / "images", "--norm", "L2")
        assert ended.status == 2
        assert "--norm L2: --eps is needed, since the model's is of Linf; e.g. --eps 0.5" in ended.error_line
    found, _ = measured(run / "run", run / "images", tmp_path, "--norm", "L2", "--eps", "0.5")
    assert found["threat"] == {"norm": "L2", "eps": 0.5}


def test_classes_of_other_names_are_measured_with_a_word(run, tmp_path, caplog):
    renamed = photos(tmp_path / "renamed", {"katze": (200, 30, 30), "wolf": (30, 30, 200)})
    with caplog.at_level("WARNING"):
        assert measured(run / "model", renamed, tmp_path)[0]["num_samples"] == 6
    assert "class 0 is called 'katze' here and 'cat' where it was trained" in caplog.text


def change(images, how):
    if how == "renamed":
        for part in ("train", "test"):
            (images / part / "cat").rename(images / part / "zebra")
    elif how == "painted":
        for path in (images / "train").rglob("*.png"):
            Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    elif how == "one out, one in":
        (images / "train/cat/0.png").rename(images / "train/cat/9.png")
    elif how == "added":
        shutil.copy(images / "train/cat/0.png", images / "train/cat/extra.png")
    else:
        shutil.move(images / "train/cat/0.png", images / "train/dog/extra.png")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("renamed", "has the classes dog, zebra in place of cat, dog with which the run in"),
        ("added", "has 17 training images in place of 16 with which the run in"),
        ("moved", "has other labels than those with which the run in"),
        ("painted", "has other images than those with which the run in"),
        ("one out, one in", "has other images than those with which the run in"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(tmp_path, how, told):
    images = photos(tmp_path / "images", CLASSES)
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):  # no two alike
        Image.fromarray(np.asarray(Image.open(path)) ^ np.uint8(8 * number)).save(path)
    command = ["train", "digits_natural", *SHORT, f"data.source={images}", "--run-dir", tmp_path / "run", "--quiet"]
    assert dualhead(*command).status == 0
    assert dualhead(*command).status == 0
    change(images, how)
    ended = dualhead(*command)
    assert ended.status == 2
    assert told in ended.error_line


def test_a_run_does_not_go_on_with_other_images_in_its_second_source(tmp_path):
    first, second = (photos(tmp_path / name, CLASSES) for name in ("first", "second"))
    command = ["train", "digits_natural", *SHORT, f"data.source={first}", f"data.extra={{source: {second}}}"]
    command += ["--run-dir", tmp_path / "run", "--quiet"]
    assert dualhead(*command).status == 0
    assert dualhead(*command).status == 0
    shutil.copy(second / "train/cat/0.png", second / "train/cat/extra.png")
    ended = dualhead(*command)
    assert ended.status == 2
    assert f"data.extra {second}: has 17 training images in place of 16 with which the run in" in ended.error_line


def test_what_another_decoder_makes_of_the_same_images_is_not_refused(tmp_path):
    pixels = torch.randint(2, 254, (300, 3, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [pixels, (pixels.int() + torch.randint_like(pixels.int(), -1, 2)).to(torch.uint8), pixels.roll(1, 0)]
    facts = [data_facts(Split(each, torch.zeros(300, dtype=torch.int64), ("a", "b"))) for each in images]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.json").write_text(json.dumps({"architecture": {}, "data": facts[0]}))
    (tmp_path / "config.yaml").touch()
    assert facts[0] != facts[1]
    refuse_other_data(tmp_path, facts[1], "there")
    with pytest.raises(UserError, match="has other images than those"):
        refuse_other_data(tmp_path, facts[2], "there")


def test_a_run_that_ended_while_it_made_its_folder_begins_again(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    images = photos(tmp_path / "images", CLASSES)
    command = ["train", "digits_natural", *SHORT, f"data.source={images}", "--run-dir", tmp_path / "run", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("dualhead.runs.folder.write_text", full)  # what `config.yaml` is written with
        assert "No space left on device" in dualhead(*command).error_line
    assert (tmp_path / "run/checkpoints/config.json").is_file()
    assert not (tmp_path / "run/config.yaml").exists()
    (images / "train/cat/0.png").unlink()  # nothing has been trained on it: these are the images to begin with
    assert dualhead(*command).status == 0


def test_an_export_can_be_pushed_again_where_the_hub_did_not_take_it(run, tmp_path, monkeypatch):
    asked = []

    class Api:
        def create_repo(self, name, **options):
            asked.append(name)
            if len(asked) == 1:
                raise ConnectionError("no route to the Hub")

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    command = ["export", run / "run", "--to", tmp_path / "model", "--push", "me/model"]
    ended = dualhead(*command)
    assert ended.status == 1
    assert "the Hub did not take it (no route to the Hub); the model is in" in ended.error_line
    ended = dualhead(*command)
    assert (ended.status, asked) == (0, ["me/model"] * 2)
    assert "Hub: https://hub/me/model" in ended.out
    for name in ("model", "my model/x", "a/b/c"):
        ended = dualhead("export", run / "run", "--to", tmp_path / "new", "--push", name)
        assert ended.status == 2
        assert f"--push {name}: write OWNER/NAME" in ended.error_line
    assert not (tmp_path / "new").exists()
    (tmp_path / "model" / CONFIG).write_text("{}")
    assert "holds something already" in dualhead(*command).error_line
