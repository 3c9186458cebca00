"""Configs with slips, of other libraries or none at all: one message before data are loaded.

    pytest tests/reliability/test_bad_configs.py --slow -s -k stock    # all stock configs

The check may not refuse what works: it is tried on every config here and on the stock configs of
mmdet, mmseg and mmpretrain.
"""

import random
import re
import sys
from pathlib import Path

import pytest
import torch
from common.config_check import ConfigError, check_config, is_slip, read_config
from helpers import ROOT
from helpers.half_precision import needs_scaler
from helpers.in_process import SEGMENTATION, refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from helpers.tools import assert_drawn_beside
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

AREA = 'Configs'
pytestmark = pytest.mark.usefixtures('in_process')


DETECTRON2 = """
_BASE_: "../Base-RCNN-FPN.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
"""
MMDET2 = """
model = dict(type='FasterRCNN', pretrained='torchvision://resnet50')
data = dict(samples_per_gpu=2, train=dict(type='CocoDataset'))
optimizer = dict(type='SGD', lr=0.02)
runner = dict(type='EpochBasedRunner', max_epochs=12)
"""
BASE = f'_base_ = {str(SEGMENTATION)!r}\n'
FILES = {  # content of a config file, and what is said of it
    'detectron2': ('a.yaml', DETECTRON2, 'file'),
    'detectron2 without its base': (
        'a.yaml',
        DETECTRON2.replace('_BASE_', '_BASE'),
        'it is of detectron2 (MODEL); here a config of mmengine is needed',
    ),
    'mmdet 2.x': ('a.py', MMDET2, 'it is of the older mmdet 2.x, mmseg 0.x or mmcls'),
    'a Python program': ('a.py', "print('hello')\n", 'it has no model'),
    'a tool of this project': ('a.py', (ROOT / 'tools/plot_curves.py').read_text(), ''),
    'an empty file': ('a.py', '', 'it has no model: no config of mmengine? At its top: nothing'),
    'a picture': ('a.py', '\0\1\2', ''),
    'a text file': ('a.txt', 'hello', 'Only py/yml/yaml/json type are supported'),
    'a YAML list': ('a.yaml', '- 1\n- 2\n', ''),
    'broken YAML': ('a.yaml', 'model: [1, 2\nb: {', ''),
    'broken JSON': ('a.json', '{"model": {', ''),
    'a missing base': ('a.py', "_base_ = './none.py'\n", 'none.py: FileNotFoundError: '),
    'a base of a package that is missing': (
        'a.py',
        "_base_ = 'mmyolo::yolov5/yolov5_s.py'\n",
        'mmyolo',
    ),
    'a syntax error': ('a.py', BASE + 'model = dict(\n  a=1,\n  b=\n)\n', 'line 5: SyntaxError'),
    'an error while it is read': ('a.py', BASE + 'a = 1\nb = a / 0\n', 'line 3: ZeroDivisionError'),
    'an unknown name': ('a.py', BASE + 'b = none + 1\n', "line 2: NameError: name 'none'"),
    'a module that is missing': (
        'a.py',
        BASE + "custom_imports = dict(imports=['no_such_module'])\n",
        'ImportError: Failed to import no_such_module',
    ),
    'a host library that is missing': (
        'a.py',
        BASE + "default_scope = 'mmyolo'\n",
        "default_scope is 'mmyolo', but there is no package mmyolo",
    ),
    'an unknown type': (
        'a.py',
        BASE + "model = dict(decode_head=dict(type='UperHead'))\n",
        "model.decode_head.type: no registry of mmseg or mmengine has 'UperHead'; did you mean "
        "'UPerHead'?",
    ),
    'an unknown key of the model': (
        'a.py',
        BASE + 'model = dict(backbone=dict(drop_path=0.1))\n',
        "model.backbone: Conv2Former takes no 'drop_path'; did you mean 'drop_path_rate'?",
    ),
    'an unknown key of a hook': (
        'a.py',
        BASE + "custom_hooks = [dict(type='EarlyStoppingHook', patiense=3)]\n",
        "custom_hooks.0: EarlyStoppingHook takes no 'patiense'; did you mean 'patience'?",
    ),
    'an unknown key of a data pipeline': (
        'a.py',
        BASE + "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', sise=1)]))\n",
        "pipeline.0: Resize takes no 'sise'",
    ),
    'a misspelt part': (
        'a.py',
        BASE + 'default_hook = dict()\n',
        "default_hook is unknown; did you mean 'default_hooks'?",
    ),
    'another type of part': ('a.py', "model = 'FasterRCNN'\n", 'model must be a dict, got str'),
    'no data': ('a.py', BASE + 'train_dataloader = None\n', 'it has no train_dataloader'),
    'a backbone that cannot be': (
        'a.py',
        BASE + "model = dict(backbone=dict(arch='huge'))\n",
        "cannot build mmconv2former.Conv2Former: ValueError: arch must be one of nano",
    ),
    'a part that is missing': (
        'a.py',
        BASE + 'model = dict(decode_head=dict(_delete_=True, type=\'FCNHead\'))\n',
        'cannot build FCNHead: TypeError: ',
    ),
}  # fmt: skip


def run_refused(arguments, message, fault_report, name, tmp_path):
    said = refusal_of(*arguments)
    survived = said.startswith('error: ') and '\n' not in said and message in said
    seen = said.replace(f'{tmp_path}/', '').replace(f'{ROOT}/', '')
    fault_report(AREA, name, 1, int(survived), seen)
    assert survived, said


@pytest.mark.parametrize('fault', FILES)
def test_config_file_is_refused(fault, sample, tmp_path, no_data, fault_report):
    name, content, message = FILES[fault]
    path = tmp_path / name
    path.write_text(content)
    is_whole = 'cannot build' in message
    init = ['--cfg-options', 'model.backbone.init_cfg=None']
    data = ['--data-root', sample / 'ade/ADEChallengeData2016', '--work-dir', tmp_path / 'work']
    arguments = ['train', path, *((*data, *init) if is_whole else ())]
    run_refused(arguments, message, fault_report, fault, tmp_path)


@pytest.mark.parametrize('place', ['none', 'a folder'])
def test_config_that_is_no_file(place, tmp_path, fault_report):
    path = tmp_path if place == 'a folder' else tmp_path / 'none.py'
    message = 'is a folder' if place == 'a folder' else 'does not exist'
    run_refused(['test', path, 'none'], message, fault_report, f'config: {place}', tmp_path)


def test_error_in_a_base_is_said_with_its_name(tmp_path):
    (tmp_path / 'base.py').write_text('model = dict()\na = 1 +\n')
    (tmp_path / 'leaf.py').write_text("_base_ = './base.py'\n")
    with pytest.raises(ConfigError, match=r'^in its _base_ .*/base\.py: line 2: SyntaxError'):
        read_config(str(tmp_path / 'leaf.py'))


OPTIONS = {
    'model.backbone.drop_path=0.1': "Conv2Former takes no 'drop_path'; did you mean 'drop_path_",
    'optim_wraper.optimizer.lr=1': "optim_wraper is unknown; did you mean 'optim_wrapper'?",
    'optim_wrapper.optimizer.lrr=1': "optim_wrapper.optimizer: AdamW takes no 'lrr'; did you mean",
    'optim_wrapper.optimizer.lr=fast': "optim_wrapper.optimizer.lr must be a number, got 'fast'",
    'optim_wrapper.constructor=LayerDecay': "there is no 'LayerDecay'",
    'train_dataloader.batch_size=two': "train_dataloader.batch_size must be a number, got 'two'",
    'train_dataloader.bach_size=2': "bach_size is unknown; did you mean 'batch_size'?",
    'train_dataloader.prefetch=2': "takes no 'prefetch'; did you mean 'prefetch_factor'?",
    'train_cfg.max_iter=10': "IterBasedTrainLoop takes no 'max_iter'; did you mean 'max_iters'?",
    'param_scheduler.7.begin=1': 'param_scheduler is a list of 2 items, counted from 0; got 7',
    'param_scheduler.first.begin=1': 'is a list of 2 items, counted from 0; got first',
    'param_scheduler.0=5': 'of items of lists only keys can be set',
    'model.type.name=1': "model.type is 'EncoderDecoder', which has no name",
    'model..backbone=1': 'a name between the dots is empty',
    'model.decode_head.loss_decode.weight=1': "CrossEntropyLoss takes no 'weight'",
    'model.test_cfg.strde=(1,1)': "strde is unknown; did you mean 'stride'?",
    'default_hooks.chekpoint.interval=1': "did you mean 'checkpoint'?",
    'randomness.seeed=1': "seeed is unknown; did you mean 'seed'?",
    'env_cfg.cudnn_benchmar=True': "did you mean 'cudnn_benchmark'?",
    'load_form=a.pth': "load_form is unknown; did you mean",
    'max_iter=10': "max_iter is unknown; did you mean 'max_iters'?",
    'model.backbone.arch': "--cfg-options takes KEY=VALUE with closed brackets, got ['model",
    'a=[(1,2]': '--cfg-options takes KEY=VALUE with closed brackets, got',
    'model.backbone=small': 'model.backbone is a dict with a type; set its keys',
    'model.backbone.type=Conv2Fromer': "has 'Conv2Fromer'; did you mean 'Conv2Former'?",
    'val_evaluator.type=IoUMetrics': "has 'IoUMetrics'; did you mean 'IoUMetric'?",
}  # fmt: skip


@pytest.mark.parametrize('option', OPTIONS)
def test_option_is_refused(option, tmp_path, no_data, fault_report):
    arguments = ['train', SEGMENTATION, '--cfg-options', option]
    run_refused(arguments, OPTIONS[option], fault_report, f'`--cfg-options {option}`', tmp_path)


ALLOWED = [
    'train_dataloader.dataset.indices=8',
    'train_dataloader.prefetch_factor=4',
    'optim_wrapper.accumulative_counts=2',
    'optim_wrapper.clip_grad.max_norm=1.0',
    'optim_wrapper.type=AmpOptimWrapper',
    'optim_wrapper.loss_scale=dynamic',
    'optim_wrapper.optimizer.fused=True',
    'optim_wrapper.optimizer._delete_=True',
    'default_hooks.early_stopping.type=EarlyStoppingHook',
    'default_hooks.checkpoint.priority=LOW',
    'default_hooks.checkpoint=None',
    'default_hooks.timer=None',
    'custom_hooks=None',
    'my_own_variable=3',
    'compile=True',
    'find_unused_parameters=True',
    'model.backbone.init_cfg.adapt_kernel=True',
    'model.decode_head.norm_cfg.type=BN',
    'model.decode_head.norm_cfg.eps=1e-3',
    'model.test_cfg.mode=whole',
    'randomness.deterministic=True',
    'param_scheduler.0.convert_to_iter_based=True',
    'train_dataloader.num_batch_per_epoch=3',
    'runner_type=Runner',
    'model.backbone.type=mmpretrain.ConvNeXt',
]


@pytest.mark.parametrize('option', ALLOWED)
def test_what_works_is_not_refused(option, no_data):
    """What is refused after the check of the config is that there are no data."""
    said = refusal_of('train', SEGMENTATION, '--data-root', '/nowhere', '--cfg-options', option)
    if 'ConvNeXt' in option:  # of which the other settings of the backbone are unknown
        assert re.search(r'ConvNeXt takes no', said) or said.startswith('error: data are missing')
    else:
        assert said.startswith('error: data are missing'), said


WITHOUT_VISUALIZER = ['visualizer=None']
WITHOUT_BACKENDS = ['visualizer._delete_=True', 'visualizer.type=SegLocalVisualizer']


@needs_scaler
@pytest.mark.parametrize('visualizer', [WITHOUT_VISUALIZER, WITHOUT_BACKENDS], ids=' '.join)
def test_flags_of_training_need_no_settings(visualizer, sample, tmp_path):
    """Where the config leaves a part to mmengine's default."""
    plain = "optim_wrapper = dict(_delete_=True, optimizer=dict(type='AdamW', lr=1e-4))\n"
    config = write_tiny_config(tmp_path / 'tiny.py', more=f'{plain}auto_scale_lr = None\n')
    arguments = ['train', config, '--amp', '--tensorboard']
    options = [*WITHOUT_WORKERS, *visualizer]
    assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
    (events,) = tmp_path.glob('work/*/vis_data/events.out.tfevents.*')
    losses = EventAccumulator(str(events)).Reload().Scalars('loss')
    assert [event.step for event in losses] == [1, 2, 3, 4]
    has_file_of_default = bool([*tmp_path.glob('work/*/vis_data/scalars.json')])
    assert has_file_of_default == (visualizer is WITHOUT_VISUALIZER)
    assert 'AmpOptimWrapper' in (tmp_path / 'work/tiny.py').read_text()
    scaling = with_data(['train', config, '--auto-scale-lr'], sample, tmp_path / 'work')
    assert 'has no auto_scale_lr.base_batch_size' in refusal_of(*scaling)


@pytest.mark.parametrize('hooks', ['default_hooks=None', 'default_hooks.visualization=None'])
@pytest.mark.parametrize('visualizer', [WITHOUT_VISUALIZER, WITHOUT_BACKENDS], ids=' '.join)
def test_drawing_needs_no_settings(visualizer, hooks, sample, tmp_path):
    config = write_tiny_config(tmp_path / 'tiny.py')
    arguments = ['test', config, 'none', '--show-dir', tmp_path / 'drawn']
    options = [*WITHOUT_WORKERS, *visualizer, hooks]
    assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
    (drawing,) = (tmp_path / 'drawn').iterdir()
    images = sample / 'ade/ADEChallengeData2016/images/validation'
    assert_drawn_beside(drawing, images / drawing.name)


def test_other_networks_and_class_types_are_fine(tmp_path):
    """A config without Conv2Former, and one with classes in the place of names."""
    config = Config.fromfile(ROOT / 'configs/comparison/upernet_swin_t.py')
    check_config(config, ['train_dataloader'])
    config.optim_wrapper.optimizer = dict(type=torch.optim.SGD, lr=0.1)
    check_config(config)
    config.optim_wrapper.optimizer.nesterof = True
    with pytest.raises(ConfigError, match="SGD takes no 'nesterof'"):
        check_config(config)


def test_errors_keep_their_trace_on_demand_and_while_training(sample, tmp_path, monkeypatch):
    config = write_tiny_config(tmp_path / 'tiny.py')
    wrong = ['model.decode_head.num_classes=many']
    arguments = with_data(['train', config], sample, tmp_path / 'work', *wrong)
    assert refusal_of(*arguments).startswith('error: ')
    with pytest.raises((ConfigError, TypeError)):
        refusal_of(arguments[0], '--traceback', *arguments[1:])

    def fail(*args, **kwargs):
        raise RuntimeError('a fault in the network')

    monkeypatch.setattr('mmconv2former.models.conv2former.Conv2Former.forward', fail)
    with pytest.raises(RuntimeError, match='a fault in the network'):
        refusal_of(*with_data(['train', config], sample, tmp_path / 'work'))


SLIPS = [
    ('optim_wraper', 'optim_wrapper', True),
    ('optim_wrapperr', 'optim_wrapper', True),
    ('otpim_wrapper', 'optim_wrapper', True),
    ('optim_wrappet', 'optim_wrapper', True),
    ('optim_wrapper', 'optim_wrapper', False),
    ('_data_root', 'data_root', False),
    ('train_dataloader', 'train_data', False),
    ('test_cfg', 'val_cfg', False),
    ('mo', 'm', False),
]


@pytest.mark.parametrize(('written', 'meant', 'expected'), SLIPS)
def test_slips_of_the_keyboard(written, meant, expected):
    assert is_slip(written, meant) is expected


# ------------------------------------------------------------------- nothing that works is refused
LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
BEHIND_THE_DOT = {'model': MODELS, 'val_evaluator': METRICS, 'test_evaluator': METRICS}


def stock_configs(library):
    folder = Path(sys.modules[library].__file__).parent / '.mim/configs'
    return sorted(p for p in folder.resolve().rglob('*.py') if '_base_' not in p.parts)


def is_really_broken(config, refusal):
    """Whether the part that was refused fails to build."""
    part = refusal.partition('.')[0].partition(':')[0]
    scope = config.get('default_scope')
    if scope is None or 'model' not in config:
        return True
    init_default_scope(scope)
    settings = config[part]
    try:
        if part.endswith('_dataloader'):
            return DATASETS.get(settings.dataset.type) is None
        if part == 'model':
            settings = Config(dict(model=settings)).model
            with torch.device('meta'):
                MODELS.build(settings)
        else:
            METRICS.build(settings)
    except Exception:  # of whatever library
        return True
    return False


def count_of_refusals(paths):
    """Numbers of configs that were read and let through, and refusals of those that build."""
    passed, right, wrong, unread = 0, {}, {}, 0
    for path in paths:
        try:
            config = Config.fromfile(path)
        except Exception:  # stock configs that mmengine cannot read either
            unread += 1
            continue
        try:
            check_config(config)
            passed += 1
        except ConfigError as error:
            of_kind = right if is_really_broken(config, str(error)) else wrong
            of_kind[path.name] = str(error)
    return passed, right, wrong, unread


def test_every_config_here_passes(slow):
    paths = [p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts]
    assert len(paths) > 40
    paths = paths if slow else paths[::4]  # mmengine takes most of a second to read one
    passed, right, wrong, _ = count_of_refusals(paths)
    assert not right
    assert not wrong
    assert passed == len(paths)


def report_stock(library, paths):
    passed, right, wrong, unread = count_of_refusals(paths)
    print(
        f'\n{library}: {len(paths)} configs, {passed} pass, {len(right)} refused that do not '
        f'build, {len(wrong)} refused that do, {unread} that mmengine cannot read'
    )
    for name, reason in sorted(right.items()):
        print(f'  {name}: {reason[:150]}')
    return passed, wrong


@pytest.mark.parametrize('library', LIBRARIES)
def test_sample_of_stock_configs(library):
    pytest.importorskip(library)
    paths = random.Random(0).sample(stock_configs(library), 20)
    _, wrong = report_stock(library, paths)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize('library', LIBRARIES)
def test_all_stock_configs(library, fault_report):
    pytest.importorskip(library)
    paths = stock_configs(library)
    passed, wrong = report_stock(library, paths)
    seen = 'none that builds is refused' if not wrong else str(wrong)
    fault_report(AREA, f'stock configs of {library}', len(paths), len(paths) - len(wrong), seen)
    assert not wrong
    assert passed > 400
