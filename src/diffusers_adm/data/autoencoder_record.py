"""
`autoencoder.json`, next to the config of an autoencoder: what diffusers' config has no entries for. The format of the
images that it was trained on, and mean and standard deviation of their latents by channel, before scale and shift.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


AUTOENCODER_NAME = "autoencoder.json"


def save_autoencoder_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes the record into the folder of an autoencoder."""
    text = json.dumps(dict(record), indent=2, ensure_ascii=False)
    Path(folder, AUTOENCODER_NAME).write_text(text + "\n", encoding="utf-8")


def load_autoencoder_record(repository: str | os.PathLike, **kwargs: Any) -> dict[str, Any] | None:
    """
    Loads the record of an autoencoder in the subfolder `vae` of a folder or of a repository on the Hub, or in its root;
    `None` if there is none. `kwargs` are arguments of `hf_hub_download`: `revision`, `cache_dir` and others.
    """
    for subfolder in ("vae", None):
        if os.path.isdir(repository):
            path = Path(repository, subfolder or "", AUTOENCODER_NAME)
            if not path.is_file():
                continue
        else:
            try:
                path = Path(hf_hub_download(str(repository), AUTOENCODER_NAME, subfolder=subfolder, **kwargs))
            except EntryNotFoundError:
                continue
        return json.loads(path.read_text(encoding="utf-8"))
    return None
