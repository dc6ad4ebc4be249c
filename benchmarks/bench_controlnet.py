"""
What a ControlNet branch costs, in training and in sampling, against its base, in one run.

    python benchmarks/bench_controlnet.py [--device cuda] [--pairs 15] [--only emoji full] [--json results.json]

Training: a step of the branch beside the frozen base against a step of fine-tuning all of the base, on the same batch:
noise, network, loss, backward pass, clipping, AdamW. Sampling: one evaluation of the branch against one of the base.
Each row times both in turn, `--pairs` times, and gives the median of the pairwise ratios with a 95% bootstrap interval,
beside the ratio of their floating-point operations as torch counts them. Peak memory is that of a process which does
nothing else, above what it had before there was a network (on CUDA: allocated memory).

A row of a branch as wide as the base fails if the median lies above 0.95 (training) or 0.6 (sampling), or if its memory
is not below that of fine-tuning. Narrower branches are reported. `emoji` is the network of
training/configs/emoji_32_glide.yaml (class and text), `64x64` the 64-channel one of `bench_unet.py`.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_unet import NETWORKS, peak_resident_bytes
from measuring import alternate, describe_machine, ratios
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
    """Images, timesteps, conditioning images, and what the network is told beside them."""
    size, device = unet.config.sample_size, unet.device
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch_size, 3, size, size, generator=generator).to(device)
    timesteps = torch.arange(batch_size, device=device) * 999 // max(1, batch_size - 1)
    told = {"class_labels": torch.arange(batch_size, device=device) % NUM_CLASSES}
    if unet.has_cross_attention:
        states = torch.randn(batch_size, TEXT_LENGTH, unet.config.cross_attention_dim, generator=generator)
        told["encoder_hidden_states"] = states.to(device)
        pooled = torch.randn(batch_size, unet.time_embed_dim, generator=generator)
        told["added_cond_kwargs"] = {"text_embeds": pooled.to(device)}
    return 2 * images - 1, timesteps, images, told


def training_step(which: str, network: str, batch_size: int, dtype: str, device: str) -> Callable[[], None]:
    """`which`: "all" fine-tunes the base, a name of `WIDTHS` trains a branch beside it."""
    unet = build_unet(network, device)
    images, timesteps, conditions, told = inputs_for(unet, batch_size)
    scheduler = LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    model, trained = unet, unet
    if which != "all":
        unet.requires_grad_(False)
        trained = AdaGNControlNetModel.from_unet(unet, width=WIDTHS[which])

        def model(sample, timesteps, **told):
            down, mid = trained(sample, timesteps, controlnet_cond=conditions, return_dict=False, **told)
            return unet(
                sample, timesteps, **told, down_block_additional_residuals=down, mid_block_additional_residual=mid
            )

    trained.train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = training_losses(model, scheduler, images, timesteps, model_kwargs=told).loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation(which: str, network: str, batch_size: int, dtype: str, device: str) -> Callable[[], None]:
    """Of the base ("all") or a branch, without gradients."""
    unet = build_unet(network, device)
    images, timesteps, conditions, told = inputs_for(unet, batch_size)
    model = unet if which == "all" else AdaGNControlNetModel.from_unet(unet, width=WIDTHS[which])
    if which != "all":
        told["controlnet_cond"] = conditions
    model.eval()

    @torch.no_grad()
    def evaluate() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            model(images, timesteps, return_dict=False, **told)

    return evaluate


MODES = {"training": (training_step, TRAINING_LIMIT), "sampling": (evaluation, SAMPLING_LIMIT)}


def count_flops(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def time_row(mode: str, network: str, dtype: str, width: str, args: argparse.Namespace) -> dict:
    build, limit = MODES[mode]
    branch, base = (build(which, network, args.batch_size, dtype, args.device) for which in (width, "all"))
    flops = count_flops(branch) / count_flops(base)
    row = ratios(alternate(branch, base, args.pairs, args.device))
    passed = row["ratio"] <= limit if width == "full" else None
    return {"mode": mode, "network": network, "dtype": dtype, "width": width, **row, "flops": flops, "passed": passed}


def measure_memory(args: argparse.Namespace) -> None:
    """What a child process prints: the peak in bytes of three training steps."""
    which, network, dtype = args.memory_of
    # What the first backward pass and the first step of an optimizer load for good is not the networks'.
    layer = torch.nn.Conv2d(3, 3, 3).to(args.device)
    layer(torch.zeros(1, 3, 8, 8, device=args.device)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    before = torch.cuda.memory_allocated() if args.device == "cuda" else peak_resident_bytes()
    step = training_step(which, network, args.batch_size, dtype, args.device)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_resident_bytes()
    print(peak - before)


def memory_row(network: str, dtype: str, width: str, args: argparse.Namespace) -> dict:
    peaks = {}
    for which in (width, "all"):
        command = [sys.executable, __file__, "--device", args.device, "--batch_size", str(args.batch_size)]
        command += ["--threads", str(torch.get_num_threads()), "--memory_of", which, network, dtype]
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.memory_runs)
        ]
        peaks[which] = statistics.median(int(output.split()[-1]) for output in outputs)
    ratio = peaks[width] / peaks["all"]
    return {
        "network": network,
        "dtype": dtype,
        "width": width,
        "branch_mib": peaks[width] / 2**20,
        "all_mib": peaks["all"] / 2**20,
        "ratio": ratio,
        "passed": ratio < 1 if width == "full" else None,
    }


def verdict(row: dict) -> str:
    return {True: "ok", False: "FAILED", None: ""}[row["passed"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, help="Of torch; default: its own choice.")
    parser.add_argument("--pairs", type=int, default=15, help="Timed pairs per row; 0: memory only.")
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `training emoji`.")
    parser.add_argument("--memory_runs", type=int, default=3, help="Processes per peak; the median counts. 0: skip.")
    parser.add_argument("--json", help="Write all numbers to this file.")
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args)
        return 0

    machine = describe_machine(args.device)
    print(f"{machine}; batch size {args.batch_size}")
    rows, memory_rows = [], []
    kinds = list(itertools.product(("emoji", "64x64"), ("float32", "bfloat16"), WIDTHS))
    for mode, (network, dtype, width) in itertools.product(MODES, kinds):
        if not args.pairs or not set(args.only) <= {mode, network, dtype, width}:
            continue
        row = time_row(mode, network, dtype, width, args)
        rows.append(row)
        print(
            f"{mode:8} {network:5} {dtype:8} {width}-width branch {row['ours_ms']:8.1f} / base {row['theirs_ms']:8.1f} "
            f"ms = {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]; operations {row['flops']:.3f}  "
            f"{verdict(row)}",
            flush=True,
        )
    if args.memory_runs:
        print("\nPeak memory of three training steps")
        for network, dtype, width in kinds:
            if not set(args.only) <= {"training", network, dtype, width}:
                continue
            row = memory_row(network, dtype, width, args)
            memory_rows.append(row)
            print(
                f"{network:5} {dtype:8} {width}-width branch {row['branch_mib']:7.0f} / all of the base "
                f"{row['all_mib']:7.0f} MiB = {row['ratio']:.3f}  {verdict(row)}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "time": rows, "memory": memory_rows}, file, indent=2)
    return 1 if any(row["passed"] is False for row in rows + memory_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
