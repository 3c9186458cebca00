"""COCO annotation files that mmdet and pycocotools read without an error, but wrongly.

- mmdet numbers labels in the order of the file's `categories`, whatever the order of `classes`.
- pycocotools takes the annotation id 0 for "no match", so that perfect boxes do not score 1.0.
- pycocotools keeps one of several images with the same id, with the objects of all.
- pycocotools exhausts the memory or crashes on coordinates such as NaN and 1e9, and on wrong sizes.
- pycocotools accepts files that lack one of the three lists; other errors do not name the entry.
- pycocotools needs `iscrowd` in evaluation; mmdet's datasets take a missing one as 0.

The changed class is the one that mmdet's datasets and metrics share. Datasets also keep the paths
of all images of the file, as `all_images`; mmdet drops those without objects.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from json import JSONDecodeError
from typing import Any

from mmengine.logging import print_log

from ..text import printable
from .finder import change_after_import

# Fields by which the lists refer to each other. mmdet's errors name others, such as `bbox`.
FIELDS = {
    'images': ('id',),
    'categories': ('id', 'name'),
    'annotations': ('id', 'image_id', 'category_id'),
}
FARTHEST = 100_000  # pixels of a coordinate from the corner of its image
LARGEST_ID = 2**53  # pycocotools keeps ids as floats
MOST_PIXELS = 2**30  # that OpenCV decodes


def install() -> None:
    """Changes mmdet's reader of annotation files; calling it again has no effect."""
    change_after_import('mmdet.datasets.api_wrappers.coco_api', change_reader)
    change_after_import('mmdet.datasets.coco', keep_images)


def change_reader(module: Any) -> None:
    """Makes mmdet's `COCO` order categories by name, and check and renumber ids."""
    stock_init, stock_index = module.COCO.__init__, module.COCO.createIndex
    stock_categories, stock_mask = module.COCO.getCatIds, module.COCO.annToRLE

    def init(self: Any, annotation_file: Any = None) -> None:
        self.annotation_file = annotation_file
        try:
            stock_init(self, annotation_file)
        except (AssertionError, JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f'{annotation_file}: {explain_format(error)}') from error

    def categories_by_name(
        self: Any, catNms: Sequence[str] = (), supNms: Sequence = (), catIds: Sequence = ()
    ) -> list[int]:
        found = stock_categories(self, catNms, supNms, catIds)
        if isinstance(catNms, str):
            return found
        position = {name: number for number, name in enumerate(catNms)}
        names = Counter(self.cats[id_]['name'] for id_ in found)
        for name in (name for name, number in names.items() if number > 1):
            ids = [id_ for id_ in found if self.cats[id_]['name'] == name]
            raise ValueError(
                f'{self.annotation_file}: categories {shown(ids)} are all named {shown(name)}; '
                'rename or remove all but one'
            )
        return sorted(found, key=lambda id_: position.get(self.cats[id_]['name'], 0))

    def create_index(self: Any) -> None:
        if self.annotation_file is not None:  # not for predictions
            for problem in wrong_lists(self.dataset):
                raise ValueError(f'{self.annotation_file}: {problem}')
        images = self.dataset.get('images', ())
        ids = {image['id'] for image in images}
        if len(ids) < len(images):
            raise ValueError(
                f'{self.annotation_file}: {len(images) - len(ids)} of {len(images)} images have '
                'the id of another image; give each its own, in annotations as image_id too'
            )
        annotations = self.dataset.get('annotations', ())
        if self.annotation_file is not None:
            categories = [category['id'] for category in self.dataset['categories']]
            for id_ in (id_ for id_, number in Counter(categories).items() if number > 1):
                raise ValueError(f'{self.annotation_file}: several categories have the id {id_}')
            for text in strays(ids, set(categories), annotations):
                warn(f'{self.annotation_file}: {text}')
            for problem in wrong_numbers(images, annotations):
                raise ValueError(f'{self.annotation_file}: {problem}; correct or remove it')
            for annotation in annotations:
                annotation.setdefault('iscrowd', 0)  # as mmdet assumes in training
        if any(annotation.get('id') == 0 for annotation in annotations):
            known = {annotation['id'] for annotation in annotations}
            if len(known) == len(annotations):  # mmdet refuses others
                for number, annotation in enumerate(annotations, 1):
                    annotation['id'] = number
        stock_index(self)

    def mask_of(self: Any, annotation: dict) -> Any:
        mask = annotation['segmentation']
        if isinstance(mask, list):  # pycocotools takes two points for a box, and then fails
            mask = [[*part, *part[:2]] if len(part) == 4 else part for part in mask]
        return stock_mask(self, {**annotation, 'segmentation': mask})

    module.COCO.__init__ = init
    module.COCO.annToRLE = mask_of
    module.COCO.getCatIds = categories_by_name
    module.COCO.createIndex = create_index


def explain_format(error: Exception) -> str:
    """Why a file was not read as an object of JSON."""
    if isinstance(error, AssertionError):
        return f'a COCO file has one object with the lists {", ".join(FIELDS)} at its top'
    return f'is no valid JSON (empty or incomplete file?): {error}'


def wrong_lists(content: Mapping[str, Any]) -> Iterator[str]:
    """Names lists and fields that are missing.

    `annotations` may be missing in files of images to predict, such as COCO's test-dev.
    """
    for name, fields in FIELDS.items():
        entries = content.get(name)
        if name not in content and name == 'annotations':
            return
        if not isinstance(entries, list):
            found = f'must be a list, got {shown(entries)}'
            if name not in content:
                found = f'is missing; the file has {shown(sorted(content))}'
            yield f'list {name!r} {found}'
            return
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                yield f'{name}[{number}] must be an object, got {shown(entry)}'
                return
            for field in fields:
                if field not in entry:
                    which = f' (id {shown(entry["id"])})' if 'id' in entry else ''
                    yield f'field {field!r} is missing in {name}[{number}]{which}'
                    return


def strays(images: set, categories: set, annotations: Sequence[Mapping]) -> Iterator[str]:
    """Names annotations of images and categories that the file does not have, by their ids."""
    for field, name, known in (
        ('image_id', 'images', images),
        ('category_id', 'categories', categories),
    ):
        found = [a for a in annotations if a[field] not in known]
        if found:
            yield (
                f'{len(found):,} of {len(annotations):,} annotations are not used: their {field} '
                f'is not in {name}, such as {shown(found[0][field])} of annotation '
                f'{shown(found[0]["id"])}'
            )


@cache  # datasets and metrics read the same files
def warn(text: str) -> None:
    """Logs a warning once."""
    print_log(f'Data: {printable(text)}', logger='current', level=logging.WARNING)


def wrong_numbers(images: Sequence[Mapping], annotations: Sequence[Mapping]) -> Iterator[str]:
    """Names numbers that must not reach pycocotools, with the image or annotation they are of."""
    sizes = {}
    for image in images:
        height, width = sizes[image['id']] = image.get('height'), image.get('width')
        if height is None or width is None:
            continue  # mmdet or the pipeline asks for them
        are_sizes = all(type(side) in (int, float) and side >= 1 for side in (height, width))
        if not (are_sizes and height * width <= MOST_PIXELS):
            yield f'image {shown(image["id"])} has height {shown(height)}, width {shown(width)}'
    for annotation in annotations:
        name = f'annotation {shown(annotation.get("id"))}'
        number = annotation.get('id', 0)
        if type(number) not in (int, float) or not -LARGEST_ID < number < LARGEST_ID:
            yield f'an annotation has the id {shown(number)}, which is no number'
        is_crowd = annotation.get('iscrowd', 0)
        if is_crowd not in (0, 1):
            yield f'{name} has iscrowd {shown(is_crowd)}, neither 0 nor 1'
        box = annotation.get('bbox', (0, 0, 0, 0))
        if not (isinstance(box, (list, tuple)) and len(box) == 4 and are_near(box)):
            yield f'{name} has bbox {shown(box)}'
        mask = annotation.get('segmentation')
        if isinstance(mask, dict):
            size = sizes.get(annotation.get('image_id'), (None, None))
            if None not in size and mask.get('size') != [*size]:
                yield (
                    f'{name} has a mask of size {shown(mask.get("size"))}, its image has height '
                    f'{size[0]}, width {size[1]}'
                )
            counts = mask.get('counts')
            is_list = isinstance(counts, list) and are_counts(counts, mask.get('size'))
            if not is_list and not isinstance(counts, str):
                yield f'{name} has a mask whose counts are not those of its size'
        elif isinstance(mask, list):
            for polygon in mask:
                if not (isinstance(polygon, list) and are_near(polygon)):
                    yield f'{name} has polygon {shown(polygon)}'


def are_near(coordinates: Sequence) -> bool:
    """Whether all are numbers from which a mask can be drawn."""
    try:  # a sum is not finite if one of its terms is not
        is_finite = math.isfinite(sum(coordinates))
    except TypeError:
        return False
    return is_finite and (
        not coordinates or (min(coordinates) >= -FARTHEST and max(coordinates) <= FARTHEST)
    )


def are_counts(counts: list, size: Any) -> bool:
    """Whether the lengths of runs fill a mask of that size (height, width)."""
    try:
        return min(counts, default=0) >= 0 and sum(counts) == math.prod(size)
    except TypeError:
        return False


def shown(value: Any) -> str:
    """A value of a file, cut."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def keep_images(module: Any) -> None:
    """Makes `CocoDataset` keep the paths of all images, and say why none of them is used."""
    stock_load, stock_filter = module.CocoDataset.load_data_list, module.CocoDataset.filter_data

    def load_data_list(self: Any) -> list[dict]:
        images = stock_load(self)
        if not images:
            raise ValueError("its list 'images' is empty")
        self.all_images = [image['img_path'] for image in images]
        return images

    def filter_data(self: Any) -> list[dict]:
        kept = stock_filter(self)
        if not kept and not any(self.cat_img_map.values()):
            raise ValueError("its list 'annotations' is missing or empty")
        if not kept:
            raise ValueError(
                f'none of its {len(self.data_list):,} images is used: objects of '
                f'{shown(self.metainfo["classes"])} in images that fit '
                f'filter_cfg={self.filter_cfg} are needed'
            )
        return kept

    module.CocoDataset.load_data_list = load_data_list
    module.CocoDataset.filter_data = filter_data
