"""
DDIMInversionScheduler: from a sample to the noise that deterministic DDIM steps lead back to it.

Song et al. 2020 (DDIM, https://huggingface.co/papers/2010.02502, eq. 12 with eta = 0). Its inverse is implicit, because
the network must be evaluated at the sample that is sought; fixed-point iteration: Pan et al. 2023 (AIDI,
https://huggingface.co/papers/2309.04907, without its acceleration).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from ..ops.integers import check_integer


class _Levels(NamedTuple):
    """Coefficients of one step: signal a = sqrt(bar alpha) and std s = sqrt(1 - bar alpha), at t_i and before it."""

    signal: float
    std: float
    signal_prev: float
    std_prev: float


class DDIMInversionScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Inverts deterministic DDIM steps. `step` goes from x_{i-1} to the x_i from which a DDIM step leads back:

        x_i = (a_i / a_{i-1}) x_{i-1} + (s_i - a_i s_{i-1} / a_{i-1}) epsilon(x_i, t_i)

    with a = sqrt(bar alpha) and s = sqrt(1 - bar alpha), which are computed in float64. x_i is on both sides, so each
    timestep is repeated: the first evaluation of the network takes x_{i-1} for x_i, each further one the result of the
    one before. One evaluation is DDIM inversion as it is commonly used. More of them converge to the exact inverse
    where the right side is a contraction: for short steps, and away from x_0, where epsilon changes fast with its
    input.

    The last result is not x_T itself but the latents that the scheduler begins with: solvers whose samples are x_0 +
    sigma * noise scale them by about the largest sigma, and for others they are x_T.

    Nothing is clipped, and a learned variance is not used. This scheduler is made by `ADMPipeline.invert` for one call;
    it is neither saved nor loaded.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler to invert. Its noise schedule, prediction type and timesteps are
            used (rounded to training timesteps, each once), with its own `final_alpha_cumprod` before the first one if
            it has any, else without noise. It is kept and changed: pass a copy.
        num_fixed_point_iterations (`int`, defaults to 1): Evaluations of the network per timestep.

    Attributes:
        timesteps (`torch.LongTensor`): Ascending; each is repeated `num_fixed_point_iterations` times.
        order (`int`): `num_fixed_point_iterations`, like the evaluations per step of a solver of higher order.

    Raises:
        ValueError: If `num_fixed_point_iterations` is no integer of at least 1.
    """

    def __init__(self, scheduler: SchedulerMixin, num_fixed_point_iterations: int = 1):
        note = " (1: one evaluation of the network per timestep)"
        check_integer("num_fixed_point_iterations", num_fixed_point_iterations, 1, note)
        self.scheduler = scheduler
        self.order = int(num_fixed_point_iterations)
        self.register_to_config(**{**scheduler.config, "clip_sample": False, "thresholding": False})
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.long)
        self._levels: list[_Levels] = []
        self._evaluation = 0  # counted on the host: reading the timestep would wait for the device
        self._start: torch.Tensor | None = None  # x_{i-1}
        self._latents_scale = 1.0  # makes x_T latents

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **kwargs: Any
    ) -> None:
        """
        Chooses the timesteps as the `scheduler` does for the same arguments.

        Raises:
            ValueError: If a single step would go to a timestep without any signal (`rescale_betas_zero_snr`), or as by
                the `scheduler`.
        """
        scheduler = self.scheduler  # on the CPU, where it can be read
        if num_inference_steps is None:
            scheduler.set_timesteps(device="cpu", **kwargs)
        else:
            scheduler.set_timesteps(num_inference_steps, device="cpu", **kwargs)
        one = torch.ones((), dtype=torch.float64)
        first_input = scheduler.scale_model_input(one * scheduler.init_noise_sigma, scheduler.timesteps[0])
        self._latents_scale = 1 / float(first_input)
        timesteps = np.unique(scheduler.timesteps.double().numpy().round().astype(np.int64))
        alphas_cumprod = self.alphas_cumprod.double().cpu().numpy()
        previous = np.append(-1, timesteps[:-1])
        if isinstance(scheduler, (DDIMScheduler, DDIMParallelScheduler)):
            # It does not step to the next timestep of the list, but by this number.
            previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        alphas, alphas_prev = alphas_cumprod[timesteps], np.where(previous < 0, final, alphas_cumprod[previous])
        if alphas[0] == 0:
            raise ValueError(
                "The first timestep carries no signal (`rescale_betas_zero_snr`), so one step forgets the image. Ask "
                "for more steps."
            )
        self._levels = [
            _Levels(math.sqrt(alpha), math.sqrt(1 - alpha), math.sqrt(prev), math.sqrt(1 - prev))
            for alpha, prev in zip(alphas, alphas_prev, strict=True)
        ]
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.from_numpy(timesteps.repeat(self.order)).to(device)
        self._evaluation, self._start = 0, None

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`, which the network takes as it is."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One evaluation of the network on the way from x_{i-1} to x_i.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, channels, ...)`): Output of the network for `sample` and
                `timestep`, without variance channels.
            timestep (`int` or `torch.LongTensor` of shape `()`): The next one of `scheduler.timesteps`; evaluations are
                counted, so that nothing waits for the device.
            sample (`torch.Tensor` of that shape): x_{i-1} in the first evaluation of a timestep, in further ones the
                result of the one before.
            return_dict (`bool`, defaults to `True`): Return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            `DDPMSchedulerOutput` or `tuple`: `prev_sample`, the next estimate of x_i, and `pred_original_sample`, in
            the dtype of `sample`.

        Raises:
            ValueError: After the last timestep, or before `set_timesteps`.
        """
        if self._evaluation >= len(self._levels) * self.order:
            raise ValueError(
                f"`step` was called {self._evaluation + 1} times for {len(self._levels) * self.order} timesteps. Call "
                "`set_timesteps` before the first step."
            )
        at = self._levels[self._evaluation // self.order]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self._evaluation % self.order == 0:
            self._start = x
        self._evaluation += 1

        x_0, epsilon = self._predict(at, model_output.to(x.dtype), x)
        if epsilon is None:  # x_i is pure noise, and its x_0 all that is predicted
            x_i = (at.std / at.std_prev) * (self._start - at.signal_prev * x_0)
        else:
            ratio = at.signal / at.signal_prev
            x_i = ratio * self._start + (at.std - ratio * at.std_prev) * epsilon
        if self._evaluation == len(self._levels) * self.order:
            x_i = self._latents_scale * x_i
        x_i, x_0 = x_i.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_i, pred_original_sample=x_0) if return_dict else (x_i, x_0)

    def _predict(
        self, at: _Levels, prediction: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predicted x_0, and noise; `None` where x_t has no signal, so that the noise is x_t itself."""
        prediction_type = self.config.get("prediction_type", "epsilon")
        if prediction_type == "epsilon":
            return (x - at.std * prediction) / max(at.signal, torch.finfo(x.dtype).tiny), prediction
        x_0 = prediction if prediction_type == "sample" else at.signal * x - at.std * prediction
        if at.signal == 0:
            return x_0, None
        if prediction_type == "sample":
            return x_0, (x - at.signal * x_0) / at.std
        return x_0, at.std * x + at.signal * prediction

    def __len__(self) -> int:
        return len(self.alphas_cumprod)
