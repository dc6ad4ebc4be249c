"""
The decoder for any number of levels against the exact normal distribution with 60 digits, sums over all bins, the
papers' code for 256 levels, and `torch.distributions` for continuous data.
"""

import math

import mpmath
import pytest
import torch
from tolerances import ONE_LAYER, rounding_errors
from torch.distributions import Normal
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.gaussians import discretized_gaussian_log_likelihood
from diffusers_adm.training.losses import training_losses


LEVELS = [2, 3, 16, 255, 257, 4096, 65536]


def levels_of(num_levels):
    return torch.linspace(-1, 1, num_levels, dtype=torch.float64)


def exact(sample, mean, log_std, num_levels):
    """Log-probability of a bin, and its derivatives by mean and log_std."""
    sample, mean, log_std = (mpmath.mpf(value) for value in (sample, mean, log_std))
    std, half = mpmath.exp(log_std), mpmath.mpf(1) / (num_levels - 1)
    low = -mpmath.inf if sample < -1 + half else (sample - half - mean) / std
    high = mpmath.inf if sample > 1 - half else (sample + half - mean) / std

    def above(x):
        return mpmath.erfc(x / mpmath.sqrt(2)) / 2

    def density(x):
        return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)

    # In the tail of both ends, where the difference keeps its digits.
    probability = above(low) - above(high) if low + high > 0 else above(-high) - above(-low)
    by_mean = (density(low) - density(high)) / std / probability
    moments = [0 if mpmath.isinf(x) else x * density(x) for x in (low, high)]
    return mpmath.log(probability), by_mean, (moments[0] - moments[1]) / probability


def papers_code(x, means, log_scales):
    """guided-diffusion's decoder, as published, but for the names."""

    def approx_standard_normal_cdf(x):
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))

    centered_x = x - means
    inv_stdv = torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_stdv * (centered_x + 1.0 / 255.0))
    cdf_min = approx_standard_normal_cdf(inv_stdv * (centered_x - 1.0 / 255.0))
    log_cdf_plus = torch.log(cdf_plus.clamp(min=1e-12))
    log_one_minus_cdf_min = torch.log((1.0 - cdf_min).clamp(min=1e-12))
    log_probs = torch.where(x > 0.999, log_one_minus_cdf_min, torch.log((cdf_plus - cdf_min).clamp(min=1e-12)))
    return torch.where(x < -0.999, log_cdf_plus, log_probs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_levels", LEVELS)
def test_log_probability_is_exact(num_levels, dtype, tolerance):
    """
    In all bins, from the middle to millions of standard deviations away: relative to 1 + |log-probability|. The
    gradients too, and none is NaN or 0 where there is one: that of the mean up to the rounding of the bin's edges.
    """
    rows = [
        (2 * k / (num_levels - 1) - 1, 2 * k / (num_levels - 1) - 1 - offset, log_std)
        for k in sorted({0, 1, num_levels // 3, num_levels - 2, num_levels - 1})
        for offset in (1e-6, 1e-4, 0.003, -0.05, 0.3, -1.7, 3.0)
        for log_std in (-12, -7, -5.3, -4, -2, 0, 3)
    ]
    samples, mean, log_std = torch.tensor(rows, dtype=torch.float64).to(dtype).unbind(dim=1)
    mean, log_std = mean.requires_grad_(), log_std.requires_grad_()
    actual = discretized_gaussian_log_likelihood(samples, mean, log_std, num_levels)
    assert actual.dtype == dtype
    gradients = torch.autograd.grad(actual.sum(), (mean, log_std))
    with mpmath.workdps(60):
        places = zip(samples.tolist(), mean.tolist(), log_std.tolist(), strict=True)
        expected = torch.tensor(
            [[float(value) for value in exact(*place, num_levels)] for place in places], dtype=torch.float64
        )
    for found, value, margin in zip((actual, *gradients), expected.T, (1, 30, 10), strict=True):
        assert found.isfinite().all()
        assert ((found.double() - value).abs() <= margin * tolerance * (1 + value.abs())).all()
        clear = value.abs() > 1e-6
        assert (found.abs() > 0)[clear].all()


@pytest.mark.parametrize("std", [1e-6, 1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.003, 1.0])
@pytest.mark.parametrize("num_levels", [2, 17, 4096, 65536])
def test_probabilities_sum_to_one(num_levels, mean, std):
    levels = levels_of(num_levels)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        means = torch.full_like(levels, mean, dtype=torch.float64)
        log_std = torch.full_like(levels, math.log(std)).to(dtype)
        result = discretized_gaussian_log_likelihood(levels.to(dtype), means.to(dtype), log_std, num_levels)
        if dtype == torch.float32 and std < 0.01:  # a level itself is rounded to 3e-8
            tolerance = 3e-8 / std + 2e-5
        assert result.double().exp().sum().item() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("num_levels", [4096, 65536])
def test_difference_of_cdfs_in_float32_is_no_way(num_levels):
    """What the papers' formula gives for narrow bins: errors of percents, or a probability of 0."""
    levels = levels_of(num_levels)[:: num_levels // 64].float()
    mean, std, half = torch.tensor(0.1), torch.tensor(0.3), 1 / (num_levels - 1)
    naive = Normal(mean, std).cdf(levels + half) - Normal(mean, std).cdf(levels - half)
    precise = Normal(mean.double(), std.double())
    expected = (precise.cdf(levels.double() + half) - precise.cdf(levels.double() - half))[1:-1]
    actual = discretized_gaussian_log_likelihood(
        levels, mean.expand_as(levels), std.log().expand_as(levels), num_levels
    )
    assert ((naive[1:-1] - expected).abs() / expected).max() > 1e-3
    assert_close(actual[1:-1].double().exp(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_256_levels_are_the_papers_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    samples = (torch.randint(0, 256, (5000,), generator=generator).to(torch.float64) / 127.5 - 1).to(dtype)
    mean = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
    log_std = (torch.randn(5000, generator=generator, dtype=torch.float64) * 3 - 3).to(dtype)
    expected = papers_code(samples, mean, log_std)
    assert torch.equal(discretized_gaussian_log_likelihood(samples, mean, log_std), expected)
    assert torch.equal(discretized_gaussian_log_likelihood(samples, mean, log_std, num_levels=256), expected)


def test_continuous_data():
    """The density is that of the scaled values; in another unit it differs by the logarithm of the unit."""
    generator = torch.Generator().manual_seed(0)
    samples, mean, log_std = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(samples, mean, log_std, num_levels=None)
    assert_close(actual, Normal(mean, log_std.exp()).log_prob(samples), rtol=1e-12, atol=1e-12)
    assert (actual > 0).any()  # densities, not probabilities
    scaled = discretized_gaussian_log_likelihood(500 * samples, 500 * mean, log_std + math.log(500), num_levels=None)
    assert_close(scaled, actual - math.log(500), rtol=1e-12, atol=1e-12)


def test_many_levels_approach_the_density():
    """Probability = density x width of a bin: the error of the logarithm is of the order of width^2 / std^2."""
    samples = levels_of(65536)[1000:64000:700]
    mean, log_std = torch.full_like(samples, 0.2), torch.full_like(samples, -1.0)
    density = discretized_gaussian_log_likelihood(samples, mean, log_std, num_levels=None)
    probability = discretized_gaussian_log_likelihood(samples, mean, log_std, num_levels=65536)
    assert_close(probability, density + math.log(2 / 65535), rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_too_few_levels_are_refused(num_levels):
    with pytest.raises(ValueError, match=f"`num_levels` is {num_levels}; it must be at least 2, or None"):
        discretized_gaussian_log_likelihood(torch.zeros(2), torch.zeros(2), torch.zeros(2), num_levels)


class _NoSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a value was read on the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_levels", [256, 65536, None])
def test_values_are_not_read_on_the_host(num_levels):
    samples = torch.linspace(-1, 1, 50)
    with _NoSynchronisation():
        discretized_gaussian_log_likelihood(samples, samples / 2, samples - 3, num_levels)


@pytest.mark.parametrize("num_levels", [2, 4096, 65536, None])
def test_bound_and_losses_use_the_levels(num_levels):
    """Only the first timestep has a decoder."""
    scheduler = LearnedVarianceDDPMScheduler()
    generator = torch.Generator().manual_seed(0)
    x_0 = (torch.rand(3, 2, 4, 6, generator=generator, dtype=torch.float64) * 2 - 1).float()
    noise, t = torch.randn(3, 2, 4, 6, generator=generator), torch.tensor([0, 1, 700])
    output = torch.randn(3, 4, 4, 6, generator=generator)
    x_t = scheduler.add_noise(x_0, noise, t)
    bound = scheduler.variational_bound(output, x_0, x_t, t, num_levels=num_levels)
    in_8_bits = scheduler.variational_bound(output, x_0, x_t, t)
    assert rounding_errors(bound[1:], in_8_bits[1:]) <= ONE_LAYER
    mean, log_variance, _ = scheduler.predicted_distribution(output, t, x_t)
    log_likelihood = discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance, num_levels)[0]
    assert_close(bound[0], -log_likelihood.mean() / math.log(2))
    assert bound[0] != in_8_bits[0]

    expected = scheduler.variational_bound(output, x_0, x_t, t, clip_sample=False, num_levels=num_levels)
    for objective, factor in (("vlb", 1000), ("hybrid", 1), ("hybrid_unscaled", 1)):
        losses = training_losses(
            lambda *_: (output,), scheduler, x_0, t, noise=noise, objective=objective, num_levels=num_levels
        )
        assert_close(losses.vb, factor * expected)


@pytest.mark.parametrize("num_levels", [4096, 65536, None])
def test_gradients_at_the_start_of_training(num_levels):
    """A network of zeros with a learned variance, at the first timestep: finite gradients everywhere, none is 0."""
    scheduler = LearnedVarianceDDPMScheduler()
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, num_levels or 4096, (2, 2, 4, 6), generator=generator)
    x_0 = (2 * levels.double() / ((num_levels or 4096) - 1) - 1).float()
    output = torch.zeros(2, 4, 4, 6, requires_grad=True)
    losses = training_losses(
        lambda *_: (output,), scheduler, x_0, torch.tensor([0, 0]), objective="vlb", num_levels=num_levels
    )
    losses.loss.sum().backward()
    assert losses.loss.isfinite().all()
    assert output.grad.isfinite().all()
    assert (output.grad != 0).all()
