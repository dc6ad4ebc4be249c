"""
Images that a sample must follow, such as edges or regions, through ControlNets (Zhang et al. 2023,
https://huggingface.co/papers/2302.05543).

The residuals of several ControlNets are added up (section 3.4 of the paper). Guess mode is not in the paper, but in the
authors' code and in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel

from ..models.controlnet_adagn import AdaGNControlNetModel, AdaGNMultiControlNetModel
from ..schedulers.noise_schedules import check_same_noise
from .condition import (
    Condition,
    MergedConditions,
    Passes,
    PreparedCondition,
    SamplingCall,
    Step,
    UNetInputs,
    check_finite,
    check_interval,
    warn_of_interval,
)
from .image_format import ImageFormat, describe_size
from .image_inputs import ImageInput, read_control_images


ControlNet = AdaGNControlNetModel | AdaGNMultiControlNetModel
ControlNets = list[AdaGNControlNetModel] | tuple[AdaGNControlNetModel, ...]


def nets_of(controlnet: ControlNet) -> ControlNets:
    """The ControlNets that a component of a pipeline consists of."""
    if isinstance(controlnet, AdaGNMultiControlNetModel):
        return cast(ControlNets, tuple(controlnet.nets))
    return (controlnet,)


def as_one_model(controlnet: ControlNet | ControlNets) -> ControlNet:
    """Joins a list of ControlNets to one model; raises a `ValueError` for an empty list and for other models."""
    nets = controlnet if isinstance(controlnet, (list, tuple)) else nets_of(controlnet)
    if not nets:
        raise ValueError("`controlnet` is an empty list; pass an `AdaGNControlNetModel`, or a list of them.")
    for net in nets:
        if not isinstance(net, AdaGNControlNetModel):
            raise ValueError(
                f"`controlnet` is, or holds, a {type(net).__name__}; pass an `AdaGNControlNetModel`, a list of them or "
                "one `AdaGNMultiControlNetModel`. Load files of diffusers' `ControlNetModel` with "
                "`AdaGNControlNetModel.from_pretrained`."
            )
    return AdaGNMultiControlNetModel(controlnet) if isinstance(controlnet, (list, tuple)) else controlnet


def check_controlnet(controlnet: ControlNet, unet: ModelMixin, scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` unless U-Net, scheduler and ControlNets are compatible."""
    if isinstance(unet, UNet2DModel):
        raise ValueError(
            f"`unet` is a {type(unet).__name__}, which takes no residuals of a ControlNet. Load it with "
            "`AdaGNUNet2DModel.from_pretrained`, which gives the same numbers."
        )
    nets = nets_of(as_one_model(controlnet))
    pools = [net.config.global_pool_conditions for net in nets]
    if len(set(pools)) > 1:
        raise ValueError(
            f"The ControlNets have `global_pool_conditions` {pools}. Those that pool are left out of the unconditional "
            "pass and the others are not, so they cannot be used together."
        )
    for i, net in enumerate(nets):
        net.check_base(unet)
        name = f"ControlNet {i} (counted from 0)" if len(nets) > 1 else "`controlnet`"
        controlnet_format_of(net)  # checks the entry of its config
        check_same_noise(name, net.config.get("noise_schedule"), scheduler, net)


def controlnet_format_of(controlnet: AdaGNControlNetModel) -> ImageFormat:
    """Format of the images of a ControlNet: that of its config (`condition_format`), or that of its channels."""
    config = controlnet.config
    return ImageFormat.from_config(config.get("condition_format"), config.conditioning_channels, "condition_format")


class ControlNetCondition(Condition):
    """
    The images that ControlNets are given.

    Args:
        controlnet (`AdaGNControlNetModel` or `AdaGNMultiControlNetModel`, *optional*): Not needed for training.
        argument (`str`, defaults to `"image"`): The pipeline's name for the images.
        dropout_prob (`float`, defaults to 0.0): Share of the images that training replaces by black ones.

    Attributes, lists with one entry for each ControlNet:
        images (list of `torch.Tensor` of shape `(num_images, conditioning_channels, height, width)`): In [0, 1].
        scales, starts, ends (list of `float`): Factor of the residuals, and the fractions of the steps between which
            they are added.
        guess_mode (`bool`): Whether they are left out of the unconditional pass.
    """

    def __init__(self, controlnet: ControlNet | None = None, *, argument: str = "image", dropout_prob: float = 0.0):
        super().__init__()
        self.controlnet, self.argument, self.dropout_prob = controlnet, argument, dropout_prob
        self.nets = [] if controlnet is None else nets_of(controlnet)
        self.is_multiple = isinstance(controlnet, AdaGNMultiControlNetModel)  # which takes lists

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """
        Reads `conditions` `(batch_size, channels, height, width)` in [0, 1]. Gives `controlnet_cond`, which is for the
        function that runs ControlNet and U-Net.
        """
        images = batch["conditions"]
        dropped = torch.rand(len(images), device=images.device) < self.dropout_prob
        return UNetInputs({"controlnet_cond": images.masked_fill(dropped[:, None, None, None], 0)})

    def read(
        self,
        image: ImageInput | Sequence[ImageInput],
        scale: float | Sequence[float],
        guess_mode: bool,
        start: float | Sequence[float],
        end: float | Sequence[float],
    ) -> ControlNetCondition:
        """Takes the arguments of a call; raises a `ValueError` unless there is one of each for each ControlNet."""
        if not self.nets:
            raise ValueError(
                f"`{self.argument}` was given, but this pipeline has no `controlnet`. Leave it out, or load the "
                "pipeline with `controlnet=`."
            )
        entries = self._one_for_each(image, self.argument) if self.is_multiple else [image]
        self.images = [
            read_control_images(entry, self._name(i), controlnet_format_of(net))
            for i, (entry, net) in enumerate(zip(entries, self.nets, strict=True))
        ]
        self.image_size = tuple(self.images[0].shape[2:])
        numbers = {self._name(i): len(images) for i, images in enumerate(self.images)}
        self.counts = {name: number for name, number in numbers.items() if number > 1}
        self.scales = self._numbers(scale, "controlnet_conditioning_scale")
        self.starts = self._numbers(start, "control_guidance_start")
        self.ends = self._numbers(end, "control_guidance_end")
        for first, last in zip(self.starts, self.ends, strict=True):
            check_interval("control_guidance", first, last)
        # Pooled residuals were trained to be left out of the unconditional pass, as in diffusers.
        self.guess_mode = guess_mode or self.nets[0].config.global_pool_conditions
        return self

    def _name(self, number: int) -> str:
        return f"{self.argument}[{number}]" if self.is_multiple else self.argument

    def _one_for_each(self, values: Any, name: str) -> Sequence[Any]:
        number = len(self.nets)
        if not isinstance(values, (list, tuple)) or len(values) != number:
            got = f"holds {len(values)} entries" if isinstance(values, (list, tuple)) else "is no list"
            raise ValueError(
                f"`{name}` {got}, but this pipeline has {number} ControlNet{'s' * (number > 1)}. Pass a list with one "
                "entry for each of them."
            )
        return values

    def _numbers(self, values: float | Sequence[float], name: str) -> list[float]:
        is_list = isinstance(values, (list, tuple))
        numbers = self._one_for_each(values if is_list else [values] * len(self.nets), name)
        check_finite(name, numbers)
        return [float(value) for value in numbers]

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """Raises a `ValueError` for images of another size than the ControlNets take for these results."""
        pixels = size[0] // sample_size[0]  # for each pixel of a sample
        for i, (images, net) in enumerate(zip(self.images, self.nets, strict=True)):
            given, factor = tuple(images.shape[2:]), net.conditioning_factor
            wanted = (sample_size[0] * factor, sample_size[1] * factor)
            if given == wanted:
                continue
            name = self._name(i)
            message = f"`{name}` is {describe_size(given)} (height x width), but {describe_size(size)} are generated"
            if wanted != size:
                message += f", for which this ControlNet takes images of {describe_size(wanted)}"
            height, width = (side // factor * pixels for side in given)
            way_out = "Resize it"
            if given[0] % factor == 0 and given[1] % factor == 0:
                way_out += f", or pass `height={height}` and `width={width}`"
            raise ValueError(f"{message}. {way_out}.")

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """No inputs but the residuals of each step; the images are embedded here, once for all steps."""
        images = self.images = [call.rows(images.to(call.unet_dtype)) for images in self.images]
        used = [each if scale != 0.0 else None for each, scale in zip(images, self.scales, strict=True)]
        if any(self.scales):
            self.embeds = self.controlnet.embed_condition(used if self.is_multiple else used[0])
        return PreparedCondition.same_in_both(UNetInputs())

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`control_images`, one batch for each ControlNet."""
        return {"control_images": self.images}

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """Warns of ControlNets that act in no step. (A scale of 0 is taken for intended.)"""
        warnings = []
        for i, (scale, start, end) in enumerate(zip(self.scales, self.starts, self.ends, strict=True)):
            if scale != 0.0:
                warnings += warn_of_interval(f"`{self._name(i)}`", "control_guidance", start, end, num_steps)
        return warnings

    def at_step(
        self, model_input: torch.Tensor, step: Step, merged: MergedConditions, passes: Passes
    ) -> dict[str, Any]:
        """The residuals of the ControlNets that act in a step."""
        scales = [
            scale if step.is_within(start, end) else 0.0
            for scale, start, end in zip(self.scales, self.starts, self.ends, strict=True)
        ]
        if not any(scales) or (self.guess_mode and passes == "unconditional"):
            return {}
        adds_zeros = self.guess_mode and passes == "both"
        if adds_zeros:
            model_input, passes = model_input.chunk(2)[1], "conditional"
        down, mid = self.controlnet(
            model_input,
            step.timestep,
            controlnet_cond_embeds=self.embeds,
            conditioning_scale=scales if self.is_multiple else scales[0],
            guess_mode=self.guess_mode,
            return_dict=False,
            **merged.inputs(passes).kwargs,
        )
        if adds_zeros:
            down = [torch.cat([torch.zeros_like(residual), residual]) for residual in down]
            mid = torch.cat([torch.zeros_like(mid), mid])
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def _is_default(value: Any, default: float) -> bool:
    return isinstance(value, Real) and value == default  # arrays would be compared entry by entry


def optional_control(
    controlnet: ControlNet | None,
    control_image: ImageInput | Sequence[ImageInput] | None,
    scale: float | Sequence[float],
    guess_mode: bool,
    start: float | Sequence[float],
    end: float | Sequence[float],
) -> list[Condition]:
    """
    The ControlNet condition of a pipeline that also runs without one; empty without a `control_image`.

    Raises:
        ValueError: See `ControlNetCondition.read`; for other values than the defaults without a `control_image`.
    """
    if control_image is not None:
        condition = ControlNetCondition(controlnet, argument="control_image")
        return [condition.read(control_image, scale, guess_mode, start, end)]
    values = {
        "controlnet_conditioning_scale": (scale, 1.0),
        "guess_mode": (guess_mode, False),
        "control_guidance_start": (start, 0.0),
        "control_guidance_end": (end, 1.0),
    }
    given = [f"`{name}`" for name, (value, default) in values.items() if not _is_default(value, default)]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would have no effect, as there is no `control_image`. Pass it, or leave them out."
        )
    return []
