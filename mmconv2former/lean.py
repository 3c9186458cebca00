"""The two halves of a block as autograd functions that keep little for the backward pass.

Stock autograd keeps the input of every operation. These keep the outputs of products and depthwise
convolutions, which are dear, and compute the rest anew in the backward pass: LayerNorm, GELU (once
for all its uses there), the Hadamard product and, if asked, the feed-forward's first product.

All tensors are contiguous (N, H, W, C). Under autocast products and convolutions run in its dtype,
LayerNorm in the dtype of its input; gradients of biases are summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops.depthwise import choose, depthwise_conv, depthwise_conv_backward, ready_weight
from .ops.memory_format import autocast_dtype, without_autocast
from .product import product, product_backward

Pair = tuple[Tensor, Tensor]  # weight and bias of a layer, or their gradients


class ModulationFunction(torch.autograd.Function):
    """scale * W3 (DW(GELU(W1 x')) * W2 x') with x' = LayerNorm(x).

    Keeps x, W1 x' and W2 x' (from one product of twice the width) and DW(GELU(W1 x')): of 4 C
    channels, where stock autograd keeps 8 C.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        eps: float,
        scale: Tensor | None,
        laid_out: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        dtype = autocast_dtype(x)
        implementation = choose(x, parameters[4])
        with without_autocast(x):
            kernel = ready_weight(parameters[4], dtype, implementation, laid_out)
            prepared = ModulationFunction.prepare(scale, parameters, kernel, dtype)
            gate_and_value, depthwise, proj = in_pairs(prepared)
            if implementation == 'triton':  # whose kernels read a bias of any dtype
                depthwise = kernel, parameters[5]
            y = normalize(x, in_pairs(parameters)[0], eps)[0].to(dtype)
            pair = product(y, *gate_and_value)  # (N, H, W, 2 C)
            gate, value = pair.chunk(2, -1)
            mixed = depthwise_conv(F.gelu(gate).contiguous(), *depthwise, implementation)
            out = product(mixed * value, *proj)
        is_cast = dtype != parameters[2].dtype
        ctx.save_for_backward(
            x, pair, mixed, scale, kernel, *parameters, *(prepared if is_cast else ())
        )
        ctx.eps, ctx.implementation = eps, implementation
        return out

    @staticmethod
    def prepare(
        scale: Tensor | None, parameters: tuple[Tensor, ...], kernel: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Weights and biases of both first products, of the convolution, of the last product."""
        _, att, depthwise, v, proj = in_pairs(parameters)
        first = torch.cat([att[0], v[0]]), torch.cat([att[1], v[1]])
        return cast([first, (kernel, depthwise[1]), scaled(proj, scale)], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, pair, mixed, scale, kernel, *rest = ctx.saved_tensors
        parameters, prepared = rest[:10], rest[10:]
        dtype = pair.dtype
        with without_autocast(x):
            if not prepared:
                prepared = ModulationFunction.prepare(scale, parameters, kernel, dtype)
            gate_and_value, _, proj = in_pairs(prepared)
            gate, value = pair.chunk(2, -1)
            grads_proj, grad = product_backward(grad.to(dtype), mixed * value, proj[0])
            grad_pair = torch.empty_like(pair)
            grad_gate, grad_value = grad_pair.chunk(2, -1)
            torch.mul(grad, mixed, out=grad_value)
            grad, *grads_depthwise = depthwise_conv_backward(
                grad.mul_(value),
                F.gelu(gate).contiguous(),
                kernel,
                implementation=ctx.implementation,
            )
            gelu_backward(grad, gate, out=grad_gate)
            y, mean, rstd = normalize(x, parameters[:2], ctx.eps)
            grads_first, grad = product_backward(grad_pair, y.to(dtype), gate_and_value[0])
            grad_x, *grads_norm = normalize_backward(grad, x, mean, rstd, parameters[:2])
            first = as_parameters(grads_first, parameters[2:4])
            grads_att, grads_v = zip(*(both.chunk(2) for both in first))
            grads_proj, grad_scale = scaled_backward(grads_proj, in_pairs(parameters)[-1], scale)
        grads = (*grads_norm, *grads_att, *grads_depthwise, *grads_v, *grads_proj)
        return grad_x, None, grad_scale, None, *as_parameters(grads, parameters)


class FeedForwardFunction(torch.autograd.Function):
    """scale * W2 (h + GELU(DW(h))) with h = GELU(W1 LayerNorm(x)).

    Keeps x, DW(h) and, if asked, W1 LayerNorm(x): with the usual expansion of 4, of 5 C or 9 C
    channels, where stock autograd keeps 22 C.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        eps: float,
        keep_hidden: bool,
        scale: Tensor | None,
        laid_out: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        dtype = autocast_dtype(x)
        implementation = choose(x, parameters[4])
        with without_autocast(x):
            kernel = ready_weight(parameters[4], dtype, implementation, laid_out)
            prepared = FeedForwardFunction.prepare(scale, parameters, kernel, dtype)
            fc1, pos, fc2 = in_pairs(prepared)
            if implementation == 'triton':
                pos = kernel, parameters[5]
            hidden = product(normalize(x, in_pairs(parameters)[0], eps)[0].to(dtype), *fc1)
            active = F.gelu(hidden)
            mixed = depthwise_conv(active, *pos, implementation)
            out = product(active.add_(F.gelu(mixed)), *fc2)
        is_cast = dtype != parameters[2].dtype
        ctx.save_for_backward(
            x, mixed, hidden if keep_hidden else None, scale, kernel, *parameters,
            *(prepared if is_cast else ()),
        )  # fmt: skip
        ctx.eps, ctx.implementation = eps, implementation
        return out

    @staticmethod
    def prepare(
        scale: Tensor | None, parameters: tuple[Tensor, ...], kernel: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Weights and biases of first product, convolution and last product."""
        _, fc1, pos, fc2 = in_pairs(parameters)
        return cast([fc1, (kernel, pos[1]), scaled(fc2, scale)], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mixed, hidden, scale, kernel, *rest = ctx.saved_tensors
        parameters, prepared = rest[:8], rest[8:]
        dtype = mixed.dtype
        with without_autocast(x):
            if not prepared:
                prepared = FeedForwardFunction.prepare(scale, parameters, kernel, dtype)
            fc1, _, fc2 = in_pairs(prepared)
            y, mean, rstd = normalize(x, parameters[:2], ctx.eps)
            y = y.to(dtype)
            if hidden is None:
                hidden = product(y, *fc1)
            active = F.gelu(hidden)
            total = F.gelu(mixed).add_(active)
            grads_fc2, grad = product_backward(grad.to(dtype), total, fc2[0])
            grad_mixed = gelu_backward(grad, mixed, out=total)
            grad_active, *grads_pos = depthwise_conv_backward(
                grad_mixed, active, kernel, implementation=ctx.implementation
            )
            del active
            grad = gelu_backward(grad_active.add_(grad), hidden, out=grad)
            del total, grad_mixed, grad_active, hidden
            grads_fc1, grad = product_backward(grad, y, fc1[0])
            grad_x, *grads_norm = normalize_backward(grad, x, mean, rstd, parameters[:2])
            grads_fc2, grad_scale = scaled_backward(grads_fc2, in_pairs(parameters)[-1], scale)
        grads = (*grads_norm, *grads_fc1, *grads_pos, *grads_fc2)
        return grad_x, None, None, grad_scale, None, *as_parameters(grads, parameters)


def cast(pairs: list[Pair], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weights and biases one after another in `dtype`; the biases, which are small, cast as one."""
    weights, biases = zip(*pairs)
    if dtype != weights[0].dtype:
        weights = tuple(weight.to(dtype) for weight in weights)
        biases = torch.cat(biases).to(dtype).split([len(bias) for bias in biases])
    return tuple(tensor for pair in zip(weights, biases) for tensor in pair)


def in_pairs(tensors: tuple[Tensor, ...]) -> list[Pair]:
    """Weight and bias of each layer."""
    return list(zip(tensors[::2], tensors[1::2]))


def as_parameters(grads: tuple[Tensor, ...], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of their parameters."""
    return tuple(grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters))


def scaled(pair: Pair, scale: Tensor | None) -> Pair:
    """Weight (C_out, C_in) and bias of a product with the layer scale in them.

    That saves a pass over the activations.
    """
    weight, bias = pair
    return pair if scale is None else (scale[:, None] * weight, scale * bias)


def scaled_backward(grads: Pair, pair: Pair, scale: Tensor | None) -> tuple[Pair, Tensor | None]:
    """Gradients of `scaled` for the product and the scale."""
    if scale is None:
        return grads, None
    (grad_weight, grad_bias), (weight, bias) = grads, pair
    grad_weight = grad_weight.to(weight.dtype)
    grad_scale = (grad_weight * weight).sum(1).addcmul_(grad_bias, bias)
    return (grad_weight.mul_(scale[:, None]), grad_bias * scale), grad_scale


def gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Gradient of GELU for x, in memory that is no longer needed: new memory is dear."""
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)


def normalize(x: Tensor, norm: Pair, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last axis, and mean and reciprocal deviation of each position."""
    return torch.native_layer_norm(x, (x.shape[-1],), *norm, eps)


def normalize_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalize` for x, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, (x.shape[-1],), mean, rstd, *norm, (True, True, True)
    )
