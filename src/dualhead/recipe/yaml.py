"""Recipes as files: YAML that may extend another recipe, plus dotted overrides; and the recipes that ship."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dualhead.components import plugins as outside
from dualhead.components.registry import folded
from dualhead.errors import UserError, under
from dualhead.recipe.schema import Recipe, parse_recipe

LARGEST_RECIPE = 2**20
"""Bytes of a file."""
LARGEST_CONTENT = 100_000
"""Values in a recipe, each use of an anchor counted."""
_TOO_MUCH = f"holds more than {LARGEST_CONTENT:,} values, each use of an anchor counted, so it is no recipe"


def recipe_content(recipe: Recipe | Mapping[str, Any] | str | Path, folders: list[Path]) -> dict[str, Any]:
    """Return a recipe as plain data that may be changed and then parsed, with those that it extends.

    Args:
        recipe: the name of a shipped one, a path to a YAML file, a mapping as such a file holds it, or a recipe.
        folders: those of the files are appended, where components are looked for.

    Raises:
        UserError: if there is no such recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe.resolved()
    if isinstance(recipe, Mapping):
        content = _unshared(_plain(recipe), [0])
        parent = content.pop("extends", None)
        base = {} if parent is None else _extended(str(parent), (), folders)[0]
        base.pop("name", None)
        _refuse_unknown_stages("recipe", base.get("stages"), content.get("stages"))
        return {"name": "recipe", **_merge(base, content)}
    if not isinstance(recipe, str | Path):
        raise UserError(
            f"recipe: must be the name of a shipped recipe, a path, a mapping or a Recipe, got {type(recipe).__name__}"
        )
    content, label = _extended(str(recipe), (), folders)
    return {"name": label, **content}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Override:
    """A change to a recipe.

    Args:
        key: dotted.
        value: as plain data.
        text: `KEY=VALUE` as it was written, for messages.
    """

    key: str
    value: Any
    text: str


Overrides = Mapping[str, Any] | Sequence[str] | str
"""Values by dotted key, or `KEY=VALUE`, once or in a list."""


def parse_overrides(given: Overrides) -> list[Override]:
    """Return overrides in their order; the values of `KEY=VALUE` are read as YAML.

    Raises:
        UserError: if one is not of that form.
    """
    if not isinstance(given, Mapping):
        return [_parse_override(text) for text in ([given] if isinstance(given, str) else given)]
    for key in given:
        if not isinstance(key, str) or not all(key.split(".")):
            raise UserError(f"override {key!r} is not understood; write dotted keys, e.g. data.source")
    return [Override(key, _plain(value), f"{key}={value}") for key, value in given.items()]


def _parse_override(text: object) -> Override:
    key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {text!r} is not understood; write KEY=VALUE, e.g. data.source=digits")
    return Override(key, parse_yaml(value, f"override {text!r}"), str(text))


def override(content: dict[str, Any], change: Override) -> None:
    """Change a recipe as plain data; `*` in a key stands for all items of a list.

    Raises:
        UserError: if there is no such place.
    """
    _assign(content, _words(change.key), copy.deepcopy(change.value), change.text)


def load_recipe(name: str, overrides: Overrides = (), plugins: str | Sequence[str] = ()) -> Recipe:
    """Load a recipe by the name of a shipped one or by path, with overrides.

    Components, and files of them, are looked for in the recipe's folder, then in those of the recipes that it extends,
    then in the current one.

    Args:
        name: `cifar10_cpu`, or a path to a YAML file. A recipe may say `extends: OTHER` and give only what differs.
        overrides: `KEY=VALUE` with a dotted key, `stages.main_head.epochs=5`, once or in a list; `*` stands for all
            items of a list. Values are read as YAML. Or values by dotted key, `{"stages.*.epochs": 5}`.
        plugins: a file or module besides those that the recipe names, or several.

    Raises:
        UserError: one line naming the key, what is wrong with it, and what would be right.
    """
    folders: list[Path] = []
    content, label = _extended(name, (), folders)
    content.setdefault("name", label)
    changes = parse_overrides(overrides)
    before = copy.deepcopy(content) if changes else content
    for change in changes:
        override(content, change)
    if plugins:
        with under("--plugin"):
            sources = [plugins] if isinstance(plugins, str) else plugins
            given = [outside.located(source) for source in sources]  # these stand on the command line: relative to here
        named = content.get("plugins") or []
        content["plugins"] = [*named, *given] if isinstance(named, list) else named
    with outside.searched_in(folders):
        try:
            return parse_recipe(content, f"recipe {name}")
        except UserError as error:
            told = ""
            if "unknown key" in str(error):
                told = _where_they_live(changes, before, f"recipe {name}") or _where_it_lives(str(error), content, name)
            stages = before.get("stages")
            names = [x.get("name") for x in stages if isinstance(x, dict)] if isinstance(stages, list) else []
            keys = [change.key for change in changes]
            raise UserError(stages_as_named(told or str(error), keys, names)) from None


def _covers(place: str, key: str) -> bool:
    """Whether a dotted key, with numbers or names of stages, is a place as `places_of` writes it."""
    pattern = "".join("[^.]+" if part == "*" else re.escape(part) for part in re.split(r"(\*)", place))
    return re.fullmatch(pattern, key) is not None


def stages_as_named(message: str, keys: Sequence[str], names: Sequence[object]) -> str:
    """Return a message in which stages are called by their names, unless overrides call them by number or `*`.

    Args:
        message: with `stages.0.epochs`.
        keys: of the overrides, dotted; they may go on, as `KEY=VALUE` does.
        names: of all stages, in order, before the overrides.
    """
    given = [key.partition("=")[0].split(".") for key in keys]
    named = {words[1] for words in given if words[0] == "stages" and words[1:]}
    if not any(words[0] == "stages" for words in given):  # then a file alone calls them anything
        named = {name for name in names if isinstance(name, str) and names.count(name) == 1}
    for number, name in enumerate(names):
        if isinstance(name, str) and name in named:
            message = re.sub(rf"\bstages\.{number}\b", f"stages.{name}", message)
    return message


def _where_they_live(changes: Sequence[Override], before: dict[str, Any], where: str) -> str:
    """Say of the first override that the recipe does not take where keys of its name live; empty if nowhere."""
    from dualhead.recipe.keys import places_of

    try:
        recipe = parse_recipe(before, where)
    except UserError:  # it is wrong without them already
        return ""
    for change in changes:
        key, value = change.key, change.text.partition("=")[2]
        content = copy.deepcopy(before)
        override(content, change)
        try:
            parse_recipe(content, where)
        except UserError as error:
            places = places_of(key.rpartition(".")[2], recipe) if "unknown key" in str(error) else []
            if places and not any(_covers(place, key) for place in places):
                return f"{change.text}: unknown key; write {' or '.join(f'{p}={value}' for p in places[:3])}"
    return ""


def _where_it_lives(message: str, content: dict[str, Any], name: str) -> str:
    """Say of the key of a file that a message does not know where keys of its name live; empty if nowhere."""
    from dualhead.recipe.keys import places_of

    found = re.search(r": ([\w.]+): unknown key(?:; did you mean ('\w+')\?)? \(", message)
    if found is None:
        return ""
    *path, key = found[1].split(".")
    rest = inner = copy.deepcopy(content)
    try:
        for word in path:
            inner = inner[int(word)] if isinstance(inner, list) else inner[word]
        del inner[key]
        places = places_of(key, parse_recipe(rest, name))
    except (UserError, LookupError, TypeError, ValueError):  # wrong elsewhere too, or a key that was given otherwise
        return ""
    if not places:
        return ""
    elsewhere = " or ".join(places[:3])
    advice = f"did you mean {found[2]} here, or {elsewhere}?" if found[2] else f"it belongs at {elsewhere}"
    return f"recipe {name}: {found[1]}: unknown key; {advice}"


def read_recipe_file(path: Path) -> Recipe:
    """Read a file that holds a recipe in full, as `Recipe.resolved` gives it.

    Raises:
        UserError: if the file is no such recipe.
    """
    content = parse_yaml(_text_of(path, str(path)), str(path))
    return parse_recipe(content, str(path))


def shipped_recipes() -> list[str]:
    """Return the names of the recipes inside the package."""
    folder = resources.files("dualhead.recipe.shipped")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def known_recipe(name: str) -> str | None:
    """Return the shipped recipe that a name means, in any case and with - or _; None if it is none."""
    return next((known for known in shipped_recipes() if folded(known) == folded(name)), None)


def _extended(name: str, chain: tuple[str, ...], folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Return a recipe's content laid over that of the recipe it extends, and its name; append the files' folders."""
    content, label = _read(name, folders)
    if _is_file(Path(name)):
        folders.append(Path(name).absolute().parent)
    parent = content.pop("extends", None)
    if parent is None:
        return content, label
    if not isinstance(parent, str) or parent in chain:
        raise UserError(f"recipe {name}: extends must name one other recipe, without a circle; got {parent!r}")
    beside = Path(name).parent / parent
    found = str(beside) if _is_file(Path(name)) and _is_file(beside) else parent
    with under(f"recipe {name}: extends"):
        base = _extended(found, (*chain, name, parent), folders)[0]
    if isinstance(base.get("plugins"), list) and isinstance(content.get("plugins"), list):
        content["plugins"] = base["plugins"] + content["plugins"]  # the base needs its own
    own = {"name": content.pop("name")} if "name" in content else {}  # a recipe's name tells no components apart
    base.pop("name", None)
    _refuse_unknown_stages(f"recipe {name}", base.get("stages"), content.get("stages"))
    return {**_merge(base, content), **own}, label


def _read(name: str, folders: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """Return a recipe's content and its name; `folders` are those of the recipes that extend it."""
    path, shipping = Path(name), known_recipe(name)
    if path.suffix in (".yaml", ".yml") or _is_file(path):
        if not _is_file(path):
            raise UserError(f"recipe {name}: no such file")
        text, label = _text_of(path, f"recipe {name}"), re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem)
    elif shipping is not None:
        label = shipping
        text = (resources.files("dualhead.recipe.shipped") / f"{label}.yaml").read_text(encoding="utf-8")
    else:
        here = [
            name + end for end in (".yaml", ".yml") for folder in (*folders, Path()) if _is_file(folder / (name + end))
        ]
        near = here or get_close_matches(name.lower(), shipped_recipes(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"recipe {name!r} is neither a file nor shipped; {hint}shipped: {', '.join(shipped_recipes())}")
    content = parse_yaml(text, f"recipe {name}")
    if not isinstance(content, dict):
        raise UserError(f"recipe {name}: must be a mapping with keys data, model, threat, stages")
    for stage in content.get("stages") or [] if isinstance(content.get("stages"), list) else []:
        if isinstance(stage, dict) and "optimizer" in stage:
            if "optimiser" in stage:
                raise UserError(
                    f"recipe {name}: a stage has both optimiser and optimizer, which are one key; remove one"
                )
            stage["optimiser"] = stage.pop("optimizer")
    return content, label


def _words(key: str) -> list[str]:
    """Return the words of a dotted key, in the tree's spelling."""
    return ["optimiser" if word == "optimizer" else word for word in key.split(".")]


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have counts as none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a character that no name has
        return False


def _text_of(path: Path, where: str) -> str:
    if path.stat().st_size > LARGEST_RECIPE:
        raise UserError(f"{where}: is larger than {LARGEST_RECIPE:,} bytes, so it is no recipe")
    return path.read_text(encoding="utf-8", errors="replace")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in a mapping, and mappings merged without end.

    And a bare yes, no, on or off, which it would take for true or false: it may be the name of a class.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"line {line}: key {key.value!r} stands in line {lines[key.value]} already; remove one")
            lines[key.value] = line
        return node

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        word = str(node.value)
        if word.lower() not in ("true", "false"):
            told = f"a bare {word} may be a name or a truth; write '{word}' in quotes, or true or false"
            raise UserError(f"line {node.start_mark.line + 1}: {told}")
        return word.lower() == "true"

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LARGEST_CONTENT:  # merges of merges, each of which doubles
            raise UserError(f"line {node.start_mark.line + 1}: {_TOO_MUCH}")


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_yaml_bool)


def parse_yaml(text: str, where: str) -> Any:
    """Return what a text of YAML holds.

    Args:
        text: of a recipe, or of a value in one.
        where: begins a message.

    Raises:
        UserError: for what is no YAML, or may mean two things.
    """
    try:
        return _unshared(yaml.load(text, _Loader), [0])  # a safe one
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: {line}is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply, or an anchor holds itself") from None
    except Exception as error:  # YAML takes 2021-02-30 for a date and !!int for a number, and fails in many ways
        raise UserError(f"{where}: holds a value that is not valid YAML: {error}") from None


def _unshared(content: Any, count: list[int]) -> Any:
    """Copy the content once for each use of an anchor, so that a change to one use leaves the others alone.

    Args:
        content: as YAML returned it.
        count: number of values so far, in a list of one; anchors within anchors grow without end.
    """
    count[0] += 1
    if count[0] > LARGEST_CONTENT:
        raise UserError(_TOO_MUCH)
    if isinstance(content, int) and content.bit_length() > 1024:  # not even written in a message by Python
        raise UserError("holds a number of more than 300 digits")
    if isinstance(content, dict):
        return {str(key): _unshared(value, count) for key, value in content.items()}
    return [_unshared(item, count) for item in content] if isinstance(content, list) else content


def _merge(base: Any, change: Any) -> Any:
    """Lay `change` over `base`: mappings key by key, stages by name; anything else is replaced."""
    if isinstance(base, dict) and isinstance(change, dict) and change.get("name", base.get("name")) == base.get("name"):
        return {**base, **{key: _merge(base[key], value) if key in base else value for key, value in change.items()}}
    named = [
        x
        for x in (base, change)
        if isinstance(x, list) and x and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in x)
    ]
    if len(named) == 2 and {s["name"] for s in change} <= {s["name"] for s in base}:
        changes = {stage["name"]: stage for stage in change}
        return [_merge(stage, changes.get(stage["name"], {})) for stage in base]
    return change


def _refuse_unknown_stages(where: str, base: object, change: object) -> None:
    """Refuse stages that neither change those of `base`, by their names, nor can stand in their place."""
    if not isinstance(base, list) or not isinstance(change, list):
        return
    known = [stage.get("name") for stage in base if isinstance(stage, dict)]
    given = [stage for stage in change if isinstance(stage, dict) and isinstance(stage.get("name"), str)]
    unknown = [stage["name"] for stage in given if stage["name"] not in known]
    if unknown and any("train" not in stage for stage in given):
        near = get_close_matches(unknown[0], [str(name) for name in known], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{where}: stages: {unknown[0]!r} is no stage of the recipe that it extends ({', '.join(map(str, known))})"
            f"{hint or ';'} a list with a name of its own replaces all of these, so each stage in it needs `train`"
        )


def _assign(target: Any, path: Sequence[str], value: Any, override: str) -> None:
    key, *rest = path
    if isinstance(target, list):
        places = [p for p, item in enumerate(target) if isinstance(item, dict) and key in ("*", item.get("name"))]
        if key.isdigit() and int(key) < len(target):
            places = [int(key)]
        if not places:
            known = ", ".join(str(item.get("name")) for item in target if isinstance(item, dict))
            raise UserError(f"{override}: no item {key!r} in the list; write its position, its name ({known}) or *")
        if not rest:
            raise UserError(f"{override}: name the key to change inside {key!r}")
        for place in places:
            target[place] = _opened(target[place], key, override)
            _assign(target[place], rest, copy.deepcopy(value), override)
        return
    if not rest:
        target[key] = value
        return
    inner = target.get(key)
    target[key] = {} if inner is None else _opened(inner, key, override)
    _assign(target[key], rest, value, override)


def _opened(item: Any, key: str, override: str) -> Any:
    """Return the item in the form that holds keys; a component in its short form becomes a mapping.

    So `attack=pgd-10 attack.step_size=2/255` works.
    """
    if isinstance(item, str):
        return {"name": item}
    if not isinstance(item, dict | list):
        raise UserError(f"{override}: {key!r} holds {item!r}, which has no keys")
    return item
