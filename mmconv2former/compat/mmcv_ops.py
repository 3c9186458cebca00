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
from typing import Any

import torch
import torch.nn.functional as F
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

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f'mmcv has no compiled operators here, and {name} has no replacement. '
                f'{HOW_TO_COMPILE}'
            )

        return missing


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
    """Pools `input` (N, C, H, W) over `rois` (R, 5) into `output` (R, C, height, width).

    With `pool_mode` 1 the samples of a bin are averaged. With 0 the largest is taken, and its
    position in the feature map is written into `argmax_y` and `argmax_x`.
    """
    x, boxes = single(input, rois)
    boxes = boxes.to(x.dtype)
    align = torch.ops.torchvision.roi_align
    size = aligned_height, aligned_width
    if pool_mode == 1:
        output.copy_(align(x, boxes, spatial_scale, *size, sampling_ratio, aligned))
        return
    starts, bins = bins_of(boxes, size, spatial_scale, aligned)
    for samples, of_grid in grids(bins, sampling_ratio):
        # Bins with one sample each are the samples of the larger bins.
        fine = [size[0] * samples[0], size[1] * samples[1]]
        values = align(x, boxes[of_grid], spatial_scale, *fine, 1, aligned)
        largest, index = F.max_pool2d(values, samples, return_indices=True)
        output[of_grid] = largest.to(output.dtype)
        steps = bins[of_grid] / bins.new_tensor(samples)  # (r, 2)
        for axis, argmax, place in (
            (0, argmax_y, index // fine[1]),
            (1, argmax_x, index % fine[1]),
        ):
            start, step = (value[:, axis, None, None, None] for value in (starts[of_grid], steps))
            argmax[of_grid] = (start + (place + 0.5) * step).to(argmax.dtype)


def bins_of(
    boxes: Tensor, size: tuple[int, int], spatial_scale: float, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Start (R, 2) of regions in the feature map and size (R, 2) of their bins, y before x."""
    corners = boxes[:, [2, 1, 4, 3]] * spatial_scale - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    sides = sides if aligned else sides.clamp(min=1)
    return corners[:, :2], sides / sides.new_tensor(size)


def grids(bins: Tensor, sampling_ratio: int) -> list[tuple[list[int], Tensor]]:
    """Samples of a bin along y and x, with the indices of the regions that have so many."""
    if sampling_ratio > 0:
        return [([sampling_ratio] * 2, torch.arange(len(bins), device=bins.device))]
    counts = bins.ceil().long().clamp(min=1)
    return [
        (samples.tolist(), (counts == samples).all(1).nonzero()[:, 0])
        for samples in torch.unique(counts, dim=0)
    ]


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
    grad, boxes, y, x = single(grad_output, rois, argmax_y, argmax_x)
    if pool_mode == 1:
        found = torch.ops.torchvision._roi_align_backward(
            grad, boxes.to(grad.dtype), spatial_scale, aligned_height, aligned_width,
            *grad_input.shape, sampling_ratio, aligned,
        )  # fmt: skip
        grad_input.copy_(found)
        return
    number, channels, height, width = grad_input.shape
    found = torch.zeros(number, channels, height * width, dtype=grad.dtype, device=grad.device)
    is_inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    image = boxes[:, 0].long()[:, None, None, None].expand(y.shape)
    channel = torch.arange(channels, device=grad.device)[:, None, None].expand(y.shape)
    for at_y, weight_y in neighbours(y):
        for at_x, weight_x in neighbours(x):
            place = (at_y.clamp(max=height - 1) * width + at_x.clamp(max=width - 1)).long()
            value = grad * weight_y * weight_x * is_inside
            found.index_put_((image, channel, place), value, accumulate=True)
    grad_input.copy_(found.view_as(grad_input))


def neighbours(position: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels beside positions along an axis, with their bilinear weights."""
    low = position.floor()
    return [(low, 1 - (position - low)), (low + 1, position - low)]


# ------------------------------------------------------------------------------------------ RoIPool
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum of `input` (N, C, H, W) in each bin of `rois` (R, 5); `argmax` are its positions.

    mmcv rounds the borders of bins differently than torchvision. Empty bins are 0, at position -1.
    """
    height, width = input.shape[2:]
    output.zero_()
    argmax.fill_(-1)
    for i, (image, *corners) in enumerate(rois.float().tolist()):
        x_1, y_1 = (value * spatial_scale for value in corners[:2])
        x_2, y_2 = ((value + 1) * spatial_scale for value in corners[2:])
        if x_2 <= x_1 or y_2 <= y_1:
            continue
        columns = pooled_ranges(x_1, x_2, pooled_width, width)
        for h, (top, bottom) in enumerate(pooled_ranges(y_1, y_2, pooled_height, height)):
            if bottom <= top:
                continue
            of_rows, rows = input[int(image), :, top:bottom].max(1)  # (C, W)
            for w, (left, right) in enumerate(columns):
                if right > left:
                    output[i, :, h, w], column = of_rows[:, left:right].max(1)
                    column = column[:, None] + left
                    argmax[i, :, h, w] = ((rows.gather(1, column) + top) * width + column)[
                        :, 0
                    ].int()


def pooled_ranges(start: float, end: float, bins: int, size: int) -> list[tuple[int, int]]:
    """First pixel of each bin along an axis, and the first after it, within the feature map."""
    step = torch.tensor((end - start) / bins)
    edges = torch.arange(bins + 1) * step + start
    low, high = edges[:-1].floor().clamp(0, size), edges[1:].ceil().clamp(0, size)
    return [(int(a), int(b)) for a, b in zip(low, high)]


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes the gradient of `roi_pool_forward` with respect to its input."""
    found = torch.zeros_like(grad_input, memory_format=torch.contiguous_format).flatten(2)
    image = rois[:, 0].long()[:, None, None, None].expand(argmax.shape)
    channel = torch.arange(argmax.shape[1], device=argmax.device)[:, None, None].expand(
        argmax.shape
    )
    is_inside = argmax >= 0
    places = (image, channel, argmax.long().clamp(min=0))
    found.index_put_(places, grad_output * is_inside, accumulate=True)
    grad_input.copy_(found.view_as(grad_input))


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


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of probabilities (N, C), 0 for negative targets."""
    p, _ = softmax_focal_terms(input, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=SMALLEST).log()
    loss = torch.where(target >= 0, loss, 0.0)
    output.copy_(loss * of_class(weight, target) if len(weight) else loss)


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Writes the gradient of `softmax_focal_loss_forward` by the logits of `input`."""
    p, all_p = softmax_focal_terms(input, target)
    log = p.clamp(min=SMALLEST).log()
    of_loss = alpha * (gamma * (1 - p) ** (gamma - 1) * p * log - (1 - p) ** gamma)
    of_loss = torch.where(target >= 0, of_loss, 0.0)
    if len(weight):
        of_loss = of_loss * of_class(weight, target)
    buff.copy_(of_loss)
    is_class = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(of_loss[:, None] * (is_class.to(all_p.dtype) - all_p))


def softmax_focal_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the target (N,), and all probabilities (N, C)."""
    (all_p,) = single(input)
    return all_p.gather(1, target.clamp(min=0)[:, None])[:, 0], all_p


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
        nms, softnms, bbox_overlaps, roi_align_forward, roi_align_backward, roi_pool_forward,
        roi_pool_backward, sigmoid_focal_loss_forward, sigmoid_focal_loss_backward,
        softmax_focal_loss_forward, softmax_focal_loss_backward, deform_conv_forward,
        deform_conv_backward_input, deform_conv_backward_parameters, modulated_deform_conv_forward,
        modulated_deform_conv_backward, ms_deform_attn_forward, ms_deform_attn_backward,
    )
}  # fmt: skip
