"""
Random masks to train networks that inpaint, the random erased regions of GLIDE (Nichol et al. 2021,
https://huggingface.co/papers/2112.10741, section 4). They depend only on the seed, the epoch and the example.
"""

import math
import random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..conditioning.image_format import Size, as_size
from ..deprecations import renamed
from .images import ImageDataset
from .seeding import derive_seed


# Shares of the kinds of masks. The full one keeps nothing, so that the network still learns to generate whole images.
MASK_SHARES = {"boxes": 0.35, "strokes": 0.35, "half": 0.2, "full": 0.1}
MAX_BOXES = 3
MAX_STROKES = 3
# Fractions of the sides of the image: shortest and longest side of a box, thinnest and thickest brush, end of a half.
# Brushes and strokes are relative to the side of a square of the same area.
BOX_SIDES = (0.2, 0.7)
BRUSH_WIDTHS = (0.06, 0.25)
HALF_ENDS = (0.3, 0.7)
# Corners of a stroke, and their distances as fractions of this side.
STROKE_CORNERS = (2, 6)
STROKE_LENGTHS = (0.1, 0.4)


def random_keep_mask(resolution: Size, generator: random.Random, kind: str | None = None) -> torch.Tensor:
    r"""
    Draws a keep mask: 1 where the image is kept, 0 where it is to be inpainted, which is at least one pixel.

    Args:
        resolution (`int` or `tuple[int, int]`): Side of a square, or height and width, in pixels.
        generator (`random.Random`): Source of the randomness.
        kind (`str`, *optional*): One of `MASK_SHARES`. `"boxes"` masks up to three rectangles, `"strokes"` up to three
            strokes of a round brush, `"half"` one side of a horizontal or vertical line, `"full"` everything. None
            chooses by these shares.

    Returns:
        `torch.Tensor` of shape `(1, height, width)`: float32.

    Raises:
        ValueError: For another kind.
    """
    if kind is None:
        (kind,) = generator.choices(list(MASK_SHARES), weights=list(MASK_SHARES.values()))
    if kind not in MASK_SHARES:
        raise ValueError(f"`kind` is {kind!r}; it must be one of {list(MASK_SHARES)}.")
    height, width = as_size(resolution)
    side, right, bottom = math.sqrt(height * width), width - 1, height - 1
    mask = Image.new("L", (width, height), 255 if kind == "full" else 0)  # white is inpainted
    draw = ImageDraw.Draw(mask)

    if kind == "boxes":
        for _ in range(generator.randint(1, MAX_BOXES)):
            box_width, box_height = (max(1, round(generator.uniform(*BOX_SIDES) * n)) for n in (width, height))
            x, y = generator.randint(0, width - box_width), generator.randint(0, height - box_height)
            draw.rectangle((x, y, x + box_width - 1, y + box_height - 1), fill=255)
    elif kind == "strokes":
        for _ in range(generator.randint(1, MAX_STROKES)):
            radius = generator.uniform(*BRUSH_WIDTHS) * side / 2
            x, y, angle = generator.uniform(0, right), generator.uniform(0, bottom), generator.uniform(0, 2 * math.pi)
            corners = [(x, y)]
            for _ in range(generator.randint(*STROKE_CORNERS)):
                angle += generator.uniform(-math.pi / 2, math.pi / 2)
                length = generator.uniform(*STROKE_LENGTHS) * side
                x = min(max(x + length * math.cos(angle), 0), right)
                y = min(max(y + length * math.sin(angle), 0), bottom)
                corners.append((x, y))
            draw.line(corners, fill=255, width=max(1, round(2 * radius)))
            for x, y in corners:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif kind == "half":
        share, name = generator.uniform(*HALF_ENDS), generator.choice(("left", "right", "top", "bottom"))
        length = width if name in ("left", "right") else height
        end = min(max(1, round(share * length)), max(1, length - 1))
        box = {
            "left": (0, 0, end - 1, bottom),
            "right": (width - end, 0, right, bottom),
            "top": (0, 0, right, end - 1),
            "bottom": (0, height - end, right, bottom),
        }[name]
        draw.rectangle(box, fill=255)
    return torch.from_numpy(np.array(mask) == 0).float()[None]


class InpaintingDataset(ImageDataset):
    """Examples with a random `keep_mask` from `random_keep_mask`, a new one in each epoch."""

    def transform(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        generator = random.Random(derive_seed(self.seed, "mask", self.epoch, index))
        return {**super().transform(example, index), "keep_mask": random_keep_mask(self.resolution, generator)}


__getattr__ = renamed(__name__, {"random_known": "random_keep_mask"})
