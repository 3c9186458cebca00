"""Compiles the Triton kernels without a GPU, and fails if one spills registers.

    python tools/kernel_resources.py                      # the default kernels, for A100 and H100
    python tools/kernel_resources.py --capability 90 --kernel-sizes 11 --dtype float32
    python tools/kernel_resources.py --kernel-sizes 11 --rows 16   # other blocks
    python tools/kernel_resources.py --network --channels 72 576  # all kernels

Prints for each kernel the registers of a thread, the bytes it spills, the instructions of its
innermost loop and how many of them are the convolution's multiply-adds, and its loads and stores
of global memory by width. With half precision and a multiple of 8 channels, 16 bits means that
single elements are read. Triton includes the assembler and disassembler; no CUDA toolkit is needed.

These are the kernels that a training step and an inference launch. Both run on the CPU with a small
image, and launches are recorded instead of computed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from common import parser_of
from common.launches import replaced
from common.tables import show, table
from torch import Tensor

from mmconv2former import Conv2Former
from mmconv2former.models.blocks import Block
from mmconv2former.ops import DepthwiseConv, depthwise
from mmconv2former.ops.block import RECOMPUTE
from mmconv2former.ops.triton_support import installation_problem

if installation_problem() is None:  # otherwise `main` says what is missing
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmconv2former.ops import depthwise_triton
    from mmconv2former.ops.launch import Launcher

TYPES = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32',
         torch.float64: 'fp64', torch.int64: 'i64', torch.int32: 'i32'}  # fmt: skip
DTYPES = ('bfloat16', 'float16', 'float32')
HALF = ('bfloat16', 'float16')
# Constants that are shown beside a kernel's name; the rest are sizes.
SWITCHES = re.compile(r'HAS_\w+|FLIP')
PAGE = Path(__file__).resolve().parents[1] / 'docs/data/kernel_resources.md'
DISASSEMBLER = 'backends/nvidia/bin/cuobjdump'  # in Triton's folder
HEADER = ['GPU', 'dtype', 'kernel', 'K', 'C', 'registers', 'bytes spilled',
          'instructions of the loop', 'multiply-adds', 'loads and stores by bits']  # fmt: skip


class Launch(NamedTuple):
    """A kernel and what it is compiled for."""

    launcher: Launcher  # has the kernel and its constants
    dtypes: tuple[torch.dtype | None, ...]  # of the tensors, None for one that is missing
    sizes: int  # number of integers


class Resources(NamedTuple):
    """The resources of a compiled kernel; see the table's header."""

    registers: int
    spilled: int
    instructions: int
    multiply_adds: int
    accesses: str


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument('--capability', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--kernel-sizes', type=int, nargs='+', default=[3, 5, 7, 11, 21, 31])
    parser.add_argument('--channels', type=int, nargs='+', default=[72])
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', default=['bfloat16'])
    parser.add_argument('--rows', type=int, help='output rows of a forward program')
    parser.add_argument(
        '--network',
        action='store_true',
        help='compile all kernels of a network with float32 weights',
    )
    parser.add_argument(
        '--page', action='store_true', help='store the table in docs/data/kernel_resources.md'
    )
    args = parser.parse_args(argv)
    problem = installation_problem()
    if problem is not None:
        raise SystemExit(f'error: {problem}')
    if os.environ.get('TRITON_INTERPRET') == '1':
        raise SystemExit('error: TRITON_INTERPRET=1: there is nothing to compile; unset it')
    run = run_network if args.network else run_convolution
    rows: list[list[str]] = []
    for capability in args.capability:
        for dtype in args.dtype:
            for kernel_size in args.kernel_sizes:
                for channels in args.channels:
                    with recorded_launches(args.rows) as launches:
                        run(channels, kernel_size, getattr(torch, dtype))
                    for launch in launches:
                        constants = launch.launcher.constants
                        sizes = (constants.get('K', ''), constants.get('C', ''))
                        row = [f'sm_{capability}', dtype, name_of(launch), *map(str, sizes),
                               *map(str, resources(launch, capability))]  # fmt: skip
                        if row not in rows:  # some do not depend on K or C
                            rows.append(row)
    name = 'network resources' if args.network else 'resources'
    show(name, table(HEADER, rows), [PAGE] if args.page else [])
    spilling = [row for row in rows if row[6] != '0']
    if spilling:
        raise SystemExit(f'error: {len(spilling)} of {len(rows)} kernels spill registers')


# ---------------------------------------------------------------------------------------- launches
@contextmanager
def recorded_launches(rows: int | None) -> Iterator[list[Launch]]:
    """Records each kernel once instead of running it; results have arbitrary values.

    Args:
        rows: Output rows of a forward program of depthwise convolutions; None for the default.
    """
    keys: set[tuple] = set()
    launches: list[Launch] = []
    default = depthwise_triton.blocks_for

    def record(
        launcher: Launcher, programs: int, tensors: tuple[Tensor | None, ...], sizes: tuple
    ) -> None:
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        constants = tuple(sorted((name, str(v)) for name, v in launcher.constants.items()))
        key = (launcher.kernel.__name__, constants, dtypes)
        if key not in keys:
            keys.add(key)
            launches.append(Launch(launcher, dtypes, len(sizes)))

    def blocks_for(kernel_size: int) -> depthwise_triton.Blocks:
        blocks = default(kernel_size)
        return blocks if rows is None else replace(blocks, rows=rows)

    with (
        patch.object(Launcher, '__call__', record),
        patch.object(depthwise, 'setting', 'triton'),
        patch.object(depthwise, 'choice_for', lambda *_: 'triton'),
        replaced(
            depthwise_triton,
            blocks_for=blocks_for,
            is_packed=lambda _, dtype: dtype == torch.bfloat16,  # as on an NVIDIA GPU
        ),
    ):
        yield launches


def run_convolution(channels: int, kernel_size: int, dtype: torch.dtype) -> None:
    """A training step of a depthwise convolution with a bias in float32."""
    conv = DepthwiseConv(channels, kernel_size)
    x = torch.randn(1, 4, 4, channels, requires_grad=True)
    with autocast(dtype):
        y = conv(x)
    y.sum().backward()


def run_network(channels: int, kernel_size: int, dtype: torch.dtype) -> None:
    """Training with and without drop path in all ways of recomputation, and both inferences."""
    arch = dict(channels=(channels, channels), depths=(1, 1), kernel_size=kernel_size)
    x = torch.randn(2, 3, 16, 16)
    for recompute in RECOMPUTE:
        model = Conv2Former(arch, out_indices=(0, 1), recompute=recompute)
        for rate in (0.0, 0.5):
            for block in model.modules():
                if isinstance(block, Block):
                    block.drop_path.rate = rate
            with autocast(dtype):
                outputs = model(x)
            sum(output.sum() for output in outputs).backward()
    for form in (model.eval(), model.switch_to_deploy()):
        with torch.no_grad(), autocast(dtype):
            form(x)


def autocast(dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast('cpu', dtype)


def name_of(launch: Launch) -> str:
    """A kernel's name and what it is compiled with."""
    constants = launch.launcher.constants
    name = launch.launcher.kernel.__name__.removesuffix('_kernel').replace('_', ' ')
    name = name.removeprefix('depthwise ')
    parts = [str(constants['EPILOGUE']).replace('_', ' ')] if 'EPILOGUE' in constants else []
    parts += [
        key.removeprefix('HAS_').lower().replace('_', ' ')
        for key, value in constants.items()
        if SWITCHES.fullmatch(key) and value
    ]
    parts = [part for part in parts if part != 'none']
    return f'{name} ({", ".join(parts)})' if parts else name


# --------------------------------------------------------------------------------------- resources
def resources(launch: Launch, capability: int) -> Resources:
    """Compiles a kernel as `Launcher.compile` does on a GPU."""
    kernel, constants = launch.launcher.kernel, dict(launch.launcher.constants)
    tensors = kernel.params[: len(launch.dtypes)]
    sizes = kernel.params[len(tensors) : len(tensors) + launch.sizes]
    fixed = [p.name for p in sizes if not p.do_not_specialize]
    if fixed:
        raise SystemExit(f'error: {kernel.__name__} is compiled for each value of {fixed}')
    signature = dict.fromkeys(kernel.arg_names, 'constexpr') | {p.name: 'i32' for p in sizes}
    attributes = {}
    for parameter, dtype in zip(tensors, launch.dtypes):
        if dtype is None:
            constants[parameter.name] = None
        else:
            signature[parameter.name] = f'*{TYPES[dtype]}'
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [['tt.divisibility', 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=launch.launcher.num_warps)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(compiled.asm['cubin'])
        usage = disassemble('--dump-resource-usage', file.name)
        program = disassemble('--dump-sass', file.name)
    found = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    if found is None:
        raise SystemExit(f'error: {DISASSEMBLER} printed no resource usage: {usage}')
    return Resources(int(found[1]), int(found[2]), *innermost_loop(program), accesses(program))


def disassemble(option: str, file: str) -> str:
    command = [str(Path(triton.__file__).parent / DISASSEMBLER), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost_loop(program: str) -> tuple[int, int]:
    """Instructions and multiply-adds of the loop with the largest share of multiply-adds."""
    lines = re.findall(r'/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]+);', program)
    places = [(int(address, 16), text) for address, text in lines]
    best = (0, 0)
    for end, text in places:
        jump = re.search(r'^BRA\b.*0x([0-9a-f]+)', text)
        if jump is not None and int(jump[1], 16) < end:
            body = [t for address, t in places if int(jump[1], 16) <= address <= end]
            adds = sum(t.startswith('FFMA') for t in body)
            if best == (0, 0) or adds * best[0] > best[1] * len(body):
                best = len(body), adds
    return best


def accesses(program: str) -> str:
    """Loads and stores of global memory by their bits, such as `12 x 128, 1 x 16`."""
    instructions = re.findall(r'\b(?:LDG|STG)\.E\S*', program)
    bits = Counter(
        int(width[1]) if (width := re.search(r'\.[US]?(8|16|64|128)\b', text)) else 32
        for text in instructions
    )
    return ', '.join(f'{bits[width]} x {width}' for width in sorted(bits, reverse=True))


if __name__ == '__main__':
    main()
