"""The study of threats one after another: what its script asks for, what is kept, and how it is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dualhead
from helpers import studies
from helpers.studies import ROOT, evaluation, module_of, recipe_of

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
    asked = {"SEEDS": "0", **environment}
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
        recipe = recipe_of(words)
        assert recipe.sequence is not None or "base.yaml" in words[1]
    _, again = asked_of(tmp_path)
    assert again == []
    (tmp_path / "kept/forward/lwf/seed=0.json").unlink()
    for run in ("first", "lwf"):
        (tmp_path / f"out/forward/{run}/seed=0/report.html").unlink()
    _, again = asked_of(tmp_path)
    assert trained(again) == ["forward/first", "forward/lwf"]  # on another machine the first stage is not there


@pytest.fixture(scope="module")
def collect():
    return module_of("continual/collect.py")


NO_TRANSFER = {"Linf": 0.5, "L2": 0.5, "union": 0.5, "fooled": {"Linf": 0.9, "L2": 0.6}}
REST = {"images": 1000, "parameters": 5, "answer": 1.0, "transfer": NO_TRANSFER}


def sequence(last, old="lost"):
    rows = [
        {"stage": stage, "clean_accuracy": 0.5, "robust_accuracy": {"Linf": linf, "L2": l2}, "union": min(linf, l2),
         "average_seen": 0.3, "forgetting": 0.4 - linf, "backward_transfer": -0.1, "clean_drop": 0.0}
        for stage, linf, l2 in (("first", 0.4, 0.2), ("second", *last))
    ]  # fmt: skip
    arrived = {"Linf": "first", "L2": "second"}
    told = {"threats": ["Linf", "L2"], "old_attacks": old, "arrived": arrived, "rows": rows}
    reached = {"threats": {"Linf": last[0], "L2": last[1], "L1": 0.1}, "union": min(last)}
    return {"sequence": told, "passes": 7.0, **REST, **reached}


def bound(linf, l2, union=0.1):
    told = {"clean": 0.6, "threats": {"Linf": linf, "L2": l2, "L1": 0.2}, "union": union, "passes": 9.0}
    return {**told, **REST}


def keep(folder, name, seed, content):
    path = folder / name / f"seed={seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_kept_files_are_told_together(collect, tmp_path):
    keep(tmp_path, "forward/lwf", 0, sequence((0.3, 0.35)))
    keep(tmp_path, "forward/lwf", 1, sequence((0.1, 0.25)))
    found = collect.tell(tmp_path)
    assert found["forward"]["lwf"]["Linf"]["mean"] == pytest.approx(0.2)
    assert found["forward"]["lwf"]["Linf"]["seeds"] == [0.3, 0.1]
    assert found["forward"]["lwf"]["transfer"].keys() == {"Linf", "L2", "union"}
    assert "plasticity" not in found["forward"]["lwf"]
    for name, linf, l2 in (("specialist-linf", 0.5, 0.1), ("specialist-l2", 0.4, 0.3), ("specialist-l1", 0.3, 0.35)):
        for seed in range(2):
            keep(tmp_path, f"bounds/{name}", seed, bound(linf + 0.1 * seed, l2))
    found = collect.tell(tmp_path)
    assert found["bounds"]["specialist-l2"]["L2"]["mean"] == pytest.approx(0.3)
    # learnt first: 0.4 under Linf, and 0.35 and 0.25 under L2; those made for them have 0.55 in the mean, and 0.3
    assert found["forward"]["lwf"]["plasticity"]["seeds"] == pytest.approx([-0.05, -0.1])
    assert found["forward"]["lwf"]["least_share"]["seeds"] == pytest.approx([0.1 / 0.2, 0.1 / 0.55])
    assert (found["under_way"], found["questions"]) == (True, None)


def test_questions_are_answered_when_all_seeds_are_there(collect, tmp_path):
    """`lwf` forgets less than fine-tuning in every seed, `ewc` differs by chance alone; `replay` beats `seen`."""
    last = {"lwf": (0.35, 0.3), "seen": (0.2, 0.25), "replay": (0.3, 0.3)}
    for order in collect.ORDERS:
        for name in collect.METHODS:
            old = "kept" if name in ("seen", "replay", "derpp", "agem", "ramp") or name.endswith("-kept") else "lost"
            for seed in range(3):
                linf, l2 = last.get(name, (0.2, 0.3))
                chance = 0.01 * (seed - 1) if name == "ewc" else 0.0001 * seed * (name != "finetune")
                made = sequence((linf + chance, l2), old)
                if name.startswith("routed"):
                    unions = {"deployed": 0.3, "uniform": 0.25, "best_fixed": 0.4 - 0.01 * seed, "oracle": 0.5}
                    made |= {"routers": {"num_samples": 500, **{key: {"union": of} for key, of in unions.items()}}}
                keep(tmp_path, f"{order}/{name}", seed, made)
    for name in ("joint", *collect.SPECIALISTS.values()):
        for seed in range(3):
            keep(tmp_path, f"bounds/{name}", seed, bound(0.5, 0.4, 0.45 + 0.001 * seed))
    assert collect.tell(tmp_path, wanted=4)["questions"] is None
    found = collect.tell(tmp_path)
    assert not found["under_way"]
    for order in ("forward", "reverse", "both"):
        told = found["questions"][order]
        forgets = told["forgets_less_than_finetune"]
        assert set(forgets) == {"lwf", "alr", "ewc", "air", "interpolate-lost", "routed-lost"}
        assert forgets["lwf"]["mean"] == pytest.approx(0.1501)
        assert (forgets["lwf"]["answer"], forgets["ewc"]["answer"]) == ("gain", "undecided")
        beyond = told["union_beyond_seen"]
        assert set(beyond) == {"replay", "derpp", "agem", "ramp", "interpolate-kept", "routed-kept"}
        assert beyond["replay"]["answer"] == "gain"
        assert set(told["union_beyond_joint"]) == set(collect.METHODS)
        assert told["union_beyond_joint"]["replay"]["answer"] == "loss"
        assert {each["answer"] for each in told["routing_beyond_best_fixed"].values()} == {"loss"}
        assert {each["answer"] for each in told["routing_beyond_uniform"].values()} == {"gain"}
    assert {each["answer"] for each in found["questions"]["forward_beyond_reverse"].values()} == {"undecided"}
    drawn = module_of("../tools/make_figures.py").continual(found)
    assert drawn.count("<circle") == 2 * (3 * len(collect.METHODS) + 2) + 3  # the bound forgets nothing; and a legend
    keep(tmp_path, "forward/lwf", 3, sequence((0.35, 0.3)))  # a seed that one order alone has is in no pair of orders
    again = collect.tell(tmp_path)["questions"]
    assert again["both"] == found["questions"]["both"]
    assert again["forward_beyond_reverse"] == found["questions"]["forward_beyond_reverse"]


def test_images_made_once_are_judged_by_the_model_that_a_run_deploys(collect, tmp_path):
    """Only rows that fooled the other network are other images; what is wrong without an attack stays wrong."""
    torch.manual_seed(0)
    run, static, count = tmp_path / "run", tmp_path / "static", 12
    shutil.copytree(ROOT / "benchmarks/results/models/continual-clean", run)
    model = dualhead.load(run).eval()
    images, attacked = torch.rand(2, count, 3, 32, 32)
    with torch.no_grad():
        labels, answers = (model(each).argmax(1).numpy() for each in (images, attacked))
    labels[:3] = (labels[:3] + 1) % 10  # three that the model gets wrong
    clean = evaluation(labels == model(images).argmax(1).numpy(), apgd_ce=np.ones(count, bool))
    clean.save(run / "evaluation")
    rows = np.array([0, 3, 4, 5, 9])
    for name in ("Linf", "L2"):
        made = evaluation(np.ones(count, bool), pgd_40=~np.isin(np.arange(count), rows))
        made.labels[:] = labels
        verdict = made.verdicts["pgd-40"]
        verdict.adversarial, verdict.adversarial_rows = attacked[rows].numpy(), rows
        if name == "L2":
            verdict.adversarial = images[rows].numpy()
        made.save(static / "threats" / name)
    found = collect.on_static(run, static)
    fallen = sum(answers[row] != labels[row] for row in rows if row > 2)
    assert fallen > 0
    assert found == {
        "Linf": pytest.approx((9 - fallen) / 12), "L2": 9 / 12, "union": pytest.approx((9 - fallen) / 12),
        "fooled": {"Linf": 5 / 12, "L2": 5 / 12},
    }  # fmt: skip


def test_what_routing_gains_is_told_beside_its_controls(collect, tmp_path):
    for seed, deployed in enumerate((0.3, 0.4)):
        unions = {"deployed": deployed, "uniform": 0.2, "best_fixed": 0.4, "oracle": 0.5}
        routers = {"num_samples": 500, **{name: {"union": union} for name, union in unions.items()}}
        keep(tmp_path, "reverse/routed-lost", seed, {**sequence((0.3, 0.35)), "routers": routers})
    told = collect.tell(tmp_path)["reverse"]["routed-lost"]["routers"]
    assert told["deployed"]["mean"] == pytest.approx(0.35)
    assert told["over_best_fixed"]["seeds"] == pytest.approx([-0.1, 0.0])
    assert told["over_uniform"]["mean"] == pytest.approx(0.15)
