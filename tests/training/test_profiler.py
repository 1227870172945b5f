"""A profile says where a step's time goes and changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dualhead.recipe.yaml import load_recipe
from dualhead.runs import stages
from dualhead.runs.prepare import prepare
from dualhead.system.arithmetic import Arithmetic
from dualhead.training import Silent
from dualhead.training.profiler import SECTIONS, SKIPPED, STEPS, labelled
from helpers.e2e import TINY


def trained(folder, *overrides, profile=True):
    settings = [*TINY, "stages.*.batch_size=32", "runtime.lanes=1", *overrides]
    prepared = prepare(load_recipe("digits_sat", settings), folder)
    stages.train_stages(prepared, Silent(), lambda: False, profile=profile)
    return load_file(folder / "model" / "model.safetensors")


def test_table_and_trace_name_the_parts_and_results_stay(tmp_path):
    plain, profiled = trained(tmp_path / "plain", profile=False), trained(tmp_path / "profiled")
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert not (tmp_path / "plain" / "profile").exists()
    for stage in ("main_head", "second_head", "aggregator"):
        parts, _, operators = (tmp_path / "profiled" / "profile" / f"{stage}.txt").read_text().partition("\n\n")
        lines = {line[2:18].strip(): line.split() for line in parts.splitlines()[1:]}
        assert {"load images", "attack", "loss: forward", "loss: backward", "update", "rest", "a step"} <= set(lines)
        assert all(float(fields[-3]) >= 0 for fields in lines.values())
        assert float(lines["attack"][-3]) > float(lines["update"][-3])
        assert "aten::" in operators
        trace = json.loads((tmp_path / "profiled" / "profile" / f"{stage}.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert names.count("attack") >= STEPS
        assert sum(name.startswith("ProfilerStep#") for name in names) == STEPS


def test_attacks_in_other_threads_are_seen(tmp_path, monkeypatch):
    two_lanes = replace(Arithmetic(bf16=False, channels_last=True), lanes=2)
    monkeypatch.setattr(stages, "choose_for_training", lambda prepared: two_lanes)
    trained(tmp_path / "run")
    trace = json.loads((tmp_path / "run" / "profile" / "main_head.json").read_text())
    convolutions = [event for event in trace["traceEvents"] if event.get("name") == "aten::convolution"]
    assert len({event["tid"] for event in convolutions}) >= 3  # the step's own and two lanes


def test_a_stage_that_is_too_short_is_told(tmp_path, caplog):
    steps = 360 // 100
    assert steps < SKIPPED + STEPS
    trained(tmp_path / "run", "stages.*.batch_size=100")
    told = [record.message for record in caplog.records if "no profile" in record.message]
    assert told[0] == f"stage main_head: no profile, since it ended before its step {SKIPPED + STEPS}"
    assert not (tmp_path / "run" / "profile").exists()


def test_labelled_gives_what_it_is_given():
    assert list(labelled(SECTIONS[0], [1, None, 3])) == [1, None, 3]
    assert list(labelled(SECTIONS[0], [])) == []


@pytest.mark.slow  # a whole run with its evaluation
def test_the_command_says_where_the_profile_is(tmp_path):
    from helpers.e2e import dualhead

    ended = dualhead("train", "digits_sat", *TINY, "stages.*.batch_size=32", "--run-dir", tmp_path / "r", "--profile")
    assert ended.status == 0
    assert "a table and a trace for each stage" in ended.out
    assert len(list((tmp_path / "r" / "profile").iterdir())) == 6
