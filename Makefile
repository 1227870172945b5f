# Two commands for newcomers: `make demo` and `make test`. Both set everything up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all bits chaos fuzz browser docs lint types wheel lowest check clean

# A shell line per package set: torch first and pinned, so that no other package draws in another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dualhead demo

test: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

test-all: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Every recipe that ships, and small ones of every setting, train the weights that they trained, to the bit; and what
# earlier code left stays of use; runs of every kind that are stopped or killed go on to the same bits, and a run goes on
# a pretend accelerator: all that is too long for `make test`.
RESUMED := tests/runs/test_resume.py::test_stopped_after_every_single_step \
	tests/runs/test_resume.py::test_killed_at_random_moments \
	tests/training/test_ingredients.py::test_stopped_at_steps_a_run_with_the_ingredient_goes_on_bit_for_bit \
	tests/training/test_free.py::test_stopped_at_steps_it_goes_on_bit_for_bit \
	tests/training/test_guard.py::test_stopped_within_a_streak_or_after_a_return_a_run_still_resumes_exactly \
	tests/objectives/test_distilled.py::test_such_a_stage_resumes_bit_for_bit \
	tests/objectives/test_joint.py::test_a_joint_stage_within_a_run_resumes_bit_for_bit \
	tests/objectives/test_several.py::test_a_choice_goes_on_bit_for_bit_where_it_was_stopped \
	tests/runs/test_sequence_runs.py tests/runs/test_routed_runs.py \
	tests/e2e/test_tied_heads.py::test_stopped_at_steps_it_goes_on_bit_for_bit \
	tests/e2e/test_commands.py::test_a_stopped_run_goes_on_to_the_same_bits \
	tests/e2e/test_fit.py::test_killed_at_random_moments_and_called_again_equals_the_undisturbed \
	tests/e2e/test_fit.py::test_two_processes_of_torchrun_share_a_fit \
	tests/e2e/test_sweep.py::test_killed_and_begun_again_a_sweep_ends_as_one_that_was_not \
	tests/e2e/test_dispatch.py::test_a_job_that_fails_is_told_and_the_others_are_done

bits: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/numerics tests/contract/test_old_runs.py tests/runs/test_new_methods.py \
		tests/contract/test_every_device.py::test_a_run_from_training_to_export $(RESUMED) \
		"tests/distributed/test_training_processes.py::test_an_equal_global_batch_gives_the_same_training[two]"

# The report in a headless Chromium of the system; without one these tests are skipped with a word.
browser: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -rs

# kill -9, 25 times a run of three stages and 25 times an evaluation; what comes out is the same to the bit.
chaos: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m chaos

# An hour of rubbish for every way in; atheris is for Linux, and not among what everybody installs.
fuzz: $(VENV)/.developer
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --minutes 60

# The documentation as pages in build/site; a broken link is an error.
docs: $(VENV)/.developer
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(VENV)/.developer
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.developer
	$(BIN)/mypy

# The wheel must work outside the checkout, with data and recipes inside.
wheel: $(VENV)/.developer
	$(BIN)/python -m build --wheel --outdir dist

# The lower bounds of pyproject.toml, but for torch, in a fresh environment: they install, train, evaluate and compare.
lowest:
	$(PYTHON) tools/lowest.py

check: lint types test

clean:
	rm -rf $(VENV) build dist
