"""
Time of steps of `ADMPipeline` with guidance relative to steps without it.

    python benchmarks/bench_guidance.py [--device cuda] [--pairs 15] [--only class] [--json results.json]

Each row times a call with guidance and one without in turn, `--pairs` times, with the same network, batch and number of
steps, and gives the median of the pairwise ratios with a 95% bootstrap interval. The rest of a call (checks, noise) is
in both; it is less than 1% of these networks' time. Classifier-free guidance runs the network on twice the images, in
the way that the pipeline chooses; a row fails if the median exceeds 2.02. `joint-or-separate` rows time a guided call
with both passes in one batch (`set_guidance_passes("joint")`) and one with two passes, without a limit; their ratio is
joint / separate, in which the choice of the pipeline is visible for a `--batch_size`. Classifier guidance adds a
forward and a backward pass of a classifier, here one of half the network's width; CLIP guidance those of a CLIP (five
layers of width 160, patches of 8 x 8 pixels), and of the network if its gradient flows through it, as that of
measurements does; without a limit. The networks are the 64-channel one of `bench_unet.py`, class-conditional, one of
the same size conditioned on 32 text states, and for `small` a narrow one for 32 x 32 pixels, in float32.
"""

import argparse
import sys
from typing import Any

import torch
from measuring import alternate, describe_machine, finish, make_parser, measure_rows, quiet, ratios
from networks import NETWORKS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.clip_guidance import CLIPGuidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction
from diffusers_adm.conditioning.image_guidance import MeasurementGuidance
from diffusers_adm.conditioning.measurements import DownsamplingOperator
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of


RATIO_LIMIT = 2.02
NUM_CLASSES = 10
TEXT_LENGTH, TEXT_WIDTH = 32, 128
CLASS_CONDITIONAL = {**NETWORKS["64x64"], "num_class_embeds": NUM_CLASSES + 1, "null_class_id": NUM_CLASSES}
SMALL = {**NETWORKS["32x32"], "block_out_channels": (64, 128, 128, 128), "layers_per_block": 1}
SMALL |= {"num_class_embeds": NUM_CLASSES + 1, "null_class_id": NUM_CLASSES}
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
CONFIGS = {"class": CLASS_CONDITIONAL, "text": TEXT_CONDITIONAL, "small": SMALL}
# The condition, and the options of the guided call.
ROWS = {
    "class": ("class", {"guidance_scale": 3.0}),
    "class-rescaled": ("class", {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "class-half-interval": ("class", {"guidance_scale": 3.0, "guidance_start": 0.25, "guidance_end": 0.75}),
    "text": ("text", {"guidance_scale": 3.0}),
    "small": ("small", {"guidance_scale": 3.0}),
    "joint-or-separate": ("class", {"guidance_scale": 3.0}),
    "joint-or-separate-text": ("text", {"guidance_scale": 3.0}),
    "joint-or-separate-small": ("small", {"guidance_scale": 3.0}),
    "clip": ("class", {"function": "clip"}),
    "clip-through-unet": ("class", {"function": "clip", "through_unet": True}),
    "clip-16-cutouts": ("class", {"function": "clip", "num_cutouts": 16}),
    "measurement": ("class", {"function": "measurement", "through_unet": True}),
    "measurement-no-backward": ("class", {"function": "measurement"}),
    "classifier": ("class", {"classifier_guidance_scale": 3.0}),
    "classifier-and-class": ("class", {"classifier_guidance_scale": 3.0, "guidance_scale": 3.0}),
}


def make_function(kind: str, device: str, through_unet: bool = False, **options: Any) -> GuidanceFunction:
    """CLIP guidance, or a measurement by averaging 4 x 4 squares."""
    if kind == "measurement":
        return MeasurementGuidance(
            DownsamplingOperator(4), torch.zeros(1, 3, 16, 16), through_unet=through_unet, **options
        )
    width = {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 4, "projection_dim": 160}
    text = {**width, "num_hidden_layers": 4, "vocab_size": 3, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**width, "num_hidden_layers": 5, "image_size": 64, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=160)).eval().to(device)
    # The prompt is encoded once a call, outside of the steps.
    words = Tokenizer(WordLevel({"<unknown>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unknown>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=8, pad_token="<pad>", eos_token="<end>"
    )
    return CLIPGuidance(clip, tokenizer, "prompt", scale=1.0, through_unet=through_unet, **options)


def measure(args: argparse.Namespace, name: str) -> dict:
    kind, guidance = ROWS[name]
    torch.manual_seed(0)
    if "function" in guidance:
        options = {name: value for name, value in guidance.items() if name != "function"}
        guidance = {"guidance_fn": make_function(guidance["function"], args.device, **options)}
    unet = AdaGNUNet2DModel(**CONFIGS[kind]).eval()
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

    def sample_in(passes: str) -> None:
        pipe.set_guidance_passes(passes)
        sample(**guidance)

    calls = (lambda: sample(**guidance), sample)
    if name.startswith("joint"):
        calls = (lambda: sample_in("joint"), lambda: sample_in("separate"))
    row = ratios(alternate(*calls, args.pairs, args.device), args.steps)
    has_limit = "classifier" not in name and "guidance_fn" not in guidance and not name.startswith("joint")
    limit = RATIO_LIMIT if has_limit else None
    return {**row, "limit": limit, "passed": limit is None or row["ratio"] <= limit}


def main() -> int:
    parser = make_parser(__doc__, "json", device="cpu", batch_size=4, pairs=15)
    parser.add_argument("--steps", type=int, default=4, help="Steps of a timed call.")
    parser.add_argument("--only", dest="rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}\n")
    print("ms per step, guided / unguided (or joint / separate) = ratio [95% interval]")
    return finish(args, rows=measure_rows(["row"], [(name,) for name in args.rows], measure, args))


if __name__ == "__main__":
    sys.exit(main())
