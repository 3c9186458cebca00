"""Triton kernels for the residual stream: addition, LayerNorm without affine part, and gradients.

Tensors are contiguous (positions, C); a program owns ROWS whole positions at a time. The residual
stream keeps its own dtype; results for a branch have the branch's dtype. Arithmetic is in
float32 (in float64 for float64 tensors).
"""

# mypy: ignore-errors
# Triton's functions have arguments without Python types.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['positions', 'per_image'], do_not_specialize_on_alignment=['factor'])
def residual_norm_kernel(
    x, branch, factor, total, y, rstd, positions, per_image,
    C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RSTD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total = x + factor * branch, and y = (total - mean) * rstd with mean and rstd over C.

    factor (N,), one for each image of `per_image` positions; rstd (positions,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < positions
    start = tl.program_id(0).to(tl.int64) * (ROWS * C)
    c = tl.arange(0, BLOCK)
    place = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    mask = in_rows[:, None] & (c < C)[None, :]
    values = tl.load(x + start + place, mask=mask, other=0).to(ACC)
    if HAS_BRANCH:
        added = tl.load(branch + start + place, mask=mask, other=0).to(ACC)
        if HAS_FACTOR:
            added *= tl.load(factor + row // per_image, mask=in_rows, other=0).to(ACC)[:, None]
        values = (values + added).to(total.dtype.element_ty).to(ACC)
        tl.store(total + start + place, values.to(total.dtype.element_ty), mask=mask)
    if HAS_NORM:
        mean = tl.sum(values, 1) / C
        centred = tl.where(mask, values - mean[:, None], 0)
        reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
        y_values = centred * reciprocal[:, None]
        tl.store(y + start + place, y_values.to(y.dtype.element_ty), mask=mask)
        if HAS_RSTD:
            tl.store(rstd + row, reciprocal, mask=in_rows)


@triton.jit(
    do_not_specialize=['positions', 'per_image', 'tiles'],
    do_not_specialize_on_alignment=['factor'],
)
def residual_norm_backward_kernel(
    grad, grad_y, y, rstd, factor, grad_x, grad_branch, sums, positions, per_image, tiles,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_FACTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of `residual_norm_kernel` for x and branch.

    grad is that of total, grad_y that of y. The gradient of the branch is grad_x * factor, whose
    sum over this program's positions goes to its row of `sums`, for the bias of the branch.
    """
    c = tl.arange(0, BLOCK)
    place = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    sum_of_rows = tl.zeros((ROWS, BLOCK), ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < positions
        start = tl.cast(tile, tl.int64) * (ROWS * C)
        mask = in_rows[:, None] & (c < C)[None, :]
        values = tl.load(grad + start + place, mask=mask, other=0).to(ACC)
        if HAS_NORM:
            g = tl.load(grad_y + start + place, mask=mask, other=0).to(ACC)
            normalized = tl.load(y + start + place, mask=mask, other=0).to(ACC)
            reciprocal = tl.load(rstd + row, mask=in_rows, other=0).to(ACC)
            mean = tl.sum(g, 1) / C
            product_mean = tl.sum(g * normalized, 1) / C
            centred = g - mean[:, None] - normalized * product_mean[:, None]
            values += tl.where(mask, centred * reciprocal[:, None], 0)
            tl.store(grad_x + start + place, values.to(grad_x.dtype.element_ty), mask=mask)
        if HAS_FACTOR:
            values *= tl.load(factor + row // per_image, mask=in_rows, other=0).to(ACC)[:, None]
        if HAS_BRANCH:
            rounded = values.to(grad_branch.dtype.element_ty)
            tl.store(grad_branch + start + place, rounded, mask=mask)
            values = rounded.to(ACC)
        if HAS_SUMS:
            sum_of_rows += values
    if HAS_SUMS:
        sums_place = sums + tl.program_id(0) * C + c
        tl.store(sums_place, tl.sum(sum_of_rows, 0), mask=c < C)


@triton.jit(do_not_specialize=['positions', 'tiles', 'shares'])
def column_sums_kernel(
    x, sums, positions, tiles, shares,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums (shares, C) of x (positions, C) over the positions of each share."""
    share = tl.program_id(0) % shares
    c = tl.program_id(0) // shares * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    sum_of_rows = tl.zeros((ROWS, BLOCK), ACC)
    for tile in range(share, tiles, shares):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < positions)[:, None] & (c < C)[None, :]
        start = tl.cast(tile, tl.int64) * (ROWS * C)
        sum_of_rows += tl.load(x + start + place, mask=mask, other=0).to(ACC)
    tl.store(sums + share * C + c, tl.sum(sum_of_rows, 0), mask=c < C)


@triton.jit(do_not_specialize=['shares'])
def add_shares_kernel(
    partial, sums, shares,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds partial (shares, N) over the shares in a fixed order."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, shares, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < shares)[:, None] & (c < N)[None, :]
        total += tl.load(partial + row[:, None] * N + c[None, :], mask=mask, other=0)
    tl.store(sums + c, tl.sum(total, 0), mask=c < N)


@triton.jit(do_not_specialize=['per_image'], do_not_specialize_on_alignment=['weight', 'bias'])
def layer_norm_kernel(
    x, weight, bias, y, per_image,
    C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x) with scale and shift; x (N, positions, C), y too or (N, C, positions)."""
    blocks = tl.cdiv(per_image, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64) * per_image * C
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    mask = (row < per_image)[:, None] & (c < C)[None, :]
    place = row[:, None] * C + c[None, :]
    values = tl.load(x + image + place, mask=mask, other=0).to(ACC)
    mean = tl.sum(values, 1) / C
    centred = tl.where(mask, values - mean[:, None], 0)
    reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    scale = tl.load(weight + c, mask=c < C, other=0).to(ACC)
    shift = tl.load(bias + c, mask=c < C, other=0).to(ACC)
    values = centred * reciprocal[:, None] * scale[None, :] + shift[None, :]
    if CHANNELS_FIRST:
        place = c[None, :] * per_image + row[:, None]
    tl.store(y + image + place, values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['per_image', 'tiles'], do_not_specialize_on_alignment=['weight'])
def layer_norm_backward_kernel(
    grad, x, weight, grad_x, sums, per_image, tiles,
    C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of `layer_norm_kernel`, in the layouts of its tensors.

    Those of weight and bias, summed over this program's positions, go to its row of `sums`
    (programs, 2 C).
    """
    blocks = tl.cdiv(per_image, ROWS)
    c = tl.arange(0, BLOCK)
    scale = tl.load(weight + c, mask=c < C, other=0).to(ACC)
    of_scale = tl.zeros((ROWS, BLOCK), ACC)
    of_shift = tl.zeros((ROWS, BLOCK), ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image = tl.cast(tile // blocks, tl.int64) * per_image * C
        row = tile % blocks * ROWS + tl.arange(0, ROWS)
        mask = (row < per_image)[:, None] & (c < C)[None, :]
        place = row[:, None] * C + c[None, :]
        values = tl.load(x + image + place, mask=mask, other=0).to(ACC)
        grad_place = c[None, :] * per_image + row[:, None] if CHANNELS_FIRST else place
        g = tl.load(grad + image + grad_place, mask=mask, other=0).to(ACC)
        mean = tl.sum(values, 1) / C
        centred = tl.where(mask, values - mean[:, None], 0)
        reciprocal = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
        normalized = centred * reciprocal[:, None]
        of_scale += g * normalized
        of_shift += g
        g = g * scale[None, :]
        g_mean = tl.sum(g, 1) / C
        product_mean = tl.sum(g * normalized, 1) / C
        values = (g - g_mean[:, None] - normalized * product_mean[:, None]) * reciprocal[:, None]
        tl.store(grad_x + image + place, values.to(grad_x.dtype.element_ty), mask=mask)
    sums_place = sums + tl.program_id(0) * (2 * C) + c
    tl.store(sums_place, tl.sum(of_scale, 0), mask=c < C)
    tl.store(sums_place + C, tl.sum(of_shift, 0), mask=c < C)
