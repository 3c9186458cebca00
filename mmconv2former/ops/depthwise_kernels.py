"""Triton kernels for depthwise convolutions: K x K, stride 1, 'same' zero padding, (N, H, W, C).

The next step of a block is computed while the result is in registers (`EPILOGUE`).

Columns and channels are one flattened axis f = w * C + c: no channel count wastes lanes, every load
is contiguous, and a shift by a column of the kernel is a shift by C along f. Sums are in float32
(in float64 for float64 tensors).

- `depthwise_forward_kernel`: a program owns a block of f in `ROWS` output rows and keeps their
  sums in registers. For each column of the kernel it loads `TAPS` weights and each input row once.
  The input gradient is the same kernel with the weights in reverse order.
- `depthwise_weight_gradient_kernel`: a program owns a block of f and `TAPS` x `COLUMNS` weights. It
  walks down its share of the rows with the last `TAPS` rows of the gradient in registers, so that
  it loads each row of the input and of the gradient once. `depthwise_sum` adds the partial sums
  in a fixed order: no atomics, so results are the same in every run.

Kernels with more rows than `TAPS` are split by rows, to fit into the registers. Constants are in
capitals; since C is one of them, the compiler knows how loads are aligned.
"""

# mypy: ignore-errors
# Triton functions have tuples that grow and arguments without Python types.

import triton
import triton.language as tl

from .activation_kernels import gelu, gelu_slope


@triton.jit
def widen(values, ACC: tl.constexpr, PACKED: tl.constexpr):
    """Values in the dtype of the sums.

    A bfloat16 is the upper half of a float32. For two values the compiler needs three instructions,
    this code two.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            'shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=r,=r,r', [values],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return values.to(ACC)


@triton.jit(do_not_specialize=['H', 'W'], do_not_specialize_on_alignment=['bias'])
def depthwise_forward_kernel(
    x, weight, bias, y, kept, other, before, H, W,
    C: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, FLIP: tl.constexpr, ACC: tl.constexpr,
    PACKED: tl.constexpr, EPILOGUE: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_OTHER: tl.constexpr,
    Y_STEP: tl.constexpr, OTHER_STEP: tl.constexpr, BEFORE_STEP: tl.constexpr,
):  # fmt: skip
    """x (N, H, W, C); weight (K, K, C), STEP elements from one (i, j) to the next; bias (C,).

    z is the convolution, which is also stored in `kept` if HAS_KEPT. EPILOGUE selects y:

    - 'none': z
    - 'times': z * other
    - 'plus_gelu': x + GELU(z)
    - 'gelu_backward': (z + other) * GELU'(before), without `other` if there is none

    y, other and before may have more channels: Y_STEP, OTHER_STEP and BEFORE_STEP. Of `other`, the
    last C channels are read, of the two others the first C are written or read.
    """
    P: tl.constexpr = K // 2
    WC = W * C
    blocks = tl.cdiv(WC, BLOCK)
    row_blocks = tl.cdiv(H, ROWS)
    program = tl.program_id(0)
    f = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    h0 = (program % row_blocks) * ROWS
    pixel = ((program // row_blocks).to(tl.int64) * H + h0) * W  # the first of these rows
    first = pixel * C
    c = f % C
    sums = ()
    for _ in tl.static_range(ROWS):
        if HAS_BIAS:
            sums = sums + (tl.load(bias + c).to(ACC),)
        else:
            sums = sums + (tl.zeros((BLOCK,), ACC),)
    for i0 in range(0, K, TAPS):
        for j in range(K):
            taps = ()
            for i in tl.static_range(TAPS):
                tap = (i0 + i) * K + j
                if FLIP:
                    tap = K * K - 1 - tap
                if K % TAPS == 0:
                    loaded = tl.load(weight + tap * STEP + c)
                else:
                    in_kernel = tl.zeros_like(c) + (i0 + i) < K
                    loaded = tl.load(weight + tap * STEP + c, mask=in_kernel, other=0)
                taps = taps + (widen(loaded, ACC, PACKED),)
            g = f + (j - P) * C
            inside = (g >= 0) & (g < WC)
            row = x + (first + (i0 - P) * WC) + g
            for r in tl.static_range(ROWS + TAPS - 1):
                h = h0 + i0 - P + r
                loaded = tl.load(row, mask=inside & (h >= 0) & (h < H), other=0)
                values = widen(loaded, ACC, PACKED)
                row += WC  # cheaper, and with fewer registers, than a product for each row
                updated = ()
                for t in tl.static_range(ROWS):
                    if r - t >= 0 and r - t < TAPS:
                        updated = updated + (sums[t] + values * taps[r - t],)
                    else:
                        updated = updated + (sums[t],)
                sums = updated
    w = f // C
    for t in tl.static_range(ROWS):
        mask = (f < WC) & (h0 + t < H)
        start = first + t * WC
        z = sums[t]
        if EPILOGUE != 'none':
            # Compute with the rounded values that the backward pass will read.
            z = z.to(x.dtype.element_ty).to(ACC)
        if HAS_KEPT:
            tl.store(kept + start + f, z.to(kept.dtype.element_ty), mask=mask)
        if HAS_OTHER:
            place = pixel * OTHER_STEP + (w * OTHER_STEP + c + (OTHER_STEP - C))
            factor = tl.load(other + place, mask=mask, other=0).to(ACC)
        if EPILOGUE == 'times':
            z = z * factor
        if EPILOGUE == 'plus_gelu':
            z = tl.load(x + start + f, mask=mask, other=0).to(ACC) + gelu(z)
        if EPILOGUE == 'gelu_backward':
            if HAS_OTHER:
                z += factor
            place = pixel * BEFORE_STEP + (w * BEFORE_STEP + c)
            z = z * gelu_slope(tl.load(before + place, mask=mask, other=0).to(ACC))
        place = pixel * Y_STEP + (w * Y_STEP + c)
        tl.store(y + place, z.to(y.dtype.element_ty), mask=mask)
        pixel += W


@triton.jit(do_not_specialize=['H', 'W', 'period_blocks', 'rows', 'rows_per_share'])
def depthwise_weight_gradient_kernel(
    x, grad, partial, H, W, period_blocks, rows, rows_per_share,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """x, grad (N, H, W, C) -> partial (shares, K * K + HAS_BIAS, period), bias last.

    A row of f is cut into periods, after which the channels repeat, and a program adds the same
    block of all periods. Shares divide the rows of all periods of all images.
    """
    P: tl.constexpr = K // 2
    SUMS: tl.constexpr = K * K + HAS_BIAS
    COLUMN_GROUPS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TAP_GROUPS: tl.constexpr = (K + TAPS - 1) // TAPS
    WC = W * C
    period = period_blocks * BLOCK
    periods = tl.cdiv(WC, period)
    program = tl.program_id(0)
    lane = (program % period_blocks) * BLOCK + tl.arange(0, BLOCK)
    program = program // period_blocks
    j0 = (program % COLUMN_GROUPS) * COLUMNS
    program = program // COLUMN_GROUPS
    i0 = (program % TAP_GROUPS) * TAPS
    share = program // TAP_GROUPS
    start = share * rows_per_share
    end = tl.minimum(start + rows_per_share, rows)
    sums = ()  # of weight (i0 + k % TAPS, j0 + k // TAPS) at k
    for _ in tl.static_range(TAPS * COLUMNS):
        sums = sums + (tl.zeros((BLOCK,), ACC),)
    bias_sum = tl.zeros((BLOCK,), ACC)
    for column in range(start // H, tl.cdiv(end, H)):  # one period of one image
        h_start = tl.maximum(start - column * H, 0)
        h_end = tl.minimum(end - column * H, H)
        f = (column % periods) * period + lane
        inside = f < WC
        first = ((column // periods).to(tl.int64) * H + h_start) * WC
        # Row h of x meets the rows h + P - i of the gradient, for all i: a window, oldest first.
        g = h_start + P - i0 - (TAPS - 1)
        grad_row = grad + (first + (P - i0 - (TAPS - 1)) * WC) + f
        x_row = x + first + f
        window = ()
        for _ in tl.static_range(TAPS - 1):
            loaded = tl.load(grad_row, mask=inside & (g >= 0) & (g < H), other=0)
            window = window + (widen(loaded, ACC, PACKED),)
            grad_row += WC
            g += 1
        for h0 in range(h_start, h_end, TAPS):
            for r in tl.static_range(TAPS):
                h = h0 + r
                g = h + P - i0
                loaded = tl.load(grad_row, mask=inside & (g >= 0) & (g < H), other=0)
                window = window + (widen(loaded, ACC, PACKED),)
                if HAS_BIAS:  # the gradient of row h itself, if this program has it
                    bias_sum += window[TAPS - 1 - P % TAPS] * (h < h_end).to(ACC)
                for q in tl.static_range(COLUMNS):
                    shift = (j0 + q - P) * C
                    in_row = inside & (f + shift >= 0) & (f + shift < WC)
                    loaded = tl.load(x_row + shift, mask=in_row & (h < h_end), other=0)
                    values = widen(loaded, ACC, PACKED)
                    updated = ()
                    for k in tl.static_range(TAPS * COLUMNS):
                        if k // TAPS == q:
                            updated = updated + (sums[k] + values * window[TAPS - 1 - k % TAPS],)
                        else:
                            updated = updated + (sums[k],)
                    sums = updated
                window = window[1:]
                x_row += WC
                grad_row += WC
    period = period.to(tl.int64)
    partial += share * SUMS * period + lane
    for k in tl.static_range(TAPS * COLUMNS):
        i = i0 + k % TAPS
        j = j0 + k // TAPS
        tl.store(partial + (i * K + j) * period, sums[k], mask=(lane >= 0) & (i < K) & (j < K))
    if HAS_BIAS:
        has_row = (i0 == P // TAPS * TAPS) & (j0 == 0)
        tl.store(partial + K * K * period, bias_sum, mask=(lane >= 0) & has_row)


@triton.jit
def depthwise_sum(
    program, partial, weight_grad, bias_grad, period_blocks, shares,
    C: tl.constexpr, K: tl.constexpr, PERIOD_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial (shares, K * K + HAS_BIAS, period) -> weight_grad (C, 1, K, K), bias_grad (C,).

    A program owns BLOCK channels of one weight of the kernel, or of the bias.
    """
    SUMS: tl.constexpr = K * K + HAS_BIAS
    period = period_blocks * PERIOD_BLOCK  # aligned, which the compiler would not know otherwise
    tap = program % SUMS
    c = (program // SUMS) * BLOCK + tl.arange(0, BLOCK)
    repeats = tl.cdiv(period, C)
    sums = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, shares * repeats, ROWS):
        row = first + tl.arange(0, ROWS)
        share = row // repeats
        lane = (row % repeats)[:, None] * C + c[None, :]
        mask = (share < shares)[:, None] & (c < C)[None, :] & (lane < period)
        row_start = (share.to(tl.int64) * SUMS + tap) * period
        sums += tl.load(partial + row_start[:, None] + lane, mask=mask, other=0)
    total = tl.sum(sums, 0)
    if HAS_BIAS:
        tl.store(bias_grad + c, total.to(bias_grad.dtype.element_ty), mask=(c < C) & (tap == K * K))
    tl.store(
        weight_grad + c * (K * K) + tap,
        total.to(weight_grad.dtype.element_ty),
        mask=(c < C) & (tap < K * K),
    )


@triton.jit(do_not_specialize=['period_blocks', 'shares'])
def depthwise_sum_kernel(
    partial, weight_grad, bias_grad, period_blocks, shares,
    C: tl.constexpr, K: tl.constexpr, PERIOD_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`depthwise_sum` alone; a block's gradients have it in `finish_kernel`."""
    depthwise_sum(
        tl.program_id(0), partial, weight_grad, bias_grad, period_blocks, shares, C, K,
        PERIOD_BLOCK, ROWS, BLOCK, HAS_BIAS, ACC,
    )  # fmt: skip
