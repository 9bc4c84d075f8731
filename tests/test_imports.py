"""Imports go one way: from each folder only to the folders below it, and in no circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "actscale_fast"

#: The floors from the ground up; folders on one line stand side by side and may not import each other.
FLOORS = (
    ("_version", "_versions", "_checks", "_suggestions", "_tables", "_log", "defaults", "_files", "_cache"),
    ("_json",),
    ("_tensor_files", "_locks"),
    ("ops",),
    ("verification",),
    ("modules",),
    ("architectures",),
    ("interventions",),
    ("patching",),
    ("frozen",),
    ("plots", "tasks", "demo_model"),
    ("learning",),
    ("extraction", "das"),
    ("reproduction",),
    ("cli", "integrations"),
)
#: Operators of interventions make composites, which are interventions.
ALLOWED_CIRCLE = {"interventions.base", "interventions.composite"}


class Import(NamedTuple):
    """One import, of a module by a module, without the package's own name: "learning.fit"."""

    file: str
    line: int
    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported or 'actscale_fast'}"


def modules_in(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path], package: Path) -> Iterator[Import]:
    """All imports of this package in a file: in functions, for type checkers, and by a string that names a module."""
    where = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = where[: len(where) - node.level + 1]
                base = ".".join(["actscale_fast", *above, *([node.module] if node.module else [])])
            inside = base.removeprefix("actscale_fast").removeprefix(".")
            for alias in node.names:
                deeper = f"{inside}.{alias.name}".removeprefix(".")
                targets.append(f"actscale_fast.{deeper}" if deeper in modules else base)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = node.value.removeprefix("actscale_fast.")
            if node.value.startswith("actscale_fast.") and dotted in modules:
                targets = [node.value]
        for target in targets:
            if target.split(".")[0] == "actscale_fast":
                inside = target.removeprefix("actscale_fast").removeprefix(".")
                yield Import(str(path.relative_to(package.parent)), node.lineno, name, inside)


def all_imports(package: Path = PACKAGE) -> list[Import]:
    modules = modules_in(package)
    return [one for name, path in modules.items() if name for one in imports_of(name, path, modules, package)]


def floor_of(name: str) -> int:
    """The number of a module's floor; the package's own `__init__` is the roof."""
    top = name.split(".")[0]
    return next((n for n, folders in enumerate(FLOORS) if top in folders), len(FLOORS))


def rising(imports: list[Import]) -> list[str]:
    """The imports that do not go down, in words."""
    return [
        str(one)
        for one in imports
        if one.importer.split(".")[0] != one.imported.split(".")[0] and floor_of(one.imported) >= floor_of(one.importer)
    ]


def circles(imports: list[Import]) -> list[set[str]]:
    """The groups of modules that import each other (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        graph.setdefault(one.importer, set()).add(one.imported)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph.get(name, set()) - {name}:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 5000))
    for name in list(graph):
        if name not in index:
            visit(name)
    return found


def test_every_folder_has_a_floor() -> None:
    tops = {name.split(".")[0] for name in modules_in(PACKAGE) if name}
    assert tops == {folder for floor in FLOORS for folder in floor}


def test_imports_go_down() -> None:
    assert rising(all_imports()) == []


def test_no_modules_import_each_other_in_a_circle_but_those_of_the_operators() -> None:
    # A folder's __init__ hands on names of its files, which import the folder's other files directly.
    assert [group for group in circles(all_imports()) if not group <= ALLOWED_CIRCLE] == []


def test_integrations_are_imported_by_nobody() -> None:
    others = [one for one in all_imports() if not one.importer.startswith("integrations")]
    assert [str(one) for one in others if one.imported.startswith("integrations")] == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..cli import output",
        "import actscale_fast.learning.fit",
        "def f():\n    from ..patching.patch import patch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import plots",
        "import importlib\nimportlib.import_module('actscale_fast.learning')",
        "from .. import __version__",
    ],
)
def test_a_rising_import_is_found_and_its_file_named(tmp_path: Path, line: str) -> None:
    package = tmp_path / "actscale_fast"
    for path in modules_in(PACKAGE).values():
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    (package / "ops" / "scale_heads.py").write_text(line)
    found = rising(all_imports(package))
    assert len(found) == 1
    assert found[0].startswith(f"actscale_fast/ops/scale_heads.py:{line.count(chr(10)) + 1} imports ")
