"""Counts what is in the datasets of a run, and finds what is unusual or cannot be trained on.

`take_census` counts images, objects and classes and judges the counts, `table_of` prints them.
All objects are counted, from annotations in memory. Masks are files: an evenly spaced sample
is read, unless all are requested.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .checked import DataError, leaves

MASKS_READ = 200  # of each dataset, at the start of a run
LABELS_READ = 200_000  # images of a classification set
CLASSES_SHOWN = 30  # of more classes the table has the ENDS_SHOWN largest and smallest
ENDS_SHOWN = 5
NAMES_SHOWN = 5
TOLERANCE = 1.0  # pixels by which a box may leave its image
ODD_SHARE = 0.1  # of the objects of a dataset: less is noise that any dataset has
UNTRAINED_SHARE = 0.25  # of the objects of a split, in classes without training data
IMAGE_SUFFIXES = {
    *('.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.ppm', '.pgm'),
    *('.heic', '.avif'),
}


@dataclass
class Census:
    """The counts of one dataset.

    Attributes:
        split: 'train' or 'val' ('test').
        kind: 'objects' (detection), 'pixels' (segmentation) or 'images' (classification).
        classes: Names of the classes.
        images: Images that are used.
        read: Images or masks that were counted.
        counts: Objects, pixels or images of each class that can be trained on.
        rows: Further counts for the table, by name.
        problems: What cannot be trained on, one line each.
        unusable: Why it has no usable object, which other parts of its split may make up for.
        oddities: What is worth a warning.
    """

    split: str
    kind: str
    classes: list[str]
    images: int
    read: int
    counts: list[int]
    rows: dict[str, int | str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unusable: str = ''
    oddities: list[str] = field(default_factory=list)

    @property
    def present(self) -> set[str]:
        return {name for name, count in zip(self.classes, self.counts) if count}


# ------------------------------------------------------------------------------------------ counts
def count(split: str, dataset: Any, masks_read: int | None, workers: int = 0) -> Census | None:
    """Counts one dataset without wrappers.

    Args:
        split: Its name in the table.
        dataset: A dataset of mmdet, mmseg or mmpretrain, with a `CheckedPipeline`.
        masks_read: The most masks to read; None reads all.
        workers: Processes that read masks.

    Returns:
        None if this type of dataset cannot be counted.

    Raises:
        DataError: A mask cannot be used.
    """
    classes = [str(name) for name in getattr(dataset, 'metainfo', {}).get('classes') or ()]
    if not classes or not hasattr(dataset, 'get_data_info'):
        return None
    info = dataset.get_data_info(0)
    if 'instances' in info:
        return count_objects(split, dataset, classes)
    if 'gt_label' in info:
        return count_labels(split, dataset, classes)
    if getattr(getattr(dataset, 'pipeline', None), 'has_class_labels', False):
        return count_pixels(split, dataset, classes, masks_read, workers)
    return None


def count_objects(split: str, dataset: Any, classes: list[str]) -> Census:
    """Objects of a detection dataset, as mmdet keeps them; crowded ones are not trained on."""
    labels, crowded, boxes, sizes = array('q'), array('b'), array('d'), array('d')
    empty = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        size = info.get('width', math.inf), info.get('height', math.inf)
        is_empty = True
        for item in info['instances']:
            if 'bbox_label' in item:
                is_crowd = bool(item.get('ignore_flag'))
                is_empty &= is_crowd
                labels.append(item['bbox_label'])
                crowded.append(is_crowd)
                boxes.extend(item['bbox'])
                sizes.extend(size)
        empty += is_empty
    usable = ~np.array(crowded, bool)
    numbers = np.bincount(np.array(labels, int)[usable], minlength=len(classes))
    census = Census(split, 'objects', classes, len(dataset), len(dataset), numbers.tolist())
    rows = census.rows
    if hasattr(dataset, 'all_images'):
        rows['images of the file that are not used'] = len(dataset.all_images) - len(dataset)
    rows['images without usable objects'] = empty
    rows['objects used'] = int(usable.sum())
    rows['objects crowded'] = len(labels) - int(usable.sum())
    annotated = getattr(dataset, 'cat_img_map', None)  # images of each object, by category
    if annotated is not None and getattr(dataset, '_indices', None) is None:
        ours = sum(len(annotated.get(id_, ())) for id_ in dataset.cat_ids)
        rows['objects of other categories'] = sum(map(len, annotated.values())) - ours
        dropped = ours - len(labels)
        rows['objects dropped (no area, outside)'] = dropped
        if dropped > ODD_SHARE * ours:
            census.oddities.append(f'{dropped:,} of {ours:,} objects have no area in their image')
    census.oddities += judge_boxes(np.reshape(boxes, (-1, 4)), np.reshape(sizes, (-1, 2)), rows)
    if not usable.any():
        found = 'no objects'
        if labels:
            found = f'all {len(labels):,} objects are crowded (iscrowd=1)'
        elif rows.get('objects dropped (no area, outside)'):
            found = f'all {dropped:,} objects have no area in their image (bbox, area)'
        elif annotated is not None and not any(annotated.values()):
            found = "the file's list 'annotations' is missing or empty"
        census.unusable = f'no usable object: {found}'
    return census


def judge_boxes(boxes: np.ndarray, sizes: np.ndarray, rows: dict[str, int | str]) -> Iterator[str]:
    """Counts boxes, (N, 4) as x1, y1, x2, y2, that leave their images, (N, 2) as width, height."""
    if len(boxes) == 0:
        return
    low, high = boxes[:, :2], boxes[:, 2:]
    outside = ((low < -TOLERANCE) | (high > sizes + TOLERANCE)).any(1)
    rows['boxes that leave their image'] = percent(outside.mean())
    if outside.mean() > ODD_SHARE:
        # A corner that was taken for a size is beyond the other corner.
        mark = ' and each is wider and higher than its x and y' * bool((high - low >= low).all())
        yield (
            f'{percent(outside.mean())} of the boxes leave their image{mark}: they may be written '
            'as x1, y1, x2, y2; COCO has x, y, width, height'
        )


def count_labels(split: str, dataset: Any, classes: list[str]) -> Census:
    """Images of a classification dataset; those with several labels count for each."""
    numbers = np.zeros(len(classes), int)
    indices = spread(len(dataset), LABELS_READ)
    beyond = 0
    for index in indices:
        labels = np.unique(np.atleast_1d(dataset.get_data_info(index)['gt_label'])).astype(int)
        inside = (labels >= 0) & (labels < len(classes))
        beyond += not inside.all()
        numbers[labels[inside]] += 1
    census = Census(split, 'images', classes, len(dataset), len(indices), numbers.tolist())
    if beyond:
        census.problems.append(
            f'{beyond:,} images have labels that are not a class (0 to {len(classes) - 1})'
        )
    return census


def count_pixels(
    split: str, dataset: Any, classes: list[str], most: int | None, workers: int
) -> Census:
    """Pixels of a segmentation dataset, with labels as its pipeline loads them.

    If the sample of masks has one class only, others are read until there is a second.
    """
    masks = Masks(dataset, len(classes))
    numbers = np.zeros(len(classes) + 1, int)  # the last one: ignored
    first = spread(len(dataset), len(dataset) if most is None else most)
    taken = set(first)
    rest = (index for index in range(len(dataset)) if index not in taken)
    read = 0
    for found in masks.read(first, workers):
        numbers += found
        read += 1
    if not numbers.any():  # the pipeline loads no labels
        return Census(split, 'pixels', classes, len(dataset), 0, [0] * len(classes))
    while (numbers[:-1] > 0).sum() < 2 and (index := next(rest, None)) is not None:
        numbers += masks[index]
        read += 1
    census = Census(split, 'pixels', classes, len(dataset), read, numbers[:-1].tolist())
    census.rows['masks read'] = f'{read:,} of {len(dataset):,}'
    census.rows['pixels ignored'] = percent(numbers[-1] / numbers.sum())
    if len(census.present) < 2:
        only = ''.join(f'only class {name!r}' for name in census.present) or 'no class at all'
        share = percent(numbers[-1] / numbers.sum())
        words = f'the masks have {only}; {dataset.ignore_index} is ignored ({share})'
        if numbers[-1]:
            words += f': if it is a class, write it as {max(1, len(classes) - 1)}'
        # Validation may have negative examples only.
        (census.problems if split == 'train' else census.oddities).append(words)
    return census


class Masks(Dataset):
    """Pixels of each class and ignored ones in each mask of a dataset, (classes + 1,)."""

    def __init__(self, dataset: Any, num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        labels = self.dataset.pipeline.load_labels(self.dataset.get_data_info(index))
        if labels is None:
            return np.zeros(self.num_classes + 1, int)
        is_ignored = labels == self.dataset.ignore_index
        numbers = np.bincount(labels[~is_ignored].ravel(), minlength=self.num_classes)
        return np.append(numbers, is_ignored.sum())

    def read(self, indices: Sequence[int], workers: int) -> Iterable[np.ndarray]:
        """The counts of some masks, in their order."""
        if not workers:
            return (self[index] for index in indices)
        return DataLoader(
            self, batch_size=None, sampler=indices, num_workers=workers, collate_fn=np.asarray
        )


# ------------------------------------------------------------------------------------------- files
@dataclass
class Files:
    """Files of the datasets of a split.

    Attributes:
        images: Paths of the images that the annotations name.
        labels: Paths of masks.
        missing: Files that the datasets use and that do not exist.
        twice: Number of images that a dataset has more than once.
    """

    images: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    twice: int = 0


def add_files(files: Files, dataset: Any) -> None:
    """Adds the local files of a dataset, if it has paths of images."""
    if not hasattr(dataset, 'get_data_info') or len(dataset) > LABELS_READ:
        return
    named = getattr(dataset, 'all_images', None)
    images, labels = used_files(dataset) if named is None else (named, [])
    images, labels = list(filter(is_local, images)), list(filter(is_local, labels))
    absent = missing([*images, *labels])
    if absent and hasattr(dataset, 'all_images'):  # mmdet leaves out those without objects
        used = set(used_files(dataset)[0])
        absent = [path for path in absent if path in used]
    files.images.update(images)
    files.labels.update(labels)
    files.twice += len(images) - len(set(images))
    files.missing += absent


def used_files(dataset: Any) -> tuple[list[Any], list[Any]]:
    """Paths of the images and of the masks of all samples; None for what a sample lacks."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    pairs = [(info.get('img_path'), info.get('seg_map_path')) for info in infos]
    return [image for image, _ in pairs], [labels for _, labels in pairs]


def is_local(path: Any) -> bool:
    """Whether a value is a path, and not one of a remote storage."""
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path)


def by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """Names of files by folder."""
    folders = defaultdict(set)
    for path in paths:
        folder, name = os.path.split(path)
        folders[folder].add(name)
    return folders


def listed(folder: str) -> set[str]:
    """The names in a folder; none if it cannot be read."""
    try:
        return set(os.listdir(folder or '.'))
    except OSError:
        return set()


def missing(paths: Iterable[str]) -> list[str]:
    """Those of some paths that do not exist; folders that do not exist are other storage."""
    return [
        os.path.join(folder, name)
        for folder, names in by_folder(paths).items()
        if os.path.isdir(folder or '.')
        for name in sorted(names - listed(folder))
    ]


def unnamed(named: set[str], images: set[str]) -> Counter[str]:
    """Image files beside some images that no dataset names, by suffix."""
    known = by_folder(named)
    return Counter(
        os.path.splitext(name)[1].lower()
        for folder in by_folder(images)
        for name in listed(folder) - known[folder]
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith('.')
    )


# ------------------------------------------------------------------------------------------ report
@dataclass
class Report:
    """What the census found in all datasets of a run."""

    lines: list[str]
    problems: list[str]
    oddities: list[str]


def take_census(
    datasets: dict[str, Any],
    masks_read: int | None = MASKS_READ,
    workers: int = 0,
) -> Report:
    """Counts all datasets of a run.

    Args:
        datasets: Whole datasets by split, wrappers included.
        masks_read: The most masks to read of each dataset; None reads all.
        workers: Processes that read masks.

    Raises:
        DataError: A mask cannot be used.
    """
    censuses: list[Census] = []
    notes, problems, oddities = [], [], []
    files, cut = {}, set()
    for split, whole in datasets.items():
        parts = list({id(leaf): leaf for leaf in leaves(whole)}.values())
        files[split] = Files()
        unusable: list[str] = []
        for number, dataset in enumerate(parts, 1):
            name = split if len(parts) == 1 else f'{split} {number}'
            try:
                add_files(files[split], dataset)
                census = count(split, dataset, masks_read, workers)
            except DataError:
                raise
            except Exception as error:  # a dataset of another library may be anything
                words = ' '.join(f'{type(error).__name__}: {error}'.split())
                notes.append(f'{name}: {type(dataset).__name__} is not counted: {words}')
                continue
            if census is None:
                notes.append(f'{name}: {type(dataset).__name__} is not counted')
                continue
            place = f'{name} ({place_of(dataset)})'
            problems += [f'{place}: {text}' for text in census.problems]
            oddities += [f'{place}: {text}' for text in census.oddities]
            unusable += [f'{place}: {census.unusable}'] if census.unusable else []
            censuses.append(census)
        # Images without objects beside others are negatives, or not labelled.
        (problems if len(unusable) == len(parts) else oddities).extend(unusable)
        if any(getattr(part, '_indices', None) is not None for part in parts):
            cut.add(split)
        if files[split].missing:
            first, *others = files[split].missing
            problems.append(f'{split}: {len(others) + 1:,} files are missing, the first is {first}')
        if files[split].twice:
            oddities.append(f'{split}: {files[split].twice:,} images are listed more than once')
    problems += one_class(censuses)
    named = set().union(*(found.images | found.labels for found in files.values()))
    for census in censuses:
        if census.split in cut:  # other images are left out on purpose
            continue
        skipped = unnamed(named, files[census.split].images)
        most = sorted(skipped.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
        text = ', '.join(f'{number:,} {suffix}' for suffix, number in most)
        census.rows['images in the folders that are not named'] = text or 0
    training = files.get('train', Files())
    for split in files.keys() - {'train'}:
        shared = len(training.images & files[split].images)
        if shared:
            total = len(files[split].images)
            oddities.append(f'{shared:,} of {total:,} {split} images are training images too')
        oddities += untrained(censuses, split, notes)
    return Report([*table_of(censuses), *notes], problems, oddities)


def one_class(censuses: Sequence[Census]) -> Iterator[str]:
    """Classification needs two classes; detection has the background as another."""
    parts = [c for c in censuses if c.kind == 'images' and c.split == 'train']
    present = set().union(*(part.present for part in parts))
    if parts and len(present) < 2 and all(part.read == part.images for part in parts):
        yield f'train: all images are of class {"".join(present)!r}'


def untrained(censuses: Sequence[Census], split: str, notes: list[str]) -> Iterator[str]:
    """Classes of a split without training data: a note, or a warning if they are many."""
    training = [census for census in censuses if census.split == 'train']
    if not training or any(census.read < census.images for census in training):
        return
    trained = set().union(*(census.present for census in training))
    evaluated = [census for census in censuses if census.split == split]
    if {census.kind for census in evaluated} != {census.kind for census in training}:
        return
    unknown = {
        name: number
        for census in evaluated
        for name, number in zip(census.classes, census.counts)
        if number and name not in trained
    }
    total = sum(sum(census.counts) for census in evaluated)
    if unknown:
        share = sum(unknown.values()) / total
        kind = evaluated[0].kind
        words = f'{split}: {percent(share)} of the {kind} are of classes without training data: '
        words += shortened(sorted(unknown))
        if share > UNTRAINED_SHARE:
            yield words
        else:
            notes.append(words)


def place_of(dataset: Any) -> str:
    """The annotation file of a dataset, or its folder of images."""
    prefixes = getattr(dataset, 'data_prefix', None)
    folders = list(prefixes.values()) if isinstance(prefixes, dict) else []
    return str(getattr(dataset, 'ann_file', '') or (folders or [type(dataset).__name__])[-1])


def table_of(censuses: Sequence[Census]) -> list[str]:
    """The counts side by side, and the classes by frequency in training."""
    if not censuses:
        return []
    names = [census.split for census in censuses]
    titles = [
        name if names.count(name) == 1 else f'{name} {names[:i].count(name) + 1}'
        for i, name in enumerate(names)
    ]
    rows: list[list[str]] = [['', *titles]]
    rows.append(['images', *(f'{census.images:,}' for census in censuses)])
    for key in dict.fromkeys(key for census in censuses for key in census.rows):
        values = [census.rows.get(key, '-') for census in censuses]
        rows.append([key, *(f'{v:,}' if isinstance(v, int) else v for v in values)])
    found = [f'{len(census.present)} of {len(census.classes)}' for census in censuses]
    rows.append(['classes that occur', *found])
    numbers = [dict(zip(census.classes, census.counts)) for census in censuses]
    order = sorted(dict.fromkeys(name for n in numbers for name in n),
                   key=lambda name: -numbers[0].get(name, 0))  # fmt: skip
    if len(order) > CLASSES_SHOWN:
        order = [name for name in order if numbers[0].get(name)]
    cut = len(order) - 2 * ENDS_SHOWN if len(order) > CLASSES_SHOWN else 0
    for place, name in enumerate(order):
        if cut and place == ENDS_SHOWN:
            rows.append([f'  ... {cut} classes ...', *('' for _ in censuses)])
        if not cut or not ENDS_SHOWN <= place < ENDS_SHOWN + cut:
            cells = [share_or_count(c, n.get(name)) for c, n in zip(censuses, numbers)]
            rows.append([f'  {name}', *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def share_or_count(census: Census, number: int | None) -> str:
    """The count of a class as text: of pixels, the share."""
    if number is None:
        return '-'
    if census.kind == 'pixels':
        return percent(number / max(1, sum(census.counts)))
    return f'{number:,}'


def shortened(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    more = f' and {len(names) - NAMES_SHOWN} more' if len(names) > NAMES_SHOWN else ''
    return ', '.join(names[:NAMES_SHOWN]) + more


def percent(share: float) -> str:
    """A share as text; a small one is not 0%."""
    return '0%' if share == 0 else f'{share:.1%}' if share >= 0.001 else '<0.1%'


def spread(length: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round()).astype(int).tolist()
