"""
The figure of the README: samples of the demonstration models in four rows.

    python benchmarks/draw_overview.py

Words as prompts, by the 64x64 model in latents; one sample from noise to image, by the 32x32 model in pixels;
inpainting and a ControlNet with a line drawing (made here), in latents; and super-resolution, in pixels. Each sample
has its own seed, starting with `--seed`, and nothing is picked.
"""

import argparse
from pathlib import Path

import torch
from curves import draw_lines, heart
from diffusers import DPMSolverMultistepScheduler
from measuring import make_parser, quiet, sample
from PIL import Image, ImageDraw, ImageFont

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
)


COLUMNS = 8
CELL, IMAGE = 136, 128  # pixels, with and without the space around an image
HEADING_HEIGHT, HEADING_SIZE, LABEL_HEIGHT, LABEL_SIZE = 46, 28, 30, 20  # pixels
ALMOST_WHITE = 248  # from here on, levels are shown as white: otherwise they would take most of the colours below
COLORS, MAX_BYTES = (256, 192, 128, 96, 64), 80_000  # of the file: as many colours as it has space for
PROMPTS = (  # words that data/popular.txt lists, or wide ones ("flag")
    *("face", "heart", "fire", "star", "cat", "panda", "apple", "cake"),
    *("car", "rocket", "sun", "rose", "butterfly", "rainbow", "ball", "flag"),
)
# Of the 32x32 model, which needs the category as well.
STRIP_INPUTS = {"prompt": ["grinning face"], "class_labels": ["Smileys & Emotion"]}
INPAINTED_PROMPT = "cat"
DRAWN_PROMPT = "red heart"

Cell = tuple[str, Image.Image]


def load(folder: Path, args: argparse.Namespace) -> ADMPipeline:
    pipe = quiet(ADMPipeline.from_pretrained(folder, variant=args.variant))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def draw_strip(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    """Samples at evenly spaced steps; the first is only noise."""
    config = pipe.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    states = [torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))]

    def keep(pipe, step, timestep, kwargs):
        states.append(kwargs["latents"])
        return kwargs

    sample(pipe, args, STRIP_INPUTS, latents=states[0], callback_on_step_end=keep)
    steps = [round(i * (len(states) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    images = pipe.image_processor.postprocess(torch.cat([states[step] for step in steps]))
    return [(f"step {step}", image) for step, image in zip(steps, images, strict=True)]


def draw_inpainted(pipe: ADMPipeline, image: Image.Image, args: argparse.Namespace) -> list[Cell]:
    """The lower half of an image, twice. RePaint requires ancestral steps, those of the model's own scheduler."""
    mask = Image.new("L", image.size)
    mask.paste(255, (0, image.height // 2, image.width, image.height))
    hidden = image.copy()
    hidden.paste("grey", mask=mask)
    inputs: dict[str, list] = {"prompt": [INPAINTED_PROMPT] * 2, "image": [image] * 2, "mask_image": [mask] * 2}
    images = sample(quiet(ADMInpaintPipeline(**pipe.components, id2label=pipe.config.id2label)), args, inputs)
    return list(zip(("kept", "inpainted", "again"), (hidden, *images), strict=True))


def draw_controlled(pipe: ADMPipeline, args: argparse.Namespace) -> list[Cell]:
    controlnet = AdaGNControlNetModel.from_pretrained(args.models / "controlnet_latents", variant=args.variant)
    controlled = quiet(ADMControlNetPipeline(**pipe.components, controlnet=controlnet))
    drawing = draw_lines([heart()], pipe.unet.config.sample_size * pipe.vae_scale_factor)
    images = sample(controlled, args, {"prompt": [DRAWN_PROMPT] * 2, "image": [drawing] * 2})
    return list(zip(("a sketch", DRAWN_PROMPT, "again"), (drawing, *images), strict=True))


def draw_upsampled(small: Image.Image, args: argparse.Namespace) -> list[Cell]:
    upsampler = quiet(ADMSuperResolutionPipeline.from_pretrained(args.models / "upsampler", variant=args.variant))
    (large,) = sample(upsampler, args, {"image": [small]}, noise_level=args.noise_level, guidance_scale=1.0)
    return [(f"{image.width} x {image.height}", image) for image in (small, large)]


def assemble(rows: dict[str, list[Cell]]) -> Image.Image:
    """Rows of cells below their headings; each label below its image."""
    lines = [(heading, -(-len(cells) // COLUMNS)) for heading, cells in rows.items()]
    height = sum(HEADING_HEIGHT + number * (CELL + LABEL_HEIGHT) for _, number in lines)
    figure = Image.new("RGB", (COLUMNS * CELL, height), "white")
    draw, y = ImageDraw.Draw(figure), 0
    heading_font, label_font = (ImageFont.load_default(size=size) for size in (HEADING_SIZE, LABEL_SIZE))
    for heading, cells in rows.items():
        draw.text((8, y + 6), heading, fill="black", font=heading_font)
        y += HEADING_HEIGHT
        for start in range(0, len(cells), COLUMNS):
            for column, (label, image) in enumerate(cells[start : start + COLUMNS]):
                x = column * CELL
                # Whole pixels compress well.
                figure.paste(image.resize((IMAGE, IMAGE), Image.Resampling.NEAREST), (x + 4, y + 4))
                draw.text((x + CELL / 2, y + CELL), label, fill="black", font=label_font, anchor="ma")
            y += CELL + LABEL_HEIGHT
    return figure


def save(figure: Image.Image, path: str) -> None:
    """As PNG of at most `MAX_BYTES`, if `COLORS` allow it."""
    figure = figure.point(lambda level: 255 if level >= ALMOST_WHITE else level)
    for colors in COLORS:
        figure.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
        if Path(path).stat().st_size < MAX_BYTES:
            return
    raise RuntimeError(f"{path} has more than {MAX_BYTES} bytes with {colors} colours. Leave a row out.")


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

    pipe, small = load(args.models / "latents", args), load(args.models / "base", args)
    own_scheduler = quiet(ADMPipeline.from_pretrained(args.models / "latents", variant=args.variant))
    words = dict(zip(PROMPTS, sample(pipe, args, {"prompt": list(PROMPTS)}), strict=True))
    strip = draw_strip(small, args)
    rows = {
        "Type a word, get an emoji": list(words.items()),
        "From noise to image": strip,
        "Inpainting, sketches, super-resolution": [
            *draw_inpainted(own_scheduler, words[INPAINTED_PROMPT], args),
            *draw_controlled(pipe, args),
            *draw_upsampled(strip[-1][1], args),
        ],
    }
    save(assemble(rows), args.output)


if __name__ == "__main__":
    main()
