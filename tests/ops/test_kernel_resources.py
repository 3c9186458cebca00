"""The kernels compile for GPUs that are not there, within their registers."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.in_process import load_tool

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')


def resources(*arguments):
    """Runs the tool in a process of its own, as this one may have Triton's interpreter."""
    settings = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    return subprocess.run(
        [sys.executable, 'tools/kernel_resources.py', *arguments],
        cwd=ROOT, env=settings, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.skipif(torch.version.hip is not None, reason='compiles for NVIDIA')
def test_no_kernel_spills():
    result = resources('--capability', '80', '90', '--kernel-sizes', '3', '11', '31')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[2:]
    page = (ROOT / 'docs/data/kernel_resources.md').read_text()
    if f'Triton {triton.__version__}' in page:
        assert all(line in page for line in lines if 'sm_90' in line), 'run it with --page'
    rows = [line.split('|')[1:-1] for line in lines]
    assert len(rows) == 2 * 3 * 4
    for row in rows:
        gpu, _, name, size, _, registers, spilled, instructions, adds, bits = map(str.strip, row)
        assert int(spilled) == 0
        assert int(registers) <= 168, 'three programs of four warps do not fit'
        assert ' x 16' not in bits, 'elements are read one by one'
        if name != 'sum (bias)':
            assert int(adds) > 0.4 * int(instructions), (gpu, name, size)


@pytest.mark.skipif(torch.version.hip is not None, reason='compiles for NVIDIA')
def test_kernels_of_a_network():
    result = resources('--network', '--capability', '90', '--kernel-sizes', '11')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[2:]
    page = (ROOT / 'docs/data/kernel_resources.md').read_text()
    if f'Triton {triton.__version__}' in page:
        assert all(line in page for line in lines), 'run it with --network --page'
    rows = [[*map(str.strip, line.split('|')[1:-1])] for line in lines]
    # Weights, which may have any size and place, are folded as they are.
    assert {row[2] for row in rows if ' x 16' in row[9]} <= {'fold'}
    assert {row[6] for row in rows} == {'0'}


def test_a_network_launches_every_kernel():
    """So none is left out. In a process of its own, as kernels have no names in the interpreter."""
    code = """
import sys, importlib, torch
sys.path.insert(0, 'tools')
from pathlib import Path
from triton.runtime import JITFunction
import kernel_resources as tool
files = Path('mmconv2former/ops').glob('*_kernels.py')
modules = [importlib.import_module(f'mmconv2former.ops.{file.stem}') for file in files]
kernels = {name for module in modules for name, value in vars(module).items()
           if isinstance(value, JITFunction) and name.endswith('_kernel')}
with tool.noted_launches(None) as launches:
    tool.run_network(8, 3, torch.bfloat16)
found = {launch.launcher.kernel.__name__ for launch in launches}
assert len(kernels) > 10
assert found == kernels, found ^ kernels
"""
    settings = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_other_channels_and_dtypes():
    """Channel counts that are no multiple of 8 and all dtypes compile, without the interpreter."""
    result = resources('--capability', '90', '--kernel-sizes', '5', '--channels', '20', '75',
                       '--dtype', 'float16', 'float32')  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 + 2 * 2 * 4


def test_spills_are_an_error():
    result = resources('--capability', '90', '--kernel-sizes', '11', '--rows', '40')
    assert result.returncode == 1
    assert re.search(r'error: 2 of 4 kernels spill registers', result.stderr)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(SystemExit, match='TRITON_INTERPRET=1: there is nothing to compile'):
        load_tool('kernel_resources').main([])
