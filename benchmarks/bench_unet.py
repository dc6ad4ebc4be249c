"""
Time and memory of `AdaGNUNet2DModel` relative to diffusers' `UNet2DModel` with the same weights.

    python benchmarks/bench_unet.py [--device cuda] [--pairs 15] [--only 64x64 float32] [--json results.json]

Each row times both networks in turn, `--pairs` times, so that disturbances of the machine affect both, and gives the
median of the pairwise ratios ours / theirs with a 95% bootstrap interval. A row fails if its whole interval lies above
the limit. Peak memory is the resident size (on CUDA: allocated memory) of a process that runs one of the networks.
"""

import argparse
import itertools
import sys
from functools import partial

import torch
import torch.nn.functional as F
from measuring import (
    alternate,
    compare_peaks,
    describe_machine,
    finish,
    make_parser,
    measure_rows,
    peak_bytes,
    ratios,
    seconds,
)
from networks import DTYPES, FORMATS, NETWORKS, build
from torch.utils.flop_counter import FlopCounterMode


MODES = ("forward", "forward+backward")
TIME_LIMITS = {"float32": 1.02, "bfloat16": 1.15}
MEMORY_LIMIT = 1.02


def inputs(network: str, dtype: str, memory_format: str, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    size = NETWORKS[network]["sample_size"]
    sample = torch.randn(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))
    sample = sample.to(args.device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])
    return sample, torch.arange(args.batch_size, device=args.device) * 100


def run(model: torch.nn.Module, arguments: tuple[torch.Tensor, torch.Tensor], mode: str) -> None:
    with torch.set_grad_enabled(mode == "forward+backward"):
        (output,) = model(*arguments, return_dict=False)
    if output.requires_grad:
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)


def convolution_rate(dtype: str, device: str) -> float:
    """The best rate in FLOP/s over both layouts of the 3x3 convolutions that make up most of the networks."""
    best = 0.0
    for (channels, size), memory_format in itertools.product(((64, 64), (128, 64), (256, 32)), FORMATS.values()):
        x = torch.randn(4, channels, size, size, device=device, dtype=DTYPES[dtype]).to(memory_format=memory_format)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=DTYPES[dtype])
        weight = weight.to(memory_format=memory_format)
        with torch.no_grad():
            times = [seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1), device) for _ in range(12)]
        best = max(best, 2 * x.numel() * channels * 9 / min(times[2:]))
    return best


def time_row(
    rates: dict[str, float], args: argparse.Namespace, network: str, dtype: str, memory_format: str, mode: str
) -> dict:
    models = (build(which, network, dtype, memory_format, args.device) for which in ("ours", "theirs"))
    arguments = inputs(network, dtype, memory_format, args)
    ours, theirs = (partial(run, model, arguments, mode) for model in models)
    with FlopCounterMode(display=False) as counter:
        ours()
    row, limit = ratios(alternate(ours, theirs, args.pairs, args.device)), TIME_LIMITS[dtype]
    for which in ("ours", "theirs"):
        row[f"{which}_of_conv_rate"] = 1000 * counter.get_total_flops() / row[f"{which}_ms"] / rates[dtype]
    note = f"{row['ours_of_conv_rate']:.2f}, {row['theirs_of_conv_rate']:.2f}  "
    return {**row, "limit": limit, "passed": row["low"] <= limit, "note": note}


def peak(args: argparse.Namespace, which: str, network: str, dtype: str, memory_format: str) -> int:
    """Peak of this process in bytes after three training steps of one network."""
    model = build(which, network, dtype, memory_format, args.device)
    arguments = inputs(network, dtype, memory_format, args)
    for _ in range(3):
        run(model, arguments, "forward+backward")
    return peak_bytes(args.device)


def memory_row(args: argparse.Namespace, *words: str) -> dict:
    row = compare_peaks(peak, args, ("ours", *words), ("theirs", *words))
    return {**row, "limit": MEMORY_LIMIT, "passed": row["ratio"] <= MEMORY_LIMIT}


def main() -> int:
    parser = make_parser(__doc__, "threads", "json", device="cpu", batch_size=4, pairs=15, memory_runs=3)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `64x64 float32`.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}")
    rates = {dtype: convolution_rate(dtype, args.device) for dtype in DTYPES}
    print("Best 3x3 convolution: " + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()))
    print("\nratio = ours / theirs [95% interval]; then the share of that convolution rate reached by ours and theirs")
    rows, memory_rows = [], []
    columns = ("network", "dtype", "format", "mode")
    if args.pairs:
        cases = itertools.product(NETWORKS, DTYPES, FORMATS, MODES)
        rows = measure_rows(columns, cases, partial(time_row, rates), args)
    if args.memory_runs:
        print("\nPeak memory of three training steps, each network in a process of its own")
        cases = itertools.product(NETWORKS, DTYPES, FORMATS)
        memory_rows = measure_rows(columns[:3], cases, memory_row, args, "mib")
    return finish(args, time=rows, memory=memory_rows)


if __name__ == "__main__":
    sys.exit(main())
