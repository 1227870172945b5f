"""Components from outside: found by address, run once, told, told apart by digest, and one line for what cannot be."""

from __future__ import annotations

import hashlib
import logging
import textwrap

import pytest

from dualhead.components import plugins
from dualhead.errors import UserError
from dualhead.recipe import REGISTRIES, load_recipe, parse_recipe
from helpers.plugins import nothing_from_outside

OBJECTIVE = '''
from __future__ import annotations
from dataclasses import dataclass
from dualhead.objectives import natural, objectives
from dualhead.objectives.natural import Natural


@dataclass(frozen=True)
class Tamed(Natural):
    """Natural training with a scale.

    Args:
        scale: of the loss.
    """

    scale: float = 1.0
'''
FROZEN = "@dataclass(frozen=True)\n"
KINDS = {
    "aggregators": "dualhead.heads.aggregators.mean:Mean",
    "attacks": "dualhead.attacks.fgsm:FGSM",
    "augmentations": "dualhead.data.augmentations.flip:Flip",
    "averages": "dualhead.training.averaging:EMA",
    "backbones": "dualhead.models.cnn:CNNBackbone",
    "measurements": "dualhead.evaluation.measurements.corruptions:Corruptions",
    "objectives": "dualhead.objectives.natural:Natural",
    "optimisers": "dualhead.training.optimisation:SGD",
    "poisons": "dualhead.data.poisons.one_pixel:OnePixel",
    "schedules": "dualhead.training.optimisation:Cosine",
    "threats": "dualhead.threats.flow:Flow",
}
"""A class of each kind to derive from."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is the current one, and a process in which nothing from outside has been run."""
    monkeypatch.chdir(tmp_path)
    with nothing_from_outside():
        yield tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def derived(kind):
    module, cls = KINDS[kind].split(":")
    return f"from dataclasses import dataclass\nfrom {module} import {cls}\n{FROZEN}class Own({cls}): ...\n"


# ---- found by address


def test_every_kind_has_a_base_class_and_a_test_here():
    assert set(KINDS) == set(REGISTRIES)
    for registry in REGISTRIES.values():
        assert registry.base is not object


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
@pytest.mark.parametrize("place", ["file", "module"])
def test_a_class_of_every_kind_is_named_by_its_address(folder, monkeypatch, kind, place):
    registry = REGISTRIES[kind]
    if place == "file":
        write(folder / "parts" / f"own_{kind}.py", derived(kind))
        spec, address = f"parts/own_{kind}.py:Own", f"{folder / 'parts' / f'own_{kind}.py'}:Own"
    else:
        write(folder / f"outside_{kind}" / "__init__.py", "")
        write(folder / f"outside_{kind}" / "parts.py", derived(kind))
        spec = address = f"outside_{kind}.parts:Own"
    built = registry.build({"name": spec, "eps": 0.1} if kind == "threats" else spec)
    assert type(built).__name__ == "Own"
    assert isinstance(built, registry.base)
    described = registry.describe(built)
    assert described["name"] == address
    monkeypatch.chdir("/")
    assert registry.build(described) == built


def test_fields_are_keys_and_nest(folder):
    write(folder / "own.py", OBJECTIVE)
    objectives = REGISTRIES["objectives"]
    built = objectives.build({"name": "own.py:Tamed", "scale": "3"})
    assert built.scale == 3.0
    with pytest.raises(UserError, match=r"^a.b.sclae: .*own.py:Tamed' has no such key; did you mean 'scale'"):
        objectives.build({"name": "own.py:Tamed", "sclae": 1}, "a.b")
    write(folder / "own.py", OBJECTIVE.replace("natural", "sat").replace("Natural", "SAT"))
    nested = objectives.build({"name": "logit_pairing", "base": "own.py:Tamed"})
    assert objectives.build(objectives.describe(nested)) == nested
    assert objectives.describe(nested)["base"]["name"] == f"{folder / 'own.py'}:Tamed"


def test_labels_of_attacks_are_short(folder):
    write(folder / "own.py", derived("attacks"))
    assert REGISTRIES["attacks"].build("own.py:Own").label == "Own"


def test_a_function_is_still_a_model_and_may_lie_in_a_file(folder):
    write(folder / "nets.py", """
        from torch import nn

        def make(num_classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(3, num_classes))
    """)  # fmt: skip
    built = REGISTRIES["backbones"].build("nets.py:make")
    assert REGISTRIES["backbones"].describe(built) == {"name": "factory", "path": f"{folder / 'nets.py'}:make"}
    assert built.published(4, (3, 1, 1))[1].out_features == 4
    assert REGISTRIES["backbones"].build({"name": "factory", "path": "nets.py:make"}) == built
    with pytest.raises(UserError, match=r"plugin gone\.py: no such file in"):
        REGISTRIES["backbones"].build("gone.py:make")


def test_the_folder_of_the_recipe_comes_before_the_current_one(folder):
    for place, scale in (("project", 2), (".", 3)):
        write(folder / place / "own.py", OBJECTIVE.replace("1.0", str(scale)))
    (folder / "only_here.py").write_text(OBJECTIVE)
    write(folder / "base" / "beside_base.py", OBJECTIVE)
    write(folder / "base" / "base.yaml", "extends: digits_natural\nplugins: [beside_base.py]\n")
    write(folder / "project" / "mine.yaml", """
        extends: ../base/base.yaml
        plugins: [own.py]
        stages: [{name: natural, objective: own.py:Tamed}]
    """)  # fmt: skip
    recipe = load_recipe("project/mine.yaml", plugins=["own.py"])
    assert recipe.stages[0].objective.scale == 2
    named = [folder / "base" / "beside_base.py", folder / "project" / "own.py", folder / "own.py"]
    assert list(recipe.plugins) == list(map(str, named))
    assert load_recipe("project/mine.yaml", plugins="own.py") == recipe
    assert parse_recipe(recipe.resolved()) == recipe
    other = load_recipe("project/mine.yaml", ["stages.natural.objective=only_here.py:Tamed"])
    assert other.stages[0].objective.scale == 1


def test_attacks_of_the_evaluation_are_found_from_any_folder(folder):
    write(folder / "own.py", derived("attacks"))
    recipe = load_recipe("digits", ["evaluate.attacks=[pgd-3, 'own.py:Own', {name: 'own.py:Own', step_size: 0.1}]"])
    place = f"{folder / 'own.py'}:Own"
    assert recipe.evaluate.attacks == ("pgd-3", {"name": place}, {"name": place, "step_size": 0.1})


# ---- run once, told, and told apart


def test_a_file_is_run_once_and_told_with_its_digest(folder, caplog):
    file = write(folder / "own.py", OBJECTIVE)
    for _ in range(2):
        REGISTRIES["objectives"].build("own.py:Tamed")
    told = [record.getMessage() for record in caplog.records]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert told == [f"code from outside is run: file {file}, sha256 {sha256[:12]}"]
    (source,) = plugins.sources_in({"stages": [{"objective": {"name": f"{file}:Tamed"}}], "plugins": []})
    assert source.describe() == {"name": str(file), "file": str(file), "sha256": sha256}
    assert plugins.sources_in(load_recipe("digits").resolved()) == []


def test_only_the_first_process_tells(folder, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write(folder / "own.py", OBJECTIVE)
    REGISTRIES["objectives"].build("own.py:Tamed")
    assert not caplog.records


def test_a_file_that_has_changed_is_run_again(folder):
    objectives = REGISTRIES["objectives"]
    registered = OBJECTIVE.replace("@dataclass", '@objectives.register("tamed")\n@dataclass')
    file = write(folder / "own.py", registered)
    plugins.load("own.py")
    assert objectives.build("tamed").scale == 1
    file.write_text(registered.replace("1.0", "2.0"))  # of the same size, within the same second
    plugins.load("own.py")
    assert objectives.build("tamed").scale == objectives.build("own.py:Tamed").scale == 2


def test_a_name_that_a_file_registers_is_described_by_its_address(folder):
    named = '@objectives.register("tamed", numbers=("scale",))\n@dataclass'
    write(folder / "own.py", OBJECTIVE.replace("@dataclass", named))
    recipe = load_recipe("digits_natural", ["stages.*.objective=tamed-2"], ["own.py"])
    assert recipe.resolved()["stages"][0]["objective"] == {
        "name": f"{folder / 'own.py'}:Tamed", "label_smoothing": 0.0, "scale": 2.0,
    }  # fmt: skip
    assert REGISTRIES["objectives"].origin("tamed") == str(folder / "own.py")
    assert REGISTRIES["objectives"].origin("trades") is None


def test_changed_and_missing_sources_are_refused_by_name(folder):
    file = write(folder / "own.py", OBJECTIVE)
    write(folder / "outside_module.py", OBJECTIVE)
    plugins.load("own.py")
    plugins.load("outside_module")
    records = [source.describe() for source in plugins.sources_in([str(file), "outside_module"])]
    assert len(records) == 2
    plugins.refuse_changed(records, "a run")
    file.write_text(OBJECTIVE + "\n")
    with pytest.raises(UserError, match=rf"^a run: was made with another version of {file} .*put back that version"):
        plugins.refuse_changed(records, "a run")
    copy = write(folder / "copies" / plugins.copy_name(records[0]), OBJECTIVE)
    with pytest.raises(UserError, match=rf"put back the file {copy}"):
        plugins.refuse_changed(records, "a run", folder / "copies")
    file.unlink()
    with pytest.raises(UserError, match=rf"needs {file}, which is not there"):
        plugins.refuse_changed(records, "a run")
    (folder / "outside_module.py").write_text("changed = True\n")
    with pytest.raises(UserError, match=rf"another version of {folder / 'outside_module.py'}"):
        plugins.refuse_changed(records[1:], "a run")


# ---- one line for what cannot be

HEAD = "from dataclasses import dataclass\nfrom dualhead.objectives import Objective, objectives\n"
OWN = f"{HEAD}{FROZEN}class Own(Objective):\n"
BODY = "    def needs(self): ...\n    def inner_loss(self, *_): ...\n    def loss(self, *_): ...\n"


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (None, "gone.py:Own", r"objective 'gone.py:Own': plugin gone.py: no such file in {folder}"),
        ("x = 1\ny = 1 / 0\n", "own.py:Own", "plugin {file}, line 2: ZeroDivisionError: division by zero"),
        ("x = 1\nclass\n", "own.py:Own", "plugin {file}, line 2: SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(3)\n", "own.py:Own", "plugin {file}, line 2: SystemExit: 3"),
        ("import no_such_thing\n", "own.py:Own", "line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        (HEAD, "own.py:Own", "objective 'own.py:Own': file 'own.py' has no 'Own'"),
        ("def Own(): ...\n", "own.py:Own", "objective 'own.py:Own': is a function; it must be a frozen dataclass "
         "derived from dualhead.objectives.Objective"),
        ("class Own: ...\n", "own.py:Own", "objective 'own.py:Own': Own is a class derived from object; it must be a"),
        (f"{HEAD}class Own(Objective):\n{BODY}", "own.py:Own", "Own is no dataclass; it must be a frozen dataclass"),
        (f"{HEAD}@dataclass\nclass Own(Objective):\n{BODY}", "own.py:Own", "Own is a dataclass that is not frozen"),
        (f"{OWN}    pass\n", "own.py:Own", "Own must define .*loss"),
        (f"{OWN}    x: 'Missing' = 1\n{BODY}", "own.py:Own",
         "a.b: {file}:Own: field 'x' has a type that cannot be checked: NameError: name 'Missing' is not defined"),
        (f"from typing import Annotated\nfrom pydantic import Field\n{OWN}    w: float = 0\n"
         f"    x: Annotated[int, Field(discriminator='a')] = 1\n{BODY}", "own.py:Own",
         "a.b: {file}:Own: field 'x' has a type that cannot be checked: "),
        (f"{OWN}    def __post_init__(self): [][0]\n{BODY}", "own.py:Own",
         "a.b: {file}:Own: failed: IndexError: list index out of range"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_one_line(folder, text, spec, message):
    if text is not None:
        write(folder / "own.py", text)
    with pytest.raises(UserError, match=message.format(folder=folder, file=folder / "own.py")) as caught:
        REGISTRIES["objectives"].build(spec, "a.b")
    assert str(caught.value).startswith("a.b: ")
    assert "\n" not in str(caught.value)


def registering(name, cls="Own"):
    return f'@objectives.register("{name}")\n@dataclass(frozen=True)\nclass {cls}(Objective):\n{BODY}\n\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + registering("trades"), "own.py, line 3: objective 'trades' is registered twice: one ships; choose"),
        (HEAD + registering("mine") + registering("mine", "Other"),
         "own.py, line 11: objective 'mine' is registered twice: one is Own of .*own.py; choose another name"),
        (HEAD + registering("mine") + registering("mine"), "own.py, line 11: objective 'mine' is registered twice"),
        (HEAD + registering("elsewhere"), "objective 'elsewhere' is registered twice: one is Own of .*first.py"),
        (f'{HEAD}@objectives.register("mine")\nclass Own(Objective):\n{BODY}',
         "own.py, line 3: objective 'mine': Own is no dataclass"),
    ],
)  # fmt: skip
def test_names_are_registered_once_and_a_file_that_fails_leaves_none(folder, text, message):
    write(folder / "first.py", HEAD + registering("elsewhere"))
    plugins.load("first.py")
    before = REGISTRIES["objectives"].names()
    write(folder / "own.py", text)
    with pytest.raises(UserError, match=message):
        load_recipe("digits", plugins=["own.py"])
    assert REGISTRIES["objectives"].names() == before
    assert "trades" in before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plugins=mine.py", r"recipe digits: plugins: must list files or modules, e.g. \[my_file.py\]; got 'mine.py'"),
        ("plugins=[gone.py]", "recipe digits: plugins: plugin gone.py: no such file in "),
        ("plugins=[no.such.module]", "recipe digits: plugins: there is no module 'no', neither installed nor in"),
        ("plugins=['a b']", "recipe digits: plugins: plugin 'a b': write a file, my_file.py, or a module, my_package"),
    ],
)
def test_plugins_that_cannot_be_are_one_line(folder, given, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", [given])


# ---- installed packages


def install(folder, package, text):
    write(folder / package / "__init__.py", "")
    write(folder / package / "parts.py", text)
    info = folder / f"{package}-1.0.dist-info"
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    write(info / "entry_points.txt", f"[dualhead.components]\nmine = {package}.parts\n")


def test_an_installed_package_is_asked_for_names_that_are_not_known(folder, monkeypatch, caplog):
    install(folder / "site", "outside_good", HEAD + registering("from_package"))
    install(folder / "site", "outside_bad", "raise RuntimeError('too old')\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    objectives = REGISTRIES["objectives"]
    assert objectives.build("trades").beta == 6
    assert not caplog.records  # nothing of it was run for a name that ships
    built = objectives.build("from_package")
    assert objectives.describe(built)["name"] == "outside_good.parts:Own"
    assert objectives.origin("from_package") == "package outside_good"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert told[0].startswith(
        "package outside_bad is left out: importing 'outside_bad.parts' failed: RuntimeError: too"
    )
    assert "of package outside_good, sha256" in told[1]
    with pytest.raises(UserError, match=r"unknown objective 'nowhere'.*; package outside_bad, which might have"):
        objectives.build("nowhere")
