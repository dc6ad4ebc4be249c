"""
Which schedulers of diffusers can sample with networks of this family, and why the others cannot; and what a pipeline
must know to step one: whether it takes a learned variance, a gradient or a generator, and keeps state between steps.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, DDPMParallelScheduler, DDPMScheduler, SchedulerMixin

from ..ops.integers import check_integer
from ..ops.values import check_number
from .scheduling_ddim_inversion import DDIMInversionScheduler
from .scheduling_ddpm_learned_variance import PredictionType


Generators = torch.Generator | list[torch.Generator] | None

DEFAULT_NUM_INFERENCE_STEPS = 50

# Schedulers of diffusers that take a config of betas, but cannot sample with these networks.
UNSUITABLE_SCHEDULERS = {
    "LCMScheduler": "it needs a network that was distilled for it (a latent consistency model): each of its steps "
    "takes the predicted x_0 for a finished image, but without distillation it is the mean of many. For few steps use "
    "`DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`.",
    "RePaintScheduler": "its steps need an original image and a mask.",
    "UnCLIPScheduler": "its steps need the previous timestep. `LearnedVarianceDDPMScheduler` makes the same steps: "
    "`LearnedVarianceDDPMScheduler.from_config(scheduler.config)`.",
    "DDIMInverseScheduler": "it goes from images to noise.",
    "DPMSolverMultistepInverseScheduler": "it goes from images to noise.",
    "CogVideoXDDIMScheduler": "it shifts the betas for CogVideoX. Use `DDIMScheduler`.",
    "CogVideoXDPMScheduler": "it shifts the betas for CogVideoX. Use `DPMSolverMultistepScheduler`.",
}
# What diffusers' schedulers do not support: some raise an error in the middle of a step, and some none at all.
PREDICTION_TYPES = get_args(PredictionType)
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
# Their first steps need what only the first timesteps of a chain give them.
SCHEDULERS_WITHOUT_STRENGTH = ("PNDMScheduler", "LMSDiscreteScheduler")
DDPM_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` takes mean and variance channels."""
    if isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        return scheduler.config.variance_type == "learned_range"
    return getattr(scheduler, "has_learned_variance", False)


def takes_gradient(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` takes the gradient of a classifier."""
    return "guidance_gradient" in inspect.signature(scheduler.step).parameters


def keeps_no_state(scheduler: SchedulerMixin) -> bool:
    """Whether steps may be taken in any order. Our scheduler is recognised by `has_learned_variance`."""
    stateless = (DDPMScheduler, DDPMParallelScheduler, DDIMScheduler, DDIMParallelScheduler)
    return isinstance(scheduler, stateless) or hasattr(scheduler, "has_learned_variance")


def last_step_kwargs(scheduler: SchedulerMixin, sample: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Keyword arguments of the last `step` of a loop that others follow with the same generators: our scheduler then draws
    no noise, of which it would add none, so that these draw what follows as with diffusers' schedulers.
    """
    options = inspect.signature(scheduler.step).parameters
    is_ours = "guidance_gradient" in options and "variance_noise" in options
    return {"variance_noise": torch.zeros_like(sample)} if is_ours else {}


def check_other_steps(scheduler: SchedulerMixin, number: int, prefix: str) -> None:
    """
    Raises a `ValueError` if a further scheduler of a pipeline cannot take so many steps. `prefix`: in front of
    `scheduler` and `num_inference_steps` in messages.
    """
    check_integer(f"{prefix}num_inference_steps", number, 1)
    try:
        Steps(int(number), None, None).set_timesteps(copy_for_call(scheduler, None, 1), torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"`{prefix}scheduler` with `{prefix}num_inference_steps` {number}: {error}") from error


def check_scheduler(scheduler: SchedulerMixin, argument: str = "scheduler") -> None:
    """
    Raises a `ValueError` for schedulers of diffusers that would generate no images, or wrong ones. `argument`: what
    messages call it.
    """
    if isinstance(scheduler, DDIMInversionScheduler):
        scheduler = scheduler.scheduler
    config, name = scheduler.config, type(scheduler).__name__
    options = inspect.signature(type(scheduler).__init__).parameters
    if name in UNSUITABLE_SCHEDULERS:
        raise ValueError(f"`{argument}` is a {name}, which these models cannot use: {UNSUITABLE_SCHEDULERS[name]}")
    if type(scheduler).__module__.startswith("diffusers.") and "beta_schedule" not in options:
        raise ValueError(
            f"`{argument}` is a {name}, which these models cannot use: it has no `beta_schedule`, so it reverses "
            "another process than the one that they are trained on (flow matching, EDM, consistency models, discrete "
            "tokens, ...). Make another one with `from_config`, such as `DDIMScheduler`, "
            "`DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES or config.get("use_flow_sigmas", False):
        raise ValueError(
            f"`{argument}` is a {name} with `prediction_type={prediction_type!r}` and "
            f"`use_flow_sigmas={config.get('use_flow_sigmas', False)}`. Networks of this family predict one of "
            f"{list(PREDICTION_TYPES)}, without flow sigmas. Pass both to `from_config`."
        )
    if prediction_type == "sample" and name in SCHEDULERS_WITHOUT_SAMPLE_PREDICTION:
        raise ValueError(
            f"`{argument}` is a {name}, which does not support `prediction_type='sample'`. Use another one, such as "
            "`DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`."
        )
    # A config keeps what its class does not know, and the betas are then not those of the network.
    if config.get("rescale_betas_zero_snr", False) and "rescale_betas_zero_snr" not in options:
        raise ValueError(
            f"`{argument}` is a {name}, which does not support `rescale_betas_zero_snr`, but its config has it set: it "
            "would step with other betas than the network's. Use one that does, such as `DDIMScheduler`, "
            "`EulerDiscreteScheduler`, `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`."
        )


def check_variance(scheduler: SchedulerMixin, unet_config: Mapping[str, Any], channels: int) -> None:
    """
    Raises a `ValueError` if just one of U-Net and scheduler has a learned variance.

    Args:
        unet_config (mapping): Its `out_channels` are `channels`, or twice as many with a learned variance.
        channels (`int`): Channels of a sample.
    """
    name, variance_type = type(scheduler).__name__, scheduler.config.get("variance_type")
    given = f"`scheduler` is a {name} with `variance_type={variance_type!r}`"
    out_channels, in_channels = unet_config["out_channels"], unet_config["in_channels"]
    if isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        if variance_type == "learned":
            raise ValueError(
                f"{given}, which takes a variance where models of this family predict a log-variance or an "
                "interpolation. Use `variance_type='learned_range'`, or `LearnedVarianceDDPMScheduler` with "
                "`variance_type='learned_log'`."
            )
        if variance_type not in DDPM_VARIANCE_TYPES:
            # It would run all the same: an unknown word as "fixed_small", "fixed_large_log" to NaN.
            raise ValueError(
                f"{given}, which it does not know. Use one of {list(DDPM_VARIANCE_TYPES)}, or "
                "`LearnedVarianceDDPMScheduler`."
            )
    if takes_variance(scheduler) and out_channels == channels:
        raise ValueError(
            f"{given}, which needs a learned variance, but `unet` predicts none: it has `out_channels={out_channels}` "
            f"for `in_channels={in_channels}`. Make the scheduler with `variance_type='fixed_small'`, or train a model "
            f"with `out_channels={2 * channels}`."
            # Half of the channels may be those of the sample, 3 for RGB images.
            + (
                " If half of its input channels are those of a low-resolution image, load it with "
                "`ADMSuperResolutionPipeline`; if they are those of another image, with `ADMImageToImagePipeline`."
            )
            * (channels % 2 == 0)
        )
    # Our scheduler, which has this property, refuses what it would have to ignore; others get the mean.
    if out_channels == 2 * channels and not getattr(scheduler, "has_learned_variance", True):
        raise ValueError(
            f"`unet` predicts a variance (`out_channels={out_channels}` for `in_channels={in_channels}`), but {given}, "
            "which does not use it. Make the scheduler with `variance_type='learned_range'`."
        )


@dataclass
class Steps:
    """
    The arguments of a call that choose its steps; see [`ADMPipeline`].

    Attributes:
        num_inference_steps (`int`), timestep_respacing (`str`, `int` or list of `int`, *optional*): Which timesteps.
        eta (`float`, *optional*): Noise of DDIM steps.
        strength (`float`): Share of the steps that are taken, the last ones; see [`ADMPipeline`] and
            [`ADMInpaintPipeline`].
    """

    num_inference_steps: int
    timestep_respacing: str | int | Sequence[int] | None
    eta: float | None
    strength: float = 1.0

    def check(self, scheduler: SchedulerMixin) -> None:
        """Raises a `ValueError` for what the scheduler cannot do, before any work."""
        number, name = self.num_inference_steps, type(scheduler).__name__
        check_integer("num_inference_steps", number, 1)
        if self.timestep_respacing is not None and number != DEFAULT_NUM_INFERENCE_STEPS:
            raise ValueError(
                f"`timestep_respacing` is {self.timestep_respacing!r} and `num_inference_steps` is {number}: both "
                "choose the steps. Leave one of them out."
            )
        if not (isinstance(self.strength, Real) and 0 < self.strength <= 1):
            raise ValueError(
                f"`strength` is {self.strength!r}; it must lie in (0, 1]: 1 starts from noise, less from the noised "
                "image, and 0 would change nothing."
            )
        if self.strength < 1 and isinstance(scheduler, DDIMInversionScheduler):
            raise ValueError(
                f"`strength` is {self.strength}, but an inversion takes all steps, from an image to noise. Leave out "
                "`strength`, and the image to start from."
            )
        if self.strength < 1 and name in SCHEDULERS_WITHOUT_STRENGTH:
            raise ValueError(
                f"`strength` is {self.strength}, but a {name} cannot start in the middle of its timesteps. Pass 1.0, "
                "or use another scheduler, such as `DDIMScheduler` or `DPMSolverMultistepScheduler`."
            )
        if self.eta is not None:
            check_number("eta", self.eta)
        if self.eta is not None and not 0 <= self.eta < math.inf:
            raise ValueError(
                f"`eta` is {self.eta}; it must be a number of at least 0 (0: deterministic, 1: as much noise as DDPM)."
            )
        if self.eta is not None and self.eta > 1 and name == "TCDScheduler":  # it would step to negative timesteps
            raise ValueError(f"`eta` is {self.eta}; a TCDScheduler takes 0 (deterministic) to 1 (all noise is new).")

    def set_timesteps(self, scheduler: SchedulerMixin, device: torch.device) -> torch.Tensor:
        """
        Sets the timesteps of a scheduler and returns those to take.

        Raises:
            ValueError: If the result of a solver would not be finite, or no step is left.
        """
        if self.timestep_respacing is not None:
            scheduler.set_timesteps(timestep_respacing=self.timestep_respacing, device=device)
        else:
            self._check_number_of(scheduler)
            scheduler.set_timesteps(self.num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else the first step looks for its index among the timesteps, and waits
        number, name = self.num_inference_steps, type(scheduler).__name__
        # KDPM2AncestralDiscreteScheduler takes the root of a rounding error where two noise levels are far apart.
        if scheduler.timesteps.is_floating_point() and scheduler.timesteps.isnan().any():
            raise ValueError(
                f"A {name} finds no {number} timesteps for these betas: its numbers overflow in the first step. Ask "
                "for more steps, make it with `timestep_spacing='leading'`, or use another scheduler."
            )
        if (
            name in SCHEDULERS_WITHOUT_EQUAL_NOISE_LEVELS
            and scheduler.config.get("solver_order") != 1
            and scheduler.sigmas.device.type == "cpu"  # where they are kept, so that nothing waits for a device
            and (scheduler.sigmas.diff() == 0).any()
        ):
            raise ValueError(
                f"`num_inference_steps` is {number}, but a {name} with "
                f"`timestep_spacing={scheduler.config.get('timestep_spacing')!r}` finds fewer different noise levels "
                f"in {scheduler.config.num_train_timesteps} timesteps, and its result would not be finite. Ask for "
                "fewer steps, or use another scheduler."
            )
        num_steps = math.ceil(len(scheduler.timesteps) / scheduler.order)  # each of `order` evaluations, but the last
        num_left = min(int(num_steps * self.strength), num_steps)
        if num_left < 1:
            raise ValueError(
                f"`strength` is {self.strength}, which leaves none of {num_steps} steps. Pass more than "
                f"{1 / num_steps:g}, or ask for more steps."
            )
        begin = (num_steps - num_left) * scheduler.order
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler.timesteps[begin:]

    def _check_number_of(self, scheduler: SchedulerMixin) -> None:
        """Raises a `ValueError` for more steps than timesteps. Some schedulers of diffusers would take them all."""
        total = scheduler.config.get("num_train_timesteps")
        if total is not None and self.num_inference_steps > total:
            raise ValueError(
                f"`num_inference_steps` is {self.num_inference_steps}; it must be an integer between 1 and the "
                f"`num_train_timesteps` {total} of this scheduler."
            )

    def step_kwargs(self, scheduler: SchedulerMixin, generator: Generators) -> dict[str, Any]:
        """Those of `generator` and `eta` that `scheduler.step` draws noise with; deterministic ones take neither."""
        kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        return kwargs if self.eta is None else {**kwargs, "eta": self.eta}


def copy_for_call(scheduler: SchedulerMixin, generator: Generators, batch_size: int) -> SchedulerMixin:
    """
    Copies a scheduler for one call, which keeps its timesteps and its history to itself. Solvers that inherited a
    learned `variance_type` by `from_config` cut the first three channels out of any model output, so their copy has
    `variance_type=None`; `DPMSolverSDEScheduler` takes a seed for each image in place of a generator.
    """
    options = inspect.signature(type(scheduler).__init__).parameters
    changes = {}
    inherited = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if "variance_type" in options and inherited and not takes_variance(scheduler):
        changes["variance_type"] = None
    if "noise_sampler_seed" in options and scheduler.config.noise_sampler_seed is None and generator is not None:
        sources = generator if isinstance(generator, list) else [generator] * batch_size
        changes["noise_sampler_seed"] = [
            int(torch.randint(2**63 - 1, (), generator=source, device=source.device)) for source in sources
        ]
    # Earlier steps of the user's own may have left tensors with a gradient. They cannot be copied, and need not be:
    # `set_timesteps` begins a new history.
    values = [x for value in vars(scheduler).values() for x in (value if isinstance(value, list) else [value])]
    own = copy.deepcopy(scheduler, {id(x): x for x in values if torch.is_tensor(x) and not x.is_leaf})
    own.register_to_config(**changes)
    if "noise_sampler_seed" in changes:
        own.noise_sampler_seed = changes["noise_sampler_seed"]  # which its constructor has read
    return own
