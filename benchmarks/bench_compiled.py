"""
Time of a sampling step's network call, eager and compiled: ours, diffusers, OpenVINO and guided-diffusion.

    python benchmarks/bench_compiled.py [--only 64x64 float32] [--rounds 15] [--json results.json]
    python benchmarks/bench_compiled.py --guided_diffusion FOLDER    # with a checkout of openai/guided-diffusion

All variants have the same weights and run in turn in one process, `--rounds` times, so that disturbances of the machine
affect all. A row gives the median time, the median over the rounds of its time relative to that of our fast path with a
95% bootstrap interval (above 1: slower than ours), the share of the rate of the best 3x3 convolution, the seconds until
the first result, and the difference from the float32 network: a variant that computes something else fails.

Eager networks run in both memory formats, and the faster one counts; compiled ones in `--compiled_formats`, because
each compilation takes a minute. OpenVINO takes part if it is installed (`pip install openvino`). bfloat16 and autocast
are skipped if the processor has no instructions for it, unless `--all`. The last lines are the rows in Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import describe_machine, finish, make_parser, markdown_table, median_with_interval, round_robin
from networks import (
    DTYPES,
    FORMATS,
    NETWORKS,
    autocast,
    build,
    build_guided_diffusion,
    convolution_rate,
    make_inputs,
)
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler


Call = Callable[[], torch.Tensor]
BASELINE = "ours, fast"
# Relative L2 distance from our float32 network, run eagerly. float32: other algorithms and orders of summation; else
# the rounding of bfloat16 (2**-9), which adds up over some 40 layers.
ERROR_LIMITS = {"float32": 1e-4, "bfloat16": 4e-2, "autocast": 4e-2}
# A variant must take at least so many times as long as our fast path.
TIME_LIMITS = {"diffusers, eager": 1.25, "diffusers, compiled": 1.1, "diffusers, frozen": 1 / 1.02}
# Share of the convolution rate that our fast path must reach.
RATE_LIMITS = {"float32": 0.8, "bfloat16": 0.7, "autocast": 0.7}
# Convolutions in bfloat16 that are less than this much faster than those in float32 are emulated.
FAST_BFLOAT16 = 1.2
MARKDOWN = {
    "network": "{network}",
    "dtype": "{dtype}",
    "variant": "{variant}",
    "memory format": "{format}",
    "ms": "{ms:.0f}",
    "relative to ours, fast": "{ratio:.2f} [{low:.2f}, {high:.2f}]",
    "of the convolution rate": "{of_conv_rate:.2f}",
    "first call, s": "{first_call_s:.0f}",
    "error": "{error:.0e}",
}


class Unavailable(Exception):
    """A variant cannot run here; the message says why."""


class Case(NamedTuple):
    network: str
    dtype: str
    args: argparse.Namespace

    def build(self, which: str, memory_format: str) -> torch.nn.Module:
        return build(which, self.network, self.dtype, memory_format, self.args.device).eval()

    def inputs(self, memory_format: str) -> tuple[torch.Tensor, torch.Tensor]:
        return make_inputs(self.network, self.dtype, memory_format, self.args.batch_size, self.args.device)

    def call(self, function: Callable[..., torch.Tensor], memory_format: str) -> Call:
        return partial(run, function, self.inputs(memory_format), self.dtype)


class First(torch.nn.Module):
    """A network whose `forward` returns its output as a tensor."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.network(sample, timestep, return_dict=False)[0]


@torch.no_grad()
def run(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, torch.Tensor], dtype: str = "float32"
) -> torch.Tensor:
    with autocast(dtype, inputs[0].device.type):
        return function(*inputs)


# Variants: each takes a case and a memory format, and returns a function that runs the network


def eager(which: str, case: Case, memory_format: str) -> Call:
    return case.call(First(case.build(which, memory_format)), memory_format)


def compiled(which: str, freezing: bool, case: Case, memory_format: str) -> Call:
    """By `torch.compile`; with `freezing`, the weights become constants in the layout that the kernels prefer."""
    if freezing and case.args.device != "cpu":
        raise Unavailable("freezing is for CPUs")
    network = First(case.build(which, memory_format))

    def function(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return network(sample, timestep)

    # Dynamo keeps graphs with the code object and would find the one without freezing for the same network.
    own = types.FunctionType(function.__code__.replace(), globals(), closure=function.__closure__)
    call = case.call(torch.compile(own), memory_format)
    with torch._inductor.config.patch(freezing=freezing):
        call()  # compiles, while the setting holds
    return call


def fast(case: Case, memory_format: str) -> Call:
    """
    What a pipeline runs after `enable_fast`, without code kept from other processes; in versions without it, our
    network frozen. autocast: float32 weights, code in bfloat16.
    """
    if not hasattr(ADMPipeline, "enable_fast"):
        return compiled("ours", True, case, memory_format)
    pipe = ADMPipeline(case.build("ours", memory_format), LearnedVarianceDDPMScheduler(), None, None, None, None)
    is_autocast = case.dtype == "autocast"
    folder = tempfile.TemporaryDirectory()
    pipe.enable_fast(torch.bfloat16 if is_autocast else None, cache_dir=folder.name)
    network = First(pipe.unet)

    def call() -> torch.Tensor:
        return run(network, inputs)

    inputs = case.inputs(memory_format)
    call.folder = folder  # lives as long as the code
    return call


def openvino(case: Case, memory_format: str) -> Call:
    """diffusers' network. float32: computed in it; autocast: in the precision that OpenVINO prefers on this device."""
    if case.dtype == "bfloat16" or case.args.device != "cpu":
        raise Unavailable("compared on CPU, with float32 weights: in the rows float32 and autocast")
    try:
        ov = importlib.import_module("openvino")
    except ImportError:
        raise Unavailable("not installed: `pip install openvino`") from None
    inputs = case.inputs(memory_format)
    with torch.no_grad(), warnings.catch_warnings():
        # Of branches on shapes, which are the same in all calls.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = ov.convert_model(
            First(case.build("theirs", memory_format)), example_input=inputs, input=[tuple(x.shape) for x in inputs]
        )
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if case.dtype == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    network = ov.Core().compile_model(model, "CPU", settings)
    precision = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if case.dtype == "autocast" and precision == "f32":
        raise Unavailable("prefers float32 on this processor: see its row there")
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(network(arrays)[0])


def guided_diffusion(case: Case, memory_format: str) -> Call:
    if case.args.guided_diffusion is None:
        raise Unavailable("needs a checkout of openai/guided-diffusion: `--guided_diffusion FOLDER`")
    if case.dtype == "bfloat16":
        raise Unavailable("has weights in float32 and float16 only")
    model = build_guided_diffusion(case.build("ours", "contiguous"), case.network, case.args.guided_diffusion)
    model = model.to(case.args.device).to(memory_format=FORMATS[memory_format]).eval()
    return case.call(model, memory_format)


VARIANTS: dict[str, Callable[[Case, str], Call]] = {
    BASELINE: fast,
    "ours, eager": partial(eager, "ours"),
    "ours, compiled": partial(compiled, "ours", False),
    "diffusers, eager": partial(eager, "theirs"),
    "diffusers, compiled": partial(compiled, "theirs", False),
    "diffusers, frozen": partial(compiled, "theirs", True),
    "openvino": openvino,
    "guided-diffusion": guided_diffusion,
}


def formats_of(variant: str, args: argparse.Namespace) -> list[str]:
    """Memory formats in which a variant is measured."""
    if variant == "openvino":
        return ["contiguous"]
    return args.compiled_formats if variant.endswith(("fast", "compiled", "frozen")) else list(FORMATS)


# Rows


def measure(case: Case) -> list[dict]:
    """A row per variant, in its fastest memory format. Variants that cannot run are named and left out."""
    torch._dynamo.reset()  # each network is a recompilation of the same code, whose number is limited
    args = case.args
    plain = eager("ours", case._replace(dtype="float32"), "contiguous")
    with FlopCounterMode(display=False) as counter:
        reference = plain()
    calls: dict[tuple[str, str], Call] = {}
    rows: dict[tuple[str, str], dict] = {}
    for variant in args.variants:
        for memory_format in formats_of(variant, args):
            start = time.perf_counter()
            try:
                call = VARIANTS[variant](case, memory_format)
                output = call()
            except Unavailable as reason:
                print(f"  {variant}: skipped, {reason}", flush=True)
                break
            calls[variant, memory_format] = call
            error = float((output.float() - reference).norm() / reference.norm())
            first = time.perf_counter() - start
            print(f"  {variant}, {memory_format}: first result after {first:.1f} s, error {error:.1e}", flush=True)
            rows[variant, memory_format] = {"first_call_s": first, "error": error}
    rate = convolution_rate(case.dtype, args.device)
    times = round_robin(calls, args.rounds, args.device)
    for key, row in rows.items():
        row |= {"ms": 1000 * statistics.median(times[key]), "times_s": times[key]}
        row["of_conv_rate"] = 1000 * counter.get_total_flops() / row["ms"] / rate
    return compare(case, rows)


def compare(case: Case, rows: dict[tuple[str, str], dict]) -> list[dict]:
    """The fastest memory format of each variant, relative to our fast path, with the verdict."""
    best: dict[str, dict] = {}
    for (variant, memory_format), row in rows.items():
        if variant not in best or row["ms"] < best[variant]["ms"]:
            words = {"network": case.network, "dtype": case.dtype, "variant": variant, "format": memory_format}
            best[variant] = words | row
    for variant, row in best.items():
        row["passed"] = row["error"] <= ERROR_LIMITS[case.dtype]
        if BASELINE in best:
            pairs = zip(row["times_s"], best[BASELINE]["times_s"], strict=True)
            row["ratio"], row["low"], row["high"] = median_with_interval([a / b for a, b in pairs])
            row["passed"] &= row["ratio"] >= TIME_LIMITS.get(variant, 0)
        if variant == BASELINE:
            row["passed"] &= row["of_conv_rate"] >= RATE_LIMITS[case.dtype]
    return list(best.values())


def has_fast_bfloat16(device: str) -> bool:
    """False where bfloat16 is emulated, so that it is slower than float32."""
    rates = {dtype: convolution_rate(dtype, device) for dtype in ("float32", "bfloat16")}
    return rates["bfloat16"] >= FAST_BFLOAT16 * rates["float32"]


def print_row(row: dict) -> None:
    relative = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if "ratio" in row else ""
    goal = f" (at least {TIME_LIMITS[row['variant']]:.2f})" if row["variant"] in TIME_LIMITS else ""
    numbers = f"{row['ms']:8.1f} ms  {relative}{goal}  {row['of_conv_rate']:.2f}"
    print(f"  {row['variant']:20} {row['format']:14} {numbers}  {'ok' if row['passed'] else 'FAILED'}", flush=True)


def main() -> int:
    parser = make_parser(__doc__, "threads", "json", device="cpu", batch_size=4, rounds=15)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a case must all have, e.g. `64x64 float32`.")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--compiled_formats", nargs="+", default=["channels_last"], choices=list(FORMATS))
    parser.add_argument("--guided_diffusion", type=Path, help="Checkout of openai/guided-diffusion.")
    parser.add_argument("--all", action="store_true", help="Also measure bfloat16 where it is emulated.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}")
    rows: list[dict] = []
    for network, dtype in itertools.product(NETWORKS, DTYPES):
        if not set(args.only) <= {network, dtype}:
            continue
        print(f"\n{network} {dtype}")
        if dtype != "float32" and not args.all and not has_fast_bfloat16(args.device):
            print("  skipped: this processor emulates bfloat16 (`--all` measures it in any case)")
            continue
        found = measure(Case(network, dtype, args))
        print("  median; relative to ours, fast [95% interval]; share of the convolution rate")
        for row in found:
            print_row(row)
        rows += found
    print("\n" + markdown_table(rows, MARKDOWN))
    return finish(args, time=rows)


if __name__ == "__main__":
    sys.exit(main())
