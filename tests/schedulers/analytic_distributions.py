"""
Data distributions for which everything that a network has to learn is known in closed form, and that network.

The forward process makes x_t = sqrt(A) x_0 + sqrt(1 - A) e with A = bar alpha_t. For a Gaussian x_0 of variance s^2 the
pair (x_0, x_t) is Gaussian, so conditioning gives, with V = A s^2 + 1 - A,

    E[x_0 | x_t] = m + sqrt(A) s^2 / V (x_t - sqrt(A) m),        Var[x_0 | x_t] = s^2 (1 - A) / V;

a mixture has one such pair a component, weighed with the component's probability given x_t. In every case

    E[e | x_t] = (x_t - sqrt(A) E[x_0 | x_t]) / sqrt(1 - A),
    Var[x_{t-1} | x_t] = beta_tilde + c^2 Var[x_0 | x_t]        (c: factor of x_0 in the mean of q(x_{t-1} | x_t, x_0)),

for any process, a respaced one with its own beta_tilde and c. All in float64, and none of it imported from the package.
"""

import math
from collections.abc import Sequence

import torch


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    return [start + (end - start) * i / (steps - 1) for i in range(steps)]


def cosine_betas(steps: int) -> list[float]:
    def bar_alpha(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - bar_alpha((i + 1) / steps) / bar_alpha(i / steps), 0.999) for i in range(steps)]


BETAS = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def cumulative_alphas(betas: Sequence[float]) -> list[float]:
    products, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


class Gaussian:
    """Independent coordinates, each with its own mean and standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.std = torch.tensor(std, dtype=torch.float64)
        self.covariance = torch.diag(self.std**2)

    def given_noisy(self, x: torch.Tensor, bar_alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x_0 | x_t] and Var[x_0 | x_t] for x_t of shape (batch, coordinates) and bar alpha of shape (batch, 1)."""
        noisy_variance = bar_alpha * self.std**2 + 1 - bar_alpha
        gain = bar_alpha.sqrt() * self.std**2 / noisy_variance
        mean = self.mean + gain * (x - bar_alpha.sqrt() * self.mean)
        return mean, (self.std**2 * (1 - bar_alpha) / noisy_variance).expand_as(x)


class Mixture:
    """Isotropic Gaussians at several points: correlated coordinates, several modes."""

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.mean = self.weights @ self.means
        centred = self.means - self.mean
        within = (self.weights * self.stds**2).sum() * torch.eye(self.means.shape[1], dtype=torch.float64)
        self.covariance = within + centred.T @ (self.weights[:, None] * centred)

    def given_noisy(self, x: torch.Tensor, bar_alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = bar_alpha.sqrt()
        log_weights, means, variances = [], [], []
        for weight, centre, std in zip(self.weights, self.means, self.stds, strict=True):
            mean, variance = Gaussian(centre.tolist(), [std.item()] * len(centre)).given_noisy(x, bar_alpha)
            noisy_variance = bar_alpha * std**2 + 1 - bar_alpha
            squares = ((x - signal * centre) ** 2 / noisy_variance + torch.log(noisy_variance)).sum(dim=1)
            log_weights.append(weight.log() - 0.5 * squares)
            means.append(mean)
            variances.append(variance)
        given_x = torch.softmax(torch.stack(log_weights), dim=0)[:, :, None]
        means, variances = torch.stack(means), torch.stack(variances)
        mean = (given_x * means).sum(dim=0)
        # Mean of the variances, and variance of the means.
        return mean, (given_x * (variances + (means - mean) ** 2)).sum(dim=0)


class OptimalNetwork:
    """
    What a perfectly trained network gives: E[e | x_t], and Var[x_{t-1} | x_t] as `variance_type` wants it.

    `timesteps` are those of the process to be reversed, ascending. Samples are (batch, coordinates, 1, 1).
    `first_variance_offset` is added to the variance at the first timestep.
    """

    def __init__(
        self,
        data: Gaussian | Mixture,
        betas: Sequence[float],
        timesteps: Sequence[int],
        variance_type: str = "learned_range",
        first_variance_offset: float = 0.0,
    ):
        self.data, self.variance_type = data, variance_type
        kept = [cumulative_alphas(betas)[t] for t in timesteps]
        rows = []
        for i, bar_alpha in enumerate(kept):
            previous = kept[i - 1] if i > 0 else 1.0
            beta = 1 - bar_alpha / previous
            tilde = beta * (1 - previous) / (1 - bar_alpha)
            factor = math.sqrt(previous) * beta / (1 - bar_alpha)
            # learned_range at the first timestep: the second one's beta_tilde stands in for the 0.
            second_beta = 1 - kept[1] / kept[0]
            lower = math.log(tilde if i > 0 else second_beta * (1 - kept[0]) / (1 - kept[1]))
            offset = first_variance_offset if i == 0 else 0.0
            rows.append([bar_alpha, tilde + offset, factor, lower, math.log(beta)])
        self.rows = torch.tensor(rows, dtype=torch.float64)
        self.position = {int(t): i for i, t in enumerate(timesteps)}

    def __call__(self, sample: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        positions = [self.position[t] for t in torch.as_tensor(timestep).reshape(-1).tolist()]
        bar_alpha, tilde, factor, lower, upper = self.rows[positions].T[:, :, None]
        x = sample.double().flatten(1)
        mean, variance = self.data.given_noisy(x, bar_alpha)
        outputs = (x - bar_alpha.sqrt() * mean) / (1 - bar_alpha).sqrt()
        log_variance = torch.log(tilde + factor**2 * variance)
        if self.variance_type == "learned_range":
            outputs = torch.cat([outputs, 2 * (log_variance - lower) / (upper - lower) - 1], dim=1)
        elif self.variance_type == "learned_log":
            outputs = torch.cat([outputs, log_variance], dim=1)
        return outputs[:, :, None, None].to(sample.dtype)
