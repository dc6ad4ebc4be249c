"""
ADMUnCLIPPipeline: generates images from CLIP image embeddings (unCLIP, the system of DALL-E 2; Ramesh et al. 2022,
https://huggingface.co/papers/2204.06125): from prompts through a prior, variations of images, interpolations between
images, and changes of an image by the difference of two prompts.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from diffusers import PriorTransformer, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from diffusers_adm.conditioning.call_arguments import check_call_arguments, checks_arguments, without_none
from diffusers_adm.conditioning.class_labels import ClassCondition
from diffusers_adm.conditioning.clip_towers import check_clip_tower, embed_clip_images, read_clip_images
from diffusers_adm.conditioning.condition import Condition, SamplingCall, Step, number_of_prompts
from diffusers_adm.conditioning.guidance import Guidance
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_embedding import ImageEmbeddingCondition, check_projection
from diffusers_adm.conditioning.image_format import ImageFormat, as_size
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.interpolation import check_weights, slerp, text_diff
from diffusers_adm.conditioning.latents import Autoencoder
from diffusers_adm.conditioning.prior import DEFAULT_PRIOR_STEPS, PriorSampler
from diffusers_adm.conditioning.steering import GuidedPrediction
from diffusers_adm.conditioning.text import TextCondition, TextConditioning, check_text_encoder, check_whole
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unclip_projection import UnCLIPProjectionModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.ops.integers import check_integer
from diffusers_adm.ops.values import check_generator
from diffusers_adm.pipelines.karlo_upsampler import DEFAULT_SUPER_RES_STEPS, KarloUpsampler
from diffusers_adm.pipelines.layouts import UNCLIP_LAYOUT
from diffusers_adm.pipelines.pipeline_adm import ADMPipeline, Output, OutputType, Samples, Sampling
from diffusers_adm.schedulers.diffusers_schedulers import DEFAULT_NUM_INFERENCE_STEPS, Steps, last_step_kwargs


class ADMUnCLIPPipeline(ADMPipeline):
    r"""
    Generates images from CLIP image embeddings, which come from a prompt through a prior, from an image, or from
    vectors; see docs/unclip.md. Guided like [`ADMPipeline`].

    Saved pipelines of diffusers' `UnCLIPPipeline` and `UnCLIPImageVariationPipeline`, such as
    `kakaobrain/karlo-v1-alpha`, load with `from_pretrained` and `from_pipe`.

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): The decoder; see [`ADMPipeline`].
        scheduler ([`SchedulerMixin`]): That of the decoder; see [`ADMPipeline`].
        image_projection (`UnCLIPProjectionModel`): Projects image embeddings, and texts if the decoder has them, to
            inputs of `unet`.
        vae ([`AutoencoderKL`], [`VQModel`] or [`AutoencoderTiny`], *optional*): See [`ADMPipeline`].
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the decoder's text, if `image_projection` has a
            `text_conditioning`: for `"clip"` a `CLIPTextModelWithProjection`.
        classifier (`AdaGNClassifierModel`, *optional*): See [`ADMPipeline`].
        prior ([`PriorTransformer`], *optional*), prior_scheduler ([`SchedulerMixin`], *optional*): Make image
            embeddings from prompts.
        prior_text_encoder (`CLIPTextModelWithProjection`, *optional*), prior_tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*): Text tower of the CLIP that gave the image
            embeddings of training. `None`: `text_encoder` and `tokenizer`.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*), feature_extractor (`CLIPImageProcessor`,
            *optional*): Its image tower, and the preparation of images for it; for `image`.
        super_res_first (`AdaGNUNet2DModel` or [`UNet2DModel`], *optional*), super_res_last (the same, *optional*),
            super_res_scheduler ([`SchedulerMixin`], *optional*): Upsampler of the decoded images, which takes x_t and
            the interpolated image. `super_res_last` takes the last step; `None`: `super_res_first` takes all.
        id2label (`dict[int, str]`, *optional*), image_format (`ImageFormat` or `dict`, *optional*): See
            [`ADMPipeline`].

    Raises:
        ValueError: For components that are incompatible with each other, as by [`ADMPipeline`]; for a prior or image
            encoder of another embedding width than `image_projection`, and towers of CLIP without a projection.
    """

    # The U-Net of the upsampler's last step comes after that of the others. The text encoder may run twice.
    model_cpu_offload_seq = (
        "image_encoder->prior_text_encoder->prior->text_encoder->image_projection->unet->vae->super_res_first"
        "->super_res_last"
    )
    _exclude_from_cpu_offload = ["prior"]  # whose `clip_mean` and `clip_std` are used outside of its `forward`
    _optional_components = [
        *ADMPipeline._optional_components,
        "prior",
        "prior_scheduler",
        "prior_text_encoder",
        "prior_tokenizer",
        "image_encoder",
        "feature_extractor",
        "super_res_first",
        "super_res_last",
        "super_res_scheduler",
    ]
    _layout = UNCLIP_LAYOUT

    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        image_projection: UnCLIPProjectionModel,
        vae: Autoencoder | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        prior: PriorTransformer | None,
        prior_scheduler: SchedulerMixin | None,
        prior_text_encoder: torch.nn.Module | None,
        prior_tokenizer: object | None,
        image_encoder: torch.nn.Module | None,
        feature_extractor: object | None,
        super_res_first: AdaGNUNet2DModel | UNet2DModel | None,
        super_res_last: AdaGNUNet2DModel | UNet2DModel | None,
        super_res_scheduler: SchedulerMixin | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
    ):
        # First, because all components are checked against each other at the end of the other constructor.
        self.register_modules(
            image_projection=image_projection,
            prior=prior,
            prior_scheduler=prior_scheduler,
            prior_text_encoder=prior_text_encoder,
            prior_tokenizer=prior_tokenizer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            super_res_scheduler=super_res_scheduler,
        )
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label, image_format)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        Loads a saved pipeline as diffusers does, also those of diffusers' `UnCLIPPipeline` and
        `UnCLIPImageVariationPipeline` (such as `kakaobrain/karlo-v1-alpha`), whose `decoder`, `decoder_scheduler` and
        `text_proj` become `unet`, `scheduler` and `image_projection`. Their `UnCLIPScheduler`s become
        `LearnedVarianceDDPMScheduler`s with the same steps.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        Makes a pipeline of the components of another one as diffusers does, also of an `UnCLIPPipeline` or
        `UnCLIPImageVariationPipeline`; see `from_pretrained`. Optional components that it does not have are `None`.
        """
        return super().from_pipe(pipeline, **kwargs)

    @property
    def has_text(self) -> bool:
        """Whether the decoder itself is conditioned on text, and not only the prior."""
        return self.image_projection.config.text_conditioning is not None

    @property
    def embedding_width(self) -> int:
        """Width of the image embeddings."""
        return self.image_projection.config.clip_embeddings_dim

    def encode_image(self, image: ImageInput | Sequence[ImageInput]) -> torch.Tensor:
        r"""
        Encodes images with `image_encoder`. Gradients are computed unless disabled.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): See `__call__`.

        Returns:
            `torch.Tensor` of shape `(number of images, width)`: Embeddings as CLIP gives them, not normalised.

        Raises:
            ValueError: Without `image_encoder` and `feature_extractor`, and for what are no images.
        """
        return self._embed_pixels(self._read_for_clip(image, "image"))

    def encode_text(self, prompt: str | Sequence[str]) -> torch.Tensor:
        r"""
        Encodes prompts to text embeddings, which lie in the same space as image embeddings. Gradients are computed
        unless disabled.

        Args:
            prompt (`str` or list of `str`): Texts.

        Returns:
            `torch.Tensor` of shape `(number of prompts, width)`: Embeddings as CLIP gives them, not normalised.

        Raises:
            ValueError: Without the text tower of the CLIP of the image embeddings, and for what are no prompts.
        """
        encoder, tokenizer = self._clip_text
        if encoder is None or tokenizer is None:
            raise ValueError(
                "This pipeline has no text tower of CLIP. Load it with `prior_text_encoder=` (a "
                "`CLIPTextModelWithProjection`) and `prior_tokenizer=`."
            )
        name = "text_encoder" if encoder is self.text_encoder else "prior_text_encoder"
        check_clip_tower("text", encoder, name)
        self._check_width(name, "projection_dim", getattr(self, name).config.projection_dim)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(x, str) for x in prompts):
            raise ValueError(f"`prompt` is {prompt!r}; pass a string, or a list of at least one.")
        prompts = list(prompts)
        text = TextCondition({}, encoder, tokenizer, masks_padding=True)
        return text.encode(prompts, None, self._execution_device)[0].pooled

    @torch.no_grad()
    @checks_arguments
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        image_embeds: torch.Tensor | None = None,
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
        prior_num_inference_steps: int = DEFAULT_PRIOR_STEPS,
        prior_guidance_scale: float = 1.0,
        prior_num_candidates: int = 1,
        super_res_num_inference_steps: int = DEFAULT_SUPER_RES_STEPS,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prior_latents: torch.Tensor | None = None,
        super_res_latents: torch.Tensor | None = None,
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
        Generates a batch of images. Their image embeddings are `image_embeds`, those of `image`, or those that the
        prior makes from `prompt`. With none of these, the decoder gets the learned embedding of training without one.

        Args:
            prompt (`str` or list of `str`, *optional*): Description of the images, for the prior, and for the decoder
                if it has text: one for all images, or one for each. With `image` or `image_embeds` the prior does not
                run. Without a prior, a decoder with text gets the prompt and the learned embedding.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): Images of any
                size to generate variations of: one for all results, or one for each. Arrays are `(height, width,
                channels)` and tensors `(channels, height, width)` in [0, 1] or of `uint8`, with a batch dimension in
                front or without; CLIP gets 8 bits of them.
            image_embeds (`torch.Tensor` of shape `(number of images, width)`, *optional*): Image embeddings as CLIP
                gives them, not normalised, such as those of `encode_image`: one for all results, or one for each.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): For the classifier, and for a U-Net
                with classes; see [`ADMPipeline`].
            batch_size (`int`, defaults to 1): Number of different images. Not needed if `prompt`, `image`,
                `image_embeds` or `class_labels` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each of these, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*):
                Steps of the decoder; see [`ADMPipeline`].
            guidance_scale (`float`, defaults to 1.0): Of the decoder, away from the learned embedding and the negative
                prompt; see [`ADMPipeline`].
            guidance_rescale (`float`, defaults to 0.0), guidance_start (`float`, defaults to 0.0), guidance_end
                (`float`, defaults to 1.0), classifier_guidance_scale (`float`, defaults to 0.0): Of the decoder; see
                [`ADMPipeline`].
            prior_num_inference_steps (`int`, defaults to 25), prior_guidance_scale (`float`, defaults to 1.0): Steps of
                the prior, and its guidance towards the prompt; 1.0 is off.
            prior_num_candidates (`int`, defaults to 1): Embeddings that the prior samples for each image; the one with
                the highest cosine similarity to the text embedding is kept. 2 in the paper.
            super_res_num_inference_steps (`int`, defaults to 7): Steps of the upsampler; 0: nothing is upsampled.
            negative_prompt (`str` or list of `str`, *optional*): Prompt to guide away from, in prior and decoder: one
                for all prompts, or one for each. `None`: the empty prompt.
            eta (`float`, *optional*): Noise of DDIM steps of the decoder; see [`ADMPipeline`].
            height, width (`int`, *optional*): Size of the decoded images in pixels; see [`ADMPipeline`]. The upsampler
                multiplies it.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise: of the prior, the decoder
                and the upsampler, in this order; see [`ADMPipeline`].
            latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*): Standard normal
                noise for the decoder.
            prior_latents (`torch.Tensor` of shape `(number of images * prior_num_candidates, width)`, *optional*):
                Standard normal noise for the prior, the candidates of an image one after the other.
            super_res_latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*):
                Standard normal noise for the upsampler, of the size of its results.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(number of prompts, length, width)`,
                *optional*), prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(number of
                prompts, length)`, *optional*), pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of
                shape `(number of prompts, width)`, *optional*): Encoded prompts of the decoder in place of `prompt` and
                `negative_prompt`; see `encode_prompt`. The prior takes them too if it has the same text encoder.
            output_type (`str`, defaults to `"pil"`): See [`ADMPipeline`]. `"latent"`: the sample of the decoder, not
                upsampled.
            return_dict (`bool`, defaults to `True`), callback_on_step_end (`Callable`, *optional*),
                callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): See [`ADMPipeline`].
                Callbacks run after the steps of the decoder. If one sets `pipe._interrupt`, the upsampler interpolates.
            guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Guidance of the decoder by functions; see
                [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that are incompatible with each other, the model or the scheduler.
        """
        # 1. check networks, read conditions
        self._check_components()
        text = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_text = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        classes = self._class_condition(self.unet.config).read(class_labels)
        prior_arguments = {
            "prior_num_inference_steps": (prior_num_inference_steps, DEFAULT_PRIOR_STEPS),
            "prior_guidance_scale": (prior_guidance_scale, 1.0),
            "prior_num_candidates": (prior_num_candidates, 1),
            "prior_latents": (prior_latents, None),
        }
        embedding = self._embedding_condition(
            prompt, text, negative_prompt, negative_text, image, image_embeds, prior_arguments
        )
        upsampler = self._read_upsampling(super_res_num_inference_steps, super_res_latents, output_type)

        # 2. check other arguments, set timesteps, run the prior, draw noise, prepare conditions
        samples = Samples(batch_size, num_images_per_prompt, height, width, generator, latents)
        if upsampler is not None:
            self._check_noise_of_upsampler(upsampler, samples, [classes, embedding])
        sampling = self._start(
            classes,
            [embedding],
            Steps(num_inference_steps, timestep_respacing, eta),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            samples,
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )

        # 3. sample, decode, upsample
        latents = self._denoise(sampling, sampling.call.noise * sampling.call.scheduler.init_noise_sigma)
        if upsampler is None:
            return self._finish(self._decode(latents, output_type), return_dict)
        pixels = self._to_pixels(latents).clamp(-1, 1)
        if sampling.state.interrupt:
            pixels = upsampler.interpolate(pixels)
        else:
            pixels = upsampler(pixels, sampling.call, self.progress_bar)
        return self._finish(self._convert(pixels, output_type), return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        image_1: ImageInput | None = None,
        image_2: ImageInput | None = None,
        weights: float | Sequence[float] | np.ndarray | torch.Tensor = 0.5,
        *,
        image_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **call_arguments: Any,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images between two images: their embeddings are interpolated on the sphere (slerp).

            path = pipe.interpolate(cat, dog, weights=[0.0, 0.25, 0.5, 0.75, 1.0], guidance_scale=3.0).images

        With the inverted noise of both images the ends of the path are the images themselves (section 3.2 of the
        paper); the steps must then be deterministic:

            noise = torch.cat([pipe.invert(each, image=each) for each in (cat, dog)])
            path = pipe.interpolate(cat, dog, weights=[0.0, 0.5, 1.0], latents=noise, eta=0.0).images

        Args:
            image_1, image_2 (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*): One image each; see
                `__call__`.
            weights (`float` or list, array or tensor of them, defaults to 0.5): In [0, 1], one for each result: 0 is
                `image_1`, 1 is `image_2`.
            image_embeds (`torch.Tensor` of shape `(2, width)`, *optional*): Embeddings in place of the images.
            latents (`torch.Tensor` of shape `(2, channels, height, width)` or `(1, channels, height, width)`,
                *optional*): The noise of both ends, which is interpolated as the embeddings are, or one noise for all
                results. `None`: one noise for all.
            generator (`torch.Generator`, *optional*): Source of the noise, which is the same for all results.
            call_arguments (`dict`): Other arguments of `__call__`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: One image for each weight, in their order.

        Raises:
            ValueError: For weights outside [0, 1], other than two images, and what `__call__` refuses.
        """
        check_call_arguments(without_none(latents=latents, image_embeds=image_embeds))
        weights = check_weights("weights", weights)
        self._check_components()
        if image_embeds is None:
            if image_1 is None or image_2 is None:
                raise ValueError("Two images are needed: pass `image_1` and `image_2`, or `image_embeds` of both.")
            pixels = [self._read_for_clip(each, f"image_{n}") for n, each in ((1, image_1), (2, image_2))]
            for number, read in enumerate(pixels, 1):
                if len(read) != 1:
                    raise ValueError(f"`image_{number}` holds {len(read)} images; pass one.")
            image_embeds = self._embed_pixels(torch.cat(pixels))
        else:
            if image_1 is not None or image_2 is not None:
                raise ValueError("Both images and `image_embeds` were given. Pass one of them.")
            self._check_embeds(image_embeds, 2)
        t = torch.tensor(weights)
        start, end = (row.expand(len(weights), -1) for row in image_embeds[:, None])
        path = slerp(start, end, t.to(image_embeds.device))
        if latents is not None:
            self._check_noise_of_ends(latents, (1, 2))
            start, end = (row.expand(len(weights), -1, -1, -1) for row in (latents[:1], latents[-1:]))
            latents = slerp(start, end, t.to(latents.device))
        return self._call_with_one_noise(path, latents, generator, call_arguments)

    @torch.no_grad()
    def edit(
        self,
        image: ImageInput | None = None,
        source_prompt: str = "",
        target_prompt: str | None = None,
        strength: float | Sequence[float] | np.ndarray | torch.Tensor = 0.25,
        *,
        image_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **call_arguments: Any,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Changes an image by the difference of two prompts (text diffs, section 3.3 of the paper): its embedding is
        turned towards the normalised difference of the text embeddings, and keeps its norm.

            pipe.edit(photo, "a photo of a cat", "an anime drawing of a cat", strength=[0.1, 0.2, 0.3])

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*): The image; see `__call__`.
            source_prompt (`str`, defaults to `""`), target_prompt (`str`, *optional*): Descriptions of the image and of
                the wanted one, which must be given.
            strength (`float` or list, array or tensor of them, defaults to 0.25): In [0, 1], one for each result: 0 is
                the image, 1 the difference of the prompts alone. The paper uses 0.25 to 0.5.
            image_embeds (`torch.Tensor` of shape `(1, width)`, *optional*): Its embedding in place of the image.
            latents (`torch.Tensor` of shape `(1, channels, height, width)`, *optional*): Noise for all results, such as
                that of `pipe.invert(image, image=image)`, with `eta=0.0`. `None`: one noise for all.
            generator (`torch.Generator`, *optional*): Source of the noise, which is the same for all results.
            call_arguments (`dict`): Other arguments of `__call__`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: One image for each strength, in their order.

        Raises:
            ValueError: For a strength outside [0, 1], prompts with the same embedding, more than one image, and what
                `__call__` refuses.
        """
        check_call_arguments(without_none(latents=latents, image_embeds=image_embeds))
        strengths = check_weights("strength", strength)
        self._check_components()
        for name, prompt in (("source_prompt", source_prompt), ("target_prompt", target_prompt)):
            if not isinstance(prompt, str):
                raise ValueError(f"`{name}` is {prompt!r}; pass a string.")
        if (image is None) == (image_embeds is None):
            given = "Both `image` and `image_embeds`" if image is not None else "Neither `image` nor `image_embeds`"
            raise ValueError(f"{given} were given. Pass one of them.")
        if image_embeds is None:
            pixels = self._read_for_clip(image, "image")
            if len(pixels) != 1:
                raise ValueError(f"`image` holds {len(pixels)} images; pass one.")
            image_embeds = self._embed_pixels(pixels)
        else:
            self._check_embeds(image_embeds, 1)
        source, target = self.encode_text([source_prompt, target_prompt])[:, None]
        embeds = image_embeds.to(source.device).expand(len(strengths), -1)
        embeds = text_diff(embeds, source, target, torch.tensor(strengths, device=source.device))
        if latents is not None:
            self._check_noise_of_ends(latents, (1,))
            latents = latents.expand(len(strengths), -1, -1, -1)
        return self._call_with_one_noise(embeds, latents, generator, call_arguments)

    # Embeddings

    def _call_with_one_noise(
        self,
        image_embeds: torch.Tensor,
        latents: torch.Tensor | None,
        generator: torch.Generator | None,
        call_arguments: dict[str, Any],
    ) -> ImagePipelineOutput | tuple:
        """A call for embeddings whose images have all noise in common, that of the steps included."""
        taken = {"image", "batch_size", "num_images_per_prompt"} & call_arguments.keys()
        if taken:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in sorted(taken))} cannot be passed here: the embeddings tell the "
                "number of results. Leave it out."
            )
        if isinstance(generator, list):
            raise ValueError("`generator` is a list; all results have the same noise. Pass a single generator.")
        check_generator(generator)
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        generators = [torch.Generator(device).manual_seed(seed) for _ in image_embeds]
        return self(image_embeds=image_embeds, latents=latents, generator=generators, **call_arguments)

    def _read_for_clip(self, image: ImageInput | Sequence[ImageInput], name: str) -> torch.Tensor:
        """Checks images; returns what `image_encoder` takes, `(number of images, 3, height, width)` on the CPU."""
        if self.image_encoder is None:
            raise ValueError(
                f"`{name}` was given, but this pipeline has no `image_encoder`. Load it with `image_encoder=` (a "
                "`CLIPVisionModelWithProjection`) and `feature_extractor=`, or pass `image_embeds`."
            )
        return read_clip_images(image, name, self.feature_extractor, self.image_format)

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return embed_clip_images(self.image_encoder, pixels, self._execution_device)

    def _check_embeds(self, image_embeds: torch.Tensor, number: int) -> None:
        ImageEmbeddingCondition(self.image_projection).read(image_embeds)
        if len(image_embeds) != number:
            raise ValueError(f"`image_embeds` holds {len(image_embeds)} embeddings; pass {number}.")

    def _check_noise_of_ends(self, latents: torch.Tensor, numbers: tuple[int, ...]) -> None:
        is_tensor = torch.is_tensor(latents)
        if (
            not is_tensor
            or latents.ndim != 4
            or len(latents) not in numbers
            or latents.shape[1] != self.sample_channels
        ):
            given = f"has shape {tuple(latents.shape)}" if is_tensor else f"is a {type(latents).__name__}"
            raise ValueError(
                f"`latents` {given}; pass the noise of {' or '.join(map(str, numbers))} "
                f"images, a `torch.Tensor` of shape ({' or '.join(map(str, numbers))}, {self.sample_channels}, "
                "height, width)."
            )

    # Conditions

    @property
    def _clip_text(self) -> tuple[Any, Any]:
        """Text tower and tokenizer of the CLIP of the image embeddings."""
        if self.prior_text_encoder is not None:
            return self.prior_text_encoder, self.prior_tokenizer
        if isinstance(self.text_encoder, GLIDETextModel):  # whose embedding lies in a space of its own
            return None, None
        return self.text_encoder, self.tokenizer

    def _prior_sampler(self) -> PriorSampler:
        text_prefix = "prior_" if self.prior_text_encoder is not None else ""
        return PriorSampler(
            self.prior,
            self.prior_scheduler,
            *self._clip_text,
            prefix="prior_",
            text_prefix=text_prefix,
            guidance_passes=self._guidance_passes,
        )

    def _text_condition(self) -> TextCondition:
        is_clip = self.image_projection.config.text_conditioning == "clip"
        return TextCondition(
            self.unet.config,
            self.text_encoder,
            self.tokenizer,
            masks_padding=is_clip,
            takes_pooled=True if is_clip else None,
            states_width=self.image_projection.states_width,
        )

    def _class_condition(self, unet_config: dict[str, Any]) -> ClassCondition:
        if self.image_projection.config.time_embed_dim is None:
            return super()._class_condition(unet_config)
        # The embedding takes the place of a class in the U-Net; labels are for the classifier.
        return super()._class_condition({**unet_config, "class_embed_type": None, "num_class_embeds": None})

    def _embedding_condition(
        self,
        prompt: str | Sequence[str] | None,
        text: TextConditioning,
        negative_prompt: str | Sequence[str] | None,
        negative_text: TextConditioning,
        image: ImageInput | Sequence[ImageInput] | None,
        image_embeds: torch.Tensor | None,
        prior_arguments: dict[str, tuple[Any, Any]],
    ) -> ImageEmbeddingCondition:
        """Reads the arguments that make the image embedding, and the text of the decoder if it has one."""
        for prefix, each in (("", text), ("negative_", negative_text)):
            check_whole(each, prefix)
        has_prompt = prompt is not None or text.hidden_states is not None
        own = "`image`" if image is not None else "`image_embeds`" if image_embeds is not None else None
        if image is not None and image_embeds is not None:
            raise ValueError("Both `image` and `image_embeds` were given. Pass one of them.")
        runs_prior = own is None and has_prompt and self.prior is not None
        if not self.has_text and has_prompt and not runs_prior:
            if own is not None:
                raise ValueError(
                    f"Both `prompt` and {own} were given, but the decoder has no text of its own: its embedding comes "
                    "from one of them. Pass one, or change an image by prompts with `edit`."
                )
            raise ValueError(
                "`prompt` was given, but this pipeline has no `prior` to make an image embedding from it, and its "
                "decoder has no text of its own. Load it with `prior=` and `prior_scheduler=`, or pass `image` or "
                "`image_embeds`."
            )
        has_negative = negative_prompt is not None or negative_text.hidden_states is not None
        if not self.has_text and has_negative and not runs_prior:
            raise ValueError(
                "`negative_prompt` was given, but the decoder has no text of its own, and the prior does not run "
                f"{f'with {own}' if own else 'without a `prompt`'}. Leave it out."
            )
        changed = [
            name
            for name, (value, default) in prior_arguments.items()
            if value is not default and (torch.is_tensor(value) or value != default)
        ]
        if not runs_prior and changed:
            why = "this pipeline has no `prior`" if self.prior is None else "there is no `prompt`"
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in changed)} cannot have an effect: "
                f"{f'the image embedding is that of {own}' if own else why}. Leave them out."
            )
        condition_text = None
        if self.has_text:
            condition_text = self._text_condition().read(prompt, text, negative_prompt, negative_text)
            self._check_texts(condition_text)
        embedding = ImageEmbeddingCondition(self.image_projection, condition_text)
        if runs_prior:
            return self._read_prior(embedding, prompt, text, negative_prompt, negative_text, prior_arguments)
        if image is None:
            return embedding.read(image_embeds)
        pixels = self._read_for_clip(image, "image")
        embedding.read(source=lambda call: self._embed_for_call(pixels, call))
        if len(pixels) > 1:
            embedding.counts["image"] = len(pixels)
        return embedding

    def _embed_for_call(self, pixels: torch.Tensor, call: SamplingCall) -> torch.Tensor:
        return call.rows(self._embed_pixels(pixels))

    def _read_prior(
        self,
        embedding: ImageEmbeddingCondition,
        prompt: str | Sequence[str] | None,
        text: TextConditioning,
        negative_prompt: str | Sequence[str] | None,
        negative_text: TextConditioning,
        arguments: dict[str, tuple[Any, Any]],
    ) -> ImageEmbeddingCondition:
        given = [None if each.hidden_states is None else each for each in (text, negative_text)]
        if any(each is not None for each in given) and self.prior_text_encoder is not None:
            raise ValueError(
                "`prompt_embeds` are those of the decoder's text encoder, but the prior has a text encoder of its own "
                "(`prior_text_encoder`). Pass `prompt`, and `negative_prompt` if there is one."
            )
        source = self._prior_sampler().read(
            prompt,
            given=given[0],
            negative_prompt=negative_prompt,
            negative_given=given[1],
            **{name.removeprefix("prior_"): value for name, (value, _) in arguments.items()},
        )
        embedding.read(source=source)
        embedding.counts |= source.counts
        has_negative = negative_prompt is not None or given[1] is not None
        if has_negative and embedding.text is None and not source.uses_negative_prompt:
            self._warn_once(
                [
                    "`negative_prompt` has no effect: `prior_guidance_scale` is 1.0, which is off, and the decoder has "
                    "no text of its own. Pass another `prior_guidance_scale`, or leave it out."
                ]
            )
        return embedding

    def _check_texts(self, text: TextCondition) -> None:
        """Raises a `ValueError` for texts that could not be encoded, or not be projected, before the prior runs."""
        is_clip = self.image_projection.config.text_conditioning == "clip"
        if text.given is None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "The decoder is conditioned on text, but this pipeline has no text encoder and tokenizer. Load it with "
                "both, or pass `prompt_embeds`."
            )
        for prefix, given in (("", text.given), ("negative_", text.negative_given)):
            if is_clip and given is not None and given.pooled is None:
                raise ValueError(
                    f"`{prefix}prompt_embeds` was given without `{prefix}pooled_prompt_embeds`, but the decoder takes "
                    "the embedding of a text as well. Pass both, as `encode_prompt` returns them."
                )

    # Steps

    def _predict(self, sampling: Sampling, latents: torch.Tensor, step: Step) -> GuidedPrediction:
        prediction = super()._predict(sampling, latents, step)
        if step.index == step.num_steps - 1:
            prediction.step_kwargs |= last_step_kwargs(sampling.call.scheduler, latents)
        return prediction

    def _upsampler(self) -> KarloUpsampler:
        size, factor = as_size(self.unet.config.sample_size), self.vae_scale_factor
        decoded_size = None if size is None else (size[0] * factor, size[1] * factor)
        networks = self.super_res_first, self.super_res_last
        return KarloUpsampler(*networks, self.super_res_scheduler, self.image_channels, decoded_size)

    def _read_upsampling(
        self, num_inference_steps: int, latents: torch.Tensor | None, output_type: str
    ) -> KarloUpsampler | None:
        """Checks the arguments for the upsampler; `None`: it does not run."""
        if self.super_res_first is None:
            why = "this pipeline has no upsampler (`super_res_first`)"
        elif num_inference_steps == 0:
            why = "`super_res_num_inference_steps` is 0"
        elif self._inverts:
            why = "an inversion ends with the noise of the decoder"
        elif output_type == "latent":
            why = "`output_type` is 'latent', which is not upsampled"
        else:
            return self._upsampler().read(num_inference_steps, latents)
        if latents is not None or num_inference_steps not in (0, DEFAULT_SUPER_RES_STEPS):
            name = "super_res_latents" if latents is not None else "super_res_num_inference_steps"
            raise ValueError(f"`{name}` cannot have an effect: {why}. Leave it out.")
        return None

    def _check_noise_of_upsampler(
        self, upsampler: KarloUpsampler, samples: Samples, conditions: Sequence[Condition]
    ) -> None:
        height, width = self._size(samples, [])
        if height is None or width is None:  # `_start` refuses this
            return
        check_integer("num_images_per_prompt", samples.num_images_per_prompt, 1)
        number = number_of_prompts(conditions, samples.batch_size) * samples.num_images_per_prompt
        upsampler.check_latents(number, (height, width))

    # Components

    def _check_components(self) -> None:
        if "clip_embeddings_dim" not in getattr(self.image_projection, "config", {}):
            raise ValueError(
                f"`image_projection` is a {type(self.image_projection).__name__}; pass the `UnCLIPProjectionModel` "
                "that was trained with the U-Net. Models without one are loaded with `ADMPipeline`."
            )
        check_projection(self.image_projection.config, self.unet.config)
        super()._check_components()
        if (self.prior is None) != (self.prior_scheduler is None):
            raise ValueError("Just one of `prior` and `prior_scheduler` was given. Pass both or neither.")
        if self.prior_text_encoder is not None and self.prior_tokenizer is None:
            raise ValueError(
                "`prior_text_encoder` was given without `prior_tokenizer`. Pass the tokenizer that it was trained with."
            )
        if self.prior is not None:
            self._prior_sampler()
            self._check_width("prior", "embedding_dim", self.prior.config.embedding_dim)
        if self.prior_text_encoder is not None:
            check_clip_tower("text", self.prior_text_encoder, "prior_text_encoder")
            self._check_width("prior_text_encoder", "projection_dim", self.prior_text_encoder.config.projection_dim)
        if self.image_encoder is not None:
            check_clip_tower("vision", self.image_encoder, "image_encoder")
            self._check_width("image_encoder", "projection_dim", self.image_encoder.config.projection_dim)
            if self.feature_extractor is None:
                raise ValueError(
                    "`image_encoder` was given without `feature_extractor`, which prepares images for it. "
                    "Pass the `CLIPImageProcessor` of the same folder."
                )
        if self.super_res_first is not None:
            self._upsampler()
        elif self.super_res_last is not None or self.super_res_scheduler is not None:
            raise ValueError(
                "`super_res_last` or `super_res_scheduler` was given without `super_res_first`. Pass all, or none."
            )

    def _check_width(self, name: str, entry: str, width: int) -> None:
        if width != self.embedding_width:
            raise ValueError(
                f"`{name}` has embeddings of width {width} (`{entry}`), but the decoder takes "
                f"{self.embedding_width} (`clip_embeddings_dim` of `image_projection`). Use networks that were trained "
                "on the embeddings of the same CLIP."
            )

    def _check_text_encoder(self) -> None:
        if not self.has_text:  # it is that of the prior
            if self.tokenizer is None:
                raise ValueError(
                    "`text_encoder` was given without a `tokenizer`. Pass the tokenizer that it was trained with."
                )
            return
        config = self.image_projection.config
        is_clip = config.text_conditioning == "clip"
        if is_clip:
            check_clip_tower("text", self.text_encoder, "text_encoder")
            self._check_width("text_encoder", "projection_dim", self.text_encoder.config.projection_dim)
        width = self.image_projection.states_width
        found = getattr(self.text_encoder.config, "hidden_size", None)
        if found not in (None, width):
            raise ValueError(
                f"`text_encoder` gives states of width {found}, but `image_projection` takes {width} "
                "(`text_states_dim`). Use the text encoder that the decoder was trained with."
            )
        own = {**self.unet.config, "encoder_hid_dim": None, "cross_attention_dim": found}  # the width was checked above
        check_text_encoder(self.text_encoder, self.tokenizer, own)
