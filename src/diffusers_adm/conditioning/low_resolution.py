"""
The low-resolution image that conditions an upsampler: downsampled, noised and upsampled in the same way in training and
sampling.

Noise on the low-resolution image, whose level conditions the network, makes an upsampler robust to artifacts of the
base model ("Gaussian conditioning augmentation", Ho et al. 2021, https://huggingface.co/papers/2106.15282, section 4).
Upsampling is that of guided-diffusion (https://huggingface.co/papers/2105.05233) and GLIDE
(https://huggingface.co/papers/2112.10741). In latents, the image itself is concatenated to them (Rombach et al. 2022,
https://huggingface.co/papers/2112.10752, section 4.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding

from ..deprecations import renamed
from .condition import PreparedCondition, SamplingCall, UNetInputs
from .image_format import ImageFormat, Size, as_size, describe_resolution, describe_size
from .image_inputs import ImageInput
from .source_image import ConcatenatedImageCondition


def downsample(images: torch.Tensor, factor: int, num_levels: int | None = 256) -> torch.Tensor:
    r"""
    Downsamples images by averaging blocks of `factor` x `factor` pixels, and rounds to the levels of the data (halves
    up), 8 bits by default, as Pillow's `Image.reduce(factor)` does.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Values of the data scaled to [-1, 1];
            `factor` divides height and width.
        factor (`int`): At least 1.
        num_levels (`int`, *optional*, defaults to 256): Number of values that the data can have; see `ImageFormat`.
            `None`: continuous data, whose means are not rounded.
    """
    if num_levels is None:
        return F.avg_pool2d(images, factor)
    half = (num_levels - 1) / 2
    levels = ((images + 1) * half).round()  # whole numbers, so that halves of their means are exact
    if (num_levels - 1) * factor**2 > 2**24 and images.device.type != "mps":  # float32 does not hold such sums
        levels = levels.double()
    return (F.avg_pool2d(levels, factor) + 0.5).floor().to(images.dtype) / half - 1


def add_noise_to_low_res(
    low_res: torch.Tensor, noise: torch.Tensor, noise_levels: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    r"""
    Noises images to a level of a noise schedule: level 0 is without noise, level n is timestep n - 1.

    Args:
        low_res (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        noise (`torch.Tensor` of that shape): Standard normal.
        noise_levels (`torch.LongTensor` of shape `(batch_size,)`): In `[0, len(alphas_cumprod)]`.
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): Of the scheduler.
    """
    # Cast to this dtype before it moves: there are devices without float64.
    table = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod]).to(low_res.dtype).to(noise_levels.device)
    alpha = table[noise_levels][:, None, None, None]
    return alpha.sqrt() * low_res + (1 - alpha).sqrt() * noise


def noise_level_embedding(noise_levels: torch.Tensor, dim: int) -> torch.Tensor:
    """The sinusoidal embedding `(batch_size, dim)`, float32, of the level for a U-Net with `time_cond_proj_dim=dim`."""
    return get_timestep_embedding(noise_levels, dim, flip_sin_to_cos=True, downscale_freq_shift=0)


def check_low_res_size(low_res_size: Size, sample_size: Size | None, factor: int = 1) -> None:
    """
    Raises a `ValueError` unless images of the size `low_res_size`, upsampled by one factor along both sides, have the
    size of the images of `sample_size`, if that is known, and are no larger than the samples. `factor`: number of image
    pixels per latent.
    """
    (h, w), samples = as_size(low_res_size), as_size(sample_size)
    if samples is None:
        return
    height, width = samples[0] * factor, samples[1] * factor
    if h * width != w * height or h > height:
        size = f"and the `sample_size` of the U-Net is {height} x {width}"
        if factor > 1:
            size = f"and the images are {height} x {width} (`sample_size` of the U-Net, times {factor} of `vae`)"
        raise ValueError(
            f"`low_res_size` is {h} x {w} (height x width) {size}; "
            "the factor must be the same along both sides, and at least 1. Pass both sides, such as "
            f"`low_res_size=[{max(1, height // 4)}, {max(1, width // 4)}]` for a factor of 4."
        )
    check_fits_latents((h, w), samples, "`low_res_size` is")


def check_fits_latents(low_res_size: Size, latent_size: Size, subject: str) -> None:
    """Raises a `ValueError` for low-resolution images that are larger than the samples to concatenate them to."""
    (h, w), (height, width) = as_size(low_res_size), as_size(latent_size)
    if h > height or w > width:
        raise ValueError(
            f"{subject} {describe_size((h, w))}, but the latents that it is concatenated to are only "
            f"{describe_size((height, width))}, which would lose its details. Use smaller images, larger results, or "
            "an autoencoder with a smaller factor."
        )


def match_low_res(images: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    r"""
    Shifts each block of pixels so that its mean is the pixel of the low-resolution image (one step of back-projection,
    Irani & Peleg 1991, doi:10.1016/1049-9652(91)90045-L).

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, factor * h, factor * w)`): In [-1, 1]; the result may
            lie outside.
        low_res (`torch.Tensor` of shape `(batch_size, channels, h, w)`): In [-1, 1].
    """
    factor = images.shape[-1] // low_res.shape[-1]
    return images + F.interpolate(low_res - F.avg_pool2d(images, factor), scale_factor=factor, mode="nearest")


def upsample(low_res: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Upsamples images `(batch_size, channels, h, w)` bilinearly, to be concatenated to the sample."""
    return F.interpolate(low_res, (height, width), mode="bilinear", align_corners=False)


class LowResolutionCondition(ConcatenatedImageCondition):
    """
    The low-resolution image of an upsampler, and its noise level.

    Args:
        unet_config (mapping): The config of the U-Net. With `time_cond_proj_dim` it takes the noise level.
        scheduler ([`SchedulerMixin`]): Its noise schedule is that of the levels.
        low_res_size (`int` or `(height, width)`, *optional*): Size of the low-resolution images of training: a square,
            or both sides.
        max_noise_level (`int`, *optional*): Highest level of training; `None`: not known.
        image_format (`ImageFormat`, *optional*): Format of the images. Training rounds the low-resolution ones to its
            levels. `None`: 8-bit RGB.
        factor (`int`, defaults to 1): Number of image pixels per sample pixel, along each side, with an autoencoder.

    Raises:
        ValueError: For a `low_res_size` that is not the size of the large images divided by one factor.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        scheduler: SchedulerMixin,
        *,
        low_res_size: Size | None = None,
        max_noise_level: int | None = None,
        image_format: ImageFormat | None = None,
        factor: int = 1,
    ):
        super().__init__()
        if low_res_size is not None:
            check_low_res_size(low_res_size, unet_config.get("sample_size"), factor)
        self.image_format, self.factor = image_format or ImageFormat(), factor
        samples = as_size(unet_config.get("sample_size"))
        self.large_size = None if samples is None else (samples[0] * factor, samples[1] * factor)
        self.embedding_dim = unet_config.get("time_cond_proj_dim")
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.low_res_size, self.max_noise_level = as_size(low_res_size), max_noise_level

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """
        Downsamples `images` `(batch_size, channels, height, width)` in [-1, 1] to `low_res_size`; with a level
        embedding, noises them to random levels up to `max_noise_level`. The channels have the size of the samples.
        """
        images = batch["images"]
        factor = images.shape[-1] // self.low_res_size[1]
        low_res, kwargs = downsample(images, factor, self.image_format.num_levels), {}
        if self.embedding_dim is not None:
            if self.alphas_cumprod.device != images.device:  # once, not in each step
                self.alphas_cumprod = self.alphas_cumprod.float().to(images.device)
            levels = torch.randint(self.max_noise_level + 1, (len(images),), device=images.device)
            low_res = add_noise_to_low_res(low_res, torch.randn_like(low_res), levels, self.alphas_cumprod)
            kwargs["timestep_cond"] = noise_level_embedding(levels, self.embedding_dim)
        size = images.shape[2] // self.factor, images.shape[3] // self.factor
        return UNetInputs(kwargs, upsample(low_res, *size))

    def read(self, image: ImageInput, noise_level: int | None, back_projection: bool) -> LowResolutionCondition:
        """
        Takes the arguments of a call; raises a `ValueError` for unusable images or levels.

        Args:
            image: Low-resolution images; see `read_images`.
            noise_level (`int`, *optional*): `None`: 0.
            back_projection (`bool`): Whether `match_low_res` follows, which needs a whole factor.
        """
        self.read_source(image, self.image_format)
        self.noise_level = 0 if noise_level is None else noise_level
        self._check_level(self.noise_level)
        self.back_projection = back_projection
        return self

    def _check_level(self, level: int) -> None:
        num_timesteps = len(self.alphas_cumprod)
        highest = num_timesteps if self.max_noise_level is None else min(self.max_noise_level, num_timesteps)
        if not isinstance(level, Integral) or not 0 <= level <= highest:
            raise ValueError(
                f"`noise_level` is {level!r}; it must be an integer from 0 (no noise) to {highest}, the "
                + ("number of timesteps." if highest == num_timesteps else "highest level of the training.")
            )
        if level > 0 and self.embedding_dim is None:
            raise ValueError(
                f"`noise_level` is {level}, but this U-Net has no `time_cond_proj_dim`, so it is not conditioned on "
                "the level: it was trained on low-resolution images without noise. Leave it at 0."
            )

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """Raises a `ValueError` for images that are no smaller than the large ones, or by another factor."""
        (h, w), (height, width) = self.source.shape[-2:], size
        given = f"`image` is {w} x {h} pixels (width x height) and would become {width} x {height}"
        if h > height or w > width or (h, w) == (height, width):
            raise ValueError(f"{given}. Pass a smaller one, or a larger `height` and `width`.")
        if self.back_projection and (height % h or (height, width) != (height // h * h, height // h * w)):
            raise ValueError(
                f"{given}, but `back_projection` needs a whole factor, the same along both sides. Leave it off."
            )
        check_fits_latents((h, w), sample_size, "`image` is")
        small, large = self.low_res_size, self.large_size
        if small is None or large is None:
            return
        if (h * large[0], w * large[0]) != (height * small[0], width * small[0]):
            factor = large[0] / small[0]
            sizes = f"from {describe_resolution(small)} to {describe_resolution(large)}"
            raise ValueError(
                f"{given}, but this model was trained to upsample {factor:g} times, {sizes}. Resize the image, or pass "
                f"`height={h * factor:g}` and `width={w * factor:g}`."
            )

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The noised image and its level, in both passes."""
        low_res = self.place_source(call)
        levels = torch.full((len(low_res),), int(self.noise_level), device=low_res.device)
        if self.noise_level > 0:
            low_res = add_noise_to_low_res(low_res, call.draw_noise(low_res.shape), levels, self.alphas_cumprod)
        kwargs = {}
        if self.embedding_dim is not None:
            kwargs["timestep_cond"] = noise_level_embedding(levels, self.embedding_dim).to(call.unet_dtype)
        return PreparedCondition.same_in_both(UNetInputs(kwargs, upsample(low_res, *call.size)))


__getattr__ = renamed(__name__, {"shrink": "downsample", "enlarge": "upsample"})
