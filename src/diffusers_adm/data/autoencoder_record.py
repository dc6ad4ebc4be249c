"""
`autoencoder.json`, next to the config of an autoencoder: what diffusers' config has no entries for. The format of the
images that it was trained on, and mean and standard deviation of their latents by channel, before scale and shift.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..conditioning.image_format import ImageFormat


AUTOENCODER_NAME = "autoencoder.json"


def save_autoencoder_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes the record into the folder of an autoencoder."""
    text = json.dumps(dict(record), indent=2, ensure_ascii=False)
    Path(folder, AUTOENCODER_NAME).write_text(text + "\n", encoding="utf-8")


def load_autoencoder_record(
    repository: str | os.PathLike, subfolders: Sequence[str] = ("vae", ""), **kwargs: Any
) -> dict[str, Any] | None:
    """
    Loads the record of an autoencoder in a folder or in a repository on the Hub; `None` if there is none.

    Args:
        repository (`str` or `os.PathLike`): The folder or the repository.
        subfolders (sequence of `str`): Where to look in it, in this order; `""` is its root.
        kwargs: Arguments of `hf_hub_download`: `revision`, `cache_dir` and others.

    Raises:
        ValueError: If it is no JSON.
    """
    for subfolder in subfolders:
        if os.path.isdir(repository):
            path = Path(repository, subfolder, AUTOENCODER_NAME)
            if not path.is_file():
                continue
        else:
            try:
                path = Path(hf_hub_download(str(repository), AUTOENCODER_NAME, subfolder=subfolder or None, **kwargs))
            except EntryNotFoundError:
                continue
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}. Restore it, or delete it.") from error
    return None


def load_recorded_format(
    repository: str | os.PathLike, channels: int, subfolders: Sequence[str] = ("vae", ""), **kwargs: Any
) -> ImageFormat | None:
    """
    The format of the images that an autoencoder was trained on, from its record or that of the pipeline that it is a
    part of; `None` if there is none. `channels` are those of its images; for the other arguments see
    `load_autoencoder_record`.
    """
    recorded = (load_autoencoder_record(repository, subfolders, **kwargs) or {}).get("image_format")
    if recorded is None and any(subfolders):
        with contextlib.suppress(OSError):  # no pipeline
            recorded = DiffusionPipeline.load_config(repository, **kwargs).get("image_format")
    return None if recorded is None else ImageFormat.from_config(recorded, channels)
