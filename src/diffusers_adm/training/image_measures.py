"""
How close images are to their targets: PSNR, SSIM (Wang et al. 2004, doi:10.1109/TIP.2003.819861) and, for masks, the
Dice coefficient (Dice 1945, doi:10.2307/1932409).
"""

from __future__ import annotations

import numpy as np
import torch


# In place of infinity for an image that equals its target, so that means stay finite.
MAX_PSNR = 100.0  # dB
SSIM_WINDOW = 7  # side in pixels, the default of scikit-image


def psnr(image: np.ndarray, target: np.ndarray, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB, at most `MAX_PSNR`."""
    from skimage.metrics import peak_signal_noise_ratio  # of the `train` extra

    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(target, image, data_range=data_range)), MAX_PSNR)


def ssim(image: np.ndarray, target: np.ndarray, data_range: float) -> float:
    """
    Structural similarity of two images `(channels, height, width)`, the mean over channels and over windows of at most
    `SSIM_WINDOW` pixels; at most 1.
    """
    from skimage.metrics import structural_similarity

    side = min(SSIM_WINDOW, *image.shape[1:])
    window = side if side % 2 else side - 1
    return float(structural_similarity(target, image, data_range=data_range, channel_axis=0, win_size=window))


def dice(image: np.ndarray, target: np.ndarray, threshold: float) -> float:
    """
    Twice the number of values above the threshold in both, divided by their numbers in each; 1 if neither has any.
    """
    found, wanted = image > threshold, target > threshold
    total = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else 1.0


def measure(images: torch.Tensor, targets: torch.Tensor, data_range: float = 1.0) -> dict[str, float]:
    r"""
    Means over all images of `psnr` (dB) and `ssim`, the latter for images of at least 3 pixels, and of `dice` if the
    targets, all together, have just two values: masks.

    Args:
        images, targets (`torch.Tensor` of shape `(number, channels, height, width)`): On the same scale.
        data_range (`float`, defaults to 1.0): Difference of the highest and the lowest possible value.
    """
    pairs = [(x.double().numpy(), y.double().numpy()) for x, y in zip(images.cpu(), targets.cpu(), strict=True)]
    measures = {"psnr": [psnr(x, y, data_range) for x, y in pairs]}
    if min(targets.shape[2:]) >= 3:
        measures["ssim"] = [ssim(x, y, data_range) for x, y in pairs]
    levels = targets.unique()
    if len(levels) == 2:
        threshold = float(levels.double().mean())
        measures["dice"] = [dice(x, y, threshold) for x, y in pairs]
    return {name: float(np.mean(values)) for name, values in measures.items()}
