"""What the distribution asks pip for."""

from importlib import metadata

import mmconv2former


def requirements(extra=None):
    """Names required for an extra, or (None) in any case."""
    names = set()
    for line in metadata.requires('mmconv2former'):
        requirement, _, marker = line.partition(';')
        wanted = f'extra == "{extra}"' in marker.replace("'", '"') if extra else not marker
        if wanted:
            names.add(requirement.split('>')[0].split('<')[0].split('=')[0].strip())
    return names


def test_version_has_one_source():
    assert metadata.version('mmconv2former') == mmconv2former.__version__


def test_no_family_of_openmmlab_is_pulled_in_unasked():
    assert requirements() == {'torch', 'numpy', 'rich'}


def test_each_family_has_its_extra():
    onedl, openmmlab = requirements('onedl'), requirements('openmmlab')
    assert onedl >= {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'}
    assert openmmlab >= {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'}
    assert not onedl & openmmlab
    assert {'pytest', 'ruff'} <= requirements('test')
