"""
Gaussian terms of the variational bound: the KL divergence, and the decoder, which gives the values of images a
probability.

Ho et al. 2020 (DDPM, https://huggingface.co/papers/2006.11239, eqs. 5 and 13).
"""

from __future__ import annotations

import math

import torch


# Smaller probabilities of 8-bit values are raised to this one before the logarithm, as in the papers' code.
MIN_PROBABILITY = 1e-12
# Bins are integrated by a rule of 6 points where half their width is at most `NARROW` standard deviations, and their
# probability changes by less than about e^(2 * MAX_SLOPE) within them. The error of the logarithm is then below 1e-11.
NARROW, MAX_SLOPE = 0.5, 1.0
# Gauss-Legendre: the positive points, and their weights, which are the same for the negative ones.
POINTS = (0.2386191860831969, 0.6612093864662645, 0.9324695142031521)
WEIGHTS = (0.4679139345726910, 0.3607615730481386, 0.1713244923791704)


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) elementwise, in nats."""
    # In the order of the papers' code: if both are nearly the same, the order decides the last digits.
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(
    samples: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, num_levels: int | None = 256
) -> torch.Tensor:
    r"""
    Log-probability in nats of image values under a Gaussian that is integrated over one bin a level (DDPM, eq. 13).

    For 256 levels the numbers are those of the papers' code, with an approximate cdf and no probability below 1e-12.
    For others they are exact, with a gradient however small the probability.

    Args:
        samples (`torch.Tensor`): Levels scaled to [-1, 1]: `2 * k / (num_levels - 1) - 1`. The outer bins extend to
            infinity.
        mean, log_std (`torch.Tensor`): Parameters of the Gaussian, of the shape of `samples`.
        num_levels (`int`, *optional*, defaults to 256): Number of levels: 256 for 8 bits, 65536 for 16. `None`: the
            data are continuous, and the result is the logarithm of the *density* of the scaled values. It can be
            positive, and depends on the unit of the data: for values v times as large it is smaller by log v.

    Raises:
        ValueError: For fewer than 2 levels.
    """
    check_num_levels(num_levels)
    if num_levels == 256:
        return _log_probability_of_8_bits(samples, mean, log_std)
    dtype = torch.promote_types(torch.promote_types(samples.dtype, mean.dtype), torch.float32)
    centered, log_std = samples.to(dtype) - mean.to(dtype), log_std.to(dtype)
    inverse_std = torch.exp(-log_std)
    if num_levels is None:
        return _log_density(centered * inverse_std) - log_std
    half = 1.0 / (num_levels - 1)
    upper = _log_probability_above(inverse_std * (centered - half))
    lower = _log_probability_above(-inverse_std * (centered + half))
    inner = _log_probability_of_bin(centered.abs() * inverse_std, half * inverse_std)
    log_probability = torch.where(samples < -1 + half, lower, inner)
    return torch.where(samples > 1 - half, upper, log_probability)


def check_num_levels(num_levels: int | None) -> None:
    """Raises the `ValueError` of [`discretized_gaussian_log_likelihood`]."""
    if num_levels is not None and num_levels < 2:
        raise ValueError(f"`num_levels` is {num_levels}; it must be at least 2, or None for continuous data.")


def _log_probability_of_8_bits(samples: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    def cdf(x: torch.Tensor) -> torch.Tensor:
        # The tanh approximation (error below 2e-4) of the papers' code, with which their bits are reported.
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    centered, inverse_std = samples - mean, torch.exp(-log_std)
    cdf_plus = cdf(inverse_std * (centered + 1.0 / 255.0))
    cdf_minus = cdf(inverse_std * (centered - 1.0 / 255.0))
    probability = torch.where(samples < -0.999, cdf_plus, cdf_plus - cdf_minus)
    probability = torch.where(samples > 0.999, 1.0 - cdf_minus, probability)
    return torch.log(probability.clamp(min=MIN_PROBABILITY))


def _log_density(x: torch.Tensor) -> torch.Tensor:
    """Of the standard normal distribution."""
    return -0.5 * x**2 - 0.5 * math.log(2 * math.pi)


def _log_probability_above(x: torch.Tensor) -> torch.Tensor:
    """
    Of the standard normal distribution: log P(X > x). Not `torch.special.log_ndtr`, whose gradient in float32 loses
    digits from 100 standard deviations on, and becomes 0 or infinite.
    """
    # Each side computes harmless values where the other is taken: NaN would reach the gradient through `torch.where`.
    tail, body = x.clamp(min=0), x.clamp(max=0)
    log_tail = torch.log(0.5 * torch.special.erfcx(tail / math.sqrt(2))) - 0.5 * tail**2
    return torch.where(x > 0, log_tail, torch.log1p(-0.5 * torch.erfc(-body / math.sqrt(2))))


def _log_probability_of_bin(middle: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """
    Logarithm of the standard normal probability of [middle - half, middle + half], for `middle` >= 0.

    A difference of two cdfs loses all digits of float32 if the bin is narrow (one of 65536 levels is 3e-5 wide), and
    vanishes far from the mean. So narrow bins are integrated: density in the middle times width times the mean over
    the bin of exp(-middle * s - s^2 / 2), s being the distance from the middle. Others are differences of logarithms.
    """
    slope = middle * half
    is_narrow = (half <= NARROW) & (slope <= MAX_SLOPE)
    # As above, each way computes harmless values where the other is taken.
    width, rise = torch.where(is_narrow, half, NARROW), torch.where(is_narrow, slope, 0.0)
    mean = torch.zeros_like(width)
    for point, weight in zip(POINTS, WEIGHTS, strict=True):
        mean = mean + weight * torch.cosh(point * rise) * torch.exp(-0.5 * (point * width) ** 2)
    narrow = _log_density(torch.where(is_narrow, middle, 0.0)) + torch.log(2 * width) + torch.log(mean)

    low, high = torch.where(is_narrow, 0.0, middle - half), torch.where(is_narrow, 1.0, middle + half)
    tail = _log_probability_above(low)
    # exp(x^2 / 2) times the probability above x decreases with x, hence the bound, which rounding could exceed.
    ratio = torch.minimum(_log_probability_above(high) - tail, -0.5 * (high - low) * (high + low))
    return torch.where(is_narrow, narrow, tail + torch.log1p(-torch.exp(ratio)))
