"""
Time of loading an image with `ImageDataset` relative to Pillow alone.

    python benchmarks/bench_loader.py [--pairs 15] [--only rgb-8] [--json results.json]
    python benchmarks/bench_loader.py --only --data_files data/noto-emoji-64/train.parquet --size 64

Each row decodes, resizes and crops all images of a small dataset in memory, from `--source_size` to `--size` pixels, in
one process without workers. The baseline is the same number of 8-bit RGB images of the same size through `decode_rgb`,
Pillow's `resize` and `crop`, and the map to [-1, 1], written out here, without random crops. The rows alternate with
the baseline `--pairs` times; given is the median of the pairwise ratios of times with a 95% bootstrap interval. A row
of 8-bit RGB fails above a ratio of 1.25 (it includes random crops and flips, and the choice of the reader), 16-bit grey
above 2. The images are waves with noise.

`--data_files` adds a row for the first `--num_images` images of parquet files, read as by the training scripts: their
images per second must be several times those of a training step, so that no step waits for them.
"""

import argparse
import io
import sys

import datasets
import numpy as np
import tifffile
import torch
from measuring import alternate, describe_machine, finish, make_image, make_parser, measure_rows, ratios
from PIL import Image

from diffusers_adm.data.decoding import decode_rgb
from diffusers_adm.data.formats import FormatRequest, find_image_format
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.training import load_image_dataset


# Channels, type of the values, file format, and the limit of the ratio.
ROWS = {
    "rgb-8": (3, np.uint8, "png", 1.25),
    "grey-8": (1, np.uint8, "png", None),
    "grey-16": (1, np.uint16, "png", 2.0),
    "grey-16-tiff": (1, np.uint16, "tiff", None),
    "rgb-16": (3, np.uint16, "tiff", None),
    "5-bands-float": (5, np.float32, "npy", None),
    "5-bands-float-tiff": (5, np.float32, "tiff", None),
}


def encode(values: np.ndarray, file_format: str) -> dict:
    file = io.BytesIO()
    squeezed = values[..., 0] if values.shape[-1] == 1 else values
    if file_format == "npy":
        np.save(file, values)
    elif file_format == "tiff":
        photometric = "rgb" if values.shape[-1] == 3 else "minisblack"
        planar = None if squeezed.ndim == 2 else "contig"
        tifffile.imwrite(file, squeezed, photometric=photometric, planarconfig=planar, compression="zlib")
    else:
        Image.fromarray(squeezed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_dataset(args: argparse.Namespace, channels: int, dtype: type, file_format: str) -> datasets.Dataset:
    images = (make_image(seed, args.source_size, channels, dtype) for seed in range(args.num_images))
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": [encode(image, file_format) for image in images]}, features=features)


def synthetic(args: argparse.Namespace, name: str) -> tuple[datasets.Dataset, int, type, float | None]:
    """Dataset, channels, type and limit of a row of `ROWS`."""
    channels, dtype, file_format, limit = ROWS[name]
    return make_dataset(args, channels, dtype, file_format), channels, dtype, limit


def load_plainly(dataset: datasets.Dataset, size: int) -> None:
    """What a loader of 8-bit RGB cannot do without."""
    for index in range(len(dataset)):
        image = decode_rgb(dataset[index]["image"])
        ratio = size / min(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
        image = image.crop((0, 0, size, size))
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def measure(args: argparse.Namespace, name: str) -> dict:
    if name == "data files":
        dataset, _ = load_image_dataset(data_files=args.data_files)
        plain = dataset = dataset.select(range(min(args.num_images, len(dataset))))
        channels, dtype, limit = 3, np.uint8, None
    else:
        plain, (dataset, channels, dtype, limit) = make_dataset(args, 3, np.uint8, "png"), synthetic(args, name)
    value_range = (0, 1) if np.dtype(dtype).kind == "f" else None
    image_format = find_image_format(dataset, FormatRequest(channels=channels, value_range=value_range))
    ours = ImageDataset(dataset, args.size, random_flip=True, image_format=image_format)
    times = alternate(lambda: list(ours), lambda: load_plainly(plain, args.size), args.pairs, "cpu")
    row = ratios(times, len(dataset))
    row["note"] = f"{1000 / row['ours_ms']:.0f} images a second  "
    return {**row, "limit": limit, "passed": limit is None or row["ratio"] <= limit}


def main() -> int:
    parser = make_parser(__doc__, "json", pairs=15, threads=1, num_images=100, source_size=128, size=96)
    parser.add_argument("--only", dest="rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--data_files", nargs="+", help="Parquet files to read as well.")
    args = parser.parse_args()
    names = [*args.rows, *(["data files"] if args.data_files else [])]

    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    sizes = f"{args.source_size} to {args.size} pixels"
    print(f"{describe_machine()}; {sizes}, {args.num_images} images\n\nms per image, ours / Pillow = ratio")
    return finish(args, rows=measure_rows(["row"], [(name,) for name in names], measure, args))


if __name__ == "__main__":
    sys.exit(main())
