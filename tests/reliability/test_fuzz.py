"""Random checkpoints and arguments: accepted, or refused with a documented error.

    pytest tests/reliability/test_fuzz.py           # 200 cases of each kind
    pytest tests/reliability/test_fuzz.py --slow    # 2,000 and more

None may crash, hang, take much memory or run code in a file. Hypothesis generates the cases and
finds the smallest one that fails; they are the same in each run.
"""

import argparse
import io
import math
import pickletools
import resource
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers.checkpoints import published_state_dict, replace_pickle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version
from safetensors.torch import save

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.checkpoint.loading import load_model, load_pretrained
from mmconv2former.checkpoint.reading import (
    UNREADABLE,
    CheckpointError,
    load_from_checked_file,
    read_state_dict,
)
from mmconv2former.checkpoint.resumption import check_resumable
from mmconv2former.checkpoint.safe_pickle import DataUnpickler, admitted_globals
from mmconv2former.models.conv2former import Arch

AREAS = {'reader': 'Checkpoints', 'arguments': 'Configs'}
DOCUMENTED = (ValueError, TypeError)
NARROW = Arch(channels=(4, 6), depths=(1, 1), kernel_size=3)
MEMORY = 512 * 2**20  # bytes that no case may add to the process
EXECUTED = []
HAS_META_CHECKPOINT = digit_version(torch.__version__) >= digit_version('2.4')


def executed(*args, **kwargs):
    """What a hostile pickle would call."""
    EXECUTED.append(args)


def fuzz(slow, strategy, check, count, shrink=True):
    """Runs `check` on `count` cases (a tenth of them without --slow); returns their number."""
    phases = [Phase.explicit, Phase.generate] + [Phase.shrink] * shrink
    number = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count if slow else count // 10,
        deadline=20_000,  # milliseconds: none may hang
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        nonlocal number
        number += 1
        check(case)
        assert not EXECUTED

    run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < MEMORY
    return number


# ------------------------------------------------------------------------------- files of weights
def run_content():
    return dict(
        meta=dict(epoch=1, iter=4, config='a = 1'),
        state_dict=OrderedDict(published_state_dict(NARROW)),
        optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(params=[0])]),
        message_hub=dict(
            log_scalars=dict(loss=HistoryBuffer([1.0, 2.0], [1, 1])),
            runtime_info={},
            resumed_keys={},
        ),
        args=argparse.Namespace(lr=0.1),
        metric=np.float64(3.0),
        array=np.arange(4),
    )


def torch_bytes(content, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


REAL = {
    'zip': torch_bytes(run_content()),
    'legacy': torch_bytes(run_content(), _use_new_zipfile_serialization=False),
    'safetensors': save({n: v.contiguous() for n, v in published_state_dict(NARROW).items()}),
}


def mutated(data):
    """Bytes of a file cut, changed, repeated or exchanged in a few places."""
    position = st.integers(0, len(data) - 1)
    head = st.integers(0, min(len(data) - 1, 4000))  # where the structure is
    change = st.tuples(
        st.sampled_from(['flip', 'insert', 'delete', 'truncate', 'splice', 'zero', 'number']),
        position | head,
        st.integers(0, 255),
        st.integers(1, 64),
    )

    def apply(changes):
        result = bytearray(data)
        for kind, place, byte, length in changes:
            place = min(place, len(result))
            if kind == 'flip' and place < len(result):
                result[place] ^= byte or 1
            elif kind == 'insert':
                result[place:place] = bytes([byte]) * length
            elif kind == 'delete':
                del result[place : place + length]
            elif kind == 'truncate':
                del result[place:]
            elif kind == 'splice':
                result[place : place + length] = data[byte * 7 : byte * 7 + length]
            elif kind == 'zero':
                result[place : place + length] = bytes(length)
            else:  # a large number, as of sizes
                result[place : place + 8] = struct.pack('<Q', 1 << (byte % 64))
        return bytes(result)

    return st.lists(change, min_size=1, max_size=4).map(apply)


def in_zip(program):
    """A file of `torch.save` with a pickle of ours."""
    target = io.BytesIO()
    replace_pickle(io.BytesIO(REAL['zip']), target, lambda _: program)
    return target.getvalue()


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def joined(*parts):
    return st.tuples(*(part if isinstance(part, st.SearchStrategy) else st.just(part)
                       for part in parts)).map(b''.join)  # fmt: skip


def many(part):
    return st.lists(part, max_size=4).map(b''.join)


NOT_ADMITTED = ['test_fuzz.executed', 'os.system', 'builtins.eval', 'builtins.__import__',
                'torch.load', 'numpy.load', 'copyreg._reconstructor']  # fmt: skip
CONTAINERS = ['collections.OrderedDict', 'argparse.Namespace', 'torch.nn.parameter.Parameter',
              'torch._utils._rebuild_tensor_v2',
              'mmengine.logging.history_buffer.HistoryBuffer']  # fmt: skip
PATHS = st.one_of(map(st.sampled_from, [NOT_ADMITTED, CONTAINERS, sorted(admitted_globals())])).map(
    lambda path: path.rpartition('.')[::2]
)
# Classes and functions: admitted ones, torch's, and ones that run code; as GLOBAL and STACK_GLOBAL.
NAMED = PATHS.map(lambda path: f'c{path[0]}\n{path[1]}\n'.encode()) | PATHS.map(
    lambda path: text(path[0]) + text(path[1]) + b'\x93'
)
PUSHED = st.sampled_from(
    [b'N', b'\x88', b'K\x03', b'K\x00', b'J\xff\xff\xff\xff', b'G?\xf0' + bytes(6), b'}', b']',
     b')', b'\x8a\x08' + struct.pack('<q', 2**50), b'\x8a\x08' + struct.pack('<q', -(2**50)),
     b'\x8f', b'C\x04abcd', b'Q', b'((lQ', *map(text, ['f8', 'O', 'latin1'])]
)  # fmt: skip
ATTRIBUTES = st.sampled_from(
    [
        'a',
        '__setstate__',
        '__class__',
        '__init__',
        '__code__',
        'append',
        'requires_grad',
        'exec',
        'storage',
    ]
).map(text)


OPCODES = st.sampled_from([code.code.encode('latin1') for code in pickletools.opcodes])
PROGRAMS = st.lists(NAMED | PUSHED | ATTRIBUTES | OPCODES | st.binary(max_size=6), max_size=30).map(
    lambda parts: b'\x80\x02' + b''.join(parts) + b'.'
)


def mutated_pickles():
    with zipfile.ZipFile(io.BytesIO(REAL['zip'])) as file:
        name = next(name for name in file.namelist() if name.endswith('data.pkl'))
        return mutated(file.read(name))


FILES = {
    'mutated zip files': ('.pth', mutated(REAL['zip'])),
    'mutated legacy files': ('.pth', mutated(REAL['legacy'])),
    'mutated safetensors': ('.safetensors', mutated(REAL['safetensors'])),
    'mutated pickles in whole zip files': ('.pth', mutated_pickles().map(in_zip)),
    'random programs of opcodes': ('.pth', PROGRAMS.map(in_zip)),
    'random programs in the legacy form': ('.pth', PROGRAMS),
    'random bytes': ('.pth', st.binary(max_size=200)),
}


class Wrapper(torch.nn.Module):
    """A model with a backbone."""

    def __init__(self):
        super().__init__()
        arch = dict(channels=(4, 6), depths=(1, 1), kernel_size=3)
        self.backbone = Conv2Former(arch, out_indices=(0, 1))


def try_all_readers(path):
    """Every way in which a file comes in; each accepts it or raises what is documented."""
    model = Wrapper()
    for reader in [
        lambda: read_state_dict(path, averaged=True),
        lambda: load_pretrained(model.backbone, path),
        lambda: load_model(model, load_from_checked_file(path), path, strict=True),
        lambda: load_model(model, load_from_checked_file(path), path, strict=False),
        lambda: check_resumable(load_from_checked_file(path), path),
    ]:
        message = refusal(reader)
        assert '\n' not in message
        assert not message or path in message


def refusal(reader):
    """What a reader says about a file; nothing if it accepts it."""
    try:
        reader()
    except CheckpointError as error:
        return str(error)
    return ''


@pytest.fixture
def older_torch(monkeypatch):
    """As with torch before 2.5, which reads files with `DataUnpickler`."""
    monkeypatch.delattr(torch.serialization, 'safe_globals', raising=False)
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)


OLDER = ' (as with torch < 2.5)'
IN_PICKLES = [kind for kind, (suffix, _) in FILES.items() if suffix == '.pth']


@pytest.mark.parametrize(
    ('kind', 'where'), [*((kind, '') for kind in FILES), *((kind, OLDER) for kind in IN_PICKLES)]
)
def test_reader_of_weights(kind, where, slow, tmp_path, fault_report, request):
    suffix, strategy = FILES[kind]
    if where == OLDER:
        request.getfixturevalue('older_torch')
    path = str(tmp_path / f'file{suffix}')
    before = state_of_admitted()

    def check(data):
        with open(path, 'wb') as file:
            file.write(data)
        try_all_readers(path)

    number = fuzz(slow, strategy, check, 600)
    check_unchanged(before)
    seen = 'accepted, or refused with a CheckpointError of one line'
    fault_report(AREAS['reader'], f'fuzzing: {kind}{where}', number, number, seen)


def values_of(content):
    """All tensors of the checkpoint of a run, by name."""
    step = content['optimizer']['state'][0]['step']
    return {**content['state_dict'], 'optimizer.step': step}


def test_one_changed_byte(slow, tmp_path, fault_report):
    """Anywhere in the file: in tensors, names, sizes, padding and the directory of the archive."""
    path, data = tmp_path / 'file.pth', REAL['zip']
    path.write_bytes(data)
    expected = values_of(load_from_checked_file(str(path)))
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    random = np.random.default_rng(0)
    count = 2000 if slow else 200
    accepted = 0
    for number in range(count):
        # Every second one is in the directory, which is a small part of the file.
        place = random.integers(directory * (number % 2), len(data))
        changed = bytearray(data)
        changed[place] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            found = values_of(load_from_checked_file(str(path)))
        except CheckpointError:
            continue
        accepted += 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert 0 < accepted < count / 2
    seen = f'{accepted} accepted with the same weights, the others refused with a CheckpointError'
    fault_report(AREAS['reader'], 'one changed byte of a file', count, count, seen)


def state_of_admitted():
    """Attributes of all classes and functions that a file may name, which it must not change."""
    return {name: dict(vars(value)) for name, value in admitted_globals().items()
            if hasattr(value, '__dict__')}  # fmt: skip


def check_unchanged(before):
    """Without an assertion on the states, which pytest would show in gigabytes."""
    after = state_of_admitted()
    changed = [name for name in before if after[name] != before[name]]
    assert not changed


@pytest.mark.parametrize(
    'name',
    ['torch.nn.parameter Parameter', 'torch._utils _rebuild_tensor_v2', 'torch FloatStorage',
     'mmengine.logging.history_buffer HistoryBuffer', 'collections OrderedDict'],
)  # fmt: skip
def test_classes_and_functions_keep_their_attributes(name, tmp_path, older_torch):
    """With the opcode BUILD, a pickle sets attributes of anything it names."""
    path = tmp_path / 'file.pth'
    named = 'c' + name.replace(' ', '\n') + '\n'
    program = b'\x80\x02' + named.encode() + b'N}X\x01\x00\x00\x00aK\x01s\x86b.'
    path.write_bytes(in_zip(program))
    before = state_of_admitted()
    assert 'state of ' in refusal(lambda: read_state_dict(str(path)))
    check_unchanged(before)


def load_directly(program):
    """What the reader for torch < 2.5 makes of a pickle, without the file around it."""
    unpickler = DataUnpickler(io.BytesIO(program))
    unpickler.persistent_load = lambda saved: torch.ones(4)._typed_storage()
    return unpickler.load()


def larger(value):
    """Programs that push one object, of those that do so: all ways to call, change and contain."""
    arguments = joined(b'(', many(value), b't')
    attributes = joined(b'(', many(joined(ATTRIBUTES, value)), b'd')
    target = NAMED | value
    return (
        arguments
        | attributes
        | joined(b'(', many(value), b'l')
        | joined(target, arguments, st.sampled_from([b'R', b'\x81', b'}\x92']))  # as functions, new
        | joined(b'(', target, many(value), b'o')
        | joined(target, attributes | value, b'b')
        | joined(target, b'N', attributes, b'\x86b')  # slots
        | joined(target, ATTRIBUTES | value, value, b's')
        | joined(target, value, b'a')
        | joined(target, b'(', many(value), b'\x90')
    )


DIRECT = {
    'mutated pickles': mutated_pickles(),
    'well-formed programs of opcodes': joined(
        b'\x80\x04', st.recursive(NAMED | PUSHED | ATTRIBUTES, larger, max_leaves=12), b'.'
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', DIRECT)
def test_pickles_of_older_torch(kind, slow, fault_report):
    before, kinds = state_of_admitted(), set()

    def check(program):
        try:
            load_directly(program)
            kinds.add('taken')
        except UNREADABLE as error:
            kinds.add('not admitted' if 'not admitted' in str(error) else 'malformed')
        else:
            assert not any(path.rpartition('.')[2].encode() in program for path in NOT_ADMITTED)
        check_unchanged(before)

    # What one case changed stays so, in smaller ones too.
    number = fuzz(slow, DIRECT[kind], check, 3000, shrink=False)
    assert kinds == {'taken', 'not admitted', 'malformed'}
    seen = 'accepted, or refused with an error that becomes a CheckpointError'
    fault_report(AREAS['reader'], f'fuzzing: {kind} (torch < 2.5)', number, number, seen)


LARGE = 2**27
LARGE_SHAPE = b'(J' + struct.pack('<i', LARGE) + b't' + text('O')
FILLS_MEMORY = {
    'ndarray': b'cnumpy\nndarray\n(' + LARGE_SHAPE + b'tR',
    'new ndarray': b'cnumpy\nndarray\n(' + LARGE_SHAPE + b't\x81',
    '_reconstruct': b'cnumpy.core.multiarray\n_reconstruct\n(N' + LARGE_SHAPE + b'tR',
    'scalar': b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(' + text(f'V{LARGE}') + b'tRtR',
    'called bytearray': b'cbuiltins\nbytearray\n(J' + struct.pack('<i', LARGE) + b'tR',
    'bytearray': b'\x96' + struct.pack('<q', LARGE),
}  # fmt: skip


@pytest.mark.parametrize('case', FILLS_MEMORY)
def test_a_number_in_a_pickle_fills_no_memory(case):
    tracemalloc.start()
    with suppress(*UNREADABLE):
        load_directly(b'\x80\x05' + FILLS_MEMORY[case] + b'.')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.binary(max_size=5) | st.builds(lambda: torch.ones(2)) | st.builds(lambda: np.float64(1))
)  # fmt: skip
KEYS = st.sampled_from(
    ['state_dict', 'model', 'meta', 'epoch', 'iter', 'config', 'optimizer', 'message_hub',
     'log_scalars', 'runtime_info', 'resumed_keys', 'state_dict_ema', 'ema_state_dict', 'module.a',
     'stages.0.0.attn.att.2.weight', 'backbone.stages.0.0.attn.att.2.weight', 'param_groups']
)  # fmt: skip
STRUCTURES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.integers() | st.tuples(st.integers()), inner, max_size=5)
    ),
    max_leaves=12,
)
TOPS = st.dictionaries(KEYS, STRUCTURES, max_size=6) | STRUCTURES


def test_structures_of_checkpoints(slow, tmp_path, fault_report):
    path = str(tmp_path / 'file.pth')

    def check(content):
        torch.save(content, path)
        try_all_readers(path)

    number = fuzz(slow, TOPS, check, 500)
    seen = 'accepted, or refused with a CheckpointError of one line'
    fault_report(AREAS['reader'], 'fuzzing: nested dicts of all kinds', number, number, seen)


# -------------------------------------------------------------------------- arguments of networks
# What a config can hold.
ODDITIES = st.sampled_from(
    [None, True, False, math.nan, -1, 0.5, '', 'tiny', (), [], {}, [[1]], ((0, 1), 2),
     {'type': 'Constant'}, [{'type': 'Pretrained'}], 'os.system', 'builtins.print']
)  # fmt: skip
ANYTHING = ODDITIES | st.integers(-3, 20) | st.floats(-1, 8) | st.lists(
    st.integers(-2, 13) | ODDITIES, max_size=5
)  # fmt: skip
SMALL_INT = st.integers(-2, 12)
SIZES = st.integers(1, 9).map(lambda n: 2 * n - 1) | SMALL_INT


def maybe(sensible):
    """Mostly what is sensible, else anything."""
    return st.integers(0, 20).flatmap(lambda n: ANYTHING if n in (7, 13) else sensible)


SHARED = {
    'in_channels': maybe(st.integers(1, 5)),
    'fusion': maybe(st.sampled_from(['hadamard', 'sum', 'sigmoid', 'l1', 'linear'])),
    'mlp_ratio': maybe(st.floats(0.01, 8) | st.integers(1, 4)),
    'drop_path_rate': maybe(st.floats(0, 0.9)),
    'layer_scale_init_value': maybe(st.floats(-2, 2)),
    'out_norm': maybe(st.booleans()),
    'frozen_stages': maybe(st.integers(-1, 4)),
    'norm_eval': maybe(st.booleans()),
    'with_cp': maybe(st.booleans()),
    'recompute': maybe(st.sampled_from(['nothing', 'elementwise', 'expansion'])),
    'depthwise_conv': maybe(
        st.sampled_from(['DepthwiseConv', 'mmconv2former.DepthwiseConv', 'none', 'os.getcwd'])
    ),
    'init_cfg': maybe(st.none() | st.just(dict(type='Constant', layer='LayerNorm', val=1.0))),
}


def stages(number):
    """Channels and depths of a network of so many stages, mostly."""
    even = st.integers(1, 6).map(lambda n: 2 * n)
    return st.fixed_dictionaries(
        {
            'channels': maybe(st.lists(even, min_size=number, max_size=number)),
            'depths': maybe(st.lists(st.integers(1, 3), min_size=number, max_size=number)),
        },
        optional={
            'kernel_size': maybe(SIZES | st.lists(SIZES, min_size=number, max_size=number)),
        },
    )


HIERARCHICAL_ARCH = st.integers(1, 4).flatmap(stages) | st.dictionaries(
    st.sampled_from(['channels', 'depths', 'kernel_size', 'width', 3]), ANYTHING
)
ISOTROPIC_ARCH = st.fixed_dictionaries(
    {
        'channels': maybe(st.integers(1, 6).map(lambda n: 4 * n)),
        'depth': maybe(st.integers(1, 4)),  # by default 18, which takes long
    },
    optional={'kernel_size': maybe(SIZES)},
)
NETWORKS = {
    'Conv2Former': (Conv2Former, HIERARCHICAL_ARCH, {'kernel_size': SIZES | st.lists(SIZES)}, 4),
    'Conv2FormerIsotropic': (
        Conv2FormerIsotropic,
        ISOTROPIC_ARCH,
        {'kernel_size': SIZES, 'patch_embedding': st.sampled_from(['plain', 'conv'])},
        3,
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_arguments_of_the_network(name, slow, fault_report):
    network, arch, own, num_outputs = NETWORKS[name]
    arguments = st.fixed_dictionaries(
        {
            'arch': maybe(arch),
            'out_indices': maybe(st.sampled_from([-1, 0, [0], [-1]]))
            | st.lists(st.integers(-num_outputs, num_outputs), max_size=4),
        },
        optional=SHARED | {key: maybe(own[key]) for key in own},
    )
    built = 0

    def check(kwargs):
        nonlocal built
        try:
            with torch.device('meta'):
                model = network(**kwargs)
        except DOCUMENTED:
            return
        built += 1
        if built % 5:  # to run one takes ten times as long
            return
        # torch < 2.4 cannot compute again on this device
        model.train(HAS_META_CHECKPOINT or not model.with_cp)
        with torch.device('meta'):
            outputs = model(torch.empty(1, int(model.in_channels), 64, 64))
        assert [output.shape[1] for output in outputs] == list(model.channels)

    number = fuzz(slow, arguments, check, 2000)
    assert built > number / 50, 'hardly any case was sensible'
    seen = f'{built} built and run, the others refused as a ValueError or TypeError'
    fault_report(AREAS['arguments'], f'fuzzing: arguments of {name}', number, number, seen)
