"""Trains Mask R-CNN with Conv2Former-T from scratch on the embedded sample.

    python tools/demo.py

Makes the sample, evaluates the untrained network, trains configs/demo/mask_rcnn_demo.py, evaluates
on held-out images, and draws predictions and curves. Every command is printed and can be pasted.
docs/demo.md explains the config. Replaces data/sample and work_dirs/demo of the current folder,
unless told to write elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.utils import digit_version

ROOT = Path(__file__).resolve().parents[1]
WORK_DIR = Path('work_dirs/demo')
CONFIG = 'configs/demo/mask_rcnn_demo.py'
HAS_FUSED_ADAMW = digit_version(torch.__version__) >= digit_version('2.4')  # on a CPU
METRICS = {
    'box AP': 'coco/bbox_mAP',
    'box AP50': 'coco/bbox_mAP_50',
    'mask AP': 'coco/segm_mAP',
    'mask AP50': 'coco/segm_mAP_50',
}
SHEET_COLUMNS, SHEET_IMAGES = 3, 9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, default='data/sample', help='folder for the sample')
    parser.add_argument('--work-dir', type=Path, default=WORK_DIR)
    parser.add_argument('--train', type=int, default=240, help='number of training images')
    parser.add_argument('--val', type=int, default=60, help='number of held-out images')
    parser.add_argument('--epochs', type=int, default=10)
    args = parser.parse_args()
    start = time.time()
    work_dir = args.work_dir
    if work_dir == WORK_DIR:
        shutil.rmtree(work_dir, ignore_errors=True)
    elif work_dir.exists():
        parser.error(f'--work-dir {work_dir} already exists')
    work_dir.mkdir(parents=True)

    def run(tool: str, *arguments: object) -> None:
        run_tool(tool, *map(str, arguments), log=work_dir / f'{Path(tool).stem}.log')

    config = os.path.relpath(ROOT / CONFIG)
    data = ['--data-root', args.data / 'coco']
    options = [
        '--cfg-options',
        f'train_cfg.max_epochs={args.epochs}',
        f'optim_wrapper.optimizer.fused={HAS_FUSED_ADAMW}',
    ]
    run('make_sample.py', args.data, '--train', args.train, '--val', args.val)
    run('test.py', config, 'none', '--work-dir', work_dir / 'untrained', *data)
    train_start = time.time()
    run('train.py', config, '--work-dir', work_dir / 'train', *data, *options)
    train_minutes = (time.time() - train_start) / 60
    checkpoint = (work_dir / 'train/last_checkpoint').read_text()
    test_options = ['--work-dir', work_dir / 'trained', '--show-dir', 'pictures']
    run('test.py', config, checkpoint, *test_options, *data)
    run('plot_curves.py', work_dir / 'train', '--out', work_dir / 'curves.png')
    drawings = newest(work_dir / 'trained', '*/pictures')
    write_sheet(sorted(drawings.iterdir())[:SHEET_IMAGES], work_dir / 'predictions.png')

    print(f'\nHeld-out images, {train_minutes:.1f} minutes of training:')
    print(f'{"":12}' + ''.join(f'{name:>12}' for name in METRICS))
    for name in ('untrained', 'trained'):
        metrics = json.loads(newest(work_dir / name, '*/*.json').read_text())
        values = (metrics.get(key, 0.0) for key in METRICS.values())  # missing without detections
        print(f'{name:12}' + ''.join(f'{value:12.3f}' for value in values))
    print(f'\npredictions beside ground truth {work_dir}/predictions.png (all: {drawings})')
    print(f'curves of loss and AP           {work_dir}/curves.png')
    print(f'checkpoint                     {checkpoint}')
    print(f'{(time.time() - start) / 60:.1f} minutes in all')


def run_tool(tool: str, *args: str, log: Path) -> None:
    """Runs a tool, shows its progress and results, and writes its whole output to a log.

    Raises:
        SystemExit: The tool failed; its last lines are printed.
    """
    command = ['python', os.path.relpath(ROOT / 'tools' / tool), *args]
    print(f'\n$ {shlex.join(command)}', flush=True)
    command[0] = sys.executable
    with log.open('w') as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout or ():
            file.write(line)
            if ' Epoch(' in line:  # mmengine's lines of progress and metrics
                print(line[line.index('Epoch(') :].rstrip(), flush=True)
    if process.wait() != 0:
        print(''.join(log.read_text().splitlines(keepends=True)[-30:]))
        raise SystemExit(f'error: tools/{tool} failed; its whole output is in {log}')


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def write_sheet(paths: list[Path], out: Path) -> None:
    """Joins images of one size to one image, in rows."""
    images: list[Any] = [cv2.imread(str(path)) for path in paths]
    images += [np.zeros_like(images[0])] * (-len(images) % SHEET_COLUMNS)
    rows = [np.hstack(images[i : i + SHEET_COLUMNS]) for i in range(0, len(images), SHEET_COLUMNS)]
    cv2.imwrite(str(out), np.vstack(rows))


if __name__ == '__main__':
    main()
