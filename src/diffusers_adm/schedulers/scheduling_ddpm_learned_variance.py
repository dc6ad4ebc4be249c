"""
LearnedVarianceDDPMScheduler: the Gaussian diffusion process of DDPM with a fixed or a learned reverse variance.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239), Song et al. 2020 (DDIM,
https://huggingface.co/papers/2010.02502), Nichol & Dhariwal 2021 (Improved DDPM,
https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021 (classifier guidance,
https://huggingface.co/papers/2105.05233).

Symbols: `alphas_cumprod` is the papers' bar alpha_t; beta_tilde_t is the variance of the posterior
q(x_{t-1} | x_t, x_0). Timesteps count from 0 and t = 0 is *one* step of noise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from .noise_schedules import BETA_SCHEDULE_ALIASES, BetaSchedule, make_betas, rescale_zero_terminal_snr


VarianceType = Literal["learned_range", "learned_log", "fixed_small", "fixed_large"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]

# Other words for the same: the `_log` ones differ in how diffusers computes the same number.
VARIANCE_TYPE_ALIASES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}
# What the network was trained on. `from_config` lets a class put its own default in place of what was not given; for
# these that would be another process (the default betas of some of diffusers' schedulers are Stable Diffusion's).
PROCESS_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# A probability below this is raised to it before its logarithm, as in the code of the papers.
MIN_PROBABILITY = 1e-12
# GLIDE's "fast27" before its last timestep is changed, https://github.com/openai/glide-text2im, `space_timesteps`.
FAST27_SECTIONS = (10, 10, 3, 2, 2)


def respaced_timesteps(num_train_timesteps: int, timestep_respacing: str | int | Sequence[int]) -> list[int]:
    r"""
    Timesteps that a shorter chain keeps, ascending (Improved DDPM, section 4; guided-diffusion's `timestep_respacing`).

    Args:
        num_train_timesteps (`int`): Length T of the full chain.
        timestep_respacing (`str`, `int` or list of `int`): `"250"` spreads 250 timesteps evenly, first and last
            included; `"10,10,15"` does so in each of three equal sections (earlier ones a step longer where T does not
            divide); `"ddim50"` takes every k-th timestep from 0, with the smallest integer k that gives 50; `"fast27"`
            is `"10,10,3,2,2"` with the third timestep from the end in place of the last (for GLIDE's upsamplers).

    Raises:
        ValueError: If no integer stride gives `ddimN`, a section is shorter than its count, or the form is another.
    """
    if isinstance(timestep_respacing, str) and timestep_respacing.startswith("ddim"):
        wanted = timestep_respacing.removeprefix("ddim")
        # ceil(T / stride) timesteps for each stride; ascending strides, so the smallest one is the last to be stored.
        strides = {math.ceil(num_train_timesteps / k): k for k in range(num_train_timesteps - 1, 0, -1)}
        if not wanted.isdecimal() or int(wanted) not in strides:
            target = int(wanted) if wanted.isdecimal() else 50
            nearest = sorted(strides, key=lambda n: abs(n - target))[:4]
            raise ValueError(
                f"`timestep_respacing` is {timestep_respacing!r}, but no integer stride through {num_train_timesteps} "
                f"timesteps takes {wanted or 'that many'} of them. Possible here: "
                f"{', '.join(f'ddim{n}' for n in sorted(nearest))}; or leave out 'ddim' for uneven strides."
            )
        return list(range(0, num_train_timesteps, strides[int(wanted)]))

    counts = FAST27_SECTIONS if timestep_respacing == "fast27" else timestep_respacing
    if isinstance(counts, str):
        counts = counts.split(",")
    elif isinstance(counts, (int, np.integer)):
        counts = [counts]
    try:
        counts = [int(count) if isinstance(count, str) else operator.index(count) for count in counts]
    except (TypeError, ValueError):
        counts = []
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(
            f"`timestep_respacing` is {timestep_respacing!r}. Pass a number of steps ('250'), one number per section "
            "('10,10,15'), 'ddimN' ('ddim50'), or 'fast27'."
        )
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = num_train_timesteps // len(counts) + (section < num_train_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"`timestep_respacing` is {timestep_respacing!r}: section {section + 1} of {len(counts)} holds {size} "
                f"of the {num_train_timesteps} timesteps, so {count} cannot be taken from it. Ask for {size} at most."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The sum is rounded at each addition, not `i * stride`: it lands on the published timesteps in every case.
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += size
    if timestep_respacing == "fast27":
        # At the noisiest timestep, a first step of DDIM leaves artefacts.
        timesteps[-1] = num_train_timesteps - 3
    return timesteps


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) elementwise, in nats."""
    # In this order, like the papers' code: where both are nearly the same, the order decides the last digits.
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(
    samples: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor
) -> torch.Tensor:
    r"""
    Log-probability in nats of 8-bit images under a Gaussian whose mass is collected in 256 bins (DDPM, eq. 13).

    Args:
        samples (`torch.Tensor`): 8-bit values scaled to [-1, 1]: `2 * k / 255 - 1`. The outer bins reach to infinity.
        mean, log_std (`torch.Tensor`): Of the Gaussian; same shape.
    """

    def cdf(x: torch.Tensor) -> torch.Tensor:
        # The tanh approximation (error below 2e-4) of the papers' code: their numbers of bits are reported with it.
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    centered, inverse_std = samples - mean, torch.exp(-log_std)
    cdf_plus = cdf(inverse_std * (centered + 1.0 / 255.0))
    cdf_minus = cdf(inverse_std * (centered - 1.0 / 255.0))
    probability = torch.where(samples < -0.999, cdf_plus, cdf_plus - cdf_minus)
    probability = torch.where(samples > 0.999, 1.0 - cdf_minus, probability)
    return torch.log(probability.clamp(min=MIN_PROBABILITY))


def check_floating_point(**samples: torch.Tensor | None) -> None:
    """
    Refuses images or noise of integers.

    Raises:
        TypeError: If images or noise, given by the names of their arguments, are no floating point numbers: results
            would be rounded to whole numbers.
    """
    for name, tensor in samples.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` is {tensor.dtype}; floating point numbers are needed, images scaled to [-1, 1]. Convert "
                "8-bit images by `images.float() / 127.5 - 1`."
            )


def mean_per_example(x: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: `(batch_size, ...)` to `(batch_size,)`."""
    return x.flatten(1).mean(dim=1)


class ChainEntries(NamedTuple):
    """
    What a chain knows about a timestep. Numbers for a timestep known on the host, else tensors `(batch_size, 1, ...)`.
    """

    sqrt_alphas_cumprod: float | torch.Tensor
    sqrt_one_minus_alphas_cumprod: float | torch.Tensor
    sqrt_recip_alphas_cumprod: float | torch.Tensor
    sqrt_recipm1_alphas_cumprod: float | torch.Tensor
    posterior_mean_coef1: float | torch.Tensor  # of x_0 in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7
    posterior_mean_coef2: float | torch.Tensor  # of x_t
    posterior_log_variance_clipped: float | torch.Tensor
    log_betas: float | torch.Tensor
    fixed_large_log_variance: float | torch.Tensor
    nonzero: float | torch.Tensor  # 0.0 at the last step of sampling, where no noise is added, else 1.0


class DDIMEntries(NamedTuple):
    """What a DDIM step takes beside [`ChainEntries`], for one eta."""

    sqrt_alphas_cumprod_prev: float | torch.Tensor
    sqrt_one_minus_alphas_cumprod: float | torch.Tensor
    std: float | torch.Tensor  # sigma, DDIM eq. 16
    direction: float | torch.Tensor  # of the predicted noise, DDIM eq. 12


class DiffusionChain:
    """
    Tables of a chain that keeps `timesteps` (ascending) of the full one: computed once, one upload a device.

    A timestep is looked up by its position in the chain. On a device, where checking would stall, one that the chain
    does not keep has a position behind the end, which is NaN in every table: it cannot pass for a number.
    """

    def __init__(self, full_alphas_cumprod: np.ndarray, timesteps: Sequence[int] | np.ndarray):
        self.timesteps = np.asarray(timesteps, dtype=np.int64)
        # A timestep's column in the tables; -1 for one that the chain does not keep.
        self.positions = np.full(len(full_alphas_cumprod), -1, dtype=np.int64)
        self.positions[self.timesteps] = np.arange(len(self.timesteps))

        alphas_cumprod = full_alphas_cumprod[self.timesteps]
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.betas = betas = 1 - alphas_cumprod / alphas_cumprod_prev
        one_minus = 1 - alphas_cumprod
        posterior_variance = betas * (1 - alphas_cumprod_prev) / one_minus
        # beta_tilde is 0 at the first step and its logarithm is needed for the decoder: the next one stands in, as in
        # the papers' code. A chain of a single step has no next one; beta itself is the only variance there.
        first = posterior_variance[1] if len(betas) > 1 else betas[0]
        with np.errstate(divide="ignore"):  # bar alpha_T = 0 with zero terminal SNR; those entries are not used then
            recip = 1 / alphas_cumprod
        tables = {
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(one_minus),
            "sqrt_recip_alphas_cumprod": np.sqrt(recip),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
            "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / one_minus,
            "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / one_minus,
            "posterior_log_variance_clipped": np.log(np.append(first, posterior_variance[1:])),
            "log_betas": np.log(betas),
            "fixed_large_log_variance": np.log(np.append(first, betas[1:])),
            "nonzero": (np.arange(len(betas)) > 0).astype(np.float64),
        }
        self._alphas_cumprod, self._alphas_cumprod_prev = alphas_cumprod, alphas_cumprod_prev
        # Each `(names, steps)`: of `ChainEntries` under `None`, of `DDIMEntries` under eta and dtype.
        self._tables: dict[tuple[float, torch.dtype] | None, np.ndarray] = {
            None: np.stack([tables[name] for name in ChainEntries._fields])
        }
        self._uploads: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def lookup(self, timestep: int | torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> ChainEntries:
        """Entries at `timestep`; tensors have `dtype` and as many dimensions as `like`."""
        return ChainEntries(*self._columns(None, timestep, like, dtype))

    def lookup_ddim(
        self, eta: float, timestep: int | torch.Tensor, like: torch.Tensor, dtype: torch.dtype
    ) -> DDIMEntries:
        """The same for DDIM, from tables that are computed once for each `eta`, *in* `dtype`."""
        if (eta, dtype) not in self._tables:
            # In the working precision and the order of guided-diffusion's code. At small t 1 - bar alpha loses digits
            # in float32; from tables of float64 guided samples came out different by up to 1%.
            precision = np.float32 if dtype == torch.float32 else np.float64
            alpha, alpha_prev = self._alphas_cumprod.astype(precision), self._alphas_cumprod_prev.astype(precision)
            # Betas below 1e-8 vanish in float32; where no noise is left before a step there is none in it.
            share = np.divide(1 - alpha_prev, 1 - alpha, out=np.zeros_like(alpha), where=alpha_prev < 1)
            std = eta * np.sqrt(share) * np.sqrt(1 - alpha / alpha_prev)
            tables = {
                "sqrt_alphas_cumprod_prev": np.sqrt(alpha_prev),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha),
                "std": std,
                # Rounding can leave a small negative number where eta = 1 takes all of the variance.
                "direction": np.sqrt(np.maximum(1 - alpha_prev - std**2, 0)),
            }
            self._tables[eta, dtype] = np.stack([tables[name] for name in DDIMEntries._fields])
        return DDIMEntries(*self._columns((eta, dtype), timestep, like, dtype))

    def _columns(
        self,
        key: tuple[float, torch.dtype] | None,
        timestep: int | torch.Tensor,
        like: torch.Tensor,
        dtype: torch.dtype,
    ) -> Sequence[float | torch.Tensor]:
        """From the tables `key`, one entry a name."""
        if isinstance(timestep, int):
            return self._tables[key][:, self.positions[timestep]].tolist()
        tables, positions = self.on_device(key, like.device)
        # `index_select` by a vector: indexing by a tensor without dimensions would read it on the host.
        columns = positions.index_select(0, timestep.reshape(-1))
        # All rows at once, however few are asked for: what costs time on a device is the number of operations.
        entries = tables.index_select(1, columns).to(dtype)
        return entries.reshape(len(tables), -1, *[1] * (like.ndim - 1)).unbind()

    def on_device(
        self, key: tuple[float, torch.dtype] | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(tables, positions)`: `(names, steps + 1)` with a last column of NaN, and `(num_train_timesteps,)`."""
        if (key, device) not in self._uploads:
            tables = torch.from_numpy(np.pad(self._tables[key], ((0, 0), (0, 1)), constant_values=np.nan))
            if device.type == "mps":  # which has no float64
                tables = tables.float()
            positions = np.where(self.positions < 0, len(self.timesteps), self.positions)
            self._uploads[key, device] = tables.to(device), torch.from_numpy(positions).to(device)
        return self._uploads[key, device]


class LearnedVarianceDDPMScheduler(SchedulerMixin, ConfigMixin):
    r"""
    DDPM with a fixed or learned variance: forward process, reverse step (ancestral or DDIM), distributions and bound.

    Configs go to and from diffusers' `DDPMScheduler` with `from_config`; arguments that both know have its names and
    defaults, except `variance_type`. What defines the process (betas, prediction, variance) counts as given in both
    directions; the rest (clipping, spacing) counts only where it was given. Tables are float64; results are at least
    float32 inside and have the dtype of the samples outside. Nothing in `step` waits for the device.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Length T of the full chain.
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02): First and last beta, literally
            (guided-diffusion multiplies both by `1000 / T`: for T = 4000 pass 0.000025 and 0.005).
        beta_schedule (`str`, defaults to `"linear"`): `"linear"`, `"scaled_linear"` (linear in sqrt(beta)),
            `"quadratic"` (the same under DDPM's name), `"squaredcos_cap_v2"` (cosine; also accepted as `"cosine"`) or
            `"sigmoid"`.
        trained_betas (list of `float`, *optional*): The betas themselves. Their number becomes `num_train_timesteps`.
        variance_type (`str`, defaults to `"learned_range"`): Variance of p(x_{t-1} | x_t).
            `"learned_range"`: `v log beta + (1 - v) log beta_tilde`, `v = (output + 1) / 2` (Improved DDPM, eq. 15);
            `"learned_log"`: the output is the log-variance; `"fixed_small"`: beta_tilde; `"fixed_large"`: beta.
        clip_sample (`bool`, defaults to `True`): Clip predicted x_0 to +-`clip_sample_range`.
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
        thresholding (`bool`, defaults to `False`): Dynamic thresholding of predicted x_0 instead of clipping (Imagen,
            https://huggingface.co/papers/2205.11487, section 2.3): a quantile of |x_0|, at least 1, becomes 1.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): That quantile, of each example.
        clip_sample_range (`float`, defaults to `1.0`): Largest |x_0| after clipping.
        sample_max_value (`float`, defaults to `1.0`): Largest threshold of dynamic thresholding.
        timestep_spacing (`str`, defaults to `"leading"`): How `num_inference_steps` timesteps are chosen: `"leading"`,
            `"linspace"` or `"trailing"`, as in `DDPMScheduler`.
        steps_offset (`int`, defaults to 0): Added to the timesteps of `"leading"`.
        rescale_betas_zero_snr (`bool`, defaults to `False`): Rescale the betas so that x_T carries no signal.

    Raises:
        ValueError: For an unknown word, betas outside (0, 1), or `rescale_betas_zero_snr` with epsilon prediction.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["LearnedVarianceDDPMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: VarianceType = "learned_range",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        beta_schedule = BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule)
        variance_type = VARIANCE_TYPE_ALIASES.get(variance_type, variance_type)
        if variance_type == "learned":
            raise ValueError(
                "`variance_type` is 'learned', which means a log-variance in guided-diffusion's code and a variance in "
                "diffusers'. Say 'learned_log' if the network predicts the log-variance, 'learned_range' if it "
                "interpolates between beta_tilde and beta (ADM, Improved DDPM)."
            )
        for name, value, choices in (
            ("beta_schedule", beta_schedule, get_args(BetaSchedule)),
            ("variance_type", variance_type, get_args(VarianceType)),
            ("prediction_type", prediction_type, get_args(PredictionType)),
            ("timestep_spacing", timestep_spacing, get_args(TimestepSpacing)),
        ):
            if value not in choices:
                hint = ""
                if name == "variance_type" and value is None:  # the default of several solvers of diffusers
                    hint = (
                        " The config of a solver need not say what the network predicts: pass "
                        "`variance_type='learned_range'` to `from_config` if it has twice as many output as input "
                        "channels, `variance_type='fixed_small'` otherwise."
                    )
                raise ValueError(f"`{name}` is {value!r}; it must be one of {list(choices)}.{hint}")
        settled = {"variance_type": variance_type, "beta_schedule": beta_schedule}
        if "_use_default_values" in self.config:  # not where all values were given, as in a saved config
            # Sorted: diffusers' order is that of a set, and two equal schedulers shall have equal configs.
            settled["_use_default_values"] = sorted(set(self.config["_use_default_values"]) - set(PROCESS_KEYS))
        self.register_to_config(**settled)

        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps}; it must be at least 1.")
        if trained_betas is not None:
            betas = np.asarray(trained_betas, dtype=np.float64)
            if betas.ndim != 1 or len(betas) == 0:
                raise ValueError(
                    f"`trained_betas` has shape {betas.shape}; pass a list with one beta for each timestep."
                )
            # diffusers' schedulers take betas of any number; here the config tells the number that results.
            num_train_timesteps = len(betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps)
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        # After a beta of 1 no signal is left and the tables are 0 / 0. (`rescale_betas_zero_snr` makes the last one 1.)
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"Betas must lie between 0 and 1; these reach from {betas.min()} to {betas.max()}.")
        if rescale_betas_zero_snr:
            if prediction_type == "epsilon":
                raise ValueError(
                    "`rescale_betas_zero_snr` leaves no signal in x_T, so x_0 cannot be computed from predicted noise "
                    "there. Use it with `prediction_type='v_prediction'` or `'sample'`."
                )
            betas = rescale_zero_terminal_snr(betas)
        self._alphas_cumprod = np.cumprod(1 - betas)
        # Read by training utilities of diffusers; float64, on the CPU.
        self.betas = torch.from_numpy(betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.from_numpy(self._alphas_cumprod)

        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._chains: dict[str, DiffusionChain] = {}
        self._full_chain = self._chain = DiffusionChain(self._alphas_cumprod, range(num_train_timesteps))
        self.timesteps = torch.from_numpy(self._chain.timesteps[::-1].copy())

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, but the config's process holds even where its class chose it by default (`PROCESS_KEYS`)."""
        if isinstance(config, dict):
            left_to_defaults = [k for k in config.get("_use_default_values", []) if k not in PROCESS_KEYS]
            config = {**config, "_use_default_values": left_to_defaults}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def has_learned_variance(self) -> bool:
        """Whether the network's output holds twice the channels of the sample: mean first, variance second."""
        return self.config.variance_type in ("learned_range", "learned_log")

    # Timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        timestep_respacing: str | int | Sequence[int] | None = None,
    ) -> None:
        r"""
        Chooses the timesteps that `step` walks through; training, `add_noise` and the bound keep to the full chain.

        Args:
            num_inference_steps (`int`, *optional*): That many, chosen by the config's `timestep_spacing`.
            device (`torch.device`, *optional*): Where `scheduler.timesteps` shall lie.
            timesteps (list of `int`, *optional*): Exactly these, descending.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): The published forms `"250"`, `"ddim50"`,
                `"10,10,15"`, `"fast27"`; see [`respaced_timesteps`].

        Raises:
            ValueError: Unless exactly one of the three is given, and for timesteps outside of the full chain.
        """
        given = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "timestep_respacing": timestep_respacing,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"Pass exactly one of {', '.join(f'`{name}`' for name in given)}; got {names or 'none'}.")

        total = self.config.num_train_timesteps
        if timestep_respacing is not None:
            chosen = respaced_timesteps(total, timestep_respacing)
        elif timesteps is not None:
            chosen = list(reversed(list(timesteps)))
            if any(t != int(t) for t in chosen):
                raise ValueError(f"`timesteps` is {timesteps}; it must hold integers.")
        else:
            if not 1 <= num_inference_steps <= total or num_inference_steps != int(num_inference_steps):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}; it must be an integer between 1 and the "
                    f"`num_train_timesteps` {total} of this scheduler."
                )
            num_inference_steps = int(num_inference_steps)
            if self.config.timestep_spacing == "linspace":
                chosen = np.linspace(0, total - 1, num_inference_steps).round()
            elif self.config.timestep_spacing == "leading":
                chosen = np.arange(num_inference_steps) * (total // num_inference_steps) + self.config.steps_offset
            else:
                # `arange` rounds ties (62.5 for 48 of 1000) as `DDPMScheduler` does, and like it appends a timestep of
                # -1 for some numbers of steps (61 of 1000): that one is cut off.
                descending = np.round(np.arange(total, 0, -total / num_inference_steps))[:num_inference_steps] - 1
                chosen = descending[::-1]
        ascending = np.asarray(chosen, dtype=np.int64)
        if len(ascending) == 0 or ascending[0] < 0 or ascending[-1] >= total or (np.diff(ascending) <= 0).any():
            raise ValueError(
                f"`{names[0]}` asks for the timesteps {ascending[::-1].tolist()}; they must descend, without "
                f"repetition, within 0 and {total - 1}."
            )
        self._chain = DiffusionChain(self._alphas_cumprod, ascending)
        self.num_inference_steps = len(ascending)
        self.timesteps = torch.from_numpy(ascending[::-1].copy()).to(device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """
        The timestep that `step` reaches from `timestep`; -1 is the clean sample. A tensor for a tensor of one element,
        which is read on the host.
        """
        position = self._chain.positions[self._host_timestep(timestep, self._chain)]
        previous = int(self._chain.timesteps[position - 1]) if position > 0 else -1
        return torch.full_like(timestep, previous) if torch.is_tensor(timestep) else previous

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: this process does not scale what the network sees. Schedulers of diffusers may."""
        return sample

    def _host_timestep(self, timestep: int | torch.Tensor, chain: DiffusionChain) -> int:
        if int(timestep) != timestep:
            raise ValueError(f"`timestep` is {timestep}; timesteps of this process are integers.")
        timestep = int(timestep)
        if not 0 <= timestep < len(chain.positions):
            raise ValueError(
                f"`timestep` is {timestep}; timesteps are numbers of the full chain, 0 to {len(chain.positions) - 1}."
            )
        if chain.positions[timestep] < 0:
            raise ValueError(
                f"`timestep` is {timestep}, which is not one of the {len(chain.timesteps)} timesteps chosen by "
                "`set_timesteps` (or by `timestep_respacing`). Take them from `scheduler.timesteps`."
            )
        return timestep

    def _check_timesteps(
        self, timestep: int | torch.Tensor, chain: DiffusionChain, sample: torch.Tensor
    ) -> int | torch.Tensor:
        """An `int` where the host knows one timestep for all, else a tensor `(batch_size,)` or `()` on the device."""
        if not torch.is_tensor(timestep):
            return self._host_timestep(timestep, chain)
        if timestep.is_floating_point():
            raise ValueError(f"`timestep` is of type {timestep.dtype}; timesteps of this process are integers.")
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)} for {sample.shape[0]} examples. Pass one number, or one "
                "for each example."
            )
        if timestep.device.type == "cpu":  # reading it costs nothing; on another device it would stall
            if timestep.numel() == 1:
                return self._host_timestep(int(timestep), chain)
            for value in timestep.unique().tolist():
                self._host_timestep(int(value), chain)
        return timestep.to(device=sample.device, dtype=torch.long)

    def _chain_for(self, timestep_respacing: str | int | Sequence[int] | None) -> DiffusionChain:
        if timestep_respacing is None:
            return self._full_chain
        key = str(timestep_respacing)
        if key not in self._chains:
            timesteps = respaced_timesteps(self.config.num_train_timesteps, timestep_respacing)
            self._chains[key] = DiffusionChain(self._alphas_cumprod, timesteps)
        return self._chains[key]

    # The forward process

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        r"""
        Draws x_t from q(x_t | x_0) = N(sqrt(bar alpha_t) x_0, (1 - bar alpha_t) I) (DDPM, eq. 4).

        Args:
            original_samples, noise (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0 and standard normal
                noise.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Of the full chain; 0 is one step.

        Raises:
            TypeError: For samples or noise that are no floating point numbers.
        """
        check_floating_point(original_samples=original_samples, noise=noise)
        signal, std = self._signal_and_std(original_samples, timesteps)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        return (signal * original_samples.to(dtype) + std * noise.to(dtype)).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """v = sqrt(bar alpha) noise - sqrt(1 - bar alpha) `sample` (https://huggingface.co/papers/2202.00512)."""
        check_floating_point(sample=sample, noise=noise)
        signal, std = self._signal_and_std(sample, timesteps)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return (signal * noise.to(dtype) - std * sample.to(dtype)).to(sample.dtype)

    def _signal_and_std(
        self, sample: torch.Tensor, timesteps: int | torch.Tensor
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        timesteps = self._check_timesteps(timesteps, self._full_chain, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        entries = self._full_chain.lookup(timesteps, sample, dtype)
        return entries.sqrt_alphas_cumprod, entries.sqrt_one_minus_alphas_cumprod

    def signal_to_noise_ratio(self, timesteps: torch.Tensor) -> torch.Tensor:
        """bar alpha / (1 - bar alpha) at `timesteps` `(batch_size,)` of the full chain: `(batch_size,)`, float32."""
        entries = self._full_chain.lookup(timesteps, like=timesteps, dtype=torch.float32)
        return torch.as_tensor(entries.sqrt_alphas_cumprod / entries.sqrt_one_minus_alphas_cumprod).square()

    def posterior_distribution(
        self,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: int | torch.Tensor,
        *,
        timestep_respacing: str | int | Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Mean and log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7).

        Args:
            original_samples, noisy_samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0 and x_t.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Numbers of the full chain.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Of a shorter chain, which then must hold
                `timesteps`.

        Returns:
            `tuple` of `torch.Tensor`: Mean and natural log of the variance, both of the shape of the samples. At the
            first timestep, where the variance is 0, the log-variance is that of the second.
        """
        check_floating_point(original_samples=original_samples, noisy_samples=noisy_samples)
        chain = self._chain_for(timestep_respacing)
        timesteps = self._check_timesteps(timesteps, chain, noisy_samples)
        return self._posterior(chain, original_samples, noisy_samples, timesteps)

    def _posterior(
        self,
        chain: DiffusionChain,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: int | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(noisy_samples.dtype, torch.float32)
        at = chain.lookup(timesteps, noisy_samples, dtype)
        mean = at.posterior_mean_coef1 * original_samples.to(dtype) + at.posterior_mean_coef2 * noisy_samples.to(dtype)
        return mean, _expand(at.posterior_log_variance_clipped, mean)

    # The reverse process

    def predicted_distribution(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        clip_sample: bool | None = None,
        timestep_respacing: str | int | Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Mean and log-variance of p(x_{t-1} | x_t), and the x_0 that the mean is made from.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network;
                twice the channels of `sample` with a learned variance: mean first, variance second.
            timestep (`int` or `torch.LongTensor` of shape `()` or `(batch_size,)`): Numbers of the full chain.
            sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_t.
            clip_sample (`bool`, *optional*): `True`: clipping, `False`: neither clipping nor thresholding, whatever the
                config says; `None`: the config's.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Of a shorter chain.

        Returns:
            `tuple` of `torch.Tensor`: Mean, natural log of the variance, predicted x_0; the shape of `sample`, at least
            float32.

        Raises:
            ValueError: If `model_output` does not have the channels that `variance_type` needs.
        """
        check_floating_point(sample=sample)
        chain = self._chain_for(timestep_respacing)
        timestep = self._check_timesteps(timestep, chain, sample)
        return self._predict(chain, model_output, timestep, sample, clip_sample)

    def _predict(
        self,
        chain: DiffusionChain,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample = sample.to(dtype)
        prediction, variance_output = self.split_model_output(model_output, sample)
        at = chain.lookup(timestep, sample, dtype)
        pred_original_sample = self._predict_original_sample(at, prediction, sample, clip_sample)
        mean, log_variance = self._predict_mean_and_log_variance(at, pred_original_sample, variance_output, sample)
        return mean, log_variance, pred_original_sample

    def _predict_original_sample(
        self, at: ChainEntries, prediction: torch.Tensor, sample: torch.Tensor, clip_sample: bool | None
    ) -> torch.Tensor:
        prediction = prediction.to(sample.dtype)
        if self.config.prediction_type == "epsilon":
            pred_original_sample = at.sqrt_recip_alphas_cumprod * sample - at.sqrt_recipm1_alphas_cumprod * prediction
        elif self.config.prediction_type == "sample":
            pred_original_sample = prediction
        else:
            pred_original_sample = at.sqrt_alphas_cumprod * sample - at.sqrt_one_minus_alphas_cumprod * prediction
        if clip_sample is None or clip_sample:
            pred_original_sample = self._clip(pred_original_sample, force=clip_sample is True)
        return pred_original_sample

    def _predict_mean_and_log_variance(
        self,
        at: ChainEntries,
        pred_original_sample: torch.Tensor,
        variance_output: torch.Tensor | None,
        sample: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean = at.posterior_mean_coef1 * pred_original_sample + at.posterior_mean_coef2 * sample  # DDPM, eq. 7
        if self.config.variance_type == "learned_range":
            # In this order, like the papers' code: the bound is a difference of such logarithms, nearly the same ones.
            fraction = (variance_output.to(sample.dtype) + 1) / 2
            log_variance = fraction * at.log_betas + (1 - fraction) * at.posterior_log_variance_clipped
        elif self.config.variance_type == "learned_log":
            log_variance = variance_output.to(sample.dtype)
        elif self.config.variance_type == "fixed_small":
            log_variance = _expand(at.posterior_log_variance_clipped, mean)
        else:
            log_variance = _expand(at.fixed_large_log_variance, mean)
        return mean, log_variance

    def _epsilon(self, at: ChainEntries, original_sample: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The noise that leads from `original_sample` to `sample`."""
        if self.config.rescale_betas_zero_snr:  # x_T carries no signal: nothing can be divided by it
            return (sample - at.sqrt_alphas_cumprod * original_sample) / at.sqrt_one_minus_alphas_cumprod
        return (at.sqrt_recip_alphas_cumprod * sample - original_sample) / at.sqrt_recipm1_alphas_cumprod

    def split_model_output(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean channels, and variance channels where `variance_type` is learned (else None). Checks their number."""
        channels, expected = sample.shape[1], sample.shape[1] * (2 if self.has_learned_variance else 1)
        if model_output.shape != (sample.shape[0], expected, *sample.shape[2:]):
            learned = self.has_learned_variance
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)} for samples of shape {tuple(sample.shape)}, but "
                f"`variance_type={self.config.variance_type!r}` takes {expected} channels. "
                + (
                    f"For a model without learned variance pass `variance_type='fixed_small'`; for a learned one build "
                    f"it with `out_channels={expected}`."
                    if learned
                    else "For a model that predicts mean and variance pass `variance_type='learned_range'`."
                )
            )
        if self.has_learned_variance:
            return model_output[:, :channels], model_output[:, channels:]
        return model_output, None

    def _clip(self, pred_original_sample: torch.Tensor, force: bool = False) -> torch.Tensor:
        config = self.config
        if config.thresholding:
            # The quantile of each example, at least 1, so that what lies within [-1, 1] stays as it is.
            magnitude = pred_original_sample.abs().flatten(1)
            threshold = torch.quantile(magnitude, config.dynamic_thresholding_ratio, dim=1)
            threshold = threshold.clamp(min=1, max=config.sample_max_value)
            threshold = threshold.reshape(-1, *[1] * (pred_original_sample.ndim - 1))
            return pred_original_sample.clamp(-threshold, threshold) / threshold
        if config.clip_sample or force:
            return pred_original_sample.clamp(-config.clip_sample_range, config.clip_sample_range)
        return pred_original_sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float | None = None,
        guidance_gradient: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One step of the reverse process through the timesteps of `set_timesteps` (before it: through all of them).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network.
            timestep (`int` or `torch.LongTensor` of shape `()` or `(batch_size,)`): From `scheduler.timesteps`.
            sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_t.
            generator (`torch.Generator` or list of them, *optional*): Of the noise; a list holds one per example.
            eta (`float`, *optional*): `None`: ancestral sampling, x_{t-1} ~ p(x_{t-1} | x_t). A number: DDIM (eq. 12),
                0 is deterministic. As in guided-diffusion, its noise direction comes from the *clipped* x_0, and a
                learned variance is not used.
            guidance_gradient (`torch.Tensor`, *optional*): Gradient g of a log-likelihood with respect to x_t, scaled.
                Ancestral: shifts the mean by variance * g; DDIM: shifts the noise prediction by -sqrt(1 - bar alpha) g
                (ADM, algorithms 1 and 2).
            variance_noise (`torch.Tensor`, *optional*): Standard normal noise to use instead of drawing it.
            return_dict (`bool`, defaults to `True`): Return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            `DDPMSchedulerOutput` or `tuple`: `prev_sample` and `pred_original_sample`, in the dtype of `sample`.

        Raises:
            ValueError: For a timestep outside of the chain (known on the host only; on another device the result is NaN
                then), a wrong number of channels, or a negative `eta`.
        """
        chain = self._chain
        timestep = self._check_timesteps(timestep, chain, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        at = chain.lookup(timestep, sample, dtype)
        sample_in = sample.to(dtype)
        prediction, variance_output = self.split_model_output(model_output, sample)
        pred_original_sample = self._predict_original_sample(at, prediction, sample_in, None)

        if eta is None:
            mean, log_variance = self._predict_mean_and_log_variance(
                at, pred_original_sample, variance_output, sample_in
            )
            if guidance_gradient is not None:
                variance = torch.exp(log_variance)
                if self.config.variance_type == "fixed_small":
                    # beta_tilde is 0 at the last step; only its logarithm has the next one in its place.
                    variance = at.nonzero * variance
                mean = mean + variance * guidance_gradient.to(dtype)
            std = torch.exp(0.5 * log_variance)
        else:
            if eta < 0:
                raise ValueError(
                    f"`eta` is {eta}; it must not be negative (0: deterministic, 1: as much noise as DDPM)."
                )
            if guidance_gradient is not None and self.config.rescale_betas_zero_snr:
                raise ValueError(
                    "DDIM steps cannot take `guidance_gradient` with `rescale_betas_zero_snr`: x_T carries no signal, "
                    "so the shifted noise gives no x_0 there. Use ancestral steps (`eta=None`)."
                )
            ddim = chain.lookup_ddim(eta, timestep, sample, dtype)
            if guidance_gradient is not None:
                pred_epsilon = self._epsilon(at, pred_original_sample, sample_in)
                pred_epsilon = pred_epsilon - ddim.sqrt_one_minus_alphas_cumprod * guidance_gradient.to(dtype)
                pred_original_sample = (
                    at.sqrt_recip_alphas_cumprod * sample_in - at.sqrt_recipm1_alphas_cumprod * pred_epsilon
                )
            pred_epsilon = self._epsilon(at, pred_original_sample, sample_in)
            std = ddim.std
            mean = pred_original_sample * ddim.sqrt_alphas_cumprod_prev + ddim.direction * pred_epsilon  # DDIM, eq. 12

        prev_sample = mean
        # Drawn at the last step, too, which adds none: on a device the host does not know which step it is, and a
        # generator on the CPU must be left in the same state by both.
        if eta is None or eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
                )
            noise = std * variance_noise.to(dtype)
            if isinstance(at.nonzero, float):
                prev_sample = mean + noise if at.nonzero else mean
            else:
                prev_sample = mean + at.nonzero * noise
        prev_sample, pred_original_sample = prev_sample.to(sample.dtype), pred_original_sample.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    # The variational bound

    def variational_bound(
        self,
        model_output: torch.Tensor,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: int | torch.Tensor,
        *,
        clip_sample: bool | None = None,
        timestep_respacing: str | int | Sequence[int] | None = None,
    ) -> torch.Tensor:
        r"""
        The term of the bound at `timesteps` (Improved DDPM, eqs. 4 to 7): KL(q(x_{t-1} | x_t, x_0) ||
        p(x_{t-1} | x_t)), and at the first timestep -log p(x_0 | x_1) with the discretised decoder.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network.
            original_samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0: 8-bit values scaled to
                [-1, 1].
            noisy_samples (`torch.Tensor` of that shape): x_t.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Numbers of the full chain.
            clip_sample (`bool`, *optional*): As in `predicted_distribution`.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Of a shorter chain.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: In *bits per dimension*, at least float32. The sum over all
            timesteps plus [`~LearnedVarianceDDPMScheduler.prior_bits_per_dim`] bounds the bits per dimension of x_0.
        """
        check_floating_point(original_samples=original_samples, noisy_samples=noisy_samples)
        chain = self._chain_for(timestep_respacing)
        timesteps = self._check_timesteps(timesteps, chain, noisy_samples)
        true_mean, true_log_variance = self._posterior(chain, original_samples, noisy_samples, timesteps)
        mean, log_variance, _ = self._predict(chain, model_output, timesteps, noisy_samples, clip_sample)
        kl = mean_per_example(normal_kl(true_mean, true_log_variance, mean, log_variance))
        decoder = -mean_per_example(
            discretized_gaussian_log_likelihood(original_samples.to(mean.dtype), mean, 0.5 * log_variance)
        )
        first = int(chain.timesteps[0])
        if isinstance(timesteps, int):
            bound = decoder if timesteps == first else kl
        else:
            bound = torch.where(timesteps == first, decoder, kl)
        return bound / math.log(2.0)

    def prior_bits_per_dim(
        self, original_samples: torch.Tensor, *, timestep_respacing: str | int | Sequence[int] | None = None
    ) -> torch.Tensor:
        """
        KL(q(x_T | x_0) || N(0, I)) of `(batch_size, channels, ...)` samples: `(batch_size,)`, in bits per dimension,
        where T is the last timestep of the chain that `timestep_respacing` keeps. No network changes it.
        """
        check_floating_point(original_samples=original_samples)
        last = int(self._chain_for(timestep_respacing).timesteps[-1])
        signal, std = self._signal_and_std(original_samples, last)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        mean = signal * original_samples.to(dtype)
        zero = torch.zeros((), dtype=dtype, device=mean.device)
        kl = normal_kl(mean, torch.full_like(mean, 2 * math.log(std)), zero, zero)
        return mean_per_example(kl) / math.log(2.0)


def _expand(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value) if isinstance(value, float) else value.expand_as(like)
