"""Threads of all tools wait passively, however a tool is started."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

# OpenMP is loaded with torch and reads the variable then.
MAIN = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, *_):
        if name == 'torch':
            print(os.environ.get('OMP_WAIT_POLICY'))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
sys.path.insert(0, 'tools')
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
TOOLS = (
    'benchmark', 'benchmark_depthwise', 'benchmark_host', 'benchmark_pointwise',
    'benchmark_recipe', 'check_setup', 'convert_weights', 'evidence', 'export', 'predict',
    'prepare_data', 'test', 'train', 'visualize',
)  # fmt: skip


@pytest.mark.parametrize(
    ('tool', 'variable', 'expected'),
    [*((tool, None, 'passive') for tool in TOOLS), ('train', 'active', 'active')],
)
def test_the_variable_is_set_before_torch_is_imported(tool, variable, expected):
    environment = {key: value for key, value in os.environ.items() if key != 'OMP_WAIT_POLICY'}
    if variable is not None:
        environment['OMP_WAIT_POLICY'] = variable
    command = [sys.executable, '-c', MAIN, f'tools/{tool}.py', '--help']
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == f'{expected}\n', result.stderr
