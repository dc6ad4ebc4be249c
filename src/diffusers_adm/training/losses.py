"""
Training losses of diffusion models: simple, hybrid and the variational bound, one value per example.

Ho et al. 2020 (L_simple, https://huggingface.co/papers/2006.11239, eq. 14), Nichol & Dhariwal 2021 (L_hybrid and L_vlb,
https://huggingface.co/papers/2102.09672, eqs. 4 and 16), Hang et al. 2023 (min-SNR weighting,
https://huggingface.co/papers/2303.09556).

To add a loss, extend `Objective` and `training_losses`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..schedulers.noise_schedules import unknown_choice
from ..schedulers.scheduling_ddpm_learned_variance import (
    LearnedVarianceDDPMScheduler,
    check_floating_point,
    mean_per_example,
)


Objective = Literal["simple", "hybrid", "hybrid_unscaled", "vlb"]

# lambda = T / HYBRID_VB_DIVISOR is the factor of the bound term: 0.001 times the whole bound, T times one term (section
# 3.1).
HYBRID_VB_DIVISOR = 1000
# Number of batches without a negative value after which images are taken to be in [0, 1]. A single one may be bright.
BATCHES_TO_JUDGE_THE_RANGE_BY = 4

logger = logging.getLogger(__name__)
# By scheduler, which stands for a training run: how many batches are still to be checked, and the highest value so far.
_looks: weakref.WeakKeyDictionary[LearnedVarianceDDPMScheduler, tuple[int, float]] = weakref.WeakKeyDictionary()


@dataclass
class TrainingLosses:
    """
    Loss terms of a batch, each `(batch_size,)` and at least float32.

    Attributes:
        loss: The loss to weight, average and differentiate.
        mse: Mean squared error of the prediction; with `snr_gamma`, weighted. Without gradient for `objective="vlb"`.
        vb: The bound term *as added* to the loss, in bits per dimension times its factor; 0 for `objective="simple"`.
    """

    loss: torch.Tensor
    mse: torch.Tensor
    vb: torch.Tensor


def min_snr_weights(scheduler: LearnedVarianceDDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """
    Weights `(batch_size,)` of the squared error at training `timesteps`: min(SNR, gamma) for the error in x_0, in terms
    of what the network predicts. SNR = bar alpha / (1 - bar alpha).
    """
    snr = scheduler.signal_to_noise_ratio(timesteps)
    clamped = snr.clamp(max=snr_gamma)
    weights = {"epsilon": clamped / snr, "sample": clamped, "v_prediction": clamped / (snr + 1)}
    return weights[scheduler.config.prediction_type]


def training_losses(
    model: Callable[..., Any],
    scheduler: LearnedVarianceDDPMScheduler,
    original_samples: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    objective: Objective = "hybrid",
    snr_gamma: float | None = None,
    extra_channels: torch.Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
    num_levels: int | None = 256,
) -> TrainingLosses:
    r"""
    Adds noise to `original_samples`, runs the network once and computes the loss of each example.

    The predicted x_0 is never clipped here, whatever the scheduler's config says: a clipped x_0 has no gradient.

    Args:
        model: Called as `model(noisy_samples, timesteps, **model_kwargs)`; returns an output with `.sample`, a tuple,
            or a tensor.
        scheduler ([`LearnedVarianceDDPMScheduler`]): The diffusion process; `set_timesteps` has no effect here.
        original_samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): x_0, floating point. For the bound:
            values on `num_levels` levels scaled to [-1, 1]. A warning is logged once for images that seem to be in
            [0, 1] or [0, 255].
        timesteps (`torch.LongTensor` of shape `(batch_size,)`): In `[0, num_train_timesteps)`; 0 is one step of noise.
        noise (`torch.Tensor`, *optional*): Standard normal noise of the shape of `original_samples`; drawn by default.
        objective (`str`, defaults to `"hybrid"`): `"simple"`: squared error only. `"hybrid"`: squared error + T/1000
            x bound term; `"hybrid_unscaled"`: squared error + bound term; in both the bound trains the variance only.
            `"vlb"`: T x bound term, whose mean over uniform t is the bound.
        snr_gamma (`float`, *optional*): Min-SNR weighting of the squared error; the usual value is 5.
        extra_channels (`torch.Tensor` of shape `(batch_size, extra, ...)`, *optional*): Input channels without noise
            that follow the noisy samples: e.g. a low-resolution image, or a masked image and its mask.
        model_kwargs (`dict`, *optional*): Further arguments of the model, e.g. `class_labels`.
        num_levels (`int`, *optional*, defaults to 256): Number of levels of the data, for the bound: 256 for 8 bits.
            `None`: they are continuous; see [`~LearnedVarianceDDPMScheduler.variational_bound`].

    Returns:
        [`TrainingLosses`]: Values per example, to be weighted and averaged by the caller.

    Raises:
        TypeError: For images or noise that are not floating point.
        ValueError: For an unknown objective, a hybrid one with a fixed variance (it has nothing to train), `snr_gamma`
            with `"vlb"`, or a network output whose number of channels does not match the scheduler's `variance_type`.
    """
    check_objective(scheduler, objective, snr_gamma)
    check_floating_point(original_samples=original_samples, noise=noise)
    warn_of_range(scheduler, original_samples)
    if noise is None:
        noise = torch.randn_like(original_samples)
    noisy_samples = scheduler.add_noise(original_samples, noise, timesteps)
    model_input = noisy_samples
    if extra_channels is not None:
        model_input = torch.cat([noisy_samples, extra_channels.to(noisy_samples.dtype)], dim=1)
    model_output = model(model_input, timesteps, **(model_kwargs or {}))
    if not torch.is_tensor(model_output):
        model_output = model_output[0]  # a tuple, or an output class, whose first entry is `.sample`

    # Under mixed precision the network may return 16 bits; the losses are computed in at least float32.
    dtype = torch.promote_types(original_samples.dtype, torch.float32)
    model_output, original_samples, noisy_samples = (
        x.to(dtype) for x in (model_output, original_samples, noisy_samples)
    )
    prediction, variance_output = scheduler.split_model_output(model_output, original_samples)

    target = {
        "epsilon": lambda: noise.to(dtype),
        "sample": lambda: original_samples,
        "v_prediction": lambda: scheduler.get_velocity(original_samples, noise.to(dtype), timesteps),
    }[scheduler.config.prediction_type]()
    mse = mean_per_example((prediction - target) ** 2)
    if snr_gamma is not None:
        mse = mse * min_snr_weights(scheduler, timesteps, snr_gamma).to(mse)
    if objective == "simple":
        return TrainingLosses(loss=mse, mse=mse, vb=torch.zeros_like(mse))

    if objective != "vlb":
        # The bound must not move the mean: its gradient there is as noisy as L_vlb's, which L_simple was made to avoid.
        model_output = torch.cat([prediction.detach(), variance_output], dim=1)
    vb = scheduler.variational_bound(
        model_output, original_samples, noisy_samples, timesteps, clip_sample=False, num_levels=num_levels
    )
    num_timesteps = scheduler.config.num_train_timesteps
    vb = vb * {"hybrid": num_timesteps / HYBRID_VB_DIVISOR, "hybrid_unscaled": 1, "vlb": num_timesteps}[objective]
    if objective == "vlb":
        return TrainingLosses(loss=vb, mse=mse.detach(), vb=vb)
    return TrainingLosses(loss=mse + vb, mse=mse, vb=vb)


def warn_of_range(scheduler: LearnedVarianceDDPMScheduler, original_samples: torch.Tensor) -> None:
    """
    Warns once if images do not seem to be in [-1, 1], which would cause no error anywhere. Reading their range waits
    for the device, so only the first few batches with `scheduler` are checked, and none inside `torch.compile`.
    """
    remaining, highest = _looks.get(scheduler, (BATCHES_TO_JUDGE_THE_RANGE_BY, 0.0))
    if remaining == 0 or torch.compiler.is_compiling() or original_samples.is_meta or original_samples.numel() == 0:
        return
    low, high = torch.stack(original_samples.detach().aminmax()).tolist()
    remaining, highest = remaining - 1, max(highest, high)
    found = None
    if not low >= 0:  # as it should be; or latents, NaN, or other data that cannot be judged here
        remaining = 0
    elif highest > 1.5:
        remaining, found = 0, ("from 0 to 255", "images / 127.5 - 1")
    elif remaining == 0 and highest > 0:
        found = "from 0 to 1", "2 * images - 1"
    _looks[scheduler] = remaining, highest
    if found is not None:
        logger.warning(
            f"The images look like numbers {found[0]}: none is negative, and the highest is {highest:g}. Losses and "
            f"sampling expect [-1, 1]; if these are images, pass `{found[1]}`."
        )


def check_objective(scheduler: LearnedVarianceDDPMScheduler, objective: Objective, snr_gamma: float | None) -> None:
    """Raises the `ValueError`s of `training_losses` that depend on options only, so that scripts can fail early."""
    if objective not in get_args(Objective):
        raise unknown_choice("objective", objective, Objective)
    if objective.startswith("hybrid") and not scheduler.has_learned_variance:
        raise ValueError(
            f"`objective={objective!r}` adds a bound term that trains the variance only, but "
            f"`variance_type={scheduler.config.variance_type!r}` has no learned variance. Pass `objective='simple'`, "
            "or 'vlb' to train the mean with the bound."
        )
    if snr_gamma is not None and objective == "vlb":
        raise ValueError("`snr_gamma` weights the squared error, which `objective='vlb'` lacks. Remove one of the two.")
    if snr_gamma is not None and snr_gamma <= 0:
        raise ValueError(f"`snr_gamma` is {snr_gamma}; it must be positive (5.0 is usual).")
