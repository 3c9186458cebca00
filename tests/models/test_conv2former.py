"""The hierarchical network: published counts, values, sizes of outputs, arguments."""

import inspect
import re

import pytest
import torch
from helpers.comparisons import SMALL_ARCHS, compare_with_plain, randomized

from mmconv2former import Conv2Former
from mmconv2former.models.conv2former import ARCHS

# Depths, kernel, parameters in millions: published with the 1000-class head, to the precision
# published (official repository), and counted for the backbone alone.
SIZES = {
    'nano': ((2, 2, 8, 2), 7, 15, 13.05),
    'tiny': ((3, 3, 12, 3), 11, 27, 24.68),
    'small': ((4, 4, 32, 4), 11, 50, 48.01),
    'base': ((4, 4, 34, 4), 11, 90, 87.76),
    'large': ((4, 4, 48, 4), 11, 199, 196.30),
}
NARROW = SMALL_ARCHS['narrow']


@pytest.mark.parametrize('name', SIZES)
def test_parameter_count_is_the_published_one(name):
    depths, kernel_size, published, backbone = SIZES[name]
    with torch.device('meta'):
        model = Conv2Former(name, out_norm=False)
        assert Conv2Former(name[0].upper()).channels == model.channels
    assert model.depths == depths
    assert model.stages[0][0].attn.att[2].kernel_size == (kernel_size, kernel_size)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == backbone
    width = model.channels[-1]
    head = (width * 1280 + 1280) + 2 * 1280 + (1280 * 1000 + 1000)  # conv, LayerNorm, linear
    assert round((count + head) / 1e6) == published


@pytest.mark.parametrize('name', ['nano', 'tiny'])
def test_equals_plain_implementation(name):
    """With the published widths; the other sizes differ from these in numbers only."""
    model = randomized(Conv2Former(name)).eval()
    compare_with_plain(model, torch.randn(1, 3, 64, 32), 1e-5, 1e-4)


@pytest.mark.parametrize('name', SMALL_ARCHS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (47, 35)])
def test_equals_plain_implementation_in_float64(name, training, size):
    arch = SMALL_ARCHS[name]
    stages = range(len(arch['depths']))
    model = Conv2Former(arch, in_channels=4, out_indices=stages).double()
    model = randomized(model).train(training)
    compare_with_plain(model, torch.randn(2, 4, *size).double(), 1e-12, 1e-11)


@pytest.mark.parametrize(
    ('name', 'size'),
    [('nano', (32, 32)), ('nano', (64, 130)), *((name, (97, 65)) for name in ARCHS)],
)
def test_channels_and_strides(name, size):
    with torch.device('cpu' if name == 'nano' else 'meta'):
        model = Conv2Former(name).eval()
        outputs = model(torch.empty(1, 3, *size))
    assert model.channels == ARCHS[name].channels
    assert model.strides == (4, 8, 16, 32)
    assert isinstance(outputs, tuple)
    height, width = ((side + 1) // 2 for side in size)
    for output, channels in zip(outputs, model.channels):
        height, width = height // 2, width // 2
        assert output.shape == (1, channels, height, width)
        assert output.is_contiguous()


def test_options_reach_the_blocks():
    model = Conv2Former(
        NARROW,
        layer_scale_init_value=0.25,
        drop_path_rate=0.5,
        mlp_ratio=2,
        kernel_size=(3, 5, 7, 9),
    )
    blocks = [block for stage in model.stages for block in stage]
    for block in blocks:
        assert (block.layer_scale_1 == 0.25).all()
        assert (block.layer_scale_2 == 0.25).all()
    rates = [block.drop_path.rate for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert [stage[0].attn.att[2].kernel_size[0] for stage in model.stages] == [3, 5, 7, 9]
    assert blocks[0].mlp.fc1.weight.shape == (16, 8, 1, 1)
    assert re.search(r'attn.*DepthwiseConv.*kernel_size=\(3, 3\)', repr(model), re.DOTALL)


def test_initial_weights_are_the_published_ones():
    model = Conv2Former('nano')
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.dim() == 4])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    for name, parameter in model.named_parameters():
        if name.endswith('bias'):
            assert (parameter == 0).all(), name
        elif 'norm' in name:
            assert (parameter == 1).all(), name
    assert (model.stages[0][0].layer_scale_1 == 1e-6).all()


def test_signature_has_all_arguments():
    parameters = inspect.signature(Conv2Former).parameters
    defaults = {name: item.default for name, item in parameters.items() if name != 'foreign'}
    assert defaults == dict(
        arch='tiny', in_channels=3, kernel_size=None, fusion='hadamard', mlp_ratio=4,
        drop_path_rate=0.0, layer_scale_init_value=1e-6, out_indices=(0, 1, 2, 3), out_norm=True,
        frozen_stages=-1, norm_eval=False, with_cp=False, recompute='elementwise',
        depthwise_conv='DepthwiseConv', init_cfg=None,
    )  # fmt: skip


BAD_ARGUMENTS = [
    (dict(arch='huge'), ValueError, "arch must be one of nano, tiny, .* or a dict, got 'huge'"),
    (dict(arch=3), ValueError, 'arch must be one of .* or a dict, got 3'),
    (dict(arch=dict(depths=[1, 1])), TypeError, r"arch=.* does not fit \(channels"),
    (dict(arch=dict(depths=[1], channels=[8], width=3)), TypeError, "arch=.*'width'.* not fit"),
    (dict(arch=dict(depths=3, channels=[8])), TypeError, "arch=.*'depths': 3.* does not fit"),
    (dict(arch=dict(depths=[1, 1], channels=[8])), ValueError, 'one value .* a stage'),
    (dict(arch=dict(depths=[], channels=[])), ValueError, 'one value .* a stage'),
    (dict(arch=dict(depths=[0], channels=[8])), ValueError, 'depths of arch .* least 1, got 0'),
    (dict(arch=dict(depths=[1], channels=[7])), ValueError, 'even number.* got'),
    (dict(arch=dict(depths=[1], channels=[8], kernel_size=4)), ValueError, 'odd, got 4'),
    (dict(kernel_size=10), ValueError, 'kernel_size must be odd, got 10'),
    (dict(kernel_size=-3), ValueError, 'kernel_size must be at least 1, got -3'),
    (dict(kernel_size=(7, 7)), ValueError, r'kernel_size .* each of 4 stages, got \(7, 7\)'),
    (dict(kernel_size=[7, 7, 7, 7.0]), TypeError, 'kernel_size must be an int .* got 7.0'),
    (dict(out_indices=4), ValueError, 'out_indices must be from -4 to 3, got 4'),
    (dict(out_indices=(0, -5)), ValueError, 'out_indices must be from -4 to 3, got -5'),
    (dict(out_indices=(3, -1)), ValueError, r'out_indices .* twice, got \(3, -1\)'),
    (dict(out_indices=None), TypeError, 'out_indices must be an int or a list of ints, got None'),
    (dict(arch=dict(depths=[1], channels=[8], kernel_size=None)), TypeError,
     'kernel_size must be an int or a list of ints, got None'),
    (dict(layer_scale_init_value=None), TypeError, 'layer_scale_init_value must be a number'),
    (dict(mlp_ratio=0.01), ValueError, 'mlp_ratio 0.01 leaves no hidden channels of 72'),
    (dict(out_indices=()), ValueError, 'out_indices must name at least one stage'),
    (dict(frozen_stages=5), ValueError, 'frozen_stages must be from -1 to 4, got 5'),
    (dict(drop_path_rate=1), ValueError, 'drop_path_rate must be .* below 1, got 1'),
    (dict(drop_path_rate=-0.1), ValueError, 'drop_path_rate must be at least 0 .* got -0.1'),
    (dict(drop_path_rate='0.1'), TypeError, "drop_path_rate must be a number, got '0.1'"),
    (dict(fusion='max'), ValueError, "fusion must be one of hadamard, .*linear, got 'max'"),
    (dict(fusion=['sum']), ValueError, r"fusion must be one of .* got \['sum'\]"),
    (dict(in_channels=0), ValueError, 'in_channels must be at least 1, got 0'),
    (dict(depthwise_conv='os.getcwd'), ValueError, 'depthwise_conv must be a registered model'),
    (dict(init_cfg=dict(checkpoint='a')), ValueError, "init_cfg must be .* 'type' .* got"),
    (dict(pretrained='a'), TypeError, 'no argument pretrained.*init_cfg=dict.*_delete_=True'),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'error', 'message'), BAD_ARGUMENTS)
def test_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2Former(**arguments)
