"""Measures a whole recipe beside the same recipe with ConvNeXt-T, and how fast its data load.

    python tools/benchmark_recipe.py configs/detection/mask_rcnn_conv2former_t.py
    python tools/benchmark_recipe.py configs/segmentation/upernet_conv2former_t.py --size 512 512
    python tools/benchmark_recipe.py CONFIG --data-root DIR       # the training pipeline alone
    python tools/benchmark_recipe.py CONFIG --evaluate 500        # COCO's metrics alone

The first two run training steps (forward and backward of all losses) on made-up images, the models
in turn; detection at 512x512 by default, segmentation at its crop. `published code` is the recipe
with the plain operators that stand for it (see benchmark.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from benchmark import (
    PlainConv2Former,
    machine,
    measure_product_rate,
    show,
    spread,
    table,
    timed,
)
from common import set_backbone, set_data_root
from datasets import COCO_IDS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pycocotools.mask import frPyObjects
from torch import Tensor, nn

OBJECTS = 8  # in each made-up image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, help='default: 1, in segmentation 2, for BatchNorm')
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
    title = machine(measure_product_rate('cpu'), 'cpu') + '\n\n'
    kind, measure = ('data', measure_pipeline) if args.data_root else ('recipe', measure_steps)
    show(f'{kind} {Path(args.config).stem}', title + measure(args), args.page)


# ------------------------------------------------------------------------------------------ steps
def measure_steps(args: argparse.Namespace) -> str:
    """A table of training steps: ours, the published code's operators, ConvNeXt-T."""
    config = Config.fromfile(args.config)
    init_default_scope(config.default_scope)
    crop = config.model.data_preprocessor.get('size')
    size = tuple(args.size or crop or (512, 512))
    if crop is not None:
        config.model.data_preprocessor.size = size
    models = {
        'Conv2Former': build(config),
        'published code': with_published_operators(build(config)),
        'ConvNeXt-T': build(with_convnext(config)),
    }
    if config.default_scope == 'mmdet':
        images, make_batch = args.batch or 1, detection_batch
    else:
        images, make_batch = args.batch or 2, segmentation_batch
    batch = make_batch(images, size)
    times: dict[str, list[float]] = defaultdict(list)
    kept = {name: count_kept(model, batch) for name, model in models.items()}
    for number in range(args.rounds + 1):  # one to warm up
        for name, model in models.items():
            seconds = timed(step, model, batch, device='cpu')
            if number > 0:
                times[name].append(seconds)
    first = statistics.median(times['Conv2Former'])
    rows = [
        [
            name,
            spread(times[name]),
            f'{first / statistics.median(times[name]):.2f}',
            f'{kept[name] / 2**20:,.0f}',
            f'{kept["Conv2Former"] / kept[name]:.2f}',
        ]
        for name in models
    ]
    title = f'{args.config}, {images}x3x{size[0]}x{size[1]}, {args.rounds} rounds\n\n'
    header = ['backbone', 'training step, ms', 'ours to it', 'kept for backward, MiB', 'ours to it']
    return title + table(header, rows)


def build(config: Config) -> BaseModel:
    config = copy.deepcopy(config)
    config.model.backbone.pop('init_cfg', None)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.train()
    return model


def with_convnext(config: Config) -> Config:
    config = copy.deepcopy(config)
    set_backbone(config, 'convnext_tiny')
    return config


def with_published_operators(model: BaseModel) -> BaseModel:
    model.backbone = PlainConv2Former(model.backbone)
    return model


def step(model: BaseModel, batch: dict) -> None:
    model.zero_grad(set_to_none=True)
    loss(model, batch).backward()


def loss(model: BaseModel, batch: dict) -> Tensor:
    torch.manual_seed(0)  # the same samples of proposals in each step
    data = model.data_preprocessor(batch, training=True)
    return model.parse_losses(model(**data, mode='loss'))[0]


def count_kept(model: nn.Module, batch: dict) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model, batch)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del total
    return sum(kept.values())


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
