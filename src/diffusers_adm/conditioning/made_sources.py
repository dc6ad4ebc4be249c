"""
Source images for image to image translation that are made from the target images: their grey values, to learn to
colourise; noise, to learn to denoise; or one of the kinds of control images (edges, blocks of colour, regions, low
resolution).
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

from .control_images import ControlImageKind, condition_format_of, make_condition
from .image_format import GREY_WEIGHTS, ImageFormat


SourceKind = Literal["grayscale", "noise", "edges", "color_blocks", "regions", "low_resolution"]
# Standard deviation of the noise, as a share of the value range: from hardly visible to half a range, where only large
# shapes remain.
NOISE_STDS = (0.05, 0.5)


def source_format_of(kind: SourceKind, image_format: ImageFormat) -> ImageFormat:
    """
    The format of the source images of a kind that are made from images of `image_format`: grey for "grayscale", that of
    the images for "noise", that of control images for their kinds. Raises a `ValueError` for another kind, and for
    images that a kind cannot be made from.
    """
    if kind not in get_args(SourceKind):
        raise ValueError(f"`source` is {kind!r}; it must be one of {', '.join(map(repr, get_args(SourceKind)))}.")
    if kind == "noise":
        return image_format
    if kind != "grayscale":
        return condition_format_of(cast(ControlImageKind, kind), image_format)
    if image_format.mode != "RGB":
        raise ValueError(
            f"`source` grayscale is made from RGB images, but these are {image_format}. Use another kind, or pairs."
        )
    return ImageFormat("L", 1, image_format.value_range, image_format.num_levels)


def grayscale(image: torch.Tensor, num_levels: int | None = 256) -> torch.Tensor:
    r"""
    The grey values of an RGB image, for 8 bits those of Pillow's `image.convert("L")`.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
        num_levels (`int`, *optional*, defaults to 256): Number of values that the data can have, also the grey ones.
            `None`: continuous.

    Returns:
        `torch.Tensor` of shape `(1, height, width)`: In [0, 1].
    """
    weights = torch.tensor(GREY_WEIGHTS)[:, None, None]
    if num_levels is None:
        return (image * (weights / 2**16)).sum(dim=0, keepdim=True)
    levels = ((image * (num_levels - 1)).round().long() * weights).sum(dim=0, keepdim=True)
    return ((levels + 2**15) >> 16).float() / (num_levels - 1)


def add_noise(
    image: torch.Tensor, generator: torch.Generator | None = None, num_levels: int | None = 256
) -> torch.Tensor:
    r"""
    Adds white Gaussian noise, clips the result to [0, 1], and rounds it to the levels of the data.

    Args:
        image (`torch.Tensor` of shape `(channels, height, width)`): In [0, 1].
        generator (`torch.Generator`, *optional*): Source of the noise and of its standard deviation, one for the whole
            image, uniform in `NOISE_STDS`.
        num_levels (`int`, *optional*, defaults to 256): Number of values that the data can have. `None`: continuous.
    """
    low, high = NOISE_STDS
    std = low + (high - low) * torch.rand((), generator=generator)
    noisy = (image + std * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return noisy if num_levels is None else (noisy * (num_levels - 1)).round() / (num_levels - 1)


def make_source(
    image: torch.Tensor,
    kind: SourceKind,
    image_format: ImageFormat | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""
    Makes the source image of a target image, in the same size and in the format of `source_format_of`.

    Args:
        image (`torch.Tensor` of shape `(channels, height, width)`): Fractions of the value range in [0, 1], float32, on
            the CPU.
        kind (`str`): "grayscale", "noise", or one of the kinds of `make_condition`.
        image_format (`ImageFormat`, *optional*): Format of the image. `None`: 8-bit RGB.
        generator (`torch.Generator`, *optional*): For "noise".

    Returns:
        `torch.Tensor` of shape `(source channels, height, width)`: In [0, 1].

    Raises:
        ValueError: As `source_format_of`.
    """
    image_format = ImageFormat() if image_format is None else image_format
    source_format_of(kind, image_format)
    if kind == "noise":
        return add_noise(image, generator, image_format.num_levels)
    if kind == "grayscale":
        return grayscale(image, image_format.num_levels)
    return make_condition(image, cast(ControlImageKind, kind), image_format)
