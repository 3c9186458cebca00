"""Triton kernels that fold the affine parts around a 1x1 convolution into it, and unfold gradients.

For weight (rows, columns) and bias (rows,), with `scale_in`, `shift_in` (columns,) of the LayerNorm
before it and `scale_out` (rows,) of the layer scale after it:

    folded weight = scale_out * weight * scale_in
    folded bias = scale_out * (bias + weight @ shift_in)
"""

# mypy: ignore-errors
# Triton's functions have arguments without Python types.

import triton
import triton.language as tl

from .depthwise_kernels import depthwise_sum


@triton.jit
def fold_kernel(
    tasks, units, folded,
    TASK: tl.constexpr, HAS_UNITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Folds ROWS rows of a weight; `tasks` (programs, TASK) tells each program which rows.

    A task is: addresses of weight, bias, scale_in, shift_in, scale_out (0 for none), first row,
    rows, columns, the offsets of folded weight and bias in `folded`, and that of the unit in
    `units` by which scale_out is divided.
    """
    task = tasks + tl.program_id(0) * TASK
    weight = tl.load(task).to(tl.pointer_type(DTYPE))
    bias = tl.load(task + 1).to(tl.pointer_type(DTYPE))
    scale_in = tl.load(task + 2).to(tl.pointer_type(DTYPE))
    shift_in = tl.load(task + 3).to(tl.pointer_type(DTYPE))
    has_in = tl.load(task + 2) != 0
    scale_out = tl.load(task + 4).to(tl.pointer_type(DTYPE))
    has_out = tl.load(task + 4) != 0
    first = tl.load(task + 5).to(tl.int32)
    rows = tl.load(task + 6).to(tl.int32)
    columns = tl.load(task + 7).to(tl.int32)
    folded_weight = folded + tl.load(task + 8)
    folded_bias = folded + tl.load(task + 9)
    row = first + tl.arange(0, ROWS)
    in_rows = row < rows
    scaled_rows = in_rows & has_out
    factor = tl.where(scaled_rows, tl.load(scale_out + row, mask=scaled_rows, other=0).to(ACC), 1)
    if HAS_UNITS:
        factor = factor / tl.load(units + tl.load(task + 10), mask=has_out, other=1).to(ACC)
    shift = tl.zeros((ROWS,), ACC)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        in_columns = column < columns
        mask = in_rows[:, None] & in_columns[None, :]
        place = row[:, None] * columns + column[None, :]
        values = tl.load(weight + place, mask=mask, other=0).to(ACC)
        beta = tl.load(shift_in + column, mask=in_columns & has_in, other=0).to(ACC)
        gamma = tl.load(scale_in + column, mask=in_columns & has_in, other=0).to(ACC)
        gamma = tl.where(in_columns & has_in, gamma, 1)
        shift += tl.sum(values * beta[None, :], 1)
        values = values * gamma[None, :] * factor[:, None]
        tl.store(folded_weight + place, values.to(folded.dtype.element_ty), mask=mask)
    values = (tl.load(bias + row, mask=in_rows, other=0).to(ACC) + shift) * factor
    tl.store(folded_bias + row, values.to(folded.dtype.element_ty), mask=in_rows)


@triton.jit
def sum_of_shares(partial, shares, column, mask, N: tl.constexpr, BLOCK: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """Sums of some columns of partial (shares, N), in a fixed order."""
    total = tl.zeros((BLOCK, column.shape[0]), ACC)
    for start in range(0, shares, BLOCK):
        share = start + tl.arange(0, BLOCK)
        place = share[:, None] * N + column[None, :]
        total += tl.load(partial + place, mask=(share < shares)[:, None] & mask[None, :], other=0)
    return tl.sum(total, 0)


@triton.jit
def unfold_rows(
    program, grad, bias_shares, shares, weight, bias, scale, grad_weight,
    N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients for weight, bias and the scale after them, from those of the folded ones.

    grad, weight (N, COLUMNS), bias and scale (N,); the gradient of the folded bias is the sum of
    `bias_shares` (shares, N). The gradients of weight, bias and scale are stored one after the
    other. A program owns ROWS rows.
    """
    row = program * ROWS + tl.arange(0, ROWS)
    in_rows = row < N
    factor = tl.load(scale + row, mask=in_rows, other=0).to(ACC)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = in_rows[:, None] & (column < COLUMNS)[None, :]
        place = row[:, None] * COLUMNS + column[None, :]
        values = tl.load(grad + place, mask=mask, other=0).to(ACC)
        total += values * tl.load(weight + place, mask=mask, other=0).to(ACC)
        values = values * factor[:, None]
        tl.store(grad_weight + place, values.to(grad_weight.dtype.element_ty), mask=mask)
    of_bias = sum_of_shares(bias_shares, shares, row, in_rows, N, 2048 // ROWS, ACC)
    of_scale = tl.sum(total, 1) + of_bias * tl.load(bias + row, mask=in_rows, other=0).to(ACC)
    values = of_bias * factor
    grad_bias = grad_weight + N * COLUMNS
    tl.store(grad_bias + row, values.to(grad_weight.dtype.element_ty), mask=in_rows)
    tl.store(grad_bias + N + row, of_scale.to(grad_weight.dtype.element_ty), mask=in_rows)


@triton.jit
def unfold_columns(
    program, grad, bias_shares, shares, weight, scale, shift, grad_weight, partial,
    N: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, SHARE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients for a weight, its bias, and the scale and shift before them, from the folded ones.

    grad, weight (N, C); the gradient of the bias is the sum of N columns of `bias_shares`
    (shares, STRIDE). The gradients of weight and bias are stored one after the other. A program
    owns BLOCK columns of SHARE rows; its sums for scale and shift go to its row of `partial`, STEP
    elements a row.
    """
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    column = program % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_columns = column < C
    share = program // COLUMN_BLOCKS
    gamma = tl.load(scale + column, mask=in_columns, other=0).to(ACC)
    beta = tl.load(shift + column, mask=in_columns, other=0).to(ACC)
    of_scale = tl.zeros((ROWS, BLOCK), ACC)
    of_shift = tl.zeros((ROWS, BLOCK), ACC)
    first = share * SHARE
    for start in range(0, SHARE, ROWS):
        local = start + tl.arange(0, ROWS)
        row = first + local
        in_rows = (row < N) & (local < SHARE)
        mask = in_rows[:, None] & in_columns[None, :]
        place = row[:, None] * C + column[None, :]
        values = tl.load(grad + place, mask=mask, other=0).to(ACC)
        of_bias = sum_of_shares(bias_shares, shares, row, in_rows, STRIDE, 2048 // ROWS, ACC)
        tl.store(
            grad_weight + N * C + row, of_bias.to(grad_weight.dtype.element_ty),
            mask=in_rows & (program % COLUMN_BLOCKS == 0),
        )  # fmt: skip
        of_bias = of_bias[:, None]
        plain = tl.load(weight + place, mask=mask, other=0).to(ACC)
        of_scale += values * plain
        of_shift += of_bias * plain
        values = values * gamma[None, :] + of_bias * beta[None, :]
        tl.store(grad_weight + place, values.to(grad_weight.dtype.element_ty), mask=mask)
    sums = partial + share * STEP + column
    tl.store(sums, tl.sum(of_scale, 0), mask=in_columns)
    tl.store(sums + C, tl.sum(of_shift, 0), mask=in_columns)


@triton.jit(
    do_not_specialize=['pair_shares', 'proj_shares', 'fc1_shares', 'fc2_shares'],
    do_not_specialize_on_alignment=[
        'gate_weight', 'value_weight', 'proj_weight', 'proj_bias', 'scale_1', 'fc1_weight',
        'fc2_weight', 'fc2_bias', 'scale_2', 'norm_1_weight', 'norm_1_bias', 'norm_2_weight',
        'norm_2_bias',
    ],
)  # fmt: skip
def unfold_kernel(
    pair, pair_bias, proj, proj_folded_bias, fc1, fc1_bias, fc2, fc2_folded_bias,
    gate_weight, value_weight, proj_weight, proj_bias, scale_1, fc1_weight, fc2_weight, fc2_bias,
    scale_2, norm_1_weight, norm_1_bias, norm_2_weight, norm_2_bias, grads, partial,
    pair_shares, proj_shares, fc1_shares, fc2_shares,
    C: tl.constexpr, E: tl.constexpr, GATE: tl.constexpr, VALUE: tl.constexpr, PROJ: tl.constexpr,
    FC1: tl.constexpr, FC2: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SHARE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of everything folded in a block, from those of the folded weights and biases.

    The arguments are the gradients of the folded weights (those of the biases in shares), the
    parameters, all their gradients, and `partial` (SHARES, 4 C) for the gradients of the
    LayerNorms: scale and shift of the first, then of the second. GATE to FC2 are the places of the
    weights in `grads`, where the bias follows its weight, and the scale follows the bias.
    """
    ROW_BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    HALF: tl.constexpr = COLUMN_BLOCKS * (SHARES // 2)
    OF_C: tl.constexpr = (C + SHARES // 2 - 1) // (SHARES // 2)
    OF_E: tl.constexpr = (E + SHARES - 1) // SHARES
    STEP: tl.constexpr = 4 * C
    program = tl.program_id(0)  # the longest work comes first
    if program < ROW_BLOCKS:
        unfold_rows(
            program, fc2, fc2_folded_bias, fc2_shares, fc2_weight, fc2_bias, scale_2, grads + FC2,
            C, E, ROWS, BLOCK, ACC,
        )  # fmt: skip
    elif program < ROW_BLOCKS + 2 * HALF:
        unfold_columns(
            program - ROW_BLOCKS, fc1, fc1_bias, fc1_shares, fc1_weight, norm_2_weight,
            norm_2_bias, grads + FC1, partial + 2 * C, E, C, E, OF_E, STEP, SHARE_ROWS, COLUMNS,
            ACC,
        )  # fmt: skip
    elif program < ROW_BLOCKS + 3 * HALF:
        unfold_columns(
            program - ROW_BLOCKS - 2 * HALF, pair, pair_bias, pair_shares, gate_weight,
            norm_1_weight, norm_1_bias, grads + GATE, partial, C, C, 2 * C, OF_C, STEP, SHARE_ROWS,
            COLUMNS, ACC,
        )  # fmt: skip
    elif program < ROW_BLOCKS + 4 * HALF:
        unfold_columns(
            program - ROW_BLOCKS - 3 * HALF, pair + C * C, pair_bias + C, pair_shares,
            value_weight, norm_1_weight, norm_1_bias, grads + VALUE,
            partial + (SHARES // 2) * STEP, C, C, 2 * C, OF_C, STEP, SHARE_ROWS, COLUMNS, ACC,
        )  # fmt: skip
    else:
        unfold_rows(
            program - ROW_BLOCKS - 4 * HALF, proj, proj_folded_bias, proj_shares, proj_weight,
            proj_bias, scale_1, grads + PROJ, C, C, ROWS, BLOCK, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=['depthwise_blocks', 'depthwise_shares', 'pos_blocks', 'pos_shares'])
def finish_kernel(
    depthwise, pos, partial, grads, depthwise_blocks, depthwise_shares, pos_blocks, pos_shares,
    C: tl.constexpr, E: tl.constexpr, K: tl.constexpr, POS_K: tl.constexpr, PERIOD: tl.constexpr,
    POS_PERIOD: tl.constexpr, DEPTHWISE: tl.constexpr, POS: tl.constexpr, NORM_2: tl.constexpr,
    SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of a block that other kernels left in shares, added in a fixed order.

    Those of the depthwise convolutions, see `depthwise_sum`, and of the LayerNorms: `partial`
    (SHARES, 4 C) of `unfold_kernel`. DEPTHWISE, POS and NORM_2 are their places in `grads`, where
    the bias follows its weight; the first LayerNorm is at 0.
    """
    OF_DEPTHWISE: tl.constexpr = (K * K + 1) * ((C + BLOCK - 1) // BLOCK)
    OF_POS: tl.constexpr = (POS_K * POS_K + 1) * ((E + BLOCK - 1) // BLOCK)
    program = tl.program_id(0)
    if program < OF_DEPTHWISE:
        depthwise_sum(
            program, depthwise, grads + DEPTHWISE, grads + (DEPTHWISE + C * K * K),
            depthwise_blocks, depthwise_shares, C, K, PERIOD, ROWS, BLOCK, True, ACC,
        )  # fmt: skip
    elif program < OF_DEPTHWISE + OF_POS:
        depthwise_sum(
            program - OF_DEPTHWISE, pos, grads + POS, grads + (POS + E * POS_K * POS_K),
            pos_blocks, pos_shares, E, POS_K, POS_PERIOD, ROWS, BLOCK, True, ACC,
        )  # fmt: skip
    else:
        column = (program - OF_DEPTHWISE - OF_POS) * BLOCK + tl.arange(0, BLOCK)
        mask = column < 4 * C
        total = sum_of_shares(partial, SHARES, column, mask, 4 * C, SHARES, ACC)
        place = tl.where(column < 2 * C, column, NORM_2 - 2 * C + column)
        tl.store(grads + place, total.to(grads.dtype.element_ty), mask=mask)
