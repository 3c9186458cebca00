"""Conv2Former (arXiv 2211.11943) as a backbone for OpenMMLab.

Importing this package registers its classes; it imports none of mmdet, mmseg and mmpretrain.
"""

try:
    import mmengine  # noqa: F401  (to explain what to do if it is missing)
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ModuleNotFoundError(
        'mmconv2former needs mmengine, which is not installed. Install one family of OpenMMLab '
        "packages, never both: pip install 'mmconv2former[onedl]' (maintained, torch >= 2.6) or "
        "'mmconv2former[openmmlab]' (the original releases); docs/installation.md.",
        name='mmengine',
    ) from error

from .compat import annotation_files, image_folders, mmcv_ops, new_transformers
from .engine.cuda_graphs import CudaGraphsHook, use_cuda_graphs
from .engine.layer_decay import LayerDecayOptimWrapperConstructor
from .engine.runner import ReliableRunner
from .models.baselines import Baseline
from .models.conv2former import Conv2Former
from .models.isotropic import Conv2FormerIsotropic
from .version import __version__

mmcv_ops.install()
new_transformers.install()
annotation_files.install()
image_folders.install()

__all__ = [
    'Baseline',
    'Conv2Former',
    'Conv2FormerClsHead',
    'Conv2FormerIsotropic',
    'CudaGraphsHook',
    'LayerDecayOptimWrapperConstructor',
    'ReliableRunner',
    '__version__',
    'use_cuda_graphs',
]


def __getattr__(name: str) -> type:
    if name == 'Conv2FormerClsHead':  # needs mmpretrain, which users of a detector may not have
        from .models.cls_head import Conv2FormerClsHead

        return Conv2FormerClsHead
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
