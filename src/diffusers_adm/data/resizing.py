"""
Resizing of decoded images by Pillow's bicubic filter, and the windows that are cut from them. It antialiases when
downsampling and is the filter of ADM's own data loader. Lanczos is slightly sharper but rings at hard edges.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..conditioning.image_format import ImageFormat
from .seeding import derive_seed


class Window(NamedTuple):
    """
    What is cut from an image: it is resized to `resized` (width, height), cropped to `height` x `width` from `left` and
    `top` on, and mirrored if `flip`.
    """

    resized: tuple[int, int]
    left: int
    top: int
    height: int
    width: int
    flip: bool = False

    @classmethod
    def place(cls, image_size: tuple[int, int], size: tuple[int, int], x: float, y: float, flip: bool) -> Window:
        """
        The window of `size` (height, width) in an image of `image_size` (width, height) that is resized to just cover
        it. `x` and `y` in [0, 1) place it, 0.5 in the middle.
        """
        (image_width, image_height), (height, width) = image_size, size
        ratio = max(width / image_width, height / image_height)
        resized = (max(width, round(image_width * ratio)), max(height, round(image_height * ratio)))
        left, top = math.floor(x * (resized[0] - width + 1)), math.floor(y * (resized[1] - height + 1))
        return cls(resized, left, top, height, width, flip)

    def cut(self, image: Image.Image | np.ndarray, image_format: ImageFormat) -> np.ndarray:
        """
        Cuts the window from a decoded image.

        Args:
            image (`Image.Image` or `np.ndarray`): From `decode_image`. A Pillow image is resized in 8 bits, an array in
                float32, clipped to the value range and, if the data has levels, rounded to them. An image that has
                the size already is not changed.
            image_format (`ImageFormat`): Its format.

        Returns:
            `np.ndarray` of shape `(height, width, channels)`.
        """
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        if isinstance(image, Image.Image):
            if self.resized != image.size:
                image = image.resize(self.resized, Image.Resampling.BICUBIC)
            image = image.crop(box)
            if self.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            values = np.array(image)
            return values[..., None] if values.ndim == 2 else values
        if self.resized == (image.shape[1], image.shape[0]):
            values = image[self.top : box[3], self.left : box[2]]
        else:
            values = _resize(image, self.resized, box, image_format)
        return values[:, ::-1] if self.flip else values


def draw_window(
    seed: int, epoch: int, index: int, image_size: tuple[int, int], size: tuple[int, int], center_crop: bool, flip: bool
) -> Window:
    """Draws the crop and, with `flip`, the mirroring of an example. They only depend on the seed, epoch and index."""
    x, y, mirror = _draw(seed, epoch, index)
    if center_crop:
        x = y = 0.5
    return Window.place(image_size, size, x, y, flip and mirror)


def draw_flip(seed: int, epoch: int, index: int) -> bool:
    """Whether `draw_window` mirrors an example if it may."""
    return _draw(seed, epoch, index)[2]


def _draw(seed: int, epoch: int, index: int) -> tuple[float, float, bool]:
    # All three are drawn whatever the options, so that changing one option does not affect the others.
    generator = random.Random(derive_seed(seed, "augmentation", epoch, index))
    return generator.random(), generator.random(), generator.random() < 0.5


def _resize(
    values: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], image_format: ImageFormat
) -> np.ndarray:
    """A box (left, top, right, bottom) of the values resized to `size` (width, height)."""
    low, high = image_format.value_range
    # Relative to the lower end: float32 is finest around 0, and there the premultiplied colours must vanish.
    values = values.astype(np.float64) - low if values.dtype.itemsize > 2 else values.astype(np.float32) - low
    has_alpha = image_format.mode in ("LA", "RGBA")
    if has_alpha:
        # Otherwise the colours of transparent pixels, which nobody sees, would leak into their neighbours.
        values[..., :-1] *= values[..., -1:] / (high - low)
    left, top, right, bottom = box
    bands = np.moveaxis(values, -1, 0).astype(np.float32)
    resized = (Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in bands)
    values = np.stack([np.asarray(band)[top:bottom, left:right] for band in resized], axis=-1).astype(np.float64)
    if has_alpha:
        alpha = values[..., -1:].clip(0, high - low)
        visible = alpha > 0
        values[..., :-1] = np.where(visible, values[..., :-1] * (high - low) / np.where(visible, alpha, 1), 0)
    values = values.clip(0, high - low)
    if image_format.num_levels is not None:
        step = (high - low) / (image_format.num_levels - 1)
        values = np.floor(values / step + 0.5) * step
    return low + values
