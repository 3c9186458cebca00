"""The converter writes complete files, and leaves nothing behind when it refuses."""

import argparse
import hashlib
import os
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import convert_weights
import pytest
import torch
from helpers.checkpoints import in_mmpretrain, published_state_dict, write_call
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from mmconv2former import Conv2Former
from mmconv2former.models.cls_head import Conv2FormerClsHead
from mmconv2former.models.conv2former import ARCHS, Arch

NARROW = Arch((8, 12, 16, 20), (1, 2, 2, 1), 7)
STATE = published_state_dict(NARROW)
AVERAGE = published_state_dict(NARROW, seed=1)
BACKBONE = {name for name in STATE if name.startswith(('stages', 'downsample_layers'))}


@pytest.fixture
def convert(guarded, monkeypatch, capsys, tmp_path):
    """Runs the tool; returns what it printed, its error last."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        error = ''
        try:
            convert_weights.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            error = str(stop.code)
        printed = capsys.readouterr()
        return printed.out + printed.err + error

    return run


def written(suffix='.pth'):
    """The only file that a conversion left, and its tensors."""
    (name,) = os.listdir('out')
    path = os.path.join('out', name)
    if suffix == '.safetensors':
        return path, load_file(path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    return path, content['state_dict']


def assert_equal(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def save_timm(path):
    """As timm saves, distributed and with an average."""
    arguments = argparse.Namespace(model='conv2former_x', lr=1e-3)
    state, average = ({f'module.{n}': t for n, t in s.items()} for s in (STATE, AVERAGE))
    content = dict(state_dict=state, state_dict_ema=average, args=arguments, optimizer={}, epoch=9)
    torch.save(content, path)


def save_ema_hook(path):
    """As mmengine's EMAHook saves: the average is in the first place."""
    average, state = in_mmpretrain(AVERAGE), in_mmpretrain(STATE)
    source = dict(steps=torch.tensor(9)) | {f'module.{name}': t for name, t in state.items()}
    torch.save(dict(state_dict=average, ema_state_dict=source, meta=dict(epoch=1)), path)


def save_detector(path):
    """For dense prediction: output norms instead of a classification head."""
    state = {f'backbone.{name}': STATE[name] for name in BACKBONE}
    state |= {'backbone.norm1.weight': torch.ones(12), 'neck.conv.weight': torch.ones(3)}
    torch.save(dict(state_dict=state, meta=dict(epoch=1)), path)


def save_published(path):
    torch.save(STATE, path)


SOURCES = {  # how it is saved, options, whether the average is expected, what is dropped
    'timm': (save_timm, [], False, '4 of head, 2 of pred'),
    'timm, averaged': (save_timm, ['--ema'], True, '4 of head, 2 of pred'),
    'EMAHook': (save_ema_hook, ['--ema'], True, '6 of head'),
    'plain': (save_published, [], False, '4 of head, 2 of pred'),
    'mmpretrain': (
        lambda path: torch.save(dict(state_dict=in_mmpretrain(STATE)), path), [], False, '6 of head'
    ),
    'detector': (save_detector, [], False, '1 of neck'),
    'safetensors': (lambda path: save_file(STATE, path), [], False, '4 of head, 2 of pred'),
}  # fmt: skip


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('case', SOURCES)
def test_backbone(case, suffix, convert):
    save, options, averaged, dropped = SOURCES[case]
    source = 'source.safetensors' if case == 'safetensors' else 'source.pth.tar'
    save(source)
    output = convert(source, f'out/narrow{suffix}', *options)
    expected = {name: (AVERAGE if averaged else STATE)[name] for name in BACKBONE}
    if case == 'detector':
        expected['norm1.weight'] = torch.ones(12)
    path, tensors = written(suffix)
    assert_equal(tensors, expected)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert path == f'out/narrow-{digest[:8]}{suffix}'
    assert f'used      {len(expected)} tensors' in output
    assert f'dropped   {dropped}\n' in output


class Classifier(nn.Module):
    """Names as in mmpretrain's ImageClassifier."""

    def __init__(self):
        super().__init__()
        self.backbone = Conv2Former(
            dict(channels=NARROW.channels, depths=NARROW.depths), kernel_size=7, out_norm=False
        )
        self.head = Conv2FormerClsHead(20, 10)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('save', [save_timm, save_ema_hook])
def test_whole_classifier_loads_without_a_missing_key(save, suffix, convert):
    save('source.pth')
    output = convert('source.pth', f'out/narrow{suffix}', '--classifier')
    assert '10 classes' in output
    assert 'dropped   none' in output
    path, tensors = written(suffix)
    assert CheckpointLoader.load_checkpoint(path)['state_dict'].keys() == tensors.keys()
    classifier = Classifier()
    load_checkpoint(classifier, path, strict=True)
    assert_equal(
        classifier.state_dict(), in_mmpretrain(AVERAGE if save is save_ema_hook else STATE)
    )


def test_arch_is_recognised(convert):
    torch.save(published_state_dict(ARCHS['nano'], num_classes=1000), 'source.pth')
    output = convert('source.pth', 'out/file.pth', '--arch', 'n', '--classifier')
    arch = ARCHS['nano']
    assert f'arch nano, kernel_size {arch.kernel_size}, channels {arch.channels}' in output
    assert f'depths {arch.depths}, mlp_ratio 4, 1000 classes' in output
    path, _ = written()
    assert torch.load(path, weights_only=True)['meta']['num_classes'] == 1000


@pytest.mark.parametrize('sizes', [[11], [11, 9, 7, 7]])
def test_adapted_kernels(sizes, convert):
    save_published('source.pth')
    output = convert('source.pth', 'out/file.pth', '--kernel-size', 7, '--adapt-kernel', *sizes)
    assert 'padded    kernels to' in output
    path, tensors = written()
    sizes = tuple(sizes * 4)[:4]
    for stage, size in enumerate(sizes):
        name = f'stages.{stage}.0.attn.att.2.weight'
        assert tensors[name].shape[-2:] == (size, size)
        middle = slice((size - 7) // 2, (size + 7) // 2)
        assert torch.equal(tensors[name][..., middle, middle], STATE[name])
        assert tensors[name].sum() == pytest.approx(STATE[name].sum().item(), rel=1e-5)
    assert torch.load(path, weights_only=True)['meta']['kernel_size'] == sizes


def test_output_is_the_same_and_small(convert):
    """The same bytes under any name, and no more than the tensors need."""
    large = torch.zeros(1_000_000)
    views = {name: large[: value.numel()].view(value.shape) for name, value in STATE.items()}
    torch.save(dict(state_dict=views, optimizer=torch.zeros(1_000_000)), 'source.pth')
    convert('source.pth', 'out/a.pth')
    path, tensors = written()
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    assert os.path.getsize(path) < size + 1000 * len(tensors)
    convert('source.pth', 'other/b.pth')
    assert os.listdir('other') == [os.path.basename(path).replace('a-', 'b-')]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666 & ~umask


def test_existing_output_is_replaced_by_force_only(convert):
    save_published('source.pth')
    convert('source.pth', 'out/file.pth')
    path, _ = written()
    Path(path).write_bytes(b'mine')
    output = convert('source.pth', 'out/file.pth')
    assert output.endswith(f'error: {path} exists already; --force replaces it')
    assert os.listdir('out') == [os.path.basename(path)]
    assert Path(path).read_bytes() == b'mine'
    convert('source.pth', 'out/file.pth', '--force')
    assert written()[1].keys() == BACKBONE


def save_without(name, path):
    torch.save({key: value for key, value in STATE.items() if key != name}, path)


# How the file is made, options, what the error says; more in reliability/test_bad_checkpoints.py.
REFUSED = {
    'wrong arch': (
        save_published,
        ['--arch', 'base'],
        'file.pth: --arch base was expected, found arch without a name, kernel_size 7, channels (8',
    ),
    'wrong kernel': (
        save_published,
        ['--kernel-size', 11],
        'file.pth: --kernel-size 11 was expected, found 7',
    ),
    'unknown arch': (save_published, ['--arch', 'huge'], 'arch must be one of nano, tiny, small'),
    'even kernel': (save_published, ['--adapt-kernel', 10], 'kernel_size must be odd, got 10'),
    'no average': (save_published, ['--ema'], 'has no averaged weights'),
    'another network': (
        lambda path: torch.save({'layer1.0.conv1.weight': torch.ones(1)}, path),
        [],
        'file.pth is not a Conv2Former: it has no stages.0.0.attn.att.2.weight; its names begin '
        "with ['layer1']",
    ),
    'no head': (
        lambda path: save_without('pred.bias', path),
        ['--classifier'],
        "file.pth: --classifier: the classification head lacks ['pred.bias']",
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refuses_and_leaves_nothing(case, convert, tmp_path):
    save, options, message = REFUSED[case]
    save('file.pth')
    *_, last = convert('file.pth', 'out/file.pth', *options).splitlines()
    assert last.startswith('error: ')
    assert message in last
    assert set(os.listdir(tmp_path)) <= {'file.pth'}


def test_trusted_file_is_run_with_a_warning(convert, monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')  # torch's own, which nothing overrides
    write_call('file.pth', 'trace', dict(state_dict=STATE))
    assert 'WARNING: --trust-checkpoints' in convert(
        'file.pth', 'out/file.pth', '--trust-checkpoints'
    )
    assert os.path.exists('trace')
    assert written()[1].keys() == BACKBONE


@contextmanager
def full_disk():
    """A limit on the size of files: a write fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_output_that_cannot_be_written(suffix, convert):
    save_published('source.pth')
    with full_disk():
        output = convert('source.pth', f'out/file{suffix}')
    assert 'error: cannot write into out: ' in output.splitlines()[-1]
    assert os.listdir('out') == []
    output = convert('source.pth', f'source.pth/file{suffix}')  # a folder that is a file
    assert 'error: cannot write into source.pth: ' in output.splitlines()[-1]
    assert 'must end with .pth or .safetensors, got out.bin' in convert('source.pth', 'out.bin')
