"""
Extension of Griffe that turns the docstrings of this package into Markdown (mkdocs.yml names this file).

Their sections look like Google's, but one entry may document several arguments, and types are Markdown with a reason
or a shape in them, as in diffusers. So arguments become a list, worded as they are. References like [`ADMPipeline`]
become links if the name has a place on one of the pages in docs/api/.
"""

import re
import textwrap
from pathlib import Path

import griffe


API = Path(__file__).parents[1] / "api"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n((?: {4}.*\n|\n)+)", re.M)
TITLES = {"Args": "Arguments"}
# Names before the types, "height, width (`int`):", or without any, "loss:".
NAMES = re.compile(r"^([\w*]+(?:,\s+[\w*]+)*)(?=\s+\(|:)")


def documented_names():
    """`{name: path}` of everything that the pages in docs/api/ document."""
    pages = "".join(path.read_text(encoding="utf-8") for path in API.glob("*.md"))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: ([\w.]+)$", pages, re.M)}


def as_list(section):
    """The entries of a section as items of a list, with their names as code."""
    items = []
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section).strip("\n")):
        # "a (types), b (types): text" names several, too.
        head, colon, text = entry.partition(": ")
        head = re.sub(r"(?<=\)),\s+(\w+)(?=\s+\()", r", **`\1`**", head)
        head = NAMES.sub(lambda match: ", ".join(f"**`{name}`**" for name in re.split(r",\s+", match[1])), head + colon)
        items.append("- " + textwrap.indent(head + text, "    ").lstrip())
    return "\n".join(items)


def as_markdown(docstring, names):
    """
    A docstring as Markdown.

    Args:
        docstring (`str`): Without indentation.
        names (`dict[str, str]`): Paths of the names that references may link to.
    """

    def section(match):
        content = textwrap.dedent(match[2]).strip("\n") if match[1] in ("Returns", "Yields") else as_list(match[2])
        return f"**{TITLES.get(match[1], match[1])}**\n\n{content}\n\n"

    def reference(match):
        if match[1].startswith("~"):  # of another library: its last name
            return f"`{match[1].rpartition('.')[2]}`"
        name, _, member = match[1].partition(".")
        if name not in names:
            return f"`{match[1]}`"
        return f"[`{match[1]}`][{names[name]}{'.' if member else ''}{member}]"

    text = SECTION.sub(section, docstring + "\n")
    # Lists need an empty line before them.
    text = re.sub(r"^((?!\s*- )\S.*)\n(?=- )", r"\1\n\n", text, flags=re.M)
    return re.sub(r"\[`(~?[\w.]+)`\](?![\[(])", reference, text)


class DocstringsAsMarkdown(griffe.Extension):
    def __init__(self):
        self.names = documented_names()

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, self.names)
