"""
Makes the embedded emoji sets from parquet files of 64x64 emoji in the format of Hugging Face `datasets`:

    python data/make_emoji.py noto-emoji-64-train.parquet data/noto-emoji-32/train.parquet --size 32
    python data/make_emoji.py noto-emoji-64-test.parquet data/noto-emoji-32/test.parquet --size 32
    python data/make_emoji.py noto-emoji-64-train.parquet data/noto-emoji-64/train.parquet --size 64
    python data/make_emoji.py noto-emoji-64-test.parquet data/noto-emoji-64/test.parquet --size 64

The same input gives the same bytes (with the versions in constraints.txt: Pillow, zlib and libwebp choose the encoding,
and pyarrow writes its version into the file).
"""

import argparse
import io
from pathlib import Path

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


def convert(source: Path, target: Path, size: int = 32) -> int:
    """
    Writes the columns `image` (at `size`), `text` and `label` of `source` to `target`. The feature types of `datasets`
    go into the file's metadata, so that `load_dataset("parquet", data_files=...)` knows the images and the label names.

    Returns:
        `int`: The number of rows.
    """
    table = pq.read_table(source)
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
    args = parser.parse_args()
    rows = convert(args.source, args.target, args.size)
    print(f"{args.target}: {rows} images, {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
