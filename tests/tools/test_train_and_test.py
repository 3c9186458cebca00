"""train.py and test.py on small data: what they write, what they refuse, and their scripts."""

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial

import cv2
import pytest
import torch
from common.cli import set_data_root
from demo import CONFIG
from helpers import ROOT
from helpers.in_process import with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS, scalars, tiny_config
from helpers.tools import assert_drawn_beside, run_tool
from helpers.training_server import free_port
from mmengine.config import Config
from plot_curves import read_scalars


def metrics_of(work_dir):
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


def state_of(path):
    """Weights, iteration and the optimizer's step of a checkpoint."""
    checkpoint = torch.load(path, weights_only=False)
    (step,) = {int(state['step']) for state in checkpoint['optimizer']['state'].values()}
    return checkpoint['state_dict'], checkpoint['meta']['iter'], step


# ------------------------------------------------------------------------------------ detection
@pytest.fixture(scope='module')
def detector(sample, tmp_path_factory):
    """Config of a tiny Mask R-CNN."""
    path = tmp_path_factory.mktemp('detector') / 'tiny.py'
    tiny_config('detection', sample, 'unused', length=2).dump(path)
    return path


@pytest.fixture(scope='module')
def trained_detector(detector, tmp_path_factory):
    """Work dir of two epochs of four iterations; the second one after resuming."""
    work_dir = tmp_path_factory.mktemp('trained_detector')
    arguments = ['train', detector, '--work-dir', work_dir]
    run_tool(*arguments, '--cfg-options', 'train_cfg.max_epochs=1')
    output = run_tool(*arguments, '--resume', '--cfg-options', 'log_level=INFO')
    assert 'resumed epoch: 1, iter: 4' in output
    return work_dir


def test_resumed_run_is_complete(trained_detector):
    weights, iteration, step = state_of(trained_detector / 'epoch_2.pth')
    assert iteration == step == 8
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert (trained_detector / 'last_checkpoint').read_text().endswith('epoch_2.pth')


def test_validation_is_logged_and_the_best_model_kept(trained_detector):
    logged = scalars(trained_detector)
    assert all(0 <= logged['coco/segm_mAP_50', epoch] <= 1 for epoch in (1, 2))
    for name in ('loss_rpn_cls', 'loss_bbox', 'loss_mask'):
        assert all((name, iteration) in logged for iteration in range(1, 9))
    assert len(list(trained_detector.glob('best_coco_bbox_mAP_epoch_*.pth'))) == 1


def test_curves(trained_detector, tmp_path):
    run_tool('plot_curves', trained_detector, '--out', tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    losses, metrics = read_scalars(trained_detector, ['coco/bbox_mAP'])
    assert sorted(losses['loss']) == list(range(1, 9))  # of the first run and the resumed one
    assert list(metrics['coco/bbox_mAP']) == [1, 2]
    assert 'no training log' in run_tool('plot_curves', tmp_path, succeeds=False)


def test_evaluates_draws_and_dumps(trained_detector, detector, sample, tmp_path):
    out = tmp_path / 'predictions.pkl'
    run_tool('test', detector, trained_detector / 'epoch_2.pth', '--work-dir', tmp_path,
              '--out', out, '--show-dir', 'images', '--cfg-options',
              'default_hooks.visualization.score_thr=0.0')  # fmt: skip
    expected = {f'coco/{kind}_mAP{at}' for kind in ('bbox', 'segm') for at in ('', '_50')}
    assert expected <= set(metrics_of(tmp_path))
    drawings = list(tmp_path.glob('*/images/*'))
    assert sorted(path.name for path in drawings) == sorted(os.listdir(sample / 'coco/val2017'))
    for drawing in drawings:
        assert_drawn_beside(drawing, sample / 'coco/val2017' / drawing.name)
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 6
    assert {'bboxes', 'scores', 'labels', 'masks'} <= set(predictions[0]['pred_instances'])


def test_detection_with_test_time_augmentation(trained_detector, detector, tmp_path):
    scales = [
        f'tta_pipeline.1.transforms.0.{i}.scale=({s},{s})' for i, s in enumerate((48, 64, 80))
    ]
    out = tmp_path / 'predictions.pkl'
    run_tool('test', detector, trained_detector / 'epoch_2.pth', '--work-dir', tmp_path,
              '--tta', '--out', out, '--cfg-options', *scales)  # fmt: skip
    assert 0 <= metrics_of(tmp_path)['coco/segm_mAP'] <= 1
    for prediction in pickle.loads(out.read_bytes()):
        instances = prediction['pred_instances']
        assert 0 < len(instances['masks']) == len(instances['bboxes']) <= 100


# --------------------------------------------------------------------------------- segmentation
@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Config of a tiny UperNet, with SyncBN as in the recipe."""
    return write_tiny_config(tmp_path_factory.mktemp('segmentor') / 'tiny.py')


@pytest.fixture(scope='module')
def trained_segmentor(segmentor, sample, tmp_path_factory):
    """Work dir of four iterations."""
    work_dir = tmp_path_factory.mktemp('trained_segmentor')
    run_tool(*with_data(['train', segmentor], sample, work_dir, *WITHOUT_WORKERS))
    return work_dir


def test_backbone_is_compiled_by_a_key(segmentor, sample, tmp_path):
    options = [*WITHOUT_WORKERS, 'compile.backend=eager', 'compile.fullgraph=True',
               'model.backbone.arch.depths=(1,1,1,1)',
               'train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1']  # fmt: skip
    output = run_tool(*with_data(['train', segmentor], sample, tmp_path, *options))
    assert 'The backbone is compiled' in output
    weights, *_ = state_of(tmp_path / 'iter_1.pth')
    assert not any('_orig_mod' in name for name in weights)


def test_segmentation_evaluates_draws_and_augments(trained_segmentor, segmentor, sample, tmp_path):
    scales = [
        f'tta_pipeline.1.transforms.0.{i}.scale=({256 * r // 4},{64 * r // 4})'
        for i, r in enumerate((2, 3, 4, 5, 6, 7))
    ]
    options = [*WITHOUT_WORKERS, *scales, 'test_dataloader.dataset.indices=3']
    images = sample / 'ade/ADEChallengeData2016/images/validation'
    labels = {}
    for name, flags in {'plain': [], 'augmented': ['--tta']}.items():
        out, drawn = tmp_path / f'{name}.pkl', tmp_path / 'drawn' / name
        test = ['test', segmentor, trained_segmentor / 'iter_4.pth', *flags, '--out', out,
                '--show-dir', drawn]  # fmt: skip
        run_tool(*with_data(test, sample, tmp_path / name, *options))
        assert {'mIoU', 'aAcc'} <= set(metrics_of(tmp_path / name))
        samples = pickle.loads(out.read_bytes())
        labels[name] = torch.stack([item['pred_sem_seg']['data'] for item in samples])
        assert sorted(os.listdir(drawn)) == sorted(os.listdir(images))[:3]
        for drawing in drawn.iterdir():
            assert_drawn_beside(drawing, images / drawing.name)
    assert labels['plain'].shape == labels['augmented'].shape == (3, 1, 64, 64)
    assert (labels['plain'] != labels['augmented']).any()


# --------------------------------------------------------------------------- several processes
def test_two_processes_train_a_detector(detector, tmp_path):
    """With frozen stages and recomputed activations; unused parameters would break them."""
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'model.backbone.frozen_stages=1',
               'model.backbone.with_cp=True', 'log_level=INFO']  # fmt: skip
    environment = os.environ | {
        'MASTER_PORT': str(free_port()),
        'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
    }
    command = ['tools/dist_train.sh', detector, 2, '--auto-scale-lr', '--work-dir', tmp_path,
               *options]  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'Scaling the original LR by 0.25' in result.stdout + result.stderr  # 2 x 2 of 16 images
    _, iteration, step = state_of(tmp_path / 'epoch_1.pth')
    assert iteration == step == 2  # 8 images in 2 processes with batches of 2


def test_two_processes_train_a_segmentor(segmentor, server, sample, tmp_path):
    options = [*WITHOUT_WORKERS, 'model.backbone.frozen_stages=1', 'model.backbone.with_cp=True']
    arguments = with_data(['train.py', segmentor], sample, tmp_path / 'work', *options)
    log = tmp_path / 'log'
    assert server.run(arguments, log, processes=2) == [0, 0], log.read_text()
    weights, iteration, _ = state_of(tmp_path / 'work/iter_4.pth')
    assert iteration == 4
    assert all(torch.isfinite(value).all() for value in weights.values())
    losses, metrics = read_scalars(tmp_path / 'work', ['mIoU'])
    assert (sorted(losses['loss']), sorted(metrics['mIoU'])) == ([1, 2, 3, 4], [2, 4])


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_scripts_explain_themselves(script):
    result = subprocess.run([f'tools/{script}.sh'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f'tools/{script}.sh ' in result.stderr


SCRIPTS = [  # arguments, what they start with which environment
    ('dist_test', ['CONFIG', 'a b.pth', '2'],
     'python|-m torch.distributed.run --nproc_per_node=2 --nnodes=4 --node_rank=0 '
     '--master_addr=127.0.0.1 --master_port=29500 tools/test.py CONFIG a b.pth --launcher pytorch'),
    ('slurm_train', ['gpu', 'my job', 'CONFIG'],
     'srun|--partition=gpu --job-name=my job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8 '
     '--cpus-per-task=5 --kill-on-bad-exit=1 --signal=USR1@120 --time=3-0 --qos=high python -u '
     'tools/train.py CONFIG --launcher slurm'),
    ('slurm_test', ['gpu', 'my job', 'CONFIG', 'a b.pth'],
     'srun|--partition=gpu --job-name=my job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8 '
     '--cpus-per-task=5 --kill-on-bad-exit=1 --time=3-0 --qos=high python -u tools/test.py CONFIG '
     'a b.pth --launcher slurm'),
]  # fmt: skip


@pytest.mark.parametrize(('script', 'arguments', 'expected'), SCRIPTS)
def test_what_scripts_start(script, arguments, expected, tmp_path):
    for program in ('python', 'srun'):
        write_command(tmp_path / program, f'printf "{program}|%s" "$*"')
    environment = os.environ | {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'GPUS': '16',
        'NNODES': '4',
        'SRUN_ARGS': '--time=3-0 --qos=high',
    }
    command = [f'tools/{script}.sh', *arguments, '--work-dir', 'a b']
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f'{expected} --work-dir a b'


@pytest.mark.parametrize(
    ('code', 'requeue', 'expected'),
    [(75, '1', '--resume|requeue 42'), (75, '0', '|'), (1, '1', '--resume|')],
)
def test_slurm_requeues_stopped_jobs(code, requeue, expected, tmp_path):
    write_command(tmp_path / 'srun', f'for last; do :; done; printf "%s|" "$last"; exit {code}')
    write_command(tmp_path / 'scontrol', 'printf "%s" "$*"')
    environment = os.environ | {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'REQUEUE': requeue,
        'SLURM_JOB_ID': '42',
        'SLURM_RESTART_COUNT': '1',
    }
    command = ['tools/slurm_train.sh', 'gpu', 'job', 'CONFIG', '']
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, expected)


# ----------------------------------------------------------------------------- the whole recipe
def test_real_images(real_samples, detector, tmp_path):
    """A greyscale one, some without objects, crowd regions: only the data root changes."""
    config = Config.fromfile(detector)
    config.data_root = config.train_dataloader.dataset.data_root
    config.dump(tmp_path / 'config.py')
    arguments = ['train', tmp_path / 'config.py', '--data-root', real_samples / 'coco_sample']
    options = ['train_dataloader.dataset.indices=40', 'train_cfg.max_epochs=1', 'log_level=INFO']
    output = run_tool(*arguments, '--work-dir', tmp_path, '--cfg-options', *options)
    assert 'Epoch(val) [1][31/31]' in output
    weights, *_ = state_of(tmp_path / 'epoch_1.pth')
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_true_input_size(real_samples, tmp_path):
    """The recipe as it is, short side 800, for one iteration and one image."""
    data = tmp_path / 'coco'
    subset = run_tool('subset_data', real_samples / 'coco_sample', data, '--train', 1, '--val', 1)
    assert 'train2017: 1 images' in subset
    output = run_tool(
        'train', 'configs/detection/mask_rcnn_conv2former_n.py', '--data-root', data, '--work-dir',
        tmp_path / 'work', '--cfg-options',
        *WITHOUT_WORKERS, 'model.backbone.init_cfg=None', 'train_cfg.max_epochs=1',
        'param_scheduler.1.end=1', 'param_scheduler.1.milestones=[1]',
        'default_hooks.logger.interval=1', 'train_dataloader.batch_size=1',
        'train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]',
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(1333,800)]',
    )  # fmt: skip
    assert 'Epoch(train) [1][1/1]' in ' '.join(output.split())
    assert 'Epoch(val) [1][1/1]' in ' '.join(output.split())
    weights, *_ = state_of(tmp_path / 'work/epoch_1.pth')
    assert weights['roi_head.mask_head.convs.3.conv.weight'].shape[0] == 256


def test_demo_in_small(tmp_path):
    work_dir = tmp_path / 'work'
    options = ['--train', 8, '--val', 3, '--epochs', 1]
    output = run_tool('demo.py', '--data', tmp_path / 'data', '--work-dir', work_dir, *options)
    *_, untrained, trained, _, predictions, _, checkpoint, _, _, hint = output.splitlines()
    assert untrained.split()[0] == 'untrained'
    assert [0 <= float(value) <= 1 for value in trained.split()[1:]] == [True] * 4
    assert str(work_dir / 'predictions.png') in predictions
    height, width, _ = cv2.imread(str(work_dir / 'predictions.png')).shape
    assert height > 256  # header, images, legend
    assert width > 3 * 512
    assert cv2.imread(str(work_dir / 'curves.png')) is not None
    assert (work_dir / 'train/epoch_1.pth').samefile(checkpoint.split()[-1])
    assert 'epoch 1, 2/2, loss ' in output
    assert 'box AP50 ' in output
    assert not any(line.startswith('$') for line in output.splitlines())
    command, *_ = (work_dir / 'train.log').read_text().splitlines()
    assert command.startswith('$ python tools/train.py')
    assert f'{CONFIG} --work-dir {work_dir}/train' in command
    tool, *arguments = shlex.split(hint.partition(': python -m mmconv2former ')[2])
    run_tool(f'{tool}.py', *arguments)
    assert len(list((work_dir / 'predict').glob('json/*.json'))) == 3  # of three images


def test_interrupted_demo_ends_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / 'tools/demo.py'), '--train', '8', '--val', '3']
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Jobs in the background of a shell ignore this signal, and so would their children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith('2/5'):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    rest = process.stdout.read()
    assert process.wait() == 1
    assert rest == 'stopped; logs are in work_dirs/demo\n'


def test_subset_of_coco(sample, tmp_path):
    run_tool('subset_data', sample / 'coco', tmp_path / 'fit', '--train', 3, '--val-is-train')
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
    output = run_tool('subset_data', source, folder, '--train', 0.25, '--val', 2)
    assert 'training: 10 images' in output
    for split, count in (('training', 10), ('validation', 2)):
        images = sorted((folder / 'images' / split).iterdir())
        labels = sorted((folder / 'annotations' / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        for path in (*images, *labels):
            assert path.read_bytes() == (source / path.relative_to(folder)).read_bytes()


def test_subset_refuses(sample, tmp_path):
    arguments = ['subset_data', sample / 'coco', tmp_path, '--train', 1, '--val', 99]
    assert 'already exists' in run_tool(*arguments, succeeds=False)
    arguments[2] = tmp_path / 'new'
    assert '99 were requested' in run_tool(*arguments, succeeds=False)
    arguments[-1] = '1.5'
    assert 'must be a share in (0, 1) or a count' in run_tool(*arguments, succeeds=False)
    arguments[-1] = 'inf'
    assert 'must be a share in (0, 1) or a count' in run_tool(*arguments, succeeds=False)
    assert not (tmp_path / 'new').exists()


def test_subset_without_iscrowd(sample, tmp_path):
    source = shutil.copytree(sample / 'coco', tmp_path / 'source')
    for path in (source / 'annotations').iterdir():
        content = json.loads(path.read_text())
        for annotation in content['annotations']:
            del annotation['iscrowd']
        path.write_text(json.dumps(content))
    output = run_tool('subset_data', source, tmp_path / 'new', '--train', 3, '--val', 2)
    assert 'train2017: 3 images' in output


NO_WEIGHTS = ['--cfg-options', 'model.backbone.init_cfg=None']
RECIPE = 'configs/detection/mask_rcnn_conv2former_t.py'
REFUSALS = {  # train.py with RECIPE, or test.py with RECIPE and none
    'data': ('train', ['--data-root', '/nowhere', *NO_WEIGHTS],
             '/nowhere/annotations/instances_train2017.json (train_dataloader)'),
    'data to evaluate': ('test', ['--data-root', '/nowhere', *NO_WEIGHTS],
                         'name their folder with --data-root DIR'),
    'tta': ('test', ['--data-root', 'SAMPLE', '--tta', *NO_WEIGHTS, 'tta_model._delete_=True',
                     'tta_pipeline=None'], 'has no tta_model and tta_pipeline'),
    'out': ('test', ['--out', 'a.json'], '--out must end with .pkl'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, sample, tmp_path):
    tool, options, message = REFUSALS[case]
    options = [sample / 'coco' if option == 'SAMPLE' else option for option in options]
    checkpoint = ['none'] if tool == 'test' else []
    options = ['--work-dir', tmp_path, *options]
    assert message in run_tool(tool, RECIPE, *checkpoint, *options, succeeds=False)


def test_empty_checkpoint_name(sample, tmp_path):
    """Such as "$(cat FOLDER/last_checkpoint)" without that file."""
    options = ['--data-root', sample / 'coco', '--work-dir', tmp_path]
    output = run_tool('test', CONFIG, '', *options, succeeds=False)
    assert "checkpoint '' does not exist" in output


def make_machine(folder, without=()):
    """A folder for PATH with the commands that set-up asks for, without some."""
    folder.mkdir()
    commands = 'bash cat cksum df awk nproc dirname ls rm mv touch c++'.split()
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
    [(['python3'], 'Python 3.10, 3.11, 3.12 or 3.13 is needed'), (['c++'], 'apt-get install g++')],
)
def test_setup_says_what_the_machine_lacks_before_it_starts(without, message, tmp_path):
    output = run_setup(tmp_path, make_machine(tmp_path / 'bin', without), MMCV_OPS='compiled')
    assert message in output
    assert not (tmp_path / 'project/.venv').exists()


def test_setup_says_when_the_disk_is_full(tmp_path):
    machine = make_machine(tmp_path / 'bin')
    write_command(machine / 'df', 'echo; echo /dev/sda 9 9 1048576 9% /')
    assert 'MiB of disk are needed' in run_setup(tmp_path, machine)


def run_setup(tmp_path, machine, **variables):
    project = tmp_path / 'project'
    (project / 'tools').mkdir(parents=True)
    for name in ('constraints.txt', 'setup.py', 'pyproject.toml', 'tools/setup_env.sh'):
        shutil.copy(ROOT / name, project / name)
    environment = {'PATH': str(machine), 'HOME': str(tmp_path), **variables}
    result = subprocess.run(
        ['bash', 'tools/setup_env.sh'], cwd=project, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr


@pytest.mark.parametrize('data_root', ['data/coco', 'data/coco/'])
def test_data_root_replaces_whole_folders(data_root):
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
