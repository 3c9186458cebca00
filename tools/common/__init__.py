"""Code that several tools share.

Tools import this package before torch: OpenMP reads how its threads wait when it is loaded. Threads
that spin slow a busy machine down, and cost nothing less on an idle one.
"""

import argparse
import os

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows a tool's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
