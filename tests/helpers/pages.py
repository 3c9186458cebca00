"""The fenced blocks of a page of documentation, so that tests run what users read.

A comment above a block gives it a name, `<!-- test: NAME -->`; a first line `# FOLDER/FILE.py` says
which file the block is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

NAME = re.compile(r'<!-- test: (.+?) -->')
FILE_NAME = re.compile(r'# ([\w./-]+\.\w+)\n')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ('' for none), text, name and place in the page."""

    language: str
    text: str
    name: str | None
    line: int  # of its fence, from 1

    @property
    def file_name(self) -> str | None:
        """The file that the block says to be, None for another block."""
        match = FILE_NAME.match(self.text)
        return match[1] if match else None

    def commands(self) -> list[str]:
        """The commands of a block of shell, one a line, without comments; `\\` joins lines."""
        lines = self.text.replace('\\\n', ' ').splitlines()
        commands = (re.sub(r'(^|\s)#.*', '', line).strip() for line in lines)
        return [command for command in commands if command]


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, also those in lists, in their order."""
    blocks = []
    name = None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == 'fence':
            blocks.append(Block(token.info.strip(), token.content, name, token.map[0] + 1))
            name = None
        elif token.type == 'html_block' and (match := NAME.search(token.content)):
            name = match[1]
    return blocks


def files_of(page: Path) -> dict[str, str]:
    """Texts of the blocks that say which file they are, by file name.

    Raises:
        ValueError: Two blocks say to be the same file.
    """
    files: dict[str, str] = {}
    for block in read_blocks(page):
        if block.file_name in files:
            raise ValueError(f'{page}, line {block.line}: {block.file_name} is there twice')
        if block.file_name is not None:
            files[block.file_name] = block.text
    return files


def write_files(page: Path, folder: Path) -> list[Path]:
    """Writes the files of a page into a folder and returns their paths."""
    paths = []
    for name, text in files_of(page).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths
