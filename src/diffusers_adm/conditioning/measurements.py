"""
Linear measurements of images, y = A x + noise, as inverse problems have them: known pixels, a smaller image, a blurred
one. `MeasurementGuidance` (image_guidance.py) samples images that fit a measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from ..ops.integers import check_integer
from .image_format import ImageFormat
from .image_inputs import ImageInput, read_images


DownsamplingMethod = Literal["average", "bicubic"]


class LinearOperator:
    """
    The base of linear measurements A. Values are those of the network's images, in [-1, 1]; 0 is grey. Differentiable.
    """

    def __init__(self) -> None:
        self._constants: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """A x of images `(batch_size, channels, height, width)`."""
        self.check(tuple(images.shape))
        return self.forward(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """A x, without checks."""
        raise NotImplementedError

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises a `ValueError` if images of this shape cannot be measured."""
        if len(shape) != 4:
            raise ValueError(
                f"The images have shape {shape}; a measurement takes `(batch_size, channels, height, width)`."
            )

    def place_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise of a measurement, where there is one."""
        return noise

    def _constant(self, name: Any, make: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A constant of the operator on the device and in the dtype of `like`, uploaded once."""
        key = (name, like.device, like.dtype)
        if key not in self._constants:
            self._constants[key] = make().to(like)
        return self._constants[key]

    def measure(
        self,
        image: ImageInput,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
        image_format: ImageFormat | None = None,
    ) -> torch.Tensor:
        r"""
        A noisy measurement of an image, to try a method with.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): As `image` of
                [`ADMInpaintPipeline`]: arrays and tensors in [0, 1] or of `uint8`.
            noise_std (`float`, defaults to 0.0): Standard deviation of Gaussian noise, for values in [-1, 1].
            generator (`torch.Generator`, *optional*): Source of the noise; on the CPU.
            image_format (`ImageFormat`, *optional*): Format of the image. `None`: 8-bit RGB.

        Returns:
            `torch.Tensor` of shape `(number of images, ...)`: y, about in [-1, 1].
        """
        check_noise_std(noise_std)
        images = 2 * read_images(image, "image", image_format or ImageFormat()) - 1
        measured = self(images)
        noise = torch.randn(measured.shape, generator=generator, dtype=measured.dtype)
        return measured + noise_std * self.place_noise(noise)


class MaskOperator(LinearOperator):
    """
    Known pixels, for inpainting: A x is x where it is known, and 0 elsewhere.

    Args:
        keep_mask (`torch.Tensor` of shape `(height, width)` or `(1 or number of images, 1, height, width)`): 1 or
            `True` for known pixels. (`~read_masks(mask_image, "mask_image")` for masks of [`ADMInpaintPipeline`], which
            are white where something is to be painted.)
    """

    def __init__(self, keep_mask: torch.Tensor):
        super().__init__()
        if not torch.is_tensor(keep_mask) or keep_mask.ndim not in (2, 4) or keep_mask.shape[-3:-2] not in ((), (1,)):
            shape = tuple(keep_mask.shape) if torch.is_tensor(keep_mask) else type(keep_mask).__name__
            raise ValueError(
                f"`keep_mask` is {shape}; pass a tensor of shape `(height, width)`, or `(number, 1, height, width)`."
            )
        mask = keep_mask if keep_mask.ndim == 4 else keep_mask[None, None]
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "`keep_mask` holds other values than 0 and 1. Pass a mask of `bool`, `True` for known pixels."
            )
        if not mask.any():
            raise ValueError("`keep_mask` is 0 everywhere, so nothing is known. Pass 1 or `True` for known pixels.")
        self.keep_mask = mask.bool()

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises a `ValueError` for images of another size than the mask, or another number of them."""
        super().check(shape)
        number, size = len(self.keep_mask), tuple(self.keep_mask.shape[2:])
        if size != tuple(shape[2:]) or number not in (1, shape[0]):
            raise ValueError(
                f"`keep_mask` has shape {tuple(self.keep_mask.shape)}, but the images have {tuple(shape)}. Pass a mask "
                "of their size: one for all, or one for each."
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The known pixels, `(batch_size, channels, height, width)`."""
        return images * self._constant("mask", lambda: self.keep_mask, images)

    def place_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Unknown pixels have no noise."""
        return noise * self.keep_mask.to(noise)


class DownsamplingOperator(LinearOperator):
    """
    A smaller image, for super-resolution.

    Args:
        factor (`int`): Number of pixels per pixel of the result, along each side.
        method (`str`, defaults to `"average"`): `"average"`: the mean of each square. `"bicubic"`: Keys' kernel (a =
            -0.5), widened by the factor against aliasing, with mirrored borders, as MATLAB's `imresize` does.
    """

    def __init__(self, factor: int, method: DownsamplingMethod = "average"):
        super().__init__()
        check_integer("factor", factor, 2)
        if method not in get_args(DownsamplingMethod):
            raise ValueError(f"`method` is {method!r}; it must be one of {list(get_args(DownsamplingMethod))}.")
        self.factor, self.method = int(factor), method

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises a `ValueError` for a size that is not divisible by the factor."""
        super().check(shape)
        if any(side % self.factor or side < self.factor for side in shape[2:]):
            raise ValueError(
                f"`factor` is {self.factor}, but the images have shape {tuple(shape)}. Height and width must be "
                "divisible by it."
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The smaller image, `(batch_size, channels, height / factor, width / factor)`."""
        if self.method == "average":
            return F.avg_pool2d(images, self.factor)
        rows, columns = (
            self._constant(side, partial(bicubic_matrix, side, self.factor), images) for side in images.shape[2:]
        )
        return rows @ images @ columns.T


class GaussianBlurOperator(LinearOperator):
    """
    A blurred image, for deblurring. Borders are mirrored.

    Args:
        kernel_size (`int`): Odd; height and width of the kernel.
        std (`float`): Its standard deviation, in pixels.
    """

    def __init__(self, kernel_size: int, std: float):
        super().__init__()
        _check_kernel(kernel_size, std)
        self.kernel_size, self.std = int(kernel_size), float(std)
        offsets = torch.arange(self.kernel_size, dtype=torch.float64) - self.kernel_size // 2
        weights = torch.exp(-(offsets**2) / (2 * self.std**2))
        self.weights = weights / weights.sum()

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises a `ValueError` if the kernel is larger than the images, mirrored once."""
        super().check(shape)
        if any(self.kernel_size // 2 >= side for side in shape[2:]):
            raise ValueError(
                f"`kernel_size` is {self.kernel_size}, too large for images of shape {tuple(shape)}: half of it, "
                f"{self.kernel_size // 2}, must be less than height and width. (For a `std` of {self.std:g}, "
                f"{2 * int(3 * self.std + 0.5) + 1} holds all but 0.3% of the weight.)"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The blurred image, `(batch_size, channels, height, width)`."""
        channels, padding = images.shape[1], self.kernel_size // 2
        weights = self._constant("weights", lambda: self.weights, images).expand(channels, 1, 1, -1)
        padded = F.pad(images, (padding,) * 4, mode="reflect")
        blurred = F.conv2d(padded, weights, groups=channels)
        return F.conv2d(blurred, weights.transpose(2, 3), groups=channels)


def bicubic_matrix(size: int, factor: int) -> torch.Tensor:
    """The weights of bicubic downsampling along one side: `(size / factor, size)`, float64."""
    positions = torch.arange(size // factor, dtype=torch.float64)
    centres = (positions + 0.5) * factor - 0.5
    taps = torch.arange(-2 * factor, size + 2 * factor)  # beyond either border, as far as the kernel reaches
    distances = ((taps - centres[:, None]) / factor).abs()
    near = 1.5 * distances**3 - 2.5 * distances**2 + 1
    far = -0.5 * distances**3 + 2.5 * distances**2 - 4 * distances + 2
    weights = torch.where(distances <= 1, near, torch.where(distances <= 2, far, 0.0))
    weights = weights / weights.sum(dim=1, keepdim=True)
    mirrored = taps % (2 * size)
    mirrored = torch.minimum(mirrored, 2 * size - 1 - mirrored)
    return torch.zeros(size // factor, size, dtype=torch.float64).index_add(1, mirrored, weights)


def _check_kernel(kernel_size: Any, std: Any) -> None:
    if not isinstance(kernel_size, Integral) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` is {kernel_size!r}; pass an odd integer.")
    if not isinstance(std, Real) or not 0 < std < float("inf"):
        raise ValueError(f"`std` is {std!r}; pass a positive number of pixels.")


def check_noise_std(noise_std: Any) -> None:
    """Raises a `ValueError` unless the standard deviation of noise is a number of at least 0."""
    if not isinstance(noise_std, Real) or not 0 <= noise_std < float("inf"):
        raise ValueError(f"`noise_std` is {noise_std!r}; pass a number of at least 0.")
