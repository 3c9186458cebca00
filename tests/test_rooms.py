"""The package is built in floors: imports point downwards, and there is no circle."""

import ast
from graphlib import TopologicalSorter

from helpers import ROOT

PACKAGE = 'mmconv2former'
# From the ground up; a room may import rooms of its own floor and below.
FLOORS = [
    {'compat', 'images', 'registry', 'text', 'version'},
    {'ops'},
    {'models'},
    {'checkpoint', 'datasets', 'engine'},
    {PACKAGE, '__main__'},  # __init__.py, and the list of tools
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    """Paths by name: `mmconv2former.ops.block`."""
    paths = (ROOT / PACKAGE).rglob('*.py')
    return {'.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p
            for p in paths}  # fmt: skip


def imports_of(name, path):
    """Absolute names of what a module imports, without what is for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and 'TYPE_CHECKING' in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    package = name.split('.') if path.name == '__init__.py' else name.split('.')[:-1]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = '.'.join([*base, node.module] if node.module else base)
            yield from (f'{module}.{alias.name}' for alias in node.names)


def graph():
    """For each module of the package, the modules of the package that it imports."""
    known = modules()
    found = {}
    for name, path in known.items():
        imports = [n if n in known else n.rpartition('.')[0] for n in imports_of(name, path)]
        found[name] = {n for n in imports if n in known and n != name}
    return found


def room_of(module):
    return module.split('.')[1] if '.' in module else module


def test_imports_point_downwards():
    upwards = [
        (name, imported)
        for name, imports in graph().items()
        for imported in imports
        if FLOOR_OF[room_of(imported)] > FLOOR_OF[room_of(name)]
    ]
    assert not upwards


def test_there_is_no_circle():
    """Neither of modules nor of rooms; sorting raises an error that names one."""
    found = graph()
    assert len(found) > 20
    assert any(found.values())
    rooms = {room: set() for room in FLOOR_OF}
    for name, imports in found.items():
        rooms[room_of(name)] |= {room_of(n) for n in imports} - {room_of(name)}
    TopologicalSorter(found).prepare()
    TopologicalSorter(rooms).prepare()


def test_the_package_needs_neither_tools_nor_tests():
    others = {path.stem for folder in ('tools', 'tests') for path in (ROOT / folder).iterdir()}
    others = others - {'__pycache__'} | {'tools', 'tests'}
    imported = {n.split('.')[0] for name, path in modules().items() for n in imports_of(name, path)}
    assert not imported & others
