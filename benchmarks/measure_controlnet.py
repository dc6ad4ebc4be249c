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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import (
    conditions_of,
    load_held_out,
    make_parser,
    mean_and_error,
    quiet,
    sample,
    with_errors,
    write_report,
)
from PIL import Image

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline
from diffusers_adm.conditioning.control_images import make_condition
from diffusers_adm.data.columns import first_caption
from diffusers_adm.training import labelled_strips


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
    names = ("pipeline", "controlnet", "data_files", "label_column", "caption_column", "output_dir", "num_images")
    settings = {"guidance_scale": 1.0, "num_inference_steps": 50, "batch_size": 41, "seed": 0, "num_shown": 12}
    parser = make_parser(__doc__, *names, "threads", **settings)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    args = parser.parse_args()
    if args.num_images == 1:
        parser.error("`--num_images` must be at least 2")
    return args


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    controlnet = AdaGNControlNetModel.from_pretrained(args.controlnet)
    pipeline = quiet(ADMControlNetPipeline.from_pretrained(args.pipeline, controlnet=controlnet).to(args.device))
    size = pipeline.unet.config.sample_size

    data, id2label, targets = load_held_out(args, size)
    edges = [make_condition(target, "edges") for target in targets]
    inputs = {"image": edges, **conditions_of(pipeline, data, id2label)}
    wanted = edges_of(targets)
    cells: dict[str, dict[str, Any]] = {}
    columns = {"edges": edges}
    for scale in args.scales:
        samples = sample(pipeline, args, inputs, controlnet_conditioning_scale=scale)
        columns[f"scale {scale:g}"] = samples
        found = edges_of(samples)
        own = {name: values.diagonal() for name, values in measure(found, wanted).items()}
        cell = with_errors(**{name: mean_and_error(values) for name, values in own.items()})
        cell |= {"f1_of_each": own["f1"].tolist(), "without_edges": int((~found.any(dim=(1, 2))).sum())}
        if cells:
            others = list(cells.values())
            for name, other in (("minus_first", others[0]), ("minus_previous", others[-1])):
                cell |= with_errors(**{name: mean_and_error(np.subtract(cell["f1_of_each"], other["f1_of_each"]))})
        cells[f"{scale:g}"] = cell
        print(f"scale {scale:g}: F1 {cell['f1']:.3f} ({cell['f1_error']:.3f})", flush=True)
    names = [first_caption(caption) for caption in data["caption"][:]] if args.caption_column else range(len(data))
    is_other = torch.tensor([[name != other for other in names] for name in names]).double()  # (images, conditions)
    # Means over the other images, for each condition.
    chance = {
        name: mean_and_error((values * is_other).sum(dim=0) / is_other.sum(dim=0))
        for name, values in measure(wanted, wanted).items()
    }
    cells["chance"] = with_errors(**chance)
    print(f"\n{len(data)} images, guidance {args.guidance_scale:g}, {args.num_inference_steps} steps\n")
    print(report_rows(cells))

    write_report(args.output_dir / "controlnet.json", args, cells=cells)
    columns["target"] = targets
    step = max(1, len(data) // args.num_shown)
    strips = {name: images[::step][: args.num_shown] for name, images in columns.items()}
    labelled_strips(strips, scale=max(1, 96 // size)).save(args.output_dir / "controlnet.png")


if __name__ == "__main__":
    main()
