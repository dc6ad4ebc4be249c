"""
Time of a scheduler's `step` against diffusers' schedulers, and what `ADMPipeline` adds to the time of its network.

    python benchmarks/bench_sampling.py [--device cuda] [--pairs 40] [--only ancestral] [--json results.json]

Each row of the first table walks `LearnedVarianceDDPMScheduler` and its counterpart through the same timesteps of a
250-step chain (64x64, float32) in turn, `--pairs` times, with the same stored output of a network and a generator, and
gives the median of the pairwise ratios ours / theirs with a 95% bootstrap interval. A row fails if that median exceeds
1.

The second table is the time of an `ADMPipeline` call that is not spent in the U-Net's forward (checks, timesteps,
noise, steps, conversion to images), as a share of the whole. The network is the 64-channel one of `bench_unet.py`, in
float32.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from bench_unet import build
from diffusers import DDIMScheduler, DDPMScheduler
from measuring import alternate, bootstrap_interval, describe_machine, ratios

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler


SIZE = 64
CHAIN = 250
RATIO_LIMIT = 1.0
SHARE_LIMIT = 0.03
# Of the 250 timesteps: a stretch in the middle, or all of them.
PARTS = {"50-steps": slice(100, 150), "250-steps": slice(None)}
# What `step` gets beside output, timestep and sample: ours, then theirs. DDIM is compared with the scheduler that does
# the same: the noise direction comes from the clipped x_0.
METHODS = {
    "ancestral": ({}, {}),
    "ddim": ({"eta": 0.0}, {"eta": 0.0, "use_clipped_model_output": True}),
    "ddim-noisy": ({"eta": 1.0}, {"eta": 1.0, "use_clipped_model_output": True}),
}


def step_row(method: str, form: str, part: str, args: argparse.Namespace) -> dict:
    """`form`: the timesteps are elements of `scheduler.timesteps`, as in pipelines, or integers."""
    ours = LearnedVarianceDDPMScheduler()
    theirs = DDPMScheduler(variance_type="learned_range") if method == "ancestral" else DDIMScheduler()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(args.batch_size, 3, SIZE, SIZE, generator=generator).to(args.device)
    output = torch.randn(args.batch_size, 6, SIZE, SIZE, generator=generator).to(args.device)
    # `DDIMScheduler` knows no learned variance: it gets the mean channels.
    outputs = {"ours": output, "theirs": output if method == "ancestral" else output[:, :3]}
    options = dict(zip(("ours", "theirs"), METHODS[method], strict=True))
    generators = {which: torch.Generator(args.device).manual_seed(0) for which in ("ours", "theirs")}
    walks = {}
    for which, scheduler in (("ours", ours), ("theirs", theirs)):
        # As `ADMPipeline` and `DDPMPipeline` do it: the former on the device, the latter on the CPU.
        scheduler.set_timesteps(CHAIN, device=args.device if which == "ours" else None)
        timesteps = scheduler.timesteps[PARTS[part]]
        walks[which] = timesteps.tolist() if form == "int" else list(timesteps)
    assert [int(t) for t in walks["ours"]] == [int(t) for t in walks["theirs"]]

    def walk(which: str, scheduler: LearnedVarianceDDPMScheduler | DDPMScheduler | DDIMScheduler) -> None:
        for t in walks[which]:
            scheduler.step(outputs[which], t, sample, generator=generators[which], **options[which])

    with torch.no_grad():
        times = alternate(lambda: walk("ours", ours), lambda: walk("theirs", theirs), args.pairs, args.device)
    row = ratios({which: [elapsed / len(walks[which]) for elapsed in times[which]] for which in times})
    return {"method": method, "timesteps": form, "part": part, **row, "passed": row["ratio"] <= RATIO_LIMIT}


def overhead_row(steps: int, args: argparse.Namespace) -> dict:
    unet = build("ours", "64x64", "float32", "contiguous", args.device).eval()
    pipe = ADMPipeline(
        unet=unet,
        scheduler=LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
    )
    pipe.set_progress_bar_config(disable=True)
    in_network = []
    forward = unet.forward

    def clock() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed_forward(*arguments, **options):
        start = clock()
        output = forward(*arguments, **options)
        in_network.append(clock() - start)
        return output

    unet.forward = timed_forward
    shares, overheads, networks = [], [], []
    for call in range(args.calls + 1):
        in_network.clear()
        start = clock()
        pipe(batch_size=args.batch_size, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        total = clock() - start
        if call:  # the first one warms up
            shares.append((total - sum(in_network)) / total)
            overheads.append((total - sum(in_network)) / steps)
            networks.append(sum(in_network) / steps)
    low, high = bootstrap_interval(shares)
    return {
        "steps": steps,
        "overhead_ms": 1000 * statistics.median(overheads),
        "network_ms": 1000 * statistics.median(networks),
        "share": statistics.median(shares),
        "low": low,
        "high": high,
        "passed": statistics.median(shares) <= SHARE_LIMIT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=40, help="Timed pairs per row; 0: skip the first table.")
    parser.add_argument("--calls", type=int, default=5, help="Timed calls of the pipeline; 0: skip the second table.")
    parser.add_argument("--only", nargs="*", default=[], help="Words that a row must all have, e.g. `ddim int`.")
    parser.add_argument("--json", help="Write all numbers to this file.")
    args = parser.parse_args()

    machine = describe_machine(args.device)
    print(f"{machine}; batch size {args.batch_size}")
    if args.pairs:
        print("\n`step`, ms a step; ratio = ours / theirs [95% interval]")
    rows, overhead_rows = [], []
    cases = [(method, "tensor", part) for method in METHODS for part in PARTS] + [("ancestral", "int", "250-steps")]
    for method, form, part in cases:
        if not args.pairs or not set(args.only) <= {method, form, part}:
            continue
        row = step_row(method, form, part, args)
        rows.append(row)
        print(
            f"{method:10} {form:6} {part:9} {row['ours_ms']:7.3f} / {row['theirs_ms']:7.3f} ms = {row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] (limit {RATIO_LIMIT})  {'ok' if row['passed'] else 'FAILED'}",
            flush=True,
        )
    if args.calls and set(args.only) <= {"overhead"}:
        print("\n`ADMPipeline` outside of the network, a step; share of the whole [95% interval]")
        row = overhead_row(20, args)
        overhead_rows.append(row)
        print(
            f"{row['steps']} steps: {row['overhead_ms']:.2f} ms beside {row['network_ms']:.1f} ms in the network = "
            f"{row['share']:.2%} [{row['low']:.2%}, {row['high']:.2%}] (limit {SHARE_LIMIT:.0%})  "
            f"{'ok' if row['passed'] else 'FAILED'}"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "step": rows, "overhead": overhead_rows}, file, indent=2)
    return 0 if all(row["passed"] for row in rows + overhead_rows) else 1


if __name__ == "__main__":
    sys.exit(main())
