"""Catalogue of what ships, with a line of description each, read from the package's files without importing torch."""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path
from typing import Final

from dualhead.system.files import head_sentence

_REGISTRIES: Final = {
    "aggregators": "aggregators", "attacks": "attacks", "augmentations": "augmentations", "averagings": "averages",
    "backbones": "backbones", "measurements": "measurements", "objectives": "objectives", "optimisers": "optimisers",
    "poisons": "poisons", "schedules": "schedules", "threats": "threats",
}  # fmt: skip
"""Registries by their names in the code, with the kind that people read."""
_SAID: Final = {"optimizers": "optimisers", "averagings": "averages", "models": "backbones", "losses": "objectives"}
KINDS: Final = sorted([*_REGISTRIES.values(), "recipes"])


def kind_of(word: str) -> str | None:
    """Return the kind that a word means, in any case and in the singular too; None if it is none."""
    word = word.lower()
    found = [kind for kind in (word, f"{word}s") if kind in KINDS or kind in _SAID]
    return _SAID.get(found[0], found[0]) if found else None


def shipped() -> dict[str, dict[str, str]]:
    """Return by kind, and in it by name, the first line that describes each."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for path in sorted(Path(str(resources.files("dualhead"))).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ".register(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                match decorator:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=registry), attr="register"),
                        args=[ast.Constant(value=str(name)), *_],
                    ) if registry in _REGISTRIES:
                        assert isinstance(node, ast.ClassDef)
                        found[_REGISTRIES[registry]][name] = first_line(ast.get_docstring(node))
    found["recipes"] = recipes()
    return {kind: dict(sorted(names.items())) for kind, names in found.items()}


def recipes() -> dict[str, str]:
    """Return the recipes that ship, by name, each with the first sentence at its head."""
    folder = Path(str(resources.files("dualhead"))) / "recipe" / "shipped"
    return {path.stem: head_sentence(path) for path in sorted(folder.glob("*.yaml"))}


def first_line(docstring: str | None) -> str:
    """Return the first line of a docstring; empty if there is none."""
    return (docstring or "").strip().partition("\n")[0]
