"""What the commands of this folder share: random subsets, progress bars, versions, and checks of arguments."""

from __future__ import annotations

import importlib.util
import os
import random
import sys

import diffusers
import torch
from tqdm.auto import tqdm

from .. import __version__
from ..commands.effects import Rule
from ..data.seeding import derive_seed


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


def choose(number: int, num_images: int | None, seed: int) -> list[int]:
    """Ascending indices of a random choice of `num_images` (`None`: all) out of `number` images."""
    if num_images is None or num_images >= number:
        return list(range(number))
    # Not the first ones: images in folders are sorted by class.
    return sorted(random.Random(derive_seed(seed, "num_images")).sample(range(number), num_images))


def make_bar(total: int | None, description: str, unit: str, show: bool, **kwargs: bool) -> tqdm:
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
        **kwargs,
    )


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {"diffusers_adm": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
