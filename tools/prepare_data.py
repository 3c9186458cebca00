"""Checks a data set before a long run: read-only, names every file that will make trouble.

    python tools/prepare_data.py coco                 # data/coco
    python tools/prepare_data.py ade --root /data/ADEChallengeData2016

Reads every annotation and decodes every image, in as many processes as there are cores, and ends
with exit status 1 if there are errors. An error would stop a run or spoil its result; a note is
worth knowing (such as a count that is not the official one). Says what to download, and where each
file goes, if something is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from common.data_layout import (
    ADE_CLASSES,
    ADE_IMAGES,
    ADE_SPLITS,
    COCO_IDS,
    COCO_IMAGES,
    COCO_OBJECTS,
    COCO_SPLITS,
    DEFAULT_ROOT,
    HOW_TO_GET,
)
from PIL import ExifTags, Image
from rich.progress import track

TOLERANCE = 1.0  # pixels that official boxes and polygons lie outside their image by rounding
NEEDED_FIELDS = {
    'images': {'id', 'file_name', 'width', 'height'},
    'annotations': {'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'},
    'categories': {'id', 'name'},
}
SHOWN = 10  # findings of a kind that are printed; the report file holds all


class Report:
    """Errors and notes by kind, such as 'image cannot be read'."""

    def __init__(self) -> None:
        self.errors: dict[str, list[str]] = defaultdict(list)
        self.notes: dict[str, list[str]] = defaultdict(list)

    def lines(self, most: int | None = None) -> Iterator[str]:
        """The whole report, with at most so many findings of each kind."""
        for title, findings in (('ERROR', self.errors), ('note', self.notes)):
            for kind, items in findings.items():
                yield f'{title}: {kind} ({len(items)})'
                yield from (f'    {item}' for item in items[:most])
                if most is not None and len(items) > most:
                    yield f'    ... and {len(items) - most} more'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('dataset', choices=CHECKS)
    parser.add_argument('--root', type=Path, help=f'default: {DEFAULT_ROOT}')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    parser.add_argument('--report', type=Path, help='file to write the whole report to')
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f'--workers must be at least 1, got {args.workers}')
    root = args.root or Path(DEFAULT_ROOT[args.dataset])

    report = Report()
    CHECKS[args.dataset](root, report, args.workers)
    if args.report is not None:
        args.report.write_text(''.join(f'{line}\n' for line in report.lines()))
    print('\n'.join(report.lines(SHOWN)))
    if report.errors:
        if any('missing' in kind for kind in report.errors):
            print('\n' + HOW_TO_GET[args.dataset].format(root=root))
        raise SystemExit(f'\n{root} is not ready: errors of {len(report.errors)} kinds, see above')
    print(f'{root} is ready')


def map_files(
    function: Callable, *columns: Iterable, count: int, workers: int, title: str
) -> Iterator:
    """`map` over rows of arguments, in processes, with a progress bar."""
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(function, *columns, chunksize=32)
        yield from track(results, description=title, total=count)


# ------------------------------------------------------------------------------------------- COCO
def check_coco(root: Path, report: Report, workers: int) -> None:
    """COCO's layout: annotation files of both splits, and the images that they name."""
    for split, name in COCO_SPLITS.items():
        content = read_coco_file(root / f'annotations/instances_{name}.json', report)
        if content is None:
            continue
        check_categories(content['categories'], f'instances_{name}.json', report)
        check_objects(content, f'instances_{name}.json', report)
        images = content['images']
        for what, found, official in (
            ('images', len(images), COCO_IMAGES[split]),
            ('annotations', len(content['annotations']), COCO_OBJECTS[split]),
        ):
            if found != official:
                text = f'{name}: {found:,} {what}, {official:,} in the official files'
                report.notes['not the official count'].append(text)
        paths = [root / name / image['file_name'] for image in images]
        sizes = [(image['width'], image['height']) for image in images]
        for findings in map_files(
            check_image, paths, sizes, count=len(paths), workers=workers, title=name
        ):
            for kind, item in findings:
                report.errors[kind].append(item)


def read_coco_file(path: Path, report: Report) -> dict | None:
    """The content of an annotation file, or None and an error."""
    if not path.is_file():
        report.errors['annotation file is missing'].append(str(path))
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # also of an encoding that is not UTF-8
        report.errors['annotation file is not JSON (cut off?)'].append(f'{path}: {error}')
        return None
    for key, fields in NEEDED_FIELDS.items():
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list):
            report.errors['annotation file has no list of such name'].append(f'{path}: {key}')
            return None
        for index, record in enumerate(records):
            missing = fields - set(record) if isinstance(record, dict) else fields
            if missing:
                text = f'{path}: {key}[{index}] has no {", ".join(sorted(missing))}'
                report.errors['record without a needed field'].append(text)
                return None
    return content


def check_categories(categories: list[dict], where: str, report: Report) -> None:
    found = {category['name']: category['id'] for category in categories}
    for name in sorted(COCO_IDS.keys() | found.keys()):
        if found.get(name) != COCO_IDS.get(name):
            text = f'{where}: {name!r} has id {found.get(name)}, official is {COCO_IDS.get(name)}'
            report.errors["category is not COCO's (recipes and metric need all 80)"].append(text)


def check_objects(content: dict, where: str, report: Report) -> None:
    """Boxes, masks and references of all annotations."""
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    names = {image['id']: image['file_name'] for image in content['images']}
    category_ids = {category['id'] for category in content['categories']}
    for kind, ids in (
        ('image', [image['id'] for image in content['images']]),
        ('annotation', [annotation['id'] for annotation in content['annotations']]),
    ):
        if len(set(ids)) < len(ids):
            text = f'{where}: {len(ids) - len(set(ids))} {kind}s'
            report.errors['id is used twice'].append(text)
    for annotation in content['annotations']:
        image_id = annotation['image_id']
        item = f'{where}: annotation {annotation["id"]} of {names.get(image_id, image_id)}'
        if image_id not in sizes:
            report.errors['annotation of an unknown image'].append(item)
            continue
        if annotation['category_id'] not in category_ids:
            text = f'{item}: {annotation["category_id"]}'
            report.errors['annotation of an unknown category'].append(text)
        for kind, is_error in faults_of_object(annotation, *sizes[image_id]):
            findings = report.errors if is_error else report.notes
            findings[kind].append(item)
    empty = set(sizes) - {annotation['image_id'] for annotation in content['annotations']}
    if empty:
        report.notes['images without objects (not used in training)'].append(
            f'{where}: {len(empty):,} images'
        )


def faults_of_object(annotation: dict, width: float, height: float) -> Iterator[tuple[str, bool]]:
    """Kind of each fault of an annotation, and whether it is an error."""
    box = annotation['bbox']
    if len(box) != 4 or not all(is_number(value) for value in box):
        yield 'box is not four finite numbers', True
    else:
        x, y, w, h = box
        if w < 0 or h < 0:
            yield 'box of negative size', True
        elif w < 1 or h < 1:
            yield 'box thinner than a pixel (not used in training)', False
        if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
            yield 'box outside its image', True
    if annotation['iscrowd'] not in (0, 1):
        yield 'iscrowd is neither 0 nor 1', True
    mask = annotation.get('segmentation')
    if isinstance(mask, dict):
        if tuple(mask.get('size', ())) != (height, width):
            yield 'mask of another size than its image', True
    elif not isinstance(mask, list) or not mask:
        yield 'object without a mask', True
    else:
        for polygon in mask:
            if len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
                yield 'polygon is not three points or more', True
                continue
            xs, ys = polygon[::2], polygon[1::2]
            if (
                min(polygon) < -TOLERANCE
                or max(xs) > width + TOLERANCE
                or max(ys) > height + TOLERANCE
            ):
                yield 'polygon outside its image', True


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image as OpenCV loads it, rotated as its EXIF data say."""
    width, height = image.size
    is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if is_on_its_side else (width, height)


def check_image(path: Path, size: tuple[int, int] | None) -> list[tuple[str, str]]:
    """Kind and text of what is wrong with an image file.

    `size` is (width, height) as annotated, if known: of the image turned as its EXIF data say.
    """
    if not path.is_file():
        return [('image is missing', str(path))]
    try:
        with Image.open(path) as image:
            image.load()
            found = oriented_size(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return [('image cannot be read', f'{path}: {error}')]
    if size is not None and found != size:
        return [('image of another size than annotated', f'{path}: {found}, not {size}')]
    return []


# ---------------------------------------------------------------------------------------- ADE20K
def check_ade(root: Path, report: Report, workers: int) -> None:
    """ADE20K's layout: for each image a label picture of the same name, with values up to 150."""
    for split, name in ADE_SPLITS.items():
        images, labels = root / 'images' / name, root / 'annotations' / name
        missing = [folder for folder in (images, labels) if not folder.is_dir()]
        if missing:
            report.errors['folder is missing'].extend(map(str, missing))
            continue
        stems = {path.stem for path in images.glob('*.jpg')}
        label_stems = {path.stem for path in labels.glob('*.png')}
        for stem in sorted(stems - label_stems):
            report.errors['label picture is missing'].append(str(labels / f'{stem}.png'))
        for stem in sorted(label_stems - stems):
            report.errors['image is missing'].append(str(images / f'{stem}.jpg'))
        others = [p for p in sorted(images.iterdir()) if p.suffix != '.jpg']
        if others:
            report.notes['not *.jpg, hence not used'].extend(map(str, others))
        pairs = sorted(stems & label_stems)
        if not pairs:
            report.errors['images are missing'].append(str(images))
        if len(pairs) != ADE_IMAGES[split]:
            text = f'{name}: {len(pairs):,} pairs, {ADE_IMAGES[split]:,} in the official files'
            report.notes['not the official count'].append(text)
        present: set[int] = set()
        for findings, values in map_files(
            check_pair, pairs, repeat(images), repeat(labels),
            count=len(pairs), workers=workers, title=name,
        ):  # fmt: skip
            present |= values
            for kind, item in findings:
                report.errors[kind].append(item)
        classes = len(present - {0})
        if classes < ADE_CLASSES:
            text = f'{name}: {classes} of {ADE_CLASSES}'
            report.notes['classes that occur'].append(text)


def check_pair(stem: str, images: Path, labels: Path) -> tuple[list[tuple[str, str]], set[int]]:
    """What is wrong with an image and its labels, and the values of the labels."""
    path = labels / f'{stem}.png'
    findings = check_image(images / f'{stem}.jpg', None) + check_image(path, None)
    if findings:
        return findings, set()
    with Image.open(images / f'{stem}.jpg') as image:
        size = oriented_size(image)
    with Image.open(path) as label_image:
        label_size, mode = label_image.size, label_image.mode
        values = set(np.unique(np.asarray(label_image)).tolist()) if mode in ('L', 'P') else set()
    if mode not in ('L', 'P'):
        findings.append(('label picture is not of one channel with 8 bits', f'{path}: {mode}'))
    elif max(values) > ADE_CLASSES:
        findings.append((f'label above {ADE_CLASSES}', f'{path}: {max(values)}'))
    if size != label_size:
        text = f'{path}: {label_size}, its image is {size}'
        findings.append(('labels of another size than their image', text))
    return findings, values


CHECKS: dict[str, Callable[[Path, Report, int], None]] = {'coco': check_coco, 'ade': check_ade}

if __name__ == '__main__':
    main()
