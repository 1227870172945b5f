"""The study of threats one after another: what its script asks for, what is kept, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualhead.recipe import load_recipe
from helpers import studies
from helpers.studies import ROOT, module_of

LAST = [
    "finetune",
    "seen",
    "lwf",
    "alr",
    "ramp",
    "interpolate-lost",
    "replay",
    "ewc",
    "air",
    "derpp",
    "agem",
    "routed-lost",
]


def asked_of(folder, **environment):
    asked = {"SEEDS": "1", **environment}
    return studies.asked_of("benchmarks/continual/run.sh", folder, str(folder), str(folder / "out"), **asked)


def trained(asked):
    return ["/".join(Path(words[-2]).parts[-3:-1]) for words in asked if words[0] == "train"]


def test_every_method_has_a_recipe_and_what_is_kept_is_not_trained_again(tmp_path):
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    names = trained(asked)
    assert names[0] == "forward/first"
    assert len(names) == len(set(names))
    assert {f"{order}/{name}" for order in ("forward", "reverse") for name in (*LAST, "interpolate-kept")} <= set(names)
    protocol = (ROOT / "benchmarks/continual/README.md").read_text()
    for words in (words for words in asked if words[0] == "train"):
        name = Path(words[-2]).parent.name
        assert f"`{name}`" in protocol or name == "first", name
        recipe = load_recipe(str(ROOT / words[1]), words[2 : words.index("--run-dir")])
        assert recipe.sequence is not None or "base.yaml" in words[1]
    _, again = asked_of(tmp_path)
    assert again == []
    (tmp_path / "kept/forward/lwf/seed=0.json").unlink()
    for run in ("first", "lwf"):
        (tmp_path / f"out/forward/{run}/seed=0/report.html").unlink()
    _, again = asked_of(tmp_path)
    assert trained(again) == ["forward/first", "forward/lwf"]  # on another machine the first stage is not there
    ended, _ = asked_of(tmp_path, METHODS="nothing")
    assert ended.returncode == 2


@pytest.fixture(scope="module")
def collect():
    return module_of("continual/collect.py")


def sequence(last):
    rows = [
        {"stage": stage, "clean_accuracy": 0.5, "robust_accuracy": {"Linf": linf, "L2": l2}, "union": min(linf, l2),
         "average_seen": 0.3, "forgetting": 0.1, "backward_transfer": -0.1, "clean_drop": 0.0}
        for stage, linf, l2 in (("first", 0.4, 0.2), ("second", *last))
    ]  # fmt: skip
    arrived = {"Linf": "first", "L2": "second"}
    told = {"threats": ["Linf", "L2"], "old_attacks": "lost", "arrived": arrived, "rows": rows}
    return {"sequence": told, "passes": 7.0, "parameters": 5}


def test_kept_files_are_told_together(collect, tmp_path):
    def keep(name, seed, content):
        path = tmp_path / name / f"seed={seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    keep("forward/lwf", 0, sequence((0.3, 0.35)))
    keep("forward/lwf", 1, sequence((0.1, 0.25)))
    found = collect.tell(tmp_path)
    assert found["forward"]["lwf"]["Linf"]["mean"] == pytest.approx(0.2)
    assert found["forward"]["lwf"]["Linf"]["seeds"] == [0.3, 0.1]
    assert "plasticity" not in found["forward"]["lwf"]
    for number, name in enumerate(collect.SPECIALISTS):
        threats = {"Linf": 0.5 - 0.1 * number, "L2": 0.1 + 0.1 * number}
        keep(f"bounds/{name}", 0, {"clean": 0.6, "threats": threats, "union": 0.1, "passes": 9.0})
    found = collect.tell(tmp_path)
    assert found["bounds"]["specialist-l2"]["L2"]["mean"] == pytest.approx(0.2)
    # learnt first: 0.4 under Linf, and 0.35 and 0.25 under L2; the best specialists have 0.5 and 0.3
    assert found["forward"]["lwf"]["plasticity"]["seeds"] == pytest.approx([-0.025, -0.075])


def test_what_routing_gains_is_told_beside_its_controls(collect, tmp_path):
    for seed, deployed in enumerate((0.3, 0.4)):
        path = tmp_path / "reverse" / "routed-lost" / f"seed={seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        unions = {"deployed": deployed, "uniform": 0.2, "best_fixed": 0.4, "oracle": 0.5}
        routers = {"num_samples": 500, **{name: {"union": union} for name, union in unions.items()}}
        path.write_text(json.dumps({**sequence((0.3, 0.35)), "routers": routers}))
    told = collect.tell(tmp_path)["reverse"]["routed-lost"]["routers"]
    assert told["deployed"]["mean"] == pytest.approx(0.35)
    assert told["over_best_fixed"]["seeds"] == pytest.approx([-0.1, 0.0])
    assert told["over_uniform"]["mean"] == pytest.approx(0.15)
