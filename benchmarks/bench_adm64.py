"""
ADM's 64x64 network (296 million parameters) on a GPU: training and sampling, against diffusers and guided-diffusion.

    python benchmarks/bench_adm64.py --part training --which ours-eager ours-compiled theirs-compiled --device cuda
    python benchmarks/bench_adm64.py --part sampling --batch_sizes 1 32 --device cuda
    python benchmarks/bench_adm64.py --part ema --device cuda
    python benchmarks/bench_adm64.py --part training --tiny

`training`: a step is forward, backward, clipping and fused AdamW, with bfloat16 autocast, in channels-last layout
(guided-diffusion: its float16 weights, without its master copies, contiguous). MFU is the rate of the operations of
matrix products and convolutions, three times those of the forward pass, relative to the peak of the data sheet.
`sampling`: milliseconds a step of `ADMPipeline` and of diffusers' `DDPMPipeline`, whose network is compiled.
`ema`: the share of the exponential moving average in a training step. Weights are random. Variants follow each other in
one process, so compare their ratios. `--tiny` tries the script with a tiny network on CPU; its times mean nothing.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from measuring import clock, describe_machine, finish, make_parser, quiet, seconds
from networks import ADM
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.training import TrainingArguments, build_ema
from diffusers_adm.training.flops import peak_tflops


ADM_64 = {
    **ADM,
    "sample_size": 64,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
    "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
}
TINY = {
    **ADM_64,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "attn_norm_num_groups": 4,
    "norm_num_groups": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
TRAINED = ("ours-eager", "ours-compiled", "theirs-eager", "theirs-compiled", "guided-diffusion")
SAMPLED = ("ours-eager", "ours-fast", "theirs-eager", "theirs-compiled")


def build(which: str, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    if which.startswith("guided-diffusion"):
        sys.path.insert(0, args.guided_diffusion)
        from guided_diffusion.unet import UNetModel

        network = UNetModel(
            image_size=64,
            in_channels=3,
            model_channels=32 if args.tiny else 192,
            out_channels=6,
            num_res_blocks=1 if args.tiny else 3,
            attention_resolutions=(2,) if args.tiny else (2, 4, 8),
            channel_mult=(1, 2) if args.tiny else (1, 2, 3, 4),
            num_head_channels=8 if args.tiny else 64,
            use_scale_shift_norm=True,
            resblock_updown=True,
            use_fp16=args.device == "cuda",
        ).to(args.device)
        if args.device == "cuda":
            network.convert_to_fp16()
        return network
    cls = AdaGNUNet2DModel if which.startswith("ours") else UNet2DModel
    network = cls(**(TINY if args.tiny else ADM_64)).to(args.device, memory_format=torch.channels_last)
    # The last convolution of a new network is 0; all gradients but its own would be as well.
    for parameter in network.conv_out.parameters():
        torch.nn.init.normal_(parameter, std=1e-2)
    return network


def compile_network(network: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    return torch.compile(network, dynamic=False, backend="eager" if args.tiny else "inductor")


def forward_flops(args: argparse.Namespace) -> int:
    """Operations of one image."""
    network = build("ours-eager", args)
    size = network.config.sample_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=args.device), torch.zeros(1, device=args.device))
    return counter.get_total_flops()


def train_steps(which: str, args: argparse.Namespace) -> tuple[Callable[[], None], torch.nn.Module]:
    """A function that takes a training step, and the network."""
    network = build(which, args)
    is_ours_or_theirs = which != "guided-diffusion"
    call = compile_network(network, args) if which.endswith("compiled") else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=args.device == "cuda")
    size = 8 if args.tiny else 64
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    if is_ours_or_theirs:
        images = images.contiguous(memory_format=torch.channels_last)
    timesteps = torch.randint(1000, (args.batch_size,), device=args.device)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=is_ours_or_theirs):
            output = call(images, timesteps, return_dict=False)[0] if is_ours_or_theirs else call(images, timesteps)
        F.mse_loss(output[:, :3].float(), images).backward()
        if is_ours_or_theirs:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, network


def median_seconds(function: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """Median time of a call, and the time of the first two, which compile."""
    first = sum(seconds(function, args.device) for _ in range(2))
    return statistics.median(seconds(function, args.device) for _ in range(args.repeats)), first


def measure_training(args: argparse.Namespace) -> list[dict]:
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    flops, peak = 3 * forward_flops(args), peak_tflops(name, "bf16", True)
    print(
        f"Training, batch size {args.batch_size}: {flops / 3e9:.0f} GFLOP an image and forward pass,"
        f" peak {peak} TFLOP/s"
    )
    rows = []
    for which in args.which or TRAINED:
        if which == "guided-diffusion" and not args.guided_diffusion:
            continue
        step, network = train_steps(which, args)
        elapsed, first = median_seconds(step, args)
        rate = args.batch_size * flops / elapsed / 1e12
        mfu = rate / peak if peak else float("nan")
        memory = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else float("nan")
        rows.append({"which": which, "step_ms": 1000 * elapsed, "first_s": first, "tflops": rate, "mfu": mfu})
        rows[-1] |= {"images_per_s": args.batch_size / elapsed, "peak_gib": memory, "passed": None}
        print(
            f"{which:16} {1000 * elapsed:8.1f} ms a step, {args.batch_size / elapsed:7.1f} images/s,"
            f" {rate:6.1f} TFLOP/s, MFU {mfu:5.1%}, first two {first:5.1f} s, peak {memory:.1f} GiB,"
            f" {rows[0]['step_ms'] / 1000 / elapsed:.2f}x the speed of {rows[0]['which']}",
            flush=True,
        )
        del step, network
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def sampler(which: str, args: argparse.Namespace) -> Callable[[int], object] | None:
    """A function that samples a batch; None if there is no such way."""
    network = build(which, args).eval()
    if args.device == "cuda":
        network = network.to(torch.bfloat16)
    generator, options = torch.Generator().manual_seed(0), {"num_inference_steps": args.steps, "output_type": "np"}
    if which.startswith("ours"):
        pipe = quiet(ADMPipeline(network, LearnedVarianceDDPMScheduler(), None, None, None, None))
        if which == "ours-fast":
            if not hasattr(pipe, "enable_fast"):
                return None
            folder = tempfile.TemporaryDirectory()  # CPUs only: as if it were the first time
            if args.tiny:
                os.environ["AOT_INDUCTOR_DEBUG_COMPILE"] = "1"  # without optimisation, the compiler is faster
            pipe.enable_fast(cache_dir=folder.name)
            pipe.folder = folder  # lives as long as the code
    else:
        if which == "theirs-compiled":
            network.forward = torch.compile(
                network.forward, dynamic=False, backend="eager" if args.tiny else "inductor"
            )
        pipe = DDPMPipeline(network, DDPMScheduler(variance_type="learned_range"))
        pipe.set_progress_bar_config(disable=True)
    return lambda batch_size: pipe(batch_size=batch_size, generator=generator, **options)


def measure_sampling(args: argparse.Namespace) -> list[dict]:
    print(f"Sampling, {args.steps} steps")
    rows = []
    for which in args.which or SAMPLED:
        sample = sampler(which, args)
        if sample is None:
            print(f"{which:16} this version has no `ADMPipeline.enable_fast`")
            continue
        for batch_size in args.batch_sizes:
            elapsed, first = median_seconds(lambda sample=sample, n=batch_size: sample(n), args)
            step_ms = 1000 * elapsed / args.steps
            rows.append(
                {"which": which, "batch_size": batch_size, "step_ms": step_ms, "first_s": first, "passed": None}
            )
            print(
                f"{which:16} batch {batch_size:3} {step_ms:8.2f} ms a step,"
                f" {batch_size / elapsed * args.steps / 250:.2f} images/s at 250 steps, first two calls {first:.1f} s",
                flush=True,
            )
    return rows


def measure_ema(args: argparse.Namespace) -> list[dict]:
    step, network = train_steps("ours-eager", args)
    parameters = list(network.parameters())
    average = build_ema(parameters, TrainingArguments())
    elapsed, _ = median_seconds(step, args)
    update, _ = median_seconds(lambda: average.step(parameters), args)
    print(f"EMA: {1000 * update:.2f} ms after a step of {1000 * elapsed:.1f} ms, {update / elapsed:.1%}")
    return [{"step_ms": 1000 * elapsed, "ema_ms": 1000 * update, "share": update / elapsed, "passed": None}]


PARTS = {"training": measure_training, "sampling": measure_sampling, "ema": measure_ema}


def main() -> int:
    parser = make_parser(__doc__, "json", device="cpu", batch_size=64, repeats=8, steps=10)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--which", nargs="*", choices=sorted({*TRAINED, *SAMPLED}), help="Default: all.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="Of sampling.")
    parser.add_argument("--guided_diffusion", help="Folder of a checkout of guided-diffusion.")
    parser.add_argument("--tiny", action="store_true", help="A tiny network, to try the script.")
    args = parser.parse_args()
    start = clock(args.device)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    print(describe_machine(args.device))
    rows = PARTS[args.part](args)
    print(f"({time.perf_counter() - start:.0f} s)")
    return finish(args, **{args.part: rows})


if __name__ == "__main__":
    sys.exit(main())
