"""Components from a user's folder, through the command line: trained, stopped, resumed, evaluated, and told apart."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dualhead import load
from dualhead.components import plugins
from dualhead.recipe import load_recipe
from helpers.e2e import dualhead
from helpers.plugins import nothing_from_outside

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "extend.md").read_text(encoding="utf-8")
SHORT = (
    "data.train_limit=256", "data.validation=32", "stages.*.epochs=1", "validation.attack.steps=1", "evaluate.limit=32",
    "evaluate.gallery=4", "runtime.device=cpu", "runtime.lanes=1",
)  # fmt: skip


def files_of_the_page(folder):
    """Write the files that the page shows under their names; its other blocks are no files."""
    for name, text in re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.M | re.S):
        (folder / name).write_text(text)
    return folder


def environment(**more):
    paths = [str(ROOT / "src"), *filter(None, [more.pop("path", "")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def command(*words):
    return [sys.executable, "-m", "dualhead", *map(str, words)]


def run(*words, cwd, status=0, **more):
    ended = subprocess.run(
        command(*words), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == status, ended.stderr
    return ended


def told(stderr):
    return [line for line in stderr.splitlines() if line.startswith("code from outside is run: ")]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the page's files, in a process that has run nothing from outside."""
    folder = files_of_the_page(tmp_path)
    monkeypatch.chdir(folder)
    with nothing_from_outside():
        yield folder


# ---- in this process


def forget():
    """As if another process began."""
    for known in plugins._loaded.values():
        plugins._take_back(known.undo)
    plugins._loaded.clear()


@pytest.mark.timeout(300)
def test_a_run_is_refused_once_its_file_has_changed(project):
    ended = dualhead("train", "half.yaml", *SHORT, "--run-dir", "run", "--quiet")
    assert ended.status == 0, ended.err
    mine, kept = project / "mine.py", json.loads((project / "run" / "plugins.json").read_text())["plugins"]
    assert kept == [{"name": str(mine), "file": str(mine), "sha256": plugins.digest(mine)}]
    (copy,) = (project / "run" / "plugins").iterdir()
    assert copy.read_bytes() == mine.read_bytes()
    text = (project / "run" / "report.html").read_text()
    assert "mine.py:HalfAndHalf" in text
    rows = json.loads((project / "run" / "comparison.json").read_text())["rows"]
    assert set(rows[-1]["robust_accuracy"]) == {"pgd-10", "two_starts-5", "worst"}
    results = json.loads((project / "run" / "evaluation" / "results.json").read_text())
    assert results["environment"]["plugins"] == kept

    mine.write_text(mine.read_text() + "\n# another version\n")
    forget()
    for words in (
        ["train", "half.yaml", *SHORT, "--run-dir", "run", "--quiet"],
        ["train", "run/config.yaml", "--run-dir", "run", "--quiet"],
        ["evaluate", "run", "--limit", "4"],
        ["gallery", "run", "--limit", "4"],
        ["play", "run"],
    ):
        ended = dualhead(*words)
        assert ended.status == 2, words
        last = ended.err.splitlines()[-1]
        assert last.startswith(f"dualhead: run: was made with another version of {mine} (sha256 ")
        kept = Path("run/plugins") / copy.name
        assert last.endswith(f"; put back the file {kept}, or begin anew in another folder")
    for words in (["report", "run"], ["info", "run"], ["compare", "run"]):
        assert dualhead(*words).status == 0, words
    with pytest.raises(ValueError, match=rf"another version of {mine}"):
        load("run")

    mine.write_bytes(copy.read_bytes())
    forget()
    assert dualhead("train", "half.yaml", *SHORT, "--run-dir", "run", "--quiet").status == 0
    assert dualhead("export", "run", "--to", "exported").status == 0
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(load("exported")(images), load("run")(images))
    assert dualhead("export", "run", "--to", "exported").status == 0  # the same export again
    logits = load("run")(images)
    mine.unlink()
    forget()
    assert torch.equal(load("exported")(images), logits)  # an export holds what it needs
    ended = dualhead("evaluate", "run", "--limit", "4")
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        f"dualhead: run: needs {mine}, which is not there; put back the file run/plugins/{copy.name}"
    )
    (project / "exported" / "plugins" / copy.name).write_text("changed = True\n")
    forget()
    with pytest.raises(ValueError, match=r"exported: was made with another version of exported/plugins/mine-"):
        load("exported")


def test_an_evaluation_is_not_mixed_with_another_version_of_an_attack(project, finished_run):
    words = ["evaluate", finished_run, "--attack", "mine.py:TwoStarts", "--limit", "8", "--output", "found", "--quiet"]
    assert dualhead(*words).status == 0
    assert dualhead(*words).status == 0
    (project / "mine.py").write_text((project / "mine.py").read_text() + "\n")
    forget()
    ended = dualhead(*words)
    assert ended.status == 2
    assert f"holds results of two_starts with another version of {project / 'mine.py'}" in ended.err
    assert dualhead(*words, "--overwrite").status == 0


def test_list_says_where_components_come_from(project):
    ended = dualhead("list", "attacks", "--plugin", "mine.py")
    assert ended.status == 0
    assert f"\ntwo_starts ({project / 'mine.py'})  " in ended.out
    ended = dualhead("list", "attacks", "--plugin", "mine.py", "--json")
    found = json.loads(ended.out)
    assert "two_starts" in found["attacks"]
    assert found["from"] == {"attacks": {"two_starts": str(project / "mine.py")}}
    assert dualhead("list", "--plugin", "gone.py").error_line.startswith("--plugin: plugin gone.py: no such file in ")


def test_a_sweep_trains_with_plugins(project):
    (project / "plain.yaml").write_text("extends: digits_natural\nmodel: {backbone: cnn-2}\n")
    ended = dualhead(
        "sweep", "plain.yaml", "evaluate.attacks=[two_starts-1]", *SHORT, "data.augment=['mine.py:Brightness'],[]",
        "--plugin", "mine.py", "--out", "sweep", "--quiet", "--json",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    rows = json.loads(ended.out)["rows"]
    assert len({row["run"] for row in rows}) == 2
    assert all("robust_two_starts-1" in row for row in rows)
    assert len(list((project / "sweep").glob("*/plugins.json"))) == 2


def test_a_recipe_in_full_needs_no_other_folder(project, monkeypatch):
    recipe = load_recipe("half.yaml")
    (project / "full.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    monkeypatch.chdir("/")
    forget()
    assert load_recipe(str(project / "full.yaml")).resolved() == recipe.resolved()


# ---- in processes of their own


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_runs_from_an_empty_folder_as_written(tmp_path):
    files_of_the_page(tmp_path)
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)
        assert words.pop(0) == "dualhead"
        ended = run(*words, cwd=tmp_path)
        if words[0] in ("train", "evaluate"):
            assert len(told(ended.stderr)) == 1
    assert "two_starts (" in run("list", "attacks", "--plugin", "mine.py", cwd=tmp_path).stdout
    assert "mine.py:HalfAndHalf (share 0.9)" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_was_stopped_goes_on_from_another_folder(tmp_path):
    (tmp_path / "project").mkdir()
    folder = files_of_the_page(tmp_path / "project")
    options = [*SHORT, "stages.*.epochs=4"]
    words = ["train", folder / "half.yaml", *options, "--run-dir", tmp_path / "run", "--quiet"]
    process = subprocess.Popen(command(*words), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 75, process.stderr.read()
    assert len(metrics.read_text().splitlines()) < 12

    mine, text = folder / "mine.py", (folder / "mine.py").read_text()
    mine.write_text(text + "\n")
    refused = run(*words, cwd="/", status=2).stderr.splitlines()[-1]
    assert f"was made with another version of {mine} " in refused
    mine.write_text(text)

    run(*words, cwd="/")
    run(*words[:-2], tmp_path / "whole", "--quiet", cwd=folder)
    images = torch.rand(4, 1, 8, 8)
    with nothing_from_outside():
        assert torch.equal(load(tmp_path / "run")(images), load(tmp_path / "whole")(images))
    ended = run("evaluate", tmp_path / "run", "--limit", "8", "--json", cwd="/tmp")
    assert set(json.loads(ended.stdout)["robust_accuracy"]) >= {"pgd-10", "two_starts-5"}
    run("report", tmp_path / "run", "-o", tmp_path / "page.html", cwd="/")
    run("export", tmp_path / "run", "--to", tmp_path / "exported", cwd="/")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_of_torchrun_run_the_same_file_and_one_tells(tmp_path):
    files_of_the_page(tmp_path)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    for words in (["train", "half.yaml", *SHORT, "--run-dir", "run"], ["evaluate", "run", "--limit", "8"]):
        ended = subprocess.run(
            [*start, "dualhead", *words, "--quiet"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert len(told(ended.stderr)) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_finds_a_module_beside_the_recipe(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "project").mkdir()
    folder = files_of_the_page(tmp_path / "project")
    (folder / "plain.yaml").write_text("extends: digits_natural\ndata: {augment: ['mine:Brightness']}\n")
    words = ["sweep", folder / "plain.yaml", *SHORT, "model.backbone=cnn-2", "evaluate.attacks=[pgd-1]"]
    run(*words, "--on", "local", "--out", tmp_path / "sweep", cwd=tmp_path)
    (record,) = json.loads(next((tmp_path / "sweep").glob("*/plugins.json")).read_text())["plugins"]
    assert (record["name"], record["file"]) == ("mine", str(folder / "mine.py"))
    (made,) = (path.parent for path in (tmp_path / "sweep").glob("*/plugins.json"))
    run("evaluate", made, "--limit", "4", cwd="/")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_installed_package_lends_its_names_and_a_broken_one_is_left_out(tmp_path):
    site = tmp_path / "site"
    for package, text in (
        ("lends", (files_of_the_page(tmp_path) / "mine.py").read_text()),
        ("broken", "import gone\n"),
    ):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").touch()
        (site / package / "parts.py").write_text(text)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dualhead.components]\nmine = {package}.parts\n")
    listed = run("list", "attacks", cwd=tmp_path, path=str(site))
    assert "two_starts (package lends)" in listed.stdout
    assert "package broken is left out: importing 'broken.parts' failed: ModuleNotFoundError" in listed.stderr
    words = ["train", "digits_natural", *SHORT, "model.backbone=cnn-2", "evaluate.attacks=[two_starts-2]"]
    run(*words, "--run-dir", "run", "--quiet", cwd=tmp_path, path=str(site))
    evaluated = run("evaluate", "run", "--limit", "8", "--json", cwd=tmp_path, path=str(site))
    assert "two_starts-2" in json.loads(evaluated.stdout)["robust_accuracy"]
    failed = run("evaluate", "run", "--limit", "8", cwd=tmp_path, status=2)
    assert "two_starts" in failed.stderr.splitlines()[-1]
