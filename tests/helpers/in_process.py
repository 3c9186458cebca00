"""Runs the tools in the process of the tests, which saves the imports of the host libraries."""

import importlib.util
import runpy
import subprocess
import sys
from functools import cache

from evidence import segmentation_size

from helpers import ROOT
from helpers.tiny import FOUR_ITERATIONS, WITHOUT_WORKERS
from helpers.tools import forget_instances


@cache
def load_tool(name):
    """The module of a tool; `test` and `train` are names of other modules too."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal_of(tool, *arguments):
    """What a tool says as it ends with an error; '' if it ends without one."""
    forget_instances()  # runs in the same second have loggers of the same name
    try:
        load_tool(tool).main([str(argument) for argument in arguments])
    except SystemExit as error:
        return str(error)
    return ''


def run_command(command, options, monkeypatch, capfd):
    """Runs a command of a page, with `--cfg-options`; returns what it printed, errors included."""
    expanded = subprocess.run(
        ['bash', '-c', f'printf "%s\\n" {command}'], capture_output=True, text=True, check=True
    )
    python, script, *arguments = expanded.stdout.splitlines()
    assert python == 'python'
    monkeypatch.setattr(sys, 'argv', [script, *arguments, '--cfg-options', *options])
    capfd.readouterr()
    runpy.run_path(script, run_name='__main__')
    forget_instances()
    return ''.join(capfd.readouterr())


SEGMENTATION = ROOT / 'configs/segmentation/upernet_conv2former_n.py'
# A network of which no copy takes time, in the recipe's place.
TINY = f"""
_base_ = {str(SEGMENTATION)!r}
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, channels=(8, 12, 16, 20), depths={{depths}}, kernel_size={{kernel}}
        ),
        init_cfg={{init_cfg}},
    ),
    decode_head=dict(in_channels=[8, 12, 16, 20], channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
)
"""


def write_tiny_config(path, kernel=5, depths=(1, 1, 2, 1), init_cfg=None, more=''):
    path.write_text(TINY.format(kernel=kernel, depths=depths, init_cfg=init_cfg) + more)
    return path


# What `quick_segmentation` of the tools' tests adds, without what this network has already.
SMALL_DATA = [
    *segmentation_size(64),
    *FOUR_ITERATIONS,
    *WITHOUT_WORKERS,
    'val_dataloader.dataset.indices=1',
    'test_dataloader.dataset.indices=1',
]


def with_data(arguments, sample, work_dir, *options):
    """The arguments of `train` and `test`, with the sample and a run of four iterations."""
    folder = sample / 'ade/ADEChallengeData2016'
    return [*arguments, '--data-root', folder, '--work-dir', work_dir,
            '--cfg-options', *SMALL_DATA, *options]  # fmt: skip
