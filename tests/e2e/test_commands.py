"""The commands from end to end on a tiny run: what they print, what they leave, and that a stopped one goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import dualhead as package
from dualhead.commands.catalogue import shipped
from dualhead.data import load_split
from dualhead.recipe.schema import REGISTRIES
from dualhead.recipe.yaml import load_recipe, shipped_recipes
from dualhead.system.lock import FolderLock
from helpers.e2e import TINY, dualhead

ROWS = ["base model", "head 1", "head 2", "mean of heads", "aggregate of heads"]
STAGES = ["main_head", "second_head", "aggregator"]
COUNT = 48  # images that TINY evaluates


def is_fraction(value):
    return isinstance(value, float | int) and 0 <= value <= 1


def is_interval(ends, share):
    return len(ends) == 2 and 0 <= ends[0] <= share + 1e-12 and share - 1e-12 <= ends[1] <= 1


def check_accuracies(entry, attacks):
    assert is_fraction(entry["clean_accuracy"])
    assert is_interval(entry["intervals"]["clean_accuracy"], entry["clean_accuracy"])
    assert list(entry["robust_accuracy"]) == [*attacks, "worst"]
    for name, share in entry["robust_accuracy"].items():
        assert is_fraction(share)
        assert share <= entry["clean_accuracy"]
        assert is_interval(entry["intervals"][name], share)
    assert entry["robust_accuracy"]["worst"] <= min(entry["robust_accuracy"][name] for name in attacks)


def check_results(folder, attacks, count=COUNT, eps=0.15):
    """`results.json` and `samples.npz` as other programs read them, and that the two agree."""
    results = json.loads((folder / "results.json").read_text())
    assert results["num_samples"] == count
    assert results["threat"] == {"norm": "Linf", "eps": eps}
    check_accuracies(results, attacks)
    assert list(results["attacks"]) == list(attacks)
    for record in results["attacks"].values():
        assert record["seconds"] > 0
        assert record["forward_passes"] >= record["backward_passes"] >= 0
    assert {"name", "status", "message"} <= set(results["diagnostics"][0])
    assert results["per_class"]
    assert results["environment"]["torch"] == torch.__version__
    assert results["command"].startswith("dualhead ")
    with np.load(folder / "samples.npz") as samples:
        correct = samples["clean_prediction"] == samples["label"]
        assert len(np.unique(samples["index"])) == count
        assert correct.mean() == pytest.approx(results["clean_accuracy"])
        for attack in attacks:
            robust, distance = samples[f"robust_{attack}"], samples[f"distance_{attack}"]
            assert robust.dtype == bool
            assert robust.mean() == pytest.approx(results["robust_accuracy"][attack])
            assert not (robust & ~correct).any()
            assert np.nanmax(distance, initial=0) <= eps
    return results


def outcome(results):
    return results["clean_accuracy"], results["robust_accuracy"]


# ---- help and lists


@pytest.mark.parametrize(
    "command",
    [
        [],
        *(
            [name]
            for name in (
                "demo",
                "train",
                "evaluate",
                "gallery",
                "info",
                "list",
                "layers",
                "export",
                "compare",
                "report",
                "sweep",
                "show",
                "runs",
                "play",
            )
        ),
    ],
)
def test_every_command_has_help(command):
    ended = dualhead(*command, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: {' '.join(['dualhead', *command])} ")


def test_bare_and_version():
    assert dualhead().out == dualhead("--help").out
    assert dualhead("--version").out.strip()[0].isdigit()


def test_list_names_and_describes_what_ships():
    """Names and first lines that are read from the files are those of the registries."""
    expected = {
        kind: {
            name: (registry.get(name).__doc__ or "").partition("\n")[0]
            for name in registry.names()
            if registry.get(name).__module__.startswith("dualhead.")
        }
        for kind, registry in REGISTRIES.items()
    }  # other tests may have registered some
    found = shipped()
    assert list(found.pop("recipes")) == shipped_recipes()
    assert found == {kind: expected[kind] for kind in sorted(expected)}
    whole = dualhead("list").out
    for kind, names in shipped().items():
        assert all(names.values()), f"one of the {kind} has no description"
        lines = dualhead("list", kind).out.splitlines()
        assert [line.split(maxsplit=1) for line in lines] == [[name, text] for name, text in names.items()]
        assert f"{kind}:\n" + "".join(f"  {line}\n" for line in lines) in whole


# ---- info, --quiet and --json


def test_info_tells_where_a_finished_run_stands(finished_run):
    facts = json.loads(dualhead("info", finished_run, "--json").out)
    assert (facts["state"], facts["recipe"], facts["process"]) == ("finished", "digits", None)
    assert [(s["name"], s["state"], s["epoch"], s["epochs"]) for s in facts["stages"]] == [
        (name, "finished", 1, 1) for name in STAGES
    ]
    results = json.loads((finished_run / "evaluation" / "results.json").read_text())
    assert facts["rows"][-1]["robust_accuracy"] == results["robust_accuracy"]
    text = dualhead("info", finished_run).out
    assert "finished" in text
    assert "aggregate of heads" in text


def test_info_tells_where_an_unfinished_run_stands(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for gone in ("checkpoints/aggregator", "evaluation"):
        shutil.rmtree(run / gone)
    (run / "comparison.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:2]
    broken = json.dumps({**json.loads(lines[1]), "validation_robust": float("nan"), "validation_clean": float("nan")})
    (run / "metrics.jsonl").write_text("\n".join([lines[0], broken, ""]))
    facts = json.loads(dualhead("info", run, "--json").out)
    assert facts["state"] == "training"
    assert [stage["state"] for stage in facts["stages"]] == ["finished", "finished", "not begun"]
    assert facts["stages"][1]["last"] == {"clean": None, "robust": None}
    assert facts["rows"] == []
    assert "stopped while training" in dualhead("info", run).out
    with FolderLock(run):
        assert json.loads(dualhead("info", run, "--json").out)["process"]["pid"] == os.getpid()
        assert f"process {os.getpid()} on" in dualhead("info", run).out
    assert "no single run" in dualhead("info", finished_run / "evaluation").error_line


def test_every_command_can_be_quiet_and_speak_json():
    for command in (
        "demo",
        "train",
        "evaluate",
        "gallery",
        "info",
        "play",
        "list",
        "layers",
        "export",
        "compare",
        "report",
        "sweep",
        "show",
        "runs",
    ):
        words = dualhead(command, "--help").out
        assert "--quiet" in words, command
        assert "--json" in words, command


def test_json_is_json_and_quiet_is_short(finished_run, tmp_path):
    assert json.loads(dualhead("list", "attacks", "--json").out)["attacks"] == list(REGISTRIES["attacks"].names())
    page = tmp_path / "page.html"
    assert json.loads(dualhead("report", finished_run, "-o", page, "--json").out) == {"report": str(page)}
    assert dualhead("report", finished_run, "-o", page, "--quiet").out == ""
    model = tmp_path / "model"
    assert json.loads(dualhead("export", finished_run, "--to", model, "--json").out)["model"] == str(model)


# ---- gallery


def test_gallery_is_made_by_train_and_anew_by_its_command(finished_run, tmp_path):
    with np.load(finished_run / "evaluation" / "gallery.npz") as stored:
        assert stored["outputs"].tolist() == ["head1", "head2", "aggregate"]
        assert len(stored["label"]) == load_recipe("digits", TINY).evaluate.gallery
    ended = dualhead(
        "gallery", finished_run, "--limit", 5, "--landscape", "3,1", "--eps", "0.2", "--output", tmp_path, "--json"
    )
    assert ended.status == 0, ended.err
    assert json.loads(ended.out) == {
        "gallery": str(tmp_path / "gallery.npz"), "images": 5, "eps": pytest.approx([0.05, 0.1, 0.15, 0.2]),
        "landscapes": [3, 1],
    }  # fmt: skip
    assert "--landscape x" in dualhead("gallery", finished_run, "--landscape", "x").error_line


# ---- train


def test_a_run_leaves_what_it_promises(finished_run):
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model", "evaluation"}
    assert {path.name for path in finished_run.iterdir()} >= expected | {"comparison.json"}
    assert {path.name for path in (finished_run / "model").iterdir()} == {
        "model.safetensors", "config.json", "README.md",
    }  # fmt: skip
    recipe = load_recipe("digits", TINY)
    assert yaml.safe_load((finished_run / "config.yaml").read_text()) == recipe.resolved()
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == STAGES
    for line in lines:
        assert (line["epoch"], line["step"]) == (1, 2)
        assert np.isfinite(line["loss"])
        assert is_fraction(line["validation_robust"])
    assert not list(finished_run.rglob("*.tmp"))


def test_what_merges_heads_is_attacked_by_one_who_knows_them(tmp_path):
    run = tmp_path / "run"
    assert dualhead("train", "digits", *TINY, "evaluate.attacks=[pgd-3, multihead-2]", "--run-dir", run).status == 0
    attacked = {
        row["name"]: set(row["robust_accuracy"]) for row in json.loads((run / "comparison.json").read_text())["rows"]
    }
    of_heads = {"pgd-3", "multihead-2", "worst"}
    assert attacked == {
        name: of_heads if name in ("mean of heads", "aggregate of heads") else {"pgd-3", "worst"} for name in ROWS
    }
    for options, attacks in (([], {"pgd-3", "multihead-2"}), (["--output-of", "head2"], {"pgd-3"})):
        output = tmp_path / f"results{len(options)}"
        ended = dualhead("evaluate", run, *options, "--limit", 4, "--output", output, "--precision", "float32")
        assert ended.status == 0, ended.err
        assert set(json.loads((output / "results.json").read_text())["attacks"]) == attacks


def test_a_run_is_evaluated_and_compared(finished_run):
    deployed = check_results(finished_run / "evaluation", ["pgd-3"])
    comparison = json.loads((finished_run / "comparison.json").read_text())
    assert [row["name"] for row in comparison["rows"]] == ROWS
    assert [row["output"] for row in comparison["rows"]] == ["base", "head1", "head2", "mean", "aggregate"]
    for row in comparison["rows"]:
        check_accuracies(row, ["pgd-3"])
        assert row["parameters"] > 0
        assert set(row["training_cost"]) == {"flops", "forward_equivalents", "seconds"}
        folder = finished_run / "evaluation" / "rows" / row["name"].replace(" ", "_")
        held = deployed if row["name"] == "aggregate of heads" else check_results(folder, ["pgd-3"])
        assert outcome(held) == outcome(row)
    base, head1, head2, mean, whole = comparison["rows"]
    assert outcome(base) == outcome(head1), "later stages must leave the base model as it was"
    costs = [row["training_cost"]["forward_equivalents"] for row in (base, head1, head2, mean, whole)]
    assert costs[0] == costs[1] < costs[2] == costs[3] < costs[4]
    assert base["parameters"] < mean["parameters"] < whole["parameters"]


def test_training_a_finished_run_prints_the_same_again_and_changes_nothing(finished_run):
    before = {path: path.read_bytes() for path in finished_run.rglob("*.safetensors")}
    comparison = (finished_run / "comparison.json").read_text()
    began = time.monotonic()
    ended = dualhead("train", "digits", *TINY, "--run-dir", finished_run, "--json")
    assert time.monotonic() - began < 30
    assert ended.status == 0
    assert "epoch" not in ended.err
    assert json.loads(ended.out) == {"run": str(finished_run), "rows": json.loads(comparison)["rows"]}
    assert {path: path.read_bytes() for path in finished_run.rglob("*.safetensors")} == before
    table = dualhead("train", "digits", *TINY, "--run-dir", finished_run, "--quiet")
    assert table.err == ""
    assert all(name in table.out for name in ROWS)
    assert "run:" not in table.out
    assert f"run: {finished_run}" in dualhead("train", "digits", *TINY, "--run-dir", finished_run).out


def test_the_library_loads_what_the_command_trained(finished_run):
    test = load_split("digits", "test")
    model = package.load(finished_run)
    with torch.no_grad():
        predicted = model(test.images[:COUNT].float() / 255).argmax(1)
    with np.load(finished_run / "evaluation" / "samples.npz") as samples:
        assert predicted.tolist() == samples["clean_prediction"].tolist()


def test_a_plain_model_has_one_row(tmp_path):
    plain = [word for word in TINY if not word.startswith("stages.*.attack")]
    ended = dualhead("train", "digits_natural", *plain, "--run-dir", tmp_path / "run", "--json")
    assert ended.status == 0, ended.err
    rows = json.loads(ended.out)["rows"]
    assert [row["name"] for row in rows] == ["digits_natural"]
    assert "stage natural (1/1): epoch 1/1" in ended.err
    check_results(tmp_path / "run" / "evaluation", ["pgd-3"])


# ---- evaluate


@pytest.fixture(scope="module")
def rows(finished_run):
    return {row["name"]: row for row in json.loads((finished_run / "comparison.json").read_text())["rows"]}


@pytest.mark.parametrize(
    ("options", "row"),
    [
        (["--stage", "main_head"], "base model"),
        (["--stage", "second_head"], "head 2"),
        (["--stage", "aggregator"], "aggregate of heads"),
        (["--output-of", "head1"], "head 1"),
        (["--output-of", "head2"], "head 2"),
        (["--output-of", "mean"], "mean of heads"),
        (["--output-of", "aggregate"], "aggregate of heads"),
        ([], "aggregate of heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_stage_and_output_gives_what_the_run_has_measured(finished_run, rows, tmp_path, options, row):
    output = tmp_path / "results"
    arguments = ["evaluate", finished_run, *options, "--attack", "pgd-3", "--limit", COUNT, "--output", output]
    ended = dualhead(*arguments, "--device", "cpu", "--precision", "float32", "--json")
    assert ended.status == 0, ended.err
    results = check_results(output, ["pgd-3"])
    assert json.loads(ended.out) == results
    assert outcome(results) == outcome(rows[row])


@pytest.mark.parametrize(
    ("options", "attacks"),
    [
        ([], ["pgd-3", "multihead"]),
        (["--output-of", "mean"], ["pgd-3", "multihead"]),
        (["--output-of", "head2"], ["pgd-3"]),
    ],
)
def test_merged_heads_are_attacked_adaptively_unless_attacks_are_named(finished_run, tmp_path, options, attacks):
    output = tmp_path / "results"
    ended = dualhead("evaluate", finished_run, *options, "--limit", 4, "--output", output, "--precision", "float32")
    assert ended.status == 0, ended.err
    results = json.loads((output / "results.json").read_text())
    assert list(results["attacks"]) == attacks


def test_evaluate_prints_a_table_and_a_curve_and_says_where_results_lie(finished_run, tmp_path):
    output = tmp_path / "results"
    ended = dualhead(
        "evaluate", finished_run, "--attack", "fgsm", "--attack", "pgd-2", "--eps", "0/25,0.01,2/25", "--limit", 16,
        "--output", output, "--quiet",
    )  # fmt: skip
    assert (ended.status, ended.err) == (0, "")
    results = check_results(output, ["fgsm", "pgd-2"], 16, 0.08)
    assert [point["eps"] for point in results["curve"]] == [0, 0.01, 0.08]
    shares = [point["robust_accuracy"]["worst"] for point in results["curve"]]
    assert shares == sorted(shares, reverse=True)
    assert "16 test images, Linf eps 0.08; percent, 95 % intervals" in ended.out
    assert "eps 0.08: " in ended.out
    assert "results:" not in ended.out
    again = dualhead(
        "evaluate", finished_run, "--attack", "fgsm", "--eps", "0,8/255", "--limit", 4, "--output", tmp_path / "levels"
    )
    assert "\neps 0: " in again.out
    assert "\neps 8/255: " in again.out


def test_results_go_to_a_folder_that_names_the_question(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    ended = dualhead("evaluate", run, "--attack", "pgd-2", "--eps", "8/255", "--limit", 8, "--quiet")
    assert ended.status == 0, ended.err
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name == "pgd-2_8-255_first8"
    check_results(folder, ["pgd-2"], 8, 8 / 255)


FACTORY = """
import torch
torch.manual_seed(0)
def make(num_classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


def test_a_model_of_ones_own_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_models.py").write_text(FACTORY)
    ended = dualhead(
        "evaluate",
        "my_own_models:make",
        "--data",
        "digits",
        "--eps",
        "0.1",
        "--attack",
        "pgd-2",
        "--limit",
        16,
        "--json",
    )
    assert ended.status == 0, ended.err
    (folder,) = (tmp_path / "evaluations" / "my_own_models.make").iterdir()
    assert check_results(folder, ["pgd-2"], 16, 0.1) == json.loads(ended.out)


def test_an_exported_model_is_evaluated_to_the_same(finished_run, rows, tmp_path):
    exported = dualhead("export", finished_run, "--to", tmp_path / "model")
    assert exported.status == 0, exported.err
    ended = dualhead(
        "evaluate", tmp_path / "model", "--data", "digits", "--attack", "pgd-3", "--limit", COUNT,
        "--output", tmp_path / "results", "--device", "cpu", "--precision", "float32", "--json",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert outcome(check_results(tmp_path / "results", ["pgd-3"])) == outcome(rows["aggregate of heads"])


# ---- stopping and going on


def start(folder, overrides):
    command = [sys.executable, "-m", "dualhead", "train", "digits", *overrides, "--run-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def weights_of(folder):
    found = sorted(folder.rglob("*.safetensors"))
    assert len(found) == 8  # best and last of three stages, the model, and a number for each image
    return {str(path.relative_to(folder)): load_file(path) for path in found}


LONG = (*TINY, "stages.*.epochs=3", "runtime.lanes=1")  # to the bit, whatever is faster


@pytest.mark.slow  # with `make bits`
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_goes_on_to_the_same_bits(number, tmp_path, uninterrupted):
    process = start(tmp_path / "run", LONG)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= (2 if number == signal.SIGINT else 6):
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("dualhead: stopped in stage ")
    assert err.splitlines()[-1].endswith("; the same command goes on from there")
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "run" / "model").exists()
    assert len(metrics.read_text().splitlines()) < 9, "it was stopped too late to show anything"

    ended = dualhead("train", "digits", *LONG, "--run-dir", tmp_path / "run", "--quiet")
    assert ended.status == 0, ended.err
    expected, found = weights_of(uninterrupted), weights_of(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, found[name][key]), f"{name}: {key}"

    def lines(folder):
        read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in read]

    assert lines(tmp_path / "run") == lines(uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = dualhead("train", "digits", *LONG, "--run-dir", folder, "--quiet")
    assert ended.status == 0, ended.err
    return folder
