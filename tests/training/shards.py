"""Shards of small images for tests: parquet files and WebDataset tars."""

import io
import tarfile

import datasets
import numpy as np
from PIL import Image


CLASSES = ["cat", "dog", "fox"]


def encoded(index, size=(8, 8), color=None):
    """A PNG whose first channel is `index` everywhere; the others are noise, or `color`."""
    pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
    if color is not None:
        pixels[..., 1:] = color
    pixels[..., 0] = index
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, sizes, kind="parquet", faulty=(), named_classes=True, **options):
    """
    Shards of these numbers of rows. Row i of all has image i (see `encoded`, which takes `options`), the class i % 3
    and the caption "image i"; images at `faulty` places are cut short. Returns the pattern of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for shard, size in enumerate(sizes):
        rows = range(start, start + size)
        images = [encoded(row, **options)[: 60 if row in faulty else None] for row in rows]
        file = folder / f"{shard:03d}.{'parquet' if kind == 'parquet' else 'tar'}"
        if kind == "parquet":
            label = datasets.ClassLabel(names=CLASSES) if named_classes else datasets.Value("int64")
            features = {"image": datasets.Image(), "label": label, "text": datasets.Value("string")}
            columns = {
                "image": [{"bytes": image, "path": f"{row}.png"} for row, image in zip(rows, images, strict=True)],
                "label": [row % 3 for row in rows],
                "text": [f"image {row}" for row in rows],
            }
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(file, batch_size=3)
        else:
            with tarfile.open(file, "w") as archive:
                for row, image in zip(rows, images, strict=True):
                    parts = {"png": image, "cls": str(row % 3).encode(), "json": f'{{"text": "image {row}"}}'.encode()}
                    for ending, content in parts.items():
                        member = tarfile.TarInfo(f"{row:05d}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        start += size
    return str(folder / "*.parquet" if kind == "parquet" else folder / "*.tar")


def stream_arguments(pattern):
    """The columns of these shards, as arguments."""
    columns = {"image_column": "image", "caption_column": "text", "label_column": "label"}
    if pattern.endswith(".tar"):
        columns = {"image_column": "png", "caption_column": "json.text", "label_column": "cls"}
    return {"data_files": [pattern], **columns}
