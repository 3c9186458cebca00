"""mmdet and mmpretrain beside a transformers too new for mmpretrain's multimodal networks."""

from helpers.in_process import run_python

CODE = """
import mmconv2former
import mmdet.models, mmpretrain.models
from mmpretrain.utils.dependency import WITH_MULTIMODAL
print(WITH_MULTIMODAL)
"""
CHANGED_BY_TORCH = 'class PretrainedConfig: pass'  # torch 2.1 looks for it when it is imported


def test_mmdet_and_mmpretrain_are_imported(tmp_path):
    """With a stand-in for transformers, as empty for mmpretrain as the real one."""
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers/__init__.py').write_text('from . import configuration_utils')
    (tmp_path / 'transformers/configuration_utils.py').write_text(CHANGED_BY_TORCH)
    info = tmp_path / 'transformers-5.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n')
    assert run_python(f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CODE}') == 'False\n'
