"""Recipes: the shipped ones, what their settings are published to be, and how files, parents and overrides combine."""

from pathlib import Path

import pytest
import yaml

from dualhead.errors import UserError
from dualhead.recipe.schema import Recipe, parse_recipe
from dualhead.recipe.yaml import load_recipe, recipe_content, shipped_recipes
from dualhead.threats.lp import ThreatModel

MINIMAL = """
data: {source: digits, validation: 100}
model: {backbone: cnn-8}
threat: {eps: 0.1}
stages:
  - {name: one, train: [model], objective: sat, epochs: 2}
"""


@pytest.fixture
def write(tmp_path):
    def write_recipe(text=MINIMAL, name="mine.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_comes_back_through_yaml(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    plain = recipe.resolved()
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False)))
    assert again == recipe
    assert again.resolved() == plain


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_says_what_it_is(name):
    from importlib import resources

    assert (resources.files("dualhead.recipe.shipped") / f"{name}.yaml").read_text().startswith("# ")


# ---- what is published

STAGES = ("main_head", "second_head", "aggregator")
PARTS = (("trunk", "head1"), ("head2",), ("aggregator",))


def rows_of(recipe: Recipe):
    """What papers give of each stage."""
    return [
        (
            stage.objective.registered_name, getattr(stage.objective, "beta", None), stage.epochs,
            stage.optimiser.lr, stage.optimiser.weight_decay, stage.schedule.milestones,
        )
        for stage in recipe.stages
    ]  # fmt: skip


# name: eps, step size, start, then a row per stage: objective, beta, epochs, lr, weight decay, epochs before the drops
TRADES_ROWS = [
    ("trades", 6, 76, 0.1, 2e-4, (74,)),
    ("trades", 3, 76, 0.1, 2e-4, (74,)),
    ("trades", 3, 60, 0.1, 2e-4, (24, 39, 49)),
]
SAT_ROWS = [
    ("sat", None, 200, 0.1, 5e-4, (100, 150)),
    ("sat", None, 76, 0.1, 5e-4, (74,)),
    ("sat", None, 60, 0.1, 5e-4, (24, 39, 49)),
]
PUBLISHED = {
    "cifar10_wrn34": (0.031, 0.007, "gaussian", TRADES_ROWS),
    "cifar10_resnet18": (0.031, 0.007, "gaussian", TRADES_ROWS),
    "cifar10_wrn34_sat": (8 / 255, 2 / 255, "uniform", SAT_ROWS),
    "cifar10_resnet18_sat": (8 / 255, 2 / 255, "uniform", SAT_ROWS),
    "cifar10_wrn34_mart": (
        8 / 255, 2 / 255, "gaussian",
        [
            ("mart", 6, 90, 0.1, 7e-4, (74, 89)),
            ("mart", 3, 76, 0.1, 7e-4, (74,)),
            ("mart", 3, 60, 0.1, 7e-4, (24, 39, 49)),
        ],
    ),
    "cifar10_resnet18_mart": (
        8 / 255, 2 / 255, "gaussian",
        [
            ("mart", 5, 120, 0.01, 3.5e-3, (74, 89)),
            ("mart", 2.5, 76, 0.01, 3.5e-3, (74,)),
            ("mart", 2.5, 60, 0.01, 3.5e-3, (24, 39, 49)),
        ],
    ),
}  # fmt: skip


TWO_ROUTES = {"cifar10_resnet18_dual_bn", "cifar10_resnet18_advprop"}
"""Recipes of one stage with two routes; see below."""


def test_the_table_names_every_recipe_with_published_settings():
    ours = ("guided_distillation", "aligned", "ar_at", "dual_bn", "advprop", "dat", "union")
    published = [n for n in shipped_recipes() if not n.endswith(ours)]  # of others there is nothing to be held to here
    assert set(PUBLISHED) == {n for n in published if n.startswith(("cifar10_wrn34", "cifar10_resnet18"))}


@pytest.mark.parametrize("name", sorted(TWO_ROUTES))
def test_routes_are_told_apart_by_batch_norm_alone(name):
    recipe = load_recipe(name)
    (stage,) = recipe.stages
    assert recipe.model.tied == ("batch_norm",)
    assert (stage.objective.clean, stage.objective.robust, stage.objective.alpha) == ("head1", "head2", 0.5)
    assert stage.output == ("head1" if "advprop" in name else "head2")
    assert stage.keep == "last"  # robust accuracy alone would choose another epoch for the clean route


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    eps, step_size, start, rows = PUBLISHED[name]
    recipe = load_recipe(name)
    assert recipe.threat == ThreatModel("Linf", eps)
    assert recipe.data.source == "uoft-cs/cifar10"
    assert [a.registered_name for a in recipe.data.augment] == ["pad_crop", "flip"]
    assert recipe.data.augment[0].padding == 4
    backbone = recipe.model.backbone
    if "wrn34" in name:
        assert (backbone.registered_name, backbone.depth, backbone.width) == ("wideresnet", 34, 10)
        assert recipe.model.attach_at == "block1"
    else:
        assert (backbone.registered_name, backbone.depth) == ("resnet", 18)
        assert recipe.model.attach_at == "layer1"
    assert recipe.model.aggregator.registered_name == "pairwise_cnn"
    assert tuple(stage.name for stage in recipe.stages) == STAGES
    assert tuple(stage.train for stage in recipe.stages) == PARTS
    assert rows_of(recipe) == rows
    for stage in recipe.stages:
        assert (stage.attack.registered_name, stage.attack.steps, stage.attack.restarts) == ("pgd", 10, 1)
        assert stage.attack.step_size == pytest.approx(step_size)
        assert stage.attack.start == start
        assert stage.attack_mode == "eval"
        assert stage.forward == "separate"
        assert stage.batch_size == 128
        assert (stage.optimiser.momentum, stage.optimiser.nesterov) == (0.9, False)
        assert stage.schedule.gamma == 0.1
    assert recipe.validation.attack.steps == 10
    assert recipe.validation.attack.step_size == pytest.approx(step_size)
    assert list(recipe.evaluate.attacks) == ["pgd-40", "autoattack"]
    assert recipe.evaluate.limit is None


PAPERS = [
    name for name in shipped_recipes()
    if len(stages := (recipe := load_recipe(name)).stages) >= 3
    and recipe.sequence is None and all(stage.fit is None for stage in stages)
]  # fmt: skip
"""Those of the paper's three stages."""


@pytest.mark.parametrize("name", PAPERS)
def test_the_second_head_leans_to_clean_accuracy_by_half_of_beta(name):
    betas = [getattr(s.objective, "beta", None) for s in load_recipe(name).stages if s.name in STAGES]
    assert betas[1] == betas[2]
    assert betas[0] is None or betas[1] == betas[0] / 2


# ---- files, parents, names


def test_defaults_are_what_the_fields_say(write):
    recipe = load_recipe(write())
    assert recipe.name == "mine"
    assert recipe.threat == ThreatModel("Linf", 0.1)
    assert recipe.stages[0].attack.label == "pgd-10"
    assert recipe.stages[0].optimiser.registered_name == "sgd"
    assert recipe.runtime.device == recipe.runtime.precision == "auto"
    assert recipe.evaluate.attacks == ("pgd-40",)


def test_corruptions_stand_among_the_attacks_and_are_none(write):
    recipe = load_recipe(write(), ["evaluate.attacks=[corruptions, pgd-5]"])
    assert recipe.evaluate.attacks == ("corruptions", "pgd-5")
    assert set(recipe.evaluate.asked.attacks) == {"pgd-5"}
    assert set(recipe.evaluate.asked.measurements) == {"corruptions"}
    assert parse_recipe(recipe.resolved()) == recipe
    several = load_recipe(write(), ["evaluate.attacks=[corruptions, pgd-5]", "evaluate.threats=[Linf:0.1, L2:0.5]"])
    assert set(several.evaluate.asked.measurements) == {"corruptions"}


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ("[corruptions]", r"evaluate.attacks: corruptions are no attack; name one beside them"),
        ("[pgd-5, corruptions, corruptions]", r"evaluate.attacks.2: corruptions is named twice"),
        ("[pgd-5, corruption]", r"evaluate.attacks.1: unknown attack 'corruption'; did you mean 'corruptions'\?"),
        ("[pgd-5, pgd-5]", r"evaluate.attacks.1: pgd-5 is named twice"),
    ],
)
def test_what_is_misnamed_among_the_attacks_is_told_with_its_place(write, attacks, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(), [f"evaluate.attacks={attacks}"])


def test_corruptions_train_nothing(write):
    with pytest.raises(UserError, match="unknown attack 'corruptions'"):
        load_recipe(write(), ["stages.0.attack=corruptions"])


def test_a_recipe_may_name_itself(write):
    assert load_recipe(write("name: other\n" + MINIMAL)).name == "other"


def test_a_child_changes_keys_stages_by_name_and_components_whole(write):
    write(
        MINIMAL.replace("objective: sat", "objective: {name: trades, beta: 4}").replace(
            "epochs: 2", "epochs: 2, init: w"
        )
        + "  - {name: two, train: [model], objective: sat, epochs: 3}\nevaluate: {attacks: [pgd-7, pgd-9], limit: 5}\n",
        "parent.yaml",
    )
    child = write(
        "extends: parent.yaml\nthreat: {norm: L2}\nevaluate: {attacks: [fgsm]}\n"
        "stages: [{name: two, epochs: 9, objective: {name: mart}}, {name: one, objective: {beta: 1}}]\n"
    )
    recipe = load_recipe(child)
    assert recipe.name == "mine"
    assert recipe.threat == ThreatModel("L2", 0.1)
    assert [s.name for s in recipe.stages] == ["one", "two"]
    assert [s.epochs for s in recipe.stages] == [2, 9]
    assert recipe.stages[0].objective.registered_name == "trades"
    assert recipe.stages[0].objective.beta == 1
    assert recipe.stages[1].objective.registered_name == "mart"
    assert recipe.stages[1].objective.beta == 5
    assert recipe.stages[0].init == "w"
    assert recipe.evaluate.attacks == ("fgsm",)
    assert recipe.evaluate.limit == 5


def test_a_child_with_other_stages_replaces_them(write):
    write(name="parent.yaml")
    child = write("extends: parent.yaml\nstages: [{name: new, train: [model], objective: natural, epochs: 1}]\n")
    assert [stage.name for stage in load_recipe(child).stages] == ["new"]


@pytest.mark.parametrize("word", ["yes", "No", "on", "OFF"])
def test_a_bare_yes_or_no_may_be_the_name_of_a_class_and_is_refused(write, word):
    with pytest.raises(UserError, match=f"a bare {word} may be a name or a truth; write '{word}' in quotes"):
        load_recipe(write(), [f"data.poison={{name: patch, target: {word}}}"])
    with pytest.raises(UserError, match=f"line 2: a bare {word}"):
        load_recipe(write(f"{MINIMAL}\n".replace("validation: 100", f"validation: 100, class_weights: {{{word}: 2}}")))
    poison = load_recipe(write(), [f"data.poison={{name: patch, target: '{word}'}}"]).data.poison
    assert poison.target == word
    assert load_recipe(write(), ["runtime.tensorboard=True"]).runtime.tensorboard


def test_a_misspelt_stage_is_told_by_its_name(write):
    write(name="parent.yaml")
    child = write("extends: parent.yaml\nstages: [{name: won, epochs: 1}]\n")
    told = r"'won' is no stage of the recipe that it extends \(one\); did you mean 'one'\?"
    with pytest.raises(UserError, match=told):
        load_recipe(child)
    with pytest.raises(UserError, match=told):
        recipe_content({"extends": str(Path(child).with_name("parent.yaml")), "stages": [{"name": "won"}]}, [])


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("epochs: 3", r"epochs: unknown key; it belongs at stages\.\*\.epochs"),
        ("eps: 8/255", r"eps: unknown key; it belongs at threat\.eps"),
        ("learning_rate: 0.1", r"learning_rate: unknown key; it belongs at stages\.\*\.optimiser\.lr"),
        ("runtime: {batch_size: 8}", r"did you mean 'batch_norm' here, or stages\.\*\.batch_size or "),
        ("stages: [{name: one, seed: 1}]", r"stages\.one\.seed: unknown key; it belongs at runtime\.seed"),
    ],
)
def test_a_key_of_a_file_that_stands_in_the_wrong_place_is_told_where_it_belongs(write, line, place):
    write(name="parent.yaml")
    with pytest.raises(UserError, match=place):
        load_recipe(write(f"extends: parent.yaml\n{line}\n"))


def test_a_file_named_without_its_ending_is_offered(write, tmp_path, monkeypatch):
    write(name="sub/parent.yaml")
    with pytest.raises(UserError, match=r"did you mean 'parent\.yaml'\?"):
        load_recipe(write("extends: parent\n", "sub/child.yaml"))
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(UserError, match=r"did you mean 'parent\.yaml'\?"):
        load_recipe("parent")


def test_a_parent_is_looked_for_beside_the_child_and_among_the_shipped(write, tmp_path, monkeypatch):
    write(name="sub/parent.yaml")
    child = write("extends: parent.yaml\nthreat: {eps: 0.2}\n", "sub/child.yaml")
    monkeypatch.chdir(tmp_path.parent)
    assert load_recipe(child).threat.eps == 0.2
    shipped = write("extends: digits\nthreat: {eps: 0.2}\n", "sub/other.yaml")
    recipe = load_recipe(shipped)
    assert recipe.name == "other"
    assert recipe.threat.eps == 0.2
    assert recipe.stages == load_recipe("digits").stages


def test_a_grandchild(write):
    write(name="a.yaml")
    write("extends: a.yaml\nthreat: {eps: 0.2}\n", "b.yaml")
    recipe = load_recipe(write("extends: b.yaml\nname: c\n", "c.yaml"))
    assert (recipe.name, recipe.threat.eps, recipe.stages[0].epochs) == ("c", 0.2, 2)


# ---- overrides


@pytest.mark.parametrize(
    ("overrides", "read", "expected"),
    [
        (["threat.eps=4/255"], lambda r: r.threat.eps, 4 / 255),
        (["threat={norm: L2, eps: 1}"], lambda r: r.threat, ThreatModel("L2", 1)),
        (["stages.one.epochs=5"], lambda r: r.stages[0].epochs, 5),
        (["stages.0.epochs=5"], lambda r: r.stages[0].epochs, 5),
        (["stages.*.epochs=5"], lambda r: {s.epochs for s in r.stages}, {5}),
        (["stages.*.epochs=5", "stages.one.epochs=6"], lambda r: r.stages[0].epochs, 6),
        (["stages.one.attack=pgd-3", "stages.one.attack.step_size=2/255"],
         lambda r: (r.stages[0].attack.steps, r.stages[0].attack.step_size), (3, 2 / 255)),
        (["stages.one.objective.name=trades", "stages.one.objective.beta=2"], lambda r: r.stages[0].objective.beta, 2),
        (["model.backbone=resnet-18"], lambda r: r.model.backbone.registered_name, "resnet"),
        (["model.backbone.width=12"], lambda r: r.model.backbone.width, 12),
        (["runtime.seed=3"], lambda r: r.runtime.seed, 3),
        (["evaluate.attacks=[pgd-5, {name: pgd, restarts: 2}]"],
         lambda r: r.evaluate.attacks, ("pgd-5", {"name": "pgd", "restarts": 2})),
        (["evaluate.attacks=[pgd-5, fgsm]", "evaluate.attacks.0.restarts=3"],
         lambda r: r.evaluate.attacks, ({"name": "pgd-5", "restarts": 3}, "fgsm")),
        (["data.train_limit=null"], lambda r: r.data.train_limit, None),
        (["name=2.5-x"], lambda r: r.name, "2.5-x"),
        (["data.source=a=b"], lambda r: r.data.source, "a=b"),
        ("stages.one.epochs=5", lambda r: r.stages[0].epochs, 5),
        ({"stages.one.epochs": 5, "data.train_limit": None},
         lambda r: (r.stages[0].epochs, r.data.train_limit), (5, None)),
        ({"stages.one.attack": {"name": "pgd", "steps": 3}, "stages.one.attack.step_size": "2/255"},
         lambda r: (r.stages[0].attack.steps, r.stages[0].attack.step_size), (3, 2 / 255)),
    ],
)  # fmt: skip
def test_overrides(write, overrides, read, expected):
    assert read(load_recipe(write(), overrides)) == expected


def test_a_mapping_of_overrides_is_left_as_it_was():
    attack = {"name": "pgd", "steps": 3}
    load_recipe("digits", {"stages.*.attack": attack, "stages.*.attack.step_size": "2/255"})
    assert attack == {"name": "pgd", "steps": 3}


def test_overrides_do_not_leak_into_the_next_load():
    load_recipe("digits", ["stages.*.attack.steps=1", "threat.eps=0.5"])
    again = load_recipe("digits")
    assert again.threat.eps == 0.15
    assert {stage.attack.steps for stage in again.stages} == {10}


def test_an_override_of_one_stage_leaves_those_that_share_a_yaml_anchor():
    """In the shipped files several stages point at one anchored attack."""
    recipe = load_recipe("digits", ["stages.main_head.attack.steps=3"])
    assert [stage.attack.steps for stage in recipe.stages] == [3, 10, 10]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["threat.eps"], "write KEY=VALUE"),
        (["=3"], "write KEY=VALUE"),
        (["threat..eps=3"], "write KEY=VALUE"),
        (["threat.eps=[1"], r"override 'threat.eps=\[1': line 1 is not valid YAML"),
        (["name=2021-02-30"], "override 'name=2021-02-30': holds a value that is not valid YAML"),
        (["data.source=" + "[" * 2000], "nested too deeply"),
        (["threat.eps=&a [*a]"], "an anchor holds itself"),
        (["threat.eps=!!python/object/apply:os.getcwd []"], "could not determine a constructor"),
        (["stages.7.epochs=1"], r"no item '7' in the list; write its position, its name \(one\) or \*"),
        (["stages.two.epochs=1"], "no item 'two'"),
        (["stages.one=1"], "name the key to change inside 'one'"),
        (["threat.eps.x=1"], "'eps' holds 0.1, which has no keys"),
        (["evaluate.attacks=[3]", "evaluate.attacks.0.steps=2"], "'0' holds 3, which has no keys"),
        (["thread.eps=1"], "thread.eps=1: unknown key; write threat.eps=1 or stages"),
        ({"thread.eps": 1}, "thread.eps=1: unknown key; write threat.eps=1 or stages"),
        ({"threat..eps": 3}, r"override 'threat\.\.eps' is not understood; write dotted keys"),
        ([("threat.eps", 3)], r"override \('threat.eps', 3\) is not understood"),
        ({"stages.two.epochs": 1}, "stages.two.epochs=1: no item 'two'"),
    ],
)
def test_overrides_that_are_not_understood(write, overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe(write(), overrides)


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write())
    with pytest.raises(ValueError, match="frozen"):
        recipe.threat = None


# ---- what baselines are held to


def test_the_wide_baseline_has_the_parameters_of_two_heads():
    from dualhead.models import backbones, count_parameters
    from dualhead.saving.architecture import Architecture

    def parameters(name):
        model = load_recipe(name).model
        facts = {"num_classes": 10, "image_shape": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        aggregator = {"name": "pairwise_cnn"} if model.attach_at else None
        described = backbones.describe(model.backbone)
        network = Architecture(backbone=described, attach_at=model.attach_at, aggregator=aggregator, **facts)
        return count_parameters(network.create())

    assert parameters("cifar10_cpu_wide") == pytest.approx(parameters("cifar10_cpu"), rel=0.02)
    assert parameters("cifar10_cpu_joint") == parameters("cifar10_cpu")


def test_a_layer_may_be_named_by_number_as_in_a_sequential():
    assert load_recipe("digits", ["model.attach_at=0"]).model.attach_at == "0"
    assert load_recipe("digits", ["model.attach_at='1.0'"]).model.attach_at == "1.0"
    with pytest.raises(UserError, match=r"model.attach_at: .*number 1.0; write the layer's name in quotes"):
        load_recipe("digits", ["model.attach_at=1.0"])
    with pytest.raises(UserError, match=r"model.attach_at"):
        load_recipe("digits", ["model.attach_at=true"])


@pytest.mark.parametrize(
    ("weights", "objective", "message"),
    [
        ("even", "sat", "data.class_weights: must be balanced, or weights by the classes' names"),
        ({"cat": 0}, "sat", "data.class_weights.cat: a weight must be greater than 0, got 0"),
        ({3: -1}, "sat", "data.class_weights.3: a weight must be greater than 0, got -1"),
        ("balanced", "ikl", "stages.0.objective: the loss of 'ikl' is no mean over images, whose weights there could"),
    ],
)
def test_class_weights_that_cannot_be_are_refused(weights, objective, message):
    content = {"name": "weighted", **yaml.safe_load(MINIMAL)}
    content["data"]["class_weights"] = weights
    content["stages"][0]["objective"] = objective
    with pytest.raises(UserError) as refused:
        parse_recipe(content)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_classes_are_evened_out_once():
    content = {"name": "weighted", **yaml.safe_load(MINIMAL)}
    content["data"] |= {"class_weights": "balanced", "sampling": "balanced"}
    with pytest.raises(UserError, match="choose one of them"):
        parse_recipe(content)
    content["data"]["class_weights"] = {7: "1/2"}
    assert parse_recipe(content).data.class_weights == {"7": 0.5}
