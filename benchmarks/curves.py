"""Line drawings for figures, as curves in the unit square."""

import math

from PIL import Image, ImageDraw


POINTS = 60  # of a curve

Curve = list[tuple[float, float]]  # (x, y) from 0 to 1, y downwards


ANGLES = [2 * math.pi * i / POINTS for i in range(POINTS + 1)]


def ellipse(x: float, y: float, width: float, height: float) -> Curve:
    return [(x + width / 2 * math.cos(a), y + height / 2 * math.sin(a)) for a in ANGLES]


def arc(x: float, y: float, width: float, height: float, bend: float) -> Curve:
    """From left to right; a positive `bend` curves down, like a smile."""
    steps = [2 * i / POINTS - 1 for i in range(POINTS + 1)]
    return [(x + width / 2 * s, y + bend * height * (1 - s * s)) for s in steps]


def heart() -> Curve:
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in ANGLES]
    return [(0.5 + 0.026 * 16 * math.sin(a) ** 3, 0.48 - 0.026 * y) for a, y in zip(ANGLES, heights, strict=True)]


EYES = [ellipse(0.35, 0.42, 0.1, 0.14), ellipse(0.65, 0.42, 0.1, 0.14)]
HEAD = ellipse(0.5, 0.5, 0.88, 0.88)


def draw_lines(curves: list[Curve], size: int) -> Image.Image:
    image = Image.new("L", (size, size))
    for curve in curves:
        ImageDraw.Draw(image).line([(x * (size - 1), y * (size - 1)) for x, y in curve], fill=255)
    return image.convert("RGB")
