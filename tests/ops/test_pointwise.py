"""1x1 convolutions by both operators: the same values and gradients, chosen as the rule says."""

import pytest
import torch
import torch.nn.functional as F
from helpers.comparisons import loss_of, randomized

from mmconv2former import Conv2Former
from mmconv2former.ops import pointwise
from mmconv2former.ops.pointwise import (
    is_convolution,
    pointwise_conv,
    pointwise_input_gradient,
    pointwise_weight_gradients,
)


def operands(shape, channels_out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (channels_out, shape[-1]), (channels_out,)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize('by_convolution', [False, True])
@pytest.mark.parametrize('shape', [(2, 5, 7, 12), (1, 1, 1, 3), (3, 1, 9, 1)])
@pytest.mark.parametrize('channels_out', [1, 6])
def test_values_and_gradients(by_convolution, shape, channels_out, monkeypatch):
    monkeypatch.setattr(pointwise, 'is_convolution', lambda x: by_convolution)
    x, weight, bias = operands(shape, channels_out, torch.double)
    expected = torch.einsum('nhwc,oc->nhwo', x, weight) + bias
    output = pointwise_conv(x, weight, bias)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (weight, bias, x), grad)
    found = *pointwise_weight_gradients(grad, x), pointwise_input_gradient(grad, weight)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(output, (weight, bias, x), grad), wanted)


@pytest.mark.parametrize('recompute', ['nothing', 'expansion'])
def test_network_is_the_same_by_both(recompute, monkeypatch):
    results = []
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).double()
    for by_convolution in (False, True):
        monkeypatch.setattr(pointwise, 'is_convolution', lambda x, by=by_convolution: by)
        arch = dict(channels=(8, 12), depths=(1, 1), kernel_size=3)
        model = randomized(Conv2Former(arch, out_indices=(0, 1), recompute=recompute).double())
        outputs = model(x)
        loss_of(outputs).backward()
        results.append((outputs, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_the_rule():
    x = torch.zeros(1, 4, 4, 8)
    assert is_convolution(x) == torch.backends.mkldnn.is_available()
    for other in (x.double(), x.to('meta'), x[0]):
        assert not is_convolution(other)
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_convolution(x)


def test_traced_graphs_have_linear_layers():
    """Every runtime optimises a matrix product on the last axis."""
    traced = torch.jit.trace(pointwise_conv, operands((1, 4, 4, 8), 6))
    assert 'aten::linear' in str(traced.graph)
    x, weight, bias = operands((2, 3, 5, 8), 6)
    torch.testing.assert_close(traced(x, weight, bias), F.linear(x, weight, bias))
