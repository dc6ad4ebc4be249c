"""
Image folders: every image below a folder, labelled by the name of the folder that holds it, with captions next to it.

Folders with a metadata file are read by `datasets`' `imagefolder`. It cannot replace the rest of this file: a loose
image or a single class makes it drop all labels; a folder named "test", or files named "test_01.png", make it drop all
other images; it does not follow links to folders; and it takes 29 s for 20,000 files, not 2 s (datasets 5.2).
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .labels import list_names
from .pixels import ARRAY_SUFFIXES


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

# The column of captions in a .txt file next to each image, the layout of training scripts for other models.
CAPTION_FILES_COLUMN = "text"
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LATENTS_NAME = "latents.json"  # in folders of latents, see latents.py
EMBEDDINGS_NAME = "embeddings.json"  # in folders of embeddings, see embeddings.py
SPLIT_FOLDERS = ("train", "validation", "valid", "val", "dev", "test", "eval")


def load_image_folder(
    folder: str,
    split: str = "train",
    label_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    Loads a folder as [`load_image_dataset`] describes, with the columns `image`, `label` and `text`, or those of its
    metadata file. What is skipped is logged.

    Raises:
        ValueError: If the folder, its split or its images are missing, if its metadata or a caption cannot be read, or
            if `label_column` is "label" and no image is in a subfolder.
    """
    import datasets

    root = split_folder(folder, split)
    extensions = {ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN}
    extensions |= {*ARRAY_SUFFIXES}
    files = list(_walk(root))
    images = [path for path in files if path.suffix.lower() in extensions]
    metadata = [path for path in files if path.name in METADATA_FILES]
    captions: list[Path | None] = [None] * len(images)
    if not metadata:
        texts = {path for path in files if path.suffix.lower() == ".txt"}
        candidates = ((path.with_suffix(".txt"), path.with_suffix(".TXT")) for path in images)
        captions = [next((file for file in pair if file in texts), None) for pair in candidates]
    used = {*images, *metadata, *captions}
    others = Counter(path.suffix.lower() or "no extension" for path in files if path not in used)
    other_files = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5))
    if not images:
        raise ValueError(f"`train_data_dir` {str(root)!r} holds no images (other files: {other_files or 'none'}).")
    if others:
        logger.warning(f"Files in {root} that are not images are skipped: {other_files}.")
    if metadata:
        return _load_with_metadata(root, images, metadata, cache_dir)

    labels = [path.parent.name if path.parent != root else None for path in images]
    if label_column == "label":
        if not any(labels):
            raise ValueError(
                f"`label_column` is 'label', but all {len(images)} images are directly in {root}. Sort them into one "
                "folder per class, or drop `label_column` to train without labels."
            )
        with_images = {os.path.realpath(folder) for folder in {parent for path in images for parent in path.parents}}
        empty = [path for path in _subfolders(root) if os.path.realpath(path) not in with_images]
        if empty:
            logger.warning(f"Folders without images give no class: {_list_paths(root, empty)}.")
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    # Tuples, because `datasets` takes lists for shards. The stamps are part of the fingerprint of the dataset, so that
    # `check_images` decodes a file again after it was replaced.
    columns: dict[str, tuple] = {"paths": tuple(str(path.absolute()) for path in images), "labels": tuple(labels)}
    columns["stamps"] = tuple(map(_stamp, images))
    without = [path for path, file in zip(images, captions, strict=True) if file is None]
    if len(without) < len(images) and caption_column == CAPTION_FILES_COLUMN:
        features[CAPTION_FILES_COLUMN] = datasets.Value("string")
        columns["captions"] = tuple(None if file is None else _read_caption(file) for file in captions)
        if without:
            counts = f"{len(without)} of {len(images)} images in {root}"
            logger.warning(f"{counts} have no .txt file next to them: {_list_paths(root, without)}")
    elif len(without) < len(images):
        logger.warning(
            f"{len(images) - len(without)} of {len(images)} images in {root} have a .txt file next to them, which is "
            f"not read. If these are captions, name them by the `caption_column` `{CAPTION_FILES_COLUMN}`."
        )
    return datasets.Dataset.from_generator(
        _generate_rows, features=datasets.Features(features), cache_dir=cache_dir, gen_kwargs=columns
    )


def split_folder(folder: str, split: str) -> Path:
    """The folder that holds the images of a split: `folder` itself, unless all its subfolders are named like splits."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"`train_data_dir` is {folder!r}, which is not a folder. Check the path.")
    if (root / LATENTS_NAME).is_file():
        raise ValueError(
            f"`train_data_dir` {folder!r} holds latents ({LATENTS_NAME}), and images are needed here. Name the folder "
            "of the images."
        )
    if (root / EMBEDDINGS_NAME).is_file():
        raise ValueError(
            f"`train_data_dir` {folder!r} holds embeddings ({EMBEDDINGS_NAME}) next to the images, in parquet files. "
            f"Pass these instead: `--data_files {folder}/*.parquet`."
        )
    names = [path.name for path in _subfolders(root)]
    if split in names and all(name in SPLIT_FOLDERS for name in names):
        logger.warning(f"Reading the images in {root / split}; its other folders are named like splits.")
        for name in METADATA_FILES:
            if (root / name).exists():
                logger.warning(f"{name} next to it is not read. Move it into the folder of the split.")
        return root / split
    if split != "train":
        raise ValueError(
            f"`split` is {split!r}, but {folder} has no such split. Its folders are {', '.join(names) or 'none'}; for "
            "a folder of images without splits, use 'train'."
        )
    return root


def _subfolders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .ipynb_checkpoints, ._resource_forks, __MACOSX; as in `datasets`


def _walk(root: Path) -> Iterator[Path]:
    """Finds all files below `root` in sorted order. Follows links to folders, but reads each folder once."""
    visited: dict[str, Path] = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            logger.warning(
                f"{folder} is the same folder as {visited[real]}, by a link: its images are taken once, from there."
            )
            subfolders.clear()
            continue
        visited[real] = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        yield from (Path(folder, name) for name in sorted(files) if not _is_hidden(name))


def _generate_rows(
    paths: tuple[str], labels: tuple[str | None], stamps: tuple, captions: tuple[str | None] | None = None
) -> Iterator[dict[str, Any]]:
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        row = {"image": {"path": path, "bytes": None}, "label": label}
        yield row if captions is None else {**row, CAPTION_FILES_COLUMN: captions[index]}


def _stamp(path: Path) -> tuple[int, int] | None:
    status = path.stat() if path.exists() else None  # `check_images` reports broken links
    return (status.st_size, status.st_mtime_ns) if status else None


def _read_caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {file} is not UTF-8 text: {error}. Save it as such, or move it away.") from error


def _load_with_metadata(
    root: Path, images: Sequence[Path], metadata: Sequence[Path], cache_dir: str | None
) -> datasets.Dataset:
    import datasets
    import pyarrow

    names = _list_paths(root, metadata)
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
            f"{len(unlisted)} of {len(images)} images in {root} are not listed in {names} and are skipped: "
            f"{_list_paths(root, unlisted)}. Add them to it, or remove it to take all images."
        )
    return dataset


def _list_paths(root: Path, paths: Sequence[Path]) -> str:
    return list_names([path.relative_to(root) for path in paths], quote=str)
