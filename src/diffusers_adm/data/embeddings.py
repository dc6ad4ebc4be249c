"""
Embeddings of images by a CLIP as data: what `encode_embeddings` stored, with captions, for training a prior.

A folder of stored embeddings holds parquet files and `embeddings.json`, which says how they were made. A row has the
columns of the source under their names, `image_embeds` (the projection, as CLIP gives it) and, with flips,
`image_embeds_flipped` (of the mirrored image).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .captions import Captions
from .columns import add_captions, check_column, choose_samples
from .folders import EMBEDDINGS_NAME
from .images import FLIPPED_ENDING
from .labels import list_names
from .resizing import draw_flip
from .stored_rows import Rows, check_lists, load_stored_rows, read_record, write_record


if TYPE_CHECKING:
    import datasets


EMBEDDINGS_VERSION = 1
EMBEDDING_COLUMN, FLIPPED_COLUMN = "image_embeds", "image_embeds_flipped"
EMBEDDING_DTYPE = "float32"


@dataclass(frozen=True)
class StoredEmbeddings:
    """
    How a folder of embeddings was made, from its `embeddings.json`.

    Attributes:
        fingerprint (`str`): Fingerprint of the CLIP, from `hash_clip_vision`.
        clip (`str`): The name that it was loaded by.
        width (`int`): Width of the embeddings.
        num_images (`int`): Number of rows.
        random_flip (`bool`): Whether the embeddings of mirrored images are stored, too.
        image_column (`str`): Column of the images.
    """

    fingerprint: str
    clip: str
    width: int
    num_images: int
    random_flip: bool
    image_column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of embeddings."""
        return (EMBEDDING_COLUMN, FLIPPED_COLUMN) if self.random_flip else (EMBEDDING_COLUMN,)

    def write(self, folder: str | Path) -> None:
        """Writes `embeddings.json`."""
        write_record(folder, EMBEDDINGS_NAME, EMBEDDINGS_VERSION, dataclasses.asdict(self))

    @classmethod
    def read(cls, argument: str, folder: str) -> StoredEmbeddings:
        """
        Reads `embeddings.json`. Raises a `ValueError` if `folder`, the value of `argument`, has none, or for one that
        is damaged or of another version.
        """
        if not Path(folder, EMBEDDINGS_NAME).is_file():
            raise ValueError(
                f"`{argument}` is {folder!r}, which holds no {EMBEDDINGS_NAME}. Name a folder that `python -m "
                "diffusers_adm.data.encode_embeddings` wrote."
            )
        return read_record(folder, EMBEDDINGS_NAME, EMBEDDINGS_VERSION, lambda values: cls(**values))

    def check(self, fingerprint: str, clip: str, folder: str) -> None:
        """Raises a `ValueError` for embeddings of another CLIP than `clip`, which has this `fingerprint`."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"The embeddings in {folder} are those of another CLIP, {self.clip}, whose fingerprint is "
                f"{self.fingerprint}; that of `clip` {clip!r} is {fingerprint}. Pass `--clip` with the former one, or "
                "encode the images again."
            )


def load_embeddings(
    folder: str,
    stored: StoredEmbeddings,
    caption_column: str,
    cache_dir: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    caption_argument: str = "caption_column",
) -> datasets.Dataset:
    """
    Loads stored embeddings, with the columns of embeddings, `row` and `caption`, and checks them. `caption_argument` is
    the argument that names the column of captions.

    Raises:
        ValueError: If a column is missing, if rows, type or width of the embeddings are not those of `embeddings.json`,
            or if some are not finite.
    """
    dataset = load_stored_rows(folder, EMBEDDINGS_NAME, stored.num_images, "embeddings", cache_dir)
    for column in stored.columns:
        check_column(dataset, folder, EMBEDDINGS_NAME, column)
        check_lists(dataset, column, EMBEDDING_DTYPE, stored.width, folder, EMBEDDINGS_NAME)
    check_column(dataset, folder, caption_argument, caption_column)
    embeddings = dataset.select_columns([*stored.columns]).add_column("row", np.arange(len(dataset)))
    embeddings = add_captions(embeddings, dataset, folder, caption_column)
    check_embeddings(embeddings, {column: column for column in stored.columns}, f" of {folder}")
    return choose_samples(embeddings, max_samples, seed)


class EmbeddingDataset(torch.utils.data.Dataset):
    """
    Examples of embeddings and captions; the randomness depends only on the seed, the epoch and the example, as in
    `ImageDataset`, and the flips are the same.

    Args:
        dataset (`datasets.Dataset`): From `load_embeddings`.
        stored (`StoredEmbeddings`): How they were made.
        captions (`Captions`, *optional*): Captions of the same examples, in their order. Of several captions of an
            example, each epoch draws one.
        random_flip (`bool`, defaults to `False`): Take the embedding of the mirrored image for half of the examples.
        seed (`int`, defaults to 0): The seed of the run.

    Raises:
        ValueError: For `random_flip` without embeddings of mirrored images.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        stored: StoredEmbeddings,
        captions: Captions | None = None,
        random_flip: bool = False,
        seed: int = 0,
    ):
        if random_flip and not stored.random_flip:
            raise ValueError(
                "`random_flip` needs the embeddings of mirrored images, which are not stored. Encode the images again "
                "with `--random_flip`, or leave it out."
            )
        self.dataset, self.captions, self.random_flip, self.seed = dataset, captions, random_flip, seed
        # Rows that were left out are left out on disk, too, so that the others can be read where they are.
        self.embeddings = dataset.select_columns([*stored.columns]).flatten_indices()
        # In shared memory, since workers that live on over epochs hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Selects the flips and captions of `epoch`, in workers too."""
        self._epoch.fill_(epoch)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.embeddings.features[EMBEDDING_COLUMN].length

    @property
    def columns(self) -> list[str]:
        """The columns that training draws from."""
        return [EMBEDDING_COLUMN, FLIPPED_COLUMN] if self.random_flip else [EMBEDDING_COLUMN]

    @functools.cached_property
    def rows(self) -> dict[str, Rows]:
        """The embeddings by column, as float32 arrays of shape `(width,)`."""
        table = self.embeddings.with_format("arrow")[:]
        return {name: Rows(table.column(name)) for name in self.embeddings.column_names}

    def __getstate__(self) -> dict[str, Any]:
        """Workers that do not share the memory of this process open the files themselves."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """Names an example for messages."""
        return f"row {self.dataset[index].get('row', index)}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns `index`, an int64 scalar, `image_embeds`, float32 of shape `(width,)`, and the tensors of `captions`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} examples.")
        is_flipped = self.random_flip and draw_flip(self.seed, self.epoch, index)
        row = self.rows[FLIPPED_COLUMN if is_flipped else EMBEDDING_COLUMN][index]
        example = {"index": torch.tensor(index), "image_embeds": torch.from_numpy(row.copy())}
        if self.captions is not None:
            example |= self.captions.at(index, self.seed, self.epoch)
        return example


# Embeddings in a column next to images or latents


def embedding_columns(column: str | None, random_flip: bool) -> dict[str, str]:
    """The `tensor_columns` of `load_image_dataset` for image embeddings, with flips also those of mirrored images."""
    if column is None:
        return {}
    flipped = {FLIPPED_COLUMN: f"{column}{FLIPPED_ENDING}"} if random_flip else {}
    return {EMBEDDING_COLUMN: column} | flipped


@contextlib.contextmanager
def embedding_columns_in_errors() -> Iterator[None]:
    """Errors of `load_image_dataset` about missing `tensor_columns` name the argument that asks for them."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if f"tensor_columns[{FLIPPED_COLUMN!r}]" in message:
            raise ValueError(
                "`random_flip` needs the embeddings of mirrored images, but there are none: "
                + message.replace(f"`tensor_columns[{FLIPPED_COLUMN!r}]`", "their column")
                + " Encode the images with `--random_flip`, or leave it out."
            ) from error
        raise ValueError(message.replace(f"tensor_columns[{EMBEDDING_COLUMN!r}]", "image_embeds_column")) from error


def check_embeddings(dataset: datasets.Dataset, columns: Mapping[str, str], source: str = "") -> int:
    """
    Checks columns of image embeddings, and returns the width of these.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`, with the column `row`.
        columns (mapping): From `embedding_columns`; the values are for messages.
        source (`str`, *optional*): What messages add to the name of a column, such as `" of FOLDER"`.

    Raises:
        ValueError: If a column does not hold lists of numbers of one length, or if some are missing or not finite.
    """
    import datasets

    widths: dict[str, int] = {}
    for name, column in columns.items():
        feature = dataset.features[name]
        number = getattr(feature, "feature", None)
        if not isinstance(number, datasets.Value) or not number.dtype.startswith("float"):
            raise ValueError(
                f"The column {column!r}{source} is of type {feature}; image embeddings are lists of floating point "
                "numbers. Name a column that `python -m diffusers_adm.data.encode_embeddings` wrote."
            )
        missing, lengths, wrong = [], {}, []
        for batch in dataset.select_columns([name, "row"]).with_format("arrow").iter(batch_size=1000):
            values, rows = batch.column(name).combine_chunks(), batch.column("row").to_pylist()
            for row, value in zip(rows, values, strict=True):
                if not value.is_valid:
                    missing.append(row)
                    continue
                numbers = value.values.to_numpy(zero_copy_only=False)
                lengths.setdefault(len(numbers), row)
                if not np.isfinite(numbers).all():
                    wrong.append(row)
        for problem, found in (("missing", missing), ("NaN or infinite", wrong)):
            if found:
                names = list_names([f"row {row}" for row in found], quote=str)
                raise ValueError(
                    f"{len(found)} of {len(dataset)} embeddings in the column {column!r}{source} are {problem}: "
                    f"{names}. Encode these images again, or remove them."
                )
        if len(lengths) != 1 or 0 in lengths:
            known = ", ".join(f"{length} (row {row})" for length, row in lengths.items())
            raise ValueError(
                f"The embeddings in the column {column!r}{source} have different lengths, or none: {known}. Encode the "
                "images with one CLIP."
            )
        widths[column] = next(iter(lengths))
    if len(set(widths.values())) > 1:
        raise ValueError(f"The embeddings have different widths: {widths}. Encode the images with one CLIP.")
    return next(iter(widths.values()))
