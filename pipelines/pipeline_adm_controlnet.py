"""
ADMControlNetPipeline: generates images that follow other images, such as edges or regions, with an ablated diffusion
model and ControlNets (Zhang et al. 2023, https://huggingface.co/papers/2302.05543).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from diffusers_adm.conditioning.call_arguments import checks_arguments
from diffusers_adm.conditioning.controlnet import (
    ControlNet,
    ControlNetCondition,
    ControlNets,
    as_one_model,
    check_controlnet,
)
from diffusers_adm.conditioning.guidance import Guidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.latents import Autoencoder
from diffusers_adm.conditioning.text import TextConditioning
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.pipelines.pipeline_adm import ADMPipeline, Output, OutputType, Samples
from diffusers_adm.schedulers.diffusers_schedulers import DEFAULT_NUM_INFERENCE_STEPS, Steps


class ADMControlNetPipeline(ADMPipeline):
    r"""
    Generates images that follow other images, such as edges or regions, through ControlNets. Unconditional, by class,
    by prompt, or by both, guided like [`ADMPipeline`].

    Args:
        unet (`AdaGNUNet2DModel` or [`UNet2DConditionModel`]): See [`ADMPipeline`]; takes the channels of a sample.
        scheduler ([`SchedulerMixin`]), vae ([`AutoencoderKL`], [`VQModel`] or [`AutoencoderTiny`], *optional*),
            text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*), classifier (`AdaGNClassifierModel`, *optional*):
            See [`ADMPipeline`].
        controlnet (`AdaGNControlNetModel`, list of them or `AdaGNMultiControlNetModel`): One ControlNet or several,
            which were made for `unet`. The residuals of several are added up.
        id2label (`dict[int, str]`, *optional*): See [`ADMPipeline`].
        image_format (`ImageFormat` or `dict`, *optional*): See [`ADMPipeline`].

    Raises:
        ValueError: For components that are incompatible with each other, as by [`ADMPipeline`]; for a ControlNet that
            was made for another U-Net, for images of another size or another noise schedule; for a U-Net that takes no
            ControlNet, or more channels than a sample has: upsamplers and inpainters take a `controlnet` in their own
            pipelines.
    """

    # `controlnet` is left out of `model_cpu_offload_seq`: like a classifier, it takes turns with the U-Net.

    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        controlnet: ControlNet | ControlNets,
        id2label: dict[int, str] | dict[str, str] | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
    ):
        # First, because all components are checked against each other at the end of the other constructor.
        self.register_modules(controlnet=as_one_model(controlnet))
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label, image_format)

    @torch.no_grad()
    @checks_arguments
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        timestep_respacing: str | int | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        classifier_guidance_scale: float = 0.0,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
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
        guidance_fn: GuidanceFunctions = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates a batch of images that follow others.

        Args:
            prompt (`str` or list of `str`, *optional*): See [`ADMPipeline`].
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): The images to
                follow, such as edges; required, by position or by name. One for all images, or one for each: arrays
                `(height, width, channels)` and tensors `(channels, height, width)` in [0, 1] or of `uint8`, with a
                batch dimension in front or without. Of the size of the generated images, also with a `vae`; nothing is
                resized. With several ControlNets a list with one entry for each of them, which is one image, a batch or
                a list of images.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): See [`ADMPipeline`].
            batch_size (`int`, defaults to 1): Number of different images. Not needed if `image`, `prompt` or
                `class_labels` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each of these, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*),
                guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0): See [`ADMPipeline`]. Both passes of classifier-free guidance get `image`.
            controlnet_conditioning_scale (`float` or list of `float`, defaults to 1.0): Factor of the residuals of a
                ControlNet; one for all ControlNets, or one for each. A ControlNet with 0.0 does not run.
            guess_mode (`bool`, defaults to `False`): The residuals are scaled from 0.1 at the first skip connection to
                1.0 in the middle block, and in guided steps the unconditional pass gets none of them: images then
                follow `image` also with an empty prompt (`prompt=""`). Use it with a `guidance_scale` of 3 to 5. Always
                on for ControlNets with `global_pool_conditions`, whose residuals are not scaled.
            control_guidance_start (`float` or list of `float`, defaults to 0.0), control_guidance_end (`float` or list
                of `float`, defaults to 1.0): Fractions of the steps between which a ControlNet runs, for all or for
                each; as `guidance_start` and `guidance_end`.
            negative_prompt (`str` or list of `str`, *optional*), eta (`float`, *optional*): See [`ADMPipeline`].
            height, width (`int`, *optional*): Size of the images in pixels. `None`: that of the U-Net (`sample_size`,
                times the upsampling of the `vae`), or that of `image` if its config names none.
            generator (`torch.Generator` or list of them, *optional*), latents (`torch.Tensor` of shape `(number of
                images, channels, height, width)`, *optional*), prompt_embeds, negative_prompt_embeds (`torch.Tensor` of
                shape `(number of prompts, length, width)`, *optional*), prompt_attention_mask,
                negative_prompt_attention_mask (`torch.Tensor` of shape `(number of prompts, length)`, *optional*),
                pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(number of prompts,
                width)`, *optional*), output_type (`str`, defaults to `"pil"`), return_dict (`bool`, defaults to
                `True`), callback_on_step_end (`Callable`, *optional*), callback_on_step_end_tensor_inputs (sequence of
                `str`, defaults to `("latents",)`): See [`ADMPipeline`].
            guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Guidance by functions, as in
                [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that are incompatible with each other, the model or the scheduler.
        """
        self._check_components()
        text = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_text = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        classes, prompts = self._class_and_text(class_labels, prompt, text, negative_prompt, negative_text)
        control = ControlNetCondition(self.controlnet).read(
            image, controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end
        )
        sampling = self._start(
            classes,
            [prompts, control],
            Steps(num_inference_steps, timestep_respacing, eta),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            Samples(batch_size, num_images_per_prompt, height, width, generator, latents),
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        latents = self._denoise(sampling, sampling.call.noise * sampling.call.scheduler.init_noise_sigma)
        return self._finish(self._decode(latents, output_type), return_dict)

    def _check_components(self) -> None:
        super()._check_components()
        check_controlnet(self.controlnet, self.unet, self.scheduler)
