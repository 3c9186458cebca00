"""COCO files with random changes of numbers, types and structure: refused in one line, or read.

    pytest tests/reliability/test_fuzz_annotations.py -s           # 300 cases
    pytest tests/reliability/test_fuzz_annotations.py -s --slow    # 2,000

Each case is loaded as for training, with masks as bitmaps and as polygons, and evaluated, in a
process of its own kind: pycocotools can crash or take all memory. The cases are the same in each
run.
"""

import collections
import copy
import json
import math
import multiprocessing
import random
import resource
import signal
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import METRICS, init_default_scope
from PIL import Image
from pycocotools import mask as coco_mask

from mmconv2former.datasets.checked import CheckedDataset, DataError

HEIGHT, WIDTH = 40, 50
NAMES = ('kite', 'ball')
MEMORY = 2**30  # bytes that a case may add to the process
SECONDS = 20  # for each case

NUMBERS = [
    *(
        0,
        -0.0,
        1,
        5,
        -1,
        0.5,
        3.7,
        39,
        40,
        41,
        50,
        255,
        256,
        65_536,
        10**5,
        10**5 + 1,
        10**6,
        10**9,
    ),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 1e-320, 1e9),
    *(1e38, 1e39, 1e308, -1e308, math.nan, math.inf, -math.inf, 10**400),
]
OTHERS = [
    *(None, True, False, '', '5', 'nan', 'kite', '\0', '\x1b[2K\rok', '\udc80', 'x' * 10_000),
    *([], {}, [[]], [{}], [None], {'a': 1}, [1, 2, 3, 4], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]]),
    *([5, 5, 20, 20], [[5, 5, 20, 5, 20, 20]], [['5', '5', '20', '5', '20', '20']]),
    *([[5, 5, 20, 5, 20, True]], [[[5, 5], [20, 5], [20, 20]]], 'P' * 9, {'counts': 'P' * 9}),
    *({'size': [HEIGHT, WIDTH]}, {'size': [HEIGHT, WIDTH], 'counts': ''}),
    *({'size': [HEIGHT, WIDTH], 'counts': [2000]}, {'size': [WIDTH, HEIGHT], 'counts': [2000]}),
    *({'size': [HEIGHT, WIDTH], 'counts': 'o' * 50}, {'size': [HEIGHT, WIDTH], 'counts': None}),
]


# --------------------------------------------------------------------------------------- the cases
def content():
    """Three images with objects of each kind of mask."""
    whole = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    whole[5:20, 10:30] = 1
    compressed = coco_mask.encode(whole)
    compressed['counts'] = compressed['counts'].decode()
    masks = [
        [[5, 5, 20, 5, 20, 20, 5, 20.5]],
        [[1, 1, 9, 1, 9, 9], [20, 20, 30, 20, 30, 30.25, 20, 30]],
        dict(size=[HEIGHT, WIDTH], counts=[400, 100, 1500]),
        compressed,
    ]
    file = dict(
        images=[
            dict(id=i, file_name=f'{i}.png', width=WIDTH, height=HEIGHT, license=1)
            for i in (1, 2, 3)
        ],
        annotations=[
            dict(id=n + 1, image_id=n // 2 + 1, category_id=n % 2 + 1, bbox=[5 + n, 5, 20, 15.5],
                 area=300.0, iscrowd=int(n == 4), segmentation=masks[n % 4])
            for n in range(6)
        ],
        categories=[dict(id=n, name=name, supercategory='x') for n, name in enumerate(NAMES, 1)],
        info=dict(year=2026),
    )  # fmt: skip
    return json.loads(json.dumps(file))  # no part of it is shared


def places(value, path=()):
    """All places of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def case(number):
    """A changed file and the places that were changed."""
    rng = random.Random(number)
    changed = content()
    found = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(list(places(changed)))
        part, key, old = at(changed, path[:-1]), path[-1], at(changed, path)
        kind = rng.choice(['number', 'number', 'other', 'remove', 'repeat', 'swap', 'text'])
        if kind == 'remove':
            del part[key]
        elif kind == 'repeat' and isinstance(part, list):
            part.insert(key, copy.deepcopy(old))
        elif kind == 'swap':
            other = rng.choice(list(places(changed)))
            if other[: len(path)] != path and path[: len(other)] != other:
                other_part, value = at(changed, other[:-1]), at(changed, other)
                part[key], other_part[other[-1]] = value, old
                found.append(other)
        elif kind == 'text' and isinstance(old, str) and old:
            index = rng.randrange(len(old))
            part[key] = old[:index] + chr(rng.choice([*range(48, 112), 0, 255])) + old[index + 1 :]
        else:
            part[key] = copy.deepcopy(rng.choice(OTHERS if kind == 'other' else NUMBERS))
        found.append(path)
    return changed, found


# ------------------------------------------------------------------------------------ what it does
def settings(path, poly2mask):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=poly2mask),
    ]
    return dict(
        type='CocoDataset',
        ann_file=str(path),
        data_prefix=dict(img=str(path.parent)),
        metainfo=dict(classes=NAMES),
        pipeline=pipeline,
        filter_cfg=dict(filter_empty_gt=True, min_size=1),
    )


def samples(path, poly2mask):
    dataset = CheckedDataset(settings(path, poly2mask))
    for index in range(len(dataset)):
        sample = dataset[index]
        masks = sample['gt_masks'].to_ndarray()
        boxes = sample['gt_bboxes'].tensor.numpy()
        yield [
            sample['img_path'],
            *(array.tolist() for array in (boxes, sample['gt_bboxes_labels'], masks)),
            sample['gt_ignore_flags'].tolist(),
        ]


def score(path):
    """Of one prediction for each image."""
    metric = METRICS.build(dict(type='CocoMetric', ann_file=str(path), metric=['bbox', 'segm']))
    metric.dataset_meta = dict(classes=NAMES)
    dataset = CheckedDataset(dict(settings(path, True), test_mode=True))
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        prediction = dict(
            bboxes=torch.tensor([[5.0, 5, 25, 20]]),
            labels=torch.tensor([0]),
            scores=torch.ones(1),
            masks=torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool),
        )
        sample = dict(img_id=info['img_id'], ori_shape=(HEIGHT, WIDTH), pred_instances=prediction)
        metric.process({}, [sample])
    return sorted(metric.evaluate(len(dataset)).items())


def read(path):
    """What training and evaluation make of a file."""
    with redirect_stdout(StringIO()):
        return [list(samples(path, True)), list(samples(path, False)), score(path)]


def outcome(path, expected):
    try:
        found = read(path)
    except DataError as error:
        return 'refused' if str(error).isprintable() else 'refused in several lines', str(error)
    except Exception as error:
        return 'raised', f'{type(error).__name__}: {error}'
    if str(found) == str(expected):
        return 'equal', ''
    return 'other' if is_sane(found) else 'wrong data', ''


def work(path, expected, numbers, pipe):
    """Tries cases, in a process whose memory is limited."""
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in numbers:
        path.write_text(json.dumps(case(number)[0]))
        signal.alarm(SECONDS)  # ends the process, also within C code
        pipe.send((number, *outcome(path, expected)))
        signal.alarm(0)


def try_all(folder, numbers):
    """The outcome by case; 'ended the process' for one that did."""
    for i in (1, 2, 3):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * i, np.uint8)).save(folder / f'{i}.png')
    init_default_scope('mmdet')
    path = folder / 'truth.json'
    path.write_text(json.dumps(content()))
    expected = read(path)
    context, results, left = multiprocessing.get_context('fork'), {}, list(numbers)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(path, expected, left, theirs))
        process.start()
        theirs.close()
        try:
            while True:
                number, *result = ours.recv()
                results[number] = result
        except EOFError:
            process.join()
        if len(results) < len(numbers):
            results[left[len(set(left) & results.keys())]] = ['ended the process', process.exitcode]
        left = [number for number in left if number not in results]
    return results


# Why a changed file may be read, by the field that was changed. Numbers within their limits, ids
# and names that exist, and lists of other objects are other data, not damaged data.
OTHER_DATA = {
    'annotations': 'objects are missing, or there twice',
    'annotations.area': 'objects without an area are left out; metrics are by area',
    'annotations.bbox': 'a box with other coordinates',
    'annotations.category_id': 'of another class, or of none: left out',
    'annotations.id': 'order of the objects',
    'annotations.image_id': 'of another image, or of none: left out',
    'annotations.iscrowd': 'a crowd, or none',
    'annotations.segmentation': 'a mask with other coordinates; below three points ignored',
    'annotations.segmentation.counts': 'a mask with other runs',
    'categories.id': 'objects of the class are left out',
    'images': 'its objects are left out',
    'images.file_name': 'another image',
    'images.id': 'its objects are left out',
}


def field(path):
    return '.'.join(part for part in path if isinstance(part, str))


def is_sane(found):
    """Whether all boxes and masks are of their image, whatever was in the file."""
    return all(
        0 <= label < len(NAMES) and np.isfinite(box).all() and np.shape(mask) == (HEIGHT, WIDTH)
        for loaded in found[:2]
        for _, boxes, labels, masks, _ in loaded
        for box, label, mask in zip(boxes, labels, masks)
    )


def test_numbers_types_and_structure(slow, tmp_path, fault_report):
    count = 2000 if slow else 300
    results = try_all(tmp_path, range(count))
    kinds = collections.Counter(kind for kind, _ in results.values())
    wrong = {n: r for n, r in results.items() if r[0] not in ('refused', 'equal', 'other')}
    reasons = collections.Counter()
    for number, (kind, _) in results.items():
        if kind == 'other':
            names = sorted({field(path) for path in case(number)[1]})
            known = [name for name in names if name in OTHER_DATA]
            reasons.update(known)
            if not known:
                wrong[number] = ['other', names]
    print(f'\n{count} files: {dict(kinds)}; other data: {dict(reasons.most_common())}')
    survived = count - len(wrong)
    seen = (
        f'{kinds["refused"]} refused in one line each, {kinds["equal"]} read as the unchanged '
        f'file, {kinds["other"]} with other data (e.g. a moved corner)'
    )
    fault_report(
        'Data', 'random numbers, types and structure in a COCO file', count, survived, seen
    )
    assert not wrong, wrong
    assert kinds['refused'] > count / 2
    assert kinds['equal'] > count / 50
