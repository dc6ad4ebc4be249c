"""
Time of a whole training step: ours, that of a plain loop with diffusers' `UNet2DModel`, and guided-diffusion's.

    python benchmarks/bench_training.py [--rounds 8] [--only float32] [--compile] [--json results.json]
    python benchmarks/bench_training.py --guided_diffusion FOLDER    # with a checkout of openai/guided-diffusion

A step draws noise and timesteps and does forward pass, squared error, backward pass, clipping, AdamW and the moving
average. All start from the same weights. Ours is built from the parts of `TrainingRun`; diffusers' loop has its
`EMAModel`, PyTorch's `AdamW` and clipping with their defaults, as in the scripts of diffusers; guided-diffusion's has
the average of that code, whose networks are in float32 only.

All variants run in turn in one process, `--rounds` times, so that disturbances of the machine affect all. A row gives
the median time, the median over the rounds of its time relative to ours of the same type, format and mode with a 95%
bootstrap interval (above 1: slower than ours), and the share of clipping, optimizer and average. A variant whose first
loss differs from ours fails. `--compile` adds compiled networks, each of which costs a minute or more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from measuring import clock, describe_machine, finish, make_parser, median_with_interval, round_robin
from networks import FORMATS, NETWORKS, build, build_guided_diffusion

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.training import TrainingArguments, build_ema, build_optimizer, compile_network, training_losses
from diffusers_adm.training.metrics import LossMetrics
from diffusers_adm.training.step_guard import StepGuard
from diffusers_adm.training.timestep_samplers import UniformTimestepSampler


WHO = ("ours", "diffusers", "guided-diffusion")
PRECISIONS, MODES = ("float32", "bf16 autocast"), ("eager", "compiled")
# Of the first loss, relative to ours: float32 sums in another order, bfloat16 rounds each of some 40 layers to 2**-9.
LOSS_LIMITS = {"float32": 1e-4, "bf16 autocast": 3e-2}
MAX_NORM = 1.0
NUM_TIMESTEPS = 1000


class Case(NamedTuple):
    who: str
    precision: str
    memory_format: str
    mode: str

    @property
    def baseline(self) -> Case:
        return self._replace(who="ours")


class Step:
    """A training step of a variant; a call returns the loss. `parts` are the seconds after the backward pass."""

    def __init__(self, case: Case, args: argparse.Namespace):
        self.case, self.device = case, args.device
        self.model = make_model(case, args)
        self.network = self.model
        if case.mode == "compiled":
            self.network = compile_network(self.model) if case.who == "ours" else torch.compile(self.model)
        self.parameters = list(self.model.parameters())
        self.arguments = TrainingArguments(max_grad_norm=MAX_NORM)
        self.parts: list[float] = []
        self.sampler = UniformTimestepSampler(NUM_TIMESTEPS)  # of all, so that their losses can be compared
        self.start()

    def autocast(self) -> contextlib.AbstractContextManager:
        is_on = self.case.precision != "float32"
        return torch.autocast(self.device, torch.bfloat16) if is_on else contextlib.nullcontext()

    def __call__(self, samples: torch.Tensor) -> float:
        loss = self.backward(samples)
        start = clock(self.device)
        self.update()
        self.parts.append(clock(self.device) - start)
        return loss

    def start(self) -> None:
        """Makes scheduler, optimizer and average."""
        raise NotImplementedError

    def backward(self, samples: torch.Tensor) -> float:
        """Computes gradients. Returns the loss."""
        raise NotImplementedError

    def update(self) -> None:
        """Changes weights and average."""
        raise NotImplementedError


class Ours(Step):
    def start(self) -> None:
        is_cpu = self.device == "cpu"
        self.scheduler, accelerator = LearnedVarianceDDPMScheduler(), Accelerator(cpu=is_cpu)
        self.optimizer = build_optimizer(self.parameters, self.arguments, fused=is_cpu)
        self.ema = build_ema(self.parameters, self.arguments)
        self.metrics = LossMetrics(NUM_TIMESTEPS, device=self.device)
        self.guard = StepGuard(accelerator, str)

    def backward(self, samples: torch.Tensor) -> float:
        self.guard.begin()
        timesteps, weights = self.sampler.sample(len(samples), device=samples.device)
        with self.autocast():
            terms = training_losses(self.network, self.scheduler, samples, timesteps, objective="simple")
        self.metrics.update(timesteps, terms.loss.detach(), terms.mse.detach(), terms.vb.detach(), weights)
        loss = (terms.loss * weights).mean()
        self.guard.record(loss, timesteps, {})
        loss.backward()
        return loss.item()

    def update(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.guard.agree(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)


class Plain(Step):
    def start(self) -> None:
        self.scheduler = DDPMScheduler()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.arguments.learning_rate, weight_decay=0.0)
        if self.case.who == "diffusers":
            average = EMAModel(self.parameters, decay=0.9999, use_ema_warmup=True, power=0.75)
            self.average = lambda: average.step(self.parameters)
        else:
            averages = [parameter.detach().clone() for parameter in self.parameters]
            self.average = lambda: decay_into(averages, self.parameters)

    def backward(self, samples: torch.Tensor) -> float:
        timesteps, _ = self.sampler.sample(len(samples), device=samples.device)
        noise = torch.randn_like(samples)
        noisy = self.scheduler.add_noise(samples, noise, timesteps)
        with self.autocast():
            output = self.network(noisy, timesteps)
        output = output if torch.is_tensor(output) else output.sample
        loss = F.mse_loss(output[:, :3].float(), noise)
        loss.backward()
        return loss.item()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()


@torch.no_grad()
def decay_into(averages: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """An average of constant decay, in two passes over each weight, as in guided-diffusion."""
    for average, parameter in zip(averages, parameters, strict=True):
        average.mul_(0.9999).add_(parameter, alpha=0.0001)


def make_model(case: Case, args: argparse.Namespace) -> torch.nn.Module:
    """The network of a case, always with the same weights, in training mode."""
    which = "theirs" if case.who == "diffusers" else "ours"
    model = build(which, args.network, "float32", case.memory_format, args.device)
    if case.who == "guided-diffusion":
        model = (
            build_guided_diffusion(model, args.network, args.guided_diffusion)
            .to(args.device)
            .to(memory_format=FORMATS[case.memory_format])
        )
    return model.train()


def cases_of(args: argparse.Namespace) -> list[Case]:
    modes = MODES if args.compile else MODES[:1]
    cases = [Case(*words) for words in itertools.product(WHO, PRECISIONS, FORMATS, modes)]
    if args.guided_diffusion is None:
        cases = [case for case in cases if case.who != "guided-diffusion"]
    # In float32 only, and not compiled: it never was.
    own = {("float32", "eager")}
    cases = [case for case in cases if case.who != "guided-diffusion" or (case.precision, case.mode) in own]
    return [case for case in cases if set(args.only) <= {*case, *case.precision.split()}]


def measure(cases: list[Case], args: argparse.Namespace) -> list[dict]:
    """The rows of all cases, which are measured in turn."""
    size = NETWORKS[args.network]["sample_size"]
    samples = torch.rand(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    steps: dict[Case, Step] = {}
    batches, losses = {}, {}
    for case in cases:
        steps[case] = (Ours if case.who == "ours" else Plain)(case, args)
        batches[case] = samples.to(args.device).contiguous(memory_format=FORMATS[case.memory_format])
        torch.manual_seed(1)  # all draw timesteps, then noise
        losses[case] = steps[case](batches[case])
        steps[case].parts.clear()
    calls = {case: partial(steps[case], batches[case]) for case in cases}
    times = round_robin(calls, args.rounds, args.device, args.max_seconds)
    rows = []
    for case in cases:
        row = {**case._asdict(), "ms": 1000 * statistics.median(times[case]), "limit": None, "passed": None}
        row["rest"] = statistics.median(a / b for a, b in zip(steps[case].parts, times[case], strict=True))
        words = f"{case.who:16} {case.precision:13} {case.memory_format:13} {case.mode:8} {row['ms']:8.0f} ms"
        if case.baseline in times:
            pairs = zip(times[case], times[case.baseline], strict=True)
            row["ratio"], row["low"], row["high"] = median_with_interval([a / b for a, b in pairs])
            row["loss_error"] = abs(losses[case] / losses[case.baseline] - 1)
            row["passed"] = row["loss_error"] <= LOSS_LIMITS[case.precision]
            words += f"  {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        verdict = "  FAILED: another loss" if row["passed"] is False else ""
        print(f"{words}  {row['rest']:.1%} after the backward pass{verdict}", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    parser = make_parser(__doc__, "threads", "json", device="cpu", batch_size=4, rounds=8, max_seconds=math.inf)
    parser.add_argument("--network", default="64x64", choices=list(NETWORKS))
    parser.add_argument("--only", nargs="*", default=[], help="Words that a case must all have, e.g. `float32`.")
    parser.add_argument("--compile", action="store_true", help="Compiled networks as well.")
    parser.add_argument("--guided_diffusion", type=Path, help="Checkout of openai/guided-diffusion.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{describe_machine(args.device)}; {args.network}, batch size {args.batch_size}\n")
    print("median time of a step, time / ours [95% interval], share of clipping, optimizer and average")
    return finish(args, rows=measure(cases_of(args), args))


if __name__ == "__main__":
    sys.exit(main())
