"""
ADMImageToImagePipeline: translates images with an ablated diffusion model that takes them, of any number of channels,
as further channels of its input: grey to colour, one style to another, a scan to its segmentation, noisy to clean.

Palette (Saharia et al. 2022, https://huggingface.co/papers/2111.05826); SR3 (Saharia et al. 2021,
https://huggingface.co/papers/2104.07636). Classifier-free guidance (Ho & Salimans 2022,
https://huggingface.co/papers/2207.12598) towards the image, with one that was dropped in training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from diffusers_adm.conditioning.call_arguments import checks_arguments
from diffusers_adm.conditioning.controlnet import (
    ControlNet,
    ControlNets,
    as_one_model,
    optional_control,
)
from diffusers_adm.conditioning.guidance import Guidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.source_image import SourceImageCondition, mean_channels_of
from diffusers_adm.conditioning.text import TextConditioning
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.pipelines.concatenated_images import ConcatenatedImagePipeline
from diffusers_adm.pipelines.pipeline_adm import Output, OutputType, Samples
from diffusers_adm.schedulers.diffusers_schedulers import DEFAULT_NUM_INFERENCE_STEPS, Steps


class ADMImageToImagePipeline(ConcatenatedImagePipeline):
    r"""
    Translates images: a U-Net denoises the target image, with the source image, of the same size and of any number of
    channels, as further input channels. Without further conditions, by class, by prompt, or by both, guided like
    [`ADMPipeline`], and towards the source image.

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): Takes the channels of a sample and,
            after them, those of a source image. The output has those of a sample, or twice as many with a learned
            variance.
        scheduler ([`SchedulerMixin`]): See [`ADMPipeline`]. Without a `source_format`, its `variance_type` tells
            whether half of the output is a variance: with 5 channels in and 2 out, whether samples have 1 channel and
            sources 4, or samples 2 and sources 3.
        vae (`None`): Must be `None`: images are translated in pixels.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*), classifier (`AdaGNClassifierModel`, *optional*),
            id2label (`dict[int, str]`, *optional*): See [`ADMPipeline`].
        source_format (`ImageFormat` or `dict`, *optional*): Format of the source images of training, saved with the
            pipeline. `None`: not known; images of 1 and 3 channels are 8-bit grey and RGB, others arrays in [0, 1].
        source_dropout_prob (`float`, *optional*): Share of the source images that training replaced by mid-grey ones.
            Above 0, classifier-free guidance acts on the source image. `None`: not known.
        controlnet (`AdaGNControlNetModel`, list of them or `AdaGNMultiControlNetModel`, *optional*): Made for `unet`;
            see [`ADMControlNetPipeline`].
        image_format (`ImageFormat` or `dict`, *optional*): Format of the target images, see [`ADMPipeline`].

    Raises:
        ValueError: For components that are incompatible with each other, as by [`ADMPipeline`] and
            [`ADMControlNetPipeline`]; for a U-Net whose input has no channels for a source, or other ones than
            `source_format`, and a `vae`.
    """

    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        source_format: ImageFormat | dict[str, Any] | None = None,
        source_dropout_prob: float | None = None,
        controlnet: ControlNet | ControlNets | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
    ):
        # First, because components are checked in the other constructor.
        self.register_modules(controlnet=None if controlnet is None else as_one_model(controlnet))
        if isinstance(source_format, ImageFormat):
            source_format = source_format.to_config()
        self.register_to_config(source_format=source_format, source_dropout_prob=source_dropout_prob)
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label, image_format)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample: those of the output's mean. The U-Net takes those of the source image after them."""
        known = self.config.source_format
        channels = known.get("channels") if isinstance(known, Mapping) else None
        return mean_channels_of(self.unet.config, self.scheduler.config, channels)

    @property
    def source_format(self) -> ImageFormat:
        """The format of the source images."""
        channels = self.unet.config.in_channels - self.sample_channels
        return ImageFormat.from_config(self.config.source_format, channels, "source_format")

    @torch.no_grad()
    @checks_arguments
    def __call__(
        self,
        image: ImageInput,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
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
        Translates a batch of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or list of one of them): Source images of one size,
                which is that of the results: divisible by the total downsampling of the U-Net, best the one that it was
                trained on. Arrays are `(number, height, width, channels)`, tensors `(number, channels, height, width)`,
                both in [0, 1], or in the data's own range if Pillow cannot show the `source_format`; the number may be
                left out for a single one. One image is used for all prompts or classes.
            prompt (`str` or list of `str`, *optional*): Description of the images, for a U-Net with cross-attention:
                one for all, or one for each.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Their classes, by number or by
                name: one for all, or one for each.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each image, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*),
                guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0), negative_prompt (`str` or list of `str`, *optional*), eta (`float`, *optional*): As in
                [`ADMPipeline`]. In the unconditional pass of classifier-free guidance the source image is dropped, too,
                if training has dropped some (`source_dropout_prob`); otherwise both passes get it.
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
        source = SourceImageCondition(self.source_format, dropout_prob=self.config.source_dropout_prob).read(image)
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
        if guidance_scale != 1.0 and not any(part.is_droppable for part in (classes, prompts, source)):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but there is nothing to guide away from: this model has no "
                f"null class and no cross-attention, and {source.why_not_guided()}, or leave `guidance_scale` at 1.0."
            )
        sampling = self._start(
            classes,
            [prompts, source, *control],
            Steps(num_inference_steps, timestep_respacing, eta),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            Samples(1, num_images_per_prompt, *source.source.shape[2:], generator, latents),
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        latents = self._denoise(sampling, sampling.call.noise * sampling.call.scheduler.init_noise_sigma)
        return self._finish(self._decode(latents, output_type), return_dict)

    def _check_components(self) -> None:
        if self.vae is not None:
            raise ValueError(
                f"`vae` was given, but {type(self).__name__} concatenates images in pixels. Pass `vae=None`."
            )
        super()._check_components()
        _ = self.source_format  # checks the entry of the config
