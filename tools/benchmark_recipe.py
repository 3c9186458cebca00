"""Measures a whole recipe beside the same recipe with ConvNeXt-T, and how fast its data load.

    python tools/benchmark_recipe.py configs/detection/mask_rcnn_conv2former_t.py
    python tools/benchmark_recipe.py configs/segmentation/upernet_conv2former_t.py --size 512 512
    python tools/benchmark_recipe.py CONFIG --data-root DIR       # the training pipeline alone

The first two run training steps (forward and backward of all losses) on made-up images, the models
in turn; detection at 512x512 by default, segmentation at its crop. `published code` is the recipe
with the plain operators that stand for it (see benchmark.py).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from benchmark import (
    PlainConv2Former,
    Setting,
    machine,
    measure_product_rate,
    show,
    spread,
    table,
    timed,
)
from common import set_backbone, set_data_root
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import Tensor, nn

OBJECTS = 8  # in each made-up image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=5, help='rounds that count')
    parser.add_argument('--data-root', help='measure the training pipeline on these data')
    parser.add_argument('--images', type=int, default=60, help='images that the pipeline makes')
    parser.add_argument(
        '--page', action='store_true', help='keep what is printed in docs/performance.md'
    )
    args = parser.parse_args()
    title = machine(measure_product_rate(Setting((0, 0)))) + '\n\n'
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
    make_batch = detection_batch if config.default_scope == 'mmdet' else segmentation_batch
    batch = make_batch(args.batch, size)
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
    title = f'{args.config}, {args.batch}x3x{size[0]}x{size[1]}, {args.rounds} rounds\n\n'
    header = ['backbone', 'training step, ms', 'ours to it', 'kept for backward, MiB', 'ours to it']
    return title + table(header, rows)


def build(config: Config) -> nn.Module:
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


def with_published_operators(model: nn.Module) -> nn.Module:
    model.backbone = PlainConv2Former(model.backbone)
    return model


def step(model: nn.Module, batch: dict) -> None:
    model.zero_grad(set_to_none=True)
    loss(model, batch).backward()


def loss(model: nn.Module, batch: dict) -> Tensor:
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


if __name__ == '__main__':
    main()
