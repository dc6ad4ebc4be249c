"""
Figures of samples: prompts by seed, samples with their upsampled versions, samples with the nearest training images.

    python benchmarks/draw_samples.py seeds --model DIR --output seeds.png
    python benchmarks/draw_samples.py cascade --model DIR --upsampler DIR --output cascade.png
    python benchmarks/draw_samples.py nearest --model DIR --output nearest.png

`nearest` also prints the distances of samples and of held-out images to the nearest training image (root mean square
over pixels, 0 to 255): samples of a model that copies are much nearer than held-out images.
"""

from __future__ import annotations

import argparse

import datasets
import torch
from measuring import make_parser, pixels_of, quiet, sample_in_batches, seeded
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
    return pixels_of(images).flatten(1).double()


def draw_seeds(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    images, _ = sample(pipe, args, NUM_SEEDS)
    columns = [f"seed {args.seed + i}" for i in range(NUM_SEEDS)]
    return labelled_grid(images, len(args.prompts), NUM_SEEDS, args.prompts, columns, scale=args.scale)


def draw_cascade(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.upsampler))
    small, generators = sample(pipe, args, NUM_CASCADES)
    large = upsampler(
        small,
        noise_level=args.noise_level,
        num_inference_steps=args.num_inference_steps,
        generator=generators,
    ).images
    small = [image.resize(large[0].size, Image.Resampling.NEAREST) for image in small]
    pairs = [image for pair in zip(small, large, strict=True) for image in pair]
    columns = [name for i in range(NUM_CASCADES) for name in (f"seed {args.seed + i}", "upsampled")]
    return labelled_grid(pairs, len(args.prompts), len(columns), args.prompts, columns)


def draw_nearest(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    files = {"train": args.train_file, "test": args.test_file}
    data = datasets.load_dataset("parquet", data_files=files)
    train = vectors(data["train"]["image"])
    # The shown captions, and held-out ones for the numbers.
    prompts = [*args.prompts, *data["test"]["text"]]
    options = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    generators = seeded(args.seed, len(prompts))
    images = sample_in_batches(pipe, {"prompt": prompts}, generators, args.batch_size, **options)

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


def sample(pipe: ADMPipeline, args: argparse.Namespace, num_seeds: int) -> tuple[list[Image.Image], list]:
    """Samples of each prompt with the same seeds, and their generators."""
    prompts = [prompt for prompt in args.prompts for _ in range(num_seeds)]
    generators = [generator for _ in args.prompts for generator in seeded(args.seed, num_seeds)]
    options = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    return sample_in_batches(pipe, {"prompt": prompts}, generators, args.batch_size, **options), generators


DRAWINGS = {"seeds": draw_seeds, "cascade": draw_cascade, "nearest": draw_nearest}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("--model", required=True, help="Text-conditional pipeline.")
    parser.add_argument("--upsampler", help="Pipeline for `cascade`.")
    parser.add_argument("--noise_level", type=int, default=20, help="Noise level of the upsampler.")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--train_file", default="data/noto-emoji-32/train.parquet")
    parser.add_argument("--test_file", default="data/noto-emoji-32/test.parquet")
    parser.add_argument("--output", required=True)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2, help="Magnification.")
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.model))
    DRAWINGS[args.what](pipe, args).save(args.output)


if __name__ == "__main__":
    main()
