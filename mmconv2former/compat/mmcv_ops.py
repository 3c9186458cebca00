"""Stands in for `mmcv._ext`, mmcv's compiled operators, where mmcv was installed without them.

PyPI has no compiled mmcv, and compiling it takes minutes and a compiler. The operators that
detectors and segmentors use exist in torchvision, compiled for CPU and CUDA, or take a few lines of
PyTorch. Functions here have the names, arguments and in-place results of mmcv's C++ interface.
Other operators raise an error when they are called. Sources: the Python wrappers in `mmcv/ops`, and
the formulas of mmcv's kernels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from .finder import find_changed

NAME = 'mmcv._ext'
HOW_TO_COMPILE = 'Compile them: `make setup MMCV_OPS=compiled`, or docs/installation.md'
SMALLEST = torch.finfo(torch.float32).tiny  # FLT_MIN, below which mmcv takes no logarithm


# ------------------------------------------------------------------------------------- installation
def install() -> None:
    """Lets `import mmcv._ext` find the stand-in if there are no compiled operators that work.

    Compiled operators are used if they can be imported. Calling this again has no effect.
    """
    find_changed(NAME, lambda compiled: ModuleSpec(NAME, CompiledOrStandIn(compiled)))


class CompiledOrStandIn(Loader):
    """Loads the compiled operators, or the stand-in if there are none or they do not load."""

    def __init__(self, compiled: ModuleSpec | None) -> None:
        self.compiled = compiled

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        reason = 'mmcv has no compiled operators'
        if self.compiled is not None and self.compiled.loader is not None:
            try:
                module = module_from_spec(self.compiled)
                self.compiled.loader.exec_module(module)
                return module
            except ImportError as error:  # compiled for another torch, for example
                reason = f"mmcv's compiled operators do not load ({error})"
        import_module('torchvision')  # registers its operators; the network alone does not need it
        if os.environ.get('LOCAL_RANK', '0') == '0':  # one line a machine
            logging.getLogger(__name__).warning(
                f"{reason}: using torchvision's and PyTorch's (docs/installation.md)"
            )
        return StandIn(NAME)

    def exec_module(self, module: ModuleType) -> None:
        pass


class StandIn(ModuleType):
    """A module that has every operator of mmcv; those without a stand-in raise when called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('__'):
            raise AttributeError(name)
        if name in STAND_INS:
            return STAND_INS[name]
        return lambda *args, **kwargs: missing(name)


def missing(name: str) -> NoReturn:
    """Raises the error about an operator without a stand-in."""
    raise NotImplementedError(
        f'mmcv has no compiled operators here, and {name} has no replacement. {HOW_TO_COMPILE}'
    )


def single(*tensors: Tensor) -> list[Tensor]:
    """Half-precision tensors in float32, others unchanged: torchvision has no bfloat16."""
    halves = (torch.float16, torch.bfloat16)
    return [tensor.float() if tensor.dtype in halves else tensor for tensor in tensors]


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a function by autograd."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))


# -------------------------------------------------------------------------------------------- boxes
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that are kept, by descending score."""
    boxes, scores = single(boxes, scores)
    # With offset 1, sides are x2 - x1 + 1.
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503), method 0 naive, 1 linear, 2 Gaussian.

    Writes boxes and decayed scores (n, 5) into the start of `dets` and returns the n indices.
    """
    left = torch.arange(len(boxes))
    remaining, rest = boxes, scores.clone()
    kept: list[int] = []
    while len(left):
        best = int(rest.argmax())
        dets[len(kept), :4] = remaining[best]
        dets[len(kept), 4] = rest[best]
        kept.append(int(left[best]))
        iou = overlaps(remaining[best : best + 1], remaining, False, offset)[0]
        if method == 0:
            decay = (iou < iou_threshold).to(rest.dtype)
        elif method == 1:
            decay = torch.where(iou >= iou_threshold, 1 - iou, 1.0)
        else:
            decay = torch.exp(-(iou**2) / sigma)
        rest = rest * decay
        others = rest >= min_score
        others[best] = False
        left, remaining, rest = left[others], remaining[others], rest[others]
    return torch.tensor(kept, dtype=torch.long)


def overlaps(boxes_1: Tensor, boxes_2: Tensor, of_first: bool, offset: int) -> Tensor:
    """Intersection over union, or over the area of the first, of (..., 4) boxes that broadcast."""
    boxes_1, boxes_2 = boxes_1[..., :, None, :], boxes_2[..., None, :, :]
    low = torch.maximum(boxes_1[..., :2], boxes_2[..., :2])
    high = torch.minimum(boxes_1[..., 2:], boxes_2[..., 2:])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    area_1, area_2 = (
        (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1) for boxes in (boxes_1, boxes_2)
    )
    base = area_1 + 0 * area_2 if of_first else area_1 + area_2 - intersection
    return intersection / base.clamp(min=offset)


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Writes overlaps (M, N), or (M,) if `aligned`; `mode` 0 is IoU, 1 intersection over first."""
    boxes_1, boxes_2 = single(bboxes1, bboxes2)
    if aligned:
        found = overlaps(boxes_1[:, None], boxes_2[:, None], mode == 1, offset)[:, 0, 0]
    else:
        found = overlaps(boxes_1, boxes_2, mode == 1, offset)
    ious.copy_(found)


# ----------------------------------------------------------------------------------------- RoIAlign
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Averages samples of `input` (N, C, H, W) in each bin of `rois` (R, 5).

    Writes into `output` (R, C, height, width). `argmax_y` and `argmax_x` are not needed.

    Raises:
        NotImplementedError: `pool_mode` is 0, the maximum.
    """
    if pool_mode != 1:
        missing("RoIAlign with pool_mode='max'")
    x, boxes = single(input, rois)
    found = torch.ops.torchvision.roi_align(
        x, boxes.to(x.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(found)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of `roi_align_forward` with respect to its input."""
    grad, boxes = single(grad_output, rois)
    found = torch.ops.torchvision._roi_align_backward(
        grad, boxes.to(grad.dtype), spatial_scale, aligned_height, aligned_width,
        *grad_input.shape, sampling_ratio, aligned,
    )  # fmt: skip
    grad_input.copy_(found)


# --------------------------------------------------------------------------------------- focal loss
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv 1708.02002) of logits (N, C); a target of C is background."""
    (x,) = single(input)
    output.copy_(sigmoid_focal_loss(x, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the gradient of each value of `sigmoid_focal_loss_forward` by its logit.

    By its formula: autograd has no gradient where a probability is rounded to 0 or 1.
    """
    (x,) = single(input)
    is_class = target[:, None] == torch.arange(x.shape[1], device=x.device)
    p, rest = x.sigmoid(), (-x).sigmoid()
    log_p, log_rest = (value.clamp(min=SMALLEST).log() for value in (p, rest))
    positive = -alpha * rest**gamma * (rest - gamma * p * log_p)
    negative = -(1 - alpha) * p**gamma * (gamma * rest * log_rest - p)
    grad = torch.where(is_class, positive, negative)
    grad_input.copy_(grad * of_class(weight, target)[:, None] if len(weight) else grad)


def sigmoid_focal_loss(
    x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    """Loss of each logit (N, C)."""
    is_class = target[:, None] == torch.arange(x.shape[1], device=x.device)
    p = x.sigmoid()
    positive = -alpha * (1 - p) ** gamma * p.clamp(min=SMALLEST).log()
    negative = -(1 - alpha) * p**gamma * (1 - p).clamp(min=SMALLEST).log()
    loss = torch.where(is_class, positive, negative)
    return loss * of_class(weight, target)[:, None] if len(weight) else loss


def of_class(weight: Tensor, target: Tensor) -> Tensor:
    """Weights of classes (C,) for targets (N,); background has that of the last class."""
    return weight[target.clamp(0, len(weight) - 1)].float()


# --------------------------------------------------------------------------- deformable convolution
def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Deformable convolution (arXiv 1703.06211) without bias."""
    setting = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(
        torch.ops.torchvision.deform_conv2d(*unmodulated(input, weight, offset), *setting, False)
    )


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_input: Tensor, grad_offset: Tensor,
    weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int,
    dilationW: int, dilationH: int, group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Writes the gradients of `deform_conv_forward` by input and offset."""
    setting = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = torch.ops.torchvision._deform_conv2d_backward(
        *single(grad_output), *unmodulated(input, weight, offset), *setting, False
    )
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor, columns: Tensor,
    ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int,
    dilationH: int, group: int, deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Adds `scale` times the gradient of `deform_conv_forward` by its weight."""
    setting = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = torch.ops.torchvision._deform_conv2d_backward(
        *single(grad_output), *unmodulated(input, grad_weight, offset), *setting, False
    )
    grad_weight.add_(grads[1].to(grad_weight.dtype), alpha=scale)


def unmodulated(input: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Input, weight, offset, an empty mask and a bias of zeros, as torchvision takes them."""
    x, w, o = single(input, weight, offset)
    return x, w, o, x.new_zeros(len(x), 0, 1, 1), x.new_zeros(len(w))


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int,
    pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, group: int, deformable_group: int,
    with_bias: bool,
) -> None:  # fmt: skip
    """Modulated deformable convolution (arXiv 1811.11168)."""
    setting = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    x, w, o, m, b = single(input, weight, offset, mask, bias)
    b = b if with_bias else w.new_zeros(len(w))
    output.copy_(torch.ops.torchvision.deform_conv2d(x, w, o, m, b, *setting, True))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    columns: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor,
    grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor, kernel_h: int, kernel_w: int,
    stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Writes the gradients of `modulated_deform_conv_forward`."""
    setting = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grad, x, w, o, m, b = single(grad_output, input, weight, offset, mask, bias)
    b = b if with_bias else w.new_zeros(len(w))
    grads = torch.ops.torchvision._deform_conv2d_backward(grad, x, w, o, m, b, *setting, True)
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    for target, value in zip([*targets, grad_bias] if with_bias else targets, grads):
        target.copy_(value)


# ----------------------------------------------------------------------------- deformable attention
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159) by mmcv's own formula in PyTorch.

    Args:
        value: (N, keys, heads, C).
        spatial_shapes: (levels, 2) of height and width.
        level_start_index: Not needed.
        sampling_locations: (N, queries, heads, levels, points, 2) in [0, 1], x before y.
        attention_weights: (N, queries, heads, levels, points).
        im2col_step: Not needed.

    Returns:
        (N, queries, heads * C).
    """
    output = attend(spatial_shapes)(*single(value, sampling_locations, attention_weights))
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients of `ms_deform_attn_forward`."""
    inputs = single(value, sampling_locations, attention_weights)
    grads = gradients(attend(spatial_shapes), inputs, grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        target.copy_(grad)


def attend(spatial_shapes: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention as a function of value, sampling locations and attention weights."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
    return lambda value, locations, weights: multi_scale_deformable_attn_pytorch(
        value, shapes, locations, weights
    )


STAND_INS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        nms, softnms, bbox_overlaps, roi_align_forward, roi_align_backward,
        sigmoid_focal_loss_forward, sigmoid_focal_loss_backward, deform_conv_forward,
        deform_conv_backward_input, deform_conv_backward_parameters, modulated_deform_conv_forward,
        modulated_deform_conv_backward, ms_deform_attn_forward, ms_deform_attn_backward,
    )
}  # fmt: skip
