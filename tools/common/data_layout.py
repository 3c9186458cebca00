"""The official datasets: categories, counts, archives and where to unpack them."""

from __future__ import annotations

COCO_NAMES = (
    'person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire '
    'hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, '
    'bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, '
    'snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, '
    'tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, '
    'sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted '
    'plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, '
    'microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, '
    'hair drier, toothbrush'
).split(', ')
UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = dict(zip(COCO_NAMES, (id_ for id_ in range(1, 91) if id_ not in UNUSED_COCO_IDS)))
COCO_SPLITS = {'train': 'train2017', 'val': 'val2017'}
COCO_IMAGES = {'train': 118_287, 'val': 5_000}
COCO_OBJECTS = {'train': 860_001, 'val': 36_781}  # annotations, including crowd regions

ADE_SPLITS = {'train': 'training', 'val': 'validation'}
ADE_IMAGES = {'train': 20_210, 'val': 2_000}
ADE_CLASSES = 150  # labels 1 to 150 in the files, 0 for everything else

DEFAULT_ROOT = {'coco': 'data/coco', 'ade': 'data/ade/ADEChallengeData2016'}
HOW_TO_GET = {
    'coco': """\
COCO 2017 (https://cocodataset.org, 20 GB): unpack in {root}
  http://images.cocodataset.org/zips/train2017.zip                             -> train2017/*.jpg
  http://images.cocodataset.org/zips/val2017.zip                               -> val2017/*.jpg
  http://images.cocodataset.org/annotations/annotations_trainval2017.zip       -> annotations/
    (only instances_train2017.json and instances_val2017.json are read)""",
    'ade': """\
ADE20K, the 150 classes of the scene parsing benchmark (http://sceneparsing.csail.mit.edu, 1 GB):
  http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, unpacked as {root}
    -> images/training/*.jpg, images/validation/*.jpg
    -> annotations/training/*.png, annotations/validation/*.png""",
}
