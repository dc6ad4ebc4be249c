"""Reads and checks the images and masks of a pipeline call (Pillow, NumPy, torch, one or many)."""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

from ..deprecations import renamed
from ..ops.values import check_plain_tensor
from .image_format import ImageFormat


OneImage = Image.Image | np.ndarray | torch.Tensor
ImageInput = OneImage | list[OneImage] | tuple[OneImage, ...]

# Pillow's modes that are converted to that of a model without loss. Pillow has no colours of more than 8 bits.
LOSSLESS_PIL_MODES = {
    "L": ("1", "L"),
    "LA": ("1", "L", "LA"),
    "RGB": ("1", "L", "P", "RGB"),
    "RGBA": ("1", "L", "LA", "P", "PA", "RGB", "RGBA"),
    "I;16": ("I;16", "I;16L", "I;16B", "I"),
}
# Share of the value range by which floating point numbers may lie outside: a rounding error of float32 or two.
RANGE_TOLERANCE = 1e-6
# Floating point numbers in [0, 1] are probably fractions if this is a smaller share of the range of the data.
MIN_SHARE_OF_RANGE = 0.05
# At least this much means "inpaint", as in diffusers' `VaeImageProcessor(do_binarize=True)`.
MASK_THRESHOLD = 0.5
MASK_FORMAT = ImageFormat("L", 1)
EXIF_ORIENTATION = 274  # tag
# Entries of configs that hold the format of images, and what messages call these images.
IMAGES_OF_ENTRY = {
    "image_format": "this model's images",
    "source_format": "this model's source images",
    "condition_format": "this ControlNet's images",
}


def read_images(
    images: ImageInput,
    name: str,
    image_format: ImageFormat,
    background: str = "white",
    entry: str = "image_format",
) -> torch.Tensor:
    r"""
    Reads images as a tensor `(batch_size, channels, height, width)` in [0, 1], fractions of the format's value range,
    float32, on their own device.

    Args:
        images, name, image_format, background, entry: See `read_values`.

    Raises:
        ValueError: See `read_values`.
    """
    return as_fractions(read_values(images, name, image_format, background, entry), image_format)


def _decoded(image: OneImage, name: str) -> OneImage:
    """
    A Pillow image completely decoded and upright, as viewers show it; anything else as it is.

    Raises:
        ValueError: If its file is damaged, if it has no pixels, and for PostScript, which Pillow would let another
            program run.
    """
    if not isinstance(image, Image.Image):
        return image
    if image.format == "EPS":
        raise ValueError(f"`{name}` is a PostScript file, which is never run. Convert it to PNG.")
    try:
        image.load()
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise almost anything (OSError, SyntaxError, struct.error, ...)
        raise ValueError(f"`{name}` cannot be decoded, its file is damaged. {type(error).__name__}: {error}") from error
    if 0 in image.size:
        raise ValueError(f"`{name}` is an image of {image.width} x {image.height} pixels; pass one with pixels.")
    return image


def _as_list(images: ImageInput, name: str) -> list[OneImage]:
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    return [_decoded(item, name) for item in items]


def as_fractions(values: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """Converts the results of `read_values` to fractions of the value range in [0, 1]."""
    return values if image_format.is_viewable else image_format.to_unit(values).clamp(0, 1)


def read_values(
    images: ImageInput,
    name: str,
    image_format: ImageFormat,
    background: str = "white",
    entry: str = "image_format",
) -> torch.Tensor:
    r"""
    Reads images as a tensor `(batch_size, channels, height, width)`, float32, on their own device, with the values of a
    pipeline's outputs "np" and "pt": fractions of the value range in [0, 1] for viewable images
    (`image_format.is_viewable`), values of the data for other formats.

    Args:
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): Arrays are `(height, width,
            channels)` and tensors `(channels, height, width)`, with a batch dimension in front or without. Floating
            point numbers have the values of the result. Integers are values of the data, as those of Pillow images; 8
            bits of a colour image stand for the whole range of a model of more. Only `uint8` for 8-bit images; it is
            divided by 255 for continuous data in [0, 1], and refused for higher values than its own. With one channel
            its dimension may be missing.
        name (`str`): Name of the argument, for messages.
        image_format (`ImageFormat`): Format of the model's images.
        background (`str`, defaults to `"white"`): Colour that messages recommend to put behind transparent images.
        entry (`str`, defaults to `"image_format"`): Entry of a config that holds the format, for messages.

    Raises:
        ValueError: For another type, shape or mode, transparency that the model has no channel for, values out of
            range, or images of several sizes.
    """
    items = _as_list(images, name)
    if not items:
        raise ValueError(f"`{name}` is empty; pass at least one image.")
    batches = [_read_one(item, name, image_format, background, entry) for item in items]
    sizes = sorted({tuple(batch.shape[2:]) for batch in batches})
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` holds images of several sizes (height, width): {sizes}. Resize them to one, or call once for "
            "each size."
        )
    values = torch.cat(batches)
    _warn_of_fractions(items, values, name, image_format)
    return values


def _warn_of_fractions(items: list[OneImage], values: torch.Tensor, name: str, image_format: ImageFormat) -> None:
    """Warns of floating point numbers in [0, 1] where values of the data have a much wider range."""
    low, high = image_format.value_range
    if image_format.is_viewable or MIN_SHARE_OF_RANGE * (high - low) <= 1:
        return
    are_floats = all(
        str(getattr(item, "dtype", "")).removeprefix("torch.").startswith(("float", "bfloat")) for item in items
    )
    if are_floats and float(values.min()) >= 0 and 0 < float(values.max()) <= 1:
        way_out = f"{low:g} + x * {high - low:g}" if low else f"x * {high:g}"
        warnings.warn(
            f"All numbers of `{name}` lie in [0, 1], but this model takes values of the data, from {low:g} to "
            f"{high:g}, so these are almost constant. Convert fractions of this range with `{way_out}`.",
            stacklevel=3,
        )


def read_control_images(conditions: ImageInput, name: str, image_format: ImageFormat) -> torch.Tensor:
    r"""
    Reads control images, such as edges, as `read_images` does; also of `bool`, and with one channel in place of three.

    8-bit values up to 1 are taken literally, as almost black, with a warning: in most such arrays 1 means white.

    Raises:
        ValueError: As `read_images`.
    """
    items = _as_list(conditions, name)
    read = []
    for item in items:
        if isinstance(item, torch.Tensor):
            check_plain_tensor(name, item)
        if isinstance(item, (np.ndarray, torch.Tensor)):
            item = _from_bool(item, image_format)
            if item.ndim == 2 and image_format.channels == 3:
                item = np.stack([item] * 3, axis=-1) if isinstance(item, np.ndarray) else item.expand(3, -1, -1)
        if reads_bytes(image_format) and _is_next_to_black(item):
            warnings.warn(
                f"`{name}` holds no 8-bit value above 1, which is almost black: white is 255. If 1 means white, pass "
                "0 and 255, or `bool`, or floating point numbers in [0, 1].",
                stacklevel=2,
            )
        read.append(item)
    return read_images(read, name, image_format, background="black", entry="condition_format")


def read_masks(masks: ImageInput, name: str) -> torch.Tensor:
    r"""
    Reads masks as a tensor `(batch_size, 1, height, width)` of `bool`: `True` where the mask is white, at least 0.5.

    Args:
        masks (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): As the images of
            `read_images`, with one channel, or with three equal ones; also of `bool`. Colours of Pillow images are
            converted to brightness.
        name (`str`): Name of the argument, for messages.

    Raises:
        ValueError: As `read_images`; for 8-bit numbers whose highest is 1.
    """
    items = _as_list(masks, name)
    grey = []
    for item in items:
        if isinstance(item, Image.Image) and item.mode in LOSSLESS_PIL_MODES["RGB"] and not item.has_transparency_data:
            item = item.convert("L")
        elif isinstance(item, (np.ndarray, torch.Tensor)):
            if isinstance(item, torch.Tensor):
                check_plain_tensor(name, item)
            item = _one_channel(_from_bool(item, MASK_FORMAT), name)
        if _is_next_to_black(item):  # such a mask would select nothing
            raise ValueError(
                f"`{name}` holds 8-bit numbers up to 1, but white is 255. Pass 0 and 255, or `bool`, or "
                "floating point numbers in [0, 1]."
            )
        grey.append(item)
    return read_images(grey, name, MASK_FORMAT) >= MASK_THRESHOLD


def reads_bytes(image_format: ImageFormat) -> bool:
    """Whether `uint8` numbers are divided by 255: 8-bit images, and continuous data in [0, 1]."""
    return image_format.value_range == (0, 255) or (
        image_format.value_range == (0, 1) and image_format.num_levels is None
    )


def _from_bool(image: np.ndarray | torch.Tensor, image_format: ImageFormat) -> np.ndarray | torch.Tensor:
    """Converts `bool` to the lowest and the highest value: 0 and 255 for 8 bits."""
    if image.dtype not in (np.bool_, torch.bool):
        return image
    if reads_bytes(image_format):
        return image * np.uint8(255) if isinstance(image, np.ndarray) else image.to(torch.uint8) * 255
    low, high = (0, 1) if image_format.is_viewable else image_format.value_range
    return low + (high - low) * (image.astype(np.float64) if isinstance(image, np.ndarray) else image.double())


def _is_next_to_black(image: OneImage) -> bool:
    """Whether 1 is the highest 8-bit number: not a black image, but one that looks the same."""
    if isinstance(image, Image.Image):
        return image.mode in ("L", "RGB") and int(np.asarray(image).max()) == 1
    is_bytes = getattr(image, "dtype", None) in (np.uint8, torch.uint8)
    return is_bytes and 0 not in image.shape and int(image.max()) == 1


def _one_channel(mask: np.ndarray | torch.Tensor, name: str) -> np.ndarray | torch.Tensor:
    """Reduces a grey mask with three channels, as drawing programs save it, to one; others stay as they are."""
    is_array = isinstance(mask, np.ndarray)
    if mask.ndim != 3 or mask.shape[-1 if is_array else 0] != 3:
        return mask
    first = mask[..., :1] if is_array else mask[:1]
    if bool(torch.as_tensor(mask == first).all()):
        return first
    if is_array:
        raise ValueError(f"`{name}` has three different channels. Pass a mask of one channel.")
    return mask  # three masks, whose dimension of channels is missing


def _read_one(image: OneImage, name: str, image_format: ImageFormat, background: str, entry: str) -> torch.Tensor:
    """Reads one image, or a batch of them as one array or tensor, as a batch."""
    is_text, channels = isinstance(image, str), image_format.channels
    if isinstance(image, Image.Image):
        image = _read_pil(image, name, image_format, background, entry)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"`{name}` is an array of type {image.dtype}; pass one of numbers.")
        if channels == 1 and image.shape[-1:] != (1,):
            image = image[..., None]
        if image.dtype.kind == "u" and image.dtype.itemsize > 1:
            image = image.astype(np.int64)  # torch computes with few unsigned types
        # A copy in the order of bytes of this machine: some cannot be written to, which torch warns of.
        tensor = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
        tensor = tensor.movedim(-1, -3) if tensor.ndim in (3, 4) else tensor
        layout = "(height, width, channels)"
        is_other_layout = image.ndim in (3, 4) and image.shape[-3] == channels
        way_out = " These are (channels, height, width): pass `np.moveaxis(array, -3, -1)`."
    elif isinstance(image, torch.Tensor):
        check_plain_tensor(name, image)
        tensor = image
        if channels == 1 and tensor.ndim in (2, 3) and tensor.shape[:-2] != (1,):
            tensor = tensor.unsqueeze(-3)
        layout = "(channels, height, width)"
        is_other_layout = image.ndim in (3, 4) and image.shape[-1] == channels
        way_out = " These are (height, width, channels): pass `tensor.movedim(-1, -3)`."
    else:
        raise ValueError(
            f"`{name}` is a {type(image).__name__}; pass a Pillow image, an array, a tensor, or a list of one of them."
            + (" A prompt is passed by its name, `prompt=...`; a file is opened with `PIL.Image.open`." * is_text)
        )

    if tensor.ndim not in (3, 4) or tensor.shape[-3] != channels or 0 in tensor.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(image.shape)}; pass {layout}, with or without a batch dimension in front, with "
            f"{channels} channels." + way_out * is_other_layout
        )
    values = _to_values(tensor, name, image_format, entry)
    return values if values.ndim == 4 else values[None]


def _read_pil(image: Image.Image, name: str, image_format: ImageFormat, background: str, entry: str) -> np.ndarray:
    """Pillow's numbers, or, if they are not those of the data, fractions."""
    whose = IMAGES_OF_ENTRY[entry]
    channels, mode = image_format.channels, image_format.pil_mode
    if mode is None:
        raise ValueError(
            f"`{name}` is a Pillow image, but {whose} have {channels} channels ({image_format}). Pass an "
            f"array (height, width, channels) or a tensor (channels, height, width) {_in_range(image_format)}."
        )
    if mode in ("L", "RGB") and image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError(
                f"`{name}` has mode {image.mode} and transparent pixels, whose colour is not known. Put a background "
                f"behind it first, such as `Image.alpha_composite(Image.new('RGBA', image.size, {background!r}), "
                f"image.convert('RGBA')).convert('{mode}')`."
            )
        image = image.convert(mode)  # drawing programs save opaque images like this
    if mode == "I;16" and image.mode in ("1", "L"):
        raise ValueError(
            f"`{name}` has mode {image.mode}, of 8 bits, but {whose} have values from "
            "{:g} to {:g}. Pass an image of mode I;16 with such values, or an array of floating point numbers in "
            "[0, 1], such as `np.asarray(image) / 255`.".format(*image_format.value_range)
        )
    if mode != "I;16" and (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        raise ValueError(
            f"`{name}` has mode {image.mode}, whose range of values is not known. Pass an array of floating point "
            "numbers in [0, 1], such as `np.asarray(image) / 65535` for 16 bits."
        )
    if image.mode not in LOSSLESS_PIL_MODES[mode]:
        raise ValueError(
            f"`{name}` has mode {image.mode}, but {whose} have {channels} channels. Pass "
            + (f"`image.convert('{mode}')`." if mode != "I;16" else "grey images of mode I;16.")
        )
    if mode == "I;16":
        return np.asarray(image)
    pixels = np.asarray(image.convert(mode))
    is_binary = image.mode == "1" and image_format.value_range[1] != 255
    return pixels / 255 if image_format.loses_depth_in_pil or is_binary else pixels


def _in_range(image_format: ImageFormat) -> str:
    if image_format.is_viewable:
        return "in [0, 1]"
    return "with values of the data, from {:g} to {:g}".format(*image_format.value_range)


def _to_values(tensor: torch.Tensor, name: str, image_format: ImageFormat, entry: str) -> torch.Tensor:
    """The values of `read_values`, from the numbers of an array."""
    (low, high), whose = image_format.value_range, IMAGES_OF_ENTRY[entry]
    is_bytes, is_viewable = reads_bytes(image_format), image_format.is_viewable
    if tensor.dtype == torch.bool or (is_bytes and not tensor.is_floating_point() and tensor.dtype != torch.uint8):
        integers = "`uint8`" if is_bytes else "integers"
        raise ValueError(
            f"`{name}` is of type {tensor.dtype}; pass {integers}, or floating point numbers {_in_range(image_format)}."
        )
    if is_bytes and tensor.dtype == torch.uint8:
        return tensor.float() / 255 if is_viewable or high == 1 else tensor.float()
    if tensor.is_floating_point():
        lowest, highest = (0, 1) if is_viewable else (low, high)
    else:
        lowest, highest = low, high
        if tensor.dtype == torch.uint8 and high > 255:
            type_name = image_format.dtype.name
            raise ValueError(
                f"`{name}` is of type {tensor.dtype}, of 8 bits, but {whose} have values from {low:g} to {high:g} "
                f"(`{entry}`). Pass such values as `{type_name}`"
                + (
                    ", or floating point numbers in [0, 1]: 8 bits divided by 255."
                    if is_viewable
                    else "; 8 bits of which 255 stands for the highest must be scaled to them first."
                )
            )
    values = tensor.float()
    smallest, largest = float(values.min()), float(values.max())
    tolerance = 0.0 if is_viewable else RANGE_TOLERANCE * (high - low)
    if not (smallest >= lowest - tolerance and largest <= highest + tolerance):  # in this form, NaN is refused as well
        given = f"`{name}` has values from {smallest:g} to {largest:g}; they must lie in [{lowest:g}, {highest:g}]"
        if not is_viewable or not tensor.is_floating_point():
            raise ValueError(f"{given}, the value range of {whose} (`{entry}`).")
        if is_bytes:
            raise ValueError(f"{given}. Divide 0 to 255 by 255; of -1 to 1 take `x / 2 + 0.5`.")
        raise ValueError(
            f"{given}. Pass values from {low:g} to {high:g} as integers, such as `uint16`, or divided by {high:g}; of "
            "-1 to 1 take `x / 2 + 0.5`."
        )
    return image_format.to_unit(values) if is_viewable and not tensor.is_floating_point() else values


__getattr__ = renamed(__name__, {"read_conditions": "read_control_images"})
