"""Text from files is shown in one line that a terminal does not obey."""

import pickle

import pytest

from mmconv2former.checkpoint.reading import CheckpointError, CheckpointNotFound
from mmconv2former.datasets.checked import DataError
from mmconv2former.engine.finite import NonFiniteError
from mmconv2former.engine.runner import CheckpointNotSaved
from mmconv2former.engine.work_dir import WorkDirError
from mmconv2former.text import LONGEST, listed, one_line, printable

SHOWN = {
    'plain: é, 中, "quotes" and back\\slash': None,
    'a\x1b[2K\rb': r'a\x1b[2K\rb',
    'one\nERROR - two\ttabs': r'one\nERROR - two\ttabs',
    'surrogate \udc80': r'surrogate \udc80',
    'reversed \u202e': r'reversed \u202e',
}


@pytest.mark.parametrize('text', SHOWN)
def test_printable(text):
    expected = SHOWN[text] or text
    assert printable(text) == expected
    assert printable(expected) == expected


def test_long_text_keeps_its_ends():
    text = printable('begin' + 'x' * 10**6 + 'end', 100)
    assert len(text) <= 100
    assert text.startswith('beginx')
    assert text.endswith('xend')
    assert ' ... ' in text


def test_listed():
    assert listed([]) == 'none'
    assert listed(['a', 'b\n']) == r'2 (a, b\n)'
    many = listed({f'key{i}' * 1000: 1 for i in range(20_000)})
    assert many.startswith('20000 (key0')
    assert many.endswith(', ...)')
    assert len(many) < 2000


ERRORS = [
    CheckpointError, CheckpointNotFound, CheckpointNotSaved, DataError, NonFiniteError, WorkDirError
]  # fmt: skip


@pytest.mark.parametrize('error', ERRORS)
def test_messages_of_errors(error):
    raised = error('file \x1b[31m\n' + 'x' * 10**6)
    assert str(raised).startswith(r'file \x1b[31m\nx')
    assert len(str(raised)) <= LONGEST
    assert str(pickle.loads(pickle.dumps(raised))) == str(raised)


def test_long_lists_in_messages_are_cut():
    names = [f'c{number}' for number in range(150)]
    assert one_line(f'new\nclasses {names} are odd') == (
        "new classes ['c0', 'c1', 'c2', 'c3', 'c4', ...] are odd"
    )
    assert one_line(f'{names[:6]}') == str(names[:6])
