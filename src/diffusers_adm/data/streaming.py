"""
Images that are read while training, from shards: `datasets`' streaming mode on parquet files and WebDataset tars.

Nothing is downloaded or converted before, so the data may be larger than the disk. In return, examples are read in the
order of [`StreamOrder`], and images that cannot be used are found as they are met.

The rows of the shards are counted once (parquet files say their number; of tars, the headers are read), and kept in the
cache folder of `datasets`. The lengths of epochs are therefore known, and positions are exact.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import os
import tarfile
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .checks import NO_LABEL, UNLABELLED_REFUSED
from .fingerprints import hash_plain
from .images import MAX_SUBSTITUTIONS, ImageDataset, example_name, report_skipped
from .labels import UNLABELLED, list_names
from .pixels import UnusableImageError
from .skipped import SkipReport
from .stream_order import Rows, ShuffleBuffer, StreamOrder


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses must be importable without it.
    import datasets


logger = logging.getLogger(__name__)

DEFAULT_BUFFER_SIZE = 1000  # examples
PARQUET_SUFFIXES = (".parquet",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_BATCH_SIZE = 16  # rows
COUNTING_THREADS = 16
# The first examples, of shards that are evenly spaced, tell the format of the images and are shown in validation.
SAMPLE_SHARDS, SAMPLE_SIZE = 16, 256
UNKNOWN_LABEL = "unknown label"
NO_ALTERNATIVE = "or leave `streaming` out"


# 1. Shards


@dataclass
class StreamSource:
    """
    Shards, and how their rows become examples as `load_image_dataset` gives them. From [`open_stream`].

    Args:
        dataset (`datasets.IterableDataset`): The rows; images are not decoded.
        name (`str`): Of the source, for messages.
        files (list of `str`): The shards.
        sizes (list of `int`): Their numbers of rows.
        columns (mapping): Name in the examples -> column; "json.caption" is an entry of the column `json`.
        class_names (list of `str`, *optional*): The classes, if there are labels.
        rows_of_classes (mapping, *optional*): Number of the class -> label of the examples; `None`: the same.
        allow_unlabelled (`bool`, defaults to `True`): Keep examples without a label.
    """

    dataset: datasets.IterableDataset
    name: str
    files: list[str]
    sizes: list[int]
    columns: Mapping[str, str]
    class_names: list[str] | None = None
    rows_of_classes: Mapping[int, int] | None = None
    allow_unlabelled: bool = True

    @property
    def id2label(self) -> dict[int, str] | None:
        """Number of the class -> name."""
        return None if self.class_names is None else dict(enumerate(self.class_names))

    def facts(self) -> dict[str, Any]:
        """What tells these shards from others: their number, that of their rows, and a hash of names, sizes, rows."""
        root = os.path.dirname(os.path.commonprefix([*self.files, self.files[0]]))
        # The addresses of files on the Hub hold the commit.
        shards = [
            (os.path.relpath(file, root or "."), os.path.getsize(file), size)
            if os.path.isfile(file)
            else (file, None, size)
            for file, size in zip(self.files, self.sizes, strict=True)
        ]
        return {"shards": len(self.files), "rows": sum(self.sizes), "hash": hash_plain(shards)}

    def read(self, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields these rows, as they are stored, with their numbers in the shard."""
        shard = self.dataset.shard(num_shards=len(self.files), index=rows.shard).skip(rows.first)
        # Not `iter(shard)`, which distributes the one shard over the workers of a loader, too.
        read = 0
        if self.files[rows.shard].endswith(PARQUET_SUFFIXES):
            batches = (table.to_pylist() for table in shard.with_format("arrow").iter(batch_size=READ_BATCH_SIZE))
        else:
            batches = (_rows_of(batch) for batch in shard.iter(batch_size=READ_BATCH_SIZE))
        for row in itertools.islice(itertools.chain.from_iterable(batches), rows.last - rows.first):
            yield rows.first + read, row
            read += 1
        if read < rows.last - rows.first:
            raise RuntimeError(
                f"{self.files[rows.shard]} has {rows.first + read} rows, and had {self.sizes[rows.shard]} when they "
                "were counted. Do not change the data while a run reads them; start it again."
            )

    def example(self, raw: Mapping[str, Any], shard: int, row: int) -> dict[str, Any]:
        """An example as `load_image_dataset` gives it. Raises an `UnusableImageError` for a label that is none."""
        values = {name: _value(raw, column) for name, column in self.columns.items()}
        values["row"] = f"{row} of {os.path.basename(self.files[shard])}"
        for name in ("image", "conditioning_image"):
            if isinstance(values.get(name), bytes):
                values[name] = {"bytes": values[name], "path": None}
        if "caption" in values and isinstance(values["caption"], list):
            values["caption"] = [text for text in values["caption"] if text]
        elif "caption" in values:
            values["caption"] = values["caption"] or ""
        if "label" in values:
            values["label"] = self._label(values["label"])
        return values

    def _label(self, value: Any) -> int:
        assert self.class_names is not None
        if value is None or value in ("", -1) or value != value:  # NaN
            if not self.allow_unlabelled:
                raise UnusableImageError(NO_LABEL, UNLABELLED_REFUSED)
            return UNLABELLED
        if isinstance(value, str):
            number = self.class_names.index(value) if value in self.class_names else -1
        else:
            number = int(value) if int(value) == value and value < len(self.class_names) else -1
        if number < 0:
            raise UnusableImageError(UNKNOWN_LABEL, f"{value!r} is none of the {len(self.class_names)} classes")
        return number if self.rows_of_classes is None else self.rows_of_classes[number]

    def sample(self) -> datasets.Dataset:
        """
        The first examples of shards that are evenly spaced, in memory, without those whose label is unknown. Raises a
        `ValueError` if none is left.
        """
        import datasets

        filled = [shard for shard, size in enumerate(self.sizes) if size]
        count = min(SAMPLE_SHARDS, len(filled))
        shards = [filled[len(filled) * place // count] for place in range(count)]
        examples, reasons = [], []
        for shard in shards:
            for row, raw in self.read(Rows(shard, 0, min(self.sizes[shard], max(1, SAMPLE_SIZE // count)))):
                try:
                    examples.append(self.example(raw, shard, row))
                except UnusableImageError as error:
                    reasons.append(f"row {row} of {self.files[shard]} ({error})")
        if reasons:
            logger.warning(f"{len(reasons)} of the first examples are left out: {list_names(reasons, 3, str)}.")
        if not examples:
            raise ValueError(f"None of the first {len(reasons)} examples of {self.name} can be used, see the log.")
        stored = {"image": datasets.Image(decode=False), "conditioning_image": datasets.Image(decode=False)}
        # Columns of numbers keep the types that they are stored in.
        table = {name: [example[name] for example in examples] for name in examples[0]}
        features = datasets.Features(
            {
                name: stored.get(name) or datasets.Dataset.from_dict({name: values}).features[name]
                for name, values in table.items()
            }
        )
        return datasets.Dataset.from_dict(table, features=features)


def _rows_of(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _value(raw: Mapping[str, Any], column: str) -> Any:
    if column in raw:
        return raw[column]
    outer, _, inner = column.partition(".")
    return (raw[outer] or {}).get(inner)


def open_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    cache_dir: str | None = None,
    caption_column: str | None = None,
    conditioning_image_column: str | None = None,
    tensor_columns: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
) -> StreamSource:
    """
    Opens the shards of a dataset to be streamed, and counts their rows.

    Args:
        data_files (`str` or sequence of `str`, *optional*): Parquet files, or WebDataset tars: paths, patterns or URLs,
            of one kind.
        dataset_name (`str`, *optional*), dataset_config_name (`str`, *optional*), split (`str`, defaults to "train"):
            A dataset on the Hub that holds either, or a local copy of one, instead.
        image_column (`str`, defaults to "image"), label_column (`str`, *optional*), caption_column (`str`,
            *optional*), conditioning_image_column (`str`, *optional*), tensor_columns (mapping, *optional*): As for
            `load_image_dataset`. In tars, columns are the endings of the files, such as `jpg`, `cls` and `txt`;
            `json.caption` is an entry of a JSON file.
        cache_dir (`str`, *optional*): Cache folder of `datasets`, also for the numbers of rows.
        class_names (sequence of `str`, *optional*): The classes, of labels that do not name them.

    Raises:
        ValueError: If there are no such shards or columns, they are of another kind, or the classes are unknown.
    """
    builder, name = _find_builder(dataset_name, dataset_config_name, data_files, cache_dir)
    by_split = {str(key): list(files) for key, files in builder.config.data_files.items()}
    if split not in by_split:
        raise ValueError(
            f"`split` is {split!r}, but {name} has the splits {', '.join(by_split)}. With `streaming`, name a "
            "whole one: slices need all rows at once."
        )
    if not by_split[split]:
        raise ValueError(f"{name} has no files. Check the name.")
    dataset = builder.as_streaming_dataset(split).decode(False)
    sizes = count_rows(by_split[split], cache_dir)
    if not sum(sizes):
        raise ValueError(f"The {len(sizes)} shards of {name} have no rows. Name shards with examples.")
    columns = {
        "image_column": ("image", image_column),
        "label_column": ("label", label_column),
        "caption_column": ("caption", caption_column),
        "conditioning_image_column": ("conditioning_image", conditioning_image_column),
        **{f"tensor_columns[{key!r}]": (key, column) for key, column in (tensor_columns or {}).items()},
    }
    features = {
        argument: _feature(dataset.features, name, argument, column)
        for argument, (_, column) in columns.items()
        if column is not None
    }
    for argument in ("image_column", "conditioning_image_column"):
        if argument in features:
            _check_images(features[argument], argument, columns[argument][1], name)
    if "caption_column" in features:
        _check_captions(features["caption_column"], caption_column, name)
    names = None
    if label_column is not None:
        names = find_class_names(features["label_column"], class_names, label_column, name)
    elif class_names is not None:
        raise ValueError("`class_names` was given without `label_column`. Pass both, or neither.")
    return StreamSource(
        dataset.select_columns(
            sorted(
                {
                    column.partition(".")[0] if column not in dataset.features else column
                    for _, column in columns.values()
                    if column is not None
                }
            )
        ),
        name,
        by_split[split],
        sizes,
        {key: column for key, column in columns.values() if column is not None},
        names,
    )


def _find_builder(
    dataset_name: str | None, config_name: str | None, data_files: str | Sequence[str] | None, cache_dir: str | None
) -> tuple[Any, str]:
    """The builder of `datasets` for either source, and the name of the source."""
    import glob

    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if (dataset_name is None) == (not data_files):
        raise ValueError(
            f"`streaming` reads shards from either `dataset_name` or `data_files`; got "
            f"{'both' if dataset_name is not None else 'neither'}. Folders of images are read at random: drop "
            "`streaming` for them, or write them to shards."
        )
    if config_name is not None and dataset_name is None:
        raise ValueError(f"`dataset_config_name` ({config_name!r}) only applies to `dataset_name`. Drop it.")
    try:
        if dataset_name is not None:
            builder = datasets.load_dataset_builder(dataset_name, config_name, cache_dir=cache_dir)
            if not isinstance(builder, (Parquet, WebDataset)):
                raise ValueError(
                    f"`dataset_name` {dataset_name!r} holds neither parquet files nor WebDataset tars, which "
                    "`streaming` reads. The Hub converts many datasets to parquet: pass `--data_files "
                    f"'hf://datasets/{dataset_name}@~parquet/**/*.parquet'`, {NO_ALTERNATIVE}."
                )
            return builder, dataset_name
        files = [data_files] if isinstance(data_files, str) else list(data_files or ())
        kinds = {
            kind
            for file in files
            for kind, suffixes in (("parquet", PARQUET_SUFFIXES), ("webdataset", TAR_SUFFIXES))
            if file.lower().endswith(suffixes)
        }
        others = [file for file in files if not file.lower().endswith((*PARQUET_SUFFIXES, *TAR_SUFFIXES))]
        if len(kinds) != 1 or others:
            raise ValueError(
                f"`data_files` is {list_names(others or files, 3)}; with `streaming`, all names must end with "
                ".parquet, or all with .tar, .tar.gz or .tgz."
            )
        # A name with brackets is a pattern to `datasets`, even if a file has exactly that name.
        patterns = [glob.escape(file) if os.path.isfile(file) else file for file in files]
        kind = kinds.pop()
        return datasets.load_dataset_builder(kind, data_files={"train": patterns}, cache_dir=cache_dir), ", ".join(
            files
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"`dataset_name` is {dataset_name!r}, which cannot be found: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"`data_files` cannot be found: {error}") from error


def _feature(features: Mapping[str, Any], source: str, argument: str, column: str) -> Any:
    if column in features:
        return features[column]
    outer, _, inner = column.partition(".")
    if isinstance(features.get(outer), dict) and inner in features[outer]:
        return features[outer][inner]
    found = [
        f"{name}.{key}" if key else name
        for name, feature in features.items()
        for key in (feature if isinstance(feature, dict) else ("",))
    ]
    raise ValueError(f"`{argument}` is {column!r}, but {source} has the columns {', '.join(found)}. Pass one of them.")


def _check_images(feature: Any, argument: str, column: str, source: str) -> None:
    import datasets

    is_encoded = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    is_stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or is_encoded or is_stored):
        raise ValueError(
            f"`{argument}` {column!r} of {source} is of type {feature}. `streaming` reads images and encoded images "
            f"(bytes). Name such a column, {NO_ALTERNATIVE}."
        )


def _check_captions(feature: Any, column: str | None, source: str) -> None:
    import datasets

    text = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    if not isinstance(text, datasets.Value) or text.dtype not in ("string", "large_string"):
        raise ValueError(
            f"`caption_column` {column!r} of {source} is of type {feature}, which is not text. Name a column that "
            "holds one caption, or a list of captions, per image."
        )


def find_class_names(feature: Any, given: Sequence[str] | None, column: str, source: str) -> list[str]:
    """
    The names of the classes, which must be known before the first step: those of the column, or `given` ones. Raises a
    `ValueError` if there are none, or both differ.
    """
    import datasets

    known = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if known is None and given is None:
        raise ValueError(
            f"`label_column` {column!r} of {source} is of type {feature}, which does not name the classes, and with "
            "`streaming` they must be known before the first step. Pass `--class_names FILE`: a text file of one name "
            "a line, in the order of the numbers, or a JSON list."
        )
    if isinstance(feature, (dict, list)) or (
        isinstance(feature, datasets.Value)
        and not feature.dtype.startswith(("int", "uint", "bool", "string", "large_s"))
    ):
        raise ValueError(f"`label_column` {column!r} of {source} is of type {feature}. Use integers or text.")
    if known is not None and given is not None and list(known) != list(given):
        raise ValueError(
            f"`class_names` lists {list_names(given, 3)}, but `label_column` {column!r} of {source} names "
            f"{list_names(known, 3)}. Leave `class_names` out."
        )
    return list(known if known is not None else given or ())


# 2. Counting


def count_rows(files: Sequence[str], cache_dir: str | None = None) -> list[int]:
    """
    The number of rows of each shard: of parquet files from their last bytes, of tars from the headers in them. Those of
    local files and of the Hub are kept in the cache folder of `datasets`, and counted again if a file has changed.
    """
    import datasets

    kept = [(file, _stamp(file)) for file in files]
    # Nothing tells whether a file elsewhere, such as on a web server, is still the same.
    is_kept = all(stamp is not None or file.startswith("hf://") for file, stamp in kept)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    cache = folder / f"rows-of-shards-{hash_plain(kept)}.json"
    if is_kept:
        with contextlib.suppress(OSError, ValueError):
            sizes = json.loads(cache.read_text())
            if len(sizes) == len(files):
                return sizes
    if len(files) >= 100:
        logger.info(f"Counting the rows of {len(files)} shards{f'; the numbers are kept in {cache}' * is_kept}")
    with ThreadPoolExecutor(COUNTING_THREADS) as pool:
        sizes = list(pool.map(_count, files))
    if is_kept:
        with contextlib.suppress(OSError):  # a folder that is read-only, or full, costs only the time to count again
            folder.mkdir(parents=True, exist_ok=True)
            # Several machines may share the folder, and their processes have equal numbers.
            writing = cache.with_suffix(f".{uuid.uuid4().hex}")
            writing.write_text(json.dumps(sizes))
            os.replace(writing, cache)
    return sizes


def _stamp(file: str) -> tuple[int, int] | None:
    """Size and time of a local file; the address of one on the Hub holds its commit."""
    status = os.stat(file) if os.path.isfile(file) else None
    return (status.st_size, status.st_mtime_ns) if status else None


def _count(file: str) -> int:
    import pyarrow
    import pyarrow.parquet
    from datasets.utils.file_utils import xopen

    try:
        with open(file, "rb") if os.path.isfile(file) else xopen(file, "rb") as opened:
            if file.lower().endswith(PARQUET_SUFFIXES):
                return pyarrow.parquet.read_metadata(opened).num_rows
            return _count_tar(opened)
    except (pyarrow.ArrowException, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        kind = "parquet" if file.lower().endswith(PARQUET_SUFFIXES) else "a tar"
        raise ValueError(f"{file} cannot be read as {kind}: {error}. Repair it, or leave it out.") from error


def _count_tar(opened: Any) -> int:
    """The number of examples, files of the same name up to its first dot in a row, as `datasets` groups them."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    count, previous = 0, None
    with tarfile.open(fileobj=opened, mode="r:*") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or they would all be kept
            if not member.isreg() or os.path.basename(member.name).startswith((".", "__")):
                continue
            key, _ = base_plus_ext(member.name)
            if key is not None:
                count += key != previous
                previous = key
    return count


# 3. The dataset


class StreamDataset(torch.utils.data.IterableDataset):
    """
    The examples of one process in the order of a [`StreamOrder`], as tensors that an [`ImageDataset`] makes of them.

    An image that cannot be used is reported, and the next one in the order that can be takes its place.

    A `torch.utils.data.DataLoader` with the batch size of the order, any number of workers that divides its lanes, and
    nothing shuffled, gives its batches.

    Args:
        source (`StreamSource`): The shards.
        order (`StreamOrder`): Their order, for `len(source.sizes)` shards.
        images (`ImageDataset`): Makes the tensors of an example; its own examples are not used. Its index is the id of
            a row: its number in the whole data.
        process_index (`int`, defaults to 0): The process.

    Attributes:
        epoch (`int`), first_batch (`int`): Where the next iteration starts.
    """

    def __init__(self, source: StreamSource, order: StreamOrder, images: ImageDataset, process_index: int = 0):
        self.source, self.order, self.images, self.process_index = source, order, images, process_index
        self.first_batch = 0

    @property
    def seed(self) -> int:
        return self.images.seed

    @property
    def skips(self) -> SkipReport | None:
        return self.images.skips

    @property
    def epoch(self) -> int:
        return self.images.epoch

    def set_epoch(self, epoch: int) -> None:
        """Selects the order, crops, flips and captions of `epoch`."""
        self.images.set_epoch(epoch)

    def name_of(self, index: int) -> str:
        """Names an example for messages, by its number in the whole data."""
        shard = int(np.searchsorted(self.order.first_ids, index, side="right")) - 1
        file = os.path.basename(self.source.files[shard])
        return f"row {index - int(self.order.first_ids[shard])} of {file}"

    def __len__(self) -> int:
        """Number of examples of the process in an epoch."""
        return self.order.num_batches * self.order.batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        num_lanes, batch_size = self.order.num_lanes, self.order.batch_size
        if num_lanes % count:
            raise ValueError(f"{count} workers cannot share {num_lanes} lanes. Use a number that divides them.")
        lanes: dict[int, Iterator[dict[str, torch.Tensor]]] = {}
        # The loader takes one batch from each worker in turn.
        for batch in range(self.first_batch + number, self.order.num_batches, count):
            lane = batch % num_lanes
            if lane not in lanes:
                lanes[lane] = self._examples(lane, skipped=batch // num_lanes * batch_size)
            yield from itertools.islice(lanes[lane], batch_size)

    def _examples(self, lane: int, skipped: int) -> Iterator[dict[str, torch.Tensor]]:
        """The examples of a lane after the first `skipped` ones."""
        positions = self.order.lane(self.process_index, lane)
        # None: an image that cannot be used.
        ahead: deque[dict[str, torch.Tensor] | None] = deque()
        source = itertools.chain(
            self._shuffled(self.order.buffer(self.epoch, self.process_index, lane, skipped)),
            # Only to take the place of the last images of the lane.
            self._read(positions.stop, self.order.num_rows),
            self._read(0, positions.start),
        )
        for _ in range(len(positions) - skipped):
            tensors = None
            for offset in range(MAX_SUBSTITUTIONS):
                if offset == len(ahead):
                    found = next(source, None)
                    if found is None:
                        break
                    ahead.append(self._transform(*found))
                if ahead[offset] is not None:
                    tensors = ahead[offset]
                    break
            if tensors is None:
                raise RuntimeError(
                    f"{len(ahead)} examples in a row of {self.source.name} cannot be used. The log names them. Are "
                    "`image_column`, `min_image_size` and the value range right, and is the storage still there?"
                )
            ahead.popleft()
            yield tensors

    def _transform(self, rows: Rows, raw: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        shard, row, _ = rows
        example: dict[str, Any] = {"image": None, "row": f"{row} of {os.path.basename(self.source.files[shard])}"}
        try:
            example = self.source.example(raw, shard, row)
            return self.images.transform(example, int(self.order.first_ids[shard]) + row)
        except UnusableImageError as error:
            report_skipped(self.images.skips, example_name(example, row), error)
            return None

    def _shuffled(self, buffer: ShuffleBuffer) -> Iterator[tuple[Rows, dict[str, Any]]]:
        """The rows in the order of a buffer. Those that it holds are read again, up to the one that is asked for."""
        held: dict[int, tuple[Rows, dict[str, Any]]] = {}
        at_first, coming = set(buffer.held), buffer.coming
        first = min(at_first, default=coming)
        rows = enumerate(self._read(first, buffer.stop), start=first)
        for position in buffer:
            while position not in held:
                place, found = next(rows)
                if place >= coming or place in at_first:
                    held[place] = found
            yield held.pop(position)

    def _read(self, first: int, last: int) -> Iterator[tuple[Rows, dict[str, Any]]]:
        """The rows at these positions of the epoch, undecoded, each with its shard and its number there."""
        for rows in self.order.rows(self.epoch, first, last):
            for row, raw in self.source.read(rows):
                yield Rows(rows.shard, row, row + 1), raw
