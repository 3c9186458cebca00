"""Makes a small dataset from a large one, for pilot runs and fitting tests.

    python tools/subset_data.py data/coco data/coco_pilot --train 0.1 --val 500
    python tools/subset_data.py data/ade/ADEChallengeData2016 data/ade_fit8 --train 8 --val-is-train

The layout, COCO's or ADE20K's, is that of the source. A number below 1 is a share of the split,
otherwise a count. The images are spread evenly over the split (ADE20K is sorted by scene) and
linked, not copied; COCO's images without objects are left out. Evaluating a part needs such a
folder, because COCO's metric counts every image of its annotation file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from common import parser_of
from common.data_layout import ADE_SPLITS, COCO_SPLITS
from common.folders import new_folder

Item = TypeVar('Item')


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('source', type=Path, help="folder in COCO's or ADE20K's layout")
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument(
        '--train', type=share_or_count, required=True, help='share or number of training images'
    )
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument('--val', type=share_or_count, help='share or number of validation images')
    held_out.add_argument(
        '--val-is-train', action='store_true', help='validate on the training images themselves'
    )
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f'{args.folder} already exists')
    amounts = {'train': ('train', args.train)}
    amounts['val'] = amounts['train'] if args.val_is_train else ('val', args.val)
    write = write_ade if (args.source / 'images').is_dir() else write_coco
    try:
        with new_folder(args.folder) as folder:
            write(args.source, folder, amounts)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def share_or_count(text: str) -> float | int:
    value = float(text)
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f'must be a share in (0, 1) or a count, got {text}')
    return value if value < 1 else int(value)


def spread(items: Sequence[Item], amount: float | int, where: Path) -> list[Item]:
    """`amount` of `items`, at even distances.

    Raises:
        ValueError: There are not that many.
    """
    count = max(1, round(amount * len(items))) if amount < 1 else int(amount)
    if count > len(items):
        raise ValueError(f'{where} has {len(items)} usable images, {count} were requested')
    return [items[i * len(items) // count] for i in range(count)]


Amounts = dict[str, tuple[str, float | int]]  # new split -> split it is taken from, how much


def write_coco(source: Path, folder: Path, amounts: Amounts) -> None:
    """Writes the annotation files of the parts, and links to the folders of images.

    Raises:
        OSError, ValueError: The source cannot be read, or has too few images with objects.
    """
    contents = {}
    for split, (source_split, amount) in amounts.items():
        path = source / f'annotations/instances_{COCO_SPLITS[source_split]}.json'
        content = json.loads(path.read_text())
        with_objects = {a['image_id'] for a in content['annotations'] if not a.get('iscrowd')}
        images = [image for image in content['images'] if image['id'] in with_objects]
        images = spread(images, amount, path)
        ids = {image['id'] for image in images}
        annotations = [a for a in content['annotations'] if a['image_id'] in ids]
        contents[split] = content | dict(images=images, annotations=annotations)
    (folder / 'annotations').mkdir()
    for split, content in contents.items():
        name = COCO_SPLITS[split]
        (folder / f'annotations/instances_{name}.json').write_text(json.dumps(content))
        (folder / name).symlink_to((source / COCO_SPLITS[amounts[split][0]]).resolve())
        print(f'{name}: {len(content["images"])} images, {len(content["annotations"])} objects')


def write_ade(source: Path, folder: Path, amounts: Amounts) -> None:
    """Links the images and labels of the parts.

    Raises:
        OSError, ValueError: The source cannot be read, or has too few images.
    """
    parts = {}
    for split, (source_split, amount) in amounts.items():
        images = source / 'images' / ADE_SPLITS[source_split]
        parts[split] = spread(sorted(images.glob('*.jpg')), amount, images)
    for split, paths in parts.items():
        name, source_name = ADE_SPLITS[split], ADE_SPLITS[amounts[split][0]]
        for kind, suffix in (('images', '.jpg'), ('annotations', '.png')):
            (folder / kind / name).mkdir(parents=True)
            for path in paths:
                file = source / kind / source_name / f'{path.stem}{suffix}'
                (folder / kind / name / file.name).symlink_to(file.resolve(strict=True))
        print(f'{name}: {len(paths)} images')


if __name__ == '__main__':
    main()
