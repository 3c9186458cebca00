"""Trains recipes on public datasets from random weights and tests them on the usual test splits.

    python tools/train_public.py DATA                  # all runs, the most telling ones first
    python tools/train_public.py DATA camvid --minutes 90
    python tools/train_public.py DATA --list           # which runs are done

DATA has the folders `bccd` and `camvid` (docs/data.md says where to get them). Each run trains one
backbone with one seed; the runs of a dataset differ in nothing else. The last checkpoint is tested.
When the time is up, the run stops with a checkpoint, and the same command continues it.
Results go to docs/evidence.json at once, with logs, curves and drawn predictions beside it, and
tools/make_tables.py turns them into tables.

On a CPU these are the recipes with Conv2Former-N, on small images and with narrow heads.
`--full-size` trains those with Conv2Former-T as they are, for which a GPU is needed. Commands for
different datasets can run beside each other.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import torch
from common import parser_of
from common.backbones import set_backbone
from common.counting import count_macs
from common.image_sizes import scale_images
from evidence import (
    command_line,
    count_parameters,
    image_size,
    logged,
    narrow_heads,
    progress,
    provenance,
    record,
    run,
)
from make_tables import EVIDENCE, PUBLIC, ROOT, read_evidence, recipes, write_tables
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from plot_curves import pyplot, read_scalars

from mmconv2former.engine.stopping import STOPPED
from mmconv2former.models.conv2former import ARCHS

SEEDS = (0, 1, 2)
BASELINES = ('convnext_tiny', 'swin_tiny')
KERNEL_SIZES = (5, 7, 11, 15)


@dataclass(frozen=True)
class Public:
    """How the recipes of a dataset are trained here.

    Attributes:
        recipe: Name of the recipes, without the size of the backbone.
        metric: That of the validation.
        side: On a CPU: short side of images, or of crops, in pixels.
        batch: On a CPU: number of images.
        iterations: On a CPU.
    """

    recipe: str
    metric: str
    side: int
    batch: int
    iterations: int


DATASETS = {
    'bccd': Public('faster_rcnn_conv2former_{}_bccd', 'coco/bbox_mAP', 160, 4, 1200),
    'camvid': Public('upernet_conv2former_{}_camvid', 'mIoU', 176, 4, 1200),
}
FOLDER = 'public'  # beside the results, for logs and curves
VALIDATIONS = 5  # during a training


@dataclass(frozen=True)
class Run:
    """The training of one backbone with one seed.

    Attributes:
        dataset: Key of `DATASETS`.
        backbone: 'conv2former', of the recipe's size, or a baseline's name.
        seed: Of the initial weights, the order of the images and their augmentation.
        kernel_size: Of Conv2Former; None for that of its size.
        full_size: Whether the recipe is trained as it is, with Conv2Former-T.
        iterations: Of the training.
    """

    dataset: str
    backbone: str
    seed: int
    kernel_size: int | None
    full_size: bool
    iterations: int

    @property
    def recipe(self) -> str:
        return DATASETS[self.dataset].recipe.format('t' if self.full_size else 'n')

    @property
    def label(self) -> str:
        kernel = '' if self.kernel_size is None else f', {self.kernel_size}x{self.kernel_size}'
        return f'{self.backbone}{kernel}, seed {self.seed}, {self.iterations} iterations'

    @property
    def stem(self) -> str:
        """A name for files."""
        return f'{self.recipe}_{self.label}'.replace(', ', '_').replace(' ', '_')

    @cached_property
    def config(self) -> Config:
        """The recipe with this run's changes."""
        settings = DATASETS[self.dataset]
        config = Config.fromfile(recipes()[self.recipe])
        if self.kernel_size is not None:
            config.model.backbone.kernel_size = self.kernel_size
        if self.backbone != 'conv2former':
            set_backbone(config, self.backbone)
        if not self.full_size:
            scale_images(config, settings.side)
            narrow_heads(config.model)
            config.train_dataloader.batch_size = settings.batch
            for part in ('train', 'val', 'test'):
                config[f'{part}_dataloader'].num_workers = 1
        config.custom_imports.imports = [*config.custom_imports.imports, 'common.class_iou']
        if self.dataset == 'camvid':
            config.test_evaluator.type = 'ClassIoUMetric'
        else:
            config.test_evaluator.classwise = True
        set_iterations(config, self.iterations)
        config.randomness = dict(seed=self.seed)
        return config


def set_iterations(config: Config, iterations: int) -> None:
    """Shortens the schedule of a recipe, with its rates, and validates several times."""
    warmup, decay = config.param_scheduler
    end = max(2, round(warmup.end * iterations / decay.end))  # of one iteration it never rises
    warmup.end = decay.begin = end
    decay.end = iterations
    interval = -(-iterations // VALIDATIONS)
    config.train_cfg.update(max_iters=iterations, val_interval=interval)
    config.default_hooks.checkpoint.interval = interval
    config.default_hooks.logger.interval = max(1, min(50, iterations // 20))


def plan(names: list[str], full_size: bool, iterations: int | None) -> list[Run]:
    """All runs, the most telling ones first: each backbone once, ours again, the rest."""

    def runs(backbone: str, seed: int, kernel_size: int | None = None) -> Iterator[Run]:
        for name in names:
            length = iterations or DATASETS[name].iterations
            yield Run(name, backbone, seed, kernel_size, full_size, length)

    first, *others = SEEDS
    planned = [
        *runs('conv2former', first),
        *(one for baseline in BASELINES for one in runs(baseline, first)),
        *(one for seed in others for one in runs('conv2former', seed)),
        *(one for seed in others for baseline in BASELINES for one in runs(baseline, seed)),
    ]
    own = ARCHS['tiny' if full_size else 'nano'].kernel_size
    kernels = [
        one
        for k in KERNEL_SIZES
        if k != own
        for seed in SEEDS
        for one in runs('conv2former', seed, k)
    ]
    return [*planned, *(one for one in kernels if one.dataset == 'camvid')]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('data', type=Path, help='folder with the folders bccd and camvid')
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(DATASETS)}')
    parser.add_argument('--minutes', type=float, help='stop after this time (default: all runs)')
    parser.add_argument(
        '--full-size', action='store_true', help='size T, images and heads of the recipes'
    )
    parser.add_argument('--iterations', type=int, help='of each run (default: see DATASETS)')
    parser.add_argument('--runs', type=int, help='only this number of runs of each dataset')
    parser.add_argument('--list', action='store_true', help='show the runs and do nothing')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/public')
    parser.add_argument('--out', type=Path, default=EVIDENCE, help='default: docs/evidence.json')
    args = parser.parse_args()
    if unknown := set(args.names) - set(DATASETS):
        parser.error(f'unknown: {", ".join(sorted(unknown))}; known: {", ".join(DATASETS)}')
    names = args.names or list(DATASETS)
    args.work_dir = args.work_dir.resolve()  # tools run in the project's folder
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (args.data / name).is_dir():
            parser.error(f'{args.data / name} is missing; docs/data.md says where to get it')
    if args.full_size and not args.iterations:
        parser.error('--full-size needs --iterations')
    runs = plan(names, args.full_size, args.iterations)
    if args.runs:
        counts = {name: [one for one in runs if one.dataset == name] for name in names}
        runs = [one for one in runs if one in counts[one.dataset][: args.runs]]

    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    for one in runs:
        done = one.label in read_evidence(args.out).get(one.recipe, {}).get(PUBLIC, {})
        if done or args.list:
            print(f'{"done" if done else "open"}: {one.recipe}, {one.label}', flush=True)
            continue
        print(f'\n--- {one.recipe}, {one.label}', flush=True)
        result = measure(one, args, deadline)
        if result is None:
            break
        record(result, [one.recipe, PUBLIC, one.label], args.out)
        draw_curves(one, args)
        if one.seed == SEEDS[0] and one.backbone == 'conv2former' and one.kernel_size is None:
            draw_predictions(one, args)
    if args.out == EVIDENCE and not args.list:
        write_tables()


def measure(one: Run, args: argparse.Namespace, deadline: float | None) -> dict | None:
    """Trains and tests; None if the time is over before."""
    folder = args.work_dir / one.stem
    folder.mkdir(parents=True, exist_ok=True)
    data = (args.data / one.dataset).resolve()
    config = folder / 'config.py'
    one.config.dump(config)
    if not train(config, folder, data, deadline):
        return None
    tested = {}
    for what in ('trained', 'untrained'):
        if what == 'untrained' and one.backbone != 'conv2former':
            continue  # one untrained network tells enough
        checkpoint = (folder / 'last_checkpoint').read_text() if what == 'trained' else 'none'
        run('test.py', config, checkpoint, '--work-dir', folder / what, '--data-root', data)
        newest = max((folder / what).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
        tested[what] = {
            name: value
            for name, value in json.loads(newest.read_text()).items()
            if 'time' not in name
        }
    return summary(one, folder, args) | {
        'metrics': tested['trained'], 'untrained': tested.get('untrained')
    }  # fmt: skip


def train(config: Path, folder: Path, data: Path, deadline: float | None) -> bool:
    """Trains, or continues a training; False if it was stopped because the time is over.

    Raises:
        SystemExit: The training failed.
    """
    command = ['tools/train.py', config, '--work-dir', folder, '--data-root', data, '--resume']
    print('$ python', shlex.join(map(str, command)), flush=True)
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        code = process.wait(deadline and max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    except KeyboardInterrupt:  # the training has got it as well
        code = process.wait()
    if code not in (0, STOPPED, -signal.SIGTERM):  # the last one before training has begun
        raise SystemExit(f'error: tools/train.py failed with exit code {code}')
    return code == 0


def summary(one: Run, folder: Path, args: argparse.Namespace) -> dict:
    """What was trained, on what and for how long; writes its log and its curves to `FOLDER`."""
    parameters, backbone_flops = count(one.config)
    log = args.out.with_name(FOLDER) / f'{one.stem}.txt'
    log.parent.mkdir(exist_ok=True)
    lines = (line for path in sorted(folder.glob('*/*.log')) for line in progress(path))
    log.write_text(f'# {command_line()}\n' + ''.join(lines))
    metric = DATASETS[one.dataset].metric
    losses, metrics = read_scalars(folder, [metric])
    curves = {'loss': thinned(losses['loss']), 'metric': thinned(metrics.get(metric, {}))}
    log.with_suffix('.json').write_text(json.dumps({'backbone': one.backbone, **curves}) + '\n')
    return {
        'dataset': one.dataset,
        'backbone': one.backbone,
        'seed': one.seed,
        'kernel_size': one.kernel_size,
        'iterations': one.iterations,
        'batch': one.config.train_dataloader.batch_size,
        'size': list(image_size(one.config)),
        'parameters': parameters,
        'backbone_flops': backbone_flops,
        'seconds': round(training_seconds(folder, one.iterations)),
        'commit': commit(),
        'log': f'{log.parent.name}/{log.name}',
        **provenance(),
    }


def draw_curves(one: Run, args: argparse.Namespace) -> None:
    """Draws the loss and the validation of all runs of a recipe, in a colour for each backbone."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    colours: dict[str, str] = {}
    kept = args.out.with_name(FOLDER).glob(f'{one.recipe}_*_seed_*_{one.iterations}_*.json')
    for path in sorted(kept):
        curves = json.loads(path.read_text())
        name = re.sub('_seed.*', '', path.stem.removeprefix(f'{one.recipe}_'))
        is_new = name not in colours
        colour = colours.setdefault(name, f'C{len(colours)}')
        for axis, key in zip(axes, ('loss', 'metric')):
            axis.plot(*zip(*curves[key]), color=colour, lw=1, label=name if is_new else None)
    for axis, title in zip(axes, ('training loss', f'{DATASETS[one.dataset].metric}, validation')):
        axis.set(title=title, xlabel='iteration')
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(images_folder(args) / f'{one.dataset}_curves.png', dpi=80)
    pyplot.close(figure)


def draw_predictions(one: Run, args: argparse.Namespace) -> None:
    """Draws truth and prediction of images of the test split, evenly spaced."""
    folder = args.work_dir / one.stem
    checkpoint = (folder / 'last_checkpoint').read_text()
    out = images_folder(args) / f'{one.dataset}_predictions.jpg'
    data = (args.data / one.dataset).resolve()
    options = ['--data-root', data, '--count', 6, '--score', 0.5, '--out', out.resolve()]
    run('visualize.py', 'predictions', folder / 'config.py', checkpoint, *options)


def images_folder(args: argparse.Namespace) -> Path:
    folder = args.out.with_name('images')
    folder.mkdir(exist_ok=True)
    return folder


def count(config: Config) -> tuple[int, int]:
    """Parameters of the whole model, and the backbone's FLOPs for an image."""
    init_default_scope(config.default_scope)
    # Not on the meta device: ConvNeXt's constructor reads values.
    model = MODELS.build(config.model)
    flops = count_macs(model.backbone.eval(), torch.zeros(1, 3, *image_size(config)))
    return count_parameters(model), flops


def training_seconds(folder: Path, iterations: int) -> float:
    """The time of all iterations, by the median of those logged: a run may have had to wait."""
    return iterations * median(line['time'] for line in logged(folder) if 'loss' in line)


def thinned(curve: dict[int, float], most: int = 40) -> list[tuple[int, float]]:
    """Some points of a curve, with the last one."""
    points = sorted(curve.items())
    every = -(-len(points) // most) or 1
    return [(step, round(value, 4)) for step, value in points[::-1][::every][::-1]]


def commit() -> str | None:
    """The commit of the project, marked if code differs from it; None outside of a repository."""
    head = git('rev-parse', '--short', 'HEAD')
    changed = git('diff', '--name-only', 'HEAD', '--', '.', ':!docs')  # docs/ gets the results
    return f'{head}-dirty' if head and changed else head or None


def git(*arguments: str) -> str:
    return subprocess.run(
        ['git', *arguments], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


if __name__ == '__main__':
    main()
