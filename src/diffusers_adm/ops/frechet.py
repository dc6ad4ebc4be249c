"""
Frechet distance of Gaussians (Heusel et al. 2017, https://huggingface.co/papers/1706.08500, eq. 6; Dowson & Landau
1982), and the Gaussian of vectors that arrive in chunks; in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


ArrayLike = torch.Tensor | np.ndarray


class GaussianStatistics:
    """
    Mean and covariance of vectors that arrive in chunks and are not kept (Chan et al. 1979, eq. 2.1). Unlike sums of
    squares, it stays accurate if the mean is large compared with the spread.

    Attributes:
        count (`int`): Number of vectors so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0)

    def update(self, vectors: ArrayLike) -> None:
        """Adds vectors, `(n, dim)`."""
        vectors = as_matrix("vectors", vectors)
        if self.count and vectors.shape[1] != len(self._mean):
            raise ValueError(f"`vectors` have {vectors.shape[1]} entries; those before had {len(self._mean)}.")
        n = len(vectors)
        if n == 0:
            return
        mean = vectors.mean(dim=0)
        centred = vectors - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self._mean, self._scatter = mean, scatter
        else:
            delta, total = mean - self._mean, self.count + n
            self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * n / total)
            self._mean = self._mean + delta * (n / total)
        self.count += n

    @property
    def mean(self) -> torch.Tensor:
        """`(dim,)`, float64."""
        self._check_count(1)
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """`(dim, dim)`, float64; unbiased: divided by the number of vectors minus 1."""
        self._check_count(2)
        return self._scatter / (self.count - 1)

    def _check_count(self, minimum: int) -> None:
        if self.count < minimum:
            raise ValueError(f"There are {self.count} vectors; {minimum} or more are needed.")


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    r"""
    Squared Frechet (2-Wasserstein) distance of two Gaussians: `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`.

    The trace of the root is the sum of the singular values of `C1^(1/2) C2^(1/2)`: nothing is inverted, so the singular
    covariances of fewer samples than dimensions are handled.

    Args:
        mean1, cov1 (`torch.Tensor` or `np.ndarray` of shape `(dim,)` and `(dim, dim)`): Mean and covariance of one
            Gaussian; the covariance is symmetric without negative eigenvalues.
        mean2, cov2 (`torch.Tensor` or `np.ndarray` of shape `(dim,)` and `(dim, dim)`): Those of the other.

    Returns:
        `float`: At least 0. FID is this number (not its root) for Inception features.
    """
    dim = torch.as_tensor(mean1).numel()
    mean1, mean2 = as_float64("mean1", mean1, (dim,)), as_float64("mean2", mean2, (dim,))
    cov1, cov2 = as_float64("cov1", cov1, (dim, dim)), as_float64("cov2", cov2, (dim, dim))
    trace_of_root = torch.linalg.svdvals(_matrix_root("cov1", cov1) @ _matrix_root("cov2", cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding may give a small negative number


def _matrix_root(name: str, covariance: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # Rounding turns the eigenvalues 0 of a singular matrix into about this size, whose roots are not as small.
    rounding = len(covariance) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    asymmetry = (covariance - covariance.T).abs().max()
    scale = covariance.abs().max()
    if asymmetry > 1e-6 * scale or eigenvalues[0] < -1e-6 * scale:
        raise ValueError(
            f"`{name}` is not a covariance: it differs from its transpose by up to {asymmetry:.3g}, and its smallest "
            f"eigenvalue is {eigenvalues[0]:.3g}."
        )
    roots = torch.where(eigenvalues > rounding, eigenvalues, 0).sqrt()
    return (vectors * roots) @ vectors.T


def as_matrix(name: str, values: ArrayLike) -> torch.Tensor:
    """`values`, called `name` in errors, in float64; a `ValueError` unless they are a matrix of finite numbers."""
    values = torch.as_tensor(values)
    if values.ndim != 2:
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}; it must be a matrix with one row per image.")
    return as_float64(name, values, values.shape)


def as_float64(name: str, values: ArrayLike, shape: Sequence[int]) -> torch.Tensor:
    """`values`, called `name` in errors, in float64; a `ValueError` unless they are finite and of this shape."""
    values = torch.as_tensor(values).detach().to(torch.float64)
    if values.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}; it must be {shape}, given `mean1`.")
    if not values.isfinite().all():
        raise ValueError(f"`{name}` holds values that are not finite.")
    return values
