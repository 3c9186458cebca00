"""The figures' numbers against hand-made fields and the plain network; and what is refused."""

import json
import re
import shutil
from xml.etree import ElementTree

import cv2
import numpy as np
import plot_curves
import pytest
import torch
import visualize
from common.plain_conv2former import (
    block,
    conv,
    depthwise,
    fuse,
    gelu,
    norm,
    plain_conv2former,
    stem,
)
from helpers import ROOT
from helpers.comparisons import randomized
from helpers.models import DETECTION_MODEL, SEGMENTATION_MODEL, save_model
from mmengine.config import Config
from torch import nn

from mmconv2former import Baseline, Conv2Former, Conv2FormerIsotropic

ARCH = dict(channels=(8, 12), depths=(2, 1), kernel_size=(5, 3))


pytestmark = pytest.mark.usefixtures('in_process')


@pytest.fixture
def images(tmp_path):
    """A folder with images of three kinds, one in a subfolder, and another file."""
    folder = tmp_path / 'images'
    (folder / 'below').mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), np.uint8)
    cv2.imwrite(str(folder / 'colour.jpg'), pixels[..., :3])
    cv2.imwrite(str(folder / 'transparent.png'), pixels)
    cv2.imwrite(str(folder / 'below/grey.PNG'), pixels[..., 0])
    (folder / 'notes.txt').write_text('no image')
    (folder / '._colour.jpg').write_text("of macOS's archives")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A whole model's file with a small backbone, and the backbone."""
    backbone = randomized(Conv2Former(ARCH, out_indices=(0, 1))).eval()
    state_dict = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    path = tmp_path / 'model.pth'
    torch.save(dict(meta={}, state_dict=state_dict | {'head.weight': torch.ones(2)}), path)
    return path, backbone


# ------------------------------------------------------------------------------- receptive field
def test_sides_of_a_field_made_by_hand():
    field = np.zeros((9, 9))
    rings = {0: 20.0, 1: 10.0, 2: 20.0, 3: 49.0, 4: 1.0}  # in all of a ring around the centre
    for y in range(9):
        for x in range(9):
            radius = max(abs(y - 4), abs(x - 4))
            field[y, x] = rings[radius] / max(1, 8 * radius)
    expected = {0.2: 1, 0.21: 3, 0.3: 3, 0.5: 5, 0.51: 7, 0.99: 7, 0.991: 9, 1.0: 9}
    for share, side in expected.items():
        assert visualize.smallest_square(field, share) == (side, side**2 / 81), share

    corner = np.zeros((8, 8))
    corner[0, 0] = 1
    assert visualize.smallest_square(corner, 0.2) == (8, 1.0)  # an even side has no middle pixel
    wide = np.zeros((8, 16))
    wide[4, 0] = 1
    assert visualize.smallest_square(wide, 0.2) == (8, 0.5)  # no square holds it


@pytest.mark.parametrize('kernel_size', [3, 7, 11])
def test_field_of_one_depthwise_convolution_is_its_kernel(kernel_size):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2, groups=3)
    layer.bias.data = torch.tensor([9.0, -9.0, 9.0])  # the second channel is never positive
    x = torch.rand(1, 3, 32, 32)
    field = visualize.input_gradient(lambda images: (layer(images),), x)
    kernel = layer.weight[[0, 2], 0].clamp(min=0).sum(0).detach()
    radius = kernel_size // 2
    expected = np.zeros((32, 32))
    expected[16 - radius : 17 + radius, 16 - radius : 17 + radius] = kernel.numpy()
    np.testing.assert_allclose(field, expected, rtol=1e-6)

    nn.init.ones_(layer.weight)
    field = visualize.input_gradient(lambda images: (layer(images),), x)
    assert visualize.smallest_square(field, 1.0)[0] == kernel_size


@pytest.mark.parametrize('with_cp', [False, True])
def test_field_of_conv2former_is_the_plain_networks(checkpoint, with_cp):
    path, backbone = checkpoint
    network = visualize.load_network(str(path), with_cp=with_cp)
    x = torch.rand(2, 3, 64, 64)
    field = visualize.input_gradient(network.backbone, x)

    x.requires_grad_()
    feature = plain_conv2former(x, backbone.state_dict(), ARCH['depths'])[-1]  # (2, C, 8, 8)
    feature[:, :, 4, 4].relu().sum().backward()
    expected = x.grad.relu().sum((0, 1))
    np.testing.assert_allclose(field, expected, rtol=1e-3, atol=1e-5 * expected.max().item())
    assert all(p.grad is None for p in network.backbone.parameters())


def test_a_gradient_that_is_not_finite_is_refused():
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match='not finite'):
        visualize.input_gradient(lambda images: (images * float('inf'),), x)
    with pytest.raises(ValueError, match='zero everywhere'):
        visualize.input_gradient(lambda images: (-images,), x)


def test_logarithm_of_the_figure():
    field = np.array([0.0, 9.0, 99.0])
    np.testing.assert_allclose(visualize.log_scaled(field), [0, 0.5, 1])
    np.testing.assert_allclose(visualize.log_scaled(field / 1e6, peak=99), [0, 0.5, 1])


def test_receptive_fields_of_several_networks(checkpoint, images, tmp_path, capsys):
    path, backbone = checkpoint
    out = tmp_path / 'new/erf.png'
    visualize.main(['erf', str(path), 'nano', '--images', str(images), '--size', '64',
                    '--out', str(out)])  # fmt: skip
    printed = capsys.readouterr().out
    assert 'Conv2Former (weights of model.pth): 3 images' in printed
    assert 'nano (random weights): 3 images' in printed
    assert cv2.imread(str(out)).size > 0

    arrays = np.load(out.with_suffix('.npz'))
    assert list(arrays['networks']) == ['Conv2Former, weights of model.pth', 'nano, random weights']
    inputs = []
    for name in ('below/grey.PNG', 'colour.jpg', 'transparent.png'):
        image = visualize.read_image(images / name).resize((64, 64), visualize.Image.BICUBIC)
        inputs.append(visualize.to_input(image))
    total = visualize.input_gradient(lambda x: backbone(x), torch.cat(inputs))
    np.testing.assert_allclose(arrays['fields'][0], total / 3, rtol=1e-3, atol=1e-4 * total.max())
    side, share = visualize.smallest_square(arrays['fields'][0], 0.99)
    assert f'{side} ({share:.1%})' in printed


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_image_with_16_bits(suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    for name, image in (('8', pixels), ('16', pixels.astype(np.uint16) * 257)):
        cv2.imwrite(str(tmp_path / f'{name}.{suffix}'), image)
    deep = np.asarray(visualize.read_image(tmp_path / f'16.{suffix}'))
    np.testing.assert_array_equal(deep, np.stack([pixels] * 3, 2))
    cv2.imwrite(str(tmp_path / 'a.tif'), pixels.astype(np.float32))
    with pytest.raises(ValueError, match=r'a\.tif cannot be read: its values are floating-point'):
        visualize.read_image(tmp_path / 'a.tif')


def test_layer_scale_of_random_weights_widens_the_field():
    x = torch.rand(1, 3, 128, 128)
    sides = []
    for layer_scale in (None, 1.0):
        network = visualize.load_network('nano', layer_scale=layer_scale)
        field = visualize.input_gradient(network.backbone, x)
        sides.append(visualize.smallest_square(field, 0.99)[0])
    assert network.title == 'nano, random weights, layer scale 1'
    assert sides[1] > sides[0]
    network = visualize.load_network('efficientnet_b0', layer_scale=1.0)  # has none
    assert network.title == 'efficientnet_b0, random weights'


@pytest.mark.parametrize('name', ['nano', 'is', 'convnext_tiny', 'hornet_tiny', 'deit3_small'])
def test_all_layer_scales_are_found(name):
    backbone = visualize.load_network(name, layer_scale=7.0).backbone
    scaled = [key for key, value in backbone.named_parameters() if (value == 7).all()]
    blocks = {re.sub(r'(layer_scale_|gamma|ls).*', '', key) for key in scaled}
    assert len(blocks) == sum(getattr(backbone, 'depths', [18]))


# --------------------------------------------------------------------------------------- networks
def test_isotropic_checkpoint_is_recognised(tmp_path):
    arch = dict(channels=8, depth=5, kernel_size=3)
    backbone = randomized(Conv2FormerIsotropic(arch, patch_embedding='conv')).eval()
    torch.save(backbone.state_dict(), tmp_path / 'isotropic.pth')
    network = visualize.load_network(str(tmp_path / 'isotropic.pth'))
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(network.backbone(x), backbone(x))
    assert network.title == 'Conv2FormerIsotropic, weights of isotropic.pth'
    blocks = visualize.blocks_of(network)
    assert list(visualize.choose_blocks(blocks, None)) == ['blocks.0', 'blocks.1', 'blocks.2',
                                                           'blocks.4']  # fmt: skip
    assert list(visualize.choose_blocks(blocks, ['3'])) == ['blocks.3']


@pytest.mark.parametrize('prefix', ['', 'backbone.body.'])
def test_weights_of_a_baseline(prefix, tmp_path):
    """A file of its library, and one of a model trained with `--backbone`."""
    name = 'efficientnet_b0'
    torch.manual_seed(2)
    baseline = Baseline(name).eval()
    weights = {f'{prefix}{key}': value for key, value in baseline.body.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'weights.pth')
    network = visualize.load_network(f'{name}={tmp_path / "weights.pth"}')
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(network.backbone(x), baseline(x))
    assert network.title == f'{name}, weights of weights.pth'


# ------------------------------------------------------------------------------------- modulation
@pytest.mark.parametrize('fusion', ['hadamard', 'sum'])
def test_maps_of_the_modulation(checkpoint, fusion):
    path, backbone = checkpoint
    p = backbone.state_dict()
    network = visualize.load_network(str(path), fusion=fusion)
    x = torch.rand(1, 3, 44, 36)
    blocks = visualize.choose_blocks(visualize.blocks_of(network), ['0.1', '1.0'])
    maps = visualize.modulation_maps(network.backbone, x, blocks)

    y = stem(x, p, training=False)
    for i, depth in enumerate(ARCH['depths']):
        if i > 0:
            name = f'downsample_layers.{i}'
            y = conv(norm(y, p, f'{name}.0'), p, f'{name}.1', stride=2)
        for j in range(depth):
            name = f'stages.{i}.{j}'
            z = norm(y, p, f'{name}.attn.norm')
            a = depthwise(gelu(conv(z, p, f'{name}.attn.att.0')), p, f'{name}.attn.att.2')
            v = conv(z, p, f'{name}.attn.v')
            if name in maps:
                found = maps.pop(name)
                torch.testing.assert_close(found.a, a[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found.v, v[0], rtol=1e-4, atol=1e-4)
                expected = fuse(a, v, fusion)[0]
                torch.testing.assert_close(found.fused, expected, rtol=1e-4, atol=1e-4)
            y = block(y, p, name, fusion)
    assert not maps


def test_modulation_is_drawn_and_measured(checkpoint, images, tmp_path, capsys):
    path, _ = checkpoint
    image = images / 'colour.jpg'
    for name, options in (('mean', []), ('channels', ['--channels', '0', '3'])):
        out = tmp_path / f'{name}.png'
        visualize.main(['modulation', str(path), '--image', str(image), '--size', '64',
                        '--blocks', 'all', '--out', str(out), *options])  # fmt: skip
        assert cv2.imread(str(out)).size > 0
    printed = capsys.readouterr().out
    assert 'colour.jpg at 64x46' in printed
    network = visualize.load_network(str(path))
    x = visualize.to_input(visualize.read_image(image).resize((64, 46)))
    blocks = visualize.blocks_of(network)
    for name, found in visualize.modulation_maps(network.backbone, x, blocks).items():
        (line,) = {line for line in printed.splitlines() if line.startswith(name)}
        numbers = [float(word) for word in line.split()[2:]]
        expected = [t.abs().mean().item() for t in (found.a, found.v, found.fused)]
        np.testing.assert_allclose(numbers, expected, atol=1e-4)


# ---------------------------------------------------------------------------------------- kernels
def test_kernels_and_their_means(checkpoint, tmp_path, capsys):
    path, backbone = checkpoint
    blocks = visualize.blocks_of(visualize.load_network(str(path)))
    p = backbone.state_dict()
    of_first_stage = torch.cat([p[f'stages.0.{j}.attn.att.2.weight'] for j in range(2)])
    means = visualize.mean_kernels(blocks)
    np.testing.assert_allclose(means['stages.0'], of_first_stage.abs().mean((0, 1)), rtol=1e-6)
    assert means['stages.1'].shape == (3, 3)
    kernels = visualize.kernels_of(blocks['stages.0.1'])
    np.testing.assert_array_equal(kernels, p['stages.0.1.attn.att.2.weight'][:, 0])

    out = tmp_path / 'kernels.png'
    visualize.main(['kernels', str(path), '--blocks', '0.1', '1.0', '--count', '4',
                    '--out', str(out)])  # fmt: skip
    assert cv2.imread(str(out)).size > 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith('stages.0'))
    words = line.split()
    assert words[1] == '5x5'
    assert float(words[2]) == pytest.approx(of_first_stage[..., 2, 2].abs().mean().item(), abs=1e-4)


# ------------------------------------------------------------------------------------ predictions
FOLDERS = {DETECTION_MODEL: 'coco', SEGMENTATION_MODEL: 'ade/ADEChallengeData2016'}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    return {recipe: save_model(recipe, folder) for recipe in FOLDERS}


@pytest.mark.parametrize('recipe', FOLDERS)
def test_predictions_beside_the_truth(recipe, models, sample, tmp_path, capsys, monkeypatch):
    drawn = {}
    draw = visualize.drawn_pairs
    monkeypatch.setattr(visualize, 'drawn_pairs', lambda *a: drawn.update(draw(*a)) or drawn)
    model, out = models[recipe], tmp_path / 'predictions.png'

    def run(*options, config=model.config, checkpoint=model.checkpoint):
        drawn.clear()
        arguments = ['predictions', config, checkpoint, '--data-root', sample / FOLDERS[recipe],
                     '--score', 0, '--out', out, *options]  # fmt: skip
        visualize.main([str(argument) for argument in arguments])

    run('--count', 2)
    names = ['000000000001.jpg', '000000000006.jpg']  # first and last of six
    assert list(drawn) == names
    assert f'2 images of test: {", ".join(names)}' in capsys.readouterr().out
    assert cv2.imread(str(out)).shape[1] > 2 * 128
    for pair in drawn.values():
        truth, prediction = pair[:, :64], pair[:, 64:]
        assert truth.shape == prediction.shape == (64, 64, 3)
        assert (truth != prediction).any()

    wrapped = Config.fromfile(model.config)
    wrapped.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=wrapped.train_dataloader.dataset
    )
    wrapped.dump(tmp_path / 'wrapped.py')
    run('--split', 'train', '--indices', 7, config=tmp_path / 'wrapped.py')
    assert list(drawn) == ['000000000008.jpg']
    for index in (6, -1):
        with pytest.raises(SystemExit, match=f'error: --indices must be from 0 to 5, got {index}'):
            run('--indices', index)
    with pytest.raises(
        SystemExit, match=r"error: cannot build .* has no argument archh.* did you mean 'arch'"
    ):
        run('--cfg-options', 'model.backbone.archh=n')
    (other,) = FOLDERS.keys() - {recipe}
    with pytest.raises(SystemExit, match=r'error: .*does not fit.* names missing'):
        run(checkpoint=models[other].checkpoint)


@pytest.mark.parametrize('recipe', FOLDERS)
def test_broken_image_is_named(recipe, models, sample, tmp_path):
    data = shutil.copytree(sample / FOLDERS[recipe], tmp_path / 'data')
    (image,) = data.rglob('*val*/000000000001.jpg')
    image.write_bytes(image.read_bytes()[:200])
    model = models[recipe]
    arguments = ['predictions', model.config, model.checkpoint, '--data-root', data, '--count', 1]
    with pytest.raises(SystemExit, match=r'error: .*000000000001\.jpg.* truncated'):
        visualize.main([str(argument) for argument in arguments])


# ----------------------------------------------------------------------------------------- curves
def test_curves_are_those_of_plot_curves(tmp_path, monkeypatch):
    folder = tmp_path / '20260101_000000/vis_data'
    folder.mkdir(parents=True)
    records = [dict(step=1, loss=2.0, loss_cls=1.0), dict(step=2, loss=1.0), dict(step=1, mIoU=3.0)]
    lines = [*map(json.dumps, records), '{"step": 3, "loss":']  # cut off by a full disk
    (folder / 'scalars.json').write_text('\n'.join(lines))
    out = tmp_path / 'other.png'
    monkeypatch.setattr('sys.argv', ['plot_curves.py', str(tmp_path), '--out', str(out)])
    plot_curves.main()
    visualize.main(['curves', str(tmp_path)])
    assert (tmp_path / 'curves.png').read_bytes() == out.read_bytes()
    with pytest.raises(SystemExit, match='error: no training log'):
        visualize.main(['curves', str(folder)])


# -------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('erf nano --images {tmp}/new', 'new does not exist'),
        ('erf nano --images {images}/notes.txt --limit 1', 'notes.txt cannot be read'),
        ('erf nano --images {empty}', 'no image'),
        ('erf huge --images {images}', "network must be a checkpoint or one of nano.*got 'huge'"),
        ('erf nano={tmp}/none.pth --images {images}', 'none.pth.* does not exist'),
        ('erf nano={model} --images {images}', 'does not fit this Conv2Former: channels is'),
        ('erf {text} --images {images}', 'text.pth.* cannot be read'),
        ('erf {other} --images {images}', r'has no Conv2Former \(.* NAME=CHECKPOINT'),
        ('erf coatnet_0 --images {images}', 'coatnet_0 is for classification only'),
        ('erf {model} --images {broken} --size 64', 'broken.jpg cannot be read'),
        ('erf {model} --images {images} --size 7', 'input must be at least 8x8 pixels'),
        ('modulation efficientnet_b0 --image {broken}', 'has no modulation; this needs a Conv2F'),
        ('modulation {model} --image {broken} --blocks 2.0', 'block stages.2.0 does not exist; '
         'there are stages.0.0 to stages.0.1, stages.1.0 to stages.1.0'),
        ('modulation {model} --image {broken}', 'broken.jpg cannot be read'),
        ('modulation {model} --image {images}/colour.jpg --channels 8',
         'channel must be from 0 to 7 in stages.0.1, got 8'),
        ('kernels {images}/notes.txt', 'notes.txt.* cannot be read'),
        ('predictions none.py {model}', 'config none.py: it does not exist'),
        ('predictions configs/classification/conv2former_n_in1k.py {model}',
         'must be one of mmdet, mmseg, got .mmpretrain'),
    ],
)  # fmt: skip
def test_one_clear_message(command, message, checkpoint, images, tmp_path):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save({'fc.weight': torch.ones(3)}, tmp_path / 'other.pth')
    image = (images / 'colour.jpg').read_bytes()
    (tmp_path / 'broken.jpg').write_bytes(image[: len(image) // 2])
    (tmp_path / 'empty').mkdir()
    paths = dict(
        empty=tmp_path / 'empty', images=images, tmp=tmp_path, model=checkpoint[0],
        text=tmp_path / 'text.pth',
        other=tmp_path / 'other.pth', broken=tmp_path / 'broken.jpg',
    )  # fmt: skip
    with pytest.raises(SystemExit, match=f'^error: .*{message}') as error:
        visualize.main([word.format(**paths) for word in command.split()])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'options', [['--out', 'erf.txt'], ['--device', 'tpu'], ['--limit', '0'], ['--size', 'big']]
)
def test_arguments_that_are_not_allowed(options, capsys):
    with pytest.raises(SystemExit):
        visualize.main(['erf', 'nano', '--images', '.', *options])
    assert f'argument {options[0]}' in capsys.readouterr().err


def test_no_images_to_draw_are_refused(capsys):
    with pytest.raises(SystemExit):
        visualize.main(['predictions', 'config.py', 'model.pth', '--count', '0'])
    assert 'argument --count: must be at least 1, got 0' in capsys.readouterr().err


# -------------------------------------------------------------------------------- the block diagram
def texts_of(image):
    """The words of an SVG, and those that name parameters."""
    elements = list(ElementTree.parse(image).iter('{http://www.w3.org/2000/svg}text'))
    names = {e.text for e in elements if 'monospace' in e.get('style')}
    return [element.text for element in elements], names


def test_block_diagram_names_all_parameters():
    words, names = texts_of(ROOT / 'docs/images/architecture.svg')
    backbone = Conv2Former('tiny')
    layers = {name.rpartition('.')[0] for name, _ in backbone.stages[0][0].named_parameters()}
    layers |= {'layer_scale_1', 'layer_scale_2'}
    stem_layers = {f'downsample_layers.0.{i}' for i in (0, 2, 3, 5, 6)}
    for layer in (layers | stem_layers) - {''}:
        assert layer in names, layer
    real = [*backbone.state_dict(), *backbone.stages[0][0].state_dict()]
    for name in names:
        assert any(f'{key}.'.startswith(f'{name}.') for key in real), name
    for channels, stride, depth in zip(backbone.channels, backbone.strides, backbone.depths):
        assert f'{channels} x H/{stride} x W/{stride}' in words
        assert f'{depth} x block' in words
