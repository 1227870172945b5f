"""Tables of accuracies: every place that shows one has the same columns and the same cells."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from dualhead.commands import terminal
from dualhead.report import accuracy_columns, evaluation_row, rows_html, rows_text, share_cell
from dualhead.report.comparison import accuracy_table, changed_tables
from dualhead.report.sources import Estimate, Measured
from dualhead.report.table import described


def results(*attacks, **more):
    return {
        "clean_accuracy": 0.8, "robust_accuracy": dict.fromkeys(attacks, 0.4),
        "intervals": {key: [0.35, 0.85] for key in ("clean_accuracy", *attacks)}, **more,
    }  # fmt: skip


FULL = results(
    "pgd", "multihead", "worst",
    corruptions={"accuracy": 0.61, "interval": [0.6, 0.62], "severities": 5,
                 "kinds": {"gaussian_noise": {"accuracy": 0.57, "interval": [0.5, 0.64]}}},
    transfer={"from": "another", "accuracy": 0.7, "interval": [0.68, 0.72], "note": "static"},
    balanced_accuracy={"clean": 0.55, "worst": 0.25}, class_sizes=[10, 40],
)  # fmt: skip
LESS = results("pgd", "worst")
EXPECTED = {
    "clean": ["80.0 [35.0, 85.0]", "80.0 [35.0, 85.0]"],
    "pgd": ["40.0 [35.0, 85.0]", "40.0 [35.0, 85.0]"],
    "multihead": ["40.0 [35.0, 85.0]", "-"],
    "worst": ["40.0 [35.0, 85.0]", "40.0 [35.0, 85.0]"],
    "corruptions": ["61.0 [60.0, 62.0]", "-"],
    "transfer": ["70.0 [68.0, 72.0]", "-"],
    "balanced clean": ["55.0", "-"],
    "balanced robust": ["25.0", "-"],
}
ROWS = [evaluation_row("full", FULL), evaluation_row("less", LESS)]


def measured(name, told):
    def estimate(key, share):
        return Estimate(share, *told["intervals"][key])

    robust = {key: estimate(key, share) for key, share in told["robust_accuracy"].items()}
    clean = estimate("clean_accuracy", told["clean_accuracy"])
    return Measured("run", name, "model", name, False, None, 10, clean, robust, told)


def test_columns_are_of_what_some_row_knows():
    assert {name: [cell.whole() for cell in cells] for name, cells in accuracy_columns(ROWS).items()} == EXPECTED
    assert list(accuracy_columns(ROWS[1:])) == ["clean", "pgd"]  # the worst of one attack is that attack
    apart = [evaluation_row("a", results("pgd", "worst")), evaluation_row("b", results("fgsm", "worst"))]
    assert list(accuracy_columns(apart)) == ["clean", "pgd", "fgsm"]  # nothing that both faced


def test_text_and_html_have_all_columns():
    head, *lines = rows_text(ROWS).splitlines()
    assert [len(re.findall(rf"(?<!\w){name}(?!\w)", head)) for name in ("transfer", "balanced robust", "worst")] == [
        1
    ] * 3
    assert all(cells[0] in lines[0] for cells in EXPECTED.values())
    assert lines[1].count(" -") == 5
    html = rows_html(ROWS)
    assert re.findall("<th>(.*?)</th>", html)[1:] == list(EXPECTED)
    assert re.findall("<td>(.*?)</td>", html)[: len(EXPECTED) + 1] == ["full", *(c[0] for c in EXPECTED.values())]


def test_a_page_has_all_columns():
    table = accuracy_table([measured("full", FULL), measured("less", LESS)])
    assert table.columns == ["model", *(f"{name} %" for name in EXPECTED)]
    assert [[cell.whole() for cell in row[1:]] for row in table.rows] == [
        [cells[number] for cells in EXPECTED.values()] for number in range(2)
    ]


def test_the_state_of_a_run_has_all_columns(monkeypatch):
    """As `dualhead info` shows it, which reads the files alone."""
    rows = [described(measured("full", FULL)), described(measured("less", LESS))]
    assert {name: [cell.whole() for cell in cells] for name, cells in accuracy_columns(rows).items()} == EXPECTED
    console = Console(width=300, file=io.StringIO())
    monkeypatch.setattr(terminal, "out", console)
    terminal.print_changed(rows)
    assert "gaussian noise" in console.file.getvalue()
    assert "57.0 [50.0, 64.0]" in console.file.getvalue()
    damaged = described(measured("damaged", {**FULL, "corruptions": {**FULL["corruptions"], "kinds": ["fog"]}}))
    terminal.print_changed([*rows, damaged])
    assert accuracy_columns([damaged])["corruptions"][0].text == "61.0"


def test_images_changed_in_another_way_have_a_table_of_their_own(monkeypatch):
    other = {**FULL, "corruptions": {**FULL["corruptions"], "constants": "ImageNet-C"}}
    damaged = {**FULL, "corruptions": {**FULL["corruptions"], "kinds": ["fog"]}}
    tables = changed_tables([measured(name, told) for name, told in (("a", FULL), ("b", other), ("c", damaged))])
    assert [table.columns for table in tables.values()] == [["kind", "a %", "c %"], ["kind", "b %"]]
    assert ["constants of ImageNet-C" in title for title in tables] == [False, True]
    console = Console(width=300, file=io.StringIO())
    monkeypatch.setattr(terminal, "out", console)
    terminal.print_changed([described(measured("a", FULL)), described(measured("b", other))])
    assert console.file.getvalue().count("gaussian noise") == 2


@pytest.mark.parametrize("hostile", [{"clean": math.nan}, {"clean": "much"}, ["clean"], None])
def test_a_page_leaves_out_balanced_accuracies_that_are_no_numbers(hostile):
    told = {**FULL, "balanced_accuracy": hostile}
    assert "transfer %" in accuracy_table([measured("m", told)]).columns
    assert "balanced clean %" not in accuracy_table([measured("m", told)]).columns


def test_a_terminal_has_all_columns(monkeypatch):
    console = Console(width=300, file=io.StringIO())
    console.print(terminal.accuracy_table("", ROWS))
    monkeypatch.setattr(terminal, "out", console)
    more = {"seeds": [0], "pareto": False, "parameters": None,
            "training_cost": {"flops": None, "forward_equivalents": None, "seconds": None}}  # fmt: skip
    terminal.print_standings({"rows": [row | more for row in ROWS], "pairs": [], "notes": []})
    first, second = (part for part in console.file.getvalue().split("accuracy in percent"))
    for shown in (first, second):
        assert all(name.split()[0] in shown for name in EXPECTED)
        assert all(cells[0].split()[0] in shown for cells in EXPECTED.values())


def test_a_share_is_a_number():
    assert share_cell(None).whole() == "-"
    assert share_cell(0.5).whole() == "50.0"
    for wrong in ((math.nan, [0.1, 0.2]), (0.5, [math.nan, 0.6]), (math.inf, None)):
        with pytest.raises(ValueError, match="not finite"):
            share_cell(*wrong)
