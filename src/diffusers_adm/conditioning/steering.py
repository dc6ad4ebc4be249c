"""
Guidance by functions in one call of a pipeline: runs the functions of `guidance_functions.py`, the classifier among
them, and gives their gradients to any scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..schedulers.diffusers_schedulers import takes_gradient
from ..schedulers.noise_schedules import unknown_choice
from ..schedulers.scheduling_ddpm_learned_variance import PredictionType
from .condition import SamplingCall, Step
from .guidance import precise_alphas_cumprod, shift_prediction, signal_and_std
from .guidance_functions import GuidanceFunction, check_conditions, name_of


@dataclass
class GuidedPrediction:
    """
    What one step is made with.

    Attributes:
        model_output (`torch.Tensor` of shape `(num_images, channels or 2 * channels, height, width)`): Mean, and
            variance if the scheduler takes it.
        step_kwargs (`dict`): Further keyword arguments of `scheduler.step`, such as a gradient.
        shift (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*): Added to x_{t-1} after the
            step, by `Steering.shift`.
    """

    model_output: torch.Tensor
    step_kwargs: dict[str, torch.Tensor] = field(default_factory=dict)
    shift: torch.Tensor | None = None


class UnitGradients:
    """
    Runs the backward pass of a network with gradients of about unit size, whatever the size of the function that is
    differentiated: float16 has no numbers above 65504, and steps of 6e-8 next to 0. Factors are powers of two, which
    change no digits.

        unit = UnitGradients()
        outputs = unit.leave(network(unit.enter(inputs)))
    """

    def __init__(self) -> None:
        self._sizes: list[torch.Tensor] = []

    def enter(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs of the network."""
        inputs = inputs.clone()
        if inputs.requires_grad:
            inputs.register_hook(lambda gradient: gradient * self._sizes.pop())
        return inputs

    def leave(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs of the network."""
        if outputs.requires_grad:
            outputs.register_hook(self._normalise)
        return outputs.clone()  # so that the gradient with respect to the result itself is its own

    def _normalise(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.abs().amax()
        size = torch.where(largest > 0, largest, 1).log2().ceil().exp2()
        self._sizes.append(size)
        return gradient / size


class Steering:
    """
    The functions that guide one call.

    Args:
        functions (sequence of [`GuidanceFunction`]): Their gradients add up.
        call (`SamplingCall`): The call.
        conditions (mapping): What it is conditioned on, passed to the functions.

    Attributes:
        through_unet (`bool`): Whether a gradient flows through the U-Net.
        reads_prediction (`bool`): Whether a function takes the predicted x_0.

    Raises:
        ValueError: For a function that needs other conditions, or that refuses the call.
    """

    def __init__(
        self,
        functions: Sequence[GuidanceFunction],
        call: SamplingCall,
        conditions: Mapping[str, Any],
    ):
        for function in functions:
            check_conditions(function, conditions)
        self.scheduler, self.conditions = call.scheduler, conditions
        self.functions = [function.for_call(call, conditions) for function in functions]
        self.through_unet = any(function.through_unet for function in self.functions)
        self.reads_prediction = any(function.reads_prediction for function in self.functions)
        device = call.noise.device
        if not takes_gradient(call.scheduler):
            self.alphas_cumprod = call.scheduler.alphas_cumprod.to(device)
        elif self.reads_prediction:
            self.alphas_cumprod = precise_alphas_cumprod(call.scheduler, device)
        self._unread: list[tuple[str, torch.Tensor]] = []

    def steer(
        self, run_unet: Callable[[torch.Tensor], torch.Tensor], x_t: torch.Tensor, step: Step
    ) -> GuidedPrediction:
        r"""
        The prediction of one step, changed by the gradients of scores, and the sum of the shifts.

        Args:
            run_unet (`Callable`): The network: x_t -> mean, and variance if the scheduler takes it.
            x_t (`torch.Tensor` of shape `(num_images, channels, height, width)`): After `scale_model_input`.
            step (`Step`): The step.
        """
        x_t = x_t.detach()
        with torch.set_grad_enabled(self.through_unet):
            unit = UnitGradients()
            x_in = x_t.clone().requires_grad_(self.through_unet)
            inner = unit.enter(x_in) if self.through_unet else x_t
            model_output = run_unet(inner)
            at = original = None
            if self.reads_prediction:
                at = signal_and_std(self.scheduler, step.timestep, self.alphas_cumprod)
                original = predicted_original_sample(self.scheduler, model_output, inner, step.timestep, *at)
                original = unit.leave(original) if self.through_unet else original
        model_output = model_output.detach()

        sums: dict[str, torch.Tensor] = {}
        last_through = max((i for i, f in enumerate(self.functions) if f.through_unet), default=-1)
        for number, function in enumerate(self.functions):
            with torch.enable_grad():
                if function.through_unet:
                    sample, prediction = x_in, original
                else:
                    sample, prediction = x_t.clone().requires_grad_(), None
                    if function.reads_prediction:
                        # The value of x_0, and the Jacobian of the best prediction for standard normal data.
                        prediction = original.detach() + at[0] * (sample - sample.detach())
                value = function(sample, step.timestep, prediction, **self.conditions)
                keeps_graph = function.through_unet and number < last_through
                gradient = self._gradient(function, value, sample, keeps_graph, step).to(x_t.dtype)
            self._check_finite(function, value, gradient, step)
            sums[function.kind] = sums[function.kind] + gradient if function.kind in sums else gradient
        return self._with_score(model_output, sums.get("score"), x_t, step, at, sums.get("shift"))

    def _with_score(
        self,
        model_output: torch.Tensor,
        score: torch.Tensor | None,
        x_t: torch.Tensor,
        step: Step,
        at: tuple[torch.Tensor, torch.Tensor] | None,
        shift: torch.Tensor | None,
    ) -> GuidedPrediction:
        if score is None:
            return GuidedPrediction(model_output, shift=shift)
        if takes_gradient(self.scheduler):
            return GuidedPrediction(model_output, {"guidance_gradient": score}, shift)
        channels = x_t.shape[1]
        if at is None:
            at = signal_and_std(self.scheduler, step.timestep, self.alphas_cumprod)
        mean = shift_prediction(model_output[:, :channels], score, *at, self.scheduler.config.prediction_type)
        return GuidedPrediction(torch.cat([mean, model_output[:, channels:]], dim=1), shift=shift)

    def shift(self, latents: torch.Tensor, shift: torch.Tensor, step: Step) -> torch.Tensor:
        """
        Adds a shift of the network's x_{t-1} to a sample after `scheduler.step`, as the scheduler scales its samples.
        """
        if getattr(self.scheduler, "last_sample", None) is not None:
            # The correctors of UniPC and SA-Solver would step again from the sample before, and lose the shift.
            self.scheduler.last_sample = None
        if step.index + 1 == step.num_steps:
            return latents + shift  # x_0, which no scheduler scales
        one = torch.ones((), dtype=torch.float64)
        return latents + shift / self.scheduler.scale_model_input(one, step.timestep)

    def _gradient(
        self,
        function: GuidanceFunction,
        value: torch.Tensor,
        sample: torch.Tensor,
        keeps_graph: bool,
        step: Step,
    ) -> torch.Tensor:
        wanted = (
            f"It must return a gradient of shape {tuple(sample.shape)}, or a value to differentiate: a scalar, or one "
            f"for each of the {len(sample)} images."
        )
        if not torch.is_tensor(value):
            raise ValueError(f"{_at(function, step)} returned {value!r}. {wanted}")
        if not value.is_floating_point() or (value.shape != sample.shape and value.shape not in ((), sample.shape[:1])):
            raise ValueError(
                f"{_at(function, step)} returned a tensor of shape {tuple(value.shape)} and type {value.dtype}. "
                f"{wanted}"
            )
        if value.shape == sample.shape:
            return value.detach()
        gradient = None
        if value.requires_grad:
            total = value.to(torch.promote_types(value.dtype, torch.float32)).sum()
            (gradient,) = torch.autograd.grad(total, sample, retain_graph=keeps_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"{_at(function, step)} returned a value that does not depend on `x_t` or `pred_original_sample`, so "
                "it has no gradient. Was one of them detached, or computed with under `torch.no_grad`? Or return the "
                "gradient itself."
            )
        return gradient

    def _check_finite(
        self, function: GuidanceFunction, value: torch.Tensor, gradient: torch.Tensor, step: Step
    ) -> None:
        is_finite = gradient.isfinite().all() & value.detach().isfinite().all()
        self._unread.append((_at(function, step), is_finite))
        if gradient.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """
        Raises a `ValueError` if a gradient was not finite. It is called after the loop, because it waits for the
        device; on the CPU after each function.
        """
        unread, self._unread = self._unread, []
        if not unread or unread[0][1].device.type == "meta":  # which has no values
            return
        are_finite = torch.stack([is_finite for _, is_finite in unread]).tolist()
        for (where, _), is_finite in zip(unread, are_finite, strict=True):
            if not is_finite:
                raise ValueError(
                    f"{where} returned a value or a gradient that is NaN or infinite. Use a smaller scale, keep the "
                    "function away from divisions by 0, and check that the prediction itself is finite without it."
                )


def predicted_original_sample(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    signal: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    r"""
    The x_0 that a prediction stands for, clipped or thresholded if the scheduler does so. Differentiable.

    Args:
        scheduler ([`SchedulerMixin`]): Any of those that pipelines take.
        model_output (`torch.Tensor` of shape `(batch_size, channels or 2 * channels, height, width)`): Mean, and
            variance if the scheduler takes it.
        x_t (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The input of the network.
        timestep (`torch.Tensor` of shape `()`): The step.
        signal, std (`torch.Tensor` of shape `()`): See `signal_and_std`.
    """
    if hasattr(scheduler, "predicted_distribution"):
        return scheduler.predicted_distribution(model_output, timestep, x_t)[2]
    prediction, kind = model_output[:, : x_t.shape[1]], scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        original = (x_t - std * prediction) / signal
    elif kind == "sample":
        original = prediction
    elif kind == "v_prediction":
        original = signal * x_t - std * prediction
    else:
        raise unknown_choice("prediction_type", kind, PredictionType)
    # A config keeps what its class does not know, such as the `clip_sample` of the scheduler that it was made from.
    config, options = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    if "thresholding" in options and config.thresholding:
        return scheduler._threshold_sample(original)
    if "clip_sample" in options and config.clip_sample:
        limit = config.get("clip_sample_range", 1.0)
        return original.clamp(-limit, limit)
    return original


def _at(function: GuidanceFunction, step: Step) -> str:
    return f"`guidance_fn` {name_of(function)}, in step {step.index + 1} of {step.num_steps},"
