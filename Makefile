# The words of this house. The environment is .venv, or $TACIT_VENV where that is set.
VENV ?= $(or $(TACIT_VENV),.venv)
PYTHON ?= python3
TESTS ?= tests
export PYTHON
# The checkout comes first on the path: an environment shared by several checkouts runs the one make was called in.
RUN := PYTHONPATH="$(CURDIR)" "$(VENV)/bin/python"
# One thread for each of the test workers: small models gain nothing from more, and workers would fight over cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all check format bench

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

env: ## make the environment, or find it made
	@.ci/environment "$(VENV)"

demo: env ## install what is missing, then run the main job
	@$(RUN) -m tacit simulate

test: env ## the tests that take seconds
	@$(PYTEST) -n 2 -m "not slow" $(TESTS)

test-all: env ## every test, the slow and statistical ones included
	@$(PYTEST) -n 2 $(TESTS)

check: env ## format, lint, types and who may import whom
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@PYTHONPATH="$(CURDIR)" "$(VENV)/bin/lint-imports"

format: env ## rewrite the code as check wants it
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

bench: env ## measure, and compare within one run
	@$(RUN) -m bench
