"""Measures a whole recipe with several backbones, and how fast its data load.

    python tools/benchmark_recipe.py configs/detection/mask_rcnn_conv2former_t.py
    python tools/benchmark_recipe.py configs/segmentation/upernet_conv2former_t.py --size 512 512
    python tools/benchmark_recipe.py CONFIG --device cuda --dtype bfloat16 --optimizer
    python tools/benchmark_recipe.py CONFIG --data-root DIR       # the training pipeline alone

The first three run training steps (forward and backward pass of all losses) on synthetic images,
with the models in turn: by default detection on one of 512x512, segmentation on two of its crop, as
BatchNorm needs. `published code` is the recipe's backbone with the published operators. In
detection nearly every batch has a new size, so the first call at two new sizes is timed too.
docs/performance.md explains the columns.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import common  # before torch
import cv2
import numpy as np
import torch
from common.backbones import set_backbone
from common.cli import set_data_root
from common.measuring import (
    UNLIMITED,
    Budget,
    Case,
    Cost,
    Setting,
    add_setting_arguments,
    asked,
    costs_table,
    machine,
    measure_costs,
)
from common.plain_conv2former import PublishedConv2Former
from common.tables import show, table
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import Tensor

PAGE = Path(__file__).resolve().parents[1] / 'docs/data/benchmarks.md'
OBJECTS = 8  # in each synthetic image


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument('config', type=Path)
    add_setting_arguments(parser, rounds=5)
    parser.add_argument('--optimizer', action='store_true', help='include the step of AdamW')
    parser.add_argument('--data-root', help='measure the training pipeline on these data')
    parser.add_argument(
        '--images', type=int, default=60, help='number of images for --data-root (default: 60)'
    )
    parser.add_argument('--page', action='store_true', help='store the table in docs/data')
    args = parser.parse_args()
    pages = [PAGE] if args.page else []
    if args.data_root:
        text = measure_pipeline(Config.fromfile(args.config), args.data_root, args.images)
        title = f'{machine("cpu")}; {args.config}'
        show(f'data {args.config.stem}', f'{title}\n\n{text}', pages)
        return
    setting = replace(default_setting(Config.fromfile(args.config)), **asked(args))
    costs = measure_steps(args.config, setting, args.optimizer, args.rounds, UNLIMITED)
    title = f'{machine(setting.device)}; {args.config}; {setting}; medians of {args.rounds} rounds'
    show(f'recipe {args.config.stem}', f'{title}\n\n{costs_table(costs)}', pages)


def default_setting(config: Config) -> Setting:
    """The recipe's crop with two images, which BatchNorm needs, or one image of 512x512."""
    crop = config.model.data_preprocessor.get('size')
    return Setting((512, 512)) if crop is None else Setting(tuple(crop), batch=2)


# ------------------------------------------------------------------------------------------ steps
def measure_steps(
    path: Path, setting: Setting, with_optimizer: bool, rounds: int, budget: Budget
) -> dict[str, Cost]:
    """Costs of a training step with each backbone: ours, the published code's, and two others.

    Args:
        path: A recipe.
        setting: Size, device and precision of the batch.
        with_optimizer: Whether AdamW's step is part of a step.
        rounds, budget: See `measure_costs`.
    """
    config = read_recipe(path, setting)
    builders = {
        'Conv2Former': partial(build, config),
        'published code': partial(build_published, config),
        'ConvNeXt-T': partial(build, with_baseline(config, 'convnext_tiny')),
        'Swin-T': partial(build, with_baseline(config, 'swin_tiny')),
    }
    height, width = setting.size
    has_crop = config.model.data_preprocessor.get('size') is not None
    make_batch = detection_batch if config.default_scope == 'mmdet' else segmentation_batch
    return measure_costs(
        {
            name: partial(make_case, build_model, setting, with_optimizer)
            for name, build_model in builders.items()
        },
        partial(make_batch, setting.batch),
        setting,
        rounds,
        budget,
        new_sizes=[] if has_crop else [(height + 32, width), (height + 32, width + 32)],
    )


def read_recipe(path: Path, setting: Setting) -> Config:
    """A recipe, with a crop of the size of the setting if it has crops."""
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    if config.model.data_preprocessor.get('size') is not None:
        config.model.data_preprocessor.size = setting.size
    return config


def with_baseline(config: Config, name: str) -> Config:
    config = copy.deepcopy(config)
    set_backbone(config, name)
    return config


def build(config: Config) -> BaseModel:
    config = copy.deepcopy(config)
    config.model.backbone.pop('init_cfg', None)
    torch.manual_seed(0)
    return MODELS.build(config.model).train()


def build_published(config: Config) -> BaseModel:
    model = build(config)
    model.backbone = PublishedConv2Former(model.backbone)
    return model


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


def loss(model: BaseModel, batch: dict, setting: Setting) -> Tensor:
    torch.manual_seed(0)  # the same samples of proposals in each step
    data = model.data_preprocessor(batch, training=True)
    with setting.autocast():
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
def measure_pipeline(config: Config, data_root: str, images: int) -> str:
    """Images per second of one worker, and where its time goes."""
    set_data_root(config, data_root)
    init_default_scope(config.default_scope)
    torch.set_num_threads(1)  # as in a worker
    cv2.setNumThreads(0)
    dataset = DATASETS.build(config.train_dataloader.dataset)
    times: dict[str, float] = defaultdict(float)
    np.random.seed(0)
    for index in range(images):
        results = dataset.get_data_info(index % len(dataset))
        for transform in dataset.pipeline.transforms:
            start = time.perf_counter()
            results = transform(results)
            times[type(transform).__name__] += time.perf_counter() - start
            if results is None:  # a crop without an object: the dataset tries another image
                break
    total = sum(times.values())
    rows = [
        [name, f'{1e3 * seconds / images:.1f}', f'{seconds / total:.0%}']
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])
    ]
    title = f'{images / total:.1f} images per second with one worker\n\n'
    return title + table(['transform', 'ms per image', 'share'], rows)


if __name__ == '__main__':
    main()
