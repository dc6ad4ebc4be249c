"""The order of the rooms: what may import what. Every import counts, also those in functions and for type checkers."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "diffusers_adm"
# Each room and the rooms below it that it may import.
LOWEST = {"commands", "ops"}
PARTS = LOWEST | {"models", "schedulers", "conditioning"}
TOOLS = PARTS | {"data", "measures", "pipelines"}
MAY_IMPORT = {
    "commands": set(),
    "ops": set(),
    "models": LOWEST,
    "compilation": LOWEST | {"models"},
    "schedulers": LOWEST | {"models"},
    "conditioning": LOWEST | {"models", "schedulers"},
    "data": PARTS,
    "pipelines": PARTS | {"compilation"},
    "measures": PARTS | {"data"},
    # None of these three imports another.
    "training": TOOLS,
    "evaluation": TOOLS,
    "conversion": TOOLS,
    "hub": TOOLS | {"training", "evaluation", "conversion"},
}
SCRIPTS = ("training", "spaces", "benchmarks")
ROOT_FILES = {"__init__.py", "deprecations.py", "py.typed"}


def imports_of(code: str, module: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """The line, the module and the name ("" for the module itself) of each import."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield node.lineno, source, alias.name


def broken_rules(code: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """
    The line and the rule of each import that breaks one.

    Args:
        code (`str`): Source code.
        module (`str`): Its full name; that of a script has no dots.
        is_package (`bool`): Whether it is the `__init__.py` of a package.
    """
    is_script = not module.startswith(PACKAGE)
    room = "" if is_script or module == PACKAGE else module.split(".")[1]
    broken = []
    for line, source, name in imports_of(code, module, is_package):
        if source.partition(".")[0] in SCRIPT_NAMES:
            broken.append((line, f"nothing imports a script, and {source} is one"))
        if source.partition(".")[0] != PACKAGE:
            continue
        _, *parts = f"{source}.{name}".split(".")
        there = parts[0] if parts[0] in MAY_IMPORT else ""
        if parts[:2] == ["hub", "registration"] and module != PACKAGE and room != "hub":
            broken.append((line, f"only {PACKAGE}/__init__.py imports hub.registration"))
        elif not room or parts[0] == "deprecations":
            continue
        elif not there and name != "__version__":
            broken.append((line, f"a room imports from other rooms, not from {PACKAGE} itself"))
        elif there and there != room and there not in MAY_IMPORT.get(room, ()):
            allowed = ", ".join(sorted(MAY_IMPORT.get(room, ()))) or "no other room"
            broken.append((line, f"{room} may import {allowed}, but not {there}"))
    return broken


def files() -> Iterator[tuple[Path, str]]:
    """Every file, and its module."""
    for path in sorted((ROOT / "src" / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for path in sorted((ROOT / "pipelines").rglob("*.py")):
        parts = (PACKAGE, "pipelines", *path.relative_to(ROOT / "pipelines").with_suffix("").parts)
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for folder in SCRIPTS:
        for path in sorted((ROOT / folder).glob("*.py")):
            yield path, path.stem


SCRIPT_NAMES = {
    path.stem for path, module in files() if not module.startswith(PACKAGE) and "__main__" in path.read_text("utf-8")
}


def test_imports_point_one_way():
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {rule}"
        for path, module in files()
        for line, rule in broken_rules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(dict.fromkeys(found))


def test_the_root_of_the_package_holds_no_more_files():
    assert {path.name for path in (ROOT / "src" / PACKAGE).iterdir() if path.is_file()} == ROOT_FILES


def test_every_folder_of_the_package_is_a_room():
    rooms = {path.parent.name for path in (ROOT / "src" / PACKAGE).glob("*/__init__.py")} | {"pipelines"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "module, code, rule",
    [
        (
            "diffusers_adm.models.unet",
            "def f():\n    from ..hub.publishing import x",
            "models may import commands, ops, ",
        ),
        ("diffusers_adm.ops.conv", "if TYPE_CHECKING:\n    from diffusers_adm.models import x", "not models"),
        ("diffusers_adm.commands.errors", "from ..ops import x", "commands may import no other room, but not ops"),
        ("diffusers_adm.training.losses", "from .. import evaluation", "but not evaluation"),
        ("diffusers_adm.pipelines.pipeline_adm", "import diffusers_adm.data.images as images", "but not data"),
        ("diffusers_adm.data.images", "from diffusers_adm import ADMPipeline", "not from diffusers_adm itself"),
        ("diffusers_adm.training.losses", "from ..hub.registration import x", "only diffusers_adm/__init__.py"),
        ("diffusers_adm.evaluation.data", "import train_adm", "nothing imports a script"),
        ("bench_unet", "from bench_sampling import x", "nothing imports a script"),
    ],
)
def test_a_broken_rule_is_found(module, code, rule):
    ((line, found),) = broken_rules(code, module)
    assert rule in found
    assert line == code.count("\n") + 1


def test_what_is_allowed():
    assert not broken_rules(
        "from .. import __version__\nfrom ..deprecations import renamed", "diffusers_adm.models.unet"
    )
    assert not broken_rules("from . import x\nfrom .y import z\nimport torch", "diffusers_adm.models.unet")
    assert not broken_rules("from .hub.registration import x", "diffusers_adm", is_package=True)
    assert not broken_rules("from diffusers_adm import x\nfrom diffusers_adm.hub import push_folder", "train_adm")
