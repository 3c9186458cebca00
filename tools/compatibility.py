"""Runs the tests with other releases than those of `make setup`, and keeps what they printed.

    make compatibility                              # everything, into docs/compatibility.md
    python tools/compatibility.py --only family     # all tests on OpenMMLab's own releases
    python tools/compatibility.py --only torch      # the backbone's tests on a list of torch

OpenMMLab's releases are installed in `.venv-openmmlab`, at the versions and hashes of
constraints-openmmlab.txt, mmcv compiled with its ops. It stays for the next run. The environments
of torch alone, with mmengine and nothing else of OpenMMLab, are deleted after their run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from common.tables import table, with_table
from pin_hashes import read_pins, with_hashes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/compatibility.md'
CONSTRAINTS = ROOT / 'constraints-openmmlab.txt'
FAMILY = ROOT / '.venv-openmmlab'
# What mmcv and other source distributions need to be built without isolation.
FIRST = ('pip', 'setuptools', 'wheel', 'ninja', 'packaging', 'numpy', 'torch', 'torchvision')
LAST = 'mmcv'

# Of the package without a host library.
BACKBONE_TESTS = [
    f'tests/test_{name}.py'
    for name in 'backbone isotropic fusion attachments deploy compile'.split()
] + ['tests/ops']
RELEASES = {  # of torch, with the mmengine of its time
    '2.1': ['torch==2.1.*', 'mmengine==0.10.7', 'numpy<2', 'setuptools<70'],
    '2.4': ['torch==2.4.*', 'mmengine==0.10.7', 'numpy<2', 'setuptools<70'],
    '2.8': ['torch==2.8.*', 'onedl-mmengine==0.10.12', 'numpy'],
    'newest': ['torch', 'onedl-mmengine==0.10.12', 'numpy'],
}
TWO = ('--numprocesses', '2', '--dist', 'loadfile')  # as `make test`
OUTCOMES = ('passed', 'failed', 'skipped', 'deselected', 'error', 'errors')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', choices=['family', 'torch'], help='one of the two parts')
    parser.add_argument(
        '--tests', nargs='+', default=['tests'], help="test files or folders for 'family'"
    )
    args = parser.parse_args()
    failed = False
    if args.only != 'torch':
        install_family()
        run = run_tests(FAMILY, args.tests)
        failed |= run.failed
        write('family', family_table(run))
    if args.only != 'family':
        rows = []
        for name, packages in RELEASES.items():
            run = run_tests(install_torch(name, packages), BACKBONE_TESTS)
            failed |= run.failed
            rows.append([name, *versions(run, 'torch', 'mmengine', 'numpy'), counts(run)])
            shutil.rmtree(environment_of(name))
            print(f'torch {name}: {counts(run)}', flush=True)
        write('torch', table(['release', 'torch', 'mmengine', 'numpy', 'tests'], rows))
    raise SystemExit(int(failed))


# ----------------------------------------------------------------------------------- environments
def install_family() -> None:
    """Makes the second environment, or leaves it as it is if it was made from the same pins."""
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f'error: {CONSTRAINTS.name} is of Python 3.11: PYTHON=python3.11 make setup'
        )
    stamp = FAMILY / '.complete'
    if stamp.exists() and stamp.read_text() == CONSTRAINTS.read_text():
        return
    if not FAMILY.exists():
        venv.create(FAMILY, with_pip=True)
    text = CONSTRAINTS.read_text()
    others = [pin.name for pin, _ in read_pins(text) if pin.name not in (*FIRST, LAST)]
    install_pinned(text, FIRST[:5])
    install_pinned(text, FIRST[5:] + tuple(name for name in others if is_of_torch(name)))
    install_pinned(text, [LAST])
    install_pinned(text, [name for name in others if not is_of_torch(name)])
    pip(FAMILY, 'install', '--no-deps', '--no-build-isolation', '--editable', ROOT)
    stamp.write_text(text)


def is_of_torch(name: str) -> bool:
    """Whether torch needs a package to be imported, as it is when mmcv is built."""
    needed = ('triton', 'filelock', 'typing-extensions', 'sympy', 'mpmath', 'networkx', 'jinja2')
    return name.startswith('nvidia-') or name in (*needed, 'markupsafe', 'fsspec', 'pillow')


def install_pinned(text: str, names: tuple[str, ...] | list[str]) -> None:
    """Installs some of the pinned packages, none of what they need in turn."""
    pins = {str(pin): hashes for pin, hashes in read_pins(text) if pin.name in names}
    requirements = FAMILY / 'requirements.txt'
    requirements.write_text(with_hashes('\n'.join(pins), pins))
    options = ['--no-deps', '--no-build-isolation', '--require-hashes', '--requirement']
    pip(FAMILY, 'install', *options, requirements)


def install_torch(name: str, packages: list[str]) -> Path:
    environment = environment_of(name)
    venv.create(environment, with_pip=True, clear=True)
    pip(environment, 'install', *packages, 'opencv-python-headless', 'rich', 'pytest-xdist')
    return environment


def environment_of(name: str) -> Path:
    return ROOT / f'.venv-torch-{name}'


def python_of(environment: Path) -> str:
    return str(environment / 'bin/python')


def pip(environment: Path, *arguments: str | Path) -> None:
    """Runs an environment's pip.

    Raises:
        SystemExit: It failed; its own message is printed before.
    """
    command = [python_of(environment), '-m', 'pip', '--disable-pip-version-check', '--quiet']
    # -g0 -O2 compiles mmcv in half the time to a twentieth of the size.
    settings = {'CFLAGS': '-g0 -O2', **os.environ}
    if subprocess.run([*command, *map(str, arguments)], env=settings).returncode != 0:
        raise SystemExit(
            f'error: pip failed in {environment.name}: {" ".join(map(str, arguments))}'
        )


# ------------------------------------------------------------------------------------------ tests
@dataclass
class Run:
    """What a run of pytest printed, and where it ran."""

    environment: Path
    tests: list[str]
    output: str
    failed: bool


def run_tests(environment: Path, tests: list[str]) -> Run:
    settings = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [python_of(environment), '-m', 'pytest', '-q', '--tb=short', '-rs', *TWO, *tests]
    result = subprocess.run(
        command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    (environment / 'tests.log').write_text(result.stdout)
    if result.returncode != 0:
        print(result.stdout)
    return Run(environment, tests, result.stdout, result.returncode != 0)


def counts(run: Run) -> str:
    """The counts in pytest's last line, without its time."""
    *_, last = run.output.strip().splitlines()
    return ', '.join(re.findall(rf'\d+ (?:{"|".join(OUTCOMES)})\b', last)) or last


def skips(run: Run) -> list[tuple[int, str]]:
    """How many tests were skipped for which reason."""
    found: dict[str, int] = {}
    for number, reason in re.findall(r'^SKIPPED \[(\d+)\] \S+: (.*)$', run.output, re.M):
        found[reason] = found.get(reason, 0) + int(number)
    return [(number, reason) for reason, number in found.items()]


def versions(run: Run, *names: str) -> list[str]:
    """Versions of modules in an environment."""
    code = 'import importlib, sys; print(importlib.import_module(sys.argv[1]).__version__)'
    command = [python_of(run.environment), '-W', 'ignore', '-c', code]
    return [
        subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True)
        .stdout.strip()
        .splitlines()[-1]
        for name in names
    ]


# ------------------------------------------------------------------------------------------- page
def family_table(run: Run) -> str:
    names = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    installed = ', '.join(map(' '.join, zip(names, versions(run, *names))))
    rows = [[f'`{" ".join(run.tests)}` with {installed}', counts(run)]]
    rows += [[f'skipped: {reason}', f'{number}'] for number, reason in skips(run)]
    return table(['run', 'tests'], rows)


def write(name: str, text: str) -> None:
    PAGE.write_text(with_table(PAGE.read_text(), name, text))


if __name__ == '__main__':
    main()
