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

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from measuring import (
    alternate,
    argument_parser,
    compare_peaks,
    describe_machine,
    finish,
    peak_bytes,
    print_row,
    ratios,
    seconds,
)
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm import AdaGNUNet2DModel


ADM = {
    "in_channels": 3,
    "out_channels": 6,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
}
NETWORKS = {
    "64x64": {
        **ADM,
        "sample_size": 64,
        "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 2,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 2,
    },
    "32x32": {
        **ADM,
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 2, "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", *("AttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = {False: "forward", True: "forward+backward"}
TIME_LIMITS = {"float32": 1.02, "bfloat16": 1.15}
MEMORY_LIMIT = 1.02


def build(which: str, network: str, dtype: str, memory_format: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    theirs = UNet2DModel(**NETWORKS[network])
    model = theirs
    if which == "ours":
        model = AdaGNUNet2DModel(**NETWORKS[network])
        model.load_state_dict(theirs.state_dict())
    return model.to(device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])


def inputs(network: str, batch_size: int, dtype: str, memory_format: str, device: str) -> tuple:
    size = NETWORKS[network]["sample_size"]
    sample = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))
    sample = sample.to(device, DTYPES[dtype]).to(memory_format=FORMATS[memory_format])
    return sample, torch.arange(batch_size, device=device) * 100


def run(model: torch.nn.Module, arguments: tuple, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            model(*arguments, return_dict=False)
        return
    (output,) = model(*arguments, return_dict=False)
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


def bench_row(
    network: str, dtype: str, memory_format: str, backward: bool, args: argparse.Namespace, rates: dict[str, float]
) -> dict:
    ours, theirs = (build(which, network, dtype, memory_format, args.device) for which in ("ours", "theirs"))
    arguments = inputs(network, args.batch_size, dtype, memory_format, args.device)
    with FlopCounterMode(display=False) as counter:
        run(ours, arguments, backward)
    times = alternate(
        lambda: run(ours, arguments, backward), lambda: run(theirs, arguments, backward), args.pairs, args.device
    )
    row = {"network": network, "dtype": dtype, "format": memory_format, "mode": MODES[backward], **ratios(times)}
    for which in ("ours", "theirs"):
        row[f"{which}_of_conv_rate"] = 1000 * counter.get_total_flops() / row[f"{which}_ms"] / rates[dtype]
    return row | {"passed": row["low"] <= TIME_LIMITS[dtype]}


def print_peak(which: str, network: str, dtype: str, memory_format: str, args: argparse.Namespace) -> None:
    """The task of a child process: prints its peak in bytes after three training steps of one network."""
    model = build(which, network, dtype, memory_format, args.device)
    arguments = inputs(network, args.batch_size, dtype, memory_format, args.device)
    for _ in range(3):
        run(model, arguments, backward=True)
    print(peak_bytes(args.device))


def main() -> int:
    parser = argument_parser(__doc__, batch_size=4, pairs=15, only="64x64 float32")
    parser.add_argument("--memory_runs", type=int, default=3, help="Processes per peak; the median counts. 0: skip.")
    parser.add_argument("--threads", type=int, help="Threads of torch; default: its own choice.")
    parser.add_argument("--memory_of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(*args.memory_of, args)
        return 0

    machine = describe_machine(args.device)
    print(f"{machine}; batch size {args.batch_size}")
    rates = {dtype: convolution_rate(dtype, args.device) for dtype in DTYPES}
    print("Best 3x3 convolution: " + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()))
    print("\nratio = ours / theirs [95% interval]; then the share of that convolution rate reached by ours and theirs")
    rows, memory_rows = [], []
    for network, dtype, memory_format, backward in itertools.product(NETWORKS, DTYPES, FORMATS, (False, True)):
        if args.pairs and set(args.only) <= {network, dtype, memory_format, MODES[backward]}:
            rows.append(row := bench_row(network, dtype, memory_format, backward, args, rates))
            label = f"{network} {dtype:8} {memory_format:13} {row['mode']:16}"
            shares = f"{row['ours_of_conv_rate']:.2f}, {row['theirs_of_conv_rate']:.2f}  "
            print_row(label, row, "ms", TIME_LIMITS[dtype], shares)
    if args.memory_runs:
        print("\nPeak memory of three training steps, each network in a process of its own")
        for network, dtype, memory_format in itertools.product(NETWORKS, DTYPES, FORMATS):
            words = (network, dtype, memory_format)
            if set(args.only) <= set(words):
                row = compare_peaks(__file__, args, ("ours", *words), ("theirs", *words))
                row |= dict(zip(("network", "dtype", "format"), words, strict=True))
                memory_rows.append(row | {"passed": row["ratio"] <= MEMORY_LIMIT})
                print_row(f"{network} {dtype:8} {memory_format:13}", memory_rows[-1], "mib", MEMORY_LIMIT)
    return finish(args, machine, time=rows, memory=memory_rows)


if __name__ == "__main__":
    sys.exit(main())
