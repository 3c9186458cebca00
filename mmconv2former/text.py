"""Text from files, such as names in a checkpoint, made safe to show: one line of bounded length."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import islice

LONGEST = 4000  # characters of a message; paths have up to 4096 bytes
LONGEST_NAME = 200
SHOWN = 6  # names of a list
LONG_LIST = re.compile(r"((?:'[^']*', ){5})(?:'[^']*',? ?){3,}")


def printable(text: object, limit: int = LONGEST) -> str:
    """Escapes what a terminal would obey, and cuts the middle out of a long text.

    Escape sequences could hide or forge lines; lone surrogates, as of file names that are not
    UTF-8, cannot be written to a log. Calling it again has no effect.

    Args:
        text: Converted by `str`.
        limit: Longest result in characters.
    """
    text = str(text)
    if not text.isprintable():
        text = ''.join(
            char if char.isprintable() else char.encode('unicode_escape').decode() for char in text
        )
    if len(text) > limit:
        half = (limit - 5) // 2
        text = f'{text[:half]} ... {text[-half:]}'
    return text


def listed(names: Collection[object], shown: int = SHOWN) -> str:
    """The number of names and the first of them: `8 (a, b, c, d, e, f, ...)`."""
    if not names:
        return 'none'
    return f'{len(names)} ({", ".join(first(names, shown))}{", ..." * (len(names) > shown)})'


def first(names: Iterable[object], shown: int = SHOWN) -> list[str]:
    """The first of some names, safe to show."""
    return [printable(name, LONGEST_NAME) for name in islice(names, shown)]


def one_line(text: str) -> str:
    """A message of a library in one line, with the first five names of each long list in it."""
    return LONG_LIST.sub(r'\1...', ' '.join(text.split()))


class PrintableError(Exception):
    """An error whose message is one line that is safe to show, whatever names are in it."""

    def __init__(self, message: object = '') -> None:
        super().__init__(printable(message))
