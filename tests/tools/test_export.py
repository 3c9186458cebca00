"""Exported files compute what the model of the checkpoint computes, on sizes of any kind."""

import importlib.util
import json
from dataclasses import replace

import export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export import EveryLevel, MatrixAdaptiveAvgPool2d, main
from helpers.models import (
    CASCADE_MODEL,
    CLASSIFICATION_MODEL,
    DETECTION_MODEL,
    SEGMENTATION_MODEL,
    save_model,
)
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import digit_version
from torch import nn

pytestmark = pytest.mark.usefixtures('in_process')
with_dynamic_sizes = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version(export.DYNAMIC_SIZES_SINCE),
    reason=f'torch < {export.DYNAMIC_SIZES_SINCE} exports programs of fixed sizes only',
)


@pytest.fixture(scope='module')
def model_of(tmp_path_factory):
    """A function that returns the tiny model of a recipe."""
    folder = tmp_path_factory.mktemp('models')
    made = {}

    def get(recipe):
        if recipe not in made:
            made[recipe] = save_model(recipe, folder)
        init_default_scope(made[recipe].scope)
        return made[recipe]

    return get


def run(model, out, *arguments):
    main([str(argument) for argument in (model.config, model.checkpoint, out, *arguments)])
    return json.loads(out.with_name(f'{out.name}.json').read_text())


def outputs_of(model, what, x):
    """What the file should compute, by the host library's own functions."""
    with torch.no_grad():
        if what == 'backbone':
            return model.backbone(x)
        if not hasattr(model, 'decode_head'):
            return [model.head(model.extract_feat(x))]
        logits = model.whole_inference(x, [dict(img_shape=x.shape[2:], ori_shape=x.shape[2:])])
        return [logits.argmax(1) if what == 'labels' else logits]


CASES = {
    'features': (DETECTION_MODEL, 'backbone'),
    'logits': (SEGMENTATION_MODEL, 'model'),
    'labels': (SEGMENTATION_MODEL, 'labels'),
    'classes': (CLASSIFICATION_MODEL, 'model'),
}
# Not among those that the tool tries; 33 makes feature maps smaller than the bins of pooling.
SHAPES = [(2, 3, 33, 97), (1, 3, 128, 96), (5, 3, 40, 40)]


def compare(run_file, model, what, shapes=SHAPES):
    for shape in shapes:
        x = torch.randn(shape)
        expected = outputs_of(model, what, x)
        found = run_file(x)
        found = [found] if isinstance(found, torch.Tensor) else found
        for ours, theirs in zip(found, expected, strict=True):
            ours = torch.as_tensor(ours)
            if what == 'labels':
                assert (ours != theirs).double().mean() < 1e-3
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_onnx(case, model_of, tmp_path, capsys):
    recipe, what = CASES[case]
    model = model_of(recipe)
    out = tmp_path / 'network.onnx'
    report = run(model, out, '--what', what, '--check-sizes', '64x64', '75x70')
    content = onnx.load(out)
    assert [opset.version for opset in content.opset_import if not opset.domain] == [17]
    assert not any(opset.domain.startswith('mmcv') for opset in content.opset_import)
    dims = content.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ['batch', 3, 'height', 'width']
    session = onnxruntime.InferenceSession(str(out))
    assert [output.name for output in session.get_outputs()] == report['outputs']
    compare(lambda x: session.run(None, {'image': x.numpy()}), model.model, what)

    tried = [(item['input'], item['difference'] < item['tolerance']) for item in report['checks']]
    expected = [[n, 3, *size] for n in (1, 3) for size in ((64, 64), (75, 70))]
    assert tried == [(shape, True) for shape in expected]
    assert report['file']['bytes'] == out.stat().st_size
    assert json.loads({prop.key: prop.value for prop in content.metadata_props}['mean']) == [
        123.675, 116.28, 103.53]  # fmt: skip
    assert report['input']['channels'] == 'RGB'
    assert '3x3x75x70' in capsys.readouterr().out


@pytest.mark.parametrize('case', ['labels', 'features'])
def test_torchscript(case, model_of, tmp_path):
    recipe, what = CASES[case]
    out = tmp_path / 'network.torchscript'
    run(model_of(recipe), out, '--what', what, '--check-sizes', '64x64')
    compare(torch.jit.load(out), model_of(recipe).model, what)


@with_dynamic_sizes
def test_program_of_the_first_stage(model_of, tmp_path):
    """The whole network is slow, see below."""
    model = model_of(DETECTION_MODEL)
    out = tmp_path / 'network.pt2'
    run(model, out, '--what', 'backbone', '--check-sizes', '64x64', '--cfg-options',
        'model.backbone.out_indices=[0]')  # fmt: skip
    program = torch.export.load(out).module()
    for shape in SHAPES:
        x = torch.randn(shape)
        (found,), (expected, *_) = program(x), outputs_of(model.model, 'backbone', x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@with_dynamic_sizes
@pytest.mark.parametrize('case', CASES)
def test_program(case, model_of, tmp_path):
    """From 64 pixels a side: a last feature map of one row has another memory layout."""
    recipe, what = CASES[case]
    out = tmp_path / 'network.pt2'
    run(model_of(recipe), out, '--what', what, '--check-sizes', '64x64')
    shapes = [(2, 3, 65, 97), (1, 3, 128, 96), (5, 3, 70, 70)]
    compare(torch.export.load(out).module(), model_of(recipe).model, what, shapes)


@pytest.mark.slow
@with_dynamic_sizes
@pytest.mark.parametrize('case', CASES)
def test_onnx_through_torch_export(case, model_of, tmp_path):
    recipe, what = CASES[case]
    out = tmp_path / 'network.onnx'
    report = run(model_of(recipe), out, '--what', what, '--dynamo', '--check-sizes', '64x64')
    assert report['file']['opset'] == 18
    session = onnxruntime.InferenceSession(str(out))
    compare(lambda x: session.run(None, {'image': x.numpy()}), model_of(recipe).model, what)


@pytest.mark.parametrize(
    'recipe', [DETECTION_MODEL, pytest.param(CASCADE_MODEL, marks=pytest.mark.slow)]
)
def test_whole_detector(recipe, model_of, tmp_path):
    """Against `predict` of mmdet, with its own RoIAlign and NMS."""
    model = model_of(recipe).model
    out = tmp_path / 'detector.onnx'
    report = run(model_of(recipe), out, '--shape', '96x128')
    assert report['sizes'] == [1, 3, 96, 128]
    assert all(item['detections'] == 20 for item in report['checks'])
    session = onnxruntime.InferenceSession(str(out))
    x = torch.randn(1, 3, 96, 128)
    boxes, scores, labels, masks = session.run(None, {'image': x.numpy()})
    size = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0))
    logits = []  # (D, classes, 28, 28) of each stage, before mmdet pastes masks into the image
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
@pytest.mark.parametrize('bins', [1, 2, 3, 6, (2, 5)])
def test_adaptive_pooling_by_products(size, bins):
    x = torch.randn(2, 4, *size, dtype=torch.double)
    pool = nn.AdaptiveAvgPool2d(bins)
    torch.testing.assert_close(MatrixAdaptiveAvgPool2d(pool)(x), pool(x))


def test_every_level_of_roi_features():
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    extractor = SingleRoIExtractor(layer, out_channels=4, featmap_strides=[4, 8, 16, 32])
    features = [torch.randn(1, 4, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
    rois = torch.tensor([[0, 1, 2, 200, 250.0], [0, 5, 5, 20, 30], [0, 0, 0, 250, 250]])
    torch.testing.assert_close(EveryLevel(extractor)(features, rois), extractor(features, rois))


def test_a_file_that_differs_is_not_kept(model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'to_deploy', lambda model: model.backbone.norm1.weight.data.mul_(2))
    with pytest.raises(SystemExit, match=r'was not written: for input \[1, 3, 64, 64\] .* differs'):
        run(model_of(DETECTION_MODEL), tmp_path / 'b.torchscript', '--what', 'backbone')
    assert not list(tmp_path.iterdir())


REFUSALS = {
    'suffix': ('b.pth', [], 'must end with .onnx, .pt2, .torchscript, got'),
    'opset': ('b.onnx', ['--opset', 16], '--opset must be from 17 to 20, got 16'),
    'opset of dynamo': (
        'b.onnx', ['--dynamo', '--opset', 17], '--opset must be from 18 to 20, got 17',
    ),
    'option': ('b.pt2', ['--dynamo'], '--dynamo and --opset are for .onnx only'),
    'size': ('b.onnx', ['--shape', '64'], 'must be HEIGHTxWIDTH, such as 224x288'),
    'batch': ('b.onnx', ['--check-batches', 0], '--check-batches: must be at least 1'),
    'batch of a detector': ('b.onnx', ['--check-batches', 1], 'leave out --check-sizes and'),
    'folder': ('none/b.onnx', [], 'none does not exist'),
    'what': ('b.onnx', ['--what', 'labels'],
             '--what must be one of backbone, model for mmdet, got labels'),
    'small': ('b.torchscript', ['--what', 'backbone', '--check-sizes', '16x16'],
              '--check-sizes 16x16: input must be at least 32x32 pixels'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, model_of, tmp_path, capsys):
    name, options, message = REFUSALS[case]
    with pytest.raises(SystemExit) as stop:
        run(model_of(DETECTION_MODEL), tmp_path / name, *options)
    assert message in f'{stop.value}{capsys.readouterr().err}'
    assert not list(tmp_path.iterdir())


@with_dynamic_sizes
def test_whole_detector_as_a_program_is_refused(model_of, tmp_path):
    with pytest.raises(SystemExit, match='cannot export a whole detector'):
        run(model_of(DETECTION_MODEL), tmp_path / 'b.pt2', '--shape', '64x64')


def test_one_stage_detectors_are_refused(model_of, monkeypatch):
    monkeypatch.setattr(export, 'load_whole_model', lambda *_: nn.Identity())
    config = Config.fromfile(model_of(DETECTION_MODEL).config)
    with pytest.raises(SystemExit, match='needs a two-stage detector, got MaskRCNN'):
        export.build_network(config, 'none.pth', 'model')


@pytest.mark.parametrize('arguments', [['network.pt2'], ['network.onnx', '--dynamo']])
def test_old_torch_is_refused(arguments, model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    name, *options = arguments
    with pytest.raises(SystemExit, match=r'need torch 2\.6 or later, found 2\.5\.1'):
        run(model_of(DETECTION_MODEL), tmp_path / name, '--what', 'backbone', *options)


@pytest.mark.parametrize('what', ['model', 'backbone'])
def test_refuses_checkpoints_of_other_networks(what, model_of, tmp_path):
    model = model_of(DETECTION_MODEL)
    (tmp_path / 'text.pth').write_text('no checkpoint')
    torch.save(dict(state_dict=nn.Conv2d(3, 8, 3).state_dict()), tmp_path / 'other.pth')
    for name, message in [
        ('other.pth', 'does not fit'),
        ('text.pth', 'cannot be read'),
        ('none.pth', 'none.pth.* does not exist'),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(replace(model, checkpoint=tmp_path / name), tmp_path / 'b.onnx', '--what', what)
    assert not (tmp_path / 'b.onnx').exists()


def test_names_the_missing_package(model_of, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name)
    )
    with pytest.raises(SystemExit, match='ONNX needs onnxruntime: pip install'):
        run(model_of(DETECTION_MODEL), tmp_path / 'b.onnx', '--what', 'backbone')
