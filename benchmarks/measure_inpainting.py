"""
How well inpainted parts fit the rest of the image: the colour step across the border of the mask.

    python benchmarks/measure_inpainting.py --inpainter DIR --model DIR --data_files data/noto-emoji-32/test.parquet \\
        --label_column label --caption_column text --output_dir DIR

`--inpainter` is a pipeline that was trained to inpaint, `--model` one that was not (replacement with resampling);
either may be omitted. For held-out images and four kinds of masks: the number of 8-bit values of kept pixels that
differ from the image (must be 0), and the mean absolute difference of 8-bit values over all pairs of neighbours across
the border; also for the real image, and for a paste of the kept part over an unconditional sample of the same model and
seed. The aim is at most half of the paste's step. `--output_dir` gets the table (`inpainting.json`) and some images
(`inpainting.png`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from typing import Any

import numpy as np
import torch
from measuring import (
    conditions_of,
    grid_of_columns,
    load_held_out,
    make_parser,
    mean_and_error,
    quiet,
    sample,
    with_errors,
    write_report,
)
from PIL import Image

from diffusers_adm import ADMInpaintPipeline
from diffusers_adm.training import random_keep_mask


KINDS = ("box", "boxes", "strokes", "half")
MAX_SHOWN = 6
GREY = 128  # of masked pixels in the figure


def make_mask(kind: str, size: int, generator: random.Random) -> np.ndarray:
    """Keep mask, `(size, size)` of `bool`, `True` = kept; "box" masks the middle quarter of the image."""
    if kind != "box":
        return random_keep_mask(size, generator, kind)[0].numpy() == 1
    keep_mask = np.ones((size, size), dtype=bool)
    keep_mask[size // 4 : size - size // 4, size // 4 : size - size // 4] = False
    return keep_mask


def border_step(image: np.ndarray, keep_mask: np.ndarray) -> float:
    """Mean absolute difference of neighbours across the border: `image` `(height, width, 3)` in 0 to 255."""
    pixels, steps = image.astype(np.float64), []
    for axis in (0, 1):
        differences = np.abs(np.diff(pixels, axis=axis)).mean(axis=2)
        steps.append(differences[np.diff(keep_mask, axis=axis)])
    return float(np.concatenate(steps).mean())


def ratio_and_error(values: list[float], others: list[float]) -> tuple[float, float]:
    """Ratio of the means of paired values, and its standard error by the delta method."""
    ratio = float(np.mean(values) / np.mean(others))
    rest = np.array(values) - ratio * np.array(others)
    return ratio, float(np.std(rest, ddof=1) / math.sqrt(len(rest)) / np.mean(others))


def parse_args() -> argparse.Namespace:
    settings = {"guidance_scale": 1.0, "num_inference_steps": 50, "batch_size": 32, "seed": 0, "num_images": 32}
    parser = make_parser(__doc__, "data_files", "label_column", "caption_column", "output_dir", **settings)
    parser.add_argument("--inpainter", help="inpainting pipeline: a folder or a Hub repository")
    parser.add_argument("--model", help="other pipeline: a folder or a Hub repository")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--jump_length", type=int, nargs="+", help="for `--model`; default: the pipeline's")
    parser.add_argument("--jump_n_sample", type=int, nargs="+", help="for `--model`: one method per value")
    args = parser.parse_args()
    if not (args.inpainter or args.model):
        parser.error("pass `--inpainter`, `--model` or both")
    return args


def main() -> None:
    args = parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Name, pipeline and options of each method.
    methods: list[tuple[str, ADMInpaintPipeline, dict[str, Any]]] = []
    if args.inpainter:
        methods.append(("trained", ADMInpaintPipeline.from_pretrained(args.inpainter), {}))
    if args.model:
        model = ADMInpaintPipeline.from_pretrained(args.model)
        for values in itertools.product(args.jump_length or [None], args.jump_n_sample or [None]):
            options = zip(("jump_length", "jump_n_sample"), values, strict=True)
            options = {name: value for name, value in options if value is not None}
            methods.append(("resampled" + "".join(f" {value}" for value in options.values()), model, options))
    for _, pipeline, _ in methods:
        quiet(pipeline).to(args.device)
    size = methods[0][1].unet.config.sample_size

    data, id2label, images = load_held_out(args, size)
    arrays = [np.array(image) for image in images]
    cells: dict[str, dict[str, Any]] = {}
    free: dict[int, list[np.ndarray]] = {}  # unconditional samples of each pipeline
    shown: dict[int, list] = {}  # columns of the figure, over the kinds
    for kind in args.kinds:
        generator = random.Random(f"{args.seed} {kind}")
        masks = [make_mask(kind, size, generator) for _ in images]

        def inpaint(pipeline, masks, conditions, **options):
            inputs = {"image": images, "mask_image": [~mask for mask in masks], **conditions}
            return [np.array(image) for image in sample(pipeline, args, inputs, **options)]

        def paste(others, masks=masks):
            triples = zip(masks, arrays, others, strict=True)
            return [np.where(mask[..., None], image, other) for mask, image, other in triples]

        def steps(images, masks=masks):
            return [border_step(*pair) for pair in zip(images, masks, strict=True)]

        cells[f"{kind}/real"] = with_errors(step=mean_and_error(steps(arrays)))
        columns = [("image", arrays), ("kept", paste([GREY] * len(arrays)))]
        pasted: dict[int, list[np.ndarray]] = {}
        for name, pipeline, options in methods:
            conditions = conditions_of(pipeline, data, id2label)
            if id(pipeline) not in free:
                nothing = [np.zeros_like(mask) for mask in masks]
                free[id(pipeline)] = inpaint(pipeline, nothing, {}, guidance_scale=1.0)
            guidance = {} if conditions else {"guidance_scale": 1.0}
            samples = inpaint(pipeline, masks, conditions, **guidance, **options)
            if id(pipeline) not in pasted:  # the same for all methods of a pipeline
                pasted[id(pipeline)] = paste(free[id(pipeline)])
                columns.append(("paste", pasted[id(pipeline)]))
            columns.append((name, samples))
            ours, theirs = steps(samples), steps(pasted[id(pipeline)])
            triples = zip(samples, arrays, masks, strict=True)
            cells[f"{kind}/{name}"] = {
                "differing_known_values": int(sum((ours != real)[mask].sum() for ours, real, mask in triples)),
                **with_errors(step=mean_and_error(ours), paste_step=mean_and_error(theirs)),
                **with_errors(ratio_to_paste=ratio_and_error(ours, theirs)),
                "num_images": len(images),
                "num_evaluations": pipeline.num_timesteps,
            }
            print(f"{kind}/{name}: {json.dumps(cells[f'{kind}/{name}'])}", flush=True)
        for i, (_, tiles) in enumerate(columns):
            tiles = tiles[:: max(1, len(tiles) // MAX_SHOWN)][: MAX_SHOWN // 2]
            shown.setdefault(i, []).extend(Image.fromarray(np.asarray(tile, dtype=np.uint8)) for tile in tiles)

    write_report(args.output_dir / "inpainting.json", args, cells=cells)
    labels = [label for label, _ in columns]
    grid = grid_of_columns(zip(labels, shown.values(), strict=True), scale=max(1, 96 // size))
    grid.save(args.output_dir / "inpainting.png")


if __name__ == "__main__":
    main()
