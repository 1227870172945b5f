"""What newcomers type, and the answer that each gets."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import typer

from dualhead.commands.catalogue import kind_of
from dualhead.commands.cli import app
from dualhead.commands.examples import EXAMPLES
from dualhead.commands.overrides import Shortcuts, settings_with_shortcuts, with_shortcuts
from dualhead.commands.sweep import plan
from dualhead.components.registry import folded
from dualhead.data.source import name_on_hub
from dualhead.recipe import load_recipe
from helpers.e2e import dualhead

SHOW = "show digits --no-cost --quiet"

UNDERSTOOD = [
    ("-h", "Usage: dualhead"),
    ("train -h", "--epochs"),
    ("train -h", "dualhead train digits"),
    ("list recipes", "digits_natural  "),
    ("list optimizers", "sgd "),
    ("list Attack", "pgd "),
    ("list models", "wideresnet "),
    ("show Digits --no-cost", "name: digits\n"),
    ("show DIGITS-SAT --no-cost", "name: digits_sat\n"),
    ("show cifar10-cpu --no-cost", "name: cifar10_cpu\n"),
    ("show digits --no-cost --epochs 3", "epochs: 3\n"),
    ("show digits --no-cost --seed 7", "seed: 7\n"),
    ("show digits --no-cost --device cpu", "device: cpu\n"),
    ("show digits --no-cost --eps 51/255", "eps: 0.2\n"),
    ("show cifar10_cpu --no-cost --data cifar100", "source: hf:uoft-cs/cifar100\n"),
    ("train -h", "--data"),
    ("show digits --no-cost --lr 0.03", "lr: 0.03\n"),
    ("show digits --no-cost --batch-size 17", "batch_size: 17\n"),
    ("show digits --no-cost stages.*.optimizer.lr=0.03", "lr: 0.03\n"),
    ("show digits --no-cost stages.*.optimizer=AdamW", "name: adamw\n"),
    ("show digits --no-cost stages.*.objective=TRADES", "name: trades\n"),
    ("show digits --no-cost stages.*.attack=PGD-7", "steps: 7\n"),
    ("show digits --no-cost stages.*.attack=pgd7", "steps: 7\n"),
    ("show digits --no-cost stages.*.attack=pgd_7", "steps: 7\n"),
    ("show digits --no-cost model.backbone=resnet18 model.attach_at=layer1", "depth: 18\n"),
    ("show digits --no-cost model.backbone=ResNet-18 model.attach_at=layer1", "depth: 18\n"),
    ("show digits --no-cost model.backbone=WideResNet28-10 model.attach_at=block1", "width: 10\n"),
    ("show digits --no-cost model.aggregator=Pairwise-CNN", "name: pairwise_cnn\n"),
    ("show digits --no-cost threat.norm=l2", "norm: L2\n"),
    ("show digits --no-cost threat.norm=L_inf", "norm: Linf\n"),
    ("show digits --no-cost data.source=cifar10", "source: hf:uoft-cs/cifar10\n"),
    ("show digits --no-cost data.source=CIFAR-100", "source: hf:uoft-cs/cifar100\n"),
]
"""What is typed after `dualhead`, and what the answer shows."""

TOLD = [
    (f"{SHOW} lr=0.1", "lr=0.1: unknown key; write stages.*.optimiser.lr=0.1"),
    (f"{SHOW} learning_rate=0.1", "write stages.*.optimiser.lr=0.1"),
    (f"{SHOW} epochs=3", "epochs=3: unknown key; write stages.*.epochs=3"),
    (f"{SHOW} seed=1", "write runtime.seed=1"),
    (f"{SHOW} device=cpu", "write runtime.device=cpu"),
    (f"{SHOW} eps=8/255", "write threat.eps=8/255"),
    (f"{SHOW} beta=3", "write stages.*.objective.beta=3"),
    (f"{SHOW} batch_size=64", "write stages.*.batch_size=64"),
    (f"{SHOW} steps=3", "write stages.*.attack.steps=3"),
    (f"{SHOW} dataset=cifar10", "write data.source=cifar10"),
    (f"{SHOW} optimizer=adamw", "write stages.*.optimiser=adamw"),
    (f"{SHOW} backbone=resnet18", "write model.backbone=resnet18"),
    (f"{SHOW} stages.main_head.lr=1", "write stages.*.optimiser.lr=1"),
    (f"{SHOW} stages.main_head.epochs=many", "stages.main_head.epochs: input should be a valid integer"),
    (f"{SHOW} --epochs 3 stages.*.epochs=4", "--epochs and stages.*.epochs say the same"),
    (f"{SHOW} --eps 0.1 threat.eps=0.2", "--eps and threat.eps say the same"),
    (f"{SHOW} --data digits data.source=digits", "--data and data.source say the same"),
    ("train digits --eps 8", "did you mean 8/255?"),
    ("sweep digits --eps 0.1,0.2", "for an axis write threat.eps=0.1,0.2"),
    ("train digits --data gone/away/", "no such file or folder in"),
    ("train digit", "did you mean 'digits'?"),
    ("list everything", "unknown kind; known: aggregators, attacks"),
    ("show digits --no-cost stages.*.attack=pdg-10", "did you mean 'pgd'?"),
    ("sweep digits --lr 0.1,0.01", "for an axis write stages.*.optimiser.lr=0.1,0.01"),
    ("sweep digits --epochs 2 stages.main_head.epochs=1,2", "--epochs and stages.main_head.epochs say the same"),
    (f"{SHOW} model.attach_at=null", "stages.main_head.train: the model has no second head"),
    ("evaluate my_file.py:make --factory my_file.py:make --data digits --eps 0.1", "my_file.py"),
    ("trian digits", "No such command 'trian'"),
    ("report runs -o report.pdf", "is an HTML page, not a .pdf file; write report.html"),
    ("report runs -o report", "not a name without an ending; write report.html"),
    ("runs nowhere", "nowhere: no such folder"),
    ("runs .", "holds no run; `dualhead train digits` makes one"),
]
"""What is typed, and what the one line that refuses it says."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_are_many():
    assert len({typed for typed, _ in UNDERSTOOD + TOLD}) >= 30


@pytest.mark.parametrize(("typed", "answer"), UNDERSTOOD)
def test_natural_guesses_are_understood(typed, answer):
    ended = dualhead(*shlex.split(typed))
    assert ended.status == 0, ended.err
    assert answer in ended.out


@pytest.mark.parametrize(("typed", "answer"), TOLD)
def test_what_is_not_understood_is_told_in_one_line(typed, answer, tmp_path):
    ended = dualhead(*shlex.split(typed))
    assert ended.status == 2
    assert answer in ended.error_line
    assert not list(tmp_path.iterdir())


def test_the_advice_on_a_key_is_right():
    """What a line says to write is then taken."""
    for typed, answer in TOLD:
        written = re.search(r"write (stages\S+|threat\S+|runtime\S+|model\S+)$", answer)
        if written and typed.startswith(SHOW) and "backbone" not in typed:
            load_recipe("digits", [written[1]])


def test_layers_tell_the_share_of_the_cost_before_the_one_that_they_recommend():
    (best,) = [layer for layer in json.loads(dualhead("layers", "cnn-8", "--json").out) if layer["recommended"]]
    assert f"* recommended: {1 - best['cost_after']:.0%} of the forward cost" in dualhead("layers", "cnn-8").out


def test_options_of_a_sweep_stand_for_keys_of_every_run():
    written, notes = settings_with_shortcuts("digits", ["threat.eps=0.1,0.2"], [], Shortcuts(epochs=2, lr="0.05"))
    recipes = [job.recipe for job in plan("digits", written)]
    assert [recipe.threat.eps for recipe in recipes] == [0.1, 0.2]
    assert {(stage.epochs, stage.optimiser.lr) for recipe in recipes for stage in recipe.stages} == {(2, 0.05)}
    assert [note.split()[0] for note in notes] == ["--epochs", "--lr"]


def test_an_option_that_levels_stages_says_so():
    ended = dualhead("show", "digits", "--no-cost", "--epochs", "2")
    assert ended.err.startswith("--epochs 2 holds for each of 3 stages, which had main_head 30, second_head 30,")
    assert dualhead("show", "digits", "--no-cost", "--seed", "2").err == ""


def test_attacks_are_taken_with_commas(monkeypatch):
    asked = []
    monkeypatch.setattr("dualhead.commands.evaluate.assess", lambda request, *rest: asked.append(request) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dualhead("evaluate", "run", "--attack", "pgd-40, square", "--attack", "autoattack")
    assert asked[0].attacks == ("pgd-40", "square", "autoattack")


def test_every_command_has_three_examples_that_it_takes():
    group = typer.main.get_command(app)
    assert set(EXAMPLES) == set(group.commands)
    for name, lines in EXAMPLES.items():
        words = dualhead(name, "-h").out
        for line in lines:
            assert f"dualhead {line}\n" in words
            command, *rest = shlex.split(line)
            assert command == name
            group.commands[name].make_context(name, rest)  # raises what is no option of it


def test_pages_are_opened_when_asked(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    monkeypatch.setattr("dualhead.report.write_report", lambda runs, output: output)
    assert dualhead("report", "runs", "-o", "page.html").status == 0
    assert not opened
    assert dualhead("report", "runs", "-o", "page.html", "--open").status == 0
    assert opened == [(tmp_path / "page.html").as_uri()]


def test_names_of_data_sets_and_kinds_as_people_say_them():
    assert name_on_hub("Fashion-MNIST") == name_on_hub("fashion_mnist") == "hf:zalando-datasets/fashion_mnist"
    assert name_on_hub("photos") is None
    assert (kind_of("Optimizer"), kind_of("recipe"), kind_of("things")) == ("optimisers", "recipes", None)
    assert folded("Pairwise_CNN") == "pairwise-cnn"


@pytest.mark.parametrize("name", ["photos, mine #1", "yes", "2024", "{a: b}", 'say "hi"', "back\\slash"])
def test_a_folder_of_any_name_is_the_data(name):
    recipe, _ = with_shortcuts("digits_natural", [], [], Shortcuts(data=name))
    assert recipe.data.source == name
    (job,) = plan("digits_natural", settings_with_shortcuts("digits_natural", [], [], Shortcuts(data=name))[0])
    assert job.recipe.data.source == name
