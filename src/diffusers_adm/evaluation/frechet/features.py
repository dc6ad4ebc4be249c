"""
Networks whose features samples are compared by. Any function of images that returns features serves.

The usual one is a classifier of the same kind of images that had no part in making the samples. Inception is for
figures that shall be compared with published ones.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...models.classifier_adagn import AdaGNClassifierModel


class FeatureNetwork(Protocol):
    """
    What features come from.

    Attributes:
        resolution (`int`, *optional*): Height and width of the images that it takes; `None`: any.
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
    What the last layer of a classifier reads, and its logits, for images as they are at t = 0.

    t = 0 is one step of noise, of which these images have none; so little that it makes no difference.

    Args:
        classifier ([`AdaGNClassifierModel`]): Of RGB images. It is used on the device and in the dtype that it is in,
            and put into eval mode.

    Raises:
        ValueError: If it does not take square RGB images.
    """

    def __init__(self, classifier: AdaGNClassifierModel):
        config = classifier.config
        if config.in_channels != 3 or not isinstance(config.sample_size, int):
            raise ValueError(
                f"The classifier takes {config.in_channels} channels and a `sample_size` of {config.sample_size}. "
                "Features are those of RGB images, 3 channels, of a square size."
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
    The 2048 features that FID is defined by, from the network of torch-fidelity, which equals TensorFlow's of 2015, and
    its logits without bias, for the inception score.

    Args:
        weights (`str`, *optional*): A file of weights in torch-fidelity's format. `None`: downloaded from its release,
            or found in the cache of `torch.hub`.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If the weights cannot be had.
    """

    resolution: int | None = None  # it resizes to 299 itself

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "Inception features come from torch-fidelity. Install the extra: `pip install "
                "diffusers-adm[inception]`, or use the features of a classifier of your own."
            ) from error
        self.device = device
        try:
            network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except OSError as error:  # that of an unreachable address is one, too
            raise ValueError(
                f"The weights of Inception cannot be read from {weights or URL_INCEPTION_V3}: {error}. Download them "
                "where there is a network, and name the file: `--features inception:FILE.pth`."
            ) from error
        self.network = network.to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = self.network(images.to(self.device))
        return features, logits
