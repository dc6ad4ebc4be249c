"""What the commands of this folder share: versions, and checks of arguments."""

from __future__ import annotations

import importlib.util
import os

import diffusers
import torch

from .. import __version__
from ..commands.effects import Rule


REVISION_RULE = Rule(
    ("revision",),
    lambda given: not os.path.isdir(given["model"]),
    "`model` is a folder, which has no revisions",
    refused=True,
)


def require(*modules: str) -> None:
    """Raises an `ImportError` that names the extra if a module is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"This command needs {module}. Install the extra: `pip install diffusers-adm[eval]`.")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {"diffusers_adm": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
