"""
Distances of images in the features of a network: LPIPS (Zhang et al. 2018, https://huggingface.co/papers/1801.03924),
or the same distance, without learned weights, in the activations of a classifier that was trained here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..conditioning.image_format import ImageFormat, as_size
from ..data.repositories import from_subfolder_or_root, only_variant, reading
from ..models.classifier_adagn import AdaGNClassifierModel
from ..ops.adagn import ADAGN_ACTIVATIONS


LPIPS = "lpips"
NORM_EPSILON = 1e-10  # of the norms of LPIPS


def load_feature_classifier(
    argument: str, source: str, image_format: ImageFormat, cache_dir: str | None
) -> AdaGNClassifierModel:
    """
    Loads a classifier (root or subfolder `classifier`) whose features describe images of this format, frozen. Raises a
    `ValueError` that names the `argument` if it cannot be read, or was trained on images of another format.
    """
    with reading(argument, source):
        load, variant = AdaGNClassifierModel.from_pretrained, only_variant(source, "classifier")
        classifier = from_subfolder_or_root(load, source, "classifier", cache_dir=cache_dir, variant=variant)
    config = classifier.config
    trained_on = ImageFormat.from_config(config.get("image_format"), config.in_channels)
    if trained_on != image_format:
        raise ValueError(
            f"`{argument}` is {source!r}, a classifier of {trained_on}, but the training data are {image_format}. Name "
            "a classifier that was trained on such images (`train_classifier.py --no_noised`), or leave it out."
        )
    return classifier.float().requires_grad_(False).eval()


class ClassifierDistance(torch.nn.Module):
    """
    The distance of LPIPS (eq. 1, with all weights 1) in the activations of a classifier at t = 0: differences of
    vectors that are scaled to unit length at each position, squared, averaged over the positions, and over the levels
    of the network. Images may have any size that the classifier can downsample.

    Args:
        classifier ([`AdaGNClassifierModel`]): Used in its dtype.
    """

    def __init__(self, classifier: AdaGNClassifierModel):
        super().__init__()
        self.classifier = classifier

    def _activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        # Not its `forward`: an attention pool takes images of one size only.
        classifier = self.classifier
        timesteps = torch.zeros(len(images), dtype=torch.long, device=images.device)
        emb = classifier.time_embedding(classifier.time_proj(timesteps).to(classifier.dtype))
        emb = ADAGN_ACTIVATIONS[classifier.config.act_fn](emb)
        hidden_states = classifier.conv_in(images.to(classifier.dtype))
        activations = []
        for block in classifier.down_blocks:
            hidden_states, _ = block(hidden_states, emb)
            activations.append(hidden_states)
        return activations

    def forward(self, samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The distance of each pair of images `(batch_size, channels, height, width)` in [-1, 1]: `(batch_size,)`."""
        with torch.no_grad():
            targets = self._activations(images)
        distances = [
            (F.normalize(x.float(), dim=1, eps=NORM_EPSILON) - F.normalize(y.float(), dim=1, eps=NORM_EPSILON))
            .square()
            .sum(dim=1)
            .mean(dim=(1, 2))
            for x, y in zip(self._activations(samples), targets, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


class LpipsDistance(torch.nn.Module):
    """LPIPS of RGB images, by the package of that name: its VGG network and learned weights."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                f"`perceptual_network` is {LPIPS!r}, but the package lpips is not installed. Install it (`pip install "
                "lpips`), name the folder of a classifier, or leave `perceptual_weight` out."
            ) from error
        try:
            self.network: Any = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
        except Exception as error:  # whatever the download or torchvision raises
            raise ValueError(
                f"`perceptual_network` is {LPIPS!r}, but its weights cannot be loaded: {error}. Name the folder of a "
                "classifier, or leave `perceptual_weight` out."
            ) from error

    def forward(self, samples: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """As `ClassifierDistance`."""
        return self.network(samples, images).flatten()


def load_perceptual_network(
    source: str, image_format: ImageFormat, size: tuple[int, int], cache_dir: str | None
) -> torch.nn.Module:
    """
    Loads the perceptual distance that `perceptual_network` names, frozen: "lpips", or a classifier on the Hub or in a
    folder. Raises a `ValueError` if it is not available, or not for images of this format and size.
    """
    if source == LPIPS:
        if image_format.channels != 3:
            raise ValueError(
                f"`perceptual_network` is {LPIPS!r}, which is for RGB images, but the training data are "
                f"{image_format}. Name a classifier of such images, or leave `perceptual_weight` out."
            )
        return LpipsDistance()
    classifier = load_feature_classifier("perceptual_network", source, image_format, cache_dir)
    factor = 2 ** (len(classifier.config.block_out_channels) - 1)
    if any(side % factor for side in size):
        raise ValueError(
            f"The classifier of `perceptual_network` downsamples by {factor}, which does not divide the resolution "
            f"{size[0]} x {size[1]}. Use another resolution or classifier."
        )
    return ClassifierDistance(classifier)


@torch.no_grad()
def features_of(classifier: AdaGNClassifierModel, images: torch.Tensor) -> torch.Tensor:
    """
    The features of a classifier at t = 0, `(batch_size, dim)`, of images in [-1, 1], which are resized to its size.
    """
    size = as_size(classifier.config.sample_size)
    images = images.to(classifier.device)
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return classifier(images, 0).features
