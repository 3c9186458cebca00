"""Runs the recipes on real samples and records the results for the tables in README and docs.

    export MMCONV2FORMER_SAMPLES=DIR     # with coco_sample, ade_sample, semantic_sample
    python tools/evidence.py steps       # every recipe: two training iterations, one evaluation
    python tools/evidence.py fit         # one recipe of each kind: memorises eight images
    python tools/evidence.py fit --true-size      # the same at the recipe's own size, on a GPU
    python tools/evidence.py cost        # every recipe: parameters and FLOPs at the paper's size
    python tools/evidence.py backbones   # ours and every baseline's: the same

Names of recipes (or backbones) before the options restrict a command to these. Each result goes
to docs/evidence.json at once; tools/make_tables.py turns it into tables. On two CPU cores an
iteration at a recipe's own size takes minutes: `steps` uses whole models on small images, `fit`
small images and narrower heads.

`fit` trains for a given time in bfloat16 and evaluates on the same images. To see the whole path
on a CPU in a minute:

    python tools/evidence.py fit mask_rcnn_conv2former_t --side 64 --seconds 20 --out evidence.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import common  # before torch
import mmcv
import mmengine
import torch
import torchvision
from common.backbones import set_backbone
from common.counting import count_bytes_kept, count_macs
from common.image_sizes import scale_images
from common.measuring import device_name
from make_tables import (
    BACKBONES,
    BASELINES,
    DENSE,
    EVIDENCE,
    OURS,
    ROOT,
    backbone_names,
    is_on_public_data,
    read_evidence,
    recipes,
    task,
    write_tables,
)
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models import GlobalAveragePooling, LinearClsHead
from plot_curves import read_logs

from mmconv2former import Baseline, Conv2Former
from mmconv2former.checkpoint.reading import read_checkpoint
from mmconv2former.models.baselines import find_baseline
from mmconv2former.models.cls_head import Conv2FormerClsHead

ADE_SAMPLE = 'ade_sample/ADEChallengeData2016'
METRICS = (
    'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU', 'aAcc',
    'accuracy/top1', 'accuracy/top5',
)  # fmt: skip


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument('kind', choices=['steps', 'fit', 'cost', 'backbones'])
    parser.add_argument(
        'names', nargs='*', metavar='NAME', help='recipes or backbones (default: all)'
    )
    parser.add_argument('--out', type=Path, default=EVIDENCE, help='default: docs/evidence.json')
    fit = parser.add_argument_group('fit')
    fit.add_argument(
        '--true-size', action='store_true', help="use the recipe's own sizes and heads"
    )
    fit.add_argument('--side', type=int, metavar='PIXELS', help='short side of images or crops')
    fit.add_argument(
        '--images', type=int, nargs='+', default=[8], metavar='N',
        help='one fit per number of images; all images if a sample has fewer (default: 8)',
    )  # fmt: skip
    fit.add_argument(
        '--seconds', type=float, default=600, help='training time of each fit (default: 600)'
    )
    args = parser.parse_args()
    if min(args.images) < 1 or args.seconds <= 0:
        parser.error('--images and --seconds must be positive')
    if args.true_size and args.side:
        parser.error('--true-size and --side exclude each other')
    if args.side and args.out == EVIDENCE:
        parser.error('fits with --side are not evidence: name another file with --out')
    known = backbone_names() if args.kind == 'backbones' else list(recipes())
    if unknown := set(args.names) - set(known):
        parser.error(f'unknown: {", ".join(sorted(unknown))}; known: {", ".join(known)}')
    if args.kind in ('steps', 'fit') and 'MMCONV2FORMER_SAMPLES' not in os.environ:
        parser.error('MMCONV2FORMER_SAMPLES must name the folder with the real samples')
    names = args.names or known
    args.out.parent.mkdir(parents=True, exist_ok=True)

    if args.kind == 'fit':
        fitted = [name for name in names if name in FITS]
        for fit_ in plan_fits(fitted, args.images, args.true_size):
            print(f'\n--- fit: {fit_.name}, {fit_.label}', flush=True)
            result = measure_fit(fit_, args)
            keys = [fit_.name, 'true_size', fit_.label] if args.true_size else [fit_.name, 'fit']
            record(result, keys, args.out)
    else:
        for name in names:
            print(f'\n--- {args.kind}: {name}', flush=True)
            if args.kind == 'backbones':
                record(measure_backbone(name), [BACKBONES, name], args.out)
            else:
                measure = {'steps': measure_steps, 'cost': measure_cost}[args.kind]
                record(measure(name, recipes()[name]), [name, args.kind], args.out)
    if args.kind == 'cost' and not args.names:
        record(measure_baselines(), [BASELINES], args.out)
    if args.out == EVIDENCE:
        write_tables()


def record(result: dict, keys: list[str], path: Path) -> None:
    """Prints a result and writes it into the file, at nested keys."""
    print(json.dumps(result, indent=1), flush=True)
    evidence = read_evidence(path)
    *parents, last = keys
    place = evidence
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = result
    path.write_text(json.dumps(evidence, indent=1, sort_keys=True) + '\n')


def sample_folder(name: str) -> Path:
    return Path(os.environ['MMCONV2FORMER_SAMPLES'], name).resolve()


def run(tool: str, *args: object) -> None:
    """Runs a tool and shows its output.

    Raises:
        SystemExit: The tool failed.
    """
    command = [f'tools/{tool}', *map(str, args)]
    print('$ python', shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode != 0:
        raise SystemExit(f'error: tools/{tool} failed')


def logged(work_dir: Path) -> list[dict]:
    """The records of a training in a work dir, and of its resumed runs."""
    return [record for records in read_logs(work_dir) for record in records]


def outcome(losses: list[float], iterations: int, metrics: dict, seconds: float) -> dict:
    """The results of a run for the tables."""
    return {
        'iterations': iterations,
        'first_loss': round(losses[0], 4),
        'last_loss': round(losses[-1], 4),
        'metrics': {key: metrics[key] for key in METRICS if key in metrics},
        'seconds': round(seconds),
    }


# ---------------------------------------------------------------- two iterations, on small images
STEP_SIDES = {'detection': 192, 'segmentation': 256, 'classification': 64, 'ablations': 64}


def measure_steps(name: str, recipe: Path) -> dict:
    """Two iterations and an evaluation on each real sample for this kind of recipe."""
    kind = task(recipe)
    samples = [ADE_SAMPLE, 'semantic_sample'] if kind == 'segmentation' else ['coco_sample']
    if is_on_public_data(recipe):
        samples = [f'public/{name.split("_")[-1]}']
    results = {}
    for sample in samples:
        with tempfile.TemporaryDirectory() as folder:
            data, config = Path(folder, 'data'), Path(folder, f'{name}.py')
            if is_on_public_data(recipe):
                data = sample_folder(sample)
            elif kind in DENSE:
                run('subset_data.py', sample_folder(sample), data, '--train', 4, '--val', 2)
            else:
                crops = ['--classes', 8, '--max-objects', 1]
                run('crop_objects.py', sample_folder(sample), data, *crops)
            steps_config(recipe).dump(config)
            result = train_and_evaluate(config, data, Path(folder))
            results[sample.removesuffix('/ADEChallengeData2016')] = result
    return results


def steps_config(recipe: Path) -> Config:
    """A recipe for two iterations from random weights, on small images."""
    config = Config.fromfile(recipe)
    kind = task(recipe)
    scale_images(config, STEP_SIDES[kind])
    config.model.backbone.init_cfg = None
    config.model.get('head', {}).pop('init_cfg', None)
    config.default_hooks.logger.interval = 1
    for part in ('train', 'val', 'test'):
        if config[f'{part}_dataloader'] is not None:  # 22K recipes are not evaluated
            config[f'{part}_dataloader'].num_workers = 1
    if config.train_cfg.get('type') == 'IterBasedTrainLoop':
        config.train_cfg.update(max_iters=2, val_interval=2)
        config.default_hooks.checkpoint.interval = 2
    else:
        config.train_cfg.max_epochs = 1
    if is_on_public_data(recipe):  # whole datasets
        config.train_dataloader.batch_size = 2
        for part in ('val', 'test'):
            config[f'{part}_dataloader'].dataset.indices = 2
    if kind == 'detection':  # after two iterations no score is above the threshold
        config.model.test_cfg.rcnn.score_thr = 0.0
    elif kind in ('classification', 'ablations'):
        config.train_dataloader.batch_size = 4
    return config


def train_and_evaluate(config: Path, data: Path, folder: Path) -> dict:
    """What `tools/train.py` and then, if the recipe evaluates, `tools/test.py` logged."""
    start = time.time()
    run('train.py', config, '--work-dir', folder / 'train', '--data-root', data)
    seconds = time.time() - start
    checkpoint = (folder / 'train/last_checkpoint').read_text()
    metrics = {}
    if Config.fromfile(config).test_dataloader is not None:
        run('test.py', config, checkpoint, '--work-dir', folder / 'test', '--data-root', data)
        (path,) = (folder / 'test').glob('*/*.json')
        metrics = json.loads(path.read_text())
    losses = [line['loss'] for line in logged(folder / 'train') if 'loss' in line]
    return outcome(losses, read_checkpoint(checkpoint)['meta']['iter'], metrics, seconds)


# ---------------------------------------------------------------- fits: memorising a few images
@dataclass(frozen=True)
class FitSettings:
    """How a recipe is fitted.

    Attributes:
        samples: Folders in MMCONV2FORMER_SAMPLES.
        side: Short side of images, or side of crops, in pixels, unless `--true-size`.
        lr: Learning rate of AdamW; our choice.
        least_batch: BatchNorm in the heads of segmentors needs several images.
        metric, goal: The metric, and the value at which the recipe "fits".
    """

    samples: tuple[str, ...]
    side: int
    lr: float
    least_batch: int
    metric: str
    goal: float


DETECTOR = FitSettings(('coco_sample',), 240, 3e-4, 2, 'coco/bbox_mAP', 0.4)
FITS = {
    'mask_rcnn_conv2former_t': DETECTOR,
    'cascade_mask_rcnn_conv2former_t': DETECTOR,
    'upernet_conv2former_t': FitSettings(
        (ADE_SAMPLE, 'semantic_sample'), 192, 5e-4, 8, 'mIoU', 60.0
    ),
    'conv2former_t_folders': FitSettings(('coco_sample',), 96, 1e-3, 16, 'accuracy/top1', 95.0),
}
LARGEST_BATCH = 8
ENDLESS = 1_000_000  # iterations; TimeBudgetHook ends the training


@dataclass(frozen=True)
class Fit:
    """A recipe and how many images of a sample it learns."""

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
    def batch(self) -> int:
        """The recipe's two images for eight, up to `LARGEST_BATCH` for more."""
        return max(FITS[self.name].least_batch, min(LARGEST_BATCH, self.images // 4))


def plan_fits(names: list[str], images: list[int], all_samples: bool) -> list[Fit]:
    """Each recipe with each number of images, or all where there are fewer, of its samples.

    Without `all_samples` the last one only.
    """
    return [
        Fit(name, sample, count)
        for name in names
        for sample in FITS[name].samples[0 if all_samples else -1 :]
        for count in sorted({min(count, count_images(sample)) for count in images})
    ]


def count_images(sample: str) -> int:
    """Training images of a sample; COCO's with objects, as `subset_data.py` takes only those."""
    folder = sample_folder(sample)
    if (folder / 'images').is_dir():
        return len(list((folder / 'images/training').glob('*.jpg')))
    content = json.loads((folder / 'annotations/instances_train2017.json').read_text())
    return len({a['image_id'] for a in content['annotations'] if not a['iscrowd']})


def measure_fit(fit: Fit, args: argparse.Namespace) -> dict:
    """Training from random weights for some seconds, then the evaluation on the same images."""
    settings, recipe = FITS[fit.name], recipes()[fit.name]
    with tempfile.TemporaryDirectory() as folder:
        data, work_dir = Path(folder, 'data'), Path(folder, 'train')
        if task(recipe) in DENSE:
            images = fit.images
            options = ['--train', images, '--val-is-train']
            run('subset_data.py', sample_folder(fit.sample), data, *options)
        else:
            options = ['--classes', 20, '--max-objects', fit.images]
            run('crop_objects.py', sample_folder(fit.sample), data, *options)
            images = len((data / 'meta/train.txt').read_text().splitlines())
        config = Path(folder, f'{fit.name}.py')
        side = None if args.true_size else args.side or settings.side
        fit_config(fit, recipe, args.seconds, side).dump(config)
        start = time.time()
        run('train.py', config, '--work-dir', work_dir, '--data-root', data, '--amp', 'bfloat16')
        wall = time.time() - start
        records = logged(work_dir)
        (log,) = work_dir.glob('*/*.log')
        kept = args.out.with_name(fit.log)
        kept.write_text(f'# {command_line()}\n' + ''.join(progress(log)))
    # CocoMetric logs nothing if nothing was predicted.
    metrics = {settings.metric: 0.0} | records[-1]
    losses = [line['loss'] for line in records if 'loss' in line]
    return outcome(losses, metrics['step'], metrics, wall) | {
        'images': images,
        'batch': fit.batch,
        'training_seconds': round(args.seconds),
        'metric': settings.metric,
        'goal': settings.goal,
        'log': kept.name,
        **provenance(),
    }


def fit_config(fit: Fit, recipe: Path, seconds: float, side: int | None) -> Config:
    """A recipe that memorises some images.

    It has no augmentation, drop path, dropout, weight decay or decay of learning rates. The layer
    scale is 0.1, because there are no pretrained weights.

    Args:
        fit: Recipe and images.
        recipe: The recipe's config.
        seconds: Training time.
        side: Short side of images, or side of crops; heads are narrower then. None for the
            recipe's own size and heads.
    """
    config, kind = Config.fromfile(recipe), task(recipe)
    model = config.model
    if side is not None:
        scale_images(config, side)
        narrow_heads(model)
        config.train_dataloader.num_workers = 1
    model.backbone.update(init_cfg=None, drop_path_rate=0.0, layer_scale_init_value=0.1)
    load, *others = config.test_dataloader.dataset.pipeline
    test = {step.type: step for step in others}
    if kind == 'detection':
        train = [test['LoadAnnotations'], test['Resize'], dict(type='PackDetInputs')]
    elif kind == 'segmentation':
        crop = dict(type='RandomCrop', crop_size=model.data_preprocessor.size)
        train = [test['LoadAnnotations'], test['Resize'], crop, test['PackSegInputs']]
        model.decode_head.dropout_ratio = model.auxiliary_head.dropout_ratio = 0.0
    else:
        train = others
        model.head.pop('init_cfg')
        for loader in (config.val_dataloader, config.test_dataloader):
            loader.dataset.data_prefix = 'train'
    config.train_dataloader.dataset.pipeline = [load, *train]
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.train_dataloader.batch_size = fit.batch
    config.optim_wrapper.optimizer.update(lr=FITS[fit.name].lr, weight_decay=0.0)
    config.optim_wrapper.paramwise_cfg.decay_rate = 1.0
    config.optim_wrapper.clip_grad = dict(max_norm=10.0)
    config.param_scheduler = None
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=ENDLESS, val_interval=ENDLESS)
    config.custom_imports.imports = [*config.custom_imports.imports, 'time_budget']
    config.custom_hooks = [dict(type='TimeBudgetHook', seconds=seconds)]
    interval = 10 if side is None else 1  # an iteration on a CPU takes seconds
    config.default_hooks.logger.update(interval=interval, log_metric_by_epoch=False)
    config.default_hooks.checkpoint = None
    config.log_processor = dict(by_epoch=False, window_size=10)
    config.randomness = dict(seed=0)
    return config


def narrow_heads(model: ConfigDict) -> None:
    """Makes the heads of a detector or segmentor cheap enough for a CPU."""
    if 'decode_head' in model:
        model.decode_head.channels = 128
        model.auxiliary_head.channels = 64
    if 'roi_head' not in model:
        return
    for part in (model.neck, model.rpn_head, model.roi_head):
        halve_channels(part)
    model.rpn_head.anchor_generator.scales = [4]  # objects are small on small images
    model.train_cfg.rpn_proposal.max_per_img = 300
    model.test_cfg.rpn.max_per_img = 200
    stages = model.train_cfg.rcnn  # a list in cascades
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 64


def halve_channels(part: ConfigDict) -> None:
    """Halves numbers of channels, except for the backbone's feature maps, which are lists."""
    for key, value in part.items():
        if key.endswith('channels') and isinstance(value, int):
            part[key] = value // 2
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                halve_channels(item)


def progress(log: Path) -> Iterator[str]:
    """The lines of a log about the training's progress, without the end, which it never reaches."""
    wanted = re.compile(r' Iter\((train|val)\) |Mixed precision|fused')
    unreached = re.compile(rf'/{ENDLESS}(?=\])|(?<=  )eta: .*?  ')
    for line in log.read_text().splitlines(keepends=True):
        if wanted.search(line):
            yield unreached.sub('', line)


def provenance() -> dict:
    """Where, when and by which command a result is measured."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    modules = dict(torch=torch, torchvision=torchvision, mmengine=mmengine, mmcv=mmcv)
    return {
        'device': device,
        'machine': device_name(device),
        'versions': {
            'python': '.'.join(map(str, sys.version_info[:3])),
            **{name: module.__version__ for name, module in modules.items()},
            'cuda': torch.version.cuda,
        },
        'date': time.strftime('%Y-%m-%d'),
        'command': command_line(),
    }


def command_line() -> str:
    return shlex.join(['python', f'tools/{Path(sys.argv[0]).name}', *sys.argv[1:]])


# ------------------------------------------------------------------------------------------ costs
DETECTION_SIZE = (800, 1280)  # height and width at which the papers count FLOPs
# Library, config and published GFLOPs (arXiv 2201.03545, tables 3 and 4). They show that this code
# counts as the papers do.
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
    """Parameters, FLOPs and, for dense recipes, the bytes that training keeps in the backbone."""
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

    Detection on COCO at 800x1280 and on BCCD at 480x640, segmentation at its crop.
    """
    init_default_scope(config.default_scope)
    config.model.backbone.merge(dict(init_cfg=None, with_cp=with_cp))
    size = config.model.data_preprocessor.get('size') or detection_size(config)
    with torch.device('meta'):
        backbone = MODELS.build(config.model.backbone).train()
        images = torch.empty(config.train_dataloader.batch_size, 3, *size)
    return count_bytes_kept(backbone, images)


def detection_size(config: Config) -> tuple[int, int]:
    """Height and width of a detector's images: the papers' on COCO, otherwise the recipe's own."""
    if config.test_dataloader.dataset.type == 'CocoDataset':
        return DETECTION_SIZE
    return image_size(config)


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of the images that are evaluated."""
    resize = next(step for step in config.test_dataloader.dataset.pipeline if step.type == 'Resize')
    width, height = resize.scale
    return height, width


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

    Detection at `detection_size`, segmentation at the recipe's test scale (512x2048 or 640x2560),
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
        size = detection_size(config)
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
# Whole models are counted with these instead of Conv2Former-T.
IN_WHOLE_MODELS = (
    'convnext_tiny', 'swin_tiny', 'hornet_tiny', 'replknet_31b', 'efficientnet_b5', 'deit3_small',
    'focalnet_tiny',
)  # fmt: skip
WHOLE_MODELS = {'mask_rcnn': 'mask_rcnn_conv2former_t', 'upernet': 'upernet_conv2former_t'}


def measure_backbone(name: str) -> dict:
    """Parameters and FLOPs of a backbone for classification (with its head) and detection.

    Detection and segmentation with whole models are counted for some.
    """
    size = 224 if name in OURS else find_baseline(name).size
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
    """Limits mask heads to 100 proposals, which mmdet's counting does not do for cascades."""
    roi_head = getattr(model, 'roi_head', None)
    mask_head = getattr(roi_head, 'mask_head', None)
    if roi_head is None or not isinstance(mask_head, torch.nn.ModuleList):
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
    """A batch of one grey image, as the model's preprocessor returns it."""
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
