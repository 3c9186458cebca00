"""Layer-wise learning-rate decay for any backbone that can tell its layer depth.

The method is BEiT's (arXiv 2106.08254), as ConvNeXt (arXiv 2201.03545) uses it: the learning rate
of layer i of n, counted from the stem, is the base rate times `decay_rate ** (n - 1 - i)`; layer
n - 1 is all that is not the pretrained backbone.
"""

from __future__ import annotations

import logging
from collections import defaultdict

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from rich.console import Console
from rich.table import Table
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, register

# The name of the backbone's method that tells depth and number of layers of a parameter.
DEPTH_METHODS = {'layer_wise': 'get_layer_depth', 'stage_wise': 'get_stage_depth'}


@register(OPTIM_WRAPPER_CONSTRUCTORS)
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer whose learning rates fall towards the stem.

    Works for any model that has modules named `backbone` with a method `get_layer_depth` (and
    `get_stage_depth` for stage-wise decay): detectors, segmentors, classifiers. The number of
    layers comes from the backbone. Norms, biases and all other parameters of one dimension (layer
    scales) get no weight decay, unless `paramwise_cfg` says otherwise. A parameter that several
    layers share is in one group.

    Args:
        optim_wrapper_cfg: As mmengine's `DefaultOptimWrapperConstructor`; the optimizer may be of
            any type.
        paramwise_cfg: `decay_rate` in (0, 1], `decay_type` ('layer_wise', the default, or
            'stage_wise'), and any key of mmengine's constructor, such as `custom_keys`, which
            multiply with the decay.

    Raises:
        ValueError: `decay_rate` or `decay_type` is missing or not as above, or there is no learning
            rate to decay.
        TypeError: The model has no backbone that can tell its depths (when called).

    Source: arXiv 2106.08254, arXiv 2201.03545.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        options = dict(paramwise_cfg or {})
        self.decay_rate = options.pop('decay_rate', None)
        self.decay_type = options.pop('decay_type', 'layer_wise')
        is_number = isinstance(self.decay_rate, (int, float))
        if not is_number or not 0 < self.decay_rate <= 1:
            raise ValueError(f'decay_rate must be a number in (0, 1], got {self.decay_rate!r}')
        if self.decay_type not in DEPTH_METHODS:
            raise ValueError(
                f'decay_type must be one of {list(DEPTH_METHODS)}, got {self.decay_type!r}'
            )
        if self.decay_rate < 1 and optim_wrapper_cfg['optimizer'].get('lr') is None:
            raise ValueError(
                f'decay_rate={self.decay_rate} needs optim_wrapper.optimizer.lr: the rate that an '
                "optimizer takes by default is not the constructor's to know"
            )
        if 'num_layers' in options:
            raise ValueError('num_layers must not be given: it comes from the backbone')
        if optim_wrapper_cfg['optimizer'].get('weight_decay') is not None:
            for key in ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'):
                options.setdefault(key, 0.0)
        # mmengine's constructor makes parameter groups only if it is given some option.
        options.setdefault('custom_keys', {})
        super().__init__(optim_wrapper_cfg, options)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Adds the groups of `module`: mmengine's for submodules, decayed and merged at the top."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        scales = self._scales(module)
        single_groups: list[dict] = []
        logger = MMLogger.get_current_instance()
        was_disabled, logger.disabled = logger.disabled, True  # else a line for each parameter
        try:
            super().add_params(single_groups, module, prefix, is_dcn_module)
        finally:
            logger.disabled = was_disabled

        names = {id(param): name for name, param in module.named_parameters()}
        merged: dict[tuple, dict] = defaultdict(lambda: {'params': []})
        for group in single_groups:
            (param,) = group.pop('params')
            name = names.pop(id(param), None)
            if name is None:  # of two layers, as in RTMDet's head, and in a group already
                continue
            scale = scales[name]
            if self.base_lr is not None:
                group.setdefault('lr', self.base_lr)
                group['lr'] *= scale
            if self.base_wd is not None:
                group.setdefault('weight_decay', self.base_wd)
            key = (scale, *sorted(group.items()))
            merged[key].update(group, lr_scale=scale)
            merged[key]['params'].append(param)
        params.extend(merged[key] for key in sorted(merged, key=lambda key: key[0]))
        print_log(describe_groups(params), logger='current', level=logging.INFO)

    def _scales(self, model: nn.Module) -> dict[str, float]:
        """The factor of the learning rate of each parameter of `model`, by name."""
        method = DEPTH_METHODS[self.decay_type]
        named_backbones = {
            name: module
            for name, module in model.named_modules()
            if name.split('.')[-1] == 'backbone'
        }
        capable = {
            f'{name}.': getattr(module, method)
            for name, module in named_backbones.items()
            if hasattr(module, method)
        }
        if not capable:
            found = {name: type(module).__name__ for name, module in named_backbones.items()}
            raise TypeError(
                f"decay_type='{self.decay_type}' needs a backbone with a method "
                f'{method}(param_name, prefix), got {found or "no module named backbone"} '
                f'in {type(model).__name__}'
            )
        scales = {}
        for name, _ in model.named_parameters():
            scales[name] = 1.0
            for prefix, get_depth in capable.items():
                if name.startswith(prefix):
                    depth, num_layers = get_depth(name, prefix)
                    scales[name] = self.decay_rate ** (num_layers - 1 - depth)
        return scales


def describe_groups(groups: list[dict]) -> str:
    """A table of an optimizer's parameter groups, as text."""
    table = Table(title='Parameter groups', title_justify='left')
    for column in ('rate scale', 'learning rate', 'weight decay', 'tensors', 'parameters'):
        table.add_column(column, justify='right')
    for group in groups:
        table.add_row(
            f'{group["lr_scale"]:.4f}',
            f'{group["lr"]:.3g}' if 'lr' in group else "optimizer's",
            f'{group["weight_decay"]:g}' if 'weight_decay' in group else "optimizer's",
            str(len(group['params'])),
            f'{sum(param.numel() for param in group["params"]):,}',
        )
    console = Console(width=88)
    with console.capture() as capture:
        console.print(table)
    return '\n' + capture.get()
