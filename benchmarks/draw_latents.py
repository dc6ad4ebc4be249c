"""
Figures of the latent demonstration model: samples by prompt and class, and held-out images above their reconstructions.

    python benchmarks/draw_latents.py --model spaces/model/latents --variant fp16 \
        --data_files data/noto-emoji-64/test.parquet --output_dir docs/images
"""

from pathlib import Path

import torch
from measuring import load_held_out, make_parser, quiet, reconstruct, sample
from PIL import Image

from diffusers_adm import ADMPipeline
from diffusers_adm.training import labelled_grid


SIZE = 64
PROMPTS = {
    "fire": "Travel & Places",
    "red heart": "Smileys & Emotion",
    "grinning face": "Smileys & Emotion",
    "kiss": "Smileys & Emotion",
    "woman, medium skin tone": "People & Body",
    "maldives flag": "Flags",
    "red apple": "Food & Drink",
    "dog face": "Animals & Nature",
}


def save(image: Image.Image, path: Path) -> None:
    """Saves 128 colours, which keep the file small."""
    image.convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    settings = {"num_inference_steps": 50, "guidance_scale": 3.0, "seed": 0, "scale": 1, "num_seeds": 3}
    parser = make_parser(__doc__, "model", "data_files", "output_dir", **settings)
    parser.add_argument("--variant", help="Variant of the weights, e.g. fp16.")
    args = parser.parse_args()
    args.num_images, args.label_column, args.caption_column = len(PROMPTS), None, None

    pipe = quiet(ADMPipeline.from_pretrained(args.model, variant=args.variant))
    _, _, images = load_held_out(args, SIZE)
    reconstructions = [*images, *reconstruct(pipe, images)]
    grid = labelled_grid(reconstructions, 2, len(images), ["held-out", "reconstructed"], scale=args.scale)
    save(grid, args.output_dir / "latents_reconstructions.png")
    rows = {}
    for number in range(args.num_seeds):
        inputs = {"prompt": list(PROMPTS), "class_labels": list(PROMPTS.values())}
        generators = [torch.Generator().manual_seed(args.seed + number) for _ in PROMPTS]
        rows[f"seed {args.seed + number}"] = sample(pipe, args, inputs, generators)
    cells = [image for row in rows.values() for image in row]
    grid = labelled_grid(cells, len(rows), len(PROMPTS), list(rows), list(PROMPTS), scale=args.scale)
    save(grid, args.output_dir / "latents_samples.png")


if __name__ == "__main__":
    main()
