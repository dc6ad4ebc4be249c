"""
Pictures of samples: prompts by seed, samples and what an upsampler makes of them, and samples beside the training
images that are nearest to them.

    python benchmarks/draw_samples.py seeds --model DIR --output seeds.png
    python benchmarks/draw_samples.py cascade --model DIR --upsampler DIR --output cascade.png
    python benchmarks/draw_samples.py nearest --model DIR --output nearest.png

`nearest` also prints how far samples lie from the nearest training image (root mean square over pixels, 0 to 255), and
how far held-out images do: a model that copies has samples much nearer than that.
"""

from __future__ import annotations

import argparse

import datasets
import numpy as np
import torch
from PIL import Image

from diffusers_adm import ADMPipeline, ADMSuperResolutionPipeline
from diffusers_adm.training import labelled_grid


PROMPTS = (
    "fire",
    "red heart",
    "grinning face",
    "maldives flag",
    "dog face",
    "red apple",
    "automobile",
    "woman astronaut, medium skin tone",
)
NUM_SEEDS = 8
NUM_CASCADES = 4
NUM_NEAREST = 4


def vectors(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).flatten(1).double()


def draw_seeds(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    generators = [
        torch.Generator().manual_seed(args.seed + i % NUM_SEEDS) for i in range(NUM_SEEDS * len(args.prompts))
    ]
    images = sample(pipe, [prompt for prompt in args.prompts for _ in range(NUM_SEEDS)], generators, args)
    columns = [f"seed {args.seed + i}" for i in range(NUM_SEEDS)]
    return labelled_grid(images, len(args.prompts), NUM_SEEDS, args.prompts, columns, scale=args.scale)


def draw_cascade(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    upsampler = ADMSuperResolutionPipeline.from_pretrained(args.upsampler)
    upsampler.set_progress_bar_config(disable=True)
    generators = [
        torch.Generator().manual_seed(args.seed + i % NUM_CASCADES) for i in range(NUM_CASCADES * len(args.prompts))
    ]
    small = sample(pipe, [prompt for prompt in args.prompts for _ in range(NUM_CASCADES)], generators, args)
    large = upsampler(
        small,
        noise_level=args.noise_level,
        num_inference_steps=args.num_inference_steps,
        generator=generators,
    ).images
    small = [image.resize(large[0].size, Image.Resampling.NEAREST) for image in small]
    pairs = [image for pair in zip(small, large, strict=True) for image in pair]
    columns = [name for i in range(NUM_CASCADES) for name in (f"seed {args.seed + i}", "enlarged")]
    return labelled_grid(pairs, len(args.prompts), len(columns), args.prompts, columns)


def draw_nearest(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    files = {"train": args.train_file, "test": args.test_file}
    data = datasets.load_dataset("parquet", data_files=files)
    train = vectors(data["train"]["image"])
    # Held-out captions after the ones that are shown, for the numbers.
    prompts = [*args.prompts, *data["test"]["text"]]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
    images = sample(pipe, prompts, generators, args)

    per_pixel = train.shape[1] ** 0.5
    distances = torch.cdist(vectors(images), train) / per_pixel
    held_out = torch.cdist(vectors(data["test"]["image"]), train).amin(dim=1) / per_pixel
    of_held_out_prompts = distances[len(args.prompts) :].amin(dim=1)
    for name, values in (("samples of held-out captions", of_held_out_prompts), ("held-out images", held_out)):
        low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        print(
            f"{name:30} to the nearest training image: median {middle:.1f}, 10% below {low:.1f}, 10% above {high:.1f}"
        )

    cells = []
    for image, row in zip(images, distances[: len(args.prompts)], strict=False):
        nearest = row.argsort()[:NUM_NEAREST].tolist()
        cells += [image, *(data["train"][i]["image"] for i in nearest)]
    columns = ["sample", *(f"nearest {i + 1}" for i in range(NUM_NEAREST))]
    return labelled_grid(cells, len(args.prompts), 1 + NUM_NEAREST, args.prompts, columns, scale=args.scale)


def sample(
    pipe: ADMPipeline, prompts: list[str], generators: list[torch.Generator], args: argparse.Namespace
) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), args.batch_size):
        part = slice(start, start + args.batch_size)
        images += pipe(
            prompts[part],
            generator=generators[part],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
        ).images
    return images


DRAWINGS = {"seeds": draw_seeds, "cascade": draw_cascade, "nearest": draw_nearest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("--model", required=True, help="A pipeline that reads captions.")
    parser.add_argument("--upsampler", help="For `cascade`.")
    parser.add_argument("--noise_level", type=int, default=20, help="Of the upsampler.")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--train_file", default="data/noto-emoji-32/train.parquet")
    parser.add_argument("--test_file", default="data/noto-emoji-32/test.parquet")
    parser.add_argument("--output", required=True)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2, help="Side of the square that a pixel becomes.")
    args = parser.parse_args()

    pipe = ADMPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    DRAWINGS[args.what](pipe, args).save(args.output)


if __name__ == "__main__":
    main()
