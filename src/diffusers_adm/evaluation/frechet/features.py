"""
Feature networks for the comparison of samples with images. Any function from images to features can be used.

The usual choice is a classifier of the same kind of images that was not used for sampling. Inception is for comparison
with published results.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...models.classifier_adagn import AdaGNClassifierModel


class FeatureNetwork(Protocol):
    """
    A function from images to features.

    Attributes:
        resolution (`int`, *optional*): Height and width of the images in pixels; `None`: any.
    """

    resolution: int | None

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): uint8, RGB.

        Returns:
            `tuple`: Features, `(batch_size, dim)`; and logits, `(batch_size, num_classes)`, or `None`.
        """


class ClassifierFeatures:
    """
    The input of a classifier's last layer, and its logits, at t = 0. That is one step of noise, a negligible amount,
    although these images have none.

    Args:
        classifier ([`AdaGNClassifierModel`]): A classifier of square RGB images; used on its device and in its dtype,
            and put into eval mode.
    """

    def __init__(self, classifier: AdaGNClassifierModel):
        config = classifier.config
        if config.in_channels != 3 or not isinstance(config.sample_size, int):
            raise ValueError(
                f"The classifier takes {config.in_channels} channels and a `sample_size` of {config.sample_size}. It "
                "must take RGB images, 3 channels, of a square size."
            )
        self.classifier = classifier.eval()
        self.resolution: int | None = config.sample_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sample = images.to(self.classifier.device, self.classifier.dtype) / 127.5 - 1
        output = self.classifier(sample, 0)
        return output.features, output.logits


class InceptionFeatures:
    """
    The 2048 features of FID, from torch-fidelity's port of TensorFlow's 2015 network, and its logits without bias, for
    the inception score.

    Args:
        weights (`str`, *optional*): File of weights in torch-fidelity's format. `None`: downloaded from its release, or
            found in the cache of `torch.hub`.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the network.
    """

    resolution: int | None = None  # it resizes to 299 itself

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            message = "Inception features come from torch-fidelity. Install it: `pip install diffusers-adm[inception]`."
            raise ImportError(message) from error
        self.device = device
        try:
            network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except OSError as error:  # also for an unreachable address
            raise ValueError(
                f"The weights of Inception cannot be read from {weights or URL_INCEPTION_V3}: {error}. Download them "
                "elsewhere and pass the file: `--features inception:FILE.pth`."
            ) from error
        self.network = network.to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(images.to(self.device))
