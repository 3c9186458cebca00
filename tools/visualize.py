"""Draws receptive fields, modulation, kernels, predictions and curves of a network.

    python tools/visualize.py erf tiny convnext_tiny swin_tiny --images data/coco/val2017
    python tools/visualize.py modulation work_dirs/.../epoch_36.pth --image photo.jpg
    python tools/visualize.py kernels pretrain/conv2former_t.pth
    python tools/visualize.py predictions CONFIG work_dirs/.../epoch_36.pth --count 6
    python tools/visualize.py curves work_dirs/mask_rcnn_conv2former_t

A NETWORK is a name such as tiny, ib or swin_tiny (with random weights, which the figure states), a
checkpoint of Conv2Former (of the backbone alone or of a whole model), or NAME=CHECKPOINT.
docs/visualize.md shows what each command prints and draws.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common  # before torch
import matplotlib

matplotlib.use('Agg')
import numpy as np
import plot_curves
import torch
import torch.nn.functional as F
from common.cli import (
    add_config_arguments,
    add_data_root_argument,
    add_trust_argument,
    check_files,
    guard_checkpoints,
    run_errors,
)
from common.inference import (
    DRAWN_BY,
    build_visualizer,
    dataset_settings,
    draw,
    load_for_drawing,
    load_whole_model,
    one_of,
    read_config,
    settings_of_files,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, pseudo_collate
from mmengine.logging import MMLogger
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmconv2former import Baseline, Conv2Former, Conv2FormerIsotropic
from mmconv2former.checkpoint.architecture import recognise_arch
from mmconv2former.checkpoint.loading import find_prefix, load_pretrained
from mmconv2former.checkpoint.reading import CheckpointError, read_state_dict
from mmconv2former.datasets.checked import CheckedDataset
from mmconv2former.images import open_image
from mmconv2former.models.baselines import BASELINES
from mmconv2former.models.blocks import Block
from mmconv2former.models.conv2former import ARCH_LETTERS, ARCHS
from mmconv2former.models.fusion import FUSIONS
from mmconv2former.models.isotropic import ISOTROPIC_LETTERS
from mmconv2former.text import printable

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
FIGURE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.pdf', '.svg')
# ImageNet's, as in all recipes
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
SHARES = {0.2: 'white', 0.3: 'cyan', 0.5: 'lime', 0.99: 'red'}  # those of RepLKNet's table
DOTS_PER_INCH = 110
# The layer scales of all networks that have them: ours, ConvNeXt's, HorNet's, DeiT-3's.
LAYER_SCALE = re.compile(r'.*\.(layer_scale_[12]|gamma|gamma[12]\.weight|ls[12]\.gamma)')
LAYER_SCALE_HELP = (
    'set the layer scales of random weights: at their initial 1e-6 or so, blocks do nothing'
)
PEAK_HELP = 'scale each field to this maximum before log10(x + 1), in the figure only'
FIRST_KERNELS = ('stages.0.0.attn.att.2.weight', 'blocks.0.attn.att.2.weight')


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)  # mmengine logs the initialisation of every tensor
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f'error: {printable(error)}') from None
    finally:
        logger.setLevel(level)


def make_parser() -> argparse.ArgumentParser:
    """A parser with a subparser per command, whose `run` is what to call."""
    parser = common.parser_of(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def add_command(
        name: str, run: Callable, out: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        help_ = (run.__doc__ or '').partition('\n')[0]
        command = commands.add_parser(name, help=help_, parents=parents)
        command.add_argument('--out', type=figure_path, default=out, help=f'default: {out}')
        command.set_defaults(run=run)
        return command

    on_device = argparse.ArgumentParser(add_help=False)
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    on_device.add_argument('--device', choices=devices, default=devices[-1])
    of_network = argparse.ArgumentParser(add_help=False, parents=[on_device])
    of_network.add_argument(
        '--fusion', choices=list(FUSIONS), default='hadamard', help='fusion, for ablations'
    )
    add_trust_argument(of_network)
    of_blocks = argparse.ArgumentParser(add_help=False, parents=[of_network])
    of_blocks.add_argument('network', metavar='NETWORK', help='see above')
    of_blocks.add_argument(
        '--blocks', nargs='+', metavar='STAGE.BLOCK',
        help='e.g. 0.2 2.11, counted from 0 (isotropic: 5), or all (default: last of each stage)',
    )  # fmt: skip

    erf = add_command('erf', draw_erf, 'erf.png', of_network)
    erf.add_argument('networks', nargs='+', metavar='NETWORK', help='see above')
    erf.add_argument(
        '--images', nargs='+', type=Path, required=True, help='image files and folders'
    )
    erf.add_argument(
        '--limit', type=common.at_least(1), default=50, help='maximum number of images'
    )
    erf.add_argument(
        '--size', type=common.at_least(1), default=1024, help='side of the input in pixels'
    )
    erf.add_argument('--layer-scale', type=float, metavar='VALUE', help=LAYER_SCALE_HELP)
    erf.add_argument(
        '--with-cp', action='store_true', help='recompute blocks: less memory, more time'
    )
    erf.add_argument('--peak', type=int, help=PEAK_HELP)

    modulation = add_command('modulation', draw_modulation, 'modulation.png', of_blocks)
    modulation.add_argument('--image', type=Path, required=True)
    modulation.add_argument(
        '--size', type=common.at_least(1), default=640, help='limit of the longest side in pixels'
    )
    modulation.add_argument(
        '--channels', type=int, nargs='+', help='channels to draw instead of the mean'
    )

    kernels = add_command('kernels', draw_kernels, 'kernels.png', of_blocks)
    kernels.add_argument(
        '--count',
        type=common.at_least(1),
        default=14,
        help='number of kernels per block, evenly spaced',
    )

    predictions = add_command('predictions', draw_predictions, 'predictions.jpg', on_device)
    predictions.add_argument('config', help='config file, of detection or segmentation')
    predictions.add_argument('checkpoint', help='checkpoint of the whole model')
    predictions.add_argument('--split', choices=['train', 'val', 'test'], default='test')
    predictions.add_argument(
        '--count', type=common.at_least(1), default=6, help='number of images, evenly spaced'
    )
    predictions.add_argument(
        '--indices', type=int, nargs='+', help='numbers of the images to draw instead'
    )
    predictions.add_argument('--score', type=float, default=0.3, help='minimum score of objects')
    add_config_arguments(predictions)
    add_data_root_argument(predictions)

    curves = commands.add_parser('curves', help='losses and metrics of a training run')
    plot_curves.add_arguments(curves)
    curves.set_defaults(run=plot_curves.plot_curves)
    return parser


def figure_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        allowed = ', '.join(FIGURE_SUFFIXES)
        raise argparse.ArgumentTypeError(f'must end with one of {allowed}, got {text}')
    return path


# --------------------------------------------------------------------------------------- networks
class Network(NamedTuple):
    """A backbone to look at, in eval mode, without gradients of its parameters.

    Attributes:
        label: Its name, or its class if only a checkpoint is given.
        weights: Where they come from, in words.
        backbone: Returns a tuple of feature maps (N, C, h, w), the deepest last.
    """

    label: str
    weights: str
    backbone: nn.Module

    @property
    def title(self) -> str:
        return f'{self.label}, {self.weights}'


def load_network(
    description: str,
    fusion: str = 'hadamard',
    with_cp: bool = False,
    layer_scale: float | None = None,
) -> Network:
    """A network from the command line.

    Args:
        description: `NAME`, `CHECKPOINT` or `NAME=CHECKPOINT`.
        fusion: Fusion of Conv2Former, which the shapes in a file do not tell.
        with_cp: Whether to recompute blocks in the backward pass, which needs less memory.
        layer_scale: Value of all layer scales of random weights; None keeps the initial values.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such network, or the checkpoint is of another network.
        ModuleNotFoundError: The library of a baseline is not installed.
    """
    name, _, checkpoint = description.partition('=')
    if Path(description).is_file():
        name, checkpoint = '', description
    torch.manual_seed(0)  # the same random weights each time
    # The last output is the deepest feature map. On a CPU only time matters: keep activations.
    options = dict(out_indices=-1, fusion=fusion, with_cp=with_cp, recompute='nothing')
    build = partial(build_backbone, name) if name else partial(recognise_backbone, checkpoint)
    backbone = build(options)
    backbone.init_weights()
    weights = 'random weights'
    if checkpoint:
        load_weights(backbone, checkpoint)
        weights = f'weights of {Path(checkpoint).name}'
    elif layer_scale is not None and set_layer_scale(backbone, layer_scale):
        weights += f', layer scale {layer_scale:g}'
    backbone.eval().requires_grad_(False)
    for module in backbone.modules():
        if hasattr(module, 'with_cp'):  # not its norms and drop path, which stay in eval mode
            module.training = with_cp
    return Network(name or type(backbone).__name__, weights, backbone)


def build_backbone(name: str, options: dict) -> Conv2Former | Conv2FormerIsotropic | Baseline:
    """A backbone by its name.

    Raises:
        ValueError: The name is unknown, or the network takes images of one size only.
        ModuleNotFoundError: The library of a baseline is not installed.
    """
    arch = name.removeprefix('conv2former_')
    if arch in ARCHS or arch in ARCH_LETTERS:
        return Conv2Former(arch, **options)
    if arch in ISOTROPIC_LETTERS:
        return Conv2FormerIsotropic(arch, **options)
    if name not in BASELINES:
        raise ValueError(
            f'network must be a checkpoint or one of {", ".join([*ARCHS, *ISOTROPIC_LETTERS])}, '
            f'{", ".join(BASELINES)}, got {name!r}, which is not a file either'
        )
    with_cp = options['with_cp']
    if BASELINES[name].family.library != 'timm':
        return Baseline(name, options=dict(with_cp=with_cp))
    baseline = Baseline(name)
    baseline.body.set_grad_checkpointing(with_cp)
    return baseline


def recognise_backbone(checkpoint: str, options: dict) -> Conv2Former | Conv2FormerIsotropic:
    """The Conv2Former of a checkpoint, recognised by shapes, with random weights.

    Raises:
        FileNotFoundError, CheckpointError: See `read_state_dict`. CheckpointError also means that
            the file is of another network.
    """
    state_dict = read_state_dict(checkpoint)
    prefix = find_prefix(state_dict, FIRST_KERNELS)
    found = {name[len(prefix) :]: v for name, v in state_dict.items() if name.startswith(prefix)}
    arch = recognise_arch(found)
    if arch.depths:
        return Conv2Former(
            dict(channels=arch.channels, depths=arch.depths),
            kernel_size=arch.kernel_size,
            mlp_ratio=arch.mlp_ratio or 4,
            in_channels=arch.in_channels or 3,
            **options,
        )
    kernel = found.get(FIRST_KERNELS[1])  # (C, 1, K, K)
    if kernel is None or kernel.dim() != 4:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} has no Conv2Former (for a baseline write '
            f'NAME=CHECKPOINT); its names begin with '
            f'{sorted({name.split(".")[0] for name in state_dict})}'
        )
    depth = len({name.split('.')[1] for name in found if name.startswith('blocks.')})
    return Conv2FormerIsotropic(
        dict(channels=kernel.shape[0], depth=depth, kernel_size=kernel.shape[-1]),
        patch_embedding='plain' if 'patch_embed.weight' in found else 'conv',
        **options,
    )


def load_weights(backbone: nn.Module, checkpoint: str) -> None:
    """Loads a file of ours, of the backbone's library, or of a whole model.

    Raises:
        FileNotFoundError, CheckpointError: See `mmconv2former.checkpoint.loading.load_pretrained`.
    """
    if not isinstance(backbone, Baseline):
        load_pretrained(backbone, checkpoint)
    elif any(name.startswith('backbone.body.') for name in read_state_dict(checkpoint)):
        load_pretrained(backbone, checkpoint, prefix='backbone')  # trained with a recipe of ours
    else:
        backbone.is_init = False
        backbone.pretrained = dict(type='Pretrained', checkpoint=checkpoint)
        backbone.init_weights()


def set_layer_scale(backbone: nn.Module, value: float) -> bool:
    """Sets every layer scale to a value; returns whether there are any."""
    scales = [p for name, p in backbone.named_parameters() if LAYER_SCALE.fullmatch(name)]
    for scale in scales:
        nn.init.constant_(scale, value)
    return bool(scales)


def blocks_of(network: Network) -> dict[str, Block]:
    """The blocks of a Conv2Former by name, such as `stages.2.11` or `blocks.5`.

    Raises:
        ValueError: It is another network.
    """
    blocks = {n: m for n, m in network.backbone.named_modules() if isinstance(m, Block)}
    if not blocks:
        raise ValueError(f'{network.label} has no modulation; this needs a Conv2Former')
    return blocks


def choose_blocks(blocks: Mapping[str, Block], chosen: Sequence[str] | None) -> dict[str, Block]:
    """The blocks that the user named.

    Args:
        blocks: All, by name.
        chosen: Such as `['0.2', '2.11']`, `['5']` for isotropic networks, or `['all']`. None takes
            the last of each stage, or of each quarter of an isotropic network.

    Raises:
        ValueError: There is no such block.
    """
    stages: dict[str, list[str]] = {}
    for name in blocks:
        stages.setdefault(name.rpartition('.')[0], []).append(name)
    if chosen is None:
        names = [stage[-1] for stage in stages.values()]
        if len(stages) == 1:
            names = list(dict.fromkeys(list(blocks)[len(blocks) * i // 4 - 1] for i in range(1, 5)))
    elif list(chosen) == ['all']:
        names = list(blocks)
    else:
        names = [f'{next(iter(blocks)).split(".")[0]}.{name}' for name in chosen]
    for name in names:
        if name not in blocks:
            there_are = ', '.join(f'{part[0]} to {part[-1]}' for part in stages.values())
            raise ValueError(f'block {name} does not exist; there are {there_are}')
    return {name: blocks[name] for name in names}


# ----------------------------------------------------------------------------------------- images
def find_images(paths: Sequence[Path], limit: int) -> list[Path]:
    """The first `limit` image files among paths and in the folders among them.

    Raises:
        FileNotFoundError: A path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist')
        if path.is_dir():
            found += sorted(
                p
                for p in path.rglob('*')
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith('.')
            )
        else:
            found.append(path)
    if not found:
        raise FileNotFoundError(
            f'no image ({", ".join(IMAGE_SUFFIXES)}) in {", ".join(map(str, paths))}'
        )
    return found[:limit]


def read_image(path: Path) -> Image.Image:
    """An image of any kind in RGB, upright.

    Raises:
        ValueError: It cannot be read; the message names the file.
    """
    try:
        with open_image(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):  # 16 bits, which Pillow would clip at 255
                high = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
            elif image.mode == 'F':
                raise ValueError('its values are floating-point numbers')
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'image {path} cannot be read: {error}') from error


def to_input(image: Image.Image) -> Tensor:
    """(1, 3, H, W), normalised as the networks expect it."""
    pixels = (np.asarray(image, np.float32) - MEAN) / STD  # (H, W, 3)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------------- receptive field
def input_gradient(backbone: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> np.ndarray:
    """How much each pixel contributes to the centre of the last feature map.

    The positive part of the gradient of the summed positive part of that position, summed over
    colours and images: RepLKNet's method (arXiv 2203.06717, section 5.1, and its published code).

    Args:
        backbone: Returns a tuple of feature maps (N, C, h, w).
        x: Images (N, 3, H, W).

    Returns:
        (H, W), float64.

    Raises:
        ValueError: The gradient is not finite, or zero everywhere.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        feature = backbone(x)[-1]
        centre = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2]
        # Not `torch.autograd.grad`: the checkpointing of some baselines does not work with it.
        F.relu(centre).sum().backward()
    assert x.grad is not None
    field = F.relu(x.grad).sum((0, 1)).double().cpu().numpy()
    if not np.isfinite(field).all() or not field.any():
        kind = 'zero everywhere' if np.isfinite(field).all() else 'not finite'
        raise ValueError(f'the gradient of an image is {kind}')
    return field


def smallest_square(field: np.ndarray, share: float) -> tuple[int, float]:
    """The smallest square around the centre that holds a share of a field's total.

    Squares grow by a pixel on each side of the pixel (H // 2, W // 2), up to the border.

    Args:
        field: (H, W), not negative.
        share: In (0, 1].

    Returns:
        Its side in pixels and its share of the field's area. If no square holds enough, as in a
        field that is not square, the largest one.
    """
    height, width = field.shape
    y, x = height // 2, width // 2
    enough = share * field.sum() * (1 - 1e-12)  # sums in another order differ by rounding
    for radius in range(min(y, x) + 1):
        rows = slice(y - radius, y + radius + 1)
        columns = slice(x - radius, x + radius + 1)
        if field[rows, columns].sum() >= enough:
            break
    side = min(2 * radius + 1, height, width)
    return side, side**2 / (height * width)


def log_scaled(field: np.ndarray, peak: float | None = None) -> np.ndarray:
    """log10(x + 1) of a field that is not negative, divided by its maximum.

    Args:
        field: Of any shape.
        peak: The field is scaled to this maximum first, unless None.
    """
    if peak is not None:
        field = field * (peak / field.max())
    logarithm = np.log10(field + 1)
    return logarithm / logarithm.max()


def draw_erf(args: argparse.Namespace) -> None:
    """effective receptive field: a figure, a table of areas, and the fields in a .npz."""
    guard_checkpoints(args)
    images = find_images(args.images, args.limit)
    networks = [
        load_network(name, args.fusion, args.with_cp, args.layer_scale) for name in args.networks
    ]
    fields = []
    for network in networks:
        backbone = network.backbone.to(args.device)
        start = time.time()
        total = np.zeros((args.size, args.size))
        for path in images:
            x = to_input(read_image(path).resize((args.size, args.size), Image.Resampling.BICUBIC))
            try:
                total += input_gradient(backbone, x.to(args.device))
            except ValueError as error:
                raise ValueError(f'{network.label}, {path}: {error}') from error
        fields.append(total / len(images))
        seconds = (time.time() - start) / len(images)
        print(f'{network.label} ({network.weights}): {len(images)} images, {seconds:.1f} s each')

    print(f'\nside of the smallest centred square in pixels of {args.size}, share of the image:')
    width = max(len(network.label) for network in networks)
    print(f'{"":{width}}' + ''.join(f'{share:>16.0%}' for share in SHARES))
    for network, field in zip(networks, fields):
        cells = [f'{s} ({area:.1%})' for s, area in (smallest_square(field, p) for p in SHARES)]
        row = f'{network.label:{width}}' + ''.join(f'{cell:>16}' for cell in cells)
        print(f'{row}   {network.weights}')
    save(erf_figure(networks, fields, args.peak), args.out)
    arrays = args.out.with_suffix('.npz')
    np.savez_compressed(arrays, networks=[n.title for n in networks], fields=fields)
    print(f'\nfigure in {args.out}, fields in {arrays}')


def erf_figure(
    networks: Sequence[Network], fields: Sequence[np.ndarray], peak: float | None
) -> Figure:
    """One panel per network, scaled by `log_scaled`, with the squares of `SHARES`."""
    columns = min(4, len(fields))
    figure, axes = panels(-(-len(fields) // columns), columns, size=3.2)
    for axis, network, field in zip(axes.flat, networks, fields):
        height, width = field.shape
        axis.imshow(log_scaled(field, peak), cmap='inferno', extent=(0, width, height, 0))
        axis.set_title(network.title.replace(', ', '\n', 1), fontsize=8)
        for share, colour in SHARES.items():
            side, _ = smallest_square(field, share)
            # Around the middle of the centre pixel
            corner = (width // 2 + 0.5 - side / 2, height // 2 + 0.5 - side / 2)
            label = f'{share:.0%}: {side}'
            axis.add_patch(
                Rectangle(corner, side, side, fill=False, color=colour, lw=0.8, label=label)
            )
        axis.legend(fontsize=6, loc='upper right', framealpha=0.4, labelcolor='white',
                    facecolor='black')  # fmt: skip
    return figure


# ------------------------------------------------------------------------------------- modulation
class ModulationMaps(NamedTuple):
    """Both branches of a block's modulation on an image, and their fusion, each (C, h, w).

    Attributes:
        a: Output of the large depthwise convolution.
        v: The linear projection.
        fused: A * V, or the result of another `fusion`.
    """

    a: Tensor
    v: Tensor
    fused: Tensor


def modulation_maps(
    backbone: nn.Module, x: Tensor, blocks: Mapping[str, Block]
) -> dict[str, ModulationMaps]:
    """A, V and A * V of some blocks.

    Args:
        backbone: A Conv2Former.
        x: One image (1, 3, H, W).
        blocks: Some of its blocks, by name.
    """
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: tuple, output: Tensor) -> None:
        seen[module] = output  # (1, h, w, C)

    branches = [m for block in blocks.values() for m in (block.attn.att, block.attn.v)]
    handles = [module.register_forward_hook(keep) for module in branches]
    try:
        with torch.no_grad():
            backbone(x)
    finally:
        for handle in handles:
            handle.remove()
    maps = {}
    for name, block in blocks.items():
        a, v = seen[block.attn.att], seen[block.attn.v]
        fused = FUSIONS[block.attn.fusion](a, v)
        maps[name] = ModulationMaps(*(t[0].permute(2, 0, 1).cpu() for t in (a, v, fused)))
    return maps


def draw_modulation(args: argparse.Namespace) -> None:
    """the maps A and A*V of the modulation, laid over an image."""
    guard_checkpoints(args)
    network = load_network(args.network, args.fusion)
    blocks = choose_blocks(blocks_of(network), args.blocks)
    image = read_image(args.image)
    scale = min(1.0, args.size / max(image.size))
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    backbone = network.backbone.to(args.device)
    maps = modulation_maps(backbone, to_input(image).to(args.device), blocks)
    fused_name = 'A*V' if args.fusion == 'hadamard' else f'A, V by {args.fusion}'

    print(f'{network.label} ({network.weights}), {args.image} at {image.width}x{image.height}')
    print(f'means of absolute values:\n{"block":14}{"size":>10}{"A":>10}{"V":>10}{fused_name:>10}')
    for name, found in maps.items():
        size = f'{found.a.shape[2]}x{found.a.shape[1]}'
        print(f'{name:14}{size:>10}' + ''.join(f'{t.abs().mean():10.4f}' for t in found))
    save(modulation_figure(network, image, maps, args.channels, fused_name), args.out)
    print(f'figure in {args.out}')


def modulation_figure(
    network: Network,
    image: Image.Image,
    maps: Mapping[str, ModulationMaps],
    channels: Sequence[int] | None,
    fused_name: str,
) -> Figure:
    """Blocks from left to right; A and its fusion with V, mean or by channel, from top to bottom.

    Raises:
        ValueError: A block has no such channel.
    """
    for name, found in maps.items():
        for channel in channels or ():
            if not 0 <= channel < len(found.a):
                raise ValueError(f'channel must be from 0 to {len(found.a) - 1} in {name}, '
                                 f'got {channel}')  # fmt: skip
    # What to draw of (C, h, w), by name
    shown: dict[str, Callable[[Tensor], Tensor]] = {'mean of |{}|': lambda t: t.abs().mean(0)}
    if channels is not None:
        shown = {f'{{}}, channel {i}': partial(torch.select, dim=0, index=i) for i in channels}
    rows = [(title, select, part) for title, select in shown.items() for part in ('a', 'fused')]

    figure, axes = panels(len(rows), 1 + len(maps), 2.6, aspect=image.height / image.width)
    figure.suptitle(network.title, fontsize=9)
    grey = ImageOps.grayscale(image)
    extent = (0, image.width, image.height, 0)
    axes[0, 0].imshow(image)
    axes[0, 0].set_title('image', fontsize=8)
    for (title, select, part), row in zip(rows, axes):
        for (name, found), axis in zip(maps.items(), row[1:]):
            values = select(getattr(found, part)).numpy()
            low, high = values.min(), values.max()
            if channels is not None:
                high = np.abs(values).max()
                low = -high
            axis.imshow(grey, cmap='gray', extent=extent)
            axis.imshow(
                values, cmap='viridis' if channels is None else 'RdBu_r', vmin=low, vmax=high,
                alpha=0.65, extent=extent, interpolation='bilinear',
            )  # fmt: skip
            drawn = title.format('A' if part == 'a' else fused_name)
            axis.set_title(f'{name}: {drawn}\n{low:.2g} to {high:.2g}', fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------- kernels
def kernels_of(block: Block) -> np.ndarray:
    """The large depthwise kernels of a block, (C, K, K)."""
    return block.attn.att[2].weight.detach()[:, 0].double().cpu().numpy()


def mean_kernels(blocks: Mapping[str, Block]) -> dict[str, np.ndarray]:
    """The mean absolute kernel (K, K) of each stage, over blocks and channels."""
    stages: dict[str, list[np.ndarray]] = {}
    for name, block in blocks.items():
        stages.setdefault(name.rpartition('.')[0], []).append(np.abs(kernels_of(block)).mean(0))
    return {stage: np.mean(kernels, 0) for stage, kernels in stages.items()}


def draw_kernels(args: argparse.Namespace) -> None:
    """the large depthwise kernels, and the mean of each stage."""
    guard_checkpoints(args)
    network = load_network(args.network, args.fusion)
    blocks = blocks_of(network)
    chosen = {name: kernels_of(b) for name, b in choose_blocks(blocks, args.blocks).items()}
    means = mean_kernels(blocks)
    print(f'{network.label} ({network.weights}): mean absolute kernel of each stage')
    print(f'{"stage":10}{"size":>8}{"centre":>10}{"border":>10}{"holds 50%":>11}{"holds 90%":>11}')
    for stage, mean in means.items():
        size, centre = len(mean), mean[len(mean) // 2, len(mean) // 2]
        border = np.concatenate([mean[0], mean[-1], mean[1:-1, 0], mean[1:-1, -1]]).mean()
        sides = [smallest_square(mean, share)[0] for share in (0.5, 0.9)]
        print(f'{stage:10}{f"{size}x{size}":>8}{centre:10.4f}{border:10.4f}'
              + ''.join(f'{f"{side}x{side}":>11}' for side in sides))  # fmt: skip
    save(kernels_figure(network, chosen, means, args.count), args.out)
    print(f'figure in {args.out}')


def kernels_figure(
    network: Network, kernels: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray], count: int
) -> Figure:
    """A row of kernels for each block, the means of the stages below; each on its own scale.

    Args:
        network: The network, for the title.
        kernels: Kernels (C, K, K) of each block to draw.
        means: Mean kernel (K, K) of each stage.
        count: Number of kernels to draw for each block.
    """
    heights = (0.98 * len(kernels), 2.4)
    figure = plt.figure(figsize=(0.85 * count, sum(heights)), dpi=DOTS_PER_INCH)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    top.suptitle(f'{network.title}: kernels, each from -max (blue) to +max '
                 '(red); channel and max above it', fontsize=8)  # fmt: skip
    axes = top.subplots(len(kernels), count, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for (name, of_block), row in zip(kernels.items(), axes):
        channels = np.unique(np.linspace(0, len(of_block) - 1, count).round().astype(int))
        for axis, channel in zip(row, channels):
            kernel = of_block[channel]
            largest = np.abs(kernel).max()
            axis.imshow(kernel, cmap='RdBu_r', vmin=-largest, vmax=largest)
            axis.set_title(f'{channel}: {largest:.2g}', fontsize=6, pad=2)
        row[0].text(-0.15, 0.5, name, fontsize=7, rotation=90, ha='right', va='center',
                    transform=row[0].transAxes)  # fmt: skip
    bottom.suptitle('mean absolute kernel of each stage, over all of its blocks', fontsize=8)
    for axis, (stage, mean) in zip(bottom.subplots(1, len(means), squeeze=False)[0], means.items()):
        drawn = axis.imshow(mean, cmap='viridis', vmin=0)
        axis.set_title(stage, fontsize=7)
        axis.set_axis_off()
        bottom.colorbar(drawn, ax=axis).ax.tick_params(labelsize=6)
    return figure


# ------------------------------------------------------------------------------------ predictions
def draw_predictions(args: argparse.Namespace) -> None:
    """predictions beside the ground truth on images of a dataset."""
    config = read_config(args)
    one_of({scope: None for scope in DRAWN_BY if scope != 'mmpretrain'}, config)
    with run_errors(args.traceback):
        pairs = drawn_pairs(config, args)
    columns = min(2, len(pairs))
    aspect = max(image.shape[0] / image.shape[1] for image in pairs.values())
    figure, axes = panels(-(-len(pairs) // columns), columns, 4.8, aspect)
    title = 'ground truth left, prediction right of each pair'
    figure.suptitle(f'{Path(args.checkpoint).name}: {title}', fontsize=9)
    for axis, (name, image) in zip(axes.flat, pairs.items()):
        axis.imshow(image)
        axis.set_title(name, fontsize=7)
    save(figure, args.out)
    print(f'{len(pairs)} images of {args.split}: {", ".join(pairs)}\nfigure in {args.out}')


def drawn_pairs(config: Config, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Ground truth and prediction side by side, uint8 (H, 2 W, 3), by file name.

    Raises:
        SystemExit: Data are missing, or the config has no such split.
        CheckpointError: The checkpoint cannot be read or is of another network.
        DataError: A dataset or a sample cannot be read.
        ValueError: The split has no such image.
    """
    parts = dataset_settings(config, args.split)
    check_files(config, [f'{args.split}_dataloader'])
    model = load_whole_model(config, args.checkpoint).to(args.device)
    # With `test_mode` images without objects are kept.
    changes = dict(pipeline=settings_of_files(config).pipeline, test_mode=True)
    dataset = ConcatDataset([CheckedDataset(dict(part, **changes)).dataset for part in parts])
    last = len(dataset) - 1
    indices = args.indices or np.unique(np.linspace(0, last, args.count).round().astype(int))
    for index in indices:
        if not 0 <= index <= last:
            raise ValueError(f'--indices must be from 0 to {last}, got {index}')
    visualizer = build_visualizer(config, dataset.metainfo)
    loader = dataset.datasets[0].pipeline.transforms[0]
    pairs = {}
    for index in indices:
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        path = Path(sample.img_path)
        image = np.ascontiguousarray(load_for_drawing(loader, path)[..., ::-1])  # RGB
        sides = [
            draw(visualizer, image, sample, score_thr=args.score, draw_gt=is_truth,
                 draw_pred=not is_truth)
            for is_truth in (True, False)
        ]  # fmt: skip
        pairs[str(path) if path.name in pairs else path.name] = np.hstack(sides)
    return pairs


# ----------------------------------------------------------------------------------------- figures
def panels(rows: int, columns: int, size: float, aspect: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A figure of panels without axes, each `size` inches wide and `aspect` times as high."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size * columns, (size * aspect + 0.45) * rows + 0.3),
        squeeze=False,
        layout='constrained',
        dpi=DOTS_PER_INCH,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches='tight')
    plt.close(figure)


if __name__ == '__main__':
    main()
