# The commands of this project; each one sets up .venv first if necessary.

PYTHON_IN_VENV := .venv/bin/python
# Threads of OpenMP spin while they wait, which slows everything down beside another busy process.
export OMP_WAIT_POLICY ?= passive
# uv trusts the system's certificates, as pip does.
export UV_SYSTEM_CERTS ?= true
# Tests start many processes: two at a time with one thread each are faster than one with many.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest --numprocesses 2 --dist loadfile
# The tests of the package itself, without tests of tools only.
COVERED_BY := tests/models tests/ops tests/checkpoint tests/engine tests/test_registry.py \
    tests/tools/test_convert_weights.py \
    $(patsubst %,tests/reliability/test_%.py,bad_checkpoints bad_data fuzz lock numbers)

UV := .venv-uv/bin/uv
UV_COMPILE := $(UV) pip compile --quiet --generate-hashes --no-annotate --no-header \
    --no-emit-package mmconv2former

.PHONY: help setup demo test lint bench reliability coverage pins audit compatibility

help:
	@echo 'make setup   create .venv with all packages (2 minutes, once); before other commands:'
	@echo '             source .venv/bin/activate'
	@echo "             MMCV_OPS=compiled: compile mmcv's own operators (needs a C++20 compiler)"
	@echo 'make demo    train, evaluate and draw Mask R-CNN on the embedded sample (10 minutes)'
	@echo 'make test    all tests except the slow ones (with MMCONV2FORMER_SAMPLES also those on real images)'
	@echo 'make lint    ruff, mypy, codespell, shellcheck, YAML and file sizes'
	@echo 'make coverage  lines of the package that the tests run, at least 95% (12 minutes)'
	@echo 'make reliability  inject every fault at full count, into docs/tables/reliability.md (16 minutes)'
	@echo 'make pins    resolve constraints.in into constraints.txt, with hashes'
	@echo 'make audit   check the pins for known vulnerabilities (needs the JSON API of pypi.org)'
	@echo "make compatibility  all tests on OpenMMLab's own releases and the backbone's on older torch,"
	@echo '             into docs/compatibility.md (34 minutes if pip has cached all packages, 14 GB)'
	@echo 'make bench   speed and memory against the published code, into docs/performance.md (10 minutes)'

setup:
	@tools/setup_env.sh

$(UV):
	@tools/setup_env.sh uv

demo: setup
	@$(PYTHON_IN_VENV) tools/demo.py

test: setup
	@$(PYTEST)

lint: setup
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@git ls-files -z '*.md' '*.py' '*.sh' '*.toml' '*.txt' '*.yml' '*.yaml' | xargs -0 .venv/bin/codespell
	@.venv/bin/shellcheck tools/*.sh .ci/run
	@git ls-files -z '*.cff' '*.yaml' '*.yml' | xargs -0 .venv/bin/check-yaml
	@git ls-files -z | xargs -0 .venv/bin/check-added-large-files --enforce-all --maxkb=500
	@.venv/bin/mypy

bench: setup
	@$(PYTHON_IN_VENV) tools/benchmark.py --runs 3 --page

reliability: setup
	@$(PYTEST) tests/reliability --slow --reliability-page docs/tables/reliability.md

coverage: setup
	@$(PYTEST) $(COVERED_BY) --cov --cov-report=term-missing

# mmcv 2.1.0 needs pkg_resources from an older setuptools to list its dependencies.
pins: $(UV)
	@$(UV_COMPILE) --universal --python-version 3.10 --output-file constraints.txt constraints.in
	@$(UV_COMPILE) --python-version 3.11 --python-platform linux --output-file constraints-openmmlab.txt \
	    --build-constraints build-constraints-openmmlab.txt constraints-openmmlab.in

audit: $(UV)
	@$(UV)x --constraints constraints.txt pip-audit --strict --require-hashes --disable-pip \
	    --requirement constraints.txt

compatibility: setup
	@$(PYTHON_IN_VENV) tools/compatibility.py
