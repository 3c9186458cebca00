"""Runs the tools in the process of the tests, which saves the imports of the host libraries."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from evidence import segmentation_size
from mmengine.runner import CheckpointLoader

from helpers import ROOT, commands
from helpers.tiny import FOUR_ITERATIONS
from helpers.tools import forget_instances


def load_tool(name):
    """The module of a tool; `test` and `train` are names of other modules too."""
    return commands.load_tool(f'tools/{name}.py')


def output_of(tool, *arguments, succeeds=True):
    """What a tool prints, the message of its error included; its process is left as it was."""
    text, error = io.StringIO(), None
    schemes = patch.object(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    argv = [f'tools/{tool}.py', *map(str, arguments)]
    forget_instances()  # runs in the same second have loggers of the same name
    with (
        patch.dict(os.environ),
        schemes,
        patch.object(sys, 'argv', argv),
        patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)),  # slow
        redirect_stdout(text),
        redirect_stderr(text),
    ):
        try:
            load_tool(tool).main()
        except SystemExit as exit_:
            error = exit_.code
    forget_instances()
    output = text.getvalue() + (f'{error}\n' if isinstance(error, str) else '')
    assert (not error) == succeeds, output
    return output


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
# A network that is quick to build and run, instead of the recipe's.
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


# As `helpers.tiny.quick_segmentation`, without what this network has already.
SMALL_DATA = [
    *segmentation_size(64),
    *FOUR_ITERATIONS,
    'val_dataloader.dataset.indices=1',
    'test_dataloader.dataset.indices=1',
]


def with_data(arguments, sample, work_dir, *options):
    """The arguments of `train` and `test`, with the sample and a run of four iterations."""
    folder = sample / 'ade/ADEChallengeData2016'
    return [*arguments, '--data-root', folder, '--work-dir', work_dir,
            '--cfg-options', *SMALL_DATA, *options]  # fmt: skip
