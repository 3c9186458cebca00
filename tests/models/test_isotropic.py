"""The isotropic models: counts, values, gradients, modes, a pyramid for dense prediction."""

import copy
import re

import pytest
import torch
from common.plain_conv2former import plain_isotropic
from helpers import ROOT
from helpers.comparisons import compare, leaves, loss_of, randomized, relative_error
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmconv2former import Conv2FormerIsotropic

SMALL = dict(channels=8, depth=4, kernel_size=5)
EMBEDDINGS = ('plain', 'conv')
HEAD = {320: 320 * 1280 + 1280, 640: 640 * 1280 + 1280}  # 1x1 convolution of the ImageNet head


def small(**kwargs):
    torch.manual_seed(0)
    return Conv2FormerIsotropic(SMALL, **kwargs)


# Parameters in millions with the 1000-class head, by our count; published: 22 to 23, above 80.
@pytest.mark.parametrize(
    ('arch', 'embedding', 'channels', 'count'),
    [
        ('is', 'plain', 320, 23.23),
        ('is', 'conv', 320, 23.45),
        ('ib', 'plain', 640, 85.72),
        ('ib', 'conv', 640, 87.11),
    ],
)
def test_parameter_count(arch, embedding, channels, count):
    with torch.device('meta'):
        model = Conv2FormerIsotropic(arch, patch_embedding=embedding, out_norm=False)
    assert len(model.blocks) == 18
    assert (model.channels, model.strides) == ((channels,), (16,))
    head = HEAD[channels] + 2 * 1280 + (1280 * 1000 + 1000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round((parameters + head) / 1e6, 2) == count


@pytest.mark.parametrize('embedding', EMBEDDINGS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(64, 48), (79, 50)])
def test_equals_plain_implementation_in_float64(embedding, training, size):
    model = small(patch_embedding=embedding, out_indices=(1, 3), in_channels=4).double()
    model = randomized(model).train(training)
    x = torch.randn(2, 4, *size).double()
    state = leaves(model)
    expected = plain_isotropic(x, state, 4, (1, 3), training)
    compare(model, model(x), expected, state, 1e-12, 1e-11)


@pytest.mark.parametrize('embedding', EMBEDDINGS)
def test_sizes(embedding):
    model = small(patch_embedding=embedding).eval()
    last = (5, 2) if embedding == 'plain' else (6, 2)  # padded convolutions round up
    for size, expected in (((16, 16), (1, 1)), ((64, 96), (4, 6)), ((95, 33), last)):
        (output,) = model(torch.randn(1, 3, *size))
        assert output.shape == (1, 8, *expected)
        assert output.is_contiguous()


@pytest.mark.parametrize(
    ('out_indices', 'expected'), [(-1, (3,)), (2, (2,)), ((0, -1), (0, 3)), ((3, 1), (3, 1))]
)
def test_out_indices(out_indices, expected):
    whole = randomized(small(out_indices=range(4))).eval()
    part = small(out_indices=out_indices).eval()
    assert len(part.blocks) == max(expected) + 1
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    x = torch.randn(1, 3, 48, 48)
    for output, i in zip(part(x), expected, strict=True):
        torch.testing.assert_close(output, whole(x)[i])


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('embedding', EMBEDDINGS)
def test_every_parameter_gets_a_gradient(with_cp, embedding):
    model = randomized(small(with_cp=with_cp, patch_embedding=embedding, out_indices=(1, 3)))
    loss_of(model(torch.randn(2, 3, 48, 48))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    model = randomized(
        small(frozen_stages=frozen_stages, patch_embedding='conv', out_indices=(1, 3))
    )
    frozen = ['patch_embed'] if frozen_stages >= 0 else []
    frozen += [f'blocks.{i}' for i in range(frozen_stages)]
    frozen += [f'norm{i}' for i in (1, 3) if i < frozen_stages]
    assert model.train() is model
    for name, parameter in model.named_parameters():
        is_frozen = any(name.startswith(f'{part}.') for part in frozen)
        assert parameter.requires_grad != is_frozen, name
    for part in frozen:
        assert not any(module.training for module in model.get_submodule(part).modules()), part
    assert model.blocks.training


def test_norm_eval_keeps_the_statistics():
    for norm_eval in (False, True):
        model = small(norm_eval=norm_eval, patch_embedding='conv').train()
        before = model.patch_embed[2].running_mean.clone()
        model(torch.randn(2, 3, 48, 48))
        assert torch.equal(before, model.patch_embed[2].running_mean) == norm_eval


def test_layer_depths():
    model = small(patch_embedding='conv')
    depths = [model.get_layer_depth(name)[0] for name, _ in model.named_parameters()]
    assert depths == sorted(depths)
    assert set(depths) == set(range(6))
    assert model.get_layer_depth('blocks.2.mlp.fc1.weight') == (3, 6)
    assert model.get_layer_depth('backbone.patch_embed.0.weight', 'backbone.') == (0, 6)
    assert model.get_layer_depth('neck.blocks.2.weight', 'backbone.') == (5, 6)


@pytest.mark.parametrize('embedding', EMBEDDINGS)
@pytest.mark.parametrize('fusion', ['hadamard', 'l1'])
def test_form_for_inference(embedding, fusion):
    model = randomized(small(patch_embedding=embedding, fusion=fusion)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
        deployed = copy.deepcopy(model).switch_to_deploy()
        assert relative_error(deployed(x)[0], expected) < 1e-5
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


def test_detector_of_the_page(tmp_path):
    """The leaf of docs/classification.md: four equal maps, a pyramid of strides 4 to 64."""
    pytest.importorskip('mmdet')  # not there where the network is tested alone
    page = (ROOT / 'docs/classification.md').read_text()
    (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    base = ROOT / 'configs/detection/mask_rcnn_conv2former_t.py'
    (tmp_path / 'leaf.py').write_text(f"_base_ = '{base}'\n{code}")
    config = Config.fromfile(tmp_path / 'leaf.py')
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert model.backbone.out_indices == (4, 8, 12, 17)
    maps = model.neck(model.backbone(torch.empty(1, 3, 128, 192, device='meta')))
    assert [tuple(item.shape[1:]) for item in maps] == [
        (256, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32, 64)
    ]


def test_pyramid_for_segmentation():
    pytest.importorskip('mmseg')
    config = Config.fromfile(ROOT / 'configs/segmentation/upernet_conv2former_t.py').model
    config.backbone = dict(
        type='mmconv2former.Conv2FormerIsotropic', arch=SMALL, out_indices=(0, 1, 2, 3)
    )
    config.neck = dict(type='Feature2Pyramid', embed_dim=8, rescales=[4, 2, 1, 0.5])
    config.decode_head.in_channels = [8] * 4
    config.auxiliary_head.in_channels = 8
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(config)
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 150, 16, 24)


def test_builds_by_name():
    config = dict(type='mmconv2former.Conv2FormerIsotropic', arch=SMALL)
    assert isinstance(MODELS.build(config), Conv2FormerIsotropic)


BAD_ARGUMENTS = [
    (dict(arch='tiny'), ValueError, "arch must be one of small, base, is, ib or a dict, got 'tiny"),
    (dict(arch=18), TypeError, 'arch must be a str or a dict, got 18'),
    (dict(arch=dict(depth=3)), ValueError, "arch as a dict must have 'channels'"),
    (dict(arch=dict(channels=8, depths=3)), ValueError, "arch as a dict .* got .*'depths'"),
    (dict(arch=dict(channels=10)), ValueError, 'multiple of 4.* got 10'),
    (
        dict(arch=dict(channels=8, depth=0)),
        ValueError,
        r"arch\['depth'\] must be from 1 to 1000, got",
    ),
    (dict(patch_embedding='stem'), ValueError, 'patch_embedding must be one of plain, conv, got'),
    (dict(kernel_size=4), ValueError, 'kernel_size must be odd, got 4'),
    (dict(out_indices=18), ValueError, 'out_indices must be from -18 to 17, got 18'),
    (dict(frozen_stages=19), ValueError, 'frozen_stages must be from -1 to 18, got 19'),
]


@pytest.mark.parametrize(('arguments', 'error', 'message'), BAD_ARGUMENTS)
def test_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2FormerIsotropic(**arguments)


def test_small_input_is_refused():
    with pytest.raises(ValueError, match='at least 16x16 pixels, got H=15, W=16'):
        small()(torch.randn(1, 3, 15, 16))
