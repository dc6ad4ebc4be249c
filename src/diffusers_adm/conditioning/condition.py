"""
What all conditions have in common. Each kind of condition (class, text, low-resolution image, ...) has one owner, a
[`Condition`]: it says what the U-Net is given with and without the condition, how training drops it, and which
arguments of a pipeline's call belong to it.

    training:  inputs = merge(condition.for_training(batch) for condition in conditions)
    sampling:  conditions = merge_prepared([condition.prepare(call) for condition in conditions])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin


@dataclass
class UNetInputs:
    """
    What a U-Net is given in addition to the noisy sample and the timestep.

    Attributes:
        kwargs (`dict`): Keyword arguments of its `forward`.
        extra_channels (`torch.Tensor` of shape `(batch_size, extra_channels, height, width)`, *optional*): Concatenated
            behind the channels of the sample.
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


def _join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(first)
    for name, value in second.items():
        if isinstance(value, dict) and isinstance(joined.get(name), dict):
            value = _join(joined[name], value)
        elif name in joined:
            raise ValueError(f"Two conditions give the U-Net `{name}`. Use one of them.")
        joined[name] = value
    return joined


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
        return _is_within(self.index, self.num_steps, start, end)


def _is_within(index: int, num_steps: int, start: float, end: float) -> bool:
    return start <= index / num_steps and (index + 1) / num_steps <= end


def is_ever_within(num_steps: int, start: float, end: float) -> bool:
    """Whether any of `num_steps` steps lies between two fractions of the steps."""
    return any(_is_within(index, num_steps, start, end) for index in range(num_steps))


@dataclass
class SamplingCall:
    """
    What conditions need to know of the call that they are prepared for.

    Attributes:
        num_prompts (`int`), num_images_per_prompt (`int`): Number of different images, and samples of each.
        size (`tuple[int, int]`): Height and width of the samples (of latents, where there is an autoencoder).
        scheduler ([`SchedulerMixin`]): That of this call, after `set_timesteps`.
        generator (`torch.Generator` or list of them, *optional*): Source of all noise.
        noise (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): What sampling starts from.
        guidance_scale (`float`): At the start of the call; 1.0 is off.
        device, dtype, unet_dtype: Device of the networks, dtype of the samples, and that of the U-Net.
    """

    num_prompts: int
    num_images_per_prompt: int
    size: tuple[int, int]
    scheduler: SchedulerMixin
    generator: torch.Generator | list[torch.Generator] | None
    noise: torch.Tensor
    guidance_scale: float
    device: torch.device
    dtype: torch.dtype
    unet_dtype: torch.dtype

    @property
    def num_images(self) -> int:
        """Number of samples."""
        return self.num_prompts * self.num_images_per_prompt

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Entries for all prompts, or one for each, as one row an image on the device."""
        return x.to(self.device).repeat_interleave(self.num_images // len(x), dim=0)


class StepHook(Protocol):
    """What a condition computes in each step, such as the residuals of a ControlNet."""

    def __call__(
        self, model_input: torch.Tensor, step: Step, conditions: MergedConditions, runs_both: bool
    ) -> dict[str, Any]:
        r"""
        Further keyword arguments of the U-Net.

        Args:
            model_input (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The input of the U-Net.
            step (`Step`): The step.
            conditions (`MergedConditions`): All conditions of the call.
            runs_both (`bool`): Whether `model_input` holds the unconditional batch and, behind it, the conditional one.
        """


@dataclass
class PreparedCondition:
    """
    A condition of one call, one row an image, on the device.

    Attributes:
        conditional (`UNetInputs`): For the conditional pass alone.
        both (`UNetInputs`, *optional*): For both passes in one batch, the unconditional one first. `None`: the call has
            no unconditional input for this condition, so that it cannot be guided.
        can_guide (`bool`): Whether the two passes differ.
        at_step (`StepHook`, *optional*): Called in each step.
    """

    conditional: UNetInputs
    both: UNetInputs | None
    can_guide: bool = True
    at_step: StepHook | None = None

    @classmethod
    def same_in_both(cls, inputs: UNetInputs, at_step: StepHook | None = None) -> PreparedCondition:
        """A condition that the unconditional pass gets as well."""

        def twice(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: twice(entry) for name, entry in value.items()}
            return torch.cat([value] * 2) if torch.is_tensor(value) else value

        both = UNetInputs(twice(inputs.kwargs), twice(inputs.extra_channels))
        return cls(inputs, both, can_guide=False, at_step=at_step)


@dataclass
class MergedConditions:
    """
    All conditions of one call, as its sampling loop uses them.

    Attributes:
        conditional (`UNetInputs`), both (`UNetInputs`, *optional*): As of [`PreparedCondition`]; `both` is `None` where
            there is nothing to guide away from.
        hooks (list of `StepHook`): Called in each step.
    """

    conditional: UNetInputs
    both: UNetInputs | None
    hooks: list[StepHook]

    def inputs(self, runs_both: bool) -> UNetInputs:
        """What the U-Net is given in every step."""
        return self.both if runs_both else self.conditional

    def kwargs_at(self, model_input: torch.Tensor, step: Step, runs_both: bool) -> dict[str, Any]:
        """Keyword arguments of the U-Net in one step; arguments as of `StepHook`."""
        kwargs = self.inputs(runs_both).kwargs
        for hook in self.hooks:
            kwargs = _join(kwargs, hook(model_input, step, self, runs_both))
        return kwargs


def merge_prepared(prepared: Sequence[PreparedCondition]) -> MergedConditions:
    """Conditions of one call in one; they can be guided if all know an unconditional pass and one differs in it."""
    can_guide = any(part.can_guide for part in prepared) and all(part.both is not None for part in prepared)
    return MergedConditions(
        conditional=merge(part.conditional for part in prepared),
        both=merge(part.both for part in prepared) if can_guide else None,
        hooks=[part.at_step for part in prepared if part.at_step is not None],
    )


class Condition:
    """
    The owner of one kind of condition. It is made from the networks and settings that it needs, for a training run, or
    for one call of a pipeline, which then hands it the arguments that belong to it (`read`).

    Attributes:
        argument (`str`): The main one of its arguments, for messages.
        is_droppable (`bool`): Whether the U-Net has an unconditional input in its place, so that it can be guided.
        is_given (`bool`): Whether the call has named something to guide towards, or away from.
        counts (`dict[str, int]`): Numbers of entries of the arguments that hold one for each image, by their names.
            What holds one for all images is left out.
        image_size (`tuple[int, int]`, *optional*): Height and width of images that have the size of those to generate.
    """

    argument = ""
    is_droppable = False
    is_given = False
    image_size: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """The inputs of the U-Net for a batch of training data; some of them dropped at random."""
        raise NotImplementedError

    def check(self, num_prompts: int, guidance_scale: float, size: tuple[int, int]) -> None:
        """
        Raises a `ValueError` for arguments that are incompatible with others of the call, before any work is done.

        Args:
            num_prompts (`int`): Number of different images.
            guidance_scale (`float`): 1.0 is off.
            size (`tuple[int, int]`): Height and width of the images to generate, in pixels.
        """

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """
        Warnings about arguments that change nothing in the call.

        Args:
            num_steps (`int`): Number of timesteps.
            may_guide (`bool`): Whether classifier-free guidance is on, or a callback may turn it on.
            uses_classifier (`bool`): Whether classifier guidance is on.
        """
        return []

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The inputs of the U-Net for the call whose arguments were read."""
        raise NotImplementedError


def number_of_prompts(conditions: Sequence[Condition], batch_size: int) -> int:
    """The number of different images that a call asks for; raises a `ValueError` unless all its arguments agree."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; pass an integer of at least 1.")
    asked = {
        f"`{name}` holds {number}": number for condition in conditions for name, number in condition.counts.items()
    }
    if batch_size != 1 or not asked:
        asked[f"`batch_size` is {batch_size}"] = batch_size
    number = next(iter(asked.values()))
    if len(set(asked.values())) > 1 or number == 0:
        raise ValueError(
            f"The arguments ask for different numbers of images, or for none: {', '.join(asked)}. Pass one of each for "
            "all images (a string, an `int`, one image), or as many as there are images, and leave `batch_size` out."
        )
    return number
