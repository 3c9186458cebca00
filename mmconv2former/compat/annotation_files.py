"""COCO annotation files that mmdet and pycocotools read without an error, but wrongly.

- mmdet numbers labels in the order of the file's `categories`, whatever the order of `classes`.
- pycocotools takes the annotation id 0 for "no match", so that perfect boxes do not score 1.0.
- pycocotools keeps one of several images with the same id, with the objects of all.

The changed class is the one that mmdet's datasets and metrics share. Datasets also keep the paths
of all images of the file, as `all_images`; mmdet drops those without objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .finder import change_after_import


def install() -> None:
    """Changes mmdet's reader of annotation files; calling it again has no effect."""
    change_after_import('mmdet.datasets.api_wrappers.coco_api', change_reader)
    change_after_import('mmdet.datasets.coco', keep_images)


def change_reader(module: Any) -> None:
    """Makes mmdet's `COCO` order categories by name, and check and renumber ids."""
    stock_init, stock_index = module.COCO.__init__, module.COCO.createIndex
    stock_categories = module.COCO.getCatIds

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
        if any(annotation.get('id') == 0 for annotation in annotations):
            known = {annotation['id'] for annotation in annotations}
            if len(known) == len(annotations):  # mmdet refuses others
                for number, annotation in enumerate(annotations, 1):
                    annotation['id'] = number
        stock_index(self)

    module.COCO.__init__ = init
    module.COCO.getCatIds = categories_by_name
    module.COCO.createIndex = create_index


def keep_images(module: Any) -> None:
    """Makes `CocoDataset` keep the paths of all images of its file."""
    stock = module.CocoDataset.load_data_list

    def load_data_list(self: Any) -> list[dict]:
        images = stock(self)
        self.all_images = [image['img_path'] for image in images]
        return images

    module.CocoDataset.load_data_list = load_data_list
