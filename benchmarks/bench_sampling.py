"""
Time of a scheduler's `step` relative to diffusers' schedulers, and overhead of `ADMPipeline` over its network.

    python benchmarks/bench_sampling.py [--device cuda] [--pairs 40] [--only ancestral] [--json results.json]

Each row of the first table steps `LearnedVarianceDDPMScheduler` and its counterpart through the same timesteps of 250
(64x64, float32) in turn, `--pairs` times, with the same stored network output and a generator, and gives the median of
the pairwise ratios ours / theirs with a 95% bootstrap interval. A row fails if that median exceeds 1.

The second table is the time of an `ADMPipeline` call outside the U-Net's forward (checks, timesteps, noise, steps,
conversion to images), as a share of the total. The network is the 64-channel one of `bench_unet.py`, in float32.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from measuring import (
    alternate,
    clock,
    describe_machine,
    finish,
    make_parser,
    measure_rows,
    median_with_interval,
    quiet,
    ratios,
)
from networks import build

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler


SIZE = 64
NUM_TIMESTEPS = 250
RATIO_LIMIT = 1.0
OVERHEAD_STEPS = 20
SHARE_LIMIT = 0.03
# The timesteps of a row: some in the middle, or all of them.
PARTS = {"50-steps": slice(100, 150), "250-steps": slice(None)}
# Further arguments of `step`: ours, then theirs. DDIM is compared with the scheduler that does the same: its noise
# direction comes from the clipped x_0.
METHODS = {
    "ancestral": ({}, {}),
    "ddim": ({"eta": 0.0}, {"eta": 0.0, "use_clipped_model_output": True}),
    "ddim-noisy": ({"eta": 1.0}, {"eta": 1.0, "use_clipped_model_output": True}),
}


def step_row(args: argparse.Namespace, method: str, form: str, part: str) -> dict:
    """`form`: the timesteps are elements of `scheduler.timesteps`, as in pipelines ("tensor"), or integers ("int")."""
    ours = LearnedVarianceDDPMScheduler()
    theirs = DDPMScheduler(variance_type="learned_range") if method == "ancestral" else DDIMScheduler()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(args.batch_size, 3, SIZE, SIZE, generator=generator).to(args.device)
    output = torch.randn(args.batch_size, 6, SIZE, SIZE, generator=generator).to(args.device)
    # As in `ADMPipeline` and `DDPMPipeline`: the former's timesteps are on the device, the latter's on the CPU.
    ours.set_timesteps(NUM_TIMESTEPS, device=args.device)
    theirs.set_timesteps(NUM_TIMESTEPS)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()

    def stepper(scheduler, output: torch.Tensor, options: dict) -> Callable[[], None]:
        timesteps = scheduler.timesteps[PARTS[part]]
        steps = timesteps.tolist() if form == "int" else list(timesteps)
        generator = torch.Generator(args.device).manual_seed(0)

        @torch.no_grad()
        def run() -> None:
            for t in steps:
                scheduler.step(output, t, sample, generator=generator, **options)

        return run

    # `DDIMScheduler` has no learned variance and gets the mean channels.
    outputs = output, output if method == "ancestral" else output[:, :3]
    runs = map(stepper, (ours, theirs), outputs, METHODS[method])
    row = ratios(alternate(*runs, args.pairs, args.device), len(ours.timesteps[PARTS[part]]))
    return {**row, "limit": RATIO_LIMIT, "passed": row["ratio"] <= RATIO_LIMIT}


def overhead_row(args: argparse.Namespace) -> dict:
    unet = build("ours", "64x64", "float32", "contiguous", args.device).eval()
    pipe = quiet(ADMPipeline(unet, LearnedVarianceDDPMScheduler(), None, None, None, None))
    in_network = []
    forward = unet.forward

    def timed_forward(*arguments, **options):
        start = clock(args.device)
        output = forward(*arguments, **options)
        in_network.append(clock(args.device) - start)
        return output

    unet.forward = timed_forward
    totals, networks = [], []
    for _ in range(args.calls + 1):
        in_network.clear()
        generator = torch.Generator().manual_seed(0)
        start = clock(args.device)
        pipe(batch_size=args.batch_size, num_inference_steps=OVERHEAD_STEPS, generator=generator)
        totals.append(clock(args.device) - start)
        networks.append(sum(in_network))
    calls = list(zip(totals, networks, strict=True))[1:]  # the first one warms up
    share, low, high = median_with_interval([(total - network) / total for total, network in calls])
    return {
        "steps": OVERHEAD_STEPS,
        "overhead_ms": 1000 * statistics.median(total - network for total, network in calls) / OVERHEAD_STEPS,
        "network_ms": 1000 * statistics.median(network for _, network in calls) / OVERHEAD_STEPS,
        "share": share,
        "low": low,
        "high": high,
        "passed": share <= SHARE_LIMIT,
    }


def main() -> int:
    parser = make_parser(__doc__, "json", device="cpu", batch_size=4, pairs=40)
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `ddim int`.")
    parser.add_argument("--calls", type=int, default=5, help="Timed calls of the pipeline; 0: skip the second table.")
    args = parser.parse_args()

    print(f"{describe_machine(args.device)}; batch size {args.batch_size}")
    rows, overhead_rows = [], []
    if args.pairs:
        print("\n`step`, ms per step; ratio = ours / theirs [95% interval]")
        cases = [*itertools.product(METHODS, ["tensor"], PARTS), ("ancestral", "int", "250-steps")]
        rows = measure_rows(("method", "timesteps", "part"), cases, step_row, args)
    if args.calls and set(args.only) <= {"overhead"}:
        print("\n`ADMPipeline` outside its network, per step; share of the total [95% interval]")
        overhead_rows.append(row := overhead_row(args))
        print(
            f"{row['steps']} steps: {row['overhead_ms']:.2f} ms next to {row['network_ms']:.1f} ms in the network = "
            f"{row['share']:.2%} [{row['low']:.2%}, {row['high']:.2%}] (limit {SHARE_LIMIT:.0%})  "
            f"{'ok' if row['passed'] else 'FAILED'}"
        )
    return finish(args, step=rows, overhead=overhead_rows)


if __name__ == "__main__":
    sys.exit(main())
