"""Several processes compute what one does."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.gradients_worker import VARIANTS
from helpers.training_server import free_port

ENVIRONMENT = os.environ | {
    'PYTHONPATH': f'{ROOT}/tests:{ROOT}/tools',
    'OMP_NUM_THREADS': '1',
}


@pytest.fixture(scope='module', params=['detection', 'segmentation'])
def gradients(request, tmp_path_factory):
    """Gradients by variant and parameter, of one process and of two."""
    folder = tmp_path_factory.mktemp('gradients')
    launchers = {'one': [], 'two': ['-m', 'torch.distributed.run', '--nproc_per_node=2',
                                    f'--master_port={free_port()}']}  # fmt: skip
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, 'tests/helpers/gradients_worker.py']
        result = subprocess.run(
            [*command, request.param, folder / name],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
    return torch.load(folder / 'one'), torch.load(folder / 'two')


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_equal_those_of_one_process(gradients, variant):
    one, two = (result[variant] for result in gradients)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert expected is not None, f'{name} is unused'
        torch.testing.assert_close(two[name], expected, rtol=1e-7, atol=1e-9, msg=name)
    assert sum(gradient.abs().sum() for gradient in one.values()) > 1
    assert any('stages.0' in name for name in one) == (variant != 'frozen stages')


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_are_views_of_buckets(gradients, variant):
    """Not copies of them: `gradient_as_bucket_view` is in effect."""
    one, two = (
        {gradient.untyped_storage().data_ptr() for gradient in result[variant].values()}
        for result in gradients
    )
    assert len(two) < len(one) / 4


def test_checkpointing_changes_no_gradient(gradients):
    one = gradients[0]
    for name, expected in one['plain'].items():
        torch.testing.assert_close(one['checkpointing'][name], expected, rtol=1e-9, atol=1e-12)
