"""
Readers: any image file or array becomes an array (height, width, channels) in its stored type, with the meaning of its
channels, or an error that says why it is unusable. Files of 8 bits, and of 16 bits in grey, are read by Pillow, other
TIFF files by tifffile, PNG files in 16-bit colour by imagecodecs, `.npy` and `.npz` by NumPy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..conditioning.image_format import MODE_CHANNELS, ImageMode


# Reasons to skip an image, as they appear in logs and in the report.
MISSING, UNREADABLE, TOO_LARGE = "missing", "unreadable", "too large (decompression bomb)"
# A reason to refuse the whole dataset: the file is intact, but is no image, or none that can be read without a loss.
UNSUPPORTED = "unsupported"
# Of arrays with as many pixels as Pillow's limit: 8 channels of 64 bits.
MAX_BYTES_PER_PIXEL = 64
ARRAY_SUFFIXES = (".npy", ".npz")
ImageSource = dict[str, Any] | Image.Image | np.ndarray | Sequence | None

NPY_MAGIC, ZIP_MAGIC, PICKLE_MAGIC = b"\x93NUMPY", b"PK\x03\x04", pickle.PROTO
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAGIC_LENGTH = 6
# Pillow's names of the layouts of which it keeps the upper 8 bits. "BGR;16", without a byte order, has 5 or 6 bits.
REDUCED_LAYOUT = re.compile(r";16[BLNS]")
# Tags of TIFF files.
BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, ORIENTATION, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 270, 274, 338, 339
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE = 0, 1, 2, 3  # photometric interpretations
PREMULTIPLIED_ALPHA, ALPHA = 1, 2  # kinds of extra samples; 0 is a band of unknown meaning
# Programs that store channels as pages say so here.
PAGES_OF_ONE_IMAGE = re.compile(r'^\{"shape"|^ImageJ=|<OME')
# From the orientation in the file to the upright image.
TO_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda values: np.rot90(values, 2),
    4: np.flipud,
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: np.rot90(values, 2).swapaxes(0, 1),
    8: np.rot90,
}


class UnusableImageError(Exception):
    """An image that cannot be used. `reason` is one of the constants of this module; the message has the details."""

    def __init__(self, reason: str, details: str):
        super().__init__(details)
        self.reason = reason


class StoredImage(NamedTuple):
    """
    An image whose header has been read, and whose pixels can be.

    Attributes:
        mode (`str`): Meaning of the channels: "L", "LA", "RGB", "RGBA", or "array", channels without a known meaning.
            Grey has one channel in arrays, too, and is "L".
        channels (`int`): Number of channels.
        dtype (`np.dtype`): Type of the values: bool, integers or floating point numbers.
        read (`Callable`): Decodes the image: an array `(height, width, channels)` of this type.
        pillow (`Image.Image`, *optional*): The image as Pillow opened it, if it is one of 8 bits (or fewer) per
            channel.
        is_transposed (`bool`): Whether `read` moves the channels of an array from its first axis to its last.
    """

    mode: ImageMode
    channels: int
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    pillow: Image.Image | None = None
    is_transposed: bool = False


def explain(error: Exception) -> UnusableImageError:
    """What an error of a reader says about the image."""
    if isinstance(error, UnusableImageError):
        return error
    if isinstance(error, FileNotFoundError):
        return UnusableImageError(MISSING, "no such file")
    if isinstance(error, UnidentifiedImageError):
        return UnusableImageError(UNREADABLE, "not an image that Pillow knows")
    if isinstance(error, Image.DecompressionBombError):
        return UnusableImageError(TOO_LARGE, str(error))
    # Damaged files make decoders raise almost anything (OSError, SyntaxError, struct.error, IndexError, zlib.error,
    # MemoryError ...). None of it may end a run, and all of it is reported with the name of the file.
    return UnusableImageError(UNREADABLE, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def open_image(image: ImageSource, channels: int | None = None) -> Iterator[StoredImage]:
    """
    Opens an image and reads its header. It can be decoded until the context ends; errors in the context are explained.

    Args:
        image (`dict`, `PIL.Image.Image`, `np.ndarray` or nested lists): A dict of `bytes` and `path`, as `datasets`
            stores images, an open image, or an array, `(height, width)` or `(height, width, channels)`.
        channels (`int`, *optional*): The number of channels that is expected. It tells arrays of shape `(channels,
            height, width)` from those of the expected shape.

    Raises:
        UnusableImageError: Whatever is wrong with the image.
        ImportError: If a file needs tifffile or imagecodecs, which is not installed.
    """
    if image is None:
        raise UnusableImageError(MISSING, "the entry is empty")
    try:
        if isinstance(image, Image.Image):
            yield _of_pillow(image)
        elif isinstance(image, dict):
            encoded, path = image["bytes"], image["path"]
            with open(path, "rb") if encoded is None else BytesIO(encoded) as file:
                yield _of_file(cast(BinaryIO, file), path, channels)
        else:
            yield _of_array(np.asarray(image), channels)
    except ImportError:
        raise
    except Exception as error:
        raise explain(error) from error


def _of_file(file: BinaryIO, path: str | None, channels: int | None) -> StoredImage:
    magic = file.read(MAGIC_LENGTH)
    file.seek(0)
    if magic == NPY_MAGIC or magic.startswith(ZIP_MAGIC) or (path and path.lower().endswith(ARRAY_SUFFIXES)):
        return _of_array(_load_array(file, magic), channels)
    is_tiff = magic.startswith(TIFF_MAGICS)
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:
        if not is_tiff:
            raise
        opened = None
    check_no_program(opened)
    if is_tiff and (opened is None or not _pillow_suits(opened)):
        file.seek(0)
        return _of_tiff(_import("tifffile", path).TiffFile(file), channels)
    if _is_reduced(opened):
        return _of_deep_colour(file, opened, path)
    return _of_pillow(opened)


def check_no_program(image: Image.Image | None) -> None:
    """Raises an `UnusableImageError` for PostScript, by whatever name: Pillow would let Ghostscript run it."""
    if image is not None and image.format == "EPS":
        raise UnusableImageError(UNSUPPORTED, "a PostScript file, which is never run. Save it as PNG")


def reader_versions() -> tuple[str | None, ...]:
    """Versions of the packages that read images, for keys of cached results; `None` for those not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return tuple(map(version, ("pillow", "tifffile", "imagecodecs")))


def _import(module: str, path: str | None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{path or 'An image'} needs {module}: `pip install diffusers-adm[train]`.") from error


# 1. Pillow


def _of_pillow(image: Any) -> StoredImage:
    if is_deep_grey(image):
        return StoredImage("L", 1, np.dtype(np.uint16), lambda: _read_deep_grey(image))
    if image.mode in ("I", "F"):
        return _of_array(np.asarray(upright(image)), 1)
    mode = _mode_of("L" if image.mode in ("1", "L", "LA", "La") else "RGB", image.has_transparency_data)
    return StoredImage(mode, MODE_CHANNELS[mode], np.dtype(np.uint8), lambda: _read_pillow(image, mode), image)


def _mode_of(colours: str, has_alpha: bool) -> ImageMode:
    return cast(ImageMode, colours + "A" * has_alpha)


def is_deep_grey(image: Image.Image) -> bool:
    """Whether an opened image is grey of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _read_pillow(image: Image.Image, mode: str) -> np.ndarray:
    return as_channels(np.asarray(upright(image).convert(mode)))


def _read_deep_grey(image: Image.Image) -> np.ndarray:
    return as_channels(np.asarray(upright(image)).astype(np.uint16))


def upright(image: Image.Image) -> Image.Image:
    """Decodes an opened image and applies its EXIF orientation; without one, it is the same object."""
    image.load()
    return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def as_channels(values: np.ndarray) -> np.ndarray:
    """Adds the axis of the channels to grey images."""
    return values[..., None] if values.ndim == 2 else values


def _is_reduced(image: Any) -> bool:
    """Whether Pillow would reduce the channels of an opened image to 8 bits."""
    if image.mode.startswith("I"):
        return False
    if image.format == "JPEG2000":
        return _bits_of_jpeg2000(image.fp) > 8
    for tile in image.tile:
        if tile.codec_name == "ppm" and tile.args[-1] > 255:
            return True
        layout = tile.args if isinstance(tile.args, str) else tile.args and tile.args[0]
        if isinstance(layout, str) and REDUCED_LAYOUT.search(layout):
            return True
    return False


def _bits_of_jpeg2000(file: BinaryIO) -> int:
    """Bits of the first channel, from the first two segments of the code stream."""
    position = file.tell()
    file.seek(0)
    head = file.read(4096)
    file.seek(position)
    start = head.find(b"\xff\x4f\xff\x51")
    bits = head[start + 42 : start + 43] if start >= 0 else b""
    return (bits[0] & 0x7F) + 1 if bits else 0


def _of_deep_colour(file: BinaryIO, image: Any, path: str | None) -> StoredImage:
    """An image of 16 bits in colour or with alpha: Pillow only reads its header."""
    if image.format != "PNG":
        raise UnusableImageError(
            UNSUPPORTED,
            f"a {image.format} file of 16 bits per channel, which Pillow reduces to 8. Save it as PNG or TIFF",
        )
    decode = _import("imagecodecs", path).png_decode
    # In this order: `getexif` reads the file to its end.
    mode = _mode_of("L" if "LA;16" in str(image.tile[0].args) else "RGB", image.mode == "RGBA")
    orientation = image.getexif().get(ORIENTATION, 1)

    def read() -> np.ndarray:
        file.seek(0)
        return TO_UPRIGHT.get(orientation, np.asarray)(decode(file.read())[..., : MODE_CHANNELS[mode]])

    return StoredImage(mode, MODE_CHANNELS[mode], np.dtype(np.uint16), read)


# 2. TIFF


def _pillow_suits(image: Any) -> bool:
    """Whether Pillow reads the values and the meaning of the channels of an opened TIFF file as they are stored."""
    tags = image.tag_v2
    if PAGES_OF_ONE_IMAGE.search(str(tags.get(DESCRIPTION, ""))) and image.n_frames > 1:
        return False
    if set(tags.get(SAMPLE_FORMAT, (1,))) != {1} or 0 in tags.get(EXTRA_SAMPLES, ()):
        return False
    is_deep = max(tags.get(BITS_PER_SAMPLE, (1,))) > 8
    return not is_deep or (is_deep_grey(image) and tags.get(PHOTOMETRIC) == MIN_IS_BLACK)


def _of_tiff(file: Any, channels: int | None) -> StoredImage:
    series, page = file.series[0], file.pages[0]
    size = page.imagewidth * page.imagelength
    if Image.MAX_IMAGE_PIXELS and size > 2 * Image.MAX_IMAGE_PIXELS:
        raise UnusableImageError(TOO_LARGE, f"{size} pixels exceed twice Pillow's limit of {Image.MAX_IMAGE_PIXELS}")
    orientation = getattr(page.tags.get(ORIENTATION), "value", 1)
    stored = _of_pages(series, channels) if series.ndim == 3 and "S" not in series.axes else None
    stored = stored or _of_page(page)

    def read() -> np.ndarray:
        return TO_UPRIGHT.get(orientation, np.asarray)(stored.read()).astype(stored.dtype, copy=False)

    return stored._replace(read=read)


def _of_pages(series: Any, channels: int | None) -> StoredImage | None:
    """The array that the pages form, if the file says so; otherwise the first page, as for animations."""
    if not set(series.axes) & {"C", "Q"}:
        return None
    shape = series.shape
    is_transposed = series.axes.startswith("C") or _has_channels_first(shape, channels)
    count = shape[0] if is_transposed else shape[-1]
    axes = (1, 2, 0) if is_transposed else (0, 1, 2)
    read = lambda: series.asarray().transpose(axes)  # noqa: E731
    return StoredImage(_mode_of_array(count), count, _checked_dtype(series.dtype, shape), read, None, is_transposed)


def _of_page(page: Any) -> StoredImage:
    extras = tuple(map(int, page.extrasamples))
    photometric = int(page.photometric)
    names = {MIN_IS_WHITE: "L", MIN_IS_BLACK: "L", RGB: "RGB", PALETTE: "RGB"}
    if photometric not in names:
        raise UnusableImageError(
            UNSUPPORTED,
            f"a TIFF file of photometric interpretation {page.photometric.name} that Pillow cannot read. Save it as "
            "grey, RGB or RGBA",
        )
    dtype = _checked_dtype(page.dtype, page.shape)
    has_alpha = len(extras) == 1 and extras[0] in (PREMULTIPLIED_ALPHA, ALPHA)
    mode, channels = _mode_of(names[photometric], has_alpha), page.samplesperpixel
    if photometric == PALETTE:
        channels, dtype = 3, np.dtype(np.uint16)
    if photometric == MIN_IS_WHITE and dtype.kind == "f":
        raise UnusableImageError(
            UNSUPPORTED, "a TIFF file of floating point numbers in which the lowest is white (MINISWHITE). Invert it"
        )
    if channels != MODE_CHANNELS[mode]:
        mode = "array"
    return StoredImage(mode, channels, dtype, lambda: _read_page(page, photometric, extras))


def _read_page(page: Any, photometric: int, extras: tuple[int, ...]) -> np.ndarray:
    values = page.asarray()
    values = values.transpose(1, 2, 0) if page.axes == "SYX" else as_channels(values)
    if photometric == PALETTE:
        return np.moveaxis(page.colormap[:, values[..., 0]], 0, -1)
    if photometric == MIN_IS_WHITE:
        count = values.shape[-1] - len(extras)
        # Within the bits of a sample, which may be fewer than those of the type. Signed numbers: -1 - value.
        white = 2**page.bitspersample - 1 if values.dtype.kind == "u" else -1
        grey = ~values[..., :count] if values.dtype.kind == "b" else white - values[..., :count]
        values = np.concatenate([grey, values[..., count:]], axis=-1)
    if extras == (PREMULTIPLIED_ALPHA,):
        values = _unpremultiplied(values)
    return values


def _unpremultiplied(values: np.ndarray) -> np.ndarray:
    opaque = alpha_of_opaque(values.dtype)
    colours, alpha = values[..., :-1].astype(np.float64), values[..., -1:].astype(np.float64)
    colours = np.minimum(colours * opaque / np.maximum(alpha, np.finfo(np.float64).tiny), opaque)
    colours = colours.round() if values.dtype.kind in "ui" else colours
    return np.concatenate([colours.astype(values.dtype), values[..., -1:]], axis=-1)


def alpha_of_opaque(dtype: np.dtype) -> float:
    """The alpha of opaque pixels in data of this type."""
    return np.iinfo(dtype).max if dtype.kind in "ui" else 1.0


# 3. Arrays


def _load_array(file: BinaryIO, magic: bytes) -> np.ndarray:
    """The array of a `.npy` or `.npz` file. Pickled objects are never read."""
    try:
        if magic == NPY_MAGIC:
            _check_array_size(file)
            return np.load(file, allow_pickle=False)
        if magic.startswith(ZIP_MAGIC):
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise UnusableImageError(
                        UNSUPPORTED,
                        f"a .npz file with {len(names)} arrays ({', '.join(names[:3])}). Save one image per file",
                    )
                with archive.open(names[0]) as member:
                    if member.read(len(NPY_MAGIC)) != NPY_MAGIC:
                        raise UnusableImageError(UNREADABLE, "a zip archive without an array")
                    member.seek(0)
                    _check_array_size(member)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return arrays[arrays.files[0]]
    except ValueError as error:
        if "object" in str(error).lower():
            details = "an array of Python objects, which is never unpickled. Save an array of numbers"
            raise UnusableImageError(UNSUPPORTED, details) from error
        raise
    if magic.startswith(PICKLE_MAGIC):
        raise UnusableImageError(UNSUPPORTED, "a pickle, which is never unpickled. Save it with `np.save`")
    raise UnusableImageError(UNREADABLE, "neither a .npy nor a .npz file")


def _check_array_size(file: Any) -> None:
    """Raises an `UnusableImageError` for a header that announces more numbers than an image has. Rewinds the file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    file.seek(0)
    size, limit = math.prod(shape) * max(dtype.itemsize, 1), MAX_BYTES_PER_PIXEL * (Image.MAX_IMAGE_PIXELS or 0)
    if limit and size > limit:
        raise UnusableImageError(TOO_LARGE, f"an array of shape {shape} and type {dtype}, {size} bytes")


def _of_array(array: np.ndarray, channels: int | None) -> StoredImage:
    dtype = _checked_dtype(array.dtype, array.shape)
    if array.ndim not in (2, 3):
        raise UnusableImageError(
            UNSUPPORTED,
            f"an array of shape {array.shape}. Store one image as (height, width) or (height, width, channels)",
        )
    is_transposed = array.ndim == 3 and _has_channels_first(array.shape, channels)
    values = np.moveaxis(array, 0, -1) if is_transposed else as_channels(array)
    values = values.astype(dtype, copy=False)
    return StoredImage(
        _mode_of_array(values.shape[-1]), values.shape[-1], dtype, lambda: values, is_transposed=is_transposed
    )


def _mode_of_array(channels: int) -> ImageMode:
    return "L" if channels == 1 else "array"


def _checked_dtype(dtype: np.dtype, shape: tuple[int, ...]) -> np.dtype:
    """The type in the byte order of this machine; raises an `UnusableImageError` unless it is of numbers."""
    if dtype is None or dtype.kind not in "buif" or dtype.itemsize > 8:
        allowed = "bool, integers, or floating point numbers of at most 64 bits"
        raise UnusableImageError(UNSUPPORTED, f"an array of type {dtype}. Save {allowed}")
    if 0 in shape:
        raise UnusableImageError(UNSUPPORTED, f"an empty array of shape {shape}")
    return dtype.newbyteorder("=")


def _has_channels_first(shape: tuple[int, ...], channels: int | None) -> bool:
    """Whether an array is of shape (channels, height, width); it can only be told by the number of channels."""
    if channels is not None:
        # If neither axis has this number, the shorter one is named in the error about other channels.
        return shape[-1] != channels and (shape[0] == channels or shape[0] < shape[-1])
    reason = _why_unclear(shape)
    if reason is None:
        return False
    way_out = "for images to train on, set `in_channels` in the network's config"
    if _why_unclear((*shape[1:], shape[0])) is None:
        way_out = f"Transpose it to (height, width, channels), or, {way_out}"
    else:  # the transposed array would be as unclear
        way_out = f"Say how many channels it has: {way_out}"
    raise UnusableImageError(UNSUPPORTED, f"an array of shape {shape}, which {reason}. {way_out}")


def _why_unclear(shape: tuple[int, ...]) -> str | None:
    """Why the axes of an array, whose number of channels is not known, may be other than (height, width, channels)."""
    if shape[-1] > shape[0]:
        return "looks like (channels, height, width)"
    if shape[-1] > 1 and shape[-1] in shape[:-1]:
        return "may be (height, width, channels) or (channels, height, width)"
    return None
