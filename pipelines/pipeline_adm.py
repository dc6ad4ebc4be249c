"""
ADMPipeline: draws images from an ablated diffusion model, by class, by prompt, by both or by neither.

Classifier-free guidance (Ho & Salimans 2022, https://huggingface.co/papers/2207.12598) through a null class or an empty
or negative prompt, its rescaling (Lin et al. 2023, https://huggingface.co/papers/2305.08891, section 3.4) and its
limitation to an interval of the steps (Kynkäänniemi et al. 2024, https://huggingface.co/papers/2404.07724). Classifier
guidance (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233, section 4). Pixels, or the latents of an
autoencoder (Rombach et al. 2022, https://huggingface.co/papers/2112.10752).
"""

import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    DDPMParallelScheduler,
    DDPMScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.conditioning.guidance import guide, log_probability_gradient, shift_prediction, signal_and_std
from diffusers_adm.conditioning.text import (
    TextConditioning,
    check_text_encoder,
    cross_attention_width,
    encode_tokens,
    join_texts,
    map_text,
    max_prompt_length,
    pads_to_max,
    text_model_kwargs,
    tokenize,
)
from diffusers_adm.ops.finiteness import explain_not_finite, not_finite
from diffusers_adm.schedulers.noise_schedules import LORA_NOISE_SCHEDULE_KEY, check_same_noise


OutputType = Literal["pil", "np", "pt", "latent"]
DEFAULT_NUM_INFERENCE_STEPS = 50
# Pillow's modes for the numbers of channels that images of `output_type="pil"` may have.
PIL_OUTPUT_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Schedulers of diffusers that take a config of betas, and yet cannot draw images with these networks.
UNSUITABLE_SCHEDULERS = {
    "LCMScheduler": "it needs a network that was distilled for it (a latent consistency model); each of its steps "
    "takes the predicted x_0 for a finished image, and a network that was not distilled predicts the mean of many. For "
    "few steps take `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`.",
    "RePaintScheduler": "its steps need a known image and a mask.",
    "UnCLIPScheduler": "its steps must be told the timestep before. `LearnedVarianceDDPMScheduler` makes the same "
    "ones, with `beta_schedule='squaredcos_cap_v2'` and `timestep_spacing='linspace'`.",
    "DDIMInverseScheduler": "it goes from images to noise.",
    "DPMSolverMultistepInverseScheduler": "it goes from images to noise.",
    "CogVideoXDDIMScheduler": "it shifts the betas, for CogVideoX. Take `DDIMScheduler`.",
    "CogVideoXDPMScheduler": "it shifts the betas, for CogVideoX. Take `DPMSolverMultistepScheduler`.",
}
# What diffusers' schedulers do not know: some say so in the middle of a step, and some not at all.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULERS_WITHOUT_SAMPLE_PREDICTION = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
# From the second order on they divide by the length of a step, in log sigma.
SCHEDULERS_WITHOUT_EQUAL_NOISE_LEVELS = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
DDPM_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")

# What is read in the configs of components.
NEEDED_OF_COMPONENTS = {
    "unet": ("AdaGNUNet2DModel", ("in_channels", "out_channels", "block_out_channels")),
    "vae": ("AutoencoderKL", ("latent_channels", "block_out_channels", "scaling_factor")),
    "classifier": ("AdaGNClassifierModel", ("in_channels", "sample_size", "num_classes")),
}


@dataclass
class CallState:
    """
    What a running call shows to its callback and takes from it, under the names of the pipeline's properties.

    Attributes:
        guidance_scale (`float`): For the steps that follow.
        num_timesteps (`int`): Number of steps.
        interrupt (`bool`): Whether the steps that follow are skipped.
    """

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False


# The calls that run in this thread, each with its pipeline; the innermost one, made by a callback, is the last.
_RUNNING_CALLS: ContextVar[tuple[tuple[DiffusionPipeline, CallState], ...]] = ContextVar("running_calls", default=())


@dataclass
class Denoising:
    """
    What a call has settled before its first step. It belongs to this call alone: other calls of the same pipeline may
    run at the same time.

    Attributes:
        state (`CallState`): What callbacks may change.
        scheduler ([`SchedulerMixin`]), timesteps (`torch.Tensor`): A copy of the pipeline's scheduler, and its steps.
        step_kwargs (`dict`): Of `scheduler.step`.
        conditional (`dict`), both (`dict`, *optional*): Keyword arguments of the U-Net for the conditional pass alone,
            and for the unconditional and the conditional one in one batch; `None` where there is nothing to guide away
            from.
        class_labels (`torch.Tensor` of shape `(num_images,)`, *optional*): For U-Net and classifier.
        alphas_cumprod (`torch.Tensor`, *optional*): Of the scheduler, where a classifier steers and it does not do so
            by itself.
        num_images (`int`), size (`tuple[int, int]`): Number, height and width of the samples.
    """

    state: CallState
    scheduler: SchedulerMixin
    timesteps: torch.Tensor
    step_kwargs: dict[str, Any]
    conditional: dict[str, Any]
    both: dict[str, Any] | None
    class_labels: torch.Tensor | None
    alphas_cumprod: torch.Tensor | None
    num_images: int
    size: tuple[int, int]
    generator: torch.Generator | list[torch.Generator] | None
    device: torch.device
    dtype: torch.dtype
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    classifier_guidance_scale: float

    def is_within(self, index: int, start: float, end: float) -> bool:
        """Whether step `index` lies between two fractions of the steps."""
        num_steps = len(self.timesteps)
        return start <= index / num_steps and (index + 1) / num_steps <= end


class ADMPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""
    Draws images from an ablated diffusion model: by class, by prompt, by both or by neither, with classifier-free and
    classifier guidance, in pixels or in the latents of an autoencoder.

    LoRA weights of U-Net and text encoder come and go with `load_lora_weights`, `set_adapters`, `fuse_lora`,
    `unfuse_lora` and `unload_lora_weights`, and are written with `save_lora_weights`.

    Several threads may call one pipeline at the same time: each call steps a scheduler of its own, and what a callback
    sets is for its own call. What changes the networks or the pipeline itself must wait until no call is running: `to`,
    `enable_model_cpu_offload` and other offloading (whose hooks move the networks during and after a call), caches and
    other hooks that keep a state, `load_lora_weights` and its kin, another component, `set_progress_bar_config`.

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): Predicts the noise, and with twice the
            channels of its input a variance as well.
        scheduler ([`SchedulerMixin`]): `LearnedVarianceDDPMScheduler`, or a scheduler of diffusers made with
            `from_config` (docs/samplers.md compares them). Only the former and `DDPMScheduler` with
            `variance_type="learned_range"` use a learned variance; the others get the mean channels alone. Each call
            steps a copy: `pipe.scheduler` stays as it is, its `timesteps` included.
        vae ([`AutoencoderKL`], *optional*): Decodes the samples, which are then latents, to images.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*): Any text encoder of transformers (CLIP, T5, BERT
            and their kin) for a U-Net with cross-attention. Prompts need both; without them, such a pipeline takes
            `prompt_embeds`.
        classifier (`AdaGNClassifierModel`, *optional*): Tells the class of a noisy sample, for classifier guidance. It
            may steer an unconditional U-Net, too.
        id2label (`dict[int, str]`, *optional*): Names of the classes, saved with the pipeline.

    Raises:
        ValueError: If just one of `unet` and `scheduler` has a learned variance, `scheduler` cannot reverse the process
            of such a network, `vae`, `text_encoder` or `classifier` does not fit `unet`, or `classifier` was trained on
            another noise schedule than that of `scheduler`.
    """

    # The classifier is left out: it takes turns with the U-Net, so neither may send the other away.
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "classifier"]
    _callback_tensor_inputs = ["latents"]

    # None of these has a default: with one, `DiffusionPipeline.from_pretrained(..., classifier=None)` would load the
    # repository's classifier all the same. Classes of this package are added to the hints when it is imported: the file
    # that the exporter makes of this module has guidance and captions in it, but no network of ours.
    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: torch.nn.Module | None,
        tokenizer: object | None,
        classifier: ModelMixin | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            classifier=classifier,
        )
        if id2label is not None:
            id2label = {str(label): name for label, name in id2label.items()}  # as JSON gives them back
        self.register_to_config(id2label=id2label)
        self._check_components()
        self._check_noise_of_classifier()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._latest_call = CallState()
        self._warned: set[str] = set()

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes; `None` where the pipeline knows none."""
        names = self.config.id2label
        return None if names is None else {int(label): name for label, name in names.items()}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for one of a sample, along each side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample. (The U-Net of an upsampler or inpainter takes more.)"""
        return self.unet.config.in_channels

    @property
    def image_channels(self) -> int:
        """Channels of an image: those that the `vae` decodes samples to, or those of a sample."""
        return self.sample_channels if self.vae is None else self.vae.config.get("out_channels", 3)

    @property
    def reads_text(self) -> bool:
        """Whether the U-Net has cross-attention."""
        return cross_attention_width(self.unet.config) is not None

    # diffusers' pipelines keep these on themselves. Here they belong to a call: within one, which is to say in its
    # callback, they are those of this call, and elsewhere those of the call that was started last.

    @property
    def guidance_scale(self) -> float:
        """
        Strength of the classifier-free guidance; 1.0 is off. A callback may set it for the steps that follow in its
        call. Elsewhere it is that of the latest call.
        """
        return self._call_state.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._call_state.guidance_scale = scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps, in a callback of its own call, elsewhere of the latest call."""
        return self._call_state.num_timesteps

    @property
    def interrupt(self) -> bool:
        """
        A callback that sets `pipe._interrupt = True` ends the sampling of its call after the current step. Set
        elsewhere, in another thread, it ends the latest call.
        """
        return self._call_state.interrupt

    # Callbacks that were written for pipelines of diffusers set these two.

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self.guidance_scale = scale

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._call_state.interrupt = interrupt

    @property
    def _call_state(self) -> CallState:
        for pipe, state in reversed(_RUNNING_CALLS.get()):
            if pipe is self:
                return state
        return self._latest_call

    @contextlib.contextmanager
    def _running(self, denoising: Denoising) -> Iterator[Any]:
        """The steps of a call, during which this thread is in it; gives their progress bar."""
        token = _RUNNING_CALLS.set((*_RUNNING_CALLS.get(), (self, denoising.state)))
        try:
            with self.progress_bar(total=denoising.state.num_timesteps) as progress_bar:
                yield progress_bar
        finally:
            _RUNNING_CALLS.reset(token)

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict: dict[str, torch.Tensor],
        network_alphas: dict[str, float] | None,
        unet: ModelMixin,
        adapter_name: str | None = None,
        _pipeline: DiffusionPipeline | None = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Loads LoRA layers into a U-Net as diffusers does; `load_lora_weights` calls it.

        Raises:
            ValueError: As of diffusers; if weights are not finite; if there are layers for a text encoder, and the
                pipeline has none; if the file says that they were trained on another noise schedule than that of the
                pipeline's scheduler.
        """
        # Fused, they would leave NaN in the network for good: unfusing subtracts them again.
        bad = next((key for key, weight in state_dict.items() if not weight.isfinite().all()), None)
        if bad is not None:
            raise ValueError(
                f"The LoRA holds weights that are not finite, such as {bad}: its training diverged, or its file is "
                "damaged. Load another one."
            )
        if _pipeline is not None:
            encoder = cls.text_encoder_name
            if getattr(_pipeline, encoder) is None and any(key.startswith(f"{encoder}.") for key in state_dict):
                raise ValueError(
                    f"The LoRA has layers for a `{encoder}`, but this pipeline has none. Load the pipeline with the "
                    "text encoder that the LoRA was trained with."
                )
            check_same_noise(
                "The LoRA",
                (metadata or {}).get(LORA_NOISE_SCHEDULE_KEY),
                _pipeline.scheduler,
                how_to_record="`train_adm.py` of diffusers-adm records it in the file",
            )
        super().load_lora_into_unet(
            state_dict,
            network_alphas,
            unet,
            adapter_name=adapter_name,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            metadata=metadata,
        )

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, torch.Tensor],
        network_alphas: dict[str, float] | None,
        text_encoder: torch.nn.Module | None,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        adapter_name: str | None = None,
        _pipeline: DiffusionPipeline | None = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Loads LoRA layers into a text encoder as diffusers does; `load_lora_weights` calls it. Does nothing if there are
        none for it.
        """
        prefix = cls.text_encoder_name if prefix is None else prefix
        if not any(key.startswith(f"{prefix}.") for key in state_dict):
            return  # where diffusers warns, even of a pipeline that has no text encoder
        super().load_lora_into_text_encoder(
            state_dict,
            network_alphas,
            text_encoder,
            prefix=prefix,
            lora_scale=lora_scale,
            adapter_name=adapter_name,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            metadata=metadata,
        )

    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        r"""
        Prompts and negative prompts, encoded in one run of the text encoder. Gradients flow unless they are off.

        Args:
            prompt (`str` or list of `str`): What to draw.
            negative_prompt (`str` or list of `str`, *optional*): What to guide away from: one for all prompts, or one
                for each. `None`: the empty prompt.

        Returns:
            `tuple` of six tensors, one row a prompt, under whose names `__call__` takes them: `prompt_embeds`,
            `negative_prompt_embeds`, `pooled_prompt_embeds`, `negative_pooled_prompt_embeds` (both `None` where the
            U-Net takes none), `prompt_attention_mask`, `negative_prompt_attention_mask` (both `None` where all states
            are seen).

        Raises:
            ValueError: Without a text encoder, or for another number of negative prompts than of prompts.
        """
        text, negative_text = self._encode_texts(prompt, negative_prompt)
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = text
        negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds = negative_text
        if self.unet.config.get("addition_embed_type") != "text_embeds":
            pooled_prompt_embeds = negative_pooled_prompt_embeds = None
        return (
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )

    def _encode_texts(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None
    ) -> tuple[TextConditioning, TextConditioning]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline has no text encoder and tokenizer. Load it with both.")
        if len(negatives) != len(prompts):
            raise ValueError(
                f"`negative_prompt` holds {len(negatives)} prompts, but there are {len(prompts)} of `prompt`. Pass one "
                "for all, or one for each."
            )
        pad_to_max = pads_to_max(self.text_encoder, self.unet.config)
        unique = list(dict.fromkeys([*prompts, *negatives]))
        input_ids, attention_mask = tokenize(
            self.tokenizer,
            unique,
            max_length=max_prompt_length(self.tokenizer, self.text_encoder),
            pad_to_max=pad_to_max,
        )
        device = self._execution_device
        encoded = encode_tokens(
            self.text_encoder, input_ids.to(device), attention_mask.to(device), pad_to_max=pad_to_max
        )
        rows, negative_rows = ([unique.index(text) for text in texts] for texts in (prompts, negatives))
        return map_text(encoded, lambda x: x[rows]), map_text(encoded, lambda x: x[negative_rows])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        Draws a batch of images.

        Args:
            prompt (`str` or list of `str`, *optional*): What to draw, for a model that reads text: one for all images,
                or one for each. `None`: the empty prompt. What a text encoder is too short for is cut, with a warning.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Classes to draw, by number or by
                name (see `pipe.id2label`): one for all images, or one for each. `None`: the null class of a model that
                has one, no class for an unconditional model. They are the classes of the classifier as well.
            batch_size (`int`, defaults to 1): Number of different images. Need not be given where `prompt` or
                `class_labels` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): How often each of these is drawn, one after the other.
            num_inference_steps (`int`, defaults to 50): Number of steps, chosen by the scheduler's `timestep_spacing`.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): The published forms `"250"`, `"ddim50"`,
                `"10,10,15"`, `"fast27"`, in place of `num_inference_steps`; with `LearnedVarianceDDPMScheduler`.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: `uncond + guidance_scale * (cond -
                uncond)` takes the place of the predicted mean; 1.0 is off. `uncond` is the prediction for the null
                class, where the model has one, and the negative prompt, where it reads text; both are predicted in one
                batch. The variance is that of the conditional prediction.
            guidance_rescale (`float`, defaults to 0.0): In [0, 1], for guided steps; pulls the standard deviation of
                the guided prediction towards that of the conditional one.
            guidance_start (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0): Fractions of the steps
                between which both kinds of guidance act. Step `i` of `n` is guided if `guidance_start <= i / n` and `(i
                + 1) / n <= guidance_end`. With schedulers of second order these are evaluations of the network, two for
                most steps.
            classifier_guidance_scale (`float`, defaults to 0.0): Classifier guidance: s times the gradient g of the
                classifier's log p(`class_labels` | x_t) steers each step; 0.0 is off and costs nothing. With
                `LearnedVarianceDDPMScheduler`, ancestral steps add variance * s * g to their mean (ADM, algorithm 1)
                and DDIM steps, like every other scheduler's, take s * g as a part of the score (algorithm 2).
            negative_prompt (`str` or list of `str`, *optional*): What to guide away from: one for all prompts, or one
                for each. `None`: the empty prompt. It acts where `guidance_scale` does.
            eta (`float`, *optional*): Noise of DDIM steps, from 0 (deterministic) to 1 (as much as DDPM). `None`:
                ancestral steps with `LearnedVarianceDDPMScheduler`, the scheduler's own default elsewhere.
            height, width (`int`, *optional*): Of the images, in pixels, divisible by the total downsampling of U-Net
                and `vae`. `None`: the U-Net's `sample_size`, times what the `vae` enlarges.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise; with one for each image, an
                image does not depend on the batch it is drawn in. Generators on the CPU give the same noise on every
                device.
            latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*): Standard
                normal noise to start from instead of drawing it; of the size of the samples, not of decoded images.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(number of prompts, length, width)`,
                *optional*): Encoded prompts in place of `prompt` and `negative_prompt`; see `encode_prompt`.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(number of prompts,
                length)`, *optional*): 1 where cross-attention sees these states, 0 for padding. `None`: it sees all.
            pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(number of prompts, width)`,
                *optional*): One vector a prompt, for a U-Net with `addition_embed_type="text_embeds"`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, for images of 1 (mode L), 3 (RGB) or 4 (RGBA) channels;
                `"np"`: `(batch_size, height, width, channels)` in [0, 1]; `"pt"`: `(batch_size, channels, height,
                width)` in [0, 1]; `"latent"`: the last sample as it is, not decoded; about [-1, 1] for pixels.
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each step as `callback(pipe, step, timestep,
                callback_kwargs)`; `latents` in the dictionary it returns replaces the sample. It may set
                `pipe.guidance_scale` for the steps that follow, if there is something to guide towards and away from.
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): What `callback_kwargs`
                holds, out of `pipe._callback_tensor_inputs`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that do not fit each other, the model or the scheduler; before any work is done.
        """
        denoising = self._start(
            prompt=prompt,
            class_labels=class_labels,
            batch_size=batch_size,
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
        latents = self._draw_noise(denoising, latents) * denoising.scheduler.init_noise_sigma
        latents = self._denoise(denoising, latents, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._finish(self._decode(latents, output_type), return_dict)

    def _start(
        self,
        *,
        prompt: str | Sequence[str] | None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None,
        batch_size: int,
        num_images_per_prompt: int,
        num_inference_steps: int,
        timestep_respacing: str | int | Sequence[int] | None,
        guidance_scale: float,
        guidance_rescale: float,
        guidance_start: float,
        guidance_end: float,
        classifier_guidance_scale: float,
        negative_prompt: str | Sequence[str] | None,
        eta: float | None,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        pooled_prompt_embeds: torch.Tensor | None,
        negative_pooled_prompt_embeds: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> Denoising:
        """Checks all arguments of a call, encodes its prompts and chooses its timesteps."""
        # 1. check
        default_height, default_width = self._default_size()
        height, width = default_height if height is None else height, default_width if width is None else width
        class_labels = self._prepare_class_labels(class_labels)
        num_prompts = self._number_of_prompts(prompt, prompt_embeds, class_labels, batch_size)
        if class_labels is not None and class_labels.ndim == 0:
            class_labels = class_labels.expand(num_prompts)
        self.check_inputs(
            prompt=prompt,
            class_labels=class_labels,
            num_prompts=num_prompts,
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
            callback_on_step_end_tensor_inputs=self._callback_inputs(
                callback_on_step_end, callback_on_step_end_tensor_inputs
            ),
        )
        state = self._latest_call = CallState(guidance_scale)
        device = self._execution_device
        num_images = num_prompts * num_images_per_prompt

        # 2. encode
        given = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_given = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        text, negative_text = self._prepare_text(
            prompt, negative_prompt, given, negative_given, num_prompts, guidance_scale
        )
        if class_labels is not None:
            class_labels = class_labels.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        conditional, both = self._conditions(class_labels, text, negative_text, num_images_per_prompt)

        # 3. timesteps
        scheduler = self._scheduler_for_call(generator, num_images)
        if timestep_respacing is not None:
            scheduler.set_timesteps(timestep_respacing=timestep_respacing, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else the first step looks for its index among the timesteps, and waits
        timesteps = scheduler.timesteps
        # KDPM2AncestralDiscreteScheduler takes the root of a rounding error where two noise levels are far apart.
        if timesteps.is_floating_point() and timesteps.isnan().any():
            raise ValueError(
                f"A {type(scheduler).__name__} finds no {num_inference_steps} timesteps for these betas: its numbers "
                "overflow in the first step. Ask for more steps, make it with `timestep_spacing='leading'`, or take "
                "another scheduler."
            )
        self._check_noise_levels(scheduler, num_inference_steps)
        state.num_timesteps = len(timesteps)
        shifts_score = classifier_guidance_scale != 0.0 and not self._takes_gradient(scheduler)
        denoising = Denoising(
            state=state,
            scheduler=scheduler,
            timesteps=timesteps,
            step_kwargs=self._step_kwargs(scheduler, generator, eta),
            conditional=conditional,
            both=both,
            class_labels=class_labels,
            alphas_cumprod=scheduler.alphas_cumprod.to(device) if shifts_score else None,
            num_images=num_images,
            size=(height // self.vae_scale_factor, width // self.vae_scale_factor),
            generator=generator,
            device=device,
            # A thousand roundings of the sample to bfloat16 would add up: whatever the dtype of the network, the sample
            # and the noise are float32 at least.
            dtype=torch.promote_types(self.unet.dtype, torch.float32),
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            classifier_guidance_scale=classifier_guidance_scale,
        )
        self._warn_of_what_has_no_effect(
            denoising,
            class_labels=class_labels,
            has_negative_text=negative_prompt is not None or negative_given.hidden_states is not None,
            may_be_guided_later=callback_on_step_end is not None,
        )
        return denoising

    def _warn_of_what_has_no_effect(
        self,
        denoising: Denoising,
        *,
        class_labels: torch.Tensor | None,
        has_negative_text: bool,
        may_be_guided_later: bool,
    ) -> None:
        """Warns, once each, of arguments that change nothing in this call although they may have been meant to."""
        steers = denoising.classifier_guidance_scale != 0.0
        guides = denoising.state.guidance_scale != 1.0
        has_interval = (denoising.guidance_start, denoising.guidance_end) != (0.0, 1.0)
        if class_labels is not None and not self._is_class_conditional and not steers:
            self._warn_once(
                "`class_labels` have no effect: the U-Net is unconditional, and `classifier_guidance_scale` is 0. Pass "
                "a `classifier_guidance_scale` to steer towards them, or leave them out."
            )
        if not guides and not may_be_guided_later:
            for name, is_given in (
                ("negative_prompt", has_negative_text),
                ("guidance_rescale", denoising.guidance_rescale != 0.0),
            ):
                if is_given:
                    self._warn_once(
                        f"`{name}` has no effect: `guidance_scale` is 1.0, which is off. Pass another "
                        "`guidance_scale`, or leave it out."
                    )
            if has_interval and not steers:
                self._warn_once(
                    "`guidance_start` and `guidance_end` have no effect: `guidance_scale` is 1.0 and "
                    "`classifier_guidance_scale` is 0.0, which is off. Pass one of them, or leave the interval out."
                )
        num_steps = len(denoising.timesteps)
        is_ever_guided = any(
            denoising.is_within(i, denoising.guidance_start, denoising.guidance_end) for i in range(num_steps)
        )
        if (guides or steers) and not is_ever_guided:
            self._warn_once(
                f"Guidance has no effect: none of the {num_steps} steps lies within `guidance_start` "
                f"{denoising.guidance_start} and `guidance_end` {denoising.guidance_end}. Make the interval longer, or "
                "ask for more steps."
            )

    def _warn_once(self, message: str) -> None:
        """A pipeline is often called in a loop."""
        if message not in self._warned:
            self._warned.add(message)
            logging.getLogger(__name__).warning(message)

    @staticmethod
    def _check_noise_levels(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
        """Raises a `ValueError` where the result of a solver would not be finite."""
        if (
            type(scheduler).__name__ not in SCHEDULERS_WITHOUT_EQUAL_NOISE_LEVELS
            or scheduler.config.get("solver_order") == 1
            or scheduler.sigmas.device.type != "cpu"  # where they keep them, so that nothing waits for a device
        ):
            return
        if (scheduler.sigmas.diff() == 0).any():
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but a {type(scheduler).__name__} with "
                f"`timestep_spacing={scheduler.config.get('timestep_spacing')!r}` finds fewer different noise levels "
                f"in {scheduler.config.num_train_timesteps} timesteps, and its result would not be finite. Ask for "
                "fewer steps, or take another scheduler."
            )

    @staticmethod
    def _callback_inputs(
        callback: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None, names: Sequence[str]
    ) -> Sequence[str]:
        """What a callback is given; callbacks of diffusers say it themselves."""
        return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names

    def _draw_noise(self, denoising: Denoising, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Standard normal noise of the shape of the samples, or the user's."""
        if latents is None:
            shape = (denoising.num_images, self.sample_channels, *denoising.size)
            return randn_tensor(shape, generator=denoising.generator, device=denoising.device, dtype=denoising.dtype)
        return latents.to(device=denoising.device, dtype=denoising.dtype)

    def _denoise(
        self,
        denoising: Denoising,
        latents: torch.Tensor,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        extra_channels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From noise, scaled for the scheduler, to samples; `extra_channels` as of `_predict`."""
        with self._running(denoising) as progress_bar:
            for i, t in enumerate(denoising.timesteps):
                if denoising.state.interrupt:
                    continue
                model_output, steering = self._predict(denoising, latents, i, t, extra_channels)
                latents = denoising.scheduler.step(
                    model_output, t, latents, **denoising.step_kwargs, **steering
                ).prev_sample
                latents = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents)
                progress_bar.update()
        return latents

    def _predict(
        self,
        denoising: Denoising,
        latents: torch.Tensor,
        index: int,
        t: torch.Tensor,
        extra_channels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        The guided output of the network for one step.

        Args:
            denoising (`Denoising`): Of this call.
            latents (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): x_t as the scheduler
                scales it.
            index (`int`): Number of the step, from 0 to `len(denoising.timesteps) - 1`; guidance may begin and end.
            t (`torch.Tensor` of shape `()`): `denoising.timesteps[index]`.
            extra_channels (`torch.Tensor` of shape `(num_images, in_channels - sample_channels, height, width)`,
                *optional*): What the network is shown beside x_t, with and without the condition alike.

        Returns:
            `tuple`: What `scheduler.step` takes as its first argument, and further keyword arguments of it.
        """
        scheduler, channels = denoising.scheduler, self.sample_channels
        is_guided = denoising.is_within(index, denoising.guidance_start, denoising.guidance_end)
        scaled_latents = scheduler.scale_model_input(latents, t)
        model_input = scaled_latents if extra_channels is None else torch.cat([scaled_latents, extra_channels], dim=1)
        model_input = model_input.to(self.unet.dtype)

        # A callback may have changed it, also from or to "off".
        guidance_scale = denoising.state.guidance_scale
        runs_both = is_guided and guidance_scale != 1.0 and denoising.both is not None
        if runs_both:
            model_input = torch.cat([model_input] * 2)
        unet_kwargs = self._unet_kwargs(denoising, model_input, index, t, runs_both)
        output = self.unet(model_input, t, **unet_kwargs).sample.to(denoising.dtype)
        if runs_both:
            uncond, cond = output.chunk(2)
            mean = guide(cond[:, :channels], uncond[:, :channels], guidance_scale, denoising.guidance_rescale)
            model_output = torch.cat([mean, cond[:, channels:]], dim=1)
        else:
            model_output = output
        if not self._takes_variance(scheduler):
            model_output = model_output[:, :channels]
        if not is_guided or denoising.classifier_guidance_scale == 0.0:
            return model_output, {}

        gradient = log_probability_gradient(self.classifier, scaled_latents, t, denoising.class_labels)
        score = denoising.classifier_guidance_scale * gradient
        if self._takes_gradient(scheduler):
            return model_output, {"guidance_gradient": score}
        mean, variance = model_output[:, :channels], model_output[:, channels:]
        at = signal_and_std(scheduler, t, denoising.alphas_cumprod)
        mean = shift_prediction(mean, score, *at, scheduler.config.prediction_type)
        return torch.cat([mean, variance], dim=1), {}

    def _unet_kwargs(
        self, denoising: Denoising, model_input: torch.Tensor, index: int, t: torch.Tensor, runs_both: bool
    ) -> dict[str, Any]:
        r"""
        Keyword arguments of the U-Net for one step: the conditions. Subclasses add what they make of its input.

        Args:
            denoising (`Denoising`), index (`int`), t (`torch.Tensor` of shape `()`): As of `_predict`.
            model_input (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The U-Net's, in its dtype;
                twice as many as images where `runs_both`.
            runs_both (`bool`): Whether the batch holds the unconditional pass and, behind it, the conditional one.
        """
        return denoising.both if runs_both else denoising.conditional

    def _call_back(
        self,
        callback: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        tensor_inputs: Sequence[str],
        index: int,
        t: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """Tells the user's callback of a step; returns the sample, which it may have replaced."""
        if callback is None:
            return latents
        callback_kwargs = {"latents": latents} if "latents" in self._callback_inputs(callback, tensor_inputs) else {}
        returned = callback(self, index, t, callback_kwargs)
        if not isinstance(returned, dict):
            raise TypeError(
                f"`callback_on_step_end` returned a {type(returned).__name__}. It must return a `dict`, such as the "
                "`callback_kwargs` that it was given."
            )
        return returned.pop("latents", latents)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Samples as images of `output_type`."""
        if self.vae is not None and output_type != "latent":
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample
        if output_type in ("pil", "np"):  # tensors may stay on the device, which nothing has to wait for
            self._warn_of_not_finite(latents)
        if output_type == "pil":
            # 8-bit numbers have no NaN, and what NumPy makes of it depends on the processor. Infinity is clamped.
            latents = latents.nan_to_num(nan=-1.0, posinf=math.inf, neginf=-math.inf)
        return self.image_processor.postprocess(latents, output_type=output_type)

    def _warn_of_not_finite(self, images: torch.Tensor) -> None:
        """Tells which images hold values that are not finite, at every call: Pillow's show no other sign of it."""
        numbers = not_finite(images)
        if numbers:
            networks = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
            logging.getLogger(__name__).warning(
                f"{len(numbers)} of {len(images)} images hold values that are not finite (numbers "
                f"{', '.join(map(str, numbers[:10]))}{', ...' if len(numbers) > 10 else ''}). As `output_type='pil'` "
                f"they are black there. {explain_not_finite(networks)}"
            )

    def _finish(self, images: Any, return_dict: bool) -> ImagePipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        *,
        prompt: str | Sequence[str] | None,
        class_labels: torch.Tensor | None,
        num_prompts: int,
        num_images_per_prompt: int,
        num_inference_steps: int,
        timestep_respacing: str | int | Sequence[int] | None,
        guidance_scale: float,
        guidance_rescale: float,
        guidance_start: float,
        guidance_end: float,
        classifier_guidance_scale: float,
        negative_prompt: str | Sequence[str] | None,
        eta: float | None,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        pooled_prompt_embeds: torch.Tensor | None,
        negative_pooled_prompt_embeds: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises a `ValueError` for what `__call__` could not do. `class_labels`: one a prompt, or `None`."""
        self._check_components()
        config, scheduler = self.unet.config, type(self.scheduler).__name__

        # steps
        if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; pass an integer of at least 1.")
        if timestep_respacing is not None:
            if num_inference_steps != DEFAULT_NUM_INFERENCE_STEPS:
                raise ValueError(
                    f"`timestep_respacing` is {timestep_respacing!r} and `num_inference_steps` is "
                    f"{num_inference_steps}: both choose the steps. Leave one of them out."
                )
            if "timestep_respacing" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`timestep_respacing` is {timestep_respacing!r}, which a {scheduler} does not know. Use "
                    "`num_inference_steps`, or a `LearnedVarianceDDPMScheduler`."
                )
        if scheduler == "PNDMScheduler" and not self.scheduler.config.skip_prk_steps and num_inference_steps < 4:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but a PNDMScheduler needs at least 4 for its "
                "Runge-Kutta steps. Make it with `skip_prk_steps=True`, or ask for more steps."
            )
        if eta is not None:
            if "eta" not in inspect.signature(self.scheduler.step).parameters:
                raise ValueError(
                    f"`eta` is {eta}, which a {scheduler} does not know. Leave it out, or use a "
                    "`LearnedVarianceDDPMScheduler` or `DDIMScheduler`."
                )
            if not 0 <= eta < math.inf:
                raise ValueError(
                    f"`eta` is {eta}; it must be a number from 0 on (0: deterministic, 1: as much noise as DDPM)."
                )
            if eta > 1 and scheduler == "TCDScheduler":
                raise ValueError(f"`eta` is {eta}; a TCDScheduler takes 0 (deterministic) to 1 (all noise is new).")

        # text
        given = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_given = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        self._check_text(prompt, given, num_prompts, "")
        self._check_text(negative_prompt, negative_given, num_prompts, "negative_")
        if self.reads_text and self.text_encoder is None and prompt_embeds is None:
            raise ValueError(
                "`prompt_embeds` are missing: this model reads text, but the pipeline has no text encoder. Pass them, "
                "or load it with a text encoder and tokenizer."
            )

        # guidance
        for name, scale in (
            ("guidance_scale", guidance_scale),
            ("classifier_guidance_scale", classifier_guidance_scale),
        ):
            # Tensors of one entry serve as well.
            if not (isinstance(scale, Real) or torch.is_tensor(scale)) or not math.isfinite(scale):
                raise ValueError(f"`{name}` is {scale!r}; it must be a finite number.")
        if guidance_scale != 1.0:
            null_class_id = config.get("null_class_id")
            if null_class_id is None and not self.reads_text:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but this model has no null class (`null_class_id` in its "
                    "config) and reads no text, so there is nothing to guide away from. Leave it at 1.0, train a model "
                    "with class dropout, or steer this one with a classifier (`classifier_guidance_scale`)."
                )
            towards_class = class_labels is not None and null_class_id is not None
            texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            if not towards_class and all(text is None for text in texts):
                missing = ["`class_labels`"] * (null_class_id is not None) + ["`prompt`"] * self.reads_text
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but there are no {' and no '.join(missing)} to guide "
                    "towards. Pass them, or leave `guidance_scale` at 1.0."
                )
            if self.reads_text and self.text_encoder is None and negative_prompt_embeds is None:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but there are no `negative_prompt_embeds` to guide away "
                    "from, and the pipeline has no text encoder. Pass those of the empty prompt, or load it with a "
                    "text encoder and tokenizer."
                )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` is {guidance_rescale}; it must lie in [0, 1].")
        if not 0 <= guidance_start <= guidance_end <= 1:
            raise ValueError(
                f"`guidance_start` is {guidance_start} and `guidance_end` is {guidance_end}; they are fractions of the "
                "steps, so 0 <= guidance_start <= guidance_end <= 1 must hold."
            )

        # shapes
        if height is None or width is None:
            raise ValueError(
                "This model's config has no `sample_size`, so the size of the images is unknown. Pass `height` and "
                "`width`."
            )
        if classifier_guidance_scale != 0.0:
            self._check_classifier_guidance(classifier_guidance_scale, class_labels, eta, height, width)
        factor = self.vae_scale_factor * 2 ** (len(config.block_out_channels) - 1)
        if not isinstance(height, Integral) or not isinstance(width, Integral):
            raise ValueError(f"`height` and `width` are {height!r} and {width!r}; pass integers.")
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}; both must be positive and divisible by {factor}, the "
                "total downsampling of this model."
            )
        if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt!r}; pass an integer of at least 1.")
        num_images = num_prompts * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {num_images} images. Pass one generator for each "
                "image, or a single one."
            )
        for source in generator if isinstance(generator, list) else [generator]:
            self._check_generator(source)
        shape = (num_images, self.sample_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None and not (torch.is_tensor(latents) and latents.is_floating_point()):
            raise ValueError(f"`latents` is {_kind_of(latents)}; pass a tensor of floating point numbers.")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but the number of images, `height` and `width` ask for "
                f"{shape}."
            )

        # output
        if output_type not in get_args(OutputType):
            raise ValueError(f"`output_type` is {output_type!r}; it must be one of {list(get_args(OutputType))}.")
        if output_type == "pil" and self.image_channels not in PIL_OUTPUT_MODES:
            modes = ", ".join(f"{number} ({mode})" for number, mode in PIL_OUTPUT_MODES.items())
            raise ValueError(
                f"`output_type` is 'pil', but the images have {self.image_channels} channels, and Pillow's have "
                f"{modes}. Pass `output_type='np'` or `output_type='pt'`."
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(
                f"`callback_on_step_end` is {_kind_of(callback_on_step_end)}; pass a function, or a callback of "
                "diffusers."
            )
        if isinstance(callback_on_step_end_tensor_inputs, str) or callback_on_step_end_tensor_inputs is None:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs!r}; pass a list of names "
                f"out of {self._callback_tensor_inputs}."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; it may hold {self._callback_tensor_inputs}."
            )

    def _check_text(
        self, prompt: str | Sequence[str] | None, given: TextConditioning, num_prompts: int, prefix: str
    ) -> None:
        """Raises a `ValueError` for prompts, or precomputed states of them, that the U-Net could not read."""
        name, embeds_name = f"`{prefix}prompt`", f"`{prefix}prompt_embeds`"
        if prompt is None and all(tensor is None for tensor in given):
            return
        if not self.reads_text:
            raise ValueError(
                f"{name if prompt is not None else embeds_name} was given, but this model reads no text: its U-Net has "
                "no cross-attention. Leave it out."
            )
        if prompt is not None and given.hidden_states is not None:
            raise ValueError(f"Both {name} and {embeds_name} were given. Pass one of them.")
        if given.hidden_states is None and any(tensor is not None for tensor in given):
            raise ValueError(
                f"`{prefix}prompt_attention_mask` and `{prefix}pooled_prompt_embeds` belong to {embeds_name}, which is "
                "missing. Pass it, or leave them out."
            )
        if prompt is not None:
            texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} is {prompt!r}; pass a string, or a list of strings.")
            if self.text_encoder is None:
                raise ValueError(
                    f"{name} was given, but the pipeline has no text encoder to read it. Pass {embeds_name}, or load "
                    "the pipeline with a text encoder and tokenizer."
                )
            if not isinstance(prompt, str) and len(prompt) != num_prompts:
                raise ValueError(
                    f"{name} holds {len(prompt)} prompts, but there are {num_prompts} to draw. Pass one for all, or "
                    "one for each."
                )
        else:
            states, mask, pooled = given
            for part, tensor in ((embeds_name, states), (f"`{prefix}pooled_prompt_embeds`", pooled)):
                if tensor is not None and not (torch.is_tensor(tensor) and tensor.is_floating_point()):
                    raise ValueError(f"{part} is {_kind_of(tensor)}; pass a tensor of floating point numbers.")
            width = cross_attention_width(self.unet.config)
            if states.ndim != 3 or states.shape[0] != num_prompts or states.shape[2] != width:
                raise ValueError(
                    f"{embeds_name} has shape {tuple(states.shape)}; {num_prompts} prompts of this model have "
                    f"({num_prompts}, length, {width})."
                )
            if mask is not None and mask.shape != states.shape[:2]:
                raise ValueError(
                    f"`{prefix}prompt_attention_mask` has shape {tuple(mask.shape)}, but {embeds_name} needs "
                    f"{tuple(states.shape[:2])}."
                )
            if (self.unet.config.get("addition_embed_type") == "text_embeds") != (pooled is not None):
                if pooled is None:
                    raise ValueError(
                        f"`{prefix}pooled_prompt_embeds` are missing: this U-Net needs them beside {embeds_name} "
                        "(`encode_prompt` gives both)."
                    )
                raise ValueError(
                    f"`{prefix}pooled_prompt_embeds` go with {embeds_name} for a U-Net with "
                    "`addition_embed_type='text_embeds'`, and with no other; this one has "
                    f"{self.unet.config.get('addition_embed_type')!r}."
                )

            if pooled is not None and (pooled.ndim != 2 or pooled.shape[0] != num_prompts):
                raise ValueError(
                    f"`{prefix}pooled_prompt_embeds` has shape {tuple(pooled.shape)}; {num_prompts} prompts have "
                    f"({num_prompts}, width)."
                )

    def _check_generator(self, generator: torch.Generator | None) -> None:
        """Raises a `ValueError` for what no noise can be drawn from; some schedulers would draw none before a step."""
        if generator is None:
            return
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                f"`generator` is, or holds, {_kind_of(generator)}; pass a `torch.Generator`, or a list of them."
            )
        device = self._execution_device.type
        if generator.device.type not in ("cpu", device):
            raise ValueError(
                f"`generator` is on {generator.device.type}, but the pipeline on {device}. Make it on that device, or "
                "on the CPU."
            )

    def _check_classifier_guidance(
        self,
        classifier_guidance_scale: float,
        class_labels: torch.Tensor | None,
        eta: float | None,
        height: int | None,
        width: int | None,
    ) -> None:
        """Raises a `ValueError` where no classifier could steer."""
        given = f"`classifier_guidance_scale` is {classifier_guidance_scale}"
        if self.classifier is None:
            raise ValueError(
                f"{given}, but this pipeline has no classifier. Leave it at 0.0, or make the pipeline with one "
                "(training/train_classifier.py trains it)."
            )
        if class_labels is None:
            raise ValueError(
                f"{given}, but there are no `class_labels` to steer towards. Pass them, or leave it at 0.0."
            )
        self._check_noise_of_classifier()
        if self.unet.config.get("class_embed_type") is not None:
            raise ValueError(
                f"{given}, but the `class_labels` of this U-Net are no class numbers (`class_embed_type="
                f"{self.unet.config.class_embed_type!r}`). Leave it at 0.0."
            )
        num_classes, highest = self.classifier.config.num_classes, int(class_labels.max())
        if highest >= num_classes:
            raise ValueError(
                f"{given}, but `class_labels` hold {highest}, and the classifier knows the classes 0 to "
                f"{num_classes - 1}: nothing can be steered towards the null class."
            )
        sizes = [size // self.vae_scale_factor for size in (height, width) if size is not None]
        expected = self.classifier.config.sample_size
        expected = [expected, expected] if isinstance(expected, int) else list(expected)
        if sizes and sizes != expected:
            raise ValueError(
                f"{given}, but the classifier was made for samples of {expected[0]} x {expected[1]}, and `height` and "
                f"`width` ask for {' x '.join(map(str, sizes))}. Ask for its size, or leave it at 0.0."
            )
        is_ancestral = self._takes_gradient(self.scheduler) and eta is None
        if self.scheduler.config.get("rescale_betas_zero_snr", False) and not is_ancestral:
            raise ValueError(
                f"{given}, but with `rescale_betas_zero_snr` x_T carries no signal, so a changed score gives no x_0 "
                "there. Use ancestral steps of `LearnedVarianceDDPMScheduler` (`eta=None`)."
            )

    def _check_components(self) -> None:
        """Raises a `ValueError` for components that do not fit each other."""
        for name in ("unet", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"`{name}` is None, but no image can be drawn without. Pass one, or load the saved one."
                )
        if isinstance(self.scheduler, type) or not hasattr(self.scheduler, "config"):
            raise ValueError(
                f"`scheduler` is {self.scheduler!r}; pass a scheduler, such as `DDIMScheduler.from_config(config)` of "
                "the config that the model was saved with."
            )
        for name, (cls, keys) in NEEDED_OF_COMPONENTS.items():
            component = getattr(self, name)
            config = getattr(component, "config", {})
            missing = [] if component is None else [key for key in keys if key not in config]
            if missing:
                raise ValueError(
                    f"`{name}` is a {type(component).__name__}, whose config names no {', '.join(missing)}. Pass an "
                    f"`{cls}`, or a model like it."
                )
        self._check_scheduler()
        self._check_variance()
        unet = self.unet.config
        if self.vae is not None and self.vae.config.latent_channels != self.sample_channels:
            raise ValueError(
                f"`vae` has latents of {self.vae.config.latent_channels} channels, but `unet` has `in_channels="
                f"{unet.in_channels}`, for samples of {self.sample_channels}. Take a U-Net that was trained on the "
                "latents of this autoencoder."
            )
        if self.text_encoder is not None:
            check_text_encoder(self.text_encoder, self.tokenizer, unet)
        if self.classifier is not None:
            self._check_classifier()

    def _check_classifier(self) -> None:
        """Raises a `ValueError` for a classifier of other samples or classes than the U-Net's."""
        unet, classifier = self.unet.config, self.classifier.config
        if classifier.in_channels != self.sample_channels:
            raise ValueError(
                f"`classifier` has `in_channels={classifier.in_channels}`, but `unet` has `in_channels="
                f"{unet.in_channels}`, for samples of {self.sample_channels}. Train the classifier on the "
                "samples of this U-Net."
            )
        sizes = [
            tuple(size) if isinstance(size, (list, tuple)) else (size, size)
            for size in (classifier.sample_size, unet.sample_size)
        ]
        if unet.sample_size is not None and sizes[0] != sizes[1]:
            raise ValueError(
                f"`classifier` has `sample_size={classifier.sample_size}`, but `unet` has `sample_size="
                f"{unet.sample_size}`. Train the classifier on samples of that size."
            )
        rows, null_class_id = unet.get("num_class_embeds"), unet.get("null_class_id")
        if rows is None:
            return
        num_classes = rows - (null_class_id is not None)
        if classifier.num_classes != num_classes:
            raise ValueError(
                f"`classifier` has `num_classes={classifier.num_classes}`, but `unet` has {num_classes} classes "
                f"(`num_class_embeds={rows}`, `null_class_id={null_class_id}`). Train the classifier on these classes."
            )
        if null_class_id not in (None, num_classes):
            raise ValueError(
                f"`unet` has `null_class_id={null_class_id}`, but beside a `classifier` it must be the last one, "
                f"{num_classes}: the others have the same numbers in both then."
            )

    def _check_noise_of_classifier(self) -> None:
        """Raises a `ValueError` for a classifier of another noise schedule, or of clean images."""
        if self.classifier is not None:
            noise_schedule = self.classifier.config.get("noise_schedule")
            check_same_noise("`classifier`", noise_schedule, self.scheduler, self.classifier)

    def _check_variance(self) -> None:
        """Raises a `ValueError` where just one of U-Net and scheduler has a learned variance."""
        config, scheduler = self.unet.config, type(self.scheduler).__name__
        variance_type = self.scheduler.config.get("variance_type")
        channels = self.sample_channels
        if config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"`unet` has `in_channels={config.in_channels}` and `out_channels={config.out_channels}`. "
                f"`{type(self).__name__}` needs as many output channels as a sample has, {channels}, or twice as many "
                "for a learned variance."
                # The inpainters of RGB images.
                + (" If it inpaints, load it with `ADMInpaintPipeline`." if config.in_channels in (7, 10) else "")
            )
        learned = config.out_channels == 2 * channels
        if isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler)) and variance_type == "learned":
            raise ValueError(
                f"`scheduler` is a {scheduler} with `variance_type='learned'`, which takes a variance where models of "
                "this family predict a log-variance or an interpolation. Use `variance_type='learned_range'`, or "
                "`LearnedVarianceDDPMScheduler` with `variance_type='learned_log'`."
            )
        if isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler)) and (
            variance_type not in DDPM_VARIANCE_TYPES
        ):
            # It would run all the same: an unknown word as "fixed_small", "fixed_large_log" to NaN.
            raise ValueError(
                f"`scheduler` is a {scheduler} with `variance_type={variance_type!r}`, which it does not know. Use one "
                f"of {list(DDPM_VARIANCE_TYPES)}, or `LearnedVarianceDDPMScheduler`."
            )
        if self._takes_variance(self.scheduler) and not learned:
            raise ValueError(
                f"`scheduler` is a {scheduler} with `variance_type={variance_type!r}`, which needs a learned variance, "
                f"but `unet` predicts none: it has `out_channels={config.out_channels}` for "
                f"`in_channels={config.in_channels}`. Make the scheduler with `variance_type='fixed_small'`, or train "
                f"a model with `out_channels={2 * channels}`."
                # The upsamplers of RGB images.
                + (" If it enlarges images, load it with `ADMSuperResolutionPipeline`." if channels == 6 else "")
            )
        # Ours is told by this property. It refuses what it would have to ignore; diffusers' schedulers get the mean.
        if learned and not getattr(self.scheduler, "has_learned_variance", True):
            raise ValueError(
                f"`unet` predicts a variance (`out_channels={config.out_channels}` for "
                f"`in_channels={config.in_channels}`), but `scheduler` is a {scheduler} with "
                f"`variance_type={variance_type!r}`, which does not use it. Make the scheduler with "
                "`variance_type='learned_range'`."
            )

    def _check_scheduler(self) -> None:
        """Raises a `ValueError` for schedulers of diffusers that would draw no images, or wrong ones."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        options = inspect.signature(type(self.scheduler).__init__).parameters
        refused = f"`scheduler` is a {name}, which `{type(self).__name__}` cannot use"
        if name in UNSUITABLE_SCHEDULERS:
            raise ValueError(f"{refused}: {UNSUITABLE_SCHEDULERS[name]}")
        if type(self.scheduler).__module__.startswith("diffusers.") and "beta_schedule" not in options:
            raise ValueError(
                f"{refused}: it has no `beta_schedule`, so it does not reverse the process that these networks are "
                "trained on, but another one (flow matching, EDM, consistency models, discrete tokens, ...). Take one "
                "that does, such as `DDIMScheduler`, `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`, with "
                "`from_config`."
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES or config.get("use_flow_sigmas", False):
            raise ValueError(
                f"`scheduler` is a {name} with `prediction_type={prediction_type!r}` and "
                f"`use_flow_sigmas={config.get('use_flow_sigmas', False)}`. Networks of this family predict one of "
                f"{list(PREDICTION_TYPES)}, without flow sigmas. Pass both to `from_config`."
            )
        if prediction_type == "sample" and name in SCHEDULERS_WITHOUT_SAMPLE_PREDICTION:
            raise ValueError(
                f"`scheduler` is a {name}, which does not know `prediction_type='sample'`. Take another one, such as "
                "`DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`."
            )
        # A config keeps what its class does not know, and the betas are then not those of the network.
        if config.get("rescale_betas_zero_snr", False) and "rescale_betas_zero_snr" not in options:
            raise ValueError(
                f"`scheduler` is a {name}, which does not know `rescale_betas_zero_snr`, but its config has it set: it "
                "would step with other betas than the network's. Take one that does, such as `DDIMScheduler`, "
                "`EulerDiscreteScheduler`, `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`."
            )

    @staticmethod
    def _takes_variance(scheduler: SchedulerMixin) -> bool:
        """Whether `scheduler.step` wants mean and variance channels."""
        if isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
            return scheduler.config.variance_type == "learned_range"
        return getattr(scheduler, "has_learned_variance", False)

    @staticmethod
    def _takes_gradient(scheduler: SchedulerMixin) -> bool:
        """Whether `scheduler.step` steers by itself."""
        return "guidance_gradient" in inspect.signature(scheduler.step).parameters

    def _scheduler_for_call(
        self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int
    ) -> SchedulerMixin:
        """
        A copy of the pipeline's scheduler for one call, which keeps its timesteps and its history to itself. Solvers
        that inherited a learned `variance_type` by `from_config` cut the first three channels out of what they get,
        whatever it is, so their copy has `variance_type=None`; `DPMSolverSDEScheduler` takes a seed for each image in
        place of a generator.
        """
        scheduler = self.scheduler
        options = inspect.signature(type(scheduler).__init__).parameters
        changes = {}
        inherited = scheduler.config.get("variance_type") in ("learned", "learned_range")
        if "variance_type" in options and inherited and not self._takes_variance(scheduler):
            changes["variance_type"] = None
        if "noise_sampler_seed" in options and scheduler.config.noise_sampler_seed is None and generator is not None:
            sources = generator if isinstance(generator, list) else [generator] * batch_size
            changes["noise_sampler_seed"] = [
                int(torch.randint(2**63 - 1, (), generator=source, device=source.device)) for source in sources
            ]
        # What steps of the user's own have left may have a gradient. Such tensors cannot be copied, and need not be:
        # `set_timesteps` begins a new history.
        values = [x for value in vars(scheduler).values() for x in (value if isinstance(value, list) else [value])]
        own = copy.deepcopy(scheduler, {id(x): x for x in values if torch.is_tensor(x) and not x.is_leaf})
        own.register_to_config(**changes)
        if "noise_sampler_seed" in changes:
            own.noise_sampler_seed = changes["noise_sampler_seed"]  # which its constructor has read
        return own

    @staticmethod
    def _step_kwargs(
        scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict:
        """Those of `generator` and `eta` that the scheduler draws noise with; deterministic ones know neither."""
        parameters = inspect.signature(scheduler.step).parameters
        kwargs = {"generator": generator} if "generator" in parameters else {}
        return kwargs if eta is None else {**kwargs, "eta": eta}

    def _default_size(self) -> tuple[int | None, int | None]:
        """In pixels."""
        sample_size = self.unet.config.sample_size
        if sample_size is None:
            return None, None
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _size_to_draw(self, height: int | None, width: int | None, image: torch.Tensor) -> tuple[int, int]:
        """In pixels: what was asked for, or what the U-Net was made for, or the size of the user's image."""
        height, width = (
            size if size is not None else made_for if made_for is not None else own
            for size, made_for, own in zip((height, width), self._default_size(), image.shape[-2:], strict=True)
        )
        return height, width

    @staticmethod
    def _check_numbers(
        lengths: dict[str, int],
        batch_size: int,
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None,
    ) -> int:
        """
        `batch_size`, or the number of images where there are several; raises a `ValueError` unless all agree.
        `lengths`: of the arguments that hold images, by their names.
        """
        several = {name: length for name, length in lengths.items() if length > 1}
        if not several:
            return batch_size
        others = {"prompt": prompt, "prompt_embeds": prompt_embeds, "class_labels": class_labels}
        for name, values in others.items():
            if isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0:
                several[name] = len(values)
        if batch_size != 1:
            several["batch_size"] = batch_size
        if len(set(several.values())) > 1:
            numbers = ", ".join(f"`{name}`: {length}" for name, length in several.items())
            raise ValueError(
                f"These do not ask for the same number of images: {numbers}. Pass one of each for all images, or one "
                "for each."
            )
        return next(iter(several.values()))

    def _prepare_class_labels(
        self, class_labels: int | str | Sequence[int | str] | torch.Tensor | None
    ) -> torch.Tensor | None:
        """Checked labels where they came from, one for all images (without dimensions) or one for each; or `None`."""
        config = self.unet.config
        embed_type, num_classes = config.get("class_embed_type"), config.get("num_class_embeds")
        if class_labels is None:
            if self._is_class_conditional and config.get("null_class_id") is None:
                raise ValueError(
                    "`class_labels` are missing: this model is class-conditional and its config names no "
                    "`null_class_id`. Pass one label, or one for each image."
                )
            return None
        if not self._is_class_conditional:
            if self.classifier is None:
                raise ValueError(
                    f"`class_labels` is {class_labels}, but this model is unconditional. Leave them out, use a model "
                    "with `num_class_embeds`, or add a classifier that steers this one."
                )
            num_classes = self.classifier.config.num_classes

        if isinstance(class_labels, str):
            class_labels = self._label_number(class_labels)
        elif isinstance(class_labels, (list, tuple)):
            class_labels = [self._label_number(c) if isinstance(c, str) else c for c in class_labels]
        class_labels = torch.as_tensor(class_labels)
        is_embedding = embed_type in ("identity", "projection")
        if class_labels.ndim not in ((2,) if is_embedding else (0, 1)) or class_labels.shape[:1] == (0,):
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)}; pass one "
                f"{'embedding' if is_embedding else 'label'} for each image."
            )
        if is_embedding:
            if embed_type == "projection":
                width = config.projection_class_embeddings_input_dim
            else:
                width = config.get("time_embedding_dim") or 4 * config.block_out_channels[0]
            if class_labels.shape[1] != width:
                raise ValueError(
                    f"`class_labels` has shape {tuple(class_labels.shape)}; embeddings of this model have {width} "
                    "entries each."
                )
        if embed_type is None:
            if class_labels.is_floating_point() or class_labels.dtype == torch.bool:
                raise ValueError(f"`class_labels` are of type {class_labels.dtype}; class numbers are integers.")
            # Read here, once: on a device the embedding would only fail after the fact, and take the process with it.
            low, high = int(class_labels.min()), int(class_labels.max())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"`class_labels` reach from {low} to {high}; this model has the classes 0 to {num_classes - 1}."
                )
            class_labels = class_labels.long()
        return class_labels

    @property
    def _is_class_conditional(self) -> bool:
        config = self.unet.config
        return config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None

    @staticmethod
    def _number_of_prompts(
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        batch_size: int,
    ) -> int:
        """How many different images all these ask for."""
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}; pass an integer of at least 1.")
        asked = []
        if isinstance(prompt, (list, tuple)):
            asked.append((len(prompt), f"`prompt` holds {len(prompt)} prompts"))
        if prompt_embeds is not None:
            asked.append((len(prompt_embeds), f"`prompt_embeds` holds {len(prompt_embeds)} prompts"))
        if class_labels is not None and class_labels.ndim > 0:
            asked.append((len(class_labels), f"`class_labels` holds {len(class_labels)} labels"))
        if batch_size != 1 or not asked:
            asked.append((batch_size, f"`batch_size` is {batch_size}"))
        (number, first), *others = asked
        for other_number, other in others:
            if other_number != number:
                raise ValueError(
                    f"{first}, but {other}. Pass as many of each, or one for all images: a `prompt` that is a string, "
                    "`class_labels` that are one `int`; and leave `batch_size` out where a list tells the number."
                )
        if number == 0:
            raise ValueError(f"{first}; pass at least one.")
        return number

    def _prepare_text(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        given: TextConditioning,
        negative_given: TextConditioning,
        num_prompts: int,
        guidance_scale: float,
    ) -> tuple[TextConditioning | None, TextConditioning | None]:
        """
        Conditional and unconditional text, a row a prompt. The latter is `None` where it was not given, and the text
        encoder would have to run for it alone without need.
        """
        if not self.reads_text:
            return None, None
        text = given if given.hidden_states is not None else None
        negative_text = negative_given if negative_given.hidden_states is not None else None
        wants_negative = guidance_scale != 1.0 or negative_prompt is not None
        if text is None or (negative_text is None and wants_negative):
            prompts = [prompt or ""] * num_prompts if prompt is None or isinstance(prompt, str) else prompt
            encoded, negative_encoded = self._encode_texts(prompts, negative_prompt)
            text, negative_text = text or encoded, negative_text or negative_encoded
        return text, negative_text

    def _conditions(
        self,
        class_labels: torch.Tensor | None,
        text: TextConditioning | None,
        negative_text: TextConditioning | None,
        num_images_per_prompt: int,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """
        Keyword arguments of the U-Net: for the conditional pass alone, and for both in one batch, the unconditional
        one first; `None` where there is nothing to guide away from.
        """
        null_class_id = self.unet.config.get("null_class_id")
        if not self._is_class_conditional:
            class_labels = None  # they are the classifier's
        conditional, both = {"class_labels": class_labels}, {"class_labels": None}
        can_guide = class_labels is not None and null_class_id is not None
        if class_labels is not None:
            null_labels = class_labels if null_class_id is None else torch.full_like(class_labels, null_class_id)
            both["class_labels"] = torch.cat([null_labels, class_labels])
        if text is not None:
            text = self._text_for_unet(text, num_images_per_prompt)
            conditional |= text_model_kwargs(text, self.unet.config)
            can_guide = negative_text is not None
            if negative_text is not None:
                lengths = [states.shape[1] for states in (text.hidden_states, negative_text.hidden_states)]
                if self.unet.config.get("addition_embed_type") == "text" and lengths[0] != lengths[1]:
                    raise ValueError(
                        f"`prompt_embeds` and `negative_prompt_embeds` have {lengths[0]} and {lengths[1]} states. This "
                        "U-Net pools them, padding included, so they must be equally many. Encode both with "
                        "`encode_prompt`."
                    )
                negative_text = self._text_for_unet(negative_text, num_images_per_prompt)
                both |= text_model_kwargs(join_texts(negative_text, text), self.unet.config)
        return conditional, both if can_guide else None

    def _text_for_unet(self, text: TextConditioning, num_images_per_prompt: int) -> TextConditioning:
        """On the device and in the dtype of the U-Net, a row an image."""
        device, dtype = self._execution_device, self.unet.dtype
        text = map_text(text, lambda x: x.to(device, dtype if x.is_floating_point() else None))
        return map_text(text, lambda x: x.repeat_interleave(num_images_per_prompt, dim=0))

    def _label_number(self, name: str) -> int:
        numbers = {known: label for label, known in (self.id2label or {}).items()}
        if name not in numbers:
            raise ValueError(
                f"`class_labels` holds {name!r}, but the classes of this pipeline are {list(numbers) or 'not named'}. "
                "Pass the number of a class, or a name that there is (`id2label` of the pipeline gives them)."
            )
        return numbers[name]


def _kind_of(value: Any) -> str:
    """What an argument is, for messages."""
    return f"a tensor of {value.dtype}" if torch.is_tensor(value) else f"a {type(value).__name__}"
