"""
ADMSuperResolutionPipeline: enlarges images with an ablated diffusion model that sees the small one beside the sample.

The upsamplers of ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233) and GLIDE (Nichol et al. 2021,
https://huggingface.co/papers/2112.10741), and ones told how noisy their small image is (cascaded diffusion, Ho et al.
2021, https://huggingface.co/papers/2106.15282).
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.conditioning.image_inputs import ImageInput, read_images
from diffusers_adm.conditioning.low_resolution import (
    add_noise_to_low_res,
    match_low_res,
    noise_level_embedding,
    upsample,
)
from diffusers_adm.pipelines.pipeline_adm import DEFAULT_NUM_INFERENCE_STEPS, ADMPipeline, OutputType
from diffusers_adm.schedulers.noise_schedules import check_same_noise


class ADMSuperResolutionPipeline(ADMPipeline):
    r"""
    Enlarges images: a U-Net denoises the large image while it sees the small one, bilinearly enlarged, beside it. By
    class, by prompt, by both or by neither, guided like [`ADMPipeline`].

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): Takes twice the channels of an image, 6
            for RGB. One with `time_cond_proj_dim` is told the noise level of the small image.
        scheduler ([`SchedulerMixin`]): As of [`ADMPipeline`].
        vae (`None`): Must be `None`: images are enlarged in pixels.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*), classifier (`AdaGNClassifierModel`, *optional*),
            id2label (`dict[int, str]`, *optional*): As of [`ADMPipeline`].
        low_res_size (`int`, *optional*): Side of the small images that the U-Net was trained on, in pixels, for large
            ones of its `sample_size`: together they tell the factor. `None`: any size is taken.
        noise_level (`int`, *optional*): That of calls which name none; `None`: 0.
        max_noise_level (`int`, *optional*): Highest level that the U-Net was trained on; `None`: not known.
        noise_schedule (`dict`, *optional*): The noise schedule that the U-Net was trained on, for the large image and
            for the levels of the small one: what `diffusers_adm.noise_schedules.noise_schedule_of(scheduler)` gives.
            `None`: not known.

    Raises:
        ValueError: For components that do not fit each other, as by [`ADMPipeline`]; for a U-Net whose channels are not
            those of an upsampler, a `vae`, levels or a size that the U-Net cannot have been trained on, and a
            `scheduler` with another noise schedule than `noise_schedule`.
    """

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: torch.nn.Module | None,
        tokenizer: object | None,
        classifier: ModelMixin | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        low_res_size: int | None = None,
        noise_level: int | None = None,
        max_noise_level: int | None = None,
        noise_schedule: dict[str, Any] | None = None,
    ):
        # First, because the scheduler is compared with it in the other constructor.
        self.register_to_config(noise_schedule=noise_schedule)
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label)
        self.register_to_config(low_res_size=low_res_size, noise_level=noise_level, max_noise_level=max_noise_level)
        size = self.unet.config.sample_size
        if low_res_size is not None and not (isinstance(size, int) and 0 < low_res_size < size):
            raise ValueError(
                f"`low_res_size` is {low_res_size} and the `sample_size` of `unet` is {size}: the small images must be "
                "smaller than the large ones, which are square."
            )
        for name, level in (("max_noise_level", max_noise_level), ("noise_level", noise_level)):
            if level is not None:
                self._check_noise_level(level, name)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample: half of those that the U-Net takes."""
        return self.unet.config.in_channels // 2

    @torch.no_grad()
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Enlarges a batch of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or list of one of them): Small images of one size:
                what `ADMPipeline` returns for `output_type` "pil", "np" or "pt". Arrays are `(number, height, width,
                channels)`, tensors `(number, channels, height, width)`, both in [0, 1]; a single one may leave the
                number out. Where the pipeline knows its `low_res_size`, the factor of enlargement must be the one it
                was trained for; otherwise any smaller size is taken. One image is taken for all prompts or classes.
            prompt (`str` or list of `str`, *optional*): What the images show, for a model that reads text: one for all,
                or one for each.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Their classes, by number or by
                name: one for all, or one for each.
            noise_level (`int`, *optional*): Number of noising steps that the small image is taken through first: 0 is
                none, and as high as it was in training is a little more than the faults of the small image. Noise is
                drawn from `generator`. `None`: the `noise_level` of the pipeline's config, or else 0. Above 0 for a
                U-Net with `time_cond_proj_dim`.
            back_projection (`bool`, defaults to `False`): Shift the blocks of pixels of the finished images so that
                their means are the pixels of the small ones, which a small or short-trained model meets only about.
                For whole factors, the same along both sides.
            num_images_per_prompt (`int`, defaults to 1): How often each image is enlarged, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*),
                guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0), negative_prompt (`str` or list of `str`, *optional*), eta (`float`, *optional*): As of
                [`ADMPipeline`]. With and without the condition, the U-Net sees the small image.
            height, width (`int`, *optional*): Of the large images, in pixels, divisible by the total downsampling of
                the U-Net. `None`: its `sample_size`.
            generator (`torch.Generator` or list of them, *optional*), latents (`torch.Tensor` of shape `(number of
                images, channels, height, width)`, *optional*), prompt_embeds, negative_prompt_embeds (`torch.Tensor`,
                *optional*), prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor`, *optional*),
                pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor`, *optional*), output_type (`str`,
                defaults to `"pil"`), return_dict (`bool`, defaults to `True`), callback_on_step_end (`Callable`,
                *optional*), callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): As of
                [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that do not fit each other, the model or the scheduler; before any work is done.
        """
        low_res = 2 * read_images(image, "image", self.sample_channels) - 1  # (N, C, h, w) in [-1, 1]
        self._check_number(len(low_res), prompt, prompt_embeds, class_labels)
        if noise_level is None:
            noise_level = self.config.noise_level or 0
        elif isinstance(noise_level, Integral):
            noise_level = int(noise_level)  # NumPy's
        self._check_noise_level(noise_level)
        default_height, default_width = self._default_size()
        self._check_size(low_res, height or default_height, width or default_width, back_projection)
        denoising = self._start(
            prompt=prompt,
            class_labels=class_labels,
            batch_size=len(low_res),
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            timestep_respacing=timestep_respacing,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            classifier_guidance_scale=classifier_guidance_scale,
            negative_prompt=negative_prompt,
            eta=eta,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # The sample first: from the same seed it then starts from the same noise at every level.
        latents = self._draw_noise(denoising, latents) * denoising.scheduler.init_noise_sigma
        low_res = low_res.to(denoising.device, denoising.dtype)
        low_res = clean_low_res = low_res.repeat_interleave(denoising.num_images // len(low_res), dim=0)
        levels = torch.full((denoising.num_images,), noise_level, device=denoising.device)
        if noise_level > 0:
            noise = randn_tensor(low_res.shape, generator, denoising.device, denoising.dtype)
            low_res = add_noise_to_low_res(low_res, noise, levels, denoising.scheduler.alphas_cumprod)
        embedding_dim = self.unet.config.get("time_cond_proj_dim")
        if embedding_dim is not None:
            embedding = noise_level_embedding(levels, embedding_dim).to(self.unet.dtype)
            denoising.conditional["timestep_cond"] = embedding
            if denoising.both is not None:
                denoising.both["timestep_cond"] = torch.cat([embedding] * 2)

        latents = self._denoise(
            denoising,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            extra_channels=upsample(low_res, *denoising.size),
        )
        if back_projection:
            latents = match_low_res(latents.clamp(-1, 1), clean_low_res)
        return self._finish(self._decode(latents, output_type), return_dict)

    @staticmethod
    def _check_number(
        num_images: int,
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None,
    ) -> None:
        """Raises a `ValueError` unless there is one of each for all images, or one for each."""
        given = {"prompt": prompt, "prompt_embeds": prompt_embeds, "class_labels": class_labels}
        for name, values in given.items():
            is_list = isinstance(values, (list, tuple)) or (torch.is_tensor(values) and values.ndim > 0)
            if is_list and num_images > 1 and len(values) != num_images:
                raise ValueError(
                    f"`{name}` holds {len(values)} entries for {num_images} images. Pass one for all, or one for each."
                )

    def _check_noise_level(self, noise_level: int, name: str = "noise_level") -> None:
        chain, highest = self.scheduler.config.num_train_timesteps, self.config.max_noise_level
        if highest is None or name == "max_noise_level":
            highest = chain
        if not isinstance(noise_level, int) or not 0 <= noise_level <= highest:
            raise ValueError(
                f"`{name}` is {noise_level!r}; it must be an integer from 0 (none) to {highest}, the "
                + ("length of the noising chain." if highest == chain else "highest level of the training.")
            )
        if noise_level > 0 and self.unet.config.get("time_cond_proj_dim") is None:
            raise ValueError(
                f"`{name}` is {noise_level}, but this U-Net has no `time_cond_proj_dim` that could tell it the level; "
                "it was trained on small images without noise. Leave it at 0."
            )

    def _check_size(self, low_res: torch.Tensor, height: int | None, width: int | None, back_projection: bool) -> None:
        """Raises a `ValueError` for images that are no smaller than the large ones, or by another factor."""
        (h, w), trained = low_res.shape[-2:], self.config.low_res_size
        if height is None or width is None:
            raise ValueError("`height` and `width` are missing: the U-Net's config names no `sample_size`. Pass both.")
        if h > height or w > width or (h, w) == (height, width):
            raise ValueError(
                f"`image` is {w} x {h} pixels (width x height) and would become {width} x {height}. Pass a smaller "
                "one, or a larger `height` and `width`."
            )
        if back_projection and (height % h or (height, width) != (height // h * h, height // h * w)):
            raise ValueError(
                f"`back_projection` needs a whole factor, the same along both sides, but {w} x {h} pixels (width x "
                f"height) would become {width} x {height}. Leave it off."
            )
        if trained is None:
            return
        trained_size = self.unet.config.sample_size
        factor = trained_size / trained
        if (h * trained_size, w * trained_size) != (height * trained, width * trained):
            raise ValueError(
                f"`image` is {w} x {h} pixels (width x height) and would become {width} x {height}, but this model "
                f"was trained to enlarge {factor:g} times, from {trained} to {trained_size}. Resize the image, or "
                f"pass `height={h * factor:g}` and `width={w * factor:g}`."
            )

    def _check_components(self) -> None:
        config = self.unet.config
        if config.in_channels % 2 or config.out_channels not in (config.in_channels // 2, config.in_channels):
            raise ValueError(
                f"`unet` has `in_channels={config.in_channels}` and `out_channels={config.out_channels}`. The U-Net of "
                "an upsampler takes the sample and the enlarged small image, 6 channels for RGB, and gives 3, or 6 "
                "with a learned variance. Load other models with `ADMPipeline`."
            )
        if self.vae is not None:
            raise ValueError("`vae` was given, but images are enlarged in pixels. Pass `vae=None`.")
        super()._check_components()
        check_same_noise("This upsampler", self.config.noise_schedule, self.scheduler, self.unet)
