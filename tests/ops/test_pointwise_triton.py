"""1x1 convolutions by Triton's kernel against float64: on a GPU or interpreted."""

import math

import pytest
import torch
import torch.nn.functional as F
from common.launches import replaced
from helpers.comparisons import relative_error

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')

# ruff: noqa: E402
from mmconv2former.ops import block_stock, block_triton, pointwise_triton
from mmconv2former.ops.pointwise_triton import Tile, most_positions, multiply, tile_for

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
# Of a result rounded to the dtype; the interpreter truncates to bfloat16 instead of rounding.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 6e-4}
# N, H, W, and channels of input and result: whole tiles, parts of tiles, several of each
SIZES = [((1, 8, 16), 64, 64), ((2, 5, 7), 72, 144), ((1, 3, 1), 264, 8), ((3, 9, 5), 16, 200)]


def normal(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.fixture(params=[None, Tile(32, 64, 32, 2, 4)], ids=['tile of the network', 'small tile'])
def tile(request):
    with replaced(pointwise_triton, tile_for=lambda *args: request.param or tile_for(*args)):
        yield


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('positions', 'c_in', 'c_out'), SIZES)
def test_products(positions, c_in, c_out, dtype, tile):
    torch.manual_seed(0)
    x, weight = normal(*positions, c_in, dtype=dtype), normal(c_out, c_in, dtype=dtype)
    bias = normal(c_out, dtype=dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = block_triton.pointwise_conv(x, weight, bias)
    assert found.dtype == dtype
    assert relative_error(found.double(), expected) < TOLERANCE[dtype]
    expected = found.double() @ weight.double()
    found = block_triton.pointwise_input_gradient(found, weight)
    assert relative_error(found.double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('channels', [8, 72, 144])
def test_gelu_of_some_channels(channels, dtype, tile):
    """It is that of the rounded result, which the backward pass reads; the rest is not written."""
    torch.manual_seed(0)
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in [(2, 5, 7, 72), (144, 72), (144,)])
    y, active = block_triton.pointwise_gelu(x, weight, bias, channels, True)
    assert torch.equal(y, block_triton.pointwise_conv(x, weight, bias))
    assert active.shape == (2, 5, 7, channels)
    assert active.is_contiguous()
    expected = F.gelu(y[..., :channels].double())
    assert relative_error(active.double(), expected) < TOLERANCE[dtype]
    if dtype == torch.float16:  # which the interpreter rounds
        before = y[..., :channels]
        differs = active != F.gelu(before.float()).to(dtype)
        assert differs[before > 0.5].float().mean() < 0.01  # 0.09 from the result before rounding
    none, alone = block_triton.pointwise_gelu(x, weight, bias, channels, False)
    assert none is None
    assert torch.equal(alone, active)


def test_what_has_no_kernel():
    """Large products, channels that it cannot read 16 bytes at a time, and other dtypes."""
    assert most_positions(torch.bfloat16, 288, 1152) == 2**32 // 288 // 1152
    assert most_positions(torch.bfloat16, 288, 72, True) == math.inf
    assert most_positions(torch.bfloat16, 72, 288) == math.inf
    assert most_positions(torch.bfloat16, 72, 288, True) < math.inf
    assert most_positions(torch.bfloat16, 72, 284) == 0
    assert most_positions(torch.float32, 72, 288) == 0
    for dtype, channels, c_out in [(torch.float64, 16, 24), (torch.bfloat16, 12, 20)]:
        x, weight = normal(1, 3, 2, channels, dtype=dtype), normal(c_out, channels, dtype=dtype)
        bias = normal(c_out, dtype=dtype)
        for stock, ours in zip(
            block_stock.pointwise_gelu(x, weight, bias, 8, True),
            block_triton.pointwise_gelu(x, weight, bias, 8, True),
        ):
            torch.testing.assert_close(ours, stock)
        grad = normal(1, 3, 2, c_out, dtype=dtype)
        torch.testing.assert_close(
            block_triton.pointwise_input_gradient(grad, weight),
            block_stock.pointwise_input_gradient(grad, weight),
        )


def test_large_products_are_left_to_torch(monkeypatch):
    """One position more than the kernel takes."""
    x, weight = normal(1, 2, 3, 16, dtype=torch.float16), normal(24, 16, dtype=torch.float16)
    bias, calls = normal(24, dtype=torch.float16), []
    monkeypatch.setattr(pointwise_triton, 'multiply', lambda *args: calls.append(args))
    for most in (6, 5):
        with replaced(pointwise_triton, most_positions=lambda *args, most=most: most):
            block_triton.pointwise_conv(x, weight, bias)
            block_triton.pointwise_gelu(x, weight, bias, 8, True)
            block_triton.pointwise_input_gradient(normal(1, 2, 3, 24, dtype=torch.float16), weight)
        assert len(calls) == 3


@pytest.mark.parametrize('c_in', [16, 128, 136, 256, 264, 3072])
@pytest.mark.parametrize('has_gelu', [False, True])
def test_tiles_fit_into_every_gpu(c_in, has_gelu):
    """GPUs of capability 8.6 and 8.9 have 99 KiB of shared memory for a program."""
    rows, columns, block, stages, _ = tile_for(c_in, has_gelu)
    assert 2 * (rows + columns) * block * stages <= 99 * 2**10


def test_nothing_is_written_beyond_the_results():
    x, weight = normal(1, 3, 3, 16, dtype=torch.float16), normal(24, 16, dtype=torch.float16)
    bias = normal(24, dtype=torch.float16)
    memory = torch.full((2, 3, 9, 24), 7.0, device=DEVICE, dtype=torch.float16)
    y, active = memory[0, 1].view(1, 3, 3, 24), memory[1, 1].view(-1)[:72].view(1, 3, 3, 8)
    multiply(x, weight, bias, y, active)
    assert not (y == 7).any()
    assert not (active == 7).any()
    memory[0, 1] = 7
    active.fill_(7)
    assert (memory == 7).all()
