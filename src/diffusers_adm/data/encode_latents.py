"""
Encodes the images of a dataset once, for training U-Nets in the latents of an autoencoder.

    python -m diffusers_adm.data.encode_latents --vae runs/autoencoder --data_files data/noto-emoji-64/train.parquet \
        --resolution 64 --label_column label --caption_column text --random_flip --output_dir runs/latents
    accelerate launch training/train_adm.py --vae runs/autoencoder --train_data_dir runs/latents ...

Mean and standard deviation of each latent are stored, so that training draws a new sample of it in each epoch. Images
are resized as for training and cropped at the centre.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..commands.arguments import arg, check_at_least, parse_args
from ..commands.errors import run_command
from ..conditioning.control_images import ControlImageKind
from ..conditioning.image_format import ImageFormat, ImageMode, Size, as_sample_size, as_size, parse_size
from ..conditioning.latents import LatentSpace, Posterior
from .checks import check_images
from .columns import load_image_dataset
from .decoding import decode_image, decoded_size, is_eight_bit
from .embeddings import EMBEDDING_DTYPE, check_embeddings, embedding_columns, embedding_columns_in_errors
from .formats import FormatRequest, find_image_format, parse_value_range, range_word
from .images import ImageDataset, example_name
from .labels import list_names
from .latents import (
    FLIPPED,
    LATENT_COLUMNS,
    NAME_COLUMN,
    PLAIN,
    LatentsDtype,
    StoredLatents,
    hash_autoencoder,
    hash_encoder,
    load_autoencoder,
)
from .resizing import Window
from .stored_rows import fixed_size_lists, prepare_folder


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger("diffusers_adm.data.encode_latents")

# Rounding to the stored dtype may change a sample, whose standard deviation should be 1, by this much.
MAX_ROUNDING = 0.01
# Outside of this range, the standard deviation of the samples does not suit noise schedules.
USUAL_STD = (0.5, 2.0)
CONDITION_COLUMN = "conditioning_image"  # of conditioning images that are made here


@dataclass
class EncodingArguments:
    vae: str = field(
        metadata={"help": "Autoencoder, on the Hub or in a folder: in its root, or in that of a pipeline."}
    )
    resolution: str = field(
        metadata={"help": "Size of the images in pixels: the side of a square, or HEIGHTxWIDTH, e.g. 64x256."}
    )
    dataset_name: str | None = arg(None, "Dataset on the Hub, or path of a local copy.")
    dataset_config_name: str | None = arg(None, "Configuration of `dataset_name`.")
    train_data_dir: str | None = arg(None, "Folder of images; the names of its subfolders are the labels.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "Split of the dataset.")
    image_column: str = arg("image", "Column of the images.")
    label_column: str | None = arg(None, "Column of labels to keep.")
    caption_column: str | None = arg(None, "Column of captions to keep.")
    conditioning_image_column: str | None = arg(
        None, "Column of conditioning images to keep, resized and cropped like the images; for ControlNets."
    )
    condition: ControlImageKind | None = arg(
        None,
        "Kind of conditioning image to make from each image, and to store in the column `conditioning_image`; for "
        "ControlNets.",
    )
    image_embeds_column: str | None = arg(
        None,
        "Column of image embeddings to keep, with `random_flip` also that of the mirrored images, `NAME_flipped`; for "
        "decoders of unCLIP.",
    )
    cache_dir: str | None = arg(None, "Cache folder of datasets and pretrained models.")
    min_image_size: int | None = arg(
        None, "Skip images whose shorter side is below this many pixels; none: half the resolution."
    )
    image_mode: ImageMode | None = arg(None, "Meaning of the channels; none: the autoencoder's, or by its channels.")
    value_range: list[float | str] | None = arg(
        None,
        "Values of the data for -1 and 1, LOW HIGH, or auto; none: the autoencoder's, or the whole range of the "
        "integer type.",
        parse=range_word,
    )
    condition_value_range: list[float | str] | None = arg(
        None,
        "Values of the conditioning images for 0 and 1, LOW HIGH, or auto; none: the whole range of the integer type.",
        parse=range_word,
    )
    random_flip: bool = arg(False, "Store the latents of mirrored images, too, so that training can flip at random.")
    dtype: LatentsDtype = arg("float16", "Type of the stored numbers.")
    batch_size: int = arg(16, "Images per forward pass.")
    num_workers: int = arg(0, "Number of processes that load images; 0: this process.")
    image_check_num_proc: int | None = arg(None, "Number of processes that check the images.")
    shard_size: int = arg(10_000, "Images per parquet file.")
    output_dir: str = arg("latents", "New folder for the latents.")

    def __post_init__(self):
        self.size = parse_size("resolution", self.resolution)
        parse_value_range("value_range", self.value_range)
        parse_value_range("condition_value_range", self.condition_value_range)
        if self.condition_value_range is not None and self.condition is not None:
            raise ValueError(
                f"`condition_value_range` was given, but `condition` {self.condition!r} makes images of a format of "
                "its own. Leave it out."
            )
        if self.condition_value_range is not None and self.conditioning_image_column is None:
            raise ValueError("`condition_value_range` was given without `conditioning_image_column`. Pass both.")
        if self.condition is not None and self.conditioning_image_column is not None:
            raise ValueError(
                f"`condition` is {self.condition!r} and `conditioning_image_column` "
                f"{self.conditioning_image_column!r}. Pass one of them."
            )
        check_at_least(self, 1, "batch_size", "shard_size", "image_check_num_proc")
        check_at_least(self, 0, "num_workers", "min_image_size")
        kept = [self.label_column, self.caption_column, self.conditioning_image_column, self.image_embeds_column]
        for column in kept:
            if column in LATENT_COLUMNS or (self.condition is not None and column == CONDITION_COLUMN):
                raise ValueError(f"The column {column!r} has a name that latents need. Rename it in the data.")

    def load_images(self) -> tuple[datasets.Dataset, dict[int, str] | None]:
        """The images, as training loads them."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split", "image_column")
        names += ("label_column", "caption_column", "conditioning_image_column", "cache_dir")
        with embedding_columns_in_errors():
            return load_image_dataset(**{name: getattr(self, name) for name in names}, tensor_columns=self.embeddings)

    @property
    def embeddings(self) -> dict[str, str]:
        """The columns of image embeddings, by their names in the examples."""
        return embedding_columns(self.image_embeds_column, self.random_flip)


def encode_batch(
    latent_space: LatentSpace, images: torch.Tensor, names: Sequence[str], dtype: LatentsDtype
) -> dict[str, np.ndarray]:
    """
    Mean and standard deviation of the latents of images, as rows of a column each.

    Raises:
        ValueError: If a value is not finite, or `dtype` does not hold it; the message names the images.
    """
    with torch.no_grad():
        posterior = latent_space.posterior(images)
    exact = [part.float().flatten(1).cpu() for part in posterior]
    stored = [part.to(getattr(torch, dtype)) for part in exact]
    for part in exact:
        if not torch.isfinite(part).all():
            wrong = [name for name, row in zip(names, part, strict=True) if not torch.isfinite(row).all()]
            raise ValueError(
                f"The autoencoder encodes {list_names(wrong, quote=str)} to NaN or infinite values. Remove these "
                "images, or check the autoencoder."
            )
    _, scale = latent_space.scales(posterior.mean.cpu())
    if isinstance(scale, torch.Tensor):  # by channel, for latents in rows
        scale = scale.expand(posterior.mean.shape[1:]).flatten()
    for part, rounded in zip(exact, stored, strict=True):
        error = ((rounded.float() - part) * scale).abs().amax(dim=1)
        wrong = [name for name, amount in zip(names, error.tolist(), strict=True) if not amount <= MAX_ROUNDING]
        if wrong:
            raise ValueError(
                f"`dtype` {dtype} does not hold the latents of {list_names(wrong, quote=str)}: a sample would be off "
                f"by up to {error.max():.2g} of about one standard deviation. Pass `--dtype float32`."
            )
    return {name: rows.numpy() for name, rows in zip(PLAIN, stored, strict=True)}


class _Moments:
    """Mean and standard deviation of the samples, by sums in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, latent_space: LatentSpace, rows: dict[str, np.ndarray]) -> None:
        shape = (latent_space.channels, -1, 1)  # some autoencoders have a scale for each channel
        mean, std = (torch.from_numpy(rows[name]).double().unflatten(1, shape) for name in PLAIN)
        samples = latent_space.to_samples(Posterior(mean, std))
        self.count += samples.numel()
        self.total += float(samples.sum())
        self.squares += float((samples**2).sum() + ((std * latent_space.scales(std)[1]) ** 2).sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0))


def encode_dataset(
    latent_space: LatentSpace,
    dataset: ImageDataset,
    folder: Path,
    *,
    features: datasets.Features,
    columns: dict[str, str],
    names: Sequence[str],
    dtype: LatentsDtype,
    random_flip: bool,
    batch_size: int,
    num_workers: int,
    shard_size: int,
    device: torch.device | str,
) -> _Moments:
    """
    Writes parquet files of the latents of a dataset.

    Args:
        features (`datasets.Features`): The columns to write.
        columns (`dict`): Columns of the dataset that are kept, by their names in the files.
        names (sequence of `str`): Names of the images.
    """
    import pyarrow
    import pyarrow.parquet

    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    num_shards, moments = math.ceil(len(dataset) / shard_size), _Moments()
    rows: dict[str, list] = {name: [] for name in features}
    kept = {name: dataset.dataset[column][:] for name, column in columns.items() if column != "conditioning_image"}
    done = shard = 0

    def write(number: int) -> None:
        nonlocal shard
        table = pyarrow.table(
            {name: _to_arrow(values[:number], features.arrow_schema.field(name).type) for name, values in rows.items()},
            schema=features.arrow_schema,
        )
        pyarrow.parquet.write_table(table, folder / f"latents-{shard:05d}-of-{num_shards:05d}.parquet")
        shard += 1
        for values in rows.values():
            del values[:number]

    for batch in loader:
        images = batch["images"].to(device)
        of_batch = names[done : done + len(images)]
        encoded = encode_batch(latent_space, images, of_batch, dtype)
        moments.add(latent_space, encoded)
        if random_flip:
            mirrored = encode_batch(latent_space, images.flip(-1), of_batch, dtype)
            encoded |= {name: mirrored[plain] for plain, name in zip(PLAIN, FLIPPED, strict=True)}
        for name, values in encoded.items():
            rows[name] += list(values)
        rows[NAME_COLUMN] += of_batch
        for name, column in columns.items():
            if column == "conditioning_image":
                rows[name] += [_store(values, dataset.condition_format) for values in batch["conditions"]]
            else:
                rows[name] += kept[name][done : done + len(images)]
        done += len(images)
        while len(rows[NAME_COLUMN]) >= shard_size:
            write(shard_size)
    if rows[NAME_COLUMN]:
        write(shard_size)
    if lost := [names[index] for index in dataset.unreadable]:
        raise ValueError(f"{list_names(lost, quote=str)} became unreadable meanwhile. Start again.")
    return moments


def _to_arrow(values: list, type_: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_fixed_size_list(type_):
        return fixed_size_lists(values, type_)
    return pyarrow.array(values, type=type_)


def _store(fractions: torch.Tensor, image_format: ImageFormat) -> dict[str, Any]:
    """A conditioning image as a file in memory: PNG for 8 bits and colours, or else `.npy`."""
    values = image_format.from_unit(fractions).permute(1, 2, 0).numpy().astype(image_format.dtype)
    file = BytesIO()
    if is_eight_bit(image_format):
        Image.fromarray(values[..., 0] if image_format.channels == 1 else values).save(file, format="png")
    else:
        np.save(file, values, allow_pickle=False)
    return {"bytes": file.getvalue(), "path": None}


def _is_cropped(example: dict[str, Any], image_format: ImageFormat, size: tuple[int, int]) -> dict[str, bool]:
    """Whether an image loses pixels at the sides."""
    window = Window.place(decoded_size(decode_image(example["image"], image_format)), size, 0.5, 0.5, False)
    return {"is_cropped": window.resized != (window.width, window.height)}


def _name_images(images: datasets.Dataset, folder: str | None) -> list[str]:
    """Names for messages; paths are relative to the folder of the data."""
    names = []
    for index, example in enumerate(images.select_columns(["image", "row"])):
        name = example_name(example, index)
        names.append(os.path.relpath(name, folder) if folder is not None and os.path.isabs(name) else name)
    return names


def main(argv: Sequence[str] | None = None) -> None:
    import datasets

    (args,) = parse_args(EncodingArguments, argv, description=__doc__)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    partial = prepare_folder(args.output_dir)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    vae, known = load_autoencoder("vae", args.vae, cache_dir=args.cache_dir)
    latent_space, autoencoder_hash = LatentSpace(vae.to(device)), hash_autoencoder(vae)
    resolution: Size = args.size
    latent_space.check_size(resolution, "`resolution`")

    images, id2label = args.load_images()
    width = check_embeddings(images, args.embeddings) if args.embeddings else 0
    channels = latent_space.image_channels[0]
    request = FormatRequest(channels, args.image_mode, parse_value_range("value_range", args.value_range), known)
    image_format = find_image_format(images, request, num_proc=args.image_check_num_proc)
    if known is not None and image_format != known:
        raise ValueError(
            f"The images are {image_format}, but the autoencoder was trained on {known}. Leave `image_mode` and "
            "`value_range` out, or train another autoencoder."
        )
    condition_format = None
    if args.conditioning_image_column is not None:
        condition_range = parse_value_range("condition_value_range", args.condition_value_range)
        asked = FormatRequest(value_range=condition_range, mode_argument=None, range_argument="--condition_value_range")
        num_proc = args.image_check_num_proc
        condition_format = find_image_format(images, asked, num_proc=num_proc, column="conditioning_image")
        if condition_format == ImageFormat("L", 1):  # as in training
            condition_format = ImageFormat()
    images, _ = check_images(
        images,
        resolution,
        min_image_size=args.min_image_size,
        num_proc=args.image_check_num_proc,
        id2label=id2label,
        image_format=image_format,
        condition_format=condition_format,
    )
    dataset = ImageDataset(
        images,
        resolution,
        center_crop=True,
        condition=args.condition,
        image_format=image_format,
        condition_format=condition_format,
    )
    if args.condition is not None:
        condition_format = dataset.condition_format
    size = latent_space.latent_size(resolution)
    latents = datasets.List(datasets.Value(args.dtype), length=latent_space.channels * size[0] * size[1])
    features = dict.fromkeys((*PLAIN, *FLIPPED) if args.random_flip else PLAIN, latents)
    features[NAME_COLUMN] = datasets.Value("string")
    columns = {}
    for column, name in (
        (args.label_column, "label"),
        (args.caption_column, "caption"),
        (args.conditioning_image_column, "conditioning_image"),
    ):
        if column is not None:
            columns[column], features[column] = name, images.features[name]
    if args.condition is not None:
        columns[CONDITION_COLUMN], features[CONDITION_COLUMN] = "conditioning_image", datasets.Image()
    for name, column in args.embeddings.items():
        columns[column], features[column] = name, datasets.List(datasets.Value(EMBEDDING_DTYPE), length=width)
    if args.label_column is not None:
        features[args.label_column] = datasets.ClassLabel(names=list(id2label.values()))

    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)
    moments = encode_dataset(
        latent_space,
        dataset,
        partial,
        features=datasets.Features(features),
        columns=columns,
        names=_name_images(images, args.train_data_dir),
        dtype=args.dtype,
        random_flip=args.random_flip,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        shard_size=args.shard_size,
        device=device,
    )
    cropped = images.select_columns("image").map(
        _is_cropped,
        remove_columns=["image"],
        fn_kwargs={"image_format": image_format, "size": dataset.size},
        num_proc=args.image_check_num_proc,
        desc="Measuring images",
    )
    stored = StoredLatents(
        autoencoder=autoencoder_hash,
        vae=args.vae,
        scaling_factor=latent_space.scale,
        shift_factor=latent_space.shift,
        channels=latent_space.channels,
        size=size,
        resolution=as_sample_size(as_size(resolution)),
        dtype=args.dtype,
        image_format=image_format,
        condition_format=condition_format,
        random_flip=args.random_flip,
        num_cropped=sum(cropped["is_cropped"][:]),
        num_images=len(images),
        label_column=args.label_column,
        caption_column=args.caption_column,
        conditioning_image_column=CONDITION_COLUMN if args.condition is not None else args.conditioning_image_column,
        encoder=hash_encoder(vae),
        image_embeds_column=args.image_embeds_column,
        condition=args.condition,
    )
    stored.write(partial)
    os.replace(partial, args.output_dir)  # at once: a folder of this name is complete
    low, high = USUAL_STD
    if not low <= moments.std <= high:
        logger.warning(
            f"The samples of the latents have the standard deviation {moments.std:.3g}; it should be close to 1. Set "
            f"`scaling_factor` of the autoencoder to {latent_space.scale / max(moments.std, 1e-12):.4g}."
        )
    num_bytes = sum(path.stat().st_size for path in Path(args.output_dir).iterdir())
    print(
        f"Latents of {len(images)} images in {args.output_dir} ({num_bytes / 2**20:.1f} MiB): {latent_space.channels} "
        f"channels at {size[0]} x {size[1]}; samples have mean {moments.mean:.3f} and standard deviation "
        f"{moments.std:.3f}."
    )


if __name__ == "__main__":
    run_command(main)
