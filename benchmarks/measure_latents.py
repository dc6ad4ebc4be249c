"""
Quality of a latent 64x64 model, and of a 32x32 model with an upsampler, against real images.

    python benchmarks/measure_latents.py --latents DIR --pixels DIR [--upsampler DIR] --judge DIR \
        --data_files data/noto-emoji-64/train.parquet --output_dir DIR

`--latents` and `--pixels` are pipelines conditioned on class and caption, best trained for the same time. Both generate
an image for each of `--num_images` classes and captions of the data, from the same seeds. All samples are compared with
all images of the data by Frechet distance and kernel distance, in the features of the classifier `--judge`, which has
its own resolution: detail above it does not count. The Frechet distance of few samples is biased upwards, so the same
number of real images is compared with all of them, too (these are among the latter, so that their distances are rather
too small); the kernel distance is unbiased. The reconstructions of these
images by the autoencoder show what it alone contributes.
"""

import time

import torch
from measuring import (
    conditions_of,
    features_and_classes,
    grid_of_columns,
    load_held_out,
    load_judge,
    make_parser,
    quiet,
    reconstruct,
    sample,
    seeded,
    write_report,
)
from PIL import Image

from diffusers_adm import ADMPipeline, ADMSuperResolutionPipeline
from diffusers_adm.conditioning.image_format import as_size
from diffusers_adm.evaluation import ClassifierFeatures, GaussianStatistics, frechet_distance, kernel_distance


SIZE = 64
NUM_SHOWN = 10


def distances(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Frechet distance and kernel distance of features, `(N, channels)`."""
    statistics = []
    for features in (real, fake):
        statistics.append(GaussianStatistics())
        statistics[-1].update(features)
    (mean, covariance), (fake_mean, fake_covariance) = ((each.mean, each.covariance) for each in statistics)
    kernel, error = kernel_distance(real, fake)
    return {
        "frechet": frechet_distance(mean, covariance, fake_mean, fake_covariance),
        "kernel": kernel,
        "kernel_error": error,
    }


def features_of(judge: ClassifierFeatures, images: list[Image.Image]) -> torch.Tensor:
    """Features of images that are resized for the classifier, `(N, channels)`."""
    size = as_size(judge.resolution)[::-1]
    return features_and_classes(judge, [image.resize(size, Image.Resampling.BICUBIC) for image in images])[0]


def main() -> None:
    settings = {"num_images": 500, "num_inference_steps": 25, "guidance_scale": 2.0, "batch_size": 50, "seed": 0}
    columns_of = {"label_column": "label", "caption_column": "text"}
    parser = make_parser(
        __doc__, "judge", "data_files", "output_dir", **columns_of, **settings, upsampler="spaces/model/upsampler"
    )
    parser.add_argument("--latents", required=True, help="Latent pipeline: a folder or a Hub repository.")
    parser.add_argument("--pixels", required=True, help="32x32 pipeline: a folder or a Hub repository.")
    parser.add_argument("--variant", help="Variant of the upsampler's weights, e.g. fp16.")
    parser.add_argument("--judge_variant", help="Variant of the judge's weights, e.g. fp16.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    latents, pixels = (quiet(ADMPipeline.from_pretrained(path)) for path in (args.latents, args.pixels))
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.upsampler, variant=args.variant))
    judge = load_judge(args.judge, args.judge_variant)
    data, id2label, images = load_held_out(args, SIZE)
    args.num_images, number = None, len(images)
    _, _, everything = load_held_out(args, SIZE)
    real = features_of(judge, everything)

    columns: dict[str, list[Image.Image]] = {"real": images, "reconstructed": reconstruct(latents, images)}
    seconds, start = {}, time.perf_counter()
    columns["latents"] = sample(latents, args, conditions_of(latents, data, id2label))
    seconds["latents"], start = time.perf_counter() - start, time.perf_counter()
    small = sample(pixels, args, conditions_of(pixels, data, id2label))
    inputs = {"image": small} | conditions_of(upsampler, data, id2label)
    columns["upsampled"] = sample(upsampler, args, inputs, seeded(args.seed, number), guidance_scale=1.0)
    seconds["upsampled"] = time.perf_counter() - start

    rows = {}
    for name, samples in columns.items():
        rows[name] = row = distances(real, features_of(judge, samples)) | (
            {"seconds": seconds[name]} if name in seconds else {}
        )
        print(
            f"{name:13} Frechet distance {row['frechet']:.3f}, kernel distance {row['kernel']:.4f} "
            f"({row['kernel_error']:.4f})" + (f", {row['seconds']:.0f} s" if name in seconds else ""),
            flush=True,
        )
    print(f"{number} samples, {len(everything)} images, {real.shape[1]} features")
    shown = [number * i // NUM_SHOWN for i in range(NUM_SHOWN)]
    cells = ((name, [samples[i] for i in shown]) for name, samples in columns.items())
    grid_of_columns(cells, scale=1).save(args.output_dir / "latents.png")
    write_report(args.output_dir / "latents.json", args, num_images=number, rows=rows)


if __name__ == "__main__":
    main()
