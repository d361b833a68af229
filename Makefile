# Two commands on a fresh machine with Python and make:
#   make train    set up .venv and train a small language model on two processes
#   make test     set up .venv and check everything
# Variables: PYTHON (for .venv), PROCS (processes of the run), WORKERS (of pytest), ARGS (for
# launch/train.py or pytest).

PYTHON ?= python3
PROCS ?= 2
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test lint clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

train: $(VENV)/train.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(PROCS) launch/train.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy launch/*.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Its wheel is for Python 3.12; the tests run it with what 3.11 lacks. Without it they are skipped.
MEGATRON_NEWER := megatron-core==0.19.2
$(VENV)/megatron-newer: | $(BIN)/python
	-rm -rf $(VENV)/newer && $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	  --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d $(VENV)/newer $(MEGATRON_NEWER) \
	  && $(BIN)/python -m zipfile -e $(VENV)/newer/megatron_core*.whl $@

# One pip call, so that nothing resolves another torch than the constrained one.
$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (about a minute) ..."
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python $(VENV)/megatron-newer
	@echo "Installing into $(VENV) (two or three minutes) ..."
	DS_BUILD_OPS=0 $(INSTALL) --editable '.[train,dev,triton,deepspeed,megatron]'
	@touch $@ $(VENV)/train.stamp
