# `make demo` and `make test` install what they need into .venv and are all that a newcomer has to know.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint format install

install: .venv/installed

# torch first and pinned: a plain `torch`, pulled in by another package, may bring gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,s3,dev]'
	touch $@

demo: install
	$(BIN)/python -P -m launch.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
