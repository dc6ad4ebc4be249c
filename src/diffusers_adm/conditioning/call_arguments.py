"""
The arguments that several pipelines have in common: which kind of value each takes. They are checked at the start of
every call, before anything is computed: what depends on a network, a scheduler or other arguments is checked later, by
its owner.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from ..ops.integers import check_integer
from ..ops.values import check_flag, check_magnitude, check_number, check_tensor, describe


P = ParamSpec("P")
R = TypeVar("R")

# Real numbers. Their limits are checked by their owners.
NUMBERS = (
    "guidance_scale",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "classifier_guidance_scale",
    "prior_guidance_scale",
    "eta",
)
# Integers with the least of each.
INTEGERS = {
    "batch_size": 1,
    "num_images_per_prompt": 1,
    "num_inference_steps": 1,
    "prior_num_inference_steps": 1,
    "super_res_num_inference_steps": 0,
    "height": 0,
    "width": 0,
    "noise_level": 0,
    "jump_length": 1,
    "jump_n_sample": 1,
    "prior_num_candidates": 1,
    "num_fixed_point_iterations": 1,
}
# These multiply the time of a call, and memory does not limit them.
REPETITIONS = ("jump_n_sample", "prior_num_candidates", "num_fixed_point_iterations")
MAX_REPETITIONS = 1000
FLAGS = ("return_dict", "guess_mode", "back_projection", "correct_kept")
# Tensors with their number of dimensions, if their owner does not check it. Images are checked where they are read.
TENSORS = {
    "latents": 4,
    "super_res_latents": 4,
    "prior_latents": 2,
    "image_embeds": 2,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "prompt_attention_mask": 2,
    "negative_prompt_attention_mask": 2,
    "pooled_prompt_embeds": 2,
    "negative_pooled_prompt_embeds": 2,
}
TEXTS = ("prompt", "negative_prompt", "source_prompt", "target_prompt")


def checks_arguments(call: Callable[P, R]) -> Callable[P, R]:
    """Makes a method of a pipeline check its arguments first, by `check_call_arguments`."""
    signature = inspect.signature(call)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        # Defaults are right, `None` included; elsewhere it is not.
        check_call_arguments({name: value for name, value in given.items() if value is not defaults[name]})
        return call(*args, **kwargs)

    return checked


def check_call_arguments(arguments: Mapping[str, Any]) -> None:
    """
    Raises a `ValueError` for arguments of another kind than they must be: text where a number belongs, NaN, tensors
    without values. Other names than those of this module are not checked.
    """
    for name, value in arguments.items():
        if name in NUMBERS:
            check_number(name, value)
        elif name in INTEGERS:
            check_integer(name, value, INTEGERS[name], maximum=MAX_REPETITIONS if name in REPETITIONS else None)
        elif name in FLAGS:
            check_flag(name, value)
        elif name in TENSORS:
            check_tensor(name, value, TENSORS[name])
            check_magnitude(name, value, "prompts" if "prompt" in name else "images")
        elif name in TEXTS:
            # Of a prompt and an image that have changed places, the owner of images says so.
            if not isinstance(arguments.get("image"), str):
                check_text(name, value)
        elif name == "callback_on_step_end" and not callable(value):
            raise ValueError(f"`{name}` is {describe(value)}; pass a function, or leave it out.")


def without_none(**arguments: Any) -> dict[str, Any]:
    """The arguments that were given, of those whose default is `None`."""
    return {name: value for name, value in arguments.items() if value is not None}


def check_text(name: str, value: Any) -> None:
    """Raises a `ValueError` unless a value is a text, or a list of at least one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` is {describe(value)}; pass a string, or a list of at least one.")
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"`{name}` is {describe(text)}, which holds half of a character. Pass valid Unicode.")
