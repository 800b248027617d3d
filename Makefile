# make demo    train on the handwritten digits with each codec: a table, and a figure in out/
# make test    lint, types, tests
# make certify the tests that need the compilers of TPUs and GPUs, which look for these devices, in $(VENV)-certify
# make wheel   what a release is, in dist/; installed with nothing else in $(VENV)-wheel, and tried there
# CI runs the last three. Each makes its environment in $(VENV) if there is none; PYTHON=python3.13 VENV=.venv313 makes another.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test certify wheel lint clean
.DEFAULT_GOAL := test

demo: $(VENV)/installed
	$(BIN)/python -m experiments.cifar --flagfile=experiments/presets/digits.flags

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

certify: $(VENV)-certify/installed
	$(VENV)-certify/bin/python -m pytest -n auto --dist loadgroup tests/test_certify.py tests/test_certified_rows.py

# The wheel is made of the sdist, so both are tried.
wheel:
	rm -rf dist $(VENV)-build $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-build
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-build/bin/python -m pip install --quiet build
	$(VENV)-build/bin/python -m build --quiet
	$(VENV)-wheel/bin/python -m pip install --quiet dist/*.whl
	cd / && JAX_PLATFORMS=cpu $(abspath $(VENV))-wheel/bin/python -I $(CURDIR)/tests/wheel_smoke.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)-certify/installed: EXTRAS := [certify]
$(VENV)/installed $(VENV)-certify/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -r requirements.txt -e '.$(EXTRAS)'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-certify $(VENV)-build $(VENV)-wheel build dist out
