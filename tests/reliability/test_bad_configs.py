"""Configs with typing errors, of other libraries, or none at all: one line says what is wrong.

It does so before the training data are read, and no config that works is refused.
"""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from common.cli import key_value, run_errors
from common.config_check import (
    KNOWN_AT_TOP,
    ConfigError,
    check_config,
    is_slip,
    merge_options,
    read_config,
    refuse_typo,
)
from helpers import ROOT
from helpers.half_precision import needs_scaler
from helpers.in_process import SEGMENTATION, load_tool, refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from helpers.tools import assert_drawn_beside
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from mmseg.datasets import ADE20KDataset
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
FILES = {  # a file that is refused as it is read, and the message
    'detectron2': (
        'a.yaml', DETECTRON2,
        'it is a detectron2 config (MODEL); a config of mmengine is needed',
    ),
    'mmdet 2.x': ('a.py', MMDET2, 'it was written for mmdet 2.x, mmseg 0.x or mmcls'),
    'a Python program': ('a.py', "print('hello')\n", 'it has no dict `model`'),
    'a tool of this project': (
        'a.py', (ROOT / 'tools/plot_curves.py').read_text(), '/a.py: line '
    ),
    'an empty file': ('a.py', '', 'it has no dict `model`, so it is not a config of mmengine'),
    'an image': ('a.py', '\0\1\2', 'null bytes'),
    'a text file': ('a.txt', 'hello', 'Only py/yml/yaml/json type are supported'),
    'a YAML list': ('a.yaml', '- 1\n- 2\n', 'AttributeError: '),
    'broken YAML': ('a.yaml', 'model: [1, 2\nb: {', 'ParserError: '),
    'broken JSON': ('a.json', '{"model": {', 'JSONDecodeError: '),
    'a missing base': ('a.py', "_base_ = './none.py'\n", 'none.py: FileNotFoundError: '),
    'a base of a missing package': ('a.py', "_base_ = 'mmyolo::yolov5/yolov5_s.py'\n", 'mmyolo'),
    'a syntax error': ('a.py', BASE + 'model = dict(\n  a=1,\n  b=\n)\n', 'line 5: SyntaxError'),
    'an error while it is read': ('a.py', BASE + 'a = 1\nb = a / 0\n', 'line 3: ZeroDivisionError'),
    'an unknown name': ('a.py', BASE + 'b = none + 1\n', "line 2: NameError: name 'none'"),
    'a missing module': (
        'a.py', BASE + "custom_imports = dict(imports=['no_such_module'])\n",
        'ImportError: Failed to import no_such_module',
    ),
    'a missing host library': (
        'a.py', BASE + "default_scope = 'mmyolo'\n",
        "default_scope is 'mmyolo', but mmyolo is not installed",
    ),
    'a misspelt part': (
        'a.py', BASE + 'default_hook = dict()\n',
        "default_hook is unknown; did you mean 'default_hooks'?",
    ),
    'a part of another type': ('a.py', "model = 'FasterRCNN'\n", 'it has no dict `model`'),
    'no data': ('a.py', BASE + 'train_dataloader = None\n', 'it has no train_dataloader'),
}  # fmt: skip
SETTINGS = {  # lines of a config that are refused as their part is built, and the message
    'an unknown key of a hook': (
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='mIoU', patiense=3)]\n",
        "unexpected keyword argument 'patiense'; did you mean 'patience'?",
    ),
    'an unknown key of a data pipeline': (
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', sise=1)]))\n",
        "unexpected keyword argument 'sise'; it takes backend, ",
    ),
    'an unknown transform': (
        "val_dataloader = dict(dataset=dict(pipeline=[dict(type='Resise', scale=1)]))\n",
        "transform registry. Please check whether",
    ),
    'an unknown key of a dataset': (
        "train_dataloader = dict(dataset=dict(ann_fil='a'))\n",
        "unexpected keyword argument 'ann_fil'; did you mean 'ann_file'?",
    ),
    'a hook without a type': (
        'default_hooks = dict(chekpoint=dict(interval=1))\n',
        "cannot build {'interval': 1}: KeyError: '`cfg` or `default_args` must contain",
    ),
    'an unknown key of the visualizer': (
        'visualizer = dict(alphx=0.5)\n',
        "unexpected keyword argument 'alphx'; did you mean 'alpha'?",
    ),
    'an unknown setting of randomness': ('randomness = dict(seeed=1)\n', "argument 'seeed'"),
    'an unknown size of the backbone': (
        "model = dict(backbone=dict(arch='huge'))\n",
        'cannot build mmconv2former.Conv2Former: ValueError: arch must be one of nano',
    ),
    'a training without iterations': (
        'train_cfg = dict(max_iters=0)\n', 'train_cfg.max_iters is 0: nothing would be trained',
    ),
    'epochs of an infinite sampler': (
        "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2)\n",
        'train_cfg counts epochs, but train_dataloader.sampler InfiniteSampler has no end',
    ),
    'a missing argument': (
        "model = dict(decode_head=dict(_delete_=True, type='FCNHead'))\n",
        'cannot build FCNHead: TypeError: ',
    ),
}  # fmt: skip
OPTIONS = {  # of the command line
    'optim_wraper.optimizer.lr=1': "optim_wraper is unknown; did you mean 'optim_wrapper'?",
    'train_dataloader.bach_size=2': "bach_size is unknown; did you mean 'batch_size'?",
    'max_iter=10': 'max_iter is unknown, and max_iters has no effect once the config file is read; '
                   'set train_cfg.max_iters',
    'max_iters=4': 'set train_cfg.max_iters',
    'num_classes=7': 'set model.decode_head.num_classes, model.auxiliary_head.num_classes',
    'data_root=/data': 'use --data-root DIR',
    'train_pipeline.0.type=A': 'set train_dataloader.dataset.pipeline',
    'data_preprocessor.std=1': 'set model.data_preprocessor',
    'param_scheduler.7.begin=1': 'Index 7 exceeds the length of list',
    'custom_hooks.0.type=EMAHook': 'the config has no list custom_hooks: set the whole list',
    'param_scheduler.first.begin=1': '--cfg-options param_scheduler.first.begin: ',
    'param_scheduler.0=5': '--cfg-options param_scheduler.0: ',
    'model.backbone.arch': "takes KEY=VALUE with closed brackets, got 'model.backbone.arch'",
    'a=[(1,2]': "--cfg-options takes KEY=VALUE with closed brackets, got 'a=[(1,2]'",
    'a=[dict(type=EMAHook]': 'takes KEY=VALUE with closed brackets',
    'a=[dict(EMAHook)]': 'takes KEY=VALUE with closed brackets',
    'model.backbone=small': 'model.backbone is a dict with a type; set its keys',
    # The constructors refuse these.
    'model..decode_head=1': "unexpected keyword argument ''",
    'model.backbone.drop_path=0.1': "did you mean 'drop_path_rate'?",
    'model.backbone.type=Conv2Fromer': "did you mean 'Conv2Former'?",
    'model.decode_head.loss_decode.weight=1': "'weight'; did you mean 'loss_weight'?",
    'optim_wrapper.optimizer.lrr=1': "argument 'lrr'; did you mean 'lr'?",
    'optim_wrapper.optimizer.lr=fast': 'cannot build OptimWrapper: TypeError: ',
    'optim_wrapper.constructor=LayerDecay': 'LayerDecay is not in the mmseg::optimizer wrapper',
    'train_dataloader.batch_size=two': 'train_dataloader: ValueError: batch_size should be a pos',
    'train_dataloader.prefetch=2': "argument 'prefetch'; did you mean 'prefetch_factor'?",
    'train_cfg.max_iter=10': "argument 'max_iter'; did you mean 'max_iters'?",
    'val_evaluator.type=IoUMetrics': "did you mean 'IoUMetric'?",
    'param_scheduler.1.by_epoch=True': 'but param_scheduler.1 (PolyLR) counts epochs',
    'default_hooks.checkpoint.by_epoch=True': 'set default_hooks.checkpoint.by_epoch=False',
}  # fmt: skip


@pytest.fixture
def no_training_data(monkeypatch):
    """Fails a test whose tool reads training data before the refusal."""

    load = ADE20KDataset.load_data_list

    def load_data_list(self):
        if 'training' in self.data_prefix['img_path']:
            pytest.fail('training data were read before the refusal')
        return load(self)

    monkeypatch.setattr(ADE20KDataset, 'load_data_list', load_data_list)


def assert_refused(arguments, message, fault_report, fault, tmp_path):
    said = refusal_of(*arguments)
    survived = said.startswith('error: ') and '\n' not in said and message in said
    seen = said.replace(f'{tmp_path}/', '').replace(f'{ROOT}/', '')
    fault_report(AREA, fault, 1, int(survived), seen)
    assert survived, said


@pytest.mark.parametrize('fault', FILES)
def test_file_is_refused(fault, tmp_path, fault_report):
    name, content, message = FILES[fault]
    (tmp_path / name).write_text(content)
    assert_refused(['train', tmp_path / name], message, fault_report, fault, tmp_path)


@pytest.mark.parametrize(('name', 'message'), [('none.py', 'does not exist'), ('', 'is a folder')])
def test_no_file(name, message, tmp_path, fault_report):
    fault = f'config: {name or "a folder"}'
    assert_refused(['test', tmp_path / name, 'none'], message, fault_report, fault, tmp_path)


def test_error_in_a_base_names_the_base(tmp_path):
    (tmp_path / 'base.py').write_text('model = dict()\na = 1 +\n')
    (tmp_path / 'leaf.py').write_text("_base_ = './base.py'\n")
    with pytest.raises(ConfigError, match=r'^in its _base_ .*/base\.py: line 2: SyntaxError'):
        read_config(str(tmp_path / 'leaf.py'))


@pytest.mark.parametrize('fault', SETTINGS)
def test_setting_is_refused(fault, sample, tmp_path, no_training_data, fault_report):
    lines, message = SETTINGS[fault]
    write_tiny_config(tmp_path / 'tiny.py')
    (tmp_path / 'a.py').write_text(f"_base_ = './tiny.py'\n{lines}")
    data = ['--data-root', sample / 'ade/ADEChallengeData2016', '--work-dir', tmp_path / 'work']
    assert_refused(['train', tmp_path / 'a.py', *data], message, fault_report, fault, tmp_path)


@pytest.mark.parametrize('option', OPTIONS)
def test_option_is_refused(option, sample, tmp_path, no_training_data, fault_report):
    config = write_tiny_config(tmp_path / 'a.py')
    arguments = with_data(['train', config], sample, tmp_path / 'work', option)
    fault = f'`--cfg-options {option}`'
    assert_refused(arguments, OPTIONS[option], fault_report, fault, tmp_path)


def test_backend_without_its_package_is_refused(sample, tmp_path, monkeypatch, no_training_data):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    option = 'visualizer.vis_backends=[dict(type=WandbVisBackend)]'
    config = write_tiny_config(tmp_path / 'a.py')
    said = refusal_of(*with_data(['train', config], sample, tmp_path / 'work', option))
    assert re.fullmatch('error: .*: ImportError: Please run "pip install wandb" .*', said)


def test_schedule_is_refused_before_the_first_iteration(sample, tmp_path):
    """It needs the length of the training data."""
    option = 'param_scheduler.1.powr=0.9'
    config = write_tiny_config(tmp_path / 'a.py')
    said = refusal_of(*with_data(['train', config], sample, tmp_path / 'work', option))
    assert re.fullmatch("error: cannot build PolyLR: .* 'powr'; did you mean 'power'.*", said)


ALLOWED = [
    'compile=True',
    'custom_hooks=None',
    'default_hooks.checkpoint=None',
    'default_hooks.checkpoint.priority=LOW',
    'default_hooks.early_stopping.type=EarlyStoppingHook',
    'find_unused_parameters=True',
    'model.backbone.init_cfg.adapt_kernel=True',
    'model.test_cfg.mode=whole',
    'my_own_variable=3',
    'optim_wrapper.loss_scale=dynamic',
    'optim_wrapper.optimizer._delete_=True',
    'param_scheduler.0.convert_to_iter_based=True',
    'randomness.deterministic=True',
    'runner_type=Runner',
    'train_dataloader.prefetch_factor=4',
]


@pytest.mark.parametrize(
    ('written', 'value'),
    [
        ("[dict(type='EMAHook',momentum=0.1)]", [dict(type='EMAHook', momentum=0.1)]),
        ('dict(type=mmconv2former.Conv2Former, a=None)',
         dict(type='mmconv2former.Conv2Former', a=None)),
        ("{'a': [1, (2, -3.5)]}", {'a': [1, (2, -3.5)]}),
        ('[(1,2),a]', [(1, 2), 'a']),
    ],
)  # fmt: skip
def test_values_of_options(written, value):
    assert key_value(f'key={written}') == ('key', value)


def test_options_that_work_are_allowed():
    config = read_config(str(SEGMENTATION))
    for option in ALLOWED:
        changed = copy.deepcopy(config)
        merge_options(changed, dict([key_value(option)]))
        check_config(changed, ['train_dataloader'])


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain', 'mmconv2former'])
def test_no_name_in_a_stock_config_looks_misspelt(library, fault_report):
    """Save for one of mmseg, which really is misspelt, so that its settings are ignored."""
    module = Path(sys.modules[library].__file__).parent
    folder = ROOT / 'configs' if library == 'mmconv2former' else module / '.mim/configs'
    paths = list(folder.resolve().rglob('*.py'))
    refused = {}
    for path in paths:
        names = set(re.findall(r'^(\w+) *=', path.read_text(), re.MULTILINE))
        for name in names - KNOWN_AT_TOP:
            try:
                refuse_typo(name, name, KNOWN_AT_TOP)
            except ConfigError as error:
                refused[path.name] = str(error)
    assert len(paths) > 40
    misspelt = {
        'bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py': 'models is unknown; did you mean '
        "'model'?"
    }
    right = refused == (misspelt if library == 'mmseg' else {})
    seen = '; '.join(f'{name}: {reason}' for name, reason in refused.items())
    fault_report(AREA, f'stock configs of {library}', len(paths), len(paths) * right,
                 seen or 'none is refused')  # fmt: skip
    assert right, refused


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


def test_types_may_be_classes():
    settings = dict(type=torch.optim.SGD, params=[torch.zeros(1)], lr=0.1, nesterof=True)
    message = "error: cannot build SGD: .* 'nesterof'; did you mean 'nesterov'?"
    with pytest.raises(SystemExit, match=message), run_errors(traceback=False):
        OPTIMIZERS.build(settings)


def test_traceback_on_demand_and_while_training(sample, tmp_path, monkeypatch):
    config = write_tiny_config(tmp_path / 'tiny.py')
    arguments = with_data(['train', config], sample, tmp_path / 'work', *WITHOUT_WORKERS)
    wrong = 'model.decode_head.num_classes=many'
    assert refusal_of(*arguments, wrong).startswith('error: ')
    with pytest.raises(TypeError):
        refusal_of(arguments[0], '--traceback', *arguments[1:], wrong)

    def fail(*args, **kwargs):
        raise RuntimeError('an error in the network')

    monkeypatch.setattr('mmconv2former.models.conv2former.Conv2Former.forward', fail)
    with pytest.raises(RuntimeError, match='an error in the network'):
        refusal_of(*arguments[:2], '--no-dry-run', *arguments[2:])
    said = refusal_of(*arguments)
    assert said.startswith('error: dry run, validation of ')
    assert '.jpg: RuntimeError: an error in the network. ' in said
    assert said.endswith('(--traceback shows where)')


# ------------------------------------------------------- options where a config leaves parts out
WITHOUT_VISUALIZER = ['visualizer=None']
WITHOUT_BACKENDS = ['visualizer._delete_=True', 'visualizer.type=SegLocalVisualizer']


@needs_scaler
@pytest.mark.parametrize('visualizer', [WITHOUT_VISUALIZER, WITHOUT_BACKENDS], ids=' '.join)
def test_flags_of_training_need_no_settings(visualizer, sample, tmp_path):
    plain = "optim_wrapper = dict(_delete_=True, optimizer=dict(type='AdamW', lr=1e-4))\n"
    config = write_tiny_config(tmp_path / 'tiny.py', more=f'{plain}auto_scale_lr = None\n')
    arguments = ['train', config, '--amp', '--tensorboard']
    options = [*WITHOUT_WORKERS, 'train_cfg.max_iters=1', *visualizer]
    assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
    (events,) = tmp_path.glob('work/*/vis_data/events.out.tfevents.*')
    losses = EventAccumulator(str(events)).Reload().Scalars('loss')
    assert [event.step for event in losses] == [1]
    has_file_of_default = bool([*tmp_path.glob('work/*/vis_data/scalars.json')])
    assert has_file_of_default == (visualizer is WITHOUT_VISUALIZER)
    assert 'AmpOptimWrapper' in (tmp_path / 'work/tiny.py').read_text()
    scaling = with_data(['train', config, '--auto-scale-lr'], sample, tmp_path / 'work')
    assert 'has no auto_scale_lr.base_batch_size' in refusal_of(*scaling)


LOCAL, TENSORBOARD = (dict(type=f'{name}VisBackend') for name in ('Local', 'Tensorboard'))


@pytest.mark.parametrize(
    ('backends', 'expected'),
    [
        (LOCAL, [LOCAL, TENSORBOARD]),
        (TENSORBOARD, [TENSORBOARD]),
        ([LOCAL, TENSORBOARD], [LOCAL, TENSORBOARD]),
    ],
)
def test_one_backend_for_tensorboard(backends, expected):
    """As in the config that an earlier run with --tensorboard saved."""
    config = Config(dict(visualizer=dict(type='Visualizer', vis_backends=backends)))
    load_tool('train').add_tensorboard(config)
    assert config.visualizer.vis_backends == expected


@pytest.mark.parametrize(
    ('visualizer', 'hooks'),
    [
        (WITHOUT_VISUALIZER, 'default_hooks.visualization=None'),
        (WITHOUT_BACKENDS, 'default_hooks=None'),
    ],
)
def test_drawing_needs_no_settings(visualizer, hooks, sample, tmp_path):
    config = write_tiny_config(tmp_path / 'tiny.py')
    arguments = ['test', config, 'none', '--show-dir', tmp_path / 'drawn']
    options = [*WITHOUT_WORKERS, *visualizer, hooks]
    assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
    (drawing,) = (tmp_path / 'drawn').iterdir()
    images = sample / 'ade/ADEChallengeData2016/images/validation'
    assert_drawn_beside(drawing, images / drawing.name)
