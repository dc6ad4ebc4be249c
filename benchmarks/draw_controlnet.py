"""
Figure of samples of a ControlNet trained on edges, for line drawings: several prompts, scales and seeds.

    python benchmarks/draw_controlnet.py --pipeline DIR --controlnet DIR --output controlnet.png

Each row: the drawing (lines one pixel wide, made here), samples from the same noise at several scales, and samples from
other noise at scale 1. `--pipeline` is a text-conditional base.
"""

import torch
from curves import EYES, HEAD, arc, draw_lines, ellipse, heart
from measuring import grid_of_columns, make_parser, quiet, sample

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline


SCALES = (0.0, 0.5, 1.0)
OTHER_SEEDS = 3
TOP, *STRIPES, BOTTOM = (arc(0.5, y, 0.9, 0.06, -1) for y in (0.25, 0.42, 0.58, 0.75))
FLAG = [[*TOP, *reversed(BOTTOM), TOP[0]], *STRIPES]
PERSON = [
    ellipse(0.5, 0.38, 0.4, 0.46),
    arc(0.5, 0.95, 0.7, 0.24, -1),
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


def main() -> None:
    names = ("pipeline", "controlnet", "output")
    args = make_parser(__doc__, *names, guidance_scale=3.0, num_inference_steps=50, seed=0, scale=2).parse_args()

    controlnet = AdaGNControlNetModel.from_pretrained(args.controlnet)
    pipe = quiet(ADMControlNetPipeline.from_pretrained(args.pipeline, controlnet=controlnet))
    curves, prompts, names = zip(*ROWS, strict=True)
    drawings = [draw_lines(drawing, pipe.unet.config.sample_size) for drawing in curves]
    inputs = {"prompt": prompts, "image": drawings}
    if set(names) <= set((pipe.id2label or {}).values()):
        inputs["class_labels"] = names
    columns = [("drawing", drawings)]
    for scale, seed in [*((scale, 0) for scale in SCALES), *((1.0, seed) for seed in range(1, OTHER_SEEDS + 1))]:
        generators = [torch.Generator().manual_seed(args.seed + seed) for _ in ROWS]
        samples = sample(pipe, args, inputs, generators, controlnet_conditioning_scale=scale)
        columns.append((f"seed {seed}" if seed else f"scale {scale:g}", samples))
    grid_of_columns(columns, prompts, scale=args.scale).save(args.output)


if __name__ == "__main__":
    main()
