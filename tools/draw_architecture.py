"""Draws the block diagram of docs/architecture.md, with the numbers and names of the code.

    python tools/draw_architecture.py docs/images/architecture.svg

Coordinates are inches from the lower left corner. The name of a part's parameters in a checkpoint
is below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

from mmconv2former.models.conv2former import ARCHS, STEM_STRIDE

NAME = 'tiny'  # whose numbers are shown
ARCH = ARCHS[NAME]
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
    parser.add_argument('out', type=Path, help='image to write, .svg or .png')
    draw(parser.parse_args().out)


def draw(out: Path) -> None:
    """Writes the diagram."""
    # The same file each time, with text instead of outlines: no date, no random names.
    with plt.rc_context({'svg.hashsalt': 'architecture', 'svg.fonttype': 'none'}):
        figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=110)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axis.set_axis_off()
        draw_network()
        draw_stem()
        draw_block()
        draw_modulation()
        draw_feed_forward()
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={'Date': None} if out.suffix == '.svg' else None)
        plt.close(figure)


# ------------------------------------------------------------------------------------- the panels
def draw_network() -> None:
    """The row of stem, stages and downsamplings, with channels and strides."""
    y = 7.1
    title((0.25, 8.45), f'Conv2Former, with the numbers of {NAME}')
    text((0.65, y), 'image\n3 x H x W')
    box((2.05, y), 1.1, 'stem', CONV, 'downsample_layers.0', height=0.62)
    arrow((1.1, y), (1.5, y))
    x = 2.05
    for i, (channels, depth) in enumerate(zip(ARCH.channels, ARCH.depths)):
        before, x = x + 0.55, 3.75 + 2.75 * i
        if i > 0:
            middle = x - 1.32
            box((middle, y), 0.82, 'down\n2x2, /2', CONV, f'downsample_layers.{i}', height=0.62)
            arrow((before, y), (middle - 0.41, y))
            before = middle + 0.41
        arrow((before, y), (x - 0.55, y))
        box((x, y), 1.1, f'stage {i}\n{depth} x block', PLAIN, f'stages.{i}', height=0.62)
        arrow((x, y + 0.31), (x, y + 0.82))
        stride = STEM_STRIDE * 2**i
        text((x + 0.08, y + 0.46), f'norm{i}', GREY, 7.5, ha='left', family='monospace')
        text((x, y + 0.96), f'{channels} x H/{stride} x W/{stride}')


def draw_stem() -> None:
    panel(0.2, 2.2, PLAIN, 'Stem')
    channels, name = ARCH.channels[0], 'downsample_layers.0'
    half = channels // 2
    parts = [
        (f'conv 3x3, /2, to {half}', CONV, f'{name}.0'),
        ('GELU', ACTIVATION, None),
        ('BatchNorm', NORM, f'{name}.2'),
        (f'conv 3x3, {half}', CONV, f'{name}.3'),
        ('GELU', ACTIVATION, None),
        ('BatchNorm', NORM, f'{name}.5'),
        (f'conv 2x2, /2, to {channels}', CONV, f'{name}.6'),
    ]
    column(1.3, 5.35, parts, 1.75, last=0.55)


def draw_block() -> None:
    """The two residual halves of a block."""
    x, skip = 3.5, 4.75
    panel(2.65, 2.45, PLAIN, 'Block')
    for top, half, colour, prefix, index in (
        (5.45, 'modulation', MODULATION, 'attn', 1),
        (2.9, 'feed-forward', FEED_FORWARD, 'mlp', 2),
    ):
        arrow((x, top), (x, top - 0.43))
        box((x, top - 0.63), 1.4, half, colour, prefix, height=0.4)
        box((x, top - 1.35), 1.4, 'layer scale', SCALE, f'layer_scale_{index}')
        text((x + 0.08, top - 1.78), 'drop path', GREY, 7.5, ha='left')
        arrow((x, top - 1.0), (x, top - 1.2))
        arrow((x, top - 1.64), (x, top - 2.02))
        circle((x, top - 2.15), '+')
        arrow((x, top - 0.13), (skip, top - 0.13), (skip, top - 2.15), (x + 0.13, top - 2.15))
        arrow((x, top - 2.28), (x, top - 2.55), head=index == 2)


def draw_modulation() -> None:
    """Both branches of the modulation and their product."""
    left, right, middle = 6.3, 8.15, 7.225
    large = f'depthwise\n{ARCH.kernel_size}x{ARCH.kernel_size}'
    panel(5.35, 3.75, MODULATION, 'Modulation: W3 (A * V)')
    arrow((middle, 5.5), (middle, 5.27))
    box((middle, 5.12), 1.4, 'LayerNorm', NORM, 'attn.norm')
    arrow((middle, 4.83), (middle, 4.68), (left, 4.68), (left, 4.44))
    arrow((middle, 4.68), (right, 4.68), (right, 4.44))
    box((left, 4.29), 1.45, 'W1, 1x1', CONV, 'attn.att.0')
    box((right, 4.29), 1.45, 'W2, 1x1', CONV, 'attn.v')
    arrow((left, 4.0), (left, 3.8))
    box((left, 3.65), 1.45, 'GELU', ACTIVATION)
    arrow((left, 3.5), (left, 3.28))
    box((left, 3.03), 1.45, large, LARGE, 'attn.att.2', height=0.5)
    y = 1.95
    arrow((left, 2.62), (left, y), (middle - 0.13, y))
    arrow((right, 4.0), (right, y), (middle + 0.13, y))
    circle((middle, y), '*')
    text((left - 0.2, 2.2), 'A', size=13, weight='bold')
    text((right + 0.2, 2.2), 'V', size=13, weight='bold')
    arrow((middle, y - 0.13), (middle, 1.5))
    box((middle, 1.35), 1.45, 'W3, 1x1', CONV, 'attn.proj')
    arrow((middle, 1.06), (middle, 0.62))
    text((middle, 0.42), 'no activation and no norm on A', GREY, 8)


def draw_feed_forward() -> None:
    """The feed-forward network with its depthwise convolution."""
    x, skip = 10.7, 12.2
    channels = ARCH.channels[0]
    panel(9.35, 3.65, FEED_FORWARD, 'Feed-forward')
    parts = [
        ('LayerNorm', NORM, 'mlp.norm'),
        (f'1x1, {channels} to {4 * channels}', CONV, 'mlp.fc1'),
        ('GELU', ACTIVATION, None),
    ]
    y = column(x, 5.35, parts, 1.6, last=0.35, head=False)
    text((x - 0.2, y + 0.2), 'h', size=11, weight='bold')
    parts = [('depthwise 3x3', CONV, 'mlp.pos'), ('GELU', ACTIVATION, None)]
    end = column(x, y, parts, 1.6, last=0.22)
    circle((x, end - 0.13), '+')
    arrow((x, y + 0.2), (skip, y + 0.2), (skip, end - 0.13), (x + 0.13, end - 0.13))
    background = dict(facecolor=FEED_FORWARD, edgecolor='none', pad=1.5)
    text((skip - 0.02, end + 0.72), "not in the\npaper's text", GREY, 8, bbox=background)
    column(x, end - 0.26, [(f'1x1, {4 * channels} to {channels}', CONV, 'mlp.fc2')], 1.6, last=0.35)


# -------------------------------------------------------------------------------------- the parts
def column(
    x: float,
    top: float,
    parts: Sequence[tuple[str, str, str | None]],
    width: float,
    last: float,
    head: bool = True,
) -> float:
    """Boxes one below another, with arrows; returns where the last arrow ends.

    Args:
        x: Middle of the boxes.
        top: Where the first arrow starts.
        parts: Label, colour and parameter name of each box.
        width: Width of the boxes.
        last: Length of the arrow below the last box.
        head: Whether that arrow has a head.
    """
    for label, colour, name in parts:
        arrow((x, top), (x, top - 0.22))
        box((x, top - 0.37), width, label, colour, name)
        top -= 0.52 if name is None else 0.68
    arrow((x, top), (x, top - last), head=head)
    return top - last


def box(
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
    frame(corner, width - 0.1, height - 0.1, 0.05, colour, edgecolor='black', linewidth=0.9)
    text(centre, label)
    if name is not None:
        text((x, y - height / 2 - 0.085), name, GREY, 7, family='monospace')


def panel(x: float, width: float, colour: str, words: str) -> None:
    """The frame of a part of the network, with its title."""
    frame((x + 0.08, 0.28), width - 0.16, 5.64, 0.08, colour, edgecolor='#999999', linewidth=0.8)
    title((x + 0.15, 5.68), words)


def frame(
    corner: Point, width: float, height: float, pad: float, colour: str, **options: Any
) -> None:
    style = f'round,pad={pad}'
    plt.gca().add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, **options)
    )


def circle(centre: Point, sign: str) -> None:
    """An elementwise operation."""
    patch = Circle(centre, 0.13, facecolor='white', edgecolor='black', linewidth=0.9)
    plt.gca().add_patch(patch)
    x, y = centre
    text((x, y - (0.045 if sign == '*' else 0)), sign, size=12)


def arrow(*points: Point, head: bool = True) -> None:
    """A line through points, with a head at its end."""
    *first, before, end = points
    plt.plot(*zip(*first, before, end if not head else before), color='black', linewidth=0.9)
    if head:
        style = dict(arrowstyle='-|>', color='black', linewidth=0.9, shrinkA=0, shrinkB=0)
        plt.annotate('', end, before, arrowprops=style)


def title(place: Point, words: str) -> None:
    text(place, words, size=11, ha='left', weight='bold')


def text(
    place: Point, words: str, colour: str = 'black', size: float = 9, ha: str = 'center',
    **options: Any,
) -> None:  # fmt: skip
    plt.text(*place, words, color=colour, fontsize=size, ha=ha, va='center', **options)


if __name__ == '__main__':
    main()
