"""Checks of all images before training: `check_images` decodes each once and drops those that cannot be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..conditioning.image_format import ImageFormat, Size, describe_resolution
from .decoding import (
    TOO_SMALL,
    Decoded,
    UnusableImageError,
    check_size,
    decode_condition,
    decode_image,
    decoded_size,
    smallest_size,
)
from .formats import warn_of_share
from .images import example_name
from .labels import UNLABELLED, list_names
from .pixels import reader_versions
from .skipped import SKIP_REPORT_NAME


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

# Reasons to skip an image, in addition to those of decoding.py.
NO_LABEL, UNLABELLED_REFUSED = "no label", "unlabelled examples are not allowed"
# Bump when `_examine` changes its verdicts: cached results of older versions are then not used.
CHECK_VERSION = 5
NOT_MEASURED = -1  # not None, which would leave the type of the cached column open
# A warning follows if data of 8 bits fill a smaller share of their range, such as masks of 0 and 1. Dark photographs
# fill more.
MIN_SHARE_OF_EIGHT_BITS = 0.05


def check_images(
    dataset: datasets.Dataset,
    resolution: Size,
    min_image_size: Size | None = None,
    allow_unlabelled: bool = True,
    num_proc: int | None = None,
    output_dir: str | os.PathLike | None = None,
    max_names: int = 10,
    id2label: Mapping[int, str] | None = None,
    image_format: ImageFormat | None = None,
    condition_format: ImageFormat | None = None,
    range_argument: str | None = "--value_range",
    condition_range_argument: str = "--condition_value_range",
) -> tuple[datasets.Dataset, dict[str, list[str]]]:
    """
    Decodes every image, and its conditioning image if there is one, and drops those that cannot be used. Their number
    and names are logged.

    `datasets` caches the result next to the dataset, so that a second launch, and the other processes of the first, do
    not decode again. It is computed afresh when the dataset, the limits or the version of a reader change.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`.
        resolution (`int` or `tuple[int, int]`): Training resolution in pixels: of a square, or (height, width).
        min_image_size (`int` or `tuple[int, int]`, *optional*): Images whose shorter side has fewer pixels, or which
            are lower or narrower than (height, width), are dropped. Defaults to half of `resolution`: upsampling by
            more than 2 teaches the model blur.
        allow_unlabelled (`bool`, defaults to True): Keep examples whose label is -1.
        num_proc (`int`, *optional*): Number of processes that decode.
        output_dir (`str` or `os.PathLike`, *optional*): Folder for `skipped_images.txt`, which lists all dropped
            images: one line each with reason, name and details, separated by tabs. Pass it on the main process only. A
            report of an earlier launch is replaced, or removed if nothing is dropped now.
        max_names (`int`, defaults to 10): Names to log for each reason.
        id2label (mapping, *optional*): Names of the classes, for the warning about classes that lose all images.
        image_format (`ImageFormat`, *optional*): The format of the images, from `find_image_format`; images of other
            channels or values are dropped, too. None: 8-bit RGB, which any file of 8 bits, or grey of 16, becomes.
        condition_format (`ImageFormat`, *optional*): The same for the conditioning images.
        range_argument (`str`, *optional*, defaults to "--value_range"), condition_range_argument (`str`, defaults to
            "--condition_value_range"): The arguments that a warning recommends for 8-bit data of few values. None: no
            warning of the images.

    Returns:
        `tuple` of the dataset without these images, and the names of the dropped ones by reason. A name is the path of
        a file, or the row in the source (with the path stored there, if any).

    Raises:
        ValueError: If no image is left.
    """
    smallest = smallest_size(resolution, min_image_size)
    verdicts = dataset.map(
        _examine,
        remove_columns=dataset.column_names,
        fn_kwargs={
            "smallest": smallest,
            "image_format": image_format,
            "condition_format": condition_format,
            "allow_unlabelled": allow_unlabelled,
            "version": (CHECK_VERSION, *reader_versions()),
        },
        num_proc=num_proc,
        desc="Checking images",
    )
    reasons = verdicts["reason"][:]
    skipped: dict[str, list[str]] = {}
    lines, first_skipped = [], ""
    for index, (reason, details) in enumerate(zip(reasons, verdicts["details"][:], strict=True)):
        if reason:
            name = example_name(dataset[index], index)
            skipped.setdefault(reason, []).append(name)
            lines.append(f"{reason}\t{name}\t{details}\n")
            first_skipped = first_skipped or f"{name} ({reason}: {details})"
    counts = ", ".join(f"{len(names)} {reason}" for reason, names in skipped.items())
    if output_dir is not None:
        report = Path(output_dir) / SKIP_REPORT_NAME
        report.unlink(missing_ok=True)
        if lines:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("".join(lines), encoding="utf-8")
    if len(lines) == len(dataset):
        limit = (
            f" `min_image_size` is {describe_resolution(smallest)} for a resolution of "
            f"{describe_resolution(resolution)}."
        )
        raise ValueError(
            f"None of the {len(dataset)} images can be used: {counts}. The first is {first_skipped}."
            + limit * (TOO_SMALL in skipped)
        )

    if lines:
        logger.warning(f"{len(lines)} of {len(dataset)} images are left out: {counts}.")
        for reason, names in skipped.items():
            logger.warning(f"  {reason}: {list_names(names, max_names, str)}")
        if output_dir is not None:
            logger.warning(f"All names are in {report}.")
    if "label" in dataset.column_names:
        _warn_of_labels(dataset["label"][:], reasons, id2label or {}, max_names)
    if range_argument is not None:
        _warn_of_few_values(verdicts["low"][:], verdicts["high"][:], range_argument, "images")
    lows, highs = verdicts["condition_low"][:], verdicts["condition_high"][:]
    have_few = _warn_of_few_values(lows, highs, condition_range_argument, "conditioning images")
    num_dark = highs.count(1)
    if num_dark and not have_few:
        logger.warning(
            f"{num_dark} of {len(dataset)} images in `conditioning_image_column` hold no 8-bit value above 1: they are "
            "almost black, since white is 255. If 1 means white in them, save them with 0 and 255."
        )
    if lines:
        dataset = dataset.select([index for index, reason in enumerate(reasons) if not reason])
    return dataset, skipped


def keep_labelled(dataset: datasets.Dataset) -> datasets.Dataset:
    """The examples with a label, without decoding; their number is logged if there are others."""
    if "label" not in dataset.column_names:
        return dataset
    kept = [index for index, label in enumerate(dataset["label"][:]) if label != UNLABELLED]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        raise ValueError(f"None of the {len(dataset)} images has a label. Name another `label_column`.")
    logger.warning(f"{len(dataset) - len(kept)} of {len(dataset)} images have no label and are left out.")
    return dataset.select(kept)


def _examine(
    example: dict[str, Any],
    smallest: tuple[int, int],
    image_format: ImageFormat | None,
    condition_format: ImageFormat | None,
    allow_unlabelled: bool,
    version: tuple,
) -> dict[str, Any]:
    """Returns the verdict on one example; `version` is only a part of the cache's key."""
    reason, details = "", ""
    extremes = dict.fromkeys(("low", "high", "condition_low", "condition_high"), NOT_MEASURED)
    try:
        image = decode_image(example["image"], image_format)
        width, height = decoded_size(image)
        extremes["low"], extremes["high"] = _extremes(image, image_format)
        if "conditioning_image" in example:
            condition = decode_condition(example["conditioning_image"], (width, height), condition_format)
            extremes["condition_low"], extremes["condition_high"] = _extremes(condition, condition_format)
        check_size(image, smallest)
    except UnusableImageError as error:
        reason, details = error.reason, str(error)
    else:
        if not allow_unlabelled and example.get("label") == UNLABELLED:
            reason, details = NO_LABEL, UNLABELLED_REFUSED
    return {"reason": reason, "details": details, **extremes}


def _extremes(image: Decoded, image_format: ImageFormat | None) -> tuple[int, int]:
    """The lowest and the highest value of an image of 8 bits, apart from its alpha; other formats: NOT_MEASURED."""
    image_format = image_format or ImageFormat()
    if image_format.value_range != (0, 255) or image_format.num_levels != 256:
        return NOT_MEASURED, NOT_MEASURED
    values = np.asarray(image)
    values = values[..., :-1] if image_format.mode in ("LA", "RGBA") else values
    return int(values.min()), int(values.max())


def _warn_of_labels(labels: list[int], reasons: list[str], id2label: Mapping[int, str], max_names: int) -> None:
    """Warns of unlabelled images that are kept, and of classes that lose all images."""
    kept = [label for label, reason in zip(labels, reasons, strict=True) if not reason]
    if UNLABELLED in kept:
        logger.warning(f"{kept.count(UNLABELLED)} of the remaining images have no label and stay unlabelled.")
    lost = sorted(set(labels) - set(kept) - {UNLABELLED})
    if lost:
        names = list_names([id2label.get(label, label) for label in lost], max_names, str)
        logger.warning(f"No image is left of these classes, so they are not trained: {names}.")


def _warn_of_few_values(lows: list[int], highs: list[int], argument: str, images: str) -> bool:
    """Warns of 8-bit data that fill a small share of their range. Images of one value have no range."""
    low = min((value for value in lows if value != NOT_MEASURED), default=0)
    high = max(highs)
    return high > low and warn_of_share(low, high, (0, 255), MIN_SHARE_OF_EIGHT_BITS, argument, images)


def check_batch_fits(num_examples: int, train_batch_size: int, num_processes: int = 1) -> None:
    """Checks that each process can fill a batch: a loader that drops incomplete batches would otherwise be empty."""
    if num_examples < train_batch_size * num_processes:
        raise ValueError(
            f"There are {num_examples} usable images, but one step takes {train_batch_size * num_processes} "
            f"(`train_batch_size` {train_batch_size}, number of processes {num_processes}). Lower `train_batch_size` "
            f"to at most {num_examples // num_processes}, or add images."
        )
