"""
Sampling and the bound where the truth is known: the scheduler gets the *optimal* network of an analytic distribution.

For Gaussian data the reverse of any process, respaced or not, is Gaussian again, so ancestral sampling with the optimal
mean and variance has no discretisation error. What remains, in closed form (V_t = bar alpha_t s^2 + 1 - bar alpha_t):
- sampling starts from N(0, 1) instead of N(sqrt(bar alpha_T) m, V_T): m is missed by bar alpha_T s^2 m / V_T;
- the last step adds no noise: the variance lacks Var[x_0 | x_first] = s^2 (1 - bar alpha_first) / V_first.
DDIM does have a discretisation error; for a Gaussian it is a product of cosines (see below).
"""

import math

import pytest
import torch
from analytic_distributions import BETAS, Gaussian, Mixture, OptimalNetwork, cumulative_alphas

from diffusers_adm import LearnedVarianceDDPMScheduler


STEPS = [1000, 100, 25]
SCHEDULES = list(BETAS)
# Samples: about the same work for each number of steps.
NUMBER = {1000: 4_000, 100: 16_000, 25: 40_000}
# Standard deviations from narrow (where beta_tilde is the right variance) to 1 (where beta is).
GAUSSIAN = Gaussian(mean=[0.0, 0.3, -0.5, 0.8], std=[0.1, 0.3, 0.6, 1.0])
MIXTURE = Mixture(weights=[0.3, 0.7], means=[[-0.8, -0.4], [0.5, 0.6]], stds=[0.15, 0.35])


def scheduler_and_network(data, schedule, steps, variance_type="learned_range"):
    """Both reverse the same process, with the first and the last of 1000 timesteps."""
    scheduler = LearnedVarianceDDPMScheduler(
        beta_schedule=schedule, variance_type=variance_type, clip_sample=False, num_train_timesteps=1000
    )
    scheduler.set_timesteps(timestep_respacing=str(steps))
    kept = scheduler.timesteps.tolist()[::-1]
    assert kept[0] == 0
    assert kept[-1] == 999
    assert len(kept) == steps
    return scheduler, OptimalNetwork(data, BETAS[schedule](1000), kept, variance_type)


def generate(scheduler, network, number, eta=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (number, len(network.data.mean), 1, 1)
    sample = torch.randn(shape, generator=generator, dtype=dtype)
    for t in scheduler.timesteps:
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        sample = scheduler.step(network(sample, t), t, sample, eta=eta, variance_noise=noise).prev_sample
    return sample.flatten(1).double()


def propagate(scheduler, network, eta=None):
    """
    Mean and variance of what sampling makes of N(0, 1), without sampling: with Gaussian data a step is
    x_prev = a x + b + c noise in every coordinate, and three probes give a, b and c.
    """
    shape = (3, len(network.data.mean), 1, 1)
    probes = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1).expand(shape)
    noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1).expand(shape)
    mean, variance = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    for t in scheduler.timesteps:
        step = scheduler.step(network(probes, t), t, probes, eta=eta, variance_noise=noise).prev_sample
        b, a_plus_b, b_plus_c = step.flatten(1)
        mean, variance = (a_plus_b - b) * mean + b, (a_plus_b - b) ** 2 * variance + (b_plus_c - b) ** 2
    return mean, variance


def ancestral_truth(data, schedule):
    """Mean and variance at the end of exact ancestral sampling: the data's, but for the two effects named above."""
    bar_alphas = cumulative_alphas(BETAS[schedule](1000))
    noisy_first, noisy_last = (b * data.std**2 + 1 - b for b in (bar_alphas[0], bar_alphas[-1]))
    # Each step's gain is the covariance of neighbours over V_t; the product over all timesteps telescopes.
    gain = math.sqrt(bar_alphas[-1]) * data.std**2 / noisy_last
    mean = data.mean - gain * math.sqrt(bar_alphas[-1]) * data.mean
    variance = data.std**2 - data.std**2 * (1 - bar_alphas[0]) / noisy_first + gain**2 * (1 - noisy_last)
    return mean, variance


def assert_within_errors(samples, mean, covariance, mean_bias=0.0, covariance_bias=0.0):
    """Mean and covariance within 5 standard errors, estimated from the samples, plus a stated bias."""
    number = len(samples)
    products = (samples - mean)[:, :, None] * (samples - mean)[:, None, :]
    mean_error, covariance_error = (samples.mean(0) - mean).abs(), (products.mean(0) - covariance).abs()
    assert (mean_error <= 5 * samples.std(0) / number**0.5 + mean_bias).all(), mean_error
    assert (covariance_error <= 5 * products.std(0) / number**0.5 + covariance_bias).all(), covariance_error


class TestGaussian:
    @pytest.mark.parametrize("variance_type", ["learned_range", "learned_log"])
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_ancestral_sampling_is_exact_at_any_number_of_steps(self, schedule, steps, variance_type):
        scheduler, network = scheduler_and_network(GAUSSIAN, schedule, steps, variance_type)
        mean, variance = propagate(scheduler, network)
        expected_mean, expected_variance = ancestral_truth(GAUSSIAN, schedule)
        # float64 throughout: 1000 factors, and the rounding of x_T times cosine's sqrt(1 / bar alpha_T) = 2e4.
        torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(variance, expected_variance, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_ancestral_samples_have_the_mean_and_covariance_of_the_data(self, schedule, steps):
        scheduler, network = scheduler_and_network(GAUSSIAN, schedule, steps)
        samples = generate(scheduler, network, NUMBER[steps])
        # The last step's missing noise is 1e-4 at most (beta_0); the rest comes to less than that.
        assert_within_errors(samples, GAUSSIAN.mean, GAUSSIAN.covariance, mean_bias=1e-4, covariance_bias=1e-4)

    @pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
    def test_the_wrong_variance_is_told_apart_at_25_steps(self, variance_type):
        """Known wrong: a fixed variance, however good the network. The checks above would be worthless if it passed."""
        scheduler, network = scheduler_and_network(GAUSSIAN, "squaredcos_cap_v2", 25, variance_type)
        samples = generate(scheduler, network, NUMBER[25])
        with pytest.raises(AssertionError):
            assert_within_errors(samples, GAUSSIAN.mean, GAUSSIAN.covariance, mean_bias=1e-4, covariance_bias=1e-4)
        ratio = samples.var(0) / GAUSSIAN.std**2
        # beta_tilde is too small for the widest coordinate, beta too large for the narrowest.
        assert ratio[3] < 0.95 if variance_type == "fixed_small" else ratio[0] > 1.05

    def test_fixed_large_is_exact_for_unit_variance_and_fixed_small_for_a_point(self):
        """DDPM, section 3.2: beta is the reverse variance of standard normal data, beta_tilde that of one point."""
        data = Gaussian(mean=[0.4], std=[1.0])
        scheduler, network = scheduler_and_network(data, "squaredcos_cap_v2", 25, "fixed_large")
        torch.testing.assert_close(
            propagate(scheduler, network)[1], ancestral_truth(data, "squaredcos_cap_v2")[1], rtol=1e-9, atol=0
        )
        point = Gaussian(mean=[0.4], std=[0.0])
        mean, variance = propagate(*scheduler_and_network(point, "squaredcos_cap_v2", 25, "fixed_small"))
        torch.testing.assert_close(mean, point.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(variance, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-9)

    @staticmethod
    def squared_cosines(data, schedule, kept):
        """
        DDIM's shrinkage of the variance. With u_t = (s sqrt(bar alpha_t), sqrt(1 - bar alpha_t)), |u_t|^2 = V_t, one
        step multiplies x by <u_t-1, u_t> / V_t: all steps together multiply the variance by s^2 / V_T, as they should,
        and by cos^2 of each angle between neighbours, the discretisation error. Also returned: the sum of angle^2.
        """
        bar_alphas = cumulative_alphas(BETAS[schedule](1000))
        angles = [torch.zeros_like(data.std)]  # u of the clean sample points along the first axis
        for t in kept:
            signal = math.sqrt(bar_alphas[t]) * data.std
            angles.append(torch.atan2(torch.full_like(signal, math.sqrt(1 - bar_alphas[t])), signal))
        steps = torch.stack(angles).diff(dim=0)
        return torch.cos(steps).square().prod(dim=0), steps.square().sum(dim=0)

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_deterministic_ddim(self, schedule, steps):
        scheduler, network = scheduler_and_network(GAUSSIAN, schedule, steps)
        kept = scheduler.timesteps.tolist()[::-1]
        shrinkage, bound = self.squared_cosines(GAUSSIAN, schedule, kept)
        bar_alpha_last = cumulative_alphas(BETAS[schedule](1000))[-1]
        noisy_last = bar_alpha_last * GAUSSIAN.std**2 + 1 - bar_alpha_last
        mean, variance = propagate(scheduler, network, eta=0.0)
        torch.testing.assert_close(variance, GAUSSIAN.std**2 / noisy_last * shrinkage, rtol=1e-9, atol=1e-10)
        # The mean is reached from 0 instead of sqrt(bar alpha_T) m.
        expected_mean = GAUSSIAN.mean - GAUSSIAN.std * (bar_alpha_last / noisy_last * shrinkage).sqrt() * GAUSSIAN.mean
        torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-9)
        # Against the data: 1 - cos^2 < angle^2, summed over the steps. The angles sum to 90 degrees, so N equal steps
        # lose (pi / 2)^2 / N of the variance, 10% with 25 (a narrow coordinate turns in fewer steps and loses more).
        assert ((variance / GAUSSIAN.std**2 - 1).abs() <= bound + 1e-4).all()
        if schedule == "squaredcos_cap_v2":  # with unit variance its angles are the equal ones (but for its offset)
            assert bound[3].item() == pytest.approx((math.pi / 2) ** 2 / steps, rel=0.1)

    @pytest.mark.parametrize("steps", STEPS)
    def test_ddim_samples_have_the_mean_and_covariance_of_the_data(self, steps):
        scheduler, network = scheduler_and_network(GAUSSIAN, "squaredcos_cap_v2", steps)
        samples = generate(scheduler, network, NUMBER[steps], eta=0.0)
        shrinkage, _ = self.squared_cosines(GAUSSIAN, "squaredcos_cap_v2", scheduler.timesteps.tolist()[::-1])
        bias = torch.diag(GAUSSIAN.std**2 * (1 - shrinkage))
        # The mean is approached from 0: sqrt(bar alpha_T) = 5e-5 of it is missing.
        assert_within_errors(samples, GAUSSIAN.mean, GAUSSIAN.covariance, mean_bias=5e-5, covariance_bias=bias)
        assert_within_errors(samples, GAUSSIAN.mean, GAUSSIAN.covariance - bias, mean_bias=5e-5)

    @pytest.mark.parametrize("steps", STEPS)
    def test_ddim_with_full_noise_is_ancestral_sampling_with_beta_tilde(self, steps):
        """DDIM, section 4.1: eta = 1. Whatever the variance channels say."""
        ddim = propagate(*scheduler_and_network(GAUSSIAN, "linear", steps), eta=1.0)
        ancestral = propagate(*scheduler_and_network(GAUSSIAN, "linear", steps, "fixed_small"))
        torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-10)


class TestMixture:
    """
    The reverse of a mixture is no Gaussian, so nothing is exact. But a step whose mean and variance are the optimal
    ones gives x_{t-1} the right mean and variance if x_t has the right distribution; what goes wrong is the shape in
    between and the correlation inside one step, which the (diagonal) variance channels cannot express: an error of
    order 1 / N. A million samples with N = 25 have covariances too small by up to 0.019 (linear schedule), of 0.45.
    Bias = 0.5 / N is that.
    """

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_ancestral_sampling(self, schedule, steps):
        samples = generate(*scheduler_and_network(MIXTURE, schedule, steps), NUMBER[steps])
        assert_within_errors(
            samples, MIXTURE.mean, MIXTURE.covariance, mean_bias=0.5 / steps, covariance_bias=0.5 / steps
        )

    @pytest.mark.parametrize("steps", STEPS)
    def test_deterministic_ddim(self, steps):
        samples = generate(*scheduler_and_network(MIXTURE, "squaredcos_cap_v2", steps), NUMBER[steps], eta=0.0)
        # What a Gaussian loses with this schedule (above), of the largest variance.
        bias = (math.pi / 2) ** 2 / steps * MIXTURE.covariance.max().item()
        assert_within_errors(samples, MIXTURE.mean, MIXTURE.covariance, mean_bias=bias, covariance_bias=bias)

    def test_a_variance_that_is_too_small_is_told_apart_at_25_steps(self):
        """Known wrong. (Too large a one hardly shows here: most of the covariance is the distance of the modes.)"""
        samples = generate(*scheduler_and_network(MIXTURE, "squaredcos_cap_v2", 25, "fixed_small"), NUMBER[25])
        with pytest.raises(AssertionError):
            assert_within_errors(samples, MIXTURE.mean, MIXTURE.covariance, mean_bias=0.02, covariance_bias=0.02)


class TestBound:
    """
    Gaussian data, snapped to the 256 levels of 8-bit images: the bound of the optimal network is the true number of
    bits, because the reverse process is Gaussian and its variance is learned. The same holds for a respaced process.
    """

    levels = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1

    def true_bits(self, std):
        """Entropy of N(0, std^2) whose mass is collected in 256 bins, the outer ones reaching to infinity."""
        infinity = torch.tensor([math.inf], dtype=torch.float64)
        edges = torch.cat([-infinity, self.levels[:-1] + 1 / 255, infinity])
        probabilities = torch.special.ndtr(edges / std).diff()
        return -torch.xlogy(probabilities, probabilities).sum().item() / math.log(2)

    @staticmethod
    def bound(std, variance_type, respacing=None):
        """
        Prior plus the terms at all timesteps, one example per timestep.

        An example holds many independent pixels, a low-discrepancy set of (x_0, noise) instead of a random one: the
        sum over a thousand timesteps then has an error of 0.003 bits (against four times as many), random ones 0.03.
        """
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type, clip_sample=False)
        scheduler.set_timesteps(timestep_respacing=respacing or "1000")
        kept = scheduler.timesteps.tolist()[::-1]
        # Snapping adds the variance of a uniform bin to the data; the decoder's bins add it again to the last step.
        bin_variance = (2 / 255) ** 2 / 12
        data = Gaussian(mean=[0.0], std=[math.sqrt(std**2 + bin_variance)])
        network = OptimalNetwork(data, BETAS["linear"](1000), kept, variance_type, first_variance_offset=-bin_variance)

        total = 0.0
        for timesteps, pixels in ((kept[:1], 2**16), (kept[1:], 2**10)):
            points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(pixels, dtype=torch.float64)
            original, noise = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).T.float()
            original = (((std * original).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            original, noise = original.expand(len(timesteps), 1, -1), noise.expand(len(timesteps), 1, -1)
            timesteps = torch.tensor(timesteps)
            noisy = scheduler.add_noise(original, noise, timesteps)
            # The network knows nothing of neighbours: every pixel is an example to it.
            output = network(noisy.reshape(-1, 1, 1, 1), timesteps.repeat_interleave(pixels))
            output = output.reshape(len(timesteps), pixels, -1).transpose(1, 2)
            total += scheduler.variational_bound(output, original, noisy, timesteps, timestep_respacing=respacing).sum()
            prior = scheduler.prior_bits_per_dim(original[:1])
        return (total + prior).item()

    @pytest.mark.parametrize("respacing", [None, "100"])
    @pytest.mark.parametrize("variance_type", ["learned_range", "learned_log"])
    @pytest.mark.parametrize("std", [0.25, 0.1])
    def test_equals_the_entropy(self, std, variance_type, respacing):
        assert self.bound(std, variance_type, respacing) == pytest.approx(self.true_bits(std), abs=0.01)

    @pytest.mark.parametrize("std", [0.25, 0.1])
    def test_a_fixed_variance_costs_bits_and_more_of_them_with_fewer_steps(self, std):
        """Known wrong, and Improved DDPM, figure 3."""
        full, short = self.bound(std, "fixed_small"), self.bound(std, "fixed_small", "100")
        assert full > self.true_bits(std) + 0.1
        assert short > full + 0.1
        assert self.bound(std, "fixed_large") > self.true_bits(std) + 0.05
