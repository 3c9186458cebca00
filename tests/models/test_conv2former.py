"""The network, over the table of sizes: counts, values, gradients, modes, arguments."""

import copy
import re

import pytest
import torch
from common.counting import count_bytes_kept
from helpers.comparisons import (
    SMALL_ARCHS,
    compare_with_plain,
    loss_of,
    randomized,
    relative_error,
)
from helpers.half_precision import HALF_DTYPES
from mmengine.utils import digit_version
from torch import nn

from mmconv2former import Conv2Former
from mmconv2former.models.blocks import DropPath
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


@pytest.mark.parametrize('name', SIZES)
def test_parameter_count_is_the_published_one(name):
    depths, kernel_size, published, backbone = SIZES[name]
    with torch.device('meta'):
        model = Conv2Former(name, out_norm=False)
    assert model.depths == depths
    assert model.stages[0][0].attn.att[2].kernel_size == (kernel_size, kernel_size)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == backbone
    width = model.channels[-1]
    head = (width * 1280 + 1280) + 2 * 1280 + (1280 * 1000 + 1000)  # conv, LayerNorm, linear
    assert round((count + head) / 1e6) == published


@pytest.mark.parametrize('name', ARCHS)
def test_equals_plain_implementation(name):
    torch.manual_seed(0)
    model = randomized(Conv2Former(name)).eval()
    compare_with_plain(model, torch.randn(1, 3, 64, 32), 1e-5, 1e-4)


@pytest.mark.parametrize('name', SMALL_ARCHS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (47, 35)])
def test_equals_plain_implementation_in_float64(name, training, size):
    torch.manual_seed(0)
    arch = SMALL_ARCHS[name]
    stages = range(len(arch['depths']))
    model = Conv2Former(arch, in_channels=4, out_indices=stages).double()
    model = randomized(model).train(training)
    compare_with_plain(model, torch.randn(2, 4, *size).double(), 1e-12, 1e-11)


@pytest.mark.parametrize('name', ARCHS)
@pytest.mark.parametrize('size', [(32, 32), (97, 65), (64, 130)])
def test_channels_and_strides(name, size):
    model = Conv2Former(name).eval()
    assert model.channels == ARCHS[name].channels
    assert model.strides == (4, 8, 16, 32)
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, *size))
    assert isinstance(outputs, tuple)
    height, width = ((side + 1) // 2 for side in size)
    for output, channels in zip(outputs, model.channels):
        height, width = height // 2, width // 2
        assert output.shape == (1, channels, height, width)
        assert output.is_contiguous()


def small(**kwargs):
    torch.manual_seed(0)
    return Conv2Former(SMALL_ARCHS['narrow'], **kwargs)


def test_layer_scale_and_drop_path_values():
    model = small(layer_scale_init_value=0.25, drop_path_rate=0.5)
    blocks = [block for stage in model.stages for block in stage]
    for block in blocks:
        assert (block.layer_scale_1 == 0.25).all()
        assert (block.layer_scale_2 == 0.25).all()
    rates = [block.drop_path.rate for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


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


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 2, 3)
    y = drop(x)
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_drop_path_is_active_in_training_only():
    model = randomized(small(drop_path_rate=0.9))
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x)[-1], model(x)[-1])
    model.eval()
    assert torch.equal(model(x)[-1], model(x)[-1])


@pytest.mark.parametrize(
    ('out_indices', 'expected'),
    [(3, (3,)), (-1, (3,)), ((0, -1), (0, 3)), ([1, 2], (1, 2)), ((2, 0), (2, 0)), (1, (1,))],
)
def test_out_indices(out_indices, expected):
    model = randomized(small()).eval()
    given = copy.copy(out_indices)
    part = small(out_indices=out_indices).eval()
    assert out_indices == given
    assert part.channels == tuple(model.channels[i] for i in expected)
    assert part.strides == tuple(model.strides[i] for i in expected)
    part.load_state_dict({k: v for k, v in model.state_dict().items() if k in part.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    for output, i in zip(part(x), expected, strict=True):
        torch.testing.assert_close(output, model(x)[i])


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,), (0, 2)])
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('out_norm', [False, True])
def test_every_parameter_gets_a_gradient(out_indices, with_cp, out_norm):
    model = small(out_indices=out_indices, with_cp=with_cp, out_norm=out_norm)
    loss_of(randomized(model)(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_out_norm_normalises():
    model = small().eval()
    for output in model(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(
            output.mean(1), torch.zeros_like(output.mean(1)), atol=1e-5, rtol=0
        )
    assert not any(name.startswith('norm') for name in small(out_norm=False).state_dict())


def test_activation_checkpointing_changes_nothing_but_memory():
    x = torch.randn(2, 3, 64, 64)
    results = []
    for with_cp in (False, True):
        model = randomized(small(with_cp=with_cp, recompute='nothing', drop_path_rate=0.3))
        kept = count_bytes_kept(model, x)
        torch.manual_seed(3)
        outputs = model(x)
        loss_of(outputs).backward()
        results.append((outputs, [p.grad for p in model.parameters()], kept))
    (outputs, gradients, kept), (outputs_cp, gradients_cp, kept_cp) = results
    torch.testing.assert_close(outputs, outputs_cp, rtol=0, atol=0)
    torch.testing.assert_close(gradients, gradients_cp)
    assert kept_cp < 0.4 * kept


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen_stages):
    model = randomized(small(frozen_stages=frozen_stages, drop_path_rate=0.2))
    frozen = set()
    if frozen_stages >= 0:
        frozen.add('downsample_layers.0')
    for i in range(frozen_stages):
        frozen |= {f'downsample_layers.{i}', f'stages.{i}', f'norm{i}'}
    is_frozen = {n: any(n.startswith(f'{f}.') for f in frozen) for n, _ in model.named_parameters()}
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, module in model.named_modules():
            if name and not name.startswith(tuple(frozen)) and list(module.children()) == []:
                assert module.training == mode, name
        for name in frozen:
            assert not any(module.training and mode is False for module in model.modules())
            assert not any(m.training for m in model.get_submodule(name).modules()), name
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)], 0.1
    )
    outputs = model(torch.randn(8, 3, 64, 64))  # drop path drops no block in all of them
    if frozen_stages < 4:
        loss_of(outputs).backward()
        optimizer.step()
    else:
        assert not outputs[-1].requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_frozen[name], name
        assert (parameter.grad is None) == is_frozen[name], name
    for name, value in model.state_dict().items():
        is_unchanged = torch.equal(value, before[name])
        assert is_unchanged == any(name.startswith(f'{f}.') for f in frozen), name


def test_norm_eval_keeps_the_statistics_of_the_stem():
    x = torch.randn(2, 3, 64, 64)
    for norm_eval in (False, True):
        model = small(norm_eval=norm_eval).train()
        before = model.downsample_layers[0][2].running_mean.clone()
        model(x)
        assert torch.equal(before, model.downsample_layers[0][2].running_mean) == norm_eval
        assert model.stages.training
        assert all(p.requires_grad for p in model.parameters())


def test_modes_return_the_module():
    model = small()
    assert model.eval() is model
    assert model.train() is model


@pytest.mark.parametrize('dtype', HALF_DTYPES)
@pytest.mark.parametrize('with_cp', [False, True])
def test_autocast(dtype, with_cp):
    model = randomized(small(with_cp=with_cp))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    loss_of([output.float() for output in outputs]).backward()
    for output, reference in zip(outputs, expected):
        assert relative_error(output.float(), reference) < (
            0.05 if dtype == torch.bfloat16 else 0.01
        )
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_memory_format_of_the_input_does_not_matter():
    model = randomized(small()).eval()
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(model(x), model(x.transpose(2, 3).contiguous().transpose(2, 3)))


def test_outputs_suit_the_roi_align_of_mmcv():
    """It reads `torch.channels_last` memory as if it were contiguous, and says nothing."""
    # The network alone needs neither (docs/compatibility.md).
    mmcv_ops = pytest.importorskip('mmcv.ops')
    torchvision_ops = pytest.importorskip('torchvision.ops')
    features = randomized(small()).eval()(torch.randn(1, 3, 64, 64))[0]
    features = nn.Conv2d(8, 4, 1)(features)  # as FPN's lateral convolution
    rois = torch.tensor([[0.0, 2, 3, 12, 14]])
    expected = torchvision_ops.roi_align(features, rois, (3, 3), aligned=True)
    torch.testing.assert_close(mmcv_ops.roi_align(features, rois, (3, 3)), expected)


def test_trace():
    model = randomized(small()).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.5'),
    reason='torch < 2.5 exports with a fixed batch',
)
def test_export_with_dynamic_shapes():
    model = randomized(small()).eval()
    side = 32 * torch.export.Dim('side', min=2, max=16)
    shapes = {0: torch.export.Dim('batch', min=1, max=8), 2: side, 3: side}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(shapes,))
    x = torch.randn(3, 3, 128, 128)
    torch.testing.assert_close(program.module()(x), model(x))


def test_copies_and_pickles():
    model = randomized(small()).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('letter', ['n', 't', 's', 'b', 'l', 'N', 'Tiny'])
def test_letters(letter):
    name = {arch[0]: arch for arch in ARCHS}[letter[0].lower()]
    with torch.device('meta'):
        assert Conv2Former(letter).channels == ARCHS[name].channels


def test_kernel_size_argument_wins_over_the_arch():
    for kernel_size, expected in ((3, [3, 3, 3, 3]), ((3, 5, 7, 9), [3, 5, 7, 9])):
        model = small(kernel_size=kernel_size)
        assert [stage[0].attn.att[2].kernel_size[0] for stage in model.stages] == expected


def test_mlp_ratio():
    assert small(mlp_ratio=2).stages[0][0].mlp.fc1.weight.shape == (16, 8, 1, 1)
    assert isinstance(small(mlp_ratio=2.5).stages[0][0].mlp.fc1, nn.Conv2d)


BAD_ARGUMENTS = [
    (dict(arch='huge'), ValueError, "arch must be one of nano, tiny, small, base, large.*'huge'"),
    (dict(arch=''), ValueError, "arch must be one of .* got ''"),
    (dict(arch=3), TypeError, 'arch must be a str or a dict, got 3'),
    (dict(arch=dict(depths=[1, 1])), ValueError, "arch .* must have 'channels' and 'depths'"),
    (dict(arch=dict(depths=[1], channels=[8], width=3)), ValueError, "arch .* got .*'width'"),
    (dict(arch=dict(depths=[1, 1], channels=[8])), ValueError, 'one value a stage'),
    (dict(arch=dict(depths=[], channels=[])), ValueError, 'one value a stage'),
    (dict(arch=dict(depths=[0], channels=[8])), ValueError, 'from 1 to 1000, got 0'),
    (dict(arch=dict(depths=[1.5], channels=[8])), TypeError, r"arch\['depths'\] .* got 1.5"),
    (dict(arch=dict(depths=3, channels=[8])), TypeError, r"arch\['depths'\] .* sequence .* got 3"),
    (dict(arch=dict(depths=[1], channels=[7])), ValueError, 'even number'),
    (dict(arch=dict(depths=[1], channels=[8], kernel_size=4)), ValueError, 'odd, got 4'),
    (dict(kernel_size=10), ValueError, 'kernel_size must be odd, got 10'),
    (dict(kernel_size=-3), ValueError, 'kernel_size must be from 1 to 999, got -3'),
    (dict(kernel_size=0), ValueError, 'kernel_size must be from 1 to 999, got 0'),
    (dict(kernel_size=7.0), TypeError, 'kernel_size must be an int from 1 to 999, got 7.0'),
    (dict(kernel_size='7'), TypeError, "kernel_size must be an int from 1 to 999, got '7'"),
    (dict(kernel_size=(7, 7)), ValueError, r'kernel_size .* each of 4 stages, got \(7, 7\)'),
    (dict(out_indices=4), ValueError, 'out_indices must be from -4 to 3, got 4'),
    (dict(out_indices=(0, -5)), ValueError, 'out_indices must be from -4 to 3, got -5'),
    (dict(out_indices=(3, -1)), ValueError, r'out_indices .* twice, got \(3, -1\)'),
    (dict(out_indices=()), ValueError, 'out_indices must name at least one stage'),
    (dict(out_indices='all'), TypeError, "out_indices must be an int from -4 to 3, got 'all'"),
    (dict(frozen_stages=5), ValueError, 'frozen_stages must be from -1 to 4, got 5'),
    (dict(frozen_stages=-2), ValueError, 'frozen_stages must be from -1 to 4, got -2'),
    (dict(frozen_stages=True), TypeError, 'frozen_stages must be an int .* got True'),
    (dict(drop_path_rate=1), ValueError, 'drop_path_rate must be below 1, got 1'),
    (dict(drop_path_rate=-0.1), ValueError, 'drop_path_rate must be at least 0, got -0.1'),
    (dict(drop_path_rate='0.1'), TypeError, "drop_path_rate must be a number, got '0.1'"),
    (dict(layer_scale_init_value=None), TypeError, 'layer_scale_init_value must be a number'),
    (dict(layer_scale_init_value=float('nan')), ValueError, 'layer_scale_init_value .* finite'),
    (dict(mlp_ratio=0), ValueError, 'mlp_ratio must be above 0, got 0'),
    (dict(fusion='max'), ValueError, "fusion must be one of hadamard, .*linear, got 'max'"),
    (dict(fusion=['sum']), ValueError, r"fusion must be one of .* got \['sum'\]"),
    (dict(in_channels=0), ValueError, 'in_channels must be from 1 to 65536, got 0'),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'error', 'message'), BAD_ARGUMENTS)
def test_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2Former(**arguments)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 64, 64), r'\(N, in_channels=3, H, W\), got \(1, 4, 64, 64\)'),
        ((3, 64, 64), r'\(N, in_channels=3, H, W\), got \(3, 64, 64\)'),
        ((1, 3, 31, 64), 'at least 32x32 pixels, got H=31, W=64'),
        ((1, 3, 64, 8), 'at least 32x32 pixels, got H=64, W=8'),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(shape))


def test_repr_names_the_parts():
    assert re.search(r'attn.*DepthwiseConv.*kernel_size=\(5, 5\)', repr(small()), re.DOTALL)
