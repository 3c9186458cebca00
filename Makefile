# The commands of this project; each one sets up .venv first if that is needed.

PYTHON_IN_VENV := .venv/bin/python
# Tests start many processes: two at a time, of one thread each, are quicker than one of many.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest --numprocesses 2 --dist loadfile
# The tests of the package itself, without those of tools alone. The full disk of the last one has no
# room for the file of coverage either.
COVERED_BY := tests/ops $(patsubst %,tests/test_%.py,backbone cls_head baselines compile convert_weights deploy \
    fusion instance_tta isotropic layer_decay lean product registry runner weights) \
    $(patsubst %,tests/reliability/test_%.py,bad_checkpoints bad_data fuzz numbers) \
    --deselect tests/tools/test_convert_weights.py::test_full_disk_leaves_nothing

.PHONY: help setup demo test lint bench reliability coverage audit compatibility

help:
	@echo 'make setup   create .venv with everything, mmcv compiled (about 10 minutes, once)'
	@echo 'make demo    train, evaluate and draw Mask R-CNN on the embedded sample (9 minutes)'
	@echo 'make test    all tests but the slow ones (MMCONV2FORMER_SAMPLES: those on real pictures too)'
	@echo 'make lint    ruff, mypy, codespell, shellcheck, YAML, hashes and the size of files'
	@echo 'make coverage  which lines of the package the tests run, 95% at least (12 minutes)'
	@echo 'make reliability  every fault injected at full count, kept in docs/reliability.md (14 minutes)'
	@echo 'make audit   the pins of constraints.txt against the advisories of PyPI (needs PyPI itself)'
	@echo "make compatibility  all tests on OpenMMLab's own releases and the backbone's on older torch,"
	@echo '             kept in docs/compatibility.md (34 minutes with all packages in the cache of pip, 14 GB)'
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
	@git ls-files -z '*.md' '*.py' '*.sh' '*.toml' '*.txt' '*.yml' '*.yaml' | xargs -0 .venv/bin/codespell
	@.venv/bin/shellcheck tools/*.sh .ci/run
	@$(PYTHON_IN_VENV) tools/check_files.py yaml
	@$(PYTHON_IN_VENV) tools/check_files.py size
	@.venv/bin/mypy
	@$(PYTHON_IN_VENV) tools/pin_hashes.py --check

bench: setup
	@$(PYTHON_IN_VENV) tools/benchmark.py --runs 3 --page

reliability: setup
	@$(PYTEST) tests/reliability --slow --reliability-page docs/reliability.md

coverage: setup
	@$(PYTEST) $(COVERED_BY) --cov --cov-report=term-missing

audit: setup
	@$(PYTHON_IN_VENV) tools/audit.py

compatibility: setup
	@$(PYTHON_IN_VENV) tools/compatibility.py
