"""
ADMControlNetPipeline: draws images that follow other ones, such as edges or regions, with an ablated diffusion model
and ControlNets beside it (Zhang et al. 2023, https://huggingface.co/papers/2302.05543).

Several of them add up (section 3.4 of the paper). Guess mode is not in the paper, but in the authors' code and in
diffusers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from diffusers_adm.conditioning.image_inputs import ImageInput, read_conditions
from diffusers_adm.pipelines.pipeline_adm import DEFAULT_NUM_INFERENCE_STEPS, ADMPipeline, Denoising, OutputType
from diffusers_adm.schedulers.noise_schedules import check_same_noise


@dataclass
class ControlledDenoising(Denoising):
    """
    What a call has settled before its first step, that of its ControlNets included: lists have one entry for each.

    Attributes:
        conditions (list of `torch.Tensor` of shape `(num_images, conditioning_channels, image height, image width)`):
            In [0, 1], on the device and in the dtype of the networks.
        control_scales, control_starts, control_ends (list of `float`): How much a ControlNet adds, and between which
            fractions of the steps.
        guess_mode (`bool`): Whether they see the conditional pass alone.
    """

    conditions: list[torch.Tensor]
    control_scales: list[float]
    control_starts: list[float]
    control_ends: list[float]
    guess_mode: bool


class ADMControlNetPipeline(ADMPipeline):
    r"""
    Draws images that follow other ones, such as edges or regions, which ControlNets tell the U-Net of. By class, by
    prompt, by both or by neither, guided like [`ADMPipeline`].

    Args:
        unet (`AdaGNUNet2DModel` or [`UNet2DConditionModel`]): As of [`ADMPipeline`]; takes the channels of a sample.
        scheduler ([`SchedulerMixin`]), vae ([`AutoencoderKL`], *optional*), text_encoder
            ([`~transformers.PreTrainedModel`], *optional*), tokenizer ([`~transformers.PreTrainedTokenizerBase`],
            *optional*), classifier (`AdaGNClassifierModel`, *optional*): As of [`ADMPipeline`].
        controlnet (`AdaGNControlNetModel`, list of them or `AdaGNMultiControlNetModel`): One ControlNet or several,
            which were made for `unet`. What several give is added up.
        id2label (`dict[int, str]`, *optional*): As of [`ADMPipeline`].

    Raises:
        ValueError: For components that do not fit each other, as by [`ADMPipeline`]; for a ControlNet that was made for
            another U-Net, for images of another size or another noise schedule; for a U-Net that takes no ControlNet,
            or more channels than a sample has (an upsampler or inpainter).
    """

    # `controlnet` is left out of `model_cpu_offload_seq`: like a classifier, it takes turns with the U-Net.

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: torch.nn.Module | None,
        tokenizer: object | None,
        classifier: ModelMixin | None,
        controlnet: ModelMixin | list[ModelMixin] | tuple[ModelMixin, ...],
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        if isinstance(controlnet, (list, tuple)):
            self._check_kind(controlnet)
            first, *others = controlnet
            controlnet = first.join(*others)  # of its own module: this one's file has no network of ours in it
        # First, because all components are checked against each other at the end of the other constructor.
        self.register_modules(controlnet=controlnet)
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label)

    @torch.no_grad()
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws a batch of images that follow others.

        Args:
            prompt (`str` or list of `str`, *optional*): What to draw, as in [`ADMPipeline`].
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): What to
                follow, such as edges; it must be given, by position or by name. One image for all that are drawn, or
                one for each: arrays `(height, width, channels)` and tensors `(channels, height, width)` in [0, 1] or of
                `uint8`, with a batch dimension in front or without. Of the size that is drawn, also where a `vae`
                decodes the samples; nothing is resized. With several ControlNets a list with one entry for each of
                them, which is one image, a batch or a list of images.
            class_labels (`int`, `str`, list of them or `torch.Tensor`, *optional*): What to draw, as in
                [`ADMPipeline`].
            batch_size (`int`, defaults to 1): Number of different images. Need not be given where `image`, `prompt` or
                `class_labels` holds one entry for each; all that are given must agree.
            num_images_per_prompt (`int`, defaults to 1): How often each of these is drawn, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*),
                guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0): As in [`ADMPipeline`]. With and without class or prompt, the ControlNets see `image`.
            controlnet_conditioning_scale (`float` or list of `float`, defaults to 1.0): What a ControlNet gives is
                multiplied by this before the U-Net adds it; one for all ControlNets, or one for each. A ControlNet with
                0.0 does not run.
            guess_mode (`bool`, defaults to `False`): What a ControlNet gives is scaled from 0.1 at the first skip
                connection to 1.0 in the middle, and in guided steps the unconditional pass gets none of it: images then
                follow `image` also with an empty prompt (`prompt=""`). Goes with a `guidance_scale` of 3 to 5. Always
                on for ControlNets with `global_pool_conditions`, whose residuals are not scaled.
            control_guidance_start (`float` or list of `float`, defaults to 0.0), control_guidance_end (`float` or list
                of `float`, defaults to 1.0): Fractions of the steps between which a ControlNet runs, for all or for
                each; counted as `guidance_start` and `guidance_end`.
            negative_prompt (`str` or list of `str`, *optional*), eta (`float`, *optional*): As in [`ADMPipeline`].
            height, width (`int`, *optional*): Of the images, in pixels. `None`: those that the U-Net was made for
                (`sample_size`, times what the `vae` enlarges), or those of `image` where it does not say.
            generator (`torch.Generator` or list of them, *optional*), latents (`torch.Tensor` of shape `(number of
                images, channels, height, width)`, *optional*), prompt_embeds, negative_prompt_embeds (`torch.Tensor` of
                shape `(number of prompts, length, width)`, *optional*), prompt_attention_mask,
                negative_prompt_attention_mask (`torch.Tensor` of shape `(number of prompts, length)`, *optional*),
                pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(number of prompts,
                width)`, *optional*), output_type (`str`, defaults to `"pil"`), return_dict (`bool`, defaults to
                `True`), callback_on_step_end (`Callable`, *optional*), callback_on_step_end_tensor_inputs (sequence of
                `str`, defaults to `("latents",)`): As in [`ADMPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that do not fit each other, the model or the scheduler; before any work is done.
        """
        # 1. check
        self._check_controlnet()
        self._check_dtype()
        conditions = self._read_conditions(image)
        height, width = self._check_sizes(conditions, height, width)
        scales = self._one_for_each_net(controlnet_conditioning_scale, "controlnet_conditioning_scale")
        starts = self._one_for_each_net(control_guidance_start, "control_guidance_start")
        ends = self._one_for_each_net(control_guidance_end, "control_guidance_end")
        self._check_strengths(scales, starts, ends)
        lengths = {self._name_of_image(i): len(condition) for i, condition in enumerate(conditions)}
        batch_size = self._check_numbers(lengths, batch_size, prompt, prompt_embeds, class_labels)

        # 2. encode, choose timesteps
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
        # Pooled residuals were trained to be left out of the unconditional pass, as in diffusers.
        guess_mode = guess_mode or self._nets[0].config.global_pool_conditions
        denoising = ControlledDenoising(
            **vars(denoising),
            conditions=[
                condition.to(denoising.device, self.unet.dtype).repeat_interleave(
                    denoising.num_images // len(condition), dim=0
                )
                for condition in conditions
            ],
            control_scales=scales,
            control_starts=starts,
            control_ends=ends,
            guess_mode=guess_mode,
        )
        self._warn_of_images_without_effect(denoising)

        # 3. noise, 4. denoise, 5. decode
        latents = self._draw_noise(denoising, latents) * denoising.scheduler.init_noise_sigma
        latents = self._denoise(denoising, latents, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._finish(self._decode(latents, output_type), return_dict)

    def _warn_of_images_without_effect(self, denoising: ControlledDenoising) -> None:
        """Warns, once each, of ControlNets that act in no step. (A scale of 0 says so itself.)"""
        num_steps = len(denoising.timesteps)
        intervals = zip(denoising.control_scales, denoising.control_starts, denoising.control_ends, strict=True)
        for i, (scale, start, end) in enumerate(intervals):
            if scale != 0.0 and not any(denoising.is_within(step, start, end) for step in range(num_steps)):
                self._warn_once(
                    f"`{self._name_of_image(i)}` has no effect: none of the {num_steps} steps lies within "
                    f"`control_guidance_start` {start} and `control_guidance_end` {end}. Make the interval longer, or "
                    "ask for more steps."
                )

    def _unet_kwargs(
        self,
        denoising: ControlledDenoising,
        model_input: torch.Tensor,
        index: int,
        t: torch.Tensor,
        runs_both: bool,
    ) -> dict[str, Any]:
        """The conditions, and what the ControlNets that act in this step make of them and the images to follow."""
        conditions = super()._unet_kwargs(denoising, model_input, index, t, runs_both)
        scales = [
            scale if denoising.is_within(index, start, end) else 0.0
            for scale, start, end in zip(
                denoising.control_scales, denoising.control_starts, denoising.control_ends, strict=True
            )
        ]
        if not any(scales):
            return conditions
        images, seen = denoising.conditions, conditions
        guesses = denoising.guess_mode and runs_both
        if guesses:
            model_input, seen = model_input.chunk(2)[1], denoising.conditional
        elif runs_both:
            images = [torch.cat([image] * 2) for image in images]
        several = self._has_several_nets
        down_residuals, mid_residual = self.controlnet(
            model_input,
            t,
            controlnet_cond=images if several else images[0],
            conditioning_scale=scales if several else scales[0],
            guess_mode=denoising.guess_mode,
            return_dict=False,
            **seen,
        )
        if guesses:  # the unconditional pass is the U-Net's alone
            down_residuals = [torch.cat([torch.zeros_like(x), x]) for x in down_residuals]
            mid_residual = torch.cat([torch.zeros_like(mid_residual), mid_residual])
        return {
            **conditions,
            "down_block_additional_residuals": tuple(down_residuals),
            "mid_block_additional_residual": mid_residual,
        }

    @property
    def _has_several_nets(self) -> bool:
        """Whether `controlnet` is an `AdaGNMultiControlNetModel`, which takes lists."""
        return hasattr(self.controlnet, "nets")

    @property
    def _nets(self) -> list[ModelMixin]:
        return list(self.controlnet.nets) if self._has_several_nets else [self.controlnet]

    def _name_of_image(self, number: int) -> str:
        """What the argument for one of the ControlNets is called in messages."""
        return f"image[{number}]" if self._has_several_nets else "image"

    def _how_many_nets(self) -> str:
        number = len(self._nets)
        return f"this pipeline has {number} ControlNet{'s' if number != 1 else ''}"

    def _read_conditions(self, image: ImageInput | Sequence[ImageInput] | None) -> list[torch.Tensor]:
        """One batch for each ControlNet; raises a `ValueError` for anything else."""
        nets = self._nets
        if image is None:
            raise ValueError(
                "`image` is missing: pass what the images shall follow, as `pipe(prompt, image)` or by name, or draw "
                "without it with `ADMPipeline`."
            )
        if self._has_several_nets:
            if not isinstance(image, (list, tuple)) or len(image) != len(nets):
                got = f"holds {len(image)} entries" if isinstance(image, (list, tuple)) else "is no list"
                raise ValueError(
                    f"`image` {got}, but {self._how_many_nets()}. Pass a list with one entry for each of them: one "
                    "image, a batch or a list of images."
                )
            entries = list(image)
        else:
            if isinstance(image, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in image):
                raise ValueError(
                    f"`image` is a list of lists, as for several ControlNets, but {self._how_many_nets()}. Pass one "
                    "image, a batch or a list of images."
                )
            entries = [image]
        return [
            read_conditions(entry, self._name_of_image(i), net.config.conditioning_channels)
            for i, (entry, net) in enumerate(zip(entries, nets, strict=True))
        ]

    def _check_sizes(self, conditions: list[torch.Tensor], height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the images to draw; raises a `ValueError` unless all conditions have them."""
        height, width = self._size_to_draw(height, width, conditions[0])
        for i, condition in enumerate(conditions):
            given = tuple(condition.shape[2:])
            if given != (height, width):
                raise ValueError(
                    f"`{self._name_of_image(i)}` is {given[1]} x {given[0]} pixels (width x height), but {width} x "
                    f"{height} are drawn. Resize it, or pass `height={given[0]}` and `width={given[1]}` if the model "
                    "shall try that size."
                )
        return height, width

    def _one_for_each_net(self, values: float | Sequence[float], name: str) -> list[float]:
        """Raises a `ValueError` unless there is one number for all ControlNets, or one for each."""
        number = len(self._nets)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if not isinstance(value, Real):
                raise ValueError(f"`{name}` is {values!r}; pass a number, or a list with one for each ControlNet.")
        if not isinstance(values, (list, tuple)):
            return [float(values)] * number
        if len(values) != number:
            raise ValueError(
                f"`{name}` holds {len(values)} entries, but {self._how_many_nets()}. Pass one number for all of them, "
                "or a list with one for each."
            )
        return [float(value) for value in values]

    @staticmethod
    def _check_strengths(scales: list[float], starts: list[float], ends: list[float]) -> None:
        for scale in scales:
            if not math.isfinite(scale):
                raise ValueError(f"`controlnet_conditioning_scale` is {scale}; it must be a finite number.")
        for start, end in zip(starts, ends, strict=True):
            if not 0 <= start <= end <= 1:
                raise ValueError(
                    f"`control_guidance_start` is {start} and `control_guidance_end` is {end}; they are fractions of "
                    "the steps, so 0 <= control_guidance_start <= control_guidance_end <= 1 must hold."
                )

    def _check_dtype(self) -> None:
        """Raises a `ValueError` unless U-Net and ControlNets have the same. (`to` may follow construction.)"""
        for net in self._nets:
            if net.dtype != self.unet.dtype:
                raise ValueError(
                    f"`controlnet` is of {net.dtype}, but `unet` of {self.unet.dtype}. Load both with the same "
                    f"`dtype=`, or call `pipe.to({self.unet.dtype})`."
                )

    def _check_components(self) -> None:
        config = self.unet.config
        channels, out_channels = config.in_channels, config.out_channels
        # As many channels out as in could be samples of six channels; with a learned variance it is an upsampler.
        is_upsampler = channels == out_channels == 6 and self._takes_variance(self.scheduler)
        if out_channels not in (channels, 2 * channels) or is_upsampler:
            raise ValueError(
                f"`unet` has `in_channels={channels}` and `out_channels={out_channels}`: it takes more than a sample, "
                f"such as an upsampler or inpainter, and `{type(self).__name__}` has nothing to give it beside that. "
                "Run the networks by themselves: the U-Net's `forward` takes what the ControlNet's gives, as "
                "`down_block_additional_residuals` and `mid_block_additional_residual`."
            )
        super()._check_components()
        self._check_controlnet()

    @staticmethod
    def _check_kind(nets: Sequence[ModelMixin]) -> None:
        """Raises a `ValueError` unless all are `AdaGNControlNetModel`s, and there is one at least."""
        if not nets:
            raise ValueError("`controlnet` is an empty list; pass an `AdaGNControlNetModel`, or a list of them.")
        for net in nets:
            if not hasattr(net, "check_base") or hasattr(net, "nets"):
                raise ValueError(
                    f"`controlnet` is, or holds, a {type(net).__name__}; pass an `AdaGNControlNetModel`, a list of "
                    "them or one `AdaGNMultiControlNetModel`. Files of diffusers' `ControlNetModel` are loaded with "
                    "`AdaGNControlNetModel.from_pretrained`; without ControlNets `ADMPipeline` draws."
                )

    def _check_controlnet(self) -> None:
        """Raises a `ValueError` unless U-Net, autoencoder and ControlNets go together."""
        if isinstance(self.unet, UNet2DModel):
            raise ValueError(
                f"`unet` is a {type(self.unet).__name__}, which takes nothing from a ControlNet. Load it with "
                "`AdaGNUNet2DModel.from_pretrained`, which gives the same numbers."
            )
        # diffusers' `MultiControlNetModel` has `nets` as well, and does not hand on all that these take.
        self._check_kind(self._nets if hasattr(self.controlnet, "check_base") else [self.controlnet])
        pools = [net.config.global_pool_conditions for net in self._nets]
        if len(set(pools)) > 1:
            raise ValueError(
                f"The ControlNets have `global_pool_conditions` {pools}. Those that pool are left out of the "
                "unconditional pass and the others are not, so they cannot be used together."
            )
        for i, net in enumerate(self._nets):
            net.check_base(self.unet)
            name = f"ControlNet {i} (counted from 0)" if self._has_several_nets else "`controlnet`"
            check_same_noise(name, net.config.get("noise_schedule"), self.scheduler, net)
            if net.conditioning_factor != self.vae_scale_factor:
                raise ValueError(
                    f"`controlnet` takes images {net.conditioning_factor} times as large as the samples "
                    f"(`conditioning_downsampling_factor`), but those that this pipeline draws are "
                    f"{self.vae_scale_factor} times as large"
                    + (", as it has no `vae`" if self.vae is None else "")
                    + ". Both must be equal: make the ControlNet with `conditioning_downsampling_factor="
                    f"{self.vae_scale_factor}`."
                )
