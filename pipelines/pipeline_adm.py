"""
ADMPipeline: draws images from an ablated diffusion model, unconditionally or by class.

Classifier-free guidance (Ho & Salimans 2022, https://huggingface.co/papers/2207.12598) through a null class, its
rescaling (Lin et al. 2023, https://huggingface.co/papers/2305.08891, section 3.4) and its limitation to an interval of
the steps (Kynkäänniemi et al. 2024, https://huggingface.co/papers/2404.07724).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


OutputType = Literal["pil", "np", "pt", "latent"]
DEFAULT_NUM_INFERENCE_STEPS = 50

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
DDPM_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    r"""
    `uncond + scale * (cond - uncond)`: a scale of 1 is `cond`, 0 is `uncond`, more than 1 is classifier-free guidance.

    Args:
        cond, uncond (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Predictions with and without
            the class.
        scale (`float`): Strength.
        rescale (`float`, defaults to 0.0): Share in the result of a copy that is scaled, by example, to the standard
            deviation of `cond`, against overexposure (Lin et al. 2023, eqs. 15 and 16).
    """
    guided = uncond + scale * (cond - uncond)
    if rescale > 0:
        std_cond, std_guided = (x.std(dim=(1, 2, 3), keepdim=True) for x in (cond, guided))
        # An untrained model predicts 0 everywhere, whose standard deviation nothing can be divided by.
        ratio = std_cond / std_guided.clamp(min=torch.finfo(std_guided.dtype).tiny)
        guided = rescale * guided * ratio + (1 - rescale) * guided
    return guided


class ADMPipeline(DiffusionPipeline):
    r"""
    Draws images from an ablated diffusion model, unconditionally or by class, with classifier-free guidance.

    Args:
        unet (`AdaGNUNet2DModel` or [`UNet2DModel`]): Predicts the noise, and with twice the channels of its input a
            variance as well.
        scheduler ([`SchedulerMixin`]): `LearnedVarianceDDPMScheduler`, or a scheduler of diffusers made with
            `from_config` (docs/samplers.md compares them). Only the former and `DDPMScheduler` with
            `variance_type="learned_range"` use a learned variance; the others get the mean channels alone. One that
            has inherited a learned `variance_type` and would cut the channels itself is copied for each call, and so is
            `DPMSolverSDEScheduler`: `pipe.scheduler.timesteps` is then not what was stepped through.
        vae, text_encoder, tokenizer, classifier: Not supported yet. Pass `None`.
        id2label (`dict[int, str]`, *optional*): Names of the classes, saved with the pipeline.

    Raises:
        ValueError: If `vae`, `text_encoder`, `tokenizer` or `classifier` is not `None`, just one of `unet` and
            `scheduler` has a learned variance, or `scheduler` cannot reverse the process of such a network.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["vae", "text_encoder", "tokenizer", "classifier"]
    _callback_tensor_inputs = ["latents"]

    # None of these has a default: with one, `DiffusionPipeline.from_pretrained(..., classifier=None)` would load the
    # repository's classifier all the same. The class of the U-Net is added to the hints when the package is imported,
    # because this file also has to work without it.
    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None,
        text_encoder: torch.nn.Module | None,
        tokenizer: object | None,
        classifier: ModelMixin | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        optional = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "classifier": classifier}
        for name, component in optional.items():
            if component is not None:
                raise ValueError(
                    f"`{name}` is a {type(component).__name__}, but `ADMPipeline` does not support a {name} yet. Pass "
                    f"`{name}=None`."
                )
        self.register_modules(unet=unet, scheduler=scheduler, **optional)
        if id2label is not None:
            id2label = {str(label): name for label, name in id2label.items()}  # as JSON gives them back
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._check_components()

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes; `None` where the pipeline knows none."""
        names = self.config.id2label
        return None if names is None else {int(label): name for label, name in names.items()}

    @property
    def guidance_scale(self) -> float:
        """Strength of the classifier-free guidance in the latest call; 1.0 is off."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `pipe._interrupt = True` ends the sampling after the current step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        *,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        timestep_respacing: str | int | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws a batch of images.

        Args:
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): Classes to draw, by number or by
                name (see `pipe.id2label`): one for all images, or one for each image, whose number is then that of the
                images. `None`: the null class of a model that has one, no class for an unconditional model.
            batch_size (`int`, defaults to 1): Number of images. Need not be given where `class_labels` holds one label
                for each image; where both are given they must agree.
            num_inference_steps (`int`, defaults to 50): Number of steps, chosen by the scheduler's `timestep_spacing`.
            timestep_respacing (`str`, `int` or list of `int`, *optional*): The published forms `"250"`, `"ddim50"`,
                `"10,10,15"`, in place of `num_inference_steps`; with `LearnedVarianceDDPMScheduler`.
            guidance_scale (`float`, defaults to 1.0): `uncond + guidance_scale * (cond - uncond)` takes the place of
                the predicted mean; 1.0 is off. It needs `class_labels` and a model with a null class. The variance is
                that of the conditional prediction.
            guidance_rescale (`float`, defaults to 0.0): In [0, 1], for guided steps; pulls the standard deviation of
                the guided prediction towards that of the conditional one.
            guidance_start, guidance_end (`float`, default to 0.0 and 1.0): Fractions of the steps between which
                guidance acts. Step `i` of `n` is guided if `guidance_start <= i / n` and `(i + 1) / n <= guidance_end`.
            eta (`float`, *optional*): Noise of DDIM steps, from 0 (deterministic) to 1 (as much as DDPM). `None`:
                ancestral steps with `LearnedVarianceDDPMScheduler`, the scheduler's own default elsewhere.
            height, width (`int`, *optional*): Of the images, divisible by the total downsampling of the U-Net. `None`:
                its `sample_size`.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise; with one for each image, an
                image does not depend on the batch it is drawn in. Generators on the CPU give the same noise on every
                device.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*): Standard normal
                noise to start from instead of drawing it.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"`: `(batch_size, height, width, channels)` in
                [0, 1]; `"pt"`: `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: the last sample as it
                is, about [-1, 1].
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each step as `callback(pipe, step, timestep,
                callback_kwargs)`; `latents` in the dictionary it returns replaces the sample. It may set
                `pipe._guidance_scale` for the steps that follow, if there are `class_labels` and a null class.
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): What `callback_kwargs`
                holds, out of `pipe._callback_tensor_inputs`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that do not fit each other, the model or the scheduler; before any work is done.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. check
        default_height, default_width = self._default_size()
        height, width = default_height if height is None else height, default_width if width is None else width
        class_labels, batch_size = self._prepare_class_labels(class_labels, batch_size)
        self.check_inputs(
            class_labels=class_labels,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            timestep_respacing=timestep_respacing,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            eta=eta,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device
        # A thousand roundings of the sample to bfloat16 would add up: whatever the dtype of the network, the sample and
        # the noise are float32 at least.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)

        # 2. timesteps
        scheduler = self._scheduler_for_call(generator, batch_size)
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
        self._num_timesteps = len(timesteps)
        step_kwargs = self._step_kwargs(scheduler, generator, eta)

        # 3. noise
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device=device, dtype=dtype) * scheduler.init_noise_sigma

        # 4. classes; the null class goes first where guidance needs both
        all_labels, null_class_id = None, self.unet.config.get("null_class_id")
        if class_labels is not None:
            class_labels = class_labels.to(device)
            if null_class_id is not None:
                all_labels = torch.cat([torch.full_like(class_labels, null_class_id), class_labels])

        # 5. denoise
        channels = self.unet.config.in_channels
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                started, ended = i / self._num_timesteps >= guidance_start, (i + 1) / self._num_timesteps > guidance_end
                model_input = scheduler.scale_model_input(latents, t).to(self.unet.dtype)
                # A callback may have changed it, also from or to "off".
                guidance_scale = self._guidance_scale
                if guidance_scale != 1.0 and all_labels is not None and started and not ended:
                    model_output = self.unet(torch.cat([model_input] * 2), t, class_labels=all_labels).sample
                    uncond, cond = model_output.to(dtype).chunk(2)
                    mean = guide(cond[:, :channels], uncond[:, :channels], guidance_scale, guidance_rescale)
                    model_output = torch.cat([mean, cond[:, channels:]], dim=1)
                else:
                    model_output = self.unet(model_input, t, class_labels=class_labels).sample.to(dtype)
                if not self._takes_variance(scheduler):
                    model_output = model_output[:, :channels]

                latents = scheduler.step(model_output, t, latents, **step_kwargs).prev_sample

                if callback_on_step_end is not None:
                    callback_kwargs = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = outputs.pop("latents", latents)
                progress_bar.update()

        # 6. decode
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def check_inputs(
        self,
        class_labels: torch.Tensor | None,
        batch_size: int,
        num_inference_steps: int,
        timestep_respacing: str | int | Sequence[int] | None,
        guidance_scale: float,
        guidance_rescale: float,
        guidance_start: float,
        guidance_end: float,
        eta: float | None,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises a `ValueError` for what `__call__` could not do. `class_labels`: one for each image, or `None`."""
        self._check_components()
        config, scheduler = self.unet.config, type(self.scheduler).__name__

        # steps
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
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
            if eta < 0:
                raise ValueError(
                    f"`eta` is {eta}; it must not be negative (0: deterministic, 1: as much noise as DDPM)."
                )
            if eta > 1 and scheduler == "TCDScheduler":
                raise ValueError(f"`eta` is {eta}; a TCDScheduler takes 0 (deterministic) to 1 (all noise is new).")

        # guidance
        if guidance_scale != 1.0:
            if config.get("null_class_id") is None:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but this model has no null class (`null_class_id` in its "
                    "config) to guide away from. Leave it at 1.0, or train a model with class dropout."
                )
            if class_labels is None:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but there are no `class_labels` to guide towards. Pass "
                    "them, or leave `guidance_scale` at 1.0."
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
        factor = 2 ** (len(config.block_out_channels) - 1)
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}; both must be positive and divisible by {factor}, the "
                "total downsampling of this model."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} images. Pass one generator for each "
                "image, or a single one."
            )
        shape = (batch_size, config.in_channels, height, width)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but `batch_size`, `height` and `width` ask for {shape}."
            )

        # output
        if output_type not in get_args(OutputType):
            raise ValueError(f"`output_type` is {output_type!r}; it must be one of {list(get_args(OutputType))}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; it may hold {self._callback_tensor_inputs}."
            )

    def _check_components(self) -> None:
        """Raises a `ValueError` for a scheduler that does not fit, or where just one of the two learned a variance."""
        self._check_scheduler()
        config, scheduler = self.unet.config, type(self.scheduler).__name__
        variance_type = self.scheduler.config.get("variance_type")
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"`unet` has `in_channels={config.in_channels}` and `out_channels={config.out_channels}`. "
                "`ADMPipeline` needs as many output as input channels, or twice as many for a learned variance."
            )
        learned = config.out_channels == 2 * config.in_channels
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
                f"a model with `out_channels={2 * config.in_channels}`."
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
        if name in UNSUITABLE_SCHEDULERS:
            raise ValueError(f"`scheduler` is a {name}, which `ADMPipeline` cannot use: {UNSUITABLE_SCHEDULERS[name]}")
        if type(self.scheduler).__module__.startswith("diffusers.") and "beta_schedule" not in options:
            raise ValueError(
                f"`scheduler` is a {name}, which `ADMPipeline` cannot use: it has no `beta_schedule`, so it does not "
                "reverse the process that these networks are trained on, but another one (flow matching, EDM, "
                "consistency models, discrete tokens, ...). Take one that does, such as `DDIMScheduler`, "
                "`DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`, with `from_config`."
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

    def _scheduler_for_call(
        self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int
    ) -> SchedulerMixin:
        """
        The pipeline's scheduler, or a copy of it with what one call needs: solvers that inherited a learned
        `variance_type` by `from_config` cut the first three channels out of what they get, whatever it is, so their
        copy has `variance_type=None`; `DPMSolverSDEScheduler` takes a seed for each image in place of a generator.
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
        return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler

    @staticmethod
    def _step_kwargs(
        scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict:
        """Those of `generator` and `eta` that the scheduler draws noise with; deterministic ones know neither."""
        parameters = inspect.signature(scheduler.step).parameters
        kwargs = {"generator": generator} if "generator" in parameters else {}
        return kwargs if eta is None else {**kwargs, "eta": eta}

    def _default_size(self) -> tuple[int | None, int | None]:
        sample_size = self.unet.config.sample_size
        if sample_size is None or isinstance(sample_size, int):
            return sample_size, sample_size
        return tuple(sample_size)

    def _prepare_class_labels(
        self, class_labels: int | str | Sequence[int | str] | torch.Tensor | None, batch_size: int
    ) -> tuple[torch.Tensor | None, int]:
        """Checked labels, one for each image and where they came from (or `None`), and the number of images."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}; pass an integer of at least 1.")
        config = self.unet.config
        embed_type, num_classes = config.get("class_embed_type"), config.get("num_class_embeds")
        is_conditional = embed_type is not None or num_classes is not None
        if class_labels is None:
            if is_conditional and config.get("null_class_id") is None:
                raise ValueError(
                    "`class_labels` are missing: this model is class-conditional and its config names no "
                    "`null_class_id`. Pass one label, or one for each image."
                )
            return None, batch_size
        if not is_conditional:
            raise ValueError(
                f"`class_labels` is {class_labels}, but this model is unconditional. Leave them out, or use a model "
                "with `num_class_embeds`."
            )

        if isinstance(class_labels, str):
            class_labels = self._label_number(class_labels)
        elif isinstance(class_labels, (list, tuple)):
            class_labels = [self._label_number(c) if isinstance(c, str) else c for c in class_labels]
        class_labels = torch.as_tensor(class_labels)
        if class_labels.ndim == 0:
            class_labels = class_labels.expand(batch_size)
        if class_labels.ndim != (2 if embed_type == "identity" else 1) or len(class_labels) == 0:
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)}; pass one "
                f"{'embedding' if embed_type == 'identity' else 'label'} for each image."
            )
        if batch_size not in (1, len(class_labels)):
            raise ValueError(
                f"`class_labels` holds {len(class_labels)} labels, but `batch_size` is {batch_size}. Leave "
                "`batch_size` out to draw one image for each label, or pass an `int` to draw all images of one class."
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
        return class_labels, len(class_labels)

    def _label_number(self, name: str) -> int:
        numbers = {known: label for label, known in (self.id2label or {}).items()}
        if name not in numbers:
            raise ValueError(
                f"`class_labels` holds {name!r}, but the classes of this pipeline are {list(numbers) or 'not named'}. "
                "Pass one of them, or the number of a class."
            )
        return numbers[name]
