"""Reads and checks the images and masks of a pipeline call (Pillow, NumPy, torch, one or many)."""

import warnings

import numpy as np
import torch
from PIL import Image

from ..deprecations import renamed


OneImage = Image.Image | np.ndarray | torch.Tensor
ImageInput = OneImage | list[OneImage] | tuple[OneImage, ...]

# Pillow's modes for a number of channels, and those that are converted to them without loss.
PIL_MODES = {1: "L", 3: "RGB"}
LOSSLESS_PIL_MODES = {1: ("1", "L"), 3: ("1", "L", "P", "RGB")}
# At least this much means "inpaint", as in diffusers' `VaeImageProcessor(do_binarize=True)`.
MASK_THRESHOLD = 0.5


def read_images(images: ImageInput, name: str, channels: int, background: str = "white") -> torch.Tensor:
    r"""
    Reads images as a tensor `(batch_size, channels, height, width)` in [0, 1], float32, on their own device.

    Args:
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): Arrays are `(height, width,
            channels)` and tensors `(channels, height, width)`, with a batch dimension in front or without, in [0, 1];
            or `uint8`. With one channel its dimension may be missing.
        name (`str`): Name of the argument, for messages.
        channels (`int`): Number of channels of the model's images.
        background (`str`, defaults to `"white"`): Colour that messages recommend to put behind transparent images.

    Raises:
        ValueError: For another type, shape or mode, transparency, values out of range, or images of several sizes.
    """
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise ValueError(f"`{name}` is empty; pass at least one image.")
    batches = [_read_one(item, name, channels, background) for item in items]
    sizes = sorted({tuple(batch.shape[2:]) for batch in batches})
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` holds images of several sizes (height, width): {sizes}. Resize them to one, or call once for "
            "each size."
        )
    return torch.cat(batches)


def read_control_images(conditions: ImageInput, name: str, channels: int) -> torch.Tensor:
    r"""
    Reads control images, such as edges, as `read_images` does; also of `bool`, and with one channel in place of three.

    8-bit values up to 1 are taken literally, as almost black, with a warning: in most such arrays 1 means white.

    Raises:
        ValueError: As `read_images`.
    """
    items = list(conditions) if isinstance(conditions, (list, tuple)) else [conditions]
    read = []
    for item in items:
        if isinstance(item, (np.ndarray, torch.Tensor)):
            item = _from_bool(item)
            if item.ndim == 2 and channels == 3:
                item = np.stack([item] * 3, axis=-1) if isinstance(item, np.ndarray) else item.expand(3, -1, -1)
        if _is_next_to_black(item):
            warnings.warn(
                f"`{name}` holds no 8-bit value above 1, which is almost black: white is 255. If 1 means white, pass "
                "0 and 255, or `bool`, or floating point numbers in [0, 1].",
                stacklevel=2,
            )
        read.append(item)
    return read_images(read, name, channels, background="black")


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
    items = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    grey = []
    for item in items:
        if isinstance(item, Image.Image) and item.mode in LOSSLESS_PIL_MODES[3] and not item.has_transparency_data:
            item = item.convert("L")
        elif isinstance(item, (np.ndarray, torch.Tensor)):
            item = _one_channel(_from_bool(item), name)
        if _is_next_to_black(item):  # such a mask would select nothing
            raise ValueError(
                f"`{name}` holds 8-bit numbers up to 1, but white is 255. Pass 0 and 255, or `bool`, or "
                "floating point numbers in [0, 1]."
            )
        grey.append(item)
    return read_images(grey, name, 1) >= MASK_THRESHOLD


def _from_bool(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Converts `bool` to 0 and 255."""
    if image.dtype not in (np.bool_, torch.bool):
        return image
    return image * np.uint8(255) if isinstance(image, np.ndarray) else image.to(torch.uint8) * 255


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


def _read_one(image: OneImage, name: str, channels: int, background: str) -> torch.Tensor:
    """Reads one image, or a batch of them as one array or tensor, as a batch."""
    is_text = isinstance(image, str)
    if isinstance(image, Image.Image):
        mode = PIL_MODES.get(channels)
        if mode is None:
            raise ValueError(
                f"`{name}` is a Pillow image, but this model's images have {channels} channels. Pass an array (height, "
                "width, channels) or a tensor (channels, height, width) in [0, 1]."
            )
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() == (255, 255):
            image = image.convert("RGB" if channels == 3 else "L")  # drawing programs save opaque images like this
        if image.has_transparency_data:
            raise ValueError(
                f"`{name}` has mode {image.mode} and transparent pixels, whose colour is not known. Put a background "
                f"behind it first, such as `Image.alpha_composite(Image.new('RGBA', image.size, {background!r}), "
                f"image.convert('RGBA')).convert('{mode}')`."
            )
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(
                f"`{name}` has mode {image.mode}, whose range of values is not known. Pass an array of floating point "
                "numbers in [0, 1], such as `np.asarray(image) / 65535` for 16 bits."
            )
        if image.mode not in LOSSLESS_PIL_MODES[channels]:
            raise ValueError(
                f"`{name}` has mode {image.mode}, but this model's images have {channels} channels. Pass "
                f"`image.convert('{mode}')`."
            )
        image = np.asarray(image.convert(mode))
    if isinstance(image, np.ndarray):
        if channels == 1 and image.shape[-1:] != (1,):
            image = image[..., None]
        tensor = torch.from_numpy(np.array(image, order="C"))  # a copy: some cannot be written to, which torch warns of
        tensor = tensor.movedim(-1, -3) if tensor.ndim in (3, 4) else tensor
        layout = "(height, width, channels)"
    elif isinstance(image, torch.Tensor):
        tensor = image
        if channels == 1 and tensor.ndim in (2, 3) and tensor.shape[:-2] != (1,):
            tensor = tensor.unsqueeze(-3)
        layout = "(channels, height, width)"
    else:
        raise ValueError(
            f"`{name}` is a {type(image).__name__}; pass a Pillow image, an array, a tensor, or a list of one of them."
            + (" A prompt is passed by its name, `prompt=...`; a file is opened with `PIL.Image.open`." * is_text)
        )

    if tensor.ndim not in (3, 4) or tensor.shape[-3] != channels or 0 in tensor.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(image.shape)}; pass {layout}, with or without a batch dimension in front, with "
            f"{channels} channels."
        )
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point():
        raise ValueError(f"`{name}` is of type {tensor.dtype}; pass `uint8`, or floating point numbers in [0, 1].")
    tensor = tensor.float()
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0 and high <= 1):  # in this form, NaN is refused as well
        raise ValueError(
            f"`{name}` has values from {low:g} to {high:g}; they must lie in [0, 1]. Divide 0 to 255 by 255; of -1 to "
            "1 take `x / 2 + 0.5`."
        )
    return tensor if tensor.ndim == 4 else tensor[None]


__getattr__ = renamed(__name__, {"read_conditions": "read_control_images"})
