"""A config and a checkpoint that holds its whole model, for `predict.py` and `export.py`.

`test.py` takes a part of it, and the option `--cuda-graphs` of both is here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import nn

from common.cli import add_config_arguments, load_config
from mmconv2former import use_cuda_graphs

BACKBONE = 'backbone.'


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of both tools.

    Args:
        description: The docstring of the tool.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint with the weights of the whole model')
    add_config_arguments(parser)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config of the command line, its model without weights to begin from.

    Raises:
        SystemExit: The config or an option is not usable.
    """
    config = load_config(args)
    drop_pretrained(config)
    return config


def drop_pretrained(config: Config) -> None:
    """Takes the pretrained weights out of a model of which a checkpoint holds all weights."""
    for part in ('backbone', 'head'):
        if 'init_cfg' in (config.model.get(part) or {}):
            config.model[part].init_cfg = None


def one_of(options: Mapping[str, Any], config: Config) -> Any:
    """The one of some options that is for the config's library.

    Args:
        options: By default scope, such as 'mmdet'.
        config: A whole config.

    Raises:
        SystemExit: There is none.
    """
    scope = config.get('default_scope')
    if scope not in options:
        raise SystemExit(
            f'error: default_scope of {config.filename} must be one of {", ".join(options)}, '
            f'got {scope!r}'
        )
    return options[scope]


def read_weights(checkpoint: str) -> dict[str, Any]:
    """The content of a checkpoint; see `load_from_checked_file` in `checkpoint/reading.py`."""
    return CheckpointLoader.load_checkpoint(checkpoint, 'cpu')


def to_deploy(model: nn.Module) -> None:
    """Gives the backbone its form for inference, if it has one."""
    switch_to_deploy = getattr(model.backbone, 'switch_to_deploy', None)
    if switch_to_deploy is not None:
        switch_to_deploy()


def add_cuda_graphs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cuda-graphs',
        action='store_true',
        help='replay the backbone as a CUDA graph: faster on a GPU, for images of one size',
    )


def check_cuda_graphs(device: str) -> None:
    """Raises SystemExit unless the device, such as cuda:1, has what `--cuda-graphs` needs."""
    if not device.startswith('cuda'):
        raise SystemExit(f'error: --cuda-graphs needs a CUDA device, the device is {device}')


def replay_backbone(model: nn.Module) -> None:
    """Does what `--cuda-graphs` asks for, to a model or to one in its wrapper for processes."""
    inner: Any = model.module if is_model_wrapper(model) else model
    use_cuda_graphs(inner.backbone)
