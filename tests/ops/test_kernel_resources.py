"""The kernels compile without a GPU, within its registers."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.in_process import load_tool

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')


PAGE = (ROOT / 'docs/data/kernel_resources.md').read_text()
needs_nvidia = pytest.mark.skipif(torch.version.hip is not None, reason='compiles for NVIDIA')


def run(*arguments):
    """Runs Python in a process without Triton's interpreter, which this one may have."""
    settings = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=settings, capture_output=True, text=True
    )


def resources(*arguments):
    """The rows that the tool prints; those for the page's GPU must be there, if of this Triton."""
    result = run('tools/kernel_resources.py', *arguments)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[2:]
    if f'Triton {triton.__version__}' in PAGE and '--channels' not in arguments:
        assert all(line in PAGE for line in lines if 'sm_90' in line), 'run the tool with --page'
    return [[*map(str.strip, line.split('|')[1:-1])] for line in lines]


@needs_nvidia
def test_no_kernel_spills():
    rows = resources('--capability', '80', '90', '--kernel-sizes', '3', '11', '31')
    assert len(rows) == 2 * 3 * 4
    for gpu, _, name, size, _, registers, spilled, instructions, adds, bits in rows:
        assert int(spilled) == 0
        assert int(registers) <= 168, 'three programs of four warps do not fit'
        assert ' x 16' not in bits, 'elements are read one by one'
        if name != 'sum (bias)':
            assert int(adds) > 0.4 * int(instructions), (gpu, name, size)


@needs_nvidia
def test_kernels_of_a_network():
    rows = resources('--network', '--capability', '90', '--kernel-sizes', '11')
    # Weights, which may have any size and place, are folded as they are.
    assert {row[2] for row in rows if ' x 16' in row[9]} <= {'fold'}
    assert {row[6] for row in rows} == {'0'}


def test_a_network_and_a_convolution_launch_every_kernel():
    """In a process of its own, because kernels have no names in the interpreter."""
    result = run('-c', """
import sys, importlib, torch
sys.path.insert(0, 'tools')
from pathlib import Path
from triton.runtime import JITFunction
import kernel_resources as tool
files = Path('mmconv2former/ops').glob('*_kernels.py')
modules = [importlib.import_module(f'mmconv2former.ops.{file.stem}') for file in files]
kernels = {name for module in modules for name, value in vars(module).items()
           if isinstance(value, JITFunction) and name.endswith('_kernel')}
with tool.recorded_launches(None) as launches:
    for dtype in (torch.bfloat16, torch.float32):
        tool.run_network(8, 3, dtype)
    tool.run_convolution(8, 3, torch.bfloat16)
found = {launch.launcher.kernel.__name__ for launch in launches}
assert len(kernels) > 10
assert found == kernels, found ^ kernels
""")  # fmt: skip
    assert result.returncode == 0, result.stderr


@needs_nvidia
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split('.')[:2])) < (3, 5),
    reason="Triton before 3.5 spills registers of two kernels' rarer variants",
)
def test_other_channels_and_dtypes():
    """Channel counts that are no multiple of 8 and all dtypes compile."""
    rows = resources('--capability', '90', '--kernel-sizes', '5', '--channels', '20', '75',
                     '--dtype', 'float16', 'float32')  # fmt: skip
    assert len(rows) == 2 * 2 * 4


def test_spills_are_an_error():
    result = run('tools/kernel_resources.py', '--capability', '90', '--kernel-sizes', '11',
                 '--rows', '40')  # fmt: skip
    assert result.returncode == 1
    assert 'error: 2 of 4 kernels spill registers' in result.stderr


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(SystemExit, match='TRITON_INTERPRET=1: there is nothing to compile'):
        load_tool('kernel_resources').main([])
