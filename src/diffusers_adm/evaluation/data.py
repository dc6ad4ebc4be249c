"""Reads what the commands of this folder evaluate: images from any source, class numbers, and classifiers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from ..conditioning.image_format import ImageFormat, Size
from ..data.checks import check_images
from ..data.columns import load_image_dataset
from ..data.decoding import decode_image, decoded_size
from ..data.folders import METADATA_FILES, SPLIT_FOLDERS
from ..data.formats import FormatRequest, find_image_format
from ..data.images import ImageDataset
from ..data.labels import load_id2label
from ..data.repositories import from_subfolder_or_root, reading
from ..measures.common import choose
from ..models.classifier_adagn import AdaGNClassifierModel
from ..schedulers.noise_schedules import noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .sample.images import IMAGE_NAME, NPZ_NAME, SETTINGS_NAME


def find_dataset(
    dataset: Sequence[str], dataset_config_name: str | None, split: str | None, argument: str = "dataset"
) -> dict[str, Any]:
    """
    Translates `--dataset` (called `argument` in messages), `--dataset_config_name` and `--split` into arguments of
    [`load_image_dataset`]. A `ValueError` says what is missing or has no effect.
    """
    is_parquet = any(name.lower().endswith(".parquet") for name in dataset)
    # A folder of images, and not the local copy of a dataset, which holds its parquet files.
    is_folder = os.path.isdir(dataset[0]) and all(
        path.name in METADATA_FILES for path in Path(dataset[0]).rglob("*.parquet")
    )
    if (is_parquet or is_folder) and dataset_config_name is not None:
        raise ValueError(
            f"`dataset_config_name` is {dataset_config_name!r}, but {dataset[0]} is not on the Hub and has no "
            "configurations. Omit it."
        )
    if is_parquet:
        return {"data_files": dataset, "split": split or "train"}
    if len(dataset) > 1:
        raise ValueError(f"`{argument}` is {dataset}. Several are only allowed if they are parquet files.")
    (name,) = dataset
    if is_folder:
        folders = sorted(entry.name for entry in Path(name).iterdir() if entry.is_dir())
        if split is None and folders and all(folder in SPLIT_FOLDERS for folder in folders):
            raise ValueError(f"{name} has the splits {', '.join(folders)}. Choose one with `--split`.")
        return {"train_data_dir": name, "split": split or "train"}
    if split is None:
        what = "is not a folder of images" if os.path.exists(name) else "is no file or folder here. Check the path"
        raise ValueError(f"`{argument}` is {name!r}, which {what}. If it is a dataset, choose a split with `--split`.")
    return {"dataset_name": name, "dataset_config_name": dataset_config_name, "split": split}


def num_real_classes(config: Any) -> int | None:
    """Number of classes of a U-Net without the null class; None if it has no class embedding table."""
    if config.num_class_embeds is None:
        return None
    return config.num_class_embeds - (config.get("null_class_id") is not None)


def load_classifier(
    argument: str, path: str, cache_dir: str | None, **kwargs: Any
) -> tuple[AdaGNClassifierModel, dict[int, str] | None]:
    """
    Loads a classifier from the Hub or a folder, and the names of its classes or of its pipeline, if they were saved. A
    config that predates the entry `noise_schedule` gets that of the scheduler in the same folder.
    """
    kwargs["cache_dir"] = cache_dir
    with reading(argument, path):
        classifier = from_subfolder_or_root(AdaGNClassifierModel.from_pretrained, path, "classifier", **kwargs)
        # In this order: diffusers, too, prefers files in a folder itself to those in the subfolder.
        names = load_id2label(path, cache_dir=cache_dir) or load_id2label(path, "classifier", cache_dir=cache_dir)
    if names is None:
        with contextlib.suppress(OSError):  # a classifier without a pipeline
            index = DiffusionPipeline.load_config(path, cache_dir=cache_dir)
            names = {int(number): name for number, name in (index.get("id2label") or {}).items()} or None
    if classifier.config.noise_schedule is None:
        with contextlib.suppress(OSError):  # there is no scheduler next to it
            scheduler = LearnedVarianceDDPMScheduler.from_pretrained(path, subfolder="scheduler", cache_dir=cache_dir)
            classifier.register_to_config(noise_schedule=noise_schedule_of(scheduler))
    return classifier, names


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads `arr_0` and, if it exists, `arr_1`; if there is no `arr_0`, everything."""
    try:
        # `np.load` alone also reads single arrays.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays if "arr_0" not in arrays or name in ("arr_0", "arr_1")}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Check the path.") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a .npz file, or is damaged: {error}. Write it again.") from error


class ArrayImages:
    """
    Images of a `.npz` file, the format of guided-diffusion's samples and reference batches, for an [`ImageDataset`].

    Args:
        path (`str` or `os.PathLike`): File with `arr_0`, numbers of shape `(N, height, width, channels)`, and
            optionally `arr_1`, N class numbers. It is read into memory.
        to_class (mapping, *optional*): From class numbers of the file to others.
        any_format (`bool`, defaults to `False`): Also read other images than those of 8 bits in grey or RGB.
    """

    def __init__(self, path: str | os.PathLike, to_class: Mapping[int, int] | None = None, *, any_format: bool = False):
        arrays = _read_npz(path)
        if "arr_0" not in arrays:
            raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}, but no `arr_0`, the images.")
        self.pixels, self.labels = arrays["arr_0"], arrays.get("arr_1")
        found = f"`arr_0` of {path} is {self.pixels.dtype} of shape {self.pixels.shape}"
        if self.pixels.ndim != 4 or 0 in self.pixels.shape or self.pixels.dtype.kind not in "uif":
            raise ValueError(f"{found}. It must hold numbers, of shape (N, height, width, channels).")
        if not any_format and (self.pixels.dtype != np.uint8 or self.pixels.shape[3] not in (1, 3)):
            raise ValueError(f"{found}. It must be uint8 of shape (N, height, width, channels) with 1 or 3 channels.")
        if self.labels is not None and self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"`arr_1` of {path} has shape {self.labels.shape} for {len(self.pixels)} images; it must hold one "
                "class number per image."
            )
        self.to_class = to_class or {}
        self.indices = np.arange(len(self.pixels))
        self.column_names = ["image"] if self.labels is None else ["image", "label"]

    def select(self, indices: Sequence[int]) -> ArrayImages:
        """A copy with only these images, as with a dataset of `datasets`."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[list(indices)]
        return chosen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.indices[index]
        pixels = self.pixels[row]
        example: dict[str, Any] = {"image": pixels}
        if pixels.dtype == np.uint8 and pixels.shape[-1] in (1, 3):
            example["image"] = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if self.labels is not None:
            label = int(self.labels[row])
            example["label"] = self.to_class.get(label, label)
        return example


def format_of_run(run: Mapping[str, Any] | None) -> ImageFormat | None:
    """The format in the settings of a run of `sample`; `None` if it recorded none."""
    recorded = None if run is None else run["settings"].get("image_format")
    return None if recorded is None else ImageFormat.from_config(recorded, recorded["channels"])


def run_of_sample(source: Sequence[str]) -> dict[str, Any] | None:
    """
    The settings that the command `sample` wrote to a folder, or next to its `samples.npz`; None for other sources. A
    `ValueError` if the run is not finished.
    """
    path = Path(source[0])
    folder = path.parent if path.name == NPZ_NAME else path
    if len(source) > 1 or not (folder / SETTINGS_NAME).is_file():
        return None
    run = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    num_images = sum(IMAGE_NAME.fullmatch(path.name) is not None for path in folder.iterdir())
    if not (folder / NPZ_NAME).exists() and num_images != run["num_images"]:
        raise ValueError(
            f"{source[0]!r} holds {num_images} of {run['num_images']} images. Run the command that generates them "
            "again: it continues where it was interrupted."
        )
    return run


def read_images(
    source: Sequence[str],
    resolution: Size | None,
    *,
    request: FormatRequest | None = None,
    to_class: Mapping[int, int] | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    num_images: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
    argument: str = "dataset",
) -> ImageDataset:
    """
    Reads images, resized and cropped at the centre; with labels if the source has class numbers, as `.npz` files and
    folders of the command `sample` do.

    Args:
        source (sequence of `str`): A `.npz` file, a folder of images, the folder of a run of `sample`, parquet files,
            or a dataset on the Hub.
        resolution (`int` or `tuple[int, int]`, *optional*): Image size in pixels: of a square, or (height, width).
            `None`: that of all images of a `.npz` file and of `sample`, else the shorter side of the first image.
        request (`FormatRequest`, *optional*): What is asked of the format of the images, and what is known of it. A run
            of `sample` knows it, too. `None`, and without such a run: 8-bit RGB.
        to_class (mapping, *optional*): From class numbers of the source to others.
        dataset_config_name (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*): Split of the dataset, if it has several.
        image_column (`str`, defaults to "image"): Column of the images.
        num_images (`int`, *optional*): Size of a random choice, if there are more.
        seed (`int`, defaults to 0): Random seed of that choice.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.
        argument (`str`, defaults to "dataset"): Name of `source` in messages.
    """
    images: Any
    run = run_of_sample(source)
    if run is not None and (Path(source[0]) / NPZ_NAME).exists():
        source = [str(Path(source[0]) / NPZ_NAME)]
    sampled = format_of_run(run)
    if sampled is not None:
        request = request or FormatRequest(sampled.channels)
        if request.known is not None and request.known != sampled:
            raise ValueError(f"`{argument}` holds {sampled}, but {request.known} are expected.")
        request = dataclasses.replace(request, known=sampled)
    is_array = len(source) == 1 and source[0].endswith(".npz")
    is_labelled_run = run is not None and run["settings"]["class_labels"] is not None
    if is_array or is_labelled_run:
        given = {"dataset_config_name": dataset_config_name, "split": split, "image_column": image_column}
        if names := [f"`{name}`" for name, value in given.items() if value not in (None, "image")]:
            raise ValueError(f"{' and '.join(names)} would have no effect: {source[0]} is not a dataset. Omit it.")
    if is_array:
        images = ArrayImages(source[0], to_class, any_format=request is not None)
        if request is not None and request.expected_channels is None:  # the axes of these files are known
            request = dataclasses.replace(request, channels=images.pixels.shape[-1])
    elif is_labelled_run:
        images, id2label = load_image_dataset(train_data_dir=source[0], label_column="label", cache_dir=cache_dir)
        # `datasets` numbers only the classes that occur.
        numbers = {label: int(name) for label, name in id2label.items()}
        labels = [(to_class or {}).get(numbers[label], numbers[label]) for label in images["label"][:]]
        images = images.remove_columns("label").add_column("label", labels)
    else:
        where = find_dataset(source, dataset_config_name, split, argument)
        try:
            images, _ = load_image_dataset(**where, image_column=image_column, cache_dir=cache_dir)
        except ValueError as error:  # which uses the argument names of the training scripts
            raise ValueError(f"`{argument}` cannot be read: {error}") from error
    if num_images is not None and num_images < len(images):
        images = images.select(choose(len(images), num_images, seed))
    image_format = None
    if request is not None:
        try:
            image_format = find_image_format(images, request)
        except ValueError as error:  # which tells only one side of the comparison
            raise ValueError(f"`{argument}` cannot be used: {error}") from error
    if resolution is None:
        width, height = decoded_size(decode_image(images[0]["image"], image_format))
        have_one_size = is_array or run is not None
        resolution = (height, width) if have_one_size and height != width else min(height, width)
    if not isinstance(images, ArrayImages):
        images, _ = check_images(images, resolution, image_format=image_format, range_argument=None)
    return ImageDataset(images, resolution, center_crop=True, image_format=image_format)
