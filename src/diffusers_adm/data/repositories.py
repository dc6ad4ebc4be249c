"""Reading the parts of a pipeline from a folder or the Hub, in the layout of today or of 2022; checks of folders."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..commands.errors import is_mistake


@contextlib.contextmanager
def reading(argument: str, value: str) -> Iterator[None]:
    """Adds the name of the argument to errors of libraries, which do not know where a path came from."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: neither a path nor the name of a repository
        if is_mistake(error):
            raise
        missing = "" if os.path.exists(value) else "is no file or folder here and "
        raise ValueError(f"`{argument}` is {value!r}, which {missing}cannot be read: {error}") from error


def from_subfolder_or_root(load: Callable[..., Any], repository: str, subfolder: str, **kwargs: Any) -> Any:
    """
    Calls `load(repository, subfolder=subfolder, **kwargs)`, and without the subfolder if that fails: repositories from
    before pipelines, such as google/ddpm-cifar10-32, keep the files of all parts in their root.
    """
    try:
        return load(repository, subfolder=subfolder, **kwargs)
    except OSError as error:
        # huggingface_hub removes the traceback of an error that is being handled when another occurs. Without it, this
        # error would seem to be raised here.
        traceback = error.__traceback__
        try:
            return load(repository, **kwargs)
        except OSError:
            raise error.with_traceback(traceback) from None


def check_can_be_written(argument: str, value: str | os.PathLike) -> None:
    """
    Checks that a folder can be created, or written to, before the work that fills it; raises a `ValueError` otherwise.
    Creates nothing.
    """
    path = Path(value).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"`{argument}` is {str(value)!r}, but {existing} is not a directory. Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{argument}` is {str(value)!r}, but {existing} cannot be written to. Name another folder.")


def only_variant(source: str, subfolder: str) -> str | None:
    """ "fp16" for a folder that holds, in `subfolder` or its root, such weights only; `None` otherwise."""
    for place in (Path(source, subfolder), Path(source)):
        names = [path.name for path in place.glob("*.safetensors")]
        if names:
            return "fp16" if all(name.endswith(".fp16.safetensors") for name in names) else None
    return None
