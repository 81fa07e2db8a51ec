"""The code that a model needs, as flat files: what its modules import from Mendel, and no more.

Hugging Face's loader copies the Python files that the modelling file names in relative imports, and
those that they name in turn, into one package. So every module becomes one file beside the others,
`primitives/channel/mlp.py` is `mendel_primitives_channel_mlp.py`, and only its import lines change.
Triton is imported by name when a kernel is first called (`kernels/backend.py`); those modules are
found by the calls, and a table names them all for the loader.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

PROJECT = "mendel"
TEMPLATES = "search.exports."
PARTS = "mendel_parts"
"""The file that is written for every model anew: its config classes and the list of its files."""

OPTIONAL = "triton"
"""What only a GPU needs. The loader refuses a file that imports an absent package, unless it does
so in a `try`."""


class BundleError(RuntimeError):
    """A module that cannot become a flat file: a fault of ours, not of the design."""


@dataclass(frozen=True)
class Flat:
    """A module as a flat file: its text, and the modules that it needs."""

    text: str
    needs: tuple[str, ...]


def flat_name(module: str) -> str:
    """The name of a module's file in the bundle, without `.py`."""
    if module.startswith(TEMPLATES):
        return module.removeprefix(TEMPLATES)
    return f"{PROJECT}_{module.replace('.', '_')}"


def bundle(roots: Iterable[str], classes: Mapping[str, type]) -> dict[str, str]:
    """The text of every file by its name.

    `roots` are modules (`genome.model`); `classes` are the config classes of the model's operators
    by the names under which its config.json has them. Raises BundleError.
    """
    found: dict[str, Flat] = {}
    left = [*roots, *(module_of(c) for c in classes.values())]
    while left:
        name = left.pop()
        if name not in found and name != TEMPLATES + PARTS:
            found[name] = flat = flatten(name)
            left += flat.needs
    texts = {f"{flat_name(name)}.py": flat.text for name, flat in found.items()}
    if len(texts) < len(found):
        raise BundleError("two modules have one name as flat files")
    rest = sorted(flat_name(name) for name in found if not name.startswith(TEMPLATES))
    texts[f"{PARTS}.py"] = _parts(classes, rest)
    return dict(sorted(texts.items()))


def module_of(kind: type) -> str:
    """The name of a class's module without the project's."""
    project, _, name = kind.__module__.partition(".")
    if project != PROJECT:
        raise BundleError(f"{kind.__module__} is no module of {PROJECT}")
    return name


@cache
def flatten(name: str) -> Flat:
    """A module with imports of the flat files; nothing else changes. Raises BundleError."""
    spec = find_spec(f"{PROJECT}.{name}")
    if spec is None or spec.origin is None:
        raise BundleError(f"{name} is no module of {PROJECT}")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    needs = []
    for node, target in _imports(name, tree):
        needs.append(target)
        line, flat = lines[node.lineno - 1], flat_name(target)
        if node.module is not None:
            new = f"from .{flat} import"
            lines[node.lineno - 1] = re.sub(r"from\s+\.+[\w.]*\s+import", new, line, count=1)
        else:
            own = node.names[0].asname or node.names[0].name
            new = f"from . import {flat} as {own}"
            lines[node.lineno - 1] = re.sub(r"from\s+\.+\s+import\s+.*", new, line, count=1)
    needs += [f"kernels.triton_{op}" for op in sorted(_kernels(name, tree))]
    return Flat(_guarded(lines, tree), tuple(needs))


def _imports(name: str, tree: ast.Module) -> list[tuple[ast.ImportFrom, str]]:
    """The import statements that name modules of the project, each with the module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name.startswith(PROJECT) for a in node.names):
            raise BundleError(f"{name}, line {node.lineno}: imports {PROJECT} by its name")
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".")[: -node.level]
            if node.module is not None:
                found.append((node, ".".join([*parts, node.module])))
            elif len(node.names) == 1:
                found.append((node, ".".join([*parts, node.names[0].name])))
            else:
                raise BundleError(f"{name}, line {node.lineno}: imports several modules")
    return found


def _kernels(name: str, tree: ast.Module) -> set[str]:
    """The operators whose Triton modules are asked for: `kernels("...")`, or by a constant."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "kernels":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Name):
                first = constants.get(first.id)
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                raise BundleError(f"{name}, line {node.lineno}: kernels() without a name")
            found.add(first.value)
    return found


def _guarded(lines: list[str], tree: ast.Module) -> str:
    """The text, with every import of Triton set into a `try`."""
    found = [node for node in ast.walk(tree) if _imports_optional(node)]
    for node in sorted(found, key=lambda node: -node.lineno):
        own = slice(node.lineno - 1, node.end_lineno)
        edge = " " * node.col_offset
        inside = [f"    {line}" for line in lines[own]]
        lines[own] = [
            f"{edge}try:\n",
            *inside,
            f"{edge}except ImportError:\n",
            f"{edge}    raise\n",
        ]
    return "".join(lines)


def _imports_optional(node: ast.AST) -> TypeGuard[ast.stmt]:
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""] if node.level == 0 else []
    else:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] == OPTIONAL for name in names)


def _parts(classes: Mapping[str, type], files: Iterable[str]) -> str:
    """The table of config classes, and the list of the other files."""
    lines = [
        '"""Written for this model: the config classes of its operators, and its files.',
        "",
        "transformers copies the files that imports name, and tells two models of one name apart",
        "by them. GPU kernels are among them and are imported when they are first called.",
        '"""',
        "",
        "from typing import TYPE_CHECKING",
        "",
    ]
    rows = []
    for number, (name, kind) in enumerate(sorted(classes.items())):
        flat = flat_name(module_of(kind))
        lines.append(f"from .{flat} import {kind.__name__} as Class{number}")
        rows.append(f'    "{name}": Class{number},')
    lines += ["", "if TYPE_CHECKING:", *(f"    from .{flat} import __doc__" for flat in files), ""]
    return "\n".join([*lines, "CLASSES: dict[str, type] = {", *rows, "}", ""])
