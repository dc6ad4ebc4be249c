"""
Paths between image embeddings, and between noises (Ramesh et al. 2022, https://huggingface.co/papers/2204.06125,
sections 3.2 and 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch


# Sine of the angle between two directions below which they count as equal or opposite: at this angle the straight line
# and the arc differ by less than the rounding of float32.
MIN_SINE = 1e-4


def check_weights(name: str, weights: float | Sequence[float] | np.ndarray | torch.Tensor) -> list[float]:
    """Returns one weight or several as a list; raises a `ValueError` unless all are numbers in [0, 1]."""
    values = weights.tolist() if isinstance(weights, (np.ndarray, torch.Tensor)) else weights
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if not values:
        raise ValueError(f"`{name}` is empty; pass at least one number in [0, 1].")
    for value in values:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(
                f"`{name}` holds {value!r}; numbers must lie in [0, 1]: 0 is the start and 1 the end of the path."
            )
    return [float(value) for value in values]


def slerp(start: torch.Tensor, end: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    r"""
    Spherical interpolation: the direction turns from `start` to `end` at a constant speed; the norm changes linearly.

    Equal directions stay as they are. For opposite ones, between which every half circle is as short, the path goes
    through the coordinate axis that is closest to being perpendicular to `start`. If one of the two is 0, it has no
    direction, and the path is straight.

    Args:
        start, end (`torch.Tensor` of shape `(batch_size, ...)`): Each row is one vector, such as an embedding or the
            noise of an image.
        weight (`float` or `torch.Tensor` of shape `(batch_size,)`): 0 is `start`, 1 is `end`.

    Returns:
        `torch.Tensor`: Of the shape and dtype of `start`; computed in at least float32.
    """
    dtype = torch.promote_types(start.dtype, torch.float32)
    a, b = start.flatten(1).to(dtype), end.flatten(1).to(dtype)
    t = torch.as_tensor(weight, dtype=dtype, device=a.device).reshape(-1, 1)
    norms = [x.norm(dim=1, keepdim=True) for x in (a, b)]
    smallest = torch.finfo(dtype).tiny
    u, v = (x / norm.clamp(min=smallest) for x, norm in zip((a, b), norms, strict=True))
    # The direction of `end` without its part along `start`.
    across = v - (u * v).sum(dim=1, keepdim=True) * u
    sine, cosine = across.norm(dim=1, keepdim=True), (u * v).sum(dim=1, keepdim=True)
    is_opposite = (sine < MIN_SINE) & (cosine < 0)
    axis = torch.zeros_like(u).scatter(1, u.abs().argmin(dim=1, keepdim=True), 1.0)
    axis = axis - (u * axis).sum(dim=1, keepdim=True) * u
    across = torch.where(is_opposite, axis, across)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=smallest)
    angle = torch.where(is_opposite, torch.full_like(sine, math.pi), torch.atan2(sine, cosine))
    direction = torch.cos(t * angle) * u + torch.sin(t * angle) * across
    path = ((1 - t) * norms[0] + t * norms[1]) * direction
    # The ends are exact, and so is the path of equal directions.
    is_straight = ((sine < MIN_SINE) & ~is_opposite) | (norms[0] == 0) | (norms[1] == 0)
    path = torch.where(is_straight | (t == 0) | (t == 1), (1 - t) * a + t * b, path)
    return path.reshape(path.shape[:1] + start.shape[1:]).to(start.dtype)


def text_diff(
    image_embeds: torch.Tensor,
    source_text_embeds: torch.Tensor,
    target_text_embeds: torch.Tensor,
    strength: float | torch.Tensor,
) -> torch.Tensor:
    r"""
    Turns image embeddings in the direction in which a text changes (text diffs, section 3.3): slerp of the embedding
    and the difference of the normalised text embeddings. The paper normalises all embeddings; here the norm of the
    image embedding is kept, as decoders take raw embeddings.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch_size, width)`): Raw embeddings of images.
        source_text_embeds, target_text_embeds (`torch.Tensor` of shape `(1 or batch_size, width)`): Embeddings of the
            text that describes the images, and of the one that is wanted.
        strength (`float` or `torch.Tensor` of shape `(batch_size,)`): In [0, 1]: 0 is the image, 1 the difference
            alone. The paper uses 0.25 to 0.5.

    Returns:
        `torch.Tensor` of shape `(batch_size, width)`: Of the dtype of `image_embeds`.

    Raises:
        ValueError: If both texts have the same embedding, whose difference has no direction. Waits for the device.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    source, target = (
        x.to(image_embeds.device, dtype) / x.to(image_embeds.device, dtype).norm(dim=1, keepdim=True)
        for x in (source_text_embeds, target_text_embeds)
    )
    difference = target - source
    norm = difference.norm(dim=1, keepdim=True)
    if bool((norm < MIN_SINE).any()):
        raise ValueError(
            "The source and the target prompt have the same text embedding, so there is no direction between them. "
            "Pass two prompts that differ."
        )
    image = image_embeds.to(dtype)
    direction = (difference / norm * image.norm(dim=1, keepdim=True)).expand_as(image)
    return slerp(image, direction, strength).to(image_embeds.dtype)
