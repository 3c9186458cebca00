"""One report of everything that the benchmarks measure on a device, within a time limit.

`python tools/benchmark.py --device cuda --report DIR` writes DIR/report.json and DIR/report.md. It
writes them after each part, so an interruption loses only the part that was running. The most
valuable parts come first. A part that fails or has no time left is a note in the report.
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
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    DEFAULT,
    DEPLOYED,
    FASTEST,
    PLAIN,
    RIVAL,
    Setting,
    build,
    device_name,
    infer,
    parse,
    spread,
    table,
    train_step,
)
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
    COLUMNS,
    Budget,
    Case,
    Ceilings,
    Cost,
    Size,
    cells,
    errors_below,
    measure_ceilings,
    measure_costs,
    mebibytes,
)
from mmengine.config import Config
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """What a report is of."""

    models: tuple[str, ...]
    setting: Setting  # of the models
    shapes: tuple[Shape, ...]  # of the depthwise convolution, with these kernels
    kernels: tuple[int, ...]
    recipes: dict[str, Size]  # with the size of their images
    rounds: int = 7


FULL = Plan(
    models=(DEFAULT, *PLAIN, FASTEST, RIVAL, DEPLOYED, 'swin_tiny', 'replknet_31b'),
    setting=Setting((800, 1280), batch=2, dtype='bfloat16'),
    shapes=tuple(GPU_SHAPES),
    kernels=GPU_KERNELS,
    recipes={
        'configs/detection/mask_rcnn_conv2former_t.py': (800, 1280),
        'configs/segmentation/upernet_conv2former_t.py': (512, 512),
    },
)
QUICK = Plan(  # to try the report on any machine
    models=('conv2former_n', 'plain_n', 'conv2former_n:deploy=True'),
    setting=Setting((64, 64), batch=2),
    shapes=tuple(stages(1, 16, 16)[:2]),
    kernels=(11, 3),
    recipes={'configs/segmentation/upernet_conv2former_n.py': (64, 64)},
)


def write_report(folder: Path, plan: Plan, seconds: float) -> None:
    """Measures the parts of a plan until the time is used up, and writes the report."""
    for spec in plan.models:
        parse(spec)  # fails early if there is no such model
    budget = Budget(seconds)
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(plan.setting.device)
    content: dict[str, Any] = {
        'command': shlex.join(['python', *sys.argv]),
        'machine': describe_machine(plan.setting.device),
        'ceilings': asdict(ceilings),
        'seconds': {},  # of each part
        'notes': [],
    }
    machine = ', '.join(f'{key} {value}' for key, value in content['machine'].items())
    text = f'# What was measured\n\n`{content["command"]}`\n\n{machine}\n\n{ceilings}\n'
    print(text)
    for name, share, measure in parts(plan, ceilings):
        limit = budget.part(share * seconds)
        start = time.monotonic()
        try:
            if not limit.left:
                raise TimeoutError(f'skipped, the {seconds:.0f} seconds are used up')
            content[name], found = measure(limit)
        except Exception as error:  # the other parts may still work
            content['notes'].append(f'{name}: {in_one_line(error)}')
            found = content['notes'][-1]
        content['seconds'][name] = round(time.monotonic() - start, 1)
        section = f'\n## {name.capitalize()}\n\n{found}\n'
        print(section, flush=True)
        text += section
        (folder / 'report.json').write_text(json.dumps(content, indent=1) + '\n')
        (folder / 'report.md').write_text(text)
        gc.collect()
        if plan.setting.device == 'cuda':
            torch.cuda.empty_cache()


def describe_machine(device: str) -> dict[str, str]:
    """The device and the versions that the results depend on."""
    triton = import_module('triton').__version__ if find_spec('triton') else 'none'
    return {
        'device': device_name(device),
        'torch': torch.__version__,
        'cuDNN': str(torch.backends.cudnn.version() or 'none'),
        'Triton': triton,
        'Python': platform.python_version(),
    }


# ------------------------------------------------------------------------------------------ parts
# What a part found: for the JSON, and as text.
Found = tuple[Any, str]


def parts(plan: Plan, ceilings: Ceilings) -> Iterator[tuple[str, float, Callable[[Budget], Found]]]:
    """Name, share of the time, and what measures it; the last one may use all that is left."""
    yield 'depthwise convolution', 0.35, partial(measure_depthwise, plan, ceilings)
    yield 'launches', 0.05, partial(measure_host, plan)
    models: dict[str, nn.Module] = {}  # built once for both
    yield 'training step', 0.3, partial(measure_models, plan, models, True)
    yield 'inference', 0.15, partial(measure_models, plan, models, False)
    models.clear()
    for number, recipe in enumerate(plan.recipes, 1):
        share = 1.0 if number == len(plan.recipes) else 0.2
        yield f'recipe {Path(recipe).stem}', share, partial(measure_recipe, plan, recipe)


def measure_depthwise(plan: Plan, ceilings: Ceilings, budget: Budget) -> Found:
    device, dtype = plan.setting.device, plan.setting.dtype
    timings = measure_passes(plan.kernels, plan.shapes, device, dtype, ceilings, budget)
    measured = len({(timing.kernel, timing.shape) for timing in timings})
    title = f'{dtype}, {measured} of {len(plan.kernels) * len(plan.shapes)} kernels and shapes'
    return [asdict(timing) for timing in timings], f'{title}\n\n{passes_table(timings)}'


def measure_host(plan: Plan, budget: Budget) -> Found:
    launches = measure_launches(plan.setting.device, plan.setting.dtype)
    return launches, launches_table(launches)


def measure_models(
    plan: Plan, models: dict[str, nn.Module], is_training: bool, budget: Budget
) -> Found:
    """Costs of a training step or of inference; deployed models have only the second."""
    setting = plan.setting
    height, width = setting.size

    def make_case(spec: str) -> Case:
        model = models[spec] = models.get(spec) or build(spec).to(setting.device)
        model.train(is_training)
        if not is_training:
            return Case(model, partial(infer, model, setting=setting))

        def step(images: Tensor) -> None:
            train_step(model, images, setting)
            model.zero_grad(set_to_none=True)

        def forward(images: Tensor) -> object:
            with setting.precision():
                return model(images)

        return Case(model, step, forward)

    costs = measure_costs(
        {
            spec: partial(make_case, spec)
            for spec in plan.models
            if not (is_training and 'deploy=True' in spec)
        },
        lambda size: replace(setting, size=size).images(),
        setting.size,
        setting.device,
        plan.rounds,
        budget,
        new_sizes=[(height + 32 * i, width + 32 * i) for i in (1, 2, 3)],
    )
    rows = [
        [f'`{spec}`', spread(cost.wall, digits=1), mebibytes(cost.bytes_kept), *cells(cost)]
        for spec, cost in costs.items()
    ]
    text = table(['model', 'wall, ms', 'kept for backward, MiB', *COLUMNS], rows)
    return as_json(costs), f'{setting}\n\n{text}{errors_below(costs)}'


def measure_recipe(plan: Plan, recipe: str, budget: Budget) -> Found:
    from benchmark_recipe import measure_steps, steps_table  # if it fails, only this part is lost

    setting = replace(plan.setting, size=plan.recipes[recipe])
    config = Config.fromfile(ROOT / recipe)
    costs = measure_steps(config, setting, True, plan.rounds, budget)
    return as_json(costs), f'{recipe}, {setting}, with AdamW\n\n{steps_table(costs)}'


def as_json(costs: dict[str, Cost]) -> dict[str, Any]:
    return {name: asdict(cost) for name, cost in costs.items()}
