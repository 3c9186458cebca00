"""Runs tools in the process of the tests, which saves importing the host libraries each time."""

import importlib.util
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager

import torch
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.utils import ManagerMixin, manager

from helpers import ROOT
from helpers.tiny import FOUR_ITERATIONS, SMALL_SEGMENTATION, WITHOUT_WORKERS


def load_tool(name):
    """The module of a tool; `test` and `train` are names of other modules too."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def managers(cls=ManagerMixin):
    """The classes whose instances mmengine keeps by name: loggers, visualizers, scopes, ..."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from managers(subclass)


@contextmanager
def isolated():
    """Restores what a run changes in its process; hides loggers and visualizers of earlier runs."""
    environment, argv, folder = dict(os.environ), sys.argv, os.getcwd()
    threads, schemes = torch.get_num_threads(), dict(CheckpointLoader._schemes)
    instances = {cls: dict(cls._instance_dict) for cls in managers()}
    for cls in instances:
        if cls is not DefaultScope:
            cls._instance_dict.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = argv
        os.chdir(folder)
        torch.set_num_threads(threads)
        CheckpointLoader._schemes = schemes
        for cls in managers():
            cls._instance_dict.clear()
            cls._instance_dict.update(instances.get(cls, {}))
        # mmengine keeps its lock if it fails to build a visualizer: other threads would hang.
        while manager._lock._is_owned():
            manager._lock.release()


def run_python(code, *, errors=False):
    """What code prints in a fresh interpreter that can import this package."""
    command = [sys.executable, '-W', 'ignore', '-c', code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return (result.stdout, result.stderr) if errors else result.stdout


@contextmanager
def typed(words):
    """The process of a tool after `words` were typed."""
    with isolated():
        DefaultScope._instance_dict.clear()
        sys.argv = [str(word) for word in words]
        yield


def refusal_of(tool, *arguments):
    """What a tool says as it ends with an error; '' if it ends without one."""
    with typed([f'tools/{tool}.py', *arguments]):
        try:
            load_tool(tool).main()
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
    capfd.readouterr()
    with typed([script, *arguments, '--cfg-options', *options]):
        runpy.run_path(script, run_name='__main__')
    return ''.join(capfd.readouterr())


SEGMENTATION = ROOT / 'configs/segmentation/upernet_conv2former_n.py'
# The recipe with a network that takes no time to copy.
TINY = f"""
_base_ = {str(ROOT / SMALL_SEGMENTATION)!r}
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
    if init_cfg is not None:
        init_cfg = dict(init_cfg, _delete_=True)  # mmengine merges no dict into None
    path.write_text(TINY.format(kernel=kernel, depths=depths, init_cfg=init_cfg) + more)
    return path


SMALL_DATA = [
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
