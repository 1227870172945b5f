"""A run that was stopped or killed, at whatever moment, ends as one that was not: bit for bit on a CPU."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from dualhead.errors import UserError
from dualhead.training import StageRun, Validator
from helpers.resume import STEPS, in_spite_of, outcome, train_in_process, train_until


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_until(folder, lambda: False)
    return outcome(folder)


def test_the_undisturbed_run_leaves_all_that_is_compared(undisturbed):
    stages = ("main_head", "second_head", "aggregator")
    expected = {f"checkpoints/{stage}/{which}.safetensors" for stage in stages for which in ("best", "last")}
    assert set(undisturbed["weights"]) == expected | {"model/model.safetensors", "checkpoints/images.safetensors"}
    assert [(line["stage"], line["epoch"]) for line in undisturbed["metrics"]] == [
        (s, e) for s in stages for e in (1, 2)
    ]
    assert set(undisturbed["summaries"]) == set(stages)


@pytest.mark.slow  # with `make bits`
def test_stopped_after_every_single_step(undisturbed, tmp_path):
    starts = 1
    while not train_until(tmp_path / "run", lambda: True):
        starts += 1
    assert starts == STEPS + 1
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("step", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_stopped_once(undisturbed, tmp_path, step):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) >= step  # asked once a step, until it says yes

    assert not train_until(tmp_path / "run", stop)
    assert train_until(tmp_path / "run", lambda: False)
    assert outcome(tmp_path / "run") == undisturbed


def test_how_the_work_is_done_may_change_on_the_way(undisturbed, tmp_path, caplog):
    folder = tmp_path / "run"
    asked = []
    assert not train_until(folder, lambda: asked.append(None) or len(asked) >= 7)
    others = ("data.workers=0", "runtime.save_minutes=1", "stages.main_head.checkpoint_activations=true")
    with caplog.at_level("WARNING"):
        assert train_until(folder, lambda: False, *others)
    assert "goes on with data.workers=0, runtime.save_minutes=1.0, stages.0.checkpoint_activations=True" in caplog.text
    assert outcome(folder) == undisturbed
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["data"]["workers"], kept["stages"][0]["checkpoint_activations"]) == (0, True)


def test_a_log_line_or_best_weights_from_after_the_saved_state_do_no_harm(undisturbed, tmp_path):
    folder = tmp_path / "run"
    states = folder / "checkpoints" / "states"
    train_until(folder, lambda: len(list(states.glob("*.pt"))) >= 3)
    newest = sorted(states.glob("*.pt"))[-1]
    newest.unlink()  # as if the process had been killed between writing best weights and log, and saving its state
    assert train_until(folder, lambda: False)
    assert outcome(folder) == undisturbed


def test_best_weights_of_an_epoch_that_no_state_knows_are_not_kept(tmp_path, monkeypatch):
    """As where an accelerator, or another number of processes, makes other bits of the epoch that was lost."""
    robust = iter([0.5, 0.6, 0.4])  # the second epoch is lost, and the third is it again

    def validated(self, *_):
        return {"validation_clean": 0.7, "validation_robust": next(robust)}

    class KilledError(Exception):
        pass

    def killed(self, *_):
        if self._position.epoch == 2 and not (self._position.step or self._position.sums):
            raise KilledError
        saves(self)

    saves = StageRun._save
    monkeypatch.setattr(Validator, "__call__", validated)
    folder, more = (
        tmp_path / "run",
        ("stages=[{name: main_head, train: [trunk, head1], objective: natural, epochs: 2, batch_size: 32}]",),
    )
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "_save", killed)
        with pytest.raises(KilledError):
            train_until(folder, lambda: False, *more)
    stage = folder / "checkpoints" / "main_head"
    first = (stage / "best.safetensors").read_bytes()
    assert len(list(stage.glob("best*.safetensors"))) == 2
    assert train_until(folder, lambda: False, *more)
    assert json.loads((stage / "summary.json").read_text())["best"]["epoch"] == 1
    assert (stage / "best.safetensors").read_bytes() == first
    assert sorted(path.name for path in stage.glob("*.safetensors")) == ["best.safetensors", "last.safetensors"]


def test_stopped_in_a_stage_that_chooses_by_validation(tmp_path):
    choice = "{name: mix, train: [aggregator], fit: {max_loss: 0.1}}"
    taught = "{name: NAME, train: [HEAD], objective: natural, epochs: 1, batch_size: 32}"
    stages = [taught.replace("NAME", "two").replace("HEAD", "head2"), choice,
              taught.replace("NAME", "again").replace("HEAD", "head2")]  # fmt: skip
    # In head 2 there is dropout, which draws from torch's own generator in the stage after the choice.
    more = (f"stages=[{', '.join(stages)}]", "model.aggregator=mixed_nuts", "model.attach_at=block2")
    assert train_until(tmp_path / "whole", lambda: False, *more)
    asked = []
    assert not train_until(tmp_path / "run", lambda: asked.append(None) or len(asked) >= 5, *more)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["stage"] == "two"
    assert train_until(tmp_path / "run", lambda: False, *more)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- kill -9


def chaos(tmp_path, epochs, kills, seed):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    began = time.monotonic()
    in_spite_of(0, train_in_process, undisturbed, epochs)
    epoch_seconds = (time.monotonic() - began) / (3 * epochs)  # three stages
    assert in_spite_of(kills, train_in_process, disturbed, epochs, epoch_seconds, seed) >= kills // 2
    assert outcome(disturbed) == outcome(undisturbed)
    assert not list(disturbed.rglob("*.tmp"))
    assert not (disturbed / ".lock").exists()


@pytest.mark.slow  # with `make bits`
def test_killed_at_random_moments(tmp_path):
    chaos(tmp_path, epochs=3, kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_killed_at_25_random_moments(tmp_path):
    chaos(tmp_path, epochs=60, kills=25, seed=1)


def test_a_run_of_an_earlier_version_that_lacks_a_fact_is_refused(tmp_path):
    stops = iter([False, True])
    assert not train_until(tmp_path, lambda: next(stops))
    facts = json.loads((tmp_path / "environment.json").read_text())
    del facts["lanes"]
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="did not write down lanes"):
        train_until(tmp_path, lambda: False)
