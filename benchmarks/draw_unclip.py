"""
Figures of unCLIP: variations of held-out images, paths between two, an image changed by two prompts, and samples of
prompts through a prior.

    python benchmarks/draw_unclip.py --model DIR --data_files data/noto-emoji-64/test.parquet --output_dir docs/images

The model is an `ADMUnCLIPPipeline` with image encoder and prior.
"""

from pathlib import Path

import torch
from measuring import load_held_out, make_parser, quiet, seeded
from PIL import Image

from diffusers_adm import ADMUnCLIPPipeline
from diffusers_adm.conditioning.image_format import as_size
from diffusers_adm.training import labelled_grid


NUM_COLORS = 128  # which keep the files small
NUM_ROWS, NUM_VARIATIONS = 6, 6
WEIGHTS = [0.0, 0.17, 0.33, 0.5, 0.67, 0.83, 1.0]
PROMPTS = ["red heart", "grinning face", "woman, dark skin tone", "flag", "yellow flower", "clock"]
# Caption of an image of the data, and what it is changed to.
EDITS = [("light skin tone", "dark skin tone"), ("woman", "man"), ("smiling face", "crying face")]
STRENGTHS = [0.0, 0.1, 0.2, 0.3, 0.4]


def save(cells: list[Image.Image], labels: list[str], rows: list[str] | None, path: Path) -> None:
    grid = labelled_grid(cells, len(cells) // len(labels), len(labels), rows, labels, scale=1)
    grid.convert("RGB").quantize(NUM_COLORS).save(path, optimize=True)


def main() -> None:
    settings = {"num_images": None, "num_inference_steps": 50, "guidance_scale": 3.0, "seed": 0}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", **settings)
    parser.set_defaults(label_column=None, caption_column="text")
    args = parser.parse_args()

    pipe = quiet(ADMUnCLIPPipeline.from_pretrained(args.model))
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    data, _, images = load_held_out(args, as_size(pipe.unet.config.sample_size)[0] * pipe.vae_scale_factor)
    captions = list(data["caption"])
    shown = [images[i * len(images) // NUM_ROWS] for i in range(NUM_ROWS)]

    # Variations
    generators = seeded(args.seed, NUM_ROWS * NUM_VARIATIONS)
    made = pipe(image=shown, num_images_per_prompt=NUM_VARIATIONS, generator=generators, **options).images
    cells = []
    for row, image in enumerate(shown):
        cells += [image, *made[row * NUM_VARIATIONS : (row + 1) * NUM_VARIATIONS]]
    save(cells, ["image", *[""] * NUM_VARIATIONS], None, args.output_dir / "unclip_variations.png")

    # Interpolation, between images far apart in the data, which is sorted by kind
    cells = []
    for row in range(NUM_ROWS // 2):
        ends = shown[row], shown[row + NUM_ROWS // 2]
        (generator,) = seeded(args.seed + row, 1)
        path = pipe.interpolate(*ends, weights=WEIGHTS, generator=generator, **options).images
        cells += [ends[0], *path, ends[1]]
    labels = ["image", *(f"{weight:g}" for weight in WEIGHTS), "image"]
    save(cells, labels, None, args.output_dir / "unclip_interpolation.png")

    # Text diffs, of the first image whose caption holds the first of the prompts
    cells, names = [], []
    for source, target in EDITS:
        index = next((i for i, caption in enumerate(captions) if source in caption), None)
        if index is None:
            continue
        (generator,) = seeded(args.seed, 1)
        changed = pipe.edit(images[index], source, target, strength=STRENGTHS, generator=generator, **options).images
        cells += [images[index], *changed]
        names.append(f"to {target}")
    save(cells, ["image", *(f"{strength:g}" for strength in STRENGTHS)], names, args.output_dir / "unclip_edits.png")

    # Prompts
    made = [
        pipe(
            PROMPTS,
            prior_num_candidates=2,
            prior_guidance_scale=2.0,
            generator=seeded(args.seed + 100 * n, len(PROMPTS)),
            **options,
        ).images
        for n in range(NUM_VARIATIONS)
    ]
    cells = [column[row] for row in range(len(PROMPTS)) for column in made]
    save(cells, [""] * NUM_VARIATIONS, PROMPTS, args.output_dir / "unclip_prompts.png")


if __name__ == "__main__":
    with torch.no_grad():
        main()
