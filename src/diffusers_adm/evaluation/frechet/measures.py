"""
Measures of sets of samples, computed in float64 from feature vectors or class probabilities. (The Frechet distance is
in `ops/frechet.py`, since training measures it, too.)

Kernel distance (Binkowski et al. 2018, https://huggingface.co/papers/1801.01401), inception score (Salimans et al.
2016, https://huggingface.co/papers/1606.03498, section 4), improved precision and recall (Kynkäänniemi et al. 2019,
https://huggingface.co/papers/1904.06991, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ...ops.frechet import ArrayLike, as_matrix


# Distances in memory at a time: 128 MB in float64.
MAX_DISTANCES = 2**24
# Maximum deviation of a sum of probabilities from 1: the rounding of float16 for a thousand classes.
PROBABILITY_TOLERANCE = 1e-2


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
    probabilities = as_matrix("probabilities", probabilities)
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
    sets = {"real": as_matrix("real", real), "fake": as_matrix("fake", fake)}
    x, y = sets.values()
    check_jackknife(real=len(x), fake=len(y))
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
    real, fake = as_matrix("real", real), as_matrix("fake", fake)
    check_neighbours(k, real=len(real), fake=len(fake))
    precision = _share_covered(fake, real, _neighbour_radii(real, k))
    recall = _share_covered(real, fake, _neighbour_radii(fake, k))
    return precision, recall


def check_neighbours(k: int, **numbers: int) -> None:
    """Checks that every point has a k-th neighbour in sets of these numbers of images."""
    for name, number in numbers.items():
        if not 1 <= k < number:
            raise ValueError(f"`k` is {k} and `{name}` holds {number} images; `k` must be at least 1 and below that.")


def check_jackknife(**numbers: int) -> None:
    """Checks that a distance remains of sets of these numbers of images without one of them."""
    for name, number in numbers.items():
        if number < 3:
            raise ValueError(f"`{name}` holds {number} images; the error of the kernel distance needs 3 or more.")


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
    features = as_matrix("features", features)
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
