# Everything from a fresh clone: `make demo` and `make test` make .venv, install into it and run.
#
#   make demo                           convert the shipped model at 4x, print the table, write the report
#   make test                           lint, types, wheel check, tests
#   make test PYTEST_ARGS="-m 'not slow'"
#
# Variables, each given as `make VARIABLE=value TARGET`:
#   PYTHON       the Python 3.11+ that makes the environment
#   TORCH        what pip installs as torch: another build (TORCH="torch==2.13.0+cu130"), or with pip options
#                before it (TORCH="--index-url URL torch==2.13.0") where your machine's index has not the build you want
#   CONSTRAINTS  pinned versions; CONSTRAINTS=/dev/null takes the newest (needed with another torch version)
#   VENV         the environment's folder
#   JOBS         test processes at a time, of one thread and about 3 GB each

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: demo test lint types wheel pytest node clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/dcconvert demo --force

test: lint types wheel pytest

lint: $(VENV)/.test-installed
	$(BIN)/ruff check

types: $(VENV)/.test-installed
	$(BIN)/mypy

wheel: $(VENV)/.test-installed
	$(BIN)/python .ci/check_wheel.py

pytest: $(VENV)/.test-installed node
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# A second run finds these stamps and installs nothing. Torch comes first, alone: nothing that depends on it
# then picks another build.
$(VENV)/.torch-installed: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo-installed: $(VENV)/.torch-installed pyproject.toml
	$(PIP) -c $(CONSTRAINTS) -e '.[cpu]'
	touch $@

$(VENV)/.test-installed: $(VENV)/.torch-installed pyproject.toml
	$(PIP) -c $(CONSTRAINTS) -e '.[test]'
	touch $@

# For the examples in JavaScript, that of the browser only where there is one. Their tests are skipped, and say so, where
# there is no npm or it cannot reach a registry.
NODE_PACKAGES := onnxruntime-node@1.30.0 $(if $(shell command -v chromium),onnxruntime-web@1.30.0 puppeteer-core@24)
node:
	@test -d examples/node_modules/onnxruntime-node || ! command -v npm >/dev/null || \
		(cd examples && npm install --silent --no-save --ignore-scripts $(NODE_PACKAGES)) || true

clean:
	rm -rf $(VENV) examples/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
