"""
Inverse problems with an unconditional use of a model: PSNR of diffusion posterior sampling (DPS) and of other methods.

    python benchmarks/measure_inverse.py --model spaces/model/base --variant fp16 \\
        --data_files data/noto-emoji-32/test.parquet --label_column label --caption_column text --output_dir DIR

`--model` is an `ADMPipeline` in pixels, `--data_files` held-out images. Measurements, with Gaussian noise of
`--noise_std` for values in [-1, 1]:

- `super-resolution`: the mean of each 4 x 4 square; compared with bicubic interpolation;
- `random`: half of the pixels; `box`: all but the middle quarter; both compared with RePaint (`ADMInpaintPipeline`) at
  about as many evaluations of the network, with resampling (`jump_length=5`, `jump_n_sample=3`) and without;
- `blur`: a Gaussian kernel; compared with the blurred image.

Each row is one method: the PSNR in dB to the real images and its difference to the first method of the problem, means
over images with standard errors; the root mean square of A(x) - y; evaluations of the network; seconds per image. PSNR
prefers blurred results to plausible details at another place. With `--conditional` all methods get class and caption.
`--output_dir` gets the table (`inverse.json`) and some images of all problems (`inverse.png`).
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    conditions_of,
    grid_of_columns,
    load_held_out,
    make_parser,
    mean_and_error,
    pixels_of,
    psnr,
    quiet,
    sample,
    to_images,
    with_errors,
    write_report,
)
from PIL import Image

from diffusers_adm import ADMInpaintPipeline, ADMPipeline
from diffusers_adm.conditioning.image_guidance import MeasurementGuidance
from diffusers_adm.conditioning.inpainting import resampling_walk
from diffusers_adm.conditioning.measurements import (
    DownsamplingOperator,
    GaussianBlurOperator,
    LinearOperator,
    MaskOperator,
)


JUMPS = {"jump_length": 5, "jump_n_sample": 3}
NUM_SHOWN = 3
FACTOR, BLUR = 4, (9, 1.5)
PROBLEMS = ("super-resolution", "random", "box", "blur")


def make_operator(problem: str, size: int, seed: int) -> LinearOperator:
    """The measurement of a problem, the same for all images."""
    if problem == "super-resolution":
        return DownsamplingOperator(FACTOR)
    if problem == "blur":
        return GaussianBlurOperator(*BLUR)
    keep_mask = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    if problem == "box":
        keep_mask = torch.ones(size, size, dtype=torch.bool)
        keep_mask[size // 4 : size - size // 4, size // 4 : size - size // 4] = False
    return MaskOperator(keep_mask)


def steps_of_repaint(evaluations: int) -> int:
    """The number of steps whose resampling takes at most so many evaluations of the network."""
    numbers = range(1, evaluations + 1)
    return max(n for n in numbers if n == 1 or len(resampling_walk(n, *JUMPS.values())) <= evaluations)


def baselines(
    problem: str, operator: LinearOperator, measured: torch.Tensor, model: ADMPipeline, args: argparse.Namespace
) -> dict[str, Callable[..., list[Image.Image]]]:
    """The methods that DPS is compared with: functions of the conditions."""
    if problem == "super-resolution":
        return {
            "bicubic": lambda **_: to_images(F.interpolate(measured, scale_factor=FACTOR, mode="bicubic").clamp(-1, 1))
        }
    if problem == "blur":
        return {"blurred": lambda **_: to_images(measured.clamp(-1, 1))}
    pipe = quiet(ADMInpaintPipeline.from_pipe(model)).to(args.device)
    images = list((measured.clamp(-1, 1) + 1) / 2)
    mask = (~operator.keep_mask[0, 0]).float()

    def repaint(num_inference_steps: int, **options: Any) -> list[Image.Image]:
        inputs = {"image": images, "mask_image": [mask] * len(images)}
        conditions = {name: options.pop(name) for name in ("prompt", "class_labels") if name in options}
        return sample(pipe, args, inputs | conditions, num_inference_steps=num_inference_steps, **options)

    steps = args.num_inference_steps
    return {
        "RePaint": lambda **conditions: repaint(steps_of_repaint(steps), **JUMPS, **conditions),
        "replacement": lambda **conditions: repaint(steps, jump_n_sample=1, **conditions),
    }


def main() -> None:
    settings = {"num_inference_steps": 100, "batch_size": 16, "seed": 0, "num_images": 16, "noise_std": 0.0}
    parser = make_parser(__doc__, "model", "data_files", "label_column", "caption_column", "output_dir", **settings)
    parser.add_argument("--variant", help="Variant of the files of the model, such as `fp16`.")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--scales", nargs="+", type=float, default=[4.0], help="Step sizes of DPS; one row each.")
    parser.add_argument("--no_backward", action="store_true", help="Also DPS with `through_unet=False`.")
    parser.add_argument("--conditional", action="store_true", help="Pass class and caption of each image.")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = ADMPipeline.from_pretrained(args.model, variant=args.variant, dtype=torch.float32)
    pipe = quiet(pipe.to(args.device))
    size = pipe.unet.config.sample_size
    data, id2label, images = load_held_out(args, size)
    real = pixels_of(images).double() / 255
    conditions = conditions_of(pipe, data, id2label) if args.conditional else {}

    rows, grids = [], []
    for problem in args.problems:
        operator = make_operator(problem, size, args.seed)
        measured = operator.measure(images, args.noise_std, torch.Generator().manual_seed(args.seed))

        def guided(scale: float, through_unet: bool, operator=operator, measured=measured, **conditions):
            # One batch after the other, each with its part of the measurement.
            results = []
            for start in range(0, len(images), args.batch_size):
                batch = slice(start, start + args.batch_size)
                guidance = MeasurementGuidance(operator, measured[batch], scale, through_unet=through_unet)
                generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(images))[batch]]
                results += pipe(
                    batch_size=len(generators),
                    num_inference_steps=args.num_inference_steps,
                    generator=generators,
                    guidance_fn=guidance,
                    **{name: values[batch] for name, values in conditions.items()},
                ).images
            return results

        methods = baselines(problem, operator, measured, pipe, args)
        for scale in args.scales:
            methods[f"DPS {scale:g}"] = lambda scale=scale, **conditions: guided(scale, True, **conditions)
            if args.no_backward:
                methods[f"DPS {scale:g}, no backward pass"] = lambda scale=scale, **conditions: guided(
                    scale, False, **conditions
                )
        first = None
        shown = [("real", images), ("measured", to_images(_as_image(measured, size)))]
        for name, method in methods.items():
            calls = []
            handle = pipe.unet.register_forward_pre_hook(
                lambda module, inputs, calls=calls: calls.append(len(inputs[0]))
            )
            start = time.perf_counter()
            results = method(**conditions)
            seconds = time.perf_counter() - start
            handle.remove()
            values = pixels_of(results).double() / 255
            quality = psnr(values, real)
            first = quality if first is None else first
            residual = (operator(2 * values.float() - 1) - measured).square().mean().sqrt().item()
            rows.append(
                {
                    "problem": problem,
                    "method": name,
                    "num_images": len(images),
                    **with_errors(psnr=mean_and_error(quality), psnr_difference=mean_and_error(quality - first)),
                    "residual": residual,
                    "num_evaluations": sum(calls) / len(images),
                    "seconds_per_image": seconds / len(images),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            shown.append((name, results))
        write_report(args.output_dir / "inverse.json", args, rows=rows)
        grids.append(grid_of_columns([(name, tiles[:NUM_SHOWN]) for name, tiles in shown], scale=max(1, 64 // size)))
        stack(grids).save(args.output_dir / "inverse.png")


def stack(grids: list[Image.Image]) -> Image.Image:
    """The figures of all problems, one below the other."""
    figure = Image.new("RGB", (max(grid.width for grid in grids), sum(grid.height for grid in grids)), "white")
    top = 0
    for grid in grids:
        figure.paste(grid, (0, top))
        top += grid.height
    return figure


def _as_image(measured: torch.Tensor, size: int) -> torch.Tensor:
    """The measurement upsampled to the size of the images, for the figure."""
    return F.interpolate(measured, size=(size, size), mode="nearest").clamp(-1, 1)


if __name__ == "__main__":
    main()
