"""The main job from nothing: Mask R-CNN with Conv2Former-T on the embedded sample.

    python tools/demo.py

Makes the sample, evaluates the untrained network, trains the COCO recipe with the overrides below,
evaluates on held-out pictures, draws predictions and curves. Every command is printed as it can be
pasted. docs/demo.md says what each override is for. Replaces data/sample and work_dirs/demo of the
current folder, unless told to write elsewhere.
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
CONFIG = 'configs/detection/mask_rcnn_conv2former_t.py'
MODEL = [  # a smaller, faster model around the same backbone, from random weights
    'model.backbone.init_cfg=None',
    'model.backbone.layer_scale_init_value=0.1',
    'model.backbone.drop_path_rate=0',
    'model.neck.out_channels=96',
    'model.rpn_head.in_channels=96',
    'model.rpn_head.feat_channels=96',
    'model.rpn_head.anchor_generator.scales=[4]',
    'model.roi_head.bbox_roi_extractor.out_channels=96',
    'model.roi_head.mask_roi_extractor.out_channels=96',
    'model.roi_head.bbox_head.in_channels=96',
    'model.roi_head.bbox_head.fc_out_channels=256',
    'model.roi_head.mask_head.in_channels=96',
    'model.roi_head.mask_head.conv_out_channels=96',
    'model.roi_head.mask_head.num_convs=2',
    'model.train_cfg.rpn_proposal.nms_pre=500',
    'model.train_cfg.rpn_proposal.max_per_img=200',
    'model.train_cfg.rcnn.sampler.num=64',
    'model.test_cfg.rpn.nms_pre=300',
    'model.test_cfg.rpn.max_per_img=100',
]
IS_FUSED = digit_version(torch.__version__) >= digit_version('2.4')  # on a CPU
DATA_AND_SCHEDULE = [
    'test_dataloader.dataset.pipeline.1.scale=(128,128)',
    'val_dataloader.dataset.pipeline.1.scale=(128,128)',
    'train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]',
    'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(128,128)]',
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=1',
    'val_dataloader.num_workers=1',
    'test_dataloader.num_workers=1',
    'param_scheduler.0.end=60',
    'optim_wrapper.optimizer.lr=4e-4',
    f'optim_wrapper.optimizer.fused={IS_FUSED}',
    'optim_wrapper.paramwise_cfg.decay_rate=1.0',
    'default_hooks.logger.interval=20',
]
METRICS = {
    'box AP': 'coco/bbox_mAP',
    'box AP50': 'coco/bbox_mAP_50',
    'mask AP': 'coco/segm_mAP',
    'mask AP50': 'coco/segm_mAP_50',
}
PICTURES = 9  # in the sheet of predictions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, default='data/sample', help='for the sample')
    parser.add_argument('--work-dir', type=Path, default=WORK_DIR)
    parser.add_argument('--train', type=int, default=240, help='training pictures')
    parser.add_argument('--val', type=int, default=60, help='held-out pictures')
    parser.add_argument('--epochs', type=int, default=10)
    args = parser.parse_args()
    start = time.time()
    work_dir = args.work_dir
    if work_dir == WORK_DIR:
        shutil.rmtree(work_dir, ignore_errors=True)
    elif work_dir.exists():
        parser.error(f'--work-dir {work_dir} exists already')
    work_dir.mkdir(parents=True)
    overrides = [*MODEL, *DATA_AND_SCHEDULE, *schedule(args.epochs)]
    config = os.path.relpath(ROOT / CONFIG)
    common = ['--data-root', str(args.data / 'coco'), '--cfg-options', *overrides]

    def run(tool: str, *arguments: str) -> None:
        run_tool(tool, *arguments, log=work_dir / f'{Path(tool).stem}.log')

    counts = ['--train', str(args.train), '--val', str(args.val)]
    run('make_sample.py', str(args.data), *counts)
    run('test.py', config, 'none', '--work-dir', str(work_dir / 'untrained'), *common)
    untrained = read_metrics(work_dir / 'untrained')
    train_start = time.time()
    run('train.py', config, '--work-dir', str(work_dir / 'train'), *common)
    train_minutes = (time.time() - train_start) / 60
    checkpoint = (work_dir / 'train/last_checkpoint').read_text()
    test_options = ['--work-dir', str(work_dir / 'trained'), '--show-dir', 'pictures']
    run('test.py', config, checkpoint, *test_options, *common)
    trained = read_metrics(work_dir / 'trained')
    run('plot_curves.py', str(work_dir / 'train'), '--out', str(work_dir / 'curves.png'))
    pictures = newest(work_dir / 'trained', '*/pictures')
    write_sheet(sorted(pictures.iterdir())[:PICTURES], work_dir / 'predictions.png')

    print(f'\nHeld-out pictures, {train_minutes:.1f} minutes of training:')
    print(f'{"":12}' + ''.join(f'{name:>12}' for name in METRICS))
    for name, metrics in (('untrained', untrained), ('trained', trained)):
        values = (metrics.get(key, 0.0) for key in METRICS.values())  # absent without detections
        print(f'{name:12}' + ''.join(f'{value:12.3f}' for value in values))
    print(f'\npredictions beside the truth   {work_dir}/predictions.png (all: {pictures})')
    print(f'curves of loss and AP          {work_dir}/curves.png')
    print(f'checkpoint                     {checkpoint}')
    print(f'{(time.time() - start) / 60:.1f} minutes in all')


def schedule(epochs: int) -> list[str]:
    """Overrides for a training of `epochs`, with the rate's steps after 80% and 90% of it."""
    every = max(1, epochs // 5)
    return [
        f'train_cfg.max_epochs={epochs}',
        f'train_cfg.val_interval={every}',
        f'default_hooks.checkpoint.interval={every}',
        f'param_scheduler.1.end={epochs}',
        f'param_scheduler.1.milestones=[{epochs * 8 // 10},{epochs * 9 // 10}]',
    ]


def run_tool(tool: str, *args: str, log: Path) -> None:
    """Runs a tool; shows the lines of progress and results, keeps all of them in a log.

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
        raise SystemExit(f'error: tools/{tool} failed; all it printed is in {log}')


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics of the newest evaluation in a work dir."""
    return json.loads(newest(work_dir, '*/*.json').read_text())


def write_sheet(paths: list[Path], out: Path, columns: int = 3) -> None:
    """One picture of several of the same size, in rows."""
    pictures: list[Any] = [cv2.imread(str(path)) for path in paths]
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    cv2.imwrite(str(out), np.vstack(rows))


if __name__ == '__main__':
    main()
