"""Times the 1x1 convolutions of size T on a GPU: torch's against the kernel of this project.

    python tools/benchmark_pointwise.py              # with the tiles that the network uses
    python tools/benchmark_pointwise.py --tiles      # with all that were considered

Sizes are those of a batch of 2 at 800x1280. It shows the time of the GPU alone and, in brackets,
that of the host. With GELU, torch needs a second launch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import common  # before torch
import torch
from benchmark_depthwise import stages
from common.launches import replaced
from common.measuring import DTYPES, Setting, device_seconds, machine, repeat, synchronize
from common.tables import show, table
from torch import Tensor

from mmconv2former.ops.triton_support import load

CALLS = 50  # fewer than a GPU queues
TILES = (
    (128, 128, 64, 3, 8), (128, 128, 64, 3, 4), (128, 128, 32, 4, 8), (128, 64, 64, 3, 4),
    (64, 128, 64, 3, 4), (64, 64, 64, 4, 4), (128, 256, 32, 3, 8), (128, 128, 128, 1, 8),
    (64, 128, 128, 1, 4), (128, 64, 128, 1, 4),
)  # fmt: skip


class Product(NamedTuple):
    """A 1x1 convolution."""

    name: str
    positions: tuple[int, int, int]  # N, H, W
    c_in: int
    c_out: int
    active: int = 0  # number of output channels that GELU is applied to
    is_gradient: bool = False  # for the input, of a convolution from c_out to c_in channels


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument(
        '--dtype', choices=[n for n in DTYPES if n != 'float32'], default='bfloat16'
    )
    parser.add_argument('--tiles', action='store_true', help='measure all tiles')
    args = parser.parse_args()
    setting = Setting((800, 1280), batch=2, device='cuda', dtype=args.dtype)
    print(f'{machine("cuda")}; {setting.dtype}; microseconds\n')
    show('pointwise', measure(setting, products(setting), TILES if args.tiles else ()), [])


def products(setting: Setting) -> Iterator[Product]:
    """Those of a block of each stage."""
    height, width = (side // 4 for side in setting.size)
    for batch, c, h, w in stages(setting.batch, height, width):
        positions = batch, h, w
        yield Product('gate and value', positions, c, 2 * c, active=c)
        yield Product('proj', positions, c, c)
        yield Product('fc1', positions, c, 4 * c, active=4 * c)
        yield Product('fc2', positions, 4 * c, c)
        for name, c_in, c_out in (
            ('gate and value', 2 * c, c), ('proj', c, c), ('fc1', 4 * c, c), ('fc2', c, 4 * c)
        ):  # fmt: skip
            yield Product(f'{name}, gradient', positions, c_in, c_out, is_gradient=True)


def measure(setting: Setting, all_products: Any, tiles: tuple[tuple[int, ...], ...]) -> str:
    """A table of products, with the network's tile and these."""
    ops = load('pointwise_triton')
    rows: list[list[str]] = []
    for product in all_products:
        call = call_of(product, setting)
        with replaced(ops, most_positions=lambda *args: 0):
            row = [time_of(call, setting)]
        with replaced(ops, most_positions=lambda *args: math.inf):
            row.append(time_of(call, setting))
            for tile in tiles:
                with replaced(ops, tile_for=lambda *args, tile=tile: ops.Tile(*tile)):
                    row.append(time_of(call, setting))
        size = 'x'.join(map(str, product.positions))
        rows.append([product.name, size, str(product.c_in), str(product.c_out), *row])
    header = ['product', 'N, H, W', 'channels', 'to', 'torch', 'kernel']
    return table(header + ['x'.join(map(str, tile)) for tile in tiles], rows)


def call_of(product: Product, setting: Setting) -> Callable[[], object]:
    """The step of a block that computes the product."""
    ops = load('pointwise_triton')
    make = partial(torch.randn, device=setting.device, dtype=DTYPES[setting.dtype])
    x: Tensor = make(*product.positions, product.c_in)
    if product.is_gradient:
        return partial(ops.pointwise_input_gradient, x, make(product.c_in, product.c_out))
    weight, bias = make(product.c_out, product.c_in), make(product.c_out)
    if product.active:
        return partial(ops.pointwise_gelu, x, weight, bias, product.active, True)
    return partial(ops.pointwise_conv, x, weight, bias)


def time_of(call: Callable[[], object], setting: Setting) -> str:
    """Microseconds of the GPU (of the host)."""
    seconds = device_seconds(call, setting.device)
    synchronize(setting.device)
    start = time.perf_counter()
    repeat(call, CALLS)
    host = (time.perf_counter() - start) / CALLS
    return f'{1e6 * seconds:.1f} ({1e6 * host:.0f})'


if __name__ == '__main__':
    main()
