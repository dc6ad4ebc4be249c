"""
Time and memory of `AdaGNUNet2DModel` relative to diffusers' `UNet2DModel` with the same weights.

    python benchmarks/bench_unet.py [--device cuda] [--pairs 15] [--only 64x64 float32] [--json results.json]

Each row times both networks in turn, `--pairs` times, so that disturbances of the machine affect both, and gives the
median of the pairwise ratios ours / theirs with a 95% bootstrap interval. A row fails if its median lies above the
limit. The dtype `autocast` is float32 weights under `torch.autocast` with bfloat16. Peak memory is the resident size
(on CUDA: allocated memory) of a process that runs one of the networks. The last lines are the same rows in Markdown.
"""

import argparse
import itertools
import sys
from functools import partial

import torch
from measuring import (
    alternate,
    compare_peaks,
    describe_machine,
    finish,
    make_parser,
    markdown_table,
    measure_rows,
    peak_bytes,
    ratios,
)
from networks import DTYPES, FORMATS, NETWORKS, autocast, build, convolution_rate, make_inputs
from torch.utils.flop_counter import FlopCounterMode


MODES = ("forward", "forward+backward")
TIME_LIMIT = 1.02
MEMORY_LIMIT = 1.02
MARKDOWN = {"network": "{network}", "dtype": "{dtype}", "memory format": "{format}"}


def run(model: torch.nn.Module, arguments: tuple[torch.Tensor, torch.Tensor], dtype: str, mode: str) -> None:
    with torch.set_grad_enabled(mode == "forward+backward"), autocast(dtype, arguments[0].device.type):
        (output,) = model(*arguments, return_dict=False)
    if output.requires_grad:
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)


def time_row(args: argparse.Namespace, network: str, dtype: str, memory_format: str, mode: str) -> dict:
    models = (build(which, network, dtype, memory_format, args.device) for which in ("ours", "theirs"))
    arguments = make_inputs(network, dtype, memory_format, args.batch_size, args.device)
    ours, theirs = (partial(run, model, arguments, dtype, mode) for model in models)
    with FlopCounterMode(display=False) as counter:
        ours()
    rate = convolution_rate(dtype, args.device)
    row = ratios(alternate(ours, theirs, args.pairs, args.device))
    for which in ("ours", "theirs"):
        row[f"{which}_of_conv_rate"] = 1000 * counter.get_total_flops() / row[f"{which}_ms"] / rate
    note = f"{row['ours_of_conv_rate']:.2f}, {row['theirs_of_conv_rate']:.2f}  "
    return {**row, "limit": TIME_LIMIT, "passed": row["ratio"] <= TIME_LIMIT, "note": note}


def peak(args: argparse.Namespace, which: str, network: str, dtype: str, memory_format: str) -> int:
    """Peak of this process in bytes after three training steps of one network."""
    model = build(which, network, dtype, memory_format, args.device)
    arguments = make_inputs(network, dtype, memory_format, args.batch_size, args.device)
    for _ in range(3):
        run(model, arguments, dtype, "forward+backward")
    return peak_bytes(args.device)


def memory_row(args: argparse.Namespace, *words: str) -> dict:
    row = compare_peaks(peak, args, ("ours", *words), ("theirs", *words))
    return {**row, "limit": MEMORY_LIMIT, "passed": row["ratio"] <= MEMORY_LIMIT}


def print_markdown(rows: list[dict], memory_rows: list[dict]) -> None:
    if rows:
        numbers = {"ours, ms": "{ours_ms:.0f}", "diffusers, ms": "{theirs_ms:.0f}", "ratio": "{ratio:.2f}"}
        numbers |= {"95% interval": "{low:.2f} to {high:.2f}", "of the convolution rate": "{ours_of_conv_rate:.2f}"}
        print("\n" + markdown_table(rows, {**MARKDOWN, "mode": "{mode}", **numbers}))
    if memory_rows:
        numbers = {"ours, MiB": "{ours_mib:.0f}", "diffusers, MiB": "{theirs_mib:.0f}", "ratio": "{ratio:.2f}"}
        print("\n" + markdown_table(memory_rows, MARKDOWN | numbers))


def main() -> int:
    parser = make_parser(__doc__, "threads", "json", device="cpu", batch_size=4, pairs=15, memory_runs=3)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `64x64 float32`.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}")
    print("\nratio = ours / theirs [95% interval]; then the shares of the rate of the best 3x3 convolution")
    rows, memory_rows = [], []
    columns = ("network", "dtype", "format", "mode")
    if args.pairs:
        cases = itertools.product(NETWORKS, DTYPES, FORMATS, MODES)
        rows = measure_rows(columns, cases, time_row, args)
    if args.memory_runs:
        print("\nPeak memory of three training steps, each network in a process of its own")
        cases = itertools.product(NETWORKS, DTYPES, FORMATS)
        memory_rows = measure_rows(columns[:3], cases, memory_row, args, "mib")
    print_markdown(rows, memory_rows)
    return finish(args, time=rows, memory=memory_rows)


if __name__ == "__main__":
    sys.exit(main())
