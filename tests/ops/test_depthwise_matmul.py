"""The weight gradient by matrix products against autograd, and the rule that chooses it."""

import pytest
import torch
from helpers.depthwise import stock
from helpers.half_precision import HALF_DTYPES
from torch import nn

from mmconv2former.ops import DepthwiseConv, depthwise, depthwise_matmul
from mmconv2former.ops.depthwise import choose
from mmconv2former.ops.depthwise_matmul import weight_gradient


# `cache_bytes` has it handle all channels of an image at once, some, or one by one.
@pytest.mark.parametrize(
    ('shape', 'kernel_size', 'cache_bytes'),
    [((2, 3, 8, 8), 31, 2**22), ((1, 4, 1, 1), 3, 2**22), ((3, 2, 17, 5), 7, 2**22),
     ((2, 2, 33, 40), 11, 2**22), ((2, 7, 20, 9), 11, 3000), ((2, 7, 20, 9), 5, 1)],
)  # fmt: skip
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_weight_gradient_equals_autograd(
    shape, kernel_size, cache_bytes, memory_format, monkeypatch
):
    monkeypatch.setattr(depthwise_matmul, 'CACHE_BYTES', cache_bytes)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double).contiguous(memory_format=memory_format)
    grad = torch.randn(shape, dtype=torch.double)
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size, dtype=torch.double)
    channels_last = (tensor.permute(0, 2, 3, 1) for tensor in (x, grad))
    _, _, expected, _ = stock(*channels_last, weight, weight[:, 0, 0, 0])
    torch.testing.assert_close(weight_gradient(x, grad, kernel_size), expected)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_half_precision(dtype, monkeypatch):
    """Not chosen there, but right if a user asks for it; and without the input's gradient."""
    monkeypatch.setattr(depthwise, 'setting', 'matmul')
    torch.manual_seed(0)
    conv = DepthwiseConv(6, 11).to(dtype)
    x, grad = (torch.randn(2, 20, 24, 6).to(dtype) for _ in range(2))
    conv(x).backward(grad)
    _, _, *expected = stock(*(tensor.float() for tensor in (x, grad, conv.weight, conv.bias)))
    for value, reference in zip((conv.weight.grad, conv.bias.grad), expected):
        assert (value.float() - reference).norm() < 0.02 * reference.norm()


def zeros(channels, side):
    return torch.zeros(1, side, side, channels)


def kernel(channels, size):
    return nn.Parameter(torch.zeros(channels, 1, size, size))


def test_the_rule():
    for channels, side, size, expected in [
        (8, 64, 3, False), (72, 128, 5, False), (512, 64, 5, False),
        (8, 64, 7, True), (8, 32, 7, False), (512, 32, 7, False),
        (72, 56, 9, True), (72, 32, 9, False), (288, 32, 9, True), (512, 4, 9, True),
        (72, 56, 11, True), (72, 32, 11, False), (144, 16, 11, False), (288, 14, 11, True),
        (72, 32, 13, True), (72, 24, 13, False), (512, 4, 13, False), (72, 32, 31, True),
    ]:  # fmt: skip
        chosen = choose(zeros(channels, side), kernel(channels, size))
        assert chosen == ('matmul' if expected else 'stock'), (channels, side, size)


def test_where_nothing_was_measured_the_stock_operator_stays(monkeypatch):
    x, weight = zeros(72, 64), kernel(72, 11)
    assert choose(x, weight) == 'matmul'
    assert choose(x, weight.detach()) == 'stock'  # frozen
    assert choose(x.double(), weight) == 'stock'
    assert choose(x.to('meta'), weight.to('meta')) == 'stock'
    with torch.autocast('cpu', torch.bfloat16):
        assert choose(x, weight) == 'stock'
    for setting in ('stock', 'matmul'):
        monkeypatch.setattr(depthwise, 'setting', setting)
        assert choose(x.double(), weight) == setting
