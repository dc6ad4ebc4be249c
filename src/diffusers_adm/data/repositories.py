"""Reading the parts of a pipeline that somebody named: on the Hub or in a folder, of today's kind or of 2022's."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..commands.errors import is_mistake


@contextlib.contextmanager
def reading(argument: str, value: str) -> Iterator[None]:
    """Gives errors of libraries, which do not know where a path came from, the name of the argument."""
    try:
        yield
    except (OSError, ValueError) as error:  # the latter for what is neither a path nor the name of a repository
        if is_mistake(error):
            raise
        missing = "" if os.path.exists(value) else "is no file or folder here and "
        raise ValueError(f"`{argument}` is {value!r}, which {missing}cannot be read: {error}") from error


def from_subfolder_or_root(load: Callable[..., Any], repository: str, subfolder: str, **kwargs: Any) -> Any:
    """
    `load(repository, subfolder=subfolder, **kwargs)`, or from the root: repositories from before pipelines, such as
    google/ddpm-cifar10-32, keep the files of all parts there.
    """
    try:
        return load(repository, subfolder=subfolder, **kwargs)
    except OSError as error:
        # huggingface_hub takes the traceback away from an error that is being handled while it meets another; without
        # it, this one would look as if it had been raised here.
        traceback = error.__traceback__
        try:
            return load(repository, **kwargs)
        except OSError:
            raise error.with_traceback(traceback) from None


def check_can_be_written(argument: str, value: str | os.PathLike) -> None:
    """
    Looks whether a folder can be made, or written to, before the work whose results it is to hold. Makes nothing.

    Raises:
        ValueError: If it cannot; it names `argument`.
    """
    path = Path(value).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"`{argument}` is {str(value)!r}, but {existing} is not a directory. Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{argument}` is {str(value)!r}, but {existing} cannot be written to. Name another folder.")
