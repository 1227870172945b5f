"""Evaluations that are killed, and evaluations by several processes, give the verdicts of one that ran through."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import evaluation_job
import numpy as np
import pytest

from dualhead.evaluation import Evaluation
from helpers.evaluation import assert_same

TESTS = Path(__file__).parent.parent


def start(folder, *group):
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(TESTS / "distributed" / "evaluation_job.py"), str(folder), *map(str, group)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def run_group(folder, world, *attacks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [start(folder, rank, world, port, *attacks) for rank in range(world)]
    said = [process.communicate(timeout=240)[0] for process in group]
    assert [process.returncode for process in group] == [0] * world
    return said


def tries_in(folder):
    """(task, part, sample, job) of everything recorded."""
    found = []
    for path in sorted((folder / "progress").glob("tries-*.npz")):
        with np.load(path) as held:
            columns = [held[name].tolist() for name in ("task", "part", "sample", "job")]
            found += [(str(held["tasks"][task]), *rest) for task, *rest in zip(*columns, strict=True)]
    return found


@pytest.fixture(scope="module")
def reference():
    return evaluation_job.main(None)


def progress_of(folder):
    """Changes whenever the evaluation has put something on disk."""
    return sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "progress").glob("*.npz"))


def evaluate_in_spite_of(kills, folder, seed):
    """Kill a process that evaluates, again and again, until it gets through; how often it was killed.

    By its own course as well as by the clock: mostly, it is killed within half a second of what it last put on disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation_job"])
    moments, killed = random.Random(seed), 0
    while True:
        before, wait_for_progress = [], moments.random() < 0.8
        process = context.Process(target=evaluation_job.slowly, args=(str(folder),))
        process.start()
        with contextlib.suppress(FileNotFoundError):
            before = progress_of(folder)
        while killed < kills and wait_for_progress and process.exitcode is None:
            with contextlib.suppress(FileNotFoundError):  # renamed in this moment
                if progress_of(folder) != before:
                    break
            time.sleep(0.005)
        process.join(moments.uniform(0.0, 0.5) if killed < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        process.kill()
        process.join()
        killed += 1


@pytest.mark.parametrize(
    ("kills", "seed"),
    [
        pytest.param(4, 0, marks=pytest.mark.slow),
        pytest.param(25, 1, marks=[pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_random_moments_and_started_again(reference, tmp_path, kills, seed):
    assert evaluate_in_spite_of(kills, tmp_path, seed) >= kills // 2
    assert_same(Evaluation.load(tmp_path), reference)
    for name, verdict in Evaluation.load(tmp_path).verdicts.items():
        np.testing.assert_array_equal(verdict.adversarial, reference.verdicts[name].adversarial)
    done = tries_in(tmp_path)
    assert len(done) == len(set(done))


@pytest.mark.slow
def test_two_processes_give_the_verdicts_of_one(reference, tmp_path):
    said = run_group(tmp_path, 2)
    assert said[0] == said[1]
    shared = Evaluation.load(tmp_path)
    assert_same(shared, reference)
    for name, verdict in shared.verdicts.items():
        np.testing.assert_array_equal(verdict.adversarial, reference.verdicts[name].adversarial)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert results["robust_accuracy"] == reference.robust_accuracy


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(reference, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    evaluation_job.main(str(tmp_path), attacks=evaluation_job.ATTACKS[:1])
    before = set(tries_in(tmp_path))
    group = [start(tmp_path, rank, 2, port) for rank in range(2)]
    time.sleep(1.0)
    for process in group:
        process.kill()
        process.wait()
    again = evaluation_job.main(str(tmp_path))
    assert_same(again, reference)
    done = tries_in(tmp_path)
    assert len(done) == len(set(done))
    assert before <= set(done)


@pytest.mark.slow
def test_two_processes_corrupt_and_count_as_one_does(tmp_path):
    alone = evaluation_job.main(str(tmp_path / "one"), attacks=["corruptions", "pgd-10"])
    said = run_group(tmp_path / "two", 2, "corruptions", "pgd-10")
    assert said[0] == said[1]
    shared = Evaluation.load(tmp_path / "two")
    assert_same(shared, alone)
    np.testing.assert_array_equal(shared.measured["corruptions"], alone.measured["corruptions"])
    assert shared.results["corruptions"] == alone.results["corruptions"]
    assert shared.results["environment"]["processes"] == 2


@pytest.mark.slow
def test_one_process_goes_on_with_corruptions_where_two_were_killed(tmp_path):
    """Kinds that both had finished are not rendered anew; the others are, with the same outcome."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = tmp_path / "two" / "progress" / "facts.json"
    group = [start(tmp_path / "two", rank, 2, port, "corruptions") for rank in range(2)]
    until = time.monotonic() + 120
    while time.monotonic() < until and group[0].poll() is None:
        if facts.is_file() and "corruptions: " in facts.read_text():
            break
        time.sleep(0.05)
    for process in group:
        process.kill()
        process.wait()
    alone = evaluation_job.main(None, attacks=["corruptions"])
    again = evaluation_job.main(str(tmp_path / "two"), attacks=["corruptions"])
    np.testing.assert_array_equal(again.measured["corruptions"], alone.measured["corruptions"])
