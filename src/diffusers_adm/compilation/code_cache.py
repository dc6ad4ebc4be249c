"""
A folder of the user's own for compiled code, so that later processes need not compile again.

Code from this folder is executed, so it must belong to the user, and nobody else may be able to write to it. It is
never part of a saved model: nothing here is pushed to a repository or loaded from one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from huggingface_hub.constants import HF_HOME


CODE = "model.pt2"
RECORD = "entry.json"  # size and hash of the code
CHUNK = 1 << 24  # bytes
ABANDONED_AFTER = 86_400  # seconds


def default_cache_dir() -> Path:
    """`diffusers_adm/compiled` in the cache of Hugging Face's libraries (`HF_HOME`)."""
    return Path(HF_HOME) / "diffusers_adm" / "compiled"


class CodeCache:
    """
    Compiled code by key, each in a folder of its own.

    Args:
        folder (`Path` or `str`, *optional*): Created where it is missing. `None`: see [`default_cache_dir`].

    Raises:
        ValueError: If the folder cannot be created or written, or others can write to it.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = (default_cache_dir() if folder is None else Path(folder)).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder = self.folder.resolve()
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"The folder for compiled code, {self.folder}, cannot be used: {error}. Pass a folder that you can "
                "write to as `cache_dir`, or set HF_HOME."
            ) from error
        self._check_owner(self.folder)
        for parent in self.folder.parents:
            # In a folder that all can write to, others could replace ours; the sticky bit (as in /tmp) prevents it.
            mode = parent.stat().st_mode
            if os.name == "posix" and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise ValueError(
                    f"All users can write to {parent}, so code in {self.folder} could be replaced by that of others. "
                    "Pass another `cache_dir`."
                )
        for left in self.folder.glob(".new-*"):  # by a process that was killed
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def _check_owner(self, path: Path) -> None:
        """Raises a `ValueError` unless a path belongs to the user, who alone can write to it."""
        if os.name != "posix":
            return
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid():
            raise ValueError(
                f"{path} in the folder for compiled code is a link, or does not belong to you, so its code is not "
                "executed. Delete it, or pass another `cache_dir`."
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(
                f"Others can write to {path}, so code from there is not executed. Delete the folder, or take away "
                f"their permission: chmod -R go-w {self.folder}"
            )

    @property
    def is_empty(self) -> bool:
        """Whether there is no code yet."""
        return not any(self.folder.glob(f"[!.]*/{CODE}"))

    def get(self, key: str) -> Path | None:
        """
        The file with the code of a key; `None`: there is none. A damaged entry is deleted, with a warning.

        Raises:
            ValueError: If others could have written the entry.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            for path in (entry, *entry.iterdir()):
                self._check_owner(path)
        except FileNotFoundError:  # another process has deleted it
            return None
        try:
            record = json.loads((entry / RECORD).read_text(encoding="utf-8"))
            is_whole = record == self._record(entry / CODE)
        except (OSError, ValueError):
            is_whole = False
        if is_whole:
            return entry / CODE
        # Loading half a library could end the process.
        logging.getLogger(__name__).warning(f"The compiled code in {entry} is damaged. It is deleted.")
        self.delete(key)
        return None

    def delete(self, key: str) -> None:
        """Deletes the code of a key."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def new_folder(self) -> Path:
        """An empty folder for `put`, on the same file system."""
        return Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))

    def put(self, key: str, folder: Path) -> Path:
        """Moves a folder of `new_folder` that holds the code to its key, in one step; returns the file of the code."""
        (folder / RECORD).write_text(json.dumps(self._record(folder / CODE)), encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o600)
        try:
            folder.rename(self.folder / key)
        except OSError:  # another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        path = self.get(key)
        if path is None:
            raise RuntimeError(f"Compiled code cannot be kept in {self.folder}: it cannot be read back.")
        return path

    @staticmethod
    def _record(path: Path) -> dict[str, int | str]:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
