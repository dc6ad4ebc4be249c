"""
Random masks, to train networks that inpaint: what GLIDE (https://huggingface.co/papers/2112.10741, section 4) calls
random erased regions. They are drawn where the images are read, on the CPU, by seed, epoch and example alone.
"""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageDraw

from .images import ImageDataset
from .seeding import derive_seed


# Shares of the kinds of masks. With the full one, on which nothing is known, the network goes on to learn what it does
# without an image.
MASK_SHARES = {"boxes": 0.35, "strokes": 0.35, "half": 0.2, "full": 0.1}
MAX_BOXES = 3
MAX_STROKES = 3
# Of the side of the image: shortest and longest side of a box, thinnest and thickest brush, where a half may end.
BOX_SIDES = (0.2, 0.7)
BRUSH_WIDTHS = (0.06, 0.25)
HALF_ENDS = (0.3, 0.7)
# Corners of a stroke, and how far apart they are, of the side of the image.
STROKE_CORNERS = (2, 6)
STROKE_LENGTHS = (0.1, 0.4)


def random_known(resolution: int, generator: random.Random, kind: str | None = None) -> torch.Tensor:
    r"""
    What is known of an image: `(1, resolution, resolution)`, float32; 1: kept, 0: to be painted, at least one pixel.

    Args:
        resolution (`int`): In pixels.
        generator (`random.Random`): Source of all that is random.
        kind (`str`, *optional*): One of `MASK_SHARES`: `"boxes"`: up to three rectangles are unknown; `"strokes"`: up
            to three strokes of a round brush; `"half"`: all on one side of a horizontal or vertical line; `"full"`:
            all. `None`: drawn by these shares.

    Raises:
        ValueError: For another kind.
    """
    if kind is None:
        (kind,) = generator.choices(list(MASK_SHARES), weights=list(MASK_SHARES.values()))
    if kind not in MASK_SHARES:
        raise ValueError(f"`kind` is {kind!r}; it must be one of {list(MASK_SHARES)}.")
    mask = Image.new("L", (resolution, resolution), 255 if kind == "full" else 0)  # white is unknown
    draw = ImageDraw.Draw(mask)
    last = resolution - 1

    if kind == "boxes":
        for _ in range(generator.randint(1, MAX_BOXES)):
            width, height = (max(1, round(generator.uniform(*BOX_SIDES) * resolution)) for _ in range(2))
            x, y = generator.randint(0, resolution - width), generator.randint(0, resolution - height)
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=255)
    elif kind == "strokes":
        for _ in range(generator.randint(1, MAX_STROKES)):
            radius = generator.uniform(*BRUSH_WIDTHS) * resolution / 2
            x, y, angle = generator.uniform(0, last), generator.uniform(0, last), generator.uniform(0, 2 * math.pi)
            corners = [(x, y)]
            for _ in range(generator.randint(*STROKE_CORNERS)):
                angle += generator.uniform(-math.pi / 2, math.pi / 2)
                length = generator.uniform(*STROKE_LENGTHS) * resolution
                x = min(max(x + length * math.cos(angle), 0), last)
                y = min(max(y + length * math.sin(angle), 0), last)
                corners.append((x, y))
            draw.line(corners, fill=255, width=max(1, round(2 * radius)))
            for x, y in corners:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif kind == "half":
        end = min(max(1, round(generator.uniform(*HALF_ENDS) * resolution)), max(1, last))
        side = generator.choice(("left", "right", "top", "bottom"))
        box = {
            "left": (0, 0, end - 1, last),
            "right": (last - end + 1, 0, last, last),
            "top": (0, 0, last, end - 1),
            "bottom": (0, last - end + 1, last, last),
        }[side]
        draw.rectangle(box, fill=255)
    return torch.from_numpy(np.array(mask) == 0).float()[None]


class InpaintingDataset(ImageDataset):
    """Examples with a mask: `known`, of `random_known`, anew in each epoch."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = random.Random(derive_seed(self.seed, "mask", self.epoch, index))
        return {**super().__getitem__(index), "known": random_known(self.resolution, generator)}
