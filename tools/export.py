"""Exports a trained network to ONNX, `torch.export` or TorchScript, chosen by the file's suffix.

    python tools/export.py configs/segmentation/upernet_conv2former_t.py CHECKPOINT upernet.onnx
    python tools/export.py configs/detection/mask_rcnn_conv2former_t.py CHECKPOINT backbone.pt2 \\
        --what backbone

Batch, height and width stay free, except for a whole detector. The file is loaded again and
compared with the network on several sizes and batches; a file that differs is not kept. The report
FILE.json has sizes, differences and the normalisation of the input. ONNX needs
`pip install -c constraints.txt 'mmconv2former[export]'`. docs/export.md says what works.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import common  # before torch
import torch
import torch.nn.functional as F
from common.cli import run_errors
from common.inference import load_whole_model, one_of, parser_for_model, read_config, to_deploy
from mmengine.config import Config
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmconv2former.checkpoint.loading import load_pretrained

TOLERANCE = 1e-4  # allowed difference, relative to the largest value if that is above 1
LABEL_TOLERANCE = 1e-3  # fraction of pixels: rounding decides between equally likely classes
DETECTION_TOLERANCE = 0.02  # fraction of detections, for the same reason
OPSETS = range(17, 21)  # 17 has LayerNormalization; torch's tracing exporter ends at 20
INPUT = 'image'
CHECK_SIZES = [(64, 64), (96, 160), (75, 70), (224, 224)]
CHECK_BATCHES = [1, 3]
DETECTOR_SHAPE = (800, 1344)  # COCO's test scale, as mmdet pads it
DETECTOR_CHECKS = 3  # random images
DYNAMIC_SIZES_SINCE = '2.6'  # torch version whose `torch.export` needs no bounds for dynamic sizes


# --------------------------------------------------------------------------------------- networks
class Network(nn.Module):
    """A model as a function of the input (N, 3, H, W), with names for its outputs."""

    output_names: tuple[str, ...] = ('logits',)
    has_dynamic_sizes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model


class Features(Network):
    """The feature maps of a backbone."""

    def __init__(self, backbone: BaseModule) -> None:
        super().__init__(nn.ModuleDict(dict(backbone=backbone)))
        with torch.no_grad():
            count = len(backbone.eval()(random_images(1, (64, 64), in_channels(self))))
        self.output_names = tuple(f'features_{i}' for i in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.backbone(x)


class SegmentorLogits(Network):
    """Logits (N, classes, H, W) of a segmentor of mmseg, in its mode 'whole'."""

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
    """Boxes (D, 4) in xyxy pixels, scores (D,), labels (D,) and masks (D, 28, 28) of one image.

    For two-stage detectors of mmdet, such as Mask R-CNN and Cascade Mask R-CNN. A mask covers its
    box. The input size is fixed because mmdet makes anchors and clips boxes in Python.
    """

    has_dynamic_sizes = False

    def __init__(self, model: BaseModule) -> None:
        super().__init__(model)
        masks = ('masks',) if model.roi_head.with_mask else ()
        self.output_names = ('boxes', 'scores', 'labels', *masks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        from mmdet.structures import DetDataSample  # here: users of mmseg may not have mmdet
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
        num_stages = getattr(model.roi_head, 'num_stages', None)  # a cascade averages its stages
        logits = [
            model.roi_head._mask_forward(*stage, features, rois)['mask_preds']
            for stage in ([()] if num_stages is None else [(i,) for i in range(num_stages)])
        ]
        index = torch.arange(found.labels.shape[0], device=x.device)
        classes = found.labels if logits[0].shape[1] > 1 else torch.zeros_like(found.labels)
        masks = torch.stack([mask[index, classes].sigmoid() for mask in logits]).mean(0)
        return *detections, masks


NETWORKS = {
    'mmseg': {'model': SegmentorLogits, 'labels': SegmentorLabels},
    'mmpretrain': {'model': ClassifierLogits},
    'mmdet': {'model': Detections},
}


def build_network(config: Config, checkpoint: str, what: str) -> Network:
    """The network to export, in eval mode.

    Args:
        config: A whole config.
        checkpoint: File with its weights; for 'backbone', those of a backbone are enough.
        what: 'backbone', 'model' or 'labels'.

    Raises:
        SystemExit: This kind of model cannot be exported as `what`.
        CheckpointError: The checkpoint cannot be read, or is of another network.
    """
    networks = one_of(NETWORKS, config)
    if what == 'backbone':
        init_default_scope(config.default_scope)
        backbone = MODELS.build(config.model.backbone)
        load_pretrained(backbone, checkpoint)
        return Features(revert_sync_batchnorm(backbone)).eval()
    if what not in networks:
        raise SystemExit(
            f'error: --what must be one of {", ".join(["backbone", *networks])} for '
            f'{config.default_scope}, got {what}'
        )
    model = load_whole_model(config, checkpoint)
    if networks[what] is Detections and not (
        getattr(model, 'with_rpn', False) and getattr(model, 'with_roi_head', False)
    ):
        raise SystemExit(
            f'error: --what model needs a two-stage detector, got {config.model.type}; '
            'use --what backbone'
        )
    return networks[what](model).eval()


# ---------------------------------------------------------------- replacements for exported layers
class MatrixAdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling as two matrix products, for inputs of any size.

    ONNX has no such operator, and the exporters write it for one size only. The mean over the rows
    of each bin is a product with a matrix that the graph computes; likewise for columns.

    Args:
        pool: The layer to replace; its output has R rows and C columns.
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = pool.output_size
        self.rows, self.columns = size if isinstance(size, tuple) else (size, size)

    def forward(self, x: Tensor) -> Tensor:  # (N, K, H, W) -> (N, K, R, C)
        return self.bins(x, 2, self.rows) @ x @ self.bins(x, 3, self.columns).transpose(0, 1)

    @staticmethod
    def bins(x: Tensor, dim: int, number: int) -> Tensor:
        """(number, size of `dim`): row i is 1 / length of bin i inside the bin, otherwise 0."""
        size = x.shape[dim]
        position = torch.arange(size, device=x.device)
        index = torch.arange(number, device=x.device)[:, None]
        # As in torch: from floor(i * size / number) to ceil((i + 1) * size / number).
        start = index * size // number
        end = ((index + 1) * size + number - 1) // number
        inside = ((position >= start) & (position < end)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


class EveryLevel(nn.Module):
    """mmdet's RoI extractor without the check whether a level has RoIs.

    Tracing would freeze the answer for the traced image.

    Args:
        extractor: A SingleRoIExtractor.
    """

    def __init__(self, extractor: BaseModule) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_inputs = extractor.num_inputs  # mmdet reads it

    def forward(self, features: tuple[Tensor, ...], rois: Tensor) -> Tensor:
        layers = self.extractor.roi_layers
        levels = self.extractor.map_roi_levels(rois, len(layers))
        channels = self.extractor.out_channels
        pooled = rois.new_zeros(rois.shape[0], channels, *layers[0].output_size)
        for level, (layer, feature) in enumerate(zip(layers, features)):
            index = (levels == level).nonzero().squeeze(1)
            pooled[index] = layer(feature, rois[index])
        return pooled


def replace_modules(module: nn.Module, old: type, new: Callable[[Any], nn.Module]) -> None:
    """Replaces every submodule of type `old` by `new(submodule)`, in place."""
    for name, child in module.named_children():
        if isinstance(child, old):
            setattr(module, name, new(child))
        else:
            replace_modules(child, old, new)


def for_export(network: Network, is_onnx: bool) -> Network:
    """A copy, folded for inference, without operators that the format lacks."""
    network = copy.deepcopy(network)
    to_deploy(network.model)
    if is_onnx:
        replace_modules(network, nn.AdaptiveAvgPool2d, MatrixAdaptiveAvgPool2d)
    if isinstance(network, Detections):
        from mmcv.ops import RoIAlign
        from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

        replace_modules(network, SingleRoIExtractor, EveryLevel)
        for module in network.modules():
            if isinstance(module, RoIAlign):
                module.use_torchvision = True
    return network


# ---------------------------------------------------------------------------------------- formats
class TorchvisionNMS:
    """Replaces mmcv's NMS operator by torchvision's, which ONNX and TorchScript know."""

    @staticmethod
    def apply(
        boxes: Tensor, scores: Tensor, threshold: float, offset: int, score_thr: float, max_num: int
    ) -> Tensor:
        import torchvision

        if offset or score_thr > 0:
            raise SystemExit('error: NMS with an offset or a score threshold cannot be exported')
        kept = torchvision.ops.nms(boxes, scores, float(threshold))
        return kept[:max_num] if max_num > 0 else kept


class AnyNumberOfBoxes(TorchFunctionMode):
    """Replaces calls for which tracing would fix the number of boxes.

    mmdet splits boxes by image, of which there is one here, and repeats each box for every class,
    which the exporter writes box by box.
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


class CompleteNorms(TorchFunctionMode):
    """Adds the scale and shift of an identity to LayerNorms that have none.

    torch 2.1 writes empty inputs for them: ONNX forbids an empty scale, and an empty shift crashes
    ONNX Runtime.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.layer_norm and kwargs['weight'] is None:
            x, shape = args
            kwargs = {**kwargs, 'weight': x.new_ones(shape), 'bias': x.new_zeros(shape)}
        return function(*args, **kwargs)


def trace(network: Network, x: Tensor) -> torch.jit.ScriptModule:
    """The network as TorchScript."""
    with ExitStack() as stack:
        if isinstance(network, Detections):
            # mmcv.ops has a function of the module's name.
            stack.enter_context(
                patch.object(importlib.import_module('mmcv.ops.nms'), 'NMSop', TorchvisionNMS)
            )
            stack.enter_context(AnyNumberOfBoxes())
        return torch.jit.trace(network, x, check_trace=False)


def write_torchscript(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    trace(network, x).save(str(path))


def write_program(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=dynamic_sizes()), path)


def dynamic_sizes() -> tuple[dict[int, Any]]:
    """Batch, height and width of the one input, for `torch.export`."""
    return (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


def write_onnx(network: Network, x: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Writes ONNX by tracing, or through `torch.export` with `--dynamo`."""
    names = list(network.output_names)
    options: dict[str, Any] = dict(
        input_names=[INPUT], output_names=names, opset_version=args.opset
    )
    if args.dynamo:
        torch.onnx.export(
            network, (x,), path, dynamic_shapes=dynamic_sizes(), dynamo=True, external_data=False,
            verbose=False, **options,
        )  # fmt: skip
        return
    if network.has_dynamic_sizes:
        axes = {INPUT: {0: 'batch', 2: 'height', 3: 'width'}, **{n: {0: 'batch'} for n in names}}
    else:
        axes = {name: {0: 'detections'} for name in names}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:  # since torch 2.5
        options['dynamo'] = False
    with CompleteNorms():
        # Trace detectors first: in this exporter mmdet takes a branch that calls removed code.
        traced = network if network.has_dynamic_sizes else trace(network, x)
        torch.onnx.export(traced, (x,), str(path), dynamic_axes=axes, **options)


def add_metadata(path: Path, content: dict[str, Any]) -> None:
    """Stores values in the metadata of an ONNX file."""
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
def random_images(batch: int, size: tuple[int, int], channels: int) -> Tensor:
    """Smooth noise (batch, channels, H, W) with a deviation near 1, like normalised images."""
    coarse = torch.randn(batch, channels, *(max(2, side // 8) for side in size))
    return F.interpolate(coarse, size, mode='bilinear') + 0.3 * torch.randn(batch, channels, *size)


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """The difference and the tolerance of the output that differs most.

    For labels, the difference is the fraction that differs.
    """
    results = []
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return dict(difference=float('inf'), tolerance=0.0)
        if theirs.is_floating_point():
            difference = (ours - theirs).abs().max().nan_to_num(nan=float('inf')).item()
            tolerance = TOLERANCE * max(1.0, theirs.abs().max().item())
        else:
            difference = (ours != theirs).double().mean().item()
            tolerance = LABEL_TOLERANCE
        results.append(dict(difference=difference, tolerance=tolerance))
    return max(results, key=lambda result: result['difference'] / result['tolerance'])


def compare_detections(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """The fraction of detections, among those of both, without a counterpart.

    A counterpart has the same label, a score within 1e-3, a box within half a pixel and a mask
    within 0.05. Rounding decides where boxes overlap by nearly the NMS threshold, or where a box's
    size is near the limit between two feature levels.
    """
    boxes, scores, labels, *masks = (y[:, None] for y in expected)
    is_same = (
        (labels == found[2])
        & ((scores - found[1]).abs() < 1e-3)
        & ((boxes - found[0]).abs().amax(-1) < 0.5)
    )
    for ours, theirs in zip(found[3:], masks, strict=True):
        is_same &= (theirs - ours).abs().amax((-1, -2)) < 0.05
    unmatched = (~is_same.any(0)).sum() + (~is_same.any(1)).sum()
    fraction = unmatched.item() / max(1, sum(is_same.shape))
    return dict(difference=fraction, tolerance=DETECTION_TOLERANCE, detections=len(labels))


def check(
    run: Callable[[Tensor], Any], network: Network, shapes: Sequence[tuple[int, int, int]]
) -> list[dict[str, Any]]:
    """Compares a loaded file with the network it was made from.

    Args:
        run: Function that runs the file.
        network: The network, without replaced modules.
        shapes: Batch, height and width of the inputs to try.

    Returns:
        `input`, `difference` and `tolerance` for each shape.

    Raises:
        SystemExit: The network or the file refuses a shape.
    """
    channels = in_channels(network)
    comparison = compare if network.has_dynamic_sizes else compare_detections
    results = []
    for batch, height, width in shapes:
        x = random_images(batch, (height, width), channels)
        try:
            expected = as_list(network(x))
        except ValueError as error:
            raise SystemExit(f'error: --check-sizes {height}x{width}: {error}') from None
        try:
            found = as_list(run(x))
        except (AssertionError, RuntimeError) as error:  # guards of `torch.export`, operators
            reason = str(error).strip().splitlines()[0]
            raise SystemExit(
                f'error: the exported network refuses an input of {height}x{width}: {reason}'
            ) from None
        results.append(dict(input=list(x.shape)) | comparison(found, expected))
    return results


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def in_channels(network: Network) -> int:
    return next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))


# ------------------------------------------------------------------------------------------- main
def parse_size(text: str) -> tuple[int, int]:
    """Height and width from a text such as '224x288', for argparse."""
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, such as 224x288, got {text}')
    return int(height), int(width)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for_model(__doc__)
    parser.add_argument('out', type=Path, help=f'file to write, ending with {", ".join(FORMATS)}')
    parser.add_argument(
        '--what',
        choices=['backbone', 'model', 'labels'],
        default='model',
        help='feature maps, logits or detections (default), or the labels of a segmentor',
    )
    parser.add_argument(
        '--shape', type=parse_size, metavar='HxW',
        help='size of the traced input; a whole detector accepts only this one (default: 800x1344)',
    )  # fmt: skip
    parser.add_argument('--opset', type=int, help='ONNX opset, 17 to 20 (default: 17)')
    parser.add_argument(
        '--dynamo', action='store_true', help='write ONNX through torch.export: slower, opset 18'
    )
    parser.add_argument(
        '--check-sizes', nargs='+', type=parse_size, metavar='HxW',
        help='sizes on which the file is compared with the network',
    )  # fmt: skip
    parser.add_argument('--check-batches', nargs='+', type=common.at_least(1), metavar='N')
    args = parser.parse_args(argv)
    check_options(parser, args)
    # It reports guards that it cannot simplify, which is harmless.
    logging.getLogger('torch.fx.experimental.symbolic_shapes').setLevel(logging.ERROR)
    config = read_config(args)
    with run_errors(args.traceback):
        network = build_network(config, args.checkpoint, args.what)
    report = export(network, args)
    report |= dict(config=args.config, checkpoint=args.checkpoint, what=args.what)
    report['input'] = input_of(config)
    if args.out.suffix == '.onnx':
        add_metadata(args.out, report['input'])
    report['file']['bytes'] = args.out.stat().st_size
    args.out.with_name(f'{args.out.name}.json').write_text(json.dumps(report, indent=1) + '\n')
    print(table(report, args.out))


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in defaults and ends with a message if options are not usable."""
    if args.out.suffix not in FORMATS:
        parser.error(f'the file must end with {", ".join(FORMATS)}, got {args.out}')
    is_onnx = args.out.suffix == '.onnx'
    if not is_onnx and (args.dynamo or args.opset is not None):
        parser.error(f'--dynamo and --opset are for .onnx only, got {args.out}')
    lowest = 18 if args.dynamo else OPSETS[0]
    args.opset = args.opset or lowest
    if not lowest <= args.opset <= OPSETS[-1]:
        parser.error(f'--opset must be from {lowest} to {OPSETS[-1]}, got {args.opset}')
    version = torch.__version__
    if (args.dynamo or args.out.suffix == '.pt2') and digit_version(version) < digit_version(
        DYNAMIC_SIZES_SINCE
    ):
        raise SystemExit(
            f'error: .pt2 and --dynamo need torch {DYNAMIC_SIZES_SINCE} or later, found {version}; '
            '.onnx without --dynamo and .torchscript do not'
        )
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
    """Writes the file, loads it again and compares; returns the report.

    Raises:
        SystemExit: The network cannot be exported, or the file computes something else.
    """
    write, load = FORMATS[args.out.suffix]
    if network.has_dynamic_sizes:
        size, batch = args.shape or (96, 128), 2  # torch.export would fix a batch of 1
        batches, sizes = args.check_batches or CHECK_BATCHES, args.check_sizes or CHECK_SIZES
        shapes = [(n, *size_) for n, size_ in product(batches, sizes)]
    else:
        if args.check_sizes or args.check_batches:
            raise SystemExit(
                'error: a whole detector takes one image of the size --shape, and is compared on '
                'such images: leave out --check-sizes and --check-batches'
            )
        size, batch = args.shape or DETECTOR_SHAPE, 1
        shapes = [(1, *size)] * DETECTOR_CHECKS
        if args.dynamo or args.out.suffix == '.pt2':
            raise SystemExit(
                'error: torch.export cannot export a whole detector, whose Python branches on '
                'values; use .onnx without --dynamo, .torchscript, or --what backbone'
            )
    torch.manual_seed(0)
    start = time.time()
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        TemporaryDirectory(dir=args.out.parent) as folder,
    ):
        warnings.simplefilter('ignore')  # tracers warn about what the comparison checks
        path = Path(folder) / args.out.name
        x = random_images(batch, size, in_channels(network))
        try:
            write(for_export(network, args.out.suffix == '.onnx'), x, path, args)
        except RuntimeError as error:  # an exporter cannot express something
            reason = str(error).strip().splitlines()[0]
            raise SystemExit(f'error: torch cannot write {args.out}: {reason}') from None
        seconds = time.time() - start
        checks = check(load(path), network, shapes)
        for item in checks:
            if not item['difference'] <= item['tolerance']:
                raise SystemExit(
                    f'error: {args.out} was not written: for input {item["input"]} the exported '
                    f'network differs by {item["difference"]:.2g}, {item["tolerance"]:.2g} is '
                    'allowed'
                )
        os.replace(path, args.out)
    file: dict[str, Any] = dict(name=args.out.name, seconds=round(seconds, 1))
    if args.out.suffix == '.onnx':
        file |= dict(opset=args.opset, exporter='torch.export' if args.dynamo else 'trace')
    free = 'dynamic' if network.has_dynamic_sizes else list(x.shape)
    return dict(file=file, outputs=list(network.output_names), sizes=free, checks=checks)


def input_of(config: Config) -> dict[str, Any]:
    """How an image is prepared for the network."""
    settings = config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    swaps = settings.get('bgr_to_rgb') or settings.get('to_rgb')
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
