"""Code that several tools share.

Tools import this package before torch, because OpenMP reads how its threads should wait when it is
loaded. Spinning threads slow a busy machine down and gain nothing on an idle one.
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows a tool's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for the arguments of a parser: a whole number from a minimum on."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f'must be at least {minimum}, got {number}')
        return number

    return whole_number
