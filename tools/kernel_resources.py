"""Compiles the Triton kernels for GPUs that are not there, and fails if one spills registers.

    python tools/kernel_resources.py                      # what runs by default, A100 and H100
    python tools/kernel_resources.py --capability 90 --kernel-sizes 11 --dtype float32
    python tools/kernel_resources.py --kernel-sizes 11 --rows 16   # another division of the work

Prints for each kernel the registers of a thread, the bytes it spills, and for its innermost loop
the number of instructions and how many of them are the multiply-adds that the convolution needs.
Triton brings the assembler and disassembler along: neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton
from make_tables import table, with_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmconv2former.ops.depthwise_triton import (
    Launcher,
    blocks_for,
    forward_launcher,
    weight_gradient_launchers,
)

TYPES = {'bfloat16': 'bf16', 'float16': 'fp16', 'float32': 'fp32'}
OF_INPUT_DTYPE = ('x', 'weight', 'y', 'grad')  # pointers; the others are of float32
FLOAT32 = ('bias', 'partial', 'weight_grad', 'bias_grad')
PAGE = Path(__file__).resolve().parents[1] / 'docs/depthwise.md'
DISASSEMBLER = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--capability', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--kernel-sizes', type=int, nargs='+', default=[3, 5, 7, 11, 21, 31])
    parser.add_argument('--channels', type=int, nargs='+', default=[72])
    parser.add_argument('--dtype', choices=TYPES, nargs='+', default=['bfloat16'])
    parser.add_argument('--rows', type=int, help='output rows of a forward program')
    parser.add_argument(
        '--page', action='store_true', help='keep what is printed in docs/depthwise.md'
    )
    args = parser.parse_args(argv)
    if os.environ.get('TRITON_INTERPRET') == '1':
        raise SystemExit('error: TRITON_INTERPRET=1: there is nothing to compile; unset it')
    rows = []
    for capability in args.capability:
        for dtype in args.dtype:
            for kernel_size in args.kernel_sizes:
                for channels in args.channels:
                    launchers = launchers_of(channels, kernel_size, dtype, args.rows)
                    for name, launcher in launchers.items():
                        numbers = resources(launcher, dtype, capability)
                        rows.append([f'sm_{capability}', dtype, name, str(kernel_size),
                                     str(channels), *map(str, numbers)])  # fmt: skip
    header = ['GPU', 'dtype', 'kernel', 'K', 'C', 'registers', 'bytes spilled',
              'instructions of the loop', 'multiply-adds']  # fmt: skip
    text = table(header, rows)
    print(text, end='')
    if args.page:
        PAGE.write_text(with_table(PAGE.read_text(), 'resources', text))
    spilling = [row for row in rows if row[6] != '0']
    if spilling:
        raise SystemExit(f'error: {len(spilling)} of {len(rows)} kernels spill registers')


def launchers_of(
    channels: int, kernel_size: int, name: str, rows: int | None
) -> dict[str, Launcher]:
    """All kernels of a convolution with bias, as they run on GPU 0."""
    dtype = getattr(torch, name)
    blocks = blocks_for(kernel_size)
    blocks = blocks if rows is None else replace(blocks, rows=rows)
    forward = forward_launcher(
        0, dtype, torch.float32, channels, kernel_size, channels, False, blocks
    )
    weight_gradient, sum_up = weight_gradient_launchers(
        0, dtype, torch.float32, channels, kernel_size, True, blocks
    )
    return {'forward': forward, 'weight gradient': weight_gradient, 'sum': sum_up}


def resources(launcher: Launcher, dtype: str, capability: int) -> tuple[int, int, int, int]:
    """Registers, bytes spilled, instructions and multiply-adds of the innermost loop."""
    kernel, constants = launcher.kernel, launcher.constants
    pointers = dict.fromkeys(OF_INPUT_DTYPE, f'*{TYPES[dtype]}') | dict.fromkeys(FLOAT32, '*fp32')
    signature = {
        name: 'constexpr' if name in constants else pointers.get(name, 'i32')
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [['tt.divisibility', 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in pointers and name != 'bias'
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=launcher.blocks.num_warps)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(compiled.asm['cubin'])
        usage = disassemble('--dump-resource-usage', file.name)
        program = disassemble('--dump-sass', file.name)
    found = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    if found is None:
        raise SystemExit(f'error: {DISASSEMBLER} printed no resource usage: {usage}')
    return int(found[1]), int(found[2]), *innermost_loop(program)


def disassemble(option: str, file: str) -> str:
    return subprocess.run(
        [DISASSEMBLER, option, file], capture_output=True, text=True, check=True
    ).stdout


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


if __name__ == '__main__':
    main()
