"""Makes a small data set in COCO's layout out of a large one, for pilot runs and fitting tests.

    python tools/subset_coco.py data/coco data/coco_100 --train 100 --val 20
    python tools/subset_coco.py data/coco data/coco_fit8 --train 8 --val-is-train

Takes the first images that have objects, in the order of the annotation file; pictures are linked,
not copied. Evaluation needs such a folder: COCO's metric counts every image of its annotation file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='folder with annotations, train2017, val2017')
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument('--train', type=int, required=True, help='training images')
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument('--val', type=int, help='validation images')
    held_out.add_argument(
        '--val-is-train', action='store_true', help='validate on the training images themselves'
    )
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f'{args.folder} exists already')
    val_source, val_count = (
        ('train2017', args.train) if args.val_is_train else ('val2017', args.val)
    )
    try:
        train = read_subset(args.source, 'train2017', args.train)
        val = read_subset(args.source, val_source, val_count)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for split, source_split, content in (
        ('train2017', 'train2017', train),
        ('val2017', val_source, val),
    ):
        path = args.folder / f'annotations/instances_{split}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        (args.folder / split).symlink_to((args.source / source_split).resolve())
        print(f'{split}: {len(content["images"])} images, {len(content["annotations"])} objects')


def read_subset(source: Path, split: str, count: int) -> dict:
    """COCO records of the first `count` images of a split that have objects.

    Raises:
        OSError: The annotation file cannot be read.
        ValueError: It is not JSON, or has fewer such images.
    """
    path = source / f'annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    with_objects = {a['image_id'] for a in content['annotations'] if not a['iscrowd']}
    images = [image for image in content['images'] if image['id'] in with_objects]
    if not 1 <= count <= len(images):
        raise ValueError(f'{path} has {len(images)} images with objects, {count} were asked for')
    ids = {image['id'] for image in images[:count]}
    annotations = [a for a in content['annotations'] if a['image_id'] in ids]
    return content | dict(images=images[:count], annotations=annotations)


if __name__ == '__main__':
    main()
