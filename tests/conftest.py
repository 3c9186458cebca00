"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.runner import CheckpointLoader

from mmconv2former.weights import TRUST_VARIABLE, admit_only_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def sample(tmp_path_factory):
    """A small embedded sample: folder with `coco` and `ade/ADEChallengeData2016`."""
    folder = tmp_path_factory.mktemp('data') / 'sample'
    options = ['--train', '40', '--val', '6', '--size', '64']
    run_tool('make_sample.py', folder, *options)
    return folder


@pytest.fixture(scope='session')
def real_samples():
    """The folder with real samples of COCO and ADE20K that MMCONV2FORMER_SAMPLES names."""
    folder = os.environ.get('MMCONV2FORMER_SAMPLES')
    if folder is None:
        pytest.skip('MMCONV2FORMER_SAMPLES names no folder with real samples')
    assert Path(folder, 'coco_sample').is_dir(), (
        f'MMCONV2FORMER_SAMPLES={folder} has no coco_sample'
    )
    return Path(folder).resolve()


@pytest.fixture
def guarded(monkeypatch):
    """mmengine with our loaders, as the tools set it up, for one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    for variable in (TRUST_VARIABLE, 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
        monkeypatch.setenv(variable, '0')  # so that it is restored
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    admit_only_data()


def run_tool(name, *args, succeeds=True):
    """Runs a tool from the root of the project and returns what it printed, errors included."""
    result = subprocess.run(
        [sys.executable, f'tools/{name}', *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode == 0) == succeeds, result.stdout
    return result.stdout
