"""CUDA graphs: run a network with one launch instead of hundreds, for inputs of one size.

`use_cuda_graphs` makes any network replay what its first call captured, in inference or in
training. `CudaGraphsHook` does this to the backbone of a training run. A graph repeats the same
kernels at the same addresses. Therefore each precision has its own graph, a network whose weights
were moved or replaced is captured again, and other input sizes are refused.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..ops.dispatch import (
    autocast_dtype,
    is_autocast_enabled,
    is_captured,
    is_intercepted,
    is_transformed,
)
from ..registry import HOOKS, register
from ..text import PrintableError

Module = TypeVar('Module', bound=nn.Module)
DEVICE = 'cuda'  # ROCm's name too
WARM_UP_CALLS = 3  # before a capture: they compile kernels, make plans, allocate workspaces


class VaryingSizeError(PrintableError, ValueError):
    """An input has another size than the one that was captured."""


# ---------------------------------------------------------------------------------------- for users
def use_cuda_graphs(module: Module, *, inference: bool = True, training: bool = False) -> Module:
    """Makes a network replay CUDA graphs, in place; its parameters and results stay the same.

        mmconv2former.use_cuda_graphs(model.backbone)

    The first call captures the network, which takes about four calls. Later calls copy the input,
    launch once and copy each output, so outputs are new tensors. Each dtype of the input and of
    autocast has its own graph.

    `inference` graphs are for eval mode without gradients, `training` graphs for training mode with
    gradients. All other calls run as before: in other modes, with an input that needs a gradient,
    inside `torch.compile`, `torch.export`, tracing, `torch.func`, dispatch modes or another
    capture, and with a smaller batch than the captured one, such as the last of a dataset. The
    network is captured again if its weights were moved, replaced or (for inference) written to.
    Copies of it, including pickled ones, have no graphs.

    Python code in the network runs only during the capture: hooks of inner modules and later
    changes of attributes, such as the rate of a drop path, have no effect. Use one thread and one
    stream at a time.

    In training, gradients are new tensors, which can be accumulated, clipped and kept. A capture
    leaves buffers (BatchNorm's statistics) and random numbers unchanged, and drop path draws the
    numbers it would draw without a graph. A parameter that affects unused outputs only gets a
    gradient of zeros instead of None.

    Args:
        module: A network with one input tensor, and output tensors in tuples, lists or dicts.
        inference: Whether to use graphs in eval mode.
        training: Whether to use graphs in training mode.

    Returns:
        The module.

    Raises:
        RuntimeError: There is no CUDA device, the network was compiled by `torch.compile`, or
            `training` in several processes. In a call: the input is not on a GPU, the network
            cannot be captured, or a backward pass does not follow its forward pass.
        ValueError: `training` with activation checkpointing (`with_cp`).
        VaryingSizeError: In a call: the input has another size than the captured one.
    """
    if not torch.cuda.is_available():
        raise RuntimeError('CUDA graphs need a CUDA device, and torch finds none')
    if getattr(module, '_compiled_call_impl', None) is not None:
        raise RuntimeError(
            f'{type(module).__name__} is compiled by torch.compile, which has CUDA graphs of its '
            'own (mode="reduce-overhead"): use only one of them'
        )
    if training and is_distributed():
        raise RuntimeError(
            'CUDA graphs for training need a single process without a launcher: disable them'
        )
    if training and any(getattr(part, 'with_cp', False) for part in module.modules()):
        raise ValueError(
            'CUDA graphs for training need with_cp=False: checkpointing reads the state of the '
            'random numbers, which a capture forbids'
        )
    forward = module.forward
    if isinstance(forward, GraphedForward):
        forward = forward.plain
    module.forward = GraphedForward(module, forward, inference, training)
    return module


@register(HOOKS)
class CudaGraphsHook(Hook):
    """Makes the backbone of a training run replay CUDA graphs: see `use_cuda_graphs`.

        custom_hooks = [dict(type='mmconv2former.CudaGraphsHook')]

    It is for recipes whose training images have one size, such as crops in segmentation and
    classification. Others stop with a `VaryingSizeError` at the second size. Validation runs
    without graphs.
    """

    def before_train(self, runner: Any) -> None:
        model = getattr(runner.model, 'module', runner.model)
        use_cuda_graphs(model.backbone, inference=False, training=True)


# ----------------------------------------------------------------------------------------- dispatch
class GraphedForward:
    """Replaces the `forward` of a network instance.

    Args:
        module: The network.
        plain: Its forward without graphs.
        inference: See `use_cuda_graphs`.
        training: See `use_cuda_graphs`.
    """

    def __init__(
        self, module: nn.Module, plain: Callable[[Tensor], Any], inference: bool, training: bool
    ) -> None:
        # Exporters read these attributes of a method.
        self.__signature__ = inspect.signature(plain)
        self.__code__ = getattr(plain, '__code__', None)
        self.module, self.plain = module, plain
        self.inference, self.training = inference, training
        # The key is training mode, dtype and autocast's dtype.
        self.graphs: dict[tuple, tuple[InferenceGraph | TrainingGraph, Weights]] = {}

    def __call__(self, x: Tensor) -> Any:
        if is_captured() or not self._applies(x):
            return self.plain(x)
        with torch.cuda.device(x.device):
            graph = self._graph_for(x)
            return self.plain(x) if graph is None else graph(x)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and unpickled modules have the forward of their class."""
        return getattr, (self.module, 'forward')

    def _applies(self, x: Tensor) -> bool:
        training = self.module.training
        is_wanted = self.training if training else self.inference
        if not is_wanted or training != torch.is_grad_enabled() or is_intercepted(x):
            return False
        if x.device.type != DEVICE:
            raise RuntimeError(
                f'{type(self.module).__name__} uses CUDA graphs, which need an input on a CUDA '
                f'device, got one on {x.device}'
            )
        if is_transformed() or torch.cuda.is_current_stream_capturing():
            return False
        if training:
            return not x.requires_grad and any(p.requires_grad for p in self.module.parameters())
        return True

    def _graph_for(self, x: Tensor) -> InferenceGraph | TrainingGraph | None:
        """The graph for an input, captured if necessary; None for a smaller batch."""
        training = self.module.training
        autocast = autocast_dtype(x) if is_autocast_enabled(DEVICE) else None
        key = training, x.dtype, autocast
        if key in self.graphs:
            graph, weights = self.graphs[key]
            size = tuple(graph.x.shape)
            if x.shape[1:] == size[1:] and len(x) < size[0]:
                return None
            if x.shape != size:
                raise VaryingSizeError(
                    f'CUDA graphs need inputs of one size: captured for {size}, got '
                    f'{tuple(x.shape)}. Make the data pipeline give all images one size (a crop, '
                    'or Resize with keep_ratio=False), or disable CUDA graphs'
                )
            if weights.are_unchanged():
                return graph
            del self.graphs[key], graph, weights  # frees their memory for the next graph
        name = type(self.module).__name__
        try:
            graph = (
                TrainingGraph(self.module, self.plain, x)
                if training
                else InferenceGraph(self.plain, x)
            )
        except RuntimeError as error:
            raise RuntimeError(
                f'cannot capture {name} as a CUDA graph ({error}): disable CUDA graphs'
            ) from error
        self.graphs[key] = graph, Weights(self.module, training)
        print_log(
            f'CUDA graph of {name} for {"training" if training else "inference"}: '
            f'{tuple(x.shape)}, {x.dtype}, autocast {autocast}',
            logger='current',
            level=logging.INFO,
        )
        return graph


class Weights:
    """The state of a network that its graph relies on.

    Args:
        module: The network.
        training: Whether the values of weights may change, as an optimizer changes them; which
            weights are trained may not. In inference the values may not change either, because a
            network may keep casts of them.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.training = training
        self.modules = list(module.modules())
        kinds = ('_modules', '_parameters', '_buffers')
        holders = (vars(part)[kind] for part in self.modules for kind in kinds)
        self.holders = [holder for holder in holders if holder]
        self.state = self._read()
        # The graph reads this memory, including plain attributes such as casts of weights. No
        # other tensor may get it.
        leaves = tree_flatten([vars(part) for part in self.modules])[0]
        self.kept = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]

    def _read(self) -> list[list]:
        values = list(chain.from_iterable(holder.values() for holder in self.holders))
        tensors = [value for value in values if isinstance(value, Tensor)]
        return [
            [id(value) for value in values],
            [part.training for part in self.modules],
            [tensor.data_ptr() for tensor in tensors],
            [
                # Tensors made in inference mode have no version.
                t.requires_grad if self.training or t.is_inference() else t._version
                for t in tensors
            ],
        ]

    def are_unchanged(self) -> bool:
        """Whether no tensor was moved, replaced, switched or (for inference) written to."""
        return self._read() == self.state


# ------------------------------------------------------------------------------------------- graphs
class InferenceGraph:
    """A captured forward pass.

    Args:
        forward: Forward of the network.
        x: An input of the size, dtype and device of all later ones, in the current autocast.
    """

    def __init__(self, forward: Callable[[Tensor], Any], x: Tensor) -> None:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), uncached_autocast(x):
            self.x = x.detach().clone()
            warm_up(lambda: forward(self.x), x.device)
            self.graph = torch.cuda.CUDAGraph()
            with capturing(self.graph, x.device):
                self.outputs = forward(self.x)

    def __call__(self, x: Tensor) -> Any:
        self.x.copy_(x)
        self.graph.replay()
        return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self.outputs)


class TrainingGraph:
    """A captured forward pass and a captured backward pass, as one node of autograd.

    Unlike `torch.cuda.make_graphed_callables`, gradients do not share the memory of the graph, so
    they can be accumulated, and BatchNorm's statistics do not change at the capture.

    Args:
        module: The network, in training mode.
        forward: Its forward without graphs.
        x: An input of the size, dtype and device of all later ones, in the current autocast.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.x = x.detach().clone()
        self.call = 0  # number, from 1, of the forward pass whose backward pass can be computed

        def run_forward() -> tuple[list[Tensor], list[Tensor], Any]:
            """The outputs, the outputs that need gradients, and their structure."""
            with uncached_autocast(x):
                outputs, structure = tree_flatten(forward(self.x))
            return outputs, [output for output in outputs if output.requires_grad], structure

        def run_backward(outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
            # `loss.backward()` is called without autocast.
            with torch.autocast(DEVICE, enabled=False):
                return torch.autograd.grad(outputs, self.parameters, grads, allow_unused=True)

        def run_both() -> None:
            outputs = run_forward()[1]
            run_backward(outputs, [torch.zeros_like(output) for output in outputs])

        with unchanged_state(module, x.device):
            warm_up(run_both, x.device)
            self.forward_graph, self.backward_graph = (torch.cuda.CUDAGraph() for _ in range(2))
            with capturing(self.forward_graph, x.device):
                outputs, differentiable, self.structure = run_forward()
            self.output_grads = [torch.zeros_like(output) for output in differentiable]
            with capturing(self.backward_graph, x.device, self.forward_graph.pool()):
                self.grads = run_backward(differentiable, self.output_grads)
        self.needs_grad = [output.requires_grad for output in outputs]
        self.outputs = [output.detach() for output in outputs]

    def __call__(self, x: Tensor) -> Any:
        return tree_unflatten(list(Replay.apply(self, x, *self.parameters)), self.structure)

    def replay_forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs, as new tensors."""
        self.call += 1
        self.x.copy_(x)
        self.forward_graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def replay_backward(self, call: int, output_grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The gradient of each parameter, as a new tensor.

        Raises:
            RuntimeError: Forward pass `call` is not the last one, or its backward pass has already
                run.
        """
        if call != self.call:
            raise RuntimeError(
                'CUDA graphs keep the activations of the last forward pass for one backward pass: '
                'call backward once after each call of the network, or disable CUDA graphs'
            )
        self.call += 1
        needed = [grad for grad, needs in zip(output_grads, self.needs_grad) if needs]
        with torch.cuda.device(self.x.device):
            copy_all(self.output_grads, needed)
            self.backward_graph.replay()
            found = [grad for grad in self.grads if grad is not None]
            copies = [torch.empty_like(grad) for grad in found]
            copy_all(copies, found)
        new = iter(copies)
        return [None if grad is None else next(new) for grad in self.grads]


class Replay(torch.autograd.Function):
    """A `TrainingGraph` as a node of autograd; the parameters are inputs, to get gradients."""

    @staticmethod
    def forward(ctx: Any, graph: TrainingGraph, x: Tensor, *parameters: Tensor) -> Any:
        outputs = graph.replay_forward(x)
        ctx.graph, ctx.call = graph, graph.call
        ctx.mark_non_differentiable(
            *(output for output, needs in zip(outputs, graph.needs_grad) if not needs)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.replay_backward(ctx.call, grads)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its target, in a few launches."""
    if targets:
        torch._foreach_copy_(targets, sources)


# ------------------------------------------------------------------------------------------ capture
@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for captures on a device; the default stream cannot be captured."""
    return torch.cuda.Stream(device)


def warm_up(function: Callable[[], object], device: torch.device) -> None:
    """Calls a function on the stream that will be captured."""
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None
) -> Iterator[None]:
    """Records what runs in this context into a graph.

    Args:
        graph: The graph.
        device: The current device.
        pool: Memory of a graph that always runs before this one.
    """
    # Thread-local, because the thread of a data loader pins memory at the same time. Unlike
    # `torch.cuda.graph`, the outer context leaves the stream if the capture fails.
    stream = side_stream(device)
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'),
    ):
        yield


def uncached_autocast(x: Tensor) -> torch.autocast:
    """The current autocast without its cache of casts, which would be missing in a graph."""
    # `x` itself may be float64, which hides autocast's dtype.
    is_enabled = is_autocast_enabled(DEVICE)
    dtype = autocast_dtype(torch.empty(0, device=x.device)) if is_enabled else None
    return torch.autocast(DEVICE, dtype, is_enabled, cache_enabled=False)


@contextmanager
def unchanged_state(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores buffers and random numbers at the end."""
    buffers = list(module.buffers())
    saved = [buffer.detach().clone() for buffer in buffers]
    random = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(random, device)
        with torch.no_grad():
            for buffer, value in zip(buffers, saved):
                buffer.copy_(value)
