# The commands of this project; each one sets up .venv first if that is needed.

PYTHON_IN_VENV := .venv/bin/python
# Tests start many processes: two at a time, of one thread each, are quicker than one of many.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest --numprocesses 2 --dist loadfile

.PHONY: help setup demo test lint bench reliability audit compatibility

help:
	@echo 'make setup   create .venv with everything, mmcv compiled (about 10 minutes, once)'
	@echo 'make demo    train, evaluate and draw Mask R-CNN on the embedded sample (9 minutes)'
	@echo 'make test    all tests (set MMCONV2FORMER_SAMPLES to run those on real pictures too)'
	@echo 'make lint    ruff (lint and format) and shellcheck'
	@echo 'make reliability  every fault injected at full count, kept in docs/reliability.md (1 hour)'
	@echo 'make audit   the pins of constraints.txt against the advisories of PyPI (needs PyPI itself)'
	@echo "make compatibility  all tests on OpenMMLab's own releases and the backbone's on older torch,"
	@echo '             kept in docs/compatibility.md (about 2 hours, 14 GB of disk for a while)'
	@echo 'make bench   speed and memory beside the published code, kept in docs/performance.md (8 minutes)'

setup:
	@tools/setup_env.sh

demo: setup
	@$(PYTHON_IN_VENV) tools/demo.py

test: setup
	@$(PYTEST)

lint: setup
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@.venv/bin/shellcheck tools/*.sh .ci/run
	@$(PYTHON_IN_VENV) tools/pin_hashes.py --check

bench: setup
	@$(PYTHON_IN_VENV) tools/benchmark.py --runs 3 --page

reliability: setup
	@$(PYTEST) tests/reliability --slow --reliability-page docs/reliability.md

audit: setup
	@$(PYTHON_IN_VENV) tools/audit.py

compatibility: setup
	@$(PYTHON_IN_VENV) tools/compatibility.py
