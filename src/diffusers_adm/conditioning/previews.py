"""
8-bit images that show samples of any format: viewable ones as they are; for other data, some channels as red, green and
blue, or side by side in grey. They are for looking at only; nothing is measured on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .image_format import ImageFormat, count_channels


MONTAGE_GAP = 1  # white pixels between channels side by side
WHITE = 255


def check_preview_numbers(channels: Sequence[int] | None) -> None:
    """Raises a `ValueError` for `preview_channels` that no images have, or that are named twice."""
    channels = channels or ()
    given = f"`preview_channels` is {' '.join(map(str, channels))}"
    if any(channel < 1 for channel in channels):
        raise ValueError(f"{given}. Count from 1.")
    if len(set(channels)) < len(channels):
        raise ValueError(f"{given}, which names a channel twice. Name each once.")


def check_preview_channels(channels: Sequence[int] | None, image_format: ImageFormat) -> None:
    """Raises a `ValueError` for `preview_channels` (from 1) that the images do not have."""
    if channels is not None and not all(1 <= channel <= image_format.channels for channel in channels):
        raise ValueError(
            f"`preview_channels` is {' '.join(map(str, channels))}, but the images have "
            f"{count_channels(image_format.channels)}. "
            + (f"Count from 1 to {image_format.channels}." if image_format.channels > 1 else "Pass 1, or leave it out.")
        )


def preview(
    samples: torch.Tensor, image_format: ImageFormat, channels: Sequence[int] | None = None
) -> list[Image.Image]:
    r"""
    Shows samples as 8-bit images, `describe_preview` says how.

    Args:
        samples (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1], clipped to it.
        image_format (`ImageFormat`): Their format.
        channels (sequence of `int`, *optional*): The channels to show, from 1. `None`: viewable images as they are; of
            other data the first three, or all if there are fewer.

    Returns:
        list of `PIL.Image.Image`: Images of mode RGB or L; wider than the samples if channels are shown side by side.
    """
    check_preview_channels(channels, image_format)
    # Bytes have no NaN, and its conversion depends on the processor.
    levels = ((samples.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().nan_to_num(nan=0.0)
    if channels is None and image_format.is_viewable:
        if image_format.mode in ("LA", "RGBA"):  # composited over white
            alpha = levels[:, -1:] / 255
            levels = (levels[:, :-1] * alpha + WHITE * (1 - alpha)).round()
        shown = levels
    else:
        shown = levels[:, [channel - 1 for channel in _shown_channels(image_format, channels)]]
    pixels = shown.byte().movedim(1, -1).numpy()  # (B, H, W, C)
    if pixels.shape[-1] not in (1, 3):
        pixels = _side_by_side(pixels)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def describe_preview(image_format: ImageFormat, channels: Sequence[int] | None = None) -> str | None:
    """What `preview` shows, for a caption; `None` for 8-bit images without transparency, shown as they are."""
    if channels is None and image_format.is_viewable:
        notes = ["on white"] if image_format.mode in ("LA", "RGBA") else []
        notes += ["scaled to 8 bits"] if (image_format.num_levels or 0) > 256 else []
        return ", ".join(notes) or None
    numbers = _shown_channels(image_format, channels)
    low, high = image_format.value_range
    if len(numbers) == 3:
        shown = f"channels {', '.join(map(str, numbers))} as red, green, blue"
    elif len(numbers) == 1:
        shown = f"channel {numbers[0]} in grey" if image_format.channels > 1 else "in grey"
    else:
        shown = f"channels {', '.join(map(str, numbers))} in grey, side by side"
    return f"{shown}, from {low:g} (0) to {high:g} (255)"


def _shown_channels(image_format: ImageFormat, channels: Sequence[int] | None) -> list[int]:
    return list(channels) if channels is not None else list(range(1, min(image_format.channels, 3) + 1))


def _side_by_side(pixels: np.ndarray) -> np.ndarray:
    """Joins the channels of images `(B, H, W, C)` along their width: `(B, H, C * W + gaps, 1)`."""
    padded = np.pad(pixels, [(0, 0), (0, 0), (0, MONTAGE_GAP), (0, 0)], constant_values=WHITE)
    joined = np.moveaxis(padded, -1, 2)  # (B, H, C, W + gap)
    return joined.reshape(*joined.shape[:2], -1)[:, :, :-MONTAGE_GAP, None]
