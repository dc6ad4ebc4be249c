"""
The format of images: what their channels are, and which values of the data the network's range [-1, 1] stands for. A
model keeps the format that it was trained with in its config, so that the map between the two is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch


ImageMode = Literal["L", "LA", "RGB", "RGBA", "array"]
# Channels of the modes whose channels have a meaning to a viewer, as in Pillow. "array" has any number of them.
MODE_CHANNELS: dict[ImageMode, int] = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
# float32 holds so many levels exactly in [-1, 1], with digits to spare.
MAX_LEVELS = 2**16
# Weights of red, green and blue in grey, ITU-R BT.601 in 65536ths, as Pillow's mode "L" computes it.
GREY_WEIGHTS = (19595, 38470, 7471)
Size = int | Sequence[int]


@dataclass(frozen=True)
class ImageFormat:
    """
    The format of the images of a model or a dataset.

    Attributes:
        mode (`str`): Meaning of the channels: grey "L", "LA" with alpha, "RGB", "RGBA", or "array", channels that are
            no colours.
        channels (`int`): Number of channels.
        value_range (`tuple[float, float]`): Values of the data for -1 and 1.
        num_levels (`int`, *optional*): Number of values between these two, both included, that the data can have,
            evenly spaced: 256 for 8 bits. `None`: any value, for floating point data.

    Raises:
        ValueError: For an unknown mode, other channels than those of the mode, and an empty range.
    """

    mode: ImageMode = "RGB"
    channels: int = 3
    value_range: tuple[float, float] = (0, 255)
    num_levels: int | None = 256

    def __post_init__(self) -> None:
        if self.mode not in get_args(ImageMode):
            raise ValueError(f"The image mode is {self.mode!r}; it must be one of {list(get_args(ImageMode))}.")
        if self.channels != MODE_CHANNELS.get(self.mode, self.channels) or self.channels < 1:
            raise ValueError(
                f"The image mode {self.mode!r} has {MODE_CHANNELS.get(self.mode, 'at least 1')} channels, not "
                f"{self.channels}. Use the mode 'array' for other channels."
            )
        low, high = self.value_range
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError(f"The value range is {low} to {high}; it must be finite, and the first must be the lower.")
        if self.num_levels is not None and not 2 <= self.num_levels <= MAX_LEVELS:
            raise ValueError(f"The number of levels is {self.num_levels}; it must lie between 2 and {MAX_LEVELS}.")

    @classmethod
    def of_channels(cls, channels: int) -> ImageFormat:
        """
        The format of a model whose config has none: 8-bit grey or RGB; other numbers of channels are an array whose
        range is not known, in [0, 1].
        """
        modes: dict[int, ImageMode] = {1: "L", 3: "RGB"}
        if channels in modes:
            return cls(modes[channels], channels)
        return cls("array", channels, (0, 1), None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, channels: int, name: str = "image_format") -> ImageFormat:
        """
        The format of the entry `name` of a config, for images of `channels` channels; `None`: `of_channels`. Raises a
        `ValueError` for an entry that is not a format, or of other channels.
        """
        if config is None:
            return cls.of_channels(channels)
        keys = ("mode", "channels", "value_range", "num_levels")
        if not isinstance(config, Mapping) or set(config) != set(keys) or not _is_pair(config["value_range"]):
            raise ValueError(
                f"`{name}` is {config!r}; it must be a dict with the entries {', '.join(keys)}, as by "
                "`ImageFormat.to_config`."
            )
        image_format = cls(config["mode"], config["channels"], tuple(config["value_range"]), config["num_levels"])
        if image_format.channels != channels:
            raise ValueError(
                f"`{name}` has {image_format.channels} channels, but the images of this model have {channels}."
            )
        return image_format

    def to_config(self) -> dict[str, Any]:
        """Plain values for a config."""
        return {
            "mode": self.mode,
            "channels": self.channels,
            "value_range": list(self.value_range),
            "num_levels": self.num_levels,
        }

    def __str__(self) -> str:
        names = {"L": "grey", "LA": "grey with alpha", "array": f"{self.channels}-channel"}
        low, high = self.value_range
        levels = "continuous" if self.num_levels is None else f"{self.num_levels} levels"
        return f"{names.get(self.mode, self.mode)} images from {low:g} to {high:g} ({levels})"

    # 1. Values

    @property
    def dtype(self) -> np.dtype:
        """The smallest NumPy type for values of the data: an integer type for whole numbers, else float32."""
        if self.num_levels is None or not self.has_whole_numbers:
            return np.dtype(np.float32)
        low, high = self.value_range
        types = (np.dtype(name) for name in ("uint8", "uint16", "int16", "int32"))
        return next(dtype for dtype in types if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)

    @property
    def has_whole_numbers(self) -> bool:
        """Whether the levels are whole numbers."""
        low, high = self.value_range
        return self.num_levels is not None and low == int(low) and (high - low) % (self.num_levels - 1) == 0

    def to_samples(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the data in [-1, 1]; float32, or float64 for such values."""
        low, high = self.value_range
        values = values if values.dtype == torch.float64 else values.float()
        # For 0 to 255 these are the operations, and so the bits, of `values / 127.5 - 1`.
        return (values - low if low else values) / ((high - low) / 2) - 1

    def to_values(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples in [-1, 1], clipped, as values of the data: float32 or float64, on its levels."""
        samples = samples.to(torch.promote_types(samples.dtype, torch.float32))
        return self.from_unit((samples / 2 + 0.5).clamp(0, 1))

    def from_unit(self, fractions: torch.Tensor) -> torch.Tensor:
        """Fractions of the value range in [0, 1] as values of the data: float32 or float64, on its levels."""
        low, high = self.value_range
        # float16 ends at 65504, and bfloat16 has 8 bits.
        fractions = fractions.to(torch.promote_types(fractions.dtype, torch.float32))
        if self.num_levels is None:
            return low + fractions * (high - low)
        return low + (fractions * (self.num_levels - 1)).round() * ((high - low) / (self.num_levels - 1))

    def to_unit(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the data as fractions of the value range: the inverse of `from_unit`, not clipped."""
        low, high = self.value_range
        # For 0 to 255 these are the bits of `values / 255`.
        return (values - low if low else values) / (high - low)

    # 2. Outputs

    @property
    def is_viewable(self) -> bool:
        """
        Whether the images are viewable: Pillow can show them. Floating point images of a pipeline are then in [0, 1],
        as everywhere in diffusers; those of other formats are values of the data.
        """
        return self.why_no_pil is None

    @property
    def why_no_pil(self) -> str | None:
        """Why Pillow cannot show these images, for messages; `None`: it can."""
        low, high = self.value_range
        if self.mode == "array":
            channels = count_channels(self.channels)
            return f"the model was trained on arrays of {channels}, which are no colours to Pillow"
        if not self.has_whole_numbers:
            return "the model was trained on floating point numbers"
        if low < 0 or high > 2**16 - 1:
            return f"the values range from {low:g} to {high:g}, and Pillow's from 0 to 65535"
        return None

    @property
    def pil_mode(self) -> str | None:
        """Pillow's mode of these images: "I;16" for grey of more than 8 bits; `None` if it cannot show them."""
        if not self.is_viewable:
            return None
        return "I;16" if self.mode == "L" and self.value_range[1] > 255 else self.mode

    @property
    def loses_depth_in_pil(self) -> bool:
        """Whether Pillow shows only 8 of more bits: it has no colour images of 16 bits."""
        return self.is_viewable and self.value_range[1] > 255 and self.mode != "L"


def count_channels(channels: int) -> str:
    """The number of channels in words: "1 channel", "5 channels"."""
    return f"{channels} channel" + "s" * (channels != 1)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)


# 3. Sizes


def as_size(size: Size | None) -> tuple[int, int] | None:
    """Returns (height, width) for the side of a square or for both sides, such as the `sample_size` of a config."""
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def as_sample_size(size: Size) -> int | list[int]:
    """The size as a `sample_size` of a config: one number for a square, or `[height, width]`."""
    height, width = as_size(size)
    return height if height == width else [height, width]


def describe_size(size: Size) -> str:
    """The size in words: "64 x 256" (height x width)."""
    return "{} x {}".format(*as_size(size))


def describe_resolution(size: Size) -> str:
    """Describes a size in words: "96" for the side of a square, or "64 x 256" for (height, width)."""
    height, width = as_size(size)
    return str(height) if height == width else describe_size(size)


def parse_size(name: str, size: str | Size) -> int | tuple[int, int]:
    """
    Reads a size from the command line: "96", a square, or "64x256", height x width; numbers may be numbers already.
    Returns one number for squares. Raises a `ValueError` that calls it `name`.
    """
    parts = list(map(str, size)) if isinstance(size, (list, tuple)) else str(size).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"`{name}` is {size!r}; pass the side of a square in pixels, e.g. 96, or HEIGHTxWIDTH, e.g. 64x256."
        )
    numbers = [int(part) for part in parts]
    return numbers[0] if len(set(numbers)) == 1 else (numbers[0], numbers[1])
