"""
Time of steps of `ADMPipeline` with guidance relative to steps without it.

    python benchmarks/bench_guidance.py [--device cuda] [--pairs 15] [--only class] [--json results.json]

Each row times a call with guidance and one without in turn, `--pairs` times, with the same network, batch and number of
steps, and gives the median of the pairwise ratios with a 95% bootstrap interval. The rest of a call (checks, noise) is
in both; it is less than 1% of these networks' time. Classifier-free guidance runs the network on twice the batch; a row
fails if the median exceeds 2.05. Classifier guidance adds a forward and a backward pass of a classifier, here one of
half the network's width, without a limit. The networks are the 64-channel one of `bench_unet.py`, class-conditional,
and one of the same size conditioned on 32 text states, in float32.
"""

import argparse
import sys

import torch
from measuring import alternate, describe_machine, finish, make_parser, measure_rows, quiet, ratios
from networks import NETWORKS

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of


RATIO_LIMIT = 2.05
NUM_CLASSES = 10
TEXT_LENGTH, TEXT_WIDTH = 32, 128
CLASS_CONDITIONAL = {**NETWORKS["64x64"], "num_class_embeds": NUM_CLASSES + 1, "null_class_id": NUM_CLASSES}
TEXT_CONDITIONAL = {
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
    "noise_schedule": noise_schedule_of(LearnedVarianceDDPMScheduler()),
}
# The condition, and the options of the guided call.
ROWS = {
    "class": ("class", {"guidance_scale": 3.0}),
    "class-rescaled": ("class", {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "class-half-interval": ("class", {"guidance_scale": 3.0, "guidance_start": 0.25, "guidance_end": 0.75}),
    "text": ("text", {"guidance_scale": 3.0}),
    "classifier": ("class", {"classifier_guidance_scale": 3.0}),
    "classifier-and-class": ("class", {"classifier_guidance_scale": 3.0, "guidance_scale": 3.0}),
}


def measure(args: argparse.Namespace, name: str) -> dict:
    kind, guidance = ROWS[name]
    torch.manual_seed(0)
    unet = AdaGNUNet2DModel(**(CLASS_CONDITIONAL if kind == "class" else TEXT_CONDITIONAL)).eval()
    classifier = AdaGNClassifierModel(**CLASSIFIER).eval() if kind == "class" else None
    pipe = quiet(ADMPipeline(unet, LearnedVarianceDDPMScheduler(), None, None, None, classifier).to(args.device))
    condition = {"class_labels": torch.arange(args.batch_size) % NUM_CLASSES}
    if kind == "text":
        shape = (2, args.batch_size, TEXT_LENGTH, TEXT_WIDTH)
        states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        condition, guidance = {"prompt_embeds": states[0]}, {**guidance, "negative_prompt_embeds": states[1]}

    def sample(**options) -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(num_inference_steps=args.steps, generator=generator, output_type="latent", **condition, **options)

    row = ratios(alternate(lambda: sample(**guidance), sample, args.pairs, args.device), args.steps)
    limit = None if "classifier" in name else RATIO_LIMIT
    return {**row, "limit": limit, "passed": limit is None or row["ratio"] <= limit}


def main() -> int:
    parser = make_parser(__doc__, "json", device="cpu", batch_size=4, pairs=15)
    parser.add_argument("--steps", type=int, default=4, help="Steps of a timed call.")
    parser.add_argument("--only", dest="rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}\n")
    print("ms per step, guided / unguided = ratio [95% interval]")
    return finish(args, rows=measure_rows(["row"], [(name,) for name in args.rows], measure, args))


if __name__ == "__main__":
    sys.exit(main())
