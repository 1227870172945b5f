"""Tables in a terminal: every attack that was run on anything has a column, and brackets in names stay."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from dualhead.commands import cli, terminal
from dualhead.commands.sweep import collect, plan


@pytest.fixture
def shown(monkeypatch):
    """What is printed."""
    text = io.StringIO()
    monkeypatch.setattr(terminal.out, "_file", text)  # `file` would be put back as the stdout of this test
    return text


def row(name, **robust):
    return {
        "name": name, "clean_accuracy": 0.5, "robust_accuracy": robust,
        "intervals": {key: [0.1, 0.9] for key in ("clean_accuracy", *robust)},
    }  # fmt: skip


def test_an_attack_that_one_row_met_has_a_column(shown):
    rows = [row("base model", pgd=0.3, worst=0.3), row("aggregate of heads", pgd=0.3, multihead=0.2, worst=0.2)]
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


@pytest.mark.parametrize("width", [80, 60, 50, 40])
def test_numbers_and_names_are_whole_on_a_narrow_terminal(width):
    measures = ("pgd-40", "autoattack-fast", "multihead", "worst")
    wide = row("cifar10_cpu_distilled", **dict.fromkeys(measures, 0.534))
    wide["intervals"] = {key: [0.812, 0.956] for key in wide["intervals"]}
    console = Console(width=width, file=io.StringIO())
    console.print(terminal.accuracy_table("test images", [wide]))
    bar, said = "\N{BOX DRAWINGS LIGHT VERTICAL}", console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert (said.count("53.4"), said.count("95.6]")) == (4, 5)
    if bar not in said:  # a list for each row
        assert "model: cifar10_cpu_distilled" in said
        return
    name = "".join(line.split(bar)[1].strip() for line in said.splitlines() if bar in line)
    assert name == "cifar10_cpu_distilled"


def test_a_sweep_of_which_nothing_is_known_has_dashes(shown):
    terminal.sweep_table(
        [{"run": "r", "seed": 0, "model": "m", "clean_accuracy": 0.5, "parameters": 1, "training_flops": None}]
    )
    assert shown.getvalue().count(" - ") == 2


@pytest.mark.parametrize(("sizes", "shown_there"), [([10, 10], False), ([10, 14], False), ([10, 40], True)])
def test_balanced_accuracy_has_columns_where_classes_differ_in_size(shown, sizes, shown_there):
    even = {"balanced_accuracy": {"clean": 0.123, "pgd": 0.045, "worst": 0.045}, "class_sizes": sizes}
    old = row("of an earlier version", pgd=0.3, worst=0.3)
    terminal.out.print(terminal.accuracy_table("accuracy", [row("m", pgd=0.3, worst=0.3) | even, old]))
    text = shown.getvalue()
    assert ("12.3" in text and "4.5" in text and "balanced" in text) == shown_there


def test_points_of_a_sweep_over_the_section_model_are_not_seeds_of_one(shown, tmp_path):
    sections = ["{backbone: cnn-16, attach_at: stage1}", "{backbone: cnn-32, attach_at: stage1}"]
    jobs = plan("digits", [f"model={','.join(sections)}"])
    for job, share in zip(jobs, (0.9, 0.5), strict=True):
        told = row("mean of heads", worst=share) | {"clean_accuracy": share, "parameters": 1, "training_cost": {}}
        (tmp_path / job.name).mkdir()
        (tmp_path / job.name / "comparison.json").write_text(json.dumps({"rows": [told]}))
    rows = [{**each, "training_flops": None} for each in collect(jobs, tmp_path)]
    assert [(each["recipe.model"], each["model"]) for each in rows] == [(each, "mean of heads") for each in sections]
    terminal.sweep_table(rows)
    assert "90.0" in shown.getvalue()
    assert "50.0" in shown.getvalue()
    assert "+-" not in shown.getvalue()


def test_a_row_of_a_sweep_in_which_a_check_failed_is_marked(shown):
    fine = {"run": "a", "lr": 1, "seed": 0, "model": "m", "clean_accuracy": 0.5, "robust_worst": 0.2,
            "checks": [], "parameters": 3, "training_flops": None}  # fmt: skip
    bad = fine | {"run": "b", "lr": 2, "checks": [{"name": "one_class", "status": "failed", "message": "said"}]}
    terminal.sweep_table([fine, bad])
    rows = [line for line in shown.getvalue().splitlines() if "50.0" in line]
    assert ["! m" in line for line in rows] == [False, True]
    assert terminal.DOUBTED in shown.getvalue()


def test_a_word_of_a_folder_that_is_read_twice_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would print instead

    def app(*_, **__):
        for text in ("left out 3 images", "left out 3 images", "another word"):
            logging.getLogger("dualhead.data.files").warning(text)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.splitlines() == ["left out 3 images", "another word"]
