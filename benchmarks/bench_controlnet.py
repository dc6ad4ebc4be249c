"""
Time and memory of a ControlNet relative to its base U-Net, in training and in sampling.

    python benchmarks/bench_controlnet.py [--device cuda] [--pairs 15] [--only emoji full] [--json results.json]

Training: a step of the ControlNet with the base frozen against a step of fine-tuning the whole base, on the same batch:
noise, network, loss, backward pass, clipping, AdamW. Sampling: an evaluation of the ControlNet against one of the base.
Each row times both in turn, `--pairs` times, and gives the median of the pairwise ratios ControlNet / base with a 95%
bootstrap interval, and the ratio of their floating-point operations as counted by torch. Peak memory is that of a
process that does nothing else, minus its memory before there was a network (on CUDA: allocated memory).

A row of a ControlNet as wide as the base fails if the median is above 0.95 (training) or 0.6 (sampling), or if its
memory is not below that of fine-tuning. Narrower ControlNets have no limit. `emoji` is the network of
training/configs/emoji_32_glide.yaml (class and text), `64x64` the 64-channel one of `bench_unet.py`.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_unet import NETWORKS
from measuring import alternate, argument_parser, compare_peaks, describe_machine, finish, peak_bytes, print_row, ratios
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm import AdaGNControlNetModel, AdaGNUNet2DModel, LearnedVarianceDDPMScheduler
from diffusers_adm.training import training_losses


EMOJI_CONFIG = Path(__file__).parent.parent / "training" / "configs" / "unet_emoji_32_glide.json"
NUM_CLASSES, TEXT_LENGTH = 10, 24
WIDTHS = {"full": 1.0, "half": 0.5}
TRAINING_LIMIT, SAMPLING_LIMIT = 0.95, 0.6
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


def training_step(which: str, network: str, batch_size: int, dtype: str, device: str) -> Callable[[], None]:
    """`which`: "base" fine-tunes the base, a name of `WIDTHS` trains a ControlNet for it."""
    unet = build_unet(network, device)
    images, timesteps, control_images, conditions = inputs_for(unet, batch_size)
    scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    model, trained = unet, unet
    if which != "base":
        unet.requires_grad_(False)
        trained = AdaGNControlNetModel.from_unet(unet, width=WIDTHS[which])

        def model(sample, timesteps, **conditions):
            down, mid = trained(sample, timesteps, controlnet_cond=control_images, return_dict=False, **conditions)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(sample, timesteps, **conditions, **residuals)

    trained.train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = training_losses(model, scheduler, images, timesteps, model_kwargs=conditions).loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation(which: str, network: str, batch_size: int, dtype: str, device: str) -> Callable[[], None]:
    """One evaluation of the base ("base") or of a ControlNet, without gradients."""
    unet = build_unet(network, device)
    images, timesteps, control_images, conditions = inputs_for(unet, batch_size)
    model = unet
    if which != "base":
        model = AdaGNControlNetModel.from_unet(unet, width=WIDTHS[which])
        conditions["controlnet_cond"] = control_images
    model.eval()

    @torch.no_grad()
    def evaluate() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            model(images, timesteps, return_dict=False, **conditions)

    return evaluate


MODES = {"training": (training_step, TRAINING_LIMIT), "sampling": (evaluation, SAMPLING_LIMIT)}


def count_flops(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def time_row(mode: str, network: str, dtype: str, width: str, args: argparse.Namespace) -> dict:
    build, limit = MODES[mode]
    controlnet, base = (build(which, network, args.batch_size, dtype, args.device) for which in (width, "base"))
    flops = count_flops(controlnet) / count_flops(base)
    row = ratios(alternate(controlnet, base, args.pairs, args.device))
    passed = row["ratio"] <= limit if width == "full" else None
    return {"mode": mode, "network": network, "dtype": dtype, "width": width, **row, "flops": flops, "passed": passed}


def print_peak(which: str, network: str, dtype: str, args: argparse.Namespace) -> None:
    """The task of a child process: prints the peak in bytes of three training steps."""
    # Memory that the first backward pass and the first optimizer step allocate for good does not count.
    layer = torch.nn.Conv2d(3, 3, 3).to(args.device)
    layer(torch.zeros(1, 3, 8, 8, device=args.device)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    before = torch.cuda.memory_allocated() if args.device == "cuda" else peak_bytes(args.device)
    step = training_step(which, network, args.batch_size, dtype, args.device)
    for _ in range(3):
        step()
    print(peak_bytes(args.device) - before)


def main() -> int:
    parser = argument_parser(__doc__, batch_size=16, pairs=15, only="training emoji")
    parser.add_argument("--threads", type=int, help="Threads of torch; default: its own choice.")
    parser.add_argument("--memory_runs", type=int, default=3, help="Processes per peak; the median counts. 0: skip.")
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(*args.memory_of, args)
        return 0

    machine = describe_machine(args.device)
    print(f"{machine}; batch size {args.batch_size}\n\nControlNet / base = ratio [95% interval]; ratio of operations")
    rows, memory_rows = [], []
    kinds = list(itertools.product(("emoji", "64x64"), ("float32", "bfloat16"), WIDTHS))
    for mode, (network, dtype, width) in itertools.product(MODES, kinds):
        if args.pairs and set(args.only) <= {mode, network, dtype, width}:
            rows.append(row := time_row(mode, network, dtype, width, args))
            limit = None if row["passed"] is None else MODES[mode][1]
            print_row(f"{mode:8} {network:5} {dtype:8} {width}", row, "ms", limit, f"{row['flops']:.3f}  ")
    if args.memory_runs:
        print("\nPeak memory of three training steps")
        for network, dtype, width in kinds:
            if set(args.only) <= {"training", network, dtype, width}:
                row = compare_peaks(__file__, args, (width, network, dtype), ("base", network, dtype))
                row |= {"network": network, "dtype": dtype, "width": width}
                memory_rows.append(row | {"passed": row["ratio"] < 1 if width == "full" else None})
                print_row(f"{network:5} {dtype:8} {width}", memory_rows[-1], "mib")
    return finish(args, machine, time=rows, memory=memory_rows)


if __name__ == "__main__":
    sys.exit(main())
