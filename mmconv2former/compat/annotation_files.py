"""COCO annotation files that mmdet and pycocotools read without an error, but wrongly.

- mmdet numbers labels in the order of the file's `categories`, whatever the order of `classes`.
- pycocotools takes the annotation id 0 for "no match", so that perfect boxes do not score 1.0.
- pycocotools keeps one of several images with the same id, with the objects of all.
- pycocotools needs `iscrowd` for an evaluation; in mmdet's datasets it is optional.
- pycocotools takes all memory or crashes for coordinates such as NaN and 1e9, and for wrong sizes.

The changed class is the one that mmdet's datasets and metrics share. Datasets also keep the paths
of all images of the file, as `all_images`; mmdet drops those without objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .finder import change_after_import

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
        stock_init(self, annotation_file)

    def categories_by_name(
        self: Any, catNms: Sequence[str] = (), supNms: Sequence = (), catIds: Sequence = ()
    ) -> list[int]:
        found = stock_categories(self, catNms, supNms, catIds)
        if isinstance(catNms, str):
            return found
        position = {name: number for number, name in enumerate(catNms)}
        return sorted(found, key=lambda id_: position.get(self.cats[id_]['name'], 0))

    def create_index(self: Any) -> None:
        images = self.dataset.get('images', ())
        ids = {image['id'] for image in images}
        if len(ids) < len(images):
            raise ValueError(
                f'{self.annotation_file}: {len(images) - len(ids)} of {len(images)} images have '
                'the id of another image; give each its own, in annotations as image_id too'
            )
        annotations = self.dataset.get('annotations', ())
        if self.annotation_file is not None:  # not for predictions
            for problem in wrong_numbers(images, annotations):
                raise ValueError(f'{self.annotation_file}: {problem}; correct or remove it')
            for annotation in annotations:
                annotation.setdefault('iscrowd', 0)
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
    """Makes `CocoDataset` keep the paths of all images of its file."""
    stock = module.CocoDataset.load_data_list

    def load_data_list(self: Any) -> list[dict]:
        images = stock(self)
        self.all_images = [image['img_path'] for image in images]
        return images

    module.CocoDataset.load_data_list = load_data_list
