"""Random changes of training images that leave what they show: small motions, and small changes of colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: Rec. 601


def random_motion(images: torch.Tensor, zoom: float, shift: float, rotation: float) -> torch.Tensor:
    """
    Zooms, moves and rotates each image by random amounts, from PyTorch's global generator. What enters at the edges
    repeats the pixels there. Without any of the three, the images are returned as they are.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images.
        zoom (`float`): The log of the factor is uniform from `-log(1 + zoom)` to `log(1 + zoom)`.
        shift (`float`): Up to this share of height and width, in both directions.
        rotation (`float`): Up to this many degrees, in both directions.
    """
    if not (zoom or shift or rotation):
        return images
    size, device = (len(images), 1), images.device
    # From output to input coordinates, in which each side goes from -1 to 1.
    factor = ((2 * torch.rand(size, device=device) - 1) * math.log1p(zoom)).exp()
    angle = (2 * torch.rand(size, device=device) - 1) * math.radians(rotation)
    move = (2 * torch.rand(len(images), 2, device=device) - 1) * 2 * shift
    aspect = images.shape[2] / images.shape[3]
    cos, sin = angle.cos() / factor, angle.sin() / factor
    rows = [torch.cat([cos, -sin * aspect, move[:, :1]], dim=1), torch.cat([sin / aspect, cos, move[:, 1:]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_colors(images: torch.Tensor, amount: float) -> torch.Tensor:
    """
    Scales brightness, contrast and saturation of each image by random factors, uniform from `1 - amount` to
    `1 + amount`, from PyTorch's global generator. With 0, the images are returned as they are.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB in [-1, 1]; so is the result.
        amount (`float`): In [0, 1].
    """
    if not amount:
        return images
    factors = 1 + amount * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    images = (images + 1) * factors[0]  # in [0, 2]: black stays black
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * factors[1]
    grey = (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    images = grey + (images - grey) * factors[2]
    return (images - 1).clamp(-1, 1)
