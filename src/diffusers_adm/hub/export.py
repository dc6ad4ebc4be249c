"""
Export of code to the Hub, for machines without this package.

A repository may ship one Python file per component, and that of a model must stand alone: other files in its folder are
not downloaded. So `export_model_file` joins a module and what it imports from this package into one file:

- Modules follow each other in the order of their imports, with comments and docstrings. Imports between them disappear,
  or become an assignment if they give another name.
- A top-level name that several modules define for themselves gets the name of its module as a suffix, except for the
  first: `_check__text`. Every replacement is verified by parsing the result.
- The file of a pipeline has stand-ins for the components of this package (see `stand_ins.py`), which come in files of
  their own.
"""

import ast
import hashlib
import importlib
import importlib.util
import itertools
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers import ConfigMixin

from .. import __version__
from .code_editing import GlobalNames, names_bound_by, read_scope, rename_globals, replace_statements
from .public_classes import COMPONENTS, PACKAGE, PIPELINES, PUBLIC_CLASSES


HEADER = """\
# Written by diffusers-adm {version} for machines without that package. Do not edit it; its sources are, in this order:
# {modules}
# SPDX-License-Identifier: Apache-2.0
"""
# diffusers runs a file anew for each repository that ships it, all in one module. What the first run has defined stays:
# objects of its classes are in use, and with new classes `isinstance` would no longer know them.
REPEATED = """\
_earlier = dict(globals()) if globals().get("_digest") == "{digest}" else {{}}
_digest = "{digest}"
"""
RESTORED = """
# Where this file has been run before, its first definitions stay.
globals().update(_earlier)
"""
PIPELINE_FOOTER = """
def __dir__():
    # diffusers wants to find just one pipeline, and may run the `pipeline.py` of several folders in one module.
    return ["{name}"]
"""
STAND_INS = f"{__package__}.stand_ins"
# Top-level names of a module that serve those who import it.
FOR_IMPORTERS = {"__all__", "__dir__", "__getattr__"}
# Files that have been joined, with the state of the sources of each. Joining takes seconds, and most repositories ship
# several files, some of which are the same in all of them.
_JOINED: dict[tuple, tuple[str, dict[str, tuple | None]]] = {}


def export_model_file(cls_or_module: type | types.ModuleType, save_directory: str | Path) -> Path:
    r"""
    Write the module of a model, scheduler or pipeline as one file that needs torch and diffusers but not this package.
    The same sources give the same file, byte by byte.

    Args:
        cls_or_module (`type` or module): A class of this package, or the module that defines it.
        save_directory (`str` or `Path`): Created if necessary. The file gets the name of the module.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the class or module is not from this package, or its modules cannot be joined.
    """
    name = cls_or_module.__name__ if isinstance(cls_or_module, types.ModuleType) else cls_or_module.__module__
    path = Path(save_directory) / f"{name.rpartition('.')[2]}.py"
    _write(name, path)
    return path


def export_class_file(cls: type, path: str | Path) -> None:
    r"""
    Write the module of a class as `export_model_file` does, to a file of any name.

    Raises:
        ValueError: As in `export_model_file`.
    """
    _write(cls.__module__, Path(path))


def _write(module: str, path: Path) -> None:
    if not module.startswith(f"{PACKAGE}."):
        raise ValueError(f"`{module}` is not a module of {PACKAGE}, so it cannot be exported. Pass one of its classes.")
    key = module, (*PIPELINES,), (*COMPONENTS,), (*PUBLIC_CLASSES,)
    text, stamps = _JOINED.get(key, ("", {}))
    if not stamps or any(_stamp(name) != stamp for name, stamp in stamps.items()):
        text, names = _join(module)
        _JOINED[key] = text, {name: _stamp(name) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _stamp(module: str) -> tuple[str, int, int] | None:
    """Changes when the source of a module does; `None` for a module that is gone."""
    try:
        origin = importlib.util.find_spec(module).origin
        status = Path(origin).stat()
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        return None
    return origin, status.st_mtime_ns, status.st_size


def _join(module: str) -> tuple[str, list[str]]:
    """The file of a module, and the names of all modules that were read for it."""
    pipelines = {cls.__module__: cls.__name__ for cls in PIPELINES}
    classes = [cls.__name__ for cls in PUBLIC_CLASSES if cls.__module__ == module and issubclass(cls, ConfigMixin)]
    publishing = [f"{__package__}.publishing"] if classes else []
    if module in pipelines:
        # diffusers runs the `pipeline.py` of several folders in one module, so names mean the same in all of them.
        stand_ins = {(cls.__module__, cls.__name__) for cls in COMPONENTS}
        joiner = _Joiner([*pipelines, *publishing], stand_ins)
    else:
        joiner = _Joiner([module, *publishing], set())
    sources = joiner.collect([module, *publishing])

    main = joiner.read(module)
    header = HEADER.format(version=__version__, modules=", ".join(source.name for source in sources))
    futures = sorted(set().union(*(source.futures for source in sources)))
    start = [header + main.docstring, f"from __future__ import {', '.join(futures)}" if futures else ""]
    parts = []
    for source in sources:
        parts.append(f"# --- {source.name} ---\n{source.docstring if source is not main else ''}")
        parts.append(joiner.text(source))
        if source.name == STAND_INS:
            parts.append(joiner.stand_ins(sources))
    parts += [f"add_publishing({cls})" for cls in classes]
    parts += [PIPELINE_FOOTER.format(name=pipelines[module]) if module in pipelines else "", RESTORED]
    digest = hashlib.sha256("".join(start + parts).encode()).hexdigest()[:16]
    parts = [*start, REPEATED.format(digest=digest), *parts]
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    if re.search(r"^\s*(import\s+\.|from\s+\.\S+\s+import)", text, re.MULTILINE):
        raise ValueError(
            f"A string in the modules of `{module}` has a line that starts like a relative import. diffusers searches "
            "code for such lines by a regular expression and would not load the file. Reword the string."
        )
    return text, joiner.modules


@dataclass
class _Import:
    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    name: str  # the name that it binds
    module: str
    attribute: str  # "" for the module itself
    place: str  # "top", "block" (of `if` or `try`), "types" (`if TYPE_CHECKING`) or "inner" (of a function or class)

    @property
    def is_ours(self) -> bool:
        return self.module.partition(".")[0] == PACKAGE


class _Source:
    """The code of a module without its docstring, `from __future__`, and names that only serve importers."""

    def __init__(self, name: str):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"There is no module `{name}` whose source could be exported.")
        self.name, self.is_package = name, spec.submodule_search_locations is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        tree = ast.parse(text, filename=name)
        self.docstring, self.futures = "", set()
        removed: dict[ast.stmt, str] = {}
        if ast.get_docstring(tree) is not None:
            self.docstring = ast.get_source_segment(text, tree.body[0])
            removed[tree.body[0]] = ""
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                self.futures.update(alias.name for alias in statement.names)
                removed[statement] = ""
            elif FOR_IMPORTERS.intersection(read_scope("module", [statement]).bound):
                removed[statement] = ""
        self.text = replace_statements(text, tree, removed)
        self.tree = ast.parse(self.text, filename=name)
        self.bound = read_scope("module", self.tree.body).bound
        nodes = GlobalNames(self.tree).nodes
        self._used = {name for name, found in nodes.items() if not all(isinstance(node, ast.alias) for node in found)}
        self.imports = list(self._read_imports(self.tree, "top"))
        self.top = {found.name: found for found in self.imports if found.place == "top"}
        # Without what is only imported from the package for others to import from here.
        self.globals = [
            name for name in nodes if name in self._used or not self.top.get(name) or not self.top[name].is_ours
        ]

    def _read_imports(self, parent: ast.AST, place: str) -> Iterator[_Import]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from (self._read_import(node, alias, place) for alias in node.names)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from self._read_imports(node, "inner")
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from self._read_imports(node, "types")
            else:
                yield from self._read_imports(node, "block" if place == "top" else place)

    def _read_import(self, node: ast.Import | ast.ImportFrom, alias: ast.alias, place: str) -> _Import:
        (name,) = names_bound_by(alias)
        if place == "top" and self.bound[name] > 1:  # it cannot just stand for what is imported
            place = "block"
        if isinstance(node, ast.Import):
            found = _Import(node, alias, name, alias.name if alias.asname else name, "", place)
        else:
            package = self.name if self.is_package else self.name.rpartition(".")[0]
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found = _Import(node, alias, name, module, alias.name, place)
        if found.is_ours and (alias.name == "*" or found.module == PACKAGE and not found.attribute):
            raise ValueError(f"{self.name}: `{ast.unparse(node)}` cannot be exported. Write `from module import name`.")
        return found

    def needed(self) -> list[_Import]:
        """Imports from the package that are used when the code is run."""
        ours = [found for found in self.imports if found.is_ours and found.place != "types"]
        return [found for found in ours if found.place == "inner" or found.name in self._used]


class _Joiner:
    """
    Joins modules, in which each name means one thing.

    Args:
        modules (`list`): Names of the modules. Those that they import are found.
        stand_ins (`set`): Classes that are not to be inlined, by module and name.
    """

    def __init__(self, modules: list[str], stand_ins: set[tuple[str, str]]):
        self._sources: dict[str, _Source] = {}
        self._stand_ins = stand_ins
        self._new_names = self._choose_names(self.collect(modules))

    @property
    def modules(self) -> list[str]:
        """Those that have been read."""
        return list(self._sources)

    def read(self, module: str) -> _Source:
        if module not in self._sources:
            self._sources[module] = _Source(module)
        return self._sources[module]

    def collect(self, modules: list[str]) -> list[_Source]:
        """The modules and all that they import from the package, each after those that it needs at its top level."""
        done: dict[str, _Source] = {}

        def visit(module: str, importers: tuple[str, ...]) -> None:
            if module in importers:
                raise ValueError(f"{' -> '.join((*importers, module))} import each other in a circle. Break it.")
            if module in done:
                return
            source = self.read(module)
            for found in source.needed():
                place, _ = self._find(source, found.module, found.attribute)
                if found.place == "inner":
                    later.append(place)
                else:
                    visit(place, (*importers, module))
            done[module] = source

        later = list(modules)
        for module in later:  # which grows
            visit(module, ())
        return list(done.values())

    def _find(self, importer: _Source, module: str, name: str) -> tuple[str, str]:
        """The module that defines a name, behind those that only pass it on, and the name there ("" for a module)."""
        if not name:
            return module, ""
        source = self.read(module)
        if name in source.top and source.top[name].is_ours:
            return self._find(importer, source.top[name].module, source.top[name].attribute)
        if (module, name) in self._stand_ins and importer.name not in dict(self._stand_ins):
            return STAND_INS, name
        if name in source.bound:
            return module, name
        if source.is_package and importlib.util.find_spec(f"{module}.{name}"):
            return f"{module}.{name}", ""
        raise ValueError(f"`{importer.name}` imports `{name}` from `{module}`, which does not define it.")

    def _define(self, module: str, name: str) -> tuple[str, str]:
        """The origin of a global of a module, "" for a built-in, and its name there."""
        if module == STAND_INS and any(name == cls for _, cls in self._stand_ins):
            return module, name
        source = self.read(module)
        found = source.top.get(name)
        if found is not None and found.is_ours:
            place, there = self._find(source, found.module, found.attribute)
            if there == name:
                return self._define(place, name)
        elif found is not None:
            return f"outside {_identity(found.module, found.attribute)}", name
        return module if name in source.bound else "", name

    def _choose_names(self, sources: list[_Source]) -> dict[tuple[str, str], str]:
        """New names, by what `_define` returns: of several definitions with the same name, one keeps it."""
        users: dict[str, dict[tuple[str, str], str]] = {}  # by name and definition: the module that has it first
        for source in sources:
            names = [(source.name, name) for name in source.globals]
            names += [self._find(source, found.module, found.attribute) for found in source.needed()]
            for module, name in names:
                if name:
                    definition = self._define(module, name)
                    users.setdefault(definition[1], {}).setdefault(definition, source.name)
        words = set(re.findall(r"\w+", "\n".join(source.text for source in sources)))
        fixed = {(cls.__module__, cls.__name__) for cls in PUBLIC_CLASSES}
        new_names = {}
        for name, definitions in users.items():
            # Built-ins, dunder names and public classes cannot have another name.
            kept = [one for one in definitions if not one[0] or one in fixed or name.startswith("__")]
            if len(kept) > 1:
                raise ValueError(f"{[place or 'Python' for place, _ in kept]} all define `{name}`. Rename it in one.")
            others = sorted((one for one in definitions if one not in kept), key=lambda one: one[0] == STAND_INS)
            for definition in others[1 - len(kept) :]:
                new = f"{name}__{definitions[definition].rpartition('.')[2]}"
                while new in words:
                    new += "_"
                words.add(new)
                new_names[definition] = new
        return new_names

    def _name(self, module: str, name: str) -> str:
        return self._new_names.get(self._define(module, name), name)

    def stand_ins(self, sources: list[_Source]) -> str:
        """The definitions of the stand-ins that the modules use."""
        found = {self._find(source, each.module, each.attribute) for source in sources for each in source.needed()}
        make = self._name(STAND_INS, "StandIn")
        lines = (
            f'{self._name(STAND_INS, name)} = {make}("{name}", (), {{"_file": "{module.rpartition(".")[2]}"}})'
            for module, name in sorted(self._stand_ins)
            if (STAND_INS, name) in found
        )
        return "\n".join(lines)

    def text(self, source: _Source) -> str:
        """The code of a module in the file."""
        new_names = {name: self._name(source.name, name) for name in source.globals}
        text = rename_globals(source.name, source.text, {old: new for old, new in new_names.items() if old != new})
        tree = ast.parse(text)
        statements = [[node for node in ast.walk(each) if isinstance(node, ast.stmt)] for each in (source.tree, tree)]
        moved = dict(zip(*statements, strict=True))
        replaced: dict[ast.stmt, str] = {}
        for old, group in itertools.groupby(source.imports, key=lambda found: found.statement):
            imports, statement = list(group), moved[old]
            if imports[0].is_ours:
                lines = [line for found in imports for line in self._assign(source, found, new_names)]
                replaced[statement] = ("\n" if imports[0].place == "top" else "; ").join(lines)
            elif imports[0].place != "inner" and any(new_names[found.name] != found.name for found in imports):
                for found in imports:
                    if new_names[found.name] != found.name:
                        found.alias.asname = new_names[found.name]
                replaced[statement] = ast.unparse(old)
        return replace_statements(text, tree, replaced)

    def _assign(self, source: _Source, found: _Import, new_names: dict[str, str]) -> list[str]:
        """The replacement of an import from the package: none if its name is that of the definition."""
        new = found.name if found.place == "inner" else new_names.get(found.name)
        if found.place == "types":
            return [f"from typing import Any as {new}"]
        if found not in source.needed():
            return []
        module, name = self._find(source, found.module, found.attribute)
        if name:
            value = self._name(module, name)
        else:  # a module becomes an object with those of its names that are used
            nodes = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
            used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == found.name}
            values = ", ".join(f'"{attribute}": {self._name(module, attribute)}' for attribute in sorted(used))
            value = f'type("{found.name}", (), {{{values}}})'
        if value == new:
            return [f'{new} = globals()["{value}"]'] if found.place == "inner" else []
        return [f"{new} = {value}"]


def _identity(module: str, name: str) -> str:
    """The same for an object under several paths, e.g. `torch.nn.Module` and `torch.nn.modules.Module`."""
    try:
        value = importlib.import_module(module)
        return str(id(getattr(value, name) if name else value))
    except (ImportError, AttributeError):
        return f"{module}.{name}"
