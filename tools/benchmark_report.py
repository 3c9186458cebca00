"""`python tools/benchmark.py --device cuda --report DIR`: all benchmarks within a time limit.

DIR/report.json and DIR/report.md are written after each part, so that an interruption loses at most
one part. The most valuable parts come first. If a part fails or no time is left for it, the report
has a note.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_depthwise import (
    GPU_KERNELS,
    GPU_SHAPES,
    Shape,
    launches_table,
    measure_launches,
    measure_passes,
    passes_table,
    stages,
)
from common.config_check import in_one_line
from common.measuring import (
    Budget,
    Ceilings,
    Cost,
    Setting,
    Size,
    costs_table,
    device_name,
    measure_ceilings,
)
from common.model_specs import check_ways, measure_models, models_table

from mmconv2former.ops.triton_support import triton_version

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """The contents of a report."""

    models: tuple[str, ...]
    setting: Setting  # of the models
    shapes: tuple[Shape, ...]  # of the depthwise convolution
    kernels: tuple[int, ...]
    recipes: dict[str, Size]  # with the size of their images
    rounds: int = 7


FULL = Plan(
    models=(
        'conv2former_t', 'plain_t', 'plain_t:channels_last=True', 'conv2former_t:recompute=nothing',
        'convnext_tiny', 'conv2former_t:deploy=True', 'swin_tiny', 'replknet_31b',
    ),
    setting=Setting((800, 1280), batch=2, dtype='bfloat16'),
    shapes=tuple(GPU_SHAPES),
    kernels=GPU_KERNELS,
    recipes={
        'configs/detection/mask_rcnn_conv2former_t.py': (800, 1280),
        'configs/segmentation/upernet_conv2former_t.py': (512, 512),
    },
)  # fmt: skip
QUICK = Plan(  # to try the report on any machine
    models=('conv2former_n', 'plain_n', 'conv2former_n:deploy=True'),
    setting=Setting((64, 64), batch=2),
    shapes=tuple(stages(1, 16, 16)[:2]),
    kernels=(11, 3),
    recipes={'configs/segmentation/upernet_conv2former_n.py': (64, 64)},
)


def write_report(folder: Path, plan: Plan, seconds: float) -> None:
    """Measures the parts of a plan within the time limit, and writes the report."""
    device = plan.setting.device
    check_ways(plan.models, plan.setting)
    budget = Budget(seconds)
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(device)
    content: dict[str, Any] = {
        'command': shlex.join(['python', *sys.argv]),
        'machine': describe_machine(device),
        'ceilings': asdict(ceilings),
        'seconds': {},  # of each part
        'notes': [],
    }
    machine = ', '.join(f'{key} {value}' for key, value in content['machine'].items())
    text = f'# Benchmark report\n\n`{content["command"]}`\n\n{machine}\n\n{ceilings}\n'
    print(text)
    for name, share, measure in parts(plan, ceilings):
        limit, start = budget.part(share * seconds), time.monotonic()
        try:
            if not limit.left:
                raise TimeoutError(f'skipped, the time limit of {seconds:.0f} s is reached')
            content[name], found = measure(limit)
        except Exception as error:  # the other parts may still work
            found = f'{name}: {in_one_line(error)}\n'
            content['notes'].append(found.strip())
        content['seconds'][name] = round(time.monotonic() - start, 1)
        section = f'\n## {name.capitalize()}\n\n{found}'
        print(section, flush=True)
        text += section
        (folder / 'report.json').write_text(json.dumps(content, indent=1) + '\n')
        (folder / 'report.md').write_text(text)
        gc.collect()
        if device == 'cuda':
            torch.cuda.empty_cache()


def describe_machine(device: str) -> dict[str, str]:
    """The device and the versions that the results depend on."""
    return {
        'device': device_name(device),
        'torch': torch.__version__,
        'cuDNN': str(torch.backends.cudnn.version() or 'none'),
        'Triton': triton_version() or 'none',
        'Python': platform.python_version(),
    }


# ------------------------------------------------------------------------------------------ parts
Found = tuple[Any, str]  # for the JSON, and as text


def parts(plan: Plan, ceilings: Ceilings) -> Iterator[tuple[str, float, Callable[[Budget], Found]]]:
    """Name, share of the time and function of each part; the last may use all that is left."""
    yield 'depthwise convolution', 0.35, partial(measure_depthwise, plan, ceilings)
    yield 'launches', 0.05, partial(measure_host, plan)
    yield 'training step', 0.3, partial(measure_backbones, plan, True)
    yield 'inference', 0.15, partial(measure_backbones, plan, False)
    for number, recipe in enumerate(plan.recipes, 1):
        share = 1.0 if number == len(plan.recipes) else 0.2
        yield f'recipe {Path(recipe).stem}', share, partial(measure_recipe, plan, recipe)


def measure_depthwise(plan: Plan, ceilings: Ceilings, budget: Budget) -> Found:
    timings = measure_passes(plan.kernels, plan.shapes, plan.setting, ceilings, budget)
    measured = len({(timing.kernel, timing.shape) for timing in timings})
    title = f'{measured} of {len(plan.kernels) * len(plan.shapes)} kernels and shapes'
    text = f'{plan.setting.dtype}, {title}\n\n{passes_table(timings)}'
    return [asdict(timing) for timing in timings], text


def measure_host(plan: Plan, budget: Budget) -> Found:
    launches = measure_launches(plan.setting)
    return launches, launches_table(launches)


def measure_backbones(plan: Plan, training: bool, budget: Budget) -> Found:
    setting = plan.setting
    height, width = setting.size
    new_sizes = [(height + 32 * i, width + 32 * i) for i in (1, 2, 3)]
    costs = measure_models(plan.models, training, setting, plan.rounds, budget, new_sizes)
    return as_json(costs), f'{setting}\n\n{models_table(costs, setting)}'


def measure_recipe(plan: Plan, recipe: str, budget: Budget) -> Found:
    from benchmark_recipe import measure_steps  # if mmdet is broken, only this part fails

    setting = replace(plan.setting, size=plan.recipes[recipe])
    costs = measure_steps(ROOT / recipe, setting, True, plan.rounds, budget)
    return as_json(costs), f'{recipe}, {setting}, with AdamW\n\n{costs_table(costs)}'


def as_json(costs: dict[str, Cost]) -> dict[str, Any]:
    return {name: asdict(cost) for name, cost in costs.items()}
