# Two commands on a fresh machine: `make train` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
PIP := $(INSTALL) -c constraints.txt
export HF_HUB_OFFLINE := 1
# Containers often forbid Python to write bytecode: then each process compiles torch and transformers
# again, and takes twice as long to start.
unexport PYTHONDONTWRITEBYTECODE
# A file of tests stays in one process, whose fixtures it shares; tests/conftest.py puts the longest
# first. One thread a process: more would compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder
# The dependencies and the development extra of pyproject.toml, one a line.
REQUIREMENTS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	x = p["optional-dependencies"]; \
	print(*[r for r in p["dependencies"] + x["dev"] + x["docs"] if "cpo_fast" not in r], sep="\n")
LOWEST := $(VENV)/lowest
LOWEST_TESTS := tests/loss/test_first_step.py tests/model/test_packed.py tests/model/test_build.py \
	tests/packing/test_collate.py tests/data/test_arrow_files.py tests/data/test_dicom.py \
	tests/concepts/test_graph.py tests/evaluation/test_metrics.py tests/report/test_page.py \
	tests/run/test_whole_runs.py::test_run_writes_the_documented_files \
	tests/run/test_export.py
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: help setup train test quick lowest real real-data bench gpu-check gpu-kit gpu-kit-quack gpu-publish lint docs doctor dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## make .venv with all dependencies and build the native kernels

# torch comes first and alone: a wide range would pull gigabytes of CUDA onto a machine without a GPU.
# Then the kernels compile (over a minute) while the dependencies are downloaded.
$(VENV)/installed: constraints.txt pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps -e . & building=$$!; \
		$(BIN)/python -c '$(REQUIREMENTS)' | $(PIP) -r /dev/stdin && wait $$building
	touch $@

train: setup ## the embedded default: phantom data, SFT, CPO, evaluation, report (runs/phantom)
	$(BIN)/python -m cpo_fast.train

# make test SKIP=complete: without the tests that CONTRIBUTING.md lists.
test: setup real-data ## all tests (SKIP=MARKER leaves some out)
	$(PYTEST) $(if $(SKIP),-m 'not $(SKIP)')

quick: setup ## the tests that take no more than a few seconds
	$(PYTEST) -m 'not slow'

real-data: $(VENV)/real-data ## 3,955 real Open-I reports and Qwen's vocabulary (wheels that carry them, without their dependencies)
$(VENV)/real-data: $(VENV)/installed
	$(PIP) --no-deps torchxrayvision dashscope
	touch $@

real: setup real-data ## all stages on the real Open-I reports (runs/real)
	$(BIN)/python -m cpo_fast.train --config examples/real.yaml

lowest: $(LOWEST)/installed ## some tests at the lowest versions that pyproject.toml admits
	PYTHONPATH=$(LOWEST) $(PYTEST) -q -k "not compiled and not flex and not datasets_itself" \
		$(LOWEST_TESTS)
$(LOWEST)/installed: constraints-lowest.txt $(VENV)/installed
	rm -rf $(LOWEST)
	$(INSTALL) --no-deps --only-binary :all: --target $(LOWEST) -r constraints-lowest.txt
	touch $@

docs: setup ## the pages of docs/ and the API reference as HTML (docs/_build/html); warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

doctor: setup ## check this installation
	$(BIN)/python -m cpo_fast.doctor

dist: setup ## sdist and wheel, built in isolation (dist/)
	$(BIN)/python -m build

bench: setup ## pytest --benchmark, with the peers installed
	$(PIP) -e '.[dev,bench]'
	$(BIN)/python -m pytest --benchmark

GPU_OUT ?= runs/gpu-check
gpu-check: ## check and measure everything on a GPU in under 9 minutes, offline, .venv or not (GPU_OUT, GPU_ARGS)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu_check --out $(GPU_OUT) $(GPU_ARGS)

# PYTHON312: an interpreter whose headers to build with; else the usual places are looked through.
gpu-kit: setup ## what a GPU machine without a network is given: peers, built kernels (gpu-kit/)
	$(BIN)/python -m bench.gpu_kit --out gpu-kit $(if $(PYTHON312),--python $(PYTHON312))

gpu-kit-quack: setup ## the peer quack, for a run of its own (gpu-kit-quack/)
	$(BIN)/python -m bench.gpu_kit --quack --out gpu-kit-quack --limit 0

gpu-publish: setup ## figures of a GPU check into docs/ and bench/results/ (RESULTS="a/results.json ...", COMMIT)
	$(BIN)/python -m bench.gpu_publish $(RESULTS) $(if $(COMMIT),--commit $(COMMIT))

lint: setup ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy cpo_fast

clean: ## remove what was built (not .venv, not runs/)
	rm -rf build dist docs/_build *.egg-info cpo_fast/*.so .pytest_cache .mypy_cache .ruff_cache
