"""
Quality of an upsampler: agreement with the small images, sharpness, and distance to the real images.

    python benchmarks/measure_super_resolution.py --model DIR --data_files data/noto-emoji-64/test.parquet \
        --output_dir DIR

`--model` is an `ADMSuperResolutionPipeline`, `--data_files` held-out large images. They are downsampled to 8 bits by
averaging blocks of pixels, and upsampled by the pipeline with several samplers, and by Pillow's bicubic filter:

- `agreement`: PSNR in dB between the upsampled images, averaged over blocks again, and the small ones.
- `gradient_ratio`: squared differences between neighbouring pixels, summed over all images, relative to those of the
  real images. Below 1: blurred.
- `psnr`, `psnr_bicubic`, `psnr_difference`: PSNR in dB to the real images. Plausible but displaced edges score lower
  than blurred ones, so a difference slightly below 0 is expected.

PSNRs are means over images, with standard errors; that of the ratio is by the jackknife over images. `--output_dir`
gets the table (`super_resolution.json`) and some images (`samples.png`: small, ours, bicubic, real).
"""

import math
import time

import torch
import torch.nn.functional as F
from measuring import (
    conditions_of,
    make_parser,
    mean_and_error,
    pixels_of,
    psnr,
    quiet,
    sample,
    spread,
    to_images,
    with_errors,
    write_report,
)
from PIL import Image

from diffusers_adm import ADMSuperResolutionPipeline
from diffusers_adm.conditioning.low_resolution import downsample
from diffusers_adm.training import ImageDataset, labelled_strips, load_image_dataset


# `eta` of each sampler: None is ancestral sampling, 0 deterministic DDIM.
SAMPLERS = {"ancestral": None, "ddim": 0.0}
MEASURES = ("agreement", "gradient_ratio", "psnr", "psnr_bicubic", "psnr_difference")


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """`(N, 3, height, width)` in [0, 1], float64."""
    return pixels_of(images).double() / 255


def gradient_energy(images: torch.Tensor) -> torch.Tensor:
    """`(N,)`: sum of squared differences of horizontal and of vertical neighbours."""
    return sum(images.diff(dim=dim).pow(2).sum(dim=(1, 2, 3)) for dim in (2, 3))


def ratio_and_error(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """Ratio of the sums, and its standard error by the jackknife."""
    total, other_total, number = numerators.sum(), denominators.sum(), len(numerators)
    without_one = (total - numerators) / (other_total - denominators)
    error = math.sqrt((number - 1) * without_one.var(correction=0).item())
    return (total / other_total).item(), error


def measure(
    upsampled: torch.Tensor, bicubic: torch.Tensor, small: torch.Tensor, real: torch.Tensor
) -> dict[str, float]:
    """All `MEASURES` of images in [0, 1]."""
    ours, theirs = psnr(upsampled, real), psnr(bicubic, real)
    factor = real.shape[-1] // small.shape[-1]
    return with_errors(
        agreement=mean_and_error(psnr(F.avg_pool2d(upsampled, factor), small)),
        gradient_ratio=ratio_and_error(gradient_energy(upsampled), gradient_energy(real)),
        psnr=mean_and_error(ours),
        psnr_bicubic=mean_and_error(theirs),
        psnr_difference=mean_and_error(ours - theirs),
    )


def main() -> None:
    settings = {"guidance_scale": 1.0, "num_shown": 12, "batch_size": 41, "seed": 0}
    columns = {"image_column": "image", "label_column": "label", "caption_column": "text"}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", "noise_level", **columns, **settings)
    parser.add_argument("--low_res_size", type=int, help="Size of the small images, if not in the config.")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--back_projection", action="store_true", help="Pass `back_projection=True`.")
    parser.add_argument("--max_images", type=int, help="Use only the first images.")
    args = parser.parse_args()

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = quiet(ADMSuperResolutionPipeline.from_pretrained(args.model)).to(args.device)
    size, low_res_size = pipe.unet.config.sample_size, args.low_res_size or pipe.config.low_res_size
    if low_res_size is None:
        parser.error(f"{args.model} does not say the size of its small images; pass `--low_res_size`")

    dataset, id2label = load_image_dataset(
        data_files=args.data_files,
        image_column=args.image_column,
        label_column=None if pipe.unet.config.num_class_embeds is None else args.label_column,
        caption_column=args.caption_column if pipe.has_cross_attention else None,
    )
    dataset = dataset.select(range(min(args.max_images or len(dataset), len(dataset))))
    large = torch.stack([example["images"] for example in ImageDataset(dataset, size, center_crop=True)])
    real_images, small_images = to_images(large), to_images(downsample(large, size // low_res_size))
    bicubic_images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in small_images]
    real, small, bicubic = (to_tensor(images) for images in (real_images, small_images, bicubic_images))

    inputs = {"image": small_images, **conditions_of(pipe, dataset, id2label)}
    options = {"noise_level": args.noise_level, "back_projection": args.back_projection}
    cells, shown = {}, None
    for name in args.samplers:
        for steps in args.num_inference_steps:
            start = time.perf_counter()
            images = sample(pipe, args, inputs, num_inference_steps=steps, eta=SAMPLERS[name], **options)
            seconds_per_image = (time.perf_counter() - start) / len(images)
            cell = measure(to_tensor(images), bicubic, small, real)
            cells[f"{name}-{steps}"] = cell | {"num_images": len(images), "seconds_per_image": seconds_per_image}
            numbers = (f"{key} {cell[key]:.3f} ({cell[f'{key}_error']:.3f})" for key in MEASURES)
            print(f"{name}-{steps:<4}", *numbers, f"{seconds_per_image:.2f} s per image", sep="  ", flush=True)
            shown = shown or images
    blurred, error = ratio_and_error(gradient_energy(bicubic), gradient_energy(real))
    print(f"bicubic: gradient_ratio {blurred:.3f} ({error:.3f})")

    path = args.output_dir / "super_resolution.json"
    write_report(path, args, bicubic_gradient_ratio=blurred, cells=cells)
    small_images = [image.resize((size, size), Image.Resampling.NEAREST) for image in small_images]
    columns = {"small": small_images, "ours": shown, "bicubic": bicubic_images, "real": real_images}
    chosen = spread(len(large), args.num_shown)
    strips = {name: [images[i] for i in chosen] for name, images in columns.items()}
    labelled_strips(strips, scale=2).save(args.output_dir / "samples.png")


if __name__ == "__main__":
    main()
