"""Compares networks with the plain second implementation: values and gradients."""

from contextlib import contextmanager

import torch
from common.plain_conv2former import plain_conv2former, plain_isotropic

# Small networks with every part of the real ones, quick enough for float64.
SMALL_ARCHS = {
    'narrow': dict(channels=(8, 12, 16, 20), depths=(1, 2, 2, 1), kernel_size=5),
    'kernels': dict(channels=(6, 8, 10, 12), depths=(1, 1, 2, 1), kernel_size=(11, 9, 7, 3)),
    'three stages': dict(channels=(8, 8, 8), depths=(1, 1, 1), kernel_size=11),
    'one stage': dict(channels=(8,), depths=(2,), kernel_size=7),
}
SMALL_ISOTROPIC_ARCH = dict(channels=8, depth=4, kernel_size=5)


@contextmanager
def exact_float32():
    """Products in float32 on GPUs, which may otherwise round their inputs to TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def randomized(model):
    """The model with all parameters and statistics away from their initial values."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = max(1, parameter[0].numel())
            if parameter.dim() > 1:
                parameter.copy_(noise(parameter) / fan_in**0.5)
            else:
                parameter.copy_(noise(parameter) * 0.3 + (0 if name.endswith('bias') else 0.7))
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.copy_(noise(buffer) * 0.1)
            elif name.endswith('running_var'):
                buffer.copy_(noise(buffer).abs() + 0.5)
    return model


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def loss_of(outputs):
    """A scalar whose gradient differs at every place."""
    return sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)).sum()
               for output in outputs)  # fmt: skip


def leaves(model):
    """A copy of the state dict whose parameters collect gradients."""
    return {
        name: value.clone().requires_grad_(value.is_floating_point() and 'running' not in name)
        for name, value in model.state_dict().items()
    }


def plain_outputs(model, x, state, fusion='hadamard'):
    """Outputs of the plain implementation for a state dict, instead of the model."""
    if hasattr(model, 'blocks'):
        return plain_isotropic(x, state, len(model.blocks), model.out_indices, model.training)
    outputs = plain_conv2former(x, state, model.depths, model.training, fusion)
    return [outputs[i] for i in model.out_indices]


def compare_with_plain(model, x, tolerance, gradient_tolerance, fusion='hadamard'):
    state = leaves(model)
    expected = plain_outputs(model, x, state, fusion)
    compare(model, model(x), expected, state, tolerance, gradient_tolerance)


def compare(model, outputs, expected, state, tolerance, gradient_tolerance):
    """Values, and gradients of the same loss: in the model, and in `state`."""
    assert len(outputs) == len(expected)
    for output, reference in zip(outputs, expected):
        assert relative_error(output, reference) < tolerance
    loss_of(outputs).backward()
    loss_of(expected).backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, state[name].grad) < gradient_tolerance, name
