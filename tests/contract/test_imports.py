"""Imports go one way, only `devices` names devices, and the command line answers without loading what computes."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "dualhead"

RANKS = [
    {"errors", "noise"},
    {"components", "names", "statistics", "system"},
    {"threats"},
    {"attacks", "data", "heads", "models", "report"},
    {"objectives"},
    {"evaluation", "saving", "training"},
    {"recipe"},
    {"runs"},
    {"commands"},
    {"__init__"},
    {"__main__"},
]
"""A module imports from lower ranks only. Those of one rank, the rooms among them, know nothing of each other."""
OPEN = {"commands", "components", "system"}
"""Rooms without a door: each module in them is entered by its own name."""
ROOMS = {
    "attacks", "data", "evaluation", "heads", "models", "objectives", "recipe", "report", "runs", "saving", "threats",
    "training",
}  # fmt: skip
INSIDES = {
    # The recipe's schema is made of the stage's, which lies beside the loop that reads it.
    ("recipe", "training.averaging"),
    ("recipe", "training.optimisation"),
    ("recipe", "training.stage"),
    # Losses serve the harness and the attacks alike.
    ("evaluation", "attacks.losses"),
}
"""Where a room is entered otherwise than by `from dualhead.ROOM import name`."""
READS_FILES_ONLY = {"report"}
"""May import nothing of the package that computes."""
RANK = {module: number for number, modules in enumerate(RANKS) for module in modules}


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """What a module imports of the package, as dotted names below `dualhead`, with line numbers."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "dualhead":
                below = node.module.removeprefix("dualhead").lstrip(".")
                for name in [below] if below else [alias.name for alias in node.names]:
                    yield name, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dualhead":
                    yield alias.name.removeprefix("dualhead").lstrip("."), node.lineno


def test_the_documentation_lists_the_ranks():
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. (.*)$", text.split("## Who may import whom")[1].split("## Decisions")[0], re.MULTILINE)
    assert [set(re.findall(r"`([\w]+)`", line.split(":")[0])) for line in listed] == RANKS


def test_every_module_has_its_rank():
    assert {room_of(path) for path in modules()} == set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    home = room_of(path)
    for name, line in imports(path):
        target = name.split(".")[0]
        if target == home:
            continue
        where = f"{path.relative_to(SOURCE)}:{line}: {home} imports {name}"
        assert RANK[target] < RANK[home], f"{where}, which does not lie below it"
        if target in ROOMS and "." in name:
            assert (home, name) in INSIDES, f"{where}, an inside of {target}; write `from dualhead.{target} import ...`"
        if home in READS_FILES_ONLY:
            assert name in {"errors", "names", "statistics", "system.files"}, f"{where}, but {home} reads files only"


def test_the_exceptions_are_needed():
    found = {(room_of(path), name) for path in modules() for name, _ in imports(path)}
    assert found >= INSIDES


def test_names_that_load_lazily_have_the_homes_that_type_checkers_see():
    import dualhead

    for name in dualhead.__all__:
        assert getattr(dualhead, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dualhead.nothing


# ---- devices

DEVICE = re.compile(r"^(cuda|mps|xpu|hpu)(:\d+)?$")


def strings_that_are_not_docstrings(module):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_one_module_names_devices(path):
    if path == SOURCE / "system" / "devices.py":
        return
    for node in strings_that_are_not_docstrings(tree(path)):
        assert not DEVICE.match(node.value), f"{path}:{node.lineno}: names the device {node.value!r}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("cuda", "mps"), f"{path}:{node.lineno}: uses .{node.attr}"


# ---- what answers at once


def imported_by(*arguments):
    """The modules that `python -m dualhead ARGUMENTS` imports."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-X", "importtime", "-m", "dualhead", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    lines = [line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return ended, set(lines)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["--version"], 0),
        ([], 0),
        (["trian"], 2),
        (["train"], 2),
        (["list"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_wrong_words_answer_without_torch(arguments, status):
    ended, loaded = imported_by(*arguments)
    assert ended.returncode == status, ended.stderr
    assert "dualhead.commands.cli" in loaded
    heavy = {"torch", "numpy", "datasets", "pandas", "scipy", "pydantic", "yaml", "matplotlib"} & loaded
    assert heavy <= {"pydantic"}  # which some versions of typer use
