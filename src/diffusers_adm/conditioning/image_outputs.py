"""Images of a pipeline in the forms that it returns: Pillow, NumPy, torch."""

import numpy as np
import torch
from PIL import Image

from .image_format import ImageFormat


def as_outputs(fractions: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    r"""
    Images with the values of the outputs "np" and "pt": fractions as they are for viewable images
    (`image_format.is_viewable`), values of the data for other formats.

    Args:
        fractions (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Fractions of the value range.
        image_format (`ImageFormat`): Format of the images.
    """
    if image_format.is_viewable:
        return fractions
    return image_format.from_unit(fractions)


def to_numpy(images: torch.Tensor) -> np.ndarray:
    """Images as an array `(batch_size, height, width, channels)`, float32."""
    return images.cpu().permute(0, 2, 3, 1).float().numpy()


def to_pil(fractions: torch.Tensor, image_format: ImageFormat) -> list[Image.Image]:
    r"""
    Converts viewable images to Pillow images, with values of the data. Colours of more than 8 bits, which Pillow does
    not have, are reduced to 8.

    Args:
        fractions (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Fractions of the value range.
        image_format (`ImageFormat`): Format of the images, a viewable one.
    """
    if image_format.loses_depth_in_pil:
        image_format = ImageFormat(image_format.mode, image_format.channels)
    values = to_numpy(image_format.from_unit(fractions.cpu().float()))
    pixels = values.astype(np.uint16 if image_format.pil_mode == "I;16" else np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
