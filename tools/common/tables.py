"""Tables in Markdown, and where they go on a page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def with_table(page: str, name: str, table: str) -> str:
    """The text of a page with the table at the mark `name` replaced; unchanged without a mark."""
    pattern = rf'(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)'
    return re.sub(pattern, lambda found: found[1] + table + found[2], page, flags=re.S)


def show(name: str, text: str, pages: Iterable[Path]) -> None:
    """Prints a text and puts it at its mark in each of the pages that has one."""
    print(text, end='')
    for page in pages:
        page.write_text(with_table(page.read_text(), name, text))
