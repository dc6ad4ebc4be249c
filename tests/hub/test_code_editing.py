"""Edits of source code, on the files of the rooms that are exported, against Python's own tables of symbols."""

import ast
import symtable
from pathlib import Path

import pytest

from diffusers_adm.hub.code_editing import read_scope, rename_globals, replace_statements


ROOT = Path(__file__).parents[2]
ROOMS = ["pipelines", *(f"src/diffusers_adm/{room}" for room in ("ops", "models", "schedulers", "conditioning", "hub"))]
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def global_names(table: symtable.SymbolTable) -> set[tuple[str, int, str]]:
    """Scopes, by their kind and line, with the globals that they use."""
    scope, is_module = (table.get_type(), table.get_lineno()), table.get_type() == "module"
    found = {(*scope, symbol.get_name()) for symbol in table.get_symbols() if is_module or symbol.is_global()}
    return found.union(*map(global_names, table.get_children()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_global_can_be_renamed(path):
    text = path.read_text(encoding="utf-8")
    statements = ast.parse(text).body
    own = read_scope("module", [s for s in statements if not isinstance(s, (ast.Import, ast.ImportFrom))]).bound
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(text))
        for alias in getattr(node, "names", [])
        if isinstance(alias, ast.alias)
    }
    new_names = {name: f"{name}__new" for name in own if not name.startswith("__") and name not in imported}
    result = rename_globals(path.stem, text, new_names)
    before = global_names(symtable.symtable(text, "", "exec"))
    expected = {(kind, line, new_names.get(name, name)) for kind, line, name in before}
    assert global_names(symtable.symtable(result, "", "exec")) == expected


def test_statements_are_removed_with_their_lines():
    text = "import a  # comment\nimport b; x = 1\ndef f():\n    import c\n\ndef g():\n    import d\n    return 1\n"
    tree = ast.parse(text)
    removed = {node: "" for node in ast.walk(tree) if isinstance(node, ast.Import)}
    assert replace_statements(text, tree, removed) == "pass; x = 1\ndef f():\n    pass\n\ndef g():\n    return 1\n"
