"""
Noise schedules: the betas behind each name, and whether two networks were trained on the same schedule.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239), Nichol & Dhariwal 2021 (the cosine schedule,
https://huggingface.co/papers/2102.09672), Lin et al. 2023 (zero terminal SNR, https://huggingface.co/papers/2305.08891).

A network trained on noisy images works with its own noise schedule only: under another one, the same timestep means a
different amount of noise. Classifiers, ControlNets, upsamplers and LoRAs therefore carry a `noise_schedule` in their
config, which is compared with the scheduler they are used with. The comparison is between the values of
`alphas_cumprod` (the papers' bar alpha_t) at all training timesteps, so neither the names of schedules nor the
timesteps that a sampler visits matter.

To add a noise schedule, extend `BetaSchedule` and `make_betas`.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from diffusers import SchedulerMixin


BetaSchedule = Literal["linear", "scaled_linear", "quadratic", "squaredcos_cap_v2", "sigmoid"]
# What arguments accept. Configs store the name that diffusers uses.
BetaScheduleName = Literal[BetaSchedule, "cosine"]
BETA_SCHEDULE_ALIASES = {"cosine": "squaredcos_cap_v2"}
# Largest beta of the cosine schedule (Improved DDPM, section 3.2).
MAX_COSINE_BETA = 0.999

# The entries of a `noise_schedule`, named like the arguments of schedulers.
NOISE_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# Key of the noise schedule in the metadata of a LoRA file. It has no prefix of a component, such as `unet.`, because
# diffusers reads the adapter's own configuration from keys with one.
LORA_NOISE_SCHEDULE_KEY = "noise_schedule"
# diffusers' tables are float32. Each of the T factors of bar alpha is rounded, and so is each product, by 2**-24 at
# most, so the relative error is at most T * 2**-23 (measured: less than a hundredth of that). For T = 1000 that is
# 1.2e-4; a linear schedule whose last beta is 0.1% larger differs by 5e-3.
FLOAT32_ERROR = 2.0**-23
# Where x_T carries no signal, diffusers stores 2**-24 instead of 0.
LEAST_SIGNAL = 2.0**-23

HOW_TO_RECORD = (
    "if you know that it has, record it with `register_to_config(noise_schedule=noise_schedule_of(scheduler))`, from "
    "`diffusers_adm.schedulers.noise_schedules`, and save it again"
)
# Networks whose missing noise schedule has been reported.
_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def unknown_choice(name: str, value: object, choices: object, hint: str = "") -> ValueError:
    """Returns the error for a `value` of the argument `name` that is not among the `choices`, a `Literal`."""
    return ValueError(f"`{name}` is {value!r}; it must be one of {list(get_args(choices))}.{hint}")


def make_betas(schedule: BetaScheduleName, num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Returns beta_0 .. beta_{T-1} in float64. The cosine schedule ignores `beta_start` and `beta_end`."""
    if schedule == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    # One formula: "scaled_linear" is its name in latent diffusion, "quadratic" in the code of DDPM.
    if schedule in ("scaled_linear", "quadratic"):
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    if schedule == "sigmoid":
        logits = np.linspace(-6, 6, num_train_timesteps, dtype=np.float64)
        return (beta_end - beta_start) / (1 + np.exp(-logits)) + beta_start
    if schedule in ("squaredcos_cap_v2", "cosine"):
        # Improved DDPM, eq. 17: the ratio of successive bar alpha(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
        times = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
        alphas_cumprod = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], MAX_COSINE_BETA)
    raise unknown_choice("beta_schedule", schedule, BetaScheduleName)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(bar alpha) so that the last one is 0 and the first one stays (Lin et al. 2023)."""
    signal = np.sqrt(np.cumprod(1 - betas))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def noise_schedule_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    r"""
    Returns the noise schedule of a scheduler, to be stored as the `noise_schedule` of a network trained with it.

    Args:
        scheduler ([`SchedulerMixin`]): `LearnedVarianceDDPMScheduler`, or one of diffusers with `alphas_cumprod`.

    Returns:
        `dict`: The config entries that determine `alphas_cumprod`, as JSON values: `num_train_timesteps`, and either
        `beta_schedule` (with `beta_start` and `beta_end`, unless it is `"squaredcos_cap_v2"`) or `trained_betas`;
        `rescale_betas_zero_snr` only if it is on.

    Raises:
        ValueError: If the scheduler has no `alphas_cumprod`.
    """
    config, table = scheduler.config, _table_of(scheduler)
    if table is None:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which has no `alphas_cumprod` and so no noise schedule of "
            "this kind. Pass the scheduler that the model was trained with."
        )
    name = BETA_SCHEDULE_ALIASES.get(config.get("beta_schedule"), config.get("beta_schedule"))
    schedule: dict[str, Any] = {"num_train_timesteps": len(table)}
    if config.get("trained_betas") is not None:
        schedule["trained_betas"] = np.asarray(config["trained_betas"], dtype=np.float64).tolist()
    elif name in get_args(BetaSchedule):
        schedule["beta_schedule"] = name
        if name != "squaredcos_cap_v2":
            schedule |= {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if config.get("rescale_betas_zero_snr"):
        schedule["rescale_betas_zero_snr"] = True
    if {"trained_betas", "beta_schedule"} & set(schedule) and is_same_noise(alphas_cumprod_of(schedule), table):
        return schedule
    # A schedule that has no name here, or a scheduler that modifies its betas.
    return {"num_train_timesteps": len(table), "trained_betas": (1 - table / np.append(1.0, table[:-1])).tolist()}


def alphas_cumprod_of(noise_schedule: Mapping[str, Any]) -> np.ndarray:
    """
    Returns bar alpha, `(num_train_timesteps,)` in float64, of a noise schedule; see [`noise_schedule_of`].

    Raises:
        TypeError: If `noise_schedule` is not a mapping.
        ValueError: If an entry is missing, or an entry or the name of the schedule is unknown.
    """
    if not isinstance(noise_schedule, Mapping):
        raise TypeError(
            f"`noise_schedule` is {noise_schedule!r}; it must be a dictionary such as `noise_schedule_of(scheduler)`."
        )
    schedule = {key: value for key, value in noise_schedule.items() if value is not None}
    name = schedule.get("beta_schedule", "linear")
    if "trained_betas" in schedule:
        needed = set()
    elif BETA_SCHEDULE_ALIASES.get(name, name) == "squaredcos_cap_v2":
        needed = {"num_train_timesteps"}
    else:
        needed = {"num_train_timesteps", "beta_start", "beta_end"}
    if needed - set(schedule) or set(schedule) - set(NOISE_SCHEDULE_KEYS) or name not in get_args(BetaScheduleName):
        raise ValueError(
            f"`noise_schedule` is {dict(noise_schedule)}, which is not understood: it must hold `num_train_timesteps` "
            f"and a `beta_schedule` of {list(get_args(BetaSchedule))}, with `beta_start` and `beta_end`, or "
            "`trained_betas`. `noise_schedule_of(scheduler)` gives that of a scheduler."
        )
    if "trained_betas" in schedule:
        betas = np.asarray(schedule["trained_betas"], dtype=np.float64)
    else:
        limits = schedule.get("beta_start", 0.0), schedule.get("beta_end", 0.0)
        betas = make_betas(name, schedule["num_train_timesteps"], *limits)
    if schedule.get("rescale_betas_zero_snr"):
        betas = rescale_zero_terminal_snr(betas)
    return np.cumprod(1 - betas)


def _table_of(scheduler: SchedulerMixin) -> np.ndarray | None:
    """Returns bar alpha of a scheduler in float64, or `None` if it has none (flow matching, EDM, ...)."""
    table = getattr(scheduler, "alphas_cumprod", None)
    return None if table is None else table.detach().cpu().double().numpy()


def describe_noise_schedule(noise_schedule: Mapping[str, Any]) -> str:
    """Describes a noise schedule in words, for messages."""
    if not noise_schedule:
        return "of clean images"
    if noise_schedule.get("trained_betas") is not None:
        text = f"of {len(noise_schedule['trained_betas'])} trained betas"
    else:
        text = f"{noise_schedule.get('beta_schedule')}"
        if noise_schedule.get("beta_start") is not None:
            text += f" from {noise_schedule['beta_start']} to {noise_schedule.get('beta_end')}"
        text += f" with {noise_schedule.get('num_train_timesteps')} timesteps"
    return f"{text}, rescaled to zero terminal SNR" if noise_schedule.get("rescale_betas_zero_snr") else text


def is_same_noise(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two tables of bar alpha, each computed in float32 or float64, belong to the same noise schedule."""
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
    Checks that a network was trained on the noise schedule of the scheduler it is used with. Takes about a tenth of a
    millisecond: call it once per pipeline call, not in each step.

    Args:
        name (`str`): The network's name in messages.
        noise_schedule (mapping, *optional*): The schedule it was trained on, see [`noise_schedule_of`]; empty for
            clean images. `None` means unknown: nothing is compared, and a warning says so once for each `part`.
        scheduler ([`SchedulerMixin`]): The scheduler. One without `alphas_cumprod` is not compared.
        part (`object`, *optional*): The network itself. `None`: the warning is repeated in each call.
        how_to_record (`str`, *optional*): The warning's advice.

    Raises:
        TypeError: If `noise_schedule` is not a mapping.
        ValueError: If the schedules differ, the network was trained on clean images, or `noise_schedule` is invalid.
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
            f"{name} was trained on clean images, so it cannot be used on the noisy images of sampling. Use one that "
            "was trained on the noise schedule of this model."
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
        difference = f" At timestep {t}, `alphas_cumprod` is {expected[t]:.6g} there and {own[t]:.6g} here."
    raise ValueError(
        f"{name} was trained on the noise schedule {describe_noise_schedule(noise_schedule)}, but `scheduler`, a "
        f"{type(scheduler).__name__}, has the noise schedule {describe_noise_schedule(noise_schedule_of(scheduler))}."
        f"{difference} If that is not the schedule of the model, make the scheduler with `from_config` from the config "
        "of the model's own scheduler. Otherwise use a network that was trained on the schedule of the model."
    )
