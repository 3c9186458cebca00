"""Trains Mask R-CNN for one step on random images, to check that the installed packages work.

    python tools/check_setup.py

`make setup` ends with this. It needs no data and takes seconds. A GPU is used if there is one.
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

import common  # before torch
import torch
from common.quiet import hide_known_messages
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmconv2former.compat.mmcv_ops import StandIn

RECIPE = Path(__file__).resolve().parents[1] / 'configs/detection/mask_rcnn_conv2former_n.py'
SIDE = 64  # pixels of the images


def main() -> None:
    """Builds the recipe's model from random weights and computes the gradients of its losses."""
    common.parser_of(__doc__).parse_args()
    hide_known_messages()
    logging.getLogger('mmconv2former').setLevel(logging.ERROR)  # the line below says it
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    init_default_scope('mmdet')
    config = Config.fromfile(RECIPE).model
    config.backbone.init_cfg = None
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = MODELS.build(config).train().to(device)
    images = demo_mm_inputs(2, [[3, SIDE, SIDE]] * 2, with_mask=True)
    data = model.data_preprocessor(images, training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    if not loss.isfinite():
        raise SystemExit(f'error: the loss is {loss.item()}')
    ops = import_module('mmcv._ext')
    source = 'torchvision' if isinstance(ops, StandIn) else 'compiled mmcv'
    print(
        f'Mask R-CNN trains on {device}: loss {loss.item():.2f}, torch {torch.__version__}, '
        f'operators of {source}'
    )


if __name__ == '__main__':
    main()
