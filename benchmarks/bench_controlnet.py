"""
Time and memory of a ControlNet relative to its base U-Net, in training and in sampling.

    python benchmarks/bench_controlnet.py [--device cuda] [--pairs 15] [--only emoji full] [--json results.json]

Training: a step of the ControlNet with the base frozen against a step of fine-tuning the whole base, on the same batch:
noise, network, loss, backward pass, clipping, AdamW. Sampling: an evaluation of the ControlNet against one of the base.
Pipeline: a guided call of `ADMControlNetPipeline`, which embeds the image once, against the same call with the image
embedded in each step and for both passes, in float32. The ControlNet takes images of the size of the samples, or, in
rows with `x8`, of eight times their height and width, as of an autoencoder's decoded latents. Each row times both in
turn, `--pairs` times, and gives the median of the pairwise ratios ControlNet / base with a 95% bootstrap interval, and
the ratio of their floating-point operations as counted by torch. Peak memory is that of a process that does nothing
else, minus its memory before there was a network (on CUDA: allocated memory).

A row of a ControlNet as wide as the base fails if the median is above 0.95 (training), 0.6 (sampling) or 1.02
(pipeline), or if its memory is not below that of fine-tuning. Narrower ControlNets have no limit. `emoji` is the
network of training/configs/emoji_32_glide.yaml (class and text), `64x64` the 64-channel one of `bench_unet.py`.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import (
    alternate,
    compare_peaks,
    describe_machine,
    finish,
    make_parser,
    measure_rows,
    peak_bytes,
    quiet,
    ratios,
)
from networks import NETWORKS
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm import (
    AdaGNControlNetModel,
    AdaGNUNet2DModel,
    ADMControlNetPipeline,
    ADMPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.training import training_losses


EMOJI_CONFIG = Path(__file__).parent.parent / "training" / "configs" / "unet_emoji_32_glide.json"
NUM_CLASSES, TEXT_LENGTH = 10, 24
WIDTHS = {"full": 1.0, "half": 0.5}
LIMITS = {"training": 0.95, "sampling": 0.6, "pipeline": 1.02}
STEPS = 4  # of a call of the pipeline
MAX_GRAD_NORM = 1.0


def build_unet(network: str, device: str) -> AdaGNUNet2DModel:
    torch.manual_seed(0)
    config = NETWORKS["64x64"] if network == "64x64" else AdaGNUNet2DModel.load_config(EMOJI_CONFIG)
    config = {**config, "num_class_embeds": NUM_CLASSES, "null_class_id": NUM_CLASSES - 1}
    return AdaGNUNet2DModel.from_config(config).to(device)


def inputs_for(unet: AdaGNUNet2DModel, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Images, timesteps, control images, and the other conditions of the network."""
    size, device = unet.config.sample_size, unet.device
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch_size, 3, size, size, generator=generator).to(device)
    timesteps = torch.arange(batch_size, device=device) * 999 // max(1, batch_size - 1)
    conditions = {"class_labels": torch.arange(batch_size, device=device) % NUM_CLASSES}
    if any("CrossAttn" in block_type for block_type in unet.config.down_block_types):
        states = torch.randn(batch_size, TEXT_LENGTH, unet.config.cross_attention_dim, generator=generator)
        conditions["encoder_hidden_states"] = states.to(device)
        pooled = torch.randn(batch_size, unet.time_embed_dim, generator=generator)
        conditions["added_cond_kwargs"] = {"text_embeds": pooled.to(device)}
    return 2 * images - 1, timesteps, images, conditions


def build_call(args: argparse.Namespace, mode: str, network: str, dtype: str, width: str) -> Callable[[], None]:
    """
    Returns a function that runs a training step or, in the mode "sampling", a forward pass without gradients. The width
    "base" is the base model, which training fine-tunes; the other widths are ControlNets.
    """
    unet = build_unet(network, args.device)
    images, timesteps, control_images, conditions = inputs_for(unet, args.batch_size)
    model = unet if width == "base" else AdaGNControlNetModel.from_unet(unet, width=WIDTHS[width])
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=dtype == "bfloat16")

    if mode == "sampling":
        model.eval()
        if width != "base":
            conditions["controlnet_cond"] = control_images

        @torch.no_grad()
        def evaluate() -> None:
            with autocast:
                model(images, timesteps, return_dict=False, **conditions)

        return evaluate

    def controlled(sample, timesteps, **conditions):
        down, mid = model(sample, timesteps, controlnet_cond=control_images, return_dict=False, **conditions)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(sample, timesteps, **conditions, **residuals)

    unet.requires_grad_(width == "base")
    model.train()
    scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        predict = unet if width == "base" else controlled
        with autocast:
            loss = training_losses(predict, scheduler, images, timesteps, model_kwargs=conditions).loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_pipeline_call(
    args: argparse.Namespace, network: str, factor: int, width: str, embeds_once: bool
) -> Callable[[], None]:
    """
    Returns a function that runs a guided call of a few steps. `embeds_once`: as the pipeline does it; else the image is
    embedded in each step, for all rows of the batch: the same numbers from more work.
    """
    unet = build_unet(network, args.device).eval()
    images, _, _, conditions = inputs_for(unet, args.batch_size)
    net = AdaGNControlNetModel.from_unet(unet, width=WIDTHS[width], conditioning_downsampling_factor=factor).eval()
    scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = ADMControlNetPipeline(unet, scheduler, **dict.fromkeys(ADMPipeline._optional_components), controlnet=net)
    quiet(pipe)
    if not embeds_once:
        net.embed_condition = lambda control_images: control_images

        def embed_all(_, arguments, options):
            control_images = options.pop("controlnet_cond_embeds")
            rows = len(arguments[0]) // len(control_images)
            return arguments, {**options, "controlnet_cond": control_images.repeat(rows, 1, 1, 1)}

        net.register_forward_pre_hook(embed_all, with_kwargs=True)
    size = factor * unet.config.sample_size
    given = {"class_labels": conditions["class_labels"], "latents": images}
    given["image"] = torch.rand(args.batch_size, 3, size, size).to(args.device)
    if "encoder_hidden_states" in conditions:
        texts = {"prompt_embeds": conditions["encoder_hidden_states"]}
        texts["pooled_prompt_embeds"] = conditions["added_cond_kwargs"]["text_embeds"]
        given |= texts | {f"negative_{name}": torch.zeros_like(value) for name, value in texts.items()}

    def call() -> None:
        pipe(num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent", **given)

    return call


def count_flops(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def time_row(args: argparse.Namespace, mode: str, network: str, dtype: str, width: str) -> dict:
    controlnet, base = (build_call(args, mode, network, dtype, which) for which in (width, "base"))
    flops = count_flops(controlnet) / count_flops(base)
    row = ratios(alternate(controlnet, base, args.pairs, args.device))
    limit = LIMITS[mode] if width == "full" else None
    passed = None if limit is None else row["ratio"] <= limit
    return {**row, "flops": flops, "limit": limit, "passed": passed, "note": f"{flops:.3f}  "}


def pipeline_row(args: argparse.Namespace, mode: str, network: str, images: str, width: str) -> dict:
    factor = int(images.removeprefix("x"))
    once, each_step = (build_pipeline_call(args, network, factor, width, which) for which in (True, False))
    row = ratios(alternate(once, each_step, args.pairs, args.device), STEPS)
    return {**row, "limit": LIMITS[mode], "passed": row["ratio"] <= LIMITS[mode]}


def peak(args: argparse.Namespace, *words: str) -> int:
    """Peak of this process in bytes in three training steps, minus its memory before there was a network."""
    # Memory that the first backward pass and the first optimizer step allocate for good does not count.
    layer = torch.nn.Conv2d(3, 3, 3).to(args.device)
    layer(torch.zeros(1, 3, 8, 8, device=args.device)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    before = torch.cuda.memory_allocated() if args.device == "cuda" else peak_bytes(args.device)
    step = build_call(args, *words)
    for _ in range(3):
        step()
    return peak_bytes(args.device) - before


def memory_row(args: argparse.Namespace, mode: str, network: str, dtype: str, width: str) -> dict:
    row = compare_peaks(peak, args, (mode, network, dtype, width), (mode, network, dtype, "base"))
    return {**row, "limit": None, "passed": row["ratio"] < 1 if width == "full" else None}


def main() -> int:
    parser = make_parser(__doc__, "threads", "json", device="cpu", batch_size=16, pairs=15, memory_runs=3)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `training emoji`.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}\n")
    print("ControlNet / base = ratio [95% interval]; ratio of operations")
    columns, kinds = ("mode", "network", "dtype", "width"), (("emoji", "64x64"), ("float32", "bfloat16"), WIDTHS)
    rows, pipeline_rows, memory_rows = [], [], []
    if args.pairs:
        rows = measure_rows(columns, itertools.product(("training", "sampling"), *kinds), time_row, args)
        print("\nGuided step of the pipeline: image embedded once a call / in each step and pass = ratio")
        cases = itertools.product(["pipeline"], kinds[0], ("x1", "x8"), WIDTHS)
        pipeline_rows = measure_rows(("mode", "network", "images", "width"), cases, pipeline_row, args)
    if args.memory_runs:
        print("\nPeak memory of three training steps")
        memory_rows = measure_rows(columns, itertools.product(["training"], *kinds), memory_row, args, "mib")
    return finish(args, time=rows, pipeline=pipeline_rows, memory=memory_rows)


if __name__ == "__main__":
    sys.exit(main())
