# `make` lists what there is. Everything runs in .venv, which is made on first use from constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
TIMES ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format stress bench docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

.venv/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.run ## train a small model on this machine's Python library, about three minutes
	$(BIN)/stackwise run

test: .venv/.dev ## the test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## let ruff put things in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stress: .venv/.dev ## the long tests: many kills, many rows; TIMES=10: ten times as many random trials
	$(BIN)/python -m pytest -q -m stress --times $(TIMES)

test-gpu: .venv/.dev ## the tests of what a GPU must keep; skipped where there is none
	$(BIN)/python -m pytest -q -rs tests/training/test_cuda.py tests/training/test_lanes.py

bench: .venv/.dev ## the benchmarks whose tables are in docs/benchmarks.md
	$(BIN)/python -m benchmarks

docs: .venv/.dev ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

clean: ## remove .venv and caches
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis
