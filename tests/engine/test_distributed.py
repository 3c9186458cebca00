"""Several processes compute what one does."""

import pytest
import torch
from helpers import gradients_worker
from helpers.gradients_worker import VARIANTS


@pytest.fixture(scope='module', params=['detection', 'segmentation'])
def gradients(request, server, tmp_path_factory):
    """Gradients by variant and parameter, of one process and of two."""
    folder = tmp_path_factory.mktemp('gradients')
    log = folder / 'log'
    for processes in (1, 2):
        argv = ['gradients_worker', request.param, folder / str(processes)]
        codes = server.run(argv, log, processes, main=gradients_worker.main)
        assert not any(codes), log.read_text()
    return torch.load(folder / '1'), torch.load(folder / '2')


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
