"""mmpretrain's image folders: hidden ones, and class numbers by name."""

from types import SimpleNamespace

import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch import nn

from mmconv2former.datasets.census_hook import CensusHook, folder_classes, follow
from mmconv2former.datasets.checked import DataError


def build(root, *names, **settings):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(root / name / 'a.png')
    init_default_scope('mmpretrain')
    return DATASETS.build(dict(type='CustomDataset', data_prefix=str(root), **settings))


def labels(dataset):
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    return {info['img_path'].split('/')[-2]: info['gt_label'] for info in infos}


def test_hidden_folders_are_no_classes(tmp_path):
    dataset = build(tmp_path, '.ipynb_checkpoints', 'ball', 'kite')
    assert dataset.metainfo['classes'] == ('ball', 'kite')
    assert labels(dataset) == dict(ball=0, kite=1)


def test_named_classes_give_the_numbers(tmp_path):
    dataset = build(tmp_path, 'ball', 'kite', classes=('kite', 'box', 'ball'))
    assert dataset.metainfo['classes'] == ('kite', 'box', 'ball')
    assert labels(dataset) == dict(ball=2, kite=0)


def test_other_names_are_those_of_the_folders_in_order(tmp_path):
    """As ImageNet's: n01440764 is 'tench'."""
    dataset = build(tmp_path, 'n01', 'n02', classes=('tench', 'goldfish'))
    assert labels(dataset) == dict(n01=0, n02=1)


# ------------------------------------------------------------------------ as the census has them
def test_folders_of_validation_get_the_numbers_of_training(tmp_path):
    train = build(tmp_path / 'train', 'ball', 'box', 'kite')
    val = build(tmp_path / 'val', 'ball', 'kite')
    assert labels(val) == dict(ball=0, kite=1)
    assert follow(SimpleNamespace(datasets=[val]), folder_classes(train)) == [val]
    assert labels(val) == dict(ball=0, kite=2)
    assert val.metainfo['classes'] == ('ball', 'box', 'kite')
    assert follow(val, folder_classes(train)) == []
    with pytest.raises(DataError, match='folders that are not a class of training: kite'):
        follow(build(tmp_path / 'other', 'kite'), ('ball', 'box'))
    assert folder_classes(SimpleNamespace(metainfo=dict(classes='ab'))) is None


@pytest.mark.parametrize('split', ['val', 'test'])
def test_folders_of_an_evaluation_get_the_numbers_of_the_checkpoint(split, tmp_path):
    """Also if the config has training data, which such a run does not build."""
    data = build(tmp_path, 'ball', 'kite')
    loop = SimpleNamespace(
        dataloader=SimpleNamespace(dataset=data), evaluator=SimpleNamespace(metrics=[])
    )
    runner = SimpleNamespace(_train_loop=dict(max_epochs=1), model=nn.Identity(),
                             visualizer=SimpleNamespace(dataset_meta={}),
                             logger=MMLogger.get_current_instance(), val_loop=loop,
                             test_loop=loop)  # fmt: skip
    hook, names = CensusHook(), ('ball', 'box', 'kite')
    hook.after_load_checkpoint(runner, dict(meta=dict(dataset_meta=dict(classes=names))))
    getattr(hook, f'before_{split}')(runner)
    assert labels(data) == dict(ball=0, kite=2)
