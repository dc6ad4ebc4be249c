"""
ADMPipeline: generates images with an ablated diffusion model: unconditional, by class, by prompt, or by both.

Classifier-free guidance (Ho & Salimans 2022, https://huggingface.co/papers/2207.12598) with a null class or an empty or
negative prompt, its rescaling (Lin et al. 2023, https://huggingface.co/papers/2305.08891, section 3.4) and its
limitation to an interval of the steps (Kynkäänniemi et al. 2024, https://huggingface.co/papers/2404.07724). Classifier
guidance (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233, section 4). From noise, or from the noised
image (SDEdit, Meng et al. 2021, https://huggingface.co/papers/2108.01073). In pixels, or in the latents of an
autoencoder (Rombach et al. 2022, https://huggingface.co/papers/2112.10752).
"""

import contextlib
import copy
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from diffusers_adm.compilation import fast_network
from diffusers_adm.compilation.suitability import FastDtype
from diffusers_adm.conditioning.call_arguments import checks_arguments
from diffusers_adm.conditioning.class_labels import ClassCondition, ClassLabels
from diffusers_adm.conditioning.condition import (
    Condition,
    MergedConditions,
    Passes,
    SamplingCall,
    Step,
    number_of_prompts,
)
from diffusers_adm.conditioning.guidance import (
    ClassifierGuidance,
    Guidance,
    GuidancePasses,
    check_classifier,
    check_format_of_classifier,
    check_guidance_passes,
    check_noise_of_classifier,
    guide,
    joins_passes,
)
from diffusers_adm.conditioning.guidance_functions import GuidanceFunctions
from diffusers_adm.conditioning.image_format import MODE_CHANNELS, ImageFormat, as_size
from diffusers_adm.conditioning.image_inputs import ImageInput
from diffusers_adm.conditioning.image_outputs import as_outputs, to_numpy, to_pil
from diffusers_adm.conditioning.inpainting import sample_channels_of
from diffusers_adm.conditioning.latents import Autoencoder, LatentSpace, downsampling_factor
from diffusers_adm.conditioning.start_image import StartCondition
from diffusers_adm.conditioning.steering import GuidedPrediction, Steering
from diffusers_adm.conditioning.text import TextCondition, TextConditioning, check_text_encoder, cross_attention_width
from diffusers_adm.models.classifier_adagn import AdaGNClassifierModel
from diffusers_adm.models.loading import explained
from diffusers_adm.models.text_encoder_glide import GLIDETextModel
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel
from diffusers_adm.ops.finiteness import count_not_finite, explain_not_finite, not_finite
from diffusers_adm.ops.integers import check_integer
from diffusers_adm.ops.values import check_elements, check_generator, describe
from diffusers_adm.pipelines.inversion import check_arguments_of_inversion, without_exact_inverse
from diffusers_adm.pipelines.layouts import LDM_LAYOUT, has_layout, load_layout
from diffusers_adm.schedulers.diffusers_schedulers import (
    DEFAULT_NUM_INFERENCE_STEPS,
    Generators,
    Steps,
    check_scheduler,
    check_variance,
    copy_for_call,
    takes_variance,
)
from diffusers_adm.schedulers.noise_schedules import LORA_NOISE_SCHEDULE_KEY, check_same_noise
from diffusers_adm.schedulers.scheduling_ddim_inversion import DDIMInversionScheduler


OutputType = Literal["pil", "np", "pt", "latent"]
# Pillow's modes for the numbers of channels of images whose format is not recorded; see `ImageFormat.pil_mode`.
PIL_OUTPUT_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class CallState:
    """
    The state of a running call that its callback may read and change, under the names of the pipeline's properties.

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
class Samples:
    """The arguments of a call for number, size and noise of the samples; see [`ADMPipeline`]."""

    batch_size: int
    num_images_per_prompt: int
    height: int | None
    width: int | None
    generator: Generators
    latents: torch.Tensor | None

    def check_size(
        self, height: int | None, width: int | None, vae_factor: int, unet_factor: int, is_of_image: bool = False
    ) -> None:
        """
        Raises a `ValueError` unless the size in pixels is divisible by both downsampling factors together.
        `is_of_image`: whether an image of the call has this size.
        """
        if height is None or width is None:
            raise ValueError(
                "This model's config has no `sample_size`, so the size of the images is unknown. Pass `height` and "
                "`width`."
            )
        factor = vae_factor * unet_factor
        for name, side in (("height", height), ("width", width)):
            check_integer(name, side, 0)
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}; both must be positive and divisible by {factor}, the "
                "total downsampling of this model"
                + f": `vae` by {vae_factor}, and `unet` by {unet_factor}" * (vae_factor > 1)
                + "."
                + " That is the size of the given image: resize or crop it." * is_of_image
            )

    def check_numbers(self, shape: tuple[int, ...], is_inversion: bool = False) -> None:
        """
        Raises a `ValueError` unless generators and latents match samples of this shape. `is_inversion`: whether the
        latents are an image to invert.
        """
        check_generator(self.generator)
        if isinstance(self.generator, list) and len(self.generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(self.generator)} for {shape[0]} images. Pass one generator for each "
                "image, or a single one."
            )
        latents = self.latents
        if latents is None:
            return
        if is_inversion and tuple(latents.shape) != shape:
            raise ValueError(
                f"The image to invert gives samples of shape {tuple(latents.shape)}, but the other arguments ask for "
                f"{shape}. Pass one image for each prompt, class or other condition, of the size of the results."
            )
        if tuple(latents.shape) != shape or not latents.is_floating_point():
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)} and type {latents.dtype}, but the number of images, "
                f"`height` and `width` ask for floating point numbers of shape {shape}."
            )
        bad = count_not_finite(latents, "images")
        if bad is not None:
            raise ValueError(
                f"`latents` holds NaN or infinity for {bad}. Pass standard normal noise, as by `torch.randn{shape}`."
            )


@dataclass
class Output:
    """The arguments of a call for its results and callbacks; see [`ADMPipeline`]."""

    output_type: OutputType
    callback: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None
    callback_inputs: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.callback, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_inputs = self.callback.tensor_inputs

    def check(self, image_format: ImageFormat, is_recorded: bool, allowed_inputs: Sequence[str]) -> None:
        """
        Raises a `ValueError` for outputs that do not exist, and callbacks that could not be called. `is_recorded`:
        whether the format is from the pipeline's config.
        """
        if self.output_type not in get_args(OutputType):
            raise ValueError(f"`output_type` is {self.output_type!r}; it must be one of {list(get_args(OutputType))}.")
        if self.output_type == "pil" and not image_format.is_viewable:
            raise ValueError(
                f"`output_type` is 'pil', but {_why_no_pil(image_format, is_recorded)} Pass `output_type='np'` or "
                "`output_type='pt'`" + _how_to_record(image_format.channels) * (not is_recorded) + "."
            )
        names = self.callback_inputs
        if isinstance(names, str) or names is None or not set(names) <= set(allowed_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {names!r}; pass a list of names out of {allowed_inputs}."
            )


def _why_no_pil(image_format: ImageFormat, is_recorded: bool) -> str:
    if is_recorded:
        return f"{image_format.why_no_pil}."
    return (
        f"the images have {image_format.channels} channels, whose meaning the pipeline's config does not tell "
        "(`image_format`)."
    )


def _how_to_record(channels: int) -> str:
    modes = [mode for mode, number in MODE_CHANNELS.items() if number == channels]
    if not modes:
        return ""
    config = ImageFormat(modes[0], channels).to_config()
    return f"; or, for 8-bit images of mode {modes[0]}, load the pipeline with `image_format={config}`"


@dataclass
class Sampling:
    """
    A call after its preparation. It belongs to this call: other calls of the pipeline may run at the same time.

    Attributes:
        state (`CallState`): May be changed by callbacks.
        call (`SamplingCall`): Number and size of the samples, their noise, and a copy of the pipeline's scheduler.
        timesteps (`torch.Tensor`), step_kwargs (`dict`): The steps, and keyword arguments of `scheduler.step`.
        conditions (`MergedConditions`): Inputs of the U-Net.
        guidance (`Guidance`), output (`Output`): As asked for.
        steering (`Steering`, *optional*): The classifier and other functions that guide; `None`: there are none.
    """

    state: CallState
    call: SamplingCall
    timesteps: torch.Tensor
    step_kwargs: dict[str, Any]
    conditions: MergedConditions
    guidance: Guidance
    output: Output
    steering: Steering | None

    def step(self, index: int) -> Step:
        """One of the steps. Those of an inversion have the numbers of the steps of sampling that they invert."""
        number, timestep = len(self.timesteps), self.timesteps[index]
        if isinstance(self.call.scheduler, DDIMInversionScheduler):
            evaluations = self.call.scheduler.order
            return Step((number - 1 - index) // evaluations, number // evaluations, timestep)
        return Step(index, number, timestep)

    def take(self, prediction: GuidedPrediction, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Steps the scheduler: x_t to x_{t-1}, both as it scales them."""
        latents = self.call.scheduler.step(
            prediction.model_output, step.timestep, latents, **self.step_kwargs, **prediction.step_kwargs
        ).prev_sample
        return latents if prediction.shift is None else self.steering.shift(latents, prediction.shift, step)

    def finish(self) -> None:
        """Checks what the loop left unread, so as not to wait for the device in each step."""
        if self.steering is not None:
            self.steering.check()


class ADMPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""
    Generates images with an ablated diffusion model: unconditional, by class, by prompt, or by both, with
    classifier-free and classifier guidance, in pixels or in the latents of an autoencoder.

    LoRA weights of U-Net and text encoder are managed with `load_lora_weights`, `set_adapters`, `fuse_lora`,
    `unfuse_lora` and `unload_lora_weights`, and are written with `save_lora_weights`.

    Several threads may call one pipeline at the same time: each call steps a scheduler of its own, and settings of a
    callback apply to its own call. Changes of the networks or of the pipeline itself must wait until no call is
    running: `to`, `enable_model_cpu_offload` and other offloading (whose hooks move the networks during and after a
    call), caches and other hooks that keep a state, `load_lora_weights` and the like, replacing a component, and
    `set_progress_bar_config`.

    Args:
        unet (`AdaGNUNet2DModel`, [`UNet2DModel`] or [`UNet2DConditionModel`]): Predicts the noise (or x_0 or v,
            see the scheduler's `prediction_type`), and with twice the channels of its input also a variance.
        scheduler ([`SchedulerMixin`]): `LearnedVarianceDDPMScheduler`, or a scheduler of diffusers made with
            `from_config` (docs/samplers.md compares them). Only the former and `DDPMScheduler` with
            `variance_type="learned_range"` use a learned variance; the others get only the mean channels. Each call
            steps a copy: `pipe.scheduler` stays as it is, its `timesteps` included.
        vae ([`AutoencoderKL`], [`VQModel`] or [`AutoencoderTiny`], *optional*): Decodes the samples, which are then
            latents, to images, and encodes images to start from. For large images and many at once call
            `pipe.vae.enable_tiling()` and `pipe.vae.enable_slicing()`.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*), tokenizer
            ([`~transformers.PreTrainedTokenizerBase`], *optional*): Any text encoder of transformers (CLIP, T5, BERT
            and the like) for a U-Net with cross-attention. Prompts need both; without them, such a pipeline takes
            `prompt_embeds`.
        classifier (`AdaGNClassifierModel`, *optional*): Classifies noisy samples, for classifier guidance, also of an
            unconditional U-Net.
        id2label (`dict[int, str]`, *optional*): Names of the classes, saved with the pipeline.
        image_format (`ImageFormat` or `dict`, *optional*): Format of the images of training (with a `vae`, of those
            that it decodes to), saved with the pipeline: mode, number of channels, the values of the data for -1 and 1,
            and their number of levels; see `diffusers_adm.conditioning.image_format.ImageFormat`. `None`: not known;
            images of 1 and 3 channels are 8-bit grey and RGB, those of other numbers arrays in [0, 1].

    Raises:
        ValueError: If just one of `unet` and `scheduler` has a learned variance, `scheduler` cannot reverse the process
            of such a network, `vae`, `text_encoder` or `classifier` is incompatible with `unet`, `classifier` was
            trained on another noise schedule than that of `scheduler` or on images of another format, or `image_format`
            is no format of images with as many channels.
    """

    # The classifier is not in the sequence: it alternates with the U-Net in every step.
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "classifier"]
    _callback_tensor_inputs = ["latents"]
    _guidance_passes: GuidancePasses = "auto"
    # Of the pipelines of diffusers that `from_pretrained` and `from_pipe` also take.
    _layout = LDM_LAYOUT

    # None of these has a default: with one, `DiffusionPipeline.from_pretrained(..., classifier=None)` would load the
    # repository's classifier all the same.
    def __init__(
        self,
        unet: AdaGNUNet2DModel | UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None,
        text_encoder: GLIDETextModel | torch.nn.Module | None,
        tokenizer: object | None,
        classifier: AdaGNClassifierModel | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        image_format: ImageFormat | dict[str, Any] | None = None,
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
        if isinstance(image_format, ImageFormat):
            image_format = image_format.to_config()
        self.register_to_config(id2label=id2label, image_format=image_format)
        self._check_components()
        if classifier is not None:
            check_noise_of_classifier(classifier, scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._latest_call = CallState()
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        Loads a saved pipeline as diffusers does, also those of diffusers' `LDMPipeline` and `LDMTextToImagePipeline`
        (such as `CompVis/ldm-celebahq-256`), whose `vqvae` and `bert` become `vae` and `text_encoder`.
        """
        path = pretrained_model_name_or_path
        with explained(path, cls):
            if kwargs.get("custom_pipeline") is None and has_layout(cls._layout, cls, path, kwargs):
                return load_layout(cls._layout, cls, path, kwargs)
            pipe = super().from_pretrained(path, **kwargs)
        # A class of diffusers that the index names by mistake ignores the weights of another, with a mere warning.
        unet = getattr(pipe, "unet", None)
        if isinstance(unet, ModelMixin) and "timestep" not in inspect.signature(unet.forward).parameters:
            raise ValueError(
                f"The index of {path} names {type(unet).__name__} as `unet`, which takes no timestep. Correct "
                "`unet` in model_index.json, or pass the U-Net to `from_pretrained`."
            )
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        Makes a pipeline of the components of another one as diffusers does, also of an `LDMPipeline` or
        `LDMTextToImagePipeline`. Optional components that it does not have are `None`; `guidance_passes` is that of
        the other one.
        """
        components = pipeline.components
        for name, its_name in cls._layout.names.items():
            if its_name in components:
                kwargs.setdefault(name, cls._layout.convert(components[its_name]))
        for name, component in components.items():
            own = cls._layout.convert(component)
            if own is not component and name in cls._get_signature_keys(cls)[0]:
                kwargs.setdefault(name, own)
        for name in set(cls._optional_components) - set(components):
            kwargs.setdefault(name, None)
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe._guidance_passes = getattr(pipeline, "_guidance_passes", "auto")
        return pipe

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes; `None` without any."""
        names = self.config.id2label
        return None if names is None else {int(label): name for label, name in names.items()}

    @property
    def vae_scale_factor(self) -> int:
        """Number of image pixels per sample pixel, along each side."""
        return downsampling_factor(self.vae)

    @property
    def sample_channels(self) -> int:
        """Channels of a sample. (The U-Net of an upsampler or inpainter takes more.)"""
        return self.unet.config.in_channels

    @property
    def image_channels(self) -> int:
        """Channels of an image: those that the `vae` decodes samples to, or those of a sample."""
        return self.sample_channels if self.vae is None else self.vae.config.get("out_channels", 3)

    @property
    def image_format(self) -> ImageFormat:
        """Format of the images, from the config; if the config has none, it follows from the number of channels."""
        return ImageFormat.from_config(self.config.image_format, self.image_channels)

    @property
    def has_cross_attention(self) -> bool:
        """Whether the U-Net is conditioned on text."""
        return cross_attention_width(self.unet.config) is not None

    @property
    def reads_text(self) -> bool:
        """Former name of `has_cross_attention`."""
        warnings.warn(
            "`reads_text` is now `has_cross_attention`, and will be removed in 0.3.",
            FutureWarning,
            stacklevel=2,
        )
        return self.has_cross_attention

    @property
    def guidance_passes(self) -> GuidancePasses:
        """How both passes of classifier-free guidance run; see `set_guidance_passes`."""
        return self._guidance_passes

    def set_guidance_passes(self, passes: GuidancePasses) -> None:
        r"""
        Sets how the unconditional and the conditional pass of classifier-free guidance run. The results differ by
        rounding only.

        Args:
            passes (`str`): `"joint"`: in one batch of twice the size. `"separate"`: one after the other, so that the
                networks always see the batch size of the call, also in steps without guidance, and need less memory.
                `"auto"`, which new pipelines have: whichever is faster: on the CPU joint for small batches of small
                samples, else separate; on other devices joint.

        Raises:
            ValueError: For another word.
        """
        check_guidance_passes(passes)
        self._guidance_passes = passes

    # State per call: inside a callback that of its own call; elsewhere that of the most recently started call.
    # (diffusers' pipelines keep these as attributes of the pipeline.)

    @property
    def guidance_scale(self) -> float:
        """
        Scale of classifier-free guidance; 1.0 is off. A callback may set it for the remaining steps of its call.
        Elsewhere it is that of the most recently started call.
        """
        return self._call_state.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._call_state.guidance_scale = scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps: inside a callback of its own call, elsewhere of the most recently started call."""
        return self._call_state.num_timesteps

    @property
    def interrupt(self) -> bool:
        """
        A callback that sets `pipe._interrupt = True` ends the sampling of its call after the current step. Set
        elsewhere, in another thread, it ends the most recently started call.
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
    def _running(self, state: CallState) -> Iterator[Any]:
        """Marks a call as running in this thread; gives the progress bar of its steps."""
        token = _RUNNING_CALLS.set((*_RUNNING_CALLS.get(), (self, state)))
        try:
            with self.progress_bar(total=state.num_timesteps) as progress_bar:
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
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Loads LoRA layers into a U-Net as diffusers does; `load_lora_weights` calls it.

        Raises:
            ValueError: As diffusers; if weights are not finite; if there are layers for a text encoder that the
                pipeline does not have; if the file names another noise schedule than that of the pipeline's scheduler.
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
            state_dict, network_alphas, unet, adapter_name, _pipeline=_pipeline, metadata=metadata, **kwargs
        )

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, torch.Tensor],
        network_alphas: dict[str, float] | None,
        text_encoder: torch.nn.Module | None,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA layers into a text encoder as diffusers does, but without a warning if there are none for it."""
        prefix = cls.text_encoder_name if prefix is None else prefix
        if any(key.startswith(f"{prefix}.") for key in state_dict):
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, prefix=prefix, **kwargs)

    def enable_fast(
        self,
        dtype: FastDtype = "auto",
        *,
        cache_dir: str | os.PathLike | None = None,
        background: bool = False,
    ) -> None:
        r"""
        Compiles the U-Net and ControlNets for sampling; see docs/fast_sampling.md for the time of the first call, which
        is minutes, and the speed-up.

        The first call with inputs of each shape compiles. On CPUs the weights are part of the code, which is kept in
        `cache_dir` for later processes; changed weights are compiled again. The networks stay the same objects, and
        their weights stay as they are: only what runs when they are called changes, also in other pipelines that share
        them. Calls that need gradients run the network itself.

        Args:
            dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): In which the code computes. `"auto"`:
                bfloat16 where the device has instructions for it (CPUs with AVX512-BF16 or AMX, GPUs from compute
                capability 8.0 on), otherwise the dtype of the network. `None`: the dtype of the network.
            cache_dir (`str` or `os.PathLike`, *optional*): Folder for compiled code of CPUs, to which only you may
                have write access. `None`: `diffusers_adm/compiled` in the cache of Hugging Face (`HF_HOME`).
            background (`bool`, defaults to `False`): Compile in the background; the networks run as before until their
                code is ready. Only on CPUs.

        Raises:
            ValueError: For networks with hooks (offloading, device maps, caches), sharded or quantised weights, or LoRA
                adapters that are not fused (call `fuse_lora` first); also by calls of the pipeline, if that is done
                later. For a `cache_dir` that cannot be used.
            RuntimeError: If code must be compiled and there is no C++ compiler.
        """
        fast_network.enable(self.components, dtype, cache_dir, background)

    def disable_fast(self) -> None:
        """Undoes `enable_fast`: the networks run as they are. Compiled code stays in the cache."""
        fast_network.disable(self.components)

    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        r"""
        Encodes prompts and negative prompts in one pass of the text encoder. Gradients are computed unless disabled.

        Args:
            prompt (`str` or list of `str`): Descriptions of the images.
            negative_prompt (`str` or list of `str`, *optional*): Prompts to guide away from: one for all prompts, or
                one for each. `None`: the empty prompt.

        Returns:
            `tuple` of six tensors, one row per prompt, named like the arguments of `__call__`: `prompt_embeds`,
            `negative_prompt_embeds`, `pooled_prompt_embeds`, `negative_pooled_prompt_embeds` (both `None` if the
            U-Net takes none), `prompt_attention_mask`, `negative_prompt_attention_mask` (both `None` if nothing is
            masked).

        Raises:
            ValueError: Without a text encoder, or for another number of negative prompts than of prompts.
        """
        text = self._text_condition()
        encoded, negative = text.encode(prompt, negative_prompt, self._execution_device)
        pooled, negative_pooled = (encoded.pooled, negative.pooled) if text.takes_pooled else (None, None)
        masks = encoded.attention_mask, negative.attention_mask
        return encoded.hidden_states, negative.hidden_states, pooled, negative_pooled, *masks

    @torch.no_grad()
    @checks_arguments
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
        image: ImageInput | None = None,
        strength: float | None = None,
        guidance_fn: GuidanceFunctions = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates a batch of images, from noise or from a noised `image`.

        Args:
            prompt (`str` or list of `str`, *optional*): Description of the images, for a U-Net with cross-attention:
                one for all images, or one for each. `None`: the empty prompt. The end of a prompt that is too long for
                the text encoder is cut off, with a warning.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Classes, by number or by name (see
                `pipe.id2label`): one for all images, or one for each. `None`: the null class of a model that has one,
                no class for an unconditional model. The classifier uses them too.
            batch_size (`int`, defaults to 1): Number of different images. Not needed if `prompt`, `class_labels` or
                `image` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): Number of samples for each of these, one after the other.
            num_inference_steps (`int`, defaults to 50): Number of steps, chosen by the scheduler's `timestep_spacing`.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): Respacing as in guided-diffusion
                (`"250"`, `"ddim50"`, `"10,10,15"`, `"fast27"`) instead of `num_inference_steps`; only with
                `LearnedVarianceDDPMScheduler`.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: `uncond + guidance_scale * (cond -
                uncond)` replaces the predicted mean; 1.0 is off. `uncond` is the prediction for the null class, if the
                model has one, and the negative prompt, if it is conditioned on text; both are predicted in one batch or
                one after the other (`set_guidance_passes`). The variance is that of the conditional prediction.
            guidance_rescale (`float`, defaults to 0.0): In [0, 1], for guided steps; pulls the standard deviation of
                the guided prediction towards that of the conditional one.
            guidance_start (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0): Fractions of the steps
                between which all kinds of guidance act. Step `i` of `n` is guided if `guidance_start <= i / n` and `(i
                + 1) / n <= guidance_end`. With schedulers of second order these are evaluations of the network, two for
                most steps.
            classifier_guidance_scale (`float`, defaults to 0.0): Classifier guidance: s times the gradient g of the
                classifier's log p(`class_labels` | x_t) is added in each step; 0.0 is off, without overhead. With
                `LearnedVarianceDDPMScheduler`, ancestral steps add variance * s * g to their mean (ADM, algorithm 1)
                and DDIM steps, like those of every other scheduler, add s * g to the score (algorithm 2).
            negative_prompt (`str` or list of `str`, *optional*): Prompt to guide away from: one for all prompts, or one
                for each. `None`: the empty prompt. Used only with classifier-free guidance.
            eta (`float`, *optional*): Noise of DDIM steps, from 0 (deterministic) to 1 (as much as DDPM). `None`:
                ancestral steps with `LearnedVarianceDDPMScheduler`, the scheduler's own default elsewhere.
            height, width (`int`, *optional*): Size of the images in pixels, divisible by the total downsampling of
                U-Net and `vae`. `None`: that of `image`, or else the U-Net's `sample_size`, times the upsampling of the
                `vae`.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise; with one for each image, an
                image does not depend on the others of its batch. Generators on the CPU give the same noise on every
                device.
            latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*): Standard
                normal noise to start from, or to add to `image`; of the size of the samples, not of decoded images.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(number of prompts, length, width)`,
                *optional*): Encoded prompts in place of `prompt` and `negative_prompt`; see `encode_prompt`.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(number of prompts,
                length)`, *optional*): 1 for the states that cross-attention attends to, 0 for padding. `None`: all.
            pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(number of prompts, width)`,
                *optional*): One vector a prompt, for a U-Net with `addition_embed_type="text_embeds"`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, for viewable images (a `pipe.image_format` of mode L, LA,
                RGB or RGBA with whole numbers that are not negative): values of the data, in mode I;16 for grey of more
                than 8 bits; colours of more are reduced to 8. `"np"`: `(batch_size, height, width, channels)`; `"pt"`:
                `(batch_size, channels, height, width)`; both in [0, 1] for viewable images, and values of the data for
                other formats. `"latent"`: the last sample as it is, not decoded; about [-1, 1] for pixels.
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each step as `callback(pipe, step, timestep,
                callback_kwargs)`; `latents` in the dictionary it returns replaces the sample. It may set
                `pipe.guidance_scale` for the steps that follow, if there is something to guide towards and away from.
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): Keys of
                `callback_kwargs`, out of `pipe._callback_tensor_inputs`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): Images to
                start from in place of noise: one for all results, or one for each. Arrays are `(height, width,
                channels)` and tensors `(channels, height, width)` in [0, 1] or of `uint8`, with a batch dimension in
                front or without; for other formats than 8-bit grey and RGB see `pipe.image_format`. The size of the
                results is that of the image; nothing is resized. With an `AutoencoderKL` its latents are sampled.
            strength (`float`, *optional*): In (0, 1], with `image`; `None`: 0.8. The image is noised for the last
                `int(strength * steps)` steps, which are taken: the less, the more of it remains. 1.0 takes all steps
                and leaves next to nothing of it. `guidance_start` and `guidance_end` are fractions of the steps that
                are taken.
            guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Functions `(x_t, t, pred_original_sample,
                **conditions)` whose gradient each step follows; several add up. See
                `diffusers_adm.conditioning.guidance_functions` and docs/guidance.md.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that are incompatible with each other, the model or the scheduler.
        """
        # 1. check networks and scheduler, read conditions
        self._check_components()
        text = TextConditioning(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative_text = TextConditioning(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        classes, prompts = self._class_and_text(class_labels, prompt, text, negative_prompt, negative_text)
        start = StartCondition(self.vae, self.image_format).read(image, strength)

        # 2. check other arguments, set timesteps, draw noise, prepare conditions
        sampling = self._start(
            classes,
            [prompts, start],
            Steps(num_inference_steps, timestep_respacing, eta, start.strength),
            Guidance(
                guidance_scale, guidance_rescale, guidance_start, guidance_end, classifier_guidance_scale, guidance_fn
            ),
            Samples(batch_size, num_images_per_prompt, *start.size(height, width), generator, latents),
            Output(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )

        # 3. sample
        latents = self._denoise(sampling, start.samples(sampling.call, sampling.timesteps))

        # 4. decode
        return self._finish(self._decode(latents, output_type), return_dict)

    @torch.no_grad()
    @checks_arguments
    def invert(
        self,
        image: ImageInput,
        /,
        num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        num_fixed_point_iterations: int = 2,
        **call_arguments: Any,
    ) -> torch.Tensor:
        r"""
        Inverts the sampling of images: returns latents from which the same call generates them (DDIM inversion, Song et
        al. 2020, https://huggingface.co/papers/2010.02502; see docs/inversion.md).

            latents = pipe.invert(image, prompt="a cat")
            image = pipe(prompt="a cat", latents=latents, eta=0.0).images[0]

        Sampling must be deterministic: `eta=0.0` with `LearnedVarianceDDPMScheduler`, or `DDIMScheduler`. Other
        deterministic schedulers, such as `DPMSolverMultistepScheduler` and `EulerDiscreteScheduler`, solve the same
        equation with other errors, and come close to the image with many steps. The latents are of the scale of
        standard normal noise for all of them, as the `latents` of a call. The scheduler must not clip the predicted
        x_0 (`clip_sample=False`).

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): The images, one for each
                result, in the forms of `image` of [`ADMPipeline`], and in the format of the results. By position only:
                `image=` is that of the call, such as the low-resolution image of [`ADMSuperResolutionPipeline`]. With a
                `vae` the mean of their latents is inverted.
            num_inference_steps (`int`, defaults to 50): As in the call that generates the images again.
            num_fixed_point_iterations (`int`, defaults to 2): Evaluations of the network per step. 1: plain DDIM
                inversion. More of them approach the exact inverse (Pan et al. 2023,
                https://huggingface.co/papers/2309.04907).
            call_arguments: Other arguments of the call (prompt, classes, guidance, conditioning images, ...), all as in
                the call that generates the images again. Guidance of all kinds, and fractions of the steps such as
                `guidance_start`, act in the steps in which they act there.

        Returns:
            `torch.Tensor` of shape `(number of images, channels, height, width)`: Latents, at least float32.

        Raises:
            ValueError: For images of another format or size, values that are not finite, and arguments of the call that
                have no meaning here or that the call refuses.
        """
        check_arguments_of_inversion(call_arguments)
        if image is None:
            raise ValueError("The image to invert is None; pass one, or a list of them, as the first argument.")
        self._check_components()
        self._warn_once(without_exact_inverse(self.scheduler))
        start = StartCondition(self.vae, self.image_format).read(image, None)
        unet_factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        size = dict(zip(("height", "width"), start.image_size, strict=True))
        Samples(1, 1, None, None, None, None).check_size(
            **size, vae_factor=self.vae_scale_factor, unet_factor=unet_factor, is_of_image=True
        )
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        latents = start.encode(self._execution_device, dtype)

        # A copy of this call's own: other calls of the pipeline may run at the same time.
        pipe = copy.copy(self)
        scheduler = copy_for_call(self.scheduler, None, len(latents))
        pipe.scheduler = DDIMInversionScheduler(scheduler, num_fixed_point_iterations)
        taken = inspect.signature(type(self).__call__).parameters
        follows = {name: value for name, value in {**size, "batch_size": len(latents)}.items() if name in taken}
        arguments = {"num_inference_steps": num_inference_steps, **follows, **call_arguments}
        arguments.pop("eta", None)  # 0, which inversion always is
        (result,) = pipe(**arguments, latents=latents, output_type="latent", return_dict=False)
        return result

    @property
    def _inverts(self) -> bool:
        """Whether this is a copy that `invert` calls: from images to noise."""
        return isinstance(self.scheduler, DDIMInversionScheduler)

    def _class_and_text(
        self,
        class_labels: ClassLabels,
        prompt: str | Sequence[str] | None,
        text: TextConditioning,
        negative_prompt: str | Sequence[str] | None,
        negative_text: TextConditioning,
    ) -> tuple[ClassCondition, TextCondition]:
        """Reads the conditions of all pipelines."""
        prompts = self._text_condition()
        classes = self._class_condition(self.unet.config).read(class_labels)
        return classes, prompts.read(prompt, text, negative_prompt, negative_text)

    def _class_condition(self, unet_config: Mapping[str, Any]) -> ClassCondition:
        num_classes = None if self.classifier is None else self.classifier.config.num_classes
        return ClassCondition(unet_config, id2label=self.id2label, num_classifier_classes=num_classes)

    def _text_condition(self) -> TextCondition:
        return TextCondition(self.unet.config, self.text_encoder, self.tokenizer)

    def _start(
        self,
        classes: ClassCondition,
        others: Sequence[Condition],
        steps: Steps,
        guidance: Guidance,
        samples: Samples,
        output: Output,
    ) -> Sampling:
        """
        Checks the arguments of a call, draws its noise, prepares its conditions and sets its timesteps. `classes` and
        `others` are its conditions, of which only `classes` is also used by classifier guidance.
        """
        # 1. check
        for runner in fast_network.runners(self.components):
            runner.refresh()
        conditions = [classes, *others]
        unet, device, pixels = self.unet.config, self._execution_device, self.vae_scale_factor
        steps.check(self.scheduler)
        guidance.check(conditions)
        output.check(self.image_format, self.config.image_format is not None, self._callback_tensor_inputs)
        num_prompts = number_of_prompts(conditions, samples.batch_size)
        check_integer("num_images_per_prompt", samples.num_images_per_prompt, 1)
        num_images = num_prompts * samples.num_images_per_prompt
        height, width = self._size(samples, conditions)
        is_of_image = any(condition.image_size == (height, width) for condition in conditions)
        samples.check_size(height, width, pixels, 2 ** (len(unet.block_out_channels) - 1), is_of_image)
        size = (height // pixels, width // pixels)
        shape = (num_images, self.sample_channels, *size)
        samples.check_numbers(shape, self._inverts)
        check_elements(f"{num_images} images of {height} x {width} pixels", math.prod(shape) * pixels**2)
        for condition in conditions:
            condition.check_size((height, width), size)
        guidance.check_classifier(self.classifier, classes, self.scheduler, steps.eta, size)
        guidance.check_functions(self.scheduler, steps.eta)

        # 2. timesteps, noise, conditions
        state = self._latest_call = CallState(guidance.scale)
        scheduler = copy_for_call(self.scheduler, samples.generator, num_images)
        timesteps = steps.set_timesteps(scheduler, device)
        state.num_timesteps = len(timesteps)
        # A thousand roundings of the sample to bfloat16 would add up: whatever the dtype of the network, the sample and
        # the noise are float32 at least.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        noise = torch.empty(shape, device=device, dtype=dtype)  # drawn below
        call = SamplingCall(
            num_prompts, size, scheduler, samples.generator, noise, self.unet.dtype, guidance_scale=guidance.scale
        )
        for condition in conditions:
            condition.before_noise(call)
        call.noise = call.draw_noise(shape) if samples.latents is None else samples.latents.to(noise)
        merged = MergedConditions(conditions, call)
        steering = None
        if guidance.steers:
            functions = list(guidance.functions)
            if guidance.classifier_scale != 0.0:
                functions.insert(0, ClassifierGuidance(self.classifier, guidance.classifier_scale))
            given = [condition.for_guidance(call) for condition in conditions]
            steering = Steering(functions, call, {name: entry for part in given for name, entry in part.items()})

        # 3. warn, once each, of arguments without effect although one may have been intended
        may_guide = guidance.scale != 1.0 or output.callback is not None
        for condition in conditions:
            self._warn_once(condition.without_effect(len(timesteps), may_guide, guidance.steers))
        self._warn_once(guidance.without_effect(len(timesteps), may_guide))
        if self.vae is not None and scheduler.config.get("clip_sample"):
            self._warn_once(
                [
                    "The scheduler clips the predicted x_0 (`clip_sample` in its config), which is meant for pixels: "
                    "latents exceed this range, and the images lose contrast and shape. Set `clip_sample=False`, e.g. "
                    "`pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)`."
                ]
            )
        if output.output_type == "pil" and self.image_format.loses_depth_in_pil:
            self._warn_once(
                [
                    f"The model has {self.image_format}, but Pillow's colours have 8 bits: `output_type='pil'` reduces "
                    "them. Pass `output_type='np'` or `output_type='pt'` for all bits."
                ]
            )
        step_kwargs = steps.step_kwargs(scheduler, samples.generator)
        return Sampling(state, call, timesteps, step_kwargs, merged, guidance, output, steering)

    def _size(self, samples: Samples, conditions: list[Condition]) -> tuple[int | None, int | None]:
        """Height and width of the images in pixels: as asked for, or the U-Net's, or that of given images."""
        made_for = as_size(self.unet.config.sample_size) or (None, None)
        given = next((condition.image_size for condition in conditions if condition.image_size), (None, None))

        def choose(asked: int | None, own: int | None, other: int | None) -> int | None:
            if asked is not None:
                return asked
            return other if own is None else own * self.vae_scale_factor

        height, width = map(choose, (samples.height, samples.width), made_for, given)
        return height, width

    def _warn_once(self, messages: list[str]) -> None:
        """Logs warnings, each once for a pipeline, which is often called in a loop."""
        for message in messages:
            if message not in self._warned:
                self._warned.add(message)
                logging.getLogger(__name__).warning(message)

    def _denoise(self, sampling: Sampling, latents: torch.Tensor) -> torch.Tensor:
        """Denoises noise, scaled for the scheduler, to samples."""
        with self._running(sampling.state) as progress_bar:
            for index in range(len(sampling.timesteps)):
                if sampling.state.interrupt:
                    continue
                step = sampling.step(index)
                latents = sampling.take(self._predict(sampling, latents, step), latents, step)
                latents = self._call_back(sampling.output, index, step.timestep, latents)
                progress_bar.update()
        sampling.finish()
        return latents

    def _predict(self, sampling: Sampling, latents: torch.Tensor, step: Step) -> GuidedPrediction:
        r"""
        The guided prediction for one step.

        Args:
            sampling (`Sampling`), step (`Step`): The call and its step.
            latents (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): x_t as the scheduler
                scales it.
        """
        scaled_latents = sampling.call.scheduler.scale_model_input(latents, step.timestep)
        if sampling.steering is None or not sampling.guidance.is_on(step):
            return GuidedPrediction(self._run_unet(sampling, scaled_latents, step))
        return sampling.steering.steer(lambda x_t: self._run_unet(sampling, x_t, step), scaled_latents, step)

    def _run_unet(self, sampling: Sampling, scaled_latents: torch.Tensor, step: Step) -> torch.Tensor:
        """The output of the network with classifier-free guidance, as the scheduler takes it; see `_predict`."""
        guidance, channels = sampling.guidance, self.sample_channels
        # A callback may have changed it, also from or to "off".
        guidance_scale = sampling.state.guidance_scale
        if not guidance.is_on(step) or guidance_scale == 1.0 or sampling.conditions.unconditional is None:
            model_output = self._run_passes(sampling, scaled_latents, step, "conditional")
        else:
            passes = self._guidance_passes
            # Compiled code is for one batch size, also of steps without guidance.
            if passes == "auto" and fast_network.runners({"unet": self.unet}):
                passes = "separate"
            if joins_passes(passes, scaled_latents):
                uncond, cond = self._run_passes(sampling, scaled_latents, step, "both").chunk(2)
            else:
                uncond = self._run_passes(sampling, scaled_latents, step, "unconditional")
                cond = self._run_passes(sampling, scaled_latents, step, "conditional")
            mean = guide(cond[:, :channels], uncond[:, :channels], guidance_scale, guidance.rescale)
            model_output = torch.cat([mean, cond[:, channels:]], dim=1)
        return model_output if takes_variance(sampling.call.scheduler) else model_output[:, :channels]

    def _run_passes(self, sampling: Sampling, scaled_latents: torch.Tensor, step: Step, passes: Passes) -> torch.Tensor:
        """One run of the network; see `_predict`. Its output has twice the rows for `"both"` passes."""
        model_input = torch.cat([scaled_latents] * 2) if passes == "both" else scaled_latents
        extra_channels = sampling.conditions.inputs(passes).extra_channels
        if extra_channels is not None:
            model_input = torch.cat([model_input, extra_channels], dim=1)
        model_input = model_input.to(self.unet.dtype)
        kwargs = sampling.conditions.kwargs_at(model_input, step, passes)
        return self.unet(model_input, step.timestep, **kwargs).sample.to(sampling.call.noise.dtype)

    def _call_back(self, output: Output, index: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Calls the user's callback; returns the sample, which it may have replaced."""
        if output.callback is None:
            return latents
        tensors = {"latents": latents} if "latents" in output.callback_inputs else {}
        returned = output.callback(self, index, t, tensors)
        if not isinstance(returned, dict):
            raise TypeError(
                f"`callback_on_step_end` returned {describe(returned)}; it must return its `callback_kwargs`, a "
                "dictionary, with other `latents` or as they are."
            )
        return returned.pop("latents", latents)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Samples as images of `output_type`."""
        return self._convert(latents if output_type == "latent" else self._to_pixels(latents), output_type)

    def _to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Samples as images, about [-1, 1]."""
        return latents if self.vae is None else LatentSpace(self.vae).decode(latents)

    def _convert(self, pixels: torch.Tensor, output_type: str) -> Any:
        """Images in [-1, 1], or samples, as `output_type`."""
        if output_type == "latent":
            return pixels
        if output_type in ("pil", "np"):  # tensors may stay on the device, which nothing has to wait for
            self._check_finite(pixels, output_type)
        if output_type == "pil":
            # 8-bit numbers have no NaN, and NumPy's conversion of it depends on the processor. Infinity is clamped.
            pixels = pixels.nan_to_num(nan=-1.0, posinf=math.inf, neginf=-math.inf)
        fractions = self.image_processor.postprocess(pixels, output_type="pt")
        if output_type == "pil":
            return to_pil(fractions, self.image_format)
        images = as_outputs(fractions, self.image_format)
        return to_numpy(images) if output_type == "np" else images

    def _check_finite(self, images: torch.Tensor, output_type: str) -> None:
        """
        Warns of images with values that are not finite, at every call. Raises a `ValueError` if nothing is left for
        Pillow to show but black. Waits for the device once.
        """
        numbers = not_finite(images)
        if numbers:
            networks = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
            if output_type == "pil" and not images.isfinite().any():
                raise ValueError(f"No value of the images is finite. {explain_not_finite(networks)}")
            logging.getLogger(__name__).warning(
                f"{len(numbers)} of {len(images)} images hold values that are not finite (numbers "
                f"{', '.join(map(str, numbers[:10]))}{', ...' if len(numbers) > 10 else ''}). With `output_type='pil'` "
                f"these pixels are black. {explain_not_finite(networks)}"
            )

    def _finish(self, images: Any, return_dict: bool) -> ImagePipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_components(self) -> None:
        """Raises a `ValueError` for components that are incompatible with each other."""
        check_scheduler(self.scheduler)
        unet, channels = self.unet.config, self.sample_channels
        if unet.out_channels not in (channels, 2 * channels):
            # More input channels than those of the mean, which may be half of the output, are those of a condition.
            has_more = unet.in_channels > unet.out_channels // 2
            may_inpaint = (sample_channels_of(unet) or channels) < channels
            raise ValueError(
                f"`unet` has `in_channels={unet.in_channels}` and `out_channels={unet.out_channels}`. "
                f"`{type(self).__name__}` needs as many output channels as a sample has, {channels}, or twice as many "
                "for a learned variance."
                + " If it inpaints, load it with `ADMInpaintPipeline`." * may_inpaint
                + (
                    " If its other input channels are those of an image to start from, load it with "
                    "`ADMImageToImagePipeline`."
                )
                * has_more
            )
        check_variance(self.scheduler, unet, channels)
        latent_space = None if self.vae is None else LatentSpace(self.vae)  # which checks the scaling factor
        if latent_space is not None and latent_space.channels != channels:
            raise ValueError(
                f"`vae` has latents of {latent_space.channels} channels, but `unet` has `in_channels="
                f"{unet.in_channels}`, for samples of {channels}. Use a U-Net that was trained on the latents of this "
                "autoencoder."
            )
        image_format = self.image_format  # checks the entry of the config
        if self.text_encoder is not None:
            self._check_text_encoder()
        if self.classifier is not None:
            check_classifier(self.classifier, unet)
            if self.config.image_format is not None:
                check_format_of_classifier(self.classifier, image_format)

    def _check_text_encoder(self) -> None:
        check_text_encoder(self.text_encoder, self.tokenizer, self.unet.config)
