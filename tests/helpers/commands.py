"""The commands that README and docs show, and what a tool's own parser makes of them.

Commands stand in blocks of shell, behind `$ ` in other blocks, and in code within a sentence, where
`tools/train.py` without `python` is a name.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from markdown_it import MarkdownIt

from helpers.in_process import load_tool, typed
from helpers.pages import read_blocks

SHELL = ('bash', 'console', 'sh', 'shell')
ASSIGNMENT = re.compile(r'[A-Z_]+=')
GENERATED = re.compile('<!-- table .+? -->.*?<!-- end -->', flags=re.DOTALL)
STARTS = re.compile(
    r'((export|make|mim|pip|pre-commit|pytest) |python (-m )?[\w./]+( |$)|tools/\w+\.sh )'
)


@dataclass(frozen=True)
class Command:
    """A command as a page shows it, with the line of its block or paragraph, from 1."""

    page: Path
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The program and its arguments, without variables before them; nothing for `...`."""
        words = shlex.split(self.text)
        while words and ASSIGNMENT.match(words[0]):
            words.pop(0)
        words = [word.removesuffix('...') for word in words if word != '...']
        if words and Path(words[0]).name == 'python':
            words.pop(0)
        if words and words[0] == '-m':
            words.pop(0)
            if words[0] == 'mmconv2former' and len(words) > 1:
                words[:2] = [f'tools/{words[1]}.py']
        return words

    @property
    def program(self) -> str:
        """What is started: `make`, `pip`, `tools/train.py`; `<<` for a script within the block."""
        return '<<' if '<<' in self.text else self.words[0]

    def __str__(self) -> str:
        return f'{self.page.name}:{self.line}: {self.text.splitlines()[0]}'


def read_commands(page: Path) -> Iterator[Command]:
    """All commands of a page; those in blocks first."""
    for block in read_blocks(page):
        if block.language in SHELL:
            commands = [block.text] if '<<' in block.text else block.commands()
        else:
            lines = block.text.replace('\\\n', ' ').splitlines()
            commands = [line[2:] for line in lines if line.startswith('$ ')]
        for text in commands:
            yield Command(page, block.line, text)
    for text, line in inline_code(page):
        without = re.sub(r'^([A-Z_]+=\S+ )+', '', text)
        if STARTS.match(without) and '\n' not in text:
            yield Command(page, line, text)


def inline_code(page: Path) -> Iterator[tuple[str, int]]:
    """Code within sentences with its paragraph's line, from 1; none of generated tables."""
    text = GENERATED.sub(lambda match: '\n' * match[0].count('\n'), page.read_text())
    for token in MarkdownIt().enable('table').parse(text):
        for child in token.children or []:
            if child.type == 'code_inline':
                yield child.content, token.map[0] + 1 if token.map else 0


def write_program(path: Path, line: str) -> None:
    """A program of one line of shell, which stands in for another one."""
    path.write_text(f'#!/bin/sh\n{line}\n')
    path.chmod(0o755)


# ---------------------------------------------------------------------------------------- parsers
class Parsed(Exception):
    """Ends a tool once its command line is read."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
        self.parser = parser
        self.arguments = arguments


@cache
def tool_of(path: str) -> Any:
    """The module of a tool such as `tools/train.py`, not run."""
    return load_tool(Path(path).stem)


def stopped(words: list[str], parse_args: Callable[..., Any]) -> Parsed:
    """A tool's parser and what `parse_args` makes of the words; the tool goes no further."""

    def stop(self: argparse.ArgumentParser, *args: Any) -> None:
        raise Parsed(self, parse_args(self, *args))

    with typed(words), patch.object(argparse.ArgumentParser, 'parse_args', stop):
        try:
            tool_of(words[0]).main()
        except Parsed as parsed:
            return parsed
    raise AssertionError(f'{words[0]} does not read its command line')


def parse(words: list[str]) -> argparse.Namespace:
    """What a tool's own parser makes of a command line.

    Raises:
        SystemExit: The parser refuses it.
    """
    return stopped(words, argparse.ArgumentParser.parse_args).arguments


def flags_of(path: str) -> set[str]:
    """All flags of a tool, those of its commands included."""
    found: set[str] = set()
    parsers = [stopped([path], lambda *_: argparse.Namespace()).parser]
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found
