"""
Noise schedules: the betas that their names stand for, and whether two parts of a model were trained on the same one.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239), Nichol & Dhariwal 2021 (the cosine schedule,
https://huggingface.co/papers/2102.09672), Lin et al. 2023 (zero terminal SNR, https://huggingface.co/papers/2305.08891).

A network that sees noisy images works for the noise schedule that it was trained on, and for no other: at the same
timestep, another schedule means another amount of noise. So what is trained on noisy images carries a `noise_schedule`
in its config, and it is compared with the scheduler of the model that it is used with. What is compared is
`alphas_cumprod` (the papers' bar alpha_t) at every training timestep: neither names of schedules matter nor which of
the timesteps a sampler visits.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from diffusers import SchedulerMixin


BetaSchedule = Literal["linear", "scaled_linear", "quadratic", "squaredcos_cap_v2", "sigmoid"]
BETA_SCHEDULE_ALIASES = {"cosine": "squaredcos_cap_v2"}
# Largest beta of the cosine schedule (Improved DDPM, section 3.2).
MAX_COSINE_BETA = 0.999

# The entries that a noise schedule may have, under the names of schedulers' arguments.
NOISE_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# Where the file of a LoRA holds its noise schedule: in the adapter metadata, without the prefix of a component, such as
# `unet.`, under which diffusers reads the configuration of the adapter.
LORA_NOISE_SCHEDULE_KEY = "noise_schedule"
# diffusers' tables are float32. Each of the T factors of bar alpha adds a rounding of itself and one of the product, of
# 2**-24 each, so the relative error is at most T * 2**-23 (measured: less than a hundredth of that). For T = 1000 that
# is 1.2e-4; a linear schedule whose last beta is 0.1% larger is off by 5e-3.
FLOAT32_ERROR = 2.0**-23
# diffusers writes 2**-24 in place of 0 where x_T carries no signal.
LEAST_SIGNAL = 2.0**-23

HOW_TO_RECORD = (
    "if you know that it has, record it with `register_to_config(noise_schedule=noise_schedule_of(scheduler))`, from "
    "`diffusers_adm.schedulers.noise_schedules`, and save it again"
)
# Parts that have been reported as unchecked.
_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def make_betas(schedule: BetaSchedule, num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta_0 .. beta_{T-1} in float64. The cosine schedule does not look at `beta_start` and `beta_end`."""
    if schedule == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    # "scaled_linear" is the name in latent diffusion, "quadratic" that of DDPM's code: one formula.
    if schedule in ("scaled_linear", "quadratic"):
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    if schedule == "sigmoid":
        logits = np.linspace(-6, 6, num_train_timesteps, dtype=np.float64)
        return (beta_end - beta_start) / (1 + np.exp(-logits)) + beta_start
    # Improved DDPM, eq. 17: the ratio of neighbours of bar alpha(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
    times = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    alphas_cumprod = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], MAX_COSINE_BETA)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts sqrt(bar alpha) so that the last one is 0 (Lin et al. 2023, https://huggingface.co/papers/2305.08891)."""
    signal = np.sqrt(np.cumprod(1 - betas))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def noise_schedule_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    r"""
    The noise schedule of a scheduler, as the `noise_schedule` of a part that is trained with it.

    Args:
        scheduler ([`SchedulerMixin`]): `LearnedVarianceDDPMScheduler`, or one of diffusers with `alphas_cumprod`.

    Returns:
        `dict`: Those entries of its config that `alphas_cumprod` depends on, which JSON can hold:
        `num_train_timesteps`, and either `beta_schedule` (with `beta_start` and `beta_end`, unless it is
        `"squaredcos_cap_v2"`) or `trained_betas`; `rescale_betas_zero_snr` where it is on.

    Raises:
        ValueError: If the scheduler has no `alphas_cumprod`.
    """
    config, table = scheduler.config, _table_of(scheduler)
    if table is None:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which has no `alphas_cumprod` and so no noise schedule of "
            "this kind. Pass the scheduler that the model was trained with."
        )
    rescales = {"rescale_betas_zero_snr": True} if config.get("rescale_betas_zero_snr", False) else {}
    word = BETA_SCHEDULE_ALIASES.get(config.get("beta_schedule"), config.get("beta_schedule"))
    schedule = None
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64).tolist()
        schedule = {"num_train_timesteps": len(betas), "trained_betas": betas, **rescales}
    elif word in get_args(BetaSchedule):
        schedule = {"num_train_timesteps": config["num_train_timesteps"], "beta_schedule": word, **rescales}
        if word != "squaredcos_cap_v2":
            schedule |= {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if schedule is None or not is_same_noise(alphas_cumprod_of(schedule), table):
        # A schedule of another name, or a scheduler that does something of its own to its betas.
        betas = (1 - table / np.append(1.0, table[:-1])).tolist()
        schedule = {"num_train_timesteps": len(betas), "trained_betas": betas}
    return schedule


def alphas_cumprod_of(noise_schedule: Mapping[str, Any]) -> np.ndarray:
    r"""
    bar alpha of a noise schedule.

    Args:
        noise_schedule (mapping): As of [`noise_schedule_of`].

    Returns:
        `np.ndarray` of shape `(num_train_timesteps,)`: float64.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If it has unknown entries, or lacks some.
    """
    if not isinstance(noise_schedule, Mapping):
        raise TypeError(
            f"`noise_schedule` is {noise_schedule!r}; it must be a dictionary such as `noise_schedule_of(scheduler)`."
        )
    schedule = {name: value for name, value in noise_schedule.items() if value is not None}
    schedule["beta_schedule"] = BETA_SCHEDULE_ALIASES.get(
        schedule.get("beta_schedule"), schedule.get("beta_schedule", "linear")
    )
    has_betas = "trained_betas" in schedule
    is_cosine = schedule["beta_schedule"] == "squaredcos_cap_v2"
    needed = () if has_betas else ("num_train_timesteps",) if is_cosine else NOISE_SCHEDULE_KEYS[:4]
    missing = [name for name in needed if name not in schedule]
    unknown = [name for name in schedule if name not in NOISE_SCHEDULE_KEYS]
    if missing or unknown or schedule["beta_schedule"] not in get_args(BetaSchedule):
        raise ValueError(
            f"`noise_schedule` is {dict(noise_schedule)}, which is not understood: it must hold `num_train_timesteps` "
            f"and a `beta_schedule` of {list(get_args(BetaSchedule))}, with `beta_start` and `beta_end`, or "
            "`trained_betas`. `noise_schedule_of(scheduler)` gives that of a scheduler."
        )
    if has_betas:
        betas = np.asarray(schedule["trained_betas"], dtype=np.float64)
    else:
        betas = make_betas(
            schedule["beta_schedule"],
            schedule["num_train_timesteps"],
            schedule.get("beta_start", 0.0),
            schedule.get("beta_end", 0.0),
        )
    if schedule.get("rescale_betas_zero_snr"):
        betas = rescale_zero_terminal_snr(betas)
    return np.cumprod(1 - betas)


def _table_of(scheduler: SchedulerMixin) -> np.ndarray | None:
    """bar alpha of a scheduler, in float64; `None` for one that has none (flow matching, EDM, ...)."""
    table = getattr(scheduler, "alphas_cumprod", None)
    return None if table is None else table.detach().cpu().double().numpy()


def describe_noise_schedule(noise_schedule: Mapping[str, Any]) -> str:
    """In words, for messages."""
    if not noise_schedule:
        return "of clean images"
    if noise_schedule.get("trained_betas") is not None:
        text = f"of {len(noise_schedule['trained_betas'])} trained betas"
    else:
        text = f"{noise_schedule.get('beta_schedule')}"
        if noise_schedule.get("beta_start") is not None:
            text += f" from {noise_schedule['beta_start']} to {noise_schedule.get('beta_end')}"
        text += f" with {noise_schedule.get('num_train_timesteps')} timesteps"
    return f"{text}, rescaled to no signal at the end" if noise_schedule.get("rescale_betas_zero_snr") else text


def is_same_noise(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two tables of bar alpha, one or both of them computed in float32, are those of one noise schedule."""
    tolerance = len(first) * FLOAT32_ERROR
    return len(first) == len(second) and np.allclose(first, second, rtol=tolerance, atol=LEAST_SIGNAL)


def check_same_noise(
    name: str,
    noise_schedule: Mapping[str, Any] | None,
    scheduler: SchedulerMixin,
    part: object | None = None,
    how_to_record: str = HOW_TO_RECORD,
) -> None:
    r"""
    Raises a `ValueError` if a part of a model was trained on another noise schedule than that of the scheduler. It
    takes about a tenth of a millisecond: to be called once a call, not in each step.

    Args:
        name (`str`): What messages call the part.
        noise_schedule (mapping, *optional*): What it was trained on, as of [`noise_schedule_of`]; empty: clean images.
            `None`: not known. Nothing is compared then, and a warning says so once for each `part`.
        scheduler ([`SchedulerMixin`]): Of the model. One without `alphas_cumprod` is not compared.
        part (`object`, *optional*): The part itself. `None`: the warning is repeated in each call.
        how_to_record (`str`, *optional*): What the warning recommends.

    Raises:
        TypeError: If `noise_schedule` is no mapping.
        ValueError: If they differ, the part was trained on clean images, or `noise_schedule` is not understood.
    """
    if noise_schedule is None:
        if part is None or part not in _reported:
            if part is not None:
                _reported.add(part)
            logging.getLogger(__name__).warning(
                f"{name} does not say which noise schedule it was trained on, so it is not known whether `scheduler` "
                f"has the same one; {how_to_record}."
            )
        return
    if isinstance(noise_schedule, Mapping) and not noise_schedule:
        raise ValueError(
            f"{name} was trained on clean images, so it cannot be used on the noisy ones of sampling. Use one that was "
            "trained on the noise schedule of this model."
        )
    own = _table_of(scheduler)
    if own is None:
        return
    expected = alphas_cumprod_of(noise_schedule)
    if is_same_noise(expected, own):
        return
    difference = ""
    if len(own) == len(expected):
        t = int(np.abs(own - expected).argmax())
        difference = f" At timestep {t}, `alphas_cumprod` is {expected[t]:.4g} there and {own[t]:.4g} here."
    raise ValueError(
        f"{name} was trained on the noise schedule {describe_noise_schedule(noise_schedule)}, but `scheduler`, a "
        f"{type(scheduler).__name__}, has the noise schedule {describe_noise_schedule(noise_schedule_of(scheduler))}."
        f"{difference} If that is not the schedule of the model, make the scheduler from the config of the model's own "
        "one (`from_config`). Otherwise use a part that was trained on the schedule of the model."
    )
