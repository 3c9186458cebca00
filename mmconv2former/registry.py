"""The scope `mmconv2former`: child registries of mmengine's.

`type='mmconv2former.Conv2Former'` is found from the registries of mmengine, mmdet, mmseg and
mmpretrain without any import, because mmengine imports `<scope>.registry` for an unknown scope,
and then the `locations` below. The short `type='Conv2Former'` is found once the package is
imported, because `register` also adds the class to mmengine's root registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine import registry as roots
from mmengine.registry import Registry

Class = TypeVar('Class', bound=type)


def child(parent: Registry, *modules: str) -> Registry:
    """The registry of our scope below a root registry; its classes are in these modules."""
    locations = [f'mmconv2former.{module}' for module in modules]
    return Registry(parent.name, parent=parent, scope='mmconv2former', locations=locations)


MODELS = child(roots.MODELS, 'models.conv2former', 'models.isotropic', 'models.baselines')
OPTIM_WRAPPER_CONSTRUCTORS = child(roots.OPTIM_WRAPPER_CONSTRUCTORS, 'engine.layer_decay')
RUNNERS = child(roots.RUNNERS, 'engine.runner')
HOOKS = child(
    roots.HOOKS,
    'engine.hooks',
    'engine.finite',
    'engine.dry_run',
    'datasets.census_hook',
    'engine.resuming',
    'engine.schedule',
    'engine.stopping',
)
DATASETS = child(roots.DATASETS, 'datasets.checked')
OPTIM_WRAPPERS = child(roots.OPTIM_WRAPPERS, 'engine.amp')
WEIGHT_INITIALIZERS = child(roots.WEIGHT_INITIALIZERS, 'checkpoint.loading')


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
