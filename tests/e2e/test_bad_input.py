"""Every bad input ends with one line that says what is wrong, the right exit status, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dualhead.saving.architecture import CONFIG, WEIGHTS
from helpers.e2e import TINY, Ended, dualhead

# ---- a world of bad things


def png(pixels=None, mode="L"):
    if pixels is None:
        pixels = np.full((8, 8) if mode == "L" else (8, 8, 3), 128, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, "PNG")
    return stream.getvalue()


def table(path, images, labels, image="image", label="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {}
    if images is not None:
        columns[image] = pa.array([{"bytes": data, "path": None} for data in images], struct)
    if labels is not None:
        columns[label] = pa.array(labels)
    pq.write_table(pa.table(columns), path)


def image_folder(root, parts, mode="L"):
    """`{"train": {"a": 3}}`: three images of class a."""
    for part, classes in parts.items():
        for name, count in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(png(mode=mode))


def make_data(root):
    grey, labels = [png()] * 20, [0, 1] * 10
    for name in ("no_image", "no_label", "text_label", "broken", "one_class", "negative", "mix", "sizes", "truncated"):
        table(root / name / "test-0.parquet", grey, labels)
    table(root / "no_image" / "train-0.parquet", None, labels)
    table(root / "no_label" / "train-0.parquet", grey, None)
    table(root / "text_label" / "train-0.parquet", grey, ["cat", "dog"] * 10)
    table(root / "broken" / "train-0.parquet", [*grey[:7], b"no image", *grey[8:]], labels)
    table(root / "truncated" / "train-0.parquet", [*grey[:3], grey[0][:40], *grey[4:]], labels)
    table(root / "one_class" / "train-0.parquet", grey, [0] * 20)
    table(root / "one_class" / "test-0.parquet", grey, [0] * 20)
    table(root / "negative" / "train-0.parquet", grey, [*labels[:5], -1, *labels[6:]])
    table(root / "mix" / "train-0.parquet", [png(mode="RGB")] * 20, labels)
    table(root / "sizes" / "train-0.parquet", [*grey[:4], png(np.zeros((5, 7), np.uint8)), *grey[5:]], labels)
    table(root / "no_test" / "train-0.parquet", grey, labels)
    table(root / "no_train" / "test-0.parquet", grey, labels)
    table(root / "good" / "train-0.parquet", grey, labels)
    table(root / "good" / "test-0.parquet", grey, labels)
    table(root / "no_rows" / "train-0.parquet", [], pa.array([], pa.int64()))
    table(root / "no_rows" / "test-0.parquet", grey, labels)
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "train-0.parquet").write_text("these are words")
    (root / "notes.txt").write_text("these are words")
    image_folder(root / "folder_stray", {"train": {"a": 3, "b": 3}, "test": {"a": 2, "c": 2}})
    image_folder(root / "folder_broken", {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}})
    (root / "folder_broken" / "train" / "a" / "0.png").write_bytes(b"GIF89a")


RECIPE = """
data: {source: digits, validation: 100}
model: {backbone: cnn-4}
threat: {norm: Linf, eps: 0.1}
stages: [{name: one, train: [model], objective: sat, epochs: 1}]
evaluate: {limit: 10}
"""


def make_recipes(root, effect):
    root.mkdir()
    texts = {
        "plain": RECIPE,
        "empty": "",
        "list": "[1, 2]",
        "words": "just words",
        "broken": "data: {source: digits\nmodel: [",
        "tabs": "data:\n\tsource: digits\n",
        "tag": f"data: !!python/object/apply:os.mkdir ['{effect}']\n",
        "tag_name": "data: !!python/name:os.system\n",
        "tag_new": f"data: !!python/object/new:os.mkdir ['{effect}']\n",
        "date": "data: {source: 2021-02-30}\n",
        "circle": "extends: circle.yaml\n",
        "circle_a": "extends: circle_b.yaml\n",
        "circle_b": "extends: circle_a.yaml\n",
        "two_parents": "extends: [plain.yaml, digits]\n",
        "orphan": "extends: nothing.yaml\n",
        "parent": "extends: broken.yaml\n",
        "anchor": RECIPE.replace("data: {source: digits", "data: &a {source: *a"),
        "no_stages": RECIPE.replace("stages:", "stagse:"),
        "no_threat": RECIPE.replace("threat: {norm: Linf, eps: 0.1}\n", ""),
        "twice": RECIPE.replace("stages: [", "stages: [{name: one, train: [model], objective: sat, epochs: 1}, "),
        "stages_map": RECIPE.replace("stages: [", "stages: {one: ").replace("epochs: 1}]", "epochs: 1}}"),
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    (root / "folder.yaml").mkdir()


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def make_models(root, run, effect):
    root.mkdir()
    shutil.copytree(run / "model", root / "good")
    for name in ("cut", "no_config", "bad_config", "bad_json", "words"):
        shutil.copytree(run / "model", root / name)
    weights = root / "cut" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "no_config" / CONFIG).unlink()
    (root / "bad_json" / CONFIG).write_text("{")
    config = json.loads((root / "bad_config" / CONFIG).read_text())
    config["architecture"]["num_classes"] = 7
    (root / "bad_config" / CONFIG).write_text(json.dumps(config))
    (root / "words" / WEIGHTS).write_text("these are words")
    torch.save({"state_dict": MakesFolder(effect)}, root / "code.pt")
    torch.save({"fc.weight": torch.zeros(3, 8)}, root / "other.pt")
    (root / "zeros.pt").write_bytes(b"\0" * 100)


def make_runs(root, run):
    """Runs in all stages of undoing."""
    root.mkdir()
    (root / "file").write_text("a file")
    (root / "stuff").mkdir()
    (root / "stuff" / "notes.txt").write_text("mine")
    for name in ("unfinished", "damaged", "bad_yaml", "list_yaml", "bad_summary", "bad_checkpoint", "bad_results"):
        shutil.copytree(run, root / name)
    shutil.rmtree(root / "unfinished" / "model")
    for summary in (root / "unfinished" / "checkpoints").rglob("summary.json"):
        summary.unlink()
    for state in (root / "damaged" / "checkpoints").rglob("*.pt"):
        state.write_bytes(state.read_bytes()[:200])
    for weights in (root / "bad_checkpoint" / "checkpoints").rglob("*.safetensors"):
        weights.write_bytes(b"these are words")
    (root / "bad_yaml" / "config.yaml").write_text("data: {")
    (root / "list_yaml" / "config.yaml").write_text("[]")
    (root / "bad_results" / "evaluation" / "results.json").write_text("{")


FACTORIES = """
import torch
number = 3
def fails(): raise RuntimeError("no weights\\nfor you")
def words(): return "model"
def five(num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
def colour(num_classes): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
def linear(num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


@pytest.fixture(scope="module")
def world(finished_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    effect = root / "effect"
    make_data(root / "data")
    make_recipes(root / "recipes", effect)
    make_models(root / "models", finished_run, effect)
    make_runs(root / "runs", finished_run)
    (root / "mymodels.py").write_text(FACTORIES)
    (root / "mybroken.py").write_text("import no_such_thing\n")
    return SimpleNamespace(root=root, effect=effect, run=finished_run)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, world):
    """The Hub is not asked: its names fail at once, as without a network."""
    import datasets
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("there is no network\nin tests")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(world.root)


def listing(root):
    """All files with their sizes and times, and all folders."""
    paths = [path for path in root.rglob("*") if "__pycache__" not in path.parts]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in paths}


BEGINNINGS = {
    "NEW": "train digits --run-dir new",  # then overrides
    "OWN": "train recipes/plain.yaml --run-dir new",
    "RECIPE": "train --run-dir new",
}
BAD = [
    ("nonsense", "No such command 'nonsense'"),
    ("trian digits", "No such command 'trian'"),
    ("train", "Missing argument"),
    ("train digits --rundir x", "--rundir"),
    ("train digits --run-dir", "Option '--run-dir' requires an argument"),
    ("list nothing", "list nothing: unknown kind"),
    ("list objectives attacks", "unexpected extra argument"),
    ("demo digits", "unexpected extra argument"),
    ("evaluate", "Missing argument"),
    ("export", "Missing argument"),
    ("RECIPE digit", "recipe 'digit' is neither a file nor shipped; did you mean 'digits'?"),
    ("RECIPE nowhere.yaml", "recipe nowhere.yaml: no such file"),
    ("RECIPE recipes/folder.yaml", "recipe recipes/folder.yaml: no such file"),
    ("RECIPE recipes", "recipe 'recipes' is neither a file nor shipped;"),
    ("RECIPE ''", "recipe '' is neither a file nor shipped;"),
    ("RECIPE recipes/empty.yaml", "must be a mapping with keys data, model, threat, stages"),
    ("RECIPE recipes/list.yaml", "must be a mapping with keys data, model, threat, stages"),
    ("RECIPE recipes/words.yaml", "must be a mapping with keys data, model, threat, stages"),
    ("RECIPE recipes/broken.yaml", "line 2 is not valid YAML"),
    ("RECIPE recipes/tabs.yaml", "line 2 is not valid YAML"),
    ("RECIPE recipes/binary.yaml", "is not valid YAML"),
    ("RECIPE recipes/date.yaml", "holds a value that is not valid YAML"),
    ("RECIPE recipes/tag.yaml", "line 1 is not valid YAML"),
    ("RECIPE recipes/tag_name.yaml", "line 1 is not valid YAML"),
    ("RECIPE recipes/tag_new.yaml", "line 1 is not valid YAML"),
    ("RECIPE recipes/circle.yaml", "extends must name one other recipe, without a circle"),
    (
        "RECIPE recipes/circle_a.yaml",
        "recipe recipes/circle_a.yaml: extends: recipe recipes/circle_b.yaml: extends: recipe recipes/circle_",
    ),
    ("RECIPE recipes/two_parents.yaml", "extends must name one other recipe, without a circle"),
    ("RECIPE recipes/orphan.yaml", "recipe recipes/orphan.yaml: extends: recipe nothing.yaml: no such file"),
    ("RECIPE recipes/anchor.yaml", "is nested too deeply, or an anchor holds itself"),
    ("RECIPE recipes/no_stages.yaml", "stagse: unknown key; did you mean 'stages'?"),
    ("RECIPE recipes/no_threat.yaml", "threat: missing; this key is required"),
    ("RECIPE recipes/parent.yaml", "line 2 is not valid YAML"),
    ("RECIPE recipes/twice.yaml", "stages.0.name: two stages are called 'one'; give each its own name"),
    ("RECIPE recipes/stages_map.yaml", "stages: input should be a valid list"),
    ("NEW threat.eps", "override 'threat.eps' is not understood; write KEY=VALUE, e.g. data.source=digits"),
    ("NEW =1", "override '=1' is not understood; write KEY=VALUE, e.g. data.source=digits"),
    ("NEW threat..eps=1", "override 'threat..eps=1' is not understood; write KEY=VALUE, e.g. data.source=digits"),
    ("NEW 'threat.eps=[1'", "line 1 is not valid YAML"),
    ("NEW 'threat.eps=!!python/object/apply:os.mkdir [effect]'", "line 1 is not valid YAML"),
    (
        "NEW stages.7.epochs=1",
        "stages.7.epochs=1: no item '7' in the list; write its position, its name (main_head, second_head, ag",
    ),
    (
        "NEW stages.first.epochs=1",
        "stages.first.epochs=1: no item 'first' in the list; write its position, its name (main_head, second_",
    ),
    ("NEW stages.main_head=1", "stages.main_head=1: name the key to change inside 'main_head'"),
    ("NEW threat.eps.x=1", "threat.eps.x=1: 'eps' holds 0.15, which has no keys"),
    ("NEW extends=cifar10_cpu", "recipe digits: extends: unknown key"),
    ("NEW dta.source=digits", "dta.source=digits: unknown key; write data.source=digits"),
    ("NEW stages.main_head.epohcs=1", "stages.main_head.epohcs: unknown key; did you mean 'epochs'?"),
    (
        "NEW stages.*.epochs=many",
        "stages.0.epochs: input should be a valid integer, unable to parse string as an integer (got 'many')",
    ),
    ("NEW stages.*.epochs=-1", "stages.0.epochs: input should be greater than or equal to 0 (got -1)"),
    (
        "NEW stages.*.epochs=1.5",
        "stages.0.epochs: input should be a valid integer, got a number with a fractional part (got 1.5)",
    ),
    ("NEW stages.*.batch_size=0", "stages.0.batch_size: input should be greater than or equal to 1 (got 0)"),
    ("NEW stages=[]", "stages: list should have at least 1 item after validation, not 0"),
    ("NEW stages=3", "stages: input should be a valid list (got 3)"),
    ("NEW 'stages=[1]'", "stages.0: must hold the keys name, train"),
    ("NEW stages.*.keep=middle", "stages.0.keep: input should be 'best' or 'last' (got 'middle')"),
    (
        "NEW stages.main_head.name=../x",
        "stages.main_head.name: string should match pattern '^[A-Za-z0-9_]+$' (got '../x')",
    ),
    ("NEW name=../../x", "name: string should match pattern '^[A-Za-z0-9_.-]+$' (got '../../x')"),
    ("NEW name=", "name: input should be a valid string (got nothing)"),
    (
        "NEW data=digits",
        "data: must hold the keys source, image_column, label_column, image_size, resample, channels, depth",
    ),
    (
        "NEW model=null",
        "model: must hold the keys backbone, attach_at, heads, aggregator, second_head, own, normalize; got None",
    ),
    ("NEW runtime.seed=-1", "runtime.seed: input should be greater than or equal to 0 (got -1)"),
    ("NEW runtime.seed=99999999999999999999", "runtime.seed: input should be less than or equal to"),
    ("NEW runtime.save_minutes=0", "runtime.save_minutes: input should be greater than 0"),
    ("NEW runtime.precision=fp8", "runtime.precision: input should be 'float32', 'tf32', 'bf16' or 'auto' (got 'fp8')"),
    (
        "NEW runtime.precision=tf32 runtime.device=cpu",
        "runtime.precision: tf32 needs a GPU that has it, and this is cpu",
    ),
    ("NEW runtime.device=tpu", "device 'tpu' is not usable here; write auto, cpu, cuda or cuda:0"),
    ("NEW runtime.device=cuda:99", "device 'cuda:99' is not usable here; write auto, cpu, cuda or cuda:0"),
    ("NEW runtime.device=", "runtime.device: input should be a valid string (got nothing)"),
    ("NEW threat.eps=0", "threat: eps must be greater than 0, got 0; for images in [0, 1] write e.g. 8/255"),
    (
        "NEW threat.eps=-8/255",
        "threat: eps must be greater than 0, got -0.0313725; for images in [0, 1] write e.g. 8/255",
    ),
    ("NEW threat.eps=8", "threat: eps 8 exceeds 1, the whole range of an image in [0, 1]; did you mean 8/255?"),
    ("NEW threat.eps=1/0", "threat: '1/0' is not a number; write it like 0.031 or 8/255"),
    ("NEW threat.eps=.nan", "threat: nan is not finite; write a number like 0.031 or 8/255"),
    ("NEW threat.eps=.inf", "threat: inf is not finite; write a number like 0.031 or 8/255"),
    ("NEW threat.eps=null", "threat: None is not a number; write it like 0.031 or 8/255"),
    ("NEW threat.eps=true", "threat: True is not a number; write it like 0.031 or 8/255"),
    ("NEW threat.norm=L7", "threat: norm 'L7' is not known; use one of Linf, L2, L1"),
    ("NEW threat=0.3", "threat: must be {norm: ..., eps: ...}, {name: ..., eps: ...} or short, as L2:0.5; got 0.3"),
    ("NEW 'threat={norm: Linf}'", "threat.eps: missing; this key is required, e.g. 8/255"),
    ("NEW threat.epsilon=0.3", "threat.epsilon=0.3: unknown key; write threat.eps=0.3"),
    ("NEW stages.*.objective=tradse", "stages.0.objective: unknown objective 'tradse'; did you mean 'trades'?"),
    ("NEW stages.*.objective=3", "stages.0.objective: input should be an instance of Objective (got 3)"),
    ("NEW 'stages.*.objective={beta: 3}'", "stages.0.objective: objective needs a name, {name: ...}; known: "),
    (
        "NEW stages.main_head.objective.beta=-1",
        "stages.main_head.objective: beta must be at least 0, got -1; TRADES uses 1 to 6",
    ),
    (
        "NEW stages.main_head.objective.betta=1",
        "stages.main_head.objective.betta: objective 'trades' has no such key; did you mean 'beta'?",
    ),
    ("NEW stages.*.attack=nothing", "stages.0.attack: unknown attack 'nothing'"),
    (
        "NEW model.aggregator=mean",
        "stages.aggregator.train: aggregator has no weights that learn, as of the",
    ),
    (
        "NEW stages.*.attack.loss=margin",
        "stages.0: attack.loss: is for measuring; training climbs its objective's loss",
    ),
    ("NEW stages.*.attack.restarts=2", "stages.0: attack.restarts: is for measuring"),
    ("NEW stages.*.attack=apgd-ce", "stages.0: attack 'apgd-ce' cannot be trained with; use pgd or fgsm"),
    ("NEW stages.*.attack.steps=0", "stages.0.attack: steps must be at least 1, got 0"),
    ("NEW stages.*.attack.step_size=-1", "stages.0.attack: step_size must be greater than 0, got -1; write e.g. 2/255"),
    (
        "NEW stages.*.attack.start=somewhere",
        "stages.0.attack.start: input should be 'uniform', 'gaussian' or 'clean' (got 'somewhere')",
    ),
    ("NEW stages.*.optimiser=adamm", "stages.0.optimiser: unknown optimiser 'adamm'"),
    ("NEW stages.*.optimiser.lr=0", "stages.0.optimiser: lr must be greater than 0, got 0"),
    ("NEW stages.*.schedule=stepp", "stages.0.schedule: unknown schedule 'stepp'; did you mean 'step'?"),
    ("NEW stages.*.schedule.peak=2", "stages.0.schedule: peak must lie in (0, 1), got 2"),
    ("NEW model.backbone=resnet-19", "model.backbone.depth: input should be 18, 34 or 50 (got 19)"),
    (
        "NEW model.backbone=wideresnet-33-10",
        "model.backbone: depth must be 6 n + 4 with n at least 1, such as 10, 16, 28 or 34, got 33",
    ),
    ("NEW model.backbone=nothing", "model.backbone: unknown backbone 'nothing'"),
    ("NEW model.backbone=cnn-0", "model.backbone: width must be at least 1, got 0"),
    ("NEW model.aggregator=median", "model.aggregator: unknown aggregator 'median'; did you mean 'mean'?"),
    ("NEW validation.attack=pgd-x", "validation.attack: attack 'pgd-x' is not understood; write 'pgd-STEPS'"),
    ("NEW 'evaluate.attacks=[nothing]'", "evaluate.attacks.0: unknown attack 'nothing'"),
    ("NEW 'evaluate.attacks=[pgd-0]'", "evaluate.attacks.0: steps must be at least 1, got 0"),
    ("NEW 'evaluate.attacks=[pgd-5, pgd-5]'", "evaluate.attacks.1: pgd-5 is named twice"),
    ("NEW 'evaluate.attacks=[multihead]'", "evaluate.attacks: multihead cannot attack the outputs of one head"),
    ("train digits_natural --run-dir new 'evaluate.attacks=[pgd-5, multihead]'", "multihead needs several heads"),
    ("NEW evaluate.attacks=pgd-5", "evaluate.attacks: input should be a valid list (got 'pgd-5')"),
    ("NEW evaluate.limit=0", "evaluate.limit: input should be greater than 0"),
    ("NEW 'data.augment=[mirror]'", "data.augment.0: unknown augmentation 'mirror'"),
    ("NEW model.attach_at=stage9", "the model has no layer 'stage9'; did you mean 'stage3', 'stage2', 'stage1'?"),
    (
        "NEW model.attach_at=",
        "stages.main_head.train: the model has no second head (model.attach_at is not set), so its parts are model; g",
    ),
    (
        "NEW stages.main_head.train=[model]",
        "stages.main_head.train: the model has 2 heads, so its parts are trunk, head1, head2, aggregator; got 'model'",
    ),
    (
        "NEW 'stages.main_head.train=[tail]'",
        "stages.main_head.train.0: must be a part, one of head1, head2, ..., trunk, aggregator, model; got 'tail'",
    ),
    ("NEW model.heads=1", "model.heads: input should be greater than or equal to 2 (got 1)"),
    ("train digits_natural --run-dir new model.heads=3", "model.heads: needs model.attach_at, the layer from which"),
    (
        "NEW stages.main_head.train=[]",
        "stages.main_head.train: list should have at least 1 item after validation, not 0",
    ),
    ("NEW 'stages.main_head.train=[head1, head1]'", "stages.main_head: train names a part twice: head1, head1"),
    (
        "NEW stages.second_head.name=main_head",
        "stages.0.name: two stages are called 'main_head'; give each its own name",
    ),
    ("NEW 'model.normalize={mean: [0.5, 0.5], std: [1, 1]}'", "normalisation is for 2 channels, but the images have 1"),
    (
        "NEW 'model.normalize={mean: [0.5], std: [0]}'",
        "std must be greater than 0 in each channel, got [0.0]; 1 leaves a channel's scale",
    ),
    (
        "NEW model.normalize=imagenet",
        "model.normalize: must be data, none or {mean: [...], std: [...]}, got 'imagenet'",
    ),
    ("NEW stages.main_head.init=nowhere.pt", "stages.main_head.init: nowhere.pt: there is no such file of weights"),
    (
        "NEW stages.second_head.init=models/other.pt",
        "stages.second_head.init: models/other.pt: these weights are not for this CNN: 31 missing",
    ),
    (
        "NEW stages.main_head.init=models/code.pt",
        "stages.main_head.init: models/code.pt: refused, since reading it would run code",
    ),
    (
        "NEW stages.main_head.init=models/zeros.pt",
        "stages.main_head.init: models/zeros.pt: neither a safetensors file nor one of torch.save, or damaged",
    ),
    (
        "NEW stages.main_head.init=models/good",
        "stages.main_head.init: models/good/model.safetensors: these weights are not for this CNN: 32 missing",
    ),
    ("NEW model.backbone=mymodels:nothing", "model 'mymodels:nothing': module 'mymodels' has no 'nothing'"),
    (
        "NEW model.backbone=mymodels:number",
        "model 'mymodels:number': 'number' is a int; it must be a function that returns a new module",
    ),
    ("NEW model.backbone=mymodels:fails", "model 'mymodels:fails': the factory failed: RuntimeError: no weights"),
    ("NEW model.backbone=mymodels:words", "model 'mymodels:words': the factory returned str, not a torch.nn.Module"),
    (
        "NEW model.backbone=mymodels:five",
        "model 'mymodels:five': the model gives logits of shape (1, 5) for one image; the data have 10 classe",
    ),
    (
        "NEW model.backbone=mymodels:colour",
        "model 'mymodels:colour': the model fails on one image of shape (1, 8, 8): RuntimeError",
    ),
    (
        "NEW model.backbone=mybroken:model",
        "model 'mybroken:model': importing 'mybroken' failed: ModuleNotFoundError: No module named 'no_such_t",
    ),
    ("NEW model.backbone=nomodule:model", "model 'nomodule:model': there is no module 'nomodule'"),
    ("NEW data.source=./nowhere", "data.source './nowhere': no such file or folder"),
    (
        "NEW data.source=no/such",
        "data.source 'no/such': no such file or folder, and the Hugging Face Hub does not give it either",
    ),
    ("NEW data.source=", "data.source: input should be a valid string (got nothing)"),
    ("NEW data.validation=1.5", "data.validation: must be a fraction in [0, 1) or a whole number of images, got 1.5"),
    ("NEW data.validation=-1", "data.validation: must be a fraction in [0, 1) or a whole number of images, got -1"),
    (
        "NEW data.validation=99999",
        "data.validation: cannot hold out 99999 of 1397 images; give a number from 1 to 1396",
    ),
    (
        "NEW data.validation=1",
        "data.validation: cannot hold out 1 of 1397 images: that is fewer than 1 image for each of 10 classes",
    ),
    (
        "NEW data.validation=0",
        "stages.main_head.keep: best needs held-out images, but data.validation is 0; set keep: last or data.validati",
    ),
    ("NEW data.train_limit=0", "data.train_limit: input should be greater than 0"),
    ("NEW 'evaluate.attacks=[]'", "evaluate.attacks: must name at least one, e.g. [pgd-40]"),
    ("NEW 'data.image_size=[8]'", "data.image_size.1: missing; this key is required"),
    ("NEW 'data.image_size=[0, 8]'", "data.image_size must be [height, width], both at least 1, got [0, 8]"),
    ("NEW data.image_column=nothing", "data.source 'digits': data.image_column: there is no column 'nothing'"),
    (
        "OWN data.source=data/empty",
        "data.source 'data/empty': empty/ holds neither parquet files nor class folders with images",
    ),
    ("OWN data.source=data/text", "data.source 'data/text': train-0.parquet is not a readable parquet file"),
    (
        "OWN data.source=data/notes.txt",
        "data.source 'data/notes.txt': a file must be parquet, .npz or .npy, got .txt; images go in train/CLASS/",
    ),
    (
        "OWN data.source=data/no_image",
        "data.source 'data/no_image': no image column was found; set data.image_column to a column of encoded",
    ),
    (
        "OWN data.source=data/no_label",
        "data.source 'data/no_label': no label column was found; set data.label_column to a column of labels: int",
    ),
    ("OWN data.source=data/broken", "data.source 'data/broken': row 7 of train-0.parquet is not a readable image"),
    (
        "OWN data.source=data/truncated",
        "data.source 'data/truncated': row 3 of train-0.parquet is not a readable image",
    ),
    (
        "OWN data.source=data/one_class",
        "data.source 'data/one_class': column 'label' has 1 class; a classifier needs at least 2",
    ),
    (
        "OWN data.source=data/negative",
        "data.source 'data/negative': row 5 of train-0.parquet has label -1 (-1 often marks a part without la",
    ),
    ("OWN data.source=data/mix", "data.source data/mix: training and test images differ in channels (grey and colour)"),
    (
        "OWN data.source=data/sizes",
        "data.source 'data/sizes': images differ in size: row 0 of train-0.parquet is 8x8, row 4 of train-0.p",
    ),
    (
        "OWN data.source=data/no_test",
        "data.source 'data/no_test': there is no test part (test or testing or validation or valid or val), only",
    ),
    (
        "OWN data.source=data/no_train",
        "data.source 'data/no_train': there is no train part (train or training), only test; name its files l",
    ),
    ("OWN data.source=data/no_rows", "data.source 'data/no_rows': train-0.parquet has no rows"),
    (
        "OWN data.source=data/folder_stray",
        "data.source 'data/folder_stray': test/c is a class that train/ does not have; its classes: a, b",
    ),
    ("OWN data.source=data/folder_broken", "data.source 'data/folder_broken': train/a/0.png is not a readable image"),
    ("OWN data.source=data/good", "data.validation: cannot hold out 100 of 20 images; give a number from 1 to 19"),
    ("train digits --run-dir runs/file", "--run-dir runs/file: it is a file; choose another folder"),
    ("train digits --run-dir runs/file/below", "runs/file is a file; choose another folder"),
    ("train digits --run-dir runs/stuff", "runs/stuff: holds something that is not a run"),
    ("train digits --run-dir runs/bad_yaml", "line 1 is not valid YAML"),
    (
        "train digits --run-dir runs/list_yaml",
        "runs/list_yaml/config.yaml: must hold the keys name, data, model, threat, stages, validation, evalua",
    ),
    (
        "train digits TINY --run-dir RUN threat.eps=0.2 stages.*.epochs=2 runtime.seed=5",
        "holds a run of another recipe, which differs in runtime.seed, stages.0.epochs, stages.1.epochs, stag",
    ),
    (
        "train digits TINY --run-dir RUN model.attach_at=stage2",
        "holds a run of another recipe, which differs in model.attach_at",
    ),
    (
        "train digits_natural --run-dir RUN",
        "holds a run of another recipe, which differs in data.train_limit, data.validation, evaluate.attacks.",
    ),
    ("train digits --run-dir /dev/null/run", "--run-dir /dev/null/run: /dev/null is a file; choose another folder"),
    ("NEW 'model.normalize={mean: [0.5], std: [1], extra: 3}'", "model.normalize.extra: unknown key"),
    ("NEW 'model.normalize={mean: 0.5, std: [1]}'", "model.normalize.mean: input should be a valid list (got 0.5)"),
    (
        "evaluate runs/unfinished",
        "runs/unfinished: no stage is finished yet; `dualhead train` with the same recipe goes on with it",
    ),
    (
        "evaluate nowhere",
        "nowhere: there is no such folder",
    ),
    ("evaluate mymodels.py", "mymodels.py: is a file of code; write mymodels.py:FUNCTION, a function in it"),
    ("evaluate mymodels.linear", "there is no such folder; a function that makes a network is written mymodels:linear"),
    (
        "evaluate runs",
        "runs: holds no finished model (model.safetensors and config.json, also not in its folder model/)",
    ),
    ("evaluate resnet-18", "resnet-18: there is no such folder; it is the name of a network, which has no weights"),
    (
        "evaluate no/such --data digits --eps 0.1",
        "no/such: no such folder, and the Hub gives no such model (there is no network)",
    ),
    (
        "evaluate runs/stuff",
        "runs/stuff: holds no finished model (model.safetensors and config.json, also not in its folder model",
    ),
    ("evaluate runs/bad_yaml", "line 1 is not valid YAML"),
    (
        "evaluate runs/bad_checkpoint",
        "runs/bad_checkpoint/checkpoints/aggregator/best.safetensors: neither a safetensors file nor one of t",
    ),
    ("evaluate models/cut --data digits", "models/cut/model.safetensors: not a whole safetensors file"),
    (
        "evaluate models/words --data digits",
        "models/words/model.safetensors: neither a safetensors file nor one of torch.save, or damaged",
    ),
    (
        "evaluate models/no_config --data digits",
        "models/no_config: holds no finished model (model.safetensors and config.json, also not in its folder",
    ),
    (
        "evaluate models/bad_config --data digits",
        "10 classes of 1-channel images do not fit models/bad_config, which is for 7 classes",
    ),
    ("evaluate models/bad_json --data digits", "models/bad_json/config.json: cannot be read"),
    ("evaluate models/good", "--data is needed, since models/good is not a run; e.g. --data uoft-cs/cifar10"),
    ("evaluate models/good --data digits --stage main_head", "--stage is for runs, and models/good is none"),
    ("evaluate models/good --data digits --checkpoint last", "--checkpoint is for runs, and models/good is none"),
    (
        "evaluate models/good --data digits --output-of head3",
        "output 'head3': the model has head1, head2, mean, aggregate",
    ),
    (
        "evaluate mymodels:linear --data digits",
        "--eps is needed, since the model does not say for what it was trained; e.g. --eps 8/255",
    ),
    (
        "evaluate mymodels:linear --eps 0.1",
        "--data is needed, since mymodels:linear is not a run; e.g. --data uoft-cs/cifar10",
    ),
    (
        "evaluate hf:resnet --data digits --channels 3 --eps 0.1",
        "model 'hf:resnet': 'resnet' is a type of model and has no weights; name a folder or a Hub model",
    ),
    (
        "evaluate mymodels:nothing --data digits --eps 0.1",
        "model 'mymodels:nothing': module 'mymodels' has no 'nothing'",
    ),
    (
        "evaluate mymodels:five --data digits --eps 0.1",
        "model 'mymodels:five': the model gives logits of shape (1, 5) for one image; the data have 10 classe",
    ),
    ("evaluate nomodule:model --data digits --eps 0.1", "model 'nomodule:model': there is no module 'nomodule'"),
    ("evaluate RUN --norm L3", "norm 'L3' is not known; use one of Linf, L2"),
    ("evaluate RUN --eps 0", "--eps 0: at least one radius must be greater than 0"),
    ("evaluate RUN --eps abc", "'abc' is not a number; write it like 0.031 or 8/255"),
    ("evaluate RUN --eps=-1", "eps must be greater than 0, got -1; for images in [0, 1] write e.g. 8/255"),
    ("evaluate RUN --eps 8", "eps 8 exceeds 1, the whole range of an image in [0, 1]; did you mean 8/255?"),
    ("evaluate RUN --eps 0.1,x", "'x' is not a number; write it like 0.031 or 8/255"),
    ("evaluate RUN --eps ''", "'' is not a number; write it like 0.031 or 8/255"),
    ("evaluate RUN --limit 0", "--limit"),
    ("evaluate RUN --limit abc", "--limit"),
    ("evaluate RUN --batch-size 0", "--batch-size"),
    ("evaluate RUN --seed=-1", "--seed"),
    ("evaluate RUN --precision fp8", "--precision fp8: use auto, float32 or bf16"),
    ("evaluate RUN --device tpu", "device 'tpu' is not usable here; write auto, cpu, cuda or cuda:0"),
    ("evaluate RUN --stage third", "finished: main_head, second_head, aggregator"),
    ("evaluate RUN --checkpoint middle", "--checkpoint middle: use best or last"),
    ("evaluate RUN --output-of head3", "output 'head3': the model has head1, head2, mean, aggregate"),
    ("evaluate RUN --attack nothing", "attacks.0: unknown attack 'nothing'"),
    ("evaluate RUN --attack pgd-0", "attacks.0: steps must be at least 1, got 0"),
    ("evaluate RUN --attack pgd-3 --attack pgd-3", "attacks.1: pgd-3 is named twice"),
    ("evaluate RUN --data ./nowhere", "data.source './nowhere': no such file or folder"),
    ("evaluate RUN --output runs/file", "--output runs/file: it is a file; choose another folder"),
    ("evaluate RUN --output runs/file/below", "runs/file is a file; choose another folder"),
    ("layers nothing", "model: unknown backbone 'nothing'"),
    ("layers cnn-4 --image-shape 3x32", "--image-shape 3x32: write CHANNELSxHEIGHTxWIDTH, e.g. 3x32x32"),
    ("layers cnn-4 --classes 1", "--classes"),
    (
        "layers mymodels:fails --image-shape 1x8x8",
        "model 'mymodels:fails': the factory failed: RuntimeError: no weights",
    ),
    ("compare RUN nowhere", "nowhere: no such folder; name a run (runs/NAME) or a folder with results.json"),
    ("compare RUN runs/bad_results", "runs/bad_results/evaluation: its results cannot be read"),
    (
        "export runs/unfinished --to new",
        "runs/unfinished: holds no finished model; `dualhead train` with the same recipe goes on with it",
    ),
    ("export nowhere --to new", "nowhere: no such folder; name a finished run (runs/NAME)"),
    ("export RUN --to runs/stuff", "--to runs/stuff: holds something already; choose an empty or a new folder"),
    ("export RUN --to runs/file", "--to runs/file: holds something already; choose an empty or a new folder"),
]
"""What is typed, and what the line on standard error then says, among other things."""


def words_of(typed, world):
    first, _, rest = typed.partition(" ")
    words = []
    for word in shlex.split(f"{BEGINNINGS.get(first, first)} {rest}"):
        words += TINY if word == "TINY" else [str(world.run) if word == "RUN" else word]
    return words


def check(ended, status, says, world, before):
    assert ended.status == status, ended.err
    assert says in ended.error_line.replace(f"{world.root}/", "")  # paths in a recipe become absolute
    assert not ended.out
    assert not world.effect.exists(), "code inside the input was run"
    assert listing(world.root) == before[0], "files were written"
    assert listing(world.run) == before[1], "files were written in the run"


@pytest.mark.parametrize(("typed", "says"), BAD, ids=[typed for typed, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(typed, says, world):
    before = listing(world.root), listing(world.run)
    check(dualhead(*words_of(typed, world)), 2, says, world, before)


def test_damaged_states_are_a_failure_of_the_run_and_stay_as_they_are(world):
    before = listing(world.root), listing(world.run)
    ended = dualhead("train", "digits", *TINY, "--run-dir", "runs/damaged")
    check(ended, 1, "checkpoints are damaged; remove them to start anew", world, before)


def test_a_folder_that_may_not_be_written_to(world, monkeypatch):
    before = listing(world.root), listing(world.run)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check(dualhead("train", "digits", "--run-dir", "new"), 2, "no permission to write in", world, before)
    check(dualhead("evaluate", world.run, "--output", "new"), 2, "no permission to write in", world, before)


def test_a_disk_that_is_full_is_a_failure_of_the_run(world, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "new/config.yaml")

    monkeypatch.setattr("dualhead.runs.folder.write_text", full)
    ended = dualhead("train", "digits", *TINY, "--run-dir", "new", "--quiet")
    shutil.rmtree(world.root / "new")
    assert ended.status == 1
    assert ended.error_line == "new/config.yaml: No space left on device"


def test_debug_shows_where_and_still_ends_with_the_line(world):
    ended = dualhead("train", "nothing", "--debug")
    assert ended.status == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("dualhead: recipe 'nothing' is neither")


def test_in_a_process_of_its_own_without_a_cache_or_unicode(world):
    before, says = (listing(world.root), listing(world.run)), "no such file or folder"
    command = [sys.executable, "-m", "dualhead", *shlex.split("train digits data.source=./nowhere --run-dir new")]
    environment = {"DUALHEAD_CACHE": "/dev/null", "LC_ALL": "C", "PYTHONUTF8": "0"}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    check(Ended(ended.returncode, ended.stdout, ended.stderr), 2, says, world, before)
