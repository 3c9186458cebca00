"""Checkpoints in all their forms: loaded strictly, or refused with the reason."""

import argparse
import os
import re

import numpy as np
import pytest
import torch
from helpers.checkpoints import in_mmpretrain, published_names, published_state_dict
from helpers.comparisons import SMALL_ARCHS, randomized
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.checkpoint import loading
from mmconv2former.checkpoint.architecture import recognise_arch
from mmconv2former.checkpoint.loading import load_model, load_pretrained
from mmconv2former.checkpoint.reading import CheckpointError
from mmconv2former.models.cls_head import Conv2FormerClsHead
from mmconv2former.models.conv2former import ARCHS, Arch

NARROW = Arch((8, 12, 16, 20), (1, 2, 2, 1), 5)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'file.pth')


def small(**kwargs):
    return Conv2Former(SMALL_ARCHS['narrow'], **kwargs)


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


# ------------------------------------------------------------------------------------ architecture
RECOGNISED = {
    **ARCHS,
    'base with 22K weights': Arch(ARCHS['base'].channels, ARCHS['base'].depths, kernel_size=7),
    'without a name': Arch((8, 12, 16), (1, 2, 1), kernel_size=(11, 7, 3)),
}


@pytest.mark.parametrize('name', RECOGNISED)
def test_published_names_and_shapes_are_ours_and_recognised(name):
    arch = RECOGNISED[name]
    sizes = arch.kernel_size
    names = published_names(arch, 21841)
    with torch.device('meta'):
        state = {key: torch.empty(shape) for key, shape in names.items()}
        settings = dict(channels=arch.channels, depths=arch.depths, kernel_size=sizes)
        model = Conv2Former(settings, out_indices=range(len(arch.depths)), out_norm=False)
    in_backbone = {n: shape for n, shape in names.items() if not n.startswith(('head', 'pred'))}
    assert {n: tuple(value.shape) for n, value in model.state_dict().items()} == in_backbone
    found = recognise_arch(state)
    assert (found.channels, found.depths) == (arch.channels, arch.depths)
    assert found.kernel_size == (sizes if isinstance(sizes, tuple) else (sizes,) * len(arch.depths))
    assert (found.mlp_ratio, found.in_channels, found.num_classes) == (4, 3, 21841)


def test_nothing_is_recognised_in_another_network():
    found = recognise_arch({'conv1.weight': torch.ones(8, 3, 3, 3), 'fc.weight': torch.ones(2, 2)})
    assert (found.channels, found.depths, found.kernel_size) == ((), (), ())
    assert (found.mlp_ratio, found.in_channels, found.num_classes) == (None, None, None)


# ---------------------------------------------------------------------------- a backbone or a head
def test_published_checkpoint_loads_completely(path):
    state = published_state_dict(ARCHS['nano'], 'module.')
    arguments = argparse.Namespace(model='conv2former_n', lr=1e-3, opt_betas=None)
    content = dict(epoch=299, arch='nano', state_dict=state, args=arguments, optimizer={})
    torch.save(content | dict(metric=np.float64(83.2)), path)
    os.rename(path, f'{path}.later')
    model = Conv2Former('nano', init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match='does not exist'):
        model.init_weights()
    os.rename(f'{path}.later', path)
    model.init_weights()  # after an error, this is not as if it had succeeded
    loaded = {f'module.{n}': v for n, v in model.state_dict().items() if not n.startswith('norm')}
    assert {name.split('.')[1] for name in state.keys() - loaded.keys()} == {'head', 'pred'}
    assert_equal(loaded, {name: state[name] for name in loaded})


FORMS = ['plain', 'state_dict', 'model', 'module', 'detector', 'wrapped detector', 'prefix',
         'compiled', 'compiled in a detector', 'safetensors']  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
def test_forms_give_the_same_output(form, tmp_path):
    source = randomized(small(out_norm=False)).eval()
    prefixes = {'module': 'module.', 'detector': 'backbone.', 'prefix': 'encoder.',
                'wrapped detector': 'module.backbone.', 'compiled': '_orig_mod.module.',
                'compiled in a detector': 'backbone._orig_mod.'}  # fmt: skip
    prefix = prefixes.get(form, '')
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if form == 'detector':  # as mmengine saves a detector
        history = HistoryBuffer([1.0, 2.0], [1, 1])
        state |= {'neck.weight': torch.ones(2)}
        state = dict(meta=dict(epoch=1), state_dict=state, message_hub=dict(loss=history))
    elif form in ('state_dict', 'model'):
        state = {form: state, 'epoch': 3}
    path = tmp_path / ('file.safetensors' if form == 'safetensors' else 'file.pth')
    (save_file if form == 'safetensors' else torch.save)(state, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if form == 'prefix':
        init_cfg['prefix'] = 'encoder'
    model = small(out_norm=False, init_cfg=init_cfg).eval()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x)[-1], source(x)[-1])
    model.init_weights()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize('form', ['published', 'mmpretrain', 'safetensors'])
def test_head_and_backbone_take_the_same_file(form, tmp_path):
    state = published_state_dict(NARROW)
    path = str(tmp_path / ('file.safetensors' if form == 'safetensors' else 'file.pth'))
    if form == 'safetensors':
        save_file(state, path)
    else:
        torch.save(dict(state_dict=in_mmpretrain(state) if form == 'mmpretrain' else state), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    head, backbone = Conv2FormerClsHead(20, 10, init_cfg=init_cfg), small(init_cfg=init_cfg)
    head.init_weights()
    backbone.init_weights()
    loaded = head.state_dict() | backbone.state_dict()
    assert_equal({name: loaded[name] for name in state}, state)


def test_part_of_the_network_takes_a_complete_checkpoint(path):
    torch.save(randomized(small()).state_dict(), path)
    part = small(out_indices=(0, 1))
    load_pretrained(part, path)
    assert part.norm1.weight[0] != 1


def test_init_cfg(path):
    """Other initialisers run first; `map_location` is ignored; unknown keys are refused."""
    torch.save(randomized(small(out_norm=False)).state_dict(), path)
    constant = dict(type='Constant', layer='LayerNorm', val=0.5)
    pretrained = dict(type='Pretrained', checkpoint=path, map_location='cpu')
    model = small(init_cfg=[pretrained, constant])
    model.init_weights()
    assert (model.norm0.weight == 0.5).all()
    assert (model.stages[0][0].attn.norm.weight != 0.5).all()
    assert model.init_cfg == [pretrained, constant]
    with pytest.raises(TypeError, match='adapt_kernels'):
        small(init_cfg=pretrained | dict(adapt_kernels=True)).init_weights()


def test_new_layers_keep_their_values(path):
    """A head for other classes takes the rest of the file."""
    source = randomized(Conv2FormerClsHead(in_channels=6, num_classes=5, hidden_channels=8))
    torch.save({f'head.{n}': v for n, v in source.state_dict().items()}, path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    sizes = dict(in_channels=6, num_classes=3, hidden_channels=8)
    with pytest.raises(CheckpointError, match=r'pred.weight is \(5, 8\) in the file, \(3, 8\)'):
        Conv2FormerClsHead(**sizes, init_cfg=init_cfg).init_weights()
    head = Conv2FormerClsHead(**sizes, init_cfg=dict(init_cfg, new_layers=['pred']))
    before = head.pred.weight.clone()
    head.init_weights()
    assert torch.equal(head.pred.weight, before)
    assert_equal(head.head.state_dict(), source.head.state_dict())


ADAPTED = {  # kernel in the file, in the model
    'one size': (7, 11),
    'a size a stage': (5, (11, 9, 7, 5)),
    'from sizes a stage': ((7, 5, 3, 3), (7, 7, 7, 7)),
    'isotropic': (5, 9),
}


@pytest.mark.parametrize('case', ADAPTED)
def test_padded_kernels_give_the_same_output(case, path):
    old, new = ADAPTED[case]

    def build(size, **kwargs):
        if case == 'isotropic':
            arch = dict(channels=16, depth=3)
            return Conv2FormerIsotropic(arch, kernel_size=size, **kwargs).double().eval()
        return small(out_norm=False, kernel_size=size, **kwargs).double().eval()

    source = randomized(build(old))
    torch.save(source.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=path, adapt_kernel=True)
    model = build(new, init_cfg=init_cfg)
    model.init_weights()
    x = torch.randn(2, 3, 80, 64).double()
    for output, expected in zip(model(x), source(x)):
        torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    kernels = [value for name, value in model.named_parameters() if name.endswith('att.2.weight')]
    assert kernels[0].shape[-1] == (new if isinstance(new, int) else new[0])


def save_without(name, path):
    state = small().state_dict()
    del state[name]
    torch.save(state, path)


def head():
    return Conv2FormerClsHead(20, 1000)


REFUSED = {  # how the file is made, what takes it, options, message
    'a name missing': (
        lambda p: save_without('stages.1.0.attn.v.weight', p),
        small,
        {},
        r"1 of \d+ names missing, such as \['stages.1.0.attn.v.weight'\]",
    ),
    'larger kernels': (
        lambda p: torch.save(small(kernel_size=7).state_dict(), p),
        small,
        dict(adapt_kernel=True),
        r'kernel_size is \(7, 7, 7, 7\) in the file, \(5, 5, 5, 5\) in the model'
        r'.*\(8, 1, 7, 7\) in the file, \(8, 1, 5, 5\) in the model',
    ),
    'smaller kernels': (
        lambda p: torch.save(small(kernel_size=3).state_dict(), p), small, {}, 'adapt_kernel=True'
    ),
    'wrong prefix': (
        lambda p: torch.save(small().state_dict(), p),
        small,
        dict(prefix='encoder'),
        r"no names with prefix='encoder.'; its names begin with \['downsample",
    ),
    'other classes': (
        lambda p: torch.save(published_state_dict(NARROW), p),
        head,
        {},
        'num_classes is 10 in the file, 1000 in the model',
    ),
    'other width': (
        lambda p: torch.save(published_state_dict(NARROW), p),
        lambda: Conv2FormerClsHead(24, 10),
        {},
        r'head.0.weight is \(1280, 20, 1, 1\) in the file',
    ),
    'no head': (
        lambda p: torch.save(small().state_dict(), p),
        head,
        {},
        r"6 of 6 names missing, such as \['head.0.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_refused_file_leaves_the_module_unchanged(case, path):
    write, build, options, message = REFUSED[case]
    write(path)
    module = build()
    before = copied(module)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(module, path, **options)
    assert path in str(error.value)
    assert_equal(module.state_dict(), before)


# ---------------------------------------------------------------------------------- a whole model
class Model(nn.Module):
    """The least with a backbone and a head."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, num_classes)


def test_fine_tuning_keeps_a_new_head(monkeypatch):
    logged = []
    monkeypatch.setattr(loading, 'print_log', lambda text, **_: logged.append(text))
    source, model = Model(), Model(num_classes=5)
    head = copied(model.head)
    load_model(model, dict(state_dict=source.state_dict()), 'file.pth', strict=False)
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())
    assert_equal(model.head.state_dict(), head)
    assert len(logged) == 1
    assert 'file.pth has 7 of 9 tensors of Model' in logged[0]
    assert 'initial values kept: 2 (head.weight is (3, 4) in the file' in logged[0]


def part(pattern, state):
    return {name: value for name, value in state.items() if re.search(pattern, name)}


LOADS = {  # change of a state dict, whether to evaluate and to fine-tune it may be loaded
    'nothing': (lambda state: state, True, True),
    'more than is needed': (lambda state: {**state, 'extra': torch.ones(1)}, True, True),
    'no head': (lambda state: part('backbone', state), False, True),
    'no backbone': (lambda state: part('head', state), False, True),
    'part of a backbone': (lambda state: part('^(?!backbone.0.bias)', state), False, False),
    'backbone of another shape': (
        lambda state: {**state, 'backbone.0.weight': torch.ones(4, 3, 5, 5)}, False, False
    ),
    'backbone without values': (
        lambda state: {**state, 'backbone.0.bias': torch.ones(4, device='meta')}, False, False
    ),
    'nothing of the model': (lambda state: {'fc.weight': torch.ones(4)}, False, False),
    'no counters of BatchNorm, as of torch 0.4': (
        lambda state: part('^(?!.*num_batches)', state), True, True
    ),
}  # fmt: skip


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('case', LOADS)
def test_what_may_be_loaded(case, strict):
    change, to_evaluate, to_tune = LOADS[case]
    state, model = change(Model().state_dict()), Model()
    before = copied(model)
    try:
        load_model(model, dict(state_dict=state), 'file.pth', strict)
    except CheckpointError:
        assert not (to_evaluate if strict else to_tune)
        assert_equal(model.state_dict(), before)
    else:
        assert to_evaluate if strict else to_tune
        loaded = {n: v for n, v in model.state_dict().items() if n in state}
        assert_equal(loaded, {name: state[name] for name in loaded})


@pytest.mark.filterwarnings('ignore:.*weight_norm.*deprecated')
def test_layers_with_weight_norm():
    """They keep a tensor that torch does not copy."""
    model = Model()
    model.head = nn.utils.weight_norm(model.head)
    saved = {name: value + 1 for name, value in copied(model).items()}
    load_model(model, dict(state_dict=saved), 'file.pth', strict=True)
    assert_equal(model.state_dict(), saved)
