"""Writes beside every pin of constraints.txt the hashes of all files of that release.

    python tools/pin_hashes.py             # after a change of constraints.txt
    python tools/pin_hashes.py --check     # only say whether a pin has none; asks no index

For maintainers: change, add or remove a line `NAME==VERSION`, run this, then `make setup`. pip says
what a new package needs in turn if that has no line yet. The hashes are the index's own (PyPI, or
pip's `index-url`), of the wheels of all platforms and of the source distribution.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

CONSTRAINTS = Path(__file__).resolve().parents[1] / 'constraints.txt'
PYPI = 'https://pypi.org/simple'
JSON = 'application/vnd.pypi.simple.v1+json'  # PEP 691
CONTINUED = ' \\'
HASH = '    --hash=sha256:'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='write nothing, fail if hashes lack')
    parser.add_argument('--file', type=Path, default=CONSTRAINTS, help='another file of pins')
    args = parser.parse_args()
    if not args.file.is_file():
        raise SystemExit(f'error: --file: {args.file} does not exist')
    text = args.file.read_text()
    if args.check:
        bare = [str(pin) for pin, hashes in read_pins(text) if not hashes]
        if bare:
            raise SystemExit(
                f'error: {args.file} has no hashes of {", ".join(bare)}: '
                'run python tools/pin_hashes.py'
            )
        return
    pins = [pin for pin, _ in read_pins(text)]
    index = index_url()
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip(map(str, pins), pool.map(lambda pin: release_hashes(index, pin), pins)))
    args.file.write_text(with_hashes(text, hashes))
    print(f'{args.file}: {len(pins)} pins, {sum(map(len, hashes.values()))} files')


# ------------------------------------------------------------------------------------------- file
def read_pins(text: str) -> list[tuple[Requirement, list[str]]]:
    """The pins of a constraints file, each with its SHA-256 hashes.

    Raises:
        SystemExit: A line is no pin (`NAME==VERSION`, a marker behind it or not).
    """
    pins: list[tuple[Requirement, list[str]]] = []
    for line in text.splitlines():
        line = line.removesuffix(CONTINUED)
        if line.startswith(HASH):
            pins[-1][1].append(line.removeprefix(HASH))
        elif line and not line.startswith('#'):
            pins.append((parse_pin(line), []))
    return pins


def parse_pin(line: str) -> Requirement:
    try:
        pin = Requirement(line)
    except InvalidRequirement as error:
        raise SystemExit(f'error: {line!r} is not NAME==VERSION: {error}') from None
    operators = [specifier.operator for specifier in pin.specifier]
    if operators != ['==']:
        raise SystemExit(f'error: {line!r} is not pinned: write NAME==VERSION')
    return pin


def pinned_version(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    return Version(specifier.version)


def with_hashes(text: str, hashes: dict[str, list[str]]) -> str:
    """The text of a constraints file with other hashes; comments and markers stay.

    Args:
        text: The old text, with hashes or without.
        hashes: SHA-256 hashes by pin, as `str(Requirement)` writes it.
    """
    lines = []
    for line in text.splitlines():
        line = line.removesuffix(CONTINUED)
        if line.startswith(HASH):
            continue
        block = [line]
        if line and not line.startswith('#'):
            block += [HASH + value for value in hashes[str(parse_pin(line))]]
        lines.append(f'{CONTINUED}\n'.join(block))
    return '\n'.join(lines) + '\n'


# ------------------------------------------------------------------------------------------ index
def index_url() -> str:
    """The package index that pip is configured to use."""
    command = [sys.executable, '-m', 'pip', 'config', 'get', 'global.index-url']
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip().rstrip('/') or PYPI


def release_hashes(index: str, pin: Requirement) -> list[str]:
    """Sorted SHA-256 hashes of all wheels and source distributions of a pinned release.

    Raises:
        SystemExit: The index cannot be reached, has no such release, or it was withdrawn.
    """
    url = f'{index}/{canonicalize_name(pin.name)}/'
    try:
        with urlopen(Request(url, headers={'Accept': JSON}), timeout=60) as response:
            files = json.load(response)['files']
    except (URLError, TimeoutError) as error:
        raise SystemExit(f'error: {url}: {error}') from None
    files = [file for file in files if file_version(file['filename']) == pinned_version(pin)]
    if not files:
        raise SystemExit(f'error: {url} has no file of {pin}')
    for file in files:
        if file.get('yanked'):
            raise SystemExit(f'error: {pin} was withdrawn ({file["yanked"]}): pin another')
    return sorted(file['hashes']['sha256'] for file in files)


def file_version(filename: str) -> Version | None:
    """The version in a file's name; None of formats that pip no longer installs."""
    try:
        if filename.endswith('.whl'):
            return parse_wheel_filename(filename)[1]
        return parse_sdist_filename(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


if __name__ == '__main__':
    main()
