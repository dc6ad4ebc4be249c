"""
The upsampler of `ADMUnCLIPPipeline`, with networks of Karlo's layout (https://github.com/kakaobrain/karlo): a second
diffusion model, in pixels. Its U-Net takes x_t and the interpolated image; the last step has a U-Net of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DModel

from diffusers_adm.conditioning.condition import SamplingCall
from diffusers_adm.conditioning.image_format import as_size
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.ops.finiteness import count_not_finite
from diffusers_adm.schedulers.diffusers_schedulers import (
    Steps,
    check_other_steps,
    check_scheduler,
    copy_for_call,
    last_step_kwargs,
    takes_variance,
)


DEFAULT_SUPER_RES_STEPS = 7


class KarloUpsampler:
    """
    Upsamples the decoded images of one call.

    Args:
        super_res_first, super_res_last (`AdaGNUNet2DModel` or [`UNet2DModel`], the last *optional*),
            super_res_scheduler ([`SchedulerMixin`]): See [`ADMUnCLIPPipeline`].
        channels (`int`): Number of channels of the images.
        decoded_size (`tuple[int, int]`, *optional*): Height and width in pixels for which the decoder was trained, so
            that images of other sizes are upsampled by the same factors. `None`: all results have the size of
            `super_res_first`.

    Raises:
        ValueError: For networks and a scheduler that are incompatible with each other or with the images.
    """

    def __init__(
        self,
        super_res_first: AdaGNUNet2DModel | UNet2DModel,
        super_res_last: AdaGNUNet2DModel | UNet2DModel | None,
        super_res_scheduler: SchedulerMixin | None,
        channels: int,
        decoded_size: tuple[int, int] | None,
    ):
        self.first, self.last, self.scheduler = super_res_first, super_res_last, super_res_scheduler
        self.channels, self.decoded_size = channels, decoded_size
        self.num_inference_steps = DEFAULT_SUPER_RES_STEPS
        self.latents: torch.Tensor | None = None
        self._check_components()

    def read(self, num_inference_steps: int, latents: torch.Tensor | None) -> "KarloUpsampler":
        """
        Takes the arguments of a call: the number of steps, and standard normal noise of the size of the results.
        Raises a `ValueError` for steps that the scheduler cannot take.
        """
        check_other_steps(self.scheduler, num_inference_steps, "super_res_")
        self.num_inference_steps, self.latents = int(num_inference_steps), latents
        return self

    def check_latents(self, num_images: int, size: tuple[int, int]) -> None:
        """Raises a `ValueError` unless the given noise is that of so many decoded images of this height and width."""
        if self.latents is None:
            return
        shape = (num_images, self.channels, *self.upsampled_size(size))
        if tuple(self.latents.shape) != shape or not self.latents.is_floating_point():
            raise ValueError(
                f"`super_res_latents` has shape {tuple(self.latents.shape)} and type {self.latents.dtype}, but the "
                f"number and size of the images ask for floating point numbers of shape {shape}."
            )
        bad = count_not_finite(self.latents, "images")
        if bad is not None:
            raise ValueError(f"`super_res_latents` holds NaN or infinity for {bad}. Pass standard normal noise.")

    def upsampled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the results for decoded images of `size`."""
        large = as_size(self.first.config.sample_size)
        if self.decoded_size is None:
            return large
        return size[0] * large[0] // self.decoded_size[0], size[1] * large[1] // self.decoded_size[1]

    def interpolate(self, images: torch.Tensor) -> torch.Tensor:
        """Images of the size of the results: what the networks are conditioned on."""
        size = self.upsampled_size((images.shape[2], images.shape[3]))
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)

    def __call__(self, images: torch.Tensor, call: SamplingCall, progress_bar: Any) -> torch.Tensor:
        r"""
        Upsamples images.

        Args:
            images (`torch.Tensor` of shape `(num_images, channels, height, width)`): Decoded images in [-1, 1].
            call (`SamplingCall`): The call, whose generators give the noise.
            progress_bar (`Callable`): `progress_bar` of the pipeline.
        """
        low_res = self.interpolate(images)
        scheduler = copy_for_call(self.scheduler, call.generator, len(images))
        steps = Steps(self.num_inference_steps, None, None)
        timesteps = steps.set_timesteps(scheduler, images.device)
        step_kwargs = steps.step_kwargs(scheduler, call.generator)
        noise = call.draw_noise(low_res.shape) if self.latents is None else self.latents.to(low_res)
        latents = noise * scheduler.init_noise_sigma
        with progress_bar(total=len(timesteps)) as progress:
            for index, t in enumerate(timesteps):
                is_last = index == len(timesteps) - 1
                unet = self.last if is_last and self.last is not None else self.first
                model_input = torch.cat([scheduler.scale_model_input(latents, t), low_res], dim=1).to(unet.dtype)
                model_output = unet(model_input, t).sample.to(latents.dtype)
                if not takes_variance(scheduler):
                    model_output = model_output[:, : self.channels]
                last = last_step_kwargs(scheduler, latents) if is_last else {}
                latents = scheduler.step(model_output, t, latents, **step_kwargs, **last).prev_sample
                progress.update()
        return latents

    def _check_components(self) -> None:
        if self.scheduler is None:
            raise ValueError("`super_res_first` was given without `super_res_scheduler`. Pass both.")
        check_scheduler(self.scheduler, "super_res_scheduler")
        for name, unet in (("super_res_first", self.first), ("super_res_last", self.last)):
            if unet is None:
                continue
            in_channels, out_channels = unet.config.in_channels, unet.config.out_channels
            if in_channels != 2 * self.channels or out_channels not in (self.channels, 2 * self.channels):
                raise ValueError(
                    f"`{name}` has `in_channels={in_channels}` and `out_channels={out_channels}`; it takes "
                    f"{2 * self.channels} channels, of x_t and of the image, and predicts {self.channels}, or "
                    f"{2 * self.channels} with a learned variance."
                )
            if takes_variance(self.scheduler) and out_channels == self.channels:
                raise ValueError(
                    f"`super_res_scheduler` takes a learned variance, but `{name}` predicts none. Make it with "
                    "`variance_type='fixed_small'`."
                )
            if unet.config.sample_size is None:
                raise ValueError(
                    f"The config of `{name}` has no `sample_size`, so the size of the upsampled images is unknown. Set "
                    f"it: `pipe.{name}.register_to_config(sample_size=...)`."
                )
