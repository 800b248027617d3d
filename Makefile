# make demo    train on the handwritten digits with each codec: a table, and a figure in out/
# make test    lint, types, tests: what CI runs
# Each makes its environment in $(VENV) if there is none; PYTHON=python3.13 VENV=.venv313 makes another.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean
.DEFAULT_GOAL := test

demo: $(VENV)/installed
	$(BIN)/python -m experiments.cifar --flagfile=experiments/presets/digits.flags

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) out
