"""The training benchmark runs, compares what it says, and its published loops take the passes they are known for."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch

from helpers.studies import module_of
from helpers.training import CallCounter


@pytest.fixture(scope="module")
def benchmark():
    return module_of("training.py")


def tiny(benchmark):
    return benchmark.Bench("cnn-2", 4, 8, torch.device("cpu"), "float32")


@pytest.mark.parametrize(("loop", "forwards"), [("trades", 2 * 10 + 3), ("sat", 10 + 1), ("mart", 10 + 2)])
def test_the_published_loops_take_the_passes_they_are_known_for(benchmark, loop, forwards):
    bench = tiny(benchmark)
    run = bench.published(benchmark.PUBLISHED[loop], bench.base)
    before = bench.base.fc.weight.clone()
    with CallCounter(model=bench.base) as calls:
        run()
    assert calls["model"] == forwards
    assert not torch.equal(bench.base.fc.weight, before)


def test_the_plainly_written_stage_3_runs_the_trunk_twice_and_differentiates_all(benchmark):
    bench = tiny(benchmark)
    run = bench.published(benchmark.published_trades, benchmark.TwoNetworks(bench.dual))
    with CallCounter(trunk=bench.dual.trunk, head1=bench.dual.head1) as calls:
        run()
    assert calls == {"trunk": 2 * 23, "head1": 23}
    assert all(parameter.grad is not None for parameter in bench.dual.parameters())


@pytest.mark.parametrize(
    ("parts", "trunk", "suffix"), [("stage 1", 13, 13), ("stage 2", 12, 13), ("stage 3", 12, 13), ("all", 13, 13)]
)
def test_the_bare_passes_are_as_many_as_a_steps(benchmark, parts, trunk, suffix):
    names = benchmark.PARTS["all parts jointly" if parts == "all" else parts]
    last = {"stage 1": "head1", "stage 2": "head2"}.get(parts, "aggregator")
    seen = []
    for make in ("bare", "ours"):
        bench = tiny(benchmark)
        bench.copied = lambda parts, arithmetic, bench=bench: bench.dual
        run = bench.bare(names) if make == "bare" else bench.ours(names, benchmark.OBJECTIVES["trades"])
        with CallCounter(trunk=bench.dual.trunk, last=bench.dual.get_submodule(last)) as calls:
            run()
        seen.append(dict(calls))
    assert seen[0] == seen[1] == {"trunk": trunk, "last": suffix}


def test_one_command_measures_everything(benchmark, monkeypatch, tmp_path, capsys):
    output = tmp_path / "results.json"
    arguments = [
        "--backbones",
        "cnn-2,cnn-4",
        "--batch-size",
        "4",
        "--side",
        "8",
        "--rounds",
        "1",
        "--precision",
        "float32",
    ]
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments, "--device", "cpu", "-o", str(output)])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert set(results["arithmetic"]) == {"cnn-2", "cnn-4"}
    assert results["arithmetic"]["cnn-2"]["bf16"] is False
    assert all(row["ratio"]["lowest"] > 0 and row["seconds"] > 0 and row["rounds"] == 1 for row in rows)
    assert {row["aim"]: row["met"] for row in rows}[""] is None
    assert all(isinstance(row["met"], bool) for row in rows if row["aim"])
    methods = ["trades, ours", "sat, ours", "mart, ours"]
    assert [row["what"] for row in rows if row["backbone"] == "cnn-4" and row["over"] == "published"] == methods
    named = " | ".join(row["what"] for row in rows)
    for what in (
        "trades, ours",
        "sat, ours",
        "mart, ours",
        "stage 3, ours",
        "epoch of stage 2",
        "all parts jointly: the",
    ):
        assert what in named
    if importlib.util.find_spec("art") is None:
        assert "pip install -c constraints.txt -e '.[benchmark]'" in capsys.readouterr().out
    else:
        assert any("adversarial-robustness-toolbox" in row["meaning"] for row in rows)


def test_a_contest_pairs_by_round_and_keeps_to_its_time(benchmark, monkeypatch):
    order = []
    contest = benchmark.Contest({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, [])
    cpu, clock = torch.device("cpu"), iter(range(1000))
    times = contest.measure(5, 60.0, cpu, lambda: next(clock))
    assert times == {"a": [1] * 5, "b": [1] * 5}
    assert "".join(order) == "abbaabbaabba"  # six rounds, the first of which does not count, begun by each in turn
    order.clear()
    contest.measure(5, 0.0, cpu, lambda: next(clock))
    assert len(order) == 2 * (1 + benchmark.LEAST_ROUNDS)
    order.clear()
    monkeypatch.setattr(benchmark, "WARM", 0.0)
    contest.measure(5, 60.0, cpu, lambda: next(clock))
    assert len(order) == 2 * 5


@pytest.mark.parametrize(
    ("aim", "ratio", "met"), [(">= 2.5", 2.5, True), (">= 2.5", 2.4, False), ("<= 1.4", 1.5, False), ("", 9.0, None)]
)
def test_an_aim_says_which_way(benchmark, aim, ratio, met):
    assert benchmark.Comparison("what", "a", "b", "times", aim).met(ratio) is met


def test_the_bare_passes_run_in_as_many_lanes_as_ours(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "with_lanes", lambda arithmetic, *_: replace(arithmetic, lanes=2))
    bench = benchmark.Bench("cnn-2", 32, 8, torch.device("cpu"), "float32")
    seen = []
    monkeypatch.setattr(benchmark.Passes, "logits", recorded(benchmark.Passes.logits, seen))
    bench.bare(("model",))()
    assert seen == [16] * (2 * benchmark.STEPS)


def recorded(function, seen):
    """The method, which notes how many images it is given."""

    def run(self, x):
        seen.append(len(x))
        return function(self, x)

    return run
