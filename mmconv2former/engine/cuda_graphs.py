"""CUDA graphs: a network as one launch instead of hundreds, for inputs of one size.

`use_cuda_graphs` lets any network replay what was captured at its first call, in inference or in
training; `CudaGraphsHook` does it to the backbone of a training run. A graph repeats the same
kernels at the same addresses. So everything that could differ at a later call either has a graph of
its own (dtype, autocast), makes the network be captured again (weights that were moved or
replaced), or is refused (sizes).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..ops.dispatch import autocast_dtype, is_autocast_enabled, is_captured, is_intercepted
from ..registry import HOOKS, register

Module = TypeVar('Module', bound=nn.Module)
DEVICE = 'cuda'  # also ROCm's name
WARM_UP_CALLS = 3  # before a capture: kernels are compiled, plans made, workspaces allocated


class VaryingSizeError(ValueError):
    """An input has another size than the network was captured for."""


# ---------------------------------------------------------------------------------------- for users
def use_cuda_graphs(
    module: Module, *, inference: bool = True, training: bool = False, max_sizes: int = 1
) -> Module:
    """Lets a network replay CUDA graphs, in place; its parameters and results stay the same.

        mmconv2former.use_cuda_graphs(model.backbone)

    The first call with an input captures the network, which takes about four calls; every further
    one is a copy of the input, one launch and a copy of each output. Outputs are new tensors, as
    without graphs. Each dtype of the input and of autocast has a graph of its own.

    `inference` is for eval mode without gradients, `training` for training mode with gradients.
    Every other call runs as it always did, and so do calls while something else looks on
    (`torch.compile`, `torch.export`, tracing, fake tensors, another capture), and those of a
    smaller batch than the captured one, such as the last of a data set. The network is captured
    again when its weights were moved, replaced or, for inference, written to. Copies of it, also
    pickled ones, are without graphs.

    What Python does in the network is done at the capture only: hooks of its inner modules, and
    changes of attributes such as the rate of a drop path, have no effect afterwards. Calls must
    come from one thread and one stream at a time.

    In training, gradients are new tensors too, so that they can be accumulated, clipped and kept.
    The capture leaves buffers (BatchNorm's statistics) and random numbers as they were; drop path
    draws the numbers it would draw without a graph. A parameter that only outputs depend on that
    are not used gets a gradient of zeros, not None.

    Args:
        module: A network with one tensor as input, and tensors in tuples, lists or dicts as output.
            It must be on a GPU when it is called.
        inference: Whether there are graphs in eval mode.
        training: Whether there are graphs in training mode.
        max_sizes: Input sizes with a graph, of inference and of training each; more need more
            memory.

    Returns:
        The module.

    Raises:
        RuntimeError: There is no CUDA device, the network is compiled by `torch.compile`, or
            several processes train it (which was not tried). When it is called: the input is not
            on a GPU, the network cannot be captured, transforms of `torch.func` are used in
            training, or a backward pass is not that of the last forward pass.
        ValueError: `max_sizes` is below 1, or for training some block recomputes its activations
            (`with_cp`). When it is called in training: the input needs a gradient.
        VaryingSizeError: When it is called: there are `max_sizes` graphs of other sizes.
    """
    if not torch.cuda.is_available():
        raise RuntimeError('CUDA graphs need a CUDA device, and torch finds none on this machine')
    if max_sizes < 1:
        raise ValueError(f'max_sizes must be at least 1, got {max_sizes}')
    if getattr(module, '_compiled_call_impl', None) is not None:
        raise RuntimeError(
            f'{type(module).__name__} is compiled, and torch.compile(mode="reduce-overhead") has '
            'CUDA graphs of its own: use one of both'
        )
    if training and get_world_size() > 1:
        raise RuntimeError(
            f'CUDA graphs for training were tried with one process only, got {get_world_size()}: '
            'leave them out'
        )
    if training and any(getattr(part, 'with_cp', False) for part in module.modules()):
        raise ValueError(
            'CUDA graphs for training need with_cp=False: what is recomputed asks for the state of '
            'the random numbers, which a capture forbids'
        )
    forward = module.forward
    if isinstance(forward, GraphedForward):
        forward = forward.plain
    module.forward = GraphedForward(module, forward, inference, training, max_sizes)
    return module


@register(HOOKS)
class CudaGraphsHook(Hook):
    """Lets the backbone of a training run replay CUDA graphs: see `use_cuda_graphs`.

        custom_hooks = [dict(type='mmconv2former.CudaGraphsHook')]

    For recipes whose training pipeline makes all images of one size, such as the crops of
    segmentation and classification; others stop with a `VaryingSizeError` at the second size.
    Validation runs without graphs.

    Args:
        max_sizes: Input sizes with a graph.

    Raises:
        RuntimeError: The model is in a wrapper for several processes. Others, and when the training
            begins or runs: see `use_cuda_graphs`.
    """

    def __init__(self, max_sizes: int = 1) -> None:
        self.max_sizes = max_sizes

    def before_train(self, runner: Any) -> None:
        model = runner.model
        if is_model_wrapper(model):  # which prepares gradients on the default stream
            raise RuntimeError(
                'CudaGraphsHook is for training in one process without a launcher, got a model in '
                f'{type(model).__name__}: leave CUDA graphs out'
            )
        use_cuda_graphs(model.backbone, inference=False, training=True, max_sizes=self.max_sizes)


# --------------------------------------------------------------------------------------- what calls
class Key(NamedTuple):
    """What a graph is of."""

    training: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None


class GraphedForward:
    """Stands for the `forward` of a network, as an attribute of the instance.

    Arguments are those of `use_cuda_graphs`, and the forward without graphs.
    """

    def __init__(
        self,
        module: nn.Module,
        plain: Callable[[Tensor], Any],
        inference: bool,
        training: bool,
        max_sizes: int,
    ) -> None:
        # What exporters ask of a method.
        self.__signature__ = inspect.signature(plain)
        self.__code__ = getattr(plain, '__code__', None)
        self.module, self.plain = module, plain
        self.inference, self.training, self.max_sizes = inference, training, max_sizes
        # With the weights as they were captured.
        self.graphs: dict[Key, tuple[InferenceGraph | TrainingGraph, Weights]] = {}

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
        """Whether there are to be graphs of such a call; at the wrong size it is an error."""
        is_training = self.module.training
        if is_training != torch.is_grad_enabled():
            return False
        if not (self.training if is_training else self.inference):
            return False
        if is_intercepted(x):
            return False
        if x.device.type != DEVICE:
            raise RuntimeError(
                f'{type(self.module).__name__} uses CUDA graphs, which need an input on a CUDA '
                f'device, got one on {x.device}'
            )
        if torch.cuda.is_current_stream_capturing():
            return False
        if torch._C._are_functorch_transforms_active():
            if is_training:
                raise RuntimeError(
                    'CUDA graphs for training know loss.backward() and torch.autograd.grad, not '
                    'the transforms of torch.func: leave CUDA graphs out'
                )
            return False
        if is_training and x.requires_grad:
            raise ValueError(
                'CUDA graphs for training have no gradient of the input, and the input needs one: '
                'leave CUDA graphs out'
            )
        return not is_training or any(p.requires_grad for p in self.module.parameters())

    def _graph_for(self, x: Tensor) -> InferenceGraph | TrainingGraph | None:
        """The graph for an input, captured if need be; None for a smaller batch."""
        training = self.module.training
        key = Key(
            training,
            tuple(x.shape),
            x.dtype,
            x.device,
            autocast_dtype(x) if is_autocast_enabled(DEVICE) else None,
        )
        if key in self.graphs:
            graph, weights = self.graphs[key]
            if weights.are_the_same():
                return graph
            del self.graphs[key], graph, weights  # and their memory, which the next one needs
        sizes = {k.shape for k in self.graphs if k.training == training}
        if key.shape not in sizes and len(sizes) >= self.max_sizes:
            if any(key.shape[1:] == s[1:] and key.shape[:1] < s[:1] for s in sizes):
                return None
            raise VaryingSizeError(
                'CUDA graphs need inputs of one size: '
                f'captured for {" and ".join(map(str, sorted(sizes)))}, got {key.shape}. Let the '
                'data pipeline make all images of one size (a crop, or Resize with '
                'keep_ratio=False), or leave CUDA graphs out'
            )
        graph = self._capture(x, key)
        self.graphs[key] = graph, Weights(self.module, training)
        return graph

    def _capture(self, x: Tensor, key: Key) -> InferenceGraph | TrainingGraph:
        name = type(self.module).__name__
        try:
            graph = (
                TrainingGraph(self.module, self.plain, x)
                if key.training
                else InferenceGraph(self.plain, x)
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f'{name} cannot be captured as a CUDA graph ({error}): leave CUDA graphs out'
            ) from error
        autocast = '' if key.autocast is None else f', autocast to {key.autocast}'
        print_log(
            f'CUDA graph of {name} for {"training" if key.training else "inference"}: '
            f'{key.shape}, {key.dtype}{autocast}.',
            logger='current',
            level=logging.INFO,
        )
        return graph


class Weights:
    """The modules, parameters and buffers of a network, to see later whether they are the same.

    Args:
        module: The network.
        training: Whether values may change, as an optimizer changes them, but not which parameters
            are trained. Otherwise values must stay too, of which a network may keep casts.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.modules = list(module.modules())
        self.modes = [part.training for part in self.modules]
        kinds = ('_modules', '_parameters', '_buffers')
        holders = (vars(part)[kind] for part in self.modules for kind in kinds)
        self.holders = [holder for holder in holders if holder]
        self.values = self._values()
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        # Kept, so that no other tensor gets the memory that a graph reads: what the network has as
        # plain attributes, such as casts of its weights, too.
        leaves = tree_flatten([list(vars(part).values()) for part in self.modules])[0]
        self.kept = [leaf.detach() for leaf in (*self.tensors, *leaves) if isinstance(leaf, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.property = attrgetter('requires_grad' if training else '_version')
        # Tensors made in inference mode have no version.
        self.watched = [t for t in self.tensors if training or not t.is_inference()]
        self.properties = list(map(self.property, self.watched))

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(holder.values() for holder in self.holders))

    def are_the_same(self) -> bool:
        """Whether nothing was moved, replaced, switched or, unless training, written to."""
        values = self._values()
        return (
            len(values) == len(self.values)
            and all(map(is_, values, self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(self.property, self.watched)) == self.properties
            and [part.training for part in self.modules] == self.modes
        )


# ------------------------------------------------------------------------------------------- graphs
class InferenceGraph:
    """A captured forward pass.

    Args:
        forward: Of the network.
        x: An input, of whose size, dtype and device the others will be, in the autocast that holds.
    """

    def __init__(self, forward: Callable[[Tensor], Any], x: Tensor) -> None:
        # Not in inference mode, whose tensors could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), uncached_autocast(x):
            self.x = x.detach().clone()
            warm_up(lambda: forward(self.x), x.device)
            self.graph = torch.cuda.CUDAGraph()
            with capturing(self.graph, x.device):
                self.outputs = forward(self.x)

    def __call__(self, x: Tensor) -> Any:
        self.x.copy_(x)
        self.graph.replay()
        return tree_map(clone, self.outputs)


def clone(value: Any) -> Any:
    """A tensor's copy; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


class TrainingGraph:
    """A captured forward pass and a captured backward pass, as one node of autograd.

    `torch.cuda.make_graphed_callables` does the same with less care: it hands out its own memory as
    gradients, so that accumulated ones are wrong, and changes BatchNorm's statistics.

    Args:
        module: The network, in training mode.
        forward: Its forward without graphs.
        x: An input, of whose size, dtype and device the others will be, in the autocast that holds.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.x = x.detach().clone()
        self.calls = 0  # of the forward pass
        self.pending = 0  # the call whose backward pass can be computed

        def run_forward() -> tuple[list[Tensor], list[Tensor], Any]:
            """Outputs, those of them that need gradients, and how they belong together."""
            with uncached_autocast(x):
                outputs, structure = tree_flatten(forward(self.x))
            return outputs, [output for output in outputs if output.requires_grad], structure

        def run_backward(outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
            # Without autocast, as `loss.backward()` is called.
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
        self.calls += 1
        self.pending = self.calls
        self.x.copy_(x)
        self.forward_graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def replay_backward(self, call: int, output_grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The gradient of each parameter, as a new tensor.

        Args:
            call: The forward pass, counted from 1.
            output_grads: Gradients of all outputs.

        Raises:
            RuntimeError: What it needs was written over.
        """
        if call != self.pending:
            reason = (
                'was called again before the backward pass'
                if call != self.calls
                else 'had its backward pass already'
            )
            raise RuntimeError(
                f'a network with CUDA graphs keeps what one backward pass needs, and it {reason}: '
                'leave CUDA graphs out'
            )
        self.pending = 0
        needed = [grad for grad, needs in zip(output_grads, self.needs_grad) if needs]
        with torch.cuda.device(self.x.device):
            copy_all(self.output_grads, needed)
            self.backward_graph.replay()
            found = [grad for grad in self.grads if grad is not None]
            new = iter(copies(found))
        return [None if grad is None else next(new) for grad in self.grads]


class Replay(torch.autograd.Function):
    """A `TrainingGraph` as a node of autograd: its parameters are inputs and get gradients."""

    @staticmethod
    def forward(ctx: Any, graph: TrainingGraph, x: Tensor, *parameters: Tensor) -> Any:
        outputs = graph.replay_forward(x)
        ctx.graph, ctx.call = graph, graph.calls
        ctx.mark_non_differentiable(
            *(output for output, needs in zip(outputs, graph.needs_grad) if not needs)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.replay_backward(ctx.call, grads)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """New tensors of the same values and strides, written by a few launches."""
    new = [torch.empty_like(tensor) for tensor in tensors]
    copy_all(new, tensors)
    return new


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Writes each source into its target by a few launches."""
    if targets:
        torch._foreach_copy_(targets, sources)


# ------------------------------------------------------------------------------------------ capture
@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which networks are captured, as the default one cannot be."""
    return torch.cuda.Stream(device)


def warm_up(function: Callable[[], object], device: torch.device) -> None:
    """Calls a function on the stream on which it will be captured."""
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
    """While it lasts, a graph records what would run.

    Args:
        graph: The graph.
        device: The current device.
        pool: Memory of another graph, for one that runs behind that one only.
    """
    # Of this thread alone: one that pins the memory of batches goes on meanwhile. The outer context
    # leaves the stream even if the capture fails, which torch's does not.
    stream = side_stream(device)
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'),
    ):
        yield


@contextmanager
def uncached_autocast(x: Tensor) -> Iterator[None]:
    """The autocast that holds, but with every cast as an operation of its own.

    A cached one would be missing in the graph, and its memory would be freed behind its back.
    """
    if not is_autocast_enabled(DEVICE):
        yield
        return
    # A float64 input would hide autocast's own dtype.
    dtype = autocast_dtype(torch.empty(0, device=x.device))
    with torch.autocast(DEVICE, dtype, cache_enabled=False):
        yield


@contextmanager
def unchanged_state(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Gives buffers and random numbers the values that they had, at the end."""
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
