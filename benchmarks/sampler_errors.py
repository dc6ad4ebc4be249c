"""
Distance of the samplers' results from the data, by number of steps. Prints the tables of docs/samplers.md.

    python benchmarks/sampler_errors.py [--schedules linear cosine] [--samples 65536] [--plot errors.png]

The network is perfect, so only the sampler's error is measured: every pixel follows the same mixture of two Gaussians,
for which the optimal prediction and its variance are known in closed form. Each sampler is set on `ADMPipeline` with
`from_config`. The error is the 2-Wasserstein distance between the generated pixels and the mixture, in one dimension
the root mean square of the differences of their quantiles; images have the range [-1, 1].

Deterministic samplers start from the quantiles of the normal distribution and have no random error. The others are
limited by the number of samples: the noise floor is the distance of as many exact samples (mean and largest of 20).
"""

import functools
import itertools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from matplotlib.figure import Figure
from measuring import make_parser, quiet

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler


# A broad mode and a narrow one, with no gap between them: across a gap, a handful of samples on the wrong side would
# dominate the distance.
WEIGHTS, MEANS, STDS = torch.tensor([[0.35, 0.65], [-0.45, 0.35], [0.25, 0.15]], dtype=torch.float64)[..., None]
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
STEPS = (5, 10, 20, 50, 100, 250)
SPACING_STEPS = 20
GRID = 2**14  # samples of a deterministic sampler
KARRAS = {"use_karras_sigmas": True}
OURS = "LearnedVarianceDDPM"
# Their "leading" spacing omits up to a quarter of the upper timesteps.
BETTER_WITH_LINSPACE = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")


@dataclass(frozen=True)
class Sampler:
    label: str  # starts with the name of the scheduler class, without "Scheduler"
    deterministic: bool
    config: dict = field(default_factory=dict)  # for `from_config`
    call: dict = field(default_factory=dict)  # for the pipeline

    @property
    def scheduler(self) -> str:
        return self.label.partition(",")[0]


SAMPLERS = [
    Sampler(OURS, False),
    Sampler("DDPM, fixed_small", False, {"variance_type": "fixed_small"}),
    Sampler("DDPM, fixed_large", False, {"variance_type": "fixed_large"}),
    Sampler("DDIM", True),
    Sampler("PNDM", True),
    Sampler("PNDM, skip_prk_steps", True, {"skip_prk_steps": True}),
    Sampler("LMSDiscrete", True),
    Sampler("EulerDiscrete", True),
    Sampler("EulerAncestralDiscrete", False),
    Sampler("HeunDiscrete", True),
    Sampler("KDPM2Discrete", True),
    Sampler("KDPM2AncestralDiscrete", False),
    Sampler("DPMSolverMultistep", True),
    Sampler("DPMSolverMultistep, sde-dpmsolver++", False, {"algorithm_type": "sde-dpmsolver++"}),
    Sampler("DPMSolverSinglestep", True),
    Sampler("DPMSolverSDE", False),
    Sampler("UniPCMultistep", True),
    Sampler("DEISMultistep", True),
    Sampler("SASolver", False),
    # Its own limit is 50 steps, with which its networks are distilled.
    Sampler("TCD", False, {"original_inference_steps": 1000}),
    Sampler("TCD, eta=0", True, {"original_inference_steps": 1000}, {"eta": 0.0}),
]
PLOTTED = [OURS, "DDPM, fixed_small", "DDIM", "PNDM, skip_prk_steps", "LMSDiscrete", "HeunDiscrete"]
PLOTTED += ["DPMSolverMultistep", "UniPCMultistep, karras", "DEISMultistep"]


class PerfectUNet(ModelMixin, ConfigMixin):
    """
    E[e | x_t] of the mixture for each pixel, and Var[x_{t-1} | x_t] as the variance channel. `timesteps`: descending
    ones of a sampler that uses the variance, else empty.
    """

    def __init__(self, size: int, alphas_cumprod: torch.Tensor, timesteps: list[int]):
        super().__init__()
        self.register_to_config(in_channels=1, out_channels=2, sample_size=size, block_out_channels=(1,))
        self.dummy = torch.nn.Parameter(torch.zeros(1))  # tells the pipeline the dtype
        self.alphas_cumprod = alphas_cumprod.double()
        self.following = dict(itertools.pairwise(timesteps))
        self.calls = 0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: None = None) -> UNet2DOutput:
        self.calls += 1
        # Some solvers evaluate between two timesteps and expect log(sigma) to be linear there.
        t = float(timestep)
        low = min(int(t), len(self.alphas_cumprod) - 2)
        log_snr = torch.logit(self.alphas_cumprod[low : low + 2])
        alpha = torch.sigmoid(torch.lerp(log_snr[0], log_snr[1], t - low))

        x = sample.double().flatten()
        variances = alpha * STDS**2 + 1 - alpha
        residuals = x - alpha.sqrt() * MEANS
        given_x = torch.softmax(torch.log(WEIGHTS) - 0.5 * (residuals**2 / variances + variances.log()), dim=0)
        means = MEANS + alpha.sqrt() * STDS**2 / variances * residuals
        mean = (given_x * means).sum(0)
        epsilon = (x - alpha.sqrt() * mean) / (1 - alpha).sqrt()

        fraction = torch.zeros_like(epsilon)
        if self.following.get(t) is not None:
            variance = (given_x * (STDS**2 * (1 - alpha) / variances + means**2)).sum(0) - mean**2
            previous = self.alphas_cumprod[self.following[t]]
            beta = 1 - alpha / previous
            beta_tilde = beta * (1 - previous) / (1 - alpha)
            reverse = beta_tilde + previous * (beta / (1 - alpha)) ** 2 * variance
            fraction = 2 * torch.log(reverse / beta_tilde) / torch.log(beta / beta_tilde) - 1
        output = torch.stack([epsilon, fraction]).reshape(1, 2, *sample.shape[2:])
        return UNet2DOutput(sample=output.to(sample.dtype))


@functools.cache
def quantiles(number: int) -> torch.Tensor:
    """Quantiles (i + 1/2) / number of the mixture, by bisection."""
    wanted = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    low, high = torch.full_like(wanted, -10.0), torch.full_like(wanted, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((middle - MEANS) / STDS)).sum(0) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def wasserstein(samples: torch.Tensor) -> float:
    """2-Wasserstein distance of samples to the mixture."""
    return (samples.flatten().double().sort().values - quantiles(samples.numel())).square().mean().sqrt().item()


def noise_floor(number: int, draws: int = 20) -> tuple[float, float]:
    """Mean and largest distance of exact samples, over `draws` repetitions."""
    generator, distances = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        modes = torch.multinomial(WEIGHTS[:, 0], number, replacement=True, generator=generator)
        noise = torch.randn(number, generator=generator, dtype=torch.float64)
        distances.append(wasserstein(MEANS[modes, 0] + STDS[modes, 0] * noise))
    return sum(distances) / draws, max(distances)


def measure(sampler: Sampler, schedule: str, samples: int, steps: int, spacing: str, **extra: Any) -> tuple[float, int]:
    """2-Wasserstein distance and network calls; NaN if the sampler cannot take so many steps."""
    number = GRID if sampler.deterministic else samples
    side = math.isqrt(number)
    scheduler = LearnedVarianceDDPMScheduler(
        beta_schedule=SCHEDULES[schedule], timestep_spacing=spacing, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist() if sampler.scheduler == OURS else []
    unet = PerfectUNet(side, scheduler.alphas_cumprod, timesteps)
    if sampler.scheduler != OURS:
        cls = getattr(diffusers, f"{sampler.scheduler}Scheduler")
        scheduler = cls.from_config(scheduler.config, **sampler.config, **extra)
    pipe = quiet(ADMPipeline(unet, scheduler, None, None, None, None))
    grid = torch.special.ndtri((torch.arange(number, dtype=torch.float64) + 0.5) / number).float()
    options = {"latents": grid.reshape(1, 1, side, side), "generator": torch.Generator().manual_seed(0)}
    try:
        images = pipe(num_inference_steps=steps, output_type="latent", **options, **sampler.call).images
    except ValueError:
        return math.nan, 0
    return wasserstein(images), unet.calls


def cell(error: float) -> str:
    """An error in thousandths."""
    if not math.isfinite(error):
        return "fails"
    return f"{1000 * error:.1f}" if error < 0.01 else f"{1000 * error:.0f}" if error < 10 else "> 9999"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def steps_table(samplers: list[Sampler], schedule: str, samples: int) -> dict[str, list[tuple[int, float]]]:
    """Prints errors by number of steps; returns (network calls, error) by sampler."""
    rows, curves = [], {}
    for sampler in samplers:
        variants = {sampler.label: {}}
        if sampler.scheduler in ("DPMSolverMultistep", "UniPCMultistep"):
            variants[f"{sampler.label}, karras"] = KARRAS
        spacing = "linspace" if sampler.scheduler in BETTER_WITH_LINSPACE else "leading"
        for label, extra in variants.items():
            results = [measure(sampler, schedule, samples, steps, spacing, **extra) for steps in STEPS]
            curves[label] = [(calls, error) for error, calls in results]
            offset = results[2][1] - STEPS[2]
            calls = {0: "n", STEPS[2] - 1: "2n - 1"}.get(offset, f"n + {offset}")
            kind = "deterministic" if sampler.deterministic else "stochastic"
            rows.append([label, kind, spacing, calls, *(cell(error) for error, _ in results)])
    print_table(["sampler", "", "spacing", "network calls", *(f"n = {n}" for n in STEPS)], rows)
    return curves


def spacing_table(samplers: list[Sampler], schedule: str, samples: int) -> None:
    columns = {spacing: {"spacing": spacing} for spacing in ("leading", "linspace", "trailing")}
    columns["linspace, karras"] = {"spacing": "linspace", **KARRAS}
    rows = []
    for sampler in samplers:
        cls = getattr(diffusers, "DDPMScheduler" if sampler.scheduler == OURS else f"{sampler.scheduler}Scheduler")
        known = cls._get_init_keys(cls) - ({"timestep_spacing"} if sampler.scheduler == "TCD" else set())
        row = [sampler.label]
        for options in columns.values():
            takes = (KARRAS.keys() if KARRAS.keys() <= options.keys() else {"timestep_spacing"}) <= known
            row.append(cell(measure(sampler, schedule, samples, SPACING_STEPS, **options)[0]) if takes else "")
        if any(row[1:]):
            rows.append(row)
    print_table(["sampler", *columns], rows)


def plot(curves: dict[str, dict[str, list[tuple[int, float]]]], floor: float, path: str) -> None:
    figure = Figure(figsize=(5.6 * len(curves), 4.6), layout="tight")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (schedule, lines) in zip(panels, curves.items(), strict=True):
        for label in (label for label in PLOTTED if label in lines):
            calls, errors = zip(*lines[label], strict=True)
            stochastic = label.startswith(("DDPM", "Learned"))
            axes.plot(calls, errors, "--o" if stochastic else "-o", label=label, markersize=3.5, linewidth=1.3)
        axes.axhspan(1e-4, floor, color="0.9", zorder=0)
        axes.text(5, floor * 0.9, "noise floor of stochastic samplers", fontsize=7, va="top", color="0.4")
        axes.set(xscale="log", yscale="log", title=f"{schedule} schedule", xlabel="network calls")
        axes.set_ylim(3e-4, 0.5)
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("2-Wasserstein distance to the data")
    panels[-1].legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--samples", type=int, default=2**16, help="Samples of a stochastic sampler; a square.")
    parser.add_argument("--only", nargs="+", help="Samplers by their labels in the tables.")
    parser.add_argument("--plot", help="File for a plot of the first tables.")
    args = parser.parse_args()
    if math.isqrt(args.samples) ** 2 != args.samples:
        parser.error(f"--samples is {args.samples}; it must be a square number, such as {2**16}")

    warnings.filterwarnings("ignore")  # deprecations inside dependencies
    diffusers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    samplers = [sampler for sampler in SAMPLERS if not args.only or sampler.label in args.only]
    if not diffusers.utils.is_torchsde_available():
        print("DPMSolverSDE is skipped: it needs torchsde.\n")
        samplers = [sampler for sampler in samplers if sampler.scheduler != "DPMSolverSDE"]

    mean_floor, floor = noise_floor(args.samples)
    print("2-Wasserstein distance to the data, in thousandths.")
    print(f"Noise floor of stochastic samplers: {cell(mean_floor)}, up to {cell(floor)}.\n")
    curves = {}
    for schedule in args.schedules:
        print(f"### {schedule} schedule, n steps\n")
        curves[schedule] = steps_table(samplers, schedule, args.samples)
        print(f"### {schedule} schedule, {SPACING_STEPS} steps\n")
        spacing_table(samplers, schedule, args.samples)
    if args.plot:
        plot(curves, floor, args.plot)


if __name__ == "__main__":
    main()
