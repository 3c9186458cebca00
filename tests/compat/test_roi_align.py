"""mmcv's RoIAlign misreads channels_last memory without the guard."""

import sys
from importlib import import_module

import pytest
import torch
from mmcv.ops import RoIAlign

from mmconv2former.compat.mmcv_ops import StandIn
from mmconv2former.compat.roi_align import guard_roi_align

FUNCTION = import_module('mmcv.ops.roi_align').RoIAlignFunction


@pytest.fixture
def stock(monkeypatch):
    """mmcv's operator without the guard."""
    forward = FUNCTION.forward
    monkeypatch.setattr(FUNCTION, 'forward', getattr(forward, '__wrapped__', forward))


def align(features):
    boxes = torch.tensor([[0, 1.0, 1, 9, 7], [1, 0, 0, 5, 5]])
    return RoIAlign(output_size=3, sampling_ratio=2)(features, boxes)


@pytest.fixture
def features():
    return torch.randn(2, 4, 8, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(
    isinstance(import_module('mmcv._ext'), StandIn), reason='mmcv has no compiled operators'
)
def test_guard_is_needed(stock, features):
    """If this fails, mmcv handles channels_last and the guard can go."""
    misread = align(features.to(memory_format=torch.channels_last))
    assert (misread - align(features)).abs().max() > 0.1


def test_any_memory_format_with_the_guard(stock, features):
    expected = align(features)
    assert guard_roi_align()
    guarded = FUNCTION.forward
    assert guard_roi_align()
    assert FUNCTION.forward is guarded  # not wrapped twice
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = features.clone().to(memory_format=layout).requires_grad_()
        found = align(given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        (found * torch.arange(found.numel()).view_as(found)).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_gradient_in_channels_last(stock, features):
    """Heads with channels_last weights return such gradients."""
    guard_roi_align()
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = features.clone().requires_grad_()
        found = align(given)
        gradient = torch.arange(found.numel()).view_as(found).float()
        found.backward(gradient.to(memory_format=layout))
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_contiguous_features_are_not_copied(monkeypatch, stock, features):
    seen = []
    monkeypatch.setattr(FUNCTION, 'forward', lambda ctx, input, *args: seen.append(input))
    guard_roi_align()
    FUNCTION.forward(None, features)
    assert seen[0] is features


@pytest.mark.parametrize('missing', ['mmcv', 'mmcv.ops.roi_align'])
def test_without_mmcv_or_its_operators(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == 'mmcv':
        monkeypatch.setattr('mmconv2former.compat.roi_align.find_spec', lambda name: None)
    assert not guard_roi_align()
