"""Every command and every Python block of README and docs runs, on small data, or is declared here with the reason."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualhead.recipe.schema import REGISTRIES
from helpers.e2e import TINY, dualhead
from helpers.plugins import nothing_from_outside

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CANNOT = {
    "make demo": "makes an environment of its own; .ci/run does so",
    "benchmarks/elsewhere/run.sh": "hours of training; what it asks for is tested in test_benchmark_elsewhere",
    "benchmarks/strongest/run.sh": "hours of training; what it asks for is tested in test_benchmark_strongest",
    "dualhead demo": "trains for minutes; tests/commands/test_demo.py runs it in short",
    "python benchmarks/": "a measurement of its own; its arguments are tested beside it",
    "'METHODS=": "hours of training; what benchmarks/strongest/run.sh asks for is tested in test_benchmark_strongest",
    "dualhead compare 'runs/strongest/": "of what those hours leave",
    "dualhead evaluate runs/strongest/": "of what those hours leave",
    "python tools/": "makes files of the repository anew",
    "pip install": "installs",
    "dualhead train cifar10_cpu": "downloads CIFAR-10; the same recipe runs below from parquet",
    "dualhead export runs/mine --to model --push": "uploads to the Hub",
    "dualhead train cifar10_wrn34": "a network for an accelerator, and weights that are not ours to ship",
    "srun torchrun": "a Slurm cluster; tests/distributed runs several processes",
    "torchrun --nproc-per-node 8 -m dualhead train imagenet": "ImageNet, 8 GPUs; tests/distributed runs the recipe",
    "dualhead train mine.yaml data.source=path/to/my_images": "weights that only the reader has",
    "dualhead train digits_dual_bn": "a minute of training; tests/e2e/test_two_routes.py trains it",
    "dualhead evaluate runs/dual": "of what that leaves; tests/e2e/test_tied_heads.py measures routes",
    "dualhead evaluate runs/digits_routed": "of what training leaves; tests/runs/test_routed_runs.py measures it",
    "dualhead sweep": "trains many networks; its own tests run small ones",
    "dualhead train half.yaml": "tests/e2e/test_own_components.py runs that page from an empty folder",
    "dualhead evaluate runs/half": "likewise",
    "dualhead report runs/half": "likewise",
    "dualhead list attacks --plugin mine.py": "likewise",
    "dualhead sample runs/dat": "of what minutes of training leave; tests/commands/test_generate.py draws samples",
    "dualhead counterfactual runs/dat": "likewise",
    "dualhead evaluate runs/dat": "likewise; that file measures samples too",
    "dualhead play": "serves until it is stopped; tests/e2e/test_play.py starts and stops it",
}
"""Beginnings of commands that are not run here, unless one of `CAN` fits."""
CAN = (
    "dualhead train cifar10_cpu --data ",
    "dualhead train cifar10_cpu data.source=",
    "dualhead train cifar10_cpu_guided_distillation data.source=",
)


def blocks(language):
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    for block in blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield pytest.param(shlex.join(words), id=f"{block.id}: {' '.join(words)[:60]}")


def reason(command):
    if command.startswith(CAN):
        return None
    return next((why for start, why in CANNOT.items() if command.startswith(start)), None)


def save(path, side, random):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(path)


def image_folder(folder, classes, random, side=32):
    for part, count in (("train", 12), ("test", 4)):
        for name in classes:
            for number in range(count):
                save(folder / part / name / f"{number}.png", side, random)


def parquet(folder, random):
    """Ten classes of noise in the layout of CIFAR-10 on the Hub."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    folder.mkdir(parents=True)
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=[f"class {k}" for k in range(10)])})
    for part, count in (("train", 80), ("test", 20)):
        images = []
        for _ in range(count):
            stored = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(stored, "PNG")
            images.append({"bytes": stored.getvalue(), "path": None})
        rows = {"img": images, "label": [number % 10 for number in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished_run):
    """A folder that holds everything the documents speak of."""
    folder, random = tmp_path_factory.mktemp("docs"), np.random.default_rng(0)
    for name in ("a", "b", "mine", "cifar10_cpu", "photos", "digits", "guided"):
        shutil.copytree(finished_run, folder / "runs" / name)
    other = folder / "runs" / "b" / "config.yaml"  # two runs that are compared differ in their seed
    other.write_text(other.read_text().replace("seed: 0", "seed: 1"))
    image_folder(folder / "photos", ("cat", "dog"), random)
    image_folder(folder / "path" / "to" / "images", [f"class {k}" for k in range(10)], random)
    parquet(folder / "path" / "to" / "parquet", random)
    for name in ("cifar10", "cifar10-jpeg75", "tiny-imagenet-32-jpeg75"):
        shutil.copytree(folder / "path/to/parquet", folder / "path/to" / name)
    recipe = next(
        text for text in re.findall(r"```yaml\n(# photos.yaml.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.S)
    )
    (folder / "photos.yaml").write_text(recipe)
    (folder / "my_recipe.yaml").write_text("extends: digits\nname: mine\n")
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "models.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))\n"
    )
    models = Path("benchmarks", "results", "models")
    shutil.copytree(ROOT / models, folder / models)
    return folder


def shortened(words, folder):
    """The command with settings that make it quick and leave what it shows as it is."""
    if words[1] == "train":
        given = {word.partition("=")[0] for word in words[2:]}
        short = [pair for pair in TINY if pair.partition("=")[0] not in given | {"model.backbone"}]
        small = [] if words[2].startswith(("cifar10", "tiny", "photos")) else TINY[:1]
        if words[2].startswith(("tiny", "digits_natural")):  # a stage has no attack to shorten
            short = [pair for pair in short if not pair.startswith("stages.")]
        held = (
            ["data.validation=10", "data.train_limit=60"]
            if {"photos.yaml", "--data"} & set(words) or "data.source" in given
            else []
        )
        fresh = folder / "fresh" / str(len(list((folder / "fresh").glob("*"))) if (folder / "fresh").is_dir() else 0)
        where = [] if "--run-dir" not in words else words[words.index("--run-dir") : words.index("--run-dir") + 2]
        rest = [word for word in words if word not in where and not word.startswith("stages.")]
        if "--epochs" in rest:
            del rest[rest.index("--epochs") : rest.index("--epochs") + 2]
        fixed = [
            f"runtime.{pair}" for pair in ("precision=float32", "layout=contiguous", "lanes=1")
        ]  # nothing to measure
        quick = [*short, *small, *held, *fixed, "stages.*.epochs=1", "evaluate.gallery=4"]
        return [*rest, *quick, "--run-dir", str(fresh), "--quiet"]
    if words[1] == "evaluate":
        limit = ["--limit"] if "--limit" not in words else []
        rest = list(words)
        if not limit:
            rest[rest.index("--limit") + 1] = "4"
        return [*rest, *([*limit, "4"] if limit else []), "--quiet"]
    if words[1] == "gallery":
        rest = list(words)
        if "--limit" in rest:
            rest[rest.index("--limit") + 1] = "4"
        return rest
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", list(commands()))
def test_command_runs(command, place, monkeypatch):
    why = reason(command)
    if why:
        pytest.skip(why)
    words = shlex.split(command)
    assert words[0] == "dualhead", f"neither run nor declared: {command}"
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    ended = dualhead(*shortened(words, place)[1:])
    assert ended.status == 0, ended.err


def test_every_reason_is_still_needed():
    texts = [param.values[0] for param in commands()]
    for start in CANNOT:
        assert start in ("pip install", "python tools/") or any(text.startswith(start) for text in texts), start


def readers_own():
    """A network and images, as the README's Python block expects them of its reader."""
    import torch

    def make_net():
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 3)
        )

    def some(count):
        labels = torch.arange(count) % 3
        return (torch.rand(count, 3, 8, 8) + labels[:, None, None, None]) / 3, labels

    (images, labels), (test_images, test_labels) = some(60), some(12)
    x, y = test_images[:4], test_labels[:4]
    return {
        "model": make_net(), "make_net": make_net, "images": images, "labels": labels, "test_images": test_images,
        "test_labels": test_labels, "x": x, "y": y,
    }  # fmt: skip


@pytest.mark.slow
def test_the_tutorial_from_an_empty_folder(tmp_path, monkeypatch):
    """Its blocks in turn, in short; what it says that a command prints has the words that the command prints."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    quick = (
        "stages.*.epochs=1", "stages.*.attack.steps=1", "validation.attack.steps=1", "data.train_limit=200",
        "model.backbone={name: cnn, width: 4, stages: 2, convolutions: 1}", "evaluate.limit=20", "evaluate.gallery=0",
    )  # fmt: skip
    printed, compared = "", 0  # by the last commands, and blocks of what they print
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            exec(compile(block, "block", "exec"), {"__name__": "__main__"})
        elif language == "yaml":
            Path("photos.yaml").write_text(block)
        elif language == "sh":
            printed = ""
            for command in map(shlex.split, block.splitlines()):
                if command[1] == "play":  # serves until it is stopped
                    continue
                if "--limit" in command:
                    command[command.index("--limit") + 1] = "4"
                ended = dualhead(*command[1:], *(quick if command[1] == "train" else ()))
                assert ended.status == 0, ended.err
                printed += ended.out
        elif printed:
            lines = [line for line in block.splitlines() if not line.startswith("play:")]
            missing = words_of("\n".join(lines)) - words_of(printed)
            assert not missing, f"{block}\nprints no {missing}, but\n{printed}"
            compared += 1
    assert compared == 7


@pytest.mark.slow
def test_the_command_line_of_the_readme_from_an_empty_folder(tmp_path, monkeypatch):
    """Photos and nothing else: its commands in turn leave a run, a stronger evaluation and a report."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", ("cat", "dog"), np.random.default_rng(0), side=8)
    readme = (ROOT / "README.md").read_text().partition("## The same from the command line")[2]
    quick = ("data.validation=4", *TINY[:1], *TINY[4:])
    text = re.search(r"```sh\n(.*?)```", readme, re.S)[1].replace("--epochs 30", "--epochs 1")
    for command in map(shlex.split, text.splitlines()):
        ended = dualhead(*command[1:], *(quick if command[1] == "train" else ()))
        assert ended.status == 0, ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "runs", "report.html"}
    assert (tmp_path / "runs" / "photos" / "evaluations").is_dir()


def words_of(text):
    """Words, without numbers and the lines of tables."""
    return {word for word in re.split(r"[^\w.:/-]+", text) if not re.search(r"\d", word) and re.search(r"\w", word)}


@pytest.mark.slow
@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_block_runs(text, place, monkeypatch, tmp_path):
    import torch

    import dualhead as package

    monkeypatch.chdir(place)
    monkeypatch.setattr("webbrowser.open", lambda *_: True)
    known = {
        "my_model": torch.nn.Sequential(),
        "images": torch.rand(8, 1, 8, 8),
        "labels": torch.arange(8),
    }
    if "dualhead.fit(" in text:  # the README's block: all that it leaves to the reader
        monkeypatch.chdir(tmp_path)
        known = readers_own()
    if "my_model" in text:  # a block that leaves the network to the reader
        known["my_model"] = package.load("runs/digits").view("head1")
        text = text.replace('attach_second_head(my_model, "layer1"', 'attach_second_head(my_model, "trunk"')
    if 'dualhead.train("digits", run_dir' in text:
        short = ", ".join(repr(pair) for pair in TINY)
        text = text.replace('dualhead.train("digits", run_dir', f'dualhead.train("digits", [{short}], run_dir')
    with nothing_from_outside():  # what a block registers is gone again for other tests
        exec(compile(text, "block", "exec"), {"__name__": "__main__", **known})


ATTACK = "one forward and backward pass for each step of the attack, "
TARGET = "a forward pass for its target, "
AMONG_THREE = "one forward and backward pass for each step of the attack that makes `attacked{}`, "
FAR, REHEARSED = (AMONG_THREE.replace("attacked{}", made) for made in ("far", "rehearsed"))
THREATS = "".join(AMONG_THREE.format(number) for number in ("", 2, 3))
ONE, TWO, THREE = (f"{number} forward and backward pass" for number in ("one", "two", "three"))
OBJECTIVE_COSTS = {
    "natural": f"{ONE} for the loss; no attack.",
    "sat": f"{ATTACK}and {ONE} for the loss.",
    "distilled": f"{ATTACK}{TWO}es for the loss, and a forward pass of the teacher.",
    "hat": f"{ATTACK}{TARGET}{THREE}es for the loss, and a forward pass of the teacher.",
    "msd": f"{ATTACK}and {ONE} for the loss.",
    "energy": f"{ATTACK}and {THREE}es for the loss.",
    "ewc": f"{ATTACK}and {ONE} for the loss.",
    "lwf": f"{ATTACK}{TWO}es for the loss, and two forward passes of the teacher.",
    "air": f"{ATTACK}{THREE}es for the loss, and two forward passes of the teacher.",
    "after_dder": f"{ATTACK}and 4 forward and backward passes for the loss.",
    "alr": f"{AMONG_THREE.format('')}{FAR}{TARGET}and {THREE}es for the loss.",
    **dict.fromkeys(("agem", "replay"), f"{AMONG_THREE.format('')}{REHEARSED}and {TWO}es for the loss."),
    "any_of": f"{ATTACK}and {ONE} for the loss.",
    "avg": f"{THREATS}and {THREE}es for the loss.",
    "elle": f"{ATTACK}and 4 forward and backward passes for the loss.",
    "grad_align": (
        f"{ATTACK}{ONE} for the loss, {TWO}es for gradients of images, and {TWO}es to differentiate one of these again."
    ),
    "ramp": f"{AMONG_THREE.format('')}{AMONG_THREE.format(2)}and {TWO}es for the loss.",
    **dict.fromkeys(("mart", "hybrid", "align", "balanced"), f"{ATTACK}and {TWO}es for the loss."),
    **dict.fromkeys(
        ("trades", "ikl", "joint", "logit_pairing", "reverse_smoothing"), f"{ATTACK}{TARGET}and {TWO}es for the loss."
    ),
}
"""What the cards of objectives say, as counted by hand."""


def test_every_card_says_when_at_what_cost_and_where_published():
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "tools" / "docs_pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    made = pages.component_pages()
    for name, text in made.items():
        stored = (ROOT / "docs" / name).read_text()
        assert stored == text, f"docs/{name} is not what the docstrings say: run `python tools/docs_pages.py`"
    for kind in ("objectives", "attacks", "aggregators", "poisons", "threats"):
        cards = re.split(r"^## ", made[f"components/{kind}.md"], flags=re.MULTILINE)[1:]
        own = [n for n in REGISTRIES[kind].names() if REGISTRIES[kind].get(n).__module__.startswith("dualhead.")]
        assert [card.partition("\n")[0] for card in cards] == own
        for card in cards:
            told = dict(re.findall(r"^\* \*(When|Cost|Paper):\* (.+)$", card, re.MULTILINE))
            assert all(len(told[word]) > 4 for word in ("When", "Cost", "Paper")), card
            assert "When: " not in card.partition("* *When")[0]
    costs = dict(re.findall(r"^## (\w+)$.*?^\* \*Cost:\* (.+?)$", made["components/objectives.md"], re.M | re.S))
    assert set(costs) == set(OBJECTIVE_COSTS), "count the passes of a new objective by hand, and write them there"
    assert costs == OBJECTIVE_COSTS
    assert "4,040 queries" in made["components/attacks.md"]  # of autoattack-rand: 20 for each gradient
    assert "7,811 queries" in made["components/attacks.md"]  # of autoattack: FAB asks at an iterate and after its step


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    cards = (tmp_path / "site" / "components" / "attacks" / "index.html").read_text()
    assert "Madry" in cards
    assert "queries of the model at most" in cards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [("attach_and_evaluate.py", [], "head2: clean"), ("digits_to_report.py", ["run", *TINY], "report.html")],
)
def test_examples_run(script, arguments, told, tmp_path):
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert told in ended.stdout
