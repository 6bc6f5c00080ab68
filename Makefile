# make demo: train on three textures and show what is found   make test: run the tests
# Each makes the virtual environment if it is missing. Override with VENV=..., PYTHON=..., JOBS=... (test processes).
PYTHON ?= python3
VENV ?= .venv
STEPS ?= 200
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

demo: $(VENV)/.demo
	$(BIN)/python demo/run.py --steps $(STEPS) $(if $(DATA),--data "$(DATA)") $(if $(CATEGORIES),--categories "$(CATEGORIES)")

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/.demo
