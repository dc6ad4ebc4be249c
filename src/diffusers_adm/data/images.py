"""
Images, labels and captions for the training scripts: where they come from, which are usable, and how one becomes a
tensor. (How captions become numbers is in captions.py.)

Three steps, in this order: `load_image_dataset` finds the images and maps labels to class ids; `check_images` decodes
every image once, before training, and leaves out what cannot be used; `ImageDataset` crops, flips and normalises one
example at a time. Each `ValueError` says what to change, and is raised before any time is spent on training.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .seeding import derive_seed


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses beside this module must be importable without it.
    import datasets

    from .captions import Captions


logger = logging.getLogger(__name__)

UNLABELLED = -1
SKIP_REPORT_NAME = "skipped_images.txt"
# Reasons to leave an image out, as they appear in logs and in the report.
MISSING, UNREADABLE, TOO_LARGE = "missing", "unreadable", "too large (decompression bomb)"
TOO_SMALL, NO_LABEL = "too small", "no label"
NO_CONDITION, MISSHAPEN_CONDITION = "no usable condition", "condition of another aspect ratio"

# The column of captions that lie in a .txt file next to each image, as scripts for other models expect them.
CAPTION_FILES_COLUMN = "text"
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_FOLDERS = ("train", "validation", "valid", "val", "dev", "test", "eval")
# Bump when `_examine` changes its verdicts: cached results of older versions are then not used.
CHECK_VERSION = 3
# A run survives files that vanish one by one; a data folder that vanished is an error, found after this many in a row.
MAX_SUBSTITUTIONS = 100


# 1. Where the images come from


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
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """
    Loads images, and labels, captions and conditioning images if asked for, from exactly one of `dataset_name`,
    `train_data_dir` and `data_files`.

    Safe inside `accelerator.main_process_first()`: what the first process prepares, the others find in the cache.

    Args:
        dataset_name (`str`, *optional*): A dataset on the Hub, or the path of a local copy of one.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str`, *optional*): A folder of images, searched at every depth. The column `label` is the name
            of the folder that holds the image; images directly in `train_data_dir` are unlabelled. Hidden files, and
            folders whose name starts with `__`, are passed over. If all its folders are named like splits (train, test,
            ...), only `train_data_dir/<split>` is read. Captions next to the images (`cat.txt` for `cat.png`) are
            the column `text`, if `caption_column` asks for it. With a `metadata.csv`, `.jsonl` or `.parquet` inside, it
            is read as `datasets`' `imagefolder`, which has the images that this file lists, and its columns.
        data_files (`str` or sequence of `str`, *optional*): Parquet files: paths, patterns or URLs.
        split (`str`, defaults to "train"): The split to train on; slices such as `train[:10%]` work except for a
            folder.
        image_column (`str`, defaults to "image"): Images, encoded images or paths of images.
        label_column (`str`, *optional*): Class names, integers or text. None loads no labels.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it prepares.
        max_train_samples (`int`, *optional*): Keep a random subset of that size, in order; the classes stay those of
            the whole dataset.
        seed (`int`, defaults to 0): Selects the subset.
        caption_column (`str`, *optional*): Text. None loads no captions.
        conditioning_image_column (`str`, *optional*): What a ControlNet is shown of each image; images again, as in
            `image_column`. None loads none.

    Returns:
        `tuple` of the dataset and `id2label`. The dataset has the columns `image` (not decoded: a dict of `bytes` and
        `path`), `row` (the index in the source) and, with `label_column`, `label`: an int64 in `[0, len(id2label))`, or
        -1 for an example without a label (None, NaN, -1 or empty text); with `caption_column`, `caption`: text, "" for
        a missing one; with `conditioning_image_column`, `conditioning_image`, not decoded either. `id2label`
        (`dict[int, str]`) is None without `label_column`. Class names keep their ids; integers and text get ids in
        sorted order.

    Raises:
        ValueError: If not exactly one source is given, it does not exist or is empty, the split or a column is missing,
            or a column cannot hold what it is meant to.
    """
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"`max_train_samples` is {max_train_samples}. Pass at least 1, or None for all examples.")
    dataset, source = load_source(
        dataset_name, dataset_config_name, train_data_dir, data_files, split, cache_dir, label_column, caption_column
    )
    if max_train_samples is not None and max_train_samples > len(dataset):
        logger.info(
            "At most %d images were asked for, and there are %d: all are taken.", max_train_samples, len(dataset)
        )
    dataset, id2label = _standardise_columns(
        dataset, source, image_column, label_column, caption_column, conditioning_image_column
    )
    if max_train_samples is not None and max_train_samples < len(dataset):
        chosen = random.Random(derive_seed(seed, "max_train_samples")).sample(range(len(dataset)), max_train_samples)
        dataset = dataset.select(sorted(chosen))
    return dataset, id2label


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
    The dataset as it is, from exactly one of `dataset_name`, `train_data_dir` and `data_files`, and what error messages
    call it. Arguments and errors are those of [`load_image_dataset`].
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
        return _load_image_folder(train_data_dir, split, label_column, caption_column, cache_dir), train_data_dir
    source = ", ".join([data_files] if isinstance(data_files, str) else data_files)
    return _load_parquet_files(data_files, split, cache_dir), source


def _load_hub_dataset(name: str, config_name: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"`dataset_name` is {name!r}, which cannot be found: {error}") from error


def _load_parquet_files(data_files: str | Sequence[str], split: str, cache_dir: str | None) -> datasets.Dataset:
    import datasets
    import pyarrow

    files = [data_files] if isinstance(data_files, str) else list(data_files)
    for file in files:
        if not file.lower().endswith(".parquet"):
            raise ValueError(
                f"`data_files` holds {file!r}. Only parquet files are read; use `train_data_dir` for images."
            )
        if "://" not in file and not glob.glob(file, recursive=True):
            raise ValueError(f"`data_files` holds {file!r}, and no such file exists. Check the path.")
    # A name with brackets is a pattern to `datasets`, even where a file has just that name.
    patterns = [glob.escape(file) if os.path.isfile(file) else file for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={"train": patterns}, split=split, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        details = error.__cause__ or error
        raise ValueError(f"`data_files` ({', '.join(files)}) cannot be read as parquet: {details}") from error


def _load_image_folder(
    folder: str, split: str, label_column: str | None, caption_column: str | None, cache_dir: str | None
) -> datasets.Dataset:
    # Not `datasets`' imagefolder for plain folders: one image beside the class folders makes it drop all labels, and a
    # class named "train" or "test" makes it take that folder for a split and leave out the others.
    import datasets

    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"`train_data_dir` is {folder!r}, which is not a folder. Check the path.")
    top_folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    if split in top_folders and all(name in SPLIT_FOLDERS for name in top_folders):
        logger.warning("Reading the images in %s; its other folders are named like splits.", root / split)
        for name in METADATA_FILES:
            if (root / name).exists():
                logger.warning("%s next to it is not read. Move it into the folder of the split.", name)
        root = root / split
    elif split != "train":
        raise ValueError(
            f"`split` is {split!r}, but {folder} has no such split. Its folders are "
            f"{', '.join(top_folders) or 'none'}; for a folder of images without splits, use 'train'."
        )

    extensions = {ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN}
    repeated: list[tuple[Path, Path]] = []
    files = list(_walk(root, repeated))
    for folder_again, first in repeated:
        logger.warning(
            "%s is the same folder as %s, by a link: its images are taken once, from there.", folder_again, first
        )
    images = [path for path in files if path.suffix.lower() in extensions]
    metadata = [path for path in files if path.name in METADATA_FILES]
    caption_files: list[Path | None] = [None] * len(images)
    if not metadata:
        texts = {path for path in files if path.suffix.lower() == ".txt"}
        beside = ((path.with_suffix(suffix) for suffix in (".txt", ".TXT")) for path in images)
        caption_files = [next((file for file in candidates if file in texts), None) for candidates in beside]
    used = {*images, *metadata, *caption_files}
    ignored = Counter(path.suffix.lower() or "no extension" for path in files if path not in used)
    other_files = ", ".join(f"{count} x {suffix}" for suffix, count in ignored.most_common(5))
    if not images:
        raise ValueError(f"`train_data_dir` {str(root)!r} holds no images (other files: {other_files or 'none'}).")
    if ignored:
        logger.warning("Files in %s that are not images are passed over: %s.", root, other_files)
    if metadata:
        return _load_folder_with_metadata(root, images, metadata, cache_dir)

    labels = [path.parent.name if path.parent != root else None for path in images]
    if label_column == "label" and not any(labels):
        raise ValueError(
            f"`label_column` is 'label', but all {len(images)} images are directly in {root}. Sort them into one "
            "folder per class, or drop `label_column` to train without labels."
        )
    if label_column == "label":
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
        empty = [path for path in folders if not any(file.suffix.lower() in extensions for file in _walk(path))]
        if empty:
            logger.warning("Folders without images give no class: %s.", _some_names(root, empty))
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    # Tuples, since `datasets` takes lists for shards. The stamps are part of the fingerprint of the dataset, so
    # that `check_images` looks again when a file was replaced.
    columns: dict[str, tuple] = {"paths": tuple(str(path.absolute()) for path in images), "labels": tuple(labels)}
    columns["stamps"] = tuple(map(_stamp, images))
    if any(caption_files):
        _tell_of_caption_files(root, images, caption_files, caption_column)
    if any(caption_files) and caption_column == CAPTION_FILES_COLUMN:
        features[CAPTION_FILES_COLUMN] = datasets.Value("string")
        columns["captions"] = tuple(None if file is None else _read_caption(file) for file in caption_files)
    return datasets.Dataset.from_generator(
        _generate_folder_rows, features=datasets.Features(features), cache_dir=cache_dir, gen_kwargs=columns
    )


def _generate_folder_rows(
    paths: tuple[str], labels: tuple[str | None], stamps: tuple, captions: tuple[str | None] | None = None
) -> Iterator[dict[str, Any]]:
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        row = {"image": {"path": path, "bytes": None}, "label": label}
        yield row if captions is None else {**row, CAPTION_FILES_COLUMN: captions[index]}


def _stamp(path: Path) -> tuple[int, int] | None:
    status = path.stat() if path.exists() else None  # a broken link is reported by `check_images`
    return (status.st_size, status.st_mtime_ns) if status else None


def _read_caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {file} is not UTF-8 text: {error}. Save it as such, or move it away.") from error


def _tell_of_caption_files(
    root: Path, images: Sequence[Path], caption_files: Sequence[Path | None], caption_column: str | None
) -> None:
    number = sum(file is not None for file in caption_files)
    if caption_column != CAPTION_FILES_COLUMN:
        logger.warning(
            "%d of %d images in %s have a .txt file next to them, which is not read. If these are captions, name them "
            "by the `caption_column` `%s`.",
            number,
            len(images),
            root,
            CAPTION_FILES_COLUMN,
        )
    elif number < len(images):
        without = [path for path, file in zip(images, caption_files, strict=True) if file is None]
        logger.warning(
            "%d of %d images in %s have no .txt file next to them: %s",
            len(without),
            len(images),
            root,
            _some_names(root, without),
        )


def _load_folder_with_metadata(
    root: Path, images: Sequence[Path], metadata: Sequence[Path], cache_dir: str | None
) -> datasets.Dataset:
    import datasets
    import pyarrow

    names = _some_names(root, metadata)
    if len({path.suffix for path in metadata}) > 1:
        raise ValueError(f"`train_data_dir` {str(root)!r} holds {names}: keep metadata of one kind only.")
    files = os.path.join(glob.escape(str(root)), "**")  # not `data_dir`, which takes brackets for a pattern
    try:
        dataset = datasets.load_dataset("imagefolder", data_files={"train": files}, split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, ValueError) as error:
        details = error.__cause__ or error
        raise ValueError(f"`train_data_dir` {str(root)!r} cannot be read with its {names}: {details}") from error
    listed = set()
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            rows = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
            listed |= {os.path.abspath(image["path"]) for image in rows[column][:] if image is not None}
    unlisted = [path for path in images if os.path.abspath(path) not in listed]
    if unlisted:
        logger.warning(
            "%d of %d images in %s are not listed in %s and are left out: %s. Add them to it, or remove it to take all "
            "images.",
            len(unlisted),
            len(images),
            root,
            names,
            _some_names(root, unlisted),
        )
    return dataset


def _some_names(root: Path, paths: Sequence[Path], most: int = 10) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(str(path.relative_to(root)) for path in paths[:most]) + more


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .ipynb_checkpoints, ._resource_forks, __MACOSX: also what `datasets` does


def _walk(root: Path, repeated: list[tuple[Path, Path]] | None = None) -> Iterator[Path]:
    """
    All files below `root` in sorted order; links to folders are followed, each folder once. `repeated` gets those that
    are met again, with the name that they were met by first.
    """
    visited: dict[str, Path] = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            if repeated is not None:
                repeated.append((Path(folder), visited[real]))
            subfolders.clear()
            continue
        visited[real] = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        yield from (Path(folder, name) for name in sorted(files) if not _is_hidden(name))


def _standardise_columns(
    dataset: datasets.Dataset,
    source: str,
    image_column: str,
    label_column: str | None,
    caption_column: str | None = None,
    conditioning_image_column: str | None = None,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    check_column(dataset, source, "image_column", image_column)
    if label_column is not None:
        check_column(dataset, source, "label_column", label_column)
    if image_column == label_column:
        raise ValueError(f"`image_column` and `label_column` are both {image_column!r}. Name two columns.")
    captions = None if caption_column is None else read_captions(dataset, source, caption_column)
    ids, id2label = None, None
    if label_column is not None:
        feature = dataset.features[label_column]
        values = dataset.select_columns(label_column).with_format("arrow")[:].column(label_column).to_pylist()
        ids, id2label = _label_ids(values, getattr(feature, "names", None), label_column)

    image_columns = {image_column: ("image_column", "image")}
    if conditioning_image_column is not None:
        check_column(dataset, source, "conditioning_image_column", conditioning_image_column)
        others = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
        for argument, column in others.items():
            if column == conditioning_image_column:
                raise ValueError(f"`{argument}` and `conditioning_image_column` are both {column!r}. Name two columns.")
        image_columns[conditioning_image_column] = ("conditioning_image_column", "conditioning_image")
    images = dataset.select_columns(list(image_columns))
    images = images.rename_columns({column: name for column, (_, name) in image_columns.items()})
    for column, (argument, name) in image_columns.items():
        images = _cast_to_images(images, name, f"`{argument}` {column!r} of {source}")
    images = images.add_column("row", np.arange(len(images)))
    if ids is not None:
        images = images.add_column("label", np.array(ids, dtype=np.int64))
    if captions is not None:
        images = images.add_column("caption", captions)
    return images, id2label


def _cast_to_images(dataset: datasets.Dataset, column: str, description: str) -> datasets.Dataset:
    import datasets
    import pyarrow

    try:
        return dataset.cast_column(column, datasets.Image(decode=False))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{description} is of type {dataset.features[column]}, which cannot hold images, encoded images or paths "
            "of images. Pass the name of a column that does."
        ) from error


def check_column(dataset: datasets.Dataset, source: str, argument: str, column: str) -> None:
    """Raises a `ValueError` if `dataset`, which `source` names, has no column as `argument` says."""
    if column not in dataset.column_names:
        raise ValueError(
            f"`{argument}` is {column!r}, but {source} has the columns {', '.join(dataset.column_names)}. Pass one of "
            "them."
        )


def read_captions(dataset: datasets.Dataset, source: str, caption_column: str) -> list[str]:
    """
    A column of text. Missing captions (None) become "", and are counted in a warning.

    Raises:
        ValueError: If there is no such column, or it does not hold text.
    """
    import datasets

    check_column(dataset, source, "caption_column", caption_column)
    feature = dataset.features[caption_column]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string", "null"):
        raise ValueError(
            f"`caption_column` {caption_column!r} of {source} is of type {feature}, which is not text. Name a column "
            "that holds one caption an image."
        )
    captions = dataset.select_columns(caption_column).with_format("arrow")[:].column(caption_column).to_pylist()
    missing = sum(not caption for caption in captions)
    if missing == len(captions):
        raise ValueError(f"`caption_column` {caption_column!r} of {source} holds no caption at all. Leave it out.")
    if missing:
        logger.warning("%d of %d captions are missing and count as empty.", missing, len(captions))
    return [caption or "" for caption in captions]


def _label_ids(values: Sequence[Any], names: Sequence[str] | None, column: str) -> tuple[list[int], dict[int, str]]:
    """Maps labels to `0 .. K-1`, and what means "none" to -1."""
    absent = [value is None or value == "" or value == -1 or value != value for value in values]  # NaN != NaN
    kinds = {type(value) for value, none in zip(values, absent, strict=True) if not none}
    if not kinds:
        raise ValueError(f"`label_column` {column!r} holds no label at all. Drop it to train without labels.")
    if kinds == {float}:  # integers with gaps, as pandas writes them
        floats = [value for value, none in zip(values, absent, strict=True) if not none]
        if not all(value.is_integer() for value in floats):
            odd = next(value for value in floats if not value.is_integer())
            raise ValueError(f"`label_column` {column!r} holds {odd}, which is no class. Use integers or text.")
        values = [value if none else int(value) for value, none in zip(values, absent, strict=True)]
        kinds = {int}
    if len(kinds) > 1 or not kinds <= {int, bool, str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"`label_column` {column!r} holds {found} values. Class names, integers or text are needed.")
    if names is not None:
        originals, id2label = range(len(names)), dict(enumerate(names))
    else:
        originals = sorted({value for value, none in zip(values, absent, strict=True) if not none})
        id2label = {index: str(value) for index, value in enumerate(originals)}
    to_id = {value: index for index, value in enumerate(originals)}
    unknown = sorted({value for value, none in zip(values, absent, strict=True) if not none} - set(to_id), key=str)
    if unknown:
        raise ValueError(f"`label_column` {column!r} holds {unknown[0]}, but its class names end at {len(to_id) - 1}.")
    return [UNLABELLED if none else to_id[value] for value, none in zip(values, absent, strict=True)], id2label


def renumber_labels(dataset: datasets.Dataset, numbers: Mapping[int, int]) -> datasets.Dataset:
    """
    The dataset with other class numbers in its column `label`.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`.
        numbers (mapping): Old number -> new one; others, such as that of unlabelled examples, stay.
    """
    if all(old == new for old, new in numbers.items()):
        return dataset
    labels = [numbers.get(label, label) for label in dataset["label"][:]]
    return dataset.remove_columns("label").add_column("label", np.array(labels, dtype=np.int64))


# 2. Which images are usable


class UnusableImageError(Exception):
    """An image that cannot be used. `reason` is one of the constants of this module; the message has the details."""

    def __init__(self, reason: str, details: str):
        super().__init__(details)
        self.reason = reason


def decode_rgb(
    image: dict[str, Any] | Image.Image | None, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """
    Decodes an image completely and turns it into 8-bit RGB, the way a viewer would show it.

    The EXIF orientation is applied, an animation gives its first frame, 16-bit grey is scaled (not cut) to 8 bits, and
    transparency of any kind is composited over `background`.

    Args:
        image (`dict` or `PIL.Image.Image`): A dict of `bytes` and `path`, as `datasets` stores images, or an open
            image.
        background (`tuple[int, int, int]`, defaults to white): RGB, each 0 to 255.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnusableImageError: Whatever is wrong with the image.
    """
    if image is None:
        raise UnusableImageError(MISSING, "the entry is empty")
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, background)
        if image["bytes"] is not None:
            file = BytesIO(image["bytes"])
        else:
            file = image["path"]
        with Image.open(file) as opened:
            return _to_rgb(opened, background)
    except UnusableImageError:
        raise
    except FileNotFoundError as error:
        raise UnusableImageError(MISSING, "no such file") from error
    except UnidentifiedImageError as error:
        raise UnusableImageError(UNREADABLE, "not an image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise UnusableImageError(TOO_LARGE, str(error)) from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost anything (OSError, SyntaxError, struct.error, IndexError,
        # zlib.error, MemoryError ...); none of it may end a run, and all of it is reported with the name of the file.
        raise UnusableImageError(UNREADABLE, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    source_format = image.format
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and source_format == "PPM"):
        # `convert` would clip at 255 and make nearly every pixel white. 65535 / 257 = 255.
        eight_bit = np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableImageError(UNREADABLE, f"pixels of mode {image.mode} have no known range; save as 8 or 16 bits")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def decode_condition(condition: dict[str, Any] | None, image_size: tuple[int, int]) -> Image.Image:
    """
    Decodes what a ControlNet is shown of an image, as `decode_rgb` does; transparency becomes black, "no condition".

    Args:
        condition (`dict`): As `datasets` stores images.
        image_size (`tuple[int, int]`): Width and height of the decoded image that it belongs to.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnusableImageError: Whatever is wrong with the condition, or if it has another aspect ratio than its image, by
            more than a pixel of the condition either way. The message names the condition's file, if it has one.
    """
    path = (condition or {}).get("path")
    name = f"the condition {path}" if path else "the condition"
    try:
        decoded = decode_rgb(condition, background=(0, 0, 0))
    except UnusableImageError as error:
        raise UnusableImageError(NO_CONDITION, f"{name} is {error.reason}: {error}") from error
    (width, height), (image_width, image_height) = decoded.size, image_size
    # One scale brings the image within a pixel of both sides.
    if abs(width * image_height - height * image_width) > image_width + image_height:
        raise UnusableImageError(
            MISSHAPEN_CONDITION,
            f"{name} has {width} x {height} pixels, its image {image_width} x {image_height}",
        )
    return decoded


def check_images(
    dataset: datasets.Dataset,
    resolution: int,
    min_image_size: int | None = None,
    allow_unlabelled: bool = True,
    num_proc: int | None = None,
    output_dir: str | os.PathLike | None = None,
    max_names: int = 10,
    id2label: Mapping[int, str] | None = None,
) -> tuple[datasets.Dataset, dict[str, list[str]]]:
    """
    Decodes every image once, and its conditioning image if there are any, and leaves out those that cannot be used,
    with a count and their names.

    The result is cached by `datasets` beside the dataset, so that a second launch, and the other processes of the
    first, do not decode again. It is taken afresh when the dataset, the limits or the version of Pillow change.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`.
        resolution (`int`): Training resolution in pixels.
        min_image_size (`int`, *optional*): Images whose shorter side has fewer pixels are left out. Defaults to half of
            `resolution`: enlarging more than twice teaches the model blur.
        allow_unlabelled (`bool`, defaults to True): Keep examples whose label is -1; otherwise they are left out.
        num_proc (`int`, *optional*): Processes to decode with.
        output_dir (`str` or `os.PathLike`, *optional*): Where to write `skipped_images.txt` with all names: one line
            each, of reason, name and details, separated by tabs. Pass it on the main process only. A report of an
            earlier launch is replaced, or removed if nothing is left out now.
        max_names (`int`, defaults to 10): Names to log for each reason.
        id2label (mapping, *optional*): Names of the classes, for the warning of those that lose all of their images.

    Returns:
        `tuple` of the dataset without these images, and the names of those left out by reason. A name is the path of a
        file, or the row in the source (with the path stored there, if any).

    Raises:
        ValueError: If no image is left.
    """
    min_image_size = max(1, resolution // 2) if min_image_size is None else min_image_size
    verdicts = dataset.map(
        _examine,
        remove_columns=dataset.column_names,
        fn_kwargs={
            "min_image_size": min_image_size,
            "allow_unlabelled": allow_unlabelled,
            "version": (CHECK_VERSION, PIL.__version__),
        },
        num_proc=num_proc,
        desc="Checking images",
    )
    reasons, details = verdicts["reason"][:], verdicts["details"][:]
    skipped: dict[str, list[str]] = {}
    lines = []
    for index, reason in enumerate(reasons):
        if reason:
            name = _example_name(dataset[index], index)
            skipped.setdefault(reason, []).append(name)
            lines.append(f"{reason}\t{name}\t{details[index]}\n")

    counts = ", ".join(f"{len(names)} {reason}" for reason, names in skipped.items())
    if output_dir is not None:
        report = Path(output_dir) / SKIP_REPORT_NAME
        report.unlink(missing_ok=True)
        if lines:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("".join(lines), encoding="utf-8")
    if lines:
        logger.warning("%d of %d images are left out: %s.", len(lines), len(dataset), counts)
        for reason, names in skipped.items():
            more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
            logger.warning("  %s: %s%s", reason, ", ".join(names[:max_names]), more)
        if output_dir is not None:
            logger.warning("All names are in %s.", report)
    num_unlabelled = (
        sum(label == UNLABELLED and not reason for label, reason in zip(dataset["label"][:], reasons, strict=True))
        if "label" in dataset.column_names
        else 0
    )
    if num_unlabelled:
        logger.warning("%d of the remaining images have no label and are kept as unlabelled.", num_unlabelled)
    if lines and "label" in dataset.column_names:
        labels = dataset["label"][:]
        kept = {label for label, reason in zip(labels, reasons, strict=True) if not reason}
        lost = sorted(set(labels) - kept - {UNLABELLED})
        if lost and kept:
            names = ", ".join((id2label or {}).get(label, str(label)) for label in lost[:max_names])
            more = f" and {len(lost) - max_names} more" if len(lost) > max_names else ""
            logger.warning("No image is left of these classes, so nothing is learned of them: %s%s.", names, more)
    num_dark = sum(verdicts["dark"][:])
    if num_dark:
        logger.warning(
            "%d of %d conditions in `conditioning_image_column` hold no 8-bit value above 1: they are next to black, "
            "since white is 255. If 1 means white in them, save them with 0 and 255.",
            num_dark,
            len(dataset),
        )
    if len(lines) == len(dataset):
        raise ValueError(
            f"None of the {len(dataset)} images can be used: {counts}. The first: {lines[0].strip()!r}. "
            f"`min_image_size` is {min_image_size} for a resolution of {resolution}."
        )
    if lines:
        dataset = dataset.select([index for index, reason in enumerate(reasons) if not reason])
    return dataset, skipped


def _examine(example: dict[str, Any], min_image_size: int, allow_unlabelled: bool, version: tuple) -> dict[str, Any]:
    """The verdict on one example; `version` takes part in the cache's key alone."""
    reason, details, dark = "", "", False
    try:
        size = decode_rgb(example["image"]).size
        if "conditioning_image" in example:
            dark = int(np.asarray(decode_condition(example["conditioning_image"], size)).max()) == 1
    except UnusableImageError as error:
        reason, details = error.reason, str(error)
    else:
        if min(size) < min_image_size:
            reason, details = TOO_SMALL, f"{size[0]} x {size[1]} pixels, shorter side below {min_image_size}"
        elif not allow_unlabelled and example.get("label") == UNLABELLED:
            reason, details = NO_LABEL, "unlabelled examples are not allowed"
    return {"reason": reason, "details": details, "dark": dark}


def _example_name(example: dict[str, Any], index: int) -> str:
    image = example["image"]
    path = image["path"] if isinstance(image, dict) else None
    if path and image["bytes"] is None:
        return path
    return f"row {example.get('row', index)}" + (f" ({path})" if path else "")


def check_batch_fits(num_examples: int, train_batch_size: int, num_processes: int = 1) -> None:
    """
    Checks that the processes can fill one batch each, as a loader that drops incomplete batches would otherwise be
    empty.

    Raises:
        ValueError: If there are fewer than `train_batch_size * num_processes` examples.
    """
    if num_examples < train_batch_size * num_processes:
        raise ValueError(
            f"There are {num_examples} usable images, but one step takes {train_batch_size * num_processes} "
            f"(`train_batch_size` {train_batch_size} on {num_processes} process(es)). Lower `train_batch_size` to at "
            f"most {num_examples // num_processes}, or add images."
        )


# 3. One example as tensors


class ImageDataset(torch.utils.data.Dataset):
    """
    Crops, flips and normalises images; what is random depends on the seed, the epoch and the example, on nothing else.

    So any number of workers gives the same tensors, and a resumed run the same as an unbroken one. Accelerate's
    prepared loaders call `set_epoch`, unless the sampler has a `set_epoch` of its own; use `EpochShuffleSampler`, which
    has none.

    The shorter side is resized to `resolution` with Pillow's bicubic filter, which is antialiased when shrinking, and
    is the filter of ADM's own data loader; Lanczos is sharper by a little but rings at the hard edges of drawings.

    If an image becomes unreadable during training, the next readable example takes its place, and its name is logged
    once (again only if two workers meet it in the same instant).

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset` and `check_images`; the column `label` is optional.
        resolution (`int`): Height and width in pixels.
        center_crop (`bool`, defaults to False): Crop at the centre; otherwise at random.
        random_flip (`bool`, defaults to False): Mirror half of the images left to right.
        seed (`int`, defaults to 0): The seed of the run.
        background (`tuple[int, int, int]`, defaults to white): RGB behind transparent pixels.
        captions (`Captions`, *optional*): Of the same examples, in their order: `captions[i]` is a dict of tensors that
            goes into the example.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        background: tuple[int, int, int] = (255, 255, 255),
        captions: Captions | None = None,
    ):
        if resolution < 1:
            raise ValueError(f"`resolution` must be at least 1, got {resolution}.")
        if "image" not in dataset.column_names:
            raise ValueError(
                f"The dataset has the columns {', '.join(dataset.column_names)}, but no `image`. Pass what "
                "`load_image_dataset` returns."
            )
        self.dataset = dataset
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.background = background
        self.captions = captions
        self.has_labels = "label" in dataset.column_names
        # In shared memory, since workers that live on over epochs hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reported = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Selects the crops and flips of `epoch`, in workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `images`, float32 of shape `(3, resolution, resolution)` in [-1, 1], where `(images + 1) * 127.5`
            gives back the 8-bit values; if the dataset has labels, `class_labels`, an int64 scalar, -1 for unlabelled;
            and what `captions` hold.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} examples.")
        for offset in range(min(len(self), MAX_SUBSTITUTIONS)):
            candidate = (index + offset) % len(self)
            example = self.dataset[candidate]
            try:
                result = self._image_tensors(example, candidate)
            except UnusableImageError as error:
                if not self._reported[candidate]:
                    self._reported[candidate] = True
                    name = _example_name(example, candidate)
                    logger.warning("%s became %s (%s); another image takes its place.", name, error.reason, error)
                continue
            if self.has_labels:
                result["class_labels"] = torch.tensor(example["label"], dtype=torch.int64)
            if self.captions is not None:
                result |= self.captions[candidate]
            return result
        raise RuntimeError(
            f"{offset + 1} examples in a row, from {_example_name(self.dataset[index], index)} on, became unreadable. "
            "Is the storage of the dataset still there?"
        )

    def _image_tensors(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        """What an example holds that depends on its pixels."""
        pixels = self._transform(decode_rgb(example["image"], self.background), index)
        return {"images": pixels.float() / 127.5 - 1}

    def _transform(self, image: Image.Image, index: int, source_size: tuple[int, int] | None = None) -> torch.Tensor:
        """
        8-bit pixels, `(3, resolution, resolution)`, resized, cropped and flipped as the seed, the epoch and the index
        say; for a condition, which belongs to an image of `source_size` (width, height), as that image is.
        """
        # All three are drawn whatever the options, so that switching one leaves the others as they were.
        generator = random.Random(derive_seed(self.seed, "augmentation", self.epoch, index))
        x, y, flip = generator.random(), generator.random(), generator.random() < 0.5
        if self.center_crop:
            x = y = 0.5

        width, height = source_size or image.size
        ratio = self.resolution / min(width, height)
        size = (max(self.resolution, round(width * ratio)), max(self.resolution, round(height * ratio)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left = math.floor(x * (size[0] - self.resolution + 1))
        top = math.floor(y * (size[1] - self.resolution + 1))
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class EpochShuffleSampler(torch.utils.data.Sampler[int]):
    """
    Shuffles the examples anew each epoch, by the seed and the epoch of an `ImageDataset` alone.

    PyTorch's `RandomSampler` draws from a generator, whose state a resumed run would have to restore. The epoch is read
    from the dataset on purpose: with a sampler that has its own `set_epoch`, Accelerate no longer tells the dataset.

    Args:
        dataset (`ImageDataset`): Whose epoch and seed are used.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.dataset.seed, "shuffle", self.dataset.epoch))
        yield from torch.randperm(len(self.dataset), generator=generator).tolist()
