# `make demo` and `make test` install what they need into .venv and are all that a newcomer has to know.

PYTHON ?= python3.11
BIN := .venv/bin

# Tests start hundreds of processes, each of which would compile the same files where this is set to something.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-short test-long test-torch gpu lint format install docs dist

install: .venv/installed

# torch first and pinned: a plain `torch`, pulled in by another package, may bring gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[s3,sentencepiece,mlflow,eval,gguf,dev]'
	touch $@

demo: install
	$(BIN)/python -P -m stoker.launch.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTEST := $(BIN)/python -m pytest --dist loadscope --no-loadscope-reorder

# Linters beside the tests, and three workers: on two cores they take what is left over while ranks wait for each other.
test: install
	$(MAKE) --no-print-directory --jobs=2 test-short lint

test-short: install
	$(PYTEST) -n 3 -m "not long" $(TESTS)

# Runs that are killed, hung and moved for minutes; some need a Slurm cluster or network namespaces, which they make as root.
test-long: install
	$(PYTEST) -n 3 -m long

# The short tests of ranks and of training with a later torch. PyPI has it for CUDA only, gigabytes; the rest is .venv's.
OTHER_TORCH ?= 2.14.1
OTHER := .venv-torch-$(OTHER_TORCH)

$(OTHER)/installed: .venv/installed
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check torch==$(OTHER_TORCH)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(OTHER)/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth"
	touch $@

test-torch: $(OTHER)/installed
	$(MAKE) --no-print-directory BIN=$(OTHER)/bin test-short TESTS="tests/parallel tests/trainer"

# What one GPU can prove in six minutes. PYTHON is the machine's own, as its torch is; nothing is installed.
gpu:
	$(PYTHON) -m tests.gpu --seconds 360 --json gpu.json

docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/site.py build/pages
	$(BIN)/mkdocs build --quiet --strict

# Wheel and source distribution as a user gets them: checked, installed into an empty environment, one step trained.
dist: install
	rm -rf dist build/dist && mkdir -p build/dist
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/dist/venv
	build/dist/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/dist/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/dist && venv/bin/stoker train run.dir=first steps=1 batch.size=4 seq_len=64 launch.nproc=1

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
