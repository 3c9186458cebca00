"""CUDA graphs on a CPU: a stand-in that records and replays operators."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mmconv2former.engine import cuda_graphs


def tree_leaves(tree):
    return tree_flatten(tree)[0]  # torch 2.1 has no `tree_leaves`


def alias(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


class StandIn(TorchDispatchMode):
    """Stands for a CUDA graph: records operators in its context."""

    made = 0
    replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []
        StandIn.made += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError('operation not permitted when stream is capturing')
        # Aliases of the tensors, as in-place operators may change their shape.
        inputs = tree_map(alias, (args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, *inputs, tree_map(alias, result)))
        return result

    def replay(self):
        StandIn.replays += 1
        with torch.no_grad():
            for function, args, kwargs, before in self.calls:
                again = function(*args, **kwargs)
                if all(value.alias_info is None for value in function._schema.returns):
                    for old, new in zip(tree_leaves(before), tree_leaves(again)):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)

    def pool(self):
        return self


@pytest.fixture
def simulated(monkeypatch):
    """Makes CUDA graphs believe that the CPU is a CUDA device."""

    @contextmanager
    def capturing(graph, device, pool=None):
        with graph:
            yield

    def warm_up(function, device):
        for _ in range(cuda_graphs.WARM_UP_CALLS):
            function()

    monkeypatch.setattr(StandIn, 'made', 0)
    monkeypatch.setattr(StandIn, 'replays', 0)
    monkeypatch.setattr(cuda_graphs, 'DEVICE', 'cpu')
    monkeypatch.setattr(cuda_graphs, 'capturing', capturing)
    monkeypatch.setattr(cuda_graphs, 'warm_up', warm_up)
    if hasattr(torch, 'accelerator'):  # asked by optimizers of torch 2.14
        monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda **options: None)
    for name, value in {
        'CUDAGraph': StandIn,
        'device': lambda device: nullcontext(),
        'device_count': lambda: 1,
        'get_rng_state': lambda device=None: torch.get_rng_state(),
        'is_available': lambda: True,
        'is_current_stream_capturing': lambda: False,
        'set_rng_state': lambda state, device=None: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
