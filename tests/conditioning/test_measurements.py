"""Measurements of images, against SciPy, `F.interpolate` and sums over pixels by hand."""

import re

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_adm.conditioning.measurements import (
    DownsamplingOperator,
    GaussianBlurOperator,
    LinearOperator,
    MaskOperator,
    bicubic_matrix,
)


KEEP_MASK = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.5
OPERATORS = [
    MaskOperator(KEEP_MASK),
    DownsamplingOperator(2),
    DownsamplingOperator(4, "bicubic"),
    GaussianBlurOperator(5, 1.2),
]


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestOperators:
    def test_mask(self):
        x = images(2, 3, 8, 12)
        expected = torch.where(KEEP_MASK, x, 0.0)
        assert torch.equal(MaskOperator(KEEP_MASK)(x), expected)
        masks = torch.stack([KEEP_MASK, ~KEEP_MASK])[:, None]
        assert torch.equal(MaskOperator(masks.int())(x)[1], torch.where(KEEP_MASK, 0.0, x[1]))

    def test_average(self):
        x = images(2, 3, 8, 12)
        expected = x.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
        torch.testing.assert_close(DownsamplingOperator(2)(x), expected)

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_bicubic(self, factor):
        """PyTorch cuts the kernel at the border; on an image mirrored beyond it, both are the same."""
        x = images(2, 3, 4 * factor, 5 * factor)
        mirrored = torch.cat([x.flip(3), x, x.flip(3)], dim=3)
        mirrored = torch.cat([mirrored.flip(2), mirrored, mirrored.flip(2)], dim=2)
        expected = F.interpolate(mirrored, scale_factor=1 / factor, mode="bicubic", antialias=True)[:, :, 4:8, 5:10]
        torch.testing.assert_close(DownsamplingOperator(factor, "bicubic")(x), expected)

    def test_bicubic_of_an_image_smaller_than_the_kernel(self):
        torch.testing.assert_close(bicubic_matrix(4, 4), torch.full((1, 4), 0.25, dtype=torch.float64))

    @pytest.mark.parametrize("kernel_size, std", [(5, 1.0), (9, 1.5), (13, 5.0)])
    def test_blur(self, kernel_size, std):
        """SciPy's "mirror" is reflection without the border pixel."""
        x = images(1, 2, 8, 12)
        radius = kernel_size // 2
        expected = scipy.ndimage.gaussian_filter(x.numpy(), std, mode="mirror", radius=radius, axes=(2, 3))
        torch.testing.assert_close(GaussianBlurOperator(kernel_size, std)(x), torch.from_numpy(expected))

    @pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
    def test_linear_with_the_gradient_of_its_transpose(self, operator):
        x, y = images(2, 1, 3, 8, 12)
        torch.testing.assert_close(operator(2 * x - 3 * y), 2 * operator(x) - 3 * operator(y))
        x.requires_grad_()
        measured = operator(x)
        direction = images(*measured.shape, seed=3)
        (gradient,) = torch.autograd.grad(measured, x, direction)
        torch.testing.assert_close((gradient * y).sum(), (direction * operator(y)).sum())

    @pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
    def test_dtypes_and_devices(self, operator):
        """One object for all of them, one after the other."""
        x = images(1, 3, 8, 12)
        wide = operator(x)
        assert wide.dtype == torch.float64
        narrow = operator(x.float())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-6)
        assert operator(x.to("meta")).shape == wide.shape
        torch.testing.assert_close(operator(x), wide)

    def test_grey_stays_grey(self):
        x = torch.full((1, 3, 8, 12), 0.3)
        for operator in OPERATORS[1:]:
            torch.testing.assert_close(operator(x), torch.full_like(operator(x), 0.3))


class TestMeasure:
    @pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
    def test_noise(self, operator):
        image = torch.rand(40, 3, 8, 12, generator=torch.Generator().manual_seed(2))
        clean = operator.measure(image)
        torch.testing.assert_close(clean, operator(2 * image - 1))
        noise = operator.measure(image, 0.2, torch.Generator().manual_seed(0)) - clean
        again = operator.measure(image, 0.2, torch.Generator().manual_seed(0)) - clean
        torch.testing.assert_close(noise, again, rtol=0, atol=1e-5)  # a sum may differ in its last bits
        if isinstance(operator, MaskOperator):
            assert not noise[:, :, ~KEEP_MASK].any()
            noise = noise[:, :, KEEP_MASK]
        # 720 numbers at least: a standard error of the deviation of 0.005.
        assert noise.std().item() == pytest.approx(0.2, abs=0.02)

    def test_pictures(self):
        image = Image.new("RGB", (12, 8), (255, 0, 51))
        measured = DownsamplingOperator(4).measure(image)
        assert measured.shape == (1, 3, 2, 3)
        torch.testing.assert_close(measured[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


class TestBadInput:
    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: MaskOperator(torch.ones(3)), "`keep_mask` is (3,); pass a tensor of shape"),
            (lambda: MaskOperator(torch.ones(1, 3, 4, 4)), "`keep_mask` is (1, 3, 4, 4); pass a tensor of shape"),
            (lambda: MaskOperator("mask"), "`keep_mask` is str; pass a tensor of shape"),
            (lambda: MaskOperator(torch.full((4, 4), 0.5)), "`keep_mask` holds other values than 0 and 1"),
            (lambda: MaskOperator(torch.zeros(4, 4)), "`keep_mask` is 0 everywhere, so nothing is known"),
            (lambda: DownsamplingOperator(1), "`factor` is 1; pass an integer of at least 2"),
            (lambda: DownsamplingOperator(2.5), "`factor` is 2.5; pass an integer of at least 2"),
            (lambda: DownsamplingOperator(2, "nearest"), "`method` is 'nearest'; it must be one of"),
            (lambda: GaussianBlurOperator(4, 1.0), "`kernel_size` is 4; pass an odd integer"),
            (lambda: GaussianBlurOperator(5, 0.0), "`std` is 0.0; pass a positive number"),
        ],
    )
    def test_of_operators(self, make, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()

    @pytest.mark.parametrize(
        "operator, shape, message",
        [
            (MaskOperator(torch.ones(4, 4)), (1, 3, 4, 5), "`keep_mask` has shape (1, 1, 4, 4), but the images have"),
            (MaskOperator(torch.ones(2, 1, 4, 4)), (3, 3, 4, 4), "Pass a mask of their size: one for all, or one for"),
            (DownsamplingOperator(3), (1, 3, 9, 8), "`factor` is 3, but the images have shape (1, 3, 9, 8)"),
            (GaussianBlurOperator(17, 2.0), (1, 3, 32, 8), "`kernel_size` is 17, too large for images of shape"),
            (GaussianBlurOperator(3, 2.0), (3, 8, 8), "a measurement takes `(batch_size, channels, height, width)`"),
        ],
    )
    def test_of_images(self, operator, shape, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            operator(torch.zeros(shape))

    @pytest.mark.parametrize("noise_std", [-0.1, float("nan"), "0.1"])
    def test_of_noise(self, noise_std):
        with pytest.raises(ValueError, match=re.escape(f"`noise_std` is {noise_std!r}; pass a number of at least 0")):
            DownsamplingOperator(2).measure(torch.zeros(3, 4, 4), noise_std)

    def test_the_base_measures_nothing(self):
        with pytest.raises(NotImplementedError):
            LinearOperator()(torch.zeros(1, 3, 4, 4))
