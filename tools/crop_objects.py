"""Crops the objects of COCO's images to a small classification dataset in ImageNet's layout.

    python tools/crop_objects.py data/coco data/coco_objects --classes 20 --max-objects 100

Writes FOLDER/{train,val}/CATEGORY/IMAGE_OBJECT.jpg and FOLDER/meta/{train,val}.txt, which every
classification recipe reads with `--data-root FOLDER`. Takes the categories with the most objects in
the training images, numbered by name. Leaves out crowds and small objects.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from common import at_least, parser_of
from common.data_layout import COCO_SPLITS
from common.folders import new_folder
from pycocotools.coco import COCO

MARGIN = 0.1  # around a box, as a share of its size


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('source', type=Path, help="folder in COCO's layout")
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument(
        '--classes', type=at_least(1), default=20, help='number of categories (default: 20)'
    )
    parser.add_argument(
        '--max-objects', type=at_least(1), help='limit per category and split (default: none)'
    )
    parser.add_argument(
        '--min-side',
        type=at_least(1),
        default=32,
        help='minimum length of the shorter side in pixels (default: 32)',
    )
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f'{args.folder} already exists')
    annotations = {
        split: args.source / f'annotations/instances_{name}.json'
        for split, name in COCO_SPLITS.items()
    }
    for path in annotations.values():
        if not path.is_file():
            parser.error(f'{path} does not exist')
    cocos = {split: COCO(str(path)) for split, path in annotations.items()}
    counts = Counter(
        object_['category_id'] for object_ in large_objects(cocos['train'], args.min_side)
    )
    if len(counts) < args.classes:
        parser.error(
            f'--classes {args.classes}: {args.source} has objects of {len(counts)} categories'
        )
    names = {id_: cocos['train'].cats[id_]['name'] for id_, _ in counts.most_common(args.classes)}
    with new_folder(args.folder) as folder:
        for split, coco in cocos.items():
            lines = crop_split(coco, args.source / COCO_SPLITS[split], folder / split, names, args)
            meta = folder / 'meta' / f'{split}.txt'
            meta.parent.mkdir(exist_ok=True)
            meta.write_text(''.join(f'{line}\n' for line in lines))
            print(f'{split}: {len(lines)} objects')


def large_objects(coco: COCO, min_side: int) -> list[dict]:
    """Annotations of single objects of at least `min_side` pixels in width and height."""
    return [
        annotation
        for annotation in coco.anns.values()
        if not annotation.get('iscrowd') and min(annotation['bbox'][2:]) >= min_side
    ]


def crop_split(
    coco: COCO, images: Path, folder: Path, names: dict[int, str], args: argparse.Namespace
) -> list[str]:
    """Writes the crops of a split and returns a line 'file label' for each."""
    labels = {name: label for label, name in enumerate(sorted(names.values()))}
    for name in labels:  # also without objects: labels are counted from the folders
        (folder / name).mkdir(parents=True)
    written: Counter[str] = Counter()
    lines = []
    for object_ in large_objects(coco, args.min_side):
        category = names.get(object_['category_id'])
        if category is None or (args.max_objects and written[category] == args.max_objects):
            continue
        file_name = coco.imgs[object_['image_id']]['file_name']
        image = cv2.imread(str(images / file_name))
        if image is None:
            raise SystemExit(f'error: {images / file_name} is missing or not an image')
        cropped = crop(image, object_['bbox'])
        if not cropped.size:  # the box is outside of its image
            continue
        written[category] += 1
        path = Path(category, f'{Path(file_name).stem}_{object_["id"]}.jpg')
        cv2.imwrite(str(folder / path), cropped)
        lines.append(f'{path} {labels[category]}')
    return lines


def crop(image: np.ndarray, bbox: list[float]) -> np.ndarray:
    """The part of an image (H, W, 3) in a box (x, y, width, height) and a margin around it."""
    x, y, width, height = bbox
    left, right = (max(0, round(x + width * share)) for share in (-MARGIN, 1 + MARGIN))
    top, bottom = (max(0, round(y + height * share)) for share in (-MARGIN, 1 + MARGIN))
    return image[top:bottom, left:right]


if __name__ == '__main__':
    main()
