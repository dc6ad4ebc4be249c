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
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import class_labels_for, make_parser, mean_and_error, quiet, sample_in_batches, seeded, write_report
from PIL import Image

from diffusers_adm import ADMInpaintPipeline
from diffusers_adm.training import decode_rgb, labelled_grid, load_image_dataset, random_keep_mask


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


def inpaint(
    pipeline: ADMInpaintPipeline,
    images: list[Image.Image],
    keep_masks: list[np.ndarray],
    conditions: dict[str, list],
    args: argparse.Namespace,
    **options: Any,
) -> list[np.ndarray]:
    samples = sample_in_batches(
        pipeline,
        {"image": images, "mask_image": [~mask for mask in keep_masks], **conditions},
        seeded(args.seed, len(images)),
        args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale if conditions else 1.0,
        **options,
    )
    return [np.array(image) for image in samples]


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--inpainter", help="inpainting pipeline: a folder or a Hub repository")
    parser.add_argument("--model", help="other pipeline: a folder or a Hub repository")
    parser.add_argument("--data_files", required=True, nargs="+", help="held-out images: Parquet files")
    parser.add_argument("--label_column")
    parser.add_argument("--caption_column", help="for text-conditional models")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_images", type=int, default=32, help="images per kind of mask")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--jump_length", type=int, nargs="+", help="for `--model`; default: the pipeline's")
    parser.add_argument("--jump_n_sample", type=int, nargs="+", help="for `--model`: one method per value")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.inpainter or args.model):
        parser.error("pass `--inpainter`, `--model` or both")
    return args


def main() -> None:
    args = parse_args()
    # Name, pipeline and options of each method.
    methods: list[tuple[str, ADMInpaintPipeline, dict[str, Any]]] = []
    if args.inpainter:
        methods.append(("trained", ADMInpaintPipeline.from_pretrained(args.inpainter), {}))
    if args.model:
        model = ADMInpaintPipeline.from_pretrained(args.model)
        for jump_length in args.jump_length or [None]:
            for jump_n_sample in args.jump_n_sample or [None]:
                options = {"jump_length": jump_length, "jump_n_sample": jump_n_sample}
                options = {name: value for name, value in options.items() if value is not None}
                name = "resampled" + "".join(f" {value}" for value in options.values())
                methods.append((name, model, options))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for _, pipeline, _ in methods:
        quiet(pipeline).to(device)
    size = methods[0][1].unet.config.sample_size

    data, id2label = load_image_dataset(
        data_files=args.data_files, split="train", label_column=args.label_column, caption_column=args.caption_column
    )
    number = min(args.num_images, len(data))
    data = data.select([len(data) * i // number for i in range(number)])  # spread over the kinds of images
    images = [decode_rgb(image).resize((size, size), Image.Resampling.BICUBIC) for image in data["image"]]
    given = {"prompt": data["caption"][:]} if args.caption_column else {}

    cells: dict[str, dict[str, Any]] = {}
    free: dict[int, list[np.ndarray]] = {}  # unconditional samples of each pipeline
    shown: list[list[np.ndarray]] = []
    for kind in args.kinds:
        generator = random.Random(f"{args.seed} {kind}")
        masks = [make_mask(kind, size, generator) for _ in images]
        arrays = [np.array(image) for image in images]
        real = [border_step(*pair) for pair in zip(arrays, masks, strict=True)]
        mean, error = mean_and_error(real)
        cells[f"{kind}/real"] = {"step": mean, "step_error": error}
        rows = [[image, np.where(mask[..., None], image, GREY)] for image, mask in zip(arrays, masks, strict=True)]
        for name, pipeline, options in methods:
            conditions = dict(given) if pipeline.has_cross_attention else {}
            if id2label and pipeline.unet.config.num_class_embeds is not None:
                conditions["class_labels"] = class_labels_for(pipeline, data, id2label)
            if id(pipeline) not in free:
                nothing = [np.zeros_like(mask) for mask in masks]
                free[id(pipeline)] = inpaint(pipeline, images, nothing, {}, args)
            samples = inpaint(pipeline, images, masks, conditions, args, **options)
            pasted = [np.where(m[..., None], i, f) for m, i, f in zip(masks, arrays, free[id(pipeline)], strict=True)]
            ours, paste = ([border_step(*pair) for pair in zip(x, masks, strict=True)] for x in (samples, pasted))
            ratio, ratio_error = ratio_and_error(ours, paste)
            cells[f"{kind}/{name}"] = {
                "differing_known_values": int(
                    sum((d != i)[m].sum() for d, i, m in zip(samples, arrays, masks, strict=True))
                ),
                "step": mean_and_error(ours)[0],
                "step_error": mean_and_error(ours)[1],
                "paste_step": mean_and_error(paste)[0],
                "paste_step_error": mean_and_error(paste)[1],
                "ratio_to_paste": ratio,
                "ratio_to_paste_error": ratio_error,
                "num_images": len(images),
                "num_evaluations": pipeline.num_timesteps,
            }
            print(f"{kind}/{name}: {json.dumps(cells[f'{kind}/{name}'])}", flush=True)
            is_first = next(other for other, p, _ in methods if p is pipeline) == name  # their pastes are the same
            for row, paste_image, image in zip(rows, pasted, samples, strict=True):
                row += [paste_image, image] if is_first else [image]
        shown += rows[:: max(1, len(rows) // MAX_SHOWN)][: MAX_SHOWN // 2]

    write_report(args.output_dir / "inpainting.json", args, device, cells=cells)
    columns, pipelines = ["image", "kept"], []
    for name, pipeline, _ in methods:
        columns += [name] if pipeline in pipelines else ["paste", name]
        pipelines.append(pipeline)
    tiles = [Image.fromarray(np.asarray(tile, dtype=np.uint8)) for row in shown for tile in row]
    grid = labelled_grid(tiles, len(shown), len(columns), col_labels=columns, scale=max(1, 96 // size))
    grid.save(args.output_dir / "inpainting.png")


if __name__ == "__main__":
    main()
