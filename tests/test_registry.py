"""Both spellings of the type name, from every registry, with no import beyond what is promised."""

import subprocess
import sys

import pytest

HOSTS = ['mmengine', 'mmdet', 'mmseg', 'mmpretrain']


def run_python(code):
    """Standard output of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize('host', HOSTS)
@pytest.mark.parametrize(
    ('preparation', 'type_name'),
    [
        ('pass', 'mmconv2former.Conv2Former'),
        ('import mmconv2former', 'mmconv2former.Conv2Former'),
        ('import mmconv2former', 'Conv2Former'),
    ],
)
def test_backbone_builds_from_every_registry(host, preparation, type_name):
    code = f"""
from {host}.registry import MODELS
{preparation}
backbone = MODELS.build(dict(type='{type_name}', arch='nano', out_indices=0))
print(type(backbone).__module__, backbone.channels)
"""
    assert run_python(code) == 'mmconv2former.models.conv2former (64,)'


@pytest.mark.parametrize('host', HOSTS)
def test_optimizer_constructor_is_found_from_every_scope(host):
    code = f"""
from mmengine.registry import DefaultScope, OPTIM_WRAPPER_CONSTRUCTORS
import {host}.registry
DefaultScope.get_instance('test', scope_name='{host}')
name = 'mmconv2former.LayerDecayOptimWrapperConstructor'
print(OPTIM_WRAPPER_CONSTRUCTORS.get(name).__module__)
"""
    assert run_python(code) == 'mmconv2former.engine.layer_decay'


def test_importing_the_package_imports_no_host_library():
    code = """
import sys
import mmconv2former
print(sorted({'mmdet', 'mmseg', 'mmpretrain', 'mmcv', 'timm'} & set(sys.modules)))
"""
    assert run_python(code) == '[]'


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


def test_version():
    assert run_python('import mmconv2former; print(mmconv2former.__version__)').count('.') == 2
