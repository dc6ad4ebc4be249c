"""
Measures of samples: against closed forms, brute force in float64 and cases that can be told on paper; and the command.
"""

import contextlib
import io
import json
import logging
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from docstrings import check_documented_arguments
from PIL import Image
from processes import run_distributed
from runs import flags
from scipy.spatial.distance import cdist
from toy_models import CONDITIONAL, random_classifier, random_unet

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.formats import FormatRequest
from diffusers_adm.data.seeding import derive_seed
from diffusers_adm.evaluation import (
    ClassifierFeatures,
    GaussianStatistics,
    InceptionFeatures,
    compare_image_sets,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_pairwise_distance,
    precision_recall,
    sample_images,
)
from diffusers_adm.evaluation.data import ArrayImages, read_images
from diffusers_adm.evaluation.frechet import measures
from diffusers_adm.evaluation.frechet.__main__ import main
from diffusers_adm.training import save_id2label


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def random_covariance(dim, rank=None, seed=0):
    factors = normal(dim, rank or dim, seed=seed)
    return factors @ factors.T


# 1. Frechet distance


class TestFrechetDistance:
    @pytest.mark.parametrize("dim", [1, 5])
    def test_commuting_covariances(self, dim):
        """With common axes: the sum of squared differences of means and of standard deviations."""
        axes, mean1, mean2 = rotation(dim), normal(dim, seed=1), normal(dim, seed=2)
        std1, std2 = normal(dim, seed=3).abs(), normal(dim, seed=4).abs()
        covariances = [axes @ torch.diag(std**2) @ axes.T for std in (std1, std2)]
        expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
        found = frechet_distance(mean1, covariances[0], mean2, covariances[1])
        assert found == pytest.approx(expected.item(), rel=1e-12)

    def test_rotated_covariances_in_the_plane(self):
        """In two dimensions tr sqrt(A) = sqrt(tr A + 2 sqrt(det A)), by Cayley and Hamilton."""
        cov1, cov2 = random_covariance(2, seed=1), random_covariance(2, seed=2)
        product = cov1 @ cov2
        assert (product - product.T).abs().max() > 0.1  # they do not commute
        trace_of_root = (product.trace() + 2 * product.det().sqrt()).sqrt()
        expected = cov1.trace() + cov2.trace() - 2 * trace_of_root
        zero = torch.zeros(2)
        assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected.item(), rel=1e-12)

    def test_many_dimensions_as_scipy_has_it(self):
        cov1, cov2 = random_covariance(40, seed=1), random_covariance(40, seed=2)
        mean1, mean2 = normal(40, seed=3), normal(40, seed=4)
        root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
        expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root)
        assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-9)
        # Not the root of the product of the roots of the traces, nor the distance itself.
        assert expected > 1

    def test_optimal_linear_map(self):
        """A symmetric positive M maps N(0, C) optimally to N(0, M C M): the distance is E|x - M x|^2."""
        cov1, step = random_covariance(6, seed=1), random_covariance(6, seed=2) / 6
        cov2 = step @ cov1 @ step
        difference = torch.eye(6, dtype=torch.float64) - step
        expected = (difference @ cov1 @ difference).trace().item()
        assert frechet_distance(torch.zeros(6), cov1, torch.zeros(6), cov2) == pytest.approx(expected, rel=1e-10)

    def test_singular_covariances(self):
        zero, mean = torch.zeros(5), normal(5)
        cov = random_covariance(5, rank=2)
        # A point against a Gaussian: |m|^2 + tr C.
        expected = mean.square().sum().item() + cov.trace().item()
        assert frechet_distance(zero, torch.zeros(5, 5), mean, cov) == pytest.approx(expected, rel=1e-12)
        # On orthogonal subspaces nothing can be saved by coupling them.
        axes = rotation(6)
        one, other = axes[:, :2], axes[:, 2:5]
        cov1, cov2 = one @ torch.diag(torch.tensor([4.0, 1.0]).double()) @ one.T, 9 * other @ other.T
        assert frechet_distance(torch.zeros(6), cov1, torch.zeros(6), cov2) == pytest.approx(5 + 27, rel=1e-12)
        # On one subspace: as there alone.
        cov3 = one @ torch.diag(torch.tensor([9.0, 1.0]).double()) @ one.T
        assert frechet_distance(torch.zeros(6), cov1, torch.zeros(6), cov3) == pytest.approx(1, rel=1e-10)

    @pytest.mark.parametrize("rank", [40, 3])
    def test_of_itself_it_is_nothing(self, rank):
        mean, cov = normal(40), random_covariance(40, rank)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-10 * cov.trace()

    def test_a_turn_of_both_changes_nothing(self):
        mean1, mean2 = normal(8, seed=3), normal(8, seed=4)
        cov1, cov2, axes = random_covariance(8, seed=1), random_covariance(8, 4, seed=2), rotation(8, seed=5)
        turned = frechet_distance(axes @ mean1, axes @ cov1 @ axes.T, axes @ mean2, axes @ cov2 @ axes.T)
        straight = frechet_distance(mean1, cov1, mean2, cov2)
        assert turned == pytest.approx(straight, rel=1e-10)
        assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(straight, rel=1e-10)

    def test_arrays_of_numpy(self):
        found = frechet_distance(np.zeros(2), np.eye(2, dtype=np.float32), np.ones(2), 4 * np.eye(2))
        assert found == pytest.approx(2 + 2, rel=1e-12)

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"mean2": torch.zeros(3)}, r"`mean2` has shape \(3,\); it must be \(2,\)"),
            ({"cov1": torch.eye(3)}, r"`cov1` has shape \(3, 3\); it must be \(2, 2\)"),
            ({"cov2": torch.full((2, 2), math.nan)}, "`cov2` holds values that are not finite"),
            ({"cov1": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "`cov1` is not a covariance"),
            ({"cov2": torch.diag(torch.tensor([1.0, -1.0]))}, "`cov2` is not a covariance"),
        ],
    )
    def test_bad_arguments(self, change, message):
        gaussians = {"mean1": torch.zeros(2), "cov1": torch.eye(2), "mean2": torch.zeros(2), "cov2": torch.eye(2)}
        with pytest.raises(ValueError, match=message):
            frechet_distance(**{**gaussians, **change})


class TestGaussianStatistics:
    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_chunks_are_as_good_as_the_whole(self, offset):
        """Also far from 0, where sums of squares would keep 4 of 16 digits."""
        vectors = offset + normal(50, 4) @ normal(4, 4, seed=1)
        statistics = GaussianStatistics()
        for chunk in vectors.split([1, 20, 0, 3, 26]):
            statistics.update(chunk)
        assert statistics.count == 50
        np.testing.assert_allclose(statistics.mean, vectors.numpy().mean(axis=0), rtol=1e-12)
        expected = np.cov((vectors - offset).numpy(), rowvar=False)
        np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-8, atol=1e-8)

    def test_errors(self):
        statistics = GaussianStatistics()
        with pytest.raises(ValueError, match="There are 0 vectors; 1 or more"):
            statistics.mean  # noqa: B018
        statistics.update(normal(1, 3))
        with pytest.raises(ValueError, match="There are 1 vectors; 2"):
            statistics.covariance  # noqa: B018
        with pytest.raises(ValueError, match="have 2 entries; those before had 3"):
            statistics.update(normal(1, 2))
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            statistics.update(normal(3))


# 2. Inception score


class TestInceptionScore:
    @pytest.mark.parametrize("splits", [1, 4])
    def test_sure_and_even_is_the_number_of_classes(self, splits):
        assert inception_score(torch.eye(5).repeat(8, 1), splits) == pytest.approx((5, 0), abs=1e-12)

    def test_sure_of_one_class_and_unsure_of_all_are_1(self):
        for row in ([1.0, 0, 0], [1 / 3] * 3, [0.2, 0.3, 0.5]):
            assert inception_score(torch.tensor([row] * 12).double(), 3) == pytest.approx((1, 0), abs=1e-12)

    def test_sure_and_uneven_is_the_perplexity(self):
        probabilities = np.eye(3)[[0] * 5 + [1] * 3 + [2] * 2]
        entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
        assert inception_score(probabilities, 1) == pytest.approx((math.exp(entropy), 0), rel=1e-12)

    def test_parts_by_hand(self):
        probabilities = normal(23, 4).softmax(dim=1)
        scores = []
        for part in (probabilities[:8], probabilities[8:16], probabilities[16:]):  # 23 images in 3 parts
            marginal = sum(part) / len(part)
            divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in part]
            scores.append(math.exp(sum(divergences) / len(part)))
        mean = sum(scores) / 3
        std = math.sqrt(sum((score - mean) ** 2 for score in scores) / 3)
        assert inception_score(probabilities, 3) == pytest.approx((mean, std), rel=1e-12)

    @pytest.mark.parametrize(
        "probabilities,splits,message",
        [
            (torch.eye(3), 4, "`splits` is 4; it must be between 1 and 3"),
            (torch.eye(3), 0, "`splits` is 0"),
            (normal(5, 3), 1, "the softmax of the logits"),
            (torch.tensor([[1.5, -0.5]]), 1, "values from -0.5 on"),
            (torch.ones(3), 1, r"shape \(3,\)"),
        ],
    )
    def test_bad_arguments(self, probabilities, splits, message):
        with pytest.raises(ValueError, match=message):
            inception_score(probabilities, splits)


# 3. Precision and recall, diversity


class TestPrecisionRecall:
    @staticmethod
    def by_hand(real, fake, k):
        """The paper's equations 1 and 2, point by point."""

        def share(points, centres):
            radii = [
                sorted(math.dist(c, o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
            ]
            inside = [any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
            return sum(inside) / len(points)

        return share(fake, real), share(real, fake)

    @pytest.mark.parametrize("k", [1, 3, 5])
    @pytest.mark.parametrize("size", [2**24, 100])
    def test_brute_force(self, k, size, monkeypatch):
        monkeypatch.setattr(measures, "MAX_DISTANCES", size)  # 100: a few rows at a time
        real, fake = normal(37, 4), 0.8 * normal(29, 4, seed=1) + 1.2
        expected = self.by_hand(real.tolist(), fake.tolist(), k)
        assert len({0, 1, *expected}) == 4
        assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)

    def test_limits(self):
        real = normal(30, 4)
        assert precision_recall(real, real) == pytest.approx((1, 1))
        assert precision_recall(real, real + 100) == (0, 0)
        # Samples of one mode of two: all of them are good, and half of the images are out of their reach.
        two_modes = torch.cat([real, real + 100])
        assert precision_recall(two_modes, real) == pytest.approx((1, 0.5))
        # Samples of two modes, where the images have one.
        assert precision_recall(real, two_modes) == pytest.approx((0.5, 1))

    @pytest.mark.parametrize(
        "real,fake,k,message",
        [
            (normal(3, 2), normal(5, 2), 3, "`k` is 3 and `real` holds 3 images"),
            (normal(5, 2), normal(2, 2), 3, "`k` is 3 and `fake` holds 2 images"),
            (normal(5, 2), normal(5, 2), 0, "`k` is 0"),
            (normal(5, 2), math.nan * normal(5, 2), 3, "`fake` holds values that are not finite"),
        ],
    )
    def test_bad_arguments(self, real, fake, k, message):
        with pytest.raises(ValueError, match=message):
            precision_recall(real, fake, k)


class TestMeanPairwiseDistance:
    @pytest.mark.parametrize("size", [2**24, 100])
    def test_brute_force_and_jackknife(self, size, monkeypatch):
        monkeypatch.setattr(measures, "MAX_DISTANCES", size)
        points = normal(23, 3).numpy()

        def mean_of_pairs(points):
            return cdist(points, points)[np.triu_indices(len(points), 1)].mean()

        left_out = np.array([mean_of_pairs(np.delete(points, i, axis=0)) for i in range(23)])
        error = math.sqrt(22 / 23 * ((left_out - left_out.mean()) ** 2).sum())
        assert mean_pairwise_distance(points) == pytest.approx((mean_of_pairs(points), error), rel=1e-10)

    def test_standard_error_is_that_of_repeated_draws(self):
        draws = [mean_pairwise_distance(normal(60, 5, seed=seed)) for seed in range(200)]
        means, errors = np.array(draws).T
        # The spread of 200 draws is known within 5 percent, and the distance of two 5-dimensional normal vectors is
        # 2 Gamma(3) / Gamma(5/2).
        assert errors.mean() == pytest.approx(means.std(), rel=0.15)
        assert means.mean() == pytest.approx(2 * math.gamma(3) / math.gamma(2.5), abs=4 * means.std() / math.sqrt(200))

    def test_limits(self):
        assert mean_pairwise_distance(torch.ones(9, 4)) == (0, 0)
        mean, error = mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        assert mean == pytest.approx(5)
        assert math.isnan(error)
        with pytest.raises(ValueError, match="has 1 points"):
            mean_pairwise_distance(torch.ones(1, 4))


class TestKernelDistance:
    @pytest.mark.parametrize("size", [2**24, 100])
    def test_brute_force_and_jackknife(self, size, monkeypatch):
        monkeypatch.setattr(measures, "MAX_DISTANCES", size)
        real, fake = normal(11, 3).numpy(), normal(17, 3, seed=1).numpy() + 0.5

        def distance(real, fake):
            def mean(points, others, same):
                kernels = [
                    (float(a @ b) / 3 + 1) ** 3
                    for i, a in enumerate(points)
                    for j, b in enumerate(others)
                    if not (same and i == j)
                ]
                return np.mean(kernels)

            return mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)

        variance = 0.0
        for name, points in (("real", real), ("fake", fake)):
            sets = {"real": real, "fake": fake}
            left_out = np.array([distance(**sets | {name: np.delete(points, i, axis=0)}) for i in range(len(points))])
            variance += (len(points) - 1) / len(points) * ((left_out - left_out.mean()) ** 2).sum()
        expected = (distance(real, fake), math.sqrt(variance))
        assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)

    def test_is_unbiased_and_its_error_that_of_repeated_draws(self):
        """Of two sets from N(0, 1) in one dimension with means 0 and 1: E k(x, y) has a closed form."""
        draws = [kernel_distance(normal(60, 1, seed=i), normal(40, 1, seed=1000 + i) + 1) for i in range(200)]
        distances, errors = np.array(draws).T
        # (x y + 1)^3 = 1 + 3 x y + 3 x^2 y^2 + x^3 y^3; the moments of N(0, 1) are 0, 1, 0, those of N(1, 1) 1, 2, 4.
        moments = np.array([[0, 1, 0], [1, 2, 4]])
        kernel = 1 + (moments[:, None] * moments[None]) @ [3, 3, 1]
        expected = kernel[0, 0] + kernel[1, 1] - 2 * kernel[0, 1]
        assert distances.mean() == pytest.approx(expected, abs=4 * distances.std() / math.sqrt(200))
        # The jackknife is an estimate, and known to be rather too large.
        assert 0.9 * distances.std() < np.sqrt((errors**2).mean()) < 1.4 * distances.std()

    @pytest.mark.parametrize(
        ("real", "fake", "message"),
        [
            (torch.ones(2, 3), torch.ones(4, 3), "`real` holds 2 images; .* needs 3 or more"),
            (torch.ones(4, 3), torch.ones(4, 2), "`real` has 3 features and `fake` 2"),
        ],
    )
    def test_bad_arguments(self, real, fake, message):
        with pytest.raises(ValueError, match=message):
            kernel_distance(real, fake)


# 4. Networks


def test_classifier_features_are_those_of_clean_images_at_0():
    classifier = random_classifier().train()
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = ClassifierFeatures(classifier)(pixels)
    with torch.no_grad():
        expected = classifier(2 * (pixels.double() / 255).float() - 1, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(features, expected.features)
    torch.testing.assert_close(logits, expected.logits)
    assert not classifier.training
    half, _ = ClassifierFeatures(classifier.bfloat16())(pixels)
    assert half.dtype == torch.bfloat16


DEEP = ImageFormat("L", 1, (0, 4095), 4096)
FIELD = ImageFormat("array", 2, (-3.5, 12.25), None)


def scaled(values, image_format):
    """To [-1, 1], in float64."""
    low, high = image_format.value_range
    return 2 * (torch.as_tensor(np.asarray(values)).double() - low) / (high - low) - 1


@pytest.mark.parametrize("image_format", [ImageFormat("L", 1), DEEP, FIELD, ImageFormat("array", 5)], ids=str)
def test_classifiers_of_any_images(image_format):
    """Of values of the data, in the shape of its training."""
    channels, (low, high) = image_format.channels, image_format.value_range
    classifier = random_classifier(in_channels=channels, sample_size=(8, 16))
    if image_format != ImageFormat("L", 1):  # that of such a classifier without an entry in its config
        classifier.register_to_config(image_format=image_format.to_config())
    network = ClassifierFeatures(classifier)
    assert network.resolution == (8, 16)
    assert network.image_format == image_format
    values = low + (high - low) * torch.rand(4, channels, 8, 16, generator=torch.Generator().manual_seed(0))
    values = values if image_format.num_levels is None else values.round()
    found = network(values.to(torch.uint8) if (low, high) == (0, 255) else values)
    with torch.no_grad():
        expected = classifier(scaled(values, image_format).float(), 0)
    torch.testing.assert_close(found, (expected.features, expected.logits))


def test_inception_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"torch-fidelity.*diffusers-adm\[inception\]"):
        InceptionFeatures()


# 5. Two sets of images


class TestComparison:
    """With features that are the means of the channels, and logits that are sure of the largest of them."""

    class ChannelMeans:
        resolution = None

        def __call__(self, images):
            assert images.dtype == torch.uint8
            means = images.double().mean(dim=(2, 3))
            return means, 1e4 * (means - means.amax(dim=1, keepdim=True))

    @staticmethod
    def images(number, seed=0, label=None):
        levels = torch.randint(0, 256, (number, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
        items = [{"images": row / 127.5 - 1} for row in levels]
        if label is not None:
            for item, row in zip(items, levels, strict=True):
                item["class_labels"] = label(row.double().mean(dim=(1, 2)))
        return items, levels.double().mean(dim=(2, 3))

    def test_all_of_the_measures(self):
        (samples, fake), (reference, real) = self.images(50), self.images(40, seed=1)
        result = compare_image_sets(self.ChannelMeans(), samples, reference, batch_size=7, splits=1, progress_bar=False)
        cov = [torch.cov(points.T) for points in (fake, real)]
        expected = frechet_distance(fake.mean(dim=0), cov[0], real.mean(dim=0), cov[1])
        assert (result.num_samples, result.num_reference, result.feature_dim) == (50, 40, 3)
        assert result.frechet_distance == pytest.approx(expected, rel=1e-5)
        kernel = (result.kernel_distance, result.kernel_distance_standard_error)
        assert kernel == pytest.approx(kernel_distance(real, fake), rel=1e-5)
        assert (result.precision, result.recall) == precision_recall(real, fake)
        assert result.diversity == pytest.approx(mean_pairwise_distance(fake)[0])
        assert result.reference_diversity == pytest.approx(mean_pairwise_distance(real)[0])
        shares = np.bincount(fake.argmax(dim=1), minlength=3) / 50
        assert result.inception_score == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert result.accuracy is None
        assert "accuracy" not in str(result)

    def test_accuracy_of_labelled_samples(self):
        count = iter(range(100))
        # Right, wrong, right, unlabelled, ...
        change = [lambda c: c, lambda c: (c + 1) % 3, lambda c: c, lambda c: -1]
        samples, _ = self.images(40, label=lambda means: change[next(count) % 4](int(means.argmax())))
        result = compare_image_sets(self.ChannelMeans(), samples, self.images(40)[0], progress_bar=False)
        assert result.accuracy == pytest.approx(20 / 30)
        assert result.accuracy_standard_error == pytest.approx(math.sqrt(2 / 9 / 30))
        assert "accuracy          0.6667" in str(result)
        wrong, _ = self.images(40, label=lambda means: 3)
        with pytest.raises(ValueError, match="range from 3 to 3, but the network has 3 classes"):
            compare_image_sets(self.ChannelMeans(), wrong, self.images(40)[0], progress_bar=False)

    def test_sets_too_small_are_refused_before_the_network_sees_them(self):
        two, (many, _) = self.images(2)[0], self.images(40)
        with pytest.raises(ValueError, match="`samples` holds 2 images; the error of the kernel distance needs 3"):
            compare_image_sets(None, two, many, k=1, progress_bar=False)

    def test_splits_do_not_follow_the_order_of_the_samples(self):
        """Sorted by class, neighbours alone would be of one class: a score of 1."""
        levels = torch.zeros(60, 3, 2, 2)
        for row in range(60):
            levels[row, row // 20] = 255
        samples = [{"images": row / 127.5 - 1} for row in levels]
        result = compare_image_sets(self.ChannelMeans(), samples, samples, splits=3, progress_bar=False)
        assert 2.7 < result.inception_score <= 3

    def test_features_alone(self):
        class Pixels:
            resolution = None

            def __call__(self, images):
                return images.flatten(1).float(), None

        samples, _ = self.images(20, label=lambda means: 0)
        result = compare_image_sets(Pixels(), samples, self.images(20, seed=1)[0], progress_bar=False)
        assert result.feature_dim == 12
        assert result.inception_score is result.accuracy is None

    class Formatted(list):
        """A dataset with a format."""

        def __init__(self, values, image_format):
            super().__init__({"images": scaled(image, image_format).float()} for image in values)
            self.image_format = image_format

    @staticmethod
    def values(image_format, number=20, seed=0):
        low, high = image_format.value_range
        shape = (number, image_format.channels, 4, 6)
        values = low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
        return values if image_format.num_levels is None else values.round()

    @pytest.mark.parametrize(
        "image_format", [ImageFormat(), ImageFormat("array", 5), DEEP, FIELD], ids=["RGB", "bands", "deep", "field"]
    )
    def test_networks_of_a_format_take_values_of_the_data(self, image_format):
        seen = []

        class Network:
            resolution = None

            def __call__(self, images):
                seen.append(images)
                return images.flatten(1).double()[:, :3], None

        network = Network()
        network.image_format = image_format
        sets = [self.values(image_format, seed=seed) for seed in (0, 1)]
        samples, reference = (self.Formatted(values, image_format) for values in sets)
        compare_image_sets(network, samples, reference, progress_bar=False)
        assert {images.dtype for images in seen} == {
            torch.uint8 if image_format.value_range == (0, 255) else torch.float32
        }
        for images, values in zip(seen, sets, strict=True):
            torch.testing.assert_close(images.float(), values, rtol=0, atol=1e-5)
        # Without a format of their own, they are taken for those of the network.
        seen.clear()
        compare_image_sets(network, list(samples), list(reference), progress_bar=False)
        torch.testing.assert_close(seen[0].float(), sets[0], rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "image_format", [ImageFormat("L", 1), DEEP, ImageFormat("RGB", 3, (0, 65535), 65536)], ids=str
    )
    def test_networks_of_rgb_images(self, image_format, caplog):
        """Grey is repeated, and more than 8 bits are reduced with a warning."""
        seen = []

        class Network:
            resolution = None

            def __call__(self, images):
                seen.append(images)
                return images.flatten(1).double()[:, ::30], None

        samples, reference = (self.values(image_format, seed=seed) for seed in (0, 1))
        sets = [self.Formatted(values, image_format) for values in (samples, reference)]
        compare_image_sets(Network(), *sets, progress_bar=False)
        expected = (samples.double() / image_format.value_range[1] * 255).round().expand(-1, 3, -1, -1)
        assert seen[0].dtype == torch.uint8
        assert (seen[0] - expected).abs().max() <= (0 if image_format.num_levels == 256 else 1)
        is_reduced = "reduced to 256 levels" in caplog.text
        assert is_reduced == (image_format.num_levels > 256)

    @pytest.mark.parametrize(
        "formats,taken,message",
        [
            (
                (DEEP, ImageFormat("L", 1)),
                None,
                r"`samples` holds L images from 0 to 4095 .*, and `reference` L images from 0 to 255 .*one format",
            ),
            ((ImageFormat(), DEEP), DEEP, "`samples` holds RGB images .*, and `reference` L images"),
            ((FIELD, FIELD), None, r"takes RGB images, but .* hold 2-channel images.* only grey .* classifier:PATH"),
            ((DEEP, DEEP), ImageFormat(), "takes RGB images from 0 to 255 .*, but .* hold L images from 0 to 4095"),
        ],
    )
    def test_formats_that_do_not_match(self, formats, taken, message):
        network = self.ChannelMeans()
        if taken is not None:
            network.image_format = taken
        sets = [self.Formatted(self.values(image_format), image_format) for image_format in formats]
        with pytest.raises(ValueError, match=message.replace("L images", "(L|grey) images")):
            compare_image_sets(network, *sets, progress_bar=False)

    def test_few_images_are_warned_of(self, caplog):
        compare_image_sets(self.ChannelMeans(), self.images(10)[0], self.images(10)[0], splits=1, progress_bar=False)
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            compare_image_sets(
                self.ChannelMeans(), self.images(4)[0], self.images(3)[0], k=1, splits=1, progress_bar=False
            )
        messages = [record.message for record in caplog.records]
        assert len(messages) == 2
        assert "`reference` holds 3 images for 3 features" in messages[0]
        assert "4 samples and 3 images" in messages[1]


@pytest.mark.parametrize(
    "function",
    [
        frechet_distance,
        inception_score,
        precision_recall,
        mean_pairwise_distance,
        compare_image_sets,
        sample_images,
        read_images,
    ],
    ids=lambda function: function.__name__,
)
def test_documented_arguments(function):
    check_documented_arguments(function.__doc__, function)


# 6. Where images come from, and the command


NAMES = {0: "birds", 1: "cats", 2: "dogs", 3: "fish"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A model's samples in both formats; images to compare with; classifiers with their classes in two orders."""
    path = tmp_path_factory.mktemp("stock")
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.2)
    pipe = ADMPipeline(random_unet(**CONDITIONAL), scheduler, None, None, None, None, id2label=NAMES)
    for output_format in ("png", "npz"):
        sample_images(
            pipe,
            18,
            path / output_format,
            class_labels=[3, 1],
            output_format=output_format,
            pipeline_options={"num_inference_steps": 2},
            progress_bar=False,
        )
    generator = np.random.default_rng(0)
    (path / "images").mkdir()
    pixels = generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(path / "images" / f"{index:02d}.png")
    np.savez(path / "images.npz", pixels)
    classifier = random_classifier(num_classes=4)
    classifier.save_pretrained(path / "classifier")
    classifier.save_pretrained(path / "turned" / "classifier")
    save_id2label(path / "classifier", NAMES)
    save_id2label(path / "turned" / "classifier", {0: "fish", 1: "dogs", 2: "cats", 3: "birds"})
    turned = dict(enumerate(reversed(NAMES.values())))
    parts = {"unet": random_unet(**CONDITIONAL), "scheduler": scheduler, "classifier": classifier}
    parts |= dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    ADMPipeline(**parts, id2label=turned).save_pretrained(path / "pipeline")
    random_classifier(num_classes=2).save_pretrained(path / "some")
    save_id2label(path / "some", {0: "fish", 1: "cats"})
    random_classifier(num_classes=3).save_pretrained(path / "small")
    return path


def measure(capsys, **arguments):
    words = ["--json"]
    for name, value in arguments.items():
        words += [f"--{name}", str(value)]
    main(words)
    return json.loads(capsys.readouterr().out)


def classified(stock):
    """What the classifier says to the samples."""
    dataset = read_images([str(stock / "png")], None)
    with torch.no_grad():
        return random_classifier(num_classes=4)(torch.stack([item["images"] for item in dataset]), 0).logits.argmax(1)


def test_command_on_every_source(stock, capsys):
    arguments = {"features": f"classifier:{stock / 'classifier'}", "splits": 2}
    results = [
        measure(capsys, samples=samples, reference=reference, **arguments)
        for samples, reference in (
            (stock / "png", stock / "images"),
            (stock / "npz", stock / "images.npz"),
            (stock / "npz" / "samples.npz", stock / "images.npz"),
        )
    ]
    settings = results[0].pop("settings")
    assert settings["resolution"] == 8
    assert settings["k"] == 3
    assert set(results[0].pop("versions")) == {"diffusers_adm", "diffusers", "torch"}
    assert results[0]["num_samples"] == 18
    assert results[0]["num_reference"] == 20
    assert results[0]["frechet_distance"] > 0.01
    for other in results[1:]:
        assert {name: other[name] for name in results[0]} == pytest.approx(results[0], rel=1e-4)  # features in float32
    right = (classified(stock) == torch.tensor([3, 1]).repeat(9)).double().mean().item()
    assert results[0]["accuracy"] == pytest.approx(right)


def measure_on_rank(words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(words)
    return printed.getvalue()


def test_two_processes_measure_the_same(stock, capsys):
    arguments = {"samples": stock / "npz", "reference": stock / "images", "splits": 2, "batch_size": 4}
    arguments["features"] = f"classifier:{stock / 'classifier'}"
    expected = measure(capsys, **arguments)
    first, second = run_distributed(measure_on_rank, ["--json", *flags(**arguments)])
    assert second == ""
    found = json.loads(first)
    # Features of batches of other images differ by rounding.
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_classes_are_matched_by_name(stock, capsys):
    arguments = {"samples": stock / "png", "reference": stock / "images", "splits": 2}
    right, wrong = (
        (classified(stock) == torch.tensor(classes).repeat(9)).double().mean().item() for classes in ([0, 2], [3, 1])
    )
    assert right != wrong
    for samples, features in (
        ("png", "turned"),
        ("png", "turned/classifier"),
        ("png", "pipeline"),
        ("npz", "turned"),
        ("npz/samples.npz", "turned"),
    ):
        named = {**arguments, "samples": stock / samples}
        result = measure(capsys, features=f"classifier:{stock / features}", **named)
        assert result["accuracy"] == pytest.approx(right)
    with pytest.raises(ValueError, match="4 classes and the network 3"):
        measure(capsys, features=f"classifier:{stock / 'small'}", **arguments)


def test_a_classifier_of_the_sampled_classes_is_enough(stock, capsys):
    """The model has four classes; fish and cats were sampled."""
    arguments = {"samples": stock / "png", "reference": stock / "images", "splits": 2}
    result = measure(capsys, features=f"classifier:{stock / 'some'}", **arguments)
    with torch.no_grad():
        images = torch.stack([item["images"] for item in read_images([str(stock / "png")], None)])
        answers = random_classifier(num_classes=2)(images, 0).logits.argmax(1)
    assert result["accuracy"] == pytest.approx((answers == torch.tensor([0, 1]).repeat(9)).double().mean().item())


def test_plain_output_and_subsets(stock, capsys):
    main(
        ["--samples", str(stock / "png"), "--reference", str(stock / "images"), "--num_images", "12", "--splits", "1"]
        + ["--features", f"classifier:{stock / 'classifier'}"]
    )
    printed = capsys.readouterr().out
    assert "12 samples, 12 images, 16 features" in printed
    assert "Frechet distance" in printed
    assert "accuracy" in printed


def test_other_numbers_for_classes_are_those_of_the_data(stock):
    for source in ("png", "npz"):
        plain = read_images([str(stock / source)], None)
        assert [int(item["class_labels"]) for item in plain] == [3, 1] * 9
        renumbered = read_images([str(stock / source)], None, to_class={1: 7})
        assert [int(item["class_labels"]) for item in renumbered] == [3, 7] * 9


def test_selection_leaves_the_others_where_they_were(stock):
    images = ArrayImages(stock / "images.npz")
    chosen = images.select([3, 1]).select([1])
    assert (len(images), len(chosen)) == (20, 1)
    assert np.array_equal(chosen[0]["image"], images[1]["image"])


def test_images_are_resized(stock):
    for source in ("png", "npz"):
        assert read_images([str(stock / source)], 4)[0]["images"].shape == (3, 4, 4)


SAMPLED = [
    (DEEP, None),
    (ImageFormat("RGB", 3), None),
    (ImageFormat("RGBA", 4), None),
    (ImageFormat("L", 1, (-1024, 3071), 4096), None),
    (ImageFormat("array", 5, (0, 10000), 10001), None),
    (FIELD, None),
    (DEEP, "tiff"),
    (ImageFormat("array", 5, (0, 10000), 10001), "npz"),
    (FIELD, "npz"),
]


def draw_samples(image_format, folder, number=3, output_format=None, **config):
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.2)
    channels = {"in_channels": image_format.channels, "out_channels": 2 * image_format.channels}
    unet = random_unet(sample_size=(8, 12), **channels, **config)
    pipe = ADMPipeline(unet, scheduler, None, None, None, None, image_format=image_format.to_config())
    options = {"pipeline_options": {"num_inference_steps": 2}, "progress_bar": False, "output_format": output_format}
    if config:
        options["class_labels"] = [3, 1]
    sample_images(pipe, number, folder, **options)
    generators = [torch.Generator().manual_seed(derive_seed(0, "sample", index)) for index in range(number)]
    images = pipe(generator=generators, batch_size=number, output_type="pt", num_inference_steps=2).images
    return 2 * images - 1 if image_format.is_viewable else scaled(images, image_format)


@pytest.mark.parametrize("image_format,output_format", SAMPLED, ids=str)
def test_samples_are_read_in_the_format_of_their_model(image_format, output_format, tmp_path):
    """All of an image, which is not square, and its values."""
    expected = draw_samples(image_format, tmp_path, output_format=output_format).double()
    levels = image_format.num_levels or 1e6
    for request in (None, FormatRequest(channels=image_format.channels)):
        dataset = read_images([str(tmp_path)], None, request=request)
        assert dataset.image_format == image_format
        assert dataset.resolution == (8, 12)
        found = torch.stack([dataset[index]["images"] for index in range(3)]).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2 / (levels - 1) + 1e-5)
    assert read_images([str(tmp_path)], (4, 6))[0]["images"].shape == (image_format.channels, 4, 6)
    other = ImageFormat("array", image_format.channels, (0, 77), 78)
    with pytest.raises(ValueError, match=r"`samples` holds .*, but .*-channel images from 0 to 77 .* are expected"):
        read_images([str(tmp_path)], None, request=FormatRequest(known=other), argument="samples")


def test_labels_of_samples_in_tiff_files(tmp_path):
    draw_samples(ImageFormat("array", 5, (0, 10000), 10001), tmp_path, **CONDITIONAL)
    dataset = read_images([str(tmp_path)], None)
    assert [int(item["class_labels"]) for item in dataset] == [3, 1, 3]


@pytest.mark.parametrize(
    "array,request_of,expected",
    [
        (np.full((4, 6, 1), 1000, np.uint16), {}, ImageFormat("L", 1, (0, 65535), 65536)),
        (np.full((4, 6, 1), 1000, np.uint16), {"known": DEEP}, DEEP),
        (np.full((4, 6, 2), 7.5, np.float32), {"value_range": (-3.5, 12.25)}, FIELD),
        (np.full((4, 6, 2), 7.5, np.float64), {"known": FIELD}, FIELD),
        (np.full((4, 6, 3), 9, np.int16), {}, ImageFormat("RGB", 3, (-32768, 32767), 65536)),
        (np.full((4, 6, 4), 9, np.uint8), {}, ImageFormat("array", 4)),
        (np.full((4, 6, 4), 9, np.uint8), {"image_mode": "RGBA"}, ImageFormat("RGBA", 4)),
        (np.full((4, 6, 1), 9, np.uint8), {"channels": 3}, ImageFormat("RGB", 3)),
        # The axes of the images in these files are known, whatever their lengths.
        (np.arange(30, dtype=np.uint8).reshape(2, 3, 5), {}, ImageFormat("array", 5)),
        (np.arange(80, dtype=np.uint8).reshape(5, 4, 4), {}, ImageFormat("array", 4)),
    ],
)
def test_npz_files_of_any_format(array, request_of, expected, tmp_path):
    np.savez(tmp_path / "file.npz", np.stack([array] * 3))
    dataset = read_images([str(tmp_path / "file.npz")], None, request=FormatRequest(**request_of))
    assert dataset.image_format == expected
    target = scaled(np.moveaxis(array.astype(np.float64), -1, 0), expected).float()
    torch.testing.assert_close(dataset[1]["images"], target.expand(expected.channels, -1, -1))


@pytest.mark.parametrize(
    "arrays,request_of,message",
    [
        (np.zeros((2, 4, 6, 2), np.float32), {}, "`dataset` cannot be used: .*float32.*--value_range LOW HIGH"),
        (np.full((2, 4, 6, 2), np.nan), {"value_range": (0, 1)}, "2 of 2 images hold NaN or infinite values: row 0"),
        (np.full((2, 4, 6, 1), 5000, np.uint16), {"known": DEEP}, "2 of 2 images have values outside of it: row 0"),
        (np.zeros((2, 4, 6, 2), np.uint8), {"channels": 5}, "5 channel"),
        (np.zeros((2, 4, 6), np.uint8), {}, r"uint8 of shape \(2, 4, 6\). It must hold numbers, of shape"),
        (np.zeros((0, 4, 6, 1), np.uint8), {}, r"shape \(0, 4, 6, 1\)"),
        (np.zeros((2, 4, 6, 1), bool).astype("U3"), {}, "It must hold numbers"),
    ],
)
def test_npz_files_without_a_clear_format(arrays, request_of, message, tmp_path):
    np.savez(tmp_path / "file.npz", arrays)
    with pytest.raises(ValueError, match=message):
        read_images([str(tmp_path / "file.npz")], None, request=FormatRequest(**request_of))


def test_command_on_grey_images_that_are_not_square(tmp_path, capsys):
    draw_samples(ImageFormat("L", 1), tmp_path / "samples", 18)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 12), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02d}.png")
    np.savez(tmp_path / "images.npz", pixels[..., None])
    random_classifier(num_classes=4, in_channels=1, sample_size=(8, 12)).save_pretrained(tmp_path / "classifier")
    arguments = {"samples": tmp_path / "samples", "features": f"classifier:{tmp_path / 'classifier'}", "splits": 2}
    results = [measure(capsys, reference=tmp_path / name, **arguments) for name in ("images", "images.npz")]
    assert results[0]["settings"]["resolution"] == [8, 12]
    assert results[0]["settings"]["image_format"] == ImageFormat("L", 1).to_config()
    assert results[0]["frechet_distance"] == pytest.approx(results[1]["frechet_distance"], rel=1e-4)
    samples = torch.stack([item["images"] for item in read_images([str(tmp_path / "samples")], None)])
    network = random_classifier(num_classes=4, in_channels=1, sample_size=(8, 12))
    with torch.no_grad():
        features = [network(x.float(), 0).features for x in (samples, scaled(pixels[:, None], ImageFormat("L", 1)))]
    means, covariances = zip(*((x.double().mean(dim=0), torch.cov(x.double().T)) for x in features), strict=True)
    expected = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert results[0]["frechet_distance"] == pytest.approx(expected, rel=1e-3)

    # Other images are refused, and both are named.
    np.savez(tmp_path / "deep.npz", np.full((20, 8, 12, 1), 1000, np.uint16))
    with pytest.raises(ValueError, match="`reference` cannot be used: .* 0 to 255 .* 20 images have values outside"):
        measure(capsys, reference=tmp_path / "deep.npz", **arguments)
    draw_samples(DEEP, tmp_path / "deep", 18)
    with pytest.raises(
        ValueError,
        match="on .* 0 to 255 .*, but the samples are .* 0 to 4095 .*the classifier with `--value_range 0 4095`",
    ):
        measure(capsys, reference=tmp_path / "images", **arguments | {"samples": tmp_path / "deep"})


def test_unfinished_samples_are_refused(stock, tmp_path, capsys):
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.2)
    pipe = ADMPipeline(random_unet(), scheduler, None, None, None, None)
    options = {"pipeline_options": {"num_inference_steps": 1}, "progress_bar": False}
    sample_images(pipe, 3, tmp_path, **options)
    (tmp_path / "000001.png").unlink()
    with pytest.raises(ValueError, match="holds 2 of 3 images"):
        measure(capsys, samples=tmp_path, reference=stock / "images", features=f"classifier:{stock / 'classifier'}")


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds images, but no `arr_0`"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "`arr_0` of .* is float64"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"of shape \(2, 3, 8, 8\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3)}, r"`arr_1` of .* shape \(3,\) for 2 images"),
    ],
)
def test_other_npz_files_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_images([str(tmp_path / "file.npz")], None)


@pytest.mark.parametrize("content", [b"", b"no archive", 0.5, 0.99])
def test_damaged_npz_files_are_named(content, tmp_path):
    file = tmp_path / "file.npz"
    np.savez_compressed(file, arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    assert len(read_images([str(file)], None)) == 4
    whole = file.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    with pytest.raises(ValueError, match=r"file\.npz cannot be read as a \.npz file, or is damaged"):
        read_images([str(file)], None)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"features": "resnet"}, "`features` is 'resnet'"),
        ({"features": "classifier:"}, "`features` is 'classifier:'"),
        ({"features": "classifier:nowhere"}, "`features` is 'nowhere'"),
        ({"reference": "nowhere"}, "`reference` is 'nowhere', which is no file or folder here. Check the path."),
        ({"samples": "nowhere"}, "`samples` is 'nowhere', which is no file or folder here. Check the path."),
        ({"samples": "{path}"}, "`samples` cannot be read: .* holds no images"),
        ({"reference": "nowhere.npz"}, "nowhere.npz does not exist. Check the path."),
        ({"num_images": 3}, "`k` is 3 and `samples` holds 3 images"),
        ({"k": 0}, "`k` is 0"),
    ],
)
def test_wrong_arguments(change, message, stock, capsys, tmp_path):
    arguments = {"samples": stock / "png", "reference": stock / "images"}
    arguments |= {"features": f"classifier:{stock / 'classifier'}", **change}
    arguments = {n: str(tmp_path) if value == "{path}" else value for n, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        measure(capsys, **arguments)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": 18}, "`k` is 18 and `samples` holds 18 images"),
        ({"splits": 19}, "`splits` is 19; it must be between 1 and 18, the number of samples"),
        ({"samples": "{path}/foreign.npz"}, "labels of the samples range from 7 to 7, but the network has"),
    ],
)
def test_is_found_before_the_features_are_computed(change, message, stock, capsys, monkeypatch):
    """Or in the first batch, where it takes what the network gives."""
    np.savez(stock / "foreign.npz", arr_0=np.zeros((18, 8, 8, 3), np.uint8), arr_1=np.full(18, 7))
    batches = []
    forward = ClassifierFeatures.__call__
    monkeypatch.setattr(ClassifierFeatures, "__call__", lambda self, images: batches.append(1) or forward(self, images))
    arguments = {"samples": stock / "png", "reference": stock / "images", "batch_size": 2}
    arguments |= {n: v.format(path=stock) if isinstance(v, str) else v for n, v in change.items()}
    with pytest.raises(ValueError, match=message):
        measure(capsys, features=f"classifier:{stock / 'classifier'}", **arguments)
    assert len(batches) <= 1
