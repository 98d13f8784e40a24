# SPDX-License-Identifier: Apache-2.0
"""Which numbers of kernels/ an object depends on, found in the syntax trees of its files.

An object is made by `program(config)` of a device half. What that half names, and what those definitions name in turn,
decides what the object computes. Every other number of a host file is tuning: a border between paths, a tile choice, a
size of a launch, a limit that is refused.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

from megamoe.kernels.compile import MACHINERY, PACKAGE


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in a source file: lines from 1, columns in bytes from 0."""

    path: pathlib.Path
    unit: str
    line: int
    column: int
    end: int
    value: int | float

    def __str__(self) -> str:
        """Return path:line, the definition and the number."""
        return f"{self.path.name}:{self.line} {self.unit}: {self.value}"


@dataclasses.dataclass
class Unit:
    """A definition of a file: a constant, a function, a class without its methods, a method, or a field's default."""

    path: pathlib.Path
    name: str
    nodes: list[ast.AST]

    def walk(self) -> Iterator[ast.AST]:
        """Yield every node of it."""
        for part in self.nodes:
            yield from ast.walk(part)

    def numbers(self) -> Iterator[Number]:
        """Yield its numbers."""
        for node in self.walk():
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                yield Number(self.path, self.name, node.lineno, node.col_offset, node.end_col_offset or 0, node.value)


def _units(path: pathlib.Path) -> Iterator[Unit]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield Unit(path, node.name, [node])
        elif isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            # What a field is when nothing is said is chosen by whoever makes the config: the device half reads a value.
            yield Unit(path, node.name, [*node.bases, *(one.annotation for one in fields)])
            yield from (Unit(path, f"{node.name}.{one.name}", [one]) for one in methods)
            for one in fields:
                if one.value is not None:
                    yield Unit(path, f"the default of {node.name}.{ast.unparse(one.target)}", [one.value])
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for one in ast.walk(target):
                    if isinstance(one, ast.Name):
                        yield Unit(path, one.id, [node.value])


def host_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return every file of kernels/ that is no device half."""
    machinery = {root / f"{name}.py" for name in MACHINERY}
    return [one for one in sorted(root.rglob("*.py")) if not one.stem.endswith("_device") and one not in machinery]


def _imports(path: pathlib.Path, root: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """Return what a file imports from kernels/: its name there → (file, name in that file)."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
            file = root.joinpath(*node.module.removeprefix(PACKAGE).split(".")).with_suffix(".py")
            found |= {one.asname or one.name: (file, one.name) for one in node.names}
    return found


def tuning_numbers(root: pathlib.Path) -> list[Number]:
    """Return the numbers of host files that no object depends on.

    Variables are followed to the definition they name. Attributes are not resolved: a method is taken for needed where
    any attribute of its name is asked for, so a number in a method of a common name may be missed.

    Args:
        root: a kernels/ folder.
    """
    units = [unit for path in host_files(root) for unit in _units(path)]
    places = {(unit.path, unit.name): unit for unit in units}
    imports = {path: _imports(path, root) for path in root.rglob("*.py")}
    devices = [path for path in root.rglob("*_device.py")]
    todo = [Unit(path, "", [ast.parse(path.read_text(encoding="utf-8"))]) for path in devices]
    needed: set[tuple[pathlib.Path, str]] = set()
    attributes: set[str] = set()
    while todo:
        unit = todo.pop()
        for node in unit.walk():
            if isinstance(node, ast.Attribute):
                attributes.add(node.attr)
            elif isinstance(node, ast.Name):
                place = imports[unit.path].get(node.id, (unit.path, node.id))
                if place in places and place not in needed:
                    needed.add(place)
                    todo.append(places[place])
        if not todo:
            for unit in units:
                owner, _, method = unit.name.partition(".")
                place = (unit.path, unit.name)
                if method in attributes and (unit.path, owner) in needed and place not in needed:
                    needed.add(place)
                    todo.append(unit)
    return [number for unit in units if (unit.path, unit.name) not in needed for number in unit.numbers()]


def bump(numbers: list[Number]) -> None:
    """Change numbers in their files, each by one."""
    for path in {one.path for one in numbers}:
        lines = path.read_bytes().splitlines(keepends=True)
        for one in sorted((one for one in numbers if one.path == path), key=lambda one: -one.column):
            line = lines[one.line - 1]
            lines[one.line - 1] = line[: one.column] + repr(one.value + 1).encode() + line[one.end :]
        path.write_bytes(b"".join(lines))
