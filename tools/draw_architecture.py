"""Draws the block diagram of docs/architecture.md, with the numbers and names of the code.

    python tools/draw_architecture.py docs/images/architecture.svg

Coordinates are inches from the lower left corner. Under a part stands the name that its parameters
have in a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from mmconv2former.models.conv2former import ARCHS, STEM_STRIDE

ARCH = 'tiny'  # whose numbers are shown
WIDTH, HEIGHT = 13.2, 8.75

CONV, LARGE, NORM, ACTIVATION, SCALE, PLAIN = (
    '#cfe2f7', '#f6b8a8', '#e4e4e4', '#fde3b0', '#d8efd3', '#ffffff',
)  # fmt: skip
MODULATION, FEED_FORWARD = '#fbe9e4', '#eaf2fb'
GREY = '#555555'

Point = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path, help='picture to write, .svg or .png')
    args = parser.parse_args()
    if args.out.suffix not in ('.svg', '.png'):
        parser.error(f'the picture must end with .svg or .png, got {args.out}')
    draw(args.out)


def draw(out: Path) -> None:
    """Writes the diagram."""
    # The same file each time, of text rather than outlines: no date in it, no random names.
    with plt.rc_context({'svg.hashsalt': 'architecture', 'svg.fonttype': 'none'}):
        figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=110)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axis.set_axis_off()
        draw_network(axis)
        draw_stem(axis)
        draw_block(axis)
        draw_modulation(axis)
        draw_feed_forward(axis)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={'Date': None} if out.suffix == '.svg' else None)
        plt.close(figure)


# ------------------------------------------------------------------------------------- the panels
def draw_network(axis: Axes) -> None:
    """The row of stem, stages and downsamplings, with channels and strides."""
    arch, y = ARCHS[ARCH], 7.1
    title(axis, 0.25, 8.45, f'Conv2Former, with the numbers of {ARCH}')
    text(axis, (0.65, y), 'image\n3 x H x W')
    box(axis, (2.05, y), 1.1, 'stem', CONV, 'downsample_layers.0', height=0.62)
    arrow(axis, [(1.1, y), (1.5, y)])
    x = 2.05
    for i, (channels, depth) in enumerate(zip(arch.channels, arch.depths)):
        before, x = x + 0.55, 3.75 + 2.75 * i
        if i > 0:
            middle = x - 1.32
            box(axis, (middle, y), 0.82, 'down\n2x2, /2', CONV, f'downsample_layers.{i}',
                height=0.62)  # fmt: skip
            arrow(axis, [(before, y), (middle - 0.41, y)])
            before = middle + 0.41
        arrow(axis, [(before, y), (x - 0.55, y)])
        box(axis, (x, y), 1.1, f'stage {i}\n{depth} x block', PLAIN, f'stages.{i}', height=0.62)
        arrow(axis, [(x, y + 0.31), (x, y + 0.82)])
        stride = STEM_STRIDE * 2**i
        text(axis, (x + 0.08, y + 0.46), f'norm{i}', GREY, 7.5, ha='left', family='monospace')
        text(axis, (x, y + 0.96), f'{channels} x H/{stride} x W/{stride}')


def draw_stem(axis: Axes) -> None:
    channels, x = ARCHS[ARCH].channels[0], 1.3
    panel(axis, (0.2, 0.2, 2.2, 5.8), PLAIN)
    title(axis, 0.35, 5.68, 'Stem')
    half, name = channels // 2, 'downsample_layers.0'
    parts = [
        (f'conv 3x3, /2, to {half}', CONV, f'{name}.0'),
        ('GELU', ACTIVATION, None),
        ('BatchNorm', NORM, f'{name}.2'),
        (f'conv 3x3, {half}', CONV, f'{name}.3'),
        ('GELU', ACTIVATION, None),
        ('BatchNorm', NORM, f'{name}.5'),
        (f'conv 2x2, /2, to {channels}', CONV, f'{name}.6'),
    ]
    column(axis, x, 5.35, parts, 1.75, last=0.55)


def draw_block(axis: Axes) -> None:
    """The two residual halves of a block."""
    x, skip = 3.5, 4.75
    panel(axis, (2.65, 0.2, 2.45, 5.8), PLAIN)
    title(axis, 2.8, 5.68, 'Block')
    for top, half, colour, index in (
        (5.45, 'modulation', MODULATION, 1),
        (2.9, 'feed-forward', FEED_FORWARD, 2),
    ):
        prefix = 'attn' if index == 1 else 'mlp'
        arrow(axis, [(x, top), (x, top - 0.43)])
        box(axis, (x, top - 0.63), 1.4, half, colour, prefix, height=0.4)
        box(axis, (x, top - 1.35), 1.4, 'layer scale', SCALE, f'layer_scale_{index}')
        text(axis, (x + 0.08, top - 1.78), 'drop path', GREY, 7.5, ha='left')
        arrow(axis, [(x, top - 1.0), (x, top - 1.2)])
        arrow(axis, [(x, top - 1.64), (x, top - 2.02)])
        circle(axis, (x, top - 2.15), '+')
        arrow(
            axis, [(x, top - 0.13), (skip, top - 0.13), (skip, top - 2.15), (x + 0.13, top - 2.15)]
        )
        arrow(axis, [(x, top - 2.28), (x, top - 2.55)], head=index == 2)


def draw_modulation(axis: Axes) -> None:
    """Both branches of the modulation and their product."""
    left, right, middle = 6.3, 8.15, 7.225
    kernel = ARCHS[ARCH].kernel_size
    panel(axis, (5.35, 0.2, 3.75, 5.8), MODULATION)
    title(axis, 5.5, 5.68, 'Modulation: W3 (A * V)')
    arrow(axis, [(middle, 5.5), (middle, 5.27)])
    box(axis, (middle, 5.12), 1.4, 'LayerNorm', NORM, 'attn.norm')
    arrow(axis, [(middle, 4.83), (middle, 4.68), (left, 4.68), (left, 4.44)])
    arrow(axis, [(middle, 4.68), (right, 4.68), (right, 4.44)])
    box(axis, (left, 4.29), 1.45, 'W1, 1x1', CONV, 'attn.att.0')
    box(axis, (right, 4.29), 1.45, 'W2, 1x1', CONV, 'attn.v')
    arrow(axis, [(left, 4.0), (left, 3.8)])
    box(axis, (left, 3.65), 1.45, 'GELU', ACTIVATION)
    arrow(axis, [(left, 3.5), (left, 3.28)])
    box(axis, (left, 3.03), 1.45, f'depthwise\n{kernel}x{kernel}', LARGE, 'attn.att.2', height=0.5)
    y = 1.95
    arrow(axis, [(left, 2.62), (left, y), (middle - 0.13, y)])
    arrow(axis, [(right, 4.0), (right, y), (middle + 0.13, y)])
    circle(axis, (middle, y), '*')
    text(axis, (left - 0.2, 2.2), 'A', size=13, weight='bold')
    text(axis, (right + 0.2, 2.2), 'V', size=13, weight='bold')
    arrow(axis, [(middle, y - 0.13), (middle, 1.5)])
    box(axis, (middle, 1.35), 1.45, 'W3, 1x1', CONV, 'attn.proj')
    arrow(axis, [(middle, 1.06), (middle, 0.62)])
    text(axis, (middle, 0.42), 'no activation and no norm on A', GREY, 8)


def draw_feed_forward(axis: Axes) -> None:
    """The feed-forward network with its depthwise convolution."""
    x, skip = 10.7, 12.2
    channels = ARCHS[ARCH].channels[0]
    panel(axis, (9.35, 0.2, 3.65, 5.8), FEED_FORWARD)
    title(axis, 9.5, 5.68, 'Feed-forward')
    parts = [
        ('LayerNorm', NORM, 'mlp.norm'),
        (f'1x1, {channels} to {4 * channels}', CONV, 'mlp.fc1'),
        ('GELU', ACTIVATION, None),
    ]
    y = column(axis, x, 5.35, parts, 1.6, last=0.35, head=False)
    text(axis, (x - 0.2, y + 0.2), 'h', size=11, weight='bold')
    parts = [('depthwise 3x3', CONV, 'mlp.pos'), ('GELU', ACTIVATION, None)]
    end = column(axis, x, y, parts, 1.6, last=0.22)
    circle(axis, (x, end - 0.13), '+')
    arrow(axis, [(x, y + 0.2), (skip, y + 0.2), (skip, end - 0.13), (x + 0.13, end - 0.13)])
    text(axis, (skip - 0.02, end + 0.72), 'not in the\npaper\'s text', GREY, 8, ha='center',
         facecolor=FEED_FORWARD)  # fmt: skip
    parts = [(f'1x1, {4 * channels} to {channels}', CONV, 'mlp.fc2')]
    column(axis, x, end - 0.26, parts, 1.6, last=0.35)


# -------------------------------------------------------------------------------------- the parts
def column(
    axis: Axes,
    x: float,
    top: float,
    parts: Sequence[tuple[str, str, str | None]],
    width: float,
    last: float,
    head: bool = True,
) -> float:
    """Boxes one below another, with arrows; returns where the last arrow ends.

    Args:
        axis: Where to draw.
        x: Of the boxes' middle.
        top: Where the first arrow begins.
        parts: Label, colour and parameter name of each box.
        width: Of the boxes.
        last: Length of the last arrow, below the last box.
        head: Whether that one has a head.
    """
    for label, colour, name in parts:
        arrow(axis, [(x, top), (x, top - 0.22)])
        box(axis, (x, top - 0.37), width, label, colour, name)
        top -= 0.52 if name is None else 0.68
    arrow(axis, [(x, top), (x, top - last)], head)
    return top - last


def box(
    axis: Axes,
    centre: Point,
    width: float,
    label: str,
    colour: str,
    name: str | None = None,
    height: float = 0.3,
) -> None:
    """A labelled box, with the name of its parameters below."""
    x, y = centre
    corner = (x - width / 2 + 0.05, y - height / 2 + 0.05)
    axis.add_patch(
        FancyBboxPatch(
            corner, width - 0.1, height - 0.1, boxstyle='round,pad=0.05', facecolor=colour,
            edgecolor='black', linewidth=0.9,
        )
    )  # fmt: skip
    text(axis, centre, label)
    if name is not None:
        below = (x, y - height / 2 - 0.085)
        text(axis, below, name, GREY, 7, family='monospace')


def circle(axis: Axes, centre: Point, sign: str) -> None:
    """An elementwise operation."""
    axis.add_patch(Circle(centre, 0.13, facecolor='white', edgecolor='black', linewidth=0.9))
    x, y = centre
    text(axis, (x, y - (0.045 if sign == '*' else 0)), sign, size=12)


def arrow(axis: Axes, points: Sequence[Point], head: bool = True) -> None:
    """A line through points, with a head at its end."""
    *first, before, end = points
    axis.plot(*zip(*first, before, end if not head else before), color='black', linewidth=0.9)
    if head:
        style = dict(arrowstyle='-|>', color='black', linewidth=0.9, shrinkA=0, shrinkB=0)
        axis.annotate('', end, before, arrowprops=style)


def panel(axis: Axes, place: tuple[float, float, float, float], colour: str) -> None:
    """A frame at (x, y, width, height)."""
    x, y, width, height = place
    axis.add_patch(
        FancyBboxPatch(
            (x + 0.08, y + 0.08), width - 0.16, height - 0.16, boxstyle='round,pad=0.08',
            facecolor=colour, edgecolor='#999999', linewidth=0.8,
        )
    )  # fmt: skip


def title(axis: Axes, x: float, y: float, words: str) -> None:
    text(axis, (x, y), words, size=11, ha='left', weight='bold')


def text(
    axis: Axes,
    place: Point,
    words: str,
    colour: str = 'black',
    size: float = 9,
    ha: str = 'center',
    weight: str = 'normal',
    family: str = 'sans-serif',
    facecolor: str | None = None,
) -> None:
    background = dict(facecolor=facecolor, edgecolor='none', pad=1.5) if facecolor else None
    axis.text(*place, words, color=colour, fontsize=size, ha=ha, va='center', weight=weight,
              family=family, bbox=background)  # fmt: skip


if __name__ == '__main__':
    main()
