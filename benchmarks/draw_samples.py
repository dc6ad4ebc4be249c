"""
Figures of samples: prompts by seed, samples with their upsampled versions, samples with the nearest training images.

    python benchmarks/draw_samples.py seeds --model DIR --output seeds.png
    python benchmarks/draw_samples.py cascade --model DIR --upsampler DIR --output cascade.png
    python benchmarks/draw_samples.py nearest --model DIR --output nearest.png

`nearest` also prints the distances of samples and of held-out images to the nearest training image (root mean square
over pixels, 0 to 255): samples of a model that copies are much nearer than held-out images.
"""

import argparse

import datasets
import torch
from measuring import EMOJI, grid_of_columns, make_parser, pixels_of, quiet, sample, seeded
from PIL import Image

from diffusers_adm import ADMPipeline, ADMSuperResolutionPipeline
from diffusers_adm.training import labelled_grid


PROMPTS = ["fire", "red heart", "grinning face", "maldives flag", "dog face", "red apple", "automobile"]
PROMPTS += ["woman astronaut, medium skin tone"]
NUM_SEEDS = 8
NUM_CASCADES = 4
NUM_NEAREST = 4


def sample_seeds(pipe: ADMPipeline, args: argparse.Namespace, number: int) -> tuple[list[Image.Image], list]:
    """Samples of each prompt with the same seeds, and their generators."""
    prompts = [prompt for prompt in args.prompts for _ in range(number)]
    generators = [generator for _ in args.prompts for generator in seeded(args.seed, number)]
    return sample(pipe, args, {"prompt": prompts}, generators), generators


def draw_seeds(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    images, _ = sample_seeds(pipe, args, NUM_SEEDS)
    columns = [f"seed {args.seed + i}" for i in range(NUM_SEEDS)]
    return labelled_grid(images, len(args.prompts), NUM_SEEDS, args.prompts, columns, scale=args.scale)


def draw_cascade(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.upsampler))
    small, generators = sample_seeds(pipe, args, NUM_CASCADES)
    options = {"noise_level": args.noise_level, "guidance_scale": 1.0}
    large = sample(upsampler, args, {"image": small}, generators, **options)
    small = [image.resize(large[0].size, Image.Resampling.NEAREST) for image in small]
    columns = []
    for i in range(NUM_CASCADES):
        columns += [(f"seed {args.seed + i}", small[i::NUM_CASCADES]), ("upsampled", large[i::NUM_CASCADES])]
    return grid_of_columns(columns, args.prompts)


def draw_nearest(pipe: ADMPipeline, args: argparse.Namespace) -> Image.Image:
    data = datasets.load_dataset("parquet", data_files={"train": args.train_file, "test": args.test_file})
    # The shown captions, and held-out ones for the numbers.
    images = sample(pipe, args, {"prompt": [*args.prompts, *data["test"]["text"]]})
    sampled, test, train = (
        pixels_of(each).flatten(1).double() for each in (images, data["test"]["image"], data["train"]["image"])
    )
    distances, held_out = (torch.cdist(each, train) / train.shape[1] ** 0.5 for each in (sampled, test))
    for name, each in (("samples of held-out captions", distances[len(args.prompts) :]), ("held-out images", held_out)):
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        low, middle, high = each.amin(dim=1).quantile(quantiles).tolist()
        numbers = f"median {middle:.1f}, 10% below {low:.1f}, 10% above {high:.1f}"
        print(f"{name:30} to the nearest training image: {numbers}")

    cells = []
    for image, row in zip(images, distances[: len(args.prompts)], strict=False):
        cells += [image, *(data["train"][i]["image"] for i in row.argsort()[:NUM_NEAREST].tolist())]
    columns = ["sample", *(f"nearest {i + 1}" for i in range(NUM_NEAREST))]
    return labelled_grid(cells, len(args.prompts), 1 + NUM_NEAREST, args.prompts, columns, scale=args.scale)


DRAWINGS = {"seeds": draw_seeds, "cascade": draw_cascade, "nearest": draw_nearest}


def main() -> None:
    parser = make_parser(
        __doc__,
        "model",
        "output",
        noise_level=20,
        train_file=f"{EMOJI}/train.parquet",
        test_file=f"{EMOJI}/test.parquet",
        guidance_scale=4.0,
        num_inference_steps=50,
        batch_size=32,
        seed=0,
        scale=2,
    )
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("--upsampler", help="Pipeline for `cascade`.")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.model))
    DRAWINGS[args.what](pipe, args).save(args.output)


if __name__ == "__main__":
    main()
