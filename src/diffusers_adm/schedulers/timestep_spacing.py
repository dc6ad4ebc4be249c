"""
Timestep spacing: which of the training timesteps a sampler visits.

Respacing: Nichol & Dhariwal 2021 (Improved DDPM, https://huggingface.co/papers/2102.09672, section 4). The spacings of
`num_inference_steps` timesteps are diffusers' (Lin et al. 2023, https://huggingface.co/papers/2305.08891, table 2).

To add a spacing, extend `TimestepSpacing` and `spaced_timesteps`.
"""

import math
import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from .noise_schedules import unknown_choice


TimestepSpacing = Literal["linspace", "leading", "trailing"]
Respacing: TypeAlias = str | int | Sequence[int]

# GLIDE's "fast27" before its last timestep is changed, https://github.com/openai/glide-text2im, `space_timesteps`.
FAST27_SECTIONS = (10, 10, 3, 2, 2)


def spaced_timesteps(
    num_train_timesteps: int, num_inference_steps: int, spacing: TimestepSpacing, steps_offset: int = 0
) -> np.ndarray:
    """Returns `num_inference_steps` ascending timesteps as `DDPMScheduler` chooses them, as floating-point numbers."""
    if spacing == "linspace":
        return np.linspace(0, num_train_timesteps - 1, num_inference_steps).round()
    if spacing == "leading":
        return np.arange(num_inference_steps) * (num_train_timesteps // num_inference_steps) + steps_offset
    if spacing == "trailing":
        # `arange` rounds ties (62.5 for 48 of 1000) as `DDPMScheduler` does. It also appends a timestep of -1 for some
        # numbers of steps (61 of 1000), as there; that one is dropped.
        descending = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps))
        return descending[:num_inference_steps][::-1] - 1
    raise unknown_choice("timestep_spacing", spacing, TimestepSpacing)


def respaced_timesteps(num_train_timesteps: int, timestep_respacing: Respacing) -> list[int]:
    r"""
    Returns the timesteps that a respacing keeps, ascending (`timestep_respacing` of guided-diffusion).

    Args:
        num_train_timesteps (`int`): Number T of training timesteps.
        timestep_respacing (`str`, `int` or list of `int`): `"250"` spreads 250 timesteps evenly, first and last
            included; `"10,10,15"` does so in each of three equal sections (the first ones are a step longer if T is not
            divisible); `"ddim50"` takes every k-th timestep from 0, with the smallest integer k that gives 50;
            `"fast27"` is `"10,10,3,2,2"` with the third-last training timestep in place of the last one (for GLIDE's
            upsamplers).

    Raises:
        ValueError: If no integer stride gives `ddimN`, a section is shorter than its count, or the form is unknown.
    """
    if isinstance(timestep_respacing, str) and timestep_respacing.startswith("ddim"):
        return _strided_timesteps(num_train_timesteps, timestep_respacing.removeprefix("ddim"))

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
        # A running sum, rounded at each addition, and not `i * stride`: only the former always gives the published
        # timesteps.
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += size
    if timestep_respacing == "fast27":
        # A first DDIM step at the noisiest timestep leaves artifacts.
        timesteps[-1] = num_train_timesteps - 3
    return timesteps


def _strided_timesteps(num_train_timesteps: int, wanted: str) -> list[int]:
    """Returns the timesteps of `"ddim<wanted>"`."""
    # ceil(T / stride) timesteps for each stride. In descending order, so that the smallest stride is stored last.
    strides = {math.ceil(num_train_timesteps / k): k for k in range(num_train_timesteps - 1, 0, -1)}
    if not wanted.isdecimal() or int(wanted) not in strides:
        target = int(wanted) if wanted.isdecimal() else 50
        nearest = sorted(sorted(strides, key=lambda n: abs(n - target))[:4])
        raise ValueError(
            f"`timestep_respacing` is 'ddim{wanted}', but no integer stride through {num_train_timesteps} timesteps "
            f"takes {wanted or 'that many'} of them. Possible here: {', '.join(f'ddim{n}' for n in nearest)}; or leave "
            "out 'ddim' for uneven strides."
        )
    return list(range(0, num_train_timesteps, strides[int(wanted)]))
