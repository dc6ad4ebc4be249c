"""
Images per second and core of streamed data: reading, decoding, resizing.

    python benchmarks/bench_streaming.py [--num_images 300] [--json results.json]

Shards of JPEG files are written to a temporary folder, as parquet files (row groups of 100 images) and as WebDataset
tars with a class and a caption. Each row streams them in one process and gives images per second of processor time (not
of the wall clock, so that other work on the machine matters less): `read`, without decoding; `load`, the tensors of
`StreamDataset` with a shuffle buffer, random crops and flips, from `source` to `size` pixels. `random` is
`ImageDataset` on the same parquet files, read at random. The last line has the draws of the shuffle buffer per
second, which a resumed run repeats. The images are waves with noise; their sizes in kB are printed, since the time to
decode depends on them.
"""

import argparse
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from measuring import describe_machine, make_image, make_parser, write_report
from PIL import Image

from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.stream_order import Rows, StreamOrder
from diffusers_adm.data.streaming import StreamDataset, StreamSource, open_stream


# Height and width of the files, and resolution of the training.
SIZES = (((64, 64), 64), ((256, 256), 256), ((375, 500), 64), ((375, 500), 256))
SHARDS = 3
QUALITY = 90  # of the JPEG files


def write_shards(folder: Path, size: tuple[int, int], num_images: int) -> float:
    """Writes the images as both kinds of shards; returns the mean size of a file in kB."""
    height, width = size
    images = []
    for seed in range(20):
        file = io.BytesIO()
        pixels = make_image(seed, max(size), 3, np.uint8)[:height, :width]
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        images.append(file.getvalue())
    for shard in range(SHARDS):
        rows = range(shard * num_images // SHARDS, (shard + 1) * num_images // SHARDS)
        columns = {
            "image": [{"bytes": images[row % len(images)], "path": f"{row}.jpg"} for row in rows],
            "label": [row % 1000 for row in rows],
            "text": [f"image {row}" for row in rows],
        }
        features = {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string")}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(folder / f"{shard}.parquet", batch_size=100)
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in rows:
                parts = {"jpg": images[row % len(images)], "cls": str(row % 1000).encode(), "txt": b"image"}
                for ending, content in parts.items():
                    member = tarfile.TarInfo(f"{row:08d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return float(np.mean([len(image) for image in images])) / 1000


def open_shards(folder: Path, kind: str) -> StreamSource:
    columns = {"image_column": "image"} if kind == "parquet" else {"image_column": "jpg"}
    return open_stream(data_files=str(folder / f"*.{kind}"), cache_dir=str(folder), **columns)


def rate(iterable) -> float:
    """Items per second of processor time of this process."""
    start = time.process_time()
    count = sum(1 for _ in iterable)
    return count / (time.process_time() - start)


def read_all(source: StreamSource):
    for shard, size in enumerate(source.sizes):
        yield from source.read(Rows(shard, 0, size))


def measure(args: argparse.Namespace, folder: Path, size: tuple[int, int], resolution: int) -> list[dict]:
    kilobytes = write_shards(folder, size, args.num_images)
    rows = []
    for kind in ("parquet", "tar"):
        source = open_shards(folder, kind)
        images = ImageDataset(source.sample(), resolution, random_flip=True)
        order = StreamOrder(source.sizes, 0, 1, buffer_size=args.buffer_size)
        read = max(rate(read_all(source)) for _ in range(args.repeats))
        load = max(rate(StreamDataset(source, order, images)) for _ in range(args.repeats))
        rows.append({"kind": kind, "read": read, "load": load})
    dataset, _ = load_image_dataset(data_files=str(folder / "*.parquet"), cache_dir=str(folder / "cache"))
    images = ImageDataset(dataset, resolution, random_flip=True)
    order = torch.randperm(len(images)).tolist()
    load = max(rate(images[index] for index in order) for _ in range(args.repeats))
    rows.append({"kind": "random", "read": None, "load": load})
    for row in rows:
        row |= {"source": f"{size[0]}x{size[1]}", "size": resolution, "kilobytes": kilobytes}
        read = "       -" if row["read"] is None else f"{row['read']:8.0f}"
        print(
            f"{row['source']:>8} {kilobytes:5.1f} kB {resolution:5} {row['kind']:>8} {read} {row['load']:8.0f}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = make_parser(__doc__, "json", threads=1, num_images=300, buffer_size=100, repeats=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    print(
        f"{describe_machine()}; images per second of processor time\n\n"
        "  source    file  size     kind     read     load"
    )
    rows = []
    for size, resolution in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(args, Path(folder), size, resolution)
    draws = rate(StreamOrder([1_000_000], 0, 1).buffer(0, 0, 0))
    print(f"\nshuffle buffer: {draws:.0f} draws a second")
    write_report(args.json, args, rows=rows, draws=draws)
    return 0


if __name__ == "__main__":
    sys.exit(main())
