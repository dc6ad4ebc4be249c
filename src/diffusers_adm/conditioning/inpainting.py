"""
The kept part of an image and its mask, as a network that was trained to inpaint takes them, and RePaint's resampling.

GLIDE (Nichol et al. 2021, https://huggingface.co/papers/2112.10741, section 4), RePaint (Lugmayr et al. 2022,
https://huggingface.co/papers/2201.09865), Stable Diffusion (Rombach et al. 2022,
https://huggingface.co/papers/2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin

from ..deprecations import renamed
from ..schedulers.diffusers_schedulers import keeps_no_state
from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs
from .guidance import add_noise_for_step, exact_prediction, precise_alphas_cumprod, signal_and_std
from .image_format import ImageFormat
from .image_inputs import ImageInput, as_fractions, read_images, read_masks, read_values
from .latents import LatentSpace
from .low_resolution import upsample
from .steering import GuidedPrediction


# For models that were not trained to inpaint. The paper uses 10, at ten times the cost; docs/inpainting.md measures the
# effect of the first ones.
DEFAULT_JUMP_N_SAMPLE = 3

# The channels that a U-Net of 2c + 1 channels takes after the c channels of x_t:
# "glide": `[image * keep_mask, keep_mask]`, where the mask is 1 in the kept part;
# "stable-diffusion": `[mask, image * (1 - mask)]`, where the mask is 1 in the part to inpaint.
InpaintingLayout = Literal["glide", "stable-diffusion"]
# What saved pipelines have without a recorded layout: that of diffusers' class is the only one, and so was GLIDE's in
# ours before there was a choice. (Others of 9 channels differ: those of Kandinsky are in GLIDE's layout.)
LAYOUT_OF_PIPELINE: dict[str, InpaintingLayout] = {
    "ADMInpaintPipeline": "glide",
    "StableDiffusionInpaintPipeline": "stable-diffusion",
}


def masked_image_channels(images: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    r"""
    The channels that a network trained to inpaint takes behind x_t: `[images * keep_mask, keep_mask]`.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        keep_mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`): 1 or `True` where the image is kept.
    """
    keep_mask = keep_mask.to(images.dtype)
    return torch.cat([images * keep_mask, keep_mask], dim=1)


def downsample_keep_mask(keep_mask: torch.Tensor, factor: int) -> torch.Tensor:
    r"""
    The keep mask of latents: one is kept if all of its pixels are.

    Args:
        keep_mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`): 1 or `True` where the image is kept.
        factor (`int`): Pixels per latent, along each side.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, 1, height / factor, width / factor)`.
    """
    return ~F.max_pool2d((~keep_mask.bool()).float(), factor).bool()


def inpainting_channels(
    images: torch.Tensor, keep_mask: torch.Tensor, latent_space: LatentSpace | None, layout: InpaintingLayout
) -> torch.Tensor:
    r"""
    The channels that a network trained to inpaint takes behind x_t, in training and sampling; see `InpaintingLayout`.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        keep_mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`): 1 or `True` where the image is kept.
        latent_space (`LatentSpace`, *optional*): Encodes the masked image, to the mode of its posterior.
        layout (`str`): One of `InpaintingLayout`.
    """
    # The masked pixels must not leak into the input of the network, so they are masked before they are encoded.
    visible, factor = images * keep_mask.to(images.dtype), 1
    if latent_space is not None:
        visible, factor = latent_space.encode(visible).to(images.dtype), latent_space.factor
    if layout == "glide":
        # With an autoencoder, latents that also encode masked pixels are 0.
        return masked_image_channels(visible, downsample_keep_mask(keep_mask, factor))
    # Stable Diffusion was trained with one pixel of the mask for each latent, the upper left one.
    mask = 1 - keep_mask.to(images.dtype)[:, :, ::factor, ::factor]
    return torch.cat([mask, visible], dim=1)


def resampling_walk(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    r"""
    The order in which RePaint takes the steps of a chain: 0 is the noisiest one, `num_steps - 1` leads to x_0.

    A step that does not follow the one before it marks a jump: the sample is noised again first, up to that step.

    Args:
        num_steps (`int`): Length of the chain.
        jump_length (`int`): Number j of steps that a jump takes back. Jumps start where 0, j, 2j, ... steps would be
            left before the last one, as far as there are j steps to go back and one more.
        jump_n_sample (`int`): Number r of times that the steps of a jump are taken, the first one included; 1 is the
            chain itself.

    Returns:
        `list` of `int`: `num_steps + (r - 1) * j * (number of places to jump from)` of them.
    """
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    walk, left = [], num_steps - 1  # steps left after the coming one
    while left >= 0:
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
        walk.append(num_steps - 1 - left)
        left -= 1
    return walk


@dataclass
class Resampling:
    """
    The arguments of a call for RePaint's resampling; see [`ADMInpaintPipeline`].

    Attributes:
        jump_length (`int`), jump_n_sample (`int`, *optional*): See `resampling_walk`.
    """

    jump_length: int
    jump_n_sample: int | None

    def check(self, scheduler: SchedulerMixin) -> None:
        """Raises a `ValueError` for numbers out of range, and for a scheduler that cannot jump."""
        for name, value in vars(self).items():
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; pass an integer of at least 1.")
        if (self.jump_n_sample or 1) > 1 and not keeps_no_state(scheduler):
            raise ValueError(
                f"`jump_n_sample` is {self.jump_n_sample}, but a {type(scheduler).__name__} uses its earlier steps, so "
                "it cannot jump. Pass `jump_n_sample=1` (the kept part is replaced in each step all the same), or use "
                "a `LearnedVarianceDDPMScheduler`, `DDPMScheduler` or `DDIMScheduler`."
            )

    def walk(self, num_steps: int, jumps_by_default: bool, keeps_anything: bool) -> list[int]:
        """
        The steps to take; see `resampling_walk`.

        Raises:
            ValueError: If a jump was asked for that is longer than the chain.
        """
        repeats = self.jump_n_sample
        if repeats is None:
            repeats = DEFAULT_JUMP_N_SAMPLE if jumps_by_default else 1
        elif repeats > 1 and self.jump_length >= num_steps:
            raise ValueError(
                f"`jump_length` is {self.jump_length}, but there are only {num_steps} steps to jump back over. Pass a "
                "smaller one, ask for more steps, or pass `jump_n_sample=1`."
            )
        return resampling_walk(num_steps, self.jump_length, repeats if keeps_anything else 1)


def sample_channels_of(unet_config: Mapping[str, Any]) -> int | None:
    """
    Channels c of a sample: a U-Net takes c, 2 c + 1 (trained with masks) or 3 c + 1 channels (which upsamples as well)
    and gives c, or 2 c with a learned variance. `None` for a U-Net with other channels.
    """
    in_channels, out_channels = unet_config["in_channels"], unet_config["out_channels"]
    for c in (out_channels, out_channels // 2):  # never both: the number would have to be twice itself
        if out_channels in (c, 2 * c) and in_channels in (c, 2 * c + 1, 3 * c + 1):
            return c
    return None


def layout_of_pipeline(config: Mapping[str, Any]) -> InpaintingLayout | None:
    """The layout of a pipeline that takes masks, by its saved config (`model_index.json`); `None`: not known."""
    name = config.get("_class_name")
    if isinstance(name, (list, tuple)):  # of a pipeline that is saved with its code
        name = name[-1]
    return config.get("inpainting_layout") or LAYOUT_OF_PIPELINE.get(str(name))


def check_layout(
    layout: InpaintingLayout | None, unet_config: Mapping[str, Any], in_latents: bool
) -> InpaintingLayout | None:
    """
    The layout of a U-Net; `None` for one that takes no mask.

    Args:
        layout (`str`, *optional*): As recorded or asked for.
        in_latents (`bool`): Whether there is an autoencoder.

    Raises:
        ValueError: For an unknown layout, one that the U-Net cannot have, and a missing one in latents, where both are
            in use.
    """
    if layout is not None and layout not in get_args(InpaintingLayout):
        raise ValueError(f"`inpainting_layout` is {layout!r}; it must be one of {list(get_args(InpaintingLayout))}.")
    in_channels, channels = unet_config["in_channels"], sample_channels_of(unet_config)
    if channels is None or in_channels == channels:
        if layout is not None:
            raise ValueError(
                f"`inpainting_layout` is {layout!r}, but the U-Net (`in_channels={in_channels}`) takes no mask. Leave "
                "it out."
            )
        return None
    if in_channels == 3 * channels + 1 and layout == "stable-diffusion":
        raise ValueError(
            f"`inpainting_layout` is {layout!r}, but the U-Net (`in_channels={in_channels}`) upsamples as well, which "
            "only GLIDE's do. Leave it out, or pass 'glide'."
        )
    if layout is None and in_latents:
        raise ValueError(
            f"The U-Net takes {in_channels} channels, x_t and {channels + 1} for the masked image and its mask, but "
            "their order is not recorded. Pass `inpainting_layout`: 'glide' for [x_t, masked image, keep mask], where "
            "the mask is 1 in the kept part, or 'stable-diffusion' for [x_t, mask, masked image], where the mask is 1 "
            "in the part to inpaint."
        )
    return layout or "glide"


class InpaintingCondition(Condition):
    """
    The kept part of images and its mask. A U-Net that was trained to inpaint takes them as channels, and its prediction
    may be corrected where the image is kept (`correct`); for any other the kept part of x_t is replaced (`replace`).

    Args:
        unet_config (mapping, *optional*): The config of the U-Net. Not needed for training.
        vae (`ModelMixin`, *optional*): Encodes the images.
        image_format (`ImageFormat`, *optional*): Format of the images. `None`: that of a model whose config has none.
        layout (`str`, *optional*): See `check_layout`; of a network that takes masks.

    Attributes, after `prepare` one row an image and on the device:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`): As given, see `read_values`: fractions
            in [0, 1] for viewable images, values of the data for other formats.
        keep_pixels (`torch.BoolTensor` of shape `(num_images, 1, height, width)`): Where the images are kept.
        original (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): x_0 of the images.
        keep_mask (`torch.BoolTensor` of shape `(num_images, 1, height, width)`): Where x_0 is kept.
        corrects (`bool`): Whether to `correct` predictions.
        noise (`torch.Tensor`, *optional*): The noise of the kept part in all steps, for schedulers that use their
            earlier steps; `None`: it is drawn for each step.
    """

    argument = "image"

    def __init__(
        self,
        unet_config: Mapping[str, Any] | None = None,
        vae: ModelMixin | None = None,
        image_format: ImageFormat | None = None,
        layout: InpaintingLayout | None = "glide",
    ):
        super().__init__()
        self.latent_space, self.layout = None if vae is None else LatentSpace(vae), layout
        if unet_config is not None:
            self.channels = sample_channels_of(unet_config)
            self.is_trained = unet_config["in_channels"] > self.channels
            self.takes_low_res = unet_config["in_channels"] == 3 * self.channels + 1
            channels = self.channels if self.latent_space is None else self.latent_space.image_channels[0]
            self.image_format = ImageFormat.of_channels(channels) if image_format is None else image_format
        self.low_res: torch.Tensor | None = None

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `images` `(batch_size, channels, height, width)` in [-1, 1] and `keep_mask` with one channel."""
        with torch.no_grad():  # of the autoencoder
            channels = inpainting_channels(
                batch["images"], batch["keep_mask"], self.latent_space, self.layout or "glide"
            )
        return UNetInputs(extra_channels=channels)

    def read(
        self,
        image: ImageInput,
        mask_image: ImageInput,
        low_res_image: ImageInput | None,
        correct_kept: bool | None = None,
    ) -> InpaintingCondition:
        """
        Takes the arguments of a call; raises a `ValueError` for those that `read_images` and `read_masks` refuse, and
        for `correct_kept` with a network that takes no mask.
        """
        if correct_kept is not None and not self.is_trained:
            raise ValueError(
                f"`correct_kept` is {correct_kept}, but this U-Net takes no mask, so the kept part is always replaced. "
                "Leave it out."
            )
        self.corrects = self.is_trained and (self.layout == "glide" if correct_kept is None else correct_kept)
        self.images = read_values(image, "image", self.image_format)
        self.keep_pixels = ~read_masks(mask_image, "mask_image")
        numbers = {"image": len(self.images), "mask_image": len(self.keep_pixels)}
        if low_res_image is not None:
            self.low_res = 2 * read_images(low_res_image, "low_res_image", self.image_format) - 1
            numbers["low_res_image"] = len(self.low_res)
        self.counts = {name: number for name, number in numbers.items() if number > 1}
        self.image_size = tuple(self.images.shape[2:])
        # Read before the masks move to the device.
        self.keeps_anything = bool(self.keep_pixels.any())
        self.keeps_all_of_one = bool(self.keep_pixels.flatten(1).all(dim=1).any())
        return self

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """Raises a `ValueError` for an image or mask of another size, and a missing or large low-resolution image."""
        height, width = self.image_size
        if self.image_size != size:
            raise ValueError(
                f"`image` is {width} x {height} pixels (width x height), but {size[1]} x {size[0]} are generated. "
                f"Resize image and mask, or pass `height={height}` and `width={width}` if the model should try that "
                "size."
            )
        if self.keep_pixels.shape[2:] != size:
            raise ValueError(
                f"`mask_image` is {self.keep_pixels.shape[3]} x {self.keep_pixels.shape[2]} pixels (width x height), "
                f"but `image` is {width} x {height}. Pass a mask of the size of the image."
            )
        if self.takes_low_res != (self.low_res is not None):
            raise ValueError(
                "`low_res_image` is missing: this U-Net upsamples and inpaints. Pass the low-resolution image."
                if self.takes_low_res
                else "`low_res_image` was given, but this U-Net does not take one. Leave it out."
            )
        if self.low_res is not None and any(a > b for a, b in zip(self.low_res.shape[2:], size, strict=True)):
            raise ValueError(
                f"`low_res_image` is {self.low_res.shape[3]} x {self.low_res.shape[2]} pixels (width x height), larger "
                f"than `image` with {width} x {height}. Pass the low-resolution image."
            )

    def masks_without_effect(self, strength: float, resampling: Resampling) -> list[str]:
        """Warnings about masks, such as inverted or empty ones, that leave an argument of the call without effect."""
        warnings = []
        if self.keeps_all_of_one:
            warnings.append(
                "`mask_image` is black everywhere, or one of several is: these images are returned as they were given. "
                "White marks the pixels to inpaint."
            )
        if not self.keeps_anything and (strength == 1.0 or (resampling.jump_n_sample or 1) > 1):
            name = "`image` has" if strength == 1.0 else "`jump_n_sample` has"
            warnings.append(
                f"{name} no effect: `mask_image` is white everywhere, so nothing of the image is kept. Black marks the "
                "pixels to keep."
            )
        return warnings

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The channels of a U-Net that was trained to inpaint, in both passes."""
        dtype, device = call.noise.dtype, call.noise.device
        self.images, self.keep_pixels = call.rows(self.images.to(dtype)), call.rows(self.keep_pixels)
        pixels = 2 * as_fractions(self.images, self.image_format) - 1
        if self.latent_space is None:
            self.original, self.keep_mask = pixels, self.keep_pixels
        else:
            self.original = self.latent_space.encode(pixels).to(dtype)
            self.keep_mask = downsample_keep_mask(self.keep_pixels, self.latent_space.factor)
        self.scheduler = call.scheduler
        self.alphas_cumprod = precise_alphas_cumprod(call.scheduler, device)
        # Solvers extrapolate from one step to the next: their kept part must move on a smooth path.
        self.noise = None if keeps_no_state(call.scheduler) else call.noise
        if not self.is_trained:
            return PreparedCondition.same_in_both(UNetInputs())
        channels = inpainting_channels(pixels, self.keep_pixels, self.latent_space, self.layout or "glide")
        if self.low_res is not None:
            channels = torch.cat([channels, upsample(call.rows(self.low_res.to(dtype)), *call.size)], dim=1)
        return PreparedCondition.same_in_both(UNetInputs(extra_channels=channels))

    def noised(self, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A sample of q(x_t | x_0) of the images, at the coming step and as the scheduler scales its samples."""
        return add_noise_for_step(self.scheduler, self.original, noise, t, self.alphas_cumprod)

    def replace(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Replaces the kept part of x_t by the noised image (RePaint)."""
        return torch.where(self.keep_mask, self.noised(noise, t), latents)

    def jump(
        self, latents: torch.Tensor, noise: torch.Tensor, cleaner: torch.Tensor, noisier: torch.Tensor
    ) -> torch.Tensor:
        """Noises samples of the timestep `cleaner` again to the timestep `noisier` (RePaint, algorithm 1)."""
        alpha_noisier, alpha_cleaner = self.alphas_cumprod.index_select(0, torch.stack([noisier, cleaner]))
        ratio = alpha_noisier / alpha_cleaner  # all steps of a jump at once: q(x_t | x_s) is a Gaussian, too
        return ratio.sqrt() * latents + (1 - ratio).sqrt() * noise

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`keep_mask` (1 channel) and `known_sample`, x_0 of the images; both of the size of samples."""
        return {"keep_mask": self.keep_mask, "known_sample": self.original}

    def correct(self, prediction: GuidedPrediction, latents: torch.Tensor, t: torch.Tensor) -> GuidedPrediction:
        """Changes model output, gradients and shift so that the predicted x_0 is the image where it is kept."""
        at = signal_and_std(self.scheduler, t, self.alphas_cumprod)
        sample = self.scheduler.scale_model_input(latents, t)
        exact = exact_prediction(sample, self.original, *at, self.scheduler.config.prediction_type)
        mean, variance = prediction.model_output[:, : self.channels], prediction.model_output[:, self.channels :]
        mean = torch.where(self.keep_mask, exact, mean)
        # The mean of kept pixels is known, so that no gradient may change it.
        step_kwargs = {name: value.masked_fill(self.keep_mask, 0) for name, value in prediction.step_kwargs.items()}
        shift = None if prediction.shift is None else prediction.shift.masked_fill(self.keep_mask, 0)
        return GuidedPrediction(torch.cat([mean, variance], dim=1), step_kwargs, shift)


__getattr__ = renamed(__name__, {"known_channels": "masked_image_channels"})
