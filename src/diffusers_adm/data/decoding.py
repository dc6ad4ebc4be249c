"""
Decoding: any image becomes the channels and values of an `ImageFormat`, for 8-bit RGB as a viewer would show it, or an
error that says why it is unusable.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, cast

import numpy as np
from PIL import Image

from ..conditioning.image_format import (
    GREY_WEIGHTS,
    ImageFormat,
    ImageMode,
    Size,
    as_size,
    describe_resolution,
)
from .pixels import (
    MISSING,
    UNREADABLE,
    ImageSource,
    StoredImage,
    UnusableImageError,
    alpha_of_opaque,
    check_no_program,
    explain,
    is_deep_grey,
    open_image,
    upright,
)


# Reasons to skip an image, in addition to those of pixels.py.
NO_CONDITION, MISSHAPEN_CONDITION = "no usable condition", "condition of another aspect ratio"
OTHER_CHANNELS, OTHER_VALUES = "other channels", "values outside the range"
TOO_SMALL = "too small"
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

Decoded = Image.Image | np.ndarray


def decode_rgb(image: dict[str, Any] | Image.Image | None, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """
    Decodes an image completely and converts it to 8-bit RGB, as a viewer would show it.

    Applies the EXIF orientation, takes the first frame of an animation, scales (does not clip) 16-bit grey to 8 bits,
    and composites transparency of any kind over `background`.

    Args:
        image (`dict` or `PIL.Image.Image`): A dict of `bytes` and `path`, as `datasets` stores images, or an open
            image.
        background (`tuple[int, int, int]`, defaults to white): RGB, each 0 to 255.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnusableImageError: Whatever is wrong with the image.
    """
    if image is None:
        raise UnusableImageError(MISSING, "the entry is empty")
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, background)
        with Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
            check_no_program(opened)
            return _to_rgb(opened, background)
    except Exception as error:
        raise explain(error) from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if is_deep_grey(image):
        # `convert` would clip at 255 and make nearly every pixel white. 65535 / 257 = 255.
        eight_bit = np.round(np.asarray(upright(image), dtype=np.float64) / 257).astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in ("I", "F"):
        image.load()
        raise UnusableImageError(UNREADABLE, f"pixels of mode {image.mode} have no known range; save as 8 or 16 bits")
    converted = _convert_pillow(image, "RGB", background)
    return converted.copy() if converted is image else converted


def _convert_pillow(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """
    Decodes an opened image of 8 bits per channel, upright; transparent ones are composited over the background, or keep
    their alpha. It is the same object if there is nothing to convert.
    """
    image = upright(image)
    if image.has_transparency_data and mode in ("L", "RGB"):
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == mode else image.convert(mode)


def is_eight_bit(image_format: ImageFormat) -> bool:
    """Whether Pillow's images of 8 bits per channel have this format."""
    is_colour = image_format.mode != "array"
    return is_colour and image_format.value_range == (0, 255) and image_format.num_levels == 256


def decode_image(
    image: ImageSource, image_format: ImageFormat | None, background: tuple[int, int, int] = WHITE
) -> Image.Image | np.ndarray:
    """
    Decodes an image completely and converts it to the channels of a format.

    Grey becomes colour and the reverse as in Pillow, at any depth. Alpha is kept in the modes "LA" and "RGBA", and
    opaque for images without: the lowest value of the range is transparent, and the highest opaque, whatever they are
    in the file. Otherwise, the image is composited over `background`. In the mode "array", nothing is converted.
    Applies the orientation in the file and takes the first frame of an animation.

    Args:
        image (`dict`, `PIL.Image.Image`, `np.ndarray` or nested lists): See [`open_image`].
        image_format (`ImageFormat`, *optional*): The format. None: 8-bit RGB of any file, by `decode_rgb`.
        background (`tuple[int, int, int]`, defaults to white): RGB, each 0 to 255; scaled to the value range.

    Returns:
        `PIL.Image.Image` of the mode of the format, if it has 8 bits, else `np.ndarray` of shape `(height, width,
        channels)`: values of the data.

    Raises:
        UnusableImageError: Whatever is wrong with the image, or if it has other channels, or values outside the range.
        ImportError: If a file needs tifffile or imagecodecs, which is not installed.
    """
    if image_format is None:
        return decode_rgb(cast(dict, image), background)
    with open_image(image, image_format.channels) as stored:
        is_eight = is_eight_bit(image_format)
        if is_eight and stored.pillow is not None:
            return _convert_pillow(stored.pillow, image_format.mode, background)
        if not can_convert(stored.mode, stored.channels, image_format):
            raise UnusableImageError(
                OTHER_CHANNELS, f"{describe_channels(stored)} cannot become {image_format.mode} images"
            )
        values = _convert_values(stored, image_format, background)
        if not is_eight:
            return values
        values = values.astype(np.uint8)
        return Image.fromarray(values[..., 0] if image_format.mode == "L" else values)


def _check_range(values: np.ndarray, image_format: ImageFormat) -> None:
    low, high = image_format.value_range
    lowest, highest = values.min(), values.max()
    if not (lowest >= low and highest <= high):  # NaN too
        details = f"values from {lowest:g} to {highest:g}, outside of {low:g} to {high:g}"
        raise UnusableImageError(OTHER_VALUES, details)


def can_convert(mode: ImageMode, channels: int, image_format: ImageFormat) -> bool:
    """Whether images of this mode and number of channels can become images of the format."""
    if mode == "array" or image_format.mode == "array":
        return channels == image_format.channels
    return True


def describe_channels(stored: StoredImage) -> str:
    """The channels of an image in words: "RGB images", "arrays of 5 channels"."""
    return f"arrays of {stored.channels} channels" if stored.mode == "array" else f"{stored.mode} images"


def decoded_size(image: Decoded) -> tuple[int, int]:
    """Width and height of a decoded image."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def smallest_size(resolution: Size, min_image_size: Size | None) -> tuple[int, int]:
    """The smallest height and width of images for a resolution: those given, or half of the resolution."""
    if min_image_size is None:
        return tuple(max(1, side // 2) for side in as_size(resolution))  # type: ignore[return-value]
    return as_size(min_image_size)


def check_size(image: Decoded, smallest: tuple[int, int]) -> None:
    """Raises an `UnusableImageError` for a decoded image that is lower or narrower than (height, width)."""
    width, height = decoded_size(image)
    if height < smallest[0] or width < smallest[1]:
        shorter = "shorter side " if smallest[0] == smallest[1] else ""
        details = f"{height} x {width} pixels (height x width), {shorter}below {describe_resolution(smallest)}"
        raise UnusableImageError(TOO_SMALL, details)


def split_alpha(
    values: np.ndarray, mode: ImageMode, dtype: np.dtype, target: ImageMode
) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Splits an image into its colours and its alpha. The value range applies to the colours; alpha has its own scale.

    Args:
        values (`np.ndarray`): `(height, width, channels)`.
        mode (`str`): The mode of the image.
        dtype (`np.dtype`): The type that its values are stored in.
        target (`str`): The mode that it becomes. Alpha is a channel like the others in "array"; the last channel of an
            array is alpha in "LA" and "RGBA". (With integers of more than 16 bits, only a file that says so holds alpha
            in the range of the type.)

    Returns:
        `tuple[np.ndarray, np.ndarray | None]`: The colours, and the alpha as float64, 0 for transparent and 1 for
        opaque; `None` if there is none.
    """
    is_declared = mode in ("LA", "RGBA") and target != "array"
    is_asked_for = mode == "array" and target in ("LA", "RGBA") and (dtype.kind in "bf" or dtype.itemsize <= 2)
    if not (is_declared or is_asked_for):
        return values, None
    return values[..., :-1], values[..., -1:] / np.float64(alpha_of_opaque(dtype))


def _convert_values(stored: StoredImage, image_format: ImageFormat, background: tuple[int, int, int]) -> np.ndarray:
    values = stored.read()
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    target = image_format.mode
    colours, alpha = split_alpha(values, stored.mode, stored.dtype, target)
    _check_range(colours, image_format)
    if alpha is not None and not (alpha.min() >= 0 and alpha.max() <= 1):  # NaN too
        raise UnusableImageError(OTHER_VALUES, f"alpha {describe_alpha(alpha.min(), alpha.max(), stored.dtype)}")
    if target == "array" or (stored.mode == "array" and alpha is None):
        return colours
    low, high = image_format.value_range
    if alpha is not None and target in ("L", "RGB"):
        page = low + np.array(background, dtype=np.float64) / 255 * (high - low)
        page = page if colours.shape[-1] == 3 else _to_grey(page)
        colours = _round_like(page + (colours - page) * alpha, colours.dtype)
    if colours.shape[-1] == 3 and target in ("L", "LA"):
        colours = _round_like(_to_grey(colours.astype(np.float64)), colours.dtype)
    elif colours.shape[-1] == 1 and target in ("RGB", "RGBA"):
        colours = np.repeat(colours, 3, axis=-1)
    if target in ("LA", "RGBA"):
        alpha = np.ones(colours[..., :1].shape) if alpha is None else alpha
        colours = np.concatenate([colours, _alpha_in_range(alpha, image_format, colours.dtype)], axis=-1)
    return colours


def describe_alpha(lowest: float, highest: float, dtype: np.dtype) -> str:
    """The range of alphas outside of that of their type, given as fractions: "from 0 to 2, outside of 0 to 1"."""
    opaque = alpha_of_opaque(dtype)
    return f"from {lowest * opaque:g} to {highest * opaque:g}, outside of 0 to {opaque:g}"


def _alpha_in_range(alpha: np.ndarray, image_format: ImageFormat, dtype: np.dtype) -> np.ndarray:
    """Alpha from 0 to 1 in the value range, in a type that goes with colours of this type."""
    low, high = image_format.value_range
    values = low + alpha * (high - low)
    if image_format.num_levels is None or dtype.kind == "f":
        return values.astype(np.result_type(dtype, np.float32))
    # The range may exceed that of the type.
    whole = np.result_type(dtype, np.min_scalar_type(int(low)), np.min_scalar_type(int(high)))
    return _round_like(values, whole)


def _to_grey(colours: np.ndarray) -> np.ndarray:
    return (colours @ np.array(GREY_WEIGHTS, dtype=np.float64) / 2**16)[..., None]


def _round_like(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in this type; whole numbers are rounded, halves up as in Pillow."""
    return np.floor(values + 0.5).astype(dtype) if dtype.kind in "ui" else values.astype(dtype)


def decode_condition(
    condition: ImageSource, image_size: tuple[int, int], condition_format: ImageFormat | None = None
) -> Image.Image | np.ndarray:
    """
    Decodes a conditioning image like `decode_image`; transparency becomes black, "no condition".

    Args:
        condition (`dict`): As `datasets` stores images.
        image_size (`tuple[int, int]`): Width and height of the decoded image that it belongs to.
        condition_format (`ImageFormat`, *optional*): Its format. None: 8-bit RGB.

    Returns:
        `PIL.Image.Image` or `np.ndarray`: As from `decode_image`.

    Raises:
        UnusableImageError: If the conditioning image is unusable, or if its aspect ratio differs from that of its image
            by more than a pixel per side. The message names its file, if it has one.
    """
    path = condition.get("path") if isinstance(condition, dict) else None
    name = f"the condition {path}" if path else "the condition"
    try:
        decoded = decode_image(condition, condition_format, background=BLACK)
    except UnusableImageError as error:
        raise UnusableImageError(NO_CONDITION, f"{name} is {error.reason}: {error}") from error
    (width, height), (image_width, image_height) = decoded_size(decoded), image_size
    # One scale brings the image within a pixel of both sides.
    if abs(width * image_height - height * image_width) > image_width + image_height:
        details = f"{name} has {height} x {width} pixels, its image {image_height} x {image_width} (height x width)"
        raise UnusableImageError(MISSHAPEN_CONDITION, details)
    return decoded
