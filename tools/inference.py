"""What `predict.py` and `export.py` share: a config and a checkpoint that holds its whole model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import add_trust_argument, is_local, load_config
from mmengine.config import Config, DictAction
from mmengine.runner import CheckpointLoader
from torch import nn

from mmconv2former.comparators import COMPARATORS
from mmconv2former.weights import (
    CheckpointError,
    behind_prefix,
    check_fit,
    differences,
    without_module,
)

BACKBONE = 'backbone.'


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of both tools; the others that `load_config` reads have no use.

    Args:
        description: The docstring of the tool.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(work_dir=None, data_root=None, launcher='none', local_rank=0)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint with the weights of the whole model')
    parser.add_argument(
        '--backbone',
        choices=list(COMPARATORS),
        metavar='NAME',
        help="another network in Conv2Former's place: a name of docs/comparators.md",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change the config, as in train.py',
    )
    add_trust_argument(parser)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config of the command line, its model without weights to begin from.

    Raises:
        SystemExit: The config or an option is not usable, or there is no such checkpoint.
    """
    config = load_config(args)
    if is_local(args.checkpoint) and not Path(args.checkpoint).is_file():
        raise SystemExit(f'error: checkpoint {args.checkpoint} does not exist')
    for part in ('backbone', 'head'):
        if 'init_cfg' in (config.model.get(part) or {}):
            config.model[part].init_cfg = None  # the checkpoint holds all weights
    return config


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
    """What a checkpoint holds, with `state_dict`; see `weights.load_from_checked_file`."""
    return CheckpointLoader.load_checkpoint(checkpoint, 'cpu')


def load_whole_model(model: nn.Module, content: Mapping[str, Any], checkpoint: str) -> None:
    """Loads all the weights of a model, where mmengine would go on with those that fit.

    Args:
        model: A detector, segmentor or classifier.
        content: What `read_weights` returns.
        checkpoint: Its name, for messages.

    Raises:
        CheckpointError: The file is of another network; the model is then unchanged.
    """
    found, expected = without_module(content['state_dict']), model.state_dict()
    try:
        # A deeper backbone of the same width has all names that the model asks for.
        backbones = [behind_prefix(state, BACKBONE) for state in (found, expected)]
        differing = list(differences(*backbones))
        if differing:
            raise CheckpointError('; '.join(differing))
        check_fit(found, expected, may_miss=None)
    except CheckpointError as error:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} does not fit the model of this config: {error}'
        ) from error
    model.load_state_dict(found, strict=False)


def to_deploy(model: nn.Module) -> None:
    """Gives the backbone its form for inference, if it has one."""
    if hasattr(model.backbone, 'switch_to_deploy'):
        model.backbone.switch_to_deploy()
