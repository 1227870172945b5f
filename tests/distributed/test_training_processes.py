"""Several processes that share every batch train as one does, whatever becomes of one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_job
from training_job import run_group

from dualhead.errors import RunError
from dualhead.evaluation import Evaluation
from dualhead.models import read_state

STAGES = ("main_head", "second_head", "aggregator")
ROUTED = (
    "model.attach_at=input", "model.second_head=tied", "model.own=[affine]",
    "stages.main_head.train=[trunk, head1, head2]",
    "stages.main_head.objective={name: hybrid, clean: head1, robust: head2}", "stages.main_head.forward=joint",
)  # fmt: skip
"""Two routes in one forward, with statistics of the union."""


def network(name):
    return f"model.backbone=training_job:{name}"


def states(folder):
    return {s: read_state(folder / "checkpoints" / s / "last.safetensors") for s in STAGES}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_training(folder, other, within=2e-5):
    """Weights after each stage, and the log, within what the order of float32 sums makes of them."""
    weights, others = states(folder), states(other)
    for stage in STAGES:
        for name, value in weights[stage].items():
            torch.testing.assert_close(others[stage][name], value, rtol=2e-4, atol=within, msg=f"{stage} {name}")
    for line, its in zip(metrics(folder), metrics(other), strict=True):
        assert line.keys() == its.keys()
        for key, value in line.items():
            brink = 2 / 26 if "accuracy" in key or "validation" in key else 10 * within  # an image may tip
            assert its[key] == (pytest.approx(value, rel=1e-3, abs=brink) if isinstance(value, float) else value)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, by their overrides."""
    made = {}

    def run(*words):
        if words not in made:
            made[words] = tmp_path_factory.mktemp("alone") / "run"
            training_job.start(str(made[words]), list(words))
        return made[words]

    return run


@pytest.mark.parametrize(
    ("world", "words"),
    [
        pytest.param(2, [network("plain")], marks=pytest.mark.slow),  # with `make bits`
        pytest.param(
            2,
            [
                network("frozen"),
                "model.attach_at=input",
                "model.second_head=tied",
                "model.own=[affine]",
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                network("frozen"),
                *ROUTED,
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                network("plain"),
                "stages.main_head.objective={name: test_energy, every: 2, longest: 2}",
                "stages.second_head.objective={name: lwf}",
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                network("plain"),
                "stages.main_head.objective={name: energy, every: 2, max_steps: 2, auc: 0.5}",
                "stages.main_head.batch_norm=frozen",
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                network("frozen"),
                "model.attach_at=input",
                "model.second_head=tied",
                "model.own=[affine]",
                "stages.main_head.train=[trunk, head1, head2]",
                "stages.main_head.objective={name: align, base: {name: balanced, clean: head1, robust: head2}, "
                "layers: [norm2], clean: head1, robust: head2, rectify: true}",
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            [
                network("frozen"),
                "stages.main_head.objective={name: alr, base: {name: agem, among: ['L2:0.5'], images: 20}}",
                "stages.second_head.objective={name: lwf, base: {name: replay, among: ['Linf:0.15', 'L2:0.5'], "
                "images: 20, logits: 0.1}}",
                "stages.second_head.threat=L1:3",
                "stages.second_head.attack.step_size=null",
                "stages.aggregator.objective={name: ewc, old: 'L2:0.5', images: 21, weight: 100}",
                "evaluate.gallery=0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(2, [network("frozen"), "stages.*.micro_batch=5"], marks=pytest.mark.slow),
        pytest.param(2, [network("plain"), "data.poison={name: patch, share: 0.2}"], marks=pytest.mark.slow),
        pytest.param(
            2,
            [network("plain"), "data.poison={name: error_minimising, steps: 2, rounds: 2, batches: 2}"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            [network("plain"), "stages.*.clip_norm=0.5", "stages.*.average=ema", "stages.*.awp={start: 1}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "two",
        "two, tied heads",
        "two, tied heads in one forward",
        "two, streams and a curriculum, and a teacher from before",
        "two, an energy and its curriculum, statistics of batch norm held",
        "two, aligned features and their balance",
        "two, threats remembered",
        "two, frozen batch norm, micro-batches",
        "two, poisoned data",
        "two, a poison made with a network",
        "three, unequal shares, with all that a stage can add",
    ],
)
def test_an_equal_global_batch_gives_the_same_training(alone, tmp_path, world, words):
    assert run_group(world, tmp_path / "run", *words) == [0] * world
    assert_same_training(alone(*words), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert results["environment"]["processes"] == world
    ours, theirs = (Evaluation.load(folder / "evaluation") for folder in (tmp_path / "run", alone(*words)))
    assert ours.num_samples == theirs.num_samples == 24


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ROUTED], ids=["one head after another", "two routes in one forward"])
def test_all_processes_hold_the_same_statistics_of_batch_norm_and_attack_the_same_network(tmp_path, more):
    words = [network("normed"), *more, "stages.*.average={name: ema, batch_norm: reestimate, batches: 2}"]
    assert run_group(2, tmp_path / "a", *words) == [0, 0]
    assert run_group(2, tmp_path / "b", *words) == [0, 0]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    for stage, state in states(tmp_path / "a").items():
        for name, value in states(tmp_path / "b")[stage].items():
            assert torch.equal(value, state[name])


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_dropped_in_all(tmp_path):
    assert run_group(2, tmp_path / "run", "model.backbone=faulty_network:sometimes") == [0, 0]
    dropped = [line["dropped_steps"] for line in metrics(tmp_path / "run")]
    assert sum(dropped) > 0
    for state in states(tmp_path / "run").values():
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.*.batch_size=1"], "less than an image for each of 2 processes"),
        (["runtime.batch_norm=synchronised"], "runtime.batch_norm: synchronised needs GPUs"),
        (["data.source=./nowhere"], "no such file or folder"),
    ],
)
def test_what_cannot_be_ends_in_every_process(tmp_path, words, says):
    command = [sys.executable, "-m", "dualhead", "train", "digits", *training_job.STAGES, network("plain"), *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(training_job.free_port())}
    group = [
        subprocess.Popen(
            [*command, "--run-dir", str(tmp_path / "run")], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in group]
    assert [process.returncode for process in group] == [2, 2]
    ends = [line for line in said[0].splitlines() if line.startswith("dualhead: ")]
    assert len(ends) == 1
    assert says in ends[0]
    assert not said[1]  # told once, as are warnings of what is merely odd


# ---- torchrun


def torchrun(folder, *words, restarts=0):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--master-port", str(training_job.free_port())]
    command += ["-m", "dualhead", "train", "digits", *training_job.STAGES, network("plain"), *words]
    return subprocess.Popen([*command, "--run-dir", str(folder)], env=environment, stderr=subprocess.PIPE, text=True)


def workers(parent):
    """The processes that torchrun has started, in order."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def wait_for_states(folder, process, count):
    states = folder / "checkpoints" / "states"
    while process.poll() is None and newest(states) < count:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


def newest(states):
    return max((int(path.name[:8]) for path in states.glob("*.pt")), default=0)


LONGER = "stages.*.epochs=6"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A longer run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert run_group(2, folder, network("plain"), LONGER) == [0, 0]
    return folder


def assert_same_bits(folder, other):
    assert metrics(folder) == metrics(other)
    weights, others = states(folder), states(other)
    assert all(torch.equal(value, others[s][name]) for s in STAGES for name, value in weights[s].items())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_under_torchrun_with_restarts_allowed(two, tmp_path, victim):
    folder = tmp_path / "run"
    process = torchrun(folder, LONGER, restarts=2)
    for count in (8, 30):
        wait_for_states(folder, process, count)
        os.kill(workers(process.pid)[victim], signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert_same_bits(two, folder)
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(two, tmp_path):
    folder = tmp_path / "run"
    process = torchrun(folder, LONGER)
    wait_for_states(folder, process, 8)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert said.count("the same command goes on from there") == 1
    assert "exitcode  : 75" in said or "exitcode: 75" in said
    assert not (folder / ".lock").exists()
    again = torchrun(folder, LONGER)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    assert_same_bits(two, folder)


@pytest.mark.slow
def test_another_number_of_processes_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    process = torchrun(folder, LONGER)
    wait_for_states(folder, process, 20)
    process.terminate()
    process.communicate(timeout=120)
    training_job.start(str(folder), [network("plain"), LONGER])
    assert_same_training(alone(network("plain"), LONGER), folder, within=2e-3)  # signs of gradients that tip add up


# ---- the group itself


def test_alone_nothing_is_exchanged():
    from dualhead.system.processes import group

    alone = group()
    assert (alone.rank, alone.world, alone.first) == (0, 1, True)
    assert alone.gather("x") == ["x"]
    assert alone.any(True, False) == (True, False)
    assert alone.in_turn(lambda: 3) == alone.lead(lambda: 3) == alone.agreed(lambda: 3) == 3
    with pytest.raises(RunError, match="no"):
        alone.agreed(fails)


def fails():
    raise RunError("no")
