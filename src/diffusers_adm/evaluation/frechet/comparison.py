"""Compares samples with images: the features of both, and all measures of them."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ...commands.processes import gather_interleaved
from ...conditioning.image_format import ImageFormat
from ...data.labels import UNLABELLED
from ...data.seeding import derive_seed
from ...measures.common import make_bar
from ...ops.finiteness import explain_not_finite, not_finite
from ...ops.frechet import GaussianStatistics, frechet_distance
from .features import FeatureNetwork
from .measures import (
    check_jackknife,
    check_neighbours,
    inception_score,
    kernel_distance,
    mean_pairwise_distance,
    precision_recall,
)


logger = logging.getLogger(__name__)


@dataclass
class ImageSetComparison:
    """
    The result of [`compare_image_sets`].

    Attributes:
        num_samples, num_reference (`int`): Images in both sets.
        feature_dim (`int`): Width of the features.
        frechet_distance (`float`): Distance of Gaussians with the means and covariances of the features; 0 is best.
        kernel_distance, kernel_distance_standard_error (`float`): Squared maximum mean discrepancy of the features,
            unbiased; 0 is best. With Inception features the KID.
        precision, recall (`float`): Fraction of the samples near the images, and of the images near the samples.
        diversity, diversity_standard_error (`float`): Mean distance of the features of two samples.
        reference_diversity (`float`): Mean distance of the features of two images.
        inception_score, inception_score_std (`float`, *optional*): Mean and standard deviation over the splits; `None`
            if the network gives no logits.
        accuracy, accuracy_standard_error (`float`, *optional*): Fraction of the labelled samples that the network
            assigns to their class; `None` without labels or logits.
    """

    num_samples: int
    num_reference: int
    feature_dim: int
    frechet_distance: float
    kernel_distance: float
    kernel_distance_standard_error: float
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
        """Plain values for `json`, with None instead of NaN."""
        values = dataclasses.asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    def __str__(self) -> str:
        plus_minus = "\N{PLUS-MINUS SIGN}"
        lines = [
            f"{self.num_samples} samples, {self.num_reference} images, {self.feature_dim} features",
            f"Frechet distance  {self.frechet_distance:.4f}",
            f"kernel distance   {self.kernel_distance:.4f} {plus_minus} {self.kernel_distance_standard_error:.4f}",
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
    accelerator: Accelerator | None = None,
    progress_bar: bool = True,
) -> ImageSetComparison:
    r"""
    Compares samples with images by all measures.

    Args:
        network ([`FeatureNetwork`]): For example a [`ClassifierFeatures`].
        samples, reference (datasets): Sequences such as an `ImageDataset`, whose items are dicts of `images`, values
            of their `image_format` scaled to [-1, 1], `(channels, height, width)`. Sequences without this attribute
            hold images as the network takes them: 8-bit RGB, or of its format. A network of RGB images takes grey ones,
            too, and more than 8 bits are reduced for it. Items of `samples` may have `class_labels`, the classes of the
            network that they were generated for; -1 is unlabelled.
        k (`int`, defaults to 3): k of [`precision_recall`].
        splits (`int`, defaults to 10): Splits of [`inception_score`], which takes the samples in random order.
        batch_size (`int`, defaults to 64): Images per forward pass.
        seed (`int`, defaults to 0): Random seed of that order.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images between its processes. Every process must
            call this function, with its own network; each gets the result, which the first one computes.
        progress_bar (`bool`, defaults to `True`): Show a progress bar in the main process, for its share of the images.

    Raises:
        ValueError: For sets too small for `k` or `splits`, features that are not finite, labels that the network does
            not have, sets of two formats, and formats that the network does not take.
    """
    # 1. features of both sets
    _check_formats(network, samples, reference)
    numbers = {"samples": len(samples), "reference": len(reference)}  # type: ignore[arg-type]
    check_neighbours(k, **numbers)
    check_jackknife(**numbers)
    fake, logits, labels = _extract(network, samples, "samples", batch_size, progress_bar, splits, accelerator)
    real, _, _ = _extract(network, reference, "reference", batch_size, progress_bar, accelerator=accelerator)

    # 2. measures, by one process
    found: list[Any] = [None, None]  # the result, or an error
    if accelerator is None or accelerator.is_main_process:
        try:
            found[0] = _measure(fake, real, logits, labels, k, splits, batch_size, seed)
        except Exception as error:
            found[1] = error  # raised in all processes: the others wait for the result
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _measure(
    fake: torch.Tensor,
    real: torch.Tensor,
    logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    k: int,
    splits: int,
    batch_size: int,
    seed: int,
) -> ImageSetComparison:
    """All measures of the features; a further one has a field in the result and a line in its `__str__`."""
    precision, recall = precision_recall(real, fake, k)
    diversity, diversity_standard_error = mean_pairwise_distance(fake)
    kernel, kernel_standard_error = kernel_distance(real, fake)
    result = ImageSetComparison(
        num_samples=len(fake),
        num_reference=len(real),
        feature_dim=fake.shape[1],
        frechet_distance=frechet_distance(*_gaussian(fake, batch_size), *_gaussian(real, batch_size)),
        kernel_distance=kernel,
        kernel_distance_standard_error=kernel_standard_error,
        precision=precision,
        recall=recall,
        diversity=diversity,
        diversity_standard_error=diversity_standard_error,
        reference_diversity=mean_pairwise_distance(real)[0],
    )
    if logits is not None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "inception score"))
        # In the order of sorted samples, each split would hold a single class.
        probabilities = logits.double().softmax(dim=1)[torch.randperm(len(logits), generator=generator)]
        result.inception_score, result.inception_score_std = inception_score(probabilities, splits)
        if labels is not None and (labelled := labels != UNLABELLED).any():
            accuracy = (logits[labelled].argmax(dim=1) == labels[labelled]).double().mean().item()
            result.accuracy = accuracy
            result.accuracy_standard_error = math.sqrt(accuracy * (1 - accuracy) / int(labelled.sum()))  # binomial

    for name, features in (("samples", fake), ("reference", real)):
        if len(features) <= features.shape[1]:
            logger.warning(
                f"`{name}` holds {len(features)} images for {features.shape[1]} features: their covariance is "
                "singular, and the Frechet distance is dominated by sampling noise. Compare only results with the same "
                "numbers of images."
            )
    if len(fake) != len(real):
        logger.warning(
            f"There are {len(fake)} samples and {len(real)} images. Precision and recall compare balls that shrink "
            "with the number of points: use equal numbers (`num_images`)."
        )
    return result


def _check_formats(network: FeatureNetwork, samples: object, reference: object) -> None:
    taken = getattr(network, "image_format", None)
    formats = [getattr(images, "image_format", None) or taken or ImageFormat() for images in (samples, reference)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"`samples` holds {formats[0]}, and `reference` {formats[1]}. Only images of one format can be compared; "
            "set it with `--image_mode` and `--value_range`."
        )
    if taken is not None and taken != formats[0]:
        raise ValueError(
            f"The feature network takes {taken}, but `samples` and `reference` hold {formats[0]}. Use a network for "
            "such images."
        )
    if taken is None and formats[0].channels not in (1, 3):
        raise ValueError(
            f"The feature network takes RGB images, but `samples` and `reference` hold {formats[0]}: only grey can "
            "become RGB. Use a classifier of such images: `--features classifier:PATH`."
        )
    if taken is None and (formats[0].num_levels is None or formats[0].num_levels > 256):
        logger.warning(
            f"The feature network takes 8-bit images, so these {formats[0]} are reduced to 256 levels: differences "
            "below them do not count."
        )


def _values_for(network: FeatureNetwork, samples: torch.Tensor, image_format: ImageFormat | None) -> torch.Tensor:
    """What the network takes for images in [-1, 1]: values of the data in its format, or uint8 RGB."""
    taken = getattr(network, "image_format", None)
    if taken is None:
        pixels = ((samples + 1) * 127.5).round().to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 and image_format is not None else pixels
    values = taken.to_values(samples)
    return values.to(torch.uint8) if taken.dtype == np.uint8 else values


def _gaussian(features: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance."""
    statistics = GaussianStatistics()
    for chunk in features.split(chunk_size):
        statistics.update(chunk)
    return statistics.mean, statistics.covariance


def _extract(
    network: FeatureNetwork,
    images: torch.utils.data.Dataset,
    name: str,
    batch_size: int,
    progress_bar: bool,
    splits: int | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Features, logits and labels, on the CPU and of all processes, each of which computes every n-th image. With
    `splits`, errors of splits and labels end it in their batch.
    """
    all_features, all_logits, all_labels = [], [], []
    number = len(images)  # type: ignore[arg-type]
    rank, num_processes = 0, 1
    if accelerator is not None and accelerator.num_processes <= number:  # else each computes the few images
        rank, num_processes = accelerator.process_index, accelerator.num_processes
    own = range(rank, number, num_processes)
    show = progress_bar and rank == 0
    with make_bar(len(own), f"Features of the {name}", "image", show=show) as bar:
        for batch in torch.utils.data.DataLoader(images, batch_size=batch_size, sampler=own):
            pixels = _values_for(network, batch["images"], getattr(images, "image_format", None))
            outputs = [output.float().cpu() for output in network(pixels) if output is not None]
            bad = not_finite(torch.cat(outputs, dim=1))
            if bad:
                networks = {name: part for name, part in vars(network).items() if isinstance(part, torch.nn.Module)}
                number_of_image = own[batch_size * len(all_features) + bad[0]]
                raise ValueError(
                    f"Features or logits of image {number_of_image} of the `{name}` are not "
                    f"finite. {explain_not_finite(networks)}"
                )
            all_features.append(outputs[0])
            all_logits += outputs[1:]
            if "class_labels" in batch:
                all_labels.append(batch["class_labels"])
            if splits is not None and all_logits:
                _check_samples(batch.get("class_labels"), all_logits[-1].shape[1], number, splits)
            bar.update(len(pixels))
    features = torch.cat(all_features)
    logits, labels = (torch.cat(parts) if parts else None for parts in (all_logits, all_labels))
    if accelerator is not None and num_processes > 1:
        features = gather_interleaved(features, accelerator)
        logits = None if logits is None else gather_interleaved(logits, accelerator)
        labels = None if labels is None else gather_interleaved(labels[:, None], accelerator)[:, 0]
    return features, logits, labels


def _check_samples(labels: torch.Tensor | None, num_classes: int, number: int, splits: int) -> None:
    if not 1 <= splits <= number:
        raise ValueError(f"`splits` is {splits}; it must be between 1 and {number}, the number of samples.")
    labels = labels[labels != UNLABELLED] if labels is not None else torch.tensor([])
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"The labels of the samples range from {labels.min()} to {labels.max()}, but the network has {num_classes} "
            "classes. Use a classifier of the same classes."
        )
