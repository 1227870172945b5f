"""The card beside a model's weights: what it withstands, how that was measured, and what it does not promise."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dualhead.names import MODEL, described, head_number
from dualhead.report.lights import light_lines, lights
from dualhead.report.routes import WARNING
from dualhead.report.text import attack_text, component_text, eps_text, threat_name, threat_text, unequal

OWN = {
    "batch_norm": "batch norm",
    "affine": "weight and bias of normalisation",
    "statistics": "statistics of normalisation",
    "sandwich": "statistics and second affine map of normalisation",
}
"""A card's names for the words of `own`, the tensors that tied heads do not share; patterns stand as they are."""

ONNX_SECTION = """
## ONNX

`model.onnx` is the same forward for engines without PyTorch: `images`, float32 [N, channels, height, width] in [0, 1],
to `logits`, for any N. It normalises by itself, and was checked with onnxruntime when it was written.
"""
"""Paragraph of a card on the model as ONNX."""


def model_card(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    *,
    onnx: bool = False,
    about: str = "",
    paper: str = "",
) -> str:
    """A card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        config: content of the model's `config.json`.
        recipe: content of the run's `config.yaml`; None if it is not known.
        results: content of the evaluation's `results.json`; None if there is none, which the card then says.
        onnx: whether `model.onnx` lies beside it.
        about: a sentence on the recipe, such as that its method is not a reproduction.
        paper: of the aggregator, see `Aggregator.paper`.
    """
    architecture, threat = config["architecture"], config.get("threat", {})
    shape = "x".join(map(str, architecture["image_shape"]))
    names = config.get("class_names") or []
    lines = [
        "---",
        "library_name: dualhead",
        "pipeline_tag: image-classification",
        "tags: [adversarial-robustness, adversarial-training, dual-head-adversarial-training]",
        "---",
        "",
        f"# {_safe(config.get('recipe', 'dualhead model'))}",
        "",
        f"{_output(config, paper)} on "
        f"{_safe(component_text(architecture['backbone']))}, "
        f"for images {shape} in [0, 1] and {architecture['num_classes']} classes.",
        "",
        "```python",
        "import dualhead",
        "",
        'model = dualhead.load("PATH_OR_HUB_NAME")  # images [B, C, H, W] in [0, 1] to logits; normalises by itself',
        "```",
        "",
        "## Threat model",
        "",
        _prepared(recipe, threat) if threat else "Not recorded.",
        "",
        "## Measured",
        "",
        *_measured(results),
        "",
        "## Data and training",
        "",
        *_training(recipe),
        *([f"- recipe: {_safe(about)}"] if about else []),
        f"- classes: {', '.join(_safe(name) for name in names)}" if len(names) <= 20 else f"- classes: {len(names)}",
        "",
        "## Limits",
        "",
        "Robust accuracy is what the named attacks left: an upper bound on what a stronger attack would leave. "
        "It holds for the threat model above and for images like the test images; other norms, larger budgets, "
        "corruptions and unrelated images are outside it.",
        *(["", f"This model is one of several routes. {WARNING}"] if _is_route(config) else []),
    ]
    return "\n".join(lines) + "\n" + (ONNX_SECTION if onnx else "")


def _prepared(recipe: Mapping[str, Any] | None, threat: Mapping[str, Any]) -> str:
    budget = f"against {threat_name(threat)} of at most {threat['eps']:g}"
    if "norm" in threat:
        budget = f"against perturbations of {threat['norm']} norm at most {eps_text(threat['eps'], threat['norm'])}"
    if recipe is None:
        return f"Trained {budget}."
    met = [
        stage.get("threat") or {**threat, "eps": stage.get("eps") or threat["eps"]}
        for stage in recipe["stages"]
        if attack_text(stage)
    ]
    if not met:
        return f"Not trained, but evaluated, {budget}."
    if all(one == threat for one in met):
        return f"Trained {budget}."
    if any(threat_name(one) != threat_name(threat) for one in met):
        return f"Evaluated {budget}; trained against {', '.join(dict.fromkeys(map(threat_text, met)))}."
    radii = (eps_text(eps, threat.get("norm")) for eps in sorted({one["eps"] for one in met}))
    return f"Evaluated {budget}; trained at most {', '.join(radii)}."


def _output(config: Mapping[str, Any], paper: str) -> str:
    """Which output it is: of tied heads what each has of its own, of an exported head where it came from."""
    output, architecture = config.get("output", MODEL), config["architecture"]
    merged = (architecture.get("aggregator") or {}).get("name", "")
    told = described(output, architecture.get("heads", 2), merged, paper)
    if output != MODEL and (own := architecture.get("own")) is not None:
        return f"{told} (tied heads: {_own(own)} of their own{_added(config)})"
    if output == MODEL and (number := head_number(config.get("exported_output", ""))):
        return f"{told}, exported from head {number} of a model of several,"
    return told


def _is_route(config: Mapping[str, Any]) -> bool:
    """Whether it is one head of tied ones, or was exported from them."""
    tied = config["architecture"].get("own") or config.get("exported_own")
    return bool(tied) and head_number(config.get("exported_output") or config.get("output", MODEL)) is not None


def _own(own: Sequence[str]) -> str:
    return " and ".join(map(_own_word, own))


def _own_word(word: str) -> str:
    rule, at, where = word.partition("@")
    if rule not in OWN:
        return _safe(f"`{word}`")
    return _safe(OWN[rule]) + (f" within {_safe(f'`{where}`')}" if at else "")


def _added(config: Mapping[str, Any]) -> str:
    added = config.get("added_parameters")
    return "" if added is None else f", +{added:,} parameters"


def _measured(results: Mapping[str, Any] | None) -> list[str]:
    if results is None:
        return ["Nothing was measured yet: `dualhead evaluate` does."]
    intervals = results["intervals"]
    rows = [("clean", results["clean_accuracy"], intervals["clean_accuracy"])]
    robust = results["robust_accuracy"]
    shown = [name for name in robust if name != "worst" or len(robust) > 2]
    rows += [(name, robust[name], intervals[name]) for name in shown]
    threat = results["threat"]
    doubts = light_lines([("", lights(results.get("diagnostics")))])
    return [
        *(f"- {_safe(line)}" for line in doubts),
        *([""] if doubts else []),
        f"{results['num_samples']} test images, {threat_text(threat)}, Wilson 95 % intervals.",
        *_unequal(results),
        "",
        "| accuracy | percent | interval |",
        "|---|---|---|",
        *(f"| {_safe(n)} | {100 * share:.2f} | {100 * e[0]:.2f} to {100 * e[1]:.2f} |" for n, share, e in rows),
        "",
        f"Command: `{results.get('command') or 'not recorded'}`, seed {results.get('seed')}.",
    ]


def _unequal(results: Mapping[str, Any]) -> list[str]:
    """Say what the accuracies are with every class of equal weight, where classes are not of equal size."""
    if not unequal(results.get("class_sizes")):
        return []
    means = {name: 100 * share for name, share in results["balanced_accuracy"].items()}
    robust = f", robust {means['worst']:.2f} %" if "worst" in means else ""  # where an attack was run
    least, most = results["class_sizes"]
    return [
        "",
        f"Classes have {least} to {most} images; balanced accuracy, the mean over classes: clean {means['clean']:.2f} %"
        f"{robust}.",
    ]


def _training(recipe: Mapping[str, Any] | None) -> list[str]:
    if recipe is None:
        return ["- recipe: not recorded"]
    stages: Sequence[Mapping[str, Any]] = recipe["stages"]
    norm = (recipe.get("threat") or {}).get("norm")
    return [
        f"- data: {_data(recipe['data'])}",
        *(
            f"- stage {_safe(stage['name'])}: {_safe(component_text(stage['objective']))}, "
            f"{', '.join(stage['train'])}, {stage['epochs']} epochs"
            + (f", attack {_safe(told)}" if (told := attack_text(stage, norm)) else "")
            for stage in stages
        ),
        f"- seed: {recipe['runtime']['seed']}",
    ]


def _data(data: Mapping[str, Any]) -> str:
    told = _safe(data["source"])
    if data.get("train_limit"):
        chosen = "a sample of" if data.get("train_choice") == "sample" else "the first"
        told += f", {chosen} {data['train_limit']} training images"
    if held_out := data.get("validation"):
        told += f", of which {held_out if held_out >= 1 else f'{100 * held_out:g} %'} held out"
    extra = data.get("extra")
    return told + (f"; {100 * extra['fraction']:g} % of each batch from {_safe(extra['source'])}" if extra else "")


def _safe(text: object) -> str:
    """Text that stays text in Markdown and HTML, on one line of a table."""
    return html.escape(" ".join(str(text).split())).replace("|", "&#124;")
