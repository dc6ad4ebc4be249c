"""The best result of a run so far, by a measure of its validations, in a folder of its own."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from .checkpoints import DELETING_PREFIX, REPLACED_PREFIX, WRITING_PREFIX, flush_directory, flush_to_disk


logger = logging.getLogger(__name__)

BEST_FOLDER, BEST_NAME = "best", "best.json"
PREFIX = "validation_"
# The words that a measure ends with, and whether higher is better. Of those with other endings, such as
# standard errors, none is.
DIRECTIONS = {
    "loss": False,
    "mse": False,
    "vb": False,
    "bits_per_dim": False,
    "frechet_distance": False,
    "rfid": False,
    "accuracy": True,
    "psnr": True,
    "ssim": True,
    "dice": True,
    "recall_at_1": True,
    "recall_at_5": True,
    "similarity": True,
}
# Baselines, which do not depend on the network that is trained.
BASELINES = ("text_similarity", "shuffled_similarity", "mean_similarity")


def is_higher_better(measure: str) -> bool | None:
    """
    Whether a higher value of a measure of validation (with or without `validation_`) is better; `None`: neither, as for
    a standard error.
    """
    name = measure.removeprefix(PREFIX)
    if name.endswith(BASELINES):
        return None
    ending = next((ending for ending in DIRECTIONS if name == ending or name.endswith(f"_{ending}")), None)
    return None if ending is None else DIRECTIONS[ending]


def check_keep_best(measure: str, measures: Collection[str]) -> None:
    """
    Raises a `ValueError` unless `measure`, the argument `keep_best`, is among the `measures` that the validations of
    the run make, and can be better or worse.
    """
    known = [name for name in measures if is_higher_better(name) is not None]
    if measure in known:
        return
    if not known:
        raise ValueError(
            f"`keep_best` is {measure!r}, but the validations of this run measure nothing. Name held-out data, such as "
            "`--validation_data_files`, or leave it out."
        )
    raise ValueError(
        f"`keep_best` is {measure!r}, which the validations of this run do not measure. They measure "
        f"{', '.join(known)}: name one of these, or pass the arguments that ask for the measure."
    )


class BestResult:
    """
    Keeps the result of the best validation in `output_dir/best`, with `best.json`: measure, value and step. The main
    process uses it.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run.
        measure (`str`): A measure of the validations, e.g. `validation_loss`.
        step (`int`): Optimizer steps taken before, by a resumed run.
        is_other_run (`bool`): Whether the resumed run was changed by force. Then the best result of a later step is not
            one that this run will reach, and is deleted.
    """

    def __init__(self, output_dir: str | os.PathLike, measure: str, step: int = 0, is_other_run: bool = False):
        self.output_dir, self.measure = Path(output_dir), measure
        self.value: float | None = None
        path = self.output_dir / BEST_FOLDER / BEST_NAME
        if not path.is_file():
            return
        record = json.loads(path.read_text(encoding="utf-8"))
        if is_other_run and record["step"] > step:
            logger.warning("Deleting %s: it is that of step %d of the run before its change.", path, record["step"])
            delete_best(output_dir)
        elif record["measure"] != measure:
            logger.warning(
                "%s is the best result by %s; from now on it is that by %s.",
                path.parent,
                record["measure"],
                measure,
            )
        else:
            self.value = record["value"]

    def is_better(self, value: float | None) -> bool:
        """Whether a value is better than the best one so far. NaN and None are not."""
        if value is None or not math.isfinite(value):
            return False
        if self.value is None:
            return True
        return value > self.value if is_higher_better(self.measure) else value < self.value

    def save(self, save_result: Callable[[str], None], value: float, step: int) -> None:
        """
        Replaces the best result. Whenever the process is killed, the folder holds a whole one, or its neighbour does,
        which the next start renames.
        """
        path = self.output_dir / BEST_FOLDER
        writing, replaced = (self.output_dir / f"{prefix}{BEST_FOLDER}" for prefix in (WRITING_PREFIX, REPLACED_PREFIX))
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            save_result(str(writing))
            record = {"measure": self.measure, "value": value, "step": step}
            (writing / BEST_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            flush_to_disk(writing)
        except BaseException:  # the run goes on: on a full disk, its next checkpoint needs the room
            shutil.rmtree(writing, ignore_errors=True)
            raise
        if path.exists():
            os.rename(path, replaced)
        os.rename(writing, path)
        flush_directory(self.output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        self.value = value
        logger.info("%s is the result of step %d, with a %s of %.5g.", path, step, self.measure, value)


def delete_best(output_dir: str | os.PathLike) -> None:
    """
    Deletes the best result of another run, also if that was killed while it replaced it. Call it on one process.
    """
    for prefix in ("", REPLACED_PREFIX):
        path = Path(output_dir, f"{prefix}{BEST_FOLDER}")
        if (path / BEST_NAME).is_file():  # made by a run
            deleting = path.with_name(f"{DELETING_PREFIX}{BEST_FOLDER}")
            shutil.rmtree(deleting, ignore_errors=True)
            os.rename(path, deleting)
            shutil.rmtree(deleting)
