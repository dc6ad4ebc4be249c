"""
Makes the embedded emoji sets from parquet files of 64x64 emoji in the format of Hugging Face `datasets`:

    python data/make_emoji.py noto-emoji-64-train.parquet data/noto-emoji-32/train.parquet --size 32
    python data/make_emoji.py noto-emoji-64-test.parquet data/noto-emoji-32/test.parquet --size 32
    python data/make_emoji.py noto-emoji-64-train.parquet data/noto-emoji-64/train.parquet --size 64
    python data/make_emoji.py noto-emoji-64-test.parquet data/noto-emoji-64/test.parquet --size 64
    python data/make_emoji.py twemoji-emoji-64-train.parquet data/twemoji-64/train.parquet --size 64 \\
        --chosen data/familiar.txt

With `--popular data/popular.txt` it makes the rows that are shown more often than the others while the demonstration
model is trained (not embedded; spaces/model/README.md has the recipe).

The same input gives the same bytes (with the versions in constraints.txt: Pillow, zlib and libwebp choose the encoding,
and pyarrow writes its version into the file).
"""

import argparse
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image


SOURCE_SIZE = 64


def encode(source: bytes, size: int) -> bytes:
    """
    Encodes one image without loss. Halved images are downscaled by averaging blocks of 2x2 pixels: exact, no ringing,
    and flat areas stay flat.

    Args:
        source (`bytes`): A 64x64 RGB image in any file format that Pillow reads.
        size (`int`): 32 (as PNG; each channel is the mean of its four source values, halves rounded up) or 64 (as
            WebP, which takes three quarters of PNG's space).

    Raises:
        ValueError: If the image is not 64x64 RGB.
    """
    image = Image.open(io.BytesIO(source))
    if image.size != (SOURCE_SIZE, SOURCE_SIZE) or image.mode != "RGB":
        raise ValueError(
            f"expected {SOURCE_SIZE}x{SOURCE_SIZE} RGB images, got {image.width}x{image.height} {image.mode}. "
            "Resize them and compose transparent ones on white first."
        )
    target = io.BytesIO()
    if size == SOURCE_SIZE:
        image.save(target, format="WEBP", lossless=True, quality=80, method=4)
    else:
        image.reduce(SOURCE_SIZE // size).save(target, format="PNG", optimize=True)
    return target.getvalue()


def pick(labels: Sequence[int], per_class: int) -> list[int]:
    """The numbers of at most `per_class` rows of each class, drawn with seed 0, in the order of the table."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    picked = [row for label in set(labels) for row in [i for i in shuffled if labels[i] == label][:per_class]]
    return sorted(int(row) for row in picked)


def choose(names: Sequence[str], lines: Sequence[str]) -> list[tuple[int, str]]:
    """
    The row of each line, `name, word`, and its word. Empty lines and those that begin with # are passed over.

    Raises:
        ValueError: If the set has no such name.
    """
    pairs = [[part.strip() for part in line.split(",")] for line in lines if line.strip() and line[0] != "#"]
    missing = [name for name, _ in pairs if name not in names]
    if missing:
        raise ValueError(f"the set has no emoji {missing[0]!r}. Correct the list.")
    return [(names.index(name), word) for name, word in pairs]


def repeat_popular(names: Sequence[str], labels: Sequence[int], lines: Sequence[str]) -> list[tuple[int, str]]:
    """
    Rows and what they are called, over and over: in each class that has any, about as many as the class has rows.

    Args:
        names, labels (sequences): Of the rows of the set.
        lines (sequence of `str`): Each the name of a row and, after commas, other words for it. Empty lines and those
            that begin with # are passed over, and so are names that the set does not have.
    """
    words = [[word.strip() for word in line.split(",")] for line in lines if line.strip() and line[0] != "#"]
    chosen = [(names.index(first), word) for first, *others in words if first in names for word in (first, *others)]
    sizes, shares = Counter(labels), Counter(labels[row] for row, _ in chosen)
    return [pair for pair in chosen for _ in range(max(1, round(sizes[labels[pair[0]]] / shares[labels[pair[0]]])))]


def convert(
    source: Path,
    target: Path,
    size: int = 32,
    per_class: int | None = None,
    popular: Path | None = None,
    chosen: Path | None = None,
) -> int:
    """
    Writes the columns `image` (at `size`), `text` and `label` of `source` to `target`. The feature types of `datasets`
    go into the file's metadata, so that `load_dataset("parquet", data_files=...)` knows the images and the label names.

    Args:
        source (`Path`), target (`Path`): The files.
        size (`int`): As of `encode`.
        per_class (`int`, *optional*): How many rows of each class are kept; `None`: all.
        popular (`Path`, *optional*): The file whose lines `repeat_popular` takes; `None`: every row once.
        chosen (`Path`, *optional*): The file whose lines `choose` takes; `None`: all rows, by their names.

    Returns:
        `int`: The number of rows written.
    """
    table = pq.read_table(source)
    if per_class is not None:
        table = table.take(pick(table["label"].to_pylist(), per_class))
    if popular is not None or chosen is not None:
        lines = (popular or chosen).read_text(encoding="utf-8").splitlines()
        names, labels = table["text"].to_pylist(), table["label"].to_pylist()
        pairs = choose(names, lines) if popular is None else repeat_popular(names, labels, lines)
        rows, words = zip(*pairs, strict=True)
        table = table.take(rows)
        table = table.set_column(table.schema.get_field_index("text"), "text", pa.array(words))
    source_features = Features.from_arrow_schema(table.schema)
    features = Features({name: source_features[name] for name in ("image", "text", "label")})
    images = [{"bytes": encode(row["bytes"], size), "path": row["path"]} for row in table["image"].to_pylist()]
    columns = [
        pa.array(images, type=features["image"].pa_type),
        table["text"].combine_chunks(),
        table["label"].combine_chunks(),
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    # The images are compressed already; what is left is too little to ask every reader for a codec.
    pq.write_table(pa.table(columns, schema=features.arrow_schema), target, compression="none")
    return table.num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an embedded emoji set from a 64x64 one.")
    parser.add_argument("source", type=Path, help="parquet file with columns image (64x64 RGB), text and label")
    parser.add_argument("target", type=Path, help="parquet file to write")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels of the images to write")
    parser.add_argument("--per_class", type=int, help="rows of each class to keep, drawn with seed 0; all by default")
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument("--popular", type=Path, help="list of names whose rows are repeated, and no others")
    lists.add_argument("--chosen", type=Path, help="list of names, each with a word for it; no others are kept")
    args = parser.parse_args()
    rows = convert(args.source, args.target, args.size, args.per_class, args.popular, args.chosen)
    print(f"{args.target}: {rows} images, {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
