"""
The figure of the README: samples of the demonstration models in four rows.

    python benchmarks/draw_overview.py

Prompts; one sample from noise to image; guidance and super-resolution; inpainting and ControlNet with line drawings
(made here). Each sample has its own seed, starting with `--seed`, and nothing is picked.
"""

import argparse
from pathlib import Path

import torch
from curves import EYES, HEAD, arc, draw_lines, heart
from measuring import make_parser, quiet, sample
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
PROMPTS = ["fire", "red heart", "grinning face", "dog face", "red apple", "automobile", "italy flag", "woman astronaut"]
STRIP_PROMPT = "grinning face"
GUIDED_PROMPT = "red heart"
SCALES = (1.0, 2.0, 4.0, 8.0)
UPSAMPLED_PROMPTS = ["fire", "dog face"]
INPAINTED_PROMPT = "grinning face"
DRAWINGS = {"smiling face": [HEAD, *EYES, arc(0.5, 0.6, 0.5, 0.2, 1)], "red heart": [heart()]}

Cell = tuple[str, Image.Image]


def draw_strip(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    """Samples at evenly spaced steps; the first is only noise."""
    size = pipe.unet.config.sample_size
    states = [torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(args.seed))]

    def keep(pipe, step, timestep, kwargs):
        states.append(kwargs["latents"])
        return kwargs

    sample(pipe, args, {"prompt": [STRIP_PROMPT]}, latents=states[0], callback_on_step_end=keep)
    steps = [round(i * (len(states) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    images = pipe.image_processor.postprocess(torch.cat([states[step] for step in steps]))
    return [(f"step {step}", image) for step, image in zip(steps, images, strict=True)]


def draw_guidance(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    inputs = {"prompt": [GUIDED_PROMPT]}
    return [(f"guidance {scale:g}", sample(pipe, args, inputs, guidance_scale=scale)[0]) for scale in SCALES]


def draw_upsampled(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.models / "upsampler", variant=args.variant))
    small = sample(pipe, args, {"prompt": UPSAMPLED_PROMPTS})
    large = sample(upsampler, args, {"image": small}, noise_level=args.noise_level, guidance_scale=1.0)
    images = [image for pair in zip(small, large, strict=True) for image in pair]
    return [(f"{image.width} x {image.height}", image) for image in images]


def draw_inpainted(pipe: ADMPipeline, image: Image.Image, args: argparse.Namespace) -> list[Cell]:
    """The lower half of an image, twice."""
    mask = Image.new("L", image.size)
    mask.paste(255, (0, image.height // 2, image.width, image.height))
    hidden = image.copy()
    hidden.paste("grey", mask=mask)
    inputs = {"image": [image] * 2, "mask_image": [mask] * 2, "prompt": [INPAINTED_PROMPT] * 2}
    images = sample(quiet(ADMInpaintPipeline(**pipe.components)), args, inputs)
    return list(zip(("an image", "what is kept", "inpainted", "again"), (image, hidden, *images), strict=True))


def draw_controlled(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    controlnet = AdaGNControlNetModel.from_pretrained(args.models / "controlnet", variant=args.variant)
    controlled = quiet(ADMControlNetPipeline(**pipe.components, controlnet=controlnet))
    drawings = [draw_lines(curves, pipe.unet.config.sample_size) for curves in DRAWINGS.values()]
    images = sample(controlled, args, {"prompt": list(DRAWINGS), "image": drawings})
    rows = zip(DRAWINGS, drawings, images, strict=True)
    return [cell for prompt, drawing, image in rows for cell in (("a drawing", drawing), (prompt, image))]


def assemble(rows: dict[str, list[Cell]]) -> Image.Image:
    """Rows of cells below their headings."""
    grids = []
    for cells in rows.values():
        images = [image.resize((CELL, CELL), Image.Resampling.NEAREST) for _, image in cells]
        grids.append(labelled_grid(images, 1, COLUMNS, col_labels=[name for name, _ in cells]))
    heights = [HEADING_HEIGHT + grid.height for grid in grids]
    figure, font = Image.new("RGB", (grids[0].width, sum(heights)), "white"), ImageFont.load_default(size=20)
    for i, (heading, grid) in enumerate(zip(rows, grids, strict=True)):
        top = sum(heights[:i])
        ImageDraw.Draw(figure).text((4, top + 6), heading, fill="black", font=font)
        figure.paste(grid, (0, top + HEADING_HEIGHT))
    return figure


def main() -> None:
    parser = make_parser(
        __doc__,
        models=Path("spaces/model"),
        guidance_scale=4.0,
        num_inference_steps=25,
        noise_level=20,
        seed=0,
        variant="fp16",
    )
    parser.add_argument("--output", default="docs/images/overview.png")
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.models / "base", variant=args.variant))
    prompted = sample(pipe, args, {"prompt": PROMPTS})
    kept = prompted[PROMPTS.index(INPAINTED_PROMPT)]
    rows = {
        "Prompts": list(zip(PROMPTS, prompted, strict=True)),
        f'"{STRIP_PROMPT}", from noise': draw_strip(pipe, args),
        f'Guidance ("{GUIDED_PROMPT}"); super-resolution': draw_guidance(pipe, args) + draw_upsampled(pipe, args),
        "Inpainting; ControlNet": draw_inpainted(pipe, kept, args) + draw_controlled(pipe, args),
    }
    assemble(rows).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
