"""
What guidance costs: steps of `ADMPipeline` with it against steps without it, in one run.

    python benchmarks/bench_guidance.py [--device cuda] [--pairs 15] [--only class] [--json results.json]

Each row times a call with guidance and one without in turn, `--pairs` times, with the same network, batch and number of
steps, and gives the median of the pairwise ratios with a 95% bootstrap interval. What a call does besides (checks,
noise) is in both; it is less than 1% of these networks' time. Classifier-free guidance runs the
network on twice the batch; a row fails if the median exceeds 2.05. Classifier guidance adds a forward and a backward
pass of a classifier, here one of half the network's width; there is no limit for it. The networks are the 64-channel
one of `bench_unet.py`, by class, and one of the same size that reads 32 states of a text, in float32.
"""

import argparse
import json
import sys

import torch
from bench_unet import NETWORKS
from measuring import alternate, describe_machine, ratios

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler


RATIO_LIMIT = 2.05
NUM_CLASSES = 10
TEXT_LENGTH, TEXT_WIDTH = 32, 128
BY_CLASS = {**NETWORKS["64x64"], "num_class_embeds": NUM_CLASSES + 1, "null_class_id": NUM_CLASSES}
BY_TEXT = {
    **NETWORKS["64x64"],
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("SimpleCrossAttnDownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
    "cross_attention_dim": TEXT_WIDTH,
}
CLASSIFIER = {
    "sample_size": 64,
    "num_classes": NUM_CLASSES,
    "block_out_channels": (32, 64, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 2,
    "downsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 32,
}
# What is asked for, and the options of the guided call.
ROWS = {
    "class": ("class", {"guidance_scale": 3.0}),
    "class-rescaled": ("class", {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "class-half-interval": ("class", {"guidance_scale": 3.0, "guidance_start": 0.25, "guidance_end": 0.75}),
    "text": ("text", {"guidance_scale": 3.0}),
    "classifier": ("class", {"classifier_guidance_scale": 3.0}),
    "classifier-and-class": ("class", {"classifier_guidance_scale": 3.0, "guidance_scale": 3.0}),
}


def build_pipeline(kind: str, device: str) -> ADMPipeline:
    torch.manual_seed(0)
    pipe = ADMPipeline(
        unet=AdaGNUNet2DModel(**(BY_CLASS if kind == "class" else BY_TEXT)).eval(),
        scheduler=LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=AdaGNClassifierModel(**CLASSIFIER).eval() if kind == "class" else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def condition(kind: str, batch_size: int, device: str) -> dict[str, torch.Tensor]:
    if kind == "class":
        return {"class_labels": torch.arange(batch_size) % NUM_CLASSES}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, batch_size, TEXT_LENGTH, TEXT_WIDTH, generator=generator).to(device)
    return {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}


def measure(name: str, args: argparse.Namespace) -> dict:
    kind, options = ROWS[name]
    pipe, conditions = build_pipeline(kind, args.device), condition(kind, args.batch_size, args.device)
    unguided = {key: value for key, value in conditions.items() if not key.startswith("negative")}

    def draw(**kwargs) -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(num_inference_steps=args.steps, generator=generator, output_type="latent", **kwargs)

    times = alternate(lambda: draw(**conditions, **options), lambda: draw(**unguided), args.pairs, args.device)
    row = ratios({which: [elapsed / args.steps for elapsed in times[which]] for which in times})
    limited = "classifier" not in name
    return {"row": name, **row, "limited": limited, "passed": not limited or row["ratio"] <= RATIO_LIMIT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="Steps of a timed call.")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--json", help="Write all numbers to this file.")
    args = parser.parse_args()

    machine = describe_machine(args.device)
    print(f"{machine}; batch size {args.batch_size}\n\nms a step, guided / unguided = ratio [95% interval]")
    rows = []
    for name in args.only:
        row = measure(name, args)
        rows.append(row)
        limit = f" (limit {RATIO_LIMIT})" if row["limited"] else ""
        print(
            f"{name:22} {row['ours_ms']:8.1f} / {row['theirs_ms']:8.1f} = {row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]{limit}  {'ok' if row['passed'] else 'FAILED'}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
