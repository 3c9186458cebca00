"""The tools, run as a user runs them, and what they refuse."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from common.cli import set_data_root
from demo import CONFIG, DATA_AND_SCHEDULE, MODEL
from helpers import ROOT
from helpers.tiny import SEGMENTATION_RECIPE as SEGMENTATION
from helpers.tiny import quick_segmentation
from helpers.tools import assert_drawn_beside, run_tool
from helpers.training_server import free_port
from mmengine.config import Config
from plot_curves import read_scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Eight pictures in batches of two: four iterations an epoch, of a small model on small pictures.
QUICK = [
    *MODEL,
    *DATA_AND_SCHEDULE,
    'model.backbone.arch=nano',
    'model.neck.in_channels=[64,128,256,512]',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=8',
    'train_cfg.max_epochs=3',
    'train_cfg.val_interval=3',
    'param_scheduler.1.end=3',
    'param_scheduler.1.milestones=[2]',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.logger.interval=1',
    'randomness.seed=0',
    'model.test_cfg.rcnn.score_thr=0.0',  # else hardly trained weights predict nothing
]


def quick(data_root, work_dir, *options):
    return ['--data-root', data_root, '--work-dir', work_dir, '--cfg-options', *QUICK, *options]


def metrics_of(work_dir):
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


@pytest.fixture(scope='module')
def trained(sample, tmp_path_factory):
    """Work dir of a short run that was killed in its second epoch and then resumed."""
    work_dir = tmp_path_factory.mktemp('trained')
    arguments = quick(sample / 'coco', work_dir)
    command = [sys.executable, 'tools/train.py', CONFIG, *map(str, arguments)]
    with (work_dir / 'killed.log').open('w') as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.time() + 300
        while not (work_dir / 'last_checkpoint').exists() and process.poll() is None:
            assert time.time() < deadline, 'no checkpoint after 300 s'
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (work_dir / 'epoch_1.pth').exists(), (work_dir / 'killed.log').read_text()
    assert not (work_dir / 'epoch_3.pth').exists()
    output = run_tool('train.py', CONFIG, '--resume', *arguments)
    assert 'resumed epoch: ' in output
    return work_dir


def test_resumed_run_is_complete(trained):
    checkpoint = torch.load(trained / 'epoch_3.pth', weights_only=False)
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (3, 12)
    steps = {int(state['step']) for state in checkpoint['optimizer']['state'].values()}
    assert steps == {12}
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict'].values())
    assert (trained / 'last_checkpoint').read_text().endswith('epoch_3.pth')


def test_validation_is_logged_and_the_best_model_kept(trained):
    lines = [
        json.loads(line)
        for path in trained.glob('*/vis_data/scalars.json')
        for line in path.read_text().splitlines()
    ]
    (validation,) = [line for line in lines if 'coco/bbox_mAP' in line]
    assert validation['step'] == 3
    assert 0 <= validation['coco/segm_mAP_50'] <= 1
    assert {'loss_rpn_cls', 'loss_bbox', 'loss_mask'} <= {key for line in lines for key in line}
    assert len(list(trained.glob('best_coco_bbox_mAP_epoch_*.pth'))) == 1


def test_evaluates_draws_and_dumps(trained, sample, tmp_path):
    checkpoint = trained / 'epoch_3.pth'
    out = tmp_path / 'predictions.pkl'
    options = ['--out', out, '--show-dir', 'pictures']
    score = 'default_hooks.visualization.score_thr=0.0'
    run_tool('test.py', CONFIG, checkpoint, *options, *quick(sample / 'coco', tmp_path, score))
    metrics = metrics_of(tmp_path)
    assert {f'coco/{kind}_mAP{at}' for kind in ('bbox', 'segm') for at in ('', '_50')} <= set(
        metrics
    )
    drawings = list(tmp_path.glob('*/pictures/*'))
    assert sorted(path.name for path in drawings) == sorted(os.listdir(sample / 'coco/val2017'))
    for drawing in drawings:
        assert_drawn_beside(drawing, sample / 'coco/val2017' / drawing.name)
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 6
    assert {'bboxes', 'scores', 'labels', 'masks'} <= set(predictions[0]['pred_instances'])


def test_flips_and_scales_in_detection(trained, sample, tmp_path):
    """Boxes and masks of several views; here of scales for small pictures."""
    scales = [
        f'tta_pipeline.1.transforms.0.{i}.scale=({s},{s})' for i, s in enumerate((96, 128, 160))
    ]
    out = tmp_path / 'predictions.pkl'
    options = [*quick(sample / 'coco', tmp_path), *scales]
    run_tool('test.py', CONFIG, trained / 'epoch_3.pth', '--tta', '--out', out, *options)
    assert 0 <= metrics_of(tmp_path)['coco/segm_mAP'] <= 1
    for prediction in pickle.loads(out.read_bytes()):
        instances = prediction['pred_instances']
        assert 0 < len(instances['masks']) == len(instances['bboxes']) <= 100


@pytest.fixture(scope='module')
def trained_segmentor(sample, tmp_path_factory):
    """Work dir of four iterations of UperNet, the last two after a resumption."""
    work_dir = tmp_path_factory.mktemp('segmentor')
    arguments = quick_segmentation(sample, work_dir)
    shorter = [a.replace('max_iters=4', 'max_iters=2') for a in map(str, arguments)]
    run_tool('train.py', SEGMENTATION, '--tensorboard', *shorter)
    assert not (work_dir / 'iter_4.pth').exists()
    output = run_tool('train.py', SEGMENTATION, '--resume', *arguments)
    assert 'resumed epoch: 0, iter: 2' in output
    return work_dir


def test_segmentation_trains_and_resumes(trained_segmentor):
    checkpoint = torch.load(trained_segmentor / 'iter_4.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 4
    assert {int(state['step']) for state in checkpoint['optimizer']['state'].values()} == {4}
    assert len(list(trained_segmentor.glob('best_mIoU_iter_*.pth'))) == 1
    losses, metrics = read_scalars(trained_segmentor, ['mIoU'])
    assert sorted(losses['loss']) == [1, 2, 3, 4]
    assert sorted(metrics['mIoU']) == [2, 4]


def test_tensorboard_is_one_flag_away(trained_segmentor):
    (events,) = trained_segmentor.glob('*/vis_data/events.out.tfevents.*')
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars('loss')] == [1, 2]
    assert accumulator.Scalars('mIoU')[0].value >= 0


def test_backbone_is_compiled_by_a_key(sample, tmp_path):
    options = quick_segmentation(
        sample, tmp_path, 'compile.backend=eager', 'compile.fullgraph=True'
    )
    log = run_tool('train.py', SEGMENTATION, *options)
    assert 'The backbone is compiled' in log
    state = torch.load(tmp_path / 'iter_4.pth', weights_only=False)['state_dict']
    assert not any('_orig_mod' in name for name in state)


def test_segmentation_evaluates_draws_and_augments(trained_segmentor, sample, tmp_path):
    scales = [f'tta_pipeline.1.transforms.0.{i}.scale=({256 * r // 4},{64 * r // 4})'
              for i, r in enumerate((2, 3, 4, 5, 6, 7))]  # fmt: skip
    runs = {'plain': [], 'augmented': ['--tta']}
    pictures = sample / 'ade/ADEChallengeData2016/images/validation'
    labels = {}
    for name, options in runs.items():
        out = tmp_path / f'{name}.pkl'
        arguments = [*quick_segmentation(sample, tmp_path / name), *scales]
        run_tool('test.py', SEGMENTATION, trained_segmentor / 'iter_4.pth', '--out', out,
                 '--show-dir', tmp_path / 'drawn' / name, *options, *arguments)  # fmt: skip
        assert {'mIoU', 'aAcc'} <= set(metrics_of(tmp_path / name))
        samples = pickle.loads(out.read_bytes())
        labels[name] = torch.stack([sample['pred_sem_seg']['data'] for sample in samples])
        drawings = list((tmp_path / 'drawn' / name).iterdir())
        assert sorted(path.name for path in drawings) == sorted(os.listdir(pictures))
        for drawing in drawings:
            assert_drawn_beside(drawing, pictures / drawing.name)
    assert labels['plain'].shape == labels['augmented'].shape == (6, 1, 64, 64)
    assert (labels['plain'] != labels['augmented']).any()


def run_script(script, *args):
    environment = os.environ | {
        'MASTER_PORT': str(free_port()),
        'OMP_NUM_THREADS': '1',
        'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
    }
    command = [f'tools/{script}', *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_two_processes_train_and_evaluate(sample, tmp_path):
    """With frozen stages and activation checkpointing, which parameters without use would break."""
    arguments = quick(sample / 'coco', tmp_path / 'train', 'train_cfg.max_epochs=1',
                      'model.backbone.frozen_stages=1', 'model.backbone.with_cp=True')  # fmt: skip
    output = run_script('dist_train.sh', CONFIG, 2, '--auto-scale-lr', *arguments)
    assert 'Scaling the original LR by 0.25' in output  # 2 processes x 2 pictures of batch 16
    checkpoint = torch.load(tmp_path / 'train/epoch_1.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2  # 8 pictures in 2 processes with batches of 2
    run_script('dist_test.sh', CONFIG, tmp_path / 'train/epoch_1.pth', 2,
               *quick(sample / 'coco', tmp_path / 'two'))  # fmt: skip
    run_tool('test.py', CONFIG, tmp_path / 'train/epoch_1.pth',
             *quick(sample / 'coco', tmp_path / 'one'))  # fmt: skip
    two, one = metrics_of(tmp_path / 'two'), metrics_of(tmp_path / 'one')
    for name in one:
        if name.startswith('coco/'):
            assert two[name] == pytest.approx(one[name], abs=1e-3), name


def test_two_processes_train_a_segmentor(sample, tmp_path):
    arguments = quick_segmentation(sample, tmp_path, 'model.backbone.frozen_stages=1',
                                   'model.backbone.with_cp=True')  # fmt: skip
    run_script('dist_train.sh', SEGMENTATION, 2, *arguments)
    checkpoint = torch.load(tmp_path / 'iter_4.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict'].values())
    losses, metrics = read_scalars(tmp_path, ['mIoU'])
    assert (sorted(losses['loss']), sorted(metrics['mIoU'])) == ([1, 2, 3, 4], [2, 4])


def test_curves(trained, tmp_path):
    run_tool('plot_curves.py', trained, '--out', tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    losses, metrics = read_scalars(trained, ['coco/bbox_mAP'])
    assert sorted(losses['loss']) == list(range(1, 13))  # the killed run and the resumed one
    assert list(metrics['coco/bbox_mAP']) == [3]
    assert 'no training log' in run_tool('plot_curves.py', tmp_path, succeeds=False)


def test_real_pictures(real_samples, tmp_path):
    """A greyscale one, some without objects, crowd regions: only the data root changes."""
    options = ['train_dataloader.dataset.indices=40', 'train_cfg.max_epochs=1',
               'train_cfg.val_interval=1']  # fmt: skip
    arguments = quick(real_samples / 'coco_sample', tmp_path, *options)
    output = run_tool('train.py', CONFIG, *arguments)
    assert 'Epoch(val) [1][31/31]' in output
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert all(torch.isfinite(value).all() for value in checkpoint['state_dict'].values())
    arguments[arguments.index('train_cfg.max_epochs=1')] = 'train_cfg.max_epochs=2'
    assert 'resumed epoch: 1' in run_tool('train.py', CONFIG, '--resume', *arguments)
    assert (tmp_path / 'epoch_2.pth').exists()


def test_true_input_size(real_samples, tmp_path):
    """The recipe as it is, short side 800, for one iteration and one picture."""
    data = tmp_path / 'coco'
    subset = run_tool(
        'subset_data.py', real_samples / 'coco_sample', data, '--train', 2, '--val', 1
    )
    assert 'train2017: 2 images' in subset
    output = run_tool(
        'train.py', CONFIG, '--data-root', data, '--work-dir', tmp_path / 'work', '--cfg-options',
        'model.backbone.init_cfg=None', 'train_cfg.max_epochs=1', 'param_scheduler.1.end=1',
        'param_scheduler.1.milestones=[1]', 'default_hooks.logger.interval=1',
        'train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]',
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(1333,800)]',
    )  # fmt: skip
    assert 'Epoch(train) [1][1/1]' in ' '.join(output.split())
    assert 'Epoch(val) [1][1/1]' in ' '.join(output.split())
    checkpoint = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    assert checkpoint['state_dict']['roi_head.mask_head.convs.3.conv.weight'].shape[0] == 256


def test_demo_in_small(tmp_path):
    work_dir = tmp_path / 'work'
    options = ['--train', 16, '--val', 3, '--epochs', 2]
    output = run_tool('demo.py', '--data', tmp_path / 'data', '--work-dir', work_dir, *options)
    *_, untrained, trained, _, predictions, _, checkpoint, _ = output.splitlines()
    assert untrained.split()[0] == 'untrained'
    assert [0 <= float(value) <= 1 for value in trained.split()[1:]] == [True] * 4
    assert str(work_dir / 'predictions.png') in predictions
    assert cv2.imread(str(work_dir / 'predictions.png')).shape == (256, 3 * 512, 3)
    assert cv2.imread(str(work_dir / 'curves.png')) is not None
    assert (work_dir / 'train/epoch_2.pth').samefile(checkpoint.split()[-1])
    command = next(line for line in output.splitlines() if line.startswith('$ python tools/train'))
    assert f'{CONFIG} --work-dir {work_dir}/train' in command


def test_subset_of_coco(sample, tmp_path):
    run_tool('subset_data.py', sample / 'coco', tmp_path / 'fit', '--train', 3, '--val-is-train')
    contents = [
        json.loads((tmp_path / f'fit/annotations/instances_{split}.json').read_text())
        for split in ('train2017', 'val2017')
    ]
    assert contents[0] == contents[1]
    ids = {image['id'] for image in contents[0]['images']}
    assert len(ids) == 3
    assert max(ids) - min(ids) > 20  # of 40: spread over the split
    assert {annotation['image_id'] for annotation in contents[0]['annotations']} == ids
    for image in contents[0]['images']:
        assert (tmp_path / 'fit/val2017' / image['file_name']).exists()


def test_subset_of_ade(sample, tmp_path):
    source, folder = sample / 'ade/ADEChallengeData2016', tmp_path / 'pilot'
    output = run_tool('subset_data.py', source, folder, '--train', 0.25, '--val', 2)
    assert 'training: 10 images' in output
    for split, count in (('training', 10), ('validation', 2)):
        images = sorted((folder / 'images' / split).iterdir())
        labels = sorted((folder / 'annotations' / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        for path in (*images, *labels):
            assert path.read_bytes() == (source / path.relative_to(folder)).read_bytes()


def test_subset_refuses(sample, tmp_path):
    arguments = ['subset_data.py', sample / 'coco', tmp_path, '--train', 1, '--val', 99]
    assert 'exists already' in run_tool(*arguments, succeeds=False)
    arguments[2] = tmp_path / 'new'
    assert '99 were asked for' in run_tool(*arguments, succeeds=False)
    arguments[-1] = '1.5'
    assert 'must be a share in (0, 1) or a count' in run_tool(*arguments, succeeds=False)
    assert not (tmp_path / 'new').exists()


MISSING = '/nowhere/else'
NO_WEIGHTS = ['--cfg-options', 'model.backbone.init_cfg=None']
REFUSALS = {
    'config': (['train.py', 'configs/none.py'], 'config configs/none.py: it does not exist'),
    'data': (
        ['train.py', CONFIG, '--data-root', MISSING, *NO_WEIGHTS],
        f'{MISSING}/annotations/instances_train2017.json (train_dataloader)',
    ),
    'data to evaluate': (
        ['test.py', CONFIG, 'none', '--data-root', MISSING, *NO_WEIGHTS],
        'say where they lie with --data-root DIR',
    ),
    'weights': (
        ['train.py', CONFIG, '--data-root', 'SAMPLE'],
        "checkpoint 'pretrain/conv2former_t.pth' does not exist. The published weights",
    ),
    'checkpoint': (
        ['test.py', CONFIG, 'none.pth', '--data-root', 'SAMPLE'],
        "checkpoint 'none.pth' does not exist",
    ),
    'resume': (
        ['train.py', CONFIG, '--resume', 'none.pth', '--data-root', 'SAMPLE', *NO_WEIGHTS],
        "checkpoint 'none.pth' does not exist",
    ),
    'amp': (
        ['train.py', CONFIG, '--amp', '--cfg-options', 'optim_wrapper.type=ApexOptimWrapper'],
        '--amp needs optim_wrapper.type OptimWrapper',
    ),
    'tta': (
        [
            'test.py',
            CONFIG,
            'none',
            '--data-root',
            'SAMPLE',
            '--tta',
            *NO_WEIGHTS,
            'tta_model._delete_=True',
            'tta_pipeline=None',
        ],
        'has no tta_model and tta_pipeline',
    ),
    'weights of a segmentor': (
        [
            'train.py',
            'configs/segmentation/upernet_conv2former_l_in22k.py',
            '--data-root',
            'ADE SAMPLE',
        ],
        "checkpoint 'pretrain/conv2former_l_in22k.pth' does not exist. The published weights",
    ),
    'out': (['test.py', CONFIG, 'none', '--out', 'a.json'], '--out must end with .pkl'),
    'scaling': (
        ['train.py', CONFIG, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr._delete_=True'],
        'has no auto_scale_lr.base_batch_size',
    ),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, sample, tmp_path):
    arguments, message = REFUSALS[case]
    folders = {'SAMPLE': sample / 'coco', 'ADE SAMPLE': sample / 'ade/ADEChallengeData2016'}
    arguments = [folders.get(argument, argument) for argument in arguments]
    tool, config, *arguments = arguments
    output = run_tool(tool, config, '--work-dir', tmp_path, *arguments, succeeds=False)
    assert message in output
    assert 'Traceback' not in output


@pytest.mark.parametrize(
    ('script', 'positional', 'expected'),
    [
        ('slurm_train.sh', [CONFIG], f'train.py {CONFIG} --launcher slurm'),
        ('slurm_test.sh', [CONFIG, 'a b.pth'], f'test.py {CONFIG} a b.pth --launcher slurm'),
    ],
)
def test_slurm_scripts(script, positional, expected, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$#" "$*"\n')
    srun.chmod(0o755)
    environment = os.environ | {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'GPUS': '16',
        'SRUN_ARGS': '--time=3-0 --qos=high',
    }
    command = [f'tools/{script}', 'gpu', 'my job', *positional, '--work-dir', 'a b']
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    count, words = result.stdout.splitlines()
    assert int(count) == 7 + 2 + 3 + len(positional) + 2 + 2
    assert f'{expected} --work-dir a b' in words
    assert '--job-name=my job' in words
    assert '--ntasks=16 --ntasks-per-node=8' in words
    assert '--time=3-0 --qos=high' in words


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_scripts_explain_themselves(script):
    result = subprocess.run([f'tools/{script}.sh'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f'tools/{script}.sh ' in result.stderr


def make_machine(folder, without=()):
    """A folder for PATH with the commands that set-up asks for, without some."""
    folder.mkdir()
    commands = [
        'bash',
        'cat',
        'cksum',
        'df',
        'awk',
        'nproc',
        'dirname',
        'ls',
        'rm',
        'mv',
        'touch',
        'c++',
    ]
    for name in set(commands) - set(without):
        (folder / name).symlink_to(shutil.which(name))
    if 'python3' not in without:
        (folder / 'python3').symlink_to(os.path.realpath(sys.executable))
    return folder


def write_command(path, text):
    path.unlink(missing_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ('without', 'message'),
    [(['python3'], 'Python 3.10, 3.11 or 3.12 is needed'), (['c++'], 'apt-get install g++')],
)
def test_setup_says_what_the_machine_lacks_before_it_starts(without, message, tmp_path):
    output = run_setup(tmp_path, make_machine(tmp_path / 'bin', without))
    assert message in output
    assert not (tmp_path / 'project/.venv').exists()


def test_setup_says_when_the_disk_is_full(tmp_path):
    machine = make_machine(tmp_path / 'bin')
    write_command(machine / 'df', 'echo; echo /dev/sda 9 9 1048576 9% /')
    assert 'MiB of disk are needed' in run_setup(tmp_path, machine)


def run_setup(tmp_path, machine):
    project = tmp_path / 'project'
    (project / 'tools').mkdir(parents=True)
    for name in ('constraints.txt', 'setup.py', 'pyproject.toml', 'tools/setup_env.sh'):
        shutil.copy(ROOT / name, project / name)
    environment = {'PATH': str(machine), 'HOME': str(tmp_path)}
    result = subprocess.run(
        ['bash', 'tools/setup_env.sh'], cwd=project, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr


@pytest.mark.parametrize('data_root', ['data/coco', 'data/coco/'])
def test_data_root_takes_the_place_of_whole_folders(data_root):
    others = ['data/coco_extra/a.json', 'data/cocoa', 'images', '', 'x/data/coco/a.json']
    config = Config(
        dict(
            data_root=data_root,
            model=dict(type='data/coco/model', number=3),
            dataset=dict(data_root='data/coco', folders=['data/coco/train', *others]),
        )
    )
    set_data_root(config, '/new')
    assert config.data_root == config.dataset.data_root == '/new/'
    assert config.dataset.folders == ['/new/train', *others]
    assert config.model == dict(type='/new/model', number=3)


@pytest.mark.parametrize('settings', [dict(data_root=''), dict(data_root=None), dict()])
def test_data_root_needs_one_to_replace(settings):
    config = Config(dict(settings, model=dict(type='A')))
    with pytest.raises(SystemExit, match=r'error: --data-root: .* has no data_root at its top'):
        set_data_root(config, '/new')
    assert config.model.type == 'A'
