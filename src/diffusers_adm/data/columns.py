"""The examples of a dataset: which columns hold images, labels, captions and tensors, under names of our own."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import number_labels
from .seeding import derive_seed
from .sources import load_source


if TYPE_CHECKING:
    import datasets
    import pyarrow


logger = logging.getLogger(__name__)

ENCODING_BATCH_SIZE = 100  # arrays


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
    caption_column: str | None = None,
    conditioning_image_column: str | None = None,
    tensor_columns: Mapping[str, str] | None = None,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """
    Loads images, and labels, captions, conditioning images and tensors if named, from exactly one of `dataset_name`,
    `train_data_dir` and `data_files`.

    Safe inside `accelerator.main_process_first()`: the other processes find the result of the first in the cache.

    Args:
        dataset_name (`str`, *optional*): A dataset on the Hub, or the path of a local copy of one.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str`, *optional*): A folder of images, searched at every depth. The column `label` is the name
            of the folder that holds the image; images directly in `train_data_dir` are unlabelled. Hidden files, and
            folders whose name starts with `__`, are skipped. If all its folders are named like splits (train, test,
            ...), only `train_data_dir/<split>` is read. Captions next to the images (`cat.txt` for `cat.png`) are the
            column `text`, if `caption_column` names it. A folder with a `metadata.csv`, `.jsonl` or `.parquet` is read
            by `datasets`' `imagefolder`: it has the images that this file lists, and the file's columns.
        data_files (`str` or sequence of `str`, *optional*): Parquet files: paths, patterns or URLs.
        split (`str`, defaults to "train"): The split to train on; slices such as `train[:10%]` work except for a
            folder.
        image_column (`str`, defaults to "image"): Images, encoded images, paths of images, or arrays (nested lists,
            `Array2D` or `Array3D`): `(height, width)` or `(height, width, channels)`.
        label_column (`str`, *optional*): Class names, integers or text. None loads no labels.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.
        max_train_samples (`int`, *optional*): Keep a random subset of that size, in order; the classes stay those of
            the whole dataset.
        seed (`int`, defaults to 0): Selects the subset.
        caption_column (`str`, *optional*): Text, or lists of texts of which each epoch draws one. None loads no
            captions.
        conditioning_image_column (`str`, *optional*): Conditioning images for a ControlNet, stored like those of
            `image_column`. None loads none.
        tensor_columns (mapping, *optional*): Further columns of numbers, as name in the examples -> name of the column,
            e.g. `{"image_embeds": "clip_embeds"}`.

    Returns:
        `tuple` of the dataset and `id2label`. The dataset has the columns `image` (not decoded: a dict of `bytes` and
        `path`; arrays are the bytes of a `.npy` file, which keeps their type), `row` (the index in the source) and,
        with `label_column`, `label`: an int64 in `[0, len(id2label))`, or -1 for an example without a label (None, NaN,
        -1 or empty text); with `caption_column`, `caption`: text, "" for a missing one, or a list of texts, empty for
        missing ones; with `conditioning_image_column`, `conditioning_image`, not decoded; and those of
        `tensor_columns`. `id2label` (`dict[int, str]`) is None without `label_column`. Class names keep their ids;
        integers and text get ids in sorted order.

    Raises:
        ValueError: If not exactly one source is given, it does not exist or is empty, the split or a column is missing,
            or a column has the wrong type.
    """
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"`max_train_samples` is {max_train_samples}. Pass at least 1, or None for all examples.")
    dataset, source = load_source(
        dataset_name, dataset_config_name, train_data_dir, data_files, split, cache_dir, label_column, caption_column
    )
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "caption_column": caption_column,
        "conditioning_image_column": conditioning_image_column,
    } | {f"tensor_columns[{name!r}]": column for name, column in (tensor_columns or {}).items()}
    columns = {argument: column for argument, column in columns.items() if column is not None}
    for argument, column in columns.items():
        check_column(dataset, source, argument, column)
        for other in ("image_column", "conditioning_image_column"):
            if argument != other and column == columns.get(other):
                raise ValueError(f"`{argument}` and `{other}` are both {column!r}. Name two columns.")

    names = {image_column: "image"}
    if conditioning_image_column is not None:
        names[conditioning_image_column] = "conditioning_image"
    tensor_names = {column: name for name, column in (tensor_columns or {}).items()}
    images = dataset.select_columns([*names, *tensor_names]).rename_columns(names | tensor_names)
    for column, name in names.items():
        images = cast_to_images(images, name, f"`{name}_column` {column!r} of {source}")
    images = images.add_column("row", np.arange(len(images)))
    id2label = None
    if label_column is not None:
        images, id2label = add_labels(images, dataset, label_column)
    if caption_column is not None:
        images = add_captions(images, dataset, source, caption_column)
    return choose_samples(images, max_train_samples, seed), id2label


def add_labels(
    images: datasets.Dataset, dataset: datasets.Dataset, label_column: str
) -> tuple[datasets.Dataset, dict[int, str]]:
    """Adds the column `label` of the numbers of the labels of `dataset`, and returns their names, too."""
    class_names = getattr(dataset.features[label_column], "names", None)
    labels, id2label = number_labels(_values(dataset, label_column), class_names, label_column)
    return images.add_column("label", np.array(labels, dtype=np.int64)), id2label


def choose_samples(images: datasets.Dataset, max_train_samples: int | None, seed: int) -> datasets.Dataset:
    """A random subset of `max_train_samples` examples, in order; `None`: all of them."""
    if max_train_samples is not None and max_train_samples < len(images):
        chosen = random.Random(derive_seed(seed, "max_train_samples")).sample(range(len(images)), max_train_samples)
        return images.select(sorted(chosen))
    if max_train_samples is not None and max_train_samples > len(images):
        logger.info(f"`max_train_samples` is {max_train_samples}, but there are {len(images)} images: all are taken.")
    return images


def check_column(dataset: datasets.Dataset, source: str, argument: str, column: str) -> None:
    """Checks that the dataset called `source` has the column that `argument` names; raises a `ValueError` otherwise."""
    if column not in dataset.column_names:
        raise ValueError(
            f"`{argument}` is {column!r}, but {source} has the columns {', '.join(dataset.column_names)}. Pass one of "
            "them."
        )


def add_captions(
    images: datasets.Dataset, dataset: datasets.Dataset, source: str, caption_column: str
) -> datasets.Dataset:
    """Adds the column `caption` with the captions of `dataset`, as `read_captions` reads them."""
    import datasets

    captions = read_captions(dataset, source, caption_column)
    # The type of lists is not left to a guess from the first ones, which may be empty.
    feature = None if isinstance(captions[0], str) else datasets.List(datasets.Value("string"))
    return images.add_column("caption", captions, feature=feature)


def read_captions(dataset: datasets.Dataset, source: str, caption_column: str) -> list[str] | list[list[str]]:
    """
    Reads a column of text, or of lists of texts. Missing captions (None) become "", in a column of lists an empty list;
    missing texts in a list are left out. Both are counted in warnings.

    Raises:
        ValueError: If there is no such column, or it holds neither text nor lists of texts.
    """
    import datasets

    check_column(dataset, source, "caption_column", caption_column)
    feature = dataset.features[caption_column]
    holds_lists = isinstance(feature, (datasets.List, datasets.LargeList))
    text = feature.feature if holds_lists else feature
    if not isinstance(text, datasets.Value) or text.dtype not in ("string", "large_string", "null"):
        raise ValueError(
            f"`caption_column` {caption_column!r} of {source} is of type {feature}, which is not text. Name a column "
            "that holds one caption, or a list of captions, per image."
        )
    captions = _values(dataset, caption_column)
    if holds_lists:
        given = sum(len(texts or ()) for texts in captions)
        captions = [[text for text in texts or () if text] for texts in captions]
        kept = sum(map(len, captions))
        if 0 < kept < given:
            logger.warning(f"{given - kept} of {given} texts in the lists of captions are missing and are left out.")
    missing = sum(not caption for caption in captions)
    if missing == len(captions):
        raise ValueError(f"`caption_column` {caption_column!r} of {source} holds no caption at all. Leave it out.")
    if missing:
        logger.warning(f"{missing} of {len(captions)} captions are missing and count as empty.")
    return captions if holds_lists else [caption or "" for caption in captions]


def first_caption(caption: str | Sequence[str]) -> str:
    """The caption of an example where only one is used, as in validation: of a list, the first one; "" if empty."""
    if isinstance(caption, str):
        return caption
    return caption[0] if caption else ""


def _values(dataset: datasets.Dataset, column: str) -> list:
    return dataset.select_columns(column).with_format("arrow")[:].column(column).to_pylist()


def cast_to_images(dataset: datasets.Dataset, column: str, description: str) -> datasets.Dataset:
    import datasets
    import pyarrow

    if _holds_arrays(dataset.features[column]):
        return (
            dataset.with_format("arrow")
            .map(
                _encode_arrays,
                with_indices=True,
                batched=True,
                batch_size=ENCODING_BATCH_SIZE,
                fn_kwargs={"column": column, "description": description},
                features=datasets.Features({**dataset.features, column: datasets.Image(decode=False)}),
                desc="Reading arrays",
            )
            .with_format(None)
        )
    feature = dataset.features[column]
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        paths = [path for path in _values(dataset, column) if path]
        if paths and not any(map(os.path.isfile, paths)):
            raise ValueError(
                f"{description} holds text that is no path of a file, such as {paths[0]!r}. Name a column of images, "
                "or of paths of files that exist."
            )
    try:
        if isinstance(feature, (datasets.List, datasets.LargeList)):  # which `datasets` would take for a row of pixels
            raise TypeError("a list of another kind")
        return dataset.cast_column(column, datasets.Image(decode=False))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{description} is of type {feature}, which cannot hold images, encoded images, paths of images or arrays "
            "(2 or 3 nested lists of numbers). Pass the name of a column that does."
        ) from error


def _holds_arrays(feature: Any) -> bool:
    import datasets

    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return True
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    numbers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))
    return depth in (2, 3) and numbers


def _encode_arrays(batch: pyarrow.Table, indices: Sequence[int], column: str, description: str) -> pyarrow.Table:
    """Replaces the arrays of a column by the bytes of `.npy` files: lists would lose their type, and are slow."""
    import pyarrow

    values = batch.column(column).combine_chunks()
    if isinstance(values, pyarrow.ExtensionArray):
        values = values.storage
    rows = []
    for index, row in zip(indices, values, strict=True):
        file = BytesIO()
        if row.is_valid:
            np.save(file, _to_array(row, f"Row {index} of {description}"), allow_pickle=False)
        rows.append({"bytes": file.getvalue(), "path": None} if row.is_valid else None)
    position = batch.column_names.index(column)
    type_ = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return batch.set_column(position, column, pyarrow.array(rows, type=type_))


def _to_array(row: pyarrow.ListScalar, name: str) -> np.ndarray:
    """Nested lists as an array of their own type."""
    import pyarrow

    values, shape = row.values, [len(row.values)]
    while pyarrow.types.is_nested(values.type):
        lengths = values.value_lengths().unique()
        if values.null_count or len(lengths) > 1:
            raise ValueError(f"{name} holds lists of different lengths, or missing ones. Store arrays with equal rows.")
        shape.append(lengths[0].as_py() if len(lengths) else 0)
        values = values.flatten()
    if values.null_count:
        raise ValueError(f"{name} holds {values.null_count} missing values (null). Replace them.")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
