"""Runs a tool by its name: `python -m mmconv2former train CONFIG`. Alone, it lists them."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In a clone, an editable installation and a wheel.
FOLDERS = (PACKAGE.parent / 'tools', PACKAGE / '.mim/tools')
FIRST = ('demo', 'prepare_data', 'train', 'test', 'predict', 'export', 'benchmark', 'check_setup')


def main() -> None:
    """Becomes the tool that the first argument names."""
    tools = next((folder for folder in FOLDERS if (folder / 'train.py').is_file()), None)
    if tools is None:
        raise SystemExit(f'error: the tools are neither in {FOLDERS[0]} nor in {FOLDERS[1]}')
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help'):
        print_tools(tools)
        return
    path = tools / f'{name}.py'
    if not path.is_file():
        print_tools(tools)
        raise SystemExit(f'\nerror: no tool is called {name!r}')
    # Threads that spin while they wait slow a busy machine down. OpenMP reads this when it is
    # loaded, so only a new process sees it.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    os.execv(sys.executable, [sys.executable, str(path), *sys.argv[2:]])


def print_tools(tools: Path) -> None:
    """Prints the tools that most people need with the first line of their documentation."""
    print('usage: python -m mmconv2former TOOL ... (TOOL --help lists its arguments)\n')
    for name in FIRST:
        text = ast.get_docstring(ast.parse((tools / f'{name}.py').read_text())) or ''
        print(f'  {name:14}{text.splitlines()[0]}')
    others = sorted(path.stem for path in tools.glob('*.py') if path.stem not in FIRST)
    print(f'\nothers: {", ".join(others)}\ntools and recipes: {tools.parent}')


if __name__ == '__main__':
    main()
