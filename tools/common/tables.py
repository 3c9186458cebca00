"""Tables of Markdown, and their places in pages."""

from __future__ import annotations

import re


def with_table(page: str, name: str, table: str) -> str:
    """The text of a page with what stands at the mark `name` replaced; unchanged without a mark."""
    pattern = rf'(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)'
    return re.sub(pattern, lambda found: found[1] + table + found[2], page, flags=re.S)


# ----------------------------------------------------------------------------------------- tables
def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
