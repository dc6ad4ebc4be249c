"""
The latents of an autoencoder as samples of a diffusion model (Rombach et al. 2022,
https://huggingface.co/papers/2112.10752): encoding and decoding with the scale and shift of its config.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel

from .image_format import Size, as_size, describe_size


Autoencoder = AutoencoderKL | VQModel | AutoencoderTiny

# Pipelines of diffusers whose latents are not scaled, whatever the config of their autoencoder says (by default,
# VQModel's has the scale of Stable Diffusion).
UNSCALED_PIPELINES = ("LDMSuperResolutionPipeline",)

# Held while the weights of an autoencoder that overflows in float16 are float32, since other threads use them, too: one
# would find them in float32 and then lose them to float16 in the middle of its own pass. One lock for all autoencoders,
# because passes of several in float16 at the same time are rare.
_UPCAST = threading.RLock()


class Posterior(NamedTuple):
    """
    The distribution of the latents of images, before scale and shift: a diagonal Gaussian.

    Attributes:
        mean, std (`torch.Tensor` of shape `(batch_size, latent channels, height, width)`): float32, or float64 of such
            an autoencoder. The standard deviation is 0 for autoencoders that give one latent (`VQModel`,
            `AutoencoderTiny`).
    """

    mean: torch.Tensor
    std: torch.Tensor


class LatentSpace:
    r"""
    The latents of an autoencoder as the samples of a diffusion model: `samples = (latents - shift) * scale`. If the
    config has `latents_mean` and `latents_std`, they are `(latents - latents_mean) / latents_std * scale` by channel,
    as in diffusers' pipelines for Stable Diffusion XL.

    Args:
        vae ([`AutoencoderKL`], [`VQModel`] or [`AutoencoderTiny`]): The autoencoder.

    Attributes:
        vae: As passed.
        scale (`float`), shift (`float`): `scaling_factor` and `shift_factor` of its config.
        channels (`int`): Of a latent.
        mean, std (list of `float`, *optional*): `latents_mean` and `latents_std` of its config.
        factor (`int`): Number of image pixels per latent, along each side.

    Raises:
        ValueError: If its config has no `scaling_factor`, one that is not finite and positive, or means and standard
            deviations that are not one for each channel, finite and positive; or both these and a `shift_factor`.
    """

    def __init__(self, vae: ModelMixin):
        config = vae.config
        scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
        if not (_are_finite([scale, shift]) and scale > 0):
            raise ValueError(
                f"The config of `vae` has `scaling_factor` {scale!r} and `shift_factor` {shift!r}; the former must be "
                "a positive number and the latter finite. `train_autoencoder.py` measures and stores them; or set them "
                "with `vae.register_to_config(scaling_factor=...)`: 1 / (standard deviation of the latents)."
            )
        self.vae, self.scale, self.shift = vae, float(scale), float(shift)
        # A `VQModel` may look its latents up in a codebook of another width.
        self.channels: int = config.get("vq_embed_dim") or config.latent_channels
        self.factor: int = downsampling_factor(vae)
        self.mean: list[float] | None = config.get("latents_mean")
        self.std: list[float] | None = config.get("latents_std")
        self._scales: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        if self.mean is not None or self.std is not None:
            self._check_channels()

    def _check_channels(self) -> None:
        mean, std = (list(values) if isinstance(values, Sequence) else [] for values in (self.mean, self.std))
        is_usable = _are_finite([*mean, *std]) and all(value > 0 for value in std)
        if len(mean) != self.channels or len(std) != self.channels or not is_usable or self.shift:
            raise ValueError(
                f"The config of `vae` has `latents_mean` {self.mean} and `latents_std` {self.std}, and `shift_factor` "
                f"{self.shift}. Set both lists, with {self.channels} finite numbers each, positive in `latents_std`, "
                "and no `shift_factor`; or neither list."
            )

    def scales(self, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """
        Shift and scale that make `like`, latents or their standard deviations, samples: numbers, or tensors of shape
        `(channels, 1, 1)`.
        """
        if self.mean is None or self.std is None:
            return self.shift, self.scale
        key = like.device, like.dtype
        if key not in self._scales:  # else they would be uploaded in each call
            mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (self.mean, self.std))
            self._scales[key] = mean.to(like), (self.scale / std).to(like)
        return self._scales[key]

    @property
    def image_channels(self) -> tuple[int, int]:
        """Channels of the images that are encoded, and of those that are decoded."""
        config = self.vae.config
        return config.get("in_channels", 3), config.get("out_channels", 3)

    def check_size(self, size: Size, name: str = "The size of the images") -> None:
        """Raises a `ValueError` for images (height and width) that cannot be encoded without a rest."""
        if any(side % self.factor for side in as_size(size)):
            raised = [math.ceil(side / self.factor) * self.factor for side in as_size(size)]
            raise ValueError(
                f"{name} is {describe_size(size)}, but `vae` downsamples by {self.factor}, so both must be divisible "
                f"by {self.factor}. Use e.g. {describe_size(raised)}."
            )

    def latent_size(self, size: Size) -> tuple[int, int]:
        """Height and width of the latents of images of this size."""
        height, width = as_size(size)
        return height // self.factor, width // self.factor

    def posterior(self, images: torch.Tensor) -> Posterior:
        """The distribution of the latents of images `(batch_size, channels, height, width)` in [-1, 1]."""
        with _computing(self.vae) as dtype:
            encoded: Any = self.vae.encode(images.to(dtype))
        if not hasattr(encoded, "latent_dist"):
            latents = _precise(encoded.latents)
            return Posterior(latents, torch.zeros_like(latents))
        distribution = encoded.latent_dist
        return Posterior(_precise(distribution.mean), _precise(distribution.std))

    def to_samples(self, posterior: Posterior, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Samples of a posterior, with standard normal noise of its shape; `None`: its mode. Scaled and shifted."""
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        shift, scale = self.scales(latents)
        return (latents - shift) * scale

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes images in [-1, 1] to samples; see `posterior` and `to_samples`."""
        return self.to_samples(self.posterior(images), noise)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """
        Decodes samples `(batch_size, channels, height, width)` to images in about [-1, 1], float32 unless the
        autoencoder is float64. (A `VQModel` quantises first.)
        """
        shift, scale = self.scales(samples)
        latents = samples / scale + shift
        with _computing(self.vae) as dtype:
            images: torch.Tensor = self.vae.decode(latents.to(dtype)).sample
        return _precise(images)


def downsampling_factor(vae: ModelMixin | None) -> int:
    """Number of image pixels per latent, along each side; 1 without an autoencoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _computing(vae: ModelMixin) -> Iterator[torch.dtype]:
    """Gives the dtype to compute in. float16 weights become float32 for a while if the config says that they must."""
    if not vae.config.get("force_upcast"):
        yield vae.dtype
        return
    with _UPCAST:  # also to read the dtype, which another thread may have changed for a while
        if vae.dtype == torch.float16:
            try:
                torch.nn.Module.to(vae, torch.float32)  # without the warnings of `ModelMixin.to`
                yield torch.float32
            finally:
                torch.nn.Module.to(vae, torch.float16)  # exactly the weights from before
            return
    yield vae.dtype  # never changes here, so that several threads may compute at the same time


def _are_finite(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
