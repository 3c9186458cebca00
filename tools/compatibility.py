"""Runs the tests with other releases than those of `make setup`, and records the results.

    make compatibility                              # everything, into docs/compatibility.md
    python tools/compatibility.py --only family     # all tests on OpenMMLab's own releases
    python tools/compatibility.py --only torch      # the backbone's tests on several torch releases

OpenMMLab's releases are installed in `.venv-openmmlab`, at the versions and hashes of
constraints-openmmlab.txt, with mmcv's ops compiled. It is kept for the next run. The other
environments have torch and, of OpenMMLab, only mmengine; they are deleted after their run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from common import parser_of
from common.tables import table, with_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/compatibility.md'
CONSTRAINTS = ROOT / 'constraints-openmmlab.txt'
FAMILY = ROOT / '.venv-openmmlab'
# Needed to build mmcv and other source distributions without isolation.
BUILD_PACKAGES = ('setuptools', 'wheel', 'ninja', 'packaging', 'numpy')

# Tests that need no host library.
BACKBONE_TESTS = [
    f'tests/models/test_{name}.py'
    for name in 'conv2former isotropic fusion attachments deploy compile'.split()
] + ['tests/ops']
RELEASES = {  # of torch, with the mmengine of its time
    '2.1': ['torch==2.1.*', 'mmengine==0.10.7', 'numpy<2', 'setuptools<70'],
    '2.4': ['torch==2.4.*', 'mmengine==0.10.7', 'numpy<2', 'setuptools<70'],
    # Triton 3.4's interpreter, which tests its kernels, fails with numpy 2.4.
    '2.8': ['torch==2.8.*', 'onedl-mmengine==0.10.12', 'numpy<2.4'],
    'newest': ['torch', 'onedl-mmengine==0.10.12', 'numpy'],
}
TWO = ('--numprocesses', '2', '--dist', 'loadfile')  # as `make test`
OUTCOMES = ('passed', 'failed', 'skipped', 'deselected', 'error', 'errors')


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('--only', choices=['family', 'torch'], help='run only one of the two parts')
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
    """Creates the second environment, unless it is complete already.

    Raises:
        SystemExit: The pins are for another Python version, or pip failed.
    """
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f'error: {CONSTRAINTS.name} is for Python 3.11: PYTHON=python3.11 make setup'
        )
    stamp = FAMILY / '.complete'
    if stamp.exists() and stamp.read_text() == CONSTRAINTS.read_text():
        return
    venv.create(FAMILY, with_pip=True, clear=True)
    pinned = ('install', '--constraint', CONSTRAINTS, '--no-build-isolation')
    pip(FAMILY, *pinned, *BUILD_PACKAGES)
    pip(FAMILY, *pinned, 'torch', 'torchvision')
    pip(FAMILY, *pinned, '--no-deps', 'mmcv')
    pip(FAMILY, 'install', '--no-deps', '--no-build-isolation', '--editable', ROOT)
    pip(FAMILY, *pinned, 'mmconv2former[openmmlab,test]')
    # The headless OpenCV has the same files but needs no display libraries.
    pip(FAMILY, *pinned, '--force-reinstall', '--no-deps', 'opencv-python-headless')
    stamp.write_text(CONSTRAINTS.read_text())


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
    """Runs this environment's pip, which checks hashes of constraints, for another environment.

    Raises:
        SystemExit: pip failed; its own message is printed before.
    """
    command = [sys.executable, '-m', 'pip', '--python', python_of(environment), '--quiet']
    # -g0 -O2 compiles mmcv in half the time to a twentieth of the size.
    settings = {'CFLAGS': '-g0 -O2', **os.environ}
    if subprocess.run([*command, *map(str, arguments)], env=settings).returncode != 0:
        raise SystemExit(
            f'error: pip failed in {environment.name}: {" ".join(map(str, arguments))}'
        )


# ------------------------------------------------------------------------------------------ tests
@dataclass
class Run:
    """The output of a run of pytest, and where it ran."""

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
    """The number of skipped tests by reason."""
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
