"""
ADMSuperResolutionPipeline: upsamples images with an ablated diffusion model that is conditioned on the low-resolution
image.

The upsamplers of ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233) and GLIDE (Nichol et al. 2021,
https://huggingface.co/papers/2112.10741), and ones that are conditioned on the noise level of the low-resolution image
(cascaded diffusion, Ho et al. 2021, https://huggingface.co/papers/2106.15282). In pixels, or in the latents of an
autoencoder (Rombach et al. 2022, https://huggingface.co/papers/2112.10752, section 4.4).
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from diffusers_adm.conditioning.call_arguments import checks_arguments
from diffusers_adm.conditioning.controlnet import (
    ControlNet,
    ControlNets,
    as_one_model,
    optional_control,
)
from diffusers_adm.conditioning.guidance import Guidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_format import ImageFormat, as_sample_size
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.latents import UNSCALED_PIPELINES, Autoencoder, LatentSpace
from diffusers_adm.conditioning.low_resolution import LowResolutionCondition, check_low_res_size, match_low_res
from diffusers_adm.conditioning.text import TextConditioning
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.pipelines.concatenated_images import ConcatenatedImagePipeline
from diffusers_adm.pipelines.layouts import HUB_ARGUMENTS
from diffusers_adm.pipelines.pipeline_adm import Output, OutputType, Samples
from diffusers_adm.schedulers.diffusers_schedulers import DEFAULT_NUM_INFERENCE_STEPS, Steps
from diffusers_adm.schedulers.noise_schedules import check_same_noise


class ADMSuperResolutionPipeline(ConcatenatedImagePipeline):
    r"""
    Upsamples images: a U-Net denoises the large image, with the low-resolution image, bilinearly upsampled to the size
    of the samples, as further input channels. Without further conditions, by class, by prompt, or by both, guided like
    [`ADMPipeline`].

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): Takes the channels of a sample and of an
            image: 6 for RGB in pixels, 7 for RGB and latents of 4 channels. One with `time_cond_proj_dim` is
            conditioned on the noise level of the low-resolution image.
        scheduler ([`SchedulerMixin`]): See [`ADMPipeline`].
        vae ([`AutoencoderKL`], [`VQModel`] or [`AutoencoderTiny`], *optional*): Decodes the samples, which are then
            latents. The low-resolution image is not encoded: it is concatenated to them as it is, and must not be
            larger.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*), classifier (`AdaGNClassifierModel`, *optional*),
            id2label (`dict[int, str]`, *optional*): See [`ADMPipeline`].
        low_res_size (`int` or `[height, width]`, *optional*): Size of the low-resolution images of training, in pixels
            (a number: a square), for large ones of the U-Net's `sample_size`: together they give the factor, the same
            along both sides. `None`: any size is taken.
        noise_level (`int`, *optional*): Default of the calls; `None`: 0.
        max_noise_level (`int`, *optional*): Highest level of training; `None`: not known.
        noise_schedule (`dict`, *optional*): The noise schedule that the U-Net was trained on, for the large image and
            for the levels of the low-resolution image: the result of
            `diffusers_adm.schedulers.noise_schedules.noise_schedule_of(scheduler)`. `None`: not known.
        controlnet (`AdaGNControlNetModel`, list of them or `AdaGNMultiControlNetModel`, *optional*): Made for `unet`;
            see [`ADMControlNetPipeline`].
        image_format (`ImageFormat` or `dict`, *optional*): See [`ADMPipeline`].

    Raises:
        ValueError: For components that are incompatible with each other, as by [`ADMPipeline`] and
            [`ADMControlNetPipeline`]; for a U-Net whose channels are not those of an upsampler, levels or a size that
            the U-Net cannot have been trained on, and a `scheduler` with another noise schedule than `noise_schedule`.
    """

    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        low_res_size: int | Sequence[int] | None = None,
        noise_level: int | None = None,
        max_noise_level: int | None = None,
        noise_schedule: dict[str, Any] | None = None,
        controlnet: ControlNet | ControlNets | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
    ):
        # First, because components and noise schedule are checked in the other constructor.
        self.register_modules(controlnet=None if controlnet is None else as_one_model(controlnet))
        if low_res_size is not None:
            low_res_size = as_sample_size(low_res_size)
        self.register_to_config(noise_schedule=noise_schedule, low_res_size=low_res_size)
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label, image_format)
        self.register_to_config(noise_level=noise_level, max_noise_level=max_noise_level)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        Loads a saved pipeline as [`ADMPipeline`] does. The latents of diffusers' `LDMSuperResolutionPipeline` (such as
        `CompVis/ldm-super-resolution-4x-openimages`) are not scaled.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **hub)
        if config["_class_name"] in UNSCALED_PIPELINES and not {"vae", "vqvae"} & kwargs.keys():
            pipe.vae.register_to_config(scaling_factor=1.0)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        Makes a pipeline of the components of another one as [`ADMPipeline`] does. The latents of diffusers'
        `LDMSuperResolutionPipeline` are not scaled.
        """
        if type(pipeline).__name__ in UNSCALED_PIPELINES and "vae" not in kwargs:
            # Another object with the same layers, since the config of the other pipeline's must stay.
            kwargs["vae"] = copy.copy(pipeline.vqvae)
            kwargs["vae"].register_to_config(scaling_factor=1.0)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample: those of a latent, or half of those that the U-Net takes."""
        return self.unet.config.in_channels // 2 if self.vae is None else LatentSpace(self.vae).channels

    @torch.no_grad()
    @checks_arguments
    def __call__(
        self,
        image: ImageInput,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        noise_level: int | None = None,
        back_projection: bool = False,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        timestep_respacing: str | int | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        classifier_guidance_scale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        guidance_fn: GuidanceFunctions = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Upsamples a batch of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or list of one of them): Low-resolution images of one
                size, such as the results of `ADMPipeline` for `output_type` "pil", "np" or "pt". Arrays are `(number,
                height, width, channels)`, tensors `(number, channels, height, width)`, both in [0, 1] for viewable
                images and with values of the data for other formats (see `pipe.image_format`); the number may be left
                out for a single one. If the pipeline has a `low_res_size`, the upsampling factor must be that of
                training; otherwise any smaller size is taken. One image is used for all prompts or classes.
            prompt (`str` or list of `str`, *optional*): Description of the images, for a U-Net with cross-attention:
                one for all, or one for each.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Their classes, by number or by
                name: one for all, or one for each.
            noise_level (`int`, *optional*): Number of steps of noise that are added to the low-resolution image first:
                0 is none; with noise, a model trained with it is robust to artifacts of the image. Noise is drawn from
                `generator`. `None`: the `noise_level` of the pipeline's config, or else 0. Above 0 for a U-Net with
                `time_cond_proj_dim`.
            back_projection (`bool`, defaults to `False`): Shift the blocks of pixels of the finished images so that
                their means are the pixels of the low-resolution image, which a small or short-trained model matches
                only roughly. For whole factors, the same along both sides. Not for `output_type="latent"` with a `vae`.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each image, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*),
                guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0), negative_prompt (`str` or list of `str`, *optional*), eta (`float`, *optional*): As in
                [`ADMPipeline`]. Both passes of classifier-free guidance get the low-resolution image.
            height, width (`int`, *optional*): Size of the large images in pixels, divisible by the total downsampling
                of the U-Net. `None`: its `sample_size`.
            generator (`torch.Generator` or list of them, *optional*), latents (`torch.Tensor` of shape `(number of
                images, channels, height, width)`, *optional*), prompt_embeds, negative_prompt_embeds (`torch.Tensor`,
                *optional*), prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor`, *optional*),
                pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor`, *optional*), output_type (`str`,
                defaults to `"pil"`), return_dict (`bool`, defaults to `True`), callback_on_step_end (`Callable`,
                *optional*), callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): As in
                [`ADMPipeline`].
            control_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): Images
                for the `controlnet`: as `image` of [`ADMControlNetPipeline`]. `None`: it does not run.
            controlnet_conditioning_scale (`float` or list of `float`, defaults to 1.0), guess_mode (`bool`, defaults to
                `False`), control_guidance_start (`float` or list of `float`, defaults to 0.0), control_guidance_end
                (`float` or list of `float`, defaults to 1.0): See [`ADMControlNetPipeline`].
            guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Guidance by functions, as in
                [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that are incompatible with each other, the model or the scheduler.
        """
        self._check_components()
        if back_projection and output_type == "latent" and self.vae is not None:
            raise ValueError(
                "`back_projection` changes pixels, but `output_type` is 'latent'. Leave one of them out, or decode the "
                "latents first."
            )
        config = self.config
        low_resolution = LowResolutionCondition(
            self.unet.config,
            self.scheduler,
            low_res_size=config.low_res_size,
            max_noise_level=config.max_noise_level,
            image_format=self.image_format,
            factor=self.vae_scale_factor,
        ).read(image, config.noise_level if noise_level is None else noise_level, back_projection)
        text = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_text = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        classes, prompts = self._class_and_text(class_labels, prompt, text, negative_prompt, negative_text)
        control = optional_control(
            self.controlnet,
            control_image,
            controlnet_conditioning_scale,
            guess_mode,
            control_guidance_start,
            control_guidance_end,
        )
        sampling = self._start(
            classes,
            [prompts, low_resolution, *control],
            Steps(num_inference_steps, timestep_respacing, eta),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            Samples(1, num_images_per_prompt, height, width, generator, latents),
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        latents = self._denoise(sampling, sampling.call.noise * sampling.call.scheduler.init_noise_sigma)
        if not back_projection:
            return self._finish(self._decode(latents, output_type), return_dict)
        pixels = latents if self.vae is None else LatentSpace(self.vae).decode(latents)
        pixels = match_low_res(pixels.clamp(-1, 1), low_resolution.source)
        return self._finish(self._convert(pixels, output_type), return_dict)

    def _check_components(self) -> None:
        channels, in_channels = self.sample_channels, self.unet.config.in_channels
        if self.vae is not None and in_channels != channels + self.image_channels:
            raise ValueError(
                f"`unet` has `in_channels={in_channels}`, but an upsampler in the latents of this `vae` takes "
                f"{channels} channels of a latent and {self.image_channels} of the low-resolution image, which is not "
                "encoded. Use a U-Net that was trained so, or `vae=None` for one that upsamples in pixels."
            )
        super()._check_components()
        if self.config.low_res_size is not None:
            check_low_res_size(self.config.low_res_size, self.unet.config.sample_size, self.vae_scale_factor)
        check_same_noise("This upsampler", self.config.noise_schedule, self.scheduler, self.unet)
