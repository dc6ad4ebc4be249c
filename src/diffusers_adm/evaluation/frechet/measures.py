"""
Measures of sets of samples, computed in float64 from feature vectors or class probabilities.

Frechet distance (Heusel et al. 2017, https://huggingface.co/papers/1706.08500, eq. 6; Dowson & Landau 1982), kernel
distance (Binkowski et al. 2018, https://huggingface.co/papers/1801.01401), inception score (Salimans et al. 2016,
https://huggingface.co/papers/1606.03498, section 4), improved precision and recall (Kynkäänniemi et al. 2019,
https://huggingface.co/papers/1904.06991, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch


# Distances in memory at a time: 128 MB in float64.
MAX_DISTANCES = 2**24
# Maximum deviation of a sum of probabilities from 1: the rounding of float16 for a thousand classes.
PROBABILITY_TOLERANCE = 1e-2

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
        vectors = _matrix("vectors", vectors)
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
    mean1, mean2 = _float64("mean1", mean1, (dim,)), _float64("mean2", mean2, (dim,))
    cov1, cov2 = _float64("cov1", cov1, (dim, dim)), _float64("cov2", cov2, (dim, dim))
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


def inception_score(probabilities: ArrayLike, splits: int = 10) -> tuple[float, float]:
    r"""
    `exp(mean of KL(p(y | x) || p(y)))`: from 1, if the classifier does not distinguish the images, to the number of
    classes, if it is certain of each image and finds all classes equally often.

    Args:
        probabilities (`torch.Tensor` or `np.ndarray` of shape `(num_images, num_classes)`): Class probabilities of each
            image, after the softmax; in random order, since splits are consecutive.
        splits (`int`, defaults to 10): Number of parts of about equal size that are scored separately; p(y) is the mean
            over a part.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the parts; the latter is 0 for one part.
    """
    probabilities = _matrix("probabilities", probabilities)
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"`splits` is {splits}; it must be between 1 and {len(probabilities)}, the number of images.")
    sums = probabilities.sum(dim=1)
    if (probabilities < 0).any() or (sums - 1).abs().max() > PROBABILITY_TOLERANCE:
        raise ValueError(
            f"`probabilities` have sums from {sums.min():.4g} to {sums.max():.4g} and values from "
            f"{probabilities.min():.4g} on. Pass probabilities, the softmax of the logits."
        )
    scores = torch.empty(splits, dtype=torch.float64)
    for number, part in enumerate(probabilities.tensor_split(splits)):
        divergences = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0, keepdim=True))
        scores[number] = divergences.sum(dim=1).mean().exp()
    return scores.mean().item(), scores.std(correction=0).item()


def kernel_distance(real: ArrayLike, fake: ArrayLike) -> tuple[float, float]:
    r"""
    Squared maximum mean discrepancy with the kernel `(x . y / dim + 1) ** 3`, and its standard error: with features of
    the Inception network, the KID (Binkowski et al. 2018, https://huggingface.co/papers/1801.01401, section 4).

    The estimate is unbiased, unlike the Frechet distance, so that few images can be compared; around 0 it may be
    negative. The standard error is the jackknife's, over both sets.

    Args:
        real, fake (`torch.Tensor` or `np.ndarray` of shapes `(num_real, dim)` and `(num_fake, dim)`): Features, 3 or
            more of each.

    Returns:
        `tuple[float, float]`: Distance and standard error.

    Raises:
        ValueError: For fewer features, other widths, or values that are not finite.
    """
    sets = {"real": _matrix("real", real), "fake": _matrix("fake", fake)}
    x, y = sets.values()
    for name, features in sets.items():
        if len(features) < 3:
            raise ValueError(f"`{name}` has {len(features)} points; the jackknife needs 3 or more.")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"`real` has {x.shape[1]} features and `fake` {y.shape[1]}; use the same network for both.")
    m, n = len(x), len(y)
    # Sums over the other points of the own set, and over all of the other set, for each point.
    within_x, within_y = (_kernel_sums(z, z) - _kernel(z, z) for z in (x, y))
    across_x, across_y = _kernel_sums(x, y), _kernel_sums(y, x)
    sum_x, sum_y, sum_xy = within_x.sum(), within_y.sum(), across_x.sum()
    distance = sum_x / (m * (m - 1)) + sum_y / (n * (n - 1)) - 2 * sum_xy / (m * n)
    # The distance without each point of one set: its pairs are missing in two of the three sums.
    without_x = (
        (sum_x - 2 * within_x) / ((m - 1) * (m - 2)) + sum_y / (n * (n - 1)) - 2 * (sum_xy - across_x) / ((m - 1) * n)
    )
    without_y = (
        sum_x / (m * (m - 1)) + (sum_y - 2 * within_y) / ((n - 1) * (n - 2)) - 2 * (sum_xy - across_y) / (m * (n - 1))
    )
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return distance.item(), variance.sqrt().item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The polynomial kernel of each point of `x` and that of `y` in the same row."""
    return ((x * y).sum(dim=1) / x.shape[1] + 1) ** 3


def _kernel_sums(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The sum of the polynomial kernel over all `others`, for each point."""
    size = max(1, MAX_DISTANCES // len(others))
    return torch.cat([((rows @ others.T / rows.shape[1] + 1) ** 3).sum(dim=1) for rows in points.split(size)])


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> tuple[float, float]:
    r"""
    Improved precision and recall: the manifold of a set is the union of balls around its points, whose radii reach to
    the k-th nearest neighbour in the set. Both depend on k and on the numbers of points (more points, smaller balls):
    compare only results with the same numbers.

    Args:
        real, fake (`torch.Tensor` or `np.ndarray` of shape `(num, dim)`): Features of images and of samples.
        k (`int`, defaults to 3): k of the k-nearest-neighbour manifold; 3 in the paper.

    Returns:
        `tuple[float, float]`: Precision, the fraction of `fake` in the manifold of `real`; and recall, the fraction of
        `real` in the manifold of `fake`.
    """
    real, fake = _matrix("real", real), _matrix("fake", fake)
    check_neighbours(k, real=len(real), fake=len(fake))
    precision = _share_covered(fake, real, _neighbour_radii(real, k))
    recall = _share_covered(real, fake, _neighbour_radii(fake, k))
    return precision, recall


def check_neighbours(k: int, **numbers: int) -> None:
    """Checks that every point has a k-th neighbour in sets of these numbers of images."""
    for name, number in numbers.items():
        if not 1 <= k < number:
            raise ValueError(f"`k` is {k} and `{name}` holds {number} images; `k` must be at least 1 and below that.")


def _neighbour_radii(points: torch.Tensor, k: int) -> torch.Tensor:
    # The nearest point is the point itself, so the k-th neighbour is number k + 1.
    return torch.cat([rows.kthvalue(k + 1, dim=1).values for _, rows in _distances(points, points)])


def _share_covered(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    covered = [(rows <= radii).any(dim=1) for _, rows in _distances(points, centres)]
    return torch.cat(covered).double().mean().item()


def mean_pairwise_distance(features: ArrayLike) -> tuple[float, float]:
    r"""
    Mean Euclidean distance of all pairs of points, a measure of diversity; and its standard error.

    The standard error is the jackknife's: omitting point i changes the mean linearly in r_i, the sum of the distances
    from i. It assumes independent points; for samples with balanced classes it is rather too large.

    Args:
        features (`torch.Tensor` or `np.ndarray` of shape `(num, dim)`): 2 or more points; with 2 the error is NaN.

    Returns:
        `tuple[float, float]`: Mean and standard error.
    """
    features = _matrix("features", features)
    n = len(features)
    if n < 2:
        raise ValueError(f"`features` has {n} points; pairs need 2 or more.")
    sums = []
    for start, rows in _distances(features, features):
        rows.diagonal(start).zero_()  # the distance to itself is not 0 after rounding
        sums.append(rows.sum(dim=1))
    from_each = torch.cat(sums)
    mean = from_each.sum().item() / (n * (n - 1))
    if n == 2:
        return mean, math.nan
    # Without point i: (sum of all - 2 r_i) / ((n - 1) (n - 2)).
    left_out = 2 * from_each / ((n - 1) * (n - 2))
    variance = (n - 1) * left_out.var(correction=0)
    return mean, variance.sqrt().item()


def _distances(points: torch.Tensor, others: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the matrix of distances in blocks: number of the first row, and `(rows, len(others))`."""
    size = max(1, MAX_DISTANCES // len(others))
    for start in range(0, len(points), size):
        yield start, torch.cdist(points[start : start + size], others)


def _matrix(name: str, values: ArrayLike) -> torch.Tensor:
    values = torch.as_tensor(values)
    if values.ndim != 2:
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}; it must be a matrix with one row per image.")
    return _float64(name, values, values.shape)


def _float64(name: str, values: ArrayLike, shape: Sequence[int]) -> torch.Tensor:
    values = torch.as_tensor(values).detach().to(torch.float64)
    if values.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}; it must be {shape}, given `mean1`.")
    if not values.isfinite().all():
        raise ValueError(f"`{name}` holds values that are not finite.")
    return values
