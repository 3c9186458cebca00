"""The ImageNet head of the published network, for mmpretrain's classifiers.

Needs mmpretrain, so the package does not import it: configs name this module in `custom_imports`.
"""

from __future__ import annotations

from mmpretrain.models.heads import ClsHead
from torch import Tensor, nn

from ..registry import MODELS, register
from .arguments import check_int
from .base import PretrainedModule
from .blocks import LAYER_NORM_EPS, PointwiseConv, init_layer


@register(MODELS)
class Conv2FormerClsHead(PretrainedModule, ClsHead):
    """1x1 convolution, GELU, LayerNorm, average over positions, linear classifier.

    Parameter names are the published ones (`head.0`, `head.2`, `pred`).

    Args:
        in_channels: Channels of the last feature map.
        num_classes: Number of classes.
        hidden_channels: Channels of the convolution's output.
        loss: Config of the loss.
        topk: The k of the accuracies reported while training.
        cal_acc: Whether accuracy is reported while training; not possible with mixed labels.
        init_cfg: As for `mmconv2former.Conv2Former`.

    Shapes:
        Takes a tuple of feature maps and uses the last, (N, in_channels, H, W), which must not be
        normalised (`out_norm=False` of the backbone). Returns logits (N, num_classes).

    Raises:
        ValueError, TypeError: A number of channels or classes is not a positive int.

    Source: official repository of arXiv 2211.11943.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1000,
        hidden_channels: int = 1280,
        loss: dict | None = None,
        topk: int | tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        loss = loss or dict(type='CrossEntropyLoss', loss_weight=1.0)
        super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
        check_int('in_channels', in_channels, minimum=1)
        check_int('num_classes', num_classes, minimum=1)
        check_int('hidden_channels', hidden_channels, minimum=1)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.head = nn.Sequential(
            PointwiseConv(in_channels, hidden_channels),
            nn.GELU(),
            nn.LayerNorm(hidden_channels, eps=LAYER_NORM_EPS),
        )
        self.pred = nn.Linear(hidden_channels, num_classes)
        self.apply(init_layer)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The input of the linear classifier, (N, hidden_channels)."""
        x = feats[-1]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'features must have shape (N, in_channels={self.in_channels}, H, W), '
                f'got {tuple(x.shape)}'
            )
        x = self.head(x.permute(0, 2, 3, 1))  # (N, H, W, hidden_channels)
        return x.mean((1, 2))

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.pred(self.pre_logits(feats))
