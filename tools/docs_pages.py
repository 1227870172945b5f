"""Pages of the documentation that are made from the code and from files beside it, so that nothing is said twice.

    python tools/docs_pages.py    # docs/components/*.md anew, after a component or its docstring changed

Each registered component has a card from its own docstring; these pages are committed, so that links to them work on
GitHub too. As a hook of mkdocs the rest is made: the README is the first page, the package's public names make the API
reference, and links out of `docs` lead to where the site has the file.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = "(?:CITATION|LICENSE|examples|src|benchmarks|tools)"
PAGES = {
    "objectives": ["objectives"],
    "attacks": ["attacks"],
    "measurements": ["measurements"],
    "threats": ["threats"],
    "aggregators": ["aggregators"],
    "backbones": ["backbones"],
    "poisons": ["poisons"],
    "training": ["augmentations", "averages", "optimisers", "schedules"],
}
MADE = "<!-- Made by tools/docs_pages.py from docstrings; change these. -->"
INTRODUCTIONS = {
    "objectives": "Base methods: what training descends, and what its attack climbs. `objective: {name: NAME, ...}` in "
    "a stage.",
    "attacks": "Ways to look for adversarial examples. `--attack NAME`, `evaluate.attacks` and, for those that can "
    "climb any loss, `attack` in a stage. The cost is that of an image that stays robust, with 10 classes; one that is "
    "fooled costs less.",
    "measurements": "Accuracy on images as the world changes them, not an adversary; named among the attacks of an "
    "evaluation: `--attack NAME`, `evaluate.attacks`. [One of your own](../howto/extend.md) is a class.",
    "threats": "What an adversary may do, beside norms (`threat: {norm: Linf, eps: 8/255}`): `threat: {name: NAME, "
    "eps: ...}` in a recipe or a stage, `dualhead evaluate MODEL --threat NAME --eps ...`.",
    "aggregators": "How the logits of two heads become one. `model.aggregator`.",
    "backbones": "Networks. `model.backbone`, and names for `dualhead layers`.",
    "poisons": "Changes of training images or labels, to find out what training makes of them: `data.poison` in a "
    "recipe, see [poisoned data](../howto/poisoned-data.md). What a run on one of them shows holds for that one.",
    "training": "Parts of a stage and of its data.",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {
        "index.md": _from_root("README.md"),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
        "api.md": _api(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside `docs`, which GitHub follows, into links within the site, or into plain names."""
    up = "../" * page.file.src_uri.count("/")
    for file, made_page in (("CONTRIBUTING.md", "contributing.md"), ("CHANGELOG.md", "changelog.md")):
        markdown = markdown.replace(f"]({up}../{file}", f"]({up}{made_page}")
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}\.\./({_OUTSIDE}[^)]*)\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    words, path = link.groups()
    return words if words.strip("`") == path else f"{words} (`{path}`)"


def component_pages() -> dict[str, str]:
    """Paths in `docs` and Markdown of the pages of components."""
    return {f"components/{page}.md": _components(page, kinds) for page, kinds in PAGES.items()}


def _from_root(name: str) -> str:
    """A file beside the docs, its links as they are from within."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text).replace('src="docs/', 'src="')
    for file, page in (("CONTRIBUTING.md", "contributing.md"), ("CHANGELOG.md", "changelog.md")):
        text = text.replace(f"]({file})", f"]({page})")
    return re.sub(rf"\[([^\]]+)\]\(({_OUTSIDE}[^)]*)\)", _named, text)


def _components(page: str, kinds: list[str]) -> str:
    from dualhead.recipe.schema import REGISTRIES

    lines = [f"# {page.capitalize()}", "", MADE, "", INTRODUCTIONS[page], ""]
    for kind in kinds:
        if len(kinds) > 1:
            lines += [f"## {kind.capitalize()}", ""]
        for name in shipped(kind):
            lines += _card(kind, name, REGISTRIES[kind].get(name), "###" if len(kinds) > 1 else "##")
    return "\n".join(lines).rstrip() + "\n"


def shipped(kind: str) -> list[str]:
    """Names of the components of a kind that the package itself holds, whatever else was registered."""
    from dualhead.recipe.schema import REGISTRIES

    registry = REGISTRIES[kind]
    return [name for name in registry.names() if registry.get(name).__module__.startswith("dualhead.")]


def _card(kind: str, name: str, component: type, heading: str) -> list[str]:
    documented = inspect.getdoc(component) or ""
    what, _, arguments = documented.partition("\nArgs:\n")
    arguments = re.split(r"\n(?:Raises|Returns|Note|Attributes):", arguments)[0]
    facts = dict(re.findall(r"^(When|Paper): (.*(?:\n.+)*)", what, re.MULTILINE))
    what = re.sub(r"^(When|Paper): .*(?:\n.+)*\n*", "", what, flags=re.MULTILINE)
    lines = [f"{heading} {name}", "", what.strip(), ""]
    if kind in COSTS:
        if len(facts) != 2:
            raise ValueError(f"{kind} {name}: its docstring lacks a paragraph `When: ...` or `Paper: ...`")
        told = {"When": facts["When"], "Cost": COSTS[kind](component), "Paper": facts["Paper"]}
        lines += [f"* *{word}:* {' '.join(text.split())}" for word, text in told.items()] + [""]
    fields = {field.name: field for field in dataclasses.fields(component) if field.init}  # type: ignore[arg-type]  # all are dataclasses
    keys = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    if fields:
        lines += ["| key | default | |", "|---|---|---|"]
        for key, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "required" if required else f"`{_written(value)}`"
            words = " ".join(keys.get(key, "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {words} |")
        lines.append("")
    return lines


def _written(value: Any) -> Any:
    """A default as a recipe would say it: of a component its name and what differs from its own defaults."""
    from dualhead.data import Surrogate

    if isinstance(value, Surrogate):
        differs = {
            f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) is not None
        }
        return f"{{{', '.join(f'{key}: {inside}' for key, inside in differs.items())}}}"
    if not hasattr(value, "registered_name"):
        return value if value != "" else '""'
    differs = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    fields = "".join(f", {key}: {_written(inside)}" for key, inside in differs.items())
    return f"{{name: {value.registered_name}{fields}}}" if fields else value.registered_name


def _attack_cost(component: Any) -> str:
    """Steps of an image that stays robust, by parts, and under L2 where they are others."""
    from dualhead.threats import build_threat, threats

    attack = component()
    if attack.norms is not None and "Linf" not in attack.norms:
        return f"{_queries(attack, build_threat(f'{attack.norms[0]}:{threats.get(attack.norms[0]).typical_eps}'))}."
    linf, l2 = (_queries(attack, build_threat(text)) for text in ("Linf:8/255", "L2:0.5"))
    return f"{linf}." if l2 == linf else f"{linf}; under L2 {l2}."


def _queries(attack: Any, threat: Any) -> str:
    parts = attack.parts(10, threat, 2)
    queries = [part.max_steps() * _asked_in_a_step(part, threat) for part in parts]
    told = [f"{part.label} {part.jobs(10)} x {count:,}" for part, count in zip(parts, queries, strict=True)]
    total = sum(part.jobs(10) * count for part, count in zip(parts, queries, strict=True))
    return f"{total:,} queries of the model at most ({', '.join(told)}: tries x queries)"


def _asked_in_a_step(part: Any, threat: Any) -> int:
    """Count how often a step asks the model: FAB twice, and a mean over random passes once for each."""
    import torch

    from dualhead.attacks import Query
    from dualhead.noise import Streams

    x, y, job = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    threat = threat.for_images(x.shape[1:])

    def logits(images: Any) -> Any:
        return images.flatten(1)[:, :10]

    query = Query(logits, lambda images: torch.stack([logits(images)] * 3, 1)).through(threat.render)
    state = part.begin(threat.lift(x), y, logits(x), job, threat, Streams.of(0, job))
    part.step(state, query, threat)
    return query.forward_passes


def _objective_cost(component: Any) -> str:
    """Passes of an image in a step, as they follow from what the objective needs and what its attacks use."""
    from dualhead.objectives import Slope, passed

    required = [f.name for f in dataclasses.fields(component) if f.default is dataclasses.MISSING]
    objective = component(**dict.fromkeys(required, "any"))
    objective = objective.at(0, objective.begin())  # as a step has it: one threat where one is drawn
    needs, teachers = objective.needs(), {*objective.teachers(), *objective.frozen()}
    asked = passed(needs)
    own = {n: need for n, need in asked.items() if getattr(need, "output", None) not in teachers}
    taught = {need for n, need in asked.items() if n not in own}
    passes = len({need.on for need in own.values()})
    cost = [f"{_number(passes, 'forward and backward pass')} for the loss"]
    if taught:
        cost.append(f"{_number(len(taught), 'forward pass')} of the teacher")
    slopes = [need for need in needs.values() if isinstance(need, Slope)]
    if slopes:
        learnt = sum(not need.constant for need in slopes)
        cost.append(f"{_number(len(slopes), 'forward and backward pass')} for gradients of images")
        cost.append(f"{_number(2 * learnt, 'forward and backward pass')} to differentiate one of these again")
    searching = {made: inner for made, inner in objective.inner().items() if inner.uses or inner.through}
    if not objective.inner():
        return f"{', '.join(cost)}; no attack."
    attacks = []
    for made, inner in searching.items():
        attack = "the attack" if len(searching) == 1 else f"the attack that makes `{made}`"
        attacks.append(f"one forward and backward pass for each step of {attack}")
        targets = {own[name].on for name in inner.uses if name in own and own[name].on != made}
        if targets:
            attacks.append(f"{_number(len(targets), 'forward pass')} for its target")
    *first, last = attacks + cost
    return f"{', '.join(first)}, and {last}."


def _number(count: int, what: str) -> str:
    words = {1: "a" if what.startswith("forward pass") else "one", 2: "two", 3: "three"}
    return f"{words.get(count, count)} {what}{'es' if count > 1 else ''}"


def _aggregator_cost(component: Any) -> str:
    """Parameters at several numbers of classes, of two heads."""
    from torch import Size

    from dualhead.errors import UserError
    from dualhead.heads import SeesFeatures

    told, channels = [], 64
    for classes in (10, 100, 1000):
        try:
            module = component().create_over([Size((channels, 8, 8))], classes)
        except UserError:
            told.append(f"refused at {classes:,}")
        else:
            told.append(f"{sum(p.numel() for p in module.parameters()):,} parameters at {classes:,} classes")
            if isinstance(module, SeesFeatures):
                told[-1] += f" and {channels} channels at the cut"
    return ", ".join(told) + "."


def _threat_cost(component: Any) -> str:
    del component
    return "the passes of the attack, as under a norm; images are made of points before each."


def _measurement_cost(component: Any) -> str:
    return f"{component().forward_passes} forward passes for each image."


def _poison_cost(component: Any) -> str:
    needed = [field.name for field in dataclasses.fields(component) if field.default is dataclasses.MISSING]
    told: str = component(**dict.fromkeys(needed)).cost
    return told


COSTS = {
    "attacks": _attack_cost,
    "objectives": _objective_cost,
    "aggregators": _aggregator_cost,
    "measurements": _measurement_cost,
    "poisons": _poison_cost,
    "threats": _threat_cost,
}
"""Kinds whose cards tell when to use a component, what it costs and where it was published."""


def _api() -> str:
    import dualhead

    lines = ["# API reference", "", "The public names of `dualhead`.", ""]
    for name in sorted(dualhead.__all__):
        value = getattr(dualhead, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
    return "\n".join(lines)


def main() -> None:
    for name, text in component_pages().items():
        path = ROOT / "docs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
