"""
Guidance of a sampler: classifier-free, by the gradient of a classifier, and the arguments of a call for all kinds.

Classifier-free guidance: Ho & Salimans 2022 (https://huggingface.co/papers/2207.12598); its rescaling: Lin et al. 2023
(https://huggingface.co/papers/2305.08891, section 3.4). Classifier guidance: Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin

from ..schedulers.diffusers_schedulers import takes_gradient
from ..schedulers.noise_schedules import check_same_noise, unknown_choice
from ..schedulers.scheduling_ddpm_learned_variance import PredictionType
from .class_labels import ClassCondition
from .condition import Condition, Step, check_finite, check_interval, warn_of_interval
from .guidance_functions import GuidanceFunction, GuidanceFunctions, as_guidance_functions, name_of
from .image_format import ImageFormat, as_size


# Multiplies a classifier's log-probability before its gradient is taken, and divides the gradient, which is around 1e-5
# for single pixels of 64 x 64 images, where float16 has only steps of 6e-8. A power of two changes no other dtype.
GRADIENT_SCALE = 2.0**7
# How the unconditional and the conditional pass of classifier-free guidance run: in one batch, or one after the other.
GuidancePasses = Literal["auto", "joint", "separate"]
# On the CPU one batch saves the overhead of small tensors: it takes 0.72 to 0.92 times as long as two passes for 1 or 4
# images of 32 x 32 and 1 of 64 x 64 (docs/guidance.md). Large ones leave the cache: 0.99 to 1.04 for 4 of 64 x 64, 1.01
# for 16 of 32 x 32, 1.09 for 16 of 64 x 64. The limit lies between, in positions of the samples of one pass.
MOST_JOINT_POSITIONS = 2**13


def check_guidance_passes(passes: str) -> None:
    """Raises a `ValueError` for another word than those of `GuidancePasses`."""
    if passes not in get_args(GuidancePasses):
        raise unknown_choice("passes", passes, GuidancePasses)


def joins_passes(passes: GuidancePasses, samples: torch.Tensor) -> bool:
    r"""
    Whether both passes of classifier-free guidance run in one batch. `"auto"`: whichever is faster, by measurements on
    CPUs; on other devices one batch, which fills them better (not measured).

    Args:
        passes (`str`): The wish.
        samples (`torch.Tensor` of shape `(batch_size, channels, ...)`): Those of one pass.
    """
    if passes != "auto":
        return passes == "joint"
    return samples.device.type != "cpu" or samples[:, 0].numel() <= MOST_JOINT_POSITIONS


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    r"""
    `uncond + scale * (cond - uncond)`: a scale of 1 is `cond`, 0 is `uncond`, more than 1 is classifier-free guidance.

    Args:
        cond, uncond (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Predictions with and without
            the class.
        scale (`float`): Strength.
        rescale (`float`, defaults to 0.0): Weight of a copy that is scaled, for each example, to the standard deviation
            of `cond`, against overexposure (Lin et al. 2023, eqs. 15 and 16).
    """
    guided = uncond + scale * (cond - uncond)
    if rescale > 0:
        std_cond, std_guided = (x.std(dim=(1, 2, 3), keepdim=True) for x in (cond, guided))
        # An untrained model predicts 0 everywhere, whose standard deviation nothing can be divided by.
        ratio = std_cond / std_guided.clamp(min=torch.finfo(std_guided.dtype).tiny)
        guided = rescale * guided * ratio + (1 - rescale) * guided
    return guided


def log_probability_gradient(
    classifier: ModelMixin, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    r"""
    The gradient of log p(y | x_t) with respect to x_t (ADM, section 4.1).

    Args:
        classifier (`AdaGNClassifierModel`): Its output has `.logits`. May be half precision; the softmax never is.
        sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
        timestep (`torch.Tensor` of shape `()`): Of the full training chain.
        class_labels (`torch.LongTensor` of shape `(batch_size,)`): y.

    Returns:
        `torch.Tensor`: The gradient, in the shape and dtype of `sample`.
    """
    with torch.enable_grad():
        sample_in = sample.detach().to(classifier.dtype).requires_grad_()
        logits = classifier(sample_in, timestep).logits
        log_probabilities = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
        chosen = log_probabilities.gather(1, class_labels[:, None])
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * chosen.sum(), sample_in)
    return gradient.to(sample.dtype) / GRADIENT_SCALE


def signal_and_std(
    scheduler: SchedulerMixin, timestep: torch.Tensor, alphas_cumprod: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    `(signal, std)` of the network's input in the coming step of a scheduler of diffusers: signal * x_0 + std * noise.

    Solvers may stand between two timesteps, or round them, so their own noise levels are used if they have any. No
    number is read from the device.

    Args:
        scheduler ([`SchedulerMixin`]): After `set_timesteps` and `set_begin_index`.
        timestep (`torch.Tensor` of shape `()`): The coming one.
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): Of the scheduler, on the device.
    """
    if not hasattr(scheduler, "sigmas"):
        alpha = alphas_cumprod.index_select(0, timestep.reshape(1)).reshape(())
        return alpha.sqrt(), (1 - alpha).sqrt()
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # samples are signal * x_0 + std * noise, sigma is std / signal
        sigma = scheduler.sigmas[scheduler.step_index or scheduler.begin_index or 0].double()
        signal = (1 + sigma**2).rsqrt()
        return signal, sigma * signal
    # Samples are x_0 + sigma * noise, and divided by sqrt(1 + sigma^2) for the network. Only the scheduler knows which
    # sigma comes next in the middle of a second-order step.
    signal = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep)
    return signal, (1 - signal**2).sqrt()


def precise_alphas_cumprod(scheduler: SchedulerMixin, device: torch.device) -> torch.Tensor:
    """The scheduler's `alphas_cumprod` on a device, in float64, which "mps" does not have."""
    return scheduler.alphas_cumprod.to(device, torch.float32 if device.type == "mps" else torch.float64)


def add_noise_for_step(
    scheduler: SchedulerMixin,
    original: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    alphas_cumprod: torch.Tensor | None,
) -> torch.Tensor:
    """
    `original`, x_0, with noise as the coming step of a scheduler of diffusers takes it; for the other arguments see
    `signal_and_std`.
    """
    signal, std = signal_and_std(scheduler, timestep, alphas_cumprod)
    noised = signal * original + std * noise
    # Some solvers scale the network's input; only they know the factor: in the middle of a second-order step their
    # `add_noise` takes another noise level.
    return noised / scheduler.scale_model_input(torch.ones_like(noised[:1, :1, :1, :1]), timestep)


def shift_prediction(
    prediction: torch.Tensor,
    score: torch.Tensor,
    signal: torch.Tensor,
    std: torch.Tensor,
    prediction_type: PredictionType,
) -> torch.Tensor:
    r"""
    Adds `score` to the score, the gradient of log p(x_t), that a prediction stands for (ADM, algorithm 2).

    Args:
        prediction (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Mean channels.
        score (`torch.Tensor` of that shape): With respect to x_t = signal * x_0 + std * noise.
        signal, std (`torch.Tensor` of shape `()`): sqrt(bar alpha_t) and sqrt(1 - bar alpha_t).
        prediction_type (`str`): `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
    """
    # The score is -epsilon / std. x_0 = (x_t - std * epsilon) / signal and v = signal * epsilon - std * x_0 follow.
    if prediction_type == "epsilon":
        return prediction - std * score
    if prediction_type == "sample":
        return prediction + std**2 / signal * score
    if prediction_type == "v_prediction":
        return prediction - std / signal * score
    raise unknown_choice("prediction_type", prediction_type, PredictionType)


def exact_prediction(
    sample: torch.Tensor,
    original_sample: torch.Tensor,
    signal: torch.Tensor,
    std: torch.Tensor,
    prediction_type: PredictionType,
) -> torch.Tensor:
    r"""
    The prediction that an ideal network would make for a given x_0.

    Args:
        sample, original_sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t = signal * x_0 +
            std * noise, the input of the network, and x_0.
        signal, std (`torch.Tensor` of shape `()`): sqrt(bar alpha_t) and sqrt(1 - bar alpha_t).
        prediction_type (`str`): `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
    """
    if prediction_type == "sample":
        return original_sample
    epsilon = (sample - signal * original_sample) / std
    if prediction_type == "epsilon":
        return epsilon
    if prediction_type == "v_prediction":
        return signal * epsilon - std * original_sample
    raise unknown_choice("prediction_type", prediction_type, PredictionType)


@dataclass
class Guidance:
    """
    The arguments of a call for all kinds of guidance; see [`ADMPipeline`].

    Attributes:
        scale (`float`): Of classifier-free guidance at the start of the call; 1.0 is off.
        rescale (`float`): See `guide`.
        start, end (`float`): Fractions of the steps between which guidance acts.
        classifier_scale (`float`): Of classifier guidance; 0.0 is off.
        guidance_fn ([`GuidanceFunction`] or list of them, *optional*): Guidance by functions; `functions` is the list.
    """

    scale: float
    rescale: float
    start: float
    end: float
    classifier_scale: float
    guidance_fn: GuidanceFunctions = None

    def __post_init__(self) -> None:
        self.functions = as_guidance_functions(self.guidance_fn)

    @property
    def steers(self) -> bool:
        """Whether a classifier or another function guides."""
        return self.classifier_scale != 0.0 or bool(self.functions)

    def is_on(self, step: Step) -> bool:
        """Whether guidance acts in a step."""
        return step.is_within(self.start, self.end)

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raises a `ValueError` for numbers out of range, and for guidance without a condition."""
        check_finite("guidance_scale", [self.scale])
        check_finite("classifier_guidance_scale", [self.classifier_scale])
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"`guidance_rescale` is {self.rescale}; it must lie in [0, 1].")
        check_interval("guidance", self.start, self.end)
        if self.scale == 1.0:
            return
        droppable = [condition for condition in conditions if condition.is_droppable]
        if not droppable:
            raise ValueError(
                f"`guidance_scale` is {self.scale}, but this model has no null class (`null_class_id` in its config) "
                "and no cross-attention, so there is nothing to guide away from. Leave it at 1.0, train a model with "
                "class dropout, or use a classifier (`classifier_guidance_scale`)."
            )
        if not any(condition.is_given for condition in droppable):
            missing = " and no ".join(f"`{condition.argument}`" for condition in droppable)
            raise ValueError(
                f"`guidance_scale` is {self.scale}, but there are no {missing} to guide towards. Pass them, or leave "
                "`guidance_scale` at 1.0."
            )

    def check_classifier(
        self,
        classifier: ModelMixin | None,
        classes: ClassCondition,
        scheduler: SchedulerMixin,
        eta: float | None,
        size: tuple[int, int],
    ) -> None:
        """Raises a `ValueError` if classifier guidance is on but impossible. `size`: height, width of samples."""
        if self.classifier_scale == 0.0:
            return
        given = f"`classifier_guidance_scale` is {self.classifier_scale}"
        if classifier is None:
            raise ValueError(
                f"{given}, but this pipeline has no classifier. Leave it at 0.0, or make the pipeline with one "
                "(training/train_classifier.py trains it)."
            )
        if classes.labels is None:
            raise ValueError(
                f"{given}, but there are no `class_labels` to guide towards. Pass them, or leave it at 0.0."
            )
        if classes.embed_type is not None:
            raise ValueError(
                f"{given}, but the `class_labels` of this U-Net are not class numbers (`class_embed_type="
                f"{classes.embed_type!r}`). Leave it at 0.0."
            )
        check_noise_of_classifier(classifier, scheduler)
        # Most poolings would take another size without an error.
        if size != (expected := as_size(classifier.config.sample_size)):
            raise ValueError(
                f"{given}, but the classifier was trained on samples of {expected[0]} x {expected[1]}, and `height` "
                f"and `width` ask for {size[0]} x {size[1]}. Pass its size, or leave it at 0.0."
            )
        num_classes, highest = classifier.config.num_classes, int(classes.labels.max())
        if highest >= num_classes:
            raise ValueError(
                f"{given}, but `class_labels` hold {highest}, and the classifier has the classes 0 to "
                f"{num_classes - 1}: it cannot guide towards the null class."
            )
        _check_signal(given, scheduler, eta)

    def check_functions(self, scheduler: SchedulerMixin, eta: float | None) -> None:
        """Raises a `ValueError` if guidance by functions is on but impossible."""
        if not self.steers:
            return
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "`guidance_fn` and `classifier_guidance_scale` need gradients, which do not exist in "
                "`torch.inference_mode()`. Leave it, or use `torch.no_grad()`, which the pipeline does by itself."
            )
        for function in self.functions:
            if function.kind == "score":
                _check_signal(f"`guidance_fn` {name_of(function)} gives a score", scheduler, eta)

    def without_effect(self, num_steps: int, may_guide: bool) -> list[str]:
        """Warnings about arguments that change nothing in a call; for the arguments see `Condition.without_effect`."""
        warnings = []
        if not may_guide and self.rescale != 0.0:
            warnings.append(
                "`guidance_rescale` has no effect: `guidance_scale` is 1.0, which is off. Pass another "
                "`guidance_scale`, or leave it out."
            )
        if not may_guide and not self.steers and (self.start, self.end) != (0.0, 1.0):
            warnings.append(
                "`guidance_start` and `guidance_end` have no effect: `guidance_scale` is 1.0 and "
                "`classifier_guidance_scale` is 0.0, which is off, and there is no `guidance_fn`. Pass one of them, or "
                "leave the interval out."
            )
        if self.scale != 1.0 or self.steers:
            warnings += warn_of_interval("Guidance", "guidance", self.start, self.end, num_steps)
        return warnings


def _check_signal(given: str, scheduler: SchedulerMixin, eta: float | None) -> None:
    """Raises a `ValueError` if a score is given to steps that divide by the signal of x_T, of which there is none."""
    is_ancestral = takes_gradient(scheduler) and eta is None
    if scheduler.config.get("rescale_betas_zero_snr", False) and not is_ancestral:
        raise ValueError(
            f"{given}, but with `rescale_betas_zero_snr` x_T carries no signal, so a changed score gives no x_0 "
            "there. Use ancestral steps of `LearnedVarianceDDPMScheduler` (`eta=None`)."
        )


class ClassifierGuidance(GuidanceFunction):
    """
    Guidance by a classifier of noisy samples: the gradient of log p(y | x_t) times a scale, a score.

    Args:
        classifier (`AdaGNClassifierModel`): Its output has `.logits`.
        scale (`float`): Multiplies the gradient.
    """

    kind = "score"
    reads_prediction = False

    def __init__(self, classifier: ModelMixin, scale: float):
        self.classifier, self.scale, self.name = classifier, scale, type(self).__name__

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, pred_original_sample: torch.Tensor | None = None, **conditions: Any
    ) -> torch.Tensor:
        """The gradient towards the `class_labels` of the call."""
        return self.scale * log_probability_gradient(self.classifier, x_t, t, conditions["class_labels"])


def check_classifier(classifier: ModelMixin, unet_config: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a classifier of other classes or samples than the U-Net's."""
    sizes = classifier.config.sample_size, unet_config.get("sample_size")
    if sizes[1] is not None and as_size(sizes[0]) != as_size(sizes[1]):
        raise ValueError(
            f"`classifier` has `sample_size={sizes[0]}`, but `unet` has `sample_size={sizes[1]}`. Train the classifier "
            "on samples of that size."
        )
    rows, null_class_id = unet_config.get("num_class_embeds"), unet_config.get("null_class_id")
    if rows is None:
        return
    num_classes = rows - (null_class_id is not None)
    if classifier.config.num_classes != num_classes:
        raise ValueError(
            f"`classifier` has `num_classes={classifier.config.num_classes}`, but `unet` has {num_classes} classes "
            f"(`num_class_embeds={rows}`, `null_class_id={null_class_id}`). Train the classifier on these classes."
        )
    if null_class_id not in (None, num_classes):
        raise ValueError(
            f"`unet` has `null_class_id={null_class_id}`, but with a `classifier` it must be the last one, "
            f"{num_classes}, so that the other classes have the same numbers in both."
        )


def check_format_of_classifier(classifier: ModelMixin, image_format: ImageFormat) -> None:
    """Raises a `ValueError` for a classifier whose config records another format of images."""
    config = classifier.config.get("image_format")
    if config is None:
        return
    trained = ImageFormat.from_config(config, config["channels"])
    if trained != image_format:
        raise ValueError(
            f"`classifier` was trained on {trained}, but the `image_format` of the pipeline is {image_format}, so the "
            "same sample means another image to it. Train the classifier on images of this format."
        )


def check_noise_of_classifier(classifier: ModelMixin, scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` for a classifier of another noise schedule, or of clean images."""
    check_same_noise("`classifier`", classifier.config.get("noise_schedule"), scheduler, classifier)
