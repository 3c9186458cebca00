"""What must have a docstring: the rule of CONTRIBUTING.md."""

import ast
import importlib
import inspect

import pytest
from helpers import ROOT

PACKAGE = sorted((ROOT / 'mmconv2former').glob('*.py'))
TOOLS = sorted((ROOT / 'tools').glob('*.py'))
LONG = 15  # lines; shorter functions of a tool may speak for themselves


def public_members(module):
    """Name and object of each public class and function of a module, and of classes' methods."""
    for name, member in vars(module).items():
        if name.startswith('_') or getattr(member, '__module__', None) != module.__name__:
            continue
        if inspect.isclass(member) or inspect.isfunction(member):
            yield name, member
        if inspect.isclass(member):
            for method_name in vars(member):
                method = inspect.getattr_static(member, method_name)
                kinds = (property, staticmethod, classmethod)
                if not method_name.startswith('_') and (
                    inspect.isfunction(method) or isinstance(method, kinds)
                ):
                    yield f'{name}.{method_name}', getattr(member, method_name)


def has_docstring(member):
    """A class needs its own (dataclasses get one that is their signature), a method a base's."""
    if inspect.isclass(member):
        doc = vars(member).get('__doc__')
        return bool(doc) and not doc.startswith(f'{member.__name__}(')
    return bool(inspect.getdoc(member))


@pytest.mark.parametrize('path', PACKAGE, ids=lambda path: path.stem)
def test_package(path):
    name = '' if path.stem == '__init__' else f'.{path.stem}'
    module = importlib.import_module(f'mmconv2former{name}')
    assert inspect.getdoc(module)
    assert not [name for name, member in public_members(module) if not has_docstring(member)]


@pytest.mark.parametrize('path', TOOLS, ids=lambda path: path.stem)
def test_tools(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert not [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        if not node.name.startswith('_') and node.name != 'main'
        if isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno > LONG
        if not ast.get_docstring(node)
    ]


@pytest.mark.parametrize('name', ['Undocumented', 'Undocumented.method', 'undocumented'])
def test_missing_ones_are_found(name, tmp_path, monkeypatch):
    (tmp_path / 'undocumented_module.py').write_text(
        'from dataclasses import dataclass\n'
        '@dataclass\nclass Undocumented:\n    x: int\n    def method(self): pass\n'
        'def undocumented(): pass\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    members = dict(public_members(importlib.import_module('undocumented_module')))
    assert not has_docstring(members[name])
