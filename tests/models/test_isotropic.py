"""The isotropic network: counts, values, sizes of outputs, a pyramid for dense prediction."""

import re

import pytest
import torch
from helpers import ROOT
from helpers.comparisons import SMALL_ISOTROPIC_ARCH, compare_with_plain, randomized
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmconv2former import Conv2FormerIsotropic


# Parameters in millions with the 1000-class head, by our count; published: 22 to 23, above 80.
@pytest.mark.parametrize(
    ('arch', 'embedding', 'channels', 'count'),
    [
        ('is', 'plain', 320, 23.23),
        ('small', 'conv', 320, 23.45),
        ('ib', 'plain', 640, 85.72),
        ('base', 'conv', 640, 87.11),
    ],
)
def test_parameter_count(arch, embedding, channels, count):
    with torch.device('meta'):
        model = Conv2FormerIsotropic(arch, patch_embedding=embedding, out_norm=False)
    assert len(model.blocks) == 18
    assert (model.channels, model.strides) == ((channels,), (16,))
    head = (channels * 1280 + 1280) + 2 * 1280 + (1280 * 1000 + 1000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round((parameters + head) / 1e6, 2) == count


@pytest.mark.parametrize('embedding', ['plain', 'conv'])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(64, 48), (79, 50)])
def test_equals_plain_implementation_in_float64(embedding, training, size):
    model = Conv2FormerIsotropic(
        SMALL_ISOTROPIC_ARCH, patch_embedding=embedding, out_indices=(1, 3), in_channels=4
    )
    model = randomized(model.double()).train(training)
    compare_with_plain(model, torch.randn(2, 4, *size).double(), 1e-12, 1e-11)


@pytest.mark.parametrize(('embedding', 'last'), [('plain', (5, 2)), ('conv', (6, 2))])
def test_sizes(embedding, last):
    """Padded convolutions round up."""
    model = Conv2FormerIsotropic(SMALL_ISOTROPIC_ARCH, patch_embedding=embedding).eval()
    for size, expected in (((16, 16), (1, 1)), ((64, 96), (4, 6)), ((95, 33), last)):
        (output,) = model(torch.randn(1, 3, *size))
        assert output.shape == (1, 8, *expected)
        assert output.is_contiguous()


def test_layer_depths():
    model = Conv2FormerIsotropic(SMALL_ISOTROPIC_ARCH, patch_embedding='conv')
    depths = [model.get_layer_depth(name)[0] for name, _ in model.named_parameters()]
    assert depths == sorted(depths)
    assert set(depths) == set(range(6))
    assert model.get_layer_depth('blocks.2.mlp.fc1.weight') == (3, 6)
    assert model.get_layer_depth('backbone.patch_embed.0.weight', 'backbone.') == (0, 6)
    assert model.get_layer_depth('neck.blocks.2.weight', 'backbone.') == (5, 6)


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
        type='mmconv2former.Conv2FormerIsotropic',
        arch=SMALL_ISOTROPIC_ARCH,
        out_indices=(0, 1, 2, 3),
    )
    config.neck = dict(type='Feature2Pyramid', embed_dim=8, rescales=[4, 2, 1, 0.5])
    config.decode_head.in_channels = [8] * 4
    config.auxiliary_head.in_channels = 8
    init_default_scope('mmseg')
    with torch.device('meta'):
        model = MODELS.build(config)
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 150, 16, 24)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (
            dict(arch='tiny'),
            ValueError,
            "arch must be one of small, base, is, ib or a dict, got 't",
        ),
        (dict(arch=dict(depth=3)), TypeError, r'arch=.* does not fit \(channels'),
        (dict(arch=dict(channels=10)), ValueError, 'multiple of 4.* got 10'),
        (dict(arch=dict(channels=8, depth=0)), ValueError, 'depth of arch must be at least 1, got'),
        (dict(patch_embedding='stem'), ValueError, 'patch_embedding must be one of plain, conv'),
        (dict(kernel_size=4), ValueError, 'kernel_size must be odd, got 4'),
        (dict(out_indices=18), ValueError, 'out_indices must be from -18 to 17, got 18'),
        (dict(frozen_stages=19), ValueError, 'frozen_stages must be from -1 to 18, got 19'),
    ],
)
def test_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2FormerIsotropic(**arguments)
