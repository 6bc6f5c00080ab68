# make demo: train on five drawn products and show what is found
# make test: run the tests           make test-fast: those that take minutes together    make test-all: also those much like others
# make lint, make types: what CI checks beside the tests           make coverage: how much of the code the tests run
# make docs: build the documents as a site in build/docs; a warning is an error
# Each makes the virtual environment if it is missing. Override with VENV=..., PYTHON=..., JOBS=... (test processes).
PYTHON ?= python3
VENV ?= .venv
STEPS ?= 100
JOBS ?= 2
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: demo test test-all test-fast coverage lint types docs clean

demo: $(VENV)/.demo
	$(BIN)/python demo/run.py --steps $(STEPS) $(if $(DATA),--data "$(DATA)") $(if $(CATEGORIES),--categories "$(CATEGORIES)")

test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive" $(TESTS)

test-all: $(VENV)/.dev
	$(PYTEST) $(TESTS)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(TESTS)

coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report term:skip-covered $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs

clean:
	rm -rf $(VENV) demo-output dist build docs/generated

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/.demo
