"""
LearnedVarianceDDPMScheduler: the Gaussian diffusion process of DDPM with a fixed or a learned reverse variance.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239), Song et al. 2020 (DDIM,
https://huggingface.co/papers/2010.02502), Nichol & Dhariwal 2021 (Improved DDPM,
https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021 (ADM, classifier guidance,
https://huggingface.co/papers/2105.05233).

Symbols: `alphas_cumprod` is the papers' bar alpha_t; beta_tilde_t is the variance of the posterior
q(x_{t-1} | x_t, x_0). Timesteps count from 0 and t = 0 is *one* step of noise.

To add a sampler step, write a method like `_ddim_step` and choose it in `step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ..ops.integers import check_integer
from ..ops.values import (
    LARGEST,
    as_number,
    check_flag,
    check_generator,
    check_number,
    check_plain_tensor,
    describe,
)
from .diffusion_process import Coefficient, Coefficients, DDIMCoefficients, DiffusionProcess, Timesteps
from .gaussians import discretized_gaussian_log_likelihood, normal_kl
from .noise_schedules import (
    BETA_SCHEDULE_ALIASES,
    NOISE_SCHEDULE_KEYS,
    BetaSchedule,
    BetaScheduleName,
    make_betas,
    rescale_zero_terminal_snr,
    unknown_choice,
)
from .timestep_spacing import Respacing, TimestepSpacing, respaced_timesteps, spaced_timesteps


VarianceType = Literal["learned_range", "learned_log", "fixed_small", "fixed_large"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]

# diffusers' `_log` variants compute the same numbers in another way.
VARIANCE_TYPE_ALIASES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}
VARIANCE_TYPE_HINTS = {
    "learned": " 'learned' means a log-variance in guided-diffusion's code and a variance in diffusers'. Pass "
    "'learned_log' if the network predicts the log-variance, 'learned_range' if it interpolates between beta_tilde and "
    "beta (ADM, Improved DDPM).",
    # The default of several solvers of diffusers.
    None: " The config of a solver need not say what the network predicts: pass `variance_type='learned_range'` to "
    "`from_config` if it has twice as many output as input channels, `variance_type='fixed_small'` otherwise.",
}
# What the network was trained on. For other arguments that were not given, `from_config` lets the new class use its own
# default. For these, that would be another process: the default betas of some diffusers schedulers are Stable
# Diffusion's.
PROCESS_KEYS = (*NOISE_SCHEDULE_KEYS, "variance_type", "prediction_type")
# All arguments of diffusers' `UnCLIPScheduler`. It has no `timestep_spacing`: its steps are those of "linspace".
UNCLIP_KEYS = {
    "num_train_timesteps",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "beta_schedule",
}


# Of diffusion models in use: a few thousand. Tables of more would only fill memory.
MAX_TRAIN_TIMESTEPS = 1_000_000
# bar alpha, by whose root steps divide; the quotient must not overflow float32. (That of 10000 timesteps with the betas
# of 1000 is 1e-44.)
LEAST_SIGNAL = 1e-60


def as_betas(trained_betas: Any) -> np.ndarray:
    """A list of betas as float64; raises a `ValueError` for what is none, or too long."""
    try:
        betas = np.asarray(trained_betas, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`trained_betas` is {describe(trained_betas)}; pass a list of numbers: {error}.") from error
    if betas.size > MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"`trained_betas` holds {betas.size} numbers; the limit is {MAX_TRAIN_TIMESTEPS}.")
    return betas


def check_floating_point(**samples: torch.Tensor | None) -> None:
    """
    Checks images and noise, given by argument name.

    Raises:
        TypeError: For what is no tensor, and for integers: results would be rounded silently.
        ValueError: For sparse and complex tensors, for tensors without a dimension of channels or without values, and
            for incompatible shapes.
    """
    given = {name: tensor for name, tensor in samples.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` is {describe(tensor)}; pass a `torch.Tensor`.")
        if tensor.device.type != "meta":  # whose shapes are computed without values
            check_plain_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` is {tensor.dtype}; it must be floating point, with images scaled to [-1, 1]. Convert 8-bit "
                "images with `images.float() / 127.5 - 1`."
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    first = next(iter(shapes.values()))
    is_one = all(len(shape) == len(first) and _can_expand(shape, first) for shape in shapes.values())
    if not is_one or len(first) < 2 or 0 in first:
        raise ValueError(
            f"The shapes {shapes} are incompatible; pass tensors of one shape, (batch_size, channels, ...), none of "
            "its sides 0."
        )


def _can_expand(shape: Sequence[int], other: Sequence[int]) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(shape, other, strict=True))


def mean_per_example(x: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: `(batch_size, ...)` to `(batch_size,)`."""
    return x.flatten(1).mean(dim=1)


def _expand(value: Coefficient, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value) if isinstance(value, float) else value.expand_as(like)


class LearnedVarianceDDPMScheduler(SchedulerMixin, ConfigMixin):
    r"""
    DDPM with a fixed or learned variance: forward process, reverse step (ancestral or DDIM), distributions and bound.

    Converts to and from diffusers' `DDPMScheduler` with `from_config`. Shared arguments have the same names and
    defaults, except `variance_type`. Arguments that define the process (betas, prediction, variance) are kept in both
    directions; the others (clipping, spacing) only if they were given. Tables are float64; results are computed in at
    least float32 and returned in the dtype of the samples. `step` never waits for the device.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Number T of training timesteps.
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02): First and last beta, as they are
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
            https://huggingface.co/papers/2205.11487, section 2.3): a quantile of |x_0|, at least 1, is scaled to 1.
        dynamic_thresholding_ratio (`float`, defaults to `0.995`): That quantile, of each example.
        clip_sample_range (`float`, defaults to `1.0`): Largest |x_0| after clipping.
        sample_max_value (`float`, defaults to `1.0`): Largest threshold of dynamic thresholding.
        timestep_spacing (`str`, defaults to `"leading"`): How `num_inference_steps` timesteps are chosen: `"leading"`,
            `"linspace"` or `"trailing"`, as in `DDPMScheduler`.
        steps_offset (`int`, defaults to 0): Added to the timesteps of `"leading"`.
        rescale_betas_zero_snr (`bool`, defaults to `False`): Rescale the betas so that x_T carries no signal.
        float32_tables (`bool`, defaults to `False`): Compute tables in float32, as diffusers' `UnCLIPScheduler` does.
            Their rounding reaches 1e-3 in the first and the last step, but images are those of its pipelines.
            `from_config` sets it for the config of that scheduler.

    Raises:
        ValueError: For an unknown choice, betas outside (0, 1), or `rescale_betas_zero_snr` with epsilon prediction.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["LearnedVarianceDDPMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaScheduleName = "linear",
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
        float32_tables: bool = False,
    ):
        for name, text in (("beta_schedule", beta_schedule), ("variance_type", variance_type)):
            if not isinstance(text, str) and text is not None:  # lists have no hash, by which aliases are found
                raise ValueError(f"`{name}` is {describe(text)}; pass a string.")
        beta_schedule = BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule)
        variance_type = VARIANCE_TYPE_ALIASES.get(variance_type, variance_type)
        for name, value, choices in (
            ("beta_schedule", beta_schedule, BetaSchedule),
            ("variance_type", variance_type, VarianceType),
            ("prediction_type", prediction_type, PredictionType),
            ("timestep_spacing", timestep_spacing, TimestepSpacing),
        ):
            if value not in get_args(choices):
                hint = VARIANCE_TYPE_HINTS.get(value, "") if name == "variance_type" else ""
                raise unknown_choice(name, value, choices, hint)
        settled = {"variance_type": variance_type, "beta_schedule": beta_schedule}
        if "_use_default_values" in self.config:  # absent if all values were given, as in a saved config
            # Sorted, because diffusers' order is that of a set, and equal schedulers should have equal configs.
            settled["_use_default_values"] = sorted(set(self.config["_use_default_values"]) - set(PROCESS_KEYS))

        check_integer("num_train_timesteps", num_train_timesteps, 0, maximum=MAX_TRAIN_TIMESTEPS)
        check_integer("steps_offset", steps_offset, 0, maximum=MAX_TRAIN_TIMESTEPS)
        for name, number, low, high in (
            ("beta_start", beta_start, 0, 1),
            ("beta_end", beta_end, 0, 1),
            ("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1),
            ("clip_sample_range", clip_sample_range, 0, LARGEST),
            ("sample_max_value", sample_max_value, 1e-6, LARGEST),
        ):
            check_number(name, number, low, high)
        for name, flag in (
            ("clip_sample", clip_sample),
            ("thresholding", thresholding),
            ("rescale_betas_zero_snr", rescale_betas_zero_snr),
            ("float32_tables", float32_tables),
        ):
            check_flag(name, flag)
        if trained_betas is None:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            betas = as_betas(trained_betas)
        # After a beta of 1 no signal is left and the tables are 0 / 0. (`rescale_betas_zero_snr` makes the last one 1.)
        if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas < 1)).all():
            found = np.array2string(betas, threshold=6, max_line_width=1000)
            raise ValueError(
                f"The betas are {found}; they must be a list of one or more numbers between 0 and 1. Check "
                "`trained_betas`, or `num_train_timesteps`, `beta_start` and `beta_end`."
            )
        # diffusers' schedulers accept any number of betas; here the config tells how many there are.
        self.register_to_config(**settled, num_train_timesteps=len(betas))
        if rescale_betas_zero_snr:
            if prediction_type == "epsilon":
                raise ValueError(
                    "`rescale_betas_zero_snr` leaves no signal in x_T, so x_0 cannot be computed from predicted noise "
                    "there. Use it with `prediction_type='v_prediction'` or `'sample'`."
                )
            betas = rescale_zero_terminal_snr(betas)
        if float32_tables:
            betas = betas.astype(np.float32)  # all that follows from them has their precision
        self._rounded_betas = betas if float32_tables else None
        self._alphas_cumprod = np.cumprod(1 - betas)
        self._check_signal(bool(rescale_betas_zero_snr))
        # Read by training utilities of diffusers; on the CPU.
        self.betas = torch.from_numpy(betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.from_numpy(self._alphas_cumprod)

        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        # All timesteps, those of `set_timesteps`, and by `timestep_respacing`.
        self._full_process = self._process = self._process_of(range(len(betas)))
        self._respaced_processes: dict[str, DiffusionProcess] = {}
        self.timesteps = torch.from_numpy(self._process.timesteps[::-1].copy())

    def _check_signal(self, has_zero_snr: bool) -> None:
        """Raises a `ValueError` for betas so small or so large that steps would divide by 0 or overflow float32."""
        inner = self._alphas_cumprod[:-1] if has_zero_snr else self._alphas_cumprod
        if self._alphas_cumprod[0] >= 1 or (len(inner) and inner[-1] < LEAST_SIGNAL):
            raise ValueError(
                f"The betas leave a share of {self._alphas_cumprod[0]:g} of the signal in the first of "
                f"{len(self._alphas_cumprod)} timesteps, and of {inner[-1] if len(inner) else 0:g} in the last: steps "
                f"would divide by 0. It must fall from below 1 to at least {LEAST_SIGNAL:g}. Check `trained_betas`, or "
                "`num_train_timesteps`, `beta_start` and `beta_end`."
            )

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        Like that of diffusers, but keeps the `PROCESS_KEYS` of `config` even if they are its class's defaults. The
        config of an `UnCLIPScheduler` gets its timesteps and rounding, and all of its arguments are kept.
        """
        if isinstance(config, dict):
            left_to_defaults = [k for k in config.get("_use_default_values", []) if k not in PROCESS_KEYS]
            if {key for key in config if not key.startswith("_")} == UNCLIP_KEYS:
                config, left_to_defaults = {**config, "timestep_spacing": "linspace", "float32_tables": True}, []
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
        timestep_respacing: Respacing | None = None,
    ) -> None:
        r"""
        Chooses the timesteps that `step` visits. Training, `add_noise` and the bound keep using all of them.

        Args:
            num_inference_steps (`int`, *optional*): Their number; the config's `timestep_spacing` chooses them.
            device (`torch.device`, *optional*): The device of `scheduler.timesteps`.
            timesteps (list of `int`, *optional*): The timesteps themselves, descending.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): The published forms `"250"`, `"ddim50"`,
                `"10,10,15"`, `"fast27"`; see [`respaced_timesteps`].

        Raises:
            ValueError: Unless exactly one of the three is given, or for timesteps outside `[0, num_train_timesteps)`.
        """
        given = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "timestep_respacing": timestep_respacing,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"Pass exactly one of {', '.join(f'`{name}`' for name in given)}; got {names or 'none'}.")

        try:
            place = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"`device` is {describe(device)}, which torch does not know: {error}.") from error
        total = self.config.num_train_timesteps
        if timestep_respacing is not None:
            chosen = respaced_timesteps(total, timestep_respacing)
        elif timesteps is not None:
            chosen = [as_number(each) for each in timesteps][::-1]
            if not all(isinstance(each, Real) and abs(each) <= total for each in chosen):
                raise ValueError(
                    f"`timesteps` is {describe(timesteps)}; they must be integers that descend, without repetition, "
                    f"within 0 and {total - 1}."
                )
        else:
            num_inference_steps = as_number(num_inference_steps)
            is_number = isinstance(num_inference_steps, Real)
            if not is_number or not 1 <= num_inference_steps <= total or num_inference_steps % 1:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}; it must be an integer between 1 and the "
                    f"`num_train_timesteps` {total} of this scheduler."
                )
            spacing, offset = self.config.timestep_spacing, self.config.steps_offset
            chosen = spaced_timesteps(total, int(num_inference_steps), spacing, offset)
        wanted = np.asarray(chosen)
        ascending = wanted.astype(np.int64)
        is_sequence = len(wanted) > 0 and (ascending == wanted).all() and (np.diff(ascending) > 0).all()
        if not is_sequence or ascending[0] < 0 or ascending[-1] >= total:
            raise ValueError(
                f"`{names[0]}` asks for the timesteps {wanted[::-1].tolist()}; they must be integers that descend, "
                f"without repetition, within 0 and {total - 1}."
            )
        self._process = self._process_of(ascending)
        self.num_inference_steps = len(ascending)
        self.timesteps = torch.from_numpy(ascending[::-1].copy()).to(place)

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """
        The timestep that `step` goes to from `timestep`; -1 is the clean sample. For a tensor of one element, which is
        read on the host, it is a tensor.
        """
        previous = self._process.previous(timestep)
        return torch.full_like(timestep, previous) if torch.is_tensor(timestep) else previous

    def scale_model_input(self, sample: torch.Tensor, timestep: Timesteps | None = None) -> torch.Tensor:
        """Returns `sample`: this process does not scale the network's input, as some diffusers schedulers do."""
        return sample

    def _process_for(self, timestep_respacing: Respacing | None) -> DiffusionProcess:
        if timestep_respacing is None:
            return self._full_process
        key = str(timestep_respacing)
        if key not in self._respaced_processes:
            timesteps = respaced_timesteps(self.config.num_train_timesteps, timestep_respacing)
            self._respaced_processes[key] = self._process_of(timesteps)
        return self._respaced_processes[key]

    def _process_of(self, timesteps: Sequence[int] | np.ndarray) -> DiffusionProcess:
        return DiffusionProcess(self._alphas_cumprod, timesteps, self._rounded_betas)

    # The forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        r"""
        Draws x_t from q(x_t | x_0) = N(sqrt(bar alpha_t) x_0, (1 - bar alpha_t) I) (DDPM, eq. 4).

        Args:
            original_samples, noise (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0 and standard normal
                noise, floating point.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Training timesteps; 0 is one step.
        """
        check_floating_point(original_samples=original_samples, noise=noise)
        signal, std = self._signal_and_std(original_samples, timesteps)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        return (signal * original_samples.to(dtype) + std * noise.to(dtype)).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = sqrt(bar alpha) noise - sqrt(1 - bar alpha) `sample` (https://huggingface.co/papers/2202.00512)."""
        check_floating_point(sample=sample, noise=noise)
        signal, std = self._signal_and_std(sample, timesteps)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        return (signal * noise.to(dtype) - std * sample.to(dtype)).to(sample.dtype)

    def _signal_and_std(self, sample: torch.Tensor, timesteps: Timesteps) -> tuple[Coefficient, Coefficient]:
        timesteps = self._full_process.check(timesteps, sample)
        at = self._full_process.lookup(timesteps, sample)
        return at.sqrt_alphas_cumprod, at.sqrt_one_minus_alphas_cumprod

    def signal_to_noise_ratio(self, timesteps: torch.Tensor) -> torch.Tensor:
        """bar alpha / (1 - bar alpha) at training `timesteps` `(batch_size,)`: `(batch_size,)`, float32."""
        at = self._full_process.lookup(timesteps, like=timesteps)
        return torch.as_tensor(at.sqrt_alphas_cumprod / at.sqrt_one_minus_alphas_cumprod).square()

    def posterior_distribution(
        self,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: Timesteps,
        *,
        timestep_respacing: Respacing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Mean and log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7).

        Args:
            original_samples, noisy_samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0 and x_t.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Training timesteps.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Restrict the process to these timesteps,
                which must include `timesteps`.

        Returns:
            `tuple` of `torch.Tensor`: Mean and natural log of the variance, both of the shape of the samples. At the
            first timestep, where the variance is 0, the log-variance is that of the second.
        """
        check_floating_point(original_samples=original_samples, noisy_samples=noisy_samples)
        process = self._process_for(timestep_respacing)
        timesteps = process.check(timesteps, noisy_samples)
        dtype = torch.promote_types(noisy_samples.dtype, torch.float32)
        at = process.lookup(timesteps, noisy_samples)
        mean = at.posterior_mean_coef1 * original_samples.to(dtype) + at.posterior_mean_coef2 * noisy_samples.to(dtype)
        return mean, _expand(at.posterior_log_variance_clipped, mean)

    # The reverse process

    def predicted_distribution(
        self,
        model_output: torch.Tensor,
        timestep: Timesteps,
        sample: torch.Tensor,
        *,
        clip_sample: bool | None = None,
        timestep_respacing: Respacing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Mean and log-variance of p(x_{t-1} | x_t), and the x_0 from which the mean is computed.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network;
                twice the channels of `sample` with a learned variance: mean first, variance second.
            timestep (`int` or `torch.LongTensor` of shape `()` or `(batch_size,)`): Training timesteps.
            sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_t.
            clip_sample (`bool`, *optional*): `True`: clip. `False`: neither clip nor threshold. `None`: as the config
                says.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Restrict the process to these timesteps,
                which must include `timestep`.

        Returns:
            `tuple` of `torch.Tensor`: Mean, natural log of the variance, predicted x_0; the shape of `sample`, at least
            float32.
        """
        check_floating_point(sample=sample)
        process = self._process_for(timestep_respacing)
        timestep = process.check(timestep, sample)
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        prediction, variance_output = self.split_model_output(model_output, sample)
        at = process.lookup(timestep, sample)
        pred_original_sample = self._predict_original_sample(at, prediction, sample, clip_sample)
        mean, log_variance = self._predict_mean_and_log_variance(at, pred_original_sample, variance_output, sample)
        return mean, log_variance, pred_original_sample

    def split_model_output(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean channels, and variance channels if `variance_type` is learned (else `None`). Checks their number."""
        check_floating_point(sample=sample)
        if not isinstance(model_output, torch.Tensor):
            raise TypeError(f"`model_output` is {describe(model_output)}; pass a `torch.Tensor`.")
        channels, learned = sample.shape[1], self.has_learned_variance
        expected = 2 * channels if learned else channels
        if model_output.shape != (sample.shape[0], expected, *sample.shape[2:]):
            hint = (
                f"Pass `variance_type='fixed_small'` for a model without a learned variance, or build a model with "
                f"`out_channels={expected}`."
                if learned
                else "Pass `variance_type='learned_range'` for a model that predicts mean and variance."
            )
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)} for samples of shape {tuple(sample.shape)}, but "
                f"`variance_type={self.config.variance_type!r}` takes {expected} channels. {hint}"
            )
        return (model_output[:, :channels], model_output[:, channels:]) if learned else (model_output, None)

    def _predict_original_sample(
        self, at: Coefficients, prediction: torch.Tensor, sample: torch.Tensor, clip_sample: bool | None
    ) -> torch.Tensor:
        prediction, kind = prediction.to(sample.dtype), self.config.prediction_type
        if kind == "epsilon":
            pred_original_sample = at.sqrt_recip_alphas_cumprod * sample - at.sqrt_recipm1_alphas_cumprod * prediction
        elif kind == "sample":
            pred_original_sample = prediction
        elif kind == "v_prediction":
            pred_original_sample = at.sqrt_alphas_cumprod * sample - at.sqrt_one_minus_alphas_cumprod * prediction
        else:
            raise unknown_choice("prediction_type", kind, PredictionType)
        if clip_sample is None or clip_sample:
            pred_original_sample = self._clip(pred_original_sample, force=clip_sample is True)
        return pred_original_sample

    def _clip(self, pred_original_sample: torch.Tensor, force: bool) -> torch.Tensor:
        config = self.config
        if config.thresholding:
            # The quantile of each example, but at least 1, so that values within [-1, 1] do not change.
            magnitude = pred_original_sample.abs().flatten(1)
            threshold = torch.quantile(magnitude, config.dynamic_thresholding_ratio, dim=1)
            threshold = threshold.clamp(min=1, max=config.sample_max_value)
            threshold = threshold.reshape(-1, *[1] * (pred_original_sample.ndim - 1))
            return pred_original_sample.clamp(-threshold, threshold) / threshold
        if config.clip_sample or force:
            return pred_original_sample.clamp(-config.clip_sample_range, config.clip_sample_range)
        return pred_original_sample

    def _predict_mean_and_log_variance(
        self,
        at: Coefficients,
        pred_original_sample: torch.Tensor,
        variance_output: torch.Tensor | None,
        sample: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean = at.posterior_mean_coef1 * pred_original_sample + at.posterior_mean_coef2 * sample  # DDPM, eq. 7
        kind = self.config.variance_type
        if kind == "learned_range":
            # In the order of the papers' code: the bound is a difference of such logarithms, which are nearly equal.
            fraction = (variance_output.to(sample.dtype) + 1) / 2
            log_variance = fraction * at.log_betas + (1 - fraction) * at.posterior_log_variance_clipped
        elif kind == "learned_log":
            log_variance = variance_output.to(sample.dtype)
        elif kind == "fixed_small":
            log_variance = _expand(at.posterior_log_variance_clipped, mean)
        elif kind == "fixed_large":
            log_variance = _expand(at.fixed_large_log_variance, mean)
        else:
            raise unknown_choice("variance_type", kind, VarianceType)
        return mean, log_variance

    def _predict_epsilon(self, at: Coefficients, original_sample: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The noise with which `sample` is made from `original_sample`."""
        if self.config.rescale_betas_zero_snr:  # x_T carries no signal, so nothing can be divided by it
            return (sample - at.sqrt_alphas_cumprod * original_sample) / at.sqrt_one_minus_alphas_cumprod
        return (at.sqrt_recip_alphas_cumprod * sample - original_sample) / at.sqrt_recipm1_alphas_cumprod

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timesteps,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float | None = None,
        guidance_gradient: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One step of the reverse process through the timesteps of `set_timesteps` (before that, through all of them).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network.
            timestep (`int` or `torch.LongTensor` of shape `()` or `(batch_size,)`): From `scheduler.timesteps`.
            sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_t.
            generator (`torch.Generator` or list of them, *optional*): Source of the noise; a list holds one per
                example.
            eta (`float`, *optional*): `None`: ancestral sampling, x_{t-1} ~ p(x_{t-1} | x_t). A number: DDIM (eq. 12),
                0 is deterministic. As in guided-diffusion, its noise direction comes from the *clipped* x_0, and a
                learned variance is not used.
            guidance_gradient (`torch.Tensor`, *optional*): Scaled gradient g of a log-likelihood with respect to x_t.
                Ancestral: shifts the mean by variance * g; DDIM: shifts the noise prediction by -sqrt(1 - bar alpha) g
                (ADM, algorithms 1 and 2).
            variance_noise (`torch.Tensor`, *optional*): Standard normal noise to use instead of drawing it.
            return_dict (`bool`, defaults to `True`): Return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            `DDPMSchedulerOutput` or `tuple`: `prev_sample` and `pred_original_sample`, in the dtype of `sample`.

        Raises:
            ValueError: For a timestep that is not visited (on a device other than the CPU it is not read, and the
                result is NaN), a wrong number of channels, or a negative `eta`.
        """
        # 1. x_t and the coefficients of its timestep, in at least float32.
        check_floating_point(sample=sample, guidance_gradient=guidance_gradient, variance_noise=variance_noise)
        check_generator(generator)
        check_flag("return_dict", return_dict)
        if eta is not None:
            check_number("eta", eta)
        timestep = self._process.check(timestep, sample)
        x_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        at = self._process.lookup(timestep, x_t)
        gradient = None if guidance_gradient is None else guidance_gradient.to(x_t.dtype)

        # 2. Predicted x_0.
        prediction, variance_output = self.split_model_output(model_output, sample)
        x_0 = self._predict_original_sample(at, prediction, x_t, clip_sample=None)

        # 3. Mean and standard deviation of x_{t-1}. Guidance shifts the mean, and with DDIM x_0 as well.
        if eta is None:
            mean, std = self._ancestral_step(at, x_t, x_0, variance_output, gradient)
        elif eta >= 0:
            ddim = self._process.lookup_ddim(eta, timestep, x_t)
            mean, std, x_0 = self._ddim_step(at, ddim, x_t, x_0, gradient)
        else:
            raise ValueError(f"`eta` is {eta}; it must not be negative (0: deterministic, 1: as much noise as DDPM).")

        # 4. Noise. It is drawn in the last step as well, although not added: on a device the host does not know which
        # step it is, and a CPU generator must end in the same state in both cases.
        prev_sample = mean
        if eta is None or eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
                )
            noise = std * variance_noise.to(x_t.dtype)
            if isinstance(at.nonzero, float):
                prev_sample = mean + noise if at.nonzero else mean
            else:
                prev_sample = mean + at.nonzero * noise

        # 5. Back to the dtype of the sample.
        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def _ancestral_step(
        self,
        at: Coefficients,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        variance_output: torch.Tensor | None,
        gradient: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of p(x_{t-1} | x_t), with guidance as in ADM, algorithm 1."""
        mean, log_variance = self._predict_mean_and_log_variance(at, x_0, variance_output, x_t)
        if gradient is not None:
            variance = torch.exp(log_variance)
            if self.config.variance_type == "fixed_small":
                # beta_tilde is 0 at the last step; only its logarithm is replaced by that of the step before.
                variance = at.nonzero * variance
            mean = mean + variance * gradient
        return mean, torch.exp(0.5 * log_variance)

    def _ddim_step(
        self,
        at: Coefficients,
        ddim: DDIMCoefficients,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        gradient: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Coefficient, torch.Tensor]:
        """Mean (DDIM, eq. 12), standard deviation, and x_0 with guidance as in ADM, algorithm 2."""
        if gradient is not None:
            if self.config.rescale_betas_zero_snr:
                raise ValueError(
                    "DDIM steps cannot take `guidance_gradient` with `rescale_betas_zero_snr`: x_T carries no signal, "
                    "so the shifted noise gives no x_0 there. Use ancestral steps (`eta=None`)."
                )
            epsilon = self._predict_epsilon(at, x_0, x_t) - ddim.sqrt_one_minus_alphas_cumprod * gradient
            x_0 = at.sqrt_recip_alphas_cumprod * x_t - at.sqrt_recipm1_alphas_cumprod * epsilon
        epsilon = self._predict_epsilon(at, x_0, x_t)
        return x_0 * ddim.sqrt_alphas_cumprod_prev + ddim.direction * epsilon, ddim.std, x_0

    # The variational bound

    def variational_bound(
        self,
        model_output: torch.Tensor,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: Timesteps,
        *,
        clip_sample: bool | None = None,
        timestep_respacing: Respacing | None = None,
        num_levels: int | None = 256,
    ) -> torch.Tensor:
        r"""
        The term of the bound at `timesteps` (Improved DDPM, eqs. 4 to 7): KL(q(x_{t-1} | x_t, x_0) ||
        p(x_{t-1} | x_t)), and at the first timestep -log p(x_0 | x_1) with the discretised decoder.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, ...)`): Output of the network.
            original_samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0: values on `num_levels` levels
                scaled to [-1, 1].
            noisy_samples (`torch.Tensor` of that shape): x_t.
            timesteps (`int` or `torch.LongTensor` of shape `(batch_size,)`): Training timesteps.
            clip_sample (`bool`, *optional*): As in `predicted_distribution`.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): As in `posterior_distribution`.
            num_levels (`int`, *optional*, defaults to 256): Number of levels of the data: 256 for 8 bits. `None`: they
                are continuous; the first term is then -log *density* of the scaled values, and may be negative.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: In *bits per dimension*, at least float32. The sum over all
            timesteps plus [`~LearnedVarianceDDPMScheduler.prior_bits_per_dim`] bounds the bits per dimension of x_0.
        """
        check_floating_point(original_samples=original_samples, noisy_samples=noisy_samples)
        process = self._process_for(timestep_respacing)
        timesteps = process.check(timesteps, noisy_samples)
        true_mean, true_log_variance = self.posterior_distribution(
            original_samples, noisy_samples, timesteps, timestep_respacing=timestep_respacing
        )
        mean, log_variance, _ = self.predicted_distribution(
            model_output, timesteps, noisy_samples, clip_sample=clip_sample, timestep_respacing=timestep_respacing
        )
        kl = mean_per_example(normal_kl(true_mean, true_log_variance, mean, log_variance))
        decoder = -mean_per_example(
            discretized_gaussian_log_likelihood(original_samples.to(mean.dtype), mean, 0.5 * log_variance, num_levels)
        )
        first = int(process.timesteps[0])
        if isinstance(timesteps, int):
            bound = decoder if timesteps == first else kl
        else:
            bound = torch.where(timesteps == first, decoder, kl)
        return bound / math.log(2.0)

    def prior_bits_per_dim(
        self, original_samples: torch.Tensor, *, timestep_respacing: Respacing | None = None
    ) -> torch.Tensor:
        """
        KL(q(x_T | x_0) || N(0, I)) of `(batch_size, channels, ...)` samples: `(batch_size,)`, in bits per dimension.
        T is the last timestep that `timestep_respacing` keeps. It does not depend on the network.
        """
        check_floating_point(original_samples=original_samples)
        last = int(self._process_for(timestep_respacing).timesteps[-1])
        signal, std = self._signal_and_std(original_samples, last)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        mean = signal * original_samples.to(dtype)
        zero = torch.zeros((), dtype=dtype, device=mean.device)
        kl = normal_kl(mean, torch.full_like(mean, 2 * math.log(std)), zero, zero)
        return mean_per_example(kl) / math.log(2.0)
