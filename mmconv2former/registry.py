"""The scope `mmconv2former`: child registries of mmengine's.

`type='mmconv2former.Conv2Former'` is found from the registries of mmengine, mmdet, mmseg and
mmpretrain without any import, because mmengine imports `<scope>.registry` for an unknown scope,
and then the `locations` below. The short `type='Conv2Former'` is found once the package is
imported, because `register` also adds the class to mmengine's root registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import RUNNERS as ROOT_RUNNERS
from mmengine.registry import WEIGHT_INITIALIZERS as ROOT_WEIGHT_INITIALIZERS
from mmengine.registry import Registry, build_runner_from_cfg

Class = TypeVar('Class', bound=type)

MODELS = Registry(
    'model',
    parent=ROOT_MODELS,
    scope='mmconv2former',
    locations=[
        'mmconv2former.models.conv2former',
        'mmconv2former.models.isotropic',
        'mmconv2former.models.baselines',
    ],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmconv2former',
    locations=['mmconv2former.engine.layer_decay'],
)
RUNNERS = Registry(
    'runner',
    parent=ROOT_RUNNERS,
    scope='mmconv2former',
    locations=['mmconv2former.engine.runner'],
    build_func=build_runner_from_cfg,
)
HOOKS = Registry(
    'hook',
    parent=ROOT_HOOKS,
    scope='mmconv2former',
    locations=[
        'mmconv2former.engine.hooks',
        'mmconv2former.engine.finite',
        'mmconv2former.engine.dry_run',
        'mmconv2former.datasets.census_hook',
        'mmconv2former.engine.resuming',
        'mmconv2former.engine.schedule',
        'mmconv2former.engine.stopping',
    ],
)
DATASETS = Registry(
    'dataset',
    parent=ROOT_DATASETS,
    scope='mmconv2former',
    locations=['mmconv2former.datasets.checked'],
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=ROOT_OPTIM_WRAPPERS,
    scope='mmconv2former',
    locations=['mmconv2former.engine.amp'],
)
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=ROOT_WEIGHT_INITIALIZERS,
    scope='mmconv2former',
    locations=['mmconv2former.checkpoint.loading'],
)


def register(registry: Registry) -> Callable[[Class], Class]:
    """Class decorator that adds a class to one of the registries above and to its root.

    Args:
        registry: A child registry of this module.

    Raises:
        KeyError: The name is taken.
    """

    def add(cls: Class) -> Class:
        registry.register_module(module=cls)
        registry.parent.register_module(module=cls)
        return cls

    return add
