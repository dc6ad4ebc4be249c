"""Grids of images with row and column labels, for validation images and the demo."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont


BACKGROUND = (255, 255, 255)
TEXT_COLOR = (32, 32, 32)
# In pixels: smaller, Pillow's default font is hard to read; larger, labels dominate the images.
MIN_FONT_SIZE, MAX_FONT_SIZE = 12, 24
CAPTION_LINE_HEIGHT = 15
MIN_CAPTION_WIDTH = 160  # narrower grids are widened by white, so that a caption has room


def labelled_grid(
    images: Sequence[Image.Image],
    rows: int,
    cols: int,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    scale: int = 1,
    padding: int = 2,
    caption: str | None = None,
) -> Image.Image:
    """
    Arranges images of one size in a grid, row by row, with optional labels to the left and above.

    Args:
        images (sequence of `PIL.Image.Image`): At most `rows * cols` images of equal size; missing ones stay blank.
        row_labels (sequence of `str`, *optional*): One per row, right-aligned, to its left.
        col_labels (sequence of `str`, *optional*): One per column, centred above it, wrapped to its width.
        scale (`int`, defaults to 1): Each pixel becomes a square of `scale` pixels, without interpolation.
        padding (`int`, defaults to 2): Pixels between neighbours and around the grid, after scaling.
        caption (`str`, *optional*): What the images show, below the grid, wrapped to its width.

    Raises:
        ValueError: If there are no images or too many, sizes differ, or a label is missing.
    """
    if not 1 <= len(images) <= rows * cols:
        raise ValueError(f"Got {len(images)} images for a grid of {rows} x {cols}. Pass between 1 and {rows * cols}.")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"All images of a grid must have one size, got {sizes}. Resize them first.")
    for name, labels, expected in (("row_labels", row_labels, rows), ("col_labels", col_labels, cols)):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"`{name}` holds {len(labels)} labels but the grid has {expected}. Pass one for each.")

    width, height = sizes[0][0] * scale, sizes[0][1] * scale
    font_size = min(max(height // 6, MIN_FONT_SIZE), MAX_FONT_SIZE)
    font = ImageFont.load_default(size=font_size)
    line_height = font_size + font_size // 4
    wrapped = [_wrap(label, font, width) for label in col_labels or []]
    top = max((len(lines) for lines in wrapped), default=0) * line_height
    left = max((int(font.getlength(label)) + line_height // 2 for label in row_labels or []), default=0)

    size = (left + padding + cols * (width + padding), top + padding + rows * (height + padding))
    caption_lines, caption_font = [], ImageFont.load_default(size=MIN_FONT_SIZE)
    if caption is not None:
        caption_lines = _wrap(caption, caption_font, max(size[0], MIN_CAPTION_WIDTH) - 2 * padding)
        size = (max(size[0], MIN_CAPTION_WIDTH), size[1] + len(caption_lines) * CAPTION_LINE_HEIGHT)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        row, col = divmod(index, cols)
        cell = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        grid.paste(cell, (left + padding + col * (width + padding), top + padding + row * (height + padding)))
    for row, label in enumerate(row_labels or []):
        middle = top + padding + row * (height + padding) + height // 2
        draw.text((left - line_height // 4, middle), label, fill=TEXT_COLOR, font=font, anchor="rm")
    for col, lines in enumerate(wrapped):
        middle = left + padding + col * (width + padding) + width // 2
        for line, text in enumerate(lines):
            # Labels of fewer lines stand directly above the images.
            baseline = top - (len(lines) - 1 - line) * line_height - line_height // 4
            draw.text((middle, baseline), text, fill=TEXT_COLOR, font=font, anchor="ms")
    for line, text in enumerate(caption_lines):
        baseline = size[1] - (len(caption_lines) - 1 - line) * CAPTION_LINE_HEIGHT - 4
        draw.text((padding, baseline), text, fill=TEXT_COLOR, font=caption_font, anchor="ls")
    return grid


def labelled_strips(
    columns: Mapping[str, Sequence[Image.Image]], scale: int = 1, caption: str | None = None
) -> Image.Image:
    """
    Arranges images that belong together, such as `condition | sample | target`, side by side, in a grid that is about
    square. `columns` holds the images, all of one size and equally many, by the names above their columns; `caption` is
    that of `labelled_grid`.
    """
    strips = list(zip(*columns.values(), strict=True))
    across = math.ceil(math.sqrt(len(strips) / len(columns)))
    labels = [*columns] * across
    images = [image for strip in strips for image in strip]
    return labelled_grid(
        images, math.ceil(len(strips) / across), len(labels), col_labels=labels, scale=scale, caption=caption
    )


def cell_scale(images: Sequence[Image.Image]) -> int:
    """The `scale` of a grid that brings the longer side of small images, all of one size, close to 64 pixels."""
    return max(1, 64 // max(images[0].size))


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks a label into lines of at most `width` pixels; a longer word ends in dots."""
    lines: list[str] = []
    for word in label.split():
        while font.getlength(word) > width and len(word.rstrip(".")) > 1:
            word = word.rstrip(".")[:-1] + ".."
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines
