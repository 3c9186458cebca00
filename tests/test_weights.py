"""Checkpoints in the forms they come in: read safely, loaded wholly or refused with the reason."""

import argparse
import re

import pytest
import torch
from mmengine.logging import HistoryBuffer
from test_backbone import SMALL_ARCHS, randomized

from mmconv2former import Conv2Former
from mmconv2former.backbone import ARCHS
from mmconv2former.weights import load_pretrained, read_state_dict


def published_names(arch):
    """Names and shapes of a published checkpoint, from the description, not from our classes."""
    names = {}
    channels, kernel = arch.channels, arch.kernel_size
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
    for i in range(1, 4):
        put(f'downsample_layers.{i}.0', channels[i - 1])
        put(f'downsample_layers.{i}.1', channels[i], channels[i - 1], 2, 2)
    for i, (width, depth) in enumerate(zip(channels, arch.depths)):
        for j in range(depth):
            block = f'stages.{i}.{j}'
            put(f'{block}.attn.norm', width)
            put(f'{block}.attn.att.0', width, width, 1, 1)
            put(f'{block}.attn.att.2', width, 1, kernel, kernel)
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
    put('pred', 10, 1280)
    return names


def published_state_dict(arch, prefix=''):
    torch.manual_seed(0)
    state = {}
    for name, shape in published_names(arch).items():
        is_count = name.endswith('num_batches_tracked')
        value = torch.tensor(7) if is_count else torch.rand(shape) * 0.1 + 0.01
        state[prefix + name] = value
    return state


def small(**kwargs):
    return Conv2Former(SMALL_ARCHS['narrow'], **kwargs)


@pytest.mark.parametrize('name', ['nano', 'tiny', 'small', 'base'])
def test_published_checkpoint_loads_whole(name, tmp_path):
    state = published_state_dict(ARCHS[name], 'module.')
    path = tmp_path / f'conv2former_{name[0]}.pth.tar'
    arguments = argparse.Namespace(model=f'conv2former_{name}', lr=1e-3, opt_betas=None)
    content = dict(epoch=299, arch=name, state_dict=state, args=arguments, optimizer={'state': {}})
    torch.save(content, path)
    model = Conv2Former(name, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    loaded = model.state_dict()
    for key in [key for key in loaded if not re.match(r'norm\d', key)]:
        assert torch.equal(loaded[key], state[f'module.{key}']), key
    left_out = {key[len('module.') :] for key in state} - set(loaded)
    assert {key.split('.')[0] for key in left_out} == {'head', 'pred'}


def test_large_has_the_published_names():
    with torch.device('meta'):
        model = Conv2Former('large', out_norm=False)
    published = published_names(ARCHS['large'])
    for name, value in model.state_dict().items():
        assert tuple(value.shape) == published.pop(name), name
    assert {name.split('.')[0] for name in published} == {'head', 'pred'}


@pytest.mark.parametrize('form', ['plain', 'state_dict', 'model', 'module', 'detector', 'prefix'])
def test_forms_give_the_same_output(form, tmp_path):
    source = randomized(small(out_norm=False)).eval()
    state = source.state_dict()
    prefix = {'module': 'module.', 'detector': 'backbone.', 'prefix': 'encoder.'}.get(form, '')
    state = {prefix + name: value for name, value in state.items()}
    if form == 'detector':  # as mmengine saves a detector
        history = HistoryBuffer([1.0, 2.0], [1, 1])
        state |= {'neck.weight': torch.ones(2)}
        state = dict(meta=dict(epoch=1), state_dict=state, message_hub=dict(loss=history))
    elif form in ('state_dict', 'model'):
        state = {form: state, 'epoch': 3}
    torch.save(state, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    if form == 'prefix':
        init_cfg['prefix'] = 'encoder'
    model = small(out_norm=False, init_cfg=init_cfg).eval()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x)[-1], source(x)[-1])
    model.init_weights()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_part_of_the_network_takes_a_whole_checkpoint(tmp_path):
    torch.save(randomized(small()).state_dict(), tmp_path / 'file.pth')
    part = small(out_indices=(0, 1))
    load_pretrained(part, str(tmp_path / 'file.pth'))
    assert part.norm1.weight[0] != 1


def test_other_initializers_still_run(tmp_path):
    torch.save(randomized(small(out_norm=False)).state_dict(), tmp_path / 'file.pth')
    constant = dict(type='Constant', layer='LayerNorm', val=0.5)
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    model = small(init_cfg=[pretrained, constant])
    model.init_weights()
    assert (model.norm0.weight == 0.5).all()
    assert (model.stages[0][0].attn.norm.weight != 0.5).all()
    assert model.init_cfg == [pretrained, constant]


class Attack:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_hostile_file_is_not_run(tmp_path):
    trace = tmp_path / 'trace'
    torch.save(dict(state_dict=small().state_dict(), args=Attack(trace)), tmp_path / 'file.pth')
    with pytest.raises(
        ValueError, match=r'file\.pth.* cannot be read: it holds io.open, which is not data'
    ):
        load_pretrained(small(), str(tmp_path / 'file.pth'))
    assert not trace.exists()


def save_without(name, path):
    state = small().state_dict()
    del state[name]
    torch.save(state, path)


REFUSED = {
    'text': (lambda p: p.write_text('hello'), 'cannot be read: '),
    'truncated': (
        lambda p: (torch.save(small().state_dict(), p), p.write_bytes(p.read_bytes()[:5000])),
        'cannot be read: ',
    ),
    'empty': (lambda p: p.write_bytes(b''), 'cannot be read: '),
    'a tensor': (lambda p: torch.save(torch.ones(1), p), 'must hold a state dict, got Tensor'),
    'no tensors': (lambda p: torch.save(dict(epoch=1), p), r"no tensors, only \['epoch'\]"),
    'other model': (lambda p: torch.save({'conv1.weight': torch.ones(1)}, p), 'names missing'),
    'a name missing': (
        lambda p: save_without('stages.1.0.attn.v.weight', p),
        r"1 of \d+ names missing, such as \['stages.1.0.attn.v.weight'\]",
    ),
    'other kernel': (
        lambda p: torch.save(small(kernel_size=7).state_dict(), p),
        r'kernel_size is \(7, 7, 7, 7\) in the file, \(5, 5, 5, 5\) in the model'
        r'.*\(8, 1, 7, 7\) in the file, \(8, 1, 5, 5\) in the model',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_file_leaves_the_model_unchanged(case, tmp_path):
    write, message = REFUSED[case]
    write(tmp_path / 'file.pth')
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(model, str(tmp_path / 'file.pth'))
    assert str(tmp_path / 'file.pth') in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_wrong_prefix_is_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r"prefix='encoder.'; the names begin with \['downsample"):
        load_pretrained(small(), str(tmp_path / 'file.pth'), prefix='encoder')


def test_missing_file_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r'pretrain/none.pth.*init_cfg=None'):
        read_state_dict('pretrain/none.pth')
