"""
ADMInpaintPipeline: repaints the masked part of images with an ablated diffusion model.

With networks that were trained to inpaint (GLIDE, Nichol et al. 2021, https://huggingface.co/papers/2112.10741, section
4), or any others, by replacing what is known in each step and resampling (RePaint, Lugmayr et al. 2022,
https://huggingface.co/papers/2201.09865). From noise, or from the noised image (SDEdit, Meng et al. 2021,
https://huggingface.co/papers/2108.01073).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from diffusers_adm.conditioning.guidance import exact_prediction, signal_and_std
from diffusers_adm.conditioning.image_inputs import ImageInput, read_images, read_masks
from diffusers_adm.conditioning.inpainting import masked_image_channels, resampling_walk
from diffusers_adm.conditioning.low_resolution import upsample
from diffusers_adm.pipelines.pipeline_adm import DEFAULT_NUM_INFERENCE_STEPS, ADMPipeline, Denoising, OutputType


# Of models that were not trained to inpaint, where a call does not say it. The paper takes 10, at ten times the cost;
# docs/inpainting.md has what the first ones bring.
DEFAULT_JUMP_N_SAMPLE = 3
# Their first steps need what only the first timesteps of a chain give them.
SCHEDULERS_WITHOUT_STRENGTH = ("PNDMScheduler", "LMSDiscreteScheduler")


@dataclass
class KnownRegion:
    """
    What a call knows of its images, one row an image to draw.

    Attributes:
        images (`torch.Tensor` of shape `(num_images, image channels, image height, image width)`): In [0, 1], as given.
        known_pixels (`torch.Tensor` of shape `(num_images, 1, image height, image width)`): Of `bool`: kept.
        original (`torch.Tensor` of shape `(num_images, sample_channels, height, width)`): x_0, of the images.
        known (`torch.Tensor` of shape `(num_images, 1, height, width)`): Of `bool`: known of x_0.
        extra_channels (`torch.Tensor` of shape `(num_images, in_channels - sample_channels, height, width)`,
            *optional*): What the network sees behind x_t.
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): Of the scheduler, on the device.
        noise (`torch.Tensor`, *optional*): Of the shape of `original`: what stays the noise of the known part for
            schedulers that look back; `None`: it is drawn for each step.
    """

    images: torch.Tensor
    known_pixels: torch.Tensor
    original: torch.Tensor
    known: torch.Tensor
    extra_channels: torch.Tensor | None
    alphas_cumprod: torch.Tensor
    noise: torch.Tensor | None


class ADMInpaintPipeline(ADMPipeline):
    r"""
    Repaints the masked part of images, by class, by prompt, by both or by neither, guided like [`ADMPipeline`]. The
    rest of the images comes back exactly as it was.

    How follows from the channels that the U-Net takes, for samples of c channels (3 for RGB):
        c: any model of [`ADMPipeline`]. In each step the known part of x_t is replaced by the noised image, and with
            resampling (RePaint) steps are repeated, so that the new part has time to agree with the known one;
        2c + 1: trained to inpaint. It sees `[x_t, image * known, known]`;
        3c + 1: trained to enlarge and to inpaint. It sees `[x_t, image * known, known, low_res]`.
    Of the latter two the predicted x_0 is corrected in each step where it is known.

    Args:
        unet, scheduler, vae, text_encoder, tokenizer, classifier, id2label: As of [`ADMPipeline`].

    Raises:
        ValueError: For components that do not fit each other, as by [`ADMPipeline`]; for a U-Net of other channels.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    @property
    def sample_channels(self) -> int:
        """Channels of a sample."""
        return self._channel_layout()[0]

    @property
    def is_trained_to_inpaint(self) -> bool:
        """Whether the U-Net sees the mask."""
        return self.unet.config.in_channels > self.sample_channels

    @property
    def takes_low_res(self) -> bool:
        """Whether the U-Net sees a small image as well."""
        return self.unet.config.in_channels == 3 * self.sample_channels + 1

    @torch.no_grad()
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Repaints images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): One image for all that are
                drawn, or one for each: arrays `(height, width, channels)` and tensors `(channels, height, width)` in
                [0, 1] or of `uint8`, with a batch dimension in front or without. Of the size that is drawn; nothing is
                resized.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): White (1, 255) where
                the image is repainted, black where it is kept; what is at least half white counts as white. Of the size
                of `image`; one for all, or one for each. An all-white mask is plain sampling (nothing is replaced or
                resampled), an all-black one gives the image back.
            prompt (`str` or list of `str`, *optional*), class_labels (`int`, `str`, list of them or `torch.Tensor`,
                *optional*): What to draw, as in [`ADMPipeline`].
            strength (`float`, defaults to 1.0): In (0, 1]. 1.0 starts from noise. Less starts from the noised image,
                the masked part included, and takes the last `int(strength * num_inference_steps)` steps: the less, the
                more of it stays.
            jump_length (`int`, defaults to 5), jump_n_sample (`int`, *optional*): RePaint's resampling: at every
                `jump_length`-th step the sample is noised again by that many steps, until it went through them
                `jump_n_sample` times; 1 is off. It takes about `jump_n_sample` times as long. `None`: 3 for a model
                that was not trained to inpaint, with a scheduler that keeps nothing between its steps
                (`LearnedVarianceDDPMScheduler`, `DDPMScheduler`, `DDIMScheduler` and their parallel kin; the others
                cannot jump) and more steps than `jump_length`, else 1.
            low_res_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*): What a
                U-Net that enlarges shall enlarge: smaller images in the forms of `image`, one for all or one for each.
            batch_size (`int`, defaults to 1): Number of different images. Need not be given where `image`,
                `mask_image`, `low_res_image`, `prompt` or `class_labels` holds one entry for each; all that are given
                must agree.
            num_images_per_prompt (`int`, defaults to 1): How often each of these is drawn, one after the other.
            num_inference_steps (`int`, defaults to 50), timestep_respacing (`str`, `int` or list of `int`, *optional*):
                The steps of the whole chain, as in [`ADMPipeline`].
            guidance_scale (`float`, defaults to 1.0), guidance_rescale (`float`, defaults to 0.0), guidance_start
                (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0), classifier_guidance_scale (`float`,
                defaults to 0.0), negative_prompt (`str` or list of `str`, *optional*): Guidance, as in
                [`ADMPipeline`]. Fractions are of the steps that `strength` leaves, by their place in the chain.
            eta (`float`, *optional*): Noise of DDIM steps, as in [`ADMPipeline`].
            height, width (`int`, *optional*): Of the images, in pixels. `None`: those that the U-Net was made for
                (`sample_size`, times what the `vae` enlarges), or those of `image` where it does not say.
            generator (`torch.Generator` or list of them, *optional*): Source of all noise; one for all images, or one
                for each.
            latents (`torch.Tensor` of shape `(number of images, channels, height, width)`, *optional*): Standard
                normal noise to start from instead of drawing it.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(number of prompts, length, width)`,
                *optional*), prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(number of
                prompts, length)`, *optional*), pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of
                shape `(number of prompts, width)`, *optional*): Encoded prompts, as in [`ADMPipeline`].
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"`: `(batch_size, height, width, channels)` in
                [0, 1]; `"pt"`: `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: the last sample with the
                known part set to that of `image`, encoded where there is a `vae`. In the former three the known pixels
                are those of `image`, bit by bit (as float32; `uint8` values divided by 255).
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each evaluation of the network as
                `callback(pipe, number of the evaluation, timestep, callback_kwargs)`; otherwise as in [`ADMPipeline`].
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`): What `callback_kwargs`
                holds, out of `pipe._callback_tensor_inputs`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `.images`, or a tuple with them as its only entry.

        Raises:
            ValueError: For arguments that do not fit each other, the model or the scheduler; before anything is drawn.
        """
        # 1. check
        images = read_images(image, "image", self._image_channels)
        repainted = read_masks(mask_image, "mask_image")
        low_res = None if low_res_image is None else read_images(low_res_image, "low_res_image", self._image_channels)
        height, width = self._check_sizes(images, repainted, low_res, height, width)
        self._check_resampling(strength, jump_length, jump_n_sample)
        lengths = {"image": len(images), "mask_image": len(repainted)}
        lengths |= {} if low_res is None else {"low_res_image": len(low_res)}
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
        denoising = self._shorten(denoising, strength)
        is_anything_known = not bool(repainted.all())
        walk = self._choose_walk(denoising, jump_length, jump_n_sample, is_anything_known)
        self._warn_of_masks_without_effect(repainted, strength, jump_n_sample)
        denoising.state.num_timesteps = len(walk)

        # 3. noise
        noise = self._draw_noise(denoising, latents)
        region = self._prepare_region(denoising, images, repainted, low_res, num_images_per_prompt, noise)
        if strength == 1.0:
            latents = noise * denoising.scheduler.init_noise_sigma
        else:
            latents = self._noised_original(denoising, region, noise, denoising.timesteps[0])

        # 4. denoise
        replaces = is_anything_known and not self.is_trained_to_inpaint
        position = 0  # of the step that `latents` are noisy for
        with self._running(denoising) as progress_bar:
            for evaluation, index in enumerate(walk):
                if denoising.state.interrupt:
                    continue
                t = denoising.timesteps[index]
                if index < position:
                    latents = self._jump(denoising, region, latents, position, index)
                if replaces:
                    noise = self._draw_noise(denoising) if region.noise is None else region.noise
                    noised_original = self._noised_original(denoising, region, noise, t)
                    latents = torch.where(region.known, noised_original, latents)
                model_output, steering = self._predict(denoising, latents, index, t, region.extra_channels)
                if self.is_trained_to_inpaint:
                    model_output = self._correct(denoising, region, model_output, latents, t)
                    # The mean of known pixels is known, too: there is nothing to steer.
                    steering = {name: gradient.masked_fill(region.known, 0) for name, gradient in steering.items()}
                latents = denoising.scheduler.step(
                    model_output, t, latents, **denoising.step_kwargs, **steering
                ).prev_sample
                position = index + 1
                latents = self._call_back(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, evaluation, t, latents
                )
                progress_bar.update()

        # 5. decode
        return self._finish(self._paste(latents, region, output_type), return_dict)

    def _warn_of_masks_without_effect(
        self, repainted: torch.Tensor, strength: float, jump_n_sample: int | None
    ) -> None:
        """Warns, once each, of masks that leave an argument without effect, such as inverted or empty ones."""
        if not repainted.flatten(1).any(dim=1).all():
            self._warn_once(
                "`mask_image` is black everywhere, or one of several is: these images come back as they were given. "
                "White marks what is inpainted."
            )
        if bool(repainted.all()) and (strength == 1.0 or (jump_n_sample or 1) > 1):
            name = "`image` has" if strength == 1.0 else "`jump_n_sample` has"
            self._warn_once(
                f"{name} no effect: `mask_image` is white everywhere, so nothing of the image is kept. Black marks "
                "what is kept."
            )

    def _channel_layout(self) -> tuple[int, bool]:
        """Channels of a sample, and whether the U-Net takes as many as go with them."""
        config = self.unet.config
        for channels in (config.out_channels, config.out_channels // 2):
            # Never both: the number of output channels would have to be twice itself.
            if config.out_channels in (channels, 2 * channels) and config.in_channels in (
                channels,
                2 * channels + 1,
                3 * channels + 1,
            ):
                return channels, True
        return config.in_channels, False

    @property
    def _image_channels(self) -> int:
        return self.sample_channels if self.vae is None else self.vae.config.in_channels

    @staticmethod
    def _keeps_no_state(scheduler: SchedulerMixin) -> bool:
        """Whether steps may be taken in any order. Ours is told by `has_learned_variance`."""
        stateless = (DDPMScheduler, DDPMParallelScheduler, DDIMScheduler, DDIMParallelScheduler)
        return isinstance(scheduler, stateless) or hasattr(scheduler, "has_learned_variance")

    def _shorten(self, denoising: Denoising, strength: float) -> Denoising:
        """Leaves the last steps, as many as `strength` says."""
        order = denoising.scheduler.order  # evaluations of the network for most steps
        num_steps = math.ceil(len(denoising.timesteps) / order)
        num_left = min(int(num_steps * strength), num_steps)
        if num_left < 1:
            raise ValueError(
                f"`strength` is {strength}, which leaves none of {num_steps} steps. Pass more than {1 / num_steps:g}, "
                "or ask for more steps."
            )
        begin = (num_steps - num_left) * order
        if begin and hasattr(denoising.scheduler, "set_begin_index"):
            denoising.scheduler.set_begin_index(begin)
        return dataclasses.replace(denoising, timesteps=denoising.timesteps[begin:])

    def _choose_walk(
        self, denoising: Denoising, jump_length: int, jump_n_sample: int | None, is_anything_known: bool
    ) -> list[int]:
        """Numbers of the steps, in the order in which they are taken."""
        num_steps = len(denoising.timesteps)
        can_jump = self._keeps_no_state(denoising.scheduler)
        if jump_n_sample is None:
            jump_n_sample = DEFAULT_JUMP_N_SAMPLE if can_jump and not self.is_trained_to_inpaint else 1
        elif jump_n_sample > 1 and jump_length >= num_steps:
            raise ValueError(
                f"`jump_length` is {jump_length}, but there are only {num_steps} steps to jump back over. Pass a "
                "smaller one, ask for more steps, or pass `jump_n_sample=1`."
            )
        return resampling_walk(num_steps, jump_length, jump_n_sample if is_anything_known else 1)

    def _prepare_region(
        self,
        denoising: Denoising,
        images: torch.Tensor,
        repainted: torch.Tensor,
        low_res: torch.Tensor | None,
        num_images_per_prompt: int,
        noise: torch.Tensor,
    ) -> KnownRegion:
        def rows(x: torch.Tensor) -> torch.Tensor:
            """One for each image to draw, on the device."""
            x = x.to(denoising.device, denoising.dtype if x.is_floating_point() else None)
            if len(x) == 1:
                return x.expand(denoising.num_images, *x.shape[1:])
            return x.repeat_interleave(num_images_per_prompt, dim=0)

        images, repainted = rows(images), rows(repainted)
        pixels, known_pixels = 2 * images - 1, ~repainted
        if self.vae is None:
            original, shown, known = pixels, pixels, known_pixels
        else:
            # A latent is known if all of its pixels are; what the network is shown of them must not tell the others.
            original = self._encode(pixels, denoising.dtype)
            shown = self._encode(pixels * known_pixels, denoising.dtype) if self.is_trained_to_inpaint else original
            known = ~F.max_pool2d(repainted.to(denoising.dtype), self.vae_scale_factor).bool()
        extra_channels = masked_image_channels(shown, known) if self.is_trained_to_inpaint else None
        if low_res is not None:
            extra_channels = torch.cat([extra_channels, upsample(2 * rows(low_res) - 1, *denoising.size)], dim=1)
        return KnownRegion(
            images=images,
            known_pixels=known_pixels,
            original=original,
            known=known,
            extra_channels=extra_channels,
            alphas_cumprod=denoising.scheduler.alphas_cumprod.to(
                denoising.device,
                torch.float32 if denoising.device.type == "mps" else torch.float64,  # which that device does not have
            ),
            # Solvers extrapolate from one step to the next: their known part must move on a smooth path.
            noise=None if self._keeps_no_state(denoising.scheduler) else noise,
        )

    def _encode(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Latents of images in [-1, 1], as `_decode` takes them."""
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().to(dtype)
        return (latents - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config.scaling_factor

    @staticmethod
    def _noised_original(
        denoising: Denoising, region: KnownRegion, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """q(x_t | x_0) of the images, at the coming step and as the scheduler scales its samples."""
        signal, std = signal_and_std(denoising.scheduler, t, region.alphas_cumprod)
        noised = signal * region.original + std * noise
        # What the network sees, but for the factor that some solvers put before it. They know it best: in the middle of
        # a second-order step their `add_noise` takes another noise level.
        return noised / denoising.scheduler.scale_model_input(torch.ones_like(noised[:1, :1, :1, :1]), t)

    def _jump(
        self, denoising: Denoising, region: KnownRegion, latents: torch.Tensor, position: int, index: int
    ) -> torch.Tensor:
        """Noises samples of step `position` again, to those of the earlier step `index` (RePaint, algorithm 1)."""
        timesteps = torch.stack([denoising.timesteps[index], denoising.timesteps[position]])
        noisier, cleaner = region.alphas_cumprod.index_select(0, timesteps)
        ratio = noisier / cleaner  # all steps of a jump at once: q(x_t | x_s) is a Gaussian, too
        return ratio.sqrt() * latents + (1 - ratio).sqrt() * self._draw_noise(denoising)

    def _correct(
        self,
        denoising: Denoising,
        region: KnownRegion,
        model_output: torch.Tensor,
        latents: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """The network's output, such that the x_0 that follows from it is the image where that is known."""
        scheduler, channels = denoising.scheduler, self.sample_channels
        at = signal_and_std(scheduler, t, region.alphas_cumprod)
        sample = scheduler.scale_model_input(latents, t)
        exact = exact_prediction(sample, region.original, *at, scheduler.config.prediction_type)
        mean = torch.where(region.known, exact, model_output[:, :channels])
        return torch.cat([mean, model_output[:, channels:]], dim=1)

    def _paste(self, latents: torch.Tensor, region: KnownRegion, output_type: str) -> Any:
        """Samples as images of `output_type`, and what was known laid over them."""
        if output_type == "latent":
            return torch.where(region.known, region.original, latents)
        # In [0, 1] and not in [-1, 1], where the last bit of what was given would be lost.
        images = torch.where(region.known_pixels, region.images, self._decode(latents, "pt"))
        if output_type == "pt":
            return images
        self._warn_of_not_finite(images)
        if output_type == "np":
            return self.image_processor.pt_to_numpy(images)
        return self.image_processor.numpy_to_pil(self.image_processor.pt_to_numpy(images.nan_to_num(nan=0.0)))

    def _check_sizes(
        self,
        images: torch.Tensor,
        repainted: torch.Tensor,
        low_res: torch.Tensor | None,
        height: int | None,
        width: int | None,
    ) -> tuple[int, int]:
        """Height and width of the images to draw; raises a `ValueError` unless all that is given has them."""
        given = tuple(images.shape[2:])
        height, width = self._size_to_draw(height, width, images)
        if given != (height, width):
            raise ValueError(
                f"`image` is {given[1]} x {given[0]} pixels (width x height), but {width} x {height} are drawn. Resize "
                f"image and mask, or pass `height={given[0]}` and `width={given[1]}` if the model shall try that size."
            )
        if repainted.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"`mask_image` is {repainted.shape[3]} x {repainted.shape[2]} pixels (width x height), but `image` is "
                f"{given[1]} x {given[0]}. Pass a mask of the size of the image."
            )
        if self.takes_low_res and low_res is None:
            raise ValueError("`low_res_image` is missing: this U-Net enlarges and inpaints. Pass the small image.")
        if low_res is not None:
            if not self.takes_low_res:
                raise ValueError(
                    "`low_res_image` was given, but this U-Net does not take one (it has `in_channels="
                    f"{self.unet.config.in_channels}`). Leave it out."
                )
            if any(small > large for small, large in zip(low_res.shape[2:], given, strict=True)):
                raise ValueError(
                    f"`low_res_image` is {low_res.shape[3]} x {low_res.shape[2]} pixels (width x height), larger than "
                    f"`image` with {given[1]} x {given[0]}. Pass the small image."
                )
        return height, width

    def _check_resampling(self, strength: float, jump_length: int, jump_n_sample: int | None) -> None:
        """Raises a `ValueError` for what no chain, or not the scheduler's, could do."""
        scheduler = type(self.scheduler).__name__
        if not 0 < strength <= 1:
            raise ValueError(
                f"`strength` is {strength}; it must lie in (0, 1]: 1 starts from noise, less from the noised image, "
                "and 0 would change nothing."
            )
        if strength < 1 and scheduler in SCHEDULERS_WITHOUT_STRENGTH:
            raise ValueError(
                f"`strength` is {strength}, but a {scheduler} cannot start in the middle of its timesteps. Leave it at "
                "1.0, or take another scheduler, such as `DDIMScheduler` or `DPMSolverMultistepScheduler`."
            )
        for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; pass an integer of at least 1.")
        if jump_n_sample is not None and jump_n_sample > 1 and not self._keeps_no_state(self.scheduler):
            raise ValueError(
                f"`jump_n_sample` is {jump_n_sample}, but a {scheduler} looks back at its earlier steps, so it cannot "
                "jump. Pass `jump_n_sample=1` (the known part is replaced in each step all the same), or take a "
                "`LearnedVarianceDDPMScheduler`, `DDPMScheduler` or `DDIMScheduler`."
            )

    def _check_components(self) -> None:
        config = self.unet.config
        if not self._channel_layout()[1]:
            raise ValueError(
                f"`unet` has `in_channels={config.in_channels}` and `out_channels={config.out_channels}`. For samples "
                "of c channels, as many as it gives or half as many with a learned variance, an inpainting U-Net takes "
                "c (any model), 2 c + 1 (trained with masks) or 3 c + 1 (which enlarges as well): 3, 7 or 10 for RGB."
            )
        if self.vae is not None and self.image_channels != self._image_channels:
            raise ValueError(
                f"`vae` takes images of {self._image_channels} channels and gives {self.image_channels}, so what it "
                "decodes cannot be joined with what is kept of an image. Take one with as many `out_channels` as "
                "`in_channels`."
            )
        if self.takes_low_res and self.vae is not None:
            raise ValueError(
                f"`unet` enlarges and inpaints (`in_channels={config.in_channels}`), which is done in pixels. Pass "
                "`vae=None`."
            )
        super()._check_components()
