"""
The prior of unCLIP: makes CLIP image embeddings from prompts (Ramesh et al. 2022,
https://huggingface.co/papers/2204.06125, section 2.2), with diffusers' `PriorTransformer`.

    in a pipeline:     condition.read(source=PriorSampler(prior, scheduler, encoder, tokenizer).read("a red fox"))
    without pipeline:  PriorSampler(prior, scheduler, encoder, tokenizer).sample(["a red fox"], generator=generator)
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..ops.finiteness import count_not_finite
from ..ops.integers import check_integer
from ..ops.values import check_elements
from ..schedulers.diffusers_schedulers import (
    Generators,
    Steps,
    check_other_steps,
    check_scheduler,
    copy_for_call,
    last_step_kwargs,
    takes_variance,
)
from .clip_towers import check_clip_tower
from .condition import SamplingCall, check_finite
from .guidance import GuidancePasses, check_guidance_passes, guide, joins_passes
from .text import (
    Prompts,
    TextCondition,
    TextConditioning,
    as_prompts,
    join_texts,
    map_text,
    max_prompt_length,
    prompts_for_guidance,
)


logger = logging.getLogger(__name__)

DEFAULT_PRIOR_STEPS = 25


class PriorSampler:
    """
    Samples image embeddings from a prior; an `EmbeddingSource` after `read`.

    Prompts are padded to the length that CLIP takes. CLIP gets no mask, the prior gets the mask of the padding. The
    unconditional pass of guidance has the empty prompt, or the negative one.

    Args:
        prior (`PriorTransformer`): Predicts the embedding (or its noise, see the scheduler's `prediction_type`), scaled
            by its `clip_mean` and `clip_std`.
        scheduler ([`SchedulerMixin`]): As pipelines take it, with a fixed variance. It is copied for each call.
        text_encoder (`CLIPTextModelWithProjection`, *optional*), tokenizer (`PreTrainedTokenizerBase`, *optional*): Of
            the CLIP that the prior was trained with. Not needed for `sample_from`.
        prefix (`str`, defaults to `""`): In front of the names of arguments and components in messages.
        text_prefix (`str`, *optional*): The same for `text_encoder` and `tokenizer`. `None`: `prefix`.
        guidance_passes (`str`, defaults to `"auto"`): `"joint"`, `"separate"` or `"auto"`: how both passes of guidance
            run; see `ADMPipeline.set_guidance_passes`.

    Raises:
        ValueError: For components that are incompatible with each other.
    """

    def __init__(
        self,
        prior: PriorTransformer,
        scheduler: SchedulerMixin,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: object | None = None,
        *,
        prefix: str = "",
        text_prefix: str | None = None,
        guidance_passes: GuidancePasses = "auto",
    ):
        self.prior, self.scheduler, self.text_encoder, self.tokenizer = prior, scheduler, text_encoder, tokenizer
        self.prefix, self.text_prefix = prefix, prefix if text_prefix is None else text_prefix
        check_guidance_passes(guidance_passes)
        self.guidance_passes = guidance_passes
        self.counts: dict[str, int] = {}
        self.prompt: Prompts = None
        self.negative_prompt: Prompts = None
        self.given: TextConditioning | None = None
        self.negative_given: TextConditioning | None = None
        self.num_inference_steps, self.guidance_scale, self.num_candidates = DEFAULT_PRIOR_STEPS, 1.0, 1
        self.latents: torch.Tensor | None = None
        self._check_components()

    @property
    def config(self) -> dict:
        """Config of the prior."""
        return getattr(self.prior, "module", self.prior).config

    @property
    def width(self) -> int:
        """Width of the image embeddings."""
        return self.config["embedding_dim"]

    def read(
        self,
        prompt: Prompts,
        *,
        given: TextConditioning | None = None,
        negative_prompt: Prompts = None,
        negative_given: TextConditioning | None = None,
        num_inference_steps: int = DEFAULT_PRIOR_STEPS,
        guidance_scale: float = 1.0,
        num_candidates: int = 1,
        latents: torch.Tensor | None = None,
    ) -> PriorSampler:
        r"""
        Takes and checks the arguments of a call.

        Args:
            prompt, negative_prompt (`str` or list of `str`, *optional*): One for all images, or one for each.
            given, negative_given (`TextConditioning`, *optional*): Prompts encoded by `text_encoder`, in their place:
                states, mask and text embedding (`pooled`).
            num_inference_steps (`int`, defaults to 25): Number of steps.
            guidance_scale (`float`, defaults to 1.0): Of classifier-free guidance; 1.0 is off.
            num_candidates (`int`, defaults to 1): Embeddings that are sampled for each image, of which the one with the
                highest cosine similarity to the embedding of its prompt is kept; 2 in the paper. The first is the one
                that `num_candidates=1` samples.
            latents (`torch.Tensor` of shape `(num_images * num_candidates, width)`, *optional*): Standard normal noise
                to start from, the candidates of an image one after the other.

        Raises:
            ValueError: For arguments that are incompatible with each other or with the prior.
        """
        needs_negative = guidance_scale != 1.0 and negative_given is None
        if (given is None or needs_negative) and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                f"The prior has no text encoder and tokenizer. Pass `{self.prefix}text_encoder` and "
                f"`{self.prefix}tokenizer`, those of the CLIP that it was trained with."
            )
        check_other_steps(self.scheduler, num_inference_steps, self.prefix)
        check_integer(f"{self.prefix}num_candidates", num_candidates, 1)
        check_finite(f"{self.prefix}guidance_scale", [guidance_scale])
        if prompt is None and given is None:
            raise ValueError("`prompt` is missing: the prior makes an image embedding from it. Pass a prompt.")
        self._check_given(prompt, given, "")
        self._check_given(negative_prompt, negative_given, "negative_")
        self._check_latents(latents, num_candidates)
        self._warn_of_statistics()
        self.prompt, self.negative_prompt = prompt, negative_prompt
        self.given, self.negative_given = given, negative_given
        self.num_inference_steps, self.guidance_scale = int(num_inference_steps), guidance_scale
        self.num_candidates, self.latents = int(num_candidates), latents
        if given is not None:
            self.counts = {"prompt_embeds": len(given.hidden_states)}
        else:
            self.counts = {} if isinstance(prompt, str) else {"prompt": len(prompt)}
        return self

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """What functions that guide get of the prompt: see `TextCondition.for_guidance`."""
        return prompts_for_guidance(self.prompt, self.given, call)

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether the call is guided away from the negative prompt."""
        return self.guidance_scale != 1.0

    def check_number(self, num_images: int) -> None:
        """Raises a `ValueError` unless the given noise is that of so many images."""
        wanted = (num_images * self.num_candidates, self.width)
        check_elements(f"{num_images} images with {self.num_candidates} candidates each", math.prod(wanted))
        if self.latents is not None and tuple(self.latents.shape) != wanted:
            raise ValueError(
                f"`{self.prefix}latents` has shape {tuple(self.latents.shape)}, but {num_images} images with "
                f"{self.num_candidates} candidates each need {wanted}."
            )

    def __call__(self, call: SamplingCall) -> torch.Tensor:
        """The embeddings `(num_images, width)` for a call of a pipeline, whose generators give the noise."""
        self.check_number(len(call.noise))
        text, negative = self.given, self.negative_given
        if negative is not None and len(negative.hidden_states) not in (1, call.num_prompts):
            raise ValueError(
                f"`negative_prompt_embeds` holds {len(negative.hidden_states)} prompts, but the call has "
                f"{call.num_prompts}. Pass one for all, or one for each."
            )
        if text is None or (negative is None and self.guidance_scale != 1.0):
            encoded, negative_encoded = self._encode(as_prompts(self.prompt, call.num_prompts), call.noise.device)
            text, negative = text or encoded, negative or negative_encoded
        negative = text if negative is None else negative  # which is not used then
        return self._sample(map_text(text, call.rows), map_text(negative, call.rows), call.generator)

    @torch.no_grad()
    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        r"""
        Samples embeddings without a pipeline.

        Args:
            prompt (`str` or list of `str`): Prompts.
            num_images_per_prompt (`int`, defaults to 1): Embeddings for each of them, one after the other.
            generator (`torch.Generator` or list of them, *optional*): Source of the noise.
            device (`torch.device`, *optional*): `None`: that of the prior.
            arguments: The other arguments of `read`.

        Returns:
            `torch.Tensor` of shape `(num_images, width)`: Embeddings as CLIP gives them, at least float32.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        own = copy.copy(self).read(prompts, **arguments)  # so that several threads may use one sampler
        own.check_number(len(prompts) * num_images_per_prompt)
        device = next(self.prior.parameters()).device if device is None else torch.device(device)
        text, negative = (
            map_text(encoded, lambda x: x.repeat_interleave(num_images_per_prompt, dim=0))
            for encoded in own._encode(prompts, device)
        )
        return own._sample(text, negative, generator)

    @torch.no_grad()
    def sample_from(
        self,
        text: TextConditioning,
        negative: TextConditioning,
        *,
        num_inference_steps: int = DEFAULT_PRIOR_STEPS,
        guidance_scale: float = 1.0,
        num_candidates: int = 1,
        generator: Generators = None,
    ) -> torch.Tensor:
        r"""
        Samples embeddings from encoded prompts, such as those of a batch of training.

        Args:
            text, negative (`TextConditioning`): Encoded prompts and, for guidance, as many empty ones: states, mask
                and text embedding (`pooled`), on the device of the prior, of `num_embeddings` tokens.
            num_inference_steps, guidance_scale, num_candidates: See `read`.
            generator (`torch.Generator` or list of them, *optional*): Source of the noise.

        Returns:
            `torch.Tensor` of shape `(num_images, width)`: Embeddings as CLIP gives them, at least float32.
        """
        own = copy.copy(self)
        own.num_inference_steps, own.guidance_scale = num_inference_steps, guidance_scale
        own.num_candidates, own.latents = num_candidates, None
        return own._sample(text, negative, generator)

    def _encode(self, prompts: list[str], device: torch.device) -> tuple[TextConditioning, TextConditioning]:
        # An owner without a U-Net: encoding depends on nothing else here.
        text = TextCondition({}, self.text_encoder, self.tokenizer, masks_padding=True)
        return text.encode(prompts, self.negative_prompt, device)

    def _sample(self, text: TextConditioning, negative: TextConditioning, generator: Generators) -> torch.Tensor:
        """One candidate after the other; the best of each row."""
        number, device = len(text.pooled), text.pooled.device
        dtype = torch.promote_types(self.prior.dtype, torch.float32)
        given = None if self.latents is None else self.latents.reshape(number, self.num_candidates, -1)
        scheduler = copy_for_call(self.scheduler, generator, number)
        candidates = []
        for index in range(self.num_candidates):
            if given is None:
                noise = randn_tensor((number, self.width), generator=generator, device=device, dtype=dtype)
            else:
                noise = given[:, index].to(device, dtype)
            candidates.append(self._denoise(scheduler, noise, text, negative, generator))
        if len(candidates) == 1:
            return candidates[0]
        embeds = torch.stack(candidates, dim=1)
        similarity = F.cosine_similarity(embeds, text.pooled[:, None].to(dtype), dim=2)
        return embeds[torch.arange(number, device=device), similarity.argmax(dim=1)]

    def _denoise(
        self,
        scheduler: SchedulerMixin,
        noise: torch.Tensor,
        text: TextConditioning,
        negative: TextConditioning,
        generator: Generators,
    ) -> torch.Tensor:
        """Denoises noise to embeddings."""
        steps = Steps(self.num_inference_steps, None, None)
        timesteps = steps.set_timesteps(scheduler, noise.device)
        step_kwargs = steps.step_kwargs(scheduler, generator)
        is_guided = self.guidance_scale != 1.0
        if is_guided and joins_passes(self.guidance_passes, noise):
            passes = [join_texts(negative, text)]
        else:
            passes = [negative, text] if is_guided else [text]
        passes = [map_text(each, self._to_dtype) for each in passes]
        latents = noise * scheduler.init_noise_sigma
        for index, t in enumerate(timesteps):
            model_input = self._to_dtype(scheduler.scale_model_input(latents, t))
            output = torch.cat([self._predict(model_input, t, each) for each in passes]).to(noise.dtype)
            if is_guided:
                uncond, cond = output.chunk(2)
                output = guide(cond, uncond, self.guidance_scale)
            is_last = index == len(timesteps) - 1
            last = last_step_kwargs(scheduler, latents) if is_last else {}
            latents = scheduler.step(output, t, latents, **step_kwargs, **last).prev_sample
        prior = getattr(self.prior, "module", self.prior)
        return latents * prior.clip_std.to(latents) + prior.clip_mean.to(latents)

    def _predict(self, model_input: torch.Tensor, t: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """The output of the prior; a text of more rows than the input has the same input several times."""
        mask = text.attention_mask
        if mask is None:  # without one, the prior would not be causal either
            mask = torch.ones(text.hidden_states.shape[:2], device=model_input.device)
        return self.prior(
            model_input.repeat(len(text.pooled) // len(model_input), 1),
            timestep=t,
            proj_embedding=text.pooled,
            encoder_hidden_states=text.hidden_states,
            attention_mask=mask,
        ).predicted_image_embedding

    def _to_dtype(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.prior.dtype) if x.is_floating_point() else x

    def _check_given(self, prompt: Prompts, text: TextConditioning | None, prefix: str) -> None:
        if text is None:
            return
        if prompt is not None:
            raise ValueError(f"Both `{prefix}prompt` and `{prefix}prompt_embeds` were given. Pass one of them.")
        if text.pooled is None:
            raise ValueError(
                f"`{prefix}prompt_embeds` was given without `{prefix}pooled_prompt_embeds`, but the prior takes the "
                "embedding of a text as well. Pass both, as `encode_prompt` returns them."
            )
        length = text.hidden_states.shape[1]
        if length != self.config["num_embeddings"]:
            raise ValueError(
                f"`{prefix}prompt_embeds` has {length} states, but the prior takes {self.config['num_embeddings']}. "
                "Encode the prompts with `encode_prompt`."
            )

    def _check_latents(self, latents: torch.Tensor | None, num_candidates: int) -> None:
        if latents is None:
            return
        name = f"`{self.prefix}latents`"
        if latents.ndim != 2 or latents.shape[1] != self.width or not latents.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(latents.shape)} and type {latents.dtype}; this prior takes floating point "
                f"numbers of shape (number of images x candidates, {self.width})."
            )
        if not len(latents) or len(latents) % num_candidates:
            raise ValueError(
                f"{name} has {len(latents)} rows for `{self.prefix}num_candidates` {num_candidates}. Pass as many rows "
                "as candidates for each image."
            )
        bad = count_not_finite(latents, "rows")
        if bad is not None:
            raise ValueError(f"{name} holds NaN or infinity in {bad}. Pass standard normal noise.")

    def _warn_of_statistics(self) -> None:
        """Logs a warning for a new `PriorTransformer`, whose results are all the same."""
        clip_std = getattr(self.prior, "module", self.prior).clip_std
        if clip_std.device.type != "meta" and not bool(clip_std.any()):
            logger.warning(
                "`clip_std` of `prior` is 0, so that all of its embeddings are `clip_mean`: the statistics of the "
                "image embeddings were never stored in it. Set `prior.clip_mean` and `prior.clip_std`, as "
                "`train_prior.py` does."
            )

    def _check_components(self) -> None:
        """Raises a `ValueError` for components that are incompatible with each other."""
        prior, prefix, text_prefix = getattr(self.prior, "module", self.prior), self.prefix, self.text_prefix
        if not hasattr(prior, "clip_std"):
            raise ValueError(f"`prior` is a {type(prior).__name__}; pass a `PriorTransformer`.")
        config = self.config
        check_scheduler(self.scheduler, f"{prefix}scheduler")
        if takes_variance(self.scheduler):
            raise ValueError(
                f"`{prefix}scheduler` is a {type(self.scheduler).__name__} with `variance_type="
                f"{self.scheduler.config.get('variance_type')!r}`, but a prior predicts no variance. Make it with "
                "`variance_type='fixed_small'`."
            )
        if self.text_encoder is None:
            return
        encoder = getattr(self.text_encoder, "module", self.text_encoder)
        check_clip_tower("text", encoder, f"{text_prefix}text_encoder")
        if self.tokenizer is None:
            raise ValueError(
                f"`{text_prefix}text_encoder` was given without `{text_prefix}tokenizer`. Pass the tokenizer that "
                "it was trained with."
            )
        # Without a projection, the states must have the width of the transformer.
        projects_states = config.get("encoder_hid_proj_type", "linear") is not None
        inner_dim = config["num_attention_heads"] * config["attention_head_dim"]
        widths = {
            "hidden_size": config["embedding_dim"] if projects_states else inner_dim,
            "projection_dim": config.get("embedding_proj_dim") or config["embedding_dim"],
        }
        as_own = "" if text_prefix == prefix else f", as `{prefix}text_encoder` with `{prefix}tokenizer`"
        for name, wanted in widths.items():
            found = getattr(encoder.config, name)
            if found != wanted:
                raise ValueError(
                    f"`{text_prefix}text_encoder` has `{name}={found}`, but `prior` takes {wanted}. Use the text "
                    f"encoder of the CLIP that the prior was trained with{as_own}."
                )
        length = max_prompt_length(self.tokenizer, encoder)
        if length != config["num_embeddings"]:
            raise ValueError(
                f"`{text_prefix}text_encoder` and `{text_prefix}tokenizer` pad prompts to {length} tokens, but `prior` "
                f"takes `num_embeddings={config['num_embeddings']}`. Use those that it was trained with{as_own}."
            )
