"""What `make lint` and the pre-commit hooks ask of files: YAML that can be read, no large ones.

    python tools/check_files.py yaml FILE...
    python tools/check_files.py size FILE...

Without files: all that git tracks. Names every file that fails, and ends with exit status 1.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

LARGEST = 500 * 1024  # bytes; pictures of the docs are smaller
YAML_SUFFIXES = ('.cff', '.yaml', '.yml')


def main() -> None:
    """Runs one check over the files of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('check', choices=CHECKS)
    parser.add_argument('files', nargs='*', type=Path)
    args = parser.parse_args()
    findings = [finding for path in args.files or tracked() for finding in CHECKS[args.check](path)]
    if findings:
        raise SystemExit('\n'.join(f'error: {finding}' for finding in findings))


def tracked() -> list[Path]:
    """All files that git tracks below this folder, deleted ones left out."""
    result = subprocess.run(['git', 'ls-files', '-z'], capture_output=True, text=True, check=True)
    return [path for path in map(Path, result.stdout.split('\0')[:-1]) if path.is_file()]


def faults_of_yaml(path: Path) -> list[str]:
    """What is wrong with a YAML file; nothing for files of another suffix."""
    if path.suffix not in YAML_SUFFIXES:
        return []
    try:
        yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f'{path}: {error}']
    return []


def faults_of_size(path: Path) -> list[str]:
    """Says so if a file is larger than a repository should keep for ever."""
    size = path.stat().st_size
    if size > LARGEST:
        return [f'{path} has {size:,} bytes, at most {LARGEST:,} are kept here']
    return []


CHECKS: dict[str, Callable[[Path], list[str]]] = {'yaml': faults_of_yaml, 'size': faults_of_size}

if __name__ == '__main__':
    main()
