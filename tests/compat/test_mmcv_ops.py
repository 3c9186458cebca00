"""The stand-in for mmcv's compiled operators against these, or against plain loops and formulas."""

import importlib.machinery
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('torchvision')
pytest.importorskip('mmcv.ops')  # the network alone needs no mmcv (docs/compatibility.md)

from helpers.in_process import run_python
from helpers.mmcv_ops_cases import REFERENCE, boxes, cases, operators, random, with_gradients

from mmconv2former.compat import mmcv_ops
from mmconv2former.compat.mmcv_ops import StandIn

CASES = dict(cases())
STAND_IN = StandIn('stand_in')
IS_COMPILED = (
    importlib.machinery.PathFinder.find_spec('mmcv._ext', sys.modules['mmcv'].__path__) is not None
)


@pytest.fixture(scope='module')
def reference():
    arrays = {}
    for key, value in np.load(REFERENCE).items():
        arrays.setdefault(key.rpartition('/')[0], []).append(torch.from_numpy(value))
    return arrays


def assert_close(found, expected):
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_equals_the_stored_results_of_compiled_operators(name, reference):
    with operators(STAND_IN):
        assert_close(CASES[name](), reference[name])


def test_every_case_has_a_stored_result(reference):
    assert set(reference) == set(CASES)


@pytest.mark.skipif(
    not IS_COMPILED, reason='mmcv has no compiled operators (make compatibility has)'
)
@pytest.mark.parametrize('name', CASES)
def test_equals_the_compiled_operators(name):
    expected = CASES[name]()
    with operators(STAND_IN):
        assert_close(CASES[name](), expected)


# --------------------------------------------------- operators that mmcv does not compile for CPUs
def focal_loss(x, target, gamma, alpha, weight):
    p = x.sigmoid()
    one_hot = F.one_hot(target, x.shape[1] + 1)[:, :-1]
    at = p * one_hot + (1 - p) * (1 - one_hot)
    factor = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    loss = (
        factor
        * (1 - at) ** gamma
        * F.binary_cross_entropy_with_logits(x, one_hot.to(x), reduction='none')
    )
    return loss if weight is None else loss * weight[target.clamp(max=3)][:, None]


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_gradient_of_focal_loss_where_probabilities_are_rounded(gamma):
    from mmcv.ops import sigmoid_focal_loss

    x = torch.tensor([-100.0, -20, 17, 20, 80])[:, None].repeat(2, 1).requires_grad_()
    target = torch.tensor([0, 1]).repeat_interleave(5)  # the class, and background
    with operators(STAND_IN):
        sigmoid_focal_loss(x, target, gamma, 0.25, None, 'sum').backward()
    exact = x.detach().double().requires_grad_()
    p, rest = exact.sigmoid(), (-exact).sigmoid()
    loss = torch.where(
        target[:, None] == 0,
        -0.25 * rest**gamma * F.logsigmoid(exact),
        -0.75 * p**gamma * F.logsigmoid(-exact),
    )
    (expected,) = torch.autograd.grad(loss.sum(), exact)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('weight', [None, torch.tensor([0.5, 1.0, 2.0, 4.0])])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_focal_loss(reduction, weight):
    from mmcv.ops import sigmoid_focal_loss

    x = random(10, 4, seed=0)
    target = torch.arange(10) % 5  # 4 is background

    def reduce(loss):
        return {'none': loss, 'mean': loss.sum() / len(x), 'sum': loss.sum()}[reduction]

    with operators(STAND_IN):
        found = with_gradients(
            lambda x: sigmoid_focal_loss(x, target, 1.5, 0.3, weight, reduction), x
        )
    assert_close(
        found, with_gradients(lambda x: reduce(focal_loss(x, target, 1.5, 0.3, weight)), x)
    )


def test_multi_scale_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes = torch.tensor([[4, 5], [2, 3]])
    value = random(2, 26, 2, 3, seed=0)
    locations = random(2, 7, 2, 2, 4, 2, seed=1).sigmoid() * 1.2 - 0.1  # some outside
    weights = random(2, 7, 2, 2, 4, seed=2).sigmoid()

    def loops(value, locations, weights):
        output = value.new_zeros(2, 7, 2, 3)
        for level, (start, (height, width)) in enumerate(zip((0, 20), shapes.tolist())):
            levels = value[:, start : start + height * width].view(2, height, width, 2, 3)
            for n, q, h, p in np.ndindex(2, 7, 2, 4):
                x, y = locations[n, q, h, level, p] * torch.tensor([width, height]) - 0.5
                for row in (y.floor(), y.floor() + 1):
                    for column in (x.floor(), x.floor() + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                            sample = levels[n, int(row), int(column), h]
                            output[n, q, h] += weights[n, q, h, level, p] * share * sample
        return output.flatten(2)

    def function(value, locations, weights):
        starts = torch.tensor([0, 20])
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    with operators(STAND_IN):
        found = with_gradients(function, value, locations, weights)
    assert_close(found, with_gradients(loops, value, locations, weights))


# -------------------------------------------------------------------------------- dtypes and layout
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last(dtype):
    """Close to float32, and layouts are read as they are: mmcv's own RoIAlign misreads them."""
    from mmcv.ops import nms, roi_align

    x = random(2, 3, 12, 16, seed=0).to(dtype)
    rois = torch.cat([torch.tensor([[0.0], [1]]), boxes(2, 30, seed=1)], 1)
    found = boxes(20, 40, seed=2)
    with operators(STAND_IN):
        expected = with_gradients(lambda x: roi_align(x, rois, 3, 0.3, 2, 'avg', True), x.float())
        last = x.contiguous(memory_format=torch.channels_last)
        half = with_gradients(
            lambda x: roi_align(x, rois.to(dtype).float(), 3, 0.3, 2, 'avg', True).float(), last
        )
        for value, wanted in zip(half, expected):
            torch.testing.assert_close(value.float(), wanted, rtol=0.1, atol=0.1)
        scores = torch.linspace(0, 1, 20)
        assert len(nms(found.to(dtype), scores.to(dtype), 0.5)[1])


# ------------------------------------------------------------------------------------- installation
def test_other_operators_say_how_to_get_them():
    from mmcv.ops import roi_align

    with pytest.raises(
        NotImplementedError, match=r'box_iou_rotated has no replacement. Compile them'
    ):
        STAND_IN.box_iou_rotated()
    with (
        operators(STAND_IN),
        pytest.raises(NotImplementedError, match="RoIAlign with pool_mode='max' has no"),
    ):
        roi_align(torch.ones(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 0, 'max')


WITHOUT = """
import sys, types
from importlib.machinery import PathFinder
original = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
    {spec} if name == 'mmcv._ext' else original(name, path, target)
)
import mmconv2former
from mmcv import ops
from mmcv.ops.nms import ext_module
print(type(ext_module).__name__)
"""
BROKEN = "__import__('importlib.util').util.spec_from_file_location('mmcv._ext', '{path}')"


def test_takes_the_place_of_missing_operators():
    printed, warning = run_python(WITHOUT.format(spec=None), errors=True)
    assert printed == 'StandIn\n'
    assert warning == (
        "mmcv has no compiled operators: using torchvision's and PyTorch's (docs/installation.md)\n"
    )


def test_one_process_of_a_machine_says_so(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert run_python(WITHOUT.format(spec=None), errors=True) == ('StandIn\n', '')


def test_takes_the_place_of_operators_that_do_not_load(tmp_path):
    """As those compiled for another torch."""
    path = tmp_path / '_ext.so'
    path.write_bytes(b'')
    printed, warning = run_python(WITHOUT.format(spec=BROKEN.format(path=path)), errors=True)
    assert printed == 'StandIn\n'
    assert warning.startswith("mmcv's compiled operators do not load (")


@pytest.mark.skipif(
    not IS_COMPILED, reason='mmcv has no compiled operators (make compatibility has)'
)
def test_compiled_operators_are_used():
    code = 'import mmconv2former; import mmcv._ext; print(mmcv._ext.__file__)'
    printed, warning = run_python(code, errors=True)
    assert printed.endswith('.so\n')
    assert 'mmcv' not in warning


def test_installing_again_has_no_effect():
    before = len(sys.meta_path)
    mmcv_ops.install()
    mmcv_ops.install()
    assert len(sys.meta_path) <= before + 1
