"""Exports a trained network: ONNX, `torch.export` or TorchScript, by the suffix of the file.

    python tools/export.py configs/segmentation/upernet_conv2former_t.py CHECKPOINT upernet.onnx
    python tools/export.py configs/detection/mask_rcnn_conv2former_t.py CHECKPOINT backbone.pt2 \\
        --what backbone

Batch, height and width stay free, except of a whole detector. What was written is loaded again and
compared with the network on several sizes and batches; a file that differs is not kept. The report
beside it, FILE.json, has sizes, differences, and how the input must be normalised. ONNX needs
`pip install -c constraints.txt 'mmconv2former[export]'`. docs/export.md says what works and what
does not.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from common.cli import run_errors
from common.inference import one_of, parser_of, read_config, read_weights, to_deploy
from mmengine.config import Config
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmconv2former.checkpoint.loading import load_model, load_pretrained

TOLERANCE = 1e-4  # of the largest difference, as a share of the largest value if that is above 1
LABEL_TOLERANCE = 1e-3  # share of the pixels: where two classes are as likely, rounding decides
OPSETS = range(17, 21)  # LayerNormalization came with 17; torch's tracing exporter ends at 20
INPUT = 'image'
CHECK_SIZES = [(64, 64), (96, 160), (75, 70), (224, 224)]
CHECK_BATCHES = [1, 3]
DETECTION_TOLERANCE = 0.02  # share of detections, for the same reason
DETECTOR_SHAPE = (800, 1344)  # COCO's test scale, as mmdet pads it
DETECTOR_CHECKS = 3  # random pictures
FREE_SIZES_SINCE = '2.6'  # of torch, in `torch.export` without bounds for each
M = TypeVar('M', bound=nn.Module)


# --------------------------------------------------------------------------------------- networks
class MatrixAdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling as two matrix products, for any size of input.

    ONNX has no such operator, and the exporters write it for one size only. The mean over the rows
    of each bin is a product with a matrix (S, H) that is made while the graph runs, the mean over
    columns likewise.

    Args:
        output_size: S, of both sides.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, S, S)
        return self.bins(x, 2) @ x @ self.bins(x, 3).transpose(0, 1)

    def bins(self, x: Tensor, dim: int) -> Tensor:
        """(S, size of `dim`): row i is 1 / length of bin i inside of that bin, else 0."""
        size = x.shape[dim]
        position = torch.arange(size, device=x.device)
        index = torch.arange(self.output_size, device=x.device)[:, None]
        # As torch does: from floor(i * size / S) to ceil((i + 1) * size / S).
        start = index * size // self.output_size
        end = ((index + 1) * size + self.output_size - 1) // self.output_size
        inside = ((position >= start) & (position < end)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def exchange(module: nn.Module, old: type[M], new: Callable[[M], nn.Module]) -> nn.Module:
    """Puts `new(child)` in the place of every module of a type, in place."""
    for name, child in module.named_children():
        if isinstance(child, old):
            setattr(module, name, new(child))
        else:
            exchange(child, old, new)
    return module


def matrix_pooling(pool: nn.AdaptiveAvgPool2d) -> nn.Module:
    """The form for ONNX of adaptive pooling.

    Raises:
        SystemExit: The output is not square.
    """
    sizes = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    if sizes == (1, 1):
        return pool  # which ONNX has
    if sizes[0] != sizes[1] or sizes[0] is None:
        raise SystemExit(f'error: {pool} has no form for ONNX here: its output is not square')
    return MatrixAdaptiveAvgPool2d(sizes[0])


class Network(nn.Module):
    """A model as one function of the input (N, 3, H, W), with the names of its outputs."""

    model: BaseModule
    output_names: tuple[str, ...] = ('logits',)
    has_free_sizes = True

    def __init__(self, model: BaseModule) -> None:
        super().__init__()
        self.model = model

    def backbone_holder(self) -> nn.Module:
        return self.model


class Features(Network):
    """The feature maps of a backbone."""

    def __init__(self, model: BaseModule) -> None:
        super().__init__(model)
        self.output_names = tuple(f'features_{i}' for i in range(len(model.channels)))

    def backbone_holder(self) -> nn.Module:
        return nn.ModuleDict(dict(backbone=self.model))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model(x)


class SegmentorLogits(Network):
    """Logits (N, classes, H, W) of a segmentor of mmseg, in one piece: its mode 'whole'."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_decode(x, [dict(img_shape=x.shape[2:])])


class SegmentorLabels(SegmentorLogits):
    """Labels (N, H, W) of a segmentor of mmseg."""

    output_names = ('labels',)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self.model.out_channels > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.model.decode_head.threshold).long()


class ClassifierLogits(Network):
    """Logits (N, classes) of a classifier of mmpretrain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, mode='tensor')


class Detections(Network):
    """Boxes (D, 4) in xyxy pixels, scores (D,), labels (D,), masks (D, 28, 28) of one picture.

    Of a two-stage detector of mmdet, such as Mask R-CNN or Cascade Mask R-CNN. A mask covers its
    box. The size of the input is fixed, as mmdet makes anchors and clips boxes in Python.
    """

    has_free_sizes = False

    def __init__(self, model: BaseModule) -> None:
        super().__init__(model)
        masks = ('masks',) if model.roi_head.with_mask else ()
        self.output_names = ('boxes', 'scores', 'labels', *masks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        from mmdet.structures import DetDataSample  # here, as users of one library have no other
        from mmdet.structures.bbox import bbox2roi

        model, size = self.model, (int(x.shape[2]), int(x.shape[3]))
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
        )
        features = model.extract_feat(x)
        proposals = model.rpn_head.predict(features, [sample], rescale=False)
        (found,) = model.roi_head.predict_bbox(
            features, [sample.metainfo], proposals, model.test_cfg.rcnn, rescale=False
        )
        detections = found.bboxes, found.scores, found.labels
        if not model.roi_head.with_mask:
            return detections
        rois = bbox2roi([found.bboxes])
        stages = getattr(model.roi_head, 'num_stages', None)  # of a cascade, whose mean is taken
        logits = [
            model.roi_head._mask_forward(*stage, features, rois)['mask_preds']
            for stage in ([()] if stages is None else [(i,) for i in range(stages)])
        ]
        index = torch.arange(found.labels.shape[0], device=x.device)
        classes = found.labels if logits[0].shape[1] > 1 else torch.zeros_like(found.labels)
        masks = torch.stack([mask[index, classes].sigmoid() for mask in logits]).mean(0)
        return *detections, masks


class EveryLevel(nn.Module):
    """mmdet's RoI extractor without its question whether a level has RoIs.

    Tracing would keep the answer for the traced picture.

    Args:
        extractor: A SingleRoIExtractor.
    """

    extractor: BaseModule

    def __init__(self, extractor: BaseModule) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_inputs, self.out_channels = extractor.num_inputs, extractor.out_channels

    def forward(self, features: tuple[Tensor, ...], rois: Tensor) -> Tensor:
        layers = self.extractor.roi_layers
        levels = self.extractor.map_roi_levels(rois, len(layers))
        pooled = rois.new_zeros(rois.shape[0], self.out_channels, *layers[0].output_size)
        for level, (layer, feature) in enumerate(zip(layers, features)):
            index = (levels == level).nonzero().squeeze(1)
            pooled[index] = layer(feature, rois[index])
        return pooled


NETWORKS = {
    'mmseg': {'model': SegmentorLogits, 'labels': SegmentorLabels},
    'mmpretrain': {'model': ClassifierLogits},
    'mmdet': {'model': Detections},
}


def build_network(config: Config, checkpoint: str, what: str) -> Network:
    """The network to export, in eval mode.

    Args:
        config: A whole config.
        checkpoint: File with its weights; it may be of a backbone alone if that is asked for.
        what: 'backbone', 'model' or 'labels'.

    Raises:
        SystemExit: This kind of model has no such form.
        CheckpointError: The checkpoint cannot be read, or is of another network.
    """
    networks = one_of(NETWORKS, config)
    if what != 'backbone' and what not in networks:
        allowed = ', '.join(['backbone', *networks])
        raise SystemExit(
            f'error: --what {what}: of {config.default_scope} can be exported: {allowed}'
        )
    init_default_scope(config.default_scope)
    if what == 'backbone':
        backbone = MODELS.build(config.model.backbone)
        load_pretrained(backbone, checkpoint)
        return Features(revert_sync_batchnorm(backbone)).eval()
    settings = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:  # mmpretrain's configs have it beside
        settings.setdefault('data_preprocessor', config.data_preprocessor)
    model = MODELS.build(settings)
    load_model(model, read_weights(checkpoint), checkpoint, strict=True)
    if networks[what] is Detections and not (model.with_rpn and model.with_roi_head):
        raise SystemExit(
            f'error: --what model: {config.model.type} is no two-stage detector; '
            'of others the backbone can be exported'
        )
    return networks[what](revert_sync_batchnorm(model)).eval()


# ---------------------------------------------------------------------------------------- formats
def for_export(network: Network, is_onnx: bool) -> Network:
    """A copy with fewer operators and, for ONNX, without those that it does not have."""
    network = copy.deepcopy(network)
    holder = network.backbone_holder()
    to_deploy(holder)
    if is_onnx:
        exchange(network, nn.AdaptiveAvgPool2d, matrix_pooling)
    if isinstance(network, Detections):
        from mmcv.ops import RoIAlign
        from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

        exchange(network, SingleRoIExtractor, EveryLevel)
        for module in network.modules():
            if isinstance(module, RoIAlign):
                module.use_torchvision = True
    return network


@contextmanager
def torchvision_nms() -> Iterator[None]:
    """Suppression by torchvision's operator, which ONNX and TorchScript know, not by mmcv's."""
    import torchvision

    nms_module: Any = importlib.import_module(
        'mmcv.ops.nms'
    )  # its package has a function of this name

    class Suppression:
        @staticmethod
        def apply(
            boxes: Tensor,
            scores: Tensor,
            threshold: float,
            offset: int,
            score_threshold: float,
            max_num: int,
        ) -> Tensor:
            if offset or score_threshold > 0:
                raise SystemExit('error: NMS with an offset or a score threshold has no ONNX form')
            kept = torchvision.ops.nms(boxes, scores, float(threshold))
            return kept[:max_num] if max_num > 0 else kept

    old, nms_module.NMSop = nms_module.NMSop, Suppression
    try:
        yield
    finally:
        nms_module.NMSop = old


class AnyNumberOfBoxes(TorchFunctionMode):
    """Computes in another way what tracing would keep for the traced number of boxes only.

    mmdet splits boxes into those of each picture, of which there is one here, and repeats each box
    for every class, which the exporter writes box by box.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is Tensor.split and isinstance(args[1], (tuple, list)) and len(args[1]) == 1:
            return (args[0],)
        if function is Tensor.repeat_interleave:
            x, times = args
            if kwargs == dict(dim=0) and x.dim() == 2:
                return x.repeat(1, times).view(-1, x.shape[1])
        return function(*args, **(kwargs or {}))


def trace(network: Network, x: Tensor) -> torch.jit.ScriptModule:
    """The network as TorchScript."""
    if isinstance(network, Detections):
        with torchvision_nms(), AnyNumberOfBoxes():
            return torch.jit.trace(network, x, check_trace=False)
    return torch.jit.trace(network, x, check_trace=False)


def write_torchscript(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    trace(network, x).save(str(path))


def write_program(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Writes what `torch.export` makes.

    Raises:
        SystemExit: It is a whole detector, whose Python branches on values.
    """
    if not network.has_free_sizes:
        raise SystemExit(
            'error: a whole detector can be exported to .onnx and .torchscript only, as its '
            'Python branches on values, at which torch.export stops; --what backbone works'
        )
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=free_sizes()), path)


def free_sizes() -> tuple[dict[int, Any]]:
    """Batch, height and width of the one input, for `torch.export`.

    Raises:
        SystemExit: This torch cannot leave them free.
    """
    if digit_version(torch.__version__) < digit_version(FREE_SIZES_SINCE):
        raise SystemExit(
            f'error: .pt2 and --dynamo need torch {FREE_SIZES_SINCE} or later, found '
            f'{torch.__version__}; .onnx without --dynamo and .torchscript do not'
        )
    return (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


def write_onnx(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Writes ONNX by tracing, or with `--dynamo` by way of `torch.export`."""
    names = list(network.output_names)
    if args.dynamo:
        torch.onnx.export(
            network, (x,), path, input_names=[INPUT], output_names=names,
            opset_version=args.opset, dynamic_shapes=free_sizes(), dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
        return
    if network.has_free_sizes:
        axes = {INPUT: {0: 'batch', 2: 'height', 3: 'width'}}
        for name in names:
            axes[name] = {0: 'batch'}
    else:
        axes = {name: {0: 'detections'} for name in names}
    with CompleteNorms():
        # Detectors first: mmdet has a branch for this exporter that calls what it no longer has.
        network_or_trace = network if network.has_free_sizes else trace(network, x)
        torch.onnx.export(
            network_or_trace, (x,), str(path), input_names=[INPUT], output_names=names,
            opset_version=args.opset, dynamic_axes=axes, **by_tracing(),
        )  # fmt: skip


class CompleteNorms(TorchFunctionMode):
    """Gives LayerNorms without scale and shift those of an identity.

    torch 2.1 writes empty inputs for them: ONNX forbids the first, the second is a segmentation
    fault of ONNX Runtime.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.layer_norm and kwargs['weight'] is None:
            x, normalized_shape = args
            identity = dict(weight=x.new_ones(normalized_shape), bias=x.new_zeros(normalized_shape))
            kwargs = {**kwargs, **identity}
        return function(*args, **kwargs)


def by_tracing() -> dict[str, Any]:
    """Arguments with which `torch.onnx.export` traces; before torch 2.5 it knew nothing else."""
    has_choice = 'dynamo' in inspect.signature(torch.onnx.export).parameters
    return dict(dynamo=False) if has_choice else {}


def describe_input(path: Path, content: dict[str, Any]) -> None:
    """Puts how to prepare the input into an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in content.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def load_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {INPUT: x.numpy()})]


def load_program(path: Path) -> Callable[[Tensor], Any]:
    return torch.export.load(path).module()


def load_torchscript(path: Path) -> Callable[[Tensor], Any]:
    if importlib.util.find_spec('torchvision'):
        importlib.import_module('torchvision')  # its operators may be in the file
    return torch.jit.load(str(path))


FORMATS = {
    '.onnx': (write_onnx, load_onnx),
    '.pt2': (write_program, load_program),
    '.torchscript': (write_torchscript, load_torchscript),
}


# ------------------------------------------------------------------------------------------ check
def random_picture(batch: int, size: tuple[int, int], channels: int) -> Tensor:
    """Smooth noise of deviation near 1, as normalised pictures have: (batch, channels, H, W)."""
    coarse = torch.randn(batch, channels, *(max(2, side // 8) for side in size))
    return F.interpolate(coarse, size, mode='bilinear') + 0.3 * torch.randn(batch, channels, *size)


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """How far outputs are apart: of the worst output the difference and what is allowed.

    For labels it is the share of those that differ.
    """
    results = []
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return dict(difference=float('inf'), tolerance=0.0)
        if theirs.is_floating_point():
            difference = (ours - theirs).abs().max().item()
            tolerance = TOLERANCE * max(1.0, theirs.abs().max().item())
        else:
            difference = (ours != theirs).double().mean().item()
            tolerance = LABEL_TOLERANCE
        if difference != difference:  # NaN
            difference = float('inf')
        results.append(dict(difference=difference, tolerance=tolerance))
    return max(results, key=lambda result: result['difference'] / result['tolerance'])


def compare_detections(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """The share of detections without a counterpart, among those of both.

    A counterpart has the label, a score within 1e-3, a box within half a pixel and a mask within
    0.05. Where boxes overlap by nearly the threshold of the suppression, or a box is of nearly the
    size at which another level of features is taken, rounding decides.
    """
    boxes, scores, labels, *masks = (y[:, None] for y in expected)
    is_same = (
        (labels == found[2])
        & ((scores - found[1]).abs() < 1e-3)
        & ((boxes - found[0]).abs().amax(-1) < 0.5)
    )
    for ours, theirs in zip(found[3:], masks, strict=True):
        is_same &= (theirs - ours).abs().amax((-1, -2)) < 0.05
    lonely = (~is_same.any(0)).sum() + (~is_same.any(1)).sum()
    share = lonely.item() / max(1, sum(is_same.shape))
    return dict(difference=share, tolerance=DETECTION_TOLERANCE, detections=len(labels))


def check(
    run: Callable[[Tensor], Any], network: Network, shapes: Sequence[tuple[int, int, int]]
) -> list[dict[str, Any]]:
    """Compares a loaded file with the network it is of.

    Args:
        run: The file as a function.
        network: As built, with nothing exchanged.
        shapes: Batch, height and width of the inputs to try.

    Returns:
        For each of them `input`, `difference` and `tolerance`.

    Raises:
        SystemExit: The network, or what was written of it, refuses a shape.
    """
    channels = in_channels(network)
    results = []
    for batch, height, width in shapes:
        x = random_picture(batch, (height, width), channels)
        try:
            expected = as_list(network(x))
        except ValueError as error:
            raise SystemExit(f'error: --check-sizes {height}x{width}: {error}') from None
        comparison = compare if network.has_free_sizes else compare_detections
        try:
            found = as_list(run(x))
        except (AssertionError, RuntimeError) as error:  # guards of `torch.export`, operators
            reason = str(error).strip().splitlines()[0]
            raise SystemExit(
                f'error: the exported network refuses an input of {height}x{width}: {reason}'
            ) from None
        result = comparison(found, expected)
        results.append(dict(input=list(x.shape)) | result)
    return results


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def in_channels(network: Network) -> int:
    """Channels of the input, by the first convolution."""
    return next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))


# ------------------------------------------------------------------------------------------- main
def parse_size(text: str) -> tuple[int, int]:
    """Height and width from a text such as '224x288', for argparse."""
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, such as 224x288, got {text}')
    return int(height), int(width)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument('out', type=Path, help=f'file to write, of suffix {", ".join(FORMATS)}')
    parser.add_argument(
        '--what',
        choices=['backbone', 'model', 'labels'],
        default='model',
        help='the feature maps, the logits or detections (default), or the labels of a segmentor',
    )
    parser.add_argument(
        '--shape', type=parse_size, metavar='HxW',
        help='size of the traced input; of a whole detector the only one (default: 800x1344)',
    )  # fmt: skip
    parser.add_argument('--opset', type=int, help='of ONNX, 17 to 20 (default: 17)')
    parser.add_argument(
        '--dynamo', action='store_true', help='ONNX by way of torch.export: slower, opset 18'
    )
    parser.add_argument(
        '--check-sizes', nargs='+', type=parse_size, default=CHECK_SIZES, metavar='HxW',
        help='inputs on which the file is compared with the network',
    )  # fmt: skip
    parser.add_argument('--check-batches', nargs='+', type=int, default=CHECK_BATCHES, metavar='N')
    args = parser.parse_args(argv)
    check_options(parser, args)
    # Of guards that it cannot simplify, which is no fault.
    logging.getLogger('torch.fx.experimental.symbolic_shapes').setLevel(logging.ERROR)
    config = read_config(args)
    with run_errors(args.traceback):
        network = build_network(config, args.checkpoint, args.what)
    report = export(network, args)
    report |= dict(config=args.config, checkpoint=args.checkpoint, what=args.what)
    report['input'] = input_of(config)
    if args.out.suffix == '.onnx':
        describe_input(args.out, report['input'])
    report['file']['bytes'] = args.out.stat().st_size
    args.out.with_name(f'{args.out.name}.json').write_text(json.dumps(report, indent=1) + '\n')
    print(table(report, args.out))


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one message if options are not usable; fills in defaults."""
    if args.out.suffix not in FORMATS:
        parser.error(f'the file must end with {", ".join(FORMATS)}, got {args.out}')
    is_onnx = args.out.suffix == '.onnx'
    if not is_onnx and (args.dynamo or args.opset is not None):
        parser.error(f'--dynamo and --opset are for .onnx only, got {args.out}')
    args.opset = args.opset or (18 if args.dynamo else 17)
    if args.opset not in OPSETS or (args.dynamo and args.opset < 18):
        lowest = 18 if args.dynamo else OPSETS[0]
        parser.error(f'--opset must be from {lowest} to {OPSETS[-1]}, got {args.opset}')
    if min(args.check_batches) < 1:
        parser.error(f'--check-batches must be at least 1, got {min(args.check_batches)}')
    needed = ['onnx', 'onnxruntime', *(['onnxscript'] if args.dynamo else [])] if is_onnx else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f'error: ONNX needs {", ".join(missing)}: '
            "pip install 'mmconv2former[export]' (docs/export.md)"
        )
    if not args.out.parent.is_dir():
        raise SystemExit(f'error: folder {args.out.parent} does not exist')


def export(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the file, loads it again and compares.

    Returns:
        The report.

    Raises:
        SystemExit: It cannot be exported, or the file computes something else.
    """
    write, load = FORMATS[args.out.suffix]
    if network.has_free_sizes:
        size, batch = args.shape or (96, 128), 2  # a batch of 1 would be taken as fixed
        shapes = [(n, *size_) for n, size_ in product(args.check_batches, args.check_sizes)]
    else:
        size, batch = args.shape or DETECTOR_SHAPE, 1
        shapes = [(1, *size)] * DETECTOR_CHECKS
        if args.dynamo:
            raise SystemExit('error: --dynamo: a whole detector can be traced only')
    torch.manual_seed(0)
    start = time.time()
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        TemporaryDirectory(dir=args.out.parent) as folder,
    ):
        warnings.simplefilter('ignore')  # of tracers, about what the comparison is for
        path = Path(folder) / args.out.name
        x = random_picture(batch, size, in_channels(network))
        try:
            write(for_export(network, args.out.suffix == '.onnx'), x, path, args)
        except RuntimeError as error:  # of the exporters: something that they cannot express
            reason = str(error).strip().splitlines()[0]
            raise SystemExit(f'error: torch cannot write {args.out}: {reason}') from None
        seconds = time.time() - start
        checks = check(load(path), network, shapes)
        wrong = [item for item in checks if not item['difference'] <= item['tolerance']]
        if wrong:
            raise SystemExit(
                f'error: {args.out} was not written: for input {wrong[0]["input"]} the exported '
                f'network differs by {wrong[0]["difference"]:.2g}, '
                f'{wrong[0]["tolerance"]:.2g} is allowed'
            )
        os.replace(path, args.out)
    file: dict[str, Any] = dict(name=args.out.name, seconds=round(seconds, 1))
    if args.out.suffix == '.onnx':
        file |= dict(opset=args.opset, exporter='torch.export' if args.dynamo else 'trace')
    sizes = 'free' if network.has_free_sizes else list(x.shape)
    return dict(file=file, outputs=list(network.output_names), sizes=sizes, checks=checks)


def input_of(config: Config) -> dict[str, Any]:
    """What must be done with a picture before it enters the network."""
    settings = config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    swaps = settings.get('bgr_to_rgb') or settings.get('to_rgb') or False
    return dict(
        layout='float32 (N, channels, H, W)',
        channels='RGB' if swaps else 'BGR',
        mean=settings.get('mean'),
        std=settings.get('std'),
    )


def table(report: dict[str, Any], path: Path) -> str:
    """The report as lines to print."""
    file = report['file']
    opset = f', opset {file["opset"]}' if 'opset' in file else ''
    lines = [
        f'{path}: {file["bytes"] / 2**20:.1f} MiB{opset}, {file["seconds"]} s; '
        f'outputs {", ".join(report["outputs"])}; sizes {report["sizes"]}',
        f'{"input":>20}  largest difference  allowed',
    ]
    for item in report['checks']:
        shape = 'x'.join(map(str, item['input']))
        count = f'  ({item["detections"]} detections)' if 'detections' in item else ''
        lines.append(f'{shape:>20}  {item["difference"]:18.1e}  {item["tolerance"]:.1e}{count}')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
