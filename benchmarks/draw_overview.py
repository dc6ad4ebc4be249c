"""
The picture of the README: what the demonstration models do, in four rows.

    python benchmarks/draw_overview.py

Prompts; one picture on its way from noise; guidance, and enlarging; repainting, and following a drawing (made here).
Each sample has a seed of its own, from `--seed` on, and nothing is picked.
"""

import argparse
from pathlib import Path

import torch
from draw_controlnet import EYES, HEAD, arc, draw_lines, heart
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
CELL = 128  # pixels: those of a sample become squares
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
ENLARGED_PROMPTS = ("fire", "dog face")
REPAINTED_PROMPT = "grinning face"
DRAWINGS = (
    ("smiling face", [HEAD, *EYES, arc(0.5, 0.6, 0.5, 0.2, 1)]),
    ("red heart", [heart()]),
)

Cell = tuple[str, Image.Image]


def generators(args: argparse.Namespace, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(args.seed + i) for i in range(count)]


def options(args: argparse.Namespace, count: int) -> dict:
    return {
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
        "generator": generators(args, count),
    }


def draw_strip(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    """Samples at evenly spaced steps; the first is noise alone."""
    states: list[torch.Tensor] = []
    size = pipe.unet.config.sample_size
    start = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(args.seed))

    def keep(pipe, step, timestep, kwargs):
        states.append(kwargs["latents"])
        return kwargs

    pipe(STRIP_PROMPT, latents=start, callback_on_step_end=keep, **options(args, 1))
    states.insert(0, start)
    steps = [round(i * (len(states) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    pictures = pipe.image_processor.postprocess(torch.cat([states[step] for step in steps]))
    return [(f"step {step}", picture) for step, picture in zip(steps, pictures, strict=True)]


def draw_guidance(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    cells = []
    for scale in SCALES:
        images = pipe(GUIDED_PROMPT, **options(args, 1) | {"guidance_scale": scale}).images
        cells.append((f"guidance {scale:g}", images[0]))
    return cells


def draw_enlarged(pipe: ADMPipeline, folder: Path, args: argparse.Namespace) -> list[Cell]:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(folder, variant=args.variant))
    count = len(ENLARGED_PROMPTS)
    small = pipe(list(ENLARGED_PROMPTS), **options(args, count)).images
    large = upsampler(small, noise_level=args.noise_level, **options(args, count) | {"guidance_scale": 1.0}).images
    names = [f"{image.width} x {image.height}" for image in (small[0], large[0])]
    return [cell for pair in zip(small, large, strict=True) for cell in zip(names, pair, strict=True)]


def draw_repainted(pipe: ADMPipeline, picture: Image.Image, args: argparse.Namespace) -> list[Cell]:
    """The lower half of a picture, twice."""
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, picture.height // 2, picture.width, picture.height))
    hidden = picture.copy()
    hidden.paste("grey", mask=mask)
    inpainter = quiet(ADMInpaintPipeline(**pipe.components))
    images = inpainter(picture, mask, REPAINTED_PROMPT, num_images_per_prompt=2, **options(args, 2)).images
    return list(zip(("a picture", "what is kept", "repainted", "again"), (picture, hidden, *images), strict=True))


def draw_controlled(pipe: ADMPipeline, controlnet: AdaGNControlNetModel, args: argparse.Namespace) -> list[Cell]:
    controlled = quiet(ADMControlNetPipeline(**pipe.components, controlnet=controlnet))
    size = pipe.unet.config.sample_size
    drawings = [draw_lines(curves, size) for _, curves in DRAWINGS]
    prompts = [prompt for prompt, _ in DRAWINGS]
    images = controlled(prompts, image=drawings, **options(args, len(prompts))).images
    return [cell for row in zip(prompts, drawings, images, strict=True) for cell in (("a drawing", row[1]), row[::2])]


def quiet(pipe: ADMPipeline) -> ADMPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble(rows: dict[str, list[Cell]]) -> Image.Image:
    """Rows of cells below their headings."""
    font = ImageFont.load_default(size=20)
    parts = []
    for heading, cells in rows.items():
        pictures = [picture.resize((CELL, CELL), Image.Resampling.NEAREST) for _, picture in cells]
        grid = labelled_grid(pictures, 1, COLUMNS, col_labels=[name for name, _ in cells])
        part = Image.new("RGB", (grid.width, grid.height + HEADING_HEIGHT), "white")
        ImageDraw.Draw(part).text((4, 6), heading, fill="black", font=font)
        part.paste(grid, (0, HEADING_HEIGHT))
        parts.append(part)
    picture = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        picture.paste(part, (0, top))
        top += part.height
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("spaces/model"), help="base/, upsampler/, controlnet/")
    parser.add_argument("--variant", default="fp16", help="Of the files of the weights.")
    parser.add_argument("--output", default="docs/images/overview.png")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--noise_level", type=int, default=20, help="Of the upsampler.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.models / "base", variant=args.variant))
    controlnet = AdaGNControlNetModel.from_pretrained(args.models / "controlnet", variant=args.variant)
    prompted = pipe(list(PROMPTS), **options(args, len(PROMPTS))).images
    rows = {
        "Prompts": list(zip(PROMPTS, prompted, strict=True)),
        f'"{STRIP_PROMPT}", from noise': draw_strip(pipe, args),
        f'Guidance ("{GUIDED_PROMPT}"); enlarging': [
            *draw_guidance(pipe, args),
            *draw_enlarged(pipe, args.models / "upsampler", args),
        ],
        "Repainting; following drawings": [
            *draw_repainted(pipe, prompted[PROMPTS.index(REPAINTED_PROMPT)], args),
            *draw_controlled(pipe, controlnet, args),
        ],
    }
    assemble(rows).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
