"""
ADMInpaintPipeline: inpaints the masked part of images with an ablated diffusion model.

With networks that were trained to inpaint (GLIDE, Nichol et al. 2021, https://huggingface.co/papers/2112.10741, section
4; Stable Diffusion, Rombach et al. 2022, https://huggingface.co/papers/2112.10752), or any others, by replacing the
kept part in each step and resampling (RePaint, Lugmayr et al. 2022, https://huggingface.co/papers/2201.09865). From
noise, or from the noised image (SDEdit, Meng et al. 2021, https://huggingface.co/papers/2108.01073).
"""

import os
from collections.abc import Callable, Mapping, Sequence
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
    check_controlnet,
    optional_control,
)
from diffusers_adm.conditioning.guidance import Guidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.image_outputs import as_outputs, to_numpy, to_pil
from diffusers_adm.conditioning.inpainting import (
    LAYOUT_OF_PIPELINE,
    InpaintingCondition,
    InpaintingLayout,
    Resampling,
    check_layout,
    layout_of_pipeline,
    sample_channels_of,
)
from diffusers_adm.conditioning.latents import Autoencoder
from diffusers_adm.conditioning.text import TextConditioning
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.pipelines.layouts import HUB_ARGUMENTS
from diffusers_adm.pipelines.pipeline_adm import ADMPipeline, Output, OutputType, Samples, Sampling
from diffusers_adm.schedulers.diffusers_schedulers import DEFAULT_NUM_INFERENCE_STEPS, Steps, keeps_no_state


class ADMInpaintPipeline(ADMPipeline):
    r"""
    Inpaints the masked part of images: unconditional, by class, by prompt, or by both, guided like [`ADMPipeline`]. The
    other pixels are returned exactly as they were given.

    The method depends on the channels of the U-Net, for samples of c channels (3 for RGB):
        c: any model of [`ADMPipeline`]. In each step the kept part of x_t is replaced by the noised image, and with
            resampling (RePaint) steps are repeated, to harmonise the new part with the kept one;
        2c + 1: trained to inpaint. Its input is `[x_t, image * keep_mask, keep_mask]` (`inpainting_layout="glide"`), or
            `[x_t, mask, image * (1 - mask)]` with `mask = 1 - keep_mask` (`"stable-diffusion"`);
        3c + 1: trained to upsample and to inpaint. Its input is `[x_t, image * keep_mask, keep_mask, low_res]`.
    For the latter two the predicted x_0 of the kept part can be corrected in each step.

    Args:
        unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label: See [`ADMPipeline`].
        controlnet (`AdaGNControlNetModel`, list of them or `AdaGNMultiControlNetModel`, *optional*): Made for `unet`;
            see [`ADMControlNetPipeline`].
        image_format (`ImageFormat` or `dict`, *optional*): See [`ADMPipeline`].
        inpainting_layout (`str`, *optional*): `"glide"` or `"stable-diffusion"`, see above, for a U-Net that takes
            masks; saved with the pipeline. `None`: `"glide"` in pixels, and not known with a `vae`, which is refused.
            `from_pretrained` and `from_pipe` know that of diffusers' `StableDiffusionInpaintPipeline`.

    Raises:
        ValueError: For components that are incompatible with each other, as by [`ADMPipeline`] and
            [`ADMControlNetPipeline`]; for a U-Net of other channels; for a layout that is not known or that the U-Net
            cannot have.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = [*ADMPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        controlnet: ControlNet | ControlNets | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
        inpainting_layout: str | None = None,  # not a Literal, with which diffusers' type check fails
    ):
        # First, because all components are checked against each other at the end of the other constructor.
        self.register_modules(controlnet=None if controlnet is None else as_one_model(controlnet))
        self.register_to_config(inpainting_layout=inpainting_layout)
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label, image_format)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        Loads a saved pipeline as [`ADMPipeline`] does. The `inpainting_layout` of a `StableDiffusionInpaintPipeline` is
        known, unless another `unet` is given.
        """
        path = pretrained_model_name_or_path
        if not {"inpainting_layout", "unet"} & kwargs.keys():
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            config = cls.load_config(path, **hub)
            layout = layout_of_pipeline(config)
            if layout is not None and "unet" in config:
                unet_config = UNet2DConditionModel.load_config(path, subfolder="unet", **hub)
                if _takes_masks(unet_config):
                    kwargs["inpainting_layout"] = layout
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        Makes a pipeline of the components of another one as [`ADMPipeline`] does. The `inpainting_layout` of a
        `StableDiffusionInpaintPipeline` is known, unless another `unet` is given.
        """
        is_known = any(parent.__name__ == "StableDiffusionInpaintPipeline" for parent in type(pipeline).__mro__)
        if is_known and not {"inpainting_layout", "unet"} & kwargs.keys() and _takes_masks(pipeline.unet.config):
            kwargs["inpainting_layout"] = LAYOUT_OF_PIPELINE["StableDiffusionInpaintPipeline"]
        return super().from_pipe(pipeline, **kwargs)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample."""
        return sample_channels_of(self.unet.config) or self.unet.config.in_channels

    @property
    def is_trained_to_inpaint(self) -> bool:
        """Whether the U-Net takes the mask."""
        return self.unet.config.in_channels > self.sample_channels

    @property
    def takes_low_res(self) -> bool:
        """Whether the U-Net takes a low-resolution image as well."""
        return self.unet.config.in_channels == 3 * self.sample_channels + 1

    @property
    def inpainting_layout(self) -> InpaintingLayout | None:
        """How the U-Net takes masked image and mask; `None`: it takes none."""
        return check_layout(self.config.inpainting_layout, self.unet.config, self.vae is not None)

    @torch.no_grad()
    @checks_arguments
    def __call__(
        self,
        image: ImageInput,
        mask_image: ImageInput,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        strength: float = 1.0,
        jump_length: int = 5,
        jump_n_sample: int | None = None,
        low_res_image: ImageInput | None = None,
        batch_size: int = 1,
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
        correct_kept: bool | None = None,
        guidance_fn: GuidanceFunctions = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Inpaints images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): One for all results, or
                one for each: arrays `(height, width, channels)` and tensors `(channels, height, width)` in [0, 1] or of
                `uint8`, with a batch dimension in front or without; for other formats than 8-bit grey and RGB see
                `pipe.image_format`. Of the size of the results; nothing is resized.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): White (1, 255) for
                pixels to inpaint, black for those to keep; at least half white counts as white. Of the size of `image`;
                one for all, or one for each. An all-white mask is plain sampling (nothing is replaced or resampled), an
                all-black one returns the image.
            prompt (`str` or list of `str`, *optional*), class_labels (`int`, `str`, list of them or `torch.Tensor`,
                *optional*): See [`ADMPipeline`].
            strength (`float`, defaults to 1.0): In (0, 1]. 1.0 starts from noise. Less starts from the noised image,
                the masked part included, and takes the last `int(strength * num_inference_steps)` steps: the less, the
                more of it remains.
            jump_length (`int`, defaults to 5), jump_n_sample (`int`, *optional*): RePaint's resampling: at every
                `jump_length`-th step the sample is noised again by that many steps, until it went through them
                `jump_n_sample` times; 1 is off. It takes about `jump_n_sample` times as long. `None`: 3 for a model
                that was not trained to inpaint, with a scheduler that keeps no state between its steps
                (`LearnedVarianceDDPMScheduler`, `DDPMScheduler`, `DDIMScheduler` and their parallel versions; the
                others cannot jump) and more steps than `jump_length`, else 1.
            low_res_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): The
                image to upsample, for a U-Net that does: smaller images in the forms of `image`, one for all or one for
                each.
            batch_size (`int`, defaults to 1): Number of different images. Not needed if `image`, `mask_image`,
                `low_res_image`, `prompt` or `class_labels` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each of these, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*):
                The steps of the whole chain, as in [`ADMPipeline`].
            guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0), negative_prompt (`str` or list of `str`, *optional*): Guidance, as in
                [`ADMPipeline`]. Fractions are of the steps that `strength` leaves, by their place in the chain.
            eta (`float`, *optional*): Noise of DDIM steps, as in [`ADMPipeline`].
            height, width (`int`, *optional*): Size of the images in pixels. `None`: that of the U-Net (`sample_size`,
                times the upsampling of the `vae`), or that of `image` if its config names none.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise; one for all images, or one
                for each.
            latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*): Standard
                normal noise to start from.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(number of prompts, length, width)`,
                *optional*), prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(number of
                prompts, length)`, *optional*), pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of
                shape `(number of prompts, width)`, *optional*): Encoded prompts, as in [`ADMPipeline`].
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` and `"pt"` as in [`ADMPipeline`]; `"latent"`: the
                last sample with the kept part set to that of `image`, encoded by the `vae` if there is one. In the
                former three the kept pixels are those of `image`, bit by bit (as float32; integers of viewable
                images as fractions, `uint8` values divided by 255).
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each evaluation of the network as
                `callback(pipe, number of the evaluation, timestep, callback_kwargs)`; otherwise as in [`ADMPipeline`].
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): Keys of
                `callback_kwargs`, out of `pipe._callback_tensor_inputs`.
            control_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): Images
                for the `controlnet`: as `image` of [`ADMControlNetPipeline`]. `None`: it does not run.
            controlnet_conditioning_scale (`float` or list of `float`, defaults to 1.0), guess_mode (`bool`, defaults to
                `False`), control_guidance_start (`float` or list of `float`, defaults to 0.0), control_guidance_end
                (`float` or list of `float`, defaults to 1.0): See [`ADMControlNetPipeline`].
            correct_kept (`bool`, *optional*): Whether the predicted x_0 is the image where it is kept, in each step.
                `None`: as the model's authors sample, `True` for the layout `"glide"` and `False` for
                `"stable-diffusion"`. For a U-Net that takes no mask, the kept part is always replaced.
            guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Guidance by functions, as in
                [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that are incompatible with each other, the model or the scheduler.
        """
        self._check_components()
        inpainting = InpaintingCondition(self.unet.config, self.vae, self.image_format, self.inpainting_layout)
        inpainting.read(image, mask_image, low_res_image, correct_kept)
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
        resampling = Resampling(jump_length, jump_n_sample)
        resampling.check(self.scheduler)
        sampling = self._start(
            classes,
            [prompts, inpainting, *control],
            Steps(num_inference_steps, timestep_respacing, eta, strength),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            Samples(batch_size, num_images_per_prompt, height, width, generator, latents),
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
        self._warn_once(inpainting.masks_without_effect(strength, resampling))
        latents = self._inpaint(sampling, inpainting, resampling, strength)
        return self._finish(self._paste(latents, inpainting, output_type), return_dict)

    def _inpaint(
        self, sampling: Sampling, inpainting: InpaintingCondition, resampling: Resampling, strength: float
    ) -> torch.Tensor:
        """From noise, or the noised image, to samples."""
        call, timesteps, shape = sampling.call, sampling.timesteps, sampling.call.noise.shape
        replaces = inpainting.keeps_anything and not inpainting.is_trained
        if replaces and self._inverts:
            raise ValueError(
                "`unet` was not trained to inpaint, so each step of sampling replaces the kept part with the noised "
                "image, which cannot be inverted. Invert the image with `ADMPipeline` instead."
            )
        jumps_by_default = not inpainting.is_trained and keeps_no_state(call.scheduler)
        walk = resampling.walk(len(timesteps), jumps_by_default, inpainting.keeps_anything)
        sampling.state.num_timesteps = len(walk)

        if strength == 1.0:
            latents = call.noise * call.scheduler.init_noise_sigma
        else:
            latents = inpainting.noised(call.noise, timesteps[0])
        position = 0  # the step whose noise level `latents` have
        with self._running(sampling.state) as progress_bar:
            for evaluation, index in enumerate(walk):
                if sampling.state.interrupt:
                    continue
                step = sampling.step(index)
                t = step.timestep
                if index < position:
                    latents = inpainting.jump(
                        latents, call.draw_noise(call.noise.shape), cleaner=timesteps[position], noisier=t
                    )
                if replaces:
                    noise = call.draw_noise(shape) if inpainting.noise is None else inpainting.noise
                    latents = inpainting.replace(latents, noise, t)
                prediction = self._predict(sampling, latents, step)
                if inpainting.corrects:
                    prediction = inpainting.correct(prediction, latents, t)
                latents = sampling.take(prediction, latents, step)
                position = index + 1
                latents = self._call_back(sampling.output, evaluation, t, latents)
                progress_bar.update()
        sampling.finish()
        return latents

    def _paste(self, latents: torch.Tensor, inpainting: InpaintingCondition, output_type: str) -> Any:
        """Samples as images of `output_type`, with the kept pixels as they were given."""
        if self._inverts:  # the latents are noise, in which nothing is kept
            return latents
        if output_type == "latent":
            return torch.where(inpainting.keep_mask, inpainting.original, latents)
        # In the values of the given pixels and not in [-1, 1], where their last bit would be lost.
        fractions = self.image_processor.postprocess(self._to_pixels(latents), output_type="pt")
        painted = as_outputs(fractions, self.image_format)
        images = torch.where(inpainting.keep_pixels, inpainting.images, painted)
        if output_type == "pt":
            return images
        self._check_finite(images, output_type)
        if output_type == "np":
            return to_numpy(images)
        return to_pil(images.nan_to_num(nan=0.0), self.image_format)

    def _check_components(self) -> None:
        if self.vae is not None and self.image_channels != self.vae.config.in_channels:
            raise ValueError(
                f"`vae` takes images of {self.vae.config.in_channels} channels and gives {self.image_channels}, so its "
                "output cannot be joined with the kept part of an image. Use one with as many `out_channels` as "
                "`in_channels`."
            )
        if self.takes_low_res and self.vae is not None:
            raise ValueError(
                f"`unet` upsamples and inpaints (`in_channels={self.unet.config.in_channels}`), which is done in "
                "pixels. Pass `vae=None`."
            )
        super()._check_components()
        check_layout(self.config.inpainting_layout, self.unet.config, self.vae is not None)
        if self.controlnet is not None:
            check_controlnet(self.controlnet, self.unet, self.scheduler)


def _takes_masks(unet_config: Mapping[str, Any]) -> bool:
    """Whether a U-Net takes masks; `unet_config` may be of a file that leaves out defaults."""
    if "in_channels" not in unet_config or "out_channels" not in unet_config:
        return False
    return (sample_channels_of(unet_config) or unet_config["in_channels"]) < unet_config["in_channels"]
