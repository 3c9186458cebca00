"""Runs the recipes on real samples and keeps what came of it, for the tables in README and docs.

    export MMCONV2FORMER_SAMPLES=DIR     # with coco_sample, ade_sample, semantic_sample
    python tools/evidence.py steps       # every recipe: two training iterations, one evaluation
    python tools/evidence.py fit         # one recipe of each kind: fits eight images
    python tools/evidence.py fit --true-size      # the same at the recipe's own size, on a GPU
    python tools/evidence.py cost        # every recipe: parameters and FLOPs at the paper's size
    python tools/evidence.py backbones   # ours and every baseline's: the same

Each takes names of recipes (or backbones), before options, to do only those. Results go to
docs/evidence.json after each one, tables are written by tools/make_tables.py. Models are whole, but
inputs small: on two CPU cores an iteration at the recipes' own sizes takes minutes.

`fit --true-size` trains unchanged models at the recipes' own input size in bfloat16, with 8 and
with 128 real images (or all that the sample has), for the time that `--budget` gives. To see the
whole path on a CPU in about a minute, with shrunk images and few proposals:

    python tools/evidence.py fit --true-size --quick --device cpu --out evidence.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import mmcv
import mmengine
import torch
import torchvision
from common.cli import set_backbone
from common.counting import count_bytes_kept, count_macs
from common.measuring import Budget, device_name
from make_tables import (
    BACKBONES,
    BASELINES,
    DENSE,
    EVIDENCE,
    OURS,
    ROOT,
    backbone_names,
    read_evidence,
    recipes,
    task,
    write_tables,
)
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import GlobalAveragePooling, LinearClsHead

from mmconv2former import Baseline, Conv2Former
from mmconv2former.checkpoint.reading import read_checkpoint
from mmconv2former.models.baselines import find_baseline
from mmconv2former.models.cls_head import Conv2FormerClsHead

FROM_RANDOM_WEIGHTS = ['model.backbone.init_cfg=None']

# ------------------------------------------------------------- two iterations, input made smaller
STEP_SIZE = 320  # pixels of the longest side of images in detection
STEP_CROP = 256  # pixels of the crop's side in segmentation
STEPS_DETECTION = [
    'train_cfg.max_epochs=1',
    'param_scheduler.1.end=1',
    'default_hooks.logger.interval=1',
    'train_dataloader.num_workers=1',
    'train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]',
    f'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[({STEP_SIZE},{STEP_SIZE})]',
    f'val_dataloader.dataset.pipeline.1.scale=({STEP_SIZE},{STEP_SIZE})',
    f'test_dataloader.dataset.pipeline.1.scale=({STEP_SIZE},{STEP_SIZE})',
]


# Weights of two iterations are sure of nothing: without this there would be nothing to evaluate.
PREDICT_ANYTHING = 'model.test_cfg.rcnn.score_thr=0.0'


def segmentation_size(crop: int) -> list[str]:
    """Overrides of an UperNet recipe for a crop of another size, all else in proportion."""
    return [
        f'model.data_preprocessor.size=({crop},{crop})',
        f'model.test_cfg.crop_size=({crop},{crop})',
        f'model.test_cfg.stride=({crop * 2 // 3},{crop * 2 // 3})',
        f'train_dataloader.dataset.pipeline.2.scale=({4 * crop},{crop})',
        f'train_dataloader.dataset.pipeline.3.crop_size=({crop},{crop})',
        f'val_dataloader.dataset.pipeline.1.scale=({4 * crop},{crop})',
        f'test_dataloader.dataset.pipeline.1.scale=({4 * crop},{crop})',
        'train_dataloader.num_workers=1',
        'val_dataloader.num_workers=1',
        'test_dataloader.num_workers=1',
    ]


STEPS_SEGMENTATION = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    *segmentation_size(STEP_CROP),
]

STEPS_CLASSIFICATION = [
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=1',
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=1',
    'train_dataloader.dataset.pipeline.1.scale=64',
]
STEPS_CLASSIFICATION_VAL = [  # 22K recipes have no validation
    'val_dataloader.num_workers=1',
    'test_dataloader.num_workers=1',
]
CROPS_TO_STEP = ['--classes', 8, '--max-objects', 1]

# ------------------------------------- fitting eight images: narrower heads, no regularisation
FIT_IMAGES = 8
FIT = [
    'model.backbone.layer_scale_init_value=0.1',
    'model.backbone.drop_path_rate=0',
    'optim_wrapper.optimizer.lr=3e-4',
    'optim_wrapper.optimizer.weight_decay=0',
    'optim_wrapper.optimizer.fused=True',
    'optim_wrapper.paramwise_cfg.decay_rate=1.0',
    'default_hooks.checkpoint.max_keep_ckpts=1',
]
FIT_EPOCHS = 60
FIT_DETECTION = [
    *STEPS_DETECTION,
    *FIT,
    f'train_cfg.max_epochs={FIT_EPOCHS}',
    'train_cfg.val_interval=20',
    'default_hooks.checkpoint.interval=20',
    'default_hooks.logger.interval=4',
    'param_scheduler.0.end=40',
    f'param_scheduler.1.end={FIT_EPOCHS}',
    'param_scheduler.1.milestones=[45,55]',
    'train_dataloader.dataset.pipeline.2.prob=0.0',
    'model.neck.out_channels=128',
    'model.rpn_head.in_channels=128',
    'model.rpn_head.feat_channels=128',
    'model.rpn_head.anchor_generator.scales=[4]',
    'model.roi_head.bbox_roi_extractor.out_channels=128',
    'model.roi_head.mask_roi_extractor.out_channels=128',
    'model.roi_head.mask_head.num_convs=2',
    'model.train_cfg.rpn_proposal.max_per_img=300',
    'model.test_cfg.rpn.max_per_img=200',
]
FIT_MASK = [
    *FIT_DETECTION,
    'model.roi_head.bbox_head.in_channels=128',
    'model.roi_head.bbox_head.fc_out_channels=512',
    'model.roi_head.mask_head.in_channels=128',
    'model.roi_head.mask_head.conv_out_channels=128',
    'model.train_cfg.rcnn.sampler.num=64',
]
FIT_CASCADE = [
    *FIT_DETECTION,
    *(
        f'model.roi_head.bbox_head.{stage}.{option}'
        for stage in range(3)
        for option in ('in_channels=128', 'conv_out_channels=128', 'fc_out_channels=512')
    ),
    'model.roi_head.mask_head.in_channels=128',
    'model.roi_head.mask_head.conv_out_channels=128',
    *(f'model.train_cfg.rcnn.{stage}.sampler.num=64' for stage in range(3)),
]
FIT_ITERATIONS = 480
FIT_SEGMENTATION = [
    *segmentation_size(192),
    *FIT,
    'optim_wrapper.optimizer.lr=1e-3',
    f'train_cfg.max_iters={FIT_ITERATIONS}',
    f'train_cfg.val_interval={FIT_ITERATIONS // 3}',
    f'default_hooks.checkpoint.interval={FIT_ITERATIONS // 3}',
    'default_hooks.logger.interval=10',
    'param_scheduler.0.end=20',
    'param_scheduler.1.begin=20',
    f'param_scheduler.1.end={FIT_ITERATIONS}',
    'train_dataloader.batch_size=4',
    'train_dataloader.dataset.pipeline.2.ratio_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.4.prob=0.0',
    'train_dataloader.dataset.pipeline.5.brightness_delta=0',
    'train_dataloader.dataset.pipeline.5.contrast_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.5.saturation_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.5.hue_delta=1',
    'model.decode_head.channels=128',
    'model.decode_head.dropout_ratio=0.0',
    'model.auxiliary_head.channels=64',
]
FIT_CROP = 96
FIT_CLASSIFICATION = [
    *FIT,
    'model.head.init_cfg=None',
    'train_cfg.max_epochs=30',
    'train_cfg.val_interval=10',
    'param_scheduler.0.end=30',
    'param_scheduler.0.T_max=30',
    'default_hooks.checkpoint.interval=30',
    'default_hooks.logger.interval=4',
    'optim_wrapper.optimizer.lr=1e-3',
    'train_dataloader.batch_size=16',
    'train_dataloader.num_workers=1',
    'val_dataloader.num_workers=1',
    'val_dataloader.dataset.data_prefix=train',
    'test_dataloader.num_workers=1',
    'test_dataloader.dataset.data_prefix=train',
    f'train_dataloader.dataset.pipeline.1.scale={FIT_CROP}',
    'train_dataloader.dataset.pipeline.1.crop_ratio_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.1.aspect_ratio_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.2.prob=0.0',
    *(
        f'{part}_dataloader.dataset.pipeline.{step}={FIT_CROP}'
        for part in ('val', 'test')
        for step in ('1.scale', '2.crop_size')
    ),
]
CROPS_TO_FIT = ['--classes', 20, '--max-objects', 20]
# recipe: overrides, sample, metric, value that counts as "fits"
FITS = {
    'mask_rcnn_conv2former_t': (FIT_MASK, 'coco_sample', 'coco/bbox_mAP', 0.4),
    'cascade_mask_rcnn_conv2former_t': (FIT_CASCADE, 'coco_sample', 'coco/bbox_mAP', 0.4),
    'upernet_conv2former_t': (FIT_SEGMENTATION, 'semantic_sample', 'mIoU', 60.0),
    'conv2former_t_folders': (FIT_CLASSIFICATION, 'coco_sample', 'accuracy/top1', 95.0),
}

ADE_SAMPLE = 'ade_sample/ADEChallengeData2016'
METRICS = (
    'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU', 'aAcc',
    'accuracy/top1', 'accuracy/top5',
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('kind', choices=['steps', 'fit', 'cost', 'backbones'])
    parser.add_argument('recipes', nargs='*', metavar='NAME', help='default: all')
    parser.add_argument('--out', type=Path, default=EVIDENCE, help='default: docs/evidence.json')
    add_true_size_arguments(parser)
    args = parser.parse_args()
    check_true_size_arguments(parser, args)
    if args.kind == 'backbones':
        for name in args.recipes or backbone_names():
            result = measure_backbone(name)
            print(name, json.dumps(result), flush=True)
            evidence = read_evidence(args.out)
            evidence.setdefault(BACKBONES, {})[name] = result
            write_evidence(evidence, args.out)
        write_tables()
        return
    configs = recipes()
    for name in args.recipes:
        if name not in configs:
            parser.error(f'unknown recipe {name}; there are {", ".join(configs)}')
    names = args.recipes or list(configs)
    if args.kind == 'fit':
        fits = TRUE_SIZE if args.true_size else FITS
        names = [name for name in names if name in fits]
    if args.kind != 'cost' and 'MMCONV2FORMER_SAMPLES' not in os.environ:
        parser.error('MMCONV2FORMER_SAMPLES must name the folder with the real samples')
    if args.true_size:
        fit_true_size(plan_true_size(names, args.images), configs, args)
        if args.out == EVIDENCE:
            write_tables()
        return
    measure = {'steps': measure_steps, 'fit': measure_fit, 'cost': measure_cost}[args.kind]
    for name in names:
        print(f'\n--- {args.kind}: {name}', flush=True)
        result = measure(name, configs[name])
        print(json.dumps(result, indent=1), flush=True)
        evidence = read_evidence(args.out)
        evidence.setdefault(name, {})[args.kind] = result
        write_evidence(evidence, args.out)
    if args.kind == 'cost' and not args.recipes:
        evidence = read_evidence(args.out)
        evidence[BASELINES] = measure_baselines()
        write_evidence(evidence, args.out)
    if args.out == EVIDENCE:
        write_tables()


def write_evidence(evidence: dict, path: Path) -> None:
    path.write_text(json.dumps(evidence, indent=1, sort_keys=True) + '\n')


def samples(name: str) -> Path:
    return Path(os.environ['MMCONV2FORMER_SAMPLES'], name).resolve()


def measure_steps(name: str, config: Path) -> dict:
    """Two iterations and an evaluation on each real sample for this kind of recipe."""
    overrides, sources = {
        'detection': ([*STEPS_DETECTION, PREDICT_ANYTHING], ['coco_sample']),
        'segmentation': (STEPS_SEGMENTATION, [ADE_SAMPLE, 'semantic_sample']),
    }.get(task(config), (classification_steps(config), ['coco_sample']))
    results = {}
    for sample in sources:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, 'data')
            if task(config) in DENSE:
                run('subset_data.py', samples(sample), data, '--train', 4, '--val', 2)
            else:
                run('crop_objects.py', samples(sample), data, *CROPS_TO_STEP)
            results[sample.split('/')[0]] = train_and_evaluate(
                config, data, folder, FROM_RANDOM_WEIGHTS + overrides
            )
    return results


def classification_steps(config: Path) -> list[str]:
    """Overrides for small crops; of evaluation and of the head's weights where there are such."""
    settings = Config.fromfile(config)
    overrides = list(STEPS_CLASSIFICATION)
    if settings.test_dataloader is not None:
        overrides += STEPS_CLASSIFICATION_VAL
    if 'init_cfg' in settings.model.head:
        overrides.append('model.head.init_cfg=None')
    return overrides


def measure_fit(name: str, config: Path) -> dict:
    """Training on a few real pictures from random weights, and the evaluation on the same."""
    overrides, sample, metric, goal = FITS[name]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, 'data')
        if task(config) in DENSE:
            run('subset_data.py', samples(sample), data, '--train', FIT_IMAGES, '--val-is-train')
            images = FIT_IMAGES
        else:
            run('crop_objects.py', samples(sample), data, *CROPS_TO_FIT)
            images = len((data / 'meta/train.txt').read_text().splitlines())
        result = train_and_evaluate(config, data, folder, FROM_RANDOM_WEIGHTS + overrides)
    return result | {'metric': metric, 'goal': goal, 'images': images}


def train_and_evaluate(config: Path, data: Path, folder: str, overrides: list[str]) -> dict:
    """What `tools/train.py` and then, if the recipe evaluates, `tools/test.py` logged."""
    work_dir = Path(folder, 'train')
    options = ['--data-root', data, '--cfg-options', *overrides]
    start = time.time()
    run('train.py', config, '--work-dir', work_dir, *options)
    seconds = time.time() - start
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    found = {}
    if Config.fromfile(config).test_dataloader is not None:
        run('test.py', config, checkpoint, '--work-dir', Path(folder, 'test'), *options)
        (metrics,) = Path(folder, 'test').glob('*/*.json')
        found = json.loads(metrics.read_text())
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')
    losses = [record['loss'] for record in map(json.loads, scalars.open()) if 'loss' in record]
    return {
        'iterations': read_checkpoint(str(checkpoint))['meta']['iter'],
        'first_loss': round(losses[0], 4),
        'last_loss': round(losses[-1], 4),
        'metrics': {key: found[key] for key in METRICS if key in found},
        'seconds': round(seconds),
    }


def run(tool: str, *args: object, environment: Mapping[str, str] | None = None) -> None:
    """Runs a tool and shows its output.

    Args:
        tool: The name of its file.
        *args: Of its command line.
        environment: Variables that it has besides those of this process.

    Raises:
        SystemExit: The tool failed.
    """
    command = [f'tools/{tool}', *map(str, args)]
    print('$ python', shlex.join(command), flush=True)
    variables = os.environ | dict(environment or {})
    if subprocess.run([sys.executable, *command], cwd=ROOT, env=variables).returncode != 0:
        raise SystemExit(f'error: tools/{tool} failed')


# ----------------------------------------------- fitting at the recipe's own size, for a given time
@dataclass(frozen=True)
class TrueSizeFit:
    """A recipe that is fitted at its own input size.

    Args:
        samples: Folders in MMCONV2FORMER_SAMPLES.
        lr: Learning rate of AdamW; our choice.
        least_batch: Batches are not smaller; BatchNorm in the heads of segmentors needs several.
        metric, goal: As in `FITS`.
    """

    samples: tuple[str, ...]
    lr: float
    least_batch: int
    metric: str
    goal: float


TRUE_SIZE = {
    'mask_rcnn_conv2former_t': TrueSizeFit(('coco_sample',), 3e-4, 2, 'coco/bbox_mAP', 0.4),
    'cascade_mask_rcnn_conv2former_t': TrueSizeFit(('coco_sample',), 3e-4, 2, 'coco/bbox_mAP', 0.4),
    'upernet_conv2former_t': TrueSizeFit((ADE_SAMPLE, 'semantic_sample'), 5e-4, 8, 'mIoU', 60.0),
}
LARGEST_BATCH = 8
ENDLESS = 1_000_000  # iterations; the time ends before
CURVE = 25  # at most so many points are kept of a loss curve
# Seconds of a fit that are not training: the start of Python, the first launches, the evaluation.
START, EVALUATION = 30, 0.2  # the second for each image
QUICK_SIDE = 64  # pixels of the short side with --quick
QUICK_MODEL: dict[str, dict] = {
    'detection': dict(
        train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=32)),
        test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=32)),
    ),
    'segmentation': dict(
        data_preprocessor=dict(size=(QUICK_SIDE, QUICK_SIDE)),
        test_cfg=dict(crop_size=(QUICK_SIDE, QUICK_SIDE), stride=(42, 42)),
        decode_head=dict(channels=32),
        auxiliary_head=dict(channels=32),
    ),
}


def add_true_size_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('fit --true-size')
    group.add_argument('--true-size', action='store_true', help="fit at the recipes' own size")
    group.add_argument(
        '--images', type=int, nargs='+', default=[8, 128], metavar='N',
        help='images to fit, one fit for each number; all where a sample has fewer (8 128)',
    )  # fmt: skip
    group.add_argument(
        '--budget', type=float, default=540, metavar='SECONDS',
        help='for all fits together, starts and evaluations included (540)',
    )  # fmt: skip
    group.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    group.add_argument(
        '--quick', action='store_true', help='shrink everything, to see that the path works'
    )


def check_true_size_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where arguments do not go together."""
    if args.true_size and args.kind != 'fit':
        parser.error('--true-size belongs to fit')
    if not args.true_size:
        return
    if min(args.images) < 1 or args.budget <= 0:
        parser.error('--images and --budget must be positive')
    if (args.quick or args.device == 'cpu') and args.out == EVIDENCE:
        parser.error('results of --quick or of a CPU are no evidence: name another file with --out')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch finds no CUDA device; --quick --device cpu shows the path without one')


@dataclass(frozen=True)
class Fit:
    """One fit of the plan: a recipe and the number of images of a sample."""

    name: str
    sample: str
    images: int

    @property
    def label(self) -> str:
        return f'{self.sample.split("/")[0]}, {self.images} images'

    @property
    def log(self) -> str:
        return f'fit_{self.name}_{self.sample.split("/")[0]}_{self.images}.txt'

    @property
    def weight(self) -> float:
        """Its share of the time: more images need more iterations, but not in proportion."""
        return math.sqrt(self.images)


def plan_true_size(names: list[str], images: list[int]) -> list[Fit]:
    """Every recipe with each number of images of each of its samples, or all where it has fewer."""
    return [
        Fit(name, sample, count)
        for name in names
        for sample in TRUE_SIZE[name].samples
        for count in sorted({min(count, images_with_objects(sample)) for count in images})
    ]


def images_with_objects(sample: str) -> int:
    """Training images of a sample; of COCO's those that `subset_data.py` takes."""
    folder = samples(sample)
    if (folder / 'images').is_dir():
        return len(list((folder / 'images/training').glob('*.jpg')))
    content = json.loads((folder / 'annotations/instances_train2017.json').read_text())
    return len({a['image_id'] for a in content['annotations'] if not a['iscrowd']})


def fit_true_size(plan: list[Fit], configs: dict[str, Path], args: argparse.Namespace) -> None:
    """Runs a plan, and writes what came of each fit, with its log beside the file of results.

    Raises:
        SystemExit: A fit failed, and those after it were run all the same; or time was over.
    """
    budget = Budget(args.budget)
    failed = []
    for index, fit in enumerate(plan):
        if budget.left == 0:
            failed += [f'{left.name} ({left.label}): no time left' for left in plan[index:]]
            break
        seconds = training_seconds(plan[index:], budget.left)
        print(f'\n--- fit at true size: {fit.name}, {fit.label}, {seconds:.0f} s', flush=True)
        try:
            result = measure_true_size(fit, configs[fit.name], seconds, args)
        except SystemExit as error:
            print(error, flush=True)
            failed.append(f'{fit.name} ({fit.label})')
            continue
        print(json.dumps(result, indent=1), flush=True)
        evidence = read_evidence(args.out)
        evidence.setdefault(fit.name, {}).setdefault('true_size', {})[fit.label] = result
        write_evidence(evidence, args.out)
    if failed:
        raise SystemExit(f'error: no result: {", ".join(failed)}')


def training_seconds(plan: list[Fit], left: float) -> float:
    """How long the first fit of a plan may train, so that all end in the seconds that are left."""
    weights = [fit.weight for fit in plan]
    besides = sum(START + EVALUATION * fit.images for fit in plan)
    # Not nothing, where there is too little for all.
    return max(left / 4, left - besides) * weights[0] / sum(weights)


def measure_true_size(fit: Fit, config: Path, seconds: float, args: argparse.Namespace) -> dict:
    """Training from random weights for some seconds, then the evaluation on the same images."""
    settings = TRUE_SIZE[fit.name]
    with tempfile.TemporaryDirectory() as folder:
        data, work_dir = Path(folder, 'data'), Path(folder, 'train')
        run('subset_data.py', samples(fit.sample), data, '--train', fit.images, '--val-is-train')
        path = Path(folder, f'{fit.name}_fit.py')
        write_true_size_config(path, config, fit, seconds, args.quick)
        options = ['--work-dir', work_dir, '--data-root', data, '--amp', 'bfloat16']
        environment = {} if args.device == 'cuda' else {'CUDA_VISIBLE_DEVICES': ''}
        start = time.time()
        run('train.py', path, *options, environment=environment)
        wall = time.time() - start
        (log,) = work_dir.glob('*/*.log')
        (scalars,) = work_dir.glob('*/vis_data/scalars.json')
        records = list(map(json.loads, scalars.open()))
        kept = args.out.with_name(fit.log)
        kept.write_text(f'# {command_line()}\n{path.read_text()}\n' + ''.join(progress(log)))
    curve = [record for record in records if 'loss' in record]
    # CocoMetric says nothing where nothing was predicted.
    found = {settings.metric: 0.0} | records[-1]
    return {
        'images': fit.images,
        'batch': batch_of(fit),
        'iterations': found['step'],
        'seconds': round(wall),
        'training_seconds': round(seconds),
        'first_loss': round(curve[0]['loss'], 4),
        'last_loss': round(curve[-1]['loss'], 4),
        'curve': {str(record['step']): round(record['loss'], 4) for record in thinned(curve)},
        'metrics': {key: found[key] for key in METRICS if key in found},
        'metric': settings.metric,
        'goal': settings.goal,
        'quick': args.quick,
        'device': args.device,
        'machine': device_name(args.device),
        'versions': versions(),
        'date': time.strftime('%Y-%m-%d'),
        'command': command_line(),
        'log': kept.name,
    }


def batch_of(fit: Fit) -> int:
    """The recipe's two images for eight, up to `LARGEST_BATCH` for more."""
    return max(TRUE_SIZE[fit.name].least_batch, min(LARGEST_BATCH, fit.images // 4))


def write_true_size_config(path: Path, recipe: Path, fit: Fit, seconds: float, quick: bool) -> None:
    """Writes a config that fits some images: the recipe without what hinders learning by heart.

    Model, heads and input size are the recipe's, but for `quick`. Augmentation, drop path, dropout,
    weight decay and the decay of learning rates are off; the layer scale is 0.1, as there are no
    pretrained weights.
    """
    base = Config.fromfile(recipe)
    kind = task(recipe)
    model: dict[str, Any] = dict(
        backbone=dict(init_cfg=None, drop_path_rate=0.0, layer_scale_init_value=0.1)
    )
    loader: dict[str, Any] = {}
    if kind == 'detection':
        scale = (
            (2 * QUICK_SIDE, QUICK_SIDE) if quick else base.val_dataloader.dataset.pipeline[1].scale
        )
        resize = dict(type='Resize', scale=scale, keep_ratio=True)
        labels = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
        train = [dict(type='LoadImageFromFile'), labels, resize, dict(type='PackDetInputs')]
        test = [*train[:1], resize, labels, base.val_dataloader.dataset.pipeline[-1].to_dict()]
    else:
        model |= {head: dict(dropout_ratio=0.0) for head in ('decode_head', 'auxiliary_head')}
        scale = (4 * QUICK_SIDE, QUICK_SIDE) if quick else base.image_scale
        crop = dict(
            type='RandomCrop', crop_size=(QUICK_SIDE, QUICK_SIDE) if quick else base.crop_size
        )
        resize = dict(type='Resize', scale=scale, keep_ratio=True)
        labels = base.load_labels.to_dict()
        pack = dict(type='PackSegInputs')
        train = [dict(type='LoadImageFromFile'), labels, resize, crop, pack]
        test = [*train[:1], resize, labels, pack]
    if quick:
        model = merged(model, QUICK_MODEL[kind])
        loader = dict(num_workers=0)
    tested = {**loader, 'dataset': dict(pipeline=test)}
    settings: dict[str, Any] = dict(
        custom_imports=dict(
            imports=[*base.custom_imports.imports, 'time_budget'], allow_failed_imports=False
        ),
        custom_hooks=[dict(type='TimeBudgetHook', seconds=seconds)],
        model=model,
        optim_wrapper=dict(
            optimizer=dict(lr=TRUE_SIZE[fit.name].lr, weight_decay=0.0),
            paramwise_cfg=dict(decay_rate=1.0),
            clip_grad=dict(max_norm=10.0),
        ),
        param_scheduler=None,
        train_cfg=dict(
            _delete_=True, type='IterBasedTrainLoop', max_iters=ENDLESS, val_interval=ENDLESS
        ),
        train_dataloader=dict(
            batch_size=batch_of(fit),
            sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
            dataset=dict(pipeline=train),
            **loader,
        ),
        val_dataloader=tested,
        test_dataloader=tested,
        default_hooks=dict(
            logger=dict(interval=1 if quick else 10, log_metric_by_epoch=False), checkpoint=None
        ),
        log_processor=dict(by_epoch=False, window_size=10),
        randomness=dict(seed=0),
    )
    lines = [f'{name} = {value!r}\n' for name, value in settings.items()]
    path.write_text(f'_base_ = {str(recipe)!r}\n' + ''.join(lines))


def merged(first: dict, second: dict) -> dict:
    """Nested dicts in one; where both have a value the second's."""
    both = {key: merged(first[key], second[key]) for key in first.keys() & second.keys()
            if isinstance(first[key], dict)}  # fmt: skip
    return {**first, **second, **both}


def progress(log: Path) -> Iterator[str]:
    """The lines of a log that tell how training went, without an end that it never reaches."""
    wanted = re.compile(r' Iter\((train|val)\) |Mixed precision|fused')
    unreached = re.compile(rf'/{ENDLESS}(?=\])|(?<=  )eta: .*?  ')
    for line in log.read_text().splitlines(keepends=True):
        if wanted.search(line):
            yield unreached.sub('', line)


def thinned(records: list[dict]) -> list[dict]:
    """At most `CURVE` of them at even distances, the first and the last included."""
    count = min(CURVE, len(records))
    return [records[round(i * (len(records) - 1) / max(1, count - 1))] for i in range(count)]


def versions() -> dict[str, str | None]:
    modules = dict(torch=torch, torchvision=torchvision, mmengine=mmengine, mmcv=mmcv)
    return {
        'python': '.'.join(map(str, sys.version_info[:3])),
        **{name: module.__version__ for name, module in modules.items()},
        'cuda': torch.version.cuda,
    }


def command_line() -> str:
    return shlex.join(['python', 'tools/evidence.py', *sys.argv[1:]])


# ------------------------------------------------------------------------------------------ costs
DETECTION_SIZE = (800, 1280)  # height and width at which the papers count FLOPs
# Library, config and published GFLOPs (arXiv 2201.03545, table 3 and 4): counted by the same code,
# they show that it counts as the papers do.
CONVNEXT_T = {
    'ConvNeXt-T, Mask R-CNN': (
        'mmdet', 'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py', 262
    ),
    'ConvNeXt-T, Cascade Mask R-CNN': (
        'mmdet',
        'convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
        741,
    ),
    'ConvNeXt-T, UperNet': (
        'mmseg', 'convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py', 939
    ),
}  # fmt: skip


def measure_cost(name: str, config: Path) -> dict:
    """Parameters, FLOPs, and, of dense recipes, the bytes that training keeps in the backbone."""
    cost = count_cost(Config.fromfile(config))
    if task(config) not in DENSE:
        return cost
    return cost | {
        'kept': {
            'default': bytes_kept(Config.fromfile(config), with_cp=False),
            'with_cp': bytes_kept(Config.fromfile(config), with_cp=True),
        }
    }


def bytes_kept(config: Config, with_cp: bool) -> int:
    """Bytes that the backbone keeps between forward and backward, float32, the batch of one GPU.

    Detection at 800x1280, segmentation at its crop.
    """
    init_default_scope(config.default_scope)
    config.model.backbone.merge(dict(init_cfg=None, with_cp=with_cp))
    size = config.model.data_preprocessor.get('size') or DETECTION_SIZE
    with torch.device('meta'):
        backbone = MODELS.build(config.model.backbone).train()
        images = torch.empty(config.train_dataloader.batch_size, 3, *size)
    return count_bytes_kept(backbone, images)


def measure_baselines() -> dict:
    results = {}
    for name, (library, path, gflops) in CONVNEXT_T.items():
        folder = Path(import_module(library).__path__[0], '.mim/configs')
        cost = count_cost(Config.fromfile(folder / path))
        print(name, cost, flush=True)
        results[name] = {'cost': cost, 'published_gflops': gflops}
    return results


def count_cost(config: Config) -> dict:
    """Parameters and FLOPs (multiply-adds, as the papers count) of a whole model.

    Detection at 800x1280, segmentation at the recipe's test scale (512x2048 or 640x2560),
    classification at its crop.
    """
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    config.model.get('head', {}).pop('init_cfg', None)
    if config.default_scope == 'mmseg':
        long_side, short_side = config.test_dataloader.dataset.pipeline[1].scale
        size = (short_side, long_side)
        config.model.data_preprocessor.size = None
        config.model.test_cfg = dict(mode='whole')
    elif config.default_scope == 'mmpretrain':
        size = (config.train_dataloader.dataset.pipeline[1].scale,) * 2
    else:
        size = DETECTION_SIZE
    model = MODELS.build(config.model).eval()
    parameters = count_parameters(model)
    if config.default_scope == 'mmpretrain':
        inputs = torch.zeros(1, 3, *size)
    else:
        limit_masks(model)
        batch = pack(model, config.default_scope, size)
        model.forward = partial(model.forward, data_samples=batch['data_samples'])
        inputs = batch['inputs']
    if config.default_scope != 'mmdet':  # whose proposals depend on values
        model, inputs = model.to('meta'), inputs.to('meta')
    flops = count_macs(model, inputs)
    del model
    gc.collect()
    return {'parameters': parameters, 'flops': flops, 'size': list(size)}


CLASSES = 1000
# Whole models are counted for these, in the place of Conv2Former-T.
IN_WHOLE_MODELS = (
    'convnext_tiny', 'swin_tiny', 'hornet_tiny', 'replknet_31b', 'efficientnet_b5', 'deit3_small',
    'focalnet_tiny',
)  # fmt: skip
WHOLE_MODELS = {'mask_rcnn': 'mask_rcnn_conv2former_t', 'upernet': 'upernet_conv2former_t'}


def measure_backbone(name: str) -> dict:
    """Parameters and FLOPs of a backbone for classification (with its head) and detection.

    Detection and segmentation with whole models are counted for some.
    """
    size = 224 if name in OURS else find_baseline(name).published.size
    network = build_network(name)
    result = {
        'classification': {
            'parameters': count_parameters(network),
            'flops': count_macs(network.to('meta'), torch.zeros(1, 3, size, size, device='meta')),
            'size': [size, size],
        }
    }
    if name in OURS or find_baseline(name).family.dense is not None:
        backbone = build_backbone(name)
        result['dense'] = {
            'parameters': count_parameters(backbone),
            'flops': count_macs(
                backbone.to('meta'), torch.zeros(1, 3, *DETECTION_SIZE, device='meta')
            ),
            'size': list(DETECTION_SIZE),
        }
    if name in IN_WHOLE_MODELS:
        for key, recipe in WHOLE_MODELS.items():
            config = Config.fromfile(recipes()[recipe])
            set_backbone(config, name)
            result[key] = count_cost(config)
    return result


def build_network(name: str) -> torch.nn.Module:
    """Backbone and classification head, as published."""
    if name in OURS:
        backbone = build_backbone(name, out_indices=(3,), out_norm=False)
        head: torch.nn.Module = Conv2FormerClsHead(int(backbone.channels[-1]), CLASSES)
    else:
        backbone = build_backbone(name, classification=True)
        head = LinearClsHead(CLASSES, backbone.channels[-1])
        head = torch.nn.Sequential(GlobalAveragePooling(), head)
    return torch.nn.Sequential(backbone, head).eval()


def build_backbone(name: str, **options: Any) -> Conv2Former | Baseline:
    if name in OURS:
        options |= dict(type='mmconv2former.Conv2Former', arch=name.removeprefix('conv2former_'))
    else:
        options |= dict(type='mmconv2former.Baseline', name=name)
    return MODELS.build(options).eval()


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


MASKS = 100  # for which the papers count the mask heads; boxes for 1,000 proposals


def limit_masks(model: torch.nn.Module) -> None:
    """Mask heads for 100 proposals, which mmdet's counting of cascades does not see to itself."""
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None or not isinstance(roi_head.mask_head, torch.nn.ModuleList):
        return
    stock = roi_head._mask_forward

    def limited(stage: int, x: tuple[torch.Tensor, ...], rois: torch.Tensor) -> dict:
        results = stock(stage, x, rois[:MASKS])
        masks = results['mask_preds']
        missing = masks.new_zeros(len(rois) - len(masks), *masks.shape[1:])
        results['mask_preds'] = torch.cat([masks, missing])
        return results

    roi_head._mask_forward = limited


def pack(model: BaseModel, scope: str, size: tuple[int, int]) -> dict:
    """A batch of one grey image, as the model's preprocessor hands it on."""
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample as Sample  # one library is needed at a time
    else:
        from mmdet.structures import DetDataSample as Sample
    sample = Sample()
    sample.set_metainfo(
        dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
             scale_factor=(1.0, 1.0), img_id=0)
    )  # fmt: skip
    image = torch.full((3, *size), 127, dtype=torch.uint8)
    with torch.no_grad():
        return model.data_preprocessor({'inputs': [image], 'data_samples': [sample]}, False)


if __name__ == '__main__':
    main()
