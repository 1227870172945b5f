"""Every recipe that ships at a tiny size, and small ones for what none of them uses: weights and kernels, as digests.

    python -m helpers.frozen_recipes OUTPUT.json CASE...

The table of cases is data, to be edited where keys of recipes are renamed; the digests in `numerics/data` are not.
A case is trained through `dualhead.train` alone, so that modules may move.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DIGESTS = TESTS / "numerics" / "data" / "recipe_digests.json"
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment in which x86-64 processors of any make give the same bits, but for MKL's vector math, see `OTHERS`."""
OTHERS = DIGESTS.with_name("weights_by_vector_math.json")
"""Logarithms, roots and exponentials come from MKL, whose portable code begins with the processor's own approximation
of a reciprocal root. So wherever normal noise is drawn or a logarithm taken, makes of processors part by a last bit.
The file has for each `vector_math` but the first the weights of the cases that differ by it. Where a case was never
trained on the first, its digests hold no weights."""
BATCH = 14
"""Of all sizes only those of training batches, halves and pairs of them are multiples of 7, by which they are told from
held-out, test and example images."""
UNIT, HELD_OUT, TESTED, TRAINING = 7, 8, 5, 28
SIDE, CLASSES = 12, 4

# ---- recipes that ship

TINY = (
    "data.source={source}", f"data.train_limit={TRAINING + HELD_OUT}", f"data.validation={HELD_OUT}",
    f"stages.*.batch_size={BATCH}", "validation.attack.steps=2", f"evaluate.limit={TESTED}", "evaluate.attacks=[fgsm]",
    "evaluate.gallery=0", "runtime.device=cpu", "runtime.precision=float32", "runtime.lanes=1",
)  # fmt: skip
CONTIGUOUS, EPOCHS = "runtime.layout=contiguous", "stages.*.epochs=1"
SMALL_WIDE = ("model.backbone=wideresnet-10-1", "model.attach_at=block1")
"""In place of a larger network."""
IMAGENET = (
    f"data.image_size=[{SIDE}, {SIDE}]", "data.train_size=[14, 14]",
    f"data.augment=[{{name: random_resized_crop, size: [{SIDE}, {SIDE}]}}, flip]",
    "model.backbone={name: cnn, width: 8, stages: 2, convolutions: 1}", "model.attach_at=stage1",
)  # fmt: skip
VIT = (
    f"data.image_size=[{SIDE}, {SIDE}]", "data.train_size=[14, 14]",
    f"data.augment=[{{name: random_resized_crop, size: [{SIDE}, {SIDE}]}}, flip]",
    "model.backbone=" + json.dumps({"name": "hf", "config": json.dumps({
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "patch_size": 4,
    })}), "model.attach_at=model.vit.layers.1", "stages.*.schedule.warmup_steps=1", "stages.*.micro_batch=null",
)  # fmt: skip
"""A transformer with fresh weights in place of the pretrained one."""
CHANGES: dict[str, tuple[str, ...]] = {
    "cifar10_cpu_mixed": ("stages.main_head.epochs=1", "stages.second_head.epochs=1"),
    "cifar10_resnet18": SMALL_WIDE,
    "cifar10_resnet18_guided_distillation": SMALL_WIDE[:1],
    "cifar10_resnet18_aligned": ("model.backbone=wideresnet-10-1", "model.attach_at=block3"),
    "cifar10_resnet18_ar_at": (
        "model.backbone=wideresnet-10-1",
        "stages.ar_at.objective.layers=[block3.layer.0.bn2, bn1]",
    ),
    "cifar10_resnet18_mart": SMALL_WIDE,
    "cifar10_resnet18_sat": SMALL_WIDE,
    "cifar10_resnet18_dual_bn": SMALL_WIDE[:1],
    "cifar10_resnet18_advprop": SMALL_WIDE[:1],
    "cifar10_wrn34": SMALL_WIDE,
    "cifar10_wrn34_dat": SMALL_WIDE[:1],
    "cifar10_wrn34_mart": SMALL_WIDE,
    "cifar10_wrn34_sat": SMALL_WIDE,
    "imagenet_resnet50": IMAGENET,
    "imagenet_resnet50_aligned_free": IMAGENET,
    "vit_finetune": VIT,
    "tiny_imagenet_cpu": (f"data.image_size=[{SIDE}, {SIDE}]",),
}


def shipped_overrides(name: str, source: str) -> list[str]:
    """What makes a shipped recipe tiny; objectives, attacks, averages and the like stay as they are."""
    on_digits = name.startswith("digits")  # which fix their layout themselves
    more = () if on_digits else (CONTIGUOUS,)
    lengths = () if name == "cifar10_cpu_mixed" else (EPOCHS,)
    given = [text.replace("{source}", "digits" if on_digits else source) for text in TINY]
    enough = ("data.train_limit=66", "data.validation=10") if on_digits else ()  # some of each class in either
    return [*given, *more, *lengths, *enough, *CHANGES.get(name, ())]


# ---- small recipes of settings that no shipped one uses

CNN = {"name": "cnn", "width": 4, "stages": 2, "convolutions": 1}
PLAIN = {"backbone": CNN}
DUAL = {"backbone": CNN, "attach_at": "stage1", "aggregator": "pairwise_cnn"}
HEADS, ALL = ["trunk", "head1", "head2"], ["trunk", "head1", "head2", "aggregator"]
TRADES, MART = {"name": "trades", "beta": 6}, {"name": "mart", "beta": 5}
ATTACK = {"name": "pgd", "steps": 3, "step_size": "4/255", "start": "gaussian"}


def stage(objective: object, train: list[str] | None = None, name: str = "stage", **settings: object) -> dict:
    """A stage with defaults for what the table does not say."""
    given = {
        "name": name, "train": train or ["model"], "objective": objective, "epochs": 2, "batch_size": BATCH,
        "attack": ATTACK, "optimiser": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cyclic", "peak": 0.5},
    }  # fmt: skip
    return {**given, **settings}


def plain(objective: object, **settings: object) -> dict:
    """One stage that trains a model with one head."""
    return {"model": PLAIN, "stages": [stage(objective, **settings)]}


def dual(objective: object, train: list[str], model: dict | None = None, **settings: object) -> dict:
    """One stage of a model with two heads."""
    return {"model": {**DUAL, **(model or {})}, "stages": [stage(objective, train, **settings)]}


def three_stages(objective: object, **settings: object) -> dict:
    """Those of DH-AT, all with the same settings."""
    parts = {"first": ["trunk", "head1"], "second": ["head2"], "third": ["aggregator"]}
    return {"model": DUAL, "stages": [stage(objective, train, name, **settings) for name, train in parts.items()]}


def joint(train: list[str], **options: object) -> dict:
    """A joint objective, which may also say `settings` of its stage."""
    settings = options.pop("settings", {})
    return dual({"name": "joint", **options}, train, **settings)


def hat(objective: object, train: list[str] | None = None, **settings: object) -> dict:
    """A stage of HAT behind the standard one that its labels are from."""
    first = stage("natural", None if train is None else ["trunk", "head1"], "standard", keep="last")
    labelled = {"name": "hat", "weights": "standard", "gamma": 0.5, "base": objective}
    second = stage(labelled, train, "hat", init="reset", **settings)
    return {"model": PLAIN if train is None else DUAL, "stages": [first, second]}


SMOOTH = {"label_smoothing": 0.1}
EMA, SWA = {"name": "ema", "decay": 0.9}, {"name": "swa", "start": 0}
ANEW = {"batch_norm": "reestimate", "batches": 2}
NO_AGGREGATE = {"aggregate": None}

OBJECTIVES = {
    "natural": plain("natural"),
    "natural, smoothed": plain({"name": "natural", **SMOOTH}),
    "sat": plain("sat"),
    "sat, smoothed": plain({"name": "sat", **SMOOTH}),
    "trades": plain(TRADES),
    "trades, smoothed": plain({**TRADES, **SMOOTH}),
    "mart": plain(MART),
    "ikl": plain("ikl"),
    "ikl, smoothed": plain({"name": "ikl", "mse": 10, "ce": 2, "temperature": 2, **SMOOTH}),
    "ikl in three stages": three_stages("ikl"),
    "logit pairing on trades": plain("logit_pairing"),
    "logit pairing on sat": plain({"name": "logit_pairing", "base": "sat", "weight": 0.5}),
    "logit pairing on mart": plain({"name": "logit_pairing", "base": MART}),
    "logit pairing on ikl, head 2": dual({"name": "logit_pairing", "base": "ikl"}, ["head2"]),
    "reverse smoothing": dual({"name": "reverse_smoothing", "decay_from": 1, "decay_every": 1}, HEADS),
    "reverse smoothing, weighted": dual(
        {"name": "reverse_smoothing", "clean_weight": 0.5, "divergence": 4, "second_adversarial": 2, "second_clean": 1},
        ["head1", "head2"],
    ),
    "distilled, other heads": {
        "model": {**DUAL, "heads": 3},
        "stages": [
            stage(TRADES, ["trunk", "head1"], "first"),
            stage({"name": "distilled", "beta": 5}, ["head2"], "second"),
            stage({"name": "distilled", "beta": 2, "teacher": "head2", "student": "head3"}, ["head3"], "third"),
            stage("sat", ["aggregator"], "fourth"),
        ],
    },
    "distilled from the aggregate": {
        "model": {**DUAL, "heads": 3},
        "stages": [
            stage({"name": "distilled", "teacher": "head1", "student": "head3"}, ["head3"], deploy="mean"),
        ],
    },
    "distilled, weights perturbed, in pieces": dual(
        {"name": "distilled", "beta": 5}, ["head2"], awp={"gamma": 0.01, "start": 0}, micro_batch=7, deploy="mean"
    ),
    "hat beside sat": hat("sat"),
    "hat, weights perturbed": hat({"name": "trades", "beta": 2.5}, awp={"gamma": 0.01, "start": 1}),
    "hat in pieces": hat({"name": "trades", "beta": 2.5}, micro_batch=7),
    "hat on head 2": hat({"name": "trades", "beta": 2.5}, ["head2"]),
    "hat with joint": hat({"name": "joint", **NO_AGGREGATE, "attack": "sum"}, HEADS),
    "hat for free": hat("sat", free={"replays": 2}),
}
JOINT = {
    "joint": joint(ALL),
    "joint, weighted": joint(ALL, head1_weight=0.5, head2_weight=0.25, aggregate_weight=2, attack="sum"),
    "joint, distillation": joint(ALL, distillation=1),
    "joint, distillation without aggregate": joint(HEADS, **NO_AGGREGATE, distillation=0.5, attack="head1"),
    "joint, diversity": joint(HEADS, **NO_AGGREGATE, diversity=0.5, attack="sum"),
    "joint, diversity of natural heads": joint(HEADS, head1="natural", head2="natural", **NO_AGGREGATE, diversity=0.5),
    "joint, guidance": joint(HEADS, head1=TRADES, head2="natural", **NO_AGGREGATE, attack="head1", guidance=1),
    "joint, guidance and distillation": joint(
        HEADS, head1="sat", head2=TRADES, **NO_AGGREGATE, attack="head1", guidance=0.5, distillation=0.5
    ),
    "joint, natural and sat": joint(HEADS, head1="natural", head2="sat", **NO_AGGREGATE, attack="head2"),
    "joint, mart and sat": joint(ALL, head1=MART, head2="sat", aggregate=MART, attack="aggregate"),
    "joint, ikl and natural": joint(ALL, head1="ikl", head2="natural", aggregate="sat", attack="head1"),
    "joint, one head and the aggregate": joint(ALL, head1=None, head2=MART, aggregate="natural", attack="head2"),
    "joint, frozen trunk": joint(["head1", "head2", "aggregator"], attack="sum"),
    "joint, deployed mean": joint(HEADS, **NO_AGGREGATE, attack="sum", settings={"deploy": "mean"}),
    "joint, weights perturbed": joint(ALL, settings={"awp": {"gamma": 0.01, "start": 0}}),
    "joint for free": joint(ALL, attack="sum", settings={"free": {"replays": 2}}),
    "joint in pieces": joint(ALL, settings={"micro_batch": 7}),
    "joint, one forward": joint(ALL, settings={"forward": "joint"}),
    "joint, one forward, natural head": joint(
        HEADS, head1=TRADES, head2="natural", **NO_AGGREGATE, attack="head1", settings={"forward": "joint"}
    ),
    "joint, cutmix": joint(ALL, diversity=0.5, settings={"cutmix": {"p": 0.5}}),
    "joint, averaged, statistics anew": joint(ALL, settings={"average": {**EMA, **ANEW}}),
    "joint, heads averaged, statistics anew": joint(
        HEADS, **NO_AGGREGATE, attack="sum", settings={"average": {**SWA, **ANEW}}
    ),
    "joint, activations recomputed": joint(ALL, settings={"checkpoint_activations": True}),
}
SETTINGS = {
    "weights perturbed, sat": plain("sat", awp={"gamma": 0.01, "start": 0}),
    "weights perturbed, trades, later": plain(TRADES, awp={"gamma": 0.005, "start": 1}),
    "weights perturbed in three stages": three_stages("sat", awp={"gamma": 0.01, "start": 0}),
    "free, trades": plain(TRADES, free={"replays": 3, "step_size": "4/255"}),
    "free in three stages": three_stages("sat", free={"replays": 2}),
    "free in pieces": plain("sat", free={"replays": 2}, micro_batch=7),
    "in pieces": plain(TRADES, micro_batch=7),
    "in pieces, three stages": three_stages(TRADES, micro_batch=7),
    "in pieces, weights perturbed": plain(MART, micro_batch=7, awp={"gamma": 0.01, "start": 0}),
    "activations recomputed": plain(TRADES, checkpoint_activations=True),
    "activations recomputed, three stages": three_stages("sat", checkpoint_activations=True),
    "one forward": plain(TRADES, forward="joint"),
    "one forward, mart in three stages": three_stages(MART, forward="joint"),
    "attacked in training mode": plain(TRADES, attack_mode="train"),
    "attacked in training mode, three stages": three_stages("sat", attack_mode="train"),
    "ema": plain("sat", average=EMA),
    "ema, statistics anew": plain("sat", average={**EMA, **ANEW}),
    "swa": plain(TRADES, average={**SWA, "batch_norm": "average"}),
    "swa, statistics anew": plain(TRADES, average={**SWA, **ANEW}),
    "averaged in three stages": three_stages("sat", average={**EMA, **ANEW}),
    "cutmix, natural": plain("natural", cutmix={"p": 1}),
    "cutmix, sat, smoothed": plain({"name": "sat", **SMOOTH}, cutmix={"p": 0.5}),
    "cutmix, trades": plain(TRADES, cutmix={"p": 0.5}),
    "cutmix, mart": plain(MART, cutmix={"p": 0.5}),
    "cutmix, ikl": plain("ikl", cutmix={"p": 0.5}),
    "cutmix, distilled": dual("distilled", ["head2"], cutmix={"p": 0.5}),
    "cutmix, reverse smoothing": dual("reverse_smoothing", HEADS, cutmix={"p": 0.5}),
    "clipped": plain(TRADES, clip_norm=0.05),
    "cosine, plain momentum": plain(
        "sat", schedule={"name": "cosine", "warmup": 0.5}, optimiser={"name": "sgd", "lr": 0.1, "nesterov": False}
    ),
    "steps": plain("sat", schedule={"name": "step", "milestones": [1]}),
    "radius and augmentation of a stage": plain(TRADES, eps="4/255", augment=["flip"]),
    "fgsm": plain("sat", attack={"name": "fgsm", "step_size": "10/255", "start": "uniform"}),
    "n_fgsm": plain("sat", attack={"name": "n_fgsm"}),
    "grad_align": plain("grad_align", attack={"name": "fgsm"}),
    "elle": plain({"name": "elle", "weight": 10}, attack={"name": "fgsm"}),
    "second head cloned": {**three_stages(TRADES), "model": {**DUAL, "second_head": "clone"}},
    "second head over a frozen trunk, both heads": dual("sat", ["trunk", "head2"]),
    "begun anew": {
        "model": DUAL,
        "stages": [
            stage("natural", ["trunk", "head1"], "first"),
            stage("sat", ["head1"], "second", init="reset"),
            stage("sat", ["trunk", "head1"], "third", init="reset"),
        ],
    },
    "L2": {**plain(TRADES), "threat": {"norm": "L2", "eps": "128/255"}},
    "L2 in three stages, uniform start": {
        **three_stages("sat", attack={"name": "pgd", "steps": 2, "step_size": 0.3, "start": "uniform"}),
        "threat": {"norm": "L2", "eps": "128/255"},
    },
    "L2 for free": {**plain("sat", free={"replays": 2}), "threat": {"norm": "L2", "eps": "128/255"}},
    "linear aggregator": {**three_stages(TRADES), "model": {**DUAL, "aggregator": "linear"}},
    "pairwise shared aggregator": {**three_stages("sat"), "model": {**DUAL, "aggregator": "pairwise_shared"}},
    "three heads": {
        "model": {**DUAL, "heads": 3},
        "stages": [stage("sat", [part], part) for part in ("head2", "head3", "aggregator")],
    },
    "dropout": {
        **three_stages("sat"),
        "model": {**DUAL, "backbone": {"name": "wideresnet", "depth": 10, "width": 1, "dropout": 0.3},
                  "attach_at": "block1"},
    },
    "channels last": {**three_stages(TRADES), "runtime": {"layout": "channels_last"}},
    "two lanes": {
        "model": PLAIN, "stages": [stage(TRADES, batch_size=35)], "runtime": {"lanes": 2}, "data": {"train_limit": 78},
    },
    "two lanes, joint": {
        "model": DUAL, "stages": [stage("joint", ALL, batch_size=35)], "runtime": {"lanes": 2},
        "data": {"train_limit": 78},
    },
    "a second source": {**plain("sat"), "data": {"extra": {"source": "{source}", "fraction": 0.5}}},
}  # fmt: skip

SMALL = {**OBJECTIVES, **JOINT, **SETTINGS}


def small_recipe(name: str, source: str) -> dict:
    """A recipe of the table, in full."""
    case = copy.deepcopy(SMALL[name])
    data = {
        "source": source, "train_limit": TRAINING + HELD_OUT, "validation": HELD_OUT,
        "augment": [{"name": "pad_crop", "padding": 1}, "flip"],
    }  # fmt: skip
    runtime = {"device": "cpu", "precision": "float32", "lanes": 1, "layout": "contiguous"}
    data |= json.loads(json.dumps(case.get("data", {})).replace("{source}", source))
    return {
        "name": "small", "model": case["model"], "threat": case.get("threat", {"norm": "Linf", "eps": "8/255"}),
        "data": data, "stages": case["stages"], "validation": {"attack": {"name": "pgd", "steps": 2}},
        "evaluate": {"limit": TESTED, "attacks": ["fgsm"], "gallery": 0},
        "runtime": {**runtime, **case.get("runtime", {})},
    }  # fmt: skip


# ---- running them


CLASS_NAMES = tuple(f"class{label}" for label in range(CLASSES))


def make_images(folder: Path, names: tuple[str, ...] = CLASS_NAMES, side: int = SIDE, train: int = 80) -> Path:
    """An image folder whose classes differ in a pattern beneath noise, the same everywhere."""
    import numpy as np
    from PIL import Image

    generator = np.random.Generator(np.random.PCG64(7))
    patterns = generator.integers(40, 216, (len(names), side, side, 3))
    for part, count in (("train", train), ("test", 20)):
        for number in range(count):
            label = number % len(names)
            image = np.clip(patterns[label] + generator.integers(-40, 41, (side, side, 3)), 0, 255).astype(np.uint8)
            place = folder / part / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03d}.png")
    return folder


def digest(path: Path) -> str:
    """SHA-256 of the name, type, shape and bytes of each tensor in a file, in the order of their names."""
    from safetensors.numpy import load_file

    found = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def counting(folder: Path, stages: list[str]):
    """A mode that counts what costs in training passes, by stage: how many are finished shows in the run's folder."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountKernels(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: dict[str, Counter[str]] = {name: Counter() for name in stages}
            self._left = list(stages)
            self._names: dict[object, str] = {}

        def _note(self, kind: str, rows: int) -> None:
            if rows % UNIT:
                return
            while self._left and (folder / "checkpoints" / self._left[0] / "summary.json").is_file():
                self._left.pop(0)
            if self._left:
                self.counts[self._left[0]][kind] += 1

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = self._names.get(func) or self._names.setdefault(func, func._schema.name)
            if name == "aten::convolution":
                self._note("forward: convolution", len(args[0]))
            elif name == "aten::convolution_backward":
                mask = args[10]
                if mask[0]:
                    self._note("backward: convolution, input", len(args[0]))
                if mask[1] or mask[2]:
                    self._note("backward: convolution, weight", len(args[0]))
            elif "batch_norm" in name:
                kind = "backward" if name.endswith("_backward") else "forward"
                self._note(f"{kind}: batch norm", len(args[0]))
            elif name == "aten::addmm":
                self._note("forward: linear", len(args[1]))
            elif name == "aten::mm":  # gradient x weight, or gradient^T x input
                self._note("backward: linear", len(args[0]) if len(args[0]) % UNIT == 0 else len(args[1]))
            return func(*args, **(kwargs or {}))

    return CountKernels()


def measure(name: str, source: Path, folder: Path) -> dict:
    """Train a case; digests of the weights that it leaves, and counts of kernels by stage."""
    import yaml

    import dualhead

    if name in SMALL:
        recipe, overrides = folder.with_suffix(".yaml"), []
        recipe.write_text(yaml.safe_dump(small_recipe(name, str(source))), encoding="utf-8")
        stages = [stage["name"] for stage in SMALL[name]["stages"]]
    else:
        recipe, overrides = name, shipped_overrides(name, str(source))
        stages = shipped_stages(name)
    mode, model = counting(folder, stages), folder / "model" / "model.safetensors"
    with mode, contextlib.suppress(dualhead.Interrupted):  # stopped where training is over: evaluation takes longer
        dualhead.train(str(recipe), overrides, run_dir=folder, stop=model.is_file)
    found = {
        f"{stage}/{which}": digest(folder / "checkpoints" / stage / f"{which}.safetensors")
        for stage in stages for which in ("best", "last")
    }  # fmt: skip
    found["model"] = digest(model)
    return {"weights": found, "kernels": {stage: dict(sorted(mode.counts[stage].items())) for stage in stages}}


def shipped_names() -> list[str]:
    """The recipes that ship."""
    import dualhead

    return sorted(path.stem for path in Path(dualhead.__file__).parent.rglob("*.yaml"))


def shipped_stages(name: str) -> list[str]:
    """Names of the stages of a recipe that ships, in order."""
    import yaml

    import dualhead

    [path] = Path(dualhead.__file__).parent.rglob(f"{name}.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = [stage["name"] for stage in content.get("stages", [])]
    return own if "extends" not in content or len(own) > 1 else shipped_stages(content["extends"])


FAST = (
    "ikl", "logit pairing on sat", "reverse smoothing", "distilled, other heads", "hat in pieces", "joint, weighted",
    "joint, distillation", "joint, diversity", "joint, guidance and distillation", "joint, ikl and natural",
    "weights perturbed, trades, later", "free in three stages", "in pieces, three stages", "activations recomputed",
    "one forward, mart in three stages", "attacked in training mode", "ema, statistics anew", "swa, statistics anew",
    "cutmix, trades", "radius and augmentation of a stage", "two lanes", "L2 in three stages, uniform start",
)  # fmt: skip
"""One of each kind, for a run in short; all others are slow."""


def groups() -> dict[str, list[str]]:
    """Names of cases by the process that runs them together."""
    shipped = shipped_names()
    of_cpu = [name for name in shipped if name.startswith("cifar10_cpu")]
    return {
        "shipped: cifar10_cpu": of_cpu,
        "shipped: others": [name for name in shipped if name not in of_cpu],
        "small, in short": list(FAST),
        "objectives": [name for name in OBJECTIVES if name not in FAST],
        "joint": [name for name in JOINT if name not in FAST],
        "settings": [name for name in SETTINGS if name not in FAST],
    }


def measure_apart(names: list[str], threads: int = 1) -> dict[str, dict]:
    """What `measure` finds for these cases, in a process of its own in which processors of any make agree."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "found.json"
        own = {**PORTABLE, "OMP_NUM_THREADS": str(threads), "DUALHEAD_CACHE": str(Path(place) / "cache")}
        command = [sys.executable, "-m", "helpers.frozen_recipes", str(output), *names]
        environment = {**os.environ, **own}
        ended = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        return json.loads(output.read_text(encoding="utf-8"))


def vector_math() -> str:
    """Return what tells apart processors whose approximations differ."""
    program = (
        "import hashlib, torch; x = torch.arange(1, 4097) / 4096;"
        "print(hashlib.sha256(torch.cat((x.log(), x.sqrt(), x.exp())).numpy().tobytes()).hexdigest()[:16])"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**os.environ, **PORTABLE}, capture_output=True, text=True, check=True
    ).stdout.strip()


def frozen_here() -> dict[str, dict]:
    """Return the digests that hold for this processor."""
    frozen = json.loads(DIGESTS.read_text(encoding="utf-8"))
    others = json.loads(OTHERS.read_text(encoding="utf-8")).get(vector_math(), {})
    return {name: case | ({"weights": others[name]} if name in others else {}) for name, case in frozen.items()}


def main() -> None:
    output, *names = sys.argv[1:]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        source = make_images(Path(place) / "images")
        for number, name in enumerate(names):
            try:
                found[name] = measure(name, source, Path(place) / f"run{number}")
            except Exception as error:
                raise RuntimeError(f"case {name!r}: {error}") from error
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
