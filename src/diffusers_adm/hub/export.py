"""
What this package puts on the Hub for machines without it.

A repository may ship one Python file for each component, and that of a model must stand alone: files beside it are not
downloaded. So `export_model_file` joins a module and the modules of this package it imports into one file. The text of
every module stays as it is, except for the imports between them, which become superfluous.
"""

import ast
import importlib.util
import itertools
import symtable
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import ConfigMixin

from .. import __version__
from .public_classes import PACKAGE, PIPELINES, PUBLIC_CLASSES


HEADER = """\
# Written by diffusers-adm {version} for machines without that package. Do not edit it; its sources are, in this order:
# {modules}
# SPDX-License-Identifier: Apache-2.0
"""
PIPELINE_FOOTER = """

# diffusers wants one pipeline in this module. It runs the `pipeline.py` of each repository in the same one, so there
# may be another repository's beside the base class.
for _other in {others}:
    globals().pop(_other, None)
"""


@dataclass
class _Source:
    """A module, taken apart."""

    name: str
    docstring: str  # as written, quotes included
    body: str  # all but the docstring, `from __future__` and the imports from the package
    futures: set[str] = field(default_factory=set)  # names imported from `__future__`
    imported: dict[str, set[str]] = field(default_factory=dict)  # names by module of the package, in order of import
    outside: dict[str, str] = field(default_factory=dict)  # where each name comes from that is imported from elsewhere
    bound: set[str] = field(default_factory=set)  # names defined at the top level, `outside` included
    used: set[str] = field(default_factory=set)  # names looked up at the top level, or among the built-ins


def export_model_file(cls_or_module: type | types.ModuleType, save_directory: str | Path) -> Path:
    r"""
    Writes the module of a model, scheduler or pipeline as one file that needs torch and diffusers but not this package.

    The same sources give the same file, byte by byte.

    Args:
        cls_or_module (`type` or module): A class of this package, or the module that defines it.
        save_directory (`str` or `Path`): Made if it does not exist. The file gets the name of the module.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the class or module is not of this package, or its modules cannot be joined: they define
            different things under one name, or import from the package in another way than
            `from ..module import name` at the top level.
    """
    name = cls_or_module.__name__ if isinstance(cls_or_module, types.ModuleType) else cls_or_module.__module__
    if not name.startswith(f"{PACKAGE}."):
        raise ValueError(f"`{name}` is not a module of {PACKAGE}, so it cannot be exported. Pass one of its classes.")
    published = [cls.__name__ for cls in PUBLIC_CLASSES if cls.__module__ == name and issubclass(cls, ConfigMixin)]
    sources = (_collect(f"{PACKAGE}.hub.publishing") if published else []) + _collect(name)
    _check_names(sources)

    *inlined, main = sources
    modules = ", ".join(source.name for source in sources)
    futures = sorted(set.union(*(source.futures for source in sources)))
    parts = [HEADER.format(version=__version__, modules=modules) + main.docstring]
    if futures:
        parts.append(f"from __future__ import {', '.join(futures)}")
    for source in inlined:
        parts.append(f"# --- {source.name} ---\n{source.docstring}")
        parts.append(source.body)
    if inlined:
        parts.append(f"# --- {main.name} ---")
    parts.append(main.body)
    parts += [f"add_publishing({name})" for name in published]

    path = Path(save_directory) / f"{name.rpartition('.')[2]}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", encoding="utf-8", newline="\n"
    )
    return path


def export_class_file(cls: type, path: str | Path) -> None:
    r"""
    Writes the module of a class as `export_model_file` does, to a file of any name.

    The file of a pipeline has no other pipeline among its names: diffusers wants to find just one in a `pipeline.py`.

    Raises:
        ValueError: As of `export_model_file`; if another pipeline is used by its name when the file has been loaded.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        text = export_model_file(cls, folder).read_text(encoding="utf-8")
    if cls in PIPELINES:
        others = {pipeline.__name__ for pipeline in PIPELINES} - {cls.__name__}
        functions = _functions(symtable.symtable(text, str(path), "exec"))
        if used := sorted(others.intersection(set().union(*map(_global_names, functions)))):
            raise ValueError(f"The methods in the file of `{cls.__name__}` use {used}, which it may not keep.")
        text += PIPELINE_FOOTER.format(others=tuple(sorted(others)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _functions(table: symtable.SymbolTable) -> list[symtable.SymbolTable]:
    """The outermost functions in a module or class: what runs later than the module itself."""
    found = []
    for child in table.get_children():
        found += [child] if child.get_type() == "function" else _functions(child)
    return found


def _collect(name: str) -> list[_Source]:
    """The module and all it imports from the package, each behind what it needs; the module itself is last."""
    done: dict[str, _Source] = {}

    def visit(name: str, importers: tuple[str, ...]) -> None:
        if name in importers:
            raise ValueError(
                f"{' -> '.join((*importers, name))} import each other in a circle; one file cannot do that."
            )
        if name in done:
            return
        source = _read(name)
        for dependency in source.imported:
            visit(dependency, (*importers, name))
        done[name] = source

    visit(name, ())
    return list(done.values())


def _read(name: str) -> _Source:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"There is no module `{name}` whose source could be exported.")
    if spec.submodule_search_locations is not None:
        raise ValueError(
            f"`{name}` is a package. Import from the module that defines the name, so that it can be exported."
        )
    text = Path(spec.origin).read_text(encoding="utf-8")
    return _take_apart(name, text)


def _take_apart(name: str, text: str) -> _Source:
    tree = ast.parse(text, filename=name)
    lines = text.splitlines()
    cut: set[int] = set()  # line numbers
    source = _Source(name, docstring="", body="")

    def remove(node: ast.stmt) -> None:
        numbers = set(range(node.lineno, node.end_lineno + 1))
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        if node.col_offset or (rest and not rest.startswith("#")):
            raise ValueError(f"{name}, line {node.lineno}: an import shares its line with something else.")
        cut.update(numbers)

    if ast.get_docstring(tree) is not None:
        node = tree.body[0]
        source.docstring = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        cut.update(range(node.lineno, node.end_lineno + 1))

    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        at_top = node in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    raise ValueError(
                        f"{name}, line {node.lineno}: `import {alias.name}` cannot be inlined. Write "
                        "`from module import name`."
                    )
                if at_top:
                    bound = alias.asname or alias.name.partition(".")[0]
                    source.outside[bound] = alias.name if alias.asname else bound
            continue

        module = node.module or ""
        if node.level:
            module = importlib.util.resolve_name("." * node.level + module, name.rpartition(".")[0])
        if module.partition(".")[0] == PACKAGE:
            names = [alias.name for alias in node.names]
            if not at_top:
                problem = "is not at the top level"
            elif "*" in names:
                problem = "does not say which names it imports"
            elif any(alias.asname not in (None, alias.name) for alias in node.names):
                problem = "renames what it imports"
            else:
                remove(node)
                source.imported.setdefault(module, set()).update(names)
                continue
            raise ValueError(
                f"{name}, line {node.lineno}: `{ast.unparse(node)}` {problem}, so it cannot be inlined. Write `from "
                "module import name` at the top level."
            )
        if module == "__future__":
            remove(node)
            source.futures.update(alias.name for alias in node.names)
        elif at_top:
            for alias in node.names:
                source.outside[alias.asname or alias.name] = f"{module}.{alias.name}"

    source.body = "\n".join(line for number, line in enumerate(lines, start=1) if number not in cut)
    table = symtable.symtable(source.body, name, "exec")
    source.bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    source.used = _global_names(table) - source.bound
    return source


def _global_names(table: symtable.SymbolTable) -> set[str]:
    is_module = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (is_module or s.is_global())}
    return names.union(*(_global_names(child) for child in table.get_children()))


def _check_names(sources: list[_Source]) -> None:
    """Raises a `ValueError` where a name would mean something else in one file than it does in several."""
    by_name = {source.name: source for source in sources}
    for source in sources:
        for module, names in source.imported.items():
            missing = sorted(names - by_name[module].bound)
            if missing:
                raise ValueError(
                    f"`{source.name}` imports {missing} from `{module}`, which does not define them itself."
                )
    for source, other in itertools.permutations(sources, 2):
        # `import torch` in both is no clash; anything else of one name is.
        both = source.bound & other.bound
        clashes = {n for n in both if n not in source.outside or source.outside[n] != other.outside.get(n)}
        if clashes:
            raise ValueError(
                f"`{source.name}` and `{other.name}` both define {sorted(clashes)}, so they cannot share a "
                "file. Rename one."
            )
        # A built-in, for example, that the other module defines anew for itself.
        captured = (source.used & other.bound).difference(*source.imported.values())
        if captured:
            raise ValueError(
                f"`{source.name}` uses {sorted(captured)} without importing them, and `{other.name}` defines them, "
                "so they cannot share a file. Rename the latter."
            )
