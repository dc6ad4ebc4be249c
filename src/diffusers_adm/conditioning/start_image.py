"""
What sampling starts from: noise, or a noised image, which changes the more, the more of the steps are taken (SDEdit,
Meng et al. 2021, https://huggingface.co/papers/2108.01073). In pixels, or in the latents of an autoencoder.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin

from ..ops.finiteness import explain_not_finite, not_finite
from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs
from .guidance import add_noise_for_step, precise_alphas_cumprod
from .image_format import ImageFormat
from .image_inputs import ImageInput, read_images
from .latents import LatentSpace, Posterior


DEFAULT_STRENGTH = 0.8  # as in diffusers' `StableDiffusionImg2ImgPipeline`


class StartCondition(Condition):
    """
    What sampling starts from. The U-Net gets no input from it.

    Args:
        vae ([`ModelMixin`], *optional*): Encodes the images.
        image_format (`ImageFormat`): Format of the images.

    Attributes:
        strength (`float`): Share of the steps to take, the last ones; 1.0 without images.
        original (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*): x_0 of the images, after
            `before_noise`.
    """

    argument = "image"

    def __init__(self, vae: ModelMixin | None, image_format: ImageFormat):
        super().__init__()
        self.latent_space = None if vae is None else LatentSpace(vae)
        self.image_format = image_format
        self.strength = 1.0
        self.images: torch.Tensor | None = None
        self.original: torch.Tensor | None = None

    def read(self, image: ImageInput | None, strength: float | None) -> StartCondition:
        """
        Takes the arguments of a call; raises a `ValueError` for images that `read_images` refuses, for those that the
        autoencoder cannot encode, and for a strength without images.
        """
        if image is None:
            if strength is not None:
                raise ValueError(
                    f"`strength` is {strength}, but there is no image to start from. Pass `image`, or leave `strength` "
                    "out."
                )
            return self
        if self.latent_space is not None:
            in_channels, out_channels = self.latent_space.image_channels
            if in_channels != out_channels:
                raise ValueError(
                    f"`image` was given, but `vae` takes images of {in_channels} channels and gives {out_channels}. "
                    "Leave `image` out, or use an autoencoder with as many `in_channels` as `out_channels`."
                )
        self.strength = DEFAULT_STRENGTH if strength is None else strength
        self.images = 2 * read_images(image, "image", self.image_format) - 1
        self.image_size = (self.images.shape[2], self.images.shape[3])
        self.counts = {"image": len(self.images)} if len(self.images) > 1 else {}
        return self

    def size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """Height and width of the results: as asked for, or those of the images; `None` if there are none."""
        if self.image_size is None:
            return height, width
        return (
            self.image_size[0] if height is None else height,
            self.image_size[1] if width is None else width,
        )

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """Raises a `ValueError` for images of another size."""
        if self.image_size is not None and self.image_size != size:
            raise ValueError(
                f"`image` is {self.image_size[1]} x {self.image_size[0]} pixels (width x height), but {size[1]} x "
                f"{size[0]} are generated. Resize the image, or leave `height` and `width` out."
            )

    def before_noise(self, call: SamplingCall) -> None:
        """
        Encodes the images. The latents of an `AutoencoderKL` are random; as in diffusers, their noise comes before that
        of the samples: one for each result with a list of generators, so that a result does not depend on the others of
        its batch, otherwise one for each given image.

        Raises:
            ValueError: If the latents are not finite.
        """
        if self.images is None:
            return
        images = self.images.to(call.noise.device, call.noise.dtype)
        if self.latent_space is None:
            self.original = call.rows(images)
            return
        mean, std = self._posterior(images)
        noise = None
        if bool(std.any()):
            number = len(call.noise) if isinstance(call.generator, list) else len(images)
            noise = call.rows(call.draw_noise((number, *mean.shape[1:])))
        posterior = Posterior(call.rows(mean), call.rows(std))
        self.original = self.latent_space.to_samples(posterior, noise).to(call.noise.dtype)

    def _posterior(self, images: torch.Tensor) -> Posterior:
        posterior = self.latent_space.posterior(images)
        bad = not_finite(posterior.mean + posterior.std)
        if bad:
            raise ValueError(
                f"`vae` encodes `image` to latents that are not finite (numbers {', '.join(map(str, bad))} of "
                f"{len(images)}, counted from 0). {explain_not_finite({'vae': self.latent_space.vae})}"
            )
        return posterior

    def encode(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """
        x_0 of the given images, without any noise: with an `AutoencoderKL` the mean of its latents.

        Raises:
            ValueError: If the latents are not finite.
        """
        images = self.images.to(device, dtype)
        if self.latent_space is None:
            return images
        return self.latent_space.to_samples(self._posterior(images)).to(dtype)

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """Nothing for the U-Net."""
        return PreparedCondition.same_in_both(UNetInputs())

    def samples(self, call: SamplingCall, timesteps: torch.Tensor) -> torch.Tensor:
        """The samples before the first of the timesteps, as the scheduler of the call scales them."""
        if self.original is None:
            return call.noise * call.scheduler.init_noise_sigma
        alphas_cumprod = precise_alphas_cumprod(call.scheduler, call.noise.device)
        return add_noise_for_step(call.scheduler, self.original, call.noise, timesteps[0], alphas_cumprod)
