# make train     the quickstart: environment, data, training, on any machine with Python 3.11 or newer
# make test      everything that CI checks, without a GPU
# make test-gpu  every kernel and training on CUDA GPUs, one or two
# make bench-gpu all measurements of docs/performance.md, on a machine with CUDA GPUs
# make docs-test every command of README.md and docs/
# make lint, make format, make clean
#
# Variables:
#   PYTHON=python3.12          interpreter for .venv (default: the first of python3, python3.12, python3.11 that fits)
#   EXTRAS=dev,gpu             extras of pyproject.toml to install (default: dev)
#   WORKERS=16                 processes of make test-gpu's kernel tests: a core each, one GPU for all (default: 8)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#                              read by pip: the CPU build of torch instead of PyPI's, which brings several GB of CUDA

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := train
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
WORKERS ?= 8
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
CODE := kernels qsparse_layers moe pipeline launch tests benchmarks docs
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env train test test-gpu bench-gpu docs-test lint format clean

env: $(STAMP)

# pip gets its own retries: a registry's hiccup should not fail a first `make train`.  What is imported is compiled then;
# compiling all that is installed takes a minute more.
$(STAMP): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" bash .ci/make-venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

train: env
	qsparse data prepare --source stdlib --output data/stdlib
	qsparse train configs/quickstart.yaml

test: lint
	bash .ci/test

# Most of a kernel's test is compiling, which takes a core each; the others start processes that train small models.
test-gpu: env
	pytest -m gpu -n $(WORKERS) tests/kernels tests/moe tests/bench
	pytest -m gpu -n 4 tests/gpu

bench-gpu: env
	test -d data/stdlib || qsparse data prepare --source stdlib --output data/stdlib
	qsparse bench kernels --output docs/performance
	qsparse bench moe --output docs/performance
	qsparse bench train --output docs/performance
	qsparse bench generate --output docs/performance
	[ "$$(nvidia-smi -L | wc -l)" -lt 2 ] || qsparse bench scaling --output docs/performance
	qsparse bench trajectories --data data/stdlib --output docs/performance

# The pages look at the run that the quickstart leaves behind.
docs-test: env
	test -f runs/quickstart/status.json || $(MAKE) train
	pytest -m docs tests/docs

lint: env
	ruff check $(CODE)
	ruff format --check $(CODE)
	mypy
	lint-imports

format: env
	ruff check --fix $(CODE)
	ruff format $(CODE)

# Keeps runs/ and data/: they may hold days of work.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
