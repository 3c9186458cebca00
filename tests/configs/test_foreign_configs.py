"""Conv2Former in other people's configs: those of docs/use_in_your_config.md, as users run them.

The page is the input. Its configs are written to an empty folder beside a checkpoint and use
nothing else of this repository. Only images, backbone depth and numbers of queries are reduced.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.pages import files_of, read_blocks, write_files
from helpers.tools import run_tool
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmconv2former import Conv2Former, Conv2FormerClsHead

PAGE = ROOT / 'docs/use_in_your_config.md'
SHARED = 'conv2former_t.py'  # which the others inherit
NAMES = [name for name in files_of(PAGE) if name != SHARED]
SIZE = 64
ARCH = dict(channels=(72, 144, 288, 576), depths=(1, 1, 6, 1))  # tiny, but shallow
QUERIES = 50  # of DETR heads: fewer than the positions of an image
PROMISED = {
    'faster_rcnn.py', 'retinanet.py', 'atss.py', 'rtmdet.py', 'yolox.py', 'deformable_detr.py',
    'dino.py', 'mask2former_instances.py', 'segformer.py', 'semantic_fpn.py', 'upernet.py',
    'mask2former_semantic.py', 'deeplabv3plus.py', 'linear_classifier.py',
    'published_classifier.py', 'simsiam.py', 'mocov2.py',
}  # fmt: skip


def test_page_has_every_promised_config():
    assert set(NAMES) == PROMISED


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A user's folder: the page's configs, results of its commands, and a checkpoint."""
    folder = tmp_path_factory.mktemp('user')
    write_files(PAGE, folder)
    python = os.path.dirname(sys.executable)
    environment = os.environ | {'PATH': f'{python}{os.pathsep}{os.environ["PATH"]}'}
    for block in read_blocks(PAGE):
        for command in block.commands() if block.language == 'bash' else ():
            subprocess.run(command, shell=True, cwd=folder, env=environment, check=True)
    # Layer scales of a trained network; at the initial 1e-6 gradients almost vanish.
    backbone = Conv2Former(ARCH, out_norm=False, layer_scale_init_value=0.1)
    head = Conv2FormerClsHead(576)
    (folder / 'pretrain').mkdir()
    torch.save(backbone.state_dict() | head.state_dict(), folder / 'pretrain/conv2former_t.pth')
    return folder


@pytest.fixture
def config(request, folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = Config.fromfile(request.param)
    init_default_scope(config.default_scope)
    config.model.backbone.update(arch=ARCH, drop_path_rate=0.0)
    if 'num_queries' in config.model:
        config.model.num_queries = QUERIES
    preprocessor = config.model.setdefault(  # as mmengine's runner does it
        'data_preprocessor', config.get('data_preprocessor', ConfigDict())
    )
    if preprocessor.get('batch_augments'):
        preprocessor.batch_augments = None  # they would resize images to the recipe's size
    if preprocessor.get('size'):
        preprocessor.size = (SIZE, SIZE)
    torch.manual_seed(0)
    return config


def detection_batch(config):
    with_mask = 'panoptic_head' in config.model
    return demo_mm_inputs(2, (3, SIZE, SIZE), num_items=[4, 3], num_classes=80, with_mask=with_mask)


def segmentation_batch(config):
    samples = []
    for _ in range(2):
        regions = torch.randint(config.model.decode_head.num_classes, (1, 4, 4))
        labels = regions.repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE)))
        samples.append(sample)
    return dict(inputs=list(images()), data_samples=samples)


def classification_batch(config):
    if config.model.type != 'ImageClassifier':  # two views of each image
        return dict(inputs=[images(), images()], data_samples=[DataSample(), DataSample()])
    samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    return dict(inputs=images(), data_samples=samples)


def images():
    return torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)


def check_normalisation(preprocessor, batch):
    """ImageNet's mean colour, as BGR from a file, must reach the network as zeros."""
    for image in batch['inputs']:
        image.copy_(torch.tensor([104, 116, 124]).view(3, 1, 1))
    inputs = preprocessor(batch, training=False)['inputs']
    for normalised in inputs:
        assert normalised.abs().max() < 0.02


def check_detection(model, batch):
    for sample in model.test_step(batch):
        instances = sample.pred_instances
        assert torch.isfinite(instances.bboxes).all()
        assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
        assert (instances.labels < 80).all()


def check_segmentation(model, batch):
    for sample in model.test_step(batch):
        assert sample.pred_sem_seg.data.shape == (1, SIZE, SIZE)
        assert torch.isfinite(sample.seg_logits.data).all()


def check_classification(model, batch):
    if model.__class__.__name__ != 'ImageClassifier':  # self-supervised
        (features,) = model.extract_feat(batch['inputs'][0].float())
        assert features.shape == (2, 576, SIZE // 32, SIZE // 32)
        assert torch.isfinite(features).all()
        check_that_checkpoint_is_pretrained_weights(model)
        return
    for sample in model.test_step(batch):
        assert sample.pred_score.shape == (1000,)
        assert sample.pred_score.sum() == pytest.approx(1, abs=1e-5)


def check_that_checkpoint_is_pretrained_weights(model):
    torch.save(dict(state_dict=model.state_dict()), 'trained.pth')
    init_cfg = dict(type='Pretrained', checkpoint='trained.pth')
    backbone = Conv2Former(ARCH, out_indices=3, init_cfg=init_cfg)
    backbone.init_weights()
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(backbone.state_dict()[name], value, rtol=0, atol=0)


HOSTS = {
    'mmdet': (detection_batch, check_detection),
    'mmseg': (segmentation_batch, check_segmentation),
    'mmpretrain': (classification_batch, check_classification),
}


@pytest.mark.parametrize('config', NAMES, indirect=True)
def test_config_trains_and_predicts(config):
    make_batch, check_prediction = HOSTS[config.default_scope]
    model = MODELS.build(config.model)
    model.init_weights()
    backbone = model.backbone
    assert type(backbone) is Conv2Former
    assert '_scope_' not in config.train_dataloader.get('collate_fn', {})  # would be an argument
    if backbone.init_cfg:
        published = torch.load('pretrain/conv2former_t.pth')
        for name, value in backbone.state_dict().items():
            if not name.startswith('norm'):
                torch.testing.assert_close(value, published[name], rtol=0, atol=0)

    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    rates = {id(p): group['lr'] for group in optim_wrapper.param_groups for p in group['params']}
    trained = [rates[id(p)] for p in backbone.stages.parameters() if p.requires_grad]
    if 'constructor' in config.optim_wrapper:  # layer-wise decay
        assert len(set(trained)) >= 4
        assert trained == sorted(trained)
        assert trained[-1] < config.optim_wrapper.optimizer.lr
    check_normalisation(model.data_preprocessor, make_batch(config))
    model.train()
    batch = model.data_preprocessor(make_batch(config), training=True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    assert torch.isfinite(loss)
    optim_wrapper.backward(loss)
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
    before = {name: value.detach().clone() for name, value in backbone.named_parameters()}
    optim_wrapper.step()
    for name, value in backbone.named_parameters():
        # For weights of a norm, a clipped step may round to nothing.
        if value.dim() > 1 or not value.requires_grad:
            assert torch.equal(value, before[name]) != value.requires_grad, name

    model.eval()
    with torch.no_grad():
        check_prediction(model, make_batch(config))


@pytest.mark.parametrize(('name', 'host'), [('retinanet.py', 'mmdet'), ('segformer.py', 'mmseg')])
def test_the_hosts_decay_does_not_know_the_backbone(name, host, folder, monkeypatch):
    """The reason for our constructor on the page."""
    monkeypatch.chdir(folder)
    config = Config.fromfile(name)
    init_default_scope(host)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    options = dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12)
    theirs = dict(constructor=f'{host}.LearningRateDecayOptimizerConstructor')
    with pytest.raises(NotImplementedError):
        build_optim_wrapper(model, config.optim_wrapper | theirs | dict(paramwise_cfg=options))


DATA = {  # where the hosts' recipes look for data, and where it is in the embedded sample
    'mmdet': ('data/coco', 'coco'),
    'mmseg': ('data/ade', 'ade'),
    'mmpretrain': ('data/imagenet', 'objects'),
}


class StopAfterOneIteration(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = True


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_trains_in_a_user_s_run(name, folder, sample, monkeypatch):
    """One iteration with the recipe's own data pipeline, image sizes, hooks and schedule."""
    monkeypatch.chdir(folder)
    config = Config.fromfile(name)
    config.model.backbone.arch = ARCH
    link, source = (folder / DATA[config.default_scope][0], sample / DATA[config.default_scope][1])
    if source.name == 'objects' and not source.exists():
        run_tool('crop_objects', sample / 'coco', source, '--classes', 2, '--max-objects', 4,
                  '--min-side', 12)  # fmt: skip
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(source)
    config.work_dir = f'work_dirs/{name}'
    config.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    dataset = config.train_dataloader.dataset
    while 'dataset' in dataset:  # within one that mixes images
        dataset = dataset.dataset
    dataset.indices = 2
    for part in ('cfg', 'dataloader', 'evaluator'):
        config[f'val_{part}'] = config[f'test_{part}'] = None
    runner = Runner.from_cfg(config)
    runner.register_hook(StopAfterOneIteration())
    runner.train()
    assert runner.iter == 1
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())


def test_foreign_arguments_are_refused_with_advice(folder, monkeypatch):
    """For who forgets `_delete_`, asks for dilation, or leaves `pretrained`."""
    monkeypatch.chdir(folder)
    config = Config.fromfile('deeplabv3plus.py')
    init_default_scope(config.default_scope)
    config.model.backbone.update(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))
    with pytest.raises(TypeError, match=r'no argument dilations, strides\. .*DeepLabV3\+'):
        MODELS.build(config.model)
    for key in ('dilations', 'strides'):
        config.model.backbone.pop(key)
    config.model.pretrained = 'open-mmlab://resnet50_v1c'
    with pytest.raises(TypeError, match=r'no argument pretrained\. .* must be None'):
        MODELS.build(config.model)
    with pytest.raises(TypeError, match=r'has no argument depth, style\. .*write _delete_=True'):
        MODELS.build(dict(type='mmconv2former.Conv2Former', depth=50, style='pytorch'))
    with pytest.raises(TypeError, match='Conv2FormerIsotropic has no argument depth'):
        MODELS.build(dict(type='mmconv2former.Conv2FormerIsotropic', depth=50))
