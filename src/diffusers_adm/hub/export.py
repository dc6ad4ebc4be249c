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
import copy
import importlib
import importlib.util
import itertools
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import ConfigMixin

from .. import __version__
from .public_classes import COMPONENTS, PACKAGE, PIPELINES, PUBLIC_CLASSES
from .scopes import GlobalNames, names_bound_by, read_scope


HEADER = """\
# Written by diffusers-adm {version} for machines without that package. Do not edit it; its sources are, in this order:
# {modules}
# SPDX-License-Identifier: Apache-2.0
"""
STAND_IN = '{variable} = {maker}("{name}", (), {{"_file": "{file}"}})'
PIPELINE_FOOTER = """
def __dir__():
    # diffusers wants to find just one pipeline, and may run the `pipeline.py` of several folders in one module.
    return ["{name}"]
"""
STAND_INS = f"{__package__}.stand_ins"
# Top-level names of a module that serve those who import it.
FOR_IMPORTERS = {"__all__", "__dir__", "__getattr__"}


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


def _write(name: str, path: Path) -> None:
    if not name.startswith(f"{PACKAGE}."):
        raise ValueError(f"`{name}` is not a module of {PACKAGE}, so it cannot be exported. Pass one of its classes.")
    # diffusers runs the `pipeline.py` of several folders in one module, so all pipelines are named together.
    pipelines = {cls.__module__: cls.__name__ for cls in PIPELINES}
    is_pipeline = name in pipelines
    classes = [cls.__name__ for cls in PUBLIC_CLASSES if cls.__module__ == name and issubclass(cls, ConfigMixin)]
    publishing = [f"{__package__}.publishing"] if classes else []
    stand_ins = {(cls.__module__, cls.__name__) for cls in COMPONENTS} if is_pipeline else set()
    joiner = _Joiner(publishing + (list(pipelines) if is_pipeline else [name]), stand_ins)
    sources = joiner.collect([name, *publishing])

    modules = ", ".join(source.name for source in sources)
    parts = [HEADER.format(version=__version__, modules=modules) + joiner.read(name).docstring]
    if futures := sorted(set().union(*(source.futures for source in sources))):
        parts.append(f"from __future__ import {', '.join(futures)}")
    bound: set[tuple[str, ...]] = set()
    for source in sources:
        docstring = source.docstring if source.name != name else ""
        parts += [f"# --- {source.name} ---\n{docstring}", joiner.text(source, bound)]
        if source.name == STAND_INS:
            parts.append(joiner.stand_ins(sources))
    parts += [f"add_publishing({cls})" for cls in classes]
    if is_pipeline:
        parts.append(PIPELINE_FOOTER.format(name=pipelines[name]))
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    if re.search(r"^\s*(import\s+\.|from\s+\.\S+\s+import)", text, re.MULTILINE):
        raise ValueError(
            f"A string in the modules of `{name}` has a line that starts like a relative import. diffusers searches "
            "code for such lines by a regular expression and would not load the file. Reword the string."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


@dataclass
class _Import:
    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    name: str  # that it binds
    origin: tuple[str, str]  # module, and the name there; "" for the module itself
    place: str  # "top", "block" (of `if` or `try`), "types" (`if TYPE_CHECKING`) or "inner" (of a function or class)

    @property
    def is_ours(self) -> bool:
        return self.origin[0].partition(".")[0] == PACKAGE


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
        cut = {}
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                self.futures.update(alias.name for alias in statement.names)
                cut[statement] = ""
            elif FOR_IMPORTERS.intersection(read_scope("module", [statement]).bound):
                cut[statement] = ""
        if ast.get_docstring(tree) is not None:
            self.docstring = ast.get_source_segment(text, tree.body[0])
            cut[tree.body[0]] = ""
        self.text = _edit(name, text, tree, cut)
        self.tree = ast.parse(self.text, filename=name)
        self.names = GlobalNames(self.tree)
        self.bound = read_scope("module", self.tree.body).bound
        self.imports = list(self._read_imports(self.tree, "top"))
        self.top = {found.name: found for found in self.imports if found.place == "top"}

    def _read_imports(self, parent: ast.AST, place: str) -> Iterator[_Import]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or ""
                if getattr(node, "level", 0):
                    package = self.name if self.is_package else self.name.rpartition(".")[0]
                    module = importlib.util.resolve_name("." * node.level + module, package)
                for alias in node.names:
                    (name,) = names_bound_by(alias)
                    origin = (module, alias.name) if module else (alias.name if alias.asname else name, "")
                    # A name that is bound again cannot just stand for what is imported.
                    is_plain = place != "top" or self.bound[name] == 1
                    found = _Import(node, alias, name, origin, place if is_plain else "block")
                    if found.is_ours and (alias.name == "*" or (not module and not alias.asname)):
                        raise ValueError(
                            f"{self.name}: `{ast.unparse(node)}` cannot be exported. Write `from module import name`."
                        )
                    yield found
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from self._read_imports(node, "inner")
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from self._read_imports(node, "types")
            else:
                yield from self._read_imports(node, "block" if place == "top" else place)

    def needs(self, found: _Import) -> bool:
        """Whether the module that is imported from has to be in the file."""
        nodes = self.names.nodes.get(found.name, [])
        is_used = found.place == "inner" or any(not isinstance(node, ast.alias) for node in nodes)
        return is_used and found.place != "types"

    def _is_passed_on(self, name: str) -> bool:
        return name in self.top and self.top[name].is_ours and not self.needs(self.top[name])

    def globals(self) -> list[str]:
        """The names of globals, without those that are only imported from the package."""
        return [name for name in self.names.nodes if not self._is_passed_on(name)]


class _Joiner:
    """
    Joins modules. A name means the same in the files of all modules of a family.

    Args:
        family (`list`): Names of the modules.
        stand_ins (`set`): Classes that are not to be inlined, by module and name.
    """

    def __init__(self, family: list[str], stand_ins: set[tuple[str, str]]):
        self._sources: dict[str, _Source] = {}
        self._stand_ins = stand_ins
        self._final = self._choose_names(self.collect(family))

    def read(self, name: str) -> _Source:
        if name not in self._sources:
            self._sources[name] = _Source(name)
        return self._sources[name]

    def collect(self, modules: list[str]) -> list[_Source]:
        """The modules and all that they import from the package, each after those that it needs when it is run."""
        done: dict[str, _Source] = {}

        def visit(name: str, importers: tuple[str, ...]) -> None:
            if name in importers:
                raise ValueError(f"{' -> '.join((*importers, name))} import each other in a circle. Break it.")
            if name in done:
                return
            source = self.read(name)
            for found, module, _ in self._targets(source):
                if found.place == "inner":
                    later.append(module)
                else:
                    visit(module, (*importers, name))
            done[name] = source

        later = list(modules)
        for name in later:  # which grows
            visit(name, ())
        return list(done.values())

    def _targets(self, source: _Source) -> Iterator[tuple[_Import, str, str]]:
        """What a module imports from the package and uses: the import, the module that is meant, and the name there."""
        for found in source.imports:
            if found.is_ours and source.needs(found):
                yield found, *self._find(source, *found.origin)

    def _find(self, importer: _Source, module: str, name: str) -> tuple[str, str]:
        """Where a name is defined, through modules that only pass it on, and its name there ("" for a module)."""
        if not name:
            return module, name
        source = self.read(module)
        if name in source.top and source.top[name].is_ours:
            return self._find(importer, *source.top[name].origin)
        if (module, name) in self._stand_ins and importer.name not in dict(self._stand_ins):
            return STAND_INS, name
        if name in source.bound:
            return module, name
        if source.is_package and importlib.util.find_spec(f"{module}.{name}"):
            return f"{module}.{name}", ""
        raise ValueError(f"`{importer.name}` imports `{name}` from `{module}`, which does not define it.")

    def _define(self, source: _Source, name: str) -> tuple[str, str]:
        """What a global of a module is: where it is defined, and the name there."""
        found = source.top.get(name)
        if found is not None and found.is_ours:
            module, there = self._find(source, *found.origin)
            if there == name:
                return self._final_place(module, name)
        elif found is not None:
            return f"outside {_identity(*found.origin)}", name
        return source.name if name in source.bound else "", name

    def _final_place(self, module: str, name: str) -> tuple[str, str]:
        return (module, name) if module == STAND_INS else self._define(self.read(module), name)

    def _choose_names(self, sources: list[_Source]) -> dict[tuple[str, str], str]:
        """The name that each definition has in the file. Of several that have the same name, one keeps it."""
        users: dict[str, dict[tuple[str, str], str]] = {}  # by name and definition: the module that has it first
        for source in sources:
            definitions = [self._define(source, name) for name in source.globals()]
            definitions += [self._final_place(module, name) for _, module, name in self._targets(source) if name]
            for definition in definitions:
                users.setdefault(definition[1], {}).setdefault(definition, source.name)
        words = set(re.findall(r"\w+", "\n".join(source.text for source in sources)))
        fixed = {(cls.__module__, cls.__name__) for cls in PUBLIC_CLASSES}
        final = {}
        for name, definitions in users.items():
            # Built-ins, dunder names and public classes come first: they cannot have another name.
            first = [one for one in definitions if not one[0] or one in fixed or name.startswith("__")]
            if len(first) > 1:
                raise ValueError(f"{[place or 'Python' for place, _ in first]} all define `{name}`. Rename it in one.")
            others = [one for one in definitions if one not in first]
            others.sort(key=lambda one: one[0] == STAND_INS)
            for definition in others[not first :]:
                new = f"{name}__{definitions[definition].rpartition('.')[2]}"
                while new in words:
                    new += "_"
                words.add(new)
                final[definition] = new
        return final

    def _name(self, module: str, name: str) -> str:
        definition = self._final_place(module, name)
        return self._final.get(definition, name)

    def stand_ins(self, sources: list[_Source]) -> str:
        """The definitions of the stand-ins that the modules use."""
        used = {name for source in sources for _, module, name in self._targets(source) if module == STAND_INS}
        files = {name: module.rpartition(".")[2] for module, name in self._stand_ins if name in used}
        lines = (
            STAND_IN.format(
                variable=self._name(STAND_INS, name),
                maker=self._name(STAND_INS, "StandIn"),
                name=name,
                file=files[name],
            )
            for name in sorted(files)
        )
        return "\n".join(lines)

    def text(self, source: _Source, bound: set[tuple[str, ...]]) -> str:
        """The code of a module in the file. `bound` holds the imports from outside that are there already; it grows."""
        new_names = {name: self._final.get(self._define(source, name), name) for name in source.globals()}
        replaced = {}
        for statement, group in itertools.groupby(source.imports, key=lambda found: found.statement):
            imports = list(group)
            if imports[0].is_ours:
                lines = [line for found in imports for line in self._assign(source, found, new_names)]
                replaced[statement] = ("\n" if imports[0].place == "top" else "; ").join(lines)
            elif imports[0].place in ("top", "block"):
                aliases = []
                for found in imports:
                    new = new_names[found.name]
                    key = (*found.origin, found.alias.name, new)
                    if found.place == "block" or key not in bound:
                        is_same = new == found.name
                        aliases.append(found.alias if is_same else ast.alias(found.alias.name, asname=new))
                    if found.place == "top":
                        bound.add(key)
                if aliases != statement.names:
                    changed = copy.copy(statement)
                    changed.names = aliases
                    replaced[statement] = ast.unparse(changed) if aliases else ""
        renamed = [
            (node, name, new)
            for name, new in new_names.items()
            if new != name
            for node in source.names.nodes[name]
            if not isinstance(node, ast.alias)
        ]
        return _edit(source.name, source.text, source.tree, replaced, renamed, source.names.f_strings)

    def _assign(self, source: _Source, found: _Import, new_names: dict[str, str]) -> list[str]:
        """What stands in place of an import from the package: nothing, where the name is that of the definition."""
        if not source.needs(found) and found.place != "types":
            return []
        new = found.name if found.place == "inner" else new_names[found.name]
        if found.place == "types":
            return [f"from typing import Any as {new}"]
        module, name = self._find(source, *found.origin)
        if name:
            value = self._name(module, name)
        else:  # a module: an object with what is used of it
            uses = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
            used = {node.attr for node in uses if isinstance(node.value, ast.Name) and node.value.id == found.name}
            attributes = ", ".join(f'"{attribute}": {self._name(module, attribute)}' for attribute in sorted(used))
            value = f'type("{found.name}", (), {{{attributes}}})'
        if value != new:
            return [f"{new} = {value}"]
        # In a function that would be an unbound local variable, unless no other statement there binds the name.
        is_local = found.place == "inner" and found.alias not in source.names.only_here
        return [f'{new} = globals()["{value}"]'] if is_local else []


def _identity(module: str, name: str) -> str:
    """The same for what is imported by different paths: `torch.nn.Module` and `torch.nn.modules.Module`, say."""
    try:
        value = importlib.import_module(module)
        return str(id(getattr(value, name) if name else value))
    except (ImportError, AttributeError):
        return f"{module}.{name}"


def _edit(
    module: str,
    text: str,
    tree: ast.Module,
    replaced: dict[ast.stmt, str],
    renamed: Sequence[tuple[ast.AST, str, str]] = (),
    f_strings: dict[ast.AST, ast.JoinedStr] | None = None,
) -> str:
    """
    Edit source code, and leave the rest as it is.

    Args:
        module (`str`): Its name, for messages.
        text (`str`), tree (`ast.Module`): The code, and what `ast.parse` makes of it. The tree is edited as well.
        replaced (`dict`): New code by statement; "" removes the statement.
        renamed (sequence): Nodes with an old and a new name.
        f_strings (`dict`): The f-strings around nodes.

    Raises:
        ValueError: If the new code does not parse as the edited tree.
    """
    data = text.encode()
    starts = [0, *itertools.accumulate(map(len, data.splitlines(keepends=True)))]
    edits: list[tuple[int, int, bytes]] = []

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    strings: dict[ast.AST, dict[str, str]] = {}  # f-strings and string annotations
    for node, old, new in renamed:
        holder = (f_strings or {}).get(node, node)
        start, end = span(holder)
        if isinstance(holder, (ast.JoinedStr, ast.Constant)):
            strings.setdefault(holder, {})[old] = new
        elif isinstance(node, ast.Name):
            edits.append((start, end, new.encode()))
        else:
            words = re.compile(rf"\b(?:(?:def|class|as)\s+|global\b[\w\s,]*?\b)({old})\b".encode())
            start, end = words.search(data, start, end).span(1)
            edits.append((start, end, new.encode()))
        _rename(node, old, new)
    for holder, names in strings.items():
        start, end = span(holder)
        is_annotation = isinstance(holder, ast.Constant)  # which has been renamed already
        new = repr(holder.value) if is_annotation else _rename_in_string(data[start:end].decode(), names, holder)
        edits.append((start, end, new.encode()))

    for block in _blocks(tree):
        removed = [statement for statement in block if replaced.get(statement) == ""]
        for statement in block.copy():
            if statement not in replaced:
                continue
            start, end = span(statement)
            line_start, line_end = starts[statement.lineno - 1], starts[statement.end_lineno]
            rest = data[line_start:start] + data[end:line_end].partition(b"#")[0]
            new = replaced[statement]
            if not new and (rest.strip() or (len(removed) == len(block) and block is not tree.body)):
                new = "pass"
            if not new:
                start, end = line_start, line_end
            edits.append((start, end, new.encode()))
            index = block.index(statement)
            block[index : index + 1] = ast.parse(new).body

    for start, end, new in sorted(edits, reverse=True):
        data = data[:start] + new + data[end:]
    if ast.dump(ast.parse(data)) != ast.dump(tree):
        names = sorted({f"{old} -> {new}" for _, old, new in renamed})
        raise ValueError(f"The imports and names of `{module}` cannot be replaced in its text: {names}. Rename there.")
    return data.decode()


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                yield block


def _rename(node: ast.AST, old: str, new: str) -> None:
    if isinstance(node, ast.Name):
        node.id = new
    elif isinstance(node, ast.Global):
        node.names = [new if name == old else name for name in node.names]
    elif isinstance(node, ast.Constant):
        node.value = _rename_in_string(node.value, {old: new}, node)
    else:
        node.name = new


def _rename_in_string(text: str, names: dict[str, str], node: ast.AST) -> str:
    """Rename the words of a string annotation, or those in the braces of an f-string."""
    words = re.compile(rf"(?<![\w.'\"])(?:{'|'.join(names)})(?![\w'\"])")
    depth, parts = isinstance(node, ast.Constant), []
    for part in re.split(r"(\{\{|\}\}|\{|\})", text):
        if part == "{" or (depth and part == "{{"):
            depth += len(part)
        elif part == "}" or (depth and part == "}}"):
            depth -= len(part)
        parts.append(words.sub(lambda match: names[match[0]], part) if depth else part)
    return "".join(parts)
