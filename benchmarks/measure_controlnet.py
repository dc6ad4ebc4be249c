"""
Whether samples follow the edges that a ControlNet is conditioned on.

    python benchmarks/measure_controlnet.py --pipeline DIR --controlnet DIR \\
        --data_files data/noto-emoji-32/test.parquet --label_column label --caption_column text --output_dir DIR

`--pipeline` is the base, `--controlnet` a ControlNet for it that was trained with `--condition edges`. For each image,
all of them held out, samples are generated from its own edges (Canny's, of `diffusers_adm.conditioning.control_images`)
with its caption and class if the base takes them, at several values of `controlnet_conditioning_scale` with the same
noise; 0 is the base without ControlNet. The edges of the samples are compared with the condition:

- precision: the fraction of the sample's edge pixels with an edge pixel of the condition at most 1 pixel away
  (Chebyshev distance); 0 if the sample has none;
- recall: the fraction of the condition's edge pixels with one of the sample at most 1 pixel away; 0 if there are none;
- F1: their harmonic mean per image; 0 if both are 0, but 1 if neither image has an edge. "F1 at 0 px" is without
  tolerance.

Means over images with standard errors; differences between scales are paired by image. `chance` is the mean score of
real images of other captions against the condition, far above 0 since small images have many edges. `--output_dir` gets
all numbers (`controlnet.json`) and some images (`controlnet.png`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import class_labels_for, make_parser, mean_and_error, quiet, sample_in_batches, seeded, write_report
from PIL import Image

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline
from diffusers_adm.conditioning.control_images import make_condition
from diffusers_adm.training import decode_rgb, labelled_strips, load_image_dataset


TOLERANCE = 1  # pixels
MEASURES = {"precision": "precision", "recall": "recall", "f1": "F1", "f1_exact": "F1 at 0 px"}


def edge_agreement(
    samples: torch.Tensor, conditions: torch.Tensor, tolerance: int = TOLERANCE
) -> dict[str, torch.Tensor]:
    """
    `precision`, `recall` and `f1`, as defined above, of each sample against each condition: each `(N, M)`.

    Args:
        samples (`torch.BoolTensor` of shape `(N, height, width)`), conditions (of shape `(M, height, width)`): `True`
            on edges.
        tolerance (`int`): Chebyshev distance in pixels.
    """
    samples, conditions = samples.double(), conditions.double()
    near_samples, near_conditions = (
        F.max_pool2d(x, 2 * tolerance + 1, stride=1, padding=tolerance) for x in (samples, conditions)
    )
    numbers, wanted = samples.sum(dim=(1, 2))[:, None], conditions.sum(dim=(1, 2))[None]
    precision = torch.einsum("nhw,mhw->nm", samples, near_conditions) / numbers.clamp(min=1)
    recall = torch.einsum("nhw,mhw->nm", near_samples, conditions) / wanted.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return {"precision": precision, "recall": recall, "f1": f1.masked_fill((numbers == 0) & (wanted == 0), 1.0)}


def measure(samples: torch.Tensor, conditions: torch.Tensor) -> dict[str, torch.Tensor]:
    """All of `MEASURES`; arguments and shapes as for `edge_agreement`."""
    exact = edge_agreement(samples, conditions, tolerance=0)["f1"]
    return {**edge_agreement(samples, conditions), "f1_exact": exact}


def edges_of(images: list[Image.Image]) -> torch.Tensor:
    """`(N, height, width)`, `True` on edges."""
    return torch.stack([torch.from_numpy(np.array(make_condition(p, "edges"))[..., 0] > 0) for p in images])


def report_rows(cells: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with standard errors in parentheses."""
    columns = {**MEASURES, "minus_first": "F1 minus the first", "minus_previous": "F1 minus the previous"}
    lines = [f"| scale | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for name, cell in cells.items():
        texts = [f"{cell[c]:.3f} ({cell[f'{c}_error']:.3f})" if c in cell else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--pipeline", required=True, help="base pipeline: a folder or a Hub repository")
    parser.add_argument("--controlnet", required=True, help="ControlNet: a folder or a Hub repository")
    parser.add_argument("--data_files", required=True, nargs="+", help="held-out images: Parquet files")
    parser.add_argument("--label_column")
    parser.add_argument("--caption_column", help="for text-conditional models")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_images", type=int, help="number of images; default: all")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=41)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_shown", type=int, default=12, help="images in `controlnet.png`")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    args = parser.parse_args()
    if args.num_images is not None and args.num_images < 2:
        parser.error("`--num_images` must be at least 2")
    return args


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    controlnet = AdaGNControlNetModel.from_pretrained(args.controlnet)
    pipeline = quiet(ADMControlNetPipeline.from_pretrained(args.pipeline, controlnet=controlnet).to(device))
    size = pipeline.unet.config.sample_size

    data, id2label = load_image_dataset(
        data_files=args.data_files, split="train", label_column=args.label_column, caption_column=args.caption_column
    )
    number = min(args.num_images or len(data), len(data))
    data = data.select([len(data) * i // number for i in range(number)])  # spread over the kinds of images
    targets = [decode_rgb(image).resize((size, size), Image.Resampling.BICUBIC) for image in data["image"]]
    edges = [make_condition(target, "edges") for target in targets]
    given: dict[str, list] = {}
    if args.caption_column and pipeline.has_cross_attention:
        given["prompt"] = data["caption"][:]
    if id2label and pipeline.unet.config.num_class_embeds is not None:
        given["class_labels"] = class_labels_for(pipeline, data, id2label)

    wanted = edges_of(targets)
    cells: dict[str, dict[str, Any]] = {}
    columns = {"edges": edges}
    for scale in args.scales:
        samples = sample_in_batches(
            pipeline,
            {"image": edges, **given},
            seeded(args.seed, number),
            args.batch_size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            controlnet_conditioning_scale=scale,
        )
        columns[f"scale {scale:g}"] = samples
        found = edges_of(samples)
        own = {name: values.diagonal().tolist() for name, values in measure(found, wanted).items()}
        cell: dict[str, Any] = {"f1_of_each": own["f1"], "without_edges": int((~found.any(dim=(1, 2))).sum())}
        for name in MEASURES:
            cell[name], cell[f"{name}_error"] = mean_and_error(own[name])
        if cells:
            others = list(cells.values())
            for name, other in (("minus_first", others[0]), ("minus_previous", others[-1])):
                difference = np.array(own["f1"]) - np.array(other["f1_of_each"])
                cell[name], cell[f"{name}_error"] = mean_and_error(difference)
        cells[f"{scale:g}"] = cell
        print(f"scale {scale:g}: F1 {cell['f1']:.3f} ({cell['f1_error']:.3f})", flush=True)
    names = data["caption"][:] if args.caption_column else range(number)
    is_other = torch.tensor([[name != other for other in names] for name in names]).double()  # (images, conditions)
    by_chance = {}
    for name, values in measure(wanted, wanted).items():
        means = (values * is_other).sum(dim=0) / is_other.sum(dim=0)  # over the other images, for each condition
        by_chance[name], by_chance[f"{name}_error"] = mean_and_error(means.numpy())
    cells["chance"] = by_chance
    print(f"\n{number} images, guidance {args.guidance_scale:g}, {args.num_inference_steps} steps\n")
    print(report_rows(cells))

    write_report(args.output_dir / "controlnet.json", args, device, cells=cells)
    columns["target"] = targets
    shown = range(0, number, max(1, number // args.num_shown))[: args.num_shown]
    strips = {name: [images[i] for i in shown] for name, images in columns.items()}
    labelled_strips(strips, scale=max(1, 96 // size)).save(args.output_dir / "controlnet.png")


if __name__ == "__main__":
    main()
