"""
Prepares the documentation for the generator of the site, which mkdocs.yml configures: `make docs` runs both.

The pages are written for GitHub. Here they are copied to outputs/site_sources, with a few changes:

- Notebooks become pages: their Markdown cells as they are, their code as blocks.
- Markdown files outside of docs/ that a page links to become pages below `repository/`, with the links in them adapted.
  Links to other files outside of docs/ lead to the repository if pyproject.toml has its address; otherwise only their
  text remains.
- Lists indented by two or three spaces are indented by four, as Python-Markdown requires.
- Formulas become MathML, which browsers show without JavaScript and without a network.
- The package is laid out as it is installed, because the reference is made from its sources without importing them.
"""

import json
import posixpath
import re
import shutil
import tomllib
from pathlib import Path


REPOSITORY = Path(__file__).parents[2]
TARGET = REPOSITORY / "outputs" / "site_sources"
PREFIX = "repository/"  # of pages from outside of docs/
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
# Links and images without a title; not those to other sites and within a page.
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")
LIST_ITEM = re.compile(r" *([-*]|\d+\.) ")
FORMULA = re.compile(r"`[^`]*`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$", re.S)


def repository_url():
    """Address of the repository in pyproject.toml, or `None`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url.rstrip("/") for name, url in project.get("urls", {}).items()}
    return next((urls[name] for name in ("repository", "source", "homepage") if name in urls), None)


def outside_of_code(text, change):
    """Applies `change` to a page except for its blocks of code."""
    parts = FENCE.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def place(path):
    """Where a file of the repository is in the site: `docs/guidance.md` is `guidance.md`."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return PREFIX + path


def resolve(path, target):
    """Path in the repository, and anchor, of a link in the file `path`."""
    name, hash_sign, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name)), hash_sign + anchor


def read_page(path):
    """A page or a notebook as Markdown."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    title, _, rest = "\n\n".join(cells).partition("\n")
    return f'{title}\n\n<a href="{posixpath.basename(path)}" download>Download this page as a notebook</a>\n\n{rest}\n'


def find_files(navigation):
    """
    Pages, notebooks and images of the site: all of docs/, and from elsewhere what these link to.

    Args:
        navigation (`str`): Text of mkdocs.yml, whose menu may name more.
    """
    docs = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*")]
    found = {path for path in docs if path.endswith((".md", ".ipynb", ".png"))}
    found |= {path for path in re.findall(rf" {PREFIX}(\S+)$", navigation, re.M) if (REPOSITORY / path).is_file()}
    waiting = sorted(found)
    while waiting:
        path = waiting.pop()
        if path.endswith(".png"):
            continue
        for match in LINK.finditer(FENCE.sub("", read_page(path))):
            target, _ = resolve(path, match["target"])
            is_page = target.endswith((".md", ".png")) and not target.startswith((".", "docs/"))
            if is_page and target not in found and (REPOSITORY / target).is_file():
                found.add(target)
                waiting.append(target)
    return found


def with_links_of_the_site(text, path, files, repo_url):
    """
    Markdown, without blocks of code, with the links that it has in the site. Links to nothing stay, so that the build
    reports them.

    Args:
        text (`str`): The Markdown.
        path (`str`): The page in the repository.
        files (set of `str`): Files of the repository that are in the site.
        repo_url (`str`, *optional*): Address of the repository.
    """

    def link(match):
        target, anchor = resolve(path, match["target"])
        if target in files:
            relative = posixpath.relpath(place(target), posixpath.dirname(place(path)) or ".")
            return f"{match['text']}({relative}{anchor})"
        if target.startswith("docs/") or not (REPOSITORY / target).exists():
            return match[0]
        if repo_url is None:
            return match["text"].lstrip("!")[1:-1]
        return f"{match['text']}({repo_url}/blob/HEAD/{target}{anchor})"

    return LINK.sub(link, text)


def with_deep_lists(text):
    """
    Markdown in which everything inside of a list is indented by a multiple of four spaces, and items of several
    paragraphs are separated by empty lines, as Python-Markdown requires.
    """
    lines, levels = [], []  # indentation of the text of the list items that a line is in
    in_code, is_loose = False, False
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if not line.strip():
            is_loose = is_loose or bool(levels)
            lines.append(line)
            continue
        while levels and indent < levels[-1] and not in_code:
            levels.pop()
        line = " " * (4 * len(levels) - (levels[-1] if levels else 0)) + line
        match = None if in_code else LIST_ITEM.match(line)
        if match:
            if is_loose and lines[-1].strip():
                lines.append("")
            levels.append(indent + len(match[0].lstrip(" ")))
        elif not levels:
            is_loose = False
        if line.lstrip().startswith("```"):
            in_code = not in_code
        lines.append(line)
    return "\n".join(lines)


def with_mathml(text):
    """Markdown, without blocks of code, with MathML in place of `$x_t$` and `$$x_t$$`."""
    from latex2mathml.converter import convert  # of the extra `docs`, which tests of the other functions do without

    def mathml(match):
        if match["block"]:
            return f'<div class="formula">{convert(match["block"].strip(), display="block")}</div>'
        # In a span, because Python-Markdown takes `<math>` at the start of a line for a paragraph of its own.
        return f'<span class="math">{convert(match["inline"])}</span>' if match["inline"] else match[0]

    return FORMULA.sub(mathml, text)


def write_sources():
    """Writes the pages and the package for the generator."""
    files = find_files((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    repo_url = repository_url()
    shutil.rmtree(TARGET, ignore_errors=True)
    for path in sorted(files):
        page = TARGET / "pages" / place(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            shutil.copy(REPOSITORY / path, page)
            continue
        text = outside_of_code(
            read_page(path), lambda text, path=path: with_links_of_the_site(text, path, files, repo_url)
        )
        if path.endswith(".ipynb"):
            shutil.copy(REPOSITORY / path, page.with_suffix(".ipynb"))
            text = outside_of_code(text, with_mathml)
        page.write_text(with_deep_lists(text), encoding="utf-8")
    shutil.copy(REPOSITORY / "docs" / "site" / "style.css", TARGET / "pages")

    package = TARGET / "package" / "diffusers_adm"
    package.mkdir(parents=True)
    for path in (REPOSITORY / "src" / "diffusers_adm").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            (package / path.name).symlink_to(path)
    (package / "pipelines").symlink_to(REPOSITORY / "pipelines")


if __name__ == "__main__":
    write_sources()
