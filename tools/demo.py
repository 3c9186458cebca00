"""Trains Mask R-CNN with Conv2Former-N from scratch on the embedded sample.

    python tools/demo.py

Makes the sample, evaluates the untrained network, trains configs/demo/mask_rcnn_demo.py, evaluates
on held-out images, and draws predictions and curves. The first line of each log in the work dir is
the command that wrote it. docs/demo.md explains the config. Replaces data/sample and work_dirs/demo
of the current folder, unless told to write elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import parser_of
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]
WORK_DIR = Path('work_dirs/demo')
CONFIG = 'configs/demo/mask_rcnn_demo.py'
# On a CPU. torch itself is not imported, which would take seconds without a word.
HAS_FUSED_ADAMW = [int(number) for number in version('torch').split('.')[:2]] >= [2, 4]
METRICS = {
    'box AP': 'coco/bbox_mAP',
    'box AP50': 'coco/bbox_mAP_50',
    'mask AP': 'coco/segm_mAP',
    'mask AP50': 'coco/segm_mAP_50',
}
# Values that are shown of mmengine's lines of progress, which have many more.
SHOWN = {
    'loss': 'loss',
    'coco/bbox_mAP_50': 'box AP50',
    'coco/segm_mAP_50': 'mask AP50',
    'eta': 'time left',
}
SHEET_COLUMNS, SHEET_ROWS = 3, 3
MIN_SCORE = 0.5  # of a drawn prediction
GAP, PAIR_GAP, HEADER = 4, 24, 32  # pixels
COLOURS = [(60, 20, 220), (80, 160, 0), (200, 110, 0), (0, 150, 240), (170, 40, 150)]  # BGR
FONT: dict[str, Any] = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.5, color=(0, 0, 0))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('--data', type=Path, default='data/sample', help='folder for the sample')
    parser.add_argument('--work-dir', type=Path, default=WORK_DIR)
    parser.add_argument('--train', type=int, default=240, help='number of training images')
    parser.add_argument('--val', type=int, default=60, help='number of held-out images')
    parser.add_argument('--epochs', type=int, default=11)
    args = parser.parse_args()
    try:
        demo(args, parser.error)
    except KeyboardInterrupt:
        raise SystemExit(f'stopped; logs are in {args.work_dir}') from None


def demo(args: argparse.Namespace, refuse: Callable[[str], Any]) -> None:
    start = time.time()
    work_dir = args.work_dir
    if work_dir == WORK_DIR:
        shutil.rmtree(work_dir, ignore_errors=True)
    elif work_dir.exists():
        refuse(f'--work-dir {work_dir} already exists')
    work_dir.mkdir(parents=True)

    def run(title: str, tool: str, *arguments: object, log: str) -> None:
        print(f'{title} ...', flush=True)
        run_tool(tool, *map(str, arguments), log=work_dir / log)

    config = os.path.relpath(ROOT / CONFIG)
    data = ['--data-root', args.data / 'coco']
    options = [
        '--cfg-options',
        f'train_cfg.max_epochs={args.epochs}',
        f'optim_wrapper.optimizer.fused={HAS_FUSED_ADAMW}',
    ]
    counts = ['--train', args.train, '--val', args.val]
    run('1/5 Making images', 'make_sample.py', args.data, *counts, log='sample.log')
    test_options = ['--work-dir', work_dir / 'untrained', *data]
    run('2/5 Evaluating random weights', 'test.py', config, 'none', *test_options,
        log='untrained.log')  # fmt: skip
    train_start = time.time()
    run('3/5 Training', 'train.py', config, '--work-dir', work_dir / 'train', *data, *options,
        log='train.log')  # fmt: skip
    train_minutes = (time.time() - train_start) / 60
    checkpoint = (work_dir / 'train/last_checkpoint').read_text()
    predictions = work_dir / 'predictions.pkl'
    test_options = ['--work-dir', work_dir / 'trained', '--show-dir', 'pictures',
                    '--out', predictions, *data]  # fmt: skip
    run('4/5 Evaluating trained weights', 'test.py', config, checkpoint, *test_options,
        log='trained.log')  # fmt: skip
    run('5/5 Drawing', 'plot_curves.py', work_dir / 'train', '--out', work_dir / 'curves.png',
        log='curves.log')  # fmt: skip
    drawings = newest(work_dir / 'trained', '*/pictures')
    annotations = args.data / 'coco/annotations/instances_val2017.json'
    write_sheet(predictions, annotations, work_dir / 'predictions.png')

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
    predict = ['predict', work_dir / 'train' / Path(CONFIG).name, checkpoint,
               args.data / 'coco/val2017', '--out', work_dir / 'predict']  # fmt: skip
    # Also works where there is no clone.
    print(f'\nTry it on other images: python -m mmconv2former {shlex.join(map(str, predict))}')


def run_tool(tool: str, *args: str, log: Path) -> None:
    """Runs a tool, shows its progress and results, and writes its whole output to a log.

    Raises:
        SystemExit: The tool failed; its last lines are printed.
    """
    command = ['python', os.path.relpath(ROOT / 'tools' / tool), *args]
    with log.open('w') as file:
        print(f'$ {shlex.join(command)}', file=file, flush=True)
        command[0] = sys.executable
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            for line in process.stdout or ():
                file.write(line)
                if shown := progress(line):
                    print(f'    {shown}', flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.wait() != 0:
        print(''.join(log.read_text().splitlines(keepends=True)[-30:]))
        raise SystemExit(f'error: tools/{tool} failed; its whole output is in {log}')


def progress(line: str) -> str:
    """What to show of a line of mmengine's log; '' if it is not one of progress or metrics."""
    match = re.search(r' Epoch\(\w+\)\s+(\[\d+\])?\[([\d/ ]+)\]', line)
    if match is None:
        return ''
    epoch, position = match.groups()
    values = dict(re.findall(r'(\S+): (\S+)', line))
    shown = [f'{name} {values[key]}' for key, name in SHOWN.items() if key in values]
    place = f'epoch {epoch[1:-1]}, ' if epoch else ''
    return ', '.join([f'{place}{position.strip()}', *shown]) if shown else ''


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def write_sheet(predictions: Path, annotations: Path, out: Path) -> None:
    """Draws pairs of truth and prediction, with a header and a legend instead of labels."""
    truth = json.loads(annotations.read_text())
    classes = truth['categories']
    used = sorted({item['category_id'] for item in truth['annotations']})
    colours = {id_: COLOURS[i % len(COLOURS)] for i, id_ in enumerate(used)}
    pairs = []
    for item in pickle.loads(predictions.read_bytes())[: SHEET_COLUMNS * SHEET_ROWS]:
        image: Any = cv2.imread(item['img_path'])
        masks = [
            (coco_mask.decode(one['segmentation']), one['category_id'])
            for one in truth['annotations']
            if one['image_id'] == item['img_id']
        ]
        found = item['pred_instances']
        labels = [classes[label]['id'] for label in found['labels'].tolist()]
        predicted = [
            (coco_mask.decode(mask), label)
            for mask, label, score in zip(found['masks'], labels, found['scores'].tolist())
            if score >= MIN_SCORE
        ]
        halves = [draw(image, part, colours) for part in (masks, predicted)]
        pairs.append(np.hstack([halves[0], white(image, GAP), halves[1], white(image, PAIR_GAP)]))
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % SHEET_COLUMNS)
    rows = [np.hstack(pairs[i : i + SHEET_COLUMNS]) for i in range(0, len(pairs), SHEET_COLUMNS)]
    gap = np.full_like(rows[0][:GAP], 255)
    band = np.full_like(rows[0][:1], 255).repeat(HEADER, axis=0)
    header, legend = band, band.copy()
    half, pair = image.shape[1], pairs[0].shape[1]
    for left in range(0, header.shape[1], pair):
        for text, x in (('truth', left), ('prediction', left + half + GAP)):
            cv2.putText(header, text, (x, HEADER - 10), **FONT)
    names = {one['id']: one['name'] for one in classes}
    for i, (id_, colour) in enumerate(colours.items()):
        x = i * half
        cv2.rectangle(legend, (x, 10), (x + 14, 24), colour, cv2.FILLED)
        cv2.putText(legend, names[id_], (x + 22, 22), **FONT)
    cv2.imwrite(
        str(out), np.vstack([header, *(part for row in rows for part in (row, gap)), legend])
    )


def white(image: np.ndarray, width: int) -> np.ndarray:
    return np.full((len(image), width, 3), 255, np.uint8)


def draw(
    image: np.ndarray, objects: list[tuple[np.ndarray, int]], colours: dict[int, tuple]
) -> np.ndarray:
    """The image with masks, by category, in their colours."""
    drawn = image.copy()
    for mask, category in objects:
        colour = colours.get(category, (0, 0, 0))  # black if no image has this category
        inside = mask.astype(bool)
        drawn[inside] = (0.5 * drawn[inside] + 0.5 * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, colour, 2)
    return drawn


if __name__ == '__main__':
    main()
