"""The report of images that are left out: `skipped_images.txt`, one line each with reason, name and details."""

from __future__ import annotations

import os
from pathlib import Path


SKIP_REPORT_NAME = "skipped_images.txt"


class SkipReport:
    """
    Images that are left out while training, in a file that all processes and their workers append to.

    An image may be added again, in a later epoch or by another worker, and counts once.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir, SKIP_REPORT_NAME)

    def clear(self) -> None:
        """Deletes the report of an earlier run."""
        self.path.unlink(missing_ok=True)

    def add(self, reason: str, name: str, details: str) -> None:
        """Adds an image. Tabs and line breaks become spaces."""
        line = "\t".join(" ".join(text.split()) for text in (reason, name, details)) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write of an appending file: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode(errors="backslashreplace"))  # names need not be valid Unicode
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, list[str]]:
        """The names of the images by reason, each once."""
        if not self.path.is_file():
            return {}
        names: dict[str, dict[str, None]] = {}
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            reason, name, *_ = [*line.split("\t"), ""]  # the last line may be cut short by a kill
            names.setdefault(reason, {})[name] = None
        return {reason: list(found) for reason, found in names.items()}

    def summary(self) -> str | None:
        """How many images are left out, by reason: "3 images: 2 unreadable, 1 too small"; `None`: none."""
        skipped = self.read()
        if not skipped:
            return None
        number = sum(map(len, skipped.values()))
        counts = ", ".join(f"{len(names)} {reason}" for reason, names in skipped.items())
        return f"{number} image{'s' * (number > 1)}: {counts}"
