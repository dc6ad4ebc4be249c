"""
What steers a sampler: classifier-free guidance of a prediction, and the gradient of a classifier.

Classifier-free guidance: Ho & Salimans 2022 (https://huggingface.co/papers/2207.12598); its rescaling: Lin et al. 2023
(https://huggingface.co/papers/2305.08891, section 3.4). Classifier guidance: Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233, section 4).
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin


# Multiplies a classifier's log-probability before its gradient is taken, and divides the gradient. For single pixels of
# 64 x 64 images that is around 1e-5, where float16 has only steps of 6e-8. A power of two changes no other dtype.
GRADIENT_SCALE = 2.0**7


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
        `torch.Tensor`: Of the shape and dtype of `sample`.
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
    `(signal, std)` of what the network sees in the coming step of a scheduler of diffusers: signal * x_0 + std * noise.

    Solvers may stand between two timesteps, or round them, so their noise levels count where they have them. No number
    is read from the device.

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
    # Samples are x_0 + sigma * noise, and divided by sqrt(1 + sigma^2) for the network. Which sigma comes next, in the
    # middle of a second-order step or not, the scheduler knows best.
    signal = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep)
    return signal, (1 - signal**2).sqrt()


def shift_prediction(
    prediction: torch.Tensor, score: torch.Tensor, signal: torch.Tensor, std: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    r"""
    The prediction of a network whose score, the gradient of log p(x_t), has `score` added to it (ADM, algorithm 2).

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
    return prediction - std / signal * score


def exact_prediction(
    sample: torch.Tensor,
    original_sample: torch.Tensor,
    signal: torch.Tensor,
    std: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    r"""
    The prediction of a network that knows x_0.

    Args:
        sample, original_sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t = signal * x_0 +
            std * noise, as the network sees it, and x_0.
        signal, std (`torch.Tensor` of shape `()`): sqrt(bar alpha_t) and sqrt(1 - bar alpha_t).
        prediction_type (`str`): `"epsilon"`, `"sample"` (x_0) or `"v_prediction"`.
    """
    if prediction_type == "sample":
        return original_sample
    epsilon = (sample - signal * original_sample) / std
    return epsilon if prediction_type == "epsilon" else signal * epsilon - std * original_sample
