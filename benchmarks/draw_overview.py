"""
The figure of the README: samples of the demonstration models in four rows.

    python benchmarks/draw_overview.py

Prompts; one sample from noise to image; guidance and super-resolution; inpainting and ControlNet with line drawings
(made here). Each sample has its own seed, starting with `--seed`, and nothing is picked.
"""

import argparse
from pathlib import Path

import torch
from draw_controlnet import EYES, HEAD, arc, draw_lines, heart
from measuring import make_parser, quiet, seeded
from PIL import Image, ImageDraw, ImageFont

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
)
from diffusers_adm.training import labelled_grid


COLUMNS = 8
CELL = 128  # pixels
HEADING_HEIGHT = 34
PROMPTS = (
    "fire",
    "red heart",
    "grinning face",
    "dog face",
    "red apple",
    "automobile",
    "italy flag",
    "woman astronaut",
)
STRIP_PROMPT = "grinning face"
GUIDED_PROMPT = "red heart"
SCALES = (1.0, 2.0, 4.0, 8.0)
UPSAMPLED_PROMPTS = ("fire", "dog face")
INPAINTED_PROMPT = "grinning face"
DRAWINGS = (
    ("smiling face", [HEAD, *EYES, arc(0.5, 0.6, 0.5, 0.2, 1)]),
    ("red heart", [heart()]),
)

Cell = tuple[str, Image.Image]


def options(args: argparse.Namespace, count: int) -> dict:
    return {
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "generator": seeded(args.seed, count),
    }


def draw_strip(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    """Samples at evenly spaced steps; the first is only noise."""
    states: list[torch.Tensor] = []
    size = pipe.unet.config.sample_size
    start = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(args.seed))

    def keep(pipe, step, timestep, kwargs):
        states.append(kwargs["latents"])
        return kwargs

    pipe(STRIP_PROMPT, latents=start, callback_on_step_end=keep, **options(args, 1))
    states.insert(0, start)
    steps = [round(i * (len(states) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    images = pipe.image_processor.postprocess(torch.cat([states[step] for step in steps]))
    return [(f"step {step}", image) for step, image in zip(steps, images, strict=True)]


def draw_guidance(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    cells = []
    for scale in SCALES:
        images = pipe(GUIDED_PROMPT, **options(args, 1) | {"guidance_scale": scale}).images
        cells.append((f"guidance {scale:g}", images[0]))
    return cells


def draw_upsampled(pipe: ADMPipeline, folder: Path, args: argparse.Namespace) -> list[Cell]:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(folder, variant=args.variant))
    count = len(UPSAMPLED_PROMPTS)
    small = pipe(list(UPSAMPLED_PROMPTS), **options(args, count)).images
    large = upsampler(small, noise_level=args.noise_level, **options(args, count) | {"guidance_scale": 1.0}).images
    names = [f"{image.width} x {image.height}" for image in (small[0], large[0])]
    return [cell for pair in zip(small, large, strict=True) for cell in zip(names, pair, strict=True)]


def draw_inpainted(pipe: ADMPipeline, image: Image.Image, args: argparse.Namespace) -> list[Cell]:
    """The lower half of an image, twice."""
    mask = Image.new("L", image.size)
    mask.paste(255, (0, image.height // 2, image.width, image.height))
    hidden = image.copy()
    hidden.paste("grey", mask=mask)
    inpainter = quiet(ADMInpaintPipeline(**pipe.components))
    images = inpainter(image, mask, INPAINTED_PROMPT, num_images_per_prompt=2, **options(args, 2)).images
    return list(zip(("an image", "what is kept", "inpainted", "again"), (image, hidden, *images), strict=True))


def draw_controlled(pipe: ADMPipeline, controlnet: AdaGNControlNetModel, args: argparse.Namespace) -> list[Cell]:
    controlled = quiet(ADMControlNetPipeline(**pipe.components, controlnet=controlnet))
    size = pipe.unet.config.sample_size
    drawings = [draw_lines(curves, size) for _, curves in DRAWINGS]
    prompts = [prompt for prompt, _ in DRAWINGS]
    images = controlled(prompts, image=drawings, **options(args, len(prompts))).images
    return [cell for row in zip(prompts, drawings, images, strict=True) for cell in (("a drawing", row[1]), row[::2])]


def assemble(rows: dict[str, list[Cell]]) -> Image.Image:
    """Rows of cells below their headings."""
    font = ImageFont.load_default(size=20)
    parts = []
    for heading, cells in rows.items():
        images = [image.resize((CELL, CELL), Image.Resampling.NEAREST) for _, image in cells]
        grid = labelled_grid(images, 1, COLUMNS, col_labels=[name for name, _ in cells])
        part = Image.new("RGB", (grid.width, grid.height + HEADING_HEIGHT), "white")
        ImageDraw.Draw(part).text((4, 6), heading, fill="black", font=font)
        part.paste(grid, (0, HEADING_HEIGHT))
        parts.append(part)
    figure = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        figure.paste(part, (0, top))
        top += part.height
    return figure


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models", type=Path, default=Path("spaces/model"), help="Folder with base/, upsampler/, controlnet/."
    )
    parser.add_argument("--variant", default="fp16", help="Variant of the weights.")
    parser.add_argument("--output", default="docs/images/overview.png")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--noise_level", type=int, default=20, help="Noise level of the upsampler.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.models / "base", variant=args.variant))
    controlnet = AdaGNControlNetModel.from_pretrained(args.models / "controlnet", variant=args.variant)
    prompted = pipe(list(PROMPTS), **options(args, len(PROMPTS))).images
    rows = {
        "Prompts": list(zip(PROMPTS, prompted, strict=True)),
        f'"{STRIP_PROMPT}", from noise': draw_strip(pipe, args),
        f'Guidance ("{GUIDED_PROMPT}"); super-resolution': [
            *draw_guidance(pipe, args),
            *draw_upsampled(pipe, args.models / "upsampler", args),
        ],
        "Inpainting; ControlNet": [
            *draw_inpainted(pipe, prompted[PROMPTS.index(INPAINTED_PROMPT)], args),
            *draw_controlled(pipe, controlnet, args),
        ],
    }
    assemble(rows).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
