"""The documentation: links work, README.md links all pages, and code can be parsed."""

import ast
import importlib
import re
import subprocess
import warnings
from pathlib import Path

import pytest
from markdown_pages import REPOSITORY, blocks

import diffusers_adm


PAGES = [
    *REPOSITORY.glob("*.md"),
    *(path for folder in ("docs", "data", "spaces", "benchmarks") for path in (REPOSITORY / folder).rglob("*.md")),
]
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
FRONT_PAGE = REPOSITORY / "docs" / "index.md"  # of the site, which `make docs` builds
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings as on GitHub: lower case, no punctuation, hyphens for spaces."""
    outside_of_code = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", outside_of_code, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# What it *is*, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#what-it-is-here) ![c](no.png) [d](other.md#no) [e](https://x.y/z) [f](#no)"
    )
    assert broken_links(page) == ["no.png", "other.md#no", "#no"]


def pages_of_docs(pattern: str) -> set[str]:
    docs = REPOSITORY / "docs"
    return {path.relative_to(docs).as_posix() for path in docs.glob(pattern) if path != FRONT_PAGE}


def test_readme_lists_every_page():
    """But the front page of the site, which does for the site what the README does for the repository."""
    linked = set(LINK.findall((REPOSITORY / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page}" for page in pages_of_docs("*.md") | pages_of_docs("notebooks/*.ipynb")} <= linked


def test_front_page_lists_every_page():
    linked = set(LINK.findall(FRONT_PAGE.read_text(encoding="utf-8")))
    assert pages_of_docs("**/*.md") | pages_of_docs("notebooks/*.ipynb") <= linked


def test_menu_of_the_site_has_every_page_once():
    config = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    menu = re.findall(r": (\S+\.md)$", config, re.M)
    inside = sorted(page for page in menu if not page.startswith("repository/"))
    notebooks = {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
    assert inside == sorted({"index.md"} | pages_of_docs("**/*.md") | notebooks)
    for page in set(menu) - set(inside):
        assert (REPOSITORY / page.removeprefix("repository/")).is_file(), page


def named_in_the_reference() -> list[str]:
    pages = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs" / "api").glob("*.md"))
    return re.findall(r"^::: ([\w.]+)$", pages, re.M)


def test_names_in_the_reference_exist():
    names = named_in_the_reference()
    assert len(names) == len(set(names)) > 50
    for name in names:
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last).__module__ == module, name


def test_reference_has_all_public_classes():
    named = {name.rpartition(".")[2] for name in named_in_the_reference()}
    assert set(diffusers_adm.__all__) - {"ModelMixin", "SchedulerMixin"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_code_can_be_parsed(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.padded, page.name, "exec")
        else:
            result = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
            assert result.returncode == 0, f"{page.name}, line {block.line}: {result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_imports_exist(page):
    """Names of this package that the code of a page imports, without old names that only work with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.code)) if block.language == "python" else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_adm"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name), (
                            f"{page.name}, line {block.line}: {node.module}.{alias.name}"
                        )


def named_code(page: Path) -> list[tuple[str, list[str]]]:
    """The Python files that a page names, each with the names in it: "`losses.py`: `Objective`, `training_losses`"."""
    named = re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w+(?:\.\w+)*`(?:, )?)+))?", page.read_text(encoding="utf-8"))
    return [(file, re.findall(r"`([\w.]+)`", names)) for file, names in named]


def test_the_map_of_the_code_is_right():
    missing = []
    for file, names in named_code(REPOSITORY / "docs" / "architecture.md"):
        paths = [path for path in (REPOSITORY / "src" / "diffusers_adm" / file, REPOSITORY / file) if path.is_file()]
        code = paths[0].read_text(encoding="utf-8") if paths else None
        for name in names:
            *_, last = name.split(".")
            if code is None or not re.search(rf"^\s*(class|def) {last}\b|^{last}\b.* = ", code, re.M):
                missing.append(f"{file}: {name}")
        if code is None:
            missing.append(file)
    assert missing == []
