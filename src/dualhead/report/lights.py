"""Failed and warning checks: their names, their order, and the lines that come before the numbers they doubt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

CHECKS = {
    "finite_logits": "Infinite logits or NaN stop gradients, and with them attacks.",
    "duplicates": "Test images that were trained on measure memory, not robustness.",
    "one_class": "A model that gives every image the same class has learned nothing, and nothing can fool it.",
    "labels": "Images of a single class cannot tell a classifier from a constant.",
    "catastrophic_overfitting": "Training on single steps can learn to withstand single steps alone.",
    "clean_accuracy": "A model that guesses, or names the largest class, has nothing to be robust with.",
    "train_mode": "Dropout and batch statistics must rest while a model is measured.",
    "value_range": "Eps is meant for images in [0, 1]; images scaled otherwise make it larger or smaller.",
    "randomness": "A random model's single answer is luck; attacks must then average over its answers.",
    "batch_independence": "An image's verdict must not depend on the images beside it.",
    "logits": "Probabilities in place of logits flatten the loss that attacks climb.",
    "gradient_flow": "Attacks need gradients that reach the image.",
    "zero_gradient": "Where the gradient is exactly zero, a gradient attack stands still: masked gradients.",
    "large_eps": "A very large perturbation must fool everything; if not, gradients lead nowhere.",
    "black_box": "If an attack without gradients finds what those with gradients miss, gradients are masked.",
    "more_steps": "More steps must not find less; where they do, they follow gradients that lead astray.",
    "curve": "Robust accuracy must fall with eps, since a larger ball holds the smaller one.",
    "precision": "Whatever a search in bf16 left standing must stand in float32 too.",
}
"""Purpose of each check, in the order in which lights are told: causes before their consequences."""

LIGHTS = {"ok": "OK", "warning": "Warning", "failed": "Failed"}
"""Heading of each status."""

MOST_NAMED = 4
"""Models named in a line; further ones are counted."""


def lights(diagnostics: object) -> list[dict[str, str]]:
    """Return the checks that are not fine, failed ones first, then in the order of `CHECKS`.

    Args:
        diagnostics: as `results.json` holds them: a list of objects with `name`, `status` and `message`; anything else
            holds no check.

    Returns:
        `name`, `status` (`failed` or `warning`) and `message` of each.
    """
    entries = diagnostics if isinstance(diagnostics, list) else []
    found = [
        {"name": str(entry["name"]), "status": str(entry["status"]), "message": str(entry.get("message", "no message"))}
        for entry in entries
        if isinstance(entry, Mapping) and "name" in entry and entry.get("status", "ok") != "ok"
    ]
    return sorted(found, key=_place)


def believable(checks: Iterable[Mapping[str, str]]) -> bool:
    """Tell whether no check has failed; a warning leaves the numbers standing."""
    return all(check["status"] != "failed" for check in checks)


def light_lines(models: Iterable[tuple[str, Sequence[Mapping[str, str]]]]) -> list[str]:
    """Return one line for each check that is not fine, with the models that it concerns and what to do.

    Args:
        models: name and checks, as `lights` gives them, of each model; an empty name is not told.
    """
    told: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, checks in models:
        for check in checks:
            told.setdefault((check["status"], check["name"]), []).append((name, check["message"]))
    lines = []
    for status, name in sorted(told, key=lambda key: _place({"status": key[0], "name": key[1]})):
        entries = told[status, name]
        models_named = list(dict.fromkeys(model for model, _ in entries if model))
        who = ", ".join(models_named[:MOST_NAMED])
        if len(models_named) > MOST_NAMED:
            who += f" and {len(models_named) - MOST_NAMED} more"
        message = " ".join(entries[0][1].split())
        if len({said for _, said in entries}) > 1 and models_named:
            message += f" (numbers of {models_named[0]})"
        lines.append(f"{status}: {name}" + (f" ({who})" if who else "") + f": {message}")
    return lines


def _place(check: Mapping[str, str]) -> tuple[bool, int]:
    order = list(CHECKS)
    return check["status"] != "failed", order.index(check["name"]) if check["name"] in order else len(order)
