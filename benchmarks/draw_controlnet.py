"""
Figure of samples of a ControlNet trained on edges, for line drawings: several prompts, scales and seeds.

    python benchmarks/draw_controlnet.py --pipeline DIR --controlnet DIR --output controlnet.png

Each row: the drawing (lines one pixel wide, made here), samples from the same noise at several scales, and samples from
other noise at scale 1. `--pipeline` is a text-conditional base.
"""

import math

import torch
from measuring import make_parser, quiet
from PIL import Image, ImageDraw

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline
from diffusers_adm.training import labelled_grid


SCALES = (0.0, 0.5, 1.0)
OTHER_SEEDS = 3
POINTS = 60  # of a curve

Curve = list[tuple[float, float]]  # (x, y) from 0 to 1, y downwards


def ellipse(x: float, y: float, width: float, height: float) -> Curve:
    angles = [2 * math.pi * i / POINTS for i in range(POINTS + 1)]
    return [(x + width / 2 * math.cos(a), y + height / 2 * math.sin(a)) for a in angles]


def arc(x: float, y: float, width: float, height: float, bend: float) -> Curve:
    """From left to right; a positive `bend` curves down, like a smile."""
    steps = [2 * i / POINTS - 1 for i in range(POINTS + 1)]
    return [(x + width / 2 * s, y + bend * height * (1 - s * s)) for s in steps]


def heart() -> Curve:
    angles = [2 * math.pi * i / POINTS for i in range(POINTS + 1)]
    return [
        (
            0.5 + 0.026 * 16 * math.sin(a) ** 3,
            0.48 - 0.026 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


EYES = [ellipse(0.35, 0.42, 0.1, 0.14), ellipse(0.65, 0.42, 0.1, 0.14)]
HEAD = ellipse(0.5, 0.5, 0.88, 0.88)
FLAG = [
    [*arc(0.5, 0.25, 0.9, 0.06, -1), *reversed(arc(0.5, 0.75, 0.9, 0.06, -1)), arc(0.5, 0.25, 0.9, 0.06, -1)[0]],
    arc(0.5, 0.42, 0.9, 0.06, -1),
    arc(0.5, 0.58, 0.9, 0.06, -1),
]
PERSON = [
    ellipse(0.5, 0.38, 0.4, 0.46),
    [*arc(0.5, 0.95, 0.7, 0.24, -1)],
    arc(0.5, 0.3, 0.36, 0.08, 1),
    ellipse(0.42, 0.38, 0.05, 0.06),
    ellipse(0.58, 0.38, 0.05, 0.06),
    arc(0.5, 0.5, 0.14, 0.04, 1),
]
# Drawing, prompt, class.
ROWS = (
    ([heart()], "red heart", "Symbols"),
    ([heart()], "blue heart", "Symbols"),
    ([HEAD, *EYES, arc(0.5, 0.6, 0.5, 0.2, 1)], "smiling face", "Smileys & Emotion"),
    ([HEAD, *EYES, arc(0.5, 0.75, 0.4, 0.14, -1)], "frowning face", "Smileys & Emotion"),
    (FLAG, "germany flag", "Flags"),
    (PERSON, "woman, medium skin tone", "People & Body"),
)


def draw_lines(curves: list[Curve], size: int) -> Image.Image:
    image = Image.new("L", (size, size))
    for curve in curves:
        ImageDraw.Draw(image).line([(x * (size - 1), y * (size - 1)) for x, y in curve], fill=255)
    return image.convert("RGB")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pipeline", required=True, help="base pipeline")
    parser.add_argument("--controlnet", required=True, help="ControlNet")
    parser.add_argument("--output", required=True)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2, help="magnification")
    args = parser.parse_args()

    pipe = ADMControlNetPipeline.from_pretrained(
        args.pipeline, controlnet=AdaGNControlNetModel.from_pretrained(args.controlnet)
    )
    quiet(pipe)
    drawings = [draw_lines(curves, pipe.unet.config.sample_size) for curves, _, _ in ROWS]
    names = [name for *_, name in ROWS]
    classes = {"class_labels": names} if set(names) <= set((pipe.id2label or {}).values()) else {}
    columns = {"drawing": drawings}
    settings = [(scale, 0) for scale in SCALES] + [(1.0, seed) for seed in range(1, OTHER_SEEDS + 1)]
    for scale, seed in settings:
        label = f"scale {scale:g}" if seed == 0 else f"seed {seed}"
        columns[label] = pipe(
            prompt=[prompt for _, prompt, _ in ROWS],
            image=drawings,
            **classes,
            guidance_scale=args.guidance_scale,
            controlnet_conditioning_scale=scale,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(args.seed + seed) for _ in ROWS],
        ).images
    cells = [image for row in zip(*columns.values(), strict=True) for image in row]
    labels = [prompt for _, prompt, _ in ROWS]
    grid = labelled_grid(cells, len(ROWS), len(columns), row_labels=labels, col_labels=list(columns), scale=args.scale)
    grid.save(args.output)


if __name__ == "__main__":
    main()
