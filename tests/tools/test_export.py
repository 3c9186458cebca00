"""Exported files compute what the model of the checkpoint computes, on sizes of any kind."""

import importlib.util
import json

import export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from demo import CONFIG as DETECTION
from demo import MODEL
from export import EveryLevel, MatrixAdaptiveAvgPool2d, main
from helpers import ROOT
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import digit_version
from torch import nn

pytestmark = pytest.mark.usefixtures('guarded')
with_free_sizes = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version(export.FREE_SIZES_SINCE),
    reason=f'torch < {export.FREE_SIZES_SINCE} exports programs of fixed sizes only',
)

SEGMENTATION = 'configs/segmentation/upernet_conv2former_n.py'
CLASSIFICATION = 'configs/classification/conv2former_n_in1k.py'
CASCADE = 'configs/detection/cascade_mask_rcnn_conv2former_t.py'
BACKBONE = [
    'model.backbone.arch._delete_=True',
    'model.backbone.arch.channels=[8,12,16,20]',
    'model.backbone.arch.depths=[1,1,2,1]',
    'model.backbone.kernel_size=5',
    'model.backbone.init_cfg=None',
    'model.backbone.layer_scale_init_value=0.1',
]
DETECTOR = [
    *(option for option in MODEL if option not in BACKBONE),
    'model.neck.in_channels=[8,12,16,20]',
    'model.test_cfg.rcnn.score_thr=0.0',  # else untrained weights predict nothing
    'model.test_cfg.rcnn.max_per_img=20',
]
OPTIONS = {
    SEGMENTATION: [
        'model.decode_head.channels=16',
        'model.decode_head.in_channels=[8,12,16,20]',
        'model.auxiliary_head.channels=16',
        'model.auxiliary_head.in_channels=16',
    ],
    CLASSIFICATION: [
        'model.head.in_channels=20',
        'model.head.hidden_channels=32',
        'model.head.num_classes=7',
    ],
    DETECTION: DETECTOR,
    CASCADE: [
        'model.neck.in_channels=[8,12,16,20]',
        'model.test_cfg.rcnn.score_thr=0.0',
        'model.test_cfg.rcnn.max_per_img=20',
    ],
}


def build(path):
    """The model in small, as the tool changes it by `--cfg-options`, with random weights."""
    config = Config.fromfile(ROOT / path)
    pairs = (option.split('=', 1) for option in (*BACKBONE, *OPTIONS[path]))
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    init_default_scope(config.default_scope)
    if config.get('data_preprocessor'):
        config.model.data_preprocessor = config.data_preprocessor
    torch.manual_seed(0)
    # Little for detectors: many boxes of one score would be in an order without meaning.
    deviation = 0.02 if config.default_scope == 'mmdet' else 0.1
    model = revert_sync_batchnorm(MODELS.build(config.model))
    for parameter in model.parameters():
        parameter.data += deviation * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope='module')
def checkpoint_of(tmp_path_factory):
    """A function that returns a config's model and a checkpoint of it."""
    folder = tmp_path_factory.mktemp('checkpoints')
    made = {}

    def make(path):
        if path not in made:
            model = build(path)
            file = folder / f'{len(made)}.pth'
            torch.save(dict(state_dict=model.state_dict(), meta={}), file)
            made[path] = model, file
        return made[path]

    return make


def run(path, checkpoint, out, *arguments, options=()):
    main([str(ROOT / path), str(checkpoint), str(out), *map(str, arguments),
          '--cfg-options', *BACKBONE, *OPTIONS[path], *options])  # fmt: skip
    return json.loads(out.with_name(f'{out.name}.json').read_text())


def outputs_of(model, path, what, x):
    """What the file should compute, by the host library's own ways."""
    with torch.no_grad():
        if what == 'backbone':
            return model.backbone(x)
        if path == CLASSIFICATION:
            return [model.head(model.extract_feat(x))]
        logits = model.whole_inference(x, [dict(img_shape=x.shape[2:], ori_shape=x.shape[2:])])
        return [logits.argmax(1) if what == 'labels' else logits]


CASES = {
    'features': (DETECTION, 'backbone'),
    'logits': (SEGMENTATION, 'model'),
    'labels': (SEGMENTATION, 'labels'),
    'classes': (CLASSIFICATION, 'model'),
}
# None of those that the tool itself tries; 33 makes feature maps smaller than the bins of pooling.
SHAPES = [(2, 3, 33, 97), (1, 3, 128, 96), (5, 3, 40, 40)]


def compare(run_file, model, path, what, shapes=SHAPES):
    for shape in shapes:
        x = torch.randn(shape)
        expected = outputs_of(model, path, what, x)
        found = run_file(x)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            ours = np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours)
            if what == 'labels':
                assert (ours != theirs.numpy()).mean() < 1e-3
            else:
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_onnx(case, checkpoint_of, tmp_path, capsys):
    path, what = CASES[case]
    model, checkpoint = checkpoint_of(path)
    out = tmp_path / 'network.onnx'
    report = run(path, checkpoint, out, '--what', what, '--check-sizes', '64x64', '75x70')
    content = onnx.load(out)
    assert [opset.version for opset in content.opset_import if not opset.domain] == [17]
    assert not any(opset.domain.startswith('mmcv') for opset in content.opset_import)
    dims = content.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ['batch', 3, 'height', 'width']
    session = onnxruntime.InferenceSession(str(out))
    assert [output.name for output in session.get_outputs()] == report['outputs']
    compare(lambda x: session.run(None, {'image': x.numpy()}), model, path, what)

    tried = [(item['input'], item['difference'] < item['tolerance']) for item in report['checks']]
    expected = [[n, 3, *size] for n in (1, 3) for size in ((64, 64), (75, 70))]
    assert tried == [(shape, True) for shape in expected]
    assert report['file']['bytes'] == out.stat().st_size
    assert json.loads({prop.key: prop.value for prop in content.metadata_props}['mean']) == [
        123.675, 116.28, 103.53]  # fmt: skip
    assert report['input']['channels'] == 'RGB'
    assert '3x3x75x70' in capsys.readouterr().out


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs


@pytest.mark.parametrize('case', CASES)
def test_torchscript(case, checkpoint_of, tmp_path):
    path, what = CASES[case]
    model, checkpoint = checkpoint_of(path)
    out = tmp_path / 'network.torchscript'
    run(path, checkpoint, out, '--what', what, '--check-sizes', '64x64')
    loaded = torch.jit.load(out)
    compare(lambda x: as_list(loaded(x)), model, path, what)


@with_free_sizes
def test_program_of_the_first_stage(checkpoint_of, tmp_path):
    """The whole network takes half a minute, see below."""
    model, checkpoint = checkpoint_of(DETECTION)
    out = tmp_path / 'network.pt2'
    run(DETECTION, checkpoint, out, '--what', 'backbone', '--check-sizes', '64x64',
        options=['model.backbone.out_indices=[0]'])  # fmt: skip
    program = torch.export.load(out).module()
    for shape in SHAPES:
        x = torch.randn(shape)
        (found,), (expected, *_) = program(x), outputs_of(model, DETECTION, 'backbone', x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@with_free_sizes
@pytest.mark.parametrize('case', CASES)
def test_program(case, checkpoint_of, tmp_path):
    """From 64 pixels a side on: a last feature map of one row is of another memory layout."""
    path, what = CASES[case]
    model, checkpoint = checkpoint_of(path)
    out = tmp_path / 'network.pt2'
    run(path, checkpoint, out, '--what', what, '--check-sizes', '64x64')
    program = torch.export.load(out).module()
    shapes = [(2, 3, 65, 97), (1, 3, 128, 96), (5, 3, 70, 70)]
    compare(lambda x: as_list(program(x)), model, path, what, shapes)


@pytest.mark.slow
@with_free_sizes
@pytest.mark.parametrize('case', CASES)
def test_onnx_by_way_of_torch_export(case, checkpoint_of, tmp_path):
    path, what = CASES[case]
    model, checkpoint = checkpoint_of(path)
    out = tmp_path / 'network.onnx'
    report = run(path, checkpoint, out, '--what', what, '--dynamo', '--check-sizes', '64x64')
    assert report['file']['opset'] == 18
    session = onnxruntime.InferenceSession(str(out))
    compare(lambda x: session.run(None, {'image': x.numpy()}), model, path, what)


@pytest.mark.parametrize('path', [DETECTION, pytest.param(CASCADE, marks=pytest.mark.slow)])
def test_whole_detector(path, checkpoint_of, tmp_path):
    """Against `predict` of mmdet, with its own RoIAlign and suppression."""
    from mmdet.structures import DetDataSample

    model, checkpoint = checkpoint_of(path)
    out = tmp_path / 'detector.onnx'
    report = run(path, checkpoint, out, '--shape', '96x128')
    assert report['sizes'] == [1, 3, 96, 128]
    assert all(item['detections'] == 20 for item in report['checks'])
    session = onnxruntime.InferenceSession(str(out))
    x = torch.randn(1, 3, 96, 128)
    boxes, scores, labels, masks = session.run(None, {'image': x.numpy()})
    size = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0))
    logits = []  # (D, classes, 28, 28) of each stage, before mmdet pastes masks into the picture
    heads = model.roi_head.mask_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        (sample,) = model.predict(x, [DetDataSample(metainfo=size)], rescale=False)
    expected = sample.pred_instances
    np.testing.assert_array_equal(labels, expected.labels)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, expected.bboxes, atol=0.01)
    expected_masks = torch.stack(logits).sigmoid().mean(0)[torch.arange(20), expected.labels]
    np.testing.assert_allclose(masks, expected_masks, atol=1e-4)


@pytest.mark.parametrize('size', [(2, 3), (6, 6), (7, 13), (32, 25)])
@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_adaptive_pooling_by_products(size, bins):
    x = torch.randn(2, 4, *size, dtype=torch.double)
    expected = nn.AdaptiveAvgPool2d(bins)(x)
    torch.testing.assert_close(MatrixAdaptiveAvgPool2d(bins).double()(x), expected)


def test_every_level_of_roi_features():
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor = SingleRoIExtractor(layer, out_channels=4, featmap_strides=[4, 8, 16, 32])
    features = [torch.randn(1, 4, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
    rois = torch.tensor([[0, 1, 2, 200, 250.0], [0, 5, 5, 20, 30], [0, 0, 0, 250, 250]])
    torch.testing.assert_close(EveryLevel(extractor)(features, rois), extractor(features, rois))


def test_a_file_that_differs_is_not_kept(checkpoint_of, tmp_path, monkeypatch):
    _, checkpoint = checkpoint_of(DETECTION)
    monkeypatch.setattr(
        export, 'to_deploy', lambda holder: holder.backbone.norm1.weight.data.mul_(2)
    )
    with pytest.raises(SystemExit, match=r'was not written: for input \[1, 3, 64, 64\] .* differs'):
        run(DETECTION, checkpoint, tmp_path / 'b.torchscript', '--what', 'backbone')
    assert not list(tmp_path.iterdir())


REFUSALS = {
    'suffix': (DETECTION, 'b.pth', [], 'must end with .onnx, .pt2, .torchscript, got'),
    'opset': (DETECTION, 'b.onnx', ['--opset', 16], '--opset must be from 17 to 20, got 16'),
    'opset of dynamo': (
        DETECTION, 'b.onnx', ['--dynamo', '--opset', 17], '--opset must be from 18 to 20, got 17',
    ),
    'option': (DETECTION, 'b.pt2', ['--dynamo'], '--dynamo and --opset are for .onnx only'),
    'size': (DETECTION, 'b.onnx', ['--shape', '64'], 'must be HEIGHTxWIDTH, such as 224x288'),
    'batch': (DETECTION, 'b.onnx', ['--check-batches', 0], '--check-batches must be at least 1'),
    'folder': (DETECTION, 'none/b.onnx', [], 'none does not exist'),
    'what': (CLASSIFICATION, 'b.onnx', ['--what', 'labels'],
             '--what labels: of mmpretrain can be exported: backbone, model'),
    'small': (DETECTION, 'b.torchscript', ['--what', 'backbone', '--check-sizes', '16x16'],
              '--check-sizes 16x16: input must be at least 32x32 pixels'),
    'detector': (DETECTION, 'b.pt2', ['--shape', '64x64'], 'to .onnx and .torchscript only'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, checkpoint_of, tmp_path, capsys):
    path, name, options, message = REFUSALS[case]
    _, checkpoint = checkpoint_of(path)
    with pytest.raises(SystemExit) as stop:
        run(path, checkpoint, tmp_path / name, *options)
    assert message in f'{stop.value}{capsys.readouterr().err}'
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('arguments', [['network.pt2'], ['network.onnx', '--dynamo']])
def test_old_torch_is_named(arguments, checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    _, checkpoint = checkpoint_of(DETECTION)
    name, *options = arguments
    with pytest.raises(SystemExit, match=r'need torch 2\.6 or later, found 2\.5\.1'):
        run(DETECTION, checkpoint, tmp_path / name, '--what', 'backbone', *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('what', ['model', 'backbone'])
def test_refuses_checkpoints_of_other_networks(what, checkpoint_of, tmp_path):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    other = tmp_path / 'other.pth'
    torch.save(dict(state_dict=nn.Conv2d(3, 8, 3).state_dict()), other)
    for checkpoint, message in [
        (other, 'does not fit'),
        (tmp_path / 'text.pth', 'cannot be read'),
        (tmp_path / 'none.pth', 'none.pth.* does not exist'),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(DETECTION, checkpoint, tmp_path / 'b.onnx', '--what', what)
    assert not (tmp_path / 'b.onnx').exists()


def test_says_which_package_is_missing(checkpoint_of, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name)
    )
    _, checkpoint = checkpoint_of(DETECTION)
    with pytest.raises(SystemExit, match='ONNX needs onnxruntime: pip install'):
        run(DETECTION, checkpoint, tmp_path / 'b.onnx', '--what', 'backbone')
