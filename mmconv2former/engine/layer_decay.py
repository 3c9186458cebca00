"""Layer-wise learning-rate decay for any backbone that knows the depth of its layers.

The method is BEiT's (arXiv 2106.08254), as used by ConvNeXt (arXiv 2201.03545): layer i of n,
counted from the stem, has the base rate times `decay_rate ** (n - 1 - i)`. Layer n - 1 is
everything outside the pretrained backbone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, register

# The backbone's method that returns (depth, number of layers) of a parameter.
DEPTH_METHODS = {'layer_wise': 'get_layer_depth', 'stage_wise': 'get_stage_depth'}


def lr_scale(name: str, depth_methods: Mapping[str, Any], decay_rate: float) -> float:
    """Factor of the learning rate of a parameter.

    Args:
        name: Name of the parameter in the model.
        depth_methods: For each backbone its prefix, such as 'backbone.', and its depth method.
        decay_rate: Factor from one layer to the one before it.
    """
    for prefix, get_depth in depth_methods.items():
        if name.startswith(prefix):
            depth, num_layers = get_depth(name, prefix)
            return float(decay_rate ** (num_layers - 1 - depth))
    return 1.0


@register(OPTIM_WRAPPER_CONSTRUCTORS)
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer whose learning rates decay towards the stem.

    Works for any model with modules named `backbone` that have a method `get_layer_depth` (or
    `get_stage_depth` for stage-wise decay): detectors, segmentors, classifiers. Norms, biases and
    other one-dimensional parameters (layer scales) get no weight decay, unless `paramwise_cfg` says
    otherwise. Parameters with the same settings share a group.

    Args:
        optim_wrapper_cfg: As in mmengine's `DefaultOptimWrapperConstructor`.
        paramwise_cfg: `decay_rate` in (0, 1], `decay_type` ('layer_wise', the default, or
            'stage_wise'), and any key of mmengine's constructor. The `lr_mult` of `custom_keys`
            is multiplied by the decay.

    Raises:
        ValueError: `decay_rate` or `decay_type` is missing or not as above, or the optimizer has no
            `lr`.
        TypeError: The model has no backbone with the method (when called).

    Source: arXiv 2106.08254, arXiv 2201.03545.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        options = dict(paramwise_cfg or {})
        self.decay_rate = options.pop('decay_rate', None)
        self.decay_type = options.pop('decay_type', 'layer_wise')
        optimizer = optim_wrapper_cfg['optimizer']
        if not isinstance(self.decay_rate, (int, float)) or not 0 < self.decay_rate <= 1:
            raise ValueError(f'decay_rate must be a number in (0, 1], got {self.decay_rate!r}')
        if self.decay_type not in DEPTH_METHODS:
            raise ValueError(
                f'decay_type must be one of {list(DEPTH_METHODS)}, got {self.decay_type!r}'
            )
        if optimizer.get('lr') is None:
            raise ValueError('decay_rate needs a learning rate: set optim_wrapper.optimizer.lr')
        if optimizer.get('weight_decay') is not None:
            for key in ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'):
                options.setdefault(key, 0.0)
        options.setdefault('custom_keys', {})  # mmengine makes groups only if an option is set
        super().__init__(optim_wrapper_cfg, options)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Adds the groups of `module`; for the whole model, decays and merges them."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        depth_methods = self._depth_methods(module)
        single_groups: list[dict] = []  # one for each parameter
        logger = MMLogger.get_current_instance()
        was_disabled, logger.disabled = logger.disabled, True  # mmengine logs every parameter
        try:
            super().add_params(single_groups, module, prefix, is_dcn_module)
        finally:
            logger.disabled = was_disabled

        names = {id(param): name for name, param in module.named_parameters()}
        merged: dict[tuple, dict] = {}
        for group in single_groups:
            (param,) = group.pop('params')
            name = names.pop(id(param), None)
            if name is None:  # shared by two layers, as in RTMDet's head
                continue
            group['lr_scale'] = lr_scale(name, depth_methods, self.decay_rate)
            group['lr'] = group.get('lr', self.base_lr) * group['lr_scale']
            if self.base_wd is not None:
                group.setdefault('weight_decay', self.base_wd)
            key = tuple(sorted(group.items()))
            merged.setdefault(key, dict(group, params=[]))['params'].append(param)
        params.extend(sorted(merged.values(), key=lambda group: group['lr_scale']))
        print_log(describe_groups(params), logger='current', level=logging.INFO)

    def _depth_methods(self, model: nn.Module) -> dict[str, Any]:
        """The depth method of each backbone, by prefix."""
        method = DEPTH_METHODS[self.decay_type]
        backbones = {
            name: module
            for name, module in model.named_modules()
            if name.split('.')[-1] == 'backbone'
        }
        methods = {
            f'{name}.': getattr(module, method)
            for name, module in backbones.items()
            if hasattr(module, method)
        }
        if not methods:
            found = {name: type(module).__name__ for name, module in backbones.items()}
            raise TypeError(
                f"decay_type='{self.decay_type}' needs a backbone with a method "
                f'{method}(param_name, prefix), got {found or "no module named backbone"} '
                f'in {type(model).__name__}'
            )
        return methods


def describe_groups(groups: list[dict]) -> str:
    """A table of parameter groups."""
    lines = ['Parameter groups:', f'{"lr scale":>9} {"lr":>9} {"decay":>7} {"parameters":>12}']
    for group in groups:
        decay = group.get('weight_decay', '')  # the optimizer's default
        count = sum(param.numel() for param in group['params'])
        lines.append(f'{group["lr_scale"]:9.4f} {group["lr"]:9.3g} {decay:>7} {count:12,}')
    return '\n'.join(lines)
