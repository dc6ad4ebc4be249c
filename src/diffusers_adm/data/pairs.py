"""Pairs of images: joins target images with their source images from elsewhere, or makes the latter from the former."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from ..conditioning.made_sources import SourceKind, make_source
from .columns import check_column, load_image_dataset
from .folders import split_folder
from .images import ImageDataset
from .labels import list_names
from .seeding import derive_seed
from .sources import load_source


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

MAX_NAMES = 3
Key = str | tuple[Any, ...]


def pair_images(
    images: datasets.Dataset,
    target: dict[str, Any],
    source: dict[str, Any],
    pair_columns: Sequence[str] | None = None,
) -> datasets.Dataset:
    r"""
    Adds the column `conditioning_image` with the source image of each target image.

    Images belong together that have the same values in `pair_columns` or, without these, the same file name: the path
    below the folder (of parquet files, the path that is stored with an image), without its extension. Images without a
    partner are left out, with their number and the first names in a warning. Several targets may have one source.

    Args:
        images (`datasets.Dataset`): The targets, from `load_image_dataset(**target)`.
        target, source (`dict`): Arguments of `load_image_dataset` for the source of each.
        pair_columns (sequence of `str`, *optional*): Columns that both have.

    Raises:
        ValueError: If two source images have the same key, a key is missing, or no image has a partner.
    """
    import datasets

    sources, _ = load_image_dataset(**source)
    (target_keys, target_name), (source_keys, source_name) = (
        _keys(dataset, arguments, pair_columns) for dataset, arguments in ((images, target), (sources, source))
    )
    places: dict[Key, int] = {}
    repeated: dict[Key, None] = {}
    for place, key in enumerate(source_keys):
        if key in places:
            repeated[key] = None
        places.setdefault(key, place)
    what = "file names" if pair_columns is None else f"`pair_column` {' and '.join(pair_columns)}"
    if repeated:
        raise ValueError(
            f"The {what} of {source_name} are not unique: several source images have {_list_keys(repeated)}. Name "
            "`pair_column`s that tell them apart, or remove the others."
        )
    kept = [index for index, key in enumerate(target_keys) if key in places]
    if not kept:
        raise ValueError(
            f"None of the {len(target_keys)} target images has a source image: the {what} of {target_name} are "
            f"{_list_keys(target_keys)}, and those of {source_name} {_list_keys(source_keys)}."
        )
    known = set(target_keys)
    for keys, partners, name, kind in (
        (target_keys, places, target_name, "target"),
        (source_keys, known, source_name, "source"),
    ):
        unpaired = [key for key in keys if key not in partners]
        if unpaired:
            logger.warning(
                f"{len(unpaired)} of {len(keys)} {kind} images in {name} have no partner and are left out: "
                f"{_list_keys(unpaired)}"
            )
    partners_of = sources.select([places[target_keys[index]] for index in kept]).select_columns("image")
    if len(kept) < len(images):
        images = images.select(kept)
    return datasets.concatenate_datasets([images, partners_of.rename_column("image", "conditioning_image")], axis=1)


def _keys(
    images: datasets.Dataset, arguments: dict[str, Any], pair_columns: Sequence[str] | None
) -> tuple[list[Key], str]:
    """The key of each image, and the name of its source."""
    folder = arguments.get("train_data_dir")
    if pair_columns is None:
        root = split_folder(folder, arguments.get("split", "train")) if folder else None
        paths = _stored_paths(images)
        missing = sum(path is None for path in paths)
        name = folder or arguments.get("dataset_name") or ", ".join(arguments["data_files"])
        if missing:
            raise ValueError(
                f"{missing} of {len(paths)} images of {name} have no file name to be paired by. Pass `pair_column`."
            )
        if root is not None:
            paths = [os.path.relpath(path, os.path.abspath(root)) for path in paths]
        return [PurePath(path).with_suffix("").as_posix() for path in paths], name
    names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split", "cache_dir")
    dataset, name = load_source(**{argument: arguments[argument] for argument in names if argument in arguments})
    for column in pair_columns:
        check_column(dataset, name, "pair_column", column)
    columns = dataset.select_columns(list(pair_columns)).with_format("arrow")[:]
    rows = images["row"][:]
    values = [columns.column(column).to_pylist() for column in pair_columns]
    keys: list[Key] = [tuple(column[row] for column in values) for row in rows]
    empty = [row for row, key in zip(rows, keys, strict=True) if None in key]
    if empty:
        raise ValueError(
            f"{len(empty)} rows of {name} have no value in `pair_column` {' and '.join(pair_columns)}, the first is "
            f"row {empty[0]}. Fill them in, or leave these rows out."
        )
    return keys, name


def _stored_paths(images: datasets.Dataset) -> list[str | None]:
    """The path of each image, without its bytes; `None` for arrays."""
    import pyarrow
    import pyarrow.compute

    paths: list[str | None] = []
    for batch in images.select_columns("image").with_format("arrow").iter(1000):
        column = batch.column("image")
        is_file = pyarrow.types.is_struct(column.type)
        paths += pyarrow.compute.struct_field(column, "path").to_pylist() if is_file else [None] * len(column)
    return paths


def _list_keys(keys: Any) -> str:
    return list_names([" ".join(map(str, key)) if isinstance(key, tuple) else key for key in keys], MAX_NAMES)


class MadeSourceDataset(ImageDataset):
    """
    Examples whose `conditions`, the source images, are made from their images; with "noise", new noise in each epoch.

    Args:
        source (`str`): See `make_source`.
        args, kwargs: Arguments of [`ImageDataset`].
    """

    def __init__(self, *args: Any, source: SourceKind, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.source = source

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        example = super().__getitem__(index)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "source", self.epoch, index))
        fractions = (example["images"] / 2 + 0.5).clamp(0, 1)
        return {**example, "conditions": make_source(fractions, self.source, self.image_format, generator)}
