"""
The small image beside the sample of an upsampler, as training and sampling agree on it: shrunk, noised, enlarged.

Noise on the small image, whose amount the network is told, makes an upsampler forgive the faults of the model before it
("Gaussian conditioning augmentation", Ho et al. 2021, https://huggingface.co/papers/2106.15282, section 4). Enlarging
is that of guided-diffusion (https://huggingface.co/papers/2105.05233) and GLIDE (https://huggingface.co/papers/2112.10741).
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    r"""
    8-bit images, made smaller by averaging blocks of `factor` x `factor` pixels, and rounded to 8 bits (halves up):
    what Pillow's `Image.reduce(factor)` gives.

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
    Small images after `noise_levels` steps of a noising chain: at level 0 as they are, at level n as at timestep n - 1.

    Args:
        low_res (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        noise (`torch.Tensor` of that shape): Standard normal.
        noise_levels (`torch.LongTensor` of shape `(batch_size,)`): In `[0, len(alphas_cumprod)]`.
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): Of the scheduler.
    """
    # In this dtype before it moves: there are devices without float64.
    table = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod]).to(low_res.dtype).to(noise_levels.device)
    alpha = table[noise_levels][:, None, None, None]
    return alpha.sqrt() * low_res + (1 - alpha).sqrt() * noise


def noise_level_embedding(noise_levels: torch.Tensor, dim: int) -> torch.Tensor:
    """The sinusoid, `(batch_size, dim)` in float32, that tells a U-Net with `time_cond_proj_dim=dim` the level."""
    return get_timestep_embedding(noise_levels, dim, flip_sin_to_cos=True, downscale_freq_shift=0)


def match_low_res(images: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    r"""
    Images whose blocks of pixels have the means that small ones say: what is missing is spread evenly over each block
    (back-projection, Irani & Peleg 1991, doi:10.1016/1049-9652(91)90045-L, in one step).

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, factor * h, factor * w)`): In [-1, 1]; the result may
            lie outside.
        low_res (`torch.Tensor` of shape `(batch_size, channels, h, w)`): In [-1, 1].
    """
    factor = images.shape[-1] // low_res.shape[-1]
    return images + F.interpolate(low_res - F.avg_pool2d(images, factor), scale_factor=factor, mode="nearest")


def enlarge(low_res: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Small images `(batch_size, channels, h, w)`, bilinearly enlarged, to go behind the channels of the sample."""
    return F.interpolate(low_res, (height, width), mode="bilinear", align_corners=False)
