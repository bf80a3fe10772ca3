# Two commands on a fresh machine: `make train` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE := 1
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: help setup train test quick real real-data bench lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## make .venv with all dependencies and build the native kernels

# torch comes first and alone: a wide range would pull gigabytes of CUDA onto a machine without a GPU.
$(VENV)/installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

train: setup ## the embedded default: phantom data, SFT, CPO, evaluation, report (runs/phantom)
	$(BIN)/python -m cpo_fast.train

test: setup real-data ## all tests
	$(BIN)/python -m pytest

quick: setup ## the tests that take no more than a few seconds
	$(BIN)/python -m pytest -m 'not slow'

real-data: $(VENV)/real-data ## the 3,955 real Open-I reports (the wheel that carries them, without its dependencies)
$(VENV)/real-data: $(VENV)/installed
	$(PIP) --no-deps torchxrayvision
	touch $@

real: setup real-data ## all stages on the real Open-I reports (runs/real)
	$(BIN)/python -m cpo_fast.train --config examples/real.yaml

bench: setup ## pytest --benchmark, with the peers installed
	$(PIP) -e '.[dev,bench]'
	$(BIN)/python -m pytest --benchmark

lint: setup ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy cpo_fast

clean: ## remove what was built (not .venv, not runs/)
	rm -rf build *.egg-info cpo_fast/*.so .pytest_cache .mypy_cache .ruff_cache
