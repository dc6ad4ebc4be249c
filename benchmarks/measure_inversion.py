"""
Round trip of DDIM inversion: held-out images, inverted to latents and generated from them again.

    python benchmarks/measure_inversion.py --model spaces/model/base --variant fp16 \
        --data_files data/noto-emoji-32/test.parquet --output_dir DIR

For each of `--conditions` ("unconditional", "caption": with the caption and class of each image, "guided": with these
and `--guidance_scale`) and each of `--settings` (STEPSxITERATIONS: number of steps and of fixed-point iterations), the
peak signal-to-noise ratio (PSNR) of the result against the image, with its standard error over the images, the smallest
one, and the standard deviation of the latents, which is 1 for noise. The scheduler does not clip. For a model in
latents, the PSNR of the autoencoder's own reconstructions, and the difference for each image, too. `--solvers` generate
from the latents of the unconditional inversion with other schedulers, with the same number of steps.
"""

import time

import diffusers
import torch
from measuring import (
    conditions_of,
    load_held_out,
    make_parser,
    mean_and_error,
    psnr,
    quiet,
    with_errors,
    write_report,
)

from diffusers_adm import ADMPipeline
from diffusers_adm.conditioning.image_format import as_size
from diffusers_adm.conditioning.image_inputs import read_images
from diffusers_adm.conditioning.latents import LatentSpace


CONDITIONS = ("unconditional", "caption", "guided")


@torch.no_grad()
def autoencoded(pipe: ADMPipeline, images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], encoded and decoded."""
    space = LatentSpace(pipe.vae)
    decoded = torch.cat([space.decode(space.encode(2 * batch - 1)) for batch in images.split(16)])
    return (decoded / 2 + 0.5).clamp(0, 1)


def main() -> None:
    settings = {"num_images": 32, "guidance_scale": 2.0, "batch_size": 16}
    columns_of = {"label_column": "label", "caption_column": "text"}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", "threads", **columns_of, **settings)
    parser.add_argument("--variant", help="Variant of the weights, e.g. fp16.")
    parser.add_argument("--settings", nargs="+", default=["50x1", "50x2", "50x4", "100x1"], help="STEPSxITERATIONS.")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS, help="Conditions.")
    parser.add_argument("--solvers", nargs="*", default=[], help="Classes of schedulers of diffusers.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = quiet(ADMPipeline.from_pretrained(args.model, variant=args.variant, classifier=None))
    own = pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    size = as_size(pipe.unet.config.sample_size)[0] * pipe.vae_scale_factor
    data, id2label, pictures = load_held_out(args, size)
    images = read_images(pictures, "image", pipe.image_format)
    given = conditions_of(pipe, data, id2label)
    own_psnr = None if pipe.vae is None else psnr(autoencoded(pipe, images), images).tolist()
    if own_psnr is not None:
        print("autoencoder alone: PSNR {:.2f} ({:.2f})".format(*mean_and_error(own_psnr)))

    rows: list[dict] = []

    def report(found: list[torch.Tensor], latents: list[torch.Tensor] | None, **row) -> None:
        values = psnr(torch.cat(found), images).tolist()
        row |= with_errors(psnr=mean_and_error(values)) | {"smallest": min(values)}
        text = f"{row['condition']:14} {row['setting']:7} {row.get('solver', ''):28} "
        text += f"PSNR {row['psnr']:.2f} ({row['psnr_error']:.2f}), smallest {row['smallest']:.2f}"
        if latents is not None:
            row["std"] = float(torch.cat(latents).std())
            text += f", std of latents {row['std']:.3f}, {row['seconds']:.0f} s"
        if own_psnr is not None:
            lost = mean_and_error([a - b for a, b in zip(own_psnr, values, strict=True)])
            row |= with_errors(lost=lost)
            text += ", {:.2f} ({:.2f}) below the autoencoder".format(*lost)
        rows.append(row)
        print(text, flush=True)
        write_report(args.output_dir / "inversion.json", args, num_images=len(images), autoencoder=own_psnr, rows=rows)

    starts = range(0, len(images), args.batch_size)
    for condition in args.conditions:
        for setting in args.settings:
            steps, iterations = map(int, setting.split("x"))
            begin, all_latents, found = time.perf_counter(), [], []
            for start in starts:
                batch = slice(start, start + args.batch_size)
                arguments = {"batch_size": len(images[batch]), "num_inference_steps": steps}
                if condition != "unconditional":
                    arguments |= {name: values[batch] for name, values in given.items()}
                if condition == "guided":
                    arguments["guidance_scale"] = args.guidance_scale
                latents = pipe.invert(images[batch], num_fixed_point_iterations=iterations, **arguments)
                found.append(pipe(**arguments, latents=latents, eta=0.0, output_type="pt").images)
                all_latents.append(latents)
            report(found, all_latents, condition=condition, setting=setting, seconds=time.perf_counter() - begin)
            for solver in args.solvers if condition == "unconditional" else ():
                pipe.scheduler = getattr(diffusers, solver).from_config(own.config)
                arguments = {"num_inference_steps": steps, "output_type": "pt"}
                found = [pipe(**arguments, batch_size=len(latents), latents=latents).images for latents in all_latents]
                report(found, None, condition=condition, setting=setting, solver=solver)
                pipe.scheduler = own


if __name__ == "__main__":
    main()
