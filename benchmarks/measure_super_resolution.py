"""
What an upsampler is worth, in numbers: whether its images agree with the small ones, are as sharp as real ones, and how
near they come to those.

    python benchmarks/measure_super_resolution.py --model DIR --data_files data/noto-emoji-64/test.parquet \
        --output_dir DIR

`--model` is an `ADMSuperResolutionPipeline`, `--data_files` large images that it has not seen. They are shrunk by
averaging blocks of pixels, to 8 bits, and enlarged again by the pipeline, for each of several samplers, and by Pillow's
bicubic filter. Per sampler:

- `agreement`: PSNR in dB between the enlarged images, averaged over blocks again, and the small ones.
- `gradient_ratio`: squared differences between neighbouring pixels, summed over all images, in relation to the real
  ones'. Below 1: blurred.
- `psnr`, `psnr_bicubic`, `psnr_difference`: PSNR in dB to the real images. A sampler that draws edges where they may be
  loses against one that blurs them, so somewhat below 0 is as it should be.

PSNRs are means over images, with their standard errors; that of the ratio is by the jackknife over images. The table
(`super_resolution.json`) and a picture of some images (`samples.png`: small, ours, bicubic, real) go to `--output_dir`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import class_labels_for, describe_machine
from PIL import Image

from diffusers_adm import ADMSuperResolutionPipeline
from diffusers_adm.conditioning.low_resolution import downsample
from diffusers_adm.training import ImageDataset, labelled_grid, load_image_dataset


# Beside the number of steps: None is ancestral sampling, 0 deterministic DDIM.
SAMPLERS = {"ancestral": None, "ddim": 0.0}
# Mean squared error of rounding to 8 bits, for images in [0, 1]: agreement beyond it (58.9 dB) says nothing.
SMALLEST_MSE = 1 / (12 * 255**2)
MEASURES = ("agreement", "gradient_ratio", "psnr", "psnr_bicubic", "psnr_difference")


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """`(N, 3, height, width)` in [0, 1], float64."""
    arrays = np.stack([np.array(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).double() / 255


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """From 8-bit values scaled to [-1, 1]."""
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`(N,)` in dB, for values in [0, 1]."""
    mse = ((images - others) ** 2).mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=SMALLEST_MSE))


def gradient_energy(images: torch.Tensor) -> torch.Tensor:
    """`(N,)`: squared differences of horizontal and of vertical neighbours, summed."""
    return sum(images.diff(dim=dim).pow(2).sum(dim=(1, 2, 3)) for dim in (2, 3))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def ratio_and_error(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """Ratio of the sums, and its standard error by the jackknife."""
    total, other_total, number = numerators.sum(), denominators.sum(), len(numerators)
    without_one = (total - numerators) / (other_total - denominators)
    error = math.sqrt((number - 1) * without_one.var(correction=0).item())
    return (total / other_total).item(), error


def measure(enlarged: torch.Tensor, bicubic: torch.Tensor, small: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """All in [0, 1]."""
    ours, theirs = psnr(enlarged, real), psnr(bicubic, real)
    factor = real.shape[-1] // small.shape[-1]
    results = {
        "agreement": mean_and_error(psnr(F.avg_pool2d(enlarged, factor), small)),
        "gradient_ratio": ratio_and_error(gradient_energy(enlarged), gradient_energy(real)),
        "psnr": mean_and_error(ours),
        "psnr_bicubic": mean_and_error(theirs),
        "psnr_difference": mean_and_error(ours - theirs),
    }
    return {name: value for name, (value, _) in results.items()} | {
        f"{name}_error": error for name, (_, error) in results.items()
    }


def enlarge_all(
    pipe: ADMSuperResolutionPipeline,
    small: list[Image.Image],
    conditions: dict[str, list],
    args: argparse.Namespace,
    **options: Any,
) -> list[Image.Image]:
    pictures = []
    for start in range(0, len(small), args.batch_size):
        batch = slice(start, start + args.batch_size)
        pictures += pipe(
            small[batch],
            **{name: values[batch] for name, values in conditions.items()},
            noise_level=args.noise_level,
            guidance_scale=args.guidance_scale,
            back_projection=args.back_projection,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in range(len(small))[batch]],
            **options,
        ).images
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_files", nargs="+", required=True, help="Parquet files of large images.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label", help="Read if the model has classes.")
    parser.add_argument("--caption_column", default="text", help="Read if the model reads text.")
    parser.add_argument("--low_res_size", type=int, help="Of a model that does not know it.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--noise_level", type=int, help="None: that of the pipeline.")
    parser.add_argument("--back_projection", action="store_true", help="As of the pipeline.")
    parser.add_argument("--max_images", type=int, help="Only the first so many.")
    parser.add_argument("--num_shown", type=int, default=12, help="Images in the picture.")
    parser.add_argument("--batch_size", type=int, default=41)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = ADMSuperResolutionPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    size, low_res_size = pipe.unet.config.sample_size, args.low_res_size or pipe.config.low_res_size
    if low_res_size is None:
        raise ValueError(f"{args.model} does not know the size of its small images. Pass `--low_res_size`.")

    has_classes = pipe.unet.config.num_class_embeds is not None
    dataset, id2label = load_image_dataset(
        data_files=args.data_files,
        image_column=args.image_column,
        label_column=args.label_column if has_classes else None,
        caption_column=args.caption_column if pipe.has_cross_attention else None,
    )
    dataset = dataset.select(range(min(args.max_images or len(dataset), len(dataset))))
    large = torch.stack([example["images"] for example in ImageDataset(dataset, size, center_crop=True)])
    conditions = {}
    if has_classes:
        conditions["class_labels"] = class_labels_for(pipe, dataset, id2label)
    if pipe.has_cross_attention:
        conditions["prompt"] = dataset["caption"][:]
    real_pictures, small_pictures = to_pictures(large), to_pictures(downsample(large, size // low_res_size))
    bicubic_pictures = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in small_pictures]
    real, small, bicubic = (to_tensor(pictures) for pictures in (real_pictures, small_pictures, bicubic_pictures))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    cells, shown = {}, None
    for name in args.samplers:
        for steps in args.num_inference_steps:
            start = time.perf_counter()
            options = {"num_inference_steps": steps, "eta": SAMPLERS[name]}
            pictures = enlarge_all(pipe, small_pictures, conditions, args, **options)
            seconds_per_image = (time.perf_counter() - start) / len(pictures)
            cell = measure(to_tensor(pictures), bicubic, small, real)
            cells[f"{name}-{steps}"] = cell | {
                "num_images": len(pictures),
                "seconds_per_image": seconds_per_image,
            }
            numbers = (f"{key} {cell[key]:.3f} ({cell[f'{key}_error']:.3f})" for key in MEASURES)
            print(f"{name}-{steps:<4}", *numbers, f"{seconds_per_image:.2f} s an image", sep="  ", flush=True)
            shown = shown or pictures
    blurred, error = ratio_and_error(gradient_energy(bicubic), gradient_energy(real))
    print(f"bicubic: gradient_ratio {blurred:.3f} ({error:.3f})")

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {
        "settings": settings,
        "machine": describe_machine(pipe.device.type),
        "bicubic_gradient_ratio": blurred,
        "cells": cells,
    }
    (args.output_dir / "super_resolution.json").write_text(json.dumps(report, indent=2) + "\n")
    number = min(args.num_shown, len(large))
    chosen = [len(large) * index // number for index in range(number)]
    columns = (small_pictures, shown, bicubic_pictures, real_pictures)
    across = max(1, math.ceil(math.sqrt(number / 4)))
    grid_pictures = [pictures[i].resize((size, size), Image.Resampling.NEAREST) for i in chosen for pictures in columns]
    labels = ["small", "ours", "bicubic", "real"] * across
    grid = labelled_grid(grid_pictures, math.ceil(number / across), len(labels), col_labels=labels, scale=2)
    grid.save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
