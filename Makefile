# Two commands for newcomers: `make demo` and `make test`. Both set everything up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all browser lint types wheel check clean

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

# The report in a headless Chromium of the system; without one these tests are skipped with a word.
browser: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -rs

lint: $(VENV)/.developer
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.developer
	$(BIN)/mypy

# The wheel must work outside the checkout, with data and recipes inside.
wheel: $(VENV)/.developer
	$(BIN)/python -m build --wheel --outdir dist

check: lint types test

clean:
	rm -rf $(VENV) build dist
