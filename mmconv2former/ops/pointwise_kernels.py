"""A Triton kernel for 1x1 convolutions in half precision, with GELU of the result."""

# mypy: ignore-errors
# Triton's functions have arguments without Python types.

import triton
import triton.language as tl

from .activation_kernels import gelu


@triton.jit(do_not_specialize=['positions'])
def pointwise_kernel(
    x, weight, bias, y, active, positions,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ACTIVE: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Y: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y (positions, C_OUT) = x (positions, C_IN) times the weight, plus the bias.

    A program computes ROWS x COLUMNS of y and adds up products of BLOCK input channels at a time.
    The weight is (C_OUT, C_IN) or, if it is TRANSPOSED, (C_IN, C_OUT). `active` (positions, ACTIVE)
    gets GELU of the first ACTIVE channels of y, as y is rounded.
    """
    dtype = x.dtype.element_ty
    TILES: tl.constexpr = (C_OUT + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    # Programs beside each other read the same rows of x.
    row = (tile // TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile % TILES * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, BLOCK)
    has_row, has_column = row[:, None] < positions, column[None, :] < C_OUT
    of_x = x + row[:, None] * C_IN + inner[None, :]
    STEP_IN: tl.constexpr = C_OUT if TRANSPOSED else 1
    STEP_OUT: tl.constexpr = 1 if TRANSPOSED else C_IN
    of_weight = weight + inner[:, None] * STEP_IN + column[None, :] * STEP_OUT
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for first in tl.range(0, C_IN, BLOCK, num_stages=STAGES):
        rest = C_IN - first
        a = tl.load(of_x + first, mask=has_row & (inner[None, :] < rest), other=0)
        b = tl.load(of_weight + first * STEP_IN, mask=(inner[:, None] < rest) & has_column, other=0)
        if WIDEN:  # Triton's interpreter misreads products of bfloat16
            a, b = a.to(ACC), b.to(ACC)
        total = tl.dot(a, b, total)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < C_OUT, other=0).to(ACC)[None, :]
    rounded = total.to(dtype)
    if HAS_Y:
        tl.store(y + row[:, None] * C_OUT + column[None, :], rounded, mask=has_row & has_column)
    if ACTIVE > 0:  # noqa: SIM102 (known to the compiler)
        if tile % TILES * COLUMNS < ACTIVE:
            tl.store(
                active + row[:, None] * ACTIVE + column[None, :], gelu(rounded.to(ACC)).to(dtype),
                mask=has_row & (column[None, :] < ACTIVE),
            )  # fmt: skip
