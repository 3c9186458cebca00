"""mmpretrain's image folders: hidden ones, and class numbers by name."""

import pytest
from mmengine.registry import DATASETS, init_default_scope


@pytest.fixture
def build(tmp_path):
    def build(folders, **settings):
        for name in folders:
            (tmp_path / name).mkdir()
            (tmp_path / name / 'a.png').touch()
        init_default_scope('mmpretrain')
        return DATASETS.build(dict(type='CustomDataset', data_prefix=str(tmp_path), **settings))

    return build


def labels(dataset):
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    return {info['img_path'].split('/')[-2]: info['gt_label'] for info in infos}


def test_hidden_folders_are_no_classes(build):
    dataset = build(['.ipynb_checkpoints', 'ball', 'kite'])
    assert dataset.metainfo['classes'] == ('ball', 'kite')
    assert labels(dataset) == dict(ball=0, kite=1)


def test_named_classes_give_the_numbers(build):
    dataset = build(['ball', 'kite'], classes=('kite', 'box', 'ball'))
    assert dataset.metainfo['classes'] == ('kite', 'box', 'ball')
    assert labels(dataset) == dict(ball=2, kite=0)


def test_other_names_are_those_of_the_folders_in_order(build):
    """As ImageNet's: n01440764 is 'tench'."""
    dataset = build(['n01', 'n02'], classes=('tench', 'goldfish'))
    assert labels(dataset) == dict(n01=0, n02=1)
