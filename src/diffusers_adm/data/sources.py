"""Where a dataset comes from: the Hub, a folder of images, or parquet files."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .folders import load_image_folder


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses must be importable without it.
    import datasets


def load_source(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> tuple[datasets.Dataset, str]:
    """
    Loads the dataset as it is, from exactly one of `dataset_name`, `train_data_dir` and `data_files`. Arguments and
    errors are those of [`load_image_dataset`].

    Returns:
        `tuple` of the dataset and the name of its source, for error messages.
    """
    sources = {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "data_files": data_files}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"Got {' and '.join(f'`{name}`' for name in given) or 'no data source'}. Pass exactly one of "
            f"{', '.join(f'`{name}`' for name in sources)}."
        )
    if dataset_config_name is not None and dataset_name is None:
        raise ValueError(f"`dataset_config_name` ({dataset_config_name!r}) only applies to `dataset_name`. Drop it.")
    if dataset_name:
        return _load_hub_dataset(dataset_name, dataset_config_name, split, cache_dir), dataset_name
    if train_data_dir:
        return load_image_folder(train_data_dir, split, label_column, caption_column, cache_dir), train_data_dir
    files = [data_files] if isinstance(data_files, str) else list(data_files or ())
    return _load_parquet_files(files, split, cache_dir), ", ".join(files)


def _load_hub_dataset(name: str, config_name: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"`dataset_name` is {name!r}, which cannot be found: {error}") from error
    except ValueError as error:
        raise _about_split(error, split) from error


def _about_split(error: ValueError, split: str) -> ValueError:
    """A sentence for the error of `datasets` about an unknown split; other errors as they are."""
    if not str(error).startswith("Unknown split"):
        return error
    return ValueError(f"The data have no split {split!r}. {str(error).partition('. ')[2]}")


def _load_parquet_files(files: Sequence[str], split: str, cache_dir: str | None) -> datasets.Dataset:
    import datasets
    import pyarrow

    # A name with brackets is a pattern to `datasets`, even if a file has exactly that name.
    patterns = [glob.escape(file) if os.path.isfile(file) else file for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={"train": patterns}, split=split, cache_dir=cache_dir)
    except (FileNotFoundError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        for file in filter(os.path.isfile, files):
            if _has_no_rows(file):
                raise ValueError(f"{file} has no rows. Name parquet files with examples.") from error
        hint = ""
        if any(file.lower().endswith((".tar", ".tar.gz", ".tgz")) for file in files):
            hint = " Tars are read with `--streaming` only."
        reason = str(error.__cause__ or error).rstrip(".")
        raise ValueError(f"`data_files` cannot be read as parquet: {reason}.{hint}") from error
    except ValueError as error:
        raise _about_split(error, split) from error


def _has_no_rows(file: str) -> bool:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows == 0
    except pyarrow.ArrowException:
        return False
