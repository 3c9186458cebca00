"""Counts against closed formulas, published numbers, and each other."""

import pytest
import torch
from common import model_specs
from common.counting import FREE, TrafficCounter, count_bytes_kept, count_macs, part_of
from common.measuring import Setting
from common.model_specs import build, bytes_kept, macs, traffic
from mmengine.utils import digit_version
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mmconv2former import Conv2Former

SMALL = Setting((64, 64))


@pytest.mark.parametrize('length', [197, 3136])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_macs_of_a_vit_block(length, device):
    """Attention included: L tokens of D channels cost 12 L D^2 + 2 L^2 D."""
    channels = 48
    block = Block(channels, num_heads=3).to(device)
    tokens = torch.zeros(2, length, channels, device=device)
    expected = 2 * (12 * length * channels**2 + 2 * length**2 * channels)
    assert count_macs(block, tokens) == expected


def test_macs_of_attention_to_other_tokens():
    class CrossAttention(nn.Module):
        def forward(self, queries, keys, values):
            return scaled_dot_product_attention(queries, keys, values)

    inputs = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)
    assert count_macs(CrossAttention(), *inputs) == 2 * 3 * 5 * 7 * (8 + 8)


def test_macs_of_conv2former_t():
    model, (height, width) = Conv2Former('tiny'), (96, 160)
    kernel = 11
    first = model.channels[0]
    pixels = height * width // 4
    expected = pixels * (9 * 3 * first // 2 + 9 * (first // 2) ** 2)  # stem, at half resolution
    previous = first // 2
    for depth, channels, stride in zip(model.depths, model.channels, model.strides, strict=True):
        pixels = height * width // stride**2
        products = 3 * channels**2 + 8 * channels**2  # modulation, feed-forward
        depthwise = kernel**2 * channels + 9 * 4 * channels
        expected += pixels * (4 * previous * channels + depth * (products + depthwise))
        previous = channels
    assert count_macs(model, torch.zeros(1, 3, height, width)) == expected
    assert macs('conv2former_t', Setting((height, width))) == expected
    assert macs('plain_t', Setting((height, width))) == expected


@pytest.mark.parametrize(('spec', 'published'), [('conv2former_n', 2.2), ('convnext_tiny', 4.5)])
def test_published_macs(spec, published):
    """Here without the classification head; tests/tools/test_evidence.py has all networks."""
    assert macs(spec, Setting((224, 224))) / 1e9 == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_bytes_kept_of_known_layers(device):
    """Of input, weight and two outputs of 2 x 5 numbers only the outputs count, each once."""
    layers = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Tanh()).to(device)
    x = torch.zeros(2, 3, device=device)
    assert count_bytes_kept(layers, x) == 4 * (2 * 5 + 2 * 5)
    kept = count_bytes_kept(layers, {'x': x}, lambda batch: (layers(batch['x']) ** 2).view(10) ** 2)
    assert kept == 4 * 3 * (2 * 5)
    with torch.no_grad():
        assert count_bytes_kept(layers, x) == 0


def test_bytes_kept_without_values_are_those_with_values():
    for spec in ('conv2former_n:recompute=expansion', 'plain_n'):
        expected = count_bytes_kept(build(spec).train(), torch.randn(1, 3, 64, 64))
        assert bytes_kept(spec, SMALL) == pytest.approx(expected, rel=0.02)
        assert bytes_kept(spec, Setting((64, 64), batch=2)) > 1.8 * expected


def test_traffic_of_known_operators():
    x, y = torch.zeros(10, 20), torch.zeros(20, dtype=torch.double)
    with TrafficCounter() as counter:
        view = x.t().reshape(4, 50)[1:]  # a copy, since a transposed tensor has no such view
        assert (counter.launches, counter.bytes) == (1, 2 * 800)
        view = view.view(150).unsqueeze(0)
        assert counter.launches == 1
        view.add_(1)  # reads and writes 600
        assert (counter.launches, counter.bytes) == (2, 1600 + 1200)
        x.to(torch.double) + y
    assert (counter.launches, counter.bytes) == (4, 2800 + (800 + 1600) + (1600 + 160 + 1600))
    assert all(name.startswith('aten::') for name in FREE)


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch < 2.4 cannot count operators that write into given memory',
)
def test_parts_of_tensors_that_kernels_read():
    """Gate and value lie in one tensor, and some kernels use one of them."""
    steps = dict(C=4, Y_STEP=8, OTHER_STEP=4, BEFORE_STEP=0)
    parts = [part_of(name, steps) for name in ('x', 'y', 'other', 'before')]
    assert parts == [1, 0.5, 1, 1]
    for has_activations, part in [(True, 1), (False, 0.5)]:
        constants = dict(C=4, HAS_ACTIVATIONS=has_activations)
        assert part_of('gate_value', constants) == part
        assert part_of('grad_gate_value', constants) == 0.5
        assert part_of('a', constants) == 1


def test_training_costs_less_than_in_the_published_code():
    """What is counted holds on any machine, so the promises of docs/performance.md stand here."""
    setting = Setting((512, 512), dtype='bfloat16')
    plain, ours = (traffic(spec, setting, True) for spec in ('plain_n', 'conv2former_n'))
    assert ours[0] <= 0.35 * plain[0]  # with Triton's kernels, which are counted
    assert ours[1] <= 0.50 * plain[1]
    setting = Setting((256, 256))
    plain = bytes_kept('plain_t', setting)
    for options, limit in (('', 0.5), (':recompute=expansion', 0.35), (':with_cp=True', 0.1)):
        assert bytes_kept(f'conv2former_t{options}', setting) <= limit * plain, options


def test_traffic_is_counted_on_the_device(monkeypatch):
    """Here on the one other device that every machine has."""
    seen = []
    monkeypatch.setattr(model_specs, 'train_step', lambda *inputs, **_: seen.append(inputs))
    traffic('conv2former_n', Setting((64, 64), device='meta'), True)
    assert len(seen) == 2  # the first warms up
    for model, images, _ in seen:
        assert {tensor.device.type for tensor in (images, *model.parameters())} == {'meta'}
