"""
Figure of DDIM inversion: pairs of held-out images, the noise that leads to each, and images from noise between the two.

    python benchmarks/draw_inversion.py --model spaces/model/base --variant fp16 \
        --data_files data/noto-emoji-32/test.parquet --output docs/images/inversion.png
"""

import torch
from measuring import load_held_out, make_parser, quiet
from PIL import Image

from diffusers_adm import ADMPipeline
from diffusers_adm.conditioning.interpolation import slerp
from diffusers_adm.training import labelled_grid


SIZE = 32
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LABELS = ["image", "its noise", "from it", "0.25", "0.5", "0.75", "from it", "its noise", "image"]
NUM_COLORS = 128  # which keep the file small


def as_image(noise: torch.Tensor) -> Image.Image:
    """Noise `(3, height, width)`, from -3 to 3."""
    levels = (noise.clamp(-3, 3) / 6 + 0.5).mul(255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def main() -> None:
    parser = make_parser(
        __doc__, "model", "data_files", "output", num_images=8, num_inference_steps=50, scale=2, iterations=4
    )
    parser.add_argument("--variant", help="Variant of the weights, e.g. fp16.")
    parser.set_defaults(label_column=None, caption_column=None)
    args = parser.parse_args()

    pipe = quiet(ADMPipeline.from_pretrained(args.model, variant=args.variant, classifier=None))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    _, _, images = load_held_out(args, SIZE)
    noise = pipe.invert(images, args.num_inference_steps, args.iterations)
    half = len(images) // 2
    paths = [slerp(noise[:half], noise[half : 2 * half], weight) for weight in WEIGHTS]
    arguments = {"num_inference_steps": args.num_inference_steps, "eta": 0.0}
    generated = [pipe(batch_size=half, latents=path, **arguments).images for path in paths]
    cells = []
    for row in range(half):
        path = [column[row] for column in generated]
        cells += [images[row], as_image(noise[row]), *path, as_image(noise[half + row]), images[half + row]]
    grid = labelled_grid(cells, half, len(LABELS), None, LABELS, scale=args.scale)
    grid.convert("RGB").quantize(NUM_COLORS).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
