"""
Latents of an autoencoder as data: loading the autoencoder, and reading latents that `encode_latents` stored.

A folder of stored latents holds parquet files and `latents.json`, which says how they were made. A row has the columns
`latent_mean` and `latent_std` (before scale and shift, flat lists of channels x height x width numbers), with flips
also `latent_mean_flipped` and `latent_std_flipped` (of the mirrored image), `image_name`, and the label, caption,
conditioning image and image embedding columns of the source under their names.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel

from ..conditioning.image_format import ImageFormat, Size
from ..conditioning.latents import LatentSpace
from ..ops.finiteness import explain_weights
from .autoencoder_record import load_recorded_format
from .columns import add_captions, add_labels, cast_to_images, check_column, choose_samples
from .decoding import decode_condition
from .fingerprints import hash_config, hash_plain, hash_tensors
from .folders import LATENTS_NAME
from .images import ImageDataset
from .labels import UNLABELLED, list_names
from .repositories import only_variant, reading
from .resizing import draw_window
from .stored_rows import Rows, check_lists, load_stored_rows, read_record, write_record


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

AUTOENCODER_CLASSES = {known.__name__: known for known in (AutoencoderKL, VQModel, AutoencoderTiny)}
# Folders of an autoencoder in a pipeline: that of most pipelines, and that of unconditional latent diffusion.
AUTOENCODER_FOLDERS = ("vae", "vqvae")
ENCODER_PREFIXES = ("encoder.", "quant_conv.")  # of the parameters that latents depend on
LATENTS_VERSION = 1
LatentsDtype = Literal["float16", "float32"]
NAME_COLUMN = "image_name"
PLAIN, FLIPPED = ("latent_mean", "latent_std"), ("latent_mean_flipped", "latent_std_flipped")
LATENT_COLUMNS = (*PLAIN, *FLIPPED, NAME_COLUMN)


# 1. Autoencoders


class LoadedAutoencoder(NamedTuple):
    """An autoencoder, and the format of the images that it was trained on; `None`: not recorded."""

    vae: ModelMixin
    image_format: ImageFormat | None


def load_autoencoder(
    argument: str,
    name: str,
    *,
    folders: Sequence[str] = (*AUTOENCODER_FOLDERS, ""),
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> LoadedAutoencoder:
    """
    Loads an autoencoder in float32, frozen.

    Args:
        argument (`str`): The argument that holds `name`, for errors.
        name (`str`): A folder, or a repository on the Hub, with an autoencoder in its root or in the folder `vae`.
        folders (sequence of `str`, *optional*): Where to look in it, in this order; `""` is its root.
        revision, variant, cache_dir (`str`, *optional*): Arguments of `from_pretrained`.

    Raises:
        ValueError: If there is none, or it is of another class; also those of [`LatentSpace`].
    """
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if os.path.isfile(name):
        raise ValueError(f"`{argument}` is {name!r}, which is a file. Name the folder of the autoencoder.")
    with reading(argument, name):
        folder, config = _find_config(name, folders, hub)
        class_name = config.get("_class_name")
        if class_name not in AUTOENCODER_CLASSES:
            raise ValueError(
                f"`{argument}` {name!r} holds a {class_name or 'network of an unknown class'}, which is no "
                f"autoencoder. Name a folder or repository of one of {', '.join(AUTOENCODER_CLASSES)}."
            )
        load = AUTOENCODER_CLASSES[class_name].from_pretrained
        place, subfolder = _place(name, folder)
        variant = variant or only_variant(place, subfolder or "")
        vae = load(place, subfolder=subfolder, variant=variant, torch_dtype=torch.float32, **hub)
        channels = LatentSpace(vae).image_channels[0]  # which checks the scale
        image_format = load_recorded_format(name, channels, [folder], **hub)
    if "scaling_factor" not in config:
        factor = vae.config.get("scaling_factor")
        logger.warning(
            f"The config of `{argument}` {name!r} has no `scaling_factor`; diffusers takes {factor}. Unless this is 1 "
            "/ (standard deviation of the latents), set it there; `diffusers_adm.data.encode_latents` measures it."
        )
    wrong = explain_weights(argument, vae)
    if wrong is not None:
        raise ValueError(wrong)
    return LoadedAutoencoder(vae.requires_grad_(False).eval(), image_format)


def _place(name: str, folder: str) -> tuple[str, str | None]:
    """Path or repository, and subfolder: diffusers prefers files in a folder itself to those in its subfolders."""
    return (os.path.join(name, folder), None) if os.path.isdir(name) else (name, folder or None)


def _find_config(name: str, folders: Sequence[str], hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The first of the folders in a folder or repository that has a config, and this config."""
    errors = []
    for folder in folders:
        place, subfolder = _place(name, folder)
        try:
            return folder, AutoencoderKL.load_config(place, subfolder=subfolder, **hub)
        except OSError as error:
            errors.append(error)
    raise errors[-1 if os.path.isdir(name) else 0]


def autoencoder_folders(index: Mapping[str, Any]) -> list[str]:
    """The folders of the autoencoders of a saved pipeline, by its `model_index.json`."""
    return [name for name in AUTOENCODER_FOLDERS if (index.get(name) or [None])[0] is not None]


def hash_autoencoder(vae: ModelMixin) -> str:
    """Hashes the config of an autoencoder, scale and shift included, and its weights in their dtype."""
    return hash_plain([hash_config(vae), hash_tensors(vae.state_dict())])


def hash_encoder(vae: ModelMixin) -> str:
    """Hashes what the latents of images depend on: the config, scale and shift included, and the encoder's weights."""
    weights = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith(ENCODER_PREFIXES)}
    return hash_plain([hash_config(vae), hash_tensors(weights)])


# 2. Stored latents


@dataclass(frozen=True)
class StoredLatents:
    """
    How a folder of latents was made, from its `latents.json`.

    Attributes:
        autoencoder (`str`): From `hash_autoencoder`.
        vae (`str`): The name that the autoencoder was loaded by.
        scaling_factor, shift_factor (`float`): Those of the autoencoder. The stored latents are neither scaled nor
            shifted.
        channels (`int`), size (`tuple[int, int]`): Channels, height and width of a latent.
        resolution (`int` or `list[int]`): Size of the images in pixels: of a square, or `[height, width]`.
        dtype (`str`): "float16" or "float32".
        image_format (`ImageFormat`): Of the images.
        condition_format (`ImageFormat`, *optional*): Of the conditioning images, if they are stored.
        random_flip (`bool`): Whether the latents of mirrored images are stored, too.
        num_cropped (`int`): Number of images that lost pixels at the sides, since they were cropped at the centre.
        num_images (`int`): Number of rows.
        label_column, caption_column, conditioning_image_column (`str`, *optional*): Columns of the source that are
            kept.
        encoder (`str`, *optional*): From `hash_encoder`; `None` in folders of earlier versions.
        image_embeds_column (`str`, *optional*): Column of image embeddings that is kept, with flips also that of
            mirrored images.
        condition (`str`, *optional*): Kind of the conditioning images, if they were made from the images.
    """

    autoencoder: str
    vae: str
    scaling_factor: float
    shift_factor: float
    channels: int
    size: tuple[int, int]
    resolution: int | list[int]
    dtype: LatentsDtype
    image_format: ImageFormat
    condition_format: ImageFormat | None
    random_flip: bool
    num_cropped: int
    num_images: int
    label_column: str | None
    caption_column: str | None
    conditioning_image_column: str | None
    encoder: str | None = None
    image_embeds_column: str | None = None
    condition: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.channels, *self.size

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of latents."""
        return (*PLAIN, *FLIPPED) if self.random_flip else PLAIN

    def write(self, folder: str | os.PathLike) -> None:
        """Writes `latents.json`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("image_format", "condition_format"):
            values[name] = None if values[name] is None else values[name].to_config()
        write_record(folder, LATENTS_NAME, LATENTS_VERSION, values)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> StoredLatents:
        """Reads `latents.json`. Raises a `ValueError` for one that is damaged or of another version."""

        def build(values: dict[str, Any]) -> StoredLatents:
            for name in ("image_format", "condition_format"):
                if values[name] is not None:
                    values[name] = ImageFormat.from_config(values[name], values[name]["channels"], name)
            return cls(**{**values, "size": tuple(values["size"])})

        return read_record(folder, LATENTS_NAME, LATENTS_VERSION, build)

    def check(self, latent_space: LatentSpace, autoencoder_hash: str, folder: str) -> None:
        """Raises a `ValueError` for latents of another autoencoder, unless only its decoder differs."""
        if self.autoencoder == autoencoder_hash or self.encoder == hash_encoder(latent_space.vae):
            return
        now = {"channels": latent_space.channels, "scaling_factor": latent_space.scale}
        now["shift_factor"] = latent_space.shift
        before = {name: getattr(self, name) for name in now}
        changed = [f"{name} is {now[name]}, and was {before[name]}" for name in now if now[name] != before[name]]
        details = f" ({'; '.join(changed)})" if changed else ""
        raise ValueError(
            f"The latents in {folder} are those of another autoencoder, {self.vae}, whose hash is {self.autoencoder}; "
            f"that of this run is {autoencoder_hash}{details}. Pass `--vae` "
            "with the former one, or encode the images again."
        )


def find_stored_latents(folder: str | None) -> StoredLatents | None:
    """How the latents in a folder were made; `None` for a folder without stored latents."""
    if folder is None or not Path(folder, LATENTS_NAME).is_file():
        return None
    return StoredLatents.read(folder)


def load_latents(
    folder: str,
    stored: StoredLatents,
    label_column: str | None = None,
    caption_column: str | None = None,
    conditioning_image_column: str | None = None,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
    tensor_columns: Mapping[str, str] | None = None,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """
    Loads stored latents like `load_image_dataset` images: with the columns of latents and `image_name` instead of
    `image`.

    Raises:
        ValueError: If a column is missing, or rows, type or size of the latents are not those of `latents.json`.
    """
    dataset = load_stored_rows(folder, LATENTS_NAME, stored.num_images, "latents", cache_dir)
    for column in (*stored.columns, NAME_COLUMN):
        check_column(dataset, folder, LATENTS_NAME, column)
    for column in stored.columns:
        check_lists(dataset, column, stored.dtype, int(np.prod(stored.shape)), folder, LATENTS_NAME)
    arguments = {"label_column": label_column, "caption_column": caption_column}
    arguments["conditioning_image_column"] = conditioning_image_column
    arguments |= {f"tensor_columns[{name!r}]": column for name, column in (tensor_columns or {}).items()}
    for argument, column in arguments.items():
        if column is not None:
            check_column(dataset, folder, argument, column)
    names = {column: name for name, column in (tensor_columns or {}).items()}
    if conditioning_image_column is not None:
        names[conditioning_image_column] = "conditioning_image"
    images = dataset.select_columns([*stored.columns, NAME_COLUMN, *names]).rename_columns(names)
    if conditioning_image_column is not None:
        images = cast_to_images(images, "conditioning_image", f"`conditioning_image_column` of {folder}")
    images = images.add_column("row", np.arange(len(images)))
    id2label = None
    if label_column is not None:
        images, id2label = add_labels(images, dataset, label_column)
    if caption_column is not None:
        images = add_captions(images, dataset, folder, caption_column)
    return choose_samples(images, max_train_samples, seed), id2label


def check_latents(
    dataset: datasets.Dataset,
    stored: StoredLatents,
    folder: str,
    allow_unlabelled: bool = True,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """
    Checks that all latents are finite, and drops unlabelled rows unless they are allowed. `datasets` caches the check.

    Raises:
        ValueError: For NaN and infinite values, and negative standard deviations, with the names of the images; or if
            no row is left.
    """
    verdicts = dataset.select_columns([*stored.columns]).map(
        _examine,
        batched=True,
        batch_size=256,
        remove_columns=[*stored.columns],
        num_proc=num_proc,
        desc="Checking latents",
    )
    wrong = [index for index, is_sound in enumerate(verdicts["is_sound"][:]) if not is_sound]
    if wrong:
        names = list_names([dataset[index][NAME_COLUMN] for index in wrong[:10]] + wrong[10:], quote=str)
        raise ValueError(
            f"The latents of {len(wrong)} of {len(dataset)} images in {folder} are NaN, infinite or have negative "
            f"standard deviations: {names}. Encode the images again."
        )
    if "label" not in dataset.column_names or allow_unlabelled:
        return dataset
    labels = dataset["label"][:]
    labelled = [index for index, label in enumerate(labels) if label != UNLABELLED]
    if not labelled:
        raise ValueError(f"None of the {len(labels)} images in {folder} can be used: all are unlabelled.")
    if len(labelled) < len(labels):
        logger.warning(f"{len(labels) - len(labelled)} of {len(labels)} images have no label and are left out.")
        dataset = dataset.select(labelled)
    return dataset


def _examine(batch: dict[str, list]) -> dict[str, list]:
    arrays = {name: np.asarray(rows, dtype=np.float32) for name, rows in batch.items()}
    sound = np.logical_and.reduce([np.isfinite(rows).all(axis=1) for rows in arrays.values()])
    for name in set(arrays) & {PLAIN[1], FLIPPED[1]}:
        sound &= ~(arrays[name] < 0).any(axis=1)
    return {"is_sound": sound.tolist()}


class LatentDataset(ImageDataset):
    """
    Examples with stored latents instead of images: `latent_mean` and `latent_std` of the shape `(channels, height,
    width)` of a latent, float32, and `latent_noise` for the sample of the posterior. Everything else is that of
    [`ImageDataset`]: labels, captions, conditioning images, and the same flips and noise for the same seed.

    Args:
        dataset (`datasets.Dataset`): From `load_latents` and `check_latents`.
        resolution (`int` or `tuple[int, int]`): Size of the images in pixels.
        stored (`StoredLatents`): How they were made.
        kwargs: Arguments of [`ImageDataset`].

    Raises:
        ValueError: If the images should be flipped at random, but there are no latents of mirrored ones; for a
            `condition`, which is made from pixels.
    """

    def __init__(self, dataset: datasets.Dataset, resolution: Size, *, stored: StoredLatents, **kwargs: Any):
        if kwargs.get("random_flip") and not stored.random_flip:
            raise ValueError(
                "`random_flip` needs the latents of mirrored images, which are not stored. Encode the images again "
                "with `--random_flip`, or leave it out."
            )
        if kwargs.get("condition") is not None:
            raise ValueError(f"`condition` {kwargs['condition']!r} is made from pixels, and only latents are stored.")
        rows = dataset.remove_columns([*stored.columns]).rename_column(NAME_COLUMN, "image")
        super().__init__(rows, resolution, **{**kwargs, "latent_shape": stored.shape})
        # Rows that were left out are left out on disk, too, so that the others can be read where they are.
        self.latents = dataset.select_columns([*stored.columns]).flatten_indices()

    @functools.cached_property
    def _rows(self) -> dict[str, Rows]:
        table = self.latents.with_format("arrow")[:]
        return {name: Rows(table.column(name)) for name in self.latents.column_names}

    def __getstate__(self) -> dict[str, Any]:
        """Workers that do not share the memory of this process open the files themselves."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def _image_tensors(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        height, width = self.size
        window = draw_window(
            self.seed, self.epoch, index, (width, height), self.size, self.center_crop, flip=self.random_flip
        )
        columns = FLIPPED if window.flip else PLAIN
        tensors = {
            name: torch.from_numpy(self._rows[column][index].astype(np.float32)).view(self.latent_shape)
            for name, column in zip(PLAIN, columns, strict=True)
        }
        if "conditioning_image" in example:
            condition = decode_condition(example["conditioning_image"], (width, height), self._decoded_as[1])
            values = self._cut(condition, index, (width, height), self.condition_format)
            tensors["conditions"] = self.condition_format.to_unit(values).float()
        return tensors
