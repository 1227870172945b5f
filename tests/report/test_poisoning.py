"""What people read of a poison: columns of tables, a section of the page, and what is printed nowhere."""

from pathlib import Path

import numpy as np
import pytest

import dualhead
from dualhead.commands.terminal import accuracy_table
from dualhead.report import rows_text
from dualhead.report.poisoning import section
from dualhead.report.sources import Estimate, Measured, Source
from dualhead.report.table import poison_columns
from dualhead.report.text import points

TOLD = {
    "name": "patch", "target": 3, "class": "dog", "num_triggered": 90, "attack_success_rate": 0.9,
    "robust_accuracy_on_triggered": {"pgd-10": 0.2, "worst": 0.1},
    "intervals": {"attack_success_rate": [0.85, 0.95], "pgd-10": [0.1, 0.3], "worst": [0.05, 0.2]},
    "training": {"num_samples": 10, "by_given_label": 1.0, "by_true_label": 0.0,
                 "intervals": {"by_given_label": [0.7, 1.0], "by_true_label": [0.0, 0.3]}},
    "per_class": [{"label": 0, "class": "cat", "num_samples": 45, "attack_success_rate": 0.8,
                   "accuracy_on_triggered": 0.1, "robust_accuracy_on_triggered": {"pgd-10": 0.1},
                   "intervals": {"attack_success_rate": [0.7, 0.9], "clean_accuracy": [0.05, 0.2]}}],
    "epochs": {"best": {"epoch": 2, "clean_accuracy": 0.5, "attack_success_rate": 0.3},
               "last": {"epoch": 9, "clean_accuracy": 0.6, "attack_success_rate": 0.9}},
    "above_clean_model": {"difference": 0.85, "interval": [0.8, 0.9]},
}  # fmt: skip


def row(name, **more):
    return {"name": name, "clean_accuracy": 0.6, "robust_accuracy": {"pgd-10": 0.3},
            "intervals": {"clean_accuracy": [0.5, 0.7], "pgd-10": [0.2, 0.4]}, **more}  # fmt: skip


def test_columns_are_of_what_was_measured():
    columns = poison_columns([{"poison": TOLD}, {}, {"poison": {"name": "one_pixel", "training": TOLD["training"]}}])
    assert list(columns) == ["attack success", "robust, triggered", "learnt by heart"]
    shown = {name: [cell.whole() for cell in cells] for name, cells in columns.items()}
    assert shown["attack success"] == ["90.0 [85.0, 95.0]", "-", "-"]
    assert shown["robust, triggered"] == ["10.0 [5.0, 20.0]", "-", "-"]
    assert shown["learnt by heart"] == ["100.0 [70.0, 100.0]", "-", "100.0 [70.0, 100.0]"]
    assert poison_columns([{}]) == {}


def test_tables_show_them_and_others_stay_as_they_were():
    told = rows_text([row("base", poison=TOLD), row("other")])
    assert "attack success" in told
    assert "90.0 [85.0, 95.0]" in told
    assert rows_text([row("base")]).splitlines()[0].split()[-1] == "pgd-10"
    assert "attack success" in accuracy_table("", [row("base", poison=TOLD)])._columns
    assert list(accuracy_table("", [row("base")])._columns) == ["model", "clean", "pgd-10"]


@pytest.fixture
def source(tmp_path):
    clean = np.full((2, 3, 4, 4), 100, np.uint8)
    poisoned = clean.copy()
    poisoned[:, :, -1, -1] += 5
    np.savez(
        tmp_path / "poison.npz", index=[1, 4], old_label=[0, 1], new_label=[3, 3], linf=[5 / 255] * 2, l2=[0.03] * 2,
        shown=[1, 4], shown_clean=clean, shown_poisoned=poisoned,
    )  # fmt: skip
    found = Source("toy", True, tmp_path)
    found.recipe = {"data": {"poison": {"name": "patch"}}}
    estimate = Estimate(0.6, 0.5, 0.7)
    found.rows = [
        Measured("toy", "base", "model", "base", True, None, 100, estimate, {"pgd-10": estimate}, {"poison": TOLD})
    ]
    return found


def test_the_section_has_tables_and_three_pictures_an_image(source):
    notes = []
    found = section(source, notes)
    assert not notes
    assert "2 training images touched: 2 with another label, 0 left out, 2 with other pixels" in found.changes
    assert found.outputs.columns == [
        "model", "attack success %", "above a clean model, points", "robust, triggered %", "learnt by heart %",
        "by true label %",
    ]  # fmt: skip
    assert [cell.text for cell in found.outputs.rows[0]] == ["base", "90.0", "+85.0", "10.0", "100.0", "0.0"]
    assert found.classes.rows[0][2].text == "80.0"
    assert [line[0].text for line in found.epochs.rows] == ["best epoch (2)", "last epoch (9)"]
    assert len(found.pictures) == 2
    assert len(set(found.pictures[0])) == 3


def test_finders_are_told_where_they_were_measured(source):
    told = source.rows[0].results["poison"]
    told["activation_clustering"] = {"auroc": 0.931, "interval": [0.9, 0.95]}
    try:
        found = section(source, []).outputs
    finally:
        told.pop("activation_clustering")
    assert found.columns[-1] == "found by clusters, AUROC"
    assert (found.rows[0][-1].text, found.rows[0][-1].order) == ("0.93", 0.931)
    assert "spectral" not in str(found.columns)


def test_a_clean_run_has_none_and_damage_is_noted(source):
    (source.folder / "poison.npz").write_bytes(b"rubbish")
    notes = []
    assert section(source, notes).pictures == []
    assert "poison.npz cannot be read" in notes[0]
    source.rows[0].results["poison"]["per_class"] = [{"class": "cat"}]
    try:
        assert section(source, notes) is None
        assert "cannot be read; it is left out" in notes[-1]
    finally:
        source.rows[0].results["poison"].pop("per_class")
    source.recipe = {"data": {"poison": None}}
    assert section(source, notes) is None


def test_no_text_of_the_product_says_that_something_is_robust_to_poisoning():
    root = Path(dualhead.__file__).parent
    repository = Path(__file__).resolve().parents[2]
    pages = [repository / "README.md", *(repository / "docs").rglob("*.md"), *(repository / "benchmarks").rglob("*.md")]
    for path in [*root.rglob("*.py"), *root.rglob("*.html"), *root.rglob("*.js"), *root.rglob("*.yaml"), *pages]:
        text = " ".join(path.read_text(encoding="utf-8").lower().split())
        for claim in (
            "robust to poison",
            "robust against poison",
            "poison-robust",
            "immune to poison",
            "safe from poison",
        ):
            assert claim not in text, path


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert [points(value) for value in (-1e-17, -0.00001, 0.00001, 0.0)] == ["0.0"] * 4
    assert [points(value) for value in (-0.0004, 0.0004, -0.001, 0.05)] == ["-0.04", "+0.04", "-0.1", "+5.0"]
