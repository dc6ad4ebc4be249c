"""
The kept part of an image and its mask, as a network that was trained to inpaint takes them, and RePaint's resampling.

GLIDE (Nichol et al. 2021, https://huggingface.co/papers/2112.10741, section 4), RePaint (Lugmayr et al. 2022,
https://huggingface.co/papers/2201.09865).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..deprecations import renamed
from .condition import Condition, UNetInputs


def masked_image_channels(images: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    r"""
    The channels that a network trained to inpaint takes behind x_t: `[images * keep_mask, keep_mask]`.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        keep_mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`): 1 or `True` where the image is kept.
    """
    keep_mask = keep_mask.to(images.dtype)
    return torch.cat([images * keep_mask, keep_mask], dim=1)


def resampling_walk(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    r"""
    The order in which RePaint takes the steps of a chain: 0 is the noisiest one, `num_steps - 1` leads to x_0.

    A step that does not follow the one before it marks a jump: the sample is noised again first, up to that step.

    Args:
        num_steps (`int`): Length of the chain.
        jump_length (`int`): Number j of steps that a jump takes back. Jumps start where 0, j, 2j, ... steps would be
            left before the last one, as far as there are j steps to go back and one more.
        jump_n_sample (`int`): Number r of times that the steps of a jump are taken, the first one included; 1 is the
            chain itself.

    Returns:
        `list` of `int`: `num_steps + (r - 1) * j * (number of places to jump from)` of them.
    """
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    walk, left = [], num_steps - 1  # steps left after the coming one
    while left >= 0:
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
        walk.append(num_steps - 1 - left)
        left -= 1
    return walk


class InpaintingCondition(Condition):
    """The kept part of an image and its mask, for a U-Net trained to inpaint."""

    argument = "image"

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `images` `(batch_size, channels, height, width)` in [-1, 1] and `keep_mask` with one channel."""
        return UNetInputs(extra_channels=masked_image_channels(batch["images"], batch["keep_mask"]))


__getattr__ = renamed(__name__, {"known_channels": "masked_image_channels"})
