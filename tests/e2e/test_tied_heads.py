"""A run with tied heads (dual batch norm), from the recipe to what is exported."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from dualhead.commands.cli import app
from dualhead.errors import Interrupted, UserError
from dualhead.heads.tied import tensors_by_name
from dualhead.models import Normalize, backbones, count_parameters, load_state, read_state
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.folder import load_stage
from dualhead.runs.run import train
from dualhead.saving import Architecture, export, load, load_base_weights, read_config
from helpers.resume import outcome

RECIPE = """
extends: digits
name: dual_bn
data: {train_limit: 128, validation: 32}
validation: {attack: pgd-1}
model: {backbone: cnn-2, attach_at: input, second_head: tied, aggregator: mean}
stages:
  - {name: base, train: [trunk, head1], objective: natural, epochs: 1, batch_size: 32}
  - name: both
    train: [trunk, head1, head2]
    objective: {name: joint, head1: natural, head2: sat, aggregate: null, attack: head2}
    attack: pgd-2
    deploy: head2
    epochs: 2
    batch_size: 32
  - {name: own, train: [head2], objective: sat, attack: pgd-2, epochs: 1, batch_size: 32}
evaluate: {attacks: [pgd-1], limit: 16, gallery: 0}
runtime: {device: cpu, precision: float32, layout: contiguous, lanes: 1, save_minutes: 1.0e-9}
"""
IMAGES = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The recipe's file, and a finished run of it."""
    folder = tmp_path_factory.mktemp("tied")
    (folder / "tied.yaml").write_text(RECIPE)
    train(load_recipe(str(folder / "tied.yaml"), []), run_dir=folder / "run")
    return folder


def base():
    return backbones.build("cnn-2").create(10, (1, 8, 8), Normalize.identity(1))


def stage(made, name):
    return load_stage(made / "run", name)[0]


def is_norm(name):
    """Whether a tensor is of a batch norm; the small network calls none of its others so."""
    module = base().get_submodule(name.rpartition(".")[0])
    return isinstance(module, torch.nn.BatchNorm2d)


def shared_of(model):
    first, second = tensors_by_name(model.head1), tensors_by_name(model.head2)
    return {name for name in first if second[name] is first[name]}


def test_heads_part_by_batch_norm_alone_and_head_2_alone_trains_its_own(made):
    both, own = stage(made, "both"), stage(made, "own")
    shared = shared_of(both)
    assert shared == shared_of(own) == {name for name in tensors_by_name(base()) if not is_norm(name)}
    for name, tensor in both.state_dict().items():
        head, _, inside = name.partition(".")
        unchanged = torch.equal(tensor, own.state_dict()[name])
        assert unchanged == (head == "head1" or inside in shared), name
    assert not torch.equal(both.view("head1").eval()(IMAGES), both.view("head2").eval()(IMAGES))


def test_shared_tensors_are_counted_once_and_written_once(made):
    plain, further = base(), sum(p.numel() for n, p in base().named_parameters() if is_norm(n))
    rows = {row["output"] if "output" in row else row["name"]: row for row in _rows(made)}
    assert {row["parameters"] for name, row in rows.items() if "mean" not in name} == {count_parameters(plain)}
    (mean,) = (row for name, row in rows.items() if "mean" in name)
    assert mean["parameters"] == count_parameters(plain) + further
    assert read_config(made / "run" / "model")["added_parameters"] == further
    names = set(read_state(made / "run" / "model" / "model.safetensors"))
    state = plain.state_dict()
    assert names == {f"head1.{n}" for n in state} | {f"head2.{n}" for n in state if is_norm(n)}
    card = (made / "run" / "model" / "README.md").read_text()
    assert f"Head 2 of a classifier of 2 heads (tied heads: batch norm of their own, +{further:,} parameters)" in card


def _rows(made):
    return json.loads((made / "run" / "comparison.json").read_text())["rows"]


def test_head_1_costs_the_stage_that_trains_it_with_head_2_and_head_2_all_of_them(made):
    costs = {row["name"]: row["training_cost"]["flops"] for row in _rows(made)}
    assert 0 < costs["base model"] < costs["head 1"] < costs["head 2"] == costs["mean of heads"]


def test_checkpoints_hold_a_shared_tensor_once(made):
    newest = max((made / "run" / "checkpoints" / "states").iterdir())
    model = torch.load(newest, weights_only=True)["model"]
    places = [tensor.untyped_storage().data_ptr() for tensor in model.values()]
    shared = {name for name in shared_of(stage(made, "own")) if name in base().state_dict()}
    assert len(places) - len(set(places)) == len(shared)


@pytest.mark.slow  # with `make bits`
def test_stopped_at_steps_it_goes_on_bit_for_bit(made):
    recipe, folder = load_recipe(str(made / "tied.yaml"), []), made / "stopped"
    asked = []

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    for _ in range(20):
        try:
            train(recipe, run_dir=folder, stop=every_fourth)
            break
        except Interrupted:
            continue
    assert outcome(folder) == outcome(made / "run")


def test_loaded_it_is_tied_and_gives_the_same_logits(made):
    config = read_config(made / "run" / "model")
    architecture = Architecture.parse(config["architecture"], "config.json")
    assert architecture.own == ("batch_norm",)
    again, trained = load(made / "run", "mean"), stage(made, "own").eval()
    assert torch.equal(again.head_logits(IMAGES), trained.head_logits(IMAGES))
    assert again.head2.fc.weight is again.head1.fc.weight
    old = Architecture.parse({k: v for k, v in config["architecture"].items() if k != "own"}, "config.json")
    assert old.own is None and len(list(old.create().head2.parameters())) == len(list(base().parameters()))


@pytest.mark.parametrize("head", ["head1", "head2"])
def test_a_head_is_exported_as_a_plain_classifier(made, tmp_path, head):
    result = CliRunner().invoke(app, ["export", str(made / "run"), "--to", str(tmp_path / "m"), "--output-of", head])
    assert result.exit_code == 0, result.output
    exported, trained = load(tmp_path / "m"), stage(made, "own").eval()
    assert exported.state_dict().keys() == base().state_dict().keys()
    assert exported.state_dict().keys() == read_state(tmp_path / "m" / "model.safetensors").keys()
    assert torch.equal(exported(IMAGES), trained.view(head)(IMAGES))
    card, number = (tmp_path / "m" / "README.md").read_text(), head.removeprefix("head")
    assert f"A single-head classifier, exported from head {number} of a model of several, on cnn" in card
    (row,) = (row for row in _rows(made) if row["name"] == f"head {number}")
    assert f"| clean | {100 * row['clean_accuracy']:.2f} |" in card
    export(made / "run", tmp_path / "m", output=head)  # the very same, again
    assert "This model is one of several routes. Clean accuracy of one route" in card
    with pytest.raises(UserError, match="holds something already"):
        export(made / "run", tmp_path / "m", output="head1" if head == "head2" else "head2")
    with pytest.raises(UserError, match="--output-of mean: must be a head, one of head1, head2"):
        export(made / "run", tmp_path / "other", output="mean")


def test_weights_of_tied_heads_fill_tied_heads_and_others_are_told(made):
    plan = Architecture.parse(read_config(made / "run" / "model")["architecture"], "config.json")
    file = made / "run" / "model" / "model.safetensors"
    tied = plan.create()
    assert load_base_weights(tied, file, plan) is True
    assert shared_of(tied) == shared_of(stage(made, "own"))
    apart = plan.model_copy(update={"own": None})
    untied = apart.create()
    with pytest.raises(UserError, match="these weights are not for this CNN: "):
        load_base_weights(untied, file, apart)
    with pytest.raises(UserError, match="differ in these weights, and are one tensor in the model"):
        load_state(tied, untied.state_dict(), "weights")


def test_init_with_a_whole_tied_model_keeps_head_2_and_reset_resets_its_own_alone(made, tmp_path):
    words = ["stages.base.epochs=0", "stages.both.epochs=0", "stages.own.epochs=0"]
    source = str(made / "run")
    recipe = load_recipe(str(made / "tied.yaml"), [*words, f"stages.both.init={source}"])
    train(recipe, run_dir=tmp_path / "again")
    trained = stage(made, "own").state_dict()
    for name, tensor in load_stage(tmp_path / "again")[0].state_dict().items():
        assert torch.equal(tensor, trained[name]), name

    recipe = load_recipe(str(made / "tied.yaml"), [*words, f"stages.both.init={source}", "stages.own.init=reset"])
    train(recipe, run_dir=tmp_path / "reset")
    reset = load_stage(tmp_path / "reset")[0]
    assert all(torch.equal(tensor, trained[f"head1.{name}"]) for name, tensor in reset.head1.state_dict().items())
    affine = [p for n, p in reset.head2.named_parameters() if is_norm(n) and n.endswith("weight")]
    assert affine
    assert all(bool((p == 1).all()) for p in affine)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.second_head=clone", "model.own=[batch_norm]"], "model.own: says what tied heads do not share"),
        (["model.own=[]"], "model.own: must name something"),
        (["model.attach_at=null"], "model.second_head: tied needs attach_at"),
        (
            ["stages.base.train=[head1]", "stages.base.objective={name: distilled, teacher: head2, student: head1}"],
            "stages.base.train: head1 must not be trained: head2, which is tied to it",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(made, words, says):
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as caught:
        load_recipe(str(made / "tied.yaml"), words)
    assert "\n" not in str(caught.value)


def test_own_that_matches_nothing_is_refused_before_anything_is_written(made, tmp_path):
    recipe = load_recipe(str(made / "tied.yaml"), ["model.own=layer9.*"])
    assert recipe.model.own == ("layer9.*",)
    with pytest.raises(UserError, match=r"own: 'layer9\.\*' matches nothing in the second head; it has batch_norm"):
        train(recipe, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_two_routes_in_one_forward_go_on_bit_for_bit_and_are_loaded_and_exported(made, tmp_path):
    changes = ["model.own=[affine]", "stages.both.forward=joint",
               "stages.both.objective={name: hybrid, clean: head1, robust: head2}"]  # fmt: skip
    recipe, asked = load_recipe(str(made / "tied.yaml"), changes), []
    train(recipe, run_dir=tmp_path / "whole")

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    for _ in range(20):
        try:
            train(recipe, run_dir=tmp_path / "stopped", stop=every_fourth)
            break
        except Interrupted:
            continue
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    again = load(tmp_path / "whole", "mean")
    assert again.head2.stage1[1].running_mean is again.head1.stage1[1].running_mean
    export(tmp_path / "whole", tmp_path / "plain", output="head2")
    assert torch.equal(load(tmp_path / "plain")(IMAGES), again.head_logits(IMAGES)[:, 1])


@pytest.mark.slow
def test_routes_are_measured_by_a_command_and_shown_in_the_report(made):
    words = ["evaluate", str(made / "run"), "--routes", "all", "--attack", "pgd-1", "--limit", "16", "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Clean accuracy of one route beside robust accuracy of another is a pair of classifiers" in said
    told = json.loads(next((made / "run" / "evaluations").glob("*/routes.json")).read_text())
    assert (told["clean"], told["robust"], len(told["routes"])) == ("head1", "head2", 4)
    result = CliRunner().invoke(app, ["report", str(made / "run"), "-o", str(made / "report.html")])
    assert result.exit_code == 0, result.output
    page = (made / "report.html").read_text()
    assert "clean statistics, robust affine" in page and "Transfer between routes" in page
    assert "A claim is one route, or a merging rule attacked as a whole." in page
    refused = CliRunner().invoke(app, [*words, "--output-of", "head1"])
    assert "leave --output-of out" in str(refused.exception)
