"""
The contract of guidance by functions: what pipelines take as `guidance_fn`.

    guidance_fn(x_t, t, pred_original_sample, **conditions) -> a gradient, or a value to differentiate

Sampling moves along the gradient: the larger the value, the better. A function says what its gradient is. `"score"`:
that of a log-probability with respect to x_t, as of a classifier (Dhariwal & Nichol 2021,
https://huggingface.co/papers/2105.05233, section 4). `"shift"`: what is added to x_{t-1} after the step, as in
diffusion posterior sampling (Chung et al. 2023, https://huggingface.co/papers/2209.14687, algorithm 1). `steering.py`
runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from .condition import SamplingCall


GuidanceKind = Literal["score", "shift"]

WANTED_SIGNATURE = "(x_t, t, pred_original_sample, **conditions)"


class GuidanceFunction:
    r"""
    A function that guides sampling, and what its gradient is. Made from a function, or a subclass with a `__call__` of
    its own.

    Args:
        function (`Callable`): See `__call__`.
        kind (`str`): `"score"`: the gradient of a log-probability with respect to x_t. Ancestral steps of
            `LearnedVarianceDDPMScheduler` add variance * gradient to their mean, all others add it to the score.
            `"shift"`: added to x_{t-1} after the step.
        through_unet (`bool`, defaults to `False`): Whether the gradient flows through the U-Net, which costs a backward
            pass, and the memory of it. Otherwise the prediction counts as constant, and x_0 depends on x_t through
            sqrt(bar alpha_t) alone, which is exact for data of a standard normal distribution, and bounded.

    Attributes:
        kind (`str`), through_unet (`bool`): As above.
        reads_prediction (`bool`): `False` for a function of x_t alone; its `pred_original_sample` is then `None`.
        name (`str`): For messages.
    """

    kind: GuidanceKind = "score"
    through_unet: bool = False
    reads_prediction: bool = True

    def __init__(self, function: Callable[..., torch.Tensor], kind: GuidanceKind, through_unet: bool = False):
        if not callable(function):
            raise ValueError(f"`function` is {function!r}; pass a function that takes `{WANTED_SIGNATURE}`.")
        self.function, self.kind, self.through_unet = function, kind, through_unet
        self.name = name_of(function)
        _check(self)
        _check_signature(self.name, function)

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor, **conditions: Any
    ) -> torch.Tensor:
        r"""
        The gradient, or what is to be differentiated. Gradients are enabled.

        Args:
            x_t (`torch.Tensor` of shape `(num_images, channels, height, width)`): The network's x_t = signal * x_0 +
                std * noise (with solvers whose samples are x_0 + sigma * noise: after their scaling), float32 at least.
                Requires a gradient.
            t (`torch.Tensor` of shape `()`): The timestep that the network gets.
            pred_original_sample (`torch.Tensor` of the shape of `x_t`): The predicted x_0, guided by
                `guidance_scale`, clipped if the scheduler clips it. Depends on `x_t`, see `through_unet`.
            conditions: What the call is conditioned on, one entry an image, as far as it was given: `class_labels`
                (`torch.LongTensor` of shape `(num_images,)`), `prompt` (list of `str`), ...

        Returns:
            `torch.Tensor`: A gradient of the shape of `x_t`; or a value to differentiate: one for each image, of shape
            `(num_images,)`, or their sum.
        """
        return self.function(x_t, t, pred_original_sample, **conditions)

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> GuidanceFunction:
        """
        The function to use in one call, before its first step: itself, or one that has checked the shape of the samples
        (`call.noise`), moved what it needs to their device, and encoded prompts.
        """
        return self


# What the argument `guidance_fn` of pipelines takes.
GuidanceFunctions = GuidanceFunction | Sequence[GuidanceFunction] | None


def as_guidance_functions(guidance_fn: GuidanceFunctions) -> list[GuidanceFunction]:
    """
    The functions of a call as a list. An object of another class that has a `kind` is one, too; its `through_unet`
    defaults to `False`.

    Raises:
        ValueError: For what is no function, does not say what it returns, or does not take the conditions.
    """
    if guidance_fn is None:
        return []
    given = list(guidance_fn) if isinstance(guidance_fn, (list, tuple)) else [guidance_fn]
    return [_as_guidance_function(function) for function in given]


def _as_guidance_function(function: Any) -> GuidanceFunction:
    if not callable(function):
        raise ValueError(
            f"`guidance_fn` is or holds {function!r}; pass a function that takes `{WANTED_SIGNATURE}`, as "
            '`GuidanceFunction(fn, kind="score")`, or a list of them.'
        )
    if not hasattr(function, "kind"):
        raise ValueError(
            f"`guidance_fn` is or holds {name_of(function)}, which does not say what it returns. Wrap it: "
            '`GuidanceFunction(fn, kind="score")` for the gradient of a log-probability, as of a classifier, or '
            '`GuidanceFunction(fn, kind="shift")` for what is added to x_{t-1}; see docs/guidance.md.'
        )
    # By its method and not by its class, of which pipelines that are saved with their code have one of their own.
    if not hasattr(function, "for_call"):
        return GuidanceFunction(function, function.kind, getattr(function, "through_unet", False))
    _check(function)  # a subclass need not call the constructor
    _check_signature(name_of(function), function)
    return function


def name_of(function: Callable[..., torch.Tensor]) -> str:
    """What messages call a function."""
    return getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__


def _check(function: GuidanceFunction) -> None:
    if function.kind not in get_args(GuidanceKind):
        raise ValueError(
            f"`kind` of {name_of(function)} is {function.kind!r}; it must be one of {list(get_args(GuidanceKind))}: "
            "the gradient of a log-probability, or what is added to x_{t-1}."
        )
    if not isinstance(function.through_unet, bool):
        raise ValueError(f"`through_unet` of {name_of(function)} is {function.through_unet!r}; pass True or False.")


def _check_signature(name: str, function: Callable[..., torch.Tensor]) -> None:
    signature = _signature_of(function)
    if signature is None:
        return
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    try:
        signature.bind_partial(None, None, None)
    except TypeError:
        takes_all = False
    if not takes_all:
        raise ValueError(
            f"{name} takes `{signature}`; a function that guides must take `{WANTED_SIGNATURE}`: the conditions of the "
            "call, such as `class_labels` and `prompt`, are passed by name. Add `**conditions`, used or not."
        )


def check_conditions(function: Callable[..., torch.Tensor], conditions: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a function that needs conditions that the call does not have."""
    signature = _signature_of(getattr(function, "function", function))
    if signature is None:
        return
    try:
        signature.bind(None, None, None, **conditions)
    except TypeError as error:
        raise ValueError(
            f"`guidance_fn` {name_of(function)} takes `{signature}`, but this call is conditioned on "
            f"{list(conditions) or 'nothing'}: {error}. Pass what it needs to the pipeline, or give it a default."
        ) from error


def _signature_of(function: Callable[..., torch.Tensor]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of a function without one, such as those of C extensions
        return None
