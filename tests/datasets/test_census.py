"""What the census counts, refuses and warns of."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.dataset import Compose

from mmconv2former.datasets.census import spread, take_census
from mmconv2former.datasets.checked import CheckedPipeline, DataError


class Samples(list):
    """A dataset: the annotations of its samples."""

    def __init__(self, infos, classes=('ball', 'kite'), **attributes):
        super().__init__(infos)
        self.metainfo = dict(classes=classes)
        vars(self).update(attributes)

    def get_data_info(self, index):
        return dict(self[index])


def objects(*items, **info):
    """A sample: items are label, box and whether it is crowded."""
    found = [dict(bbox_label=n, bbox=box, ignore_flag=int(crowd)) for n, box, crowd in items]
    return dict(width=40, height=30, instances=found, **info)


def masks(*arrays, classes=('ground', 'ball'), **attributes):
    dataset = Samples([dict(labels=np.array(a)) for a in arrays], classes, ignore_index=255,
                      **attributes)  # fmt: skip
    stock = Compose([lambda data: dict(data, gt_seg_map=data['labels'])])
    dataset.pipeline = CheckedPipeline(stock, dataset)
    return dataset


def row(report, name):
    """The cells of a row of the table; its name ends with two spaces."""
    (line,) = [line.strip() for line in report.lines if line.strip().startswith(f'{name}  ')]
    return line[len(name) :].split()


INSIDE, OUTSIDE = [2, 3, 12, 13], [30, 20, 60, 40]
GOOD = objects((0, INSIDE, False), (1, INSIDE, False))


def test_objects_of_both_splits_side_by_side():
    train = Samples([GOOD, objects((1, INSIDE, False), (1, INSIDE, True)), objects()])
    report = take_census(dict(train=train, val=Samples([GOOD])))
    assert row(report, 'images') == ['3', '1']
    assert row(report, 'images without usable objects') == ['1', '0']
    assert row(report, 'objects used') == ['3', '2']
    assert row(report, 'objects crowded') == ['1', '0']
    assert row(report, 'ball') == ['1', '1']
    assert row(report, 'kite') == ['2', '1']
    assert not report.problems
    assert not report.oddities


@pytest.mark.parametrize('split', ['train', 'val'])
def test_crowded_objects_alone_cannot_teach(split):
    crowd = Samples([objects((0, INSIDE, True)), objects((1, INSIDE, True))])
    report = take_census({'train': Samples([GOOD]), split: crowd})
    (problem,) = report.problems
    assert problem.startswith(split)
    assert 'no usable object: all 2 objects are crowded (iscrowd=1)' in problem


def test_part_without_objects():
    """Negatives, or images that are not labelled, beside labelled ones."""
    report = take_census(
        {'train': SimpleNamespace(datasets=[Samples([GOOD]), Samples([objects()])])}
    )
    assert not report.problems
    assert any('no usable object: no objects' in text for text in report.oddities)
    report = take_census(
        {'train': SimpleNamespace(datasets=[Samples([objects()]), Samples([objects()])])}
    )
    assert len(report.problems) == 2


def test_objects_of_other_categories_and_dropped_ones():
    dataset = Samples([GOOD], cat_ids=[5, 6], cat_img_map={5: [1], 6: [1, 1, 1], 9: [1, 1]})
    report = take_census(dict(train=dataset))
    assert row(report, 'objects of other categories') == ['2']
    assert row(report, 'objects dropped (no area, outside)') == ['2']
    (oddity,) = report.oddities
    assert '2 of 4 objects have no area in their image' in oddity


def test_boxes_of_two_corners():
    corners = Samples([objects((0, [20, 20, 20 + 30, 20 + 28], False)), GOOD, GOOD])
    (oddity,) = take_census(dict(train=corners)).oddities
    assert '20.0% of the boxes leave their image' in oddity
    assert 'wider and higher' in oddity
    overlapping = Samples([objects((0, OUTSIDE, False)), objects((0, [30, 0, 35, 9], False))])
    (oddity,) = take_census(dict(train=overlapping)).oddities
    assert 'wider and higher' not in oddity
    few = Samples([objects((0, OUTSIDE, False)), *[GOOD] * 5])
    assert not take_census(dict(train=few)).oddities


def test_classes_without_training_data():
    train = Samples([objects((0, INSIDE, False))])
    report = take_census(dict(train=train, val=Samples([GOOD])))
    assert report.oddities == [
        'val: 50.0% of the objects are of classes without training data: kite'
    ]
    few = Samples([GOOD, *[objects((0, INSIDE, False))] * 9])
    report = take_census(dict(train=train, val=few))
    assert not report.oddities
    assert report.lines[-1].endswith('classes without training data: kite')


def test_pixels_of_each_class():
    report = take_census(dict(train=masks([[0, 0], [1, 255]], [[0, 0], [0, 1]])))
    assert row(report, 'ground') == ['71.4%']
    assert row(report, 'pixels ignored') == ['12.5%']
    assert not report.problems


def test_masks_of_0_and_255():
    report = take_census(dict(train=masks([[0, 255]]), val=masks([[0, 0]])))
    (problem,) = report.problems
    assert "the masks have only class 'ground'; 255 is ignored (50.0%)" in problem
    assert problem.endswith('write it as 1')
    (oddity,) = report.oddities
    assert oddity.startswith('val')


def test_a_sample_of_masks_of_one_class_is_extended():
    arrays = [[[0, 0]]] * 9
    arrays[4] = [[0, 1]]
    report = take_census(dict(train=masks(*arrays)), masks_read=2)
    assert not report.problems
    assert row(report, 'masks read') == ['6', 'of', '9']
    report = take_census(dict(train=masks(*[[[0, 0]]] * 9)), masks_read=2)
    assert len(report.problems) == 1


def test_a_value_that_is_no_class_names_the_file():
    dataset = masks([[0, 7]])
    dataset[0].update(seg_map_path='masks/a.png')
    with pytest.raises(DataError, match=r'masks/a.png: labels \[7\] are not a class'):
        take_census(dict(train=dataset))


def test_images_of_each_class():
    train = Samples([dict(gt_label=0), dict(gt_label=1), dict(gt_label=[0, 1])])
    report = take_census(dict(train=train))
    assert row(report, 'ball') == ['2']
    assert not report.problems
    (problem,) = take_census(dict(train=Samples([dict(gt_label=1)] * 3))).problems
    assert problem == "train: all images are of class 'kite'"
    (problem,) = take_census(dict(train=Samples([dict(gt_label=n) for n in range(3)]))).problems
    assert '1 images have labels that are not a class (0 to 1)' in problem


def test_files_missing_shared_and_unnamed(tmp_path):
    for name in ('a.jpg', 'b.jpg', 'c.webp', '.d.jpg', 'Thumbs.db'):
        (tmp_path / name).touch()

    def of(*names):
        return Samples([dict(GOOD, img_path=str(tmp_path / name)) for name in names])

    report = take_census(dict(train=of('a.jpg', 'x.jpg', 'y.jpg'), val=of('a.jpg', 'a.jpg')))
    (problem,) = report.problems
    assert problem == f'train: 2 files are missing, the first is {tmp_path}/x.jpg'
    assert report.oddities == [
        'val: 1 images are listed more than once',
        '1 of 1 val images are training images too',
    ]
    assert row(report, 'images in the folders that are not named')[:4] == [
        *('1', '.jpg,', '1', '.webp'),
    ]
    elsewhere = Samples([dict(GOOD, img_path='s3://bucket/a.jpg')])
    assert not take_census(dict(train=elsewhere)).problems


def test_images_that_a_dataset_left_out_may_be_missing(tmp_path):
    (tmp_path / 'a.jpg').touch()
    used = dict(GOOD, img_path=str(tmp_path / 'a.jpg'))
    dataset = Samples([used], all_images=[str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg')])
    report = take_census(dict(train=dataset))
    assert not report.problems
    assert row(report, 'images of the file that are not used') == ['1']


def test_what_cannot_be_counted_is_said():
    strange = Samples([dict(instances=3)])
    whole = SimpleNamespace(datasets=[Samples([GOOD]), SimpleNamespace(), strange])
    report = take_census(dict(train=whole))
    assert report.lines[-2] == 'train 2: SimpleNamespace is not counted'
    assert report.lines[-1].startswith('train 3: Samples is not counted: TypeError')
    assert row(report, 'objects used') == ['2']
    assert not report.problems


@pytest.mark.parametrize('classes', ['ab', ''])
def test_samples_that_cannot_be_read_are_said(classes):
    class Strange(Samples):
        def get_data_info(self, index):
            raise TypeError(index)

    report = take_census(dict(train=Strange([GOOD], classes)))
    assert report.lines == ['train: Strange is not counted: TypeError: 0']


def test_long_tables_have_both_ends():
    classes = [f'c{n}' for n in range(50)]
    infos = [dict(gt_label=n) for n in range(50) for _ in range(n)]
    report = take_census(dict(train=Samples(infos, classes)))
    names = [line.split()[0] for line in report.lines if line.startswith('  c')]
    assert names == ['c49', 'c48', 'c47', 'c46', 'c45', 'c5', 'c4', 'c3', 'c2', 'c1']
    assert '  ... 39 classes ...' in report.lines


def test_spread():
    assert spread(10, 3) == [0, 4, 9]
    assert spread(2, 5) == [0, 1]
    assert spread(1, 1) == [0]
