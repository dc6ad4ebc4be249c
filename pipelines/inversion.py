"""Which arguments and schedulers `ADMPipeline.invert` takes: the sampling that it inverts must be deterministic."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin

from diffusers_adm.conditioning.guidance_functions import as_guidance_functions, name_of


# Arguments of calls that have no meaning in an inversion, with the reason.
REFUSED_ARGUMENTS = {
    "latents": "the latents are the result. Pass the image as the first argument, by position",
    "output_type": "the result is always a tensor of latents",
    "return_dict": "the result is always a tensor of latents",
    "num_images_per_prompt": "an image has one inversion. Pass one image for each result",
    "strength": "an inversion takes all steps, from an image to noise",
    "jump_length": "resampling draws new noise",
    "jump_n_sample": "resampling draws new noise",
    "back_projection": "it changes finished images, and not what they are sampled from",
}


def check_arguments_of_inversion(arguments: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for arguments of a call that have no meaning in an inversion."""
    for name, reason in REFUSED_ARGUMENTS.items():
        if name in arguments:
            raise ValueError(f"`invert` does not take `{name}`: {reason}. Leave `{name}` out.")
    eta = arguments.get("eta")
    if eta not in (None, 0):
        raise ValueError(
            f"`eta` is {eta!r}, but only sampling without new noise can be inverted. Leave it out, and generate with "
            "`eta=0.0`."
        )
    for function in as_guidance_functions(arguments.get("guidance_fn")):
        if function.kind != "score":
            raise ValueError(
                f"`guidance_fn` {name_of(function)} is of kind {function.kind!r}: it changes x_{{t-1}} after the step, "
                "which cannot be inverted. Pass functions of kind 'score', or leave it out."
            )


def without_exact_inverse(scheduler: SchedulerMixin) -> list[str]:
    """A warning if the scheduler clips what the network predicts, which an inversion does not."""
    options = inspect.signature(type(scheduler).__init__).parameters
    clipping = [name for name in ("clip_sample", "thresholding") if name in options and scheduler.config.get(name)]
    if not clipping:
        return []
    changes = ", ".join(f"{name}=False" for name in clipping)
    return [
        f"The scheduler clips the predicted x_0 ({' and '.join(f'`{name}`' for name in clipping)} in its config), but "
        "an inversion does not: the latents will not lead back to the image where a prediction leaves the range. Set "
        f"`pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {changes})` for both."
    ]
