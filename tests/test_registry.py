"""Both spellings of the type names, from every registry, with no import beyond what is promised."""

from importlib import import_module

import pytest
from helpers.in_process import run_python

from mmconv2former.compat.mmcv_ops import StandIn

HOSTS = ['mmengine', 'mmdet', 'mmseg', 'mmpretrain']


@pytest.mark.parametrize('host', HOSTS)
def test_names_are_found_from_every_registry(host):
    """Names with the scope without an import, short ones after it.

    mmdet itself needs mmcv's operators, which the import stands in for.
    """
    is_needed = host == 'mmdet' and isinstance(import_module('mmcv._ext'), StandIn)
    code = f"""
{'import mmconv2former' if is_needed else ''}
import sys
from mmengine.registry import DefaultScope, HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS
from {host}.registry import MODELS
backbone = MODELS.build(dict(type='mmconv2former.Conv2Former', arch='nano', out_indices=0))
print(type(backbone).__module__, backbone.channels)
DefaultScope.get_instance('test', scope_name='{host}')
print(OPTIM_WRAPPER_CONSTRUCTORS.get('mmconv2former.LayerDecayOptimWrapperConstructor').__module__)
print(WEIGHT_INITIALIZERS.get('mmconv2former.Pretrained').__module__)
import mmconv2former
print(MODELS.get('Conv2Former') is MODELS.get('mmconv2former.Conv2Former') is type(backbone))
"""
    assert run_python(code).splitlines()[-4:] == [
        'mmconv2former.models.conv2former (64,)',
        'mmconv2former.engine.layer_decay',
        'mmconv2former.checkpoint.loading',
        'True',
    ]


def test_importing_the_package_imports_no_host_library():
    code = """
import sys
import mmconv2former
print(sorted({'mmdet', 'mmseg', 'mmpretrain', 'mmcv', 'timm'} & set(sys.modules)))
print(mmconv2former.__version__.count('.'))
"""
    assert run_python(code) == '[]\n2\n'


def test_missing_mmengine_is_explained():
    code = """
import sys
sys.modules['mmengine'] = None
try:
    import mmconv2former
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'mmconv2former[onedl]'" in run_python(code)
