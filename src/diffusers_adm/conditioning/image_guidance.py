"""
Functions that guide sampling by what the predicted image looks like: a colour, a target, a measurement.

`MeasurementGuidance` is diffusion posterior sampling (DPS, Chung et al. 2023,
https://huggingface.co/papers/2209.14687).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import ModelMixin

from ..ops.finiteness import count_not_finite
from .condition import SamplingCall, check_finite
from .guidance_functions import GuidanceFunction
from .image_format import ImageFormat
from .image_inputs import ImageInput, read_images, read_masks
from .latents import LatentSpace


class PixelGuidance(GuidanceFunction):
    """
    The base of functions of the predicted image, in pixels.

    Args:
        scale (`float`): Strength.
        through_unet (`bool`): See [`GuidanceFunction`].
        vae (`ModelMixin`, *optional*): Decodes the samples of a pipeline in latents: its own `pipe.vae`. The gradient
            flows through it.

    Raises:
        ValueError: For a scale that is not finite, and an autoencoder in float16 that computes in float32 for a while
            (`force_upcast` in its config), so that no gradient could flow back.
    """

    def __init__(self, scale: float, through_unet: bool, vae: ModelMixin | None):
        check_finite("scale", [scale])
        self.scale, self.through_unet, self.name = scale, through_unet, type(self).__name__
        self.latent_space = None if vae is None else LatentSpace(vae)
        if vae is not None and vae.config.get("force_upcast") and vae.dtype == torch.float16:
            raise ValueError(
                "`vae` is float16 and computes in float32 only while it decodes (`force_upcast` in its config), so no "
                "gradient flows back through it. Make it float32: `pipe.vae.to(torch.float32)`."
            )

    def pixels(self, samples: torch.Tensor) -> torch.Tensor:
        """Images in about [-1, 1] of samples."""
        return samples if self.latent_space is None else self.latent_space.decode(samples)

    def image_shape(self, call: SamplingCall) -> tuple[int, int, int, int]:
        """Shape of the images of a call, in pixels."""
        number, channels, height, width = call.noise.shape
        if self.latent_space is None:
            return number, channels, height, width
        if channels != self.latent_space.channels:
            raise ValueError(
                f"`vae` of {self.name} has latents of {self.latent_space.channels} channels, but the samples have "
                f"{channels}. Pass the `vae` of the pipeline, or none for samples in pixels."
            )
        factor = self.latent_space.factor
        return number, self.latent_space.image_channels[1], height * factor, width * factor

    @property
    def vae_hint(self) -> str:
        """The end of messages about samples of another shape than expected, which may be latents."""
        return " If the samples are latents, pass `vae=pipe.vae`." if self.latent_space is None else ""

    def rows(self, x: torch.Tensor, name: str, call: SamplingCall) -> torch.Tensor:
        """One entry for all images, or one for each prompt or image, as one row per image, on the device."""
        if len(x) not in (1, call.num_prompts, len(call.noise)):
            raise ValueError(
                f"`{name}` of {self.name} holds {len(x)} entries for {len(call.noise)} images. Pass one for all, or "
                "one for each."
            )
        return call.rows(x.to(call.noise.dtype))

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> Self:
        """See [`GuidanceFunction`]; a copy, so that several calls may use one function at the same time."""
        self.image_shape(call)
        return copy.copy(self)


class RegionGuidance(PixelGuidance):
    r"""
    Pulls a region of the predicted image towards a target image: the logarithm of a Gaussian likelihood of its pixels
    with the variance 1 / `scale`. A score.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): The target, of the size of the
            results: one for all, or one for each, as `image` of [`ADMInpaintPipeline`].
        mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): White where
            the target counts. `None`: everywhere.
        scale (`float`, defaults to 10.0): Strength.
        through_unet (`bool`, defaults to `False`), vae (`ModelMixin`, *optional*): See [`PixelGuidance`].
        image_format (`ImageFormat`, *optional*): That of the pipeline. `None`: 8-bit RGB.
    """

    def __init__(
        self,
        image: ImageInput,
        mask_image: ImageInput | None = None,
        scale: float = 10.0,
        *,
        through_unet: bool = False,
        vae: ModelMixin | None = None,
        image_format: ImageFormat | None = None,
    ):
        super().__init__(scale, through_unet, vae)
        self.target = 2 * read_images(image, "image", image_format or ImageFormat()) - 1
        self.mask = None if mask_image is None else read_masks(mask_image, "mask_image")

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> Self:
        """Checks sizes; raises a `ValueError` for a target or mask of another size than the results."""
        own, shape = super().for_call(call, conditions), self.image_shape(call)
        if tuple(self.target.shape[1:]) != shape[1:]:
            raise ValueError(
                f"`image` of {self.name} has shape {tuple(self.target.shape[1:])} (channels, height, width), but the "
                f"results have {shape[1:]}. Resize it, or convert its mode.{self.vae_hint}"
            )
        _check_mask(self, self.mask, shape)
        own.target = self.rows(self.target, "image", call)
        own.mask = None if self.mask is None else self.rows(self.mask, "mask_image", call)
        return own

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor, **conditions: Any
    ) -> torch.Tensor:
        """Minus the squared distance, one value an image."""
        difference = self.pixels(pred_original_sample) - self.target
        if self.mask is not None:
            difference = difference * self.mask
        return -self.scale / 2 * difference.square().flatten(1).sum(dim=1)


class ColorGuidance(PixelGuidance):
    r"""
    Pulls the mean colour of a region of the predicted image towards a colour, whatever the single pixels are. A score:
    minus `scale` / 2 times the number of pixels times the squared distance of the colours, so that each pixel is moved
    by `scale` times their difference.

    Args:
        color (sequence of `float`): One number a channel, in [0, 1].
        mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): White in the
            region. `None`: the whole image.
        scale (`float`, defaults to 10.0): Strength.
        through_unet (`bool`, defaults to `False`), vae (`ModelMixin`, *optional*): See [`PixelGuidance`].
    """

    def __init__(
        self,
        color: Sequence[float],
        mask_image: ImageInput | None = None,
        scale: float = 10.0,
        *,
        through_unet: bool = False,
        vae: ModelMixin | None = None,
    ):
        super().__init__(scale, through_unet, vae)
        is_text = isinstance(color, (str, bytes))
        self.color = torch.as_tensor(-1 if is_text else color, dtype=torch.float32)
        if self.color.ndim != 1 or not ((self.color >= 0) & (self.color <= 1)).all():
            raise ValueError(
                f"`color` is {color!r}; pass one number in [0, 1] for each channel, such as (1.0, 0.5, 0.0)."
            )
        self.mask = None if mask_image is None else read_masks(mask_image, "mask_image")
        if self.mask is not None and not self.mask.flatten(1).any(dim=1).all():
            raise ValueError(
                "`mask_image` is black everywhere, or one of several is, so there is no region to colour. White marks "
                "it."
            )

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> Self:
        """Checks sizes; raises a `ValueError` for another number of channels, or a mask of another size."""
        own, shape = super().for_call(call, conditions), self.image_shape(call)
        if len(self.color) != shape[1]:
            raise ValueError(
                f"`color` of {self.name} has {len(self.color)} numbers, but the images have {shape[1]} channels. Pass "
                f"one number for each.{self.vae_hint}"
            )
        _check_mask(self, self.mask, shape)
        own.color = self.color.to(call.noise)
        own.mask = None if self.mask is None else self.rows(self.mask, "mask_image", call)
        return own

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor, **conditions: Any
    ) -> torch.Tensor:
        """Minus the squared distance of the mean colour, one value an image."""
        pixels = self.pixels(pred_original_sample)
        mask = torch.ones_like(pixels[:, :1]) if self.mask is None else self.mask
        number = mask.flatten(1).sum(dim=1)
        mean = (pixels * mask).flatten(2).sum(dim=2) / number[:, None]
        return -self.scale / 2 * number * (mean - (2 * self.color - 1)).square().sum(dim=1)


class MeasurementGuidance(PixelGuidance):
    r"""
    Samples images that fit a measurement y = A x + noise, by diffusion posterior sampling: after each step, x_{t-1}
    moves by -`scale` times the gradient of ||y - A(x_0)|| with respect to x_t, x_0 being the prediction (DPS, eq. 16
    and algorithm 1, whose step size zeta_i is a constant over that norm). The norm is that of each image.

    Args:
        operator (`Callable`): A: images `(batch_size, channels, height, width)` in [-1, 1] to measurements
            `(batch_size, ...)`, differentiable; see `diffusers_adm.conditioning.measurements`. It need not be linear.
        measurement (`torch.Tensor` of shape `(1 or number of images, ...)`): y, in the values of A's results.
        scale (`float`, defaults to 1.0): Step size; the paper uses 0.3 to 1.
        through_unet (`bool`, defaults to `True`): `False` approximates the gradient without the backward pass of the
            U-Net, see [`GuidanceFunction`].
        vae (`ModelMixin`, *optional*): See [`PixelGuidance`].
    """

    kind = "shift"

    def __init__(
        self,
        operator: Callable[[torch.Tensor], torch.Tensor],
        measurement: torch.Tensor,
        scale: float = 1.0,
        *,
        through_unet: bool = True,
        vae: ModelMixin | None = None,
    ):
        super().__init__(scale, through_unet, vae)
        if not callable(operator):
            raise ValueError(
                f"`operator` is {operator!r}; pass a function of images, such as `GaussianBlurOperator(9, 2.0)`."
            )
        if not torch.is_tensor(measurement) or not measurement.is_floating_point() or measurement.ndim < 2:
            given = measurement.dtype if torch.is_tensor(measurement) else type(measurement).__name__
            raise ValueError(
                f"`measurement` is of type {given}; pass a floating point tensor `(number, ...)` as `operator` returns "
                "it, for images in [-1, 1]."
            )
        bad = count_not_finite(measurement, "entries")
        if bad is not None:
            raise ValueError(f"`measurement` holds NaN or infinity in {bad}. Pass finite numbers.")
        self.operator, self.measurement = operator, measurement

    def for_call(self, call: SamplingCall, conditions: Mapping[str, Any]) -> Self:
        """Checks the measurement; raises a `ValueError` if its shape is not that of a measured result."""
        own, shape = super().for_call(call, conditions), self.image_shape(call)
        expected = self.operator(torch.zeros(shape, device=call.noise.device, dtype=call.noise.dtype)).shape
        if expected[0] != shape[0] or self.measurement.shape[1:] != expected[1:]:
            raise ValueError(
                f"`measurement` has shape {tuple(self.measurement.shape)}, but `operator` measures images of shape "
                f"{shape} as {tuple(expected)}. Pass a measurement of images of the size of the results.{self.vae_hint}"
            )
        own.measurement = self.rows(self.measurement, "measurement", call)
        return own

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor, **conditions: Any
    ) -> torch.Tensor:
        """Minus the distance of each image from its measurement."""
        difference = self.measurement - self.operator(self.pixels(pred_original_sample))
        return -self.scale * difference.flatten(1).norm(dim=1)


def _check_mask(guidance: PixelGuidance, mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None and tuple(mask.shape[2:]) != tuple(shape[2:]):
        raise ValueError(
            f"`mask_image` of {guidance.name} is {mask.shape[3]} x {mask.shape[2]} pixels (width x height), but the "
            f"results are {shape[3]} x {shape[2]}. Pass a mask of their size."
        )
