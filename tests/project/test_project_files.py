"""Files for developers: hooks, workflow, citation."""

import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT

import mmconv2former


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_hooks_are_valid_and_their_programs_pinned():
    pytest.importorskip('pre_commit')
    name = '.pre-commit-config.yaml'
    command = [sys.executable, '-m', 'pre_commit', 'validate-config', name]
    subprocess.run(command, cwd=ROOT, check=True)
    (repository,) = read(name)['repos']
    assert repository['repo'] == 'local'  # nothing is fetched
    makefile = (ROOT / 'Makefile').read_text()
    pins = (ROOT / 'constraints.txt').read_text()
    for hook in repository['hooks']:
        program = hook['entry'].split()[0]
        assert program.startswith('.venv/bin/')
        name = program.removeprefix('.venv/bin/')
        assert re.search(rf'(\.venv/bin/|-m ){name}', makefile)
        package = 'pre-commit-hooks' if name.startswith('check-') else name
        assert re.search(rf'^{package}(-py)?==', pins, flags=re.M)


def test_workflow_runs_what_ci_runs_on_each_python():
    job = read('.github/workflows/ci.yml')['jobs']['cpu']
    assert [step['run'] for step in job['steps'] if 'run' in step][-2:] == ['make setup', '.ci/run']
    versions = job['strategy']['matrix']['python']
    setup = (ROOT / 'tools/setup_env.sh').read_text()
    named = re.search(r'Python (.*) is needed', setup)
    assert versions == re.findall(r'3\.\d+', named[1])


def test_citation_is_of_this_version_and_the_paper():
    citation = read('CITATION.cff')
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
    assert citation['version'] == mmconv2former.__version__
    doi = citation['preferred-citation']['doi']
    assert f'doi {doi}' in (ROOT / 'README.md').read_text()
