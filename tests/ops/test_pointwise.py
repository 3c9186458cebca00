"""1x1 convolutions by both operators: the same values and gradients, chosen as the rule says."""

import pytest
import torch
import torch.nn.functional as F
from helpers.comparisons import SMALL_ARCHS, loss_of, randomized

from mmconv2former import Conv2Former
from mmconv2former.ops import pointwise as module
from mmconv2former.ops.pointwise import (
    is_convolution,
    product,
    product_gradient,
    product_input_gradient,
)


def operands(shape, channels_out, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(channels_out, shape[-1], dtype=dtype)
    return x, weight, torch.randn(channels_out, dtype=dtype)


@pytest.mark.parametrize('method', ['linear', 'convolution'])
@pytest.mark.parametrize('shape', [(2, 5, 7, 12), (1, 1, 1, 3), (3, 1, 9, 1), (1, 8, 8, 64)])
@pytest.mark.parametrize('channels_out', [1, 6, 64])
def test_values_and_gradients(method, shape, channels_out, monkeypatch):
    monkeypatch.setattr(module, 'product_method', method)
    x, weight, bias = (
        tensor.requires_grad_() for tensor in operands(shape, channels_out, torch.double)
    )
    expected = torch.einsum('nhwc,oc->nhwo', x, weight) + bias
    output = product(x, weight, bias)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (weight, bias, x), grad)
    grad_weight, grad_bias = product_gradient(grad, x.detach())
    grad_x = product_input_gradient(grad, weight.detach())
    torch.testing.assert_close((grad_weight, grad_bias, grad_x), wanted)
    torch.testing.assert_close(torch.autograd.grad(output, (weight, bias, x), grad), wanted)


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise', 'expansion'])
def test_network_is_the_same_by_both(recompute, monkeypatch):
    results = []
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    for method in ('linear', 'convolution'):
        monkeypatch.setattr(module, 'product_method', method)
        model = randomized(Conv2Former(SMALL_ARCHS['narrow'], recompute=recompute).double())
        outputs = model(x)
        loss_of(outputs).backward()
        results.append((outputs, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_the_rule(monkeypatch):
    x = torch.zeros(1, 4, 4, 8)
    assert is_convolution(x) == torch.backends.mkldnn.is_available()
    assert not is_convolution(x.double())
    assert not is_convolution(x.to('meta'))
    assert not is_convolution(x[0])  # no image
    with torch.autocast('cpu', torch.bfloat16):
        assert not is_convolution(x)
    monkeypatch.setattr(module, 'product_method', 'linear')
    assert not is_convolution(x)
    monkeypatch.setattr(module, 'product_method', 'convolution')
    assert is_convolution(x.double())


def test_traced_graphs_have_stock_products():
    """An exported product of the last axis is one that every runtime optimises."""
    traced = torch.jit.trace(product, operands((1, 4, 4, 8), 6))
    assert 'aten::linear' in str(traced.graph)
    x, weight, bias = operands((2, 3, 5, 8), 6)
    torch.testing.assert_close(traced(x, weight, bias), F.linear(x, weight, bias))
