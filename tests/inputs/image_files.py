"""Files of images as people have them: damaged, hostile, or in unusual formats."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


SIDE = 16


def colours(side: int = SIDE) -> Image.Image:
    """An image whose top half is red and whose bottom half is blue, so that a turned one shows."""
    image = Image.new("RGB", (side, side), "blue")
    image.paste("red", (0, 0, side, side // 2))
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def rotated_jpeg() -> bytes:
    """A photo of a camera that was held sideways: stored turned by 90 degrees, with a tag that turns it back."""
    exif = Image.Exif()
    exif[274] = 6  # "rotate 90 degrees clockwise to show it"
    return encoded(colours().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95, subsampling=0)


def bomb(side: int = 30_000) -> bytes:
    """A PNG of one colour with 900 million pixels, about 1 MB: 2.7 GB once decoded."""
    rows = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    data = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cheap_bomb() -> bytes:
    """The same header with almost no data: the header alone must decide."""
    content = bomb(1)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return content[:8] + chunk + content[33:]


def animation(file_format: str) -> bytes:
    return encoded(colours(), file_format, save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "green")])


def array(content: object, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, content, **options)
    return file.getvalue()


def array_bomb() -> bytes:
    """A `.npy` file of 128 bytes that announces a petabyte."""
    content = array(np.zeros((1, 1, 3), np.uint8))
    return content.replace(b"(1, 1, 3), }" + b" " * 20, b"(17000000, 20000000, 3), }" + b" " * 6)


def files() -> dict[str, bytes]:
    """By name of the file."""
    palette = colours().convert("P", palette=Image.Palette.ADAPTIVE)
    see_through = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    see_through.paste((0, 0, 255, 255), (0, SIDE // 2, SIDE, SIDE))
    deep = Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16))
    return {
        "whole.png": encoded(colours()),
        "truncated.png": encoded(Image.effect_noise((64, 64), 50))[:900],
        "truncated.jpg": encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        "empty.png": b"",
        "one_pixel.png": encoded(Image.new("RGB", (1, 1), "red")),
        "huge.png": cheap_bomb(),
        "cmyk.jpg": encoded(colours().convert("CMYK"), "JPEG", quality=95, subsampling=0),
        "palette.png": encoded(palette),
        "see_through_palette.png": encoded(see_through.quantize()),
        "see_through.png": encoded(see_through),
        "animated.gif": animation("GIF"),
        "animated.png": animation("PNG"),
        "animated.webp": animation("WEBP"),
        "rotated.jpg": rotated_jpeg(),
        "text.png": b"This is no image, whatever its name says.\n",
        "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "deep.png": encoded(deep),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "program.png": encoded(colours(), "EPS"),
        "objects.npy": array(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "huge.npy": array_bomb(),
        "pickle.npy": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    }


def write(folder: Path) -> dict[str, Path]:
    """Writes all of them, and a folder named `folder.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return {path.name: path for path in sorted(folder.iterdir())}
