"""Pictures of what a network is and does.

    python tools/visualize.py erf tiny convnext_tiny swin_tiny --images data/coco/val2017
    python tools/visualize.py modulation work_dirs/.../epoch_36.pth --image picture.jpg
    python tools/visualize.py kernels pretrain/conv2former_t.pth
    python tools/visualize.py predictions CONFIG work_dirs/.../epoch_36.pth --count 6
    python tools/visualize.py curves work_dirs/mask_rcnn_conv2former_t

A NETWORK is a name (tiny, ib, swin_tiny, ...: random weights, and the picture says so), a
checkpoint of Conv2Former, of the backbone alone or of a whole model, or NAME=CHECKPOINT.
docs/visualize.md shows what each command prints and draws.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    load_config,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmconv2former import Baseline, Conv2Former, Conv2FormerIsotropic
from mmconv2former.checkpoint.architecture import recognise_arch
from mmconv2former.checkpoint.loading import find_prefix, load_model, load_pretrained
from mmconv2former.checkpoint.reading import CheckpointError, read_state_dict
from mmconv2former.models.baselines import BASELINES
from mmconv2former.models.blocks import Block
from mmconv2former.models.conv2former import ARCH_LETTERS, ARCHS
from mmconv2former.models.fusion import FUSIONS
from mmconv2former.models.isotropic import ISOTROPIC_LETTERS

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')
PICTURE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.pdf', '.svg')
# Of ImageNet, as all recipes have them
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the receptive field's total, as RepLKNet's table has them
SHARE_COLOURS = ('white', 'cyan', 'lime', 'red')
DOTS_PER_INCH = 110


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or '').partition('\n')[0])
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(arguments)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)  # mmengine tells of each tensor that it gave its first value
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f'error: {error}') from None
    finally:
        logger.setLevel(level)


# --------------------------------------------------------------------------------------- networks
# The names of layer scales in all networks that have them: ours, ConvNeXt's, HorNet's, DeiT-3's.
LAYER_SCALE = re.compile(r'.*\.(layer_scale_[12]|gamma|gamma[12]\.weight|ls[12]\.gamma)')


@dataclass(frozen=True)
class Network:
    """A backbone to look at, in eval mode and without gradients of its parameters.

    Attributes:
        label: Its name, or its class for a checkpoint alone.
        weights: Where they are from, in words.
        backbone: Gives a tuple of feature maps (N, C, h, w), the last one the deepest.
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
    """A network from what the command line says.

    Args:
        description: `NAME`, `CHECKPOINT` or `NAME=CHECKPOINT`.
        fusion: Of Conv2Former: the shapes in a file do not tell it.
        with_cp: Whether blocks are computed anew in the backward pass, for less memory.
        layer_scale: Value of all layer scales of random weights, of networks that have some; None
            leaves them as they are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such network, or the checkpoint is not of it.
        ModuleNotFoundError: A baseline's library is not installed.
    """
    name, _, checkpoint = description.partition('=')
    if Path(description).is_file():
        name, checkpoint = '', description
    torch.manual_seed(0)  # the same random weights each time
    make = partial(build_backbone, name) if name else partial(backbone_of_checkpoint, checkpoint)
    backbone = make(fusion, with_cp)
    backbone.init_weights()
    weights = 'random weights'
    if checkpoint:
        load_weights(backbone, checkpoint)
        weights = f'weights of {Path(checkpoint).name}'
    elif layer_scale is not None and set_layer_scale(backbone, layer_scale):
        weights += f', layer scale {layer_scale:g}'
    backbone.eval().requires_grad_(False)
    for module in backbone.modules():
        if hasattr(module, 'with_cp'):  # of itself alone: norms and drop path stay in eval mode
            module.training = with_cp
    return Network(name or type(backbone).__name__, weights, backbone)


def conv2former_options(fusion: str, with_cp: bool) -> dict:
    """Arguments for which the last output is the deepest feature map.

    With `recompute='nothing'`, as nothing but time matters on a CPU.
    """
    return dict(out_indices=-1, fusion=fusion, with_cp=with_cp, recompute='nothing')


def build_backbone(
    name: str, fusion: str, with_cp: bool
) -> Conv2Former | Conv2FormerIsotropic | Baseline:
    """A backbone by its name, whose last output is the deepest feature map.

    Raises:
        ValueError: There is none of this name, or it takes images of one size only.
        ModuleNotFoundError: A baseline's library is not installed.
    """
    options = conv2former_options(fusion, with_cp)
    arch = name.removeprefix('conv2former_')
    if arch in ARCHS or arch in ARCH_LETTERS:
        return Conv2Former(arch, **options)
    if arch in ISOTROPIC_LETTERS:
        return Conv2FormerIsotropic(arch, **options)
    if name in BASELINES:
        is_of_timm = BASELINES[name].family.library == 'timm'
        baseline = Baseline(name, options={} if is_of_timm else dict(with_cp=with_cp))
        if is_of_timm:
            baseline.body.set_grad_checkpointing(with_cp)
        return baseline
    raise ValueError(
        f'network must be a checkpoint or one of {", ".join([*ARCHS, *ISOTROPIC_LETTERS])}, '
        f'{", ".join(BASELINES)}, got {name!r}, which is no file either'
    )


def backbone_of_checkpoint(
    checkpoint: str, fusion: str, with_cp: bool
) -> Conv2Former | Conv2FormerIsotropic:
    """The Conv2Former that a checkpoint is of, by the shapes of its tensors, still to be loaded.

    Raises:
        FileNotFoundError, CheckpointError: See `read_state_dict`; or it is of another network.
    """
    state_dict = read_state_dict(checkpoint)
    first_kernels = ['stages.0.0.attn.att.2.weight', 'blocks.0.attn.att.2.weight']
    prefix = find_prefix(state_dict, first_kernels)
    found = {
        name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)
    }
    options = conv2former_options(fusion, with_cp)
    architecture = recognise_arch(found)
    if architecture.depths:
        arch = dict(channels=architecture.channels, depths=architecture.depths)
        return Conv2Former(
            arch,
            kernel_size=architecture.kernel_size,
            mlp_ratio=architecture.mlp_ratio or 4,
            in_channels=architecture.in_channels or 3,
            **options,
        )
    kernel = found.get(first_kernels[1])
    if kernel is None or kernel.dim() != 4:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} is of no Conv2Former (of a baseline write '
            f'NAME=CHECKPOINT); its names begin with '
            f'{sorted({name.split(".")[0] for name in state_dict})}'
        )
    blocks = {name.split('.')[1] for name in found if name.startswith('blocks.')}
    channels, _, kernel_size, _ = kernel.shape
    return Conv2FormerIsotropic(
        dict(channels=channels, depth=len(blocks), kernel_size=kernel_size),
        patch_embedding='plain' if 'patch_embed.weight' in found else 'conv',
        **options,
    )


def load_weights(backbone: nn.Module, checkpoint: str) -> None:
    """Fills a backbone from a file of ours, of the backbone's library, or of a whole model.

    Raises:
        FileNotFoundError, CheckpointError: See `mmconv2former.checkpoint.loading.load_pretrained`.
    """
    if not isinstance(backbone, Baseline):
        load_pretrained(backbone, checkpoint)
    elif any(name.startswith('backbone.body.') for name in read_state_dict(checkpoint)):
        load_pretrained(backbone, checkpoint, prefix='backbone')  # trained in a recipe of ours
    else:
        backbone.is_init = False
        backbone.pretrained = dict(type='Pretrained', checkpoint=checkpoint)
        backbone.init_weights()


def set_layer_scale(backbone: nn.Module, value: float) -> int:
    """Sets every layer scale of a network to a value, and tells how many there are."""
    scales = [p for name, p in backbone.named_parameters() if LAYER_SCALE.fullmatch(name)]
    for scale in scales:
        nn.init.constant_(scale, value)
    return len(scales)


def blocks_of(network: Network) -> dict[str, Block]:
    """The blocks of a Conv2Former by their names, such as `stages.2.11`, or `blocks.5`.

    Raises:
        ValueError: It is another network.
    """
    blocks = {n: m for n, m in network.backbone.named_modules() if isinstance(m, Block)}
    if not blocks:
        raise ValueError(f'{network.label} has no modulation: this is for Conv2Former only')
    return blocks


def choose_blocks(blocks: Mapping[str, Block], chosen: Sequence[str] | None) -> dict[str, Block]:
    """The blocks that a user names, by default the last of each stage.

    Args:
        blocks: All, by name.
        chosen: Such as `['0.2', '2.11']`, of isotropic networks `['5']`; or `['all']`; or None.

    Raises:
        ValueError: There is no such block.
    """
    stages: dict[str, list[str]] = {}
    for name in blocks:
        stages.setdefault(name.rpartition('.')[0], []).append(name)
    if chosen is None:
        names = [stage[-1] for stage in stages.values()]
        if len(stages) == 1:  # an isotropic network: the ends of the quarters
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
    """Image files among paths and in the folders among them, the first `limit` by name.

    Raises:
        FileNotFoundError: A path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f'{path} does not exist')
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
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'image {path} cannot be read: {error}') from error


def to_input(image: Image.Image) -> Tensor:
    """(1, 3, H, W), normalised as the networks expect it."""
    pixels = (np.asarray(image, np.float32) - MEAN) / STD  # (H, W, 3)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def fit_into(image: Image.Image, size: int) -> Image.Image:
    """The image with its longest side at most `size`."""
    scale = min(1.0, size / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size])


# ------------------------------------------------------------------------------- receptive field
def input_gradient(backbone: nn.Module, x: Tensor) -> np.ndarray:
    """What each pixel adds to the centre of the last feature map.

    The positive part of the gradient of the summed positive part of that position, summed over
    colours and images: RepLKNet's method (arXiv 2203.06717, section 5.1, and its published code).

    Args:
        backbone: Gives a tuple of feature maps (N, C, h, w).
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

    Squares grow by a pixel to each side of the pixel (H // 2, W // 2), up to the border.

    Args:
        field: (H, W), not negative.
        share: In (0, 1].

    Returns:
        Its side in pixels, at most the shorter one of the field; and its share of the field's area.
        If no square holds enough, which a field that is not square may have, the largest one.
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
    """log10(x + 1), of which the largest is 1.

    Args:
        field: Not negative.
        peak: What its largest value is made before; None leaves it as it is.
    """
    if peak is not None:
        field = field * (peak / field.max())
    logarithm = np.log10(field + 1)
    return logarithm / logarithm.max()


def add_erf_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `draw_erf`."""
    parser.add_argument('networks', nargs='+', metavar='NETWORK', help='see above; all in one go')
    parser.add_argument('--images', nargs='+', type=Path, required=True, help='files and folders')
    parser.add_argument('--limit', type=positive_int, default=50, help='images at most')
    parser.add_argument('--size', type=positive_int, default=1024, help='side of the input, pixels')
    parser.add_argument(
        '--layer-scale',
        type=float,
        metavar='VALUE',
        help='of random weights, where a network has layer scales: they begin at 1e-6 or so, with '
        'which untrained blocks do nothing',
    )
    parser.add_argument(
        '--with-cp', action='store_true', help='blocks computed anew: less memory, more time'
    )
    parser.add_argument(
        '--peak',
        type=positive_int,
        help='makes this the largest value of each field before the logarithm, in the picture: '
        'where gradients are far below 1, the logarithm of x + 1 shows their centre only',
    )
    add_network_arguments(parser)
    parser.add_argument('--out', type=picture_path, default='erf.png')


def draw_erf(args: argparse.Namespace) -> None:
    """effective receptive field: pictures, and a table of areas

    The fields themselves are beside the picture, in a .npz.
    """
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
    for line in area_table(networks, fields):
        print(line)

    save(erf_figure(networks, fields, args.peak), args.out)
    arrays = args.out.with_suffix('.npz')
    np.savez_compressed(arrays, networks=[n.title for n in networks], fields=fields)
    print(f'\npicture in {args.out}, fields in {arrays}')


def area_table(networks: Sequence[Network], fields: Sequence[np.ndarray]) -> list[str]:
    """Lines of a table: for each network, what holds each of `SHARES`."""
    width = max(len(network.label) for network in networks)
    lines = [f'{"":{width}}' + ''.join(f'{share:>16.0%}' for share in SHARES)]
    for network, field in zip(networks, fields):
        cells = [f'{s} ({area:.1%})' for s, area in (smallest_square(field, p) for p in SHARES)]
        row = f'{network.label:{width}}' + ''.join(f'{cell:>16}' for cell in cells)
        lines.append(f'{row}   {network.weights}')
    return lines


def erf_figure(
    networks: Sequence[Network], fields: Sequence[np.ndarray], peak: float | None
) -> Figure:
    """One panel a network, scaled by `log_scaled`, with the squares of `SHARES`."""
    columns = min(4, len(fields))
    figure, axes = panels(-(-len(fields) // columns), columns, size=3.2)
    for axis, network, field in zip(axes.flat, networks, fields):
        height, width = field.shape
        axis.imshow(log_scaled(field, peak), cmap='inferno', extent=(0, width, height, 0))
        axis.set_title(network.title.replace(', ', '\n', 1), fontsize=8)
        for share, colour in zip(SHARES, SHARE_COLOURS):
            side, _ = smallest_square(field, share)
            # Around the middle of the centre pixel
            corner = (width // 2 + 0.5 - side / 2, height // 2 + 0.5 - side / 2)
            square = Rectangle(corner, side, side, fill=False, color=colour, lw=0.8)
            square.set_label(f'{share:.0%}: {side}')
            axis.add_patch(square)
        axis.legend(fontsize=6, loc='upper right', framealpha=0.4, labelcolor='white',
                    facecolor='black')  # fmt: skip
    return figure


# ------------------------------------------------------------------------------------- modulation
@dataclass(frozen=True)
class ModulationMaps:
    """Both branches of a block's modulation on an image, and what becomes of them, each (C, h, w).

    Attributes:
        a: Of the large depthwise convolution.
        v: The linear projection.
        fused: A * V, or what else the network's `fusion` makes of them.
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
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(key: tuple[str, str], _: nn.Module, __: tuple, output: Tensor) -> None:
        seen[key] = output  # (1, h, w, C)

    handles = [
        module.register_forward_hook(partial(keep, (name, branch)))
        for name, block in blocks.items()
        for branch, module in (('a', block.attn.att), ('v', block.attn.v))
    ]
    try:
        with torch.no_grad():  # hooks are called in this mode only, see `Modulation.forward`
            backbone(x)
    finally:
        for handle in handles:
            handle.remove()
    maps = {}
    for name, block in blocks.items():
        a, v = seen[name, 'a'], seen[name, 'v']
        fused = FUSIONS[block.attn.fusion](a, v)
        maps[name] = ModulationMaps(*(t[0].permute(2, 0, 1).cpu() for t in (a, v, fused)))
    return maps


def add_modulation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('network', metavar='NETWORK', help='see above')
    parser.add_argument('--image', type=Path, required=True)
    parser.add_argument('--size', type=positive_int, default=640, help='longest side at most')
    add_block_arguments(parser)
    parser.add_argument(
        '--channels', type=int, nargs='+', help='draw these, with their sign, instead of the mean'
    )
    add_network_arguments(parser)
    parser.add_argument('--out', type=picture_path, default='modulation.png')


def draw_modulation(args: argparse.Namespace) -> None:
    """the maps A and A*V of the modulation, laid over an image"""
    guard_checkpoints(args)
    network = load_network(args.network, args.fusion)
    blocks = choose_blocks(blocks_of(network), args.blocks)
    image = fit_into(read_image(args.image), args.size)
    backbone = network.backbone.to(args.device)
    maps = modulation_maps(backbone, to_input(image).to(args.device), blocks)
    fused_name = 'A*V' if args.fusion == 'hadamard' else f'A, V by {args.fusion}'

    print(f'{network.label} ({network.weights}), {args.image} at {image.width}x{image.height}')
    print(f'means of absolute values:\n{"block":14}{"size":>10}{"A":>10}{"V":>10}{fused_name:>10}')
    for name, found in maps.items():
        size = f'{found.a.shape[2]}x{found.a.shape[1]}'
        means = (t.abs().mean().item() for t in (found.a, found.v, found.fused))
        print(f'{name:14}{size:>10}' + ''.join(f'{mean:10.4f}' for mean in means))
    save(modulation_figure(network, image, maps, args.channels, fused_name), args.out)
    print(f'picture in {args.out}')


def modulation_figure(
    network: Network,
    image: Image.Image,
    maps: Mapping[str, ModulationMaps],
    channels: Sequence[int] | None,
    fused_name: str,
) -> Figure:
    """Blocks from left to right; A and what becomes of it, mean or channel by channel, below.

    Raises:
        ValueError: A block has no such channel.
    """
    rows: list[tuple[str, list[Tensor]]] = []  # what is drawn of each block
    if channels is None:
        rows.append(('mean |A|', [found.a.abs().mean(0) for found in maps.values()]))
        means = [found.fused.abs().mean(0) for found in maps.values()]
        rows.append((f'mean |{fused_name}|', means))
    for channel in channels or ():
        for name, found in maps.items():
            if not 0 <= channel < len(found.a):
                raise ValueError(f'channel must be from 0 to {len(found.a) - 1} in {name}, '
                                 f'got {channel}')  # fmt: skip
        rows.append((f'A, channel {channel}', [found.a[channel] for found in maps.values()]))
        of_channel = [found.fused[channel] for found in maps.values()]
        rows.append((f'{fused_name}, channel {channel}', of_channel))

    figure, axes = panels(len(rows), 1 + len(maps), 2.6, aspect=image.height / image.width)
    figure.suptitle(network.title, fontsize=9)
    grey = ImageOps.grayscale(image)
    extent = (0, image.width, image.height, 0)
    axes[0, 0].imshow(image)
    axes[0, 0].set_title('image', fontsize=8)
    for (row_name, drawn), row in zip(rows, axes):
        for name, values, axis in zip(maps, map(Tensor.numpy, drawn), row[1:]):
            low, high = values.min(), values.max()
            if channels is not None:
                high = np.abs(values).max()
                low = -high
            axis.imshow(grey, cmap='gray', extent=extent)
            axis.imshow(
                values, cmap='viridis' if channels is None else 'RdBu_r', vmin=low, vmax=high,
                alpha=0.65, extent=extent, interpolation='bilinear',
            )  # fmt: skip
            axis.set_title(f'{name}: {row_name}\n{low:.2g} to {high:.2g}', fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------- kernels
def kernels_of(block: Block) -> np.ndarray:
    """The large depthwise kernels of a block, (C, K, K)."""
    return block.attn.att[2].weight.detach()[:, 0].double().cpu().numpy()


def mean_kernels(blocks: Mapping[str, Block]) -> dict[str, np.ndarray]:
    """The mean of the absolute kernels of each stage, over blocks and channels, (K, K)."""
    stages: dict[str, list[np.ndarray]] = {}
    for name, block in blocks.items():
        stages.setdefault(name.rpartition('.')[0], []).append(np.abs(kernels_of(block)).mean(0))
    return {stage: np.mean(kernels, 0) for stage, kernels in stages.items()}


def add_kernels_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('network', metavar='NETWORK', help='see above')
    add_block_arguments(parser)
    parser.add_argument(
        '--count', type=positive_int, default=14, help='kernels of a block, evenly spaced'
    )
    add_network_arguments(parser)
    parser.add_argument('--out', type=picture_path, default='kernels.png')


def draw_kernels(args: argparse.Namespace) -> None:
    """the large depthwise kernels, and the mean of each stage"""
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
    print(f'picture in {args.out}')


def kernels_figure(
    network: Network, kernels: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray], count: int
) -> Figure:
    """A row of kernels for each block, under them the means of the stages; each on its own scale.

    Args:
        kernels: Of each block to draw, (C, K, K).
        means: Of each stage, (K, K).
        count: Kernels drawn of each block.
    """
    size = 0.85
    figure = plt.figure(
        figsize=(size * count, size * (1.15 * len(kernels)) + 2.4), dpi=DOTS_PER_INCH
    )
    sheet, bottom = figure.subfigures(
        2, 1, squeeze=False, height_ratios=(size * 1.15 * len(kernels), 2.4)
    ).flat
    sheet.suptitle(f'{network.title}: kernels, each from -max (blue) to +max '
                   '(red); channel and max above it', fontsize=8)  # fmt: skip
    axes = sheet.subplots(len(kernels), count, squeeze=False)
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
LEFT_OF_EACH = 'left of each pair the truth, right the prediction'


def add_predictions_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `draw_predictions`."""
    parser.add_argument('config', help='config file, of detection or segmentation')
    parser.add_argument('checkpoint', help='checkpoint file of the whole model')
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='test')
    parser.add_argument('--count', type=positive_int, default=6, help='images, evenly spaced')
    parser.add_argument('--indices', type=int, nargs='+', help='these images of the split instead')
    parser.add_argument('--score', type=float, default=0.3, help='least score of a drawn object')
    add_config_arguments(parser)
    add_data_root_argument(parser)
    add_device_argument(parser)
    parser.add_argument('--out', type=picture_path, default='predictions.jpg')


def draw_predictions(args: argparse.Namespace) -> None:
    """predictions beside the truth on images of a data set"""
    config = load_config(args)
    if config.get('default_scope') not in ('mmdet', 'mmseg'):
        raise ValueError(
            f'{args.config} is of {config.get("default_scope")}; predictions are drawn for '
            'detection (mmdet) and segmentation (mmseg)'
        )
    pairs = drawn_pairs(config, args.checkpoint, args.split, args.count, args.indices, args.score,
                        args.device)  # fmt: skip
    columns = min(2, len(pairs))
    heights = [picture.shape[0] / picture.shape[1] for _, picture in pairs]
    figure, axes = panels(-(-len(pairs) // columns), columns, 4.8, aspect=max(heights))
    figure.suptitle(f'{Path(args.checkpoint).name}: {LEFT_OF_EACH}', fontsize=9)
    for axis, (name, picture) in zip(axes.flat, pairs):
        axis.imshow(picture)
        axis.set_title(name, fontsize=7)
    save(figure, args.out)
    names = ', '.join(name for name, _ in pairs)
    print(f'{len(pairs)} images of {args.split}: {names}\npicture in {args.out}')


def drawn_pairs(
    config: Config,
    checkpoint: str,
    split: str,
    count: int,
    indices: Sequence[int] | None,
    score: float,
    device: str,
) -> list[tuple[str, np.ndarray]]:
    """Truth and prediction side by side, as the host library's visualizer draws them.

    Args:
        config: A whole config of mmdet or mmseg.
        checkpoint: Of the whole model.
        split: Whose images, 'train', 'val' or 'test'; with the pipeline of the test.
        count: How many, evenly spaced.
        indices: Which ones instead.
        score: Least score of an object that is drawn, in detection.
        device: 'cpu' or 'cuda'.

    Returns:
        For each image its file name and the picture (H, 2 W, 3) in RGB.

    Raises:
        SystemExit: Data are missing.
        FileNotFoundError, CheckpointError: The checkpoint is not there or not of this model.
        ValueError: There is no such split, or it has no such image.
    """
    dataloader = f'{split}_dataloader'
    if not config.get(dataloader):
        raise ValueError(f'--split {split}: {config.filename} has no {dataloader}')
    check_files(config, [dataloader, 'test_dataloader'])
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None  # the checkpoint holds all weights
    model = MODELS.build(config.model)
    content = dict(state_dict=read_state_dict(checkpoint))
    load_model(model, content, checkpoint, strict=True)
    model = model.to(device).eval()

    settings = without_wrappers(config[dataloader].dataset)
    settings.pipeline = without_wrappers(config.test_dataloader.dataset).pipeline
    settings.test_mode = True  # keeps images without objects
    dataset = DATASETS.build(settings)
    if indices is None:
        indices = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()
    for index in indices:
        if not 0 <= index < len(dataset):
            raise ValueError(f'--indices must be from 0 to {len(dataset) - 1}, got {index}')
    visualizer = VISUALIZERS.build(dict(config.visualizer, vis_backends=None, name='visualize'))
    visualizer.dataset_meta = dataset.metainfo
    options = dict(pred_score_thr=score) if config.default_scope == 'mmdet' else {}

    pairs = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for index in indices:
            (sample,) = model.test_step(pseudo_collate([dataset[index]]))
            name = Path(sample.img_path).name
            image = np.asarray(read_image(Path(sample.img_path)))
            out = Path(folder, 'pair.png')
            visualizer.add_datasample(name, image, sample, out_file=str(out), **options)
            pairs.append((name, np.asarray(read_image(out))))
    return pairs


def without_wrappers(dataset: ConfigDict) -> ConfigDict:
    """The settings of a dataset out of those that repeat it, check it and the like."""
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


# ------------------------------------------------------------------------- arguments and pictures
def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'must be an int of at least 1, got {text}')
    return int(text)


def picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        allowed = ', '.join(PICTURE_SUFFIXES)
        raise argparse.ArgumentTypeError(f'must end with one of {allowed}, got {text}')
    return path


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    parser.add_argument('--device', choices=devices, default=devices[-1])


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--blocks',
        nargs='+',
        metavar='STAGE.BLOCK',
        help='such as 0.2 2.11, both from 0 (isotropic: 5), or all (default: last of each stage)',
    )


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--fusion', choices=list(FUSIONS), default='hadamard', help='of Conv2Former, an ablation'
    )
    add_device_argument(parser)
    add_trust_argument(parser)


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


COMMANDS: dict[str, tuple[Callable, Callable]] = {
    'erf': (add_erf_arguments, draw_erf),
    'modulation': (add_modulation_arguments, draw_modulation),
    'kernels': (add_kernels_arguments, draw_kernels),
    'predictions': (add_predictions_arguments, draw_predictions),
    'curves': (plot_curves.add_arguments, plot_curves.plot_curves),
}

if __name__ == '__main__':
    main()
