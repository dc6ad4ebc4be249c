"""
The Triton kernels of AdaGN at the shapes of ADM's 64x64 network: bandwidth, time relative to `torch.compile` of the
reference and to eager PyTorch, and agreement with the reference in float64.

    python benchmarks/bench_kernels.py --device cuda [--batch_sizes 32 1] [--only bfloat16] [--search] [--json FILE]
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --tiny

`share` is the bandwidth of the kernel as a share of that of a copy of 1 GiB in the same run. It counts three transfers
of the tensor for the forward pass (two reads, one write), and five for the backward pass (`x` and `dy` twice, one
write), also where a kernel reads once, so it can exceed 1. Times are of CUDA graphs, so they are those of the device
alone, and each call works on other tensors than the one before, so that small ones do not stay in the cache. A row
fails if the kernel is slower than the compiled reference or below the goal (0.8 forward, 0.7 backward).

`--search` times other plans than that of `find_plan`, and prints the best. With `--tiny`, tiny shapes on CPU, in
Triton's interpreter if `TRITON_INTERPRET=1`: this tries the script, and its times mean nothing.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from measuring import describe_machine, finish, make_parser

import diffusers_adm.ops.adagn_triton  # noqa: F401 (the package exports functions of modules under their names)
from diffusers_adm.ops.adagn import adagn_reference


kernels = sys.modules["diffusers_adm.ops.adagn_triton"]
SHAPES, TINY_SHAPES = ((192, 64), (384, 32), (576, 16), (768, 8)), ((6, 5), (8, 2))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
GOALS, TRANSFERS = {"forward": 0.8, "backward": 0.7}, {"forward": 3, "backward": 5}
# Of the largest absolute value; the results are rounded once to the dtype.
LIMITS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-19}
EPS = 1e-5


def device_seconds(calls: list[Callable[[], object]], args: argparse.Namespace) -> float:
    """Median time of one of the calls, which follow each other: on CUDA in a graph, without the launches of Python."""
    if args.device == "cpu":
        calls[0]()
        start = time.perf_counter()
        calls[-1]()
        return time.perf_counter() - start
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for repeat in range(args.repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def copy_bandwidth(args: argparse.Namespace) -> float:
    """Bytes read and written a second."""
    source = torch.randn(2**10 if args.device == "cpu" else 2**28, device=args.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / device_seconds([lambda: target.copy_(source)] * 4, args)


def make_inputs(args: argparse.Namespace, batch_size: int, channels: int, size: int, dtype: str, layout: str) -> dict:
    generator = torch.Generator(args.device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=args.device)

    x, dy = (
        (draw(batch_size, channels, size, size) + offset).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        for offset in (1, 0)
    )
    # As in training with autocast: float32 weights, scale and shift in 16 bits, halves of one tensor.
    scale, shift = (0.5 * draw(batch_size, 2 * channels)).to(DTYPES[dtype]).chunk(2, dim=1)
    return {"x": x, "dy": dy, "parameters": (1 + 0.3 * draw(channels), 0.3 * draw(channels), scale, shift)}


def reference_forward(x: torch.Tensor, weight, bias, scale, shift, groups: int) -> torch.Tensor:
    return adagn_reference(x, groups, weight, bias, EPS, scale, shift)


def reference_results(inputs: dict, groups: int, function: Callable, dtype: torch.dtype | None = None) -> tuple:
    """Output and gradients of x, weight, bias, scale and shift."""
    tensors = [inputs["x"], *inputs["parameters"]]
    tensors = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in tensors]
    output = function(*tensors, groups)
    return output, *torch.autograd.grad(output, tensors, inputs["dy"].to(output.dtype))


def run_kernels(inputs: dict, groups: int, forward_plan=None, backward_plan=None) -> tuple:
    x, (weight, bias, scale, shift) = inputs["x"], inputs["parameters"]
    output, mean, rstd = kernels.run_forward(x, groups, weight, bias, EPS, scale, shift, forward_plan)
    gradients = kernels.run_backward(
        inputs["dy"], x, groups, mean, rstd, weight, bias, scale, shift, plan=backward_plan
    )
    return output, *gradients


def relative_error(actual: tuple, expected: tuple) -> float:
    """The largest, over output and gradients, each relative to its largest absolute value."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def calls_of(mode: str, sets: list[dict], groups: int, plan=None) -> list[Callable[[], object]]:
    calls = []
    for inputs in sets:
        x, (weight, bias, scale, shift) = inputs["x"], inputs["parameters"]
        _, mean, rstd = kernels.run_forward(x, groups, weight, bias, EPS, scale, shift)
        if mode == "forward":
            arguments = (x, groups, weight, bias, EPS, scale, shift, plan)
            calls.append(lambda a=arguments: kernels.run_forward(*a))
        else:
            arguments = (inputs["dy"], x, groups, mean, rstd, weight, bias, scale, shift, plan)
            calls.append(lambda a=arguments: kernels.run_backward(*a))
    return calls


def reference_calls(mode: str, sets: list[dict], groups: int, function: Callable) -> list[Callable[[], object]]:
    """Of the reference; its backward pass alone, from graphs that are kept."""
    if mode == "forward":
        return [lambda i=i: function(i["x"], *i["parameters"], groups) for i in sets]
    calls = []
    for inputs in sets:
        tensors = [t.detach().requires_grad_() for t in (inputs["x"], *inputs["parameters"])]
        output = function(*tensors, groups)
        calls.append(lambda o=output, t=tensors, dy=inputs["dy"]: torch.autograd.grad(o, t, dy, retain_graph=True))
    return calls


def other_plans(x: torch.Tensor, groups: int, mode: str) -> set:
    """Plans that may be faster than the rule's: whole groups, other tiles, other numbers of warps."""
    batch_size, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    channels_last, itemsize = kernels._is_channels_last(x), x.element_size()
    limit = kernels.WHOLE_BACKWARD if mode == "backward" else kernels.WHOLE_FORWARD
    plans = {kernels.split_plan(batch_size, channels, pixels, itemsize, channels_last, n) for n in (1, 132, 1000)}
    plans |= {plan._replace(block_p=max(plan.block_p // 2, 1)) for plan in plans}
    whole = kernels.whole_plan(channels // groups, pixels, groups, itemsize, channels_last, limit)
    if whole is not None:
        plans |= {whole, whole._replace(groups=1), whole._replace(groups=min(2 * whole.groups, groups))}
    plans = {plan for plan in plans if plan.groups * plan.block_p * plan.block_c <= limit}
    return {
        plan._replace(warps=warps)
        for plan in plans
        for warps in {plan.warps, max(plan.warps // 2, 1), min(2 * plan.warps, 32)}
    }


def measure(args: argparse.Namespace, bandwidth: float, batch_size: int, shape: tuple, dtype: str, layout: str) -> list:
    channels, size = shape
    groups = 2 if args.tiny else 32
    tensor_bytes = batch_size * channels * size**2 * DTYPES[dtype].itemsize
    # Enough tensors that their sum exceeds the cache, at most 16.
    number = 2 if args.device == "cpu" else max(min(2**28 // tensor_bytes, 16), 2)
    sets = [make_inputs(args, batch_size, channels, size, dtype, layout) for _ in range(number)]
    compiled = torch.compile(reference_forward, dynamic=False, backend="eager" if args.device == "cpu" else "inductor")

    exact = reference_results(sets[0], groups, reference_forward, torch.float64)
    error = relative_error(run_kernels(sets[0], groups), exact)
    rows = []
    for mode in GOALS:
        with torch.set_grad_enabled(mode == "backward"):
            theirs = device_seconds(reference_calls(mode, sets, groups, compiled), args)
            eager = device_seconds(reference_calls(mode, sets, groups, reference_forward), args)
        with torch.no_grad():
            ours = device_seconds(calls_of(mode, sets, groups), args)
            share = TRANSFERS[mode] * tensor_bytes / ours / bandwidth
            plan = kernels.find_plan(sets[0]["x"], groups, mode == "backward")
            row = {"batch_size": batch_size, "channels": channels, "size": size, "dtype": dtype, "layout": layout}
            row |= {"mode": mode, "ours_us": ours * 1e6, "compiled_us": theirs * 1e6, "eager_us": eager * 1e6}
            row |= {"share": share, "goal": GOALS[mode], "error": error, "plan": plan}
            is_fast = args.device == "cpu" or (ours <= theirs and share >= GOALS[mode])
            row["passed"] = error <= LIMITS[dtype] and is_fast
            if args.search:
                times = {
                    p: device_seconds(calls_of(mode, sets, groups, p), args)
                    for p in other_plans(sets[0]["x"], groups, mode)
                }
                best = min(times, key=times.get)
                row |= {"best_plan": best, "best_us": times[best] * 1e6}
        best = f"  best {row['best_us']:.1f} us {tuple(row['best_plan'])}" if args.search else ""
        print(
            f"{batch_size:3} {channels:4}x{size}x{size} {dtype:8} {layout:13} {mode:8} {ours * 1e6:9.1f} us"
            f"  share {share:5.2f}  / compiled {ours / theirs:5.2f}  / eager {ours / eager:5.2f}  error {error:.1e}"
            f"  plan {tuple(plan)}{best}  {'ok' if row['passed'] else 'FAILED'}",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> int:
    parser = make_parser(__doc__, "json", device="cpu", repeats=20)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--only", nargs="*", default=[], help="Names of dtypes and layouts; default: all.")
    parser.add_argument("--search", action="store_true", help="Also time other plans.")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes, to try the script.")
    args = parser.parse_args()
    if args.device == "cpu" and not kernels.INTERPRETED:
        parser.error("on CPU the kernels only run in Triton's interpreter: set TRITON_INTERPRET=1")
    if kernels.triton is None:
        parser.error("Triton is not installed: pip install triton")
    dtypes = [dtype for dtype in DTYPES if dtype in args.only] or list(DTYPES)
    layouts = [layout for layout in LAYOUTS if layout in args.only] or list(LAYOUTS)

    bandwidth = copy_bandwidth(args)
    print(f"{describe_machine(args.device)}, Triton {kernels.triton.__version__}; copy {bandwidth / 1e12:.3f} TB/s")
    print("share: share of that bandwidth; / compiled, / eager: time relative to the reference, compiled or eager\n")
    cases = itertools.product(args.batch_sizes, TINY_SHAPES if args.tiny else SHAPES, dtypes, layouts)
    rows = [row for case in cases for row in measure(args, bandwidth, *case)]
    return finish(args, kernels=rows)


if __name__ == "__main__":
    sys.exit(main())
