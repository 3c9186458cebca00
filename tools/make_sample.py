"""Makes the embedded sample: a small image set in COCO's and ADE20K's layouts.

    python tools/make_sample.py data/sample

Category names and ids are COCO's and ADE20K's own, so a recipe reads the sample when only its data
root changes: `data/sample/coco` and `data/sample/ade/ADEChallengeData2016`. Each image has two
textured background regions and clutter (lines, specks, blobs), and up to seven textured, rotated
objects between an eighth and more than half of the image's side, which may hide each other. As in
the real data, there are images without objects, greyscale JPEGs and crowd regions. The same seed
gives the same files with the same versions of numpy and OpenCV.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from common import at_least, parser_of
from common.data_layout import ADE_SPLITS, COCO_IDS, COCO_SPLITS
from numpy.random import Generator
from pycocotools import mask as coco_mask

# ADE20K's labels: of the objects (ball, signboard, flag, plate, food there), of the regions
OBJECTS = {'sports ball': 120, 'stop sign': 44, 'kite': 150, 'donut': 143, 'pizza': 121}
BACKGROUNDS = {'wall': 1, 'sky': 3, 'grass': 10, 'sea': 27, 'sand': 47}

SMALLEST_OBJECT, LARGEST_OBJECT = 0.12, 0.55  # side, as a share of the image's
MOST_OBJECTS = 7
CROWD_SIZE = 12  # objects in a crowd region
LEAST_VISIBLE = 0.25  # an object that is hidden more is not annotated
EMPTY_EVERY, GREY_EVERY, CROWD_EVERY = 25, 20, 16  # one image in this many


class Painted(NamedTuple):
    """An object in an image, with a boolean mask (H, W)."""

    category: str
    mask: np.ndarray
    is_crowd: bool


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument('folder', type=Path, help='output folder; replaced if this tool made it')
    parser.add_argument('--train', type=at_least(1), default=240, help='number of training images')
    parser.add_argument('--val', type=at_least(1), default=60, help='number of held-out images')
    parser.add_argument('--size', type=at_least(64), default=256, help='side of an image in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    folder, marker = args.folder, args.folder / 'made_by_make_sample.json'
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        parser.error(f'{folder} exists and is not a sample; name another folder')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {name: getattr(args, name) for name in ('train', 'val', 'size', 'seed')}
    marker.write_text(json.dumps(settings))
    for index, split in enumerate(('train', 'val')):
        rng = np.random.default_rng([args.seed, index])
        write_split(folder, split, getattr(args, split), args.size, rng)
    print(f'{args.train} training and {args.val} held-out images in {folder}')


def write_split(folder: Path, split: str, count: int, size: int, rng: Generator) -> None:
    """Images, annotations and labels of one split, in both layouts."""
    coco, ade = folder / 'coco', folder / 'ade/ADEChallengeData2016'
    coco_images = coco / COCO_SPLITS[split]
    ade_images, ade_labels = (ade / kind / ADE_SPLITS[split] for kind in ('images', 'annotations'))
    for path in (coco_images, ade_images, ade_labels, coco / 'annotations'):
        path.mkdir(parents=True, exist_ok=True)

    images: list[dict] = []
    annotations: list[dict] = []
    for id_ in range(1, count + 1):
        name = f'{id_:012d}'
        image, labels, objects = draw_image(
            size, rng, empty=id_ % EMPTY_EVERY == 0, crowd=id_ % CROWD_EVERY == 0
        )
        if id_ % GREY_EVERY == 0:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        cv2.imwrite(str(coco_images / f'{name}.jpg'), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        shutil.copyfile(coco_images / f'{name}.jpg', ade_images / f'{name}.jpg')
        cv2.imwrite(str(ade_labels / f'{name}.png'), labels)
        images.append(dict(id=id_, file_name=f'{name}.jpg', height=size, width=size))
        for category, mask, is_crowd in objects:
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=id_,
                    category_id=COCO_IDS[category],
                    iscrowd=int(is_crowd),
                    segmentation=dict(size=runs['size'], counts=runs['counts'].decode('ascii')),
                    area=float(coco_mask.area(runs)),
                    bbox=coco_mask.toBbox(runs).tolist(),
                )
            )
    # All 80 categories: evaluation maps labels 0 to 79 to these ids.
    categories = [dict(id=id_, name=name) for name, id_ in COCO_IDS.items()]
    content = dict(images=images, annotations=annotations, categories=categories)
    (coco / f'annotations/instances_{COCO_SPLITS[split]}.json').write_text(json.dumps(content))


def draw_image(
    size: int, rng: Generator, empty: bool, crowd: bool
) -> tuple[np.ndarray, np.ndarray, list[Painted]]:
    """One image (size, size, 3) in BGR, its ADE20K labels (size, size) and its objects.

    Both arrays are uint8; objects have the masks of their visible parts.
    """
    image, labels = draw_background(size, rng)
    painted = [draw_crowd(image, rng)] if crowd else []
    for _ in range(0 if empty else rng.integers(2, MOST_OBJECTS + 1)):
        category = str(rng.choice(list(OBJECTS)))
        # uniform in the logarithm: as many small objects as large ones
        side = size * np.exp(rng.uniform(np.log(SMALLEST_OBJECT), np.log(LARGEST_OBJECT)))
        # a third of the side away from the border, so that most of it is inside
        center = rng.uniform(side / 3, size - side / 3, 2)
        painted.append(Painted(category, draw_object(image, category, center, side, rng), False))

    objects = []
    hidden = np.zeros((size, size), bool)
    for category, mask, is_crowd in reversed(painted):  # from front to back
        visible = mask & ~hidden
        hidden |= mask
        labels[visible] = OBJECTS[category]
        if visible.sum() > LEAST_VISIBLE * mask.sum() and not empty:
            objects.append(Painted(category, visible, is_crowd))
    return image, labels, objects[::-1]


# ------------------------------------------------------------------------------------- background
def draw_background(size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two textured regions with a wavy border, and clutter over both."""
    upper, lower = rng.permutation(list(BACKGROUNDS))[:2]
    x = np.arange(size)
    border = size * rng.uniform(0.3, 0.7) + size * 0.05 * np.sin(
        x / size * rng.uniform(4, 12) + rng.uniform(0, 6)
    )
    is_lower = x[:, None] > border[None, :]
    image = np.where(
        is_lower[..., None], region_texture(lower, size, rng), region_texture(upper, size, rng)
    )
    labels = np.where(is_lower, BACKGROUNDS[lower], BACKGROUNDS[upper]).astype(np.uint8)
    image = np.ascontiguousarray(image.astype(np.uint8))
    for _ in range(rng.integers(4, 12)):
        color, thickness = random_color(rng), int(rng.integers(1, 3))
        start, end = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(image, start, end, color, thickness, cv2.LINE_AA)
    for _ in range(rng.integers(10, 40)):
        center = rng.integers(0, size, 2).tolist()
        cv2.circle(image, center, int(rng.integers(1, 3)), random_color(rng), -1, cv2.LINE_AA)
    for _ in range(rng.integers(0, 4)):
        center, axes = rng.integers(0, size, 2).tolist(), rng.integers(4, size // 6, 2).tolist()
        blob = image.copy()
        cv2.ellipse(blob, center, axes, rng.uniform(0, 180), 0, 360, random_color(rng), -1)
        image = cv2.addWeighted(image, 0.6, blob, 0.4, 0)
    return image, labels


# Base colour (BGR) and grain of each kind of background.
TEXTURES = {
    'wall': ((150, 160, 175), 2),
    'sky': ((225, 190, 140), 32),
    'grass': ((60, 130, 70), 3),
    'sea': ((140, 95, 40), 8),
    'sand': ((130, 180, 205), 1),
}


def region_texture(name: str, size: int, rng: Generator) -> np.ndarray:
    """An image (size, size, 3) of one kind of background."""
    base, grain = TEXTURES[name]
    side = max(2, size // grain)
    noise: np.ndarray = rng.normal(0, 18, (side, side // (4 if name == 'sea' else 1), 1))
    noise = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    texture = np.array(base) + rng.normal(0, 12, 3) + noise[..., None]
    if name == 'wall':  # bricks
        texture[np.arange(size) % (size // 10) == 0] -= 40
    return np.clip(texture, 0, 255)


# ---------------------------------------------------------------------------------------- objects
# First and second colour (BGR) about which an object's own vary; balls and kites have any colours.
COLORS = {
    'stop sign': ((50, 40, 190), (235, 235, 235)),
    'donut': ((150, 120, 225), (240, 240, 120)),
    'pizza': ((90, 190, 240), (45, 70, 170)),
}


def draw_object(
    image: np.ndarray, category: str, center: np.ndarray, side: float, rng: Generator
) -> np.ndarray:
    """Paints an object of about `side` pixels at `center` (x, y); returns its full mask (H, W)."""
    size = image.shape[0]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] + 0.5
    dx, dy = (x - center[0]) / (side / 2), (y - center[1]) / (side / 2)
    u = np.cos(angle) * dx + np.sin(angle) * dy  # -1 to 1 across the object, in its own frame
    v = -np.sin(angle) * dx + np.cos(angle) * dy
    shape, is_second_color = draw_shape(category, u, v)
    means = COLORS.get(category) or (random_color(rng), random_color(rng))
    first, second = (np.array(mean) + rng.normal(0, 20, 3) for mean in means)
    colors = np.where(is_second_color[..., None], second, first) + rng.normal(0, 8, (size, size, 1))
    colors *= 1 - 0.25 * np.clip(u + v, -1, 1)[..., None]  # light from one side
    image[shape] = np.clip(colors, 0, 255).astype(np.uint8)[shape]
    return shape


def draw_crowd(image: np.ndarray, rng: Generator) -> Painted:
    """A heap of small objects of one category, annotated as one region, as in COCO."""
    size = image.shape[0]
    middle = rng.uniform(0.25, 0.75, 2) * size
    heap = np.zeros((size, size), bool)
    for _ in range(CROWD_SIZE):
        center = middle + rng.normal(0, 0.08, 2) * size
        heap |= draw_object(image, 'sports ball', center, size * SMALLEST_OBJECT, rng)
    return Painted('sports ball', heap, True)


def draw_shape(category: str, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where an object is, and where it has its second colour, at coordinates of its own frame."""
    radius = np.hypot(u, v)
    if category == 'sports ball':  # a disc with curved stripes
        return radius < 1, np.abs(np.sin(4 * u + v**2)) < 0.35
    if category == 'stop sign':  # an octagon with a rim and a bar
        extent = np.maximum(np.maximum(abs(u), abs(v)), (abs(u) + abs(v)) / np.sqrt(2))
        return extent < 0.92, (extent > 0.76) | ((abs(v) < 0.2) & (abs(u) < 0.55))
    if category == 'kite':  # four checkered quarters
        reach = np.where(v < 0, 1 + v / 0.65, 1 - v)
        return abs(u) < 0.65 * reach, (u > 0) != (v > 0)
    if category == 'donut':  # a ring with sprinkles
        return (radius < 1) & (radius > 0.42), np.sin(14 * u) * np.sin(14 * v) > 0.55
    # a slice of pizza with a crust and round toppings
    inside = (v < 0.85) & (abs(u) < 0.7 * (v + 0.95) / 1.8)
    toppings = [(0.0, 0.35), (-0.3, 0.6), (0.3, 0.55), (0.02, -0.2)]
    is_topping = np.any([np.hypot(u - a, v - b) < 0.16 for a, b in toppings], axis=0)
    return inside, is_topping | (v > 0.7)


def random_color(rng: Generator) -> tuple[int, int, int]:
    """A saturated colour (BGR)."""
    hsv = [rng.integers(0, 180), rng.integers(120, 256), rng.integers(120, 256)]
    return tuple(cv2.cvtColor(np.array([[hsv]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0].tolist())


if __name__ == '__main__':
    main()
