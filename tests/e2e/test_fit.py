"""`dualhead.fit`: runs from Python are those of the command line, and what does not fit is refused in one line."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Pillow
from torch.utils.data import DataLoader, TensorDataset, random_split

import dualhead
from dualhead.data import load_split
from dualhead.models import read_state
from dualhead.runs.images import load_images
from helpers import fit_job
from helpers.e2e import dualhead as command
from helpers.own_net import OwnNet
from helpers.resume import in_spite_of, outcome

SHORT = {
    "data.validation": 20,
    "stages.*.attack.steps": 1,
    "validation.attack.steps": 1,
    "stages.*.batch_size": 64,
    "evaluate.limit": 16,
    "evaluate.attacks": ["pgd-2"],
    "evaluate.gallery": 2,
    "runtime.lanes": 1,
}
PLAIN = {
    "name": "plain",
    "data": {},
    "model": {},
    "threat": {"norm": "Linf", "eps": 0.1},
    "validation": {"attack": "pgd-1"},
    "stages": [{"name": "main", "train": ["model"], "objective": "sat", "attack": "pgd-1", "epochs": 1}],
}


@pytest.fixture(scope="module")
def digits():
    train, test = load_split("digits", "train").first(200), load_split("digits", "test").first(40)
    return (train.images.float() / 255, train.labels), (test.images, test.labels)


def net(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OwnNet()


def fitted(model, digits, folder, recipe="digits", **more):
    train, test = digits
    more = {"train": train, "test": test, "epochs": 1, "seed": 3, "device": "cpu", "eps": "20/255", **more}
    return dualhead.fit(model, recipe=recipe, overrides=SHORT, run_dir=folder, progress=False, **more)


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    return fitted(net(), digits, folder)


def test_equals_the_command_line_to_the_bit(digits, whole, tmp_path):
    (x, y), (x_test, y_test) = digits
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    words = [f"{key}={value}".replace("'", "") for key, value in SHORT.items()]
    words += [f"data.source={tmp_path / 'mine.npz'}", "model.backbone=helpers.own_net:OwnNet", "model.attach_at=low"]
    words += [f"stages.{number}.epochs=1" for number in range(3)]
    words += ["threat.eps=20/255", "runtime.seed=3", "runtime.device=cpu"]
    ended = command("train", "digits", *words, "--run-dir", tmp_path / "run", "--quiet")
    assert ended.status == 0, ended.err
    assert weights(tmp_path / "run") == weights(whole.run_dir)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("steps", [4, pytest.param(1, marks=SLOW), pytest.param(8, marks=SLOW)])
def test_stopped_and_gone_on_with_equals_the_whole(digits, whole, tmp_path, steps):
    asked = iter(range(steps))
    with pytest.raises(dualhead.Interrupted):
        fitted(net(), digits, tmp_path / "run", stop=lambda: next(asked, None) is None)
    fitted(net(seed=9), digits, tmp_path / "run")  # the run's weights count, not those given again
    assert weights(tmp_path / "run") == weights(whole.run_dir)


def fit_in_process(folder, epochs):
    torch.set_num_threads(1)
    train, test = load_split("digits", "train").first(200), load_split("digits", "test").first(40)
    images = (train.images.float() / 255, train.labels), (test.images, test.labels)
    often = {**SHORT, "runtime.save_minutes": 1e-9}
    dualhead.fit(
        net(), *images, recipe="digits", overrides=often, epochs=epochs, run_dir=folder, progress=False, device="cpu"
    )


@SLOW  # with `make bits`
def test_killed_at_random_moments_and_called_again_equals_the_undisturbed(tmp_path):
    began = time.monotonic()
    assert in_spite_of(0, fit_in_process, tmp_path / "undisturbed", 3) == 0
    epoch_seconds = (time.monotonic() - began) / (3 * 3)
    assert in_spite_of(4, fit_in_process, tmp_path / "killed", 3, epoch_seconds) >= 2
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "undisturbed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fit_in_processes(count, *words):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
    return subprocess.run(
        [sys.executable, *start, fit_job.__file__, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@SLOW  # with `make bits`
def test_two_processes_of_torchrun_share_a_fit(tmp_path):
    for count in (1, 2):
        ended = fit_in_processes(count, tmp_path / str(count))
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("epoch 1/1") == 2  # two calls, each told once
    for call in ("0", "1"):
        alone, shared = (read_state(tmp_path / count / call / "model" / "model.safetensors") for count in ("1", "2"))
        for name, tensor in alone.items():
            torch.testing.assert_close(shared[name], tensor, rtol=2e-4, atol=2e-5)
    ended = fit_in_processes(2, tmp_path / "other", "other")
    assert "process 1 holds other images than process 0" in ended.stderr
    assert not (tmp_path / "other").exists()


def test_fresh_weights_do_not_take_the_place_of_lost_ones(digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    with pytest.raises(dualhead.Interrupted):
        fitted(net(), (tmp_path / "mine.npz", None), tmp_path / "run", PLAIN, stop=lambda: True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "states")
    with pytest.raises(dualhead.UserError, match="began with"):
        dualhead.train(str(tmp_path / "run" / "config.yaml"), run_dir=tmp_path / "run")


def test_other_images_do_not_go_on(digits, whole):
    (x, y), test = digits
    with pytest.raises(dualhead.UserError, match="began with other images or labels"):
        fitted(net(), ((1 - x, y), test), whole.run_dir)


def test_the_model_is_left_as_it_is(digits, tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    fitted(model, digits, tmp_path / "run", PLAIN)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_begins_with_the_weights_that_are_given(digits, tmp_path):
    model = net(seed=11)
    run = fitted(
        model, digits, tmp_path / "run", {**PLAIN, "stages": [{**PLAIN["stages"][0], "keep": "last"}]}, epochs=0
    )
    x = digits[1][0].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), model.eval()(x))


@pytest.mark.slow
def test_every_form_of_the_same_images_is_the_same_run(digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    forms = [
        ((x, y), (x_test, y_test)),
        ((x.numpy(), y.numpy()), (x_test[:, 0].numpy(), y_test.numpy()[:, None])),
        (DataLoader(TensorDataset(x, y), 32, shuffle=True), TensorDataset(x_test.float() / 255, y_test)),
    ]
    found = []
    for number, form in enumerate(forms):
        fitted(net(), form, tmp_path / str(number), PLAIN)
        found.append(weights(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]


# ---- sources of several kinds, and the names of classes

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Named(TensorDataset):
    """Images of the digits with the names of `names`, as torchvision's data sets have them."""

    def __init__(self, images, names):
        self.classes = list(names)
        super().__init__(images[0], torch.tensor([self.classes.index(WORDS[label]) for label in images[1].tolist()]))


def hugging_face(images, names=tuple(WORDS)):
    from datasets import ClassLabel, Dataset, Features, Image

    x = images[0] if images[0].dtype == torch.uint8 else (images[0] * 255).round().byte()
    labels = [list(names).index(WORDS[label]) for label in images[1].tolist()]
    columns = {"img": [Pillow.fromarray(one.numpy()) for one in x[:, 0]], "source": [0] * len(x), "label": labels}
    kinds = {"img": Image(), "source": ClassLabel(names=["web", "book"]), "label": ClassLabel(names=list(names))}
    return Dataset.from_dict(columns, features=Features(kinds))


def folder_of(root, part, images):
    x = images[0] if images[0].dtype == torch.uint8 else (images[0] * 255).round().byte()
    for place, (one, label) in enumerate(zip(x[:, 0], images[1].tolist(), strict=True)):
        (root / part / WORDS[label]).mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(one.numpy()).save(root / part / WORDS[label] / f"{place:03d}.png")
    return root


@pytest.fixture
def seen(digits, monkeypatch):
    """Returns training and test images as a run sees them, each by the word of its class."""
    monkeypatch.setattr("dualhead.commands.fit.train_run", lambda recipe, **_: load_images(recipe, Path("run")))

    def fit(train, test, **more):
        images = dualhead.fit(net(), train, test, recipe=PLAIN, progress=False, **more)
        found = []
        for split in (images.training, images.test):
            names = [split.class_names[label] for label in split.labels.tolist()]
            found.append(sorted(zip(split.images[:].flatten(1).tolist(), names, strict=True)))
        return found, images.training.class_names

    return fit


def by_word(images):
    x = images[0] if images[0].dtype == torch.uint8 else (images[0] * 255).round().byte()
    return sorted((one.flatten().tolist(), WORDS[label]) for one, label in zip(x, images[1].tolist(), strict=True))


@pytest.mark.parametrize(
    ("train_as", "test_as"),
    [
        (hugging_face, hugging_face),
        (hugging_face, lambda images: hugging_face(images, WORDS[::-1])),
        (lambda images: DataLoader(Named(images, WORDS), 64), lambda images: hugging_face(images, sorted(WORDS))),
        (lambda images: random_split(Named(images, WORDS), [1.0])[0], lambda images: Named(images, WORDS[::-1])),
        ("folder", hugging_face),
        (hugging_face, "folder"),
        (lambda images: Named(images, WORDS), lambda images: images),
        ("folder", lambda images: Named(images, WORDS[::-1])),
    ],
)
def test_classes_of_mixed_sources_are_matched_by_name(digits, seen, tmp_path, train_as, test_as, caplog):
    train, test = (
        str(folder_of(tmp_path / part, part, images)) if form == "folder" else form(images)
        for part, form, images in (("train", train_as, digits[0]), ("test", test_as, digits[1]))
    )
    found, names = seen(train, test)
    assert found == [by_word(images) for images in digits]
    assert sorted(names) == sorted(WORDS)
    assert "trusted" not in caplog.text


def test_where_one_side_has_no_names_it_is_told(digits, seen, tmp_path, caplog):
    train, test = digits
    found, names = seen(train, hugging_face(test))
    assert found == [by_word(images) for images in digits]
    assert list(names) == WORDS
    assert "train: does not name its classes; their order is taken to be that of test" in caplog.text
    seen(train, str(folder_of(tmp_path, "test", test)))
    assert "their order is trusted" in caplog.text
    with pytest.raises(dualhead.UserError, match=r"classes \(zebra.*are not those of train"):
        seen(hugging_face(train), Named(test, ["zebra", *WORDS]))
    with pytest.raises(dualhead.UserError, match=r"keys train, test; give one of its data sets, train=data\[KEY\]"):
        seen({"train": hugging_face(test), "test": hugging_face(test)}, None)


@pytest.mark.parametrize("form", [Named, hugging_face])
def test_names_in_another_order_than_a_data_set_s_number_its_labels_anew(digits, seen, form):
    found, names = seen(form(digits[0], WORDS), form(digits[1], WORDS[::-1]), class_names=sorted(WORDS))
    assert found == [by_word(images) for images in digits]
    assert list(names) == sorted(WORDS)


def test_new_names_for_a_data_set_s_classes_stand_in_its_order(digits, seen):
    new = [word.upper()[::-1] for word in WORDS]
    found, names = seen(Named(digits[0], WORDS), Named(digits[1], WORDS[::-1]), class_names=new)
    assert list(names) == new
    for split, images in zip(found, digits, strict=True):
        assert sorted((pixels, name[::-1].lower()) for pixels, name in split) == by_word(images)
    with pytest.raises(dualhead.UserError, match=r"train: the names of its classes \(zero.*are not among class_names"):
        seen(Named(digits[0], WORDS), digits[1], class_names=["null", *WORDS[1:]])


def test_a_column_for_each_class_is_numbered_as_the_training_images_are(digits, seen):
    class Columns(Named):
        def __getitem__(self, place):
            image, label = super().__getitem__(place)
            return image, torch.nn.functional.one_hot(label, 10)

    found, _ = seen(*(DataLoader(Columns(*each), 50) for each in ((digits[0], WORDS), (digits[1], WORDS[::-1]))))
    assert found == [by_word(images) for images in digits]


def test_a_model_with_a_second_head(digits, tmp_path):
    model = dualhead.attach_second_head(net(), "low", example=digits[0][0][:2], aggregator="mean")
    recipe = {
        **PLAIN,
        "stages": [{"name": "second", "train": ["head2"], "objective": "sat", "attack": "pgd-1", "epochs": 1}],
    }
    run = fitted(model, digits, tmp_path / "run", recipe)
    assert {row.output for row in run.rows} >= {"head1", "head2"}
    again = dualhead.load(tmp_path / "run", "head1", factory=lambda: copy.deepcopy(model))
    x = digits[1][0].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.view("head1").eval()(x))  # what is not trained stays


def test_a_network_that_a_factory_hands_out_again_keeps_its_weights(whole):
    kept = net(seed=9)
    before = copy.deepcopy(kept.state_dict())
    loaded = dualhead.load(whole.run_dir, "head1", factory=lambda: kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())
    assert not torch.equal(next(loaded.parameters()), next(kept.parameters()))
    with pytest.raises(dualhead.UserError, match="must be a function that makes the network, got the network itself"):
        dualhead.load(whole.run_dir, factory=kept)


def test_a_network_that_cannot_be_copied_is_taken_itself_and_a_line_says_so(digits, tmp_path, caplog):
    dualhead.save(torch.nn.Sequential(net()), tmp_path / "saved", example=digits[0][0])
    kept = torch.nn.Sequential(net(seed=9))
    kept.made = torch.ones(1, requires_grad=True) * 2  # torch copies no tensor that was computed with a graph
    before = next(kept.parameters()).clone()
    dualhead.load(tmp_path / "saved", factory=lambda: kept)
    assert "the Sequential that it returned cannot be copied (RuntimeError: " in caplog.text
    assert not torch.equal(next(kept.parameters()), before)


def test_epochs_are_those_of_stages_that_train(digits, tmp_path):
    first, second = ({**PLAIN["stages"][0], "name": name, "epochs": epochs} for name, epochs in (("a", 0), ("b", 2)))
    mixed = {"name": "c", "train": ["model"], "interpolate": {"between": ["a", "b"], "shares": [0.5]}}
    recipe = {**PLAIN, "stages": [first, second, mixed]}
    short = {key: value for key, value in SHORT.items() if not key.startswith("stages.*.attack")}
    run = dualhead.fit(
        net(), *digits, recipe=recipe, overrides=short, eps=0.1, epochs=1, run_dir=tmp_path / "run", progress=False
    )
    told = yaml.safe_load((run.run_dir / "config.yaml").read_text())["stages"]
    assert [stage["epochs"] for stage in told[:2]] == [0, 1]


def moved(model):
    """The same heads, each with weights of its own: they answer otherwise than head 1."""
    for name, tensor in model.head2.named_parameters():
        if name not in model.tied:
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    ("second_head", "own", "told"),
    [("clone", None, None), ("tied", None, ["batch_norm"]), ("tied", ["low.0.bias"], ["low.0.bias"])],
)
def test_heads_that_are_given_keep_their_weights(digits, tmp_path, second_head, own, told):
    given = {"aggregator": "mean", "init": second_head, "own": own, "example": digits[0][0][:2]}
    model = moved(dualhead.attach_second_head(net(), "input", **given))
    stage = {"name": "second", "train": ["head2"], "objective": "sat", "attack": "pgd-1", "keep": "last"}
    recipe = {
        **PLAIN,
        "model": {"second_head": second_head, "attach_at": "low"},
        "stages": [{**stage, "deploy": "mean"}],
    }
    run = fitted(model, digits, tmp_path / "run", recipe, epochs=0)
    x = digits[1][0].float() / 255
    again = dualhead.load(tmp_path / "run", "aggregate", factory=lambda: copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
        assert not torch.equal(model.view("head1")(x), model.view("head2")(x))
    section = yaml.safe_load((run.run_dir / "config.yaml").read_text())["model"]
    assert section["aggregator"] == {"name": "mean"}
    assert section["own"] == told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"recipe": {**PLAIN, "model": {"second_head": "tied"}}},
            "its heads share no tensor, and the recipe ties them",
        ),
        ({"attach_at": "high"}, "has its heads already, behind low"),
    ],
)
def test_given_heads_that_do_not_fit_are_refused(digits, tmp_path, more, said):
    model = dualhead.attach_second_head(net(), "low", example=digits[0][0][:2])
    with pytest.raises(dualhead.UserError, match=said):
        fitted(model, digits, tmp_path / "run", **{"recipe": PLAIN, **more})
    assert not (tmp_path / "run").exists()


def test_a_network_without_an_address_needs_a_factory(digits, tmp_path):
    torch.manual_seed(0)
    model = OwnNet(width=3)  # its class makes another one
    run = fitted(model, digits, tmp_path / "run", PLAIN)
    with pytest.raises(dualhead.UserError, match="factory="):
        dualhead.load(tmp_path / "run")
    with pytest.raises(dualhead.UserError, match="other names or shapes"):
        dualhead.load(tmp_path / "run", factory=OwnNet)
    x = digits[1][0].float() / 255
    (tmp_path / "made.py").write_text("from helpers.own_net import OwnNet\ndef make(): return OwnNet(width=3)\n")
    short = ["--limit", 4, "--attack", "pgd-1", "--data", "digits", "--device", "cpu", "--quiet"]
    assert "--factory package.module:MAKE" in command("evaluate", tmp_path / "run", *short).error_line
    made = ["--factory", tmp_path / "made.py:make"]
    assert command("evaluate", tmp_path / "run", *short, *made).status == 0
    assert command("export", tmp_path / "run", "--to", tmp_path / "out", *made).status == 0
    assert "--factory is for runs" in command("evaluate", tmp_path / "made.py:make", *short, *made).error_line
    again = dualhead.load(tmp_path / "run", factory=lambda: OwnNet(width=3))
    with torch.no_grad():
        assert torch.equal(again(x), run.model(x))
    with pytest.raises(dualhead.UserError, match="OwnNet"):
        fitted(OwnNet(width=3), digits, tmp_path / "other", PLAIN, factory=OwnNet)

    def otherwise():
        network = OwnNet(width=3)
        network.low[2] = torch.nn.Tanh()
        return network

    written = tmp_path / "out/config.json"
    whole = written.read_text()
    written.write_text(json.dumps({**json.loads(whole), "answers": ["rubbish"]}))
    with pytest.raises(dualhead.UserError, match="answers must be logits of two images"):
        dualhead.load(tmp_path / "out", factory=lambda: OwnNet(width=3))
    written.write_text(whole)
    for folder in ("run", "out"):
        with pytest.raises(
            dualhead.UserError, match="with the same weights, answers otherwise than the one that was saved"
        ):
            dualhead.load(tmp_path / folder, factory=otherwise)


def test_what_comes_back(whole, digits, tmp_path):
    assert len(str(whole).splitlines()) >= 1 + len(whole.rows)
    assert all(row.name in str(whole) and row.name in whole._repr_html_() for row in whole.rows)
    assert len(repr(whole)) < 200
    with mock.patch("webbrowser.open") as shown:
        assert whole.report().is_file()
        assert not shown.called
        assert whole.report(open=True).as_uri() in shown.call_args.args
    dualhead.save(whole.model, tmp_path / "mine")
    x = digits[1][0].float() / 255
    with torch.no_grad():
        assert torch.equal(dualhead.load(tmp_path / "mine")(x), whole.model(x))
    ended = command("evaluate", whole.run_dir, "--data", "digits", "--limit", "8", "--attack", "pgd-1", "--json")
    assert ended.status == 0, ended.err


def test_a_model_of_no_run_is_saved_by_an_example(digits, tmp_path):
    model, x = net().eval(), digits[0][0][:4]
    with pytest.raises(dualhead.UserError, match="example"):
        dualhead.save(model, tmp_path / "mine")
    dualhead.save(model, tmp_path / "mine", example=x)
    with torch.no_grad():
        assert torch.equal(dualhead.load(tmp_path / "mine")(x), model(x))
    with pytest.raises(dualhead.UserError, match=r"float16; they must be torch.float32: give model.float\(\)"):
        dualhead.save(net().half(), tmp_path / "half", example=x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x[0], y), "images"),
        (lambda x, y: (x, y[:-1]), "labels"),
        (lambda x, y: DataLoader(TensorDataset(x[:, 0], y), 32), r"1 images .*32 labels.*\(grey: C = 1\)"),
        (lambda x, y: (x, y.float() + 0.5), "integers"),
        (lambda x, y: (x, y - 1), "0 or more"),
        (lambda x, y: (x * 2 - 1, y), r"\[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), "NaN"),
        (lambda x, y: (x.repeat(1, 2, 1, 1), y), "channels"),
        (lambda x, y: (x.repeat(1, 1, 2, 2), y), r"training images are .*16.*, test images .*8.*; data.image_size"),
        (lambda x, y: x, "no labels"),
        (lambda x, y: 7, "int"),
        (lambda x, y: (x, y + 5), "15 classes"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(digits, tmp_path, change, said):
    train, test = digits
    with pytest.raises(dualhead.UserError, match=said) as caught:
        fitted(net(), (change(*train), test), tmp_path / "run", PLAIN)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_images_is_refused(tmp_path):
    with pytest.raises(dualhead.UserError, match=r"data.source"):
        dualhead.fit(net(), recipe=PLAIN, run_dir=tmp_path / "run")


def test_names_mean_the_same_whatever_was_imported_first():
    told = "import dualhead; a = dualhead.attacks; import dualhead.attacks.pgd; dualhead.evaluate; dualhead.fit; "
    told += "assert dualhead.attacks is a and dualhead.attacks.build('pgd-3').steps == 3; "
    told += "import dualhead.objectives as o; assert o is dualhead.objectives and 'trades' in o.names(); "
    told += "assert all(hasattr(dualhead, name) for name in dualhead.__all__)"
    subprocess.run([sys.executable, "-c", told], check=True, timeout=120)


def test_attack_gives_images_within_the_budget_whatever_the_batch(whole, digits):
    x, y = digits[1]
    made = dualhead.attack(whole.model, x, y, "pgd-3", eps="8/255")
    assert made.shape == x.shape and float((made - x.float() / 255).abs().max()) <= 8 / 255 + 1e-6
    torch.testing.assert_close(dualhead.attack(whole.model, x, y, "pgd-3", eps="8/255", batch_size=8), made)
    for wrong in ({}, {"eps": 0.1, "threat": dualhead.ThreatModel("L2", 1)}):
        with pytest.raises(dualhead.UserError, match="eps"):
            dualhead.attack(whole.model, x, y, **wrong)
    with pytest.raises(dualhead.UserError, match="labels"):
        dualhead.attack(whole.model, x, y + 10, eps=0.1)


@pytest.mark.parametrize(("attack", "told"), [("pgd-2", True), ("square-5", False)])
def test_an_attack_that_no_gradient_reaches_says_that_it_is_blind(digits, caplog, attack, told):
    x, y = digits[1]

    class Detached(OwnNet):
        def forward(self, images):
            return super().forward(images.detach())

    dualhead.attack(Detached(), x, y, attack, eps=0.1)
    assert ("no gradient of the model reaches the images" in caplog.text) == told
    caplog.clear()
    dualhead.attack(net(), x, y, attack, eps=0.1)
    assert not caplog.records


def test_an_attack_that_needs_heads_finds_them(whole, digits):
    x, y = digits[1]
    merged = dualhead.load(whole.run_dir, "mean", factory=net)
    assert dualhead.attack(merged, x, y, "multihead-1", eps=0.1).shape == x.shape


def test_functions_are_attacks_and_their_images_come_back(whole, digits, tmp_path):
    x, y = digits[1]

    def gradient_sign(model, images, labels):
        images.requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
        return images + torch.autograd.grad(loss, images)[0].sign()  # far outside; it is confined

    threat = dualhead.ThreatModel("Linf", "30/255")
    found = dualhead.evaluate(
        whole.model, x, y, threat=threat, attacks=[gradient_sign, "fgsm"], return_adversarial=True, diagnostics=False,
        output_dir=tmp_path,
    )  # fmt: skip
    assert found.robust_accuracy["gradient_sign"] == found.robust_accuracy["fgsm"]
    images = found.adversarial("gradient_sign")
    assert float((images - x.float() / 255).abs().max()) <= 30 / 255 + 1e-6
    with torch.no_grad():
        answers = whole.model(images).argmax(1)
    assert float((answers == y).float().mean()) == pytest.approx(found.robust_accuracy["gradient_sign"])
    with pytest.raises(dualhead.UserError, match="must return images"):
        dualhead.evaluate(whole.model, x, y, threat=threat, attacks=[lambda m, a, b: a[:1]], diagnostics=False)
    assert len(repr(found)) < 200


# ---- natural guesses


def seen_as(digits, **changed):
    """The recipe that a call of `fit` means, and its images, with arguments changed."""
    given = {"model": net(), "train": digits[0], "test": digits[1], "recipe": PLAIN, "progress": False, **changed}
    with mock.patch("dualhead.commands.fit.train_run", lambda recipe, **_: (recipe, load_images(recipe, Path("run")))):
        return dualhead.fit(**given)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.permute(0, 2, 3, 1), y),
        lambda x, y: (x[:, 0], y),
        lambda x, y: (x.double(), y),
        lambda x, y: (x * 255, y),
        lambda x, y: ((x * 255).bfloat16(), y),
        lambda x, y: ((x * 255).round().byte(), y),
        lambda x, y: (x.clone().requires_grad_(), y),
        lambda x, y: (x, torch.eye(10)[y]),
        lambda x, y: (x, torch.eye(10).long()[y]),
        lambda x, y: (x, y[:, None]),
        lambda x, y: (x, y.float()),
        lambda x, y: (x, y.tolist()),
        lambda x, y: (list(x), list(y)),
        lambda x, y: [x.numpy(), y.numpy()],
    ],
)
def test_images_and_labels_as_newcomers_have_them_are_the_same_images(digits, change):
    usual, changed = (seen_as(digits, train=train)[1].training for train in (digits[0], change(*digits[0])))
    assert torch.equal(usual.images[:], changed.images[:])
    assert torch.equal(usual.labels, changed.labels)


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ({"device": torch.device("cpu")}, lambda recipe: recipe.runtime.device, "cpu"),
        ({"overrides": "stages.*.epochs=3"}, lambda recipe: recipe.stages[0].epochs, 3),
        ({"epochs": "3"}, lambda recipe: recipe.stages[0].epochs, 3),
        ({"eps": "8 / 255"}, lambda recipe: recipe.threat.eps, 8 / 255),
        ({"overrides": {"threat.norm": "l2"}}, lambda recipe: recipe.threat.norm, "L2"),
    ],
)
def test_arguments_as_newcomers_write_them_are_understood(digits, more, key, value):
    assert key(seen_as(digits, **more)[0]) == value


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": OwnNet}, "got the class OwnNet"),
        ({"model": "resnet-19"}, "model.depth: input should be 18, 34 or 50"),
        ({"recipe": "digit"}, "did you mean 'digits'"),
        (
            {"recipe": ["digits"]},
            "must be the name of a shipped recipe, a path, a mapping or a Recipe, got list",
        ),
        ({"recipe": {}}, "threat: missing"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": "eight"}, "'eight' is not a number"),
        ({"epochs": 1.5}, "stages.main.epochs: input should be a valid integer"),
        ({"seed": -1}, "runtime.seed: input should be greater than or equal to 0"),
        ({"overrides": ["epochs"]}, "write KEY=VALUE"),
        ({"class_names": ["a", "b"]}, r"labels must lie in 0\.\.1"),
        ({"train": ([[1, 2], "x"], [0, 1])}, "a list of images must hold tensors or arrays"),
    ],
)
def test_arguments_that_cannot_be_are_told_in_one_line(digits, more, said):
    with pytest.raises(dualhead.UserError, match=said) as caught:
        seen_as(digits, **more)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, y: dualhead.attack(m, x, y, "pdg-10", eps=0.1), "did you mean 'pgd'"),
        (lambda m, x, y: dualhead.attack(m, x, y, ["pgd-2"], eps=0.1), "is one attack"),
        (lambda m, x, y: dualhead.attack(m, x, y, 5, eps=0.1), "attack: must be an attack, .*; got 5"),
        (lambda m, x, y: dualhead.attack(m, x, y, eps=0.1, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m, x, y: dualhead.attack(m, x, y, eps=0.1, seed=0.5), "seed must be a whole number, got 0.5"),
        (lambda m, x, y: dualhead.attack(x, y, m, "pgd-2", eps=0.1), r"the order is attack\(model, images, labels"),
        (lambda m, x, y: dualhead.attack("resnet18", x, y, eps=0.1), "must be a torch.nn.Module, got str"),
        (lambda m, x, y: dualhead.attack(m, x.permute(0, 2, 3, 1), y, eps=0.1), r"permute\(0, 3, 1, 2\)"),
        (lambda m, x, y: dualhead.attack(m, x[0], y[0], eps=0.1), "must have shape"),
        (lambda m, x, y: dualhead.attack(m, x, torch.eye(10)[y], eps=0.1), "one per image"),
        (lambda m, x, y: dualhead.attack(m, x, y, eps=8), "did you mean 8/255"),
        (lambda m, x, y: dualhead.attack(m, x, ["ant"] * len(x), eps=0.1), "labels: must be integers"),
        (lambda m, x, y: dualhead.attack(m, x.repeat(1, 3, 1, 1), y, eps=0.1), r"fails on one image of shape \(3"),
        (lambda m, x, y: dualhead.attack("runs/g", x, y, eps=0.1), r"dualhead.load\('runs/g'\) gives"),
        (lambda m, x, y: dualhead.save("mine", m), r"save\(model, path\)"),
        (lambda m, x, y: dualhead.train(m), r"dualhead.fit\(model, ...\) trains one"),
        (lambda m, x, y: dualhead.load("nowhere"), "nowhere: there is no such folder"),
        (lambda m, x, y: dualhead.load("resnet-18"), "the name of a network, which has no weights"),
        (lambda m, x, y: dualhead.load(__file__), "test_fit.py:FUNCTION, a function in it that makes the network"),
        (
            lambda m, x, y: dualhead.save(m, "new", example=(1, 8, 8)),
            "example must be a tensor of images",
        ),
        (lambda m, x, y: dualhead.save(m, "new", example=x[0]), "example must be a tensor of images"),
        (lambda m, x, y: dualhead.save(m, "new", example=x.repeat(1, 3, 1, 1)), r"fails on images of shape \[3, 8, 8"),
        (lambda m, x, y: dualhead.energy(m, x), "must be floating in .0, 1., got torch.uint8"),
        (lambda m, x, y: dualhead.counterfactual(m, x, 3), "must be floating in .0, 1., got torch.uint8"),
    ],
)
def test_calls_in_the_wrong_order_or_words_are_told(digits, call, said):
    with pytest.raises(dualhead.UserError, match=said):
        call(net().eval(), *digits[1])
