"""Checkpoint files for tests: as published, in other forms, and hostile."""

import io
import zipfile

import torch


def published_names(arch, num_classes=10):
    """Names and shapes of a published checkpoint, independent of our classes."""
    names = {}
    channels, kernels = arch.channels, arch.kernel_size
    if isinstance(kernels, int):
        kernels = (kernels,) * len(channels)
    half = channels[0] // 2

    def put(prefix, *shape, bias=True):
        names[f'{prefix}.weight'] = shape
        if bias:
            names[f'{prefix}.bias'] = shape[:1]

    put('downsample_layers.0.0', half, 3, 3, 3, bias=False)
    put('downsample_layers.0.3', half, half, 3, 3, bias=False)
    put('downsample_layers.0.6', channels[0], half, 2, 2, bias=False)
    for index in (2, 5):
        put(f'downsample_layers.0.{index}', half)
        names[f'downsample_layers.0.{index}.running_mean'] = (half,)
        names[f'downsample_layers.0.{index}.running_var'] = (half,)
        names[f'downsample_layers.0.{index}.num_batches_tracked'] = ()
    for i in range(1, len(channels)):
        put(f'downsample_layers.{i}.0', channels[i - 1])
        put(f'downsample_layers.{i}.1', channels[i], channels[i - 1], 2, 2)
    for i, (width, depth) in enumerate(zip(channels, arch.depths)):
        for j in range(depth):
            block = f'stages.{i}.{j}'
            put(f'{block}.attn.norm', width)
            put(f'{block}.attn.att.0', width, width, 1, 1)
            put(f'{block}.attn.att.2', width, 1, kernels[i], kernels[i])
            put(f'{block}.attn.v', width, width, 1, 1)
            put(f'{block}.attn.proj', width, width, 1, 1)
            put(f'{block}.mlp.norm', width)
            put(f'{block}.mlp.fc1', 4 * width, width, 1, 1)
            put(f'{block}.mlp.pos', 4 * width, 1, 3, 3)
            put(f'{block}.mlp.fc2', width, 4 * width, 1, 1)
            names[f'{block}.layer_scale_1'] = (width,)
            names[f'{block}.layer_scale_2'] = (width,)
    put('head.0', 1280, channels[-1], 1, 1)
    put('head.2', 1280)
    put('pred', num_classes, 1280)
    return names


def published_state_dict(arch, prefix='', num_classes=10, seed=0):
    """The tensors of a published checkpoint, with random values."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_names(arch, num_classes).items():
        value = torch.rand(shape, generator=generator) * 0.1 + 0.01
        is_count = name.endswith('num_batches_tracked')
        state[prefix + name] = torch.tensor(7) if is_count else value
    return state


def in_mmpretrain(state_dict):
    """The same under the names of an ImageClassifier's `backbone` and `head`."""
    return {
        f'head.{name}' if name.startswith(('head.', 'pred.')) else f'backbone.{name}': value
        for name, value in state_dict.items()
    }


class Attack:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


CALLED = f'{open.__module__}.open'  # as pickles name it: _io.open since Python 3.12


def write_call(path, trace, content=None):
    """A checkpoint that calls a function."""
    torch.save(dict(content or {}, args=Attack(trace)), path)


def write_getattr_chain(path, trace, content=None):
    """One that gets from `getattr` on an admitted class to `exec`, with only harmless names.

    A function's `__builtins__` become attributes of a Namespace, its `exec` becomes the
    `__setstate__` of a second one, and setting its state runs the code. `content` follows.
    """

    def name(module, function):
        return f'c{module}\n{function}\n'.encode()

    def text(value):
        return b'X' + len(value).to_bytes(4, 'little') + value.encode()

    def attribute(of, which):
        return name('builtins', 'getattr') + of + text(which) + b'\x86R'

    namespace = name('argparse', 'Namespace') + b')R'
    init = attribute(name('mmengine.logging.history_buffer', 'HistoryBuffer'), '__init__')
    program = (
        b'\x80\x02'
        + (namespace + b'q\x00' + attribute(init, '__builtins__') + b'b')
        + (namespace + b'}' + text('__setstate__') + attribute(b'h\x00', 'exec') + b'sb')
        + (text(f'open({str(trace)!r}, "w")') + b'b')
    )
    buffer = io.BytesIO()
    torch.save(content or {}, buffer)
    replace_pickle(buffer, path, lambda pickle: program + pickle[2:])


def replace_pickle(source, path, change):
    """Copies a file of `torch.save` with its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, 'w') as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, change(data) if entry.endswith('data.pkl') else data)


class Program(torch.nn.Module):
    """Has code that TorchScript runs as it loads the file."""

    def __init__(self, trace):
        super().__init__()
        self.trace = str(trace)
        self.kept = torch.ones(1)

    @torch.jit.export
    def __getstate__(self):
        return self.trace, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.trace, self.training = state
        self.kept = torch.from_file(self.trace, True, 1)  # makes the file

    def forward(self, x):
        return x


def write_torchscript(path, trace):
    """An archive that torch before 2.6 runs, also with `weights_only=True` (CVE-2025-32434)."""
    torch.jit.script(Program(trace)).save(str(path))


HOSTILE = {'call': write_call, 'getattr chain': write_getattr_chain}
