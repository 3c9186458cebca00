"""Packaging; the version is read from the package, the pins are in `constraints.txt`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmconv2former/version.py').read_text())[1]
EXPORT = ['onnx>=1.16', 'onnxruntime>=1.18', 'onnxscript']  # onnxscript for --dynamo only

setup(
    name='mmconv2former',
    version=VERSION,
    description='Conv2Former as a backbone for detection and segmentation in OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmconv2former', 'mmconv2former.*']),
    # Neither family of OpenMMLab packages: they install the same modules, and users have one.
    install_requires=['torch>=2.1', 'numpy', 'rich'],
    extras_require={
        'onedl': [
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
            'mmpretrain>=1.2.0',
        ],
        'export': EXPORT,
        'test': [
            'hypothesis',
            'markdown-it-py',
            'pytest',
            'ruff',
            'safetensors',
            'tensorboard',
            'timm',
            *EXPORT,
        ],
    },
)
