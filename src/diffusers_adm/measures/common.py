"""Random subsets and progress bars."""

from __future__ import annotations

import random
import sys

from tqdm.auto import tqdm

from ..data.seeding import derive_seed


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
