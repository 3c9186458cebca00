"""Triton kernels for GELU and the elementwise operations around it, forward and backward.

Tensors are (positions, channels) with the channels next to each other in memory; a part of a wider
tensor has more than `channels` elements from one position to the next. Arithmetic is in float32
(in float64 for float64 tensors).
"""

# mypy: ignore-errors
# Triton's functions have arguments without Python types.

import triton
import triton.language as tl


@triton.jit
def normal_distribution(x):
    """The cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x):
    """GELU, exactly."""
    return x * normal_distribution(x)


@triton.jit
def gelu_slope(x):
    """The derivative of GELU."""
    return normal_distribution(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def places(positions, C: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """This program's elements of tensors with that many positions.

    Returns:
        Their offsets in a contiguous tensor and in one with STEP elements from position to
        position, and a mask of those that exist.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first = start // C  # first position; the others are 32-bit offsets from it
    # Tells the compiler that the rest is a multiple of the largest power of 2 in C and BLOCK. `min`
    # is no constant before Triton 3.5.
    rest = tl.multiple_of((start % C).to(tl.int32), (C & -C) if (C & -C) < BLOCK else BLOCK)
    offset = rest + tl.arange(0, BLOCK)
    position = offset // C
    dense = first * C + offset
    wide = first * STEP + (position * STEP + offset % C)
    return dense, wide, position < (positions - first).to(tl.int32)


@triton.jit(do_not_specialize=['positions'])
def gelu_kernel(
    x, y, positions,
    C: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y (positions, C) contiguous = GELU(x), x with STEP elements from position to position."""
    dense, wide, mask = places(positions, C, STEP, BLOCK)
    values = tl.load(x + wide, mask=mask, other=0).to(ACC)
    tl.store(y + dense, gelu(values).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['positions'])
def modulation_backward_kernel(
    grad, a, gate_value, grad_a, grad_gate_value, weighted, active, positions,
    C: tl.constexpr, HAS_ACTIVATIONS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a * value, and the activations that the backward pass recomputes.

    gate_value and grad_gate_value are (positions, 2 C), gate first, all others (positions, C):
    grad_a = grad * value, grad_value = grad * a, weighted = a * value, active = GELU(gate).
    """
    dense, gate, mask = places(positions, C, 2 * C, BLOCK)
    value = gate + C
    dtype = a.dtype.element_ty
    g = tl.load(grad + dense, mask=mask, other=0).to(ACC)
    m = tl.load(a + dense, mask=mask, other=0).to(ACC)
    v = tl.load(gate_value + value, mask=mask, other=0).to(ACC)
    tl.store(grad_a + dense, (g * v).to(dtype), mask=mask)
    tl.store(grad_gate_value + value, (g * m).to(dtype), mask=mask)
    if HAS_ACTIVATIONS:
        tl.store(weighted + dense, (m * v).to(dtype), mask=mask)
        before = tl.load(gate_value + gate, mask=mask, other=0).to(ACC)
        tl.store(active + dense, gelu(before).to(dtype), mask=mask)


@triton.jit(do_not_specialize=['positions'])
def feed_forward_backward_kernel(
    grad, hidden, mixed, grad_mixed, active, total, positions,
    C: tl.constexpr, HAS_ACTIVATIONS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of active + GELU(mixed) for `mixed`, and the activations.

    All are contiguous: grad_mixed = grad * GELU'(mixed), active = GELU(hidden),
    total = active + GELU(mixed).
    """
    place, _, mask = places(positions, C, C, BLOCK)
    dtype = mixed.dtype.element_ty
    g = tl.load(grad + place, mask=mask, other=0).to(ACC)
    m = tl.load(mixed + place, mask=mask, other=0).to(ACC)
    share = normal_distribution(m)
    slope = share + m * 0.3989422804014327 * tl.exp(-0.5 * m * m)
    tl.store(grad_mixed + place, (g * slope).to(dtype), mask=mask)
    if HAS_ACTIVATIONS:
        h = gelu(tl.load(hidden + place, mask=mask, other=0).to(ACC)).to(dtype)
        tl.store(active + place, h, mask=mask)
        tl.store(total + place, (h.to(ACC) + m * share).to(dtype), mask=mask)
