"""
The low-resolution image that conditions an upsampler: downsampled, noised and upsampled in the same way in training and
sampling.

Noise on the low-resolution image, whose level conditions the network, makes an upsampler robust to artifacts of the
base model ("Gaussian conditioning augmentation", Ho et al. 2021, https://huggingface.co/papers/2106.15282, section 4).
Upsampling is that of guided-diffusion (https://huggingface.co/papers/2105.05233) and GLIDE
(https://huggingface.co/papers/2112.10741).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding

from ..deprecations import renamed
from .condition import Condition, UNetInputs


def downsample(images: torch.Tensor, factor: int) -> torch.Tensor:
    r"""
    Downsamples 8-bit images by averaging blocks of `factor` x `factor` pixels, and rounds to 8 bits (halves up), as
    Pillow's `Image.reduce(factor)` does.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): 8-bit values scaled to [-1, 1];
            `factor` divides height and width.
        factor (`int`): At least 1.
    """
    levels = ((images + 1) * 127.5).round()  # whole numbers, so that halves of their means are exact
    return (F.avg_pool2d(levels, factor) + 0.5).floor() / 127.5 - 1


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


class LowResolutionCondition(Condition):
    """
    The low-resolution image of an upsampler, and its noise level.

    Args:
        unet_config (mapping): The config of the U-Net. With `time_cond_proj_dim` it takes the noise level.
        scheduler ([`SchedulerMixin`]): Its noise schedule is that of the levels.
        low_res_size (`int`, *optional*): Side of the low-resolution images of training.
        max_noise_level (`int`, *optional*): Highest level of training; `None`: not known.
    """

    argument = "image"

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        scheduler: SchedulerMixin,
        *,
        low_res_size: int | None = None,
        max_noise_level: int | None = None,
    ):
        super().__init__()
        self.embedding_dim = unet_config.get("time_cond_proj_dim")
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.low_res_size, self.max_noise_level = low_res_size, max_noise_level

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """
        Downsamples `images` `(batch_size, channels, size, size)` in [-1, 1] to `low_res_size`; with a level embedding,
        noises them to random levels up to `max_noise_level`.
        """
        images = batch["images"]
        low_res, kwargs = downsample(images, images.shape[-1] // self.low_res_size), {}
        if self.embedding_dim is not None:
            if self.alphas_cumprod.device != images.device:  # once, not in each step
                self.alphas_cumprod = self.alphas_cumprod.float().to(images.device)
            levels = torch.randint(self.max_noise_level + 1, (len(images),), device=images.device)
            low_res = add_noise_to_low_res(low_res, torch.randn_like(low_res), levels, self.alphas_cumprod)
            kwargs["timestep_cond"] = noise_level_embedding(levels, self.embedding_dim)
        return UNetInputs(kwargs, upsample(low_res, *images.shape[2:]))


__getattr__ = renamed(__name__, {"shrink": "downsample", "enlarge": "upsample"})
