"""PSNR, SSIM and the Dice coefficient against their definitions."""

import math

import numpy as np
import pytest
import torch

from diffusers_adm.training.image_measures import MAX_PSNR, SSIM_WINDOW, dice, measure, psnr, ssim


def images(seed, number=2, channels=3, height=8, width=12):
    return torch.rand(number, channels, height, width, generator=torch.Generator().manual_seed(seed)).double()


def ssim_of_definition(x, y, data_range):
    """Wang et al. 2004, eq. 13, with uniform windows and unbiased variances, window by window."""
    c1, c2, side = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2, SSIM_WINDOW
    values = []
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - side + 1):
            for left in range(x.shape[2] - side + 1):
                a, b = (z[channel, top : top + side, left : left + side].ravel() for z in (x, y))
                covariance = np.cov(a, b)
                numerator = (2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
                denominator = (a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
                values.append(numerator / denominator)
    return np.mean(values)


@pytest.mark.parametrize("data_range", [1.0, 4095.0])
def test_psnr(data_range):
    x, y = (data_range * images(seed)[0].numpy() for seed in (0, 1))
    expected = 20 * math.log10(data_range) - 10 * math.log10(((x - y) ** 2).mean())
    assert psnr(x, y, data_range) == pytest.approx(expected, rel=1e-12)
    assert psnr(x, x, data_range) == MAX_PSNR


@pytest.mark.parametrize("data_range", [1.0, 4095.0])
def test_ssim(data_range):
    x = images(0)[0].numpy()
    y = 0.5 * x + 0.5 * images(1)[0].numpy()
    x, y = data_range * x, data_range * y
    assert ssim(x, y, data_range) == pytest.approx(ssim_of_definition(x, y, data_range), rel=1e-9)
    assert ssim(x, x, data_range) == pytest.approx(1)


def test_dice():
    target = np.zeros((1, 4, 4))
    target[0, :2] = 1  # 8 pixels
    image = np.zeros((1, 4, 4))
    image[0, 1:3] = 0.7  # 8 pixels, 4 of them in common
    assert dice(image, target, 0.5) == 2 * 4 / 16
    assert dice(target, target, 0.5) == 1
    assert dice(1 - target, target, 0.5) == 0
    assert dice(0 * target, 0 * target, 0.5) == 1


def test_means_over_images():
    x, y = images(0), images(1)
    measures = measure(x, y)
    assert list(measures) == ["psnr", "ssim"]
    assert measures["psnr"] == pytest.approx(
        np.mean([psnr(a.numpy(), b.numpy(), 1) for a, b in zip(x, y, strict=True)])
    )
    assert measures["ssim"] == pytest.approx(
        np.mean([ssim(a.numpy(), b.numpy(), 1) for a, b in zip(x, y, strict=True)])
    )
    # The scale of the data does not matter.
    scaled = measure(65535 * x, 65535 * y, 65535)
    assert scaled == pytest.approx(measures, rel=1e-9)


@pytest.mark.parametrize("levels", [(0, 1), (3, 200)])
def test_masks_are_recognised_by_their_two_values(levels):
    low, high = levels
    masks = torch.where(images(1, channels=1) > 0.5, high, low).double()
    samples = low + (high - low) * images(2, channels=1)
    expected = []
    for sample, mask in zip(samples > (low + high) / 2, masks == high, strict=True):
        expected.append(2 * (sample & mask).sum() / (sample.sum() + mask.sum()))
    measures = measure(samples, masks, high - low)
    assert measures["dice"] == pytest.approx(float(np.mean(expected)))
    assert measure(masks, masks, high - low) == {"psnr": MAX_PSNR, "ssim": pytest.approx(1), "dice": 1}


def test_tiny_images():
    assert list(measure(images(0, height=2), images(1, height=2))) == ["psnr"]
    assert "ssim" in measure(images(0, height=4), images(1, height=4))
