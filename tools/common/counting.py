"""Counts the cost of a network without a GPU: multiply-adds, bytes kept for backward, traffic.

Fake and meta tensors, which have no values, make counting fast at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from mmconv2former.ops import block, depthwise, triton_support


# ----------------------------------------------------------------------------------- multiply-adds
def attention_flops(
    queries: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any
) -> int:
    """Twice the multiply-adds of both matrix products, from shapes (..., length, channels)."""
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of convolutions, matrix products and attention in one forward pass.

    Papers call them FLOPs. Norms, activations and other element-wise operators do not count.
    """
    # torch has formulas for attention on GPUs only.
    on_cpu = getattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu', None)
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: attention_flops})
    with counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------- bytes kept
def count_bytes_kept(
    model: nn.Module, batch: Any, forward: Callable[[Any], object] | None = None
) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once.

    Args:
        model: The model; its parameters are not counted.
        batch: Input of the forward pass, a tensor or a tree of tensors; it is not counted.
        forward: The forward pass; the model itself by default.
    """
    kept = {}  # with the storage itself, so that its address is not reused

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (forward or model)(batch)
    for tensor in (*model.parameters(), *tree_flatten(batch)[0]):
        if isinstance(tensor, Tensor):
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


# ----------------------------------------------------------------------------------------- traffic
# Operators that only allocate memory or return a view.
FREE = {
    'aten::detach', 'aten::_unsafe_view', 'aten::empty', 'aten::empty_like', 'aten::new_empty',
    'aten::empty_strided', 'aten::new_empty_strided', 'aten::lift_fresh', 'aten::promote_types',
}  # fmt: skip


class TrafficCounter(TorchDispatchMode):
    """Counts operators launched and the bytes that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_foreign = function.namespace not in ('aten', 'mmconv2former')
        if not (is_view or is_foreign or function._schema.name in FREE):
            leaves, _ = tree_flatten((args, kwargs, result))
            self.add_launch((leaf, 1.0) for leaf in leaves if isinstance(leaf, Tensor))
        return result

    def add_launch(self, tensors: Iterable[tuple[Tensor | None, float]]) -> None:
        """A launch that reads or writes each tensor, or a part of it, once."""
        self.launches += 1
        self.bytes += round(
            sum(part * t.numel() * t.element_size() for t, part in tensors if t is not None)
        )


def part_of(name: str, constants: Mapping[str, Any]) -> float:
    """The part of its channels that a kernel reads or writes of the argument with this name."""
    if name == 'grad_gate_value' or (name == 'gate_value' and not constants['HAS_ACTIVATIONS']):
        return 0.5  # the value's half
    all_channels = constants.get(f'{name.upper()}_STEP')
    return constants['C'] / all_channels if all_channels else 1.0


@contextmanager
def counted_kernels(counter: TrafficCounter) -> Iterator[None]:
    """Makes fake tensors take the path of a GPU, with Triton kernels that are only counted."""
    if triton_support.installation_problem() is not None:
        yield
        return
    from mmconv2former.ops.launch import Launcher  # needs Triton

    def add(launcher: Launcher, _programs: int, tensors: Iterable[Tensor | None], _: Any) -> None:
        names = launcher.kernel.arg_names
        counter.add_launch((t, part_of(n, launcher.constants)) for n, t in zip(names, tensors))

    with (
        patch.object(depthwise, 'setting', 'triton'),
        patch.object(depthwise, 'choice_for', lambda *_: 'triton'),
        patch.object(depthwise, 'is_intercepted', lambda _: False),
        patch.object(block, 'is_intercepted', lambda _: False),
        patch.object(Launcher, '__call__', add),
    ):
        yield


def count_traffic(step: Callable[[], object]) -> tuple[int, int]:
    """Operators and kernels that a GPU would launch in a step, and the bytes they read and write.

    Args:
        step: A step on fake tensors. It runs twice, because weights are only cast in the first one.
    """
    for _ in range(2):
        counter = TrafficCounter()
        with counted_kernels(counter), counter:
            step()
    return counter.launches, counter.bytes
