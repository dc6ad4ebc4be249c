"""
Encodes the images of a dataset once with the vision tower of a CLIP, for training a prior or a decoder of unCLIP.

    python -m diffusers_adm.data.encode_embeddings --clip runs/clip --data_files data/noto-emoji-64/train.parquet \
        --random_flip --output_dir runs/embeddings
    accelerate launch training/train_prior.py --clip runs/clip --train_data_dir runs/embeddings ...

All columns are kept, and `image_embeds` is added: the projections as CLIP gives them, which are not normalised. Images
are resized, cropped and normalised by the image processor of the CLIP.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import ImageOps

from ..commands.arguments import arg, check_at_least, parse_args
from ..commands.errors import run_command
from .checks import check_images
from .clip_models import ClipVision, hash_clip_vision, load_clip_vision
from .columns import load_image_dataset
from .decoding import decode_rgb
from .embeddings import EMBEDDING_COLUMN, EMBEDDING_DTYPE, FLIPPED_COLUMN, StoredEmbeddings
from .images import example_name
from .labels import list_names
from .sources import load_source
from .stored_rows import fixed_size_lists, prepare_folder


if TYPE_CHECKING:
    import datasets


@dataclass
class EmbeddingArguments:
    clip: str = field(metadata={"help": "CLIP with projections, on the Hub or in a folder."})
    dataset_name: str | None = arg(None, "Dataset on the Hub, or path of a local copy.")
    dataset_config_name: str | None = arg(None, "Configuration of `dataset_name`.")
    train_data_dir: str | None = arg(None, "Folder of images; the names of its subfolders are the labels.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "Split of the dataset.")
    image_column: str = arg("image", "Column of the images.")
    label_column: str | None = arg(None, "Column of labels; all columns are kept, this one is checked.")
    caption_column: str | None = arg(
        None,
        "Column of captions; all columns are kept, this one is checked. For .txt files next to the images of a folder: "
        "text.",
    )
    cache_dir: str | None = arg(None, "Cache folder of datasets and pretrained models.")
    min_image_size: int = arg(1, "Skip images whose shorter side is below this many pixels.")
    random_flip: bool = arg(False, "Store the embeddings of mirrored images, too, so that training can flip at random.")
    batch_size: int = arg(64, "Images per forward pass.")
    num_workers: int = arg(0, "Number of processes that load images; 0: this process.")
    image_check_num_proc: int | None = arg(None, "Number of processes that check the images.")
    shard_size: int = arg(10_000, "Images per parquet file.")
    output_dir: str = arg("embeddings", "New folder for the images and embeddings.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "shard_size", "image_check_num_proc", "min_image_size")
        check_at_least(self, 0, "num_workers")

    def source(self) -> dict[str, Any]:
        """Keyword arguments of `load_source`."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split", "cache_dir")
        return {name: getattr(self, name) for name in (*names, "label_column", "caption_column")}


def load_images(args: EmbeddingArguments, size: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The usable rows of the source with all their columns, and their images: `image`, not decoded, and `row`.

    Raises:
        ValueError: For a column that is missing, or has the name of a column of embeddings.
    """
    source, name = load_source(**args.source())
    for column in (EMBEDDING_COLUMN, FLIPPED_COLUMN):
        if column in source.column_names:
            raise ValueError(f"{name} has a column {column!r} already. Rename it, or encode the original data.")
    images, _ = load_image_dataset(**args.source(), image_column=args.image_column)
    images = images.select_columns(["image", "row"])
    images, _ = check_images(
        images, size, min_image_size=args.min_image_size, num_proc=args.image_check_num_proc, range_argument=None
    )
    return source.select(images["row"][:]), images


class _Pixels(torch.utils.data.Dataset):
    """Images as the vision tower takes them; with flips, also the mirrored ones."""

    def __init__(self, images: datasets.Dataset, vision: ClipVision, random_flip: bool):
        self.images, self.processor, self.random_flip = images, vision.processor, random_flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = decode_rgb(self.images[index]["image"])
        shown = {EMBEDDING_COLUMN: image} | ({FLIPPED_COLUMN: ImageOps.mirror(image)} if self.random_flip else {})
        return {name: self.processor(pixels, return_tensors="pt")["pixel_values"][0] for name, pixels in shown.items()}


def encode_images(
    vision: ClipVision,
    images: datasets.Dataset,
    names: Sequence[str],
    *,
    random_flip: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, np.ndarray]:
    """
    Embeddings of images, float32 of shape `(number, width)`, by the name of their column.

    Raises:
        ValueError: If an embedding is not finite; the message names the images, by `names`.
    """
    columns: dict[str, list[np.ndarray]] = {}
    loader = torch.utils.data.DataLoader(_Pixels(images, vision, random_flip), batch_size, num_workers=num_workers)
    done = 0
    for batch in loader:
        for name, pixel_values in batch.items():
            embeds = vision.embed(pixel_values).float().cpu()
            finite = torch.isfinite(embeds).all(dim=1).tolist()
            if not all(finite):
                wrong = [names[done + index] for index, is_finite in enumerate(finite) if not is_finite]
                raise ValueError(
                    f"The CLIP encodes {list_names(wrong, quote=str)} to NaN or infinite values. Remove these images, "
                    "or check the CLIP."
                )
            columns.setdefault(name, []).append(embeds.numpy())
        done += len(pixel_values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def write_shard(path: Path, rows: datasets.Dataset, embeddings: dict[str, np.ndarray]) -> None:
    """Writes rows with their embeddings to a parquet file, with the content of image files that rows only name."""
    import datasets
    import pyarrow
    import pyarrow.parquet
    from datasets.table import embed_table_storage

    width = next(iter(embeddings.values())).shape[1]
    lists = datasets.List(datasets.Value(EMBEDDING_DTYPE), length=width)
    # Images in folders are listed without decoding; the files are to be read as images.
    kept = {
        name: datasets.Image() if isinstance(feature, datasets.Image) else feature
        for name, feature in rows.features.items()
    }
    features = datasets.Features({**kept, **dict.fromkeys(embeddings, lists)})
    schema = features.arrow_schema
    table = embed_table_storage(rows.with_format("arrow")[:].cast(rows.features.arrow_schema))
    for name, values in embeddings.items():
        table = table.append_column(schema.field(name), fixed_size_lists([*values], schema.field(name).type))
    pyarrow.parquet.write_table(pyarrow.table(table.columns, schema=schema), path)


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(EmbeddingArguments, argv, description=__doc__)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()  # it lists the weights of the other tower
    partial = prepare_folder(args.output_dir)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    vision = load_clip_vision("clip", args.clip, cache_dir=args.cache_dir)
    fingerprint = hash_clip_vision(vision)
    vision.model.to(device)
    rows, images = load_images(args, vision.model.config.image_size)

    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)
    num_shards = math.ceil(len(images) / args.shard_size)
    for shard in range(num_shards):
        chosen = range(shard * args.shard_size, min((shard + 1) * args.shard_size, len(images)))
        shown = images.select(chosen)
        embeddings = encode_images(
            vision,
            shown,
            [example_name(example, index) for index, example in zip(chosen, shown, strict=True)],
            random_flip=args.random_flip,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )
        path = partial / f"embeddings-{shard:05d}-of-{num_shards:05d}.parquet"
        write_shard(path, rows.select(chosen), embeddings)
    stored = StoredEmbeddings(
        fingerprint=fingerprint,
        clip=args.clip,
        width=vision.width,
        num_images=len(images),
        random_flip=args.random_flip,
        image_column=args.image_column,
    )
    stored.write(partial)
    os.replace(partial, args.output_dir)  # at once: a folder of this name is complete
    num_bytes = sum(path.stat().st_size for path in Path(args.output_dir).iterdir())
    print(
        f"Embeddings of {len(images)} images in {args.output_dir} ({num_bytes / 2**20:.1f} MiB), of width "
        f"{vision.width}, by the CLIP {args.clip} ({fingerprint})."
    )


if __name__ == "__main__":
    run_command(main)
