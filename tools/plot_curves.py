"""Draws the curves of a training run: losses against iterations, metrics of each validation.

    python tools/plot_curves.py work_dirs/mask_rcnn_conv2former_t

Reads the `vis_data/scalars.json` that mmengine writes. The parts of a resumed run are joined. A new
run from the start in the same folder replaces earlier ones. `tools/visualize.py curves` does the
same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import matplotlib
from common import parser_of

matplotlib.use('Agg')
from matplotlib import pyplot


def main() -> None:
    parser = parser_of(__doc__)
    add_arguments(parser)
    plot_curves(parser.parse_args())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `plot_curves`."""
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('--out', type=Path, help='image to write (default: WORK_DIR/curves.png)')
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=['coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU'],
        help='metrics to draw, if the run has them',
    )


def plot_curves(args: argparse.Namespace) -> None:
    """Reads the logs of a work dir and draws them.

    Raises:
        SystemExit: There is no log.
    """
    losses, metrics = read_scalars(args.work_dir, args.metrics)
    if not losses:
        raise SystemExit(f'error: no training log (*/vis_data/scalars.json) in {args.work_dir}')
    out = args.out or args.work_dir / 'curves.png'
    draw(losses, metrics, out)
    print(f'curves in {out}')


Curves = dict[str, dict[int, float]]  # name -> {iteration or epoch: value}


def read_scalars(work_dir: Path, metric_names: list[str]) -> tuple[Curves, Curves]:
    """Losses by iteration and the named metrics by validation step, of the runs in a work dir."""
    losses: Curves = {}
    metrics: Curves = {}
    for records in read_logs(work_dir):
        first_step = min((record['step'] for record in records if 'loss' in record), default=None)
        if losses and first_step is not None and first_step <= min(losses['loss']):
            losses, metrics = {}, {}  # a new run, not a resumed one
        for record in records:
            is_training = 'loss' in record
            for name, value in record.items():
                if is_training and name.startswith('loss'):
                    losses.setdefault(name, {})[record['step']] = value
                elif not is_training and name in metric_names:
                    metrics.setdefault(name, {})[record['step']] = value
    return losses, metrics


def read_logs(work_dir: Path) -> Iterator[list[dict]]:
    """The logged records of each run in a work dir, by time.

    Lines that a full disk has cut off are left out.
    """
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):  # named by time
        records = []
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
        yield records


def draw(losses: Curves, metrics: Curves, out: Path) -> None:
    """Draws losses on the left and metrics, if there are any, on the right."""
    figure, axes = pyplot.subplots(1, 2 if metrics else 1, figsize=(11, 4), squeeze=False)
    for axis, curves, title, label in zip(
        axes[0],
        (losses, metrics),
        ('Training loss', 'Validation'),
        ('iteration', 'epoch (or iteration)'),
    ):
        for name, values in curves.items():
            steps = sorted(values)
            axis.plot(steps, [values[step] for step in steps], label=name, marker='.', ms=4)
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == '__main__':
    main()
