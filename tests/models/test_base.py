"""What both networks do alike: outputs, gradients, freezing, modes, precision, graphs."""

import copy

import pytest
import torch
from common.counting import count_bytes_kept
from helpers.comparisons import (
    SMALL_ARCHS,
    SMALL_ISOTROPIC_ARCH,
    loss_of,
    randomized,
    relative_error,
)
from helpers.half_precision import HALF_DTYPES
from mmengine.utils import digit_version
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.models.blocks import DropPath

# Class, arguments, and what belongs to the stem and to each stage.
NETWORKS = {
    'hierarchical': (
        Conv2Former,
        dict(arch=SMALL_ARCHS['narrow']),
        ['downsample_layers.0'],
        [['stages.0'], *([f'downsample_layers.{i}', f'stages.{i}'] for i in (1, 2, 3))],
    ),
    'isotropic': (
        Conv2FormerIsotropic,
        dict(arch=SMALL_ISOTROPIC_ARCH, patch_embedding='conv', out_indices=(0, 1, 2, 3)),
        ['patch_embed'],
        [[f'blocks.{i}'] for i in range(4)],
    ),
}
networks = pytest.mark.parametrize('name', NETWORKS)
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def build(name='hierarchical', **options):
    network, arguments, _, _ = NETWORKS[name]
    return randomized(network(**{**arguments, **options}))


@networks
@pytest.mark.parametrize(
    ('out_indices', 'expected'),
    [(3, (3,)), (-1, (3,)), ((0, -1), (0, 3)), ([1, 2], (1, 2)), ((2, 0), (2, 0)), (1, (1,))],
)
def test_out_indices(name, out_indices, expected):
    whole = build(name).eval()
    part = build(name, out_indices=out_indices).eval()
    assert part.channels == tuple(whole.channels[i] for i in expected)
    assert part.strides == tuple(whole.strides[i] for i in expected)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    for output, i in zip(part(X), expected, strict=True):
        torch.testing.assert_close(output, whole(X)[i])


@networks
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,), (0, 2)])
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_gets_a_gradient(name, out_indices, with_cp):
    for out_norm in (False, True):
        model = build(name, out_indices=out_indices, with_cp=with_cp, out_norm=out_norm)
        loss_of(model(X)).backward()
        for part, parameter in model.named_parameters():
            assert parameter.grad is not None, part
            assert parameter.grad.abs().sum() > 0, part


def test_out_norm_normalises():
    network, arguments, _, _ = NETWORKS['hierarchical']
    for output in network(**arguments).eval()(X):
        mean = output.mean(1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    assert not any(name.startswith('norm') for name in build(out_norm=False).state_dict())


def test_activation_checkpointing_changes_nothing_but_memory():
    results = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, recompute='nothing', drop_path_rate=0.3)
        kept = count_bytes_kept(model, X)
        torch.manual_seed(3)
        outputs = model(X)
        loss_of(outputs).backward()
        results.append((outputs, [p.grad for p in model.parameters()], kept))
    (outputs, gradients, kept), (outputs_cp, gradients_cp, kept_cp) = results
    torch.testing.assert_close(outputs, outputs_cp, rtol=0, atol=0)
    torch.testing.assert_close(gradients, gradients_cp)
    assert kept_cp < 0.4 * kept


@networks
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(name, frozen_stages):
    """Frozen parts get no gradient and stay as they are, statistics too; all others change."""
    model = build(name, frozen_stages=frozen_stages, drop_path_rate=0.2)
    _, _, stem, stages = NETWORKS[name]
    frozen = list(stem) if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [*stages[i], f'norm{i}']

    def is_frozen(part):
        return any(part.startswith(f'{prefix}.') for prefix in frozen)

    for mode in (True, False, True):
        assert model.train(mode) is model
        for part, module in model.named_modules():
            if not [*module.children()]:
                assert module.training == (mode and not is_frozen(f'{part}.')), part
    before = copy.deepcopy(model.state_dict())
    outputs = model(X.repeat(4, 1, 1, 1))  # so many images that drop path drops no block in all
    if frozen_stages < 4:
        loss_of(outputs).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    for part, parameter in model.named_parameters():
        assert parameter.requires_grad != is_frozen(part), part
        assert (parameter.grad is None) == is_frozen(part), part
    for part, value in model.state_dict().items():
        assert torch.equal(value, before[part]) == is_frozen(part), part


@networks
@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval_keeps_the_statistics_of_the_stem(name, norm_eval):
    model = build(name, norm_eval=norm_eval).train()
    (norm, *_) = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(X)
    assert torch.equal(before, norm.running_mean) == norm_eval
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 2, 3)
    y = drop(x)
    per_image = y.flatten(1)
    assert (per_image == per_image[:, :1]).all()
    assert sorted(set(per_image[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_drop_path_is_active_in_training_only():
    model = build(drop_path_rate=0.9)
    assert not torch.equal(model(X)[-1], model(X)[-1])
    model.eval()
    assert torch.equal(model(X)[-1], model(X)[-1])


@pytest.mark.parametrize('dtype', HALF_DTYPES)
@pytest.mark.parametrize('with_cp', [False, True])
def test_autocast(dtype, with_cp):
    model = build(with_cp=with_cp)
    expected = model(X)
    with torch.autocast('cpu', dtype):
        outputs = model(X)
    loss_of([output.float() for output in outputs]).backward()
    for output, reference in zip(outputs, expected):
        tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
        assert relative_error(output.float(), reference) < tolerance
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_memory_format_of_the_input_does_not_matter():
    model = build().eval()
    torch.testing.assert_close(model(X), model(X.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(model(X), model(X.transpose(2, 3).contiguous().transpose(2, 3)))


def test_outputs_suit_the_roi_align_of_mmcv():
    """It reads `torch.channels_last` memory as if it were contiguous, without an error."""
    # The network alone needs neither (docs/compatibility.md).
    mmcv_ops = pytest.importorskip('mmcv.ops')
    torchvision_ops = pytest.importorskip('torchvision.ops')
    features = nn.Conv2d(8, 4, 1)(build().eval()(X)[0])  # as FPN's lateral convolution
    rois = torch.tensor([[0.0, 2, 3, 12, 14]])
    expected = torchvision_ops.roi_align(features, rois, (3, 3), aligned=True)
    torch.testing.assert_close(mmcv_ops.roi_align(features, rois, (3, 3)), expected)


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.5'),
    reason='torch < 2.5 exports with a fixed batch',
)
def test_export_with_dynamic_shapes():
    arch = dict(channels=(8, 12), depths=(1, 1), kernel_size=5)
    model = build(arch=arch, out_indices=(0, 1)).eval()
    side = 8 * torch.export.Dim('side', min=2, max=16)
    shapes = {0: torch.export.Dim('batch', min=1, max=8), 2: side, 3: side}
    program = torch.export.export(model, (X[:, :, :, :64],), dynamic_shapes=(shapes,))
    x = torch.randn(3, 3, 128, 128)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('hierarchical', (1, 4, 64, 64), r'\(N, in_channels=3, H, W\), got \(1, 4, 64, 64\)'),
        ('hierarchical', (3, 64, 64), r'\(N, in_channels=3, H, W\), got \(3, 64, 64\)'),
        ('hierarchical', (1, 3, 31, 64), 'at least 32x32 pixels, got H=31, W=64'),
        ('isotropic', (1, 3, 16, 8), 'at least 16x16 pixels, got H=16, W=8'),
    ],
)
def test_bad_input(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build(name)(torch.randn(shape))
