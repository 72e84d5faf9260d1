# Requires only python3 (3.11 or newer) and access to a package index. Everything is installed into .venv and
# .venv-bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
BENCH_VENV := .venv-bench
TORCH := torch==2.13.0
ATHERIS := atheris==3.0.0
LOCK = uv pip compile pyproject.toml --universal --python-version 3.11 --constraint requirements/constraints.txt \
  --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header

.PHONY: help setup demo test test-all torture fuzz bench gpu lint format lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Create .venv with the pinned packages

$(STAMP): requirements/test.lock pyproject.toml
	@echo "Setting up $(VENV) (about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/test.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Train on the embedded sample, evaluate, predict, explain, write a report
	$(BIN)/python scripts/train.py --preset sample --platform cpu --run-dir runs/demo
	$(BIN)/python scripts/evaluate.py runs/demo --platform cpu
	$(BIN)/python scripts/predict.py runs/demo --platform cpu "I expected a masterpiece. It was a disaster." "Not bad at all, quite the opposite."
	$(BIN)/python scripts/explain.py runs/demo --platform cpu "Not bad at all, quite the opposite."
	@echo "The report of the run, for a browser:"
	@$(BIN)/python scripts/report.py runs/demo --platform cpu

test: setup  ## Run the tests, without the slow ones (four minutes)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: setup  ## Run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile

torture: setup  ## Kill, stop, damage and forge runs, hundreds of times (40 minutes)
	$(BIN)/python tests/torture.py --markdown runs/torture.md

# Atheris has wheels for few platforms, so it is not in the lock file.
fuzz: setup  ## Search for files that break a reader, guided by coverage (10 minutes; Linux, Python 3.11 to 3.13)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(ATHERIS)
	$(BIN)/python tests/fuzz.py

bench: setup $(BENCH_VENV)/.ready  ## Compare a training step with Keras and PyTorch; ARCHIVE=PATH: on real reviews (5 minutes)
	$(BIN)/python benchmarks/epoch_time.py --quick $(if $(ARCHIVE),--archive "$(ARCHIVE)")
# benchmarks/time_to_accuracy.py and benchmarks/cost_curves.py run in the same environment.

# PyTorch is not in the lock file: its builds (CPU, CUDA) differ by index, and any of them will do. If it cannot be
# installed, the benchmark reports it as missing.
$(BENCH_VENV)/.ready: requirements/bench.lock
	@echo "Setting up $(BENCH_VENV) (a few minutes)"
	@$(PYTHON) -m venv --clear $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.lock
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) || echo "$(TORCH) is missing: the benchmark leaves it out"
	@touch $@

gpu: setup $(BENCH_VENV)/.ready  ## Measure on an NVIDIA GPU (Hopper or later); see docs/gpu.md
	@for python in $(BIN)/python $(BENCH_VENV)/bin/python; do \
	  $$python -m pip install --quiet --disable-pip-version-check "jax[cuda13]==$$($$python -c 'import jax; print(jax.__version__)')"; done
	IMDB_JAX_TEST_PLATFORM=cuda $(BIN)/python -m pytest tests/lstm/test_mosaic_gpu.py
	$(BIN)/python benchmarks/recurrence.py --platform gpu --json runs/gpu/recurrence.json --plot runs/gpu/recurrence.png
	$(BIN)/python benchmarks/epoch_time.py --quick --platform gpu --json runs/gpu/epoch_time.json --plot runs/gpu/epoch_time.png
	$(BIN)/python scripts/train.py --platform gpu --run-dir runs/gpu/article
	$(BIN)/python scripts/train.py --platform gpu --run-dir runs/gpu/one --epochs 1
	$(BIN)/python scripts/train.py --platform gpu --run-dir runs/gpu/seeds --num-seeds 32 --epochs 1
	for implementation in mosaic_gpu chunked; do \
	  $(BIN)/python scripts/train.py --platform gpu --run-dir runs/gpu/$$implementation --num-seeds 8 --implementation $$implementation || exit; done

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## Renew requirements/*.lock from pyproject.toml (needs uv)
	$(LOCK) --extra test --output-file requirements/test.lock
	$(LOCK) --extra bench --output-file requirements/bench.lock

clean:  ## Remove .venv, .venv-bench and caches, never runs
	rm -rf $(VENV) $(BENCH_VENV) .pytest_cache .ruff_cache .hypothesis
