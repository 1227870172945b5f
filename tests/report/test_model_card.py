"""The card of a model: what it was trained against, and on what, as its recipe says."""

from __future__ import annotations

import json

import pytest

from dualhead.commands.catalogue import recipes
from dualhead.recipe.yaml import load_recipe
from dualhead.report.model_card import model_card
from dualhead.report.text import attack_text, threat_text
from dualhead.saving.export import write_card
from dualhead.system.files import head_sentence

CONFIG = {
    "architecture": {"backbone": {"name": "cnn"}, "image_shape": [1, 8, 8], "num_classes": 10},
    "threat": {"norm": "Linf", "eps": 0.15},
}


def card(*overrides):
    return model_card(CONFIG, load_recipe("digits", overrides).resolved()).splitlines()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "Trained against perturbations of Linf norm at most 0.15."),
        (
            ("stages.*.eps=0.05",),
            "Evaluated against perturbations of Linf norm at most 0.15; trained at most 0.05.",
        ),
        (
            ("stages.main_head.eps=0.05",),
            "Evaluated against perturbations of Linf norm at most 0.15; trained at most 0.05, 0.15.",
        ),
    ],
)
def test_radius_of_training_is_told_from_that_of_evaluation(overrides, told):
    assert told in card(*overrides)


@pytest.mark.parametrize(
    ("threat", "overrides", "told"),
    [
        ({"name": "flow", "eps": 0.05}, (), "Trained against flow of at most 0.05."),
        (
            {"name": "flow", "eps": 0.05},
            ("stages.*.eps=0.02",),
            "Evaluated against flow of at most 0.05; trained at most 0.02.",
        ),
        (
            {"norm": "Linf", "eps": 0.15},
            ("stages.main_head.threat={name: flow, eps: 0.05}",),
            "Evaluated against perturbations of Linf norm at most 0.15; trained against flow 0.05, Linf eps 0.15.",
        ),
    ],
)
def test_threats_without_a_norm_are_called_by_name(threat, overrides, told):
    recipe = load_recipe("digits", [f"threat={json.dumps(threat)}", *overrides]).resolved()
    results = {
        "num_samples": 10, "threat": threat, "clean_accuracy": 0.9, "robust_accuracy": {"pgd-40": 0.5, "worst": 0.5},
        "intervals": {"clean_accuracy": [0.8, 1.0], "pgd-40": [0.4, 0.6], "worst": [0.4, 0.6]},
    }  # fmt: skip
    lines = model_card({**CONFIG, "threat": threat}, recipe, results).splitlines()
    assert told in lines
    assert any(line.startswith(f"10 test images, {threat_text(threat)}, Wilson") for line in lines)


def test_stages_name_their_own_radius_and_not_the_loss_that_measuring_uses():
    stages = [line for line in card("stages.main_head.eps=0.05") if line.startswith("- stage ")]
    assert "within eps 0.05" in stages[0]
    assert "within" not in stages[1]
    assert all("attack pgd" in line for line in stages)
    assert not any("loss ce" in line or "restarts" in line for line in stages)


def test_what_is_not_attacked_names_no_attack_and_free_takes_its_place():
    natural = load_recipe("digits_natural").resolved()["stages"][0]
    assert (natural["attack"]["name"], attack_text(natural)) == ("pgd", "")
    around = load_recipe("digits_natural", ["stages.0.objective={name: ewc, base: natural, old: Linf:0.1}"])
    assert attack_text(around.resolved()["stages"][0]) == ""
    free = load_recipe("digits", ["stages.main_head.free={replays: 4}"]).resolved()["stages"][0]
    assert attack_text(free) == "free (replays 4)"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("data.train_limit=400", "data.validation=30"),
            "- data: digits, the first 400 training images, of which 30 held out"),
        (
            ("data.train_limit=400", "data.train_choice=sample", "data.validation=0.1"),
            "- data: digits, a sample of 400 training images, of which 10 % held out",
        ),
        (
            ("data.train_limit=null", "data.validation=0", "data.extra={source: more, fraction: 0.3}"),
            "- data: digits; 30 % of each batch from more",
        ),
    ],
)  # fmt: skip
def test_data_are_told_with_how_many_of_them(overrides, told):
    assert told in card(*overrides)


def test_the_card_of_a_recipe_after_an_abstract_says_that_it_is_no_reproduction(tmp_path):
    config = {**CONFIG, "recipe": "cifar10_cpu_aligned", "output": "head1"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, None)
    assert "After THAT (Wu et al. 2021, arXiv 2103.13612), not a reproduction" in (tmp_path / "README.md").read_text()
    assert "recipe:" not in model_card({**CONFIG, "recipe": "my_own"}).partition("## Data and training")[2].replace(
        "- recipe: not recorded", ""
    )


@pytest.mark.parametrize(
    ("aggregator", "told"),
    [
        (None, "an aggregator (DH-AT, Jiang et al. 2021, arXiv 2104.10377)"),
        ({"name": "pairwise_cnn"}, "an aggregator (DH-AT, Jiang et al. 2021, arXiv 2104.10377)"),
        ({"name": "pairwise_shared", "rivals": 3}, "an aggregator (DH-AT, Jiang et al. 2021, arXiv 2104.10377)"),
        ({"name": "linear"}, "the aggregator linear"),
        ({"name": "pairwise_mine"}, "the aggregator pairwise_mine"),
    ],
)
def test_the_paper_is_cited_for_its_aggregators_alone(tmp_path, aggregator, told):
    architecture = {**CONFIG["architecture"], "heads": 3, "aggregator": aggregator}
    config = {**CONFIG, "architecture": architecture, "output": "aggregate"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, None)
    assert f"A classifier of 3 heads and {told} on cnn, " in (tmp_path / "README.md").read_text()


def test_the_sentence_at_a_recipe_s_head_is_whole(tmp_path):
    written = "# Ours (Doe et al. 2020, eq. 3), in\n# two lines. More.\ndata: {}\n# Not this.\n"
    (tmp_path / "a.yaml").write_text(written)
    assert head_sentence(tmp_path / "a.yaml") == "Ours (Doe et al. 2020, eq. 3), in two lines."
    (tmp_path / "b.yaml").write_text("data: {}\n")
    assert head_sentence(tmp_path / "b.yaml") == ""


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_that_ships_says_what_it_is_in_a_sentence(name):
    said = recipes()[name]
    assert said.endswith(".") and said.count("(") == said.count(")")
    after = "aligned" in name or "routed" in name or name == "cifar10_wrn34_dat"
    assert ("not a reproduction" in said) == after
