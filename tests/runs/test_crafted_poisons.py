"""Poisons that need a surrogate: its recipe, the budget, what is kept, and that a run without it is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from dualhead.data import Found, Search, Split, Surrogate, load_split, poisons
from dualhead.data.poisons.entangled import Entangling
from dualhead.data.poisons.error_minimising import Alternating, Turns
from dualhead.data.poisons.gradient_matching import Aligning, gradient, misalignment
from dualhead.errors import Interrupted, UserError
from dualhead.noise import Streams
from dualhead.recipe import load_recipe
from dualhead.runs import crafting
from dualhead.runs.crafted import Crafted, surrogate_recipe, without_poison
from dualhead.runs.crafting import Crafting, craft
from dualhead.runs.images import load_images
from dualhead.runs.prepare import prepare
from dualhead.runs.run import train
from dualhead.runs.trial import trial
from dualhead.threats import ThreatModel
from dualhead.training import Silent
from dualhead.training.optimisation import optimisers
from helpers.plugins import nothing_from_outside

TINY = (
    "data.train_limit=80", "data.validation=20", "data.augment=[]", "model.backbone=cnn-4", "stages.natural.epochs=1",
    "stages.natural.batch_size=20", "evaluate={attacks: [fgsm], limit: 30, gallery: 0}",
    "validation.attack=fgsm", "runtime={device: cpu, precision: float32, layout: contiguous, lanes: 1}",
)  # fmt: skip
TOWARDS = "data.poison={name: towards, shift: 0, eps: 16/255, steps: 4, surrogate: {epochs: 3}}"
CONSISTENT = (
    "data.poison={name: label_consistent, target: 3, eps: 0.1, steps: 3, surrogate: {objective: natural, epochs: 1}}"
)


def recipe(*more):
    return load_recipe("digits_natural", [*TINY, *more])


NO_AIM = torch.zeros(0, 1, 8, 8, dtype=torch.uint8)


def never():
    return False


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose poison is made, and which has not begun."""
    path = tmp_path_factory.mktemp("crafted") / "run"
    craft(recipe(TOWARDS), path, Silent(), never)
    return path


def test_images_stay_within_eps_and_a_network_likes_them_better(made):
    poisoning = prepare(recipe(TOWARDS), made).images.poisoning
    assert len(poisoning.made.index) == 80
    assert 0 < float(poisoning.made.linf.max()) <= 16 / 255
    assert torch.equal(poisoning.made.old_label, poisoning.made.new_label)
    (folder,) = (path for path in (made / "poison").iterdir() if path.is_dir())
    setting = poisons.build(recipe(TOWARDS).data.poison).surrogate
    prepared = prepare(surrogate_recipe(recipe(TOWARDS), setting), folder)
    model = prepared.model
    with torch.no_grad():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        model.eval()
        before, after = (
            torch.nn.functional.cross_entropy(model(images.float() / 255), poisoning.clean.labels)
            for images in (poisoning.clean.images, poisoning.made.split.images)
        )
    assert after < before
    assert prepared.images.poisoning is None


def test_what_it_cost_is_kept_with_it(made):
    facts = prepare(recipe(TOWARDS), made).images.poisoning.made.facts
    assert facts["surrogate"]["epochs"] == 3
    assert facts["surrogate"]["flops"] > 0
    assert facts["search"]["forward_passes"] == 4 * 80


def test_it_is_made_once_and_for_any_seed_of_the_run(made, monkeypatch):
    monkeypatch.setattr(crafting, "train_stages", None)
    craft(recipe(TOWARDS), made, Silent(), never)
    first = prepare(recipe(TOWARDS), made).images.poisoning.facts()
    with pytest.raises(TypeError):  # another search is made anew
        craft(recipe(TOWARDS.replace("steps: 4", "steps: 5").replace("epochs: 3", "epochs: 2")), made, Silent(), never)
    assert prepare(recipe(TOWARDS), made).images.poisoning.facts() == first


def test_a_run_that_nobody_made_it_for_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"data\.poison: towards: was not made yet; `dualhead train` makes it"):
        prepare(recipe(TOWARDS), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stopped_surrogate_goes_on(tmp_path, made):
    with pytest.raises(Interrupted):
        craft(recipe(TOWARDS), tmp_path / "run", Silent(), lambda: True)
    craft(recipe(TOWARDS), tmp_path / "run", Silent(), never)
    again = prepare(recipe(TOWARDS), tmp_path / "run").images.poisoning.facts()
    assert again == prepare(recipe(TOWARDS), made).images.poisoning.facts()


def test_a_recipe_that_cannot_be_trained_is_refused_before_a_surrogate_is(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        craft(recipe(TOWARDS, "stages.natural.init=nowhere"), tmp_path / "run", Silent(), never)
    assert not (tmp_path / "run").exists()


def test_the_surrogate_is_of_the_victims_backbone_or_the_victim_itself():
    given = load_recipe("digits", ["data.poison={name: towards, surrogate: {objective: sat, eps: 2/255, epochs: 10}}"])
    made = surrogate_recipe(given, given.data.poison.surrogate)
    assert made.data.poison is None
    assert made.model.backbone == given.model.backbone
    assert made.model.attach_at is None
    (stage,) = made.stages
    assert (stage.objective.registered_name, stage.epochs, made.threat.eps) == ("sat", 10, 2 / 255)
    assert made.runtime.seed != given.runtime.seed
    given = load_recipe("cifar10_cpu", ["data.poison={name: towards, surrogate: {objective: sat, eps: 2/255}}"])
    (stage,) = surrogate_recipe(given, given.data.poison.surrogate).stages
    assert given.stages[0].attack.step_size == pytest.approx(4 / 255)
    assert stage.attack.step_size == pytest.approx(1 / 255)  # as long for its eps as the victim's
    own = load_recipe("digits", ["data.poison={name: towards, surrogate: {objective: self}}"])
    adaptive = surrogate_recipe(own, own.data.poison.surrogate)
    assert adaptive.stages == own.stages
    assert adaptive.model == own.model
    assert adaptive.data.poison is None


def test_label_consistent_images_are_of_the_target_and_carry_the_patch(tmp_path):
    craft(recipe(CONSISTENT), tmp_path / "run", Silent(), never)
    poisoning = prepare(recipe(CONSISTENT), tmp_path / "run").images.poisoning
    made = poisoning.made
    assert set(made.old_label.tolist()) == set(made.new_label.tolist()) == {3}
    changed = made.split.images[made.index].int() - poisoning.clean.images[made.index].int()
    outside = changed.clone()
    outside[:, :, 5:, 5:] = 0
    assert 0 < int(outside.abs().max()) <= 25
    assert (made.split.images[made.index][:, :, 7, 7] == 255).all()


def test_a_sham_and_a_removal_know_what_the_poison_touches(made):
    like = TOWARDS.removeprefix("data.poison=").replace("towards,", "towards, share: 0.5,")
    for control in ("sham", "remove"):
        given = recipe(f"data.poison={{name: {control}, like: {like}}}")
        craft(given, made, Silent(), never)
        assert given.data.poison.needs_surrogate
        images = prepare(given, made).images
        assert len(images.poisoning.made.index) == 40
        assert len(images.training) == 60 if control == "sham" else 20


def test_the_cost_of_the_victim_is_told_without_a_surrogate():
    assert trial(recipe(TOWARDS)).forward_equivalents == trial(recipe()).forward_equivalents


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{name: towards, steps: 0}", "data.poison: steps must be at least 1"),
        ("{name: towards, surrogate: {objectiv: sat}}", r"data.poison.surrogate.objectiv: unexpected|unknown key"),
        ("{name: towards, surrogate: {epochs: 0}}", "epochs must be at least 1"),
        ("{name: towards, eps: 0}", "eps must be"),
    ],
)
def test_impossible_settings_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        recipe(f"data.poison={spec}")


def test_it_survives_yaml():
    given = recipe(TOWARDS)
    assert json.loads(json.dumps(given.resolved()["data"]["poison"]))["surrogate"]["epochs"] == 3


# ---- features of classes mixed up


ENTANGLED = "data.poison={name: entangled, way: WAY, eps: 0.1, steps: 6, surrogate: {objective: natural, epochs: 2}}"


def test_features_are_pushed_from_the_own_centre_or_pulled_to_the_nearest_other():
    pushed = Entangling(Surrogate(), ThreatModel("Linf", 0.1), 0, 1, None, towards=False)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0], [torch.inf, torch.inf]])  # no image of the last class
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    assert pushed.distance(features, torch.tensor([0, 1]), centres).tolist() == [0.0, 10.0]  # (2^2 + 4^2) / 2
    pulled = replace(pushed, towards=True).distance(features, torch.tensor([0, 2]), centres)
    assert pulled.tolist() == [-0.5, -10.0]  # to the second centre, both
    (slope,) = torch.autograd.grad(pulled.sum(), features)
    assert slope.tolist() == [[1.0, 0.0], [-2.0, -4.0]]  # of -|f - c|^2 / 2


@pytest.mark.parametrize("way", ["push", "pull"])
def test_entangled_images_stay_within_eps_and_leave_their_class(tmp_path, way):
    given = recipe(ENTANGLED.replace("WAY", way))
    craft(given, tmp_path / "run", Silent(), never)
    poisoning = prepare(given, tmp_path / "run").images.poisoning
    made, clean = poisoning.made, poisoning.clean
    assert 0 < float(made.linf.max()) <= 0.1
    assert torch.equal(made.old_label, made.new_label)
    (folder,) = (path for path in (tmp_path / "run" / "poison").iterdir() if path.is_dir())
    prepared = prepare(surrogate_recipe(given, given.data.poison.surrogate), folder)
    from safetensors.torch import load_file

    prepared.model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    prepared.model.eval()
    climbed = given.data.poison.search().climbed(clean, crafting.Bench(prepared, prepared.model, NO_AIM, never))
    with torch.no_grad():
        before, after = (
            climbed(images.float() / 255, clean.labels).mean() for images in (clean.images, made.split.images)
        )
    assert after > before


def test_merged_heads_have_no_features_to_mix_up(tmp_path):
    tiny = [word for word in TINY if not word.startswith("stages.")]
    given = load_recipe(
        "digits",
        [*tiny, "stages.*.epochs=1", "stages.*.batch_size=20", "stages.*.attack.steps=1",
         "data.poison={name: entangled, steps: 1, surrogate: {objective: self}}"],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data\.poison: entangled: surrogate\.objective: its output is the aggregate"):
        craft(given, tmp_path / "run", Silent(), never)


# ---- error-minimising noise


def turns(search, images, labels):
    """Turns on a linear classifier of two pixels, whose rate of learning is 0.1."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        model[1].bias.zero_()
    clean = Split(images, labels, ("a", "b"))
    sgd = optimisers.build({"name": "sgd", "lr": 0.1, "momentum": 0, "nesterov": False})
    bench = SimpleNamespace(
        model=model, device=torch.device("cpu"), batch_size=2, optimiser=lambda: sgd.create(list(model.parameters()))
    )
    return Turns(search, clean, torch.arange(len(labels)), labels, bench), model


def test_noise_descends_the_loss_within_its_budget_from_where_it_is():
    images = torch.tensor([[[[100, 100]]], [[[100, 1]]]], dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    search = Alternating(Surrogate(), ThreatModel("Linf", 0.02), 0, 3, 0.004, towards=True)
    made, _ = turns(search, images, labels)
    made.search()
    # Class 0 is the likelier the larger w x with w = (1, -2): its image moves by + and -, that of class 1 by - and +.
    start, sign = images.float() / 255, torch.tensor([[[[1.0, -1.0]]], [[[-1.0, 1.0]]]])
    torch.testing.assert_close(made.images, start + 0.012 * sign)
    made.search()
    torch.testing.assert_close(made.images, start + 0.02 * sign)  # 24 thousandths, cut to the budget


def test_a_round_of_training_is_steps_on_the_changed_images():
    images = torch.tensor([[[[255, 0]]], [[[0, 255]]]], dtype=torch.uint8)
    labels = torch.tensor([1, 0])
    search = Alternating(Surrogate(), ThreatModel("Linf", 0.1), 0, 1, 0.1, towards=True, batches=1)
    made, model = turns(search, images, labels)
    assert made.error() == 1.0
    by_hand = torch.nn.functional.cross_entropy(model(made.images), labels)
    slopes = torch.autograd.grad(by_hand, list(model.parameters()))
    expected = [p.detach() - 0.1 * g for p, g in zip(model.parameters(), slopes, strict=True)]
    decay = optimisers.build({"name": "sgd", "lr": 0.1}).weight_decay
    expected = [e - 0.1 * decay * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    made.train(0)
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_error_minimising_images_are_easy_and_within_eps(tmp_path, caplog):
    given = recipe("data.poison={name: error_minimising, eps: 0.2, steps: 5, batches: 4, rounds: 12, error: 0.05}")
    craft(given, tmp_path / "run", Silent(), never)
    poisoning = prepare(given, tmp_path / "run").images.poisoning
    facts = poisoning.made.facts
    assert 0 < float(poisoning.made.linf.max()) <= 0.2
    assert torch.equal(poisoning.made.old_label, poisoning.made.new_label)
    assert facts["surrogate"]["rounds"] <= 12
    assert (facts["surrogate"]["training_error"] <= 0.05) == ("still errs" not in caplog.text)
    passes = facts["surrogate"]["rounds"] * (5 * 80 + 4 * 20)
    assert facts["search"]["forward_passes"] == passes
    again = recipe("data.poison={name: error_minimising, eps: 0.2, steps: 5, batches: 4, rounds: 12, error: 0.05}")
    craft(again, tmp_path / "other", Silent(), never)
    assert prepare(again, tmp_path / "other").images.poisoning.facts() == poisoning.facts()


def test_error_minimising_noise_that_is_stopped_begins_anew(tmp_path):
    given = recipe("data.poison={name: error_minimising, steps: 2, rounds: 1}")
    with pytest.raises(Interrupted, match="begins it anew"):
        craft(given, tmp_path / "run", Silent(), lambda: True)
    craft(given, tmp_path / "run", Silent(), never)
    assert len(prepare(given, tmp_path / "run").images.poisoning.made.index) == 80


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{name: error_minimising, error: 1}", r"error in \(0, 1\)"),
        ("{name: error_minimising, batches: 0}", "batches and rounds must be at least 1"),
        ("{name: entangled, way: sideways}", "push"),
    ],
)
def test_impossible_searches_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        recipe(f"data.poison={spec}")


# ---- gradients matched


MATCHING = (
    "data.poison={name: gradient_matching, image: IMAGE, target: 3, share: 0.1, eps: 0.2, steps: 12, "
    "surrogate: {epochs: 2}}"
)


def test_misalignment_is_that_of_the_angle():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    parameters = list(model.parameters())
    x, y = torch.rand(1, 1, 2, 2), torch.tensor([1])
    goal = gradient(model, parameters, x, y)
    chance = torch.softmax(model(x), 1)[0, 0]
    torch.testing.assert_close(goal[0], torch.stack((chance * x.flatten(), -chance * x.flatten())))  # (p - y) x
    same = gradient(model, parameters, 0.5 * x, y)
    assert float(misalignment(goal, same)) == pytest.approx(0.0, abs=1e-6)
    opposite = gradient(model, parameters, x, torch.tensor([0]))
    assert float(misalignment(goal, opposite)) == pytest.approx(2.0, abs=1e-6)


def test_images_are_aligned_within_their_budget():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    parameters = list(model.parameters())
    x, y = torch.rand(5, 1, 2, 4), torch.full((5,), 2)
    goal = gradient(model, parameters, torch.rand(1, 1, 2, 4), torch.tensor([2]))
    search = Aligning(Surrogate(), ThreatModel("Linf", 0.1), 0, 40, 0.01)
    found, value = search.aligned(model, parameters, goal, x, y, Streams.of(0, torch.arange(5)))
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert value < float(misalignment(goal, gradient(model, parameters, x, y)))


def test_matched_images_are_of_the_wanted_class_and_the_aim_is_measured(tmp_path):
    labels = load_split("digits", "test").labels
    image = int((labels != 3).nonzero()[0])
    given = recipe(MATCHING.replace("IMAGE", str(image)))
    craft(given, tmp_path / "run", Silent(), never)
    poisoning = prepare(given, tmp_path / "run").images.poisoning
    assert poisoning.made.old_label.tolist() == poisoning.made.new_label.tolist() == [3] * 8
    assert 0 < float(poisoning.made.linf.max()) <= 0.2
    assert 0 <= poisoning.made.facts["search"]["misalignment"] <= 2
    result = train(given, run_dir=tmp_path / "run")
    told = json.loads((result.run_dir / "evaluation" / "results.json").read_text())["poison"]["aimed"]
    assert (told["image"], told["wanted"], told["class"]) == (image, "3", str(int(labels[image])))
    assert told["success"] == (told["taken_for"] == "3")


def test_an_image_of_the_wanted_class_is_no_aim(tmp_path):
    labels = load_split("digits", "test").labels
    for image, message in (
        (int((labels == 3).nonzero()[0]), r"data\.poison: gradient_matching: image: test image \d+ is of class '3'"),
        (10_000, r"image: there is no test image 10000; they are 0 to 399"),
    ):
        with pytest.raises(UserError, match=message):
            craft(recipe(MATCHING.replace("IMAGE", str(image))), tmp_path / "run", Silent(), never)


# ---- what was found before


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (
            "{name: towards, shift: 1, eps: 16/255, steps: 4, surrogate: {objective: sat, epochs: 3}}",
            "a3d285753b63b7015a5c4983",
        ),
        ("{name: label_consistent, target: 3, eps: 0.1, step_size: 0.01, steps: 3}", "26285e421b5f5d3b3fe0d6b3"),
        ("{name: entangled, way: pull, norm: L2, eps: 0.1, steps: 6, share: 0.5, seed: 4}", "e581ef9c4a603c12dbbdbb9f"),
        (
            "{name: error_minimising, eps: 0.2, steps: 5, batches: 4, rounds: 12, error: 0.05}",
            "1a64d141f891aac164af7306",
        ),
        ("{name: gradient_matching, image: 1, target: 3, share: 0.1, eps: 0.2, steps: 12}", "86e1b341f7c8dfa4ad8fe4e8"),
        ("{name: gradient_matching, image: 1, target: 3, restarts: 2, step_size: 1/255}", "8a4f0a9d8a020d1f2088ec9b"),
    ],
)
def test_what_was_found_before_is_found_by_the_same_key(tmp_path, spec, key):
    given, asked = recipe(f"data.poison={spec}"), []

    class Asked(Crafted):
        def find(self, *search):
            asked.append(self.key(*search))
            return super().find(*search)

    images = load_images(without_poison(given), tmp_path)
    with pytest.raises(UserError, match="was not made yet"):
        given.data.poison.apply(images.training, Asked(given, tmp_path, images.test))
    assert asked == [key]


# ---- a search of one's own


OWN = """
from dataclasses import dataclass
from typing import ClassVar

from dualhead.data import Found, Search, Searched, Surrogate
from dualhead.threats import ThreatModel


@dataclass(frozen=True)
class Brighter(Search):
    trained: ClassVar[bool] = TRAINED

    def find(self, clean, index, labels, bench):
        x = clean.images[index].to(bench.device).float() / 255
        right = bench.model(x).argmax(1) == labels.to(bench.device)
        threat = self.threat.for_images(clean.image_shape)
        change = threat.eps * (2 * right.float() - 1)
        found = threat.project(x + change[:, None, None, None], x)
        return Found(found, len(index), 0, search={"right": int(right.sum())})

    @property
    def cost(self):
        return "the training of a surrogate, and a pass for each changed image"


@dataclass(frozen=True)
class Mine(Searched):
    share: float = 0.5
    eps: float = 0.1
    surrogate: Surrogate = Surrogate(epochs=2)
    seed: int = 0

    def search(self):
        return Brighter(self.surrogate, ThreatModel("Linf", self.eps), self.seed)
"""


@pytest.mark.parametrize("trained", [True, False])
def test_a_search_of_ones_own_is_a_file(tmp_path, trained):
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(OWN.replace("TRAINED", str(trained)))
    with nothing_from_outside():
        given = recipe(f"data.poison={{name: '{file}:Mine', eps: 0.2}}")
        assert given.data.poison.cost.startswith("the training of a surrogate, and a pass for each changed image; ")
        craft(given, run, Silent(), never)
        poisoning = prepare(given, run).images.poisoning
        made, facts = poisoning.made, poisoning.made.facts
        assert len(made.index) == 40
        assert 0 < float(made.linf.max()) <= 0.2
        change = made.split.images[made.index].int() - poisoning.clean.images[made.index].int()
        assert int((change.flatten(1).sum(1) > 0).sum()) == facts["search"]["right"]
        assert (facts["search"]["forward_passes"], facts["search"]["backward_passes"]) == (40, 0)
        assert ("flops" in facts["surrogate"]) == trained
        assert train(given, run_dir=run).rows


def test_another_version_of_the_file_searches_anew(tmp_path):
    file, run = tmp_path / "own.py", tmp_path / "run"
    words = f"data.poison={{name: '{file}:Mine'}}"
    with nothing_from_outside():
        for text, kept in ((OWN, 1), (OWN, 1), (OWN + "# another version\n", 2)):
            file.write_text(text.replace("TRAINED", "False"))
            craft(recipe(words), run, Silent(), never)
            assert len(list((run / "poison").glob("*.safetensors"))) == kept


@dataclass(frozen=True)
class Given(Search):
    """A search that finds what it is told to; its surrogate needs no training."""

    trained = False
    images: torch.Tensor | None = None

    def find(self, clean, index, labels, bench):
        return Found(self.images, 0, 0)

    @property
    def cost(self):
        return "nothing"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 1, 8, 8), r"Given\.find gave torch\.float32 images of shape \[3, 1, 8, 8\]; .* \[4, 1, 8, 8\]"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"Given\.find gave torch\.uint8 images"),
        (torch.full((4, 1, 8, 8), 1.5), r"Given\.find gave images with values outside of \[0, 1\]"),
        (torch.full((4, 1, 8, 8), torch.nan), r"Given\.find gave images with values outside of \[0, 1\]"),
    ],
)
def test_images_that_a_search_cannot_have_found_are_refused(tmp_path, images, message):
    given = load_images(recipe(), tmp_path)
    search, index = Given(Surrogate(), ThreatModel("Linf", 0.1), 0, images), torch.arange(4)
    with pytest.raises(UserError, match=message):
        Crafting(recipe(), tmp_path, given.test).find(given.training, index, given.training.labels[index], search)
    assert not list(tmp_path.rglob("*.safetensors"))


def bench(*layers):
    model = torch.nn.Sequential(*layers)
    stages = [SimpleNamespace(batch_size=2)]
    prepared = SimpleNamespace(device=torch.device("cpu"), output="model", recipe=SimpleNamespace(stages=stages))
    return crafting.Bench(prepared, model, NO_AIM, never)


def test_features_are_given_to_the_last_linear_layer():
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    scaled = bench(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    seen = scaled.features(x)
    assert torch.equal(seen, scaled.model[:3](x))
    assert seen.requires_grad
    with pytest.raises(UserError, match="the surrogate has no linear layer"):
        bench(torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten()).features(x)


def test_an_attack_that_climbs_its_own_losses_is_not_lent():
    with pytest.raises(UserError, match="climbs only losses of its own; use pgd"):
        bench(torch.nn.Flatten()).attacked(
            {"name": "square"}, lambda x: x.sum((1, 2, 3)), torch.rand(1, 1, 2, 2), ThreatModel("Linf", 0.1),
            Streams.of(0, torch.arange(1)),
        )  # fmt: skip
