"""
Folders of rows of numbers in parquet files, such as latents and embeddings: preparing them, the record of how they were
made, and reading rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .repositories import check_can_be_written
from .sources import load_source


if TYPE_CHECKING:
    import datasets
    import pyarrow


PARTIAL_SUFFIX = ".incomplete"
Record = TypeVar("Record")


def prepare_folder(output_dir: str) -> Path:
    """
    An empty folder next to `output_dir`, which becomes `output_dir` once it is complete. Raises a `ValueError` if that
    exists and is not empty.
    """
    target = Path(output_dir)
    check_can_be_written("output_dir", target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"`output_dir` {output_dir!r} is not empty. Name a new folder, or delete it.")
    return target.absolute().with_name(target.absolute().name + PARTIAL_SUFFIX)


def write_record(folder: str | os.PathLike, name: str, version: int, values: Mapping[str, Any]) -> None:
    """Writes the file that says how the rows in a folder were made."""
    text = json.dumps({"version": version, **values}, indent=2, ensure_ascii=False)
    Path(folder, name).write_text(text + "\n", encoding="utf-8")


def read_record(
    folder: str | os.PathLike, name: str, version: int, build: Callable[[dict[str, Any]], Record]
) -> Record:
    """
    Reads what `write_record` wrote, which `build` makes the result from. Raises a `ValueError` for a file that is
    damaged or of another version.
    """
    path = Path(folder, name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("version")
        if found == version:
            return build(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Encode the images again.") from error
    raise ValueError(f"{path} is of version {found}, and this is {version}. Encode the images again.")


def fixed_size_lists(rows: Sequence[np.ndarray], type_: pyarrow.FixedSizeListType) -> pyarrow.Array:
    """Rows of equal length as a column of lists of this type."""
    import pyarrow

    flat = pyarrow.array(np.concatenate(rows))
    return pyarrow.FixedSizeListArray.from_arrays(flat, type_.list_size).cast(type_)


def load_stored_rows(
    folder: str, record_name: str, num_rows: int, what: str, cache_dir: str | None = None
) -> datasets.Dataset:
    """
    Loads the parquet files in a folder.

    Args:
        record_name (`str`): Name of the file that says how they were made, for errors.
        num_rows (`int`): Number of rows that were written.
        what (`str`): What they hold, for errors.

    Raises:
        ValueError: If there are none, one cannot be read, or rows are missing.
    """
    files = sorted(map(str, Path(folder).glob("*.parquet")))
    if not files:
        raise ValueError(f"{folder} holds {record_name} and no parquet file. Encode the images again.")
    try:
        dataset, _ = load_source(data_files=files, cache_dir=cache_dir)
    except ValueError as error:
        raise ValueError(f"The {what} in {folder} cannot be read: {error} Encode the images again.") from error
    if len(dataset) != num_rows:
        raise ValueError(
            f"{folder} holds {len(dataset)} rows, but {num_rows} were written ({record_name}). A file is missing, or "
            "of another folder: encode the images again."
        )
    return dataset


def check_lists(dataset: datasets.Dataset, column: str, dtype: str, length: int, folder: str, record_name: str) -> None:
    """Raises a `ValueError` unless a column holds lists of this type and length, those of the record."""
    feature = dataset.features[column]
    found = (getattr(getattr(feature, "feature", None), "dtype", str(feature)), getattr(feature, "length", None))
    if found != (dtype, length):
        raise ValueError(
            f"The column {column!r} in {folder} holds {found[1]} numbers of type {found[0]} in a row, but "
            f"{record_name} says {length} of {dtype}. Encode the images again."
        )


class Rows:
    """Rows of numbers, read from the memory-mapped files: `datasets` takes a millisecond for one."""

    def __init__(self, column: pyarrow.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.chunks = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in chunks]
        self.ends = np.cumsum([len(chunk) for chunk in chunks])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.chunks[number][index - self.ends[number]]  # counted from the end of the chunk


class RowsOfVectors:
    """Rows of different numbers of vectors, `(number, width)` each, as `datasets.Array2D` stores them."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self.chunks = []
        for chunk in column.chunks:
            if len(chunk):
                lengths, values = chunk.storage.value_lengths().to_numpy(), chunk.storage.flatten().flatten().to_numpy()
                ends = np.cumsum(lengths)
                self.chunks.append((values.reshape(ends[-1], -1), ends - lengths, ends))
        self.ends = np.cumsum([len(ends) for _, _, ends in self.chunks])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, side="right"))
        values, starts, ends = self.chunks[number]
        place = index - self.ends[number]  # counted from the end of the chunk
        return values[starts[place] : ends[place]]
