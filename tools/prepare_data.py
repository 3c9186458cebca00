"""Checks a dataset before a long run: reads it, changes nothing, names every bad file.

    python tools/prepare_data.py coco                 # data/coco
    python tools/prepare_data.py ade --root /data/ADEChallengeData2016
    python tools/prepare_data.py camvid               # also bccd; see docs/public_data.md
    python tools/prepare_data.py configs/custom/mask_rcnn_shapes.py     # the data of any config

For COCO, ADE20K, BCCD and CamVid in the layouts that the recipes expect, reads every annotation and
decodes every image, in as many processes as there are cores. An error would stop a run or spoil its
result, and makes the exit status 1. A note is worth knowing, such as a count that is not the
official one. If files are missing, the tool says what to download and where each file goes.

For a config, loads every sample of its training and validation data as a run would, names those
that cannot be used, and prints the census that a run logs, here of all masks.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from common import at_least, parser_of
from common.cli import add_config_arguments, check_files, load_config
from common.data_layout import (
    ADE,
    BCCD_CLASSES,
    BCCD_IMAGES,
    CAMVID,
    COCO_IDS,
    COCO_IMAGES,
    COCO_OBJECTS,
    COCO_SPLITS,
    DEFAULT_ROOT,
    HOW_TO_GET,
    LabelledImages,
)
from mmengine.registry import init_default_scope
from PIL import ExifTags, Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from mmconv2former.compat.annotation_files import wrong_numbers
from mmconv2former.datasets.census import take_census
from mmconv2former.datasets.census_hook import folder_classes, follow
from mmconv2former.datasets.checked import CheckedDataset, DataError
from mmconv2former.images import open_image
from mmconv2former.text import printable

TOLERANCE = 1.0  # pixels by which official boxes and polygons exceed their image, by rounding
NEEDED_FIELDS = {
    'images': {'id', 'file_name', 'width', 'height'},
    'annotations': {'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'},
    'categories': {'id', 'name'},
}
THIN_BOX = 'box thinner than a pixel (not used in training)'  # not an error
VOC_BOX = ('xmin', 'ymin', 'xmax', 'ymax')
SHOWN = 10  # findings of a kind that are printed; the report file has all


class Finding(NamedTuple):
    """Something found in a dataset: its kind, the file or annotation, and whether it is fatal."""

    kind: str
    item: str
    is_error: bool = True


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument('dataset', help=f'{", ".join(CHECKS)}, or a config file')
    parser.add_argument(
        '--root',
        type=Path,
        help=f'folder (default: that of the config, or {", ".join(DEFAULT_ROOT.values())})',
    )
    parser.add_argument(
        '--workers',
        type=at_least(1),
        default=os.cpu_count(),
        help='number of processes (default: one per core)',
    )
    parser.add_argument('--report', type=Path, help='file for the whole report')
    args = parser.parse_args(argv)
    if args.report is not None:
        try:
            args.report.open('a').close()  # an earlier report is kept until then
        except OSError as error:
            parser.error(f'--report {args.report} cannot be written: {error.strerror}')
    if args.dataset in CHECKS:
        root = args.root or Path(DEFAULT_ROOT[args.dataset])
        found_all = CHECKS[args.dataset](root, args.workers)
    elif args.dataset.endswith('.py'):
        root = Path(args.dataset)
        found_all = check_config_data(args.dataset, args.root, args.workers)
    else:
        parser.error(f'{args.dataset!r} is none of {", ".join(CHECKS)}, and no config (*.py)')

    items: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for finding in found_all:
        items[not finding.is_error, finding.kind].append(finding.item)
    print('\n'.join(report(items, SHOWN)))
    if args.report is not None:
        args.report.write_text(''.join(f'{line}\n' for line in report(items)))
    errors = [kind for is_note, kind in items if not is_note]
    if errors:
        if args.dataset in CHECKS and any('missing' in kind for kind in errors):
            print('\n' + HOW_TO_GET[args.dataset].format(root=root))
        found = '1 kind' if len(errors) == 1 else f'{len(errors)} kinds'
        raise SystemExit(f'\n{root} is not ready: {found} of errors, see above')
    print(f'{root} is ready')


def report(items: dict[tuple[bool, str], list[str]], most: int | None = None) -> Iterator[str]:
    """The lines of a report, errors first, with a maximum number of findings of each kind."""
    for (is_note, kind), found in sorted(items.items(), key=lambda entry: entry[0][0]):
        yield f'{"note" if is_note else "ERROR"}: {kind} ({len(found)})'
        yield from (f'    {printable(item)}' for item in found[:most])
        if most is not None and len(found) > most:
            yield f'    ... and {len(found) - most} more'


def map_files(function: Callable, rows: list[tuple], workers: int, title: str) -> Iterator:
    """Calls a function with each row of arguments, in processes, with a progress bar."""
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(function, *zip(*rows), chunksize=32)
        yield from track(results, description=title, total=len(rows))


def other_count(split: str, what: str, found: Sequence, official: int) -> Iterator[Finding]:
    """A note if a split has more or fewer of something than the official files."""
    if len(found) != official:
        text = f'{split}: {len(found):,} {what}, {official:,} in the official files'
        yield Finding('not the official count', text, is_error=False)


# ------------------------------------------------------------------------------------------- COCO
def check_coco(root: Path, workers: int) -> Iterator[Finding]:
    """COCO's layout: annotation files of both splits, and the images that they name."""
    for split, name in COCO_SPLITS.items():
        path = root / f'annotations/instances_{name}.json'
        problem = find_format_problem(path)
        if problem is not None:
            yield problem
            continue
        content = json.loads(path.read_text())
        yield from check_categories(content['categories'], path.name)
        yield from check_objects(content, path.name)
        images = content['images']
        yield from other_count(name, 'images', images, COCO_IMAGES[split])
        yield from other_count(name, 'annotations', content['annotations'], COCO_OBJECTS[split])
        rows = [
            (root / name / image['file_name'], (image['width'], image['height']))
            for image in images
        ]
        for findings in map_files(check_image, rows, workers, name):
            yield from findings


def find_format_problem(path: Path) -> Finding | None:
    """Problems that make an annotation file unreadable."""
    if not path.is_file():
        return Finding('annotation file is missing', str(path))
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # also of an encoding that is not UTF-8
        return Finding('annotation file is not JSON (truncated?)', f'{path}: {error}')
    for key, fields in NEEDED_FIELDS.items():
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list):
            return Finding('annotation file lacks a list', f'{path}: {key}')
        for index, record in enumerate(records):
            missing = fields - set(record) if isinstance(record, dict) else fields
            if missing:
                text = f'{path}: {key}[{index}] has no {", ".join(sorted(missing))}'
                return Finding('record lacks a needed field', text)
    return None


def check_categories(categories: list[dict], where: str) -> Iterator[Finding]:
    found = {category['name']: category['id'] for category in categories}
    for name in sorted(COCO_IDS.keys() | found.keys()):
        if found.get(name) != COCO_IDS.get(name):
            text = f'{where}: {name!r} has id {found.get(name)}, official is {COCO_IDS.get(name)}'
            yield Finding("category is not COCO's (recipes and metric need all 80)", text)


def check_objects(content: dict, where: str) -> Iterator[Finding]:
    """Boxes, masks and references of all annotations."""
    images = {image['id']: image for image in content['images']}
    category_ids = {category['id'] for category in content['categories']}
    for key in ('images', 'annotations'):
        ids = [record['id'] for record in content[key]]
        if len(set(ids)) < len(ids):
            yield Finding('id is used twice', f'{where}: {len(ids) - len(set(ids))} {key}')
    for annotation in content['annotations']:
        image = images.get(annotation['image_id'])
        name = annotation['image_id'] if image is None else image['file_name']
        item = f'{where}: annotation {annotation["id"]} of {name}'
        if image is None:
            yield Finding('annotation of an unknown image', item)
            continue
        if annotation['category_id'] not in category_ids:
            text = f'{item}: {annotation["category_id"]}'
            yield Finding('annotation of an unknown category', text)
        problems = [*wrong_numbers([image], [annotation])]
        if problems:
            for problem in problems:
                yield Finding('annotation has a wrong value', f'{item}: {problem}')
            continue
        size = image['width'], image['height']
        for kind in (*box_errors(annotation['bbox'], *size), *mask_errors(annotation, *size)):
            yield Finding(kind, item, is_error=kind != THIN_BOX)
    empty = set(images) - {annotation['image_id'] for annotation in content['annotations']}
    if empty:
        kind = 'images without objects (not used in training)'
        yield Finding(kind, f'{where}: {len(empty):,} images', is_error=False)


def box_errors(box: Sequence[float], width: float, height: float) -> Iterator[str]:
    x, y, w, h = box
    if w < 0 or h < 0:
        yield 'box of negative size'
    elif w < 1 or h < 1:
        yield THIN_BOX
    if not is_inside([x, x + w], [y, y + h], width, height):
        yield 'box outside its image'


def mask_errors(annotation: dict, width: float, height: float) -> Iterator[str]:
    mask = annotation.get('segmentation')
    if not mask or not isinstance(mask, (dict, list)):
        yield 'object without a mask'
    elif isinstance(mask, list):
        for polygon in mask:
            if len(polygon) < 6 or len(polygon) % 2:
                yield 'polygon is not three points or more'
            elif not is_inside(polygon[::2], polygon[1::2], width, height):
                yield 'polygon outside its image'


def is_inside(xs: Sequence[float], ys: Sequence[float], width: float, height: float) -> bool:
    """Whether all coordinates are within an image and a tolerance around it."""
    return all(  # false for NaN
        -TOLERANCE <= value <= size + TOLERANCE
        for values, size in ((xs, width), (ys, height))
        for value in values
    )


# ------------------------------------------------------------------------------------------ images
def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image as OpenCV loads it, rotated as its EXIF data say."""
    width, height = image.size
    is_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if is_on_its_side else (width, height)


def check_image(path: Path, size: tuple[int, int] | None) -> list[Finding]:
    """What is wrong with an image file.

    Args:
        path: The file.
        size: Annotated width and height, if known, of the image rotated as its EXIF data say.
    """
    if not path.is_file():
        return [Finding('image is missing', str(path))]
    try:
        with open_image(path) as image:
            image.load()
        found = oriented_size(image)
    except (OSError, SyntaxError, ValueError) as error:
        return [Finding('image cannot be read', f'{path}: {error}')]
    if size is not None and found != size:
        return [Finding('image of another size than annotated', f'{path}: {found}, not {size}')]
    return []


# ------------------------------------------------------------------------------------------- BCCD
def check_bccd(root: Path, workers: int) -> Iterator[Finding]:
    """BCCD's layout: lists of images, and for each image a file of boxes in VOC's form."""
    for split, official in BCCD_IMAGES.items():
        path = root / f'ImageSets/Main/{split}.txt'
        if not path.is_file():
            yield Finding('list of images is missing', str(path))
            continue
        names = path.read_text().split()
        yield from other_count(split, 'images', names, official)
        rows = [(root, name) for name in names]
        for findings in map_files(check_voc_image, rows, workers, split):
            yield from findings


def check_voc_image(root: Path, name: str) -> list[Finding]:
    """What is wrong with an image and its file of boxes."""
    path = root / f'Annotations/{name}.xml'
    if not path.is_file():
        return [Finding('annotation file is missing', str(path))]
    try:
        content = ElementTree.parse(path)
        size = tuple(int(content.findtext(f'size/{side}', '')) for side in ('width', 'height'))
        objects = [
            (one.findtext('name'), [float(one.findtext(f'bndbox/{key}', '')) for key in VOC_BOX])
            for one in content.iterfind('object')
        ]
    except (ElementTree.ParseError, ValueError) as error:
        return [Finding('annotation file cannot be read', f'{path}: {error}')]
    findings = check_image(root / f'JPEGImages/{name}.jpg', (size[0], size[1]))
    if not objects:
        findings.append(Finding('image without objects', str(path), is_error=False))
    for class_name, box in objects:
        item = f'{path}: {class_name} {box}'
        if class_name not in BCCD_CLASSES:
            findings.append(Finding(f'class is none of {", ".join(BCCD_CLASSES)}', item))
        left, top, right, bottom = box
        for kind in box_errors([left, top, right - left, bottom - top], *size):
            findings.append(Finding(kind, item, is_error=kind != THIN_BOX))
    return findings


# ------------------------------------------------------------------------------ ADE20K and CamVid
def check_labelled_images(root: Path, workers: int, dataset: LabelledImages) -> Iterator[Finding]:
    """For each image a label image of the same name, with known labels."""
    for name, official in dataset.images.items():
        images, labels = root / 'images' / name, root / 'annotations' / name
        missing = [folder for folder in (images, labels) if not folder.is_dir()]
        if missing:
            yield from (Finding('folder is missing', str(folder)) for folder in missing)
            continue
        stems = {path.stem for path in images.glob('*.jpg')}
        label_stems = {path.stem for path in labels.glob('*.png')}
        for stem in sorted(stems - label_stems):
            yield Finding('label image is missing', str(labels / f'{stem}.png'))
        for stem in sorted(label_stems - stems):
            yield Finding('image is missing', str(images / f'{stem}.jpg'))
        for path in sorted(images.iterdir()):
            if path.suffix != '.jpg':
                yield Finding('not *.jpg, so not used', str(path), is_error=False)
        pairs = sorted(stems & label_stems)
        if not pairs:
            yield Finding('images are missing', str(images))
        yield from other_count(name, 'pairs', pairs, official)
        present: set[int] = set()
        last = max(*dataset.classes, dataset.void)
        rows = [(stem, images, labels, last) for stem in pairs]
        for findings, values in map_files(check_pair, rows, workers, name):
            present |= values
            yield from findings
        classes = len(present & set(dataset.classes))
        if classes < len(dataset.classes):
            text = f'{name}: {classes} of {len(dataset.classes)}'
            yield Finding('classes that occur', text, is_error=False)


def check_pair(stem: str, images: Path, labels: Path, last: int) -> tuple[list[Finding], set[int]]:
    """What is wrong with an image and its labels up to `last`, and the values of the labels."""
    path = labels / f'{stem}.png'
    findings = check_image(images / f'{stem}.jpg', None) + check_image(path, None)
    if findings:
        return findings, set()
    with open_image(images / f'{stem}.jpg') as image, open_image(path) as label_image:
        size, label_size, mode = oriented_size(image), label_image.size, label_image.mode
        values = set(np.unique(np.asarray(label_image)).tolist()) if mode in ('L', 'P') else set()
    if mode not in ('L', 'P'):
        findings.append(Finding('label image is not one channel with 8 bits', f'{path}: {mode}'))
    elif max(values) > last:
        findings.append(Finding(f'label above {last}', f'{path}: {max(values)}'))
    if size != label_size:
        text = f'{path}: {label_size}, its image is {size}'
        findings.append(Finding('labels of another size than their image', text))
    return findings, values


# --------------------------------------------------------------------------------------- any config
def check_config_data(config_path: str, root: Path | None, workers: int) -> Iterator[Finding]:
    """The training and validation data of a config: the census, and every sample loaded once."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.set_defaults(config=config_path, data_root=root and str(root))
    config = load_config(parser.parse_args([]), ('train_dataloader',))
    check_files(config, ['train_dataloader', 'val_dataloader'])
    init_default_scope(config.get('default_scope') or 'mmengine')
    datasets: dict[str, CheckedDataset] = {}
    for split in ('train', 'val'):
        loader = config.get(f'{split}_dataloader')
        try:
            if loader is not None:
                datasets[split] = CheckedDataset(loader.dataset)
        except DataError as error:
            yield Finding('dataset cannot be read', str(error))
    if 'train' in datasets and 'val' in datasets:
        follow(datasets['val'], folder_classes(datasets['train']))
    is_usable = True
    for split, dataset in datasets.items():
        loader = DataLoader(Samples(dataset), batch_size=None, num_workers=workers, collate_fn=str)
        for text in track(loader, description=split, total=len(dataset)):
            if text:
                is_usable = False
                yield Finding('sample cannot be used', f'{split}: {text}')
    try:
        census = take_census(datasets, masks_read=None, workers=workers)
    except DataError as error:
        if is_usable:  # otherwise it is named above
            yield Finding('labels cannot be counted', str(error))
        return
    print('\n'.join(census.lines))
    yield from (Finding('cannot be trained on', text) for text in census.problems)
    yield from (Finding('odd', text, is_error=False) for text in census.oddities)


class Samples(Dataset):
    """What is wrong with each sample of a dataset; '' if it can be used."""

    def __init__(self, dataset: CheckedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            _ = self.dataset[index]
        except DataError as error:
            return str(error)
        return ''


CHECKS: dict[str, Callable[[Path, int], Iterator[Finding]]] = {
    'coco': check_coco,
    'ade': partial(check_labelled_images, dataset=ADE),
    'bccd': check_bccd,
    'camvid': partial(check_labelled_images, dataset=CAMVID),
}

if __name__ == '__main__':
    main()
