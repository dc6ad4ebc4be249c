"""Pages in Markdown, and the code in them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
# Blocks of other languages are no code that runs. Those in lists are indented.
FENCED = re.compile(r"^( *)```(python|bash)\n(.*?)^\1```$", re.M | re.S)


@dataclass
class Block:
    language: str  # "python" or "bash"
    code: str
    line: int  # of its first line of code in the page

    @property
    def padded(self) -> str:
        """With the line numbers that it has in the page."""
        return "\n" * (self.line - 1) + self.code


def blocks(page: Path) -> list[Block]:
    """The blocks of Python and of shell commands in a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2], textwrap.dedent(match[3]), text[: match.start(3)].count("\n") + 1)
        for match in FENCED.finditer(text)
    ]
