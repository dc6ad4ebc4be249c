"""
Feature networks for the comparison of samples with images. Any function from images to features can be used.

The usual choice is a classifier of the same kind of images that was not used for sampling. Inception is for comparison
with published results.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...conditioning.image_format import ImageFormat, Size, as_size
from ...models.classifier_adagn import AdaGNClassifierModel


class FeatureNetwork(Protocol):
    """
    A function from images to features. It may have an attribute `image_format`, an `ImageFormat`, to take images of
    that format; without one it takes 8-bit RGB.

    Attributes:
        resolution (`int` or `tuple[int, int]`, *optional*): Size of the images in pixels: of a square, or (height,
            width); `None`: any.
    """

    resolution: Size | None

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Values of the data: uint8 if the
                format is of 8 bits, as for RGB, else float32.

        Returns:
            `tuple`: Features, `(batch_size, dim)`; and logits, `(batch_size, num_classes)`, or `None`.
        """


class ClassifierFeatures:
    """
    The input of a classifier's last layer, and its logits, at t = 0. That is one step of noise, a negligible amount,
    although these images have none.

    Args:
        classifier ([`AdaGNClassifierModel`]): A classifier of images of any channels and size; used on its device and
            in its dtype, and put into eval mode.

    Attributes:
        image_format (`ImageFormat`): That of the images of its training, from its config.
    """

    def __init__(self, classifier: AdaGNClassifierModel):
        config = classifier.config
        self.classifier = classifier.eval()
        self.image_format = ImageFormat.from_config(config.get("image_format"), config.in_channels)
        size = as_size(config.sample_size)
        self.resolution: Size | None = size if size is None or size[0] != size[1] else size[0]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.image_format.to_samples(images.to(self.classifier.device)).to(self.classifier.dtype)
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

    resolution: Size | None = None  # it resizes to 299 itself

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
