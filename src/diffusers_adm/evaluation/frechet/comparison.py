"""Samples against images: features of both, and all measures of them."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ...data.labels import UNLABELLED
from ...data.seeding import derive_seed
from ...ops.finiteness import explain_not_finite, not_finite
from .features import FeatureNetwork
from .measures import GaussianStatistics, frechet_distance, inception_score, mean_pairwise_distance, precision_recall


logger = logging.getLogger(__name__)


@dataclass
class ImageSetComparison:
    """
    What [`compare_image_sets`] measured.

    Attributes:
        num_samples, num_reference (`int`): Images in both sets.
        feature_dim (`int`): Width of the features.
        frechet_distance (`float`): Of Gaussians with the means and covariances of the features; 0 is best.
        precision, recall (`float`): Shares of the samples near the images, and of the images near the samples.
        diversity, diversity_standard_error (`float`): Mean distance of the features of two samples.
        reference_diversity (`float`): The same of the images.
        inception_score, inception_score_std (`float`, *optional*): Mean and standard deviation over the splits; `None`
            if the network gives no logits.
        accuracy, accuracy_standard_error (`float`, *optional*): Share of the labelled samples that the network finds
            to be of their class; `None` without labels or logits.
    """

    num_samples: int
    num_reference: int
    feature_dim: int
    frechet_distance: float
    precision: float
    recall: float
    diversity: float
    diversity_standard_error: float
    reference_diversity: float
    inception_score: float | None = None
    inception_score_std: float | None = None
    accuracy: float | None = None
    accuracy_standard_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `json`, which has no NaN: None in its place."""
        values = dataclasses.asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    def __str__(self) -> str:
        plus_minus = "\N{PLUS-MINUS SIGN}"
        lines = [
            f"{self.num_samples} samples, {self.num_reference} images, {self.feature_dim} features",
            f"Frechet distance  {self.frechet_distance:.4f}",
            f"precision         {self.precision:.4f}",
            f"recall            {self.recall:.4f}",
            f"diversity         {self.diversity:.4f} {plus_minus} {self.diversity_standard_error:.4f} (of the images: "
            f"{self.reference_diversity:.4f})",
        ]
        if self.inception_score is not None:
            lines.append(
                f"inception score   {self.inception_score:.4f} (standard deviation over splits: "
                f"{self.inception_score_std:.4f})"
            )
        if self.accuracy is not None:
            lines.append(f"accuracy          {self.accuracy:.4f} {plus_minus} {self.accuracy_standard_error:.4f}")
        return "\n".join(lines)


def compare_image_sets(
    network: FeatureNetwork,
    samples: torch.utils.data.Dataset,
    reference: torch.utils.data.Dataset,
    *,
    k: int = 3,
    splits: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    progress_bar: bool = True,
) -> ImageSetComparison:
    r"""
    Measures samples against images.

    Args:
        network ([`FeatureNetwork`]): Such as a [`ClassifierFeatures`].
        samples, reference (datasets): Something with a length and an index, such as an `ImageDataset`, whose items are
            dicts of `images`, 8-bit values scaled to [-1, 1], `(3, height, width)`; and for `samples`, perhaps
            `class_labels`, the network's numbers of the classes they were drawn for; -1 counts as unlabelled.
        k (`int`, defaults to 3): Of [`precision_recall`].
        splits (`int`, defaults to 10): Of [`inception_score`], which takes the samples in random order.
        batch_size (`int`, defaults to 64): Images per forward pass.
        seed (`int`, defaults to 0): Of that order.
        progress_bar (`bool`, defaults to `True`): Show one.

    Raises:
        ValueError: For sets too small for `k` or `splits`, features that are not finite, and labels that the network
            does not know.
    """
    sets = {"samples": samples, "reference": reference}
    for name, images in sets.items():
        number = len(images)  # type: ignore[arg-type]
        if number == 0:
            raise ValueError(f"`{name}` holds no images. Pass some.")
        if not 1 <= k < number:
            raise ValueError(f"`k` is {k} and `{name}` holds {number} images; there must be more, and `k` at least 1.")
    features, logits, labels, statistics = [], None, None, []
    for name, images in sets.items():
        vectors, set_logits, set_labels, gaussian = _extract(
            network, images, batch_size, name, progress_bar, splits=splits if name == "samples" else None
        )
        if name == "samples":
            logits, labels = set_logits, set_labels
        if len(vectors) <= vectors.shape[1]:
            logger.warning(
                f"`{name}` holds {len(vectors)} images for {vectors.shape[1]} features: their covariance is singular, "
                "and the Frechet distance mostly that of chance. Compare only figures of the same numbers of images."
            )
        features.append(vectors)
        statistics.append(gaussian)
    of_samples, of_reference = features
    if len(of_samples) != len(of_reference):
        logger.warning(
            f"There are {len(of_samples)} samples and {len(of_reference)} images. Precision and recall compare "
            "balls that are the smaller the more points there are: take as many of both (`num_images`)."
        )
    (sample_mean, sample_cov), (mean, cov) = ((gaussian.mean, gaussian.covariance) for gaussian in statistics)
    precision, recall = precision_recall(of_reference, of_samples, k)
    diversity, diversity_standard_error = mean_pairwise_distance(of_samples)
    result = ImageSetComparison(
        num_samples=len(of_samples),
        num_reference=len(of_reference),
        feature_dim=of_samples.shape[1],
        frechet_distance=frechet_distance(sample_mean, sample_cov, mean, cov),
        precision=precision,
        recall=recall,
        diversity=diversity,
        diversity_standard_error=diversity_standard_error,
        reference_diversity=mean_pairwise_distance(of_reference)[0],
    )
    if logits is not None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "inception score"))
        # Samples that are sorted by class would have splits of one class each.
        probabilities = logits.double().softmax(dim=1)[torch.randperm(len(logits), generator=generator)]
        result.inception_score, result.inception_score_std = inception_score(probabilities, splits)
    if logits is not None and labels is not None and (labels != UNLABELLED).any():
        result.accuracy, result.accuracy_standard_error = _accuracy(logits, labels)
    return result


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """And its binomial standard error."""
    labelled = labels != UNLABELLED
    logits, labels = logits[labelled], labels[labelled]
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / len(labels))


def _extract(
    network: FeatureNetwork,
    images: torch.utils.data.Dataset,
    batch_size: int,
    name: str,
    progress_bar: bool,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, GaussianStatistics]:
    """
    Features, logits and labels, on the CPU, and the statistics of the features. With `splits` it raises a `ValueError`
    as soon as it sees that the logits are of no use for that many, or for the labels.
    """
    statistics = GaussianStatistics()
    collected: dict[str, list[torch.Tensor]] = {"features": [], "logits": [], "labels": []}
    bar = tqdm(
        total=len(images),  # type: ignore[arg-type]
        desc=f"Features of the {name}",
        unit="image",
        disable=not progress_bar,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
    )
    with bar:
        for batch in torch.utils.data.DataLoader(images, batch_size=batch_size):
            pixels = ((batch["images"] + 1) * 127.5).round().to(torch.uint8)
            features, logits = network(pixels)
            features = features.float().cpu()
            bad = not_finite(features if logits is None else torch.cat([features, logits.float().cpu()], dim=1))
            if bad:
                number = sum(map(len, collected["features"])) + bad[0]
                networks = {name: part for name, part in vars(network).items() if isinstance(part, torch.nn.Module)}
                raise ValueError(
                    f"Features or logits of image {number} of the `{name}` are not finite. "
                    f"{explain_not_finite(networks)}"
                )
            statistics.update(features)
            collected["features"].append(features)
            if logits is not None:
                collected["logits"].append(logits.float().cpu())
            if "class_labels" in batch:
                collected["labels"].append(batch["class_labels"])
            if splits is not None and logits is not None:
                _check_logits(logits, batch.get("class_labels"), len(images), splits)  # type: ignore[arg-type]
            bar.update(len(pixels))
    features, logits, labels = (torch.cat(parts) if parts else None for parts in collected.values())
    return features, logits, labels, statistics


def _check_logits(logits: torch.Tensor, labels: torch.Tensor | None, num_images: int, splits: int) -> None:
    """Raises a `ValueError` for logits of a batch that neither score nor accuracy could be computed from."""
    if not 1 <= splits <= num_images:
        raise ValueError(f"`splits` is {splits}; it must lie between 1 and {num_images}, the number of samples.")
    known = None if labels is None else labels[labels != UNLABELLED]
    if known is not None and len(known) and (known.min() < 0 or known.max() >= logits.shape[1]):
        raise ValueError(
            f"The labels of the samples reach from {known.min()} to {known.max()}, but the network tells "
            f"{logits.shape[1]} classes apart. Take a classifier of the same classes."
        )
