# The commands of this project; each one sets up .venv first if that is needed.

PYTHON_IN_VENV := .venv/bin/python

.PHONY: help setup demo test lint bench

help:
	@echo 'make setup   create .venv with everything, mmcv compiled (about 10 minutes, once)'
	@echo 'make demo    train, evaluate and draw Mask R-CNN on the embedded sample (9 minutes)'
	@echo 'make test    all tests (set MMCONV2FORMER_SAMPLES to run those on real pictures too)'
	@echo 'make lint    ruff: lint and format check'
	@echo 'make bench   speed and memory beside the published code, kept in docs/performance.md (8 minutes)'

setup:
	@tools/setup_env.sh

demo: setup
	@$(PYTHON_IN_VENV) tools/demo.py

test: setup
	@$(PYTHON_IN_VENV) -m pytest

lint: setup
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .

bench: setup
	@$(PYTHON_IN_VENV) tools/benchmark.py --runs 3 --page
