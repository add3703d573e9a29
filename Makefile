# A newcomer's two commands: make demo, make test. Everything they make is inside this checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# pip's own cache would be outside the checkout.
export PIP_CACHE_DIR := $(CURDIR)/$(VENV)/cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1
TESTS ?= tests
PYTEST_ARGS ?=
DEMO_ARGS ?=
CODE := scheduler pool gateway bench scripts tests examples

.PHONY: help demo test lint format clean
help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 16

demo: $(VENV)/ready ## run the examples from a pool of their own, show how fast they start, leave nothing behind
	@$(PY) scripts/demo.py $(DEMO_ARGS)

test: $(VENV)/ready-dev ## all tests, with a real engine; TESTS=tests/test_x.py for some, PYTEST_ARGS for more
	@scripts/needs.sh --check
	@mkdir -p .test
	@$(PY) -m pytest $(TESTS) --junitxml=.test/junit.xml $(PYTEST_ARGS)
	@$(PY) scripts/noskip.py .test/junit.xml

lint: $(VENV)/ready-dev ## ruff, mypy --strict, the import rule
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy --strict
	$(VENV)/bin/mypy --strict --explicit-package-bases scripts
	$(VENV)/bin/lint-imports --no-logo

format: $(VENV)/ready-dev ## let ruff put the code in order
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

clean: ## remove what the other commands made
	@if [ -d .test/engine ]; then $(PYTHON) scripts/engine.py stop .test/engine --purge; fi
	rm -rf $(VENV) .demo .test build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1 || true)." >&2; \
	  echo "make: install it (apt-get install python3), or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/ready: pyproject.toml | $(VENV)/bin/python
	@echo "installing poold and what it needs into $(VENV)"
	@$(PY) -m pip install -qq --editable .
	@touch $@

$(VENV)/ready-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing poold and what its tests need into $(VENV)"
	@$(PY) -m pip install -qq --editable '.[dev,plot]'
	@touch $@ $(VENV)/ready
