"""The fast weight gradient against autograd of the stock operator, and the rule that chooses it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmconv2former.depthwise import DepthwiseConv, has_fast_weight_gradient, weight_gradient


def stock_gradients(x, weight, bias, grad):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    padding, groups = weight.shape[-1] // 2, weight.shape[0]
    F.conv2d(*inputs, padding=padding, groups=groups).backward(grad)
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize('kernel_size', [3, 5, 7, 9, 11, 15, 21, 31])
@pytest.mark.parametrize('shape', [(2, 3, 8, 8), (1, 4, 1, 1), (3, 2, 17, 5), (2, 2, 33, 40)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_weight_gradient_equals_autograd(kernel_size, shape, memory_format):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double).contiguous(memory_format=memory_format)
    grad = torch.randn(shape, dtype=torch.double)
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size, dtype=torch.double)
    _, expected, _ = stock_gradients(x, weight, weight[:, 0, 0, 0], grad)
    torch.testing.assert_close(weight_gradient(x, grad, kernel_size), expected)


@pytest.mark.parametrize('shape', [(2, 160, 12, 12), (1, 64, 7, 9), (3, 256, 4, 4)])
@pytest.mark.parametrize('kernel_size', [9, 11, 13])
def test_module_equals_the_stock_convolution(shape, kernel_size):
    torch.manual_seed(0)
    conv = DepthwiseConv(shape[1], kernel_size)
    nn.init.normal_(conv.bias)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert has_fast_weight_gradient(x, conv.weight)
    grad = torch.randn(shape)
    output = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, nn.Conv2d.forward(conv, x))
    output.backward(grad)
    expected = stock_gradients(x, conv.weight, conv.bias, grad)
    for value, reference in zip((x.grad, conv.weight.grad, conv.bias.grad), expected):
        assert (value - reference).norm() < 1e-5 * reference.norm()


def test_input_that_needs_no_gradient():
    conv = DepthwiseConv(64, 11)
    conv(torch.randn(1, 8, 8, 64)).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_the_rule():
    x, weight = torch.zeros(1, 64, 8, 8), nn.Parameter(torch.zeros(64, 1, 11, 11))
    assert has_fast_weight_gradient(x, weight)
    assert not has_fast_weight_gradient(torch.zeros(1, 64, 16, 16), weight)  # a large map
    assert not has_fast_weight_gradient(x, nn.Parameter(weight[..., :7, :7]))  # a small kernel
    assert not has_fast_weight_gradient(x, weight.detach())  # frozen
    assert not has_fast_weight_gradient(x.double(), weight)
    assert not has_fast_weight_gradient(x.to('meta'), weight)
    with torch.autocast('cpu', torch.bfloat16):
        assert not has_fast_weight_gradient(x, weight)
