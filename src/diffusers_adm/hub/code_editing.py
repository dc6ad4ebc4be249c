"""Edits of source code for the exporter: replacing statements, and renaming globals by Python's rules of scope."""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Located: TypeAlias = ast.stmt | ast.expr | ast.alias | ast.excepthandler | ast.pattern  # nodes with positions


@dataclass
class _Scope:
    kind: str  # "function", "class" or "comprehension"
    bound: Counter[str] = field(default_factory=Counter)
    declared: set[str] = field(default_factory=set)  # by `global`


def names_bound_by(node: ast.AST) -> list[str]:
    """The names that a node binds in its scope, apart from those that its children bind."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.alias(name=name, asname=asname):
            return [asname or name.partition(".")[0]]
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
            return [node.name]
    return []


def read_scope(kind: str, nodes: Iterable[ast.AST]) -> _Scope:
    """The scope of a block of statements, with each name as often as it is bound there."""
    scope, elsewhere, todo = _Scope(kind), set(), list(nodes)
    while todo:
        node = todo.pop()
        scope.bound.update(names_bound_by(node))
        if isinstance(node, ast.Global):
            scope.declared.update(node.names)
        elif isinstance(node, ast.Nonlocal):
            elsewhere.update(node.names)
        elif isinstance(node, COMPREHENSIONS):
            todo += [child.target for child in ast.walk(node) if isinstance(child, ast.NamedExpr)]
        elif not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)
    for name in scope.declared | elsewhere:
        del scope.bound[name]
    return scope


class GlobalNames(ast.NodeVisitor):
    """
    Finds the nodes that name a global of a module.

    Attributes:
        nodes (`dict`): Lists of nodes by name. A string annotation counts as a node for the names in it.
        f_strings (`dict`): The f-string around a node, for nodes in one. Python 3.11 misplaces these.
    """

    def __init__(self, tree: ast.Module):
        self.nodes: dict[str, list[Located]] = {}
        self.f_strings: dict[Located, ast.JoinedStr] = {}
        self._scopes: list[_Scope] = []
        self._f_string: ast.JoinedStr | None = None
        self.generic_visit(tree)

    def _is_global(self, name: str, binds: bool = False) -> bool:
        for number, scope in enumerate(reversed(self._scopes)):
            if name in scope.declared:
                return True
            if name in scope.bound and (scope.kind != "class" or number == 0):
                return False
            if binds and scope.kind != "comprehension":
                return False
        return True

    def _add(self, name: str, node: Located, binds: bool = False) -> None:
        if self._is_global(name, binds):
            self.nodes.setdefault(name, []).append(node)
            if self._f_string is not None:
                self.f_strings[node] = self._f_string

    def _visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, Located):
            for name in names_bound_by(node):
                self._add(name, node, binds=True)
        if (annotation := getattr(node, "annotation", None)) is not None:
            self._add_string_annotations(annotation)
        super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._add(node.id, node, binds=not isinstance(node.ctx, ast.Load))

    def visit_Global(self, node: ast.Global) -> None:
        for name in node.names:
            self._add(name, node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        outer, self._f_string = self._f_string, self._f_string or node
        super().generic_visit(node)
        self._f_string = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *node.keywords])
        self._add(node.name, node, binds=True)
        self._scopes.append(_Scope("class"))
        for statement in node.body:  # each sees the names that those before it have bound
            declared = read_scope("class", [statement])
            self._scopes[-1].declared |= declared.declared
            self.visit(statement)
            self._scopes[-1].bound += declared.bound
        self._scopes.pop()

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        every = [argument for argument in every if argument is not None]
        self._visit_all([*arguments.defaults, *arguments.kw_defaults, *every])
        body: Sequence[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else node.body
        if not isinstance(node, ast.Lambda):
            self._visit_all([*node.decorator_list, node.returns])
            if node.returns is not None:
                self._add_string_annotations(node.returns)
            self._add(node.name, node, binds=True)
        scope = read_scope("function", body)
        scope.bound.update(argument.arg for argument in every)
        self._scopes.append(scope)
        self._visit_all(body)
        self._scopes.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)  # in the scope around
        self._scopes.append(read_scope("comprehension", [generator.target for generator in node.generators]))
        for generator in node.generators:
            rest = [] if generator is node.generators[0] else [generator.iter]
            self._visit_all([generator.target, *rest, *generator.ifs])
        self._visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        self._scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def _add_string_annotations(self, annotation: ast.AST) -> None:
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Literal"):
            return
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            for name in sorted(set(re.findall(r"(?<![\w.])[^\W\d]\w*", annotation.value))):
                self._add(name, annotation)
        for child in ast.iter_child_nodes(annotation):
            self._add_string_annotations(child)


def _spans(text: bytes) -> Callable[[Located], tuple[int, int]]:
    """A function that tells where a node begins and ends in a text."""
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    return lambda node: (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)


def _apply(text: bytes, edits: dict[tuple[int, int], str]) -> str:
    for (start, end), new in sorted(edits.items(), reverse=True):
        text = text[:start] + new.encode() + text[end:]
    return text.decode()


def replace_statements(text: str, tree: ast.Module, replaced: dict[ast.stmt, str]) -> str:
    """Replace statements. One that is replaced by "" is removed with its lines, or becomes `pass` where it has to."""
    data, edits = text.encode(), {}
    span = _spans(data)
    blocks = [getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse", "finalbody")]
    for block in blocks:
        statements = [statement for statement in block if statement in replaced] if isinstance(block, list) else []
        for statement in statements:
            start, end = span(statement)
            new = replaced[statement]
            if not new:
                before, after = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", end) + 1 or len(data)
                shares_line = (data[before:start] + data[end:after].partition(b"#")[0]).strip()
                if shares_line or (block is not tree.body and all(replaced.get(other) == "" for other in block)):
                    new = "pass"
                else:
                    start, end = before, after
            edits[start, end] = new
    return _apply(data, edits)


def rename_globals(module: str, text: str, new_names: dict[str, str]) -> str:
    """
    Rename globals of a module.

    Raises:
        ValueError: If the new code does not parse as the old one with other names.
    """
    if not new_names:
        return text
    data, tree = text.encode(), ast.parse(text)
    span, names = _spans(data), GlobalNames(tree)
    words = re.compile(rf"(?<![\w.'\"])(?:{'|'.join(new_names)})(?![\w'\"])")

    def renamed(match: re.Match[str]) -> str:
        return new_names[match[0]]

    edits: dict[tuple[int, int], str] = {}
    for old, new in new_names.items():
        for node in names.nodes.get(old, []):
            f_string = names.f_strings.get(node)
            if f_string is not None:
                depth, parts = 0, []  # of braces
                for part in re.split(r"(\{\{|\}\}|\{|\})", data[slice(*span(f_string))].decode()):
                    depth += {"{": 1, "}": -1, "{{": 2 * bool(depth), "}}": -2 * bool(depth)}.get(part, 0)
                    parts.append(words.sub(renamed, part) if depth else part)
                edits[span(f_string)] = "".join(parts)
            if isinstance(node, ast.Name):
                if f_string is None:
                    edits[span(node)] = new
                node.id = new
            elif isinstance(node, ast.Constant):  # a string annotation
                node.value = words.sub(renamed, str(node.value))
                edits[span(node)] = repr(node.value)
            elif isinstance(node, ast.Global):
                node.names = [new_names.get(name, name) for name in node.names]
                edits[span(node)] = ast.unparse(node)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
                place = re.compile(rf"\b(?:def|class|as)\s+({old})\b".encode()).search(data, *span(node))
                edits[place.span(1)] = node.name = new
    result = _apply(data, edits)
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError(f"Names of `{module}` cannot be replaced in its text: {sorted(new_names)}. Rename them there.")
    return result
