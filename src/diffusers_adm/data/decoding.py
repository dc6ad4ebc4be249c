"""Decoding: any image file becomes 8-bit RGB, as a viewer would show it, or an error that says why it is unusable."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# Reasons to skip an image, as they appear in logs and in the report.
MISSING, UNREADABLE, TOO_LARGE = "missing", "unreadable", "too large (decompression bomb)"
NO_CONDITION, MISSHAPEN_CONDITION = "no usable condition", "condition of another aspect ratio"
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


class UnusableImageError(Exception):
    """An image that cannot be used. `reason` is one of the constants of this module; the message has the details."""

    def __init__(self, reason: str, details: str):
        super().__init__(details)
        self.reason = reason


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
            return _to_rgb(opened, background)
    except UnusableImageError:
        raise
    except FileNotFoundError as error:
        raise UnusableImageError(MISSING, "no such file") from error
    except UnidentifiedImageError as error:
        raise UnusableImageError(UNREADABLE, "not an image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise UnusableImageError(TOO_LARGE, str(error)) from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost anything (OSError, SyntaxError, struct.error, IndexError,
        # zlib.error, MemoryError ...). None of it may end a run, and all of it is reported with the name of the file.
        raise UnusableImageError(UNREADABLE, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    source_format = image.format
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and source_format == "PPM"):
        # `convert` would clip at 255 and make nearly every pixel white. 65535 / 257 = 255.
        eight_bit = np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableImageError(UNREADABLE, f"pixels of mode {image.mode} have no known range; save as 8 or 16 bits")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def decode_condition(condition: dict[str, Any] | None, image_size: tuple[int, int]) -> Image.Image:
    """
    Decodes a conditioning image for a ControlNet like `decode_rgb`; transparency becomes black, "no condition".

    Args:
        condition (`dict`): As `datasets` stores images.
        image_size (`tuple[int, int]`): Width and height of the decoded image that it belongs to.

    Returns:
        `PIL.Image.Image`: Mode RGB.

    Raises:
        UnusableImageError: If the conditioning image is unusable, or if its aspect ratio differs from that of its image
            by more than a pixel per side. The message names its file, if it has one.
    """
    path = (condition or {}).get("path")
    name = f"the condition {path}" if path else "the condition"
    try:
        decoded = decode_rgb(condition, background=BLACK)
    except UnusableImageError as error:
        raise UnusableImageError(NO_CONDITION, f"{name} is {error.reason}: {error}") from error
    (width, height), (image_width, image_height) = decoded.size, image_size
    # One scale brings the image within a pixel of both sides.
    if abs(width * image_height - height * image_width) > image_width + image_height:
        details = f"{name} has {width} x {height} pixels, its image {image_width} x {image_height}"
        raise UnusableImageError(MISSHAPEN_CONDITION, details)
    return decoded
