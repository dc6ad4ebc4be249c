"""
Time of a training step and of a sampling step for each value of the environment variable MKL_CBWR.

    python benchmarks/bench_mkl_cbwr.py [--rounds 8] [--steps 8] [--threads 1] [--json results.json]

MKL reads the variable when it is loaded, so each value needs a process of its own. Each round runs every value once; a
row gives the median over the rounds of the time relative to the process without the variable, with a 95% bootstrap
interval. Times are CPU times, which other programs disturb little. The network is that of
`training/configs/unet_emoji_32.json`, with batch size 16. docs/reproducibility.md explains the variable.
"""

import os
import statistics
import time
from pathlib import Path

import torch
from measuring import in_fresh_process, make_parser, median_with_interval, write_report

from diffusers_adm import AdaGNUNet2DModel, LearnedVarianceDDPMScheduler
from diffusers_adm.training import training_losses
from diffusers_adm.training.reproducibility import describe_machine


CONFIG = Path(__file__).parents[1] / "training" / "configs" / "unet_emoji_32.json"
VALUES = (None, "AUTO,STRICT", "AVX2,STRICT", "AVX512,STRICT", "COMPATIBLE")
BATCH_SIZE = 16


def measure(steps: int) -> dict[str, float]:
    """Median milliseconds of each kind of step in this process."""
    torch.manual_seed(0)
    unet, scheduler = AdaGNUNet2DModel.from_config(AdaGNUNet2DModel.load_config(CONFIG)), LearnedVarianceDDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    images = torch.rand(BATCH_SIZE, 3, 32, 32) * 2 - 1
    timesteps = torch.arange(BATCH_SIZE) * 60

    def train(enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = training_losses(unet, scheduler, images, timesteps).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sample() -> None:
        scheduler.step(unet(images, 500).sample, 500, images)

    result = {}
    kinds = {"training, float32": lambda: train(False), "training, bf16": lambda: train(True)}
    for kind, step in (kinds | {"sampling, float32": sample}).items():
        times = []
        for _ in range(steps + 2):
            start = time.process_time()
            step()
            times.append(1000 * (time.process_time() - start))
        result[kind] = statistics.median(times[2:])  # the first ones warm up
    return result


def main() -> None:
    parser = make_parser(__doc__, "json")
    parser.add_argument("--rounds", type=int, default=8, help="Processes for each value.")
    parser.add_argument("--steps", type=int, default=8, help="Timed steps of each kind in a process.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    found = {value: [] for value in VALUES}
    for turn in range(args.rounds):
        for value in VALUES if turn % 2 else reversed(VALUES):
            os.environ.pop("MKL_CBWR", None)
            if value is not None:
                os.environ["MKL_CBWR"] = value
            found[value].append(in_fresh_process(measure, args.steps))
    os.environ.pop("MKL_CBWR", None)

    machine = describe_machine()
    print(f"{machine}; batch size {BATCH_SIZE}, {args.rounds} rounds\n")
    print("time relative to the process without MKL_CBWR [95% interval]")
    rows = []
    for kind in found[None][0]:
        print(f"{kind}: {statistics.median(result[kind] for result in found[None]):.0f} ms without")
        for value in VALUES[1:]:
            pairs = [a[kind] / b[kind] for a, b in zip(found[value], found[None], strict=True)]
            ratio, low, high = median_with_interval(pairs)
            rows.append({"kind": kind, "value": value, "ratio": ratio, "low": low, "high": high})
            print(f"  {value:14} {ratio:.3f} [{low:.3f}, {high:.3f}]")
    write_report(args.json, args, machine=machine, rows=rows)


if __name__ == "__main__":
    main()
