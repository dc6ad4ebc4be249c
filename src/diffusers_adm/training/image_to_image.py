"""Image to image translation in training: arguments, pairs of images, and validation with measures of the result."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..commands.arguments import arg
from ..conditioning.image_format import ImageFormat, ImageMode
from ..conditioning.made_sources import SourceKind, source_format_of
from ..conditioning.previews import describe_preview, preview
from ..data.formats import FormatRequest, find_image_format, parse_value_range, range_word
from ..data.images import ImageDataset
from ..data.pairs import MadeSourceDataset, pair_images
from .arguments import (
    APPLIED,
    FREE,
    PROCESS,
    DiffusionTrainingArguments,
    HeldOutDataArguments,
    check_needs,
    check_share,
)
from .disk import write_whole
from .image_measures import measure
from .validation import Example, generate_samples, strips_of_two_formats, to_pipeline


if TYPE_CHECKING:
    import datasets  # of the `train` extra

    from .run import TrainingRun

MEASURES_NAME = "image_to_image.json"


# 1. Arguments


@dataclass
class ImageToImageArguments:
    """The source images of train_image_to_image.py; the images of the data arguments are the targets."""

    source: SourceKind | None = arg(None, "Kind of source image to make from each target image.", resume=PROCESS)
    source_column: str | None = arg(
        None,
        "Column of the source images: of the data, or of `source_data_files` (none: `image_column`).",
        resume=PROCESS,
    )
    source_data_dir: str | None = arg(
        None, "Folder of source images with the file names of the target images.", resume=PROCESS
    )
    source_data_files: list[str] | None = arg(None, "Parquet files of source images.", resume=PROCESS)
    pair_column: list[str] | None = arg(
        None,
        "Columns whose values source and target have in common; none: their file names, without the extension.",
        resume=PROCESS,
    )
    source_mode: ImageMode | None = arg(
        None,
        "Meaning of the channels of source images of pairs, as `image_mode` of the targets; none: by the numbers of "
        "channels of U-Net and data.",
        resume=PROCESS,
    )
    source_value_range: list[float | str] | None = arg(
        None,
        "Values of the source images of pairs for -1 and 1, LOW HIGH, or auto; none: those of the pretrained model, or "
        "the whole range of the integer type.",
        resume=PROCESS,
        parse=range_word,
    )
    source_dropout_prob: float = arg(
        0.1, "Share of the source images replaced by mid-grey ones, for classifier-free guidance.", resume=APPLIED
    )
    validation_source_data_files: list[str] | None = arg(
        None,
        "Parquet files of the source images of `validation_data_files`, with `source_data_files`.",
        resume=FREE,
    )

    def __post_init__(self) -> None:
        elsewhere = {"source_data_dir": self.source_data_dir, "source_data_files": self.source_data_files}
        ways = {"source": self.source, **elsewhere}
        given = [name for name, value in ways.items() if value]
        if self.source_column is not None and given != ["source_data_files"]:
            given.append("source_column")
        if len(given) != 1:
            raise ValueError(
                f"Got {' and '.join(f'`{name}`' for name in given) or 'no source images'}. Pass exactly one of "
                "`source` (made from the target images), `source_column`, `source_data_dir` and `source_data_files`."
            )
        if self.pair_column and not any(elsewhere.values()):
            raise ValueError("`pair_column` needs `source_data_files` or `source_data_dir`. Pass both, or neither.")
        check_needs(self, "source_data_files", "validation_source_data_files")
        check_share(self, "source_dropout_prob")
        parse_value_range("source_value_range", self.source_value_range)
        if self.source is not None and (self.source_mode or self.source_value_range):
            raise ValueError(
                f"`source_mode` and `source_value_range` are for pairs of images, but `source` is {self.source}. Leave "
                "them out."
            )

    def check(self, data_args: HeldOutDataArguments) -> None:
        """Raises a `ValueError` for held-out images without source images, or the other way round."""
        is_held_out = data_args.validation_source() is not None
        if self.validation_source_data_files and not data_args.validation_data_files:
            raise ValueError(
                "`validation_source_data_files` was given without `validation_data_files`. Pass both, or neither."
            )
        if self.source_data_dir and is_held_out:
            raise ValueError("`validation_data_files` does not go with `source_data_dir`. Use parquet files for both.")
        if (
            self.source_data_files
            and data_args.validation_source() is not None
            and not self.validation_source_data_files
        ):
            raise ValueError("`validation_data_files` needs `validation_source_data_files`. Pass both, or neither.")

    @property
    def column(self) -> str | None:
        """The column of the targets' data that holds the source images."""
        return None if self.source_data_files else self.source_column

    def describe(self) -> str:
        """The source images in words."""
        files = ", ".join(self.source_data_files or [])
        return self.source or self.source_data_dir or files or str(self.source_column)

    def pair(
        self, images: datasets.Dataset, target: Mapping[str, Any], files: Sequence[str] | None = None
    ) -> datasets.Dataset:
        """
        Joins target images, loaded with the arguments `target`, with source images from elsewhere: those of `files`, or
        of the arguments. Targets that have a column for them, or that they are made from, stay as they are.
        """
        files = files or self.source_data_files
        if not files and not self.source_data_dir:
            return images
        source = {"data_files": files, "train_data_dir": None if files else self.source_data_dir}
        source["image_column"] = (self.source_column or target["image_column"]) if files else "image"
        return pair_images(images, dict(target), source | {"cache_dir": target["cache_dir"]}, self.pair_column)

    def find_source_format(
        self,
        images: datasets.Dataset,
        image_format: ImageFormat,
        channels: int | None,
        known: Mapping[str, Any] | None,
        num_proc: int | None,
    ) -> ImageFormat:
        """
        The format of the source images; a `ValueError` for one that the U-Net does not take.

        Args:
            images (`datasets.Dataset`): After `pair`.
            image_format (`ImageFormat`): Of the targets.
            channels (`int`, *optional*): Number of channels that the U-Net has for them; `None` or 0: any.
            known (mapping, *optional*): The `source_format` in the config of a pretrained pipeline.
            num_proc (`int`, *optional*): Number of processes that examine the images.
        """
        if self.source is not None:
            found = source_format_of(self.source, image_format)
        else:
            try:
                recorded = ImageFormat.from_config(known, channels, "source_format") if known and channels else None
                value_range = parse_value_range("source_value_range", self.source_value_range)
                request = FormatRequest(
                    channels or None,
                    self.source_mode,
                    value_range,
                    recorded,
                    mode_argument="--source_mode",
                    range_argument="--source_value_range",
                )
                found = find_image_format(images, request, num_proc=num_proc, column="conditioning_image")
            except ValueError as error:
                raise ValueError(f"Source images: {error}") from error
        if channels and found.channels != channels:
            raise ValueError(
                f"The U-Net takes {channels} channels in addition to those of the targets, but the source images "
                f"({self.describe()}) have {found.channels}. Change `in_channels` in its config, or the source images."
            )
        return found

    def dataset_class(self) -> Any:
        """The class of the datasets, with the made source images if there are some."""
        return functools.partial(MadeSourceDataset, source=self.source) if self.source else ImageDataset


@contextlib.contextmanager
def source_column_in_errors() -> Iterator[None]:
    """Calls the column of the source images in errors as the arguments of the script do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("conditioning_image_column", "source_column")) from error


# 2. Validation


def source_arguments(example: Example, source_format: ImageFormat) -> dict[str, Any]:
    """The arguments of a pipeline for an example: its source image, and what it is told."""
    tensors, given = example
    return {"image": to_pipeline(2 * tensors["conditions"] - 1, source_format), **given}


def translate_examples(
    pipeline: DiffusionPipeline, examples: Sequence[Example], training_args: DiffusionTrainingArguments
) -> tuple[Image.Image, dict[str, float]]:
    """Input | sample | target of each example, and the measures of the samples (see `image_measures.measure`)."""
    image_format, source_format = pipeline.image_format, pipeline.source_format
    targets, sources = (torch.stack([tensors[name] for tensors, _ in examples]) for name in ("images", "conditions"))
    sources = 2 * sources - 1
    wanted = [source_arguments(example, source_format) for example in examples]
    samples = generate_samples(pipeline, wanted, training_args)
    low, high = image_format.value_range
    measures = measure(image_format.to_values(samples), image_format.to_values(targets), high - low)
    channels = training_args.preview_channels
    columns = {
        "input": preview(sources, source_format),
        "sample": preview(samples, image_format, channels),
        "target": preview(targets, image_format, channels),
    }
    notes = {"input": describe_preview(source_format), "images": describe_preview(image_format, channels)}
    return strips_of_two_formats(columns, notes), measures


def translation_measures(examples: Sequence[Example], image_format: ImageFormat) -> list[str]:
    """The names of what `translate_examples` measures, as in the log, for `keep_best`."""
    targets = image_format.to_values(torch.stack([tensors["images"] for tensors, _ in examples]))
    low, high = image_format.value_range
    return [f"validation_{name}" for name in measure(targets, targets, high - low)]


def record_measures(
    run: TrainingRun,
    training_args: DiffusionTrainingArguments,
    measures: Mapping[str, float],
    num_images: int,
    held_out: bool,
) -> None:
    """
    Writes the measures of a validation, of that many held-out or training images, to the log and, for the model card,
    to the folder of the run.
    """
    step = run.progress.global_step
    run.log.write_validation(step, measures)
    values = {**measures, "num_images": num_images, "held_out": held_out, "step": step}
    values["num_inference_steps"] = training_args.validation_num_inference_steps
    path = Path(training_args.output_dir, MEASURES_NAME)
    write_whole(path, json.dumps(values, indent=2) + "\n")
    described = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    images = f"{num_images} {'held-out' if held_out else 'training'} images"
    run.logger.info(f"Validation at step {step} on {images}: {described}")
