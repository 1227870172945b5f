"""The benchmark of busy machines pairs its turns, judges by its aims, and the page shows what it measured."""

from __future__ import annotations

import json
import os

import pytest

from dualhead.system.waiting import CHOICES
from helpers.studies import module_of


@pytest.fixture(scope="module")
def benchmark():
    return module_of("contention.py")


@pytest.fixture
def measured(benchmark, monkeypatch, tmp_path):
    """Results of two rounds in which everything takes twice as long beside others, and half as long with one thread."""
    company = []

    class Spinning:
        def __init__(self, count):
            assert count == benchmark.cores()

        def __enter__(self):
            company.append(True)

        def __exit__(self, *_):
            company.pop()

    def turn(changes, epochs):
        assert epochs == 4
        seconds = (5.0 if "OMP_NUM_THREADS" in changes else 10.0) * (2 if company else 1)
        return {"training": seconds, "evaluation": seconds / 2}

    monkeypatch.setattr(benchmark, "spinning", Spinning)
    monkeypatch.setattr(benchmark, "turn", turn)
    monkeypatch.setattr(benchmark.signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    benchmark.main([str(tmp_path / "found.json"), "--runs", "2"])
    return json.loads((tmp_path / "found.json").read_text())


def test_ratios_are_of_turns_side_by_side(measured, benchmark):
    rows = {(row["work"], row["setting"]): row for row in measured["rows"]}
    assert len(rows) == 2 * len(benchmark.SETTINGS)
    assert all(row["beside_over_alone"]["median"] == 2.0 for row in rows.values())
    assert rows["evaluation", "one thread"]["alone_over_default"]["median"] == 0.5
    ours = rows["training", benchmark.OURS]
    assert ours["met"] and ours["met_alone"]
    assert [len(times["alone"]) for times in measured["seconds"]["training"].values()] == [2] * len(benchmark.SETTINGS)


def test_further_pairs_count_beside_the_rounds(measured, benchmark, tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    monkeypatch.setattr(benchmark, "turn", lambda changes, _: dict.fromkeys(benchmark.WORK, 9.0 if changes else 12.0))
    benchmark.main([str(path), "--runs", "0", "--pairs", "5"])
    told = json.loads(path.read_text())
    assert told["seconds"] == measured["seconds"]
    row = next(row for row in told["rows"] if row["setting"] == benchmark.OURS)
    assert row["alone_over_default"]["median"] == pytest.approx(12 / 9)
    assert row["beside_over_alone"]["median"] == 2.0
    assert not row["met_alone"]
    told["environment"]["cpu"] = "another"
    path.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="another machine"):
        benchmark.main([str(path), "--runs", "0", "--pairs", "1"])


def test_a_busy_machine_is_refused(benchmark, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setattr(benchmark.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="wait until the machine is quiet"):
        benchmark.main(["--runs", "1"])


def test_a_setting_is_all_that_a_process_is_told_of_threads(benchmark, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for changes in benchmark.SETTINGS.values():
        told = benchmark.environment(changes)
        assert {name: told[name] for name in (*CHOICES, "OMP_NUM_THREADS") if name in told} == changes


def test_what_spins_ends(benchmark):
    started = []
    popen = benchmark.subprocess.Popen

    class Kept(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    benchmark.subprocess.Popen = Kept
    try:
        with pytest.raises(ValueError, match="in vain"), benchmark.spinning(2):
            assert [other.poll() for other in started] == [None, None]
            raise ValueError("in vain")
    finally:
        benchmark.subprocess.Popen = popen
    assert all(other.poll() is not None for other in started)


def test_the_page_shows_the_committed_results(measured):
    tool = module_of("../tools/speed_tables.py")
    page, results = tool.PAGE.read_text(encoding="utf-8"), tool.found()
    assert tool.made(page, results) == page, "docs/speed.md: run `python tools/speed_tables.py`"
    other = tool.made(page, results | {"contention": measured})
    assert "| training | one thread | 5.0 | 10.0 | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) |" in other
    assert tool.made(other, results) == page
