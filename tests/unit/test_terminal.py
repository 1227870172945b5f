"""Tables in a terminal: every attack that was run on anything has a column, and brackets in names stay."""

from __future__ import annotations

import io

import pytest

from dualhead import terminal


@pytest.fixture
def shown(monkeypatch):
    """What is printed."""
    text = io.StringIO()
    monkeypatch.setattr(terminal.out, "file", text)
    return text


def row(name, **robust):
    return {
        "name": name, "clean_accuracy": 0.5, "robust_accuracy": robust,
        "intervals": {key: [0.1, 0.9] for key in ("clean_accuracy", *robust)},
    }  # fmt: skip


def test_an_attack_that_one_row_met_has_a_column(shown):
    rows = [row("base model", pgd=0.3, worst=0.3), row("DH-AT", pgd=0.3, multihead=0.2, worst=0.2)]
    terminal.out.print(terminal.accuracy_table("accuracy", rows))
    text = shown.getvalue()
    assert all(column in text for column in ("pgd", "multihead", "worst"))
    base = next(line for line in text.splitlines() if "base model" in line)
    assert "-" in [cell.strip() for cell in base.split("\N{BOX DRAWINGS LIGHT VERTICAL}")]


def test_brackets_in_names_are_no_markup(shown):
    points = ["[pad_crop]", "[pad_crop, flip]", "[/x]"]
    rows = [
        {"run": "r", "data.augment": point, "seed": 0, "model": "m", "clean_accuracy": 0.5, "robust_worst": 0.2,
         "parameters": 1, "training_flops": 1e9}
        for point in points
    ]  # fmt: skip
    terminal.sweep_table(rows)
    assert all(point in shown.getvalue() for point in points)
