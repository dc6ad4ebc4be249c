"""
A full disk: recognised in the errors of all libraries that write files, and explained in one sentence. Small files that
are written whole or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..commands.errors import CommandError


# The disk is full, its quota is used up, or a file would exceed the limit of the process or the file system.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries that write files by themselves make of it: safetensors, PyTorch.
DISK_WORDS = tuple(os.strerror(number) for number in DISK_ERRORS) + (
    "PytorchStreamWriter failed",
    "unexpected pos",
    "file write failed",
)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that there is no room for a file."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return True
    if isinstance(error, (OSError, SafetensorError, RuntimeError)) and any(word in str(error) for word in DISK_WORDS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)


def as_disk_error(error: Exception, folder: str | os.PathLike, what: str, kept: str) -> Exception:
    """
    Explains the error of a full disk, and returns every other error as it is.

    Args:
        folder (`str` or `os.PathLike`): Where the files were to be written.
        what (`str`): What has failed, e.g. "checkpoint-100 could not be written".
        kept (`str`): A sentence on what there is to go on from.

    Returns:
        `Exception`: A [`CommandError`] with the exit code 1, to be raised from `error`; or `error`.
    """
    if not is_disk_full(error) or isinstance(error, CommandError):
        return error
    existing = next(path for path in (Path(folder), *Path(folder).resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    message = (
        f"{what}: {error}. The disk of {folder} has {free / 2**20:,.0f} MiB free. {kept} Free some space (for example "
        "with a smaller `--checkpoints_total_limit`), or raise the limit on file sizes if there is one (`ulimit -f`), "
        "then run the same command with `--resume_from_checkpoint latest`."
    )
    explained = CommandError(message, exit_code=1)
    explained.__cause__ = error
    return explained


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file under another name and renames it: whenever the process is killed, the old or the new one."""
    writing = Path(f"{os.fspath(path)}.writing")
    with open(writing, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)


@contextmanager
def explained_disk_errors(folder: str | os.PathLike, what: str, kept: str) -> Iterator[None]:
    """Raises the error of a full disk in a `with` block as [`as_disk_error`] explains it."""
    try:
        yield
    except Exception as error:
        explained = as_disk_error(error, folder, what, kept)
        if explained is error:
            raise
        raise explained from error
