"""What the commands of this folder read: images from wherever they lie, and the numbers of their classes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from ..data.checks import check_images
from ..data.columns import load_image_dataset
from ..data.decoding import decode_rgb
from ..data.folders import METADATA_FILES, SPLIT_FOLDERS
from ..data.images import ImageDataset
from ..data.labels import load_id2label
from ..data.repositories import from_subfolder_or_root, reading
from ..data.seeding import derive_seed
from ..models.classifier_adagn import AdaGNClassifierModel
from ..schedulers.noise_schedules import noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .sample.images import IMAGE_NAME, NPZ_NAME, SETTINGS_NAME


def find_dataset(
    dataset: Sequence[str], dataset_config_name: str | None, split: str | None, argument: str = "dataset"
) -> dict[str, Any]:
    """
    What `--dataset`, which messages call `argument`, `--dataset_config_name` and `--split` mean to
    [`load_image_dataset`].

    Raises:
        ValueError: For several that are not all parquet files, where it is not clear which split is meant, and for a
            configuration where there are none.
    """
    is_local = any(name.lower().endswith(".parquet") for name in dataset) or _is_image_folder(dataset[0])
    if is_local and dataset_config_name is not None:
        raise ValueError(
            f"`dataset_config_name` is {dataset_config_name!r}, but {dataset[0]} is no dataset on the Hub, and has no "
            "configurations. Leave it out."
        )
    if any(name.lower().endswith(".parquet") for name in dataset):
        return {"data_files": dataset, "split": split or "train"}
    if len(dataset) > 1:
        raise ValueError(f"`{argument}` is {dataset}. Several are only taken if they are parquet files.")
    (name,) = dataset
    if is_local:
        folders = sorted(entry.name for entry in Path(name).iterdir() if entry.is_dir())
        if split is None and folders and all(folder in SPLIT_FOLDERS for folder in folders):
            raise ValueError(f"{name} has the splits {', '.join(folders)}. Name one with `--split`.")
        return {"train_data_dir": name, "split": split or "train"}
    if split is None:
        if os.path.exists(name):  # a local copy of a dataset, or a file
            what = "is no folder of images and no parquet file. If it is a copy of a dataset"
        else:
            what = "is no file or folder here. Check the path. If it is a dataset on the Hub"
        raise ValueError(f"`{argument}` is {name!r}, which {what}, name a split with `--split`, e.g. test.")
    return {"dataset_name": name, "dataset_config_name": dataset_config_name, "split": split}


def _is_image_folder(name: str) -> bool:
    """Not the folder of a local copy of a dataset, which holds its parquet files."""
    return os.path.isdir(name) and all(path.name in METADATA_FILES for path in Path(name).rglob("*.parquet"))


def num_real_classes(config: Any) -> int | None:
    """How many classes a U-Net has, the null class not counted; None where it has no table of them."""
    if config.num_class_embeds is None:
        return None
    return config.num_class_embeds - (config.get("null_class_id") is not None)


def load_classifier(
    argument: str, path: str, cache_dir: str | None, **kwargs: Any
) -> tuple[AdaGNClassifierModel, dict[int, str] | None]:
    """
    A classifier on the Hub or in a folder, and the names of its classes, or those of its pipeline, if they were saved.
    If its config is older than the entry `noise_schedule`, that of the scheduler in the same folder is entered.

    Raises:
        ValueError: If it cannot be read; it names `argument`.
    """
    kwargs["cache_dir"] = cache_dir
    with reading(argument, path):
        classifier = from_subfolder_or_root(AdaGNClassifierModel.from_pretrained, path, "classifier", **kwargs)
        # In that order: diffusers, too, takes what lies in a folder itself before what lies in the subfolder.
        names = load_id2label(path, cache_dir=cache_dir) or load_id2label(path, "classifier", cache_dir=cache_dir)
    if names is None:
        with contextlib.suppress(OSError):  # a classifier alone, without a pipeline
            index = DiffusionPipeline.load_config(path, cache_dir=cache_dir)
            names = {int(number): name for number, name in (index.get("id2label") or {}).items()} or None
    if classifier.config.noise_schedule is None:
        with contextlib.suppress(OSError):  # there is no scheduler next to it
            scheduler = LearnedVarianceDDPMScheduler.from_pretrained(path, subfolder="scheduler", cache_dir=cache_dir)
            classifier.register_to_config(noise_schedule=noise_schedule_of(scheduler))
    return classifier, names


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """`arr_0` and `arr_1`, if they are there, and otherwise the names of what is."""
    try:
        with zipfile.ZipFile(path):  # `np.load` takes anything else for a pickle, or for a single array
            pass
        with np.load(path) as arrays:
            found = [name for name in ("arr_0", "arr_1") if name in arrays] if "arr_0" in arrays else list(arrays)
            return {name: arrays[name] for name in found}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Check the path.") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a .npz file, or is damaged: {error}. Write it again.") from error


class ArrayImages:
    """
    Images of a `.npz` file, as guided-diffusion keeps samples and reference batches, for an [`ImageDataset`].

    Args:
        path (`str` or `os.PathLike`): With `arr_0`: uint8 of shape `(N, height, width, channels)`, 1 or 3 channels; and
            perhaps `arr_1`: N class numbers. It is read into memory.
        to_class (mapping, *optional*): Other numbers for the classes.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, path: str | os.PathLike, to_class: Mapping[int, int] | None = None):
        arrays = _read_npz(path)
        if "arr_0" not in arrays:
            raise ValueError(f"{path} holds {', '.join(arrays) or 'nothing'}, but no `arr_0`, the images.")
        self.pixels = arrays["arr_0"]
        self.labels = arrays.get("arr_1")
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] not in (1, 3):
            raise ValueError(
                f"`arr_0` of {path} is {self.pixels.dtype} of shape {self.pixels.shape}. It must be uint8 of shape (N, "
                "height, width, channels) with 1 or 3 channels."
            )
        if self.labels is not None and self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"`arr_1` of {path} has shape {self.labels.shape} for {len(self.pixels)} images. It must hold one "
                "class number for each."
            )
        self.to_class = to_class or {}
        self.indices = np.arange(len(self.pixels))
        self.column_names = ["image"] if self.labels is None else ["image", "label"]

    def select(self, indices: Sequence[int]) -> ArrayImages:
        """These images only; `self` stays as it is, as with a dataset of `datasets`."""
        chosen = copy.copy(self)
        chosen.indices = self.indices[list(indices)]
        return chosen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.indices[index]
        pixels = self.pixels[row]
        example = {"image": Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)}
        if self.labels is None:
            return example
        label = int(self.labels[row])
        return {**example, "label": self.to_class.get(label, label)}


def run_of_sample(source: Sequence[str]) -> dict[str, Any] | None:
    """
    The settings that the command `sample` has left in a folder, or beside its `samples.npz`; None for anything else.

    Raises:
        ValueError: If images are missing yet.
    """
    path = Path(source[0])
    folder = path.parent if path.name == NPZ_NAME else path
    if len(source) > 1 or not (folder / SETTINGS_NAME).is_file():
        return None
    run = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    num_images = sum(IMAGE_NAME.fullmatch(path.name) is not None for path in folder.iterdir())
    if not (folder / NPZ_NAME).exists() and num_images != run["num_images"]:
        raise ValueError(
            f"{source[0]!r} holds {num_images} of {run['num_images']} images. Run the command that draws them again: "
            "it goes on where it was interrupted."
        )
    return run


def read_images(
    source: Sequence[str],
    resolution: int | None,
    *,
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
    Images, resized and cropped at the centre; with labels where the source has class numbers beside them, which are
    `.npz` files and folders of the command `sample`.

    Args:
        source (sequence of `str`): A `.npz` file, a folder of images, the folder of a run of `sample`, parquet files,
            or a dataset on the Hub.
        resolution (`int`, *optional*): Pixels; `None`: the shorter side of the first image.
        to_class (mapping, *optional*): Other numbers for the classes.
        dataset_config_name (`str`, *optional*): Of a dataset on the Hub: its configuration.
        split (`str`, *optional*): Of a dataset that has several.
        image_column (`str`, defaults to "image"): Of a dataset.
        num_images (`int`, *optional*): A random choice of this size, if there are more.
        seed (`int`, defaults to 0): Of that choice.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it prepares.
        argument (`str`, defaults to "dataset"): What messages call `source`.

    Raises:
        ValueError: If the images cannot be read, or belong to a run of `sample` that is not finished.
    """
    images: Any
    run = run_of_sample(source)
    if run is not None and (Path(source[0]) / NPZ_NAME).exists():
        source = [str(Path(source[0]) / NPZ_NAME)]
    is_array = len(source) == 1 and source[0].endswith(".npz")
    if is_array or (run is not None and run["settings"]["class_labels"] is not None):
        columns = {"dataset_config_name": dataset_config_name, "split": split}
        columns["image_column"] = None if image_column == "image" else image_column
        given = [f"`{name}`" for name, value in columns.items() if value is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} would have no effect: {source[0]} is no dataset. Leave it out.")
    if is_array:
        images = ArrayImages(source[0], to_class)
    elif run is not None and run["settings"]["class_labels"] is not None:
        images, id2label = load_image_dataset(train_data_dir=source[0], label_column="label", cache_dir=cache_dir)
        # Numbers that do not occur have been left out of the count.
        numbers = {label: int(name) for label, name in id2label.items()}
        labels = [(to_class or {}).get(numbers[label], numbers[label]) for label in images["label"][:]]
        images = images.remove_columns("label").add_column("label", labels)
    else:
        where = find_dataset(source, dataset_config_name, split, argument)
        try:
            images, _ = load_image_dataset(**where, image_column=image_column, cache_dir=cache_dir)
        except ValueError as error:  # which calls it by the arguments of the training scripts
            raise ValueError(f"`{argument}` cannot be read: {error}") from error
    if num_images is not None and num_images < len(images):
        chosen = random.Random(derive_seed(seed, "num_images")).sample(range(len(images)), num_images)
        images = images.select(sorted(chosen))
    if resolution is None:
        resolution = min(decode_rgb(images[0]["image"]).size)
    if not isinstance(images, ArrayImages):
        images, _ = check_images(images, resolution)
    return ImageDataset(images, resolution, center_crop=True)
