"""Models on disk: what is saved comes back to the bit, and nothing that is not a model is taken for one, or run."""

import json
import os
import pickle
import shutil

import pytest
import torch

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier
from dualhead.saving.architecture import CONFIG, WEIGHTS, Architecture, read_config
from dualhead.saving.models import find_model, load, load_base_weights, save_model, view
from dualhead.system.generators import all_generator_states

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def architecture(attach_at="stage1", classes=4, width=4, aggregator="pairwise_cnn"):
    return Architecture(
        backbone={"name": "cnn", "width": width, "stages": 2, "convolutions": 1},
        attach_at=attach_at,
        aggregator={"name": aggregator} if attach_at else None,
        num_classes=classes,
        image_shape=(1, 8, 8),
        mean=(0.3,),
        std=(0.4,),
    )


def made(plan, seed=0):
    """A network whose batch-norm statistics have moved."""
    torch.manual_seed(seed)
    model = plan.create()
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(16, 1, 8, 8))
    return model.eval()


@pytest.fixture(params=["plain", "dual"])
def plan(request):
    return architecture() if request.param == "dual" else architecture(attach_at=None)


def test_the_logits_come_back_to_the_bit(tmp_path, plan):
    model = made(plan)
    save_model(tmp_path / "m", model, plan, {"output": "aggregate" if plan.attach_at else "model"})
    torch.manual_seed(99)
    before = all_generator_states(IMAGES.device)
    again = load(tmp_path / "m")
    assert all_generator_states(IMAGES.device) == before
    assert not again.training
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [CONFIG, WEIGHTS]


def test_a_run_is_found_by_its_folder(tmp_path, plan):
    model = made(plan)
    save_model(tmp_path / "run" / "model", model, plan, {"output": "aggregate" if plan.attach_at else "model"})
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"
    assert torch.equal(load(tmp_path / "run")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("output", ["head1", "head2", "mean", "aggregate"])
def test_outputs_by_name(tmp_path, output):
    plan = architecture()
    model = made(plan)
    save_model(tmp_path, model, plan, {"output": "head1"})
    heads = model.head_logits(IMAGES)
    expected = {
        "head1": heads[:, 0],
        "head2": heads[:, 1],
        "mean": heads.mean(1),
        "aggregate": model(IMAGES),
    }[output]
    assert torch.allclose(load(tmp_path, output)(IMAGES), expected)
    assert torch.equal(load(tmp_path)(IMAGES), heads[:, 0])
    assert torch.allclose(view(model, output)(IMAGES), expected)


def test_outputs_that_do_not_exist_are_refused(tmp_path):
    save_model(tmp_path / "dual", made(architecture()), architecture(), {"output": "aggregate"})
    save_model(tmp_path / "plain", made(architecture(None)), architecture(None), {})
    with pytest.raises(UserError, match="the model has head1, head2, mean, aggregate"):
        load(tmp_path / "dual", "model")
    with pytest.raises(UserError, match="has no second head; leave it out"):
        load(tmp_path / "plain", "head1")


# ---- starting from weights that exist


@pytest.mark.parametrize("form", ["folder", "safetensors", "torch", "wrapped"])
def test_weights_of_the_plain_backbone_fill_trunk_and_head_1(tmp_path, form):
    base, dual = made(architecture(None)), made(architecture(), seed=1)
    before = {name: tensor.clone() for name, tensor in dual.state_dict().items()}
    save_model(tmp_path / "m", base, architecture(None), {})
    path = {"folder": tmp_path / "m", "safetensors": tmp_path / "m" / WEIGHTS}.get(form, tmp_path / "w.pt")
    if form == "torch":
        torch.save(base.state_dict(), path)
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.{k}": v for k, v in base.state_dict().items()}, "epoch": 3}, path)
    load_base_weights(dual, path, architecture())
    assert torch.equal(view(dual, "head1").eval()(IMAGES), base(IMAGES))
    for name, tensor in dual.state_dict().items():
        if name.startswith(("head2.", "aggregator.")):
            assert torch.equal(tensor, before[name])


def test_weights_of_the_whole_network_fill_it(tmp_path):
    source, target = made(architecture()), made(architecture(), seed=1)
    save_model(tmp_path / "run" / "model", source, architecture(), {})
    assert not torch.equal(source(IMAGES), target(IMAGES))
    load_base_weights(target, tmp_path / "run", architecture())
    assert torch.equal(source(IMAGES), target.eval()(IMAGES))


@pytest.mark.parametrize(("kind", "other"), [("dual", {"classes": 5}), ("dual", {"width": 8}), ("plain", {"width": 8})])
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path, kind, other):
    plan = architecture("stage1" if kind == "dual" else None)
    model = made(plan)
    before = model(IMAGES)
    save_model(tmp_path, made(architecture(None, **other)), architecture(None, **other), {})
    with pytest.raises(UserError, match="of another shape") as caught:
        load_base_weights(model, tmp_path, plan)
    assert str(tmp_path) in str(caught.value)
    assert torch.equal(model.eval()(IMAGES), before)


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file of weights"):
        load_base_weights(made(architecture()), tmp_path, architecture())
    with pytest.raises(UserError, match="there is no such file of weights"):
        load_base_weights(made(architecture()), tmp_path / "nothing.pt", architecture())


class Attacker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("form", ["pickle", "torch", "inside a state dict"])
def test_a_pickle_with_code_is_refused_and_has_no_effect(tmp_path, form):
    effect, path = tmp_path / "effect", tmp_path / "weights.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Attacker(str(effect))))
    elif form == "torch":
        torch.save(Attacker(str(effect)), path)
    else:
        torch.save({**made(architecture(None)).state_dict(), "extra": Attacker(str(effect))}, path)
    with pytest.raises(UserError, match=r"refused|neither a safetensors file nor one of torch\.save") as caught:
        load_base_weights(made(architecture(None)), path, architecture(None))
    assert "\n" not in str(caught.value)
    assert not effect.exists()
    # The same file read without care does run it, so the test can fail.
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert effect.exists()


# ---- what is damaged


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "m", made(architecture()), architecture(), {"output": "aggregate"})
    return tmp_path / "m"


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no finished model"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no finished model"),
        (shutil.rmtree, "there is no such folder"),
        (lambda f: (f / CONFIG).write_text("{"), r"config\.json: cannot be read"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"config\.json: cannot be read"),
        (lambda f: (f / CONFIG).write_text("[]"), "has no key 'architecture'"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-50]), "not a whole safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "neither a safetensors file nor one of torch.save"),
        (lambda f: edit(f, lambda c: c["architecture"].pop("mean")), r"config\.json: .*mean: missing"),
        (lambda f: edit(f, lambda c: c["architecture"].update(mean=[0, 0])), "mean and a std per channel|channels"),
        (lambda f: edit(f, lambda c: c["architecture"].update(num_classes=7)), "of another shape"),
        (lambda f: edit(f, lambda c: c["architecture"].update(attach_at="stage9")), "stage9"),
        (lambda f: edit(f, lambda c: c["architecture"].update(evil=1)), "evil: unknown key"),
        (lambda f: edit(f, lambda c: c["architecture"]["backbone"].update(name="nn")), "unknown backbone 'nn'"),
        (lambda f: edit(f, lambda c: c.update(output="everything")), "output 'everything'"),
    ],
)
def test_a_damaged_model_is_one_clear_line(saved, damage, words):
    damage(saved)
    with pytest.raises(UserError, match=words) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_facts_are_kept_beside_the_architecture(tmp_path):
    facts = {"class_names": ["a", "b"], "threat": {"norm": "L2", "eps": 0.5}, "output": "mean", "recipe": "r"}
    save_model(tmp_path, made(architecture()), architecture(), facts)
    config = read_config(tmp_path)
    assert {key: config[key] for key in facts} == facts
    assert Architecture.parse(config["architecture"], "x") == architecture()
    assert isinstance(Architecture.parse(config["architecture"], "x").create(), DualHeadClassifier)


def test_saving_again_replaces(saved):
    other = made(architecture(), seed=5)
    save_model(saved, other, architecture(), {"output": "aggregate"})
    assert torch.equal(load(saved)(IMAGES), other(IMAGES))


def test_a_function_that_a_download_names_is_not_run(tmp_path, monkeypatch, caplog):
    import huggingface_hub

    plan = architecture(attach_at=None)
    save_model(tmp_path / "m", made(plan), plan, {})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "m"))
    load("somebody/model")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    (tmp_path / "hostile.py").write_text("open('taken', 'w').close()\ndef make(): raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    config["architecture"]["backbone"] = {"name": "factory", "path": "hostile:make"}
    (tmp_path / "m" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"hostile:make.*is not run; if you trust it, load the folder"):
        load("somebody/model")
    own = [("backbone", "hostile.py:Own"), ("backbone", "hostile:Own"), ("aggregator", "hostile.py:Own")]
    inside = ({"name": "factory", "path": "hostile:Own"}, "hostile:Own", "factory:hostile:Own", {"name": "hostile:Own"})
    named = [(key, name, {"name": name}) for key, name in own]
    named += [("backbone", "hostile:Own", {"name": "with_norm", "norm": "none", "backbone": spec}) for spec in inside]
    for key, name, spec in named:
        architecture_named = {**plan.model_dump(mode="json"), key: spec}
        (tmp_path / "m" / CONFIG).write_text(json.dumps({**config, "architecture": architecture_named}))
        with pytest.raises(UserError, match=rf"{name}.*is not run; if you trust it, load the folder"):
            load("somebody/model")
    assert not (tmp_path / "taken").exists()
