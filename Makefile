# Everything here needs only python3 (3.11 or newer) and a package index. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: help setup demo test lint format lock clean

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

demo: setup  ## Train on the embedded sample, evaluate, plot, predict
	$(BIN)/python scripts/train.py --preset sample --platform cpu --run-dir runs/demo
	$(BIN)/python scripts/evaluate.py runs/demo --platform cpu
	$(BIN)/python scripts/plot.py runs/demo
	$(BIN)/python scripts/predict.py runs/demo --platform cpu "I expected a masterpiece. It was a disaster." "Not bad at all, quite the opposite."

test: setup  ## Run the tests
	$(BIN)/python -m pytest -n auto

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## Renew requirements/*.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra test --constraint requirements/constraints.txt \
	  --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --output-file requirements/test.lock

clean:  ## Remove .venv and caches, never runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
