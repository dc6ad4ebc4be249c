"""
The base class of all conditions. Each kind of condition (class, text, low-resolution image, ...) has one owner, a
[`Condition`]: it defines the inputs of the U-Net with and without the condition, how training drops it, and which
arguments of a pipeline's call belong to it.

    training:  inputs = merge(condition.for_training(batch) for condition in conditions)
    sampling:  conditions = MergedConditions(conditions, call)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..ops.integers import check_integer
from ..ops.values import check_number
from ..schedulers.diffusers_schedulers import Generators


# What one run of the U-Net predicts; "both": the unconditional pass and, after it, the conditional one, in one batch.
Passes = Literal["conditional", "unconditional", "both"]


@dataclass
class UNetInputs:
    """
    Inputs of the U-Net in addition to the noisy sample and the timestep.

    Attributes:
        kwargs (`dict`): Keyword arguments of its `forward`.
        extra_channels (`torch.Tensor` of shape `(batch_size, extra_channels, height, width)`, *optional*): Concatenated
            after the channels of the sample.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    extra_channels: torch.Tensor | None = None


def merge(inputs: Iterable[UNetInputs]) -> UNetInputs:
    """
    The inputs of several conditions in one: extra channels in the given order, `added_cond_kwargs` joined.

    Raises:
        ValueError: If two conditions give the same keyword argument.
    """
    merged, channels = UNetInputs(), []
    for part in inputs:
        merged.kwargs = _join(merged.kwargs, part.kwargs)
        if part.extra_channels is not None:
            channels.append(part.extra_channels)
    if channels:
        merged.extra_channels = channels[0] if len(channels) == 1 else torch.cat(channels, dim=1)
    return merged


def concatenate(first: UNetInputs, second: UNetInputs) -> UNetInputs:
    """The inputs of one batch with the rows of `first` and, after them, those of `second`, of the same names."""

    def cat(a: Any, b: Any) -> Any:
        if isinstance(a, dict):  # such as `added_cond_kwargs`
            return {name: cat(value, b[name]) for name, value in a.items()}
        return None if a is None else torch.cat([a, b])

    return UNetInputs(cat(first.kwargs, second.kwargs), cat(first.extra_channels, second.extra_channels))


def _join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(first)
    for name, value in second.items():
        if isinstance(value, dict) and isinstance(joined.get(name), dict):
            value = _join(joined[name], value)
        elif name in joined:
            raise ValueError(f"Two conditions give the U-Net `{name}`. Use one of them.")
        joined[name] = value
    return joined


def lies_within(index: int, num_steps: int, start: float, end: float) -> bool:
    """Whether step `index` (from 0) of `num_steps` lies between two fractions of the steps."""
    return start <= index / num_steps and (index + 1) / num_steps <= end


@dataclass
class Step:
    """
    One evaluation of the network in a sampling loop.

    Attributes:
        index (`int`), num_steps (`int`): Its number, from 0, and the number of timesteps of the chain.
        timestep (`torch.Tensor` of shape `()`): On the device.
    """

    index: int
    num_steps: int
    timestep: torch.Tensor

    def is_within(self, start: float, end: float) -> bool:
        """Whether the step lies between two fractions of the steps."""
        return lies_within(self.index, self.num_steps, start, end)


def warn_of_interval(subject: str, prefix: str, start: float, end: float, num_steps: int) -> list[str]:
    """A warning if no step lies between two fractions of the steps, the arguments `prefix_start` and `prefix_end`."""
    if any(lies_within(i, num_steps, start, end) for i in range(num_steps)):
        return []
    return [
        f"{subject} has no effect: none of the {num_steps} steps lies within `{prefix}_start` {start} and "
        f"`{prefix}_end` {end}. Make the interval longer, or ask for more steps."
    ]


def check_finite(name: str, scales: Sequence[float]) -> None:
    """Raises a `ValueError` for a scale that would make samples NaN, of which only "pil" and "np" outputs warn."""
    for scale in scales:
        check_number(name, scale)


def check_interval(prefix: str, start: float, end: float) -> None:
    """Raises a `ValueError` unless 0 <= start <= end <= 1."""
    check_number(f"{prefix}_start", start)
    check_number(f"{prefix}_end", end)
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"`{prefix}_start` is {start} and `{prefix}_end` is {end}; they are fractions of the steps, so 0 <= "
            f"{prefix}_start <= {prefix}_end <= 1 must hold."
        )


@dataclass
class SamplingCall:
    """
    The call of a pipeline for which conditions are prepared.

    Attributes:
        num_prompts (`int`): Number of different images.
        size (`tuple[int, int]`): Height and width of the samples (of latents, with an autoencoder).
        scheduler ([`SchedulerMixin`]): Scheduler of the call, after `set_timesteps`.
        generator (`torch.Generator` or list of them, *optional*): Source of all noise.
        noise (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): The start of sampling; its
            device and dtype are those of the samples.
        unet_dtype (`torch.dtype`): Data type of the U-Net.
        guidance_scale (`float`): At the start of the call; 1.0 is off.
    """

    num_prompts: int
    size: tuple[int, int]
    scheduler: SchedulerMixin
    generator: Generators
    noise: torch.Tensor
    unet_dtype: torch.dtype
    guidance_scale: float

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """One entry for all prompts, or one for each, repeated to one row per image, on the device."""
        return x.to(self.noise.device).repeat_interleave(len(self.noise) // len(x), dim=0)

    def draw_noise(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal noise from the generators of the call."""
        return randn_tensor(shape, self.generator, self.noise.device, self.noise.dtype)


@dataclass
class PreparedCondition:
    """
    A condition of one call, with one row per image, on the device.

    Attributes:
        conditional (`UNetInputs`): For the conditional pass.
        unconditional (`UNetInputs`, *optional*): For the unconditional pass: of the same names and shapes. `None`: the
            call has no unconditional input for this condition, so that it cannot be guided.
        can_guide (`bool`): Whether the two passes differ.
    """

    conditional: UNetInputs
    unconditional: UNetInputs | None
    can_guide: bool = True

    @classmethod
    def same_in_both(cls, inputs: UNetInputs) -> PreparedCondition:
        """A condition that the unconditional pass also gets."""
        return cls(inputs, inputs, can_guide=False)


class Condition:
    """
    The owner of one kind of condition. It is made from the networks and settings that it needs, for a training run, or
    for one call of a pipeline.

    A subclass that pipelines use also has a method `read`. It takes the arguments of the call that belong to the
    condition (so its signature is its own), checks them, sets `counts`, `is_given` and, with images, `image_size`, and
    returns the condition. Pipelines call `read`, `check_size`, `before_noise`, `prepare` and then `at_step`, in this
    order.

    Guidance depends on four flags:

    | flag | set by | meaning |
    |---|---|---|
    | `is_droppable` | networks | the U-Net has an unconditional input in the place of this condition |
    | `is_given` | `read` | the call names something to guide towards, or away from |
    | `PreparedCondition.unconditional` is not `None` | `prepare` | the call has an unconditional input |
    | `PreparedCondition.can_guide` | `prepare` | this input differs from the conditional one |

    Attributes:
        argument (`str`): Its main argument, for messages.
        is_droppable (`bool`), is_given (`bool`): See the table.
        counts (`dict[str, int]`): Number of entries by name of argument, of the arguments that hold one entry for each
            image (not of those that hold one for all images).
        image_size (`tuple[int, int]`, *optional*): Height and width of given images, if they must have the size of the
            generated images.
    """

    argument = ""
    is_droppable = False
    is_given = False
    image_size: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """The inputs of the U-Net for a batch of training data, with some conditions dropped at random."""
        raise NotImplementedError

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """
        Raises a `ValueError` if images of the call are incompatible with the height and width of the results, or with
        those of samples, which differ with an autoencoder.
        """

    def before_noise(self, call: SamplingCall) -> None:
        """
        Does what draws noise from the generators before the samples do. The noise of the call has its shape, dtype and
        device, but no values yet.
        """

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The inputs of the U-Net for the call. Called after `read`."""
        raise NotImplementedError

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """
        What functions that guide the call get by name, one entry an image: see [`GuidanceFunction`]. Called after
        `prepare`.
        """
        return {}

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """
        Warnings about arguments that change nothing in the call.

        Args:
            num_steps (`int`): Number of timesteps.
            may_guide (`bool`): Whether classifier-free guidance is on, or a callback may turn it on.
            uses_classifier (`bool`): Whether a classifier or another function guides.
        """
        return []

    def at_step(
        self, model_input: torch.Tensor, step: Step, merged: MergedConditions, passes: Passes
    ) -> dict[str, Any]:
        """
        Keyword arguments of the U-Net that depend on the step, such as the residuals of a ControlNet.

        Args:
            model_input (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The input of the U-Net.
            step (`Step`), merged (`MergedConditions`): The step, and all conditions of the call.
            passes (`str`): What the batch holds: `"conditional"`, `"unconditional"` or `"both"` passes.
        """
        return {}


class MergedConditions:
    """
    All conditions of one call, as its sampling loop uses them.

    Args:
        conditions (sequence of `Condition`): After `read`; they are prepared here, in this order.
        call (`SamplingCall`): The call.

    Attributes:
        conditional (`UNetInputs`), unconditional (`UNetInputs`, *optional*): See [`PreparedCondition`]; the latter is
            `None` unless all conditions have an unconditional input, and at least one of these differs from its
            conditional one.
    """

    def __init__(self, conditions: Sequence[Condition], call: SamplingCall):
        self.conditions = conditions
        prepared = [condition.prepare(call) for condition in conditions]
        can_guide = any(part.can_guide for part in prepared)
        can_guide &= all(part.unconditional is not None for part in prepared)
        self.conditional = merge(part.conditional for part in prepared)
        self.unconditional = merge(part.unconditional for part in prepared) if can_guide else None

    @cached_property
    def both(self) -> UNetInputs:
        """Of both passes in one batch, the unconditional one first."""
        return concatenate(self.unconditional, self.conditional)

    def inputs(self, passes: Passes) -> UNetInputs:
        """Inputs of the U-Net in every step."""
        return getattr(self, passes)

    def kwargs_at(self, model_input: torch.Tensor, step: Step, passes: Passes) -> dict[str, Any]:
        """Keyword arguments of the U-Net in one step; for the arguments see `Condition.at_step`."""
        kwargs = self.inputs(passes).kwargs
        for condition in self.conditions:
            kwargs = kwargs | condition.at_step(model_input, step, self, passes)
        return kwargs


def number_of_prompts(conditions: Sequence[Condition], batch_size: int) -> int:
    """The number of different images that a call asks for; raises a `ValueError` unless all its arguments agree."""
    check_integer("batch_size", batch_size, 1)
    counts = {name: number for condition in conditions for name, number in condition.counts.items()}
    asked = {f"`{name}` holds {number}": number for name, number in counts.items()}
    if batch_size != 1 or not asked:
        asked[f"`batch_size` is {batch_size}"] = batch_size
    number = next(iter(asked.values()))
    if len(set(asked.values())) > 1 or number == 0:
        raise ValueError(
            f"The arguments ask for different numbers of images, or for none: {', '.join(asked)}. Pass one of each for "
            "all images (a string, an `int`, one image), or as many as there are images, and leave `batch_size` out."
        )
    return number
