# Two commands matter: `make demo` and `make test`. Both set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --warn-undefined-variables

VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
ARGS ?=
export PYTHON ?=
export PIP_ARGS ?=
# Nothing that runs from here reports usage or looks for weights elsewhere.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export FEAST_USAGE := False
export DO_NOT_TRACK := 1
# Each worker process would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

# A recipe that hangs is ended: TERM first, so that it can stop what it started, then KILL.
within = timeout --foreground --kill-after=30 $(1)

.PHONY: help
help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# Made anew when the lock or the project's metadata changes, else at no cost.
$(VENV)/.installed: requirements/lock.txt requirements/install.sh pyproject.toml
	@$(call within,1800) requirements/install.sh $(VENV)
	@touch $@

.PHONY: setup
setup: $(VENV)/.installed  ## make .venv from the lock and install the project into it

.PHONY: demo
demo: setup  ## serve real flights, score a batch, compare both
	@$(PY) -m graphs.demo $(ARGS)

.PHONY: lint
lint: setup  ## formatting, lint, types and import direction
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(call within,180) $(PY) -m mypy
	PYTHONPATH=platform $(VENV)/bin/lint-imports

.PHONY: check
check: lint  ## lint and the quick tests, in about a minute and a half
	$(call within,300) $(PYTEST) -q -n 2 --dist loadfile tests/unit -m "not slow and not network" $(ARGS)

# One pytest over everything, so that its closing line counts every test. INT when it takes too
# long: pytest then ends what it started, and says what failed until then.
.PHONY: test
test: lint  ## lint and every test, notebooks included
	timeout --foreground --signal=INT --kill-after=30 3300 $(PYTEST) --nbmake --nbmake-timeout=300 \
	    tests $(wildcard notebooks) $(ARGS)

.PHONY: bench
bench: setup  ## benchmarks against peers on this machine
	@$(PY) -m benchmarks run --all $(ARGS)

.PHONY: format
format: setup  ## format the code and sort imports
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

.PHONY: lock
lock:  ## resolve every dependency afresh into requirements/lock.txt
	requirements/update.sh

.PHONY: wheel
wheel: setup  ## build dist/twinpath-*.whl
	rm -rf build
	$(PY) -m build --wheel --no-isolation --outdir dist .

.PHONY: clean
clean:  ## remove caches, build outputs and what runs left; .venv stays
	rm -rf build dist platform/*.egg-info .mypy_cache .ruff_cache .pytest_cache \
	    .hypothesis .import_linter_cache .twinpath mlruns mlartifacts mlflow.db
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
