"""Measures a whole recipe beside the same one with other backbones, and how fast its data load.

    python tools/benchmark_recipe.py configs/detection/mask_rcnn_conv2former_t.py
    python tools/benchmark_recipe.py configs/segmentation/upernet_conv2former_t.py --size 512 512
    python tools/benchmark_recipe.py CONFIG --device cuda --dtype bfloat16 --optimizer
    python tools/benchmark_recipe.py CONFIG --layout --device cuda --dtype bfloat16 --optimizer
    python tools/benchmark_recipe.py CONFIG --data-root DIR       # the training pipeline alone
    python tools/benchmark_recipe.py CONFIG --evaluate 500        # COCO's metrics alone

The first three run training steps (forward and backward of all losses) on made-up images, the
models in turn; detection at 512x512 by default, segmentation at its crop. `published code` is the
recipe with the plain operators that stand for it (see benchmark.py). In detection nearly every
batch has a new size, so the first call at some new sizes is timed too. docs/performance.md explains
the columns. With `--layout` the models are the recipe itself: its backbone's features contiguous
or in channels_last (`out_channels_last`), with the weights of neck and heads as they are or in
channels_last too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from benchmark import (
    DTYPES,
    PlainConv2Former,
    Setting,
    machine,
    measure_product_rate,
    refuse_page,
    show,
    spread,
    table,
)
from common.backbones import set_backbone
from common.cli import set_data_root
from common.data_layout import COCO_IDS
from common.measuring import (
    COLUMNS,
    Budget,
    Case,
    Cost,
    Size,
    cells,
    errors_below,
    measure_costs,
    mebibytes,
    timed,
)
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pycocotools.mask import frPyObjects
from torch import Tensor

from mmconv2former.compat.roi_align import guard_roi_align

OBJECTS = 8  # in each made-up image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, help='default: 1, in segmentation 2, for BatchNorm')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='of the steps (default: cpu)')
    parser.add_argument('--dtype', choices=DTYPES, help='autocast to it (default: float32)')
    parser.add_argument(
        '--optimizer', action='store_true', help="AdamW's step is part of a training step"
    )
    parser.add_argument(
        '--layout', action='store_true', help='compare memory formats of features and of weights'
    )
    parser.add_argument('--rounds', type=int, default=5, help='rounds that count')
    parser.add_argument('--data-root', help='measure the training pipeline on these data')
    parser.add_argument('--images', type=int, default=60, help='images that the pipeline makes')
    parser.add_argument(
        '--evaluate', type=int, metavar='N', help='measure the metrics on N made-up results'
    )
    parser.add_argument(
        '--page', action='store_true', help='keep what is printed in docs/performance.md'
    )
    args = parser.parse_args()
    if args.evaluate is not None:
        show('evaluation', measure_evaluation(args.evaluate), args.page)
        return
    if args.data_root:
        title = machine(measure_product_rate('cpu'), 'cpu') + '\n\n'
        show(f'data {Path(args.config).stem}', title + measure_pipeline(args), args.page)
        return
    config = Config.fromfile(args.config)
    default = default_setting(config)
    asked: dict[str, Any] = {
        key: value for key in ('batch', 'device', 'dtype') if (value := getattr(args, key))
    }
    setting = replace(default, size=tuple(args.size or default.size), **asked)
    if args.page:
        refuse_page(setting, default)
    measure = measure_layouts if args.layout else measure_steps
    costs = measure(config, setting, args.optimizer, args.rounds, Budget(math.inf))
    title = machine(measure_product_rate(setting.device), setting.device)
    title += f'\n\n{args.config}, {setting}, {args.rounds} rounds\n\n'
    name = f'{"layout" if args.layout else "recipe"} {Path(args.config).stem}'
    show(name, title + steps_table(costs), args.page)


# ------------------------------------------------------------------------------------------ steps
OURS = 'Conv2Former'


def measure_steps(
    config: Config, setting: Setting, with_optimizer: bool, rounds: int, budget: Budget
) -> dict[str, Cost]:
    """Costs of a training step with each backbone: ours, the published code's, and two others.

    Args:
        config: A recipe. If it has a crop, that gets the size of the setting.
        setting: Size, device and precision of the batch.
        with_optimizer: Whether AdamW's step is part of a step.
        rounds, budget: See `measure_costs`.
    """
    config = with_crop(config, setting)
    builders = {
        OURS: lambda: build(config),
        'published code': lambda: with_published_operators(build(config)),
        'ConvNeXt-T': lambda: build(with_baseline(config, 'convnext_tiny')),
        'Swin-T': lambda: build(with_baseline(config, 'swin_tiny')),
    }
    return measure_models(builders, config, setting, with_optimizer, rounds, budget)


def measure_layouts(
    config: Config, setting: Setting, with_optimizer: bool, rounds: int, budget: Budget
) -> dict[str, Cost]:
    """Costs of a training step with each memory format of features and weights; see the above.

    The first is the recipe as it is without the argument `out_channels_last`.
    """
    config = with_crop(config, setting)
    builders = {
        f'{features} features, {weights} weights': partial(
            build_layout, config, features == CHANNELS_LAST, weights == CHANNELS_LAST
        )
        for features in (CONTIGUOUS, CHANNELS_LAST)
        for weights in (CONTIGUOUS, CHANNELS_LAST)
    }
    return measure_models(builders, config, setting, with_optimizer, rounds, budget)


CONTIGUOUS, CHANNELS_LAST = 'contiguous', 'channels_last'


def build_layout(config: Config, features: bool, weights: bool) -> BaseModel:
    """A recipe's model with features, or weights of all but the backbone, in channels_last."""
    guard_roi_align()
    config = copy.deepcopy(config)
    config.model.backbone.out_channels_last = features
    model = build(config)
    if weights:
        for name, part in model.named_children():
            if name != 'backbone':
                part.to(memory_format=torch.channels_last)
    return model


def with_crop(config: Config, setting: Setting) -> Config:
    """A copy of a recipe; if it has a crop, that gets the size of the setting."""
    init_default_scope(config.default_scope)
    config = copy.deepcopy(config)
    if crop_of(config) is not None:
        config.model.data_preprocessor.size = setting.size
    return config


def measure_models(
    builders: Mapping[str, Callable[[], BaseModel]],
    config: Config,
    setting: Setting,
    with_optimizer: bool,
    rounds: int,
    budget: Budget,
) -> dict[str, Cost]:
    """Costs of a training step of some models of a recipe, which run in turn."""
    make_batch = detection_batch if config.default_scope == 'mmdet' else segmentation_batch
    height, width = setting.size
    return measure_costs(
        {
            name: partial(make_case, build_model, setting, with_optimizer)
            for name, build_model in builders.items()
        },
        partial(make_batch, setting.batch),
        setting.size,
        setting.device,
        rounds,
        budget,
        new_sizes=[] if crop_of(config) else [(height + 32, width), (height + 32, width + 32)],
    )


def make_case(build_model: Callable[[], BaseModel], setting: Setting, with_optimizer: bool) -> Case:
    """A model of a recipe on its device, and its training step."""
    model = build_model().to(setting.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=setting.device == 'cuda')

    def step(batch: dict) -> None:
        loss(model, batch, setting).backward()
        if with_optimizer:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return Case(model, step, partial(loss, model, setting=setting))


def steps_table(costs: dict[str, Cost]) -> str:
    """Time and bytes kept with the first model's ratio to each, then `COLUMNS`."""
    first = next(iter(costs.values()))
    rows = []
    for name, cost in costs.items():
        rows.append(
            [
                name,
                spread(cost.wall),
                ratio(median(first), median(cost)),
                mebibytes(cost.bytes_kept),
                ratio(first.bytes_kept, cost.bytes_kept),
                *cells(cost),
            ]
        )
    name, ratios = ('backbone', 'ours to it') if OURS in costs else ('layout', 'first to it')
    header = [name, 'training step, ms', ratios, 'kept for backward, MiB', ratios, *COLUMNS]
    return table(header, rows) + errors_below(costs)


def median(cost: Cost) -> float | None:
    return statistics.median(cost.wall) if cost.wall else None


def ratio(ours: float | None, theirs: float | None) -> str:
    return f'{ours / theirs:.2f}' if ours and theirs else ''


def crop_of(config: Config) -> Size | None:
    """The size that a recipe trains at; None if it has several."""
    size = config.model.data_preprocessor.get('size')
    return None if size is None else tuple(size)


def default_setting(config: Config) -> Setting:
    """The recipe's crop with two images, which BatchNorm needs, else one image of 512x512."""
    crop = crop_of(config)
    return Setting((512, 512)) if crop is None else Setting(crop, batch=2)


def build(config: Config) -> BaseModel:
    config = copy.deepcopy(config)
    config.model.backbone.pop('init_cfg', None)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.train()
    return model


def with_baseline(config: Config, name: str) -> Config:
    config = copy.deepcopy(config)
    set_backbone(config, name)
    return config


def with_published_operators(model: BaseModel) -> BaseModel:
    model.backbone = PlainConv2Former(model.backbone)
    return model


def loss(model: BaseModel, batch: dict, setting: Setting) -> Tensor:
    torch.manual_seed(0)  # the same samples of proposals in each step
    data = model.data_preprocessor(batch, training=True)
    with setting.precision():
        return model.parse_losses(model(**data, mode='loss'))[0]


def detection_batch(batch: int, size: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs  # one library is needed at a time

    shapes = [(3, *size)] * batch
    return demo_mm_inputs(
        batch, image_shapes=shapes, num_items=[OBJECTS] * batch, num_classes=80, with_mask=True
    )


def segmentation_batch(batch: int, size: tuple[int, int]) -> dict:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    rng = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(batch):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=torch.randint(150, (1, *size), generator=rng))
        samples.append(sample)
    images = [torch.randint(256, (3, *size), generator=rng).byte() for _ in range(batch)]
    return {'inputs': images, 'data_samples': samples}


# ------------------------------------------------------------------------------------------- data
def measure_pipeline(args: argparse.Namespace) -> str:
    """Images a second of one worker, and where its time goes."""
    config = Config.fromfile(args.config)
    set_data_root(config, args.data_root)
    init_default_scope(config.default_scope)
    torch.set_num_threads(1)  # as in a worker
    cv2.setNumThreads(0)
    dataset = DATASETS.build(config.train_dataloader.dataset)
    times: dict[str, float] = defaultdict(float)
    np.random.seed(0)
    count = 0
    while count < args.images:
        results = dataset.get_data_info(count % len(dataset))
        for transform in dataset.pipeline.transforms:
            start = time.perf_counter()
            results = transform(results)
            times[type(transform).__name__] += time.perf_counter() - start
            if results is None:  # a crop without an object: the data set tries another image
                break
        count += 1
    total = sum(times.values())
    rows = [
        [name, f'{1e3 * seconds / count:.1f}', f'{seconds / total:.0%}']
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])
    ]
    title = f'{args.config}: {count / total:.1f} images a second with one worker\n\n'
    return title + table(['transform', 'ms an image', 'share'], rows)


# ------------------------------------------------------------------------------------- evaluation
IMAGE_SIZE = (480, 640)
PREDICTIONS = 100  # of an image, as the recipes keep


def measure_evaluation(images: int) -> str:
    """Seconds of COCO's metrics for boxes and masks, by pycocotools and by faster-coco-eval.

    Raises:
        SystemExit: faster-coco-eval is not installed.
    """
    if find_spec('faster_coco_eval') is None:
        raise SystemExit('error: --evaluate: pip install faster-coco-eval')
    from mmdet.evaluation.metrics import CocoMetric, FasterCocoMetric

    rng = np.random.default_rng(0)
    categories = list(COCO_IDS.values())
    truth = {
        'images': [dict(id=i, height=IMAGE_SIZE[0], width=IMAGE_SIZE[1]) for i in range(images)],
        'categories': [dict(id=id_, name=name) for name, id_ in COCO_IDS.items()],
        'annotations': [
            dict(id=number + 1, image_id=number // OBJECTS, category_id=int(rng.choice(categories)),
                 bbox=box, area=box[2] * box[3], iscrowd=0, segmentation=[outline(box)])
            for number, box in enumerate(random_boxes(rng, images * OBJECTS))
        ],
    }  # fmt: skip
    results = []
    for image in range(images):
        boxes = random_boxes(rng, PREDICTIONS)
        corners = torch.tensor(boxes)
        corners[:, 2:] += corners[:, :2]
        instances = dict(
            bboxes=corners,
            scores=torch.rand(PREDICTIONS),
            labels=torch.randint(len(categories), (PREDICTIONS,)),
            masks=frPyObjects([outline(box) for box in boxes], *IMAGE_SIZE),
        )
        results.append(dict(img_id=image, ori_shape=IMAGE_SIZE, pred_instances=instances))
    rows = []
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(truth, file)
        file.flush()
        for metric_type in (CocoMetric, FasterCocoMetric):
            metric = metric_type(ann_file=file.name, metric=['bbox', 'segm'])
            metric.dataset_meta = dict(classes=tuple(COCO_IDS))
            metric.process({}, results)
            seconds = timed(metric.evaluate, images, device='cpu')
            rows.append([f'`{metric_type.__name__}`', f'{seconds:.1f}'])
    title = f'{images} made-up images, {PREDICTIONS} boxes and masks each\n\n'
    return title + table(['metric', 'seconds'], rows)


def random_boxes(rng: np.random.Generator, count: int) -> list[list[float]]:
    """Boxes (x, y, width, height) inside the image."""
    sizes = rng.uniform(20, 200, (count, 2))
    places = rng.uniform(0, 1, (count, 2)) * (np.array(IMAGE_SIZE[::-1]) - sizes)
    return np.concatenate([places, sizes], 1).tolist()


def outline(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


if __name__ == '__main__':
    main()
