# make demo    train on the handwritten digits with each codec: a table, and a figure in out/
# make test    lint, types, tests
# make certify the tests that need the compilers of TPUs and GPUs, which look for these devices, in $(VENV)-certify
# make docs    the documentation as a web site, in site/; any warning is an error
# CI runs the last three. Each makes its environment, $(VENV), $(VENV)-certify or $(VENV)-docs, if there is none;
# PYTHON=python3.13 VENV=.venv313 makes another.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test certify docs lint clean
.DEFAULT_GOAL := test

demo: $(VENV)/installed
	$(BIN)/python -m experiments.cifar --flagfile=experiments/presets/digits.flags

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

certify: $(VENV)-certify/installed
	$(VENV)-certify/bin/python -m pytest -n auto --dist loadgroup tests/test_certify.py tests/test_certified_rows.py

docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/python -m mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: NEEDS := -r requirements.txt -e .
$(VENV)-certify/installed: NEEDS := -r requirements.txt -e '.[certify]'
$(VENV)-docs/installed: NEEDS := -e '.[docs]'
$(VENV)/installed $(VENV)-certify/installed $(VENV)-docs/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet $(NEEDS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-certify $(VENV)-docs out site
