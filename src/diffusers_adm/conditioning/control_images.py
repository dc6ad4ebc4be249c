"""
Control images for ControlNets (Zhang et al. 2023, https://huggingface.co/papers/2302.05543), made from images in the
same way for training and sampling: edges (Canny 1986, doi:10.1109/TPAMI.1986.4767851), blocks of colour (Mou et al.
2023, https://huggingface.co/papers/2302.08453), regions, low resolution.
"""

from collections.abc import Callable
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .image_format import ImageFormat
from .image_inputs import read_images
from .image_outputs import to_pil
from .low_resolution import downsample, upsample


# Of ITU-R BT.601, as in Pillow's mode "L".
LUMINANCE = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
# Standard deviation in pixels, small, to keep lines thin: emoji of 32 x 32 pixels have details two pixels apart.
CANNY_SIGMA = 0.6
# Of the Sobel gradient, which is 4 times the step at a sharp border: edges start at steps of a tenth of the range of
# luminance, and are followed, for closed outlines, to steps of a fortieth.
CANNY_THRESHOLDS = (0.1, 0.4)
# Curvature of a paraboloid added to the luminance: far above rounding errors, far below a step of 8 bits.
TIE_BREAKER = 1e-10
COLOR_BLOCKS = 8  # along the shorter side
MAX_REGION_COLORS = 6
LOW_RESOLUTION_FACTOR = 4


def edges(image: torch.Tensor) -> torch.Tensor:
    r"""
    Finds edges with scikit-image's Canny on the luminance: white lines, one pixel wide, on black. The outermost pixels
    are never edges.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].

    Raises:
        ImportError: Without scikit-image.
    """
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise ImportError("Edges need scikit-image: `pip install diffusers-adm[train]`.") from error
    luminance = torch.einsum("c,chw->hw", LUMINANCE, _levels(image).double()) / 255
    # The pixels on either side of a sharp border have the same gradient, so that rounding errors would decide whether
    # one or both become edges.
    y, x = torch.meshgrid(*map(torch.arange, luminance.shape), indexing="ij")
    luminance += TIE_BREAKER * (y**2 + x**2)
    low, high = CANNY_THRESHOLDS
    found = canny(luminance.numpy(), CANNY_SIGMA, low_threshold=low, high_threshold=high, mode="nearest")
    return torch.from_numpy(found).float().expand(3, -1, -1).contiguous()


def color_blocks(image: torch.Tensor) -> torch.Tensor:
    r"""
    Averages the colours of each block of a grid, rounded to 8 bits. The grid has `COLOR_BLOCKS` blocks along the
    shorter side, or as many as pixels; if they do not divide it, some blocks are a pixel longer than others.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
    """
    shorter = min(image.shape[1:])
    counts = [min(side, round(COLOR_BLOCKS * side / shorter)) for side in image.shape[1:]]
    # The row of blocks for each row of pixels, and the same for columns.
    rows, columns = (torch.arange(side) * n // side for side, n in zip(image.shape[1:], counts, strict=True))
    in_row, in_column = F.one_hot(rows).double(), F.one_hot(columns).double()  # (height, .), (width, .)
    sums = torch.einsum("chw,hi,wj->cij", _levels(image).double(), in_row, in_column)  # whole numbers, so exact
    means = sums / torch.outer(in_row.sum(dim=0), in_column.sum(dim=0))
    return _from_levels(means)[:, rows][:, :, columns]


def regions(image: torch.Tensor) -> torch.Tensor:
    r"""
    Reduces an image to at most `MAX_REGION_COLORS` flat colours without specks, like a segmentation map in the colours
    of the image.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
    """
    smooth = _to_pil(image).filter(ImageFilter.MedianFilter(3))
    posterised = smooth.quantize(MAX_REGION_COLORS, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    # Soft borders leave lines, a pixel wide, in colours between those of both sides.
    return _from_pil(posterised.filter(ImageFilter.ModeFilter(3)).convert("RGB"))


def low_resolution(image: torch.Tensor, num_levels: int | None = 256) -> torch.Tensor:
    r"""
    Downsamples by `LOW_RESOLUTION_FACTOR` (block means) and upsamples again (bilinearly).

    Args:
        image (`torch.Tensor` of shape `(channels, height, width)`): In [0, 1].
        num_levels (`int`, *optional*, defaults to 256): Number of values that the data can have. `None`: continuous.
    """
    height, width = image.shape[1:]
    # Sides that blocks do not divide are padded with their last pixels.
    padding = (0, -width % LOW_RESOLUTION_FACTOR, 0, -height % LOW_RESOLUTION_FACTOR)
    padded = F.pad(image[None], padding, mode="replicate")
    low_res = (downsample(2 * padded - 1, LOW_RESOLUTION_FACTOR, num_levels) + 1) / 2
    if num_levels is None:
        return upsample(low_res, *padded.shape[2:])[0, :, :height, :width]
    # Whole numbers times multiples of 1 / 64 are exact, and so are the halves that are rounded up.
    levels = upsample((low_res * (num_levels - 1)).round(), *padded.shape[2:])[0, :, :height, :width]
    return _from_levels(levels, num_levels)


ControlImageKind = Literal["edges", "color_blocks", "regions", "low_resolution"]
CONDITIONS: dict[ControlImageKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "edges": edges,
    "color_blocks": color_blocks,
    "regions": regions,
    "low_resolution": low_resolution,
}


# Kinds that look at colours, not at numbers.
COLOR_KINDS: tuple[ControlImageKind, ...] = ("edges", "color_blocks", "regions")


def condition_format_of(kind: ControlImageKind, image_format: ImageFormat) -> ImageFormat:
    """
    The format of the control images of a kind: that of the images for "low_resolution", 8-bit grey (for images of mode
    L and LA) or RGB for the other kinds.

    Raises:
        ValueError: For another kind, and for a kind that looks at colours with images that have none.
    """
    if kind not in CONDITIONS:
        raise ValueError(f"`kind` is {kind!r}; it must be one of {', '.join(map(repr, CONDITIONS))}.")
    if kind not in COLOR_KINDS:
        return image_format
    if image_format.mode == "array":
        raise ValueError(
            f"Control images of the kind {kind!r} are made from grey or RGB images, but these are {image_format}, "
            "whose channels are no colours. Use 'low_resolution', which takes any channels, or make the control "
            "images yourself and train on pairs of images."
        )
    return ImageFormat("L", 1) if image_format.mode in ("L", "LA") else ImageFormat("RGB", 3)


@overload
def make_condition(
    image: torch.Tensor, kind: ControlImageKind, image_format: ImageFormat | None = None
) -> torch.Tensor: ...
@overload
def make_condition(
    image: Image.Image, kind: ControlImageKind, image_format: ImageFormat | None = None
) -> Image.Image: ...
def make_condition(
    image: torch.Tensor | Image.Image, kind: ControlImageKind, image_format: ImageFormat | None = None
) -> torch.Tensor | Image.Image:
    r"""
    Makes the control image of an image, in the same size and with the values of `condition_format_of`: 8 bits, except
    for low-resolution images of other data.

    It depends only on the values of the data: Pillow images, saved or not, and tensors give the same.

    Args:
        image (`torch.Tensor` of shape `(channels, height, width)` or `PIL.Image.Image`): A tensor is float32, in [0,
            1] (fractions of the value range), on the CPU; a Pillow image is RGB or grey, without transparency, or of
            the mode of `image_format`.
        kind (`str`): One of `CONDITIONS`: "edges", "color_blocks", "regions", "low_resolution".
        image_format (`ImageFormat`, *optional*): Format of the image. `None`: 8-bit RGB. Transparent images are
            composited over white for the kinds that look at colours.

    Returns:
        `torch.Tensor` of shape `(channels of the control image, height, width)`, float32, in [0, 1]: 1 for the kinds
        that look at colours of grey images, 3 for those of RGB images; for low resolution as many as the image has. For
        a Pillow image a Pillow image.

    Raises:
        ValueError: For another kind, a kind that looks at colours with data that are none, and images that are not as
            described.
        ImportError: For edges without scikit-image.
    """
    image_format = ImageFormat("RGB", 3) if image_format is None else image_format
    condition_format = condition_format_of(kind, image_format)
    if isinstance(image, Image.Image):
        tensor = read_images(image, "image", image_format)[0]
    else:
        _check_image(image, image_format.channels)
        tensor = image
    if kind in COLOR_KINDS:
        condition = CONDITIONS[kind](_on_white(tensor, image_format))[: condition_format.channels]
    else:
        condition = low_resolution(tensor, image_format.num_levels)
    return to_pil(condition[None], condition_format)[0] if isinstance(image, Image.Image) else condition


def _on_white(image: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """The image as RGB: transparent ones on white."""
    if image_format.mode in ("LA", "RGBA"):
        image, alpha = image[:-1], image[-1:]
        image = alpha * image + 1 - alpha
    return image.expand(3, -1, -1)


def _check_image(image: torch.Tensor, channels: int) -> None:
    if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
        raise ValueError(f"`image` has shape {tuple(image.shape)}. Pass one image, ({channels}, height, width).")
    if image.dtype != torch.float32 or image.device.type != "cpu":
        raise ValueError(
            f"`image` is {image.dtype} on {image.device}. Pass `image.cpu().float()`; 8-bit values divided by 255."
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"`image` has values from {low:g} to {high:g}. Pass numbers in [0, 1].")


def _levels(image: torch.Tensor) -> torch.Tensor:
    # 8-bit values that were float32 may differ in the last bit, which would decide between two equal edges.
    return (image * 255).round()


def _from_levels(levels: torch.Tensor, num_levels: int = 256) -> torch.Tensor:
    return (levels + 0.5).floor().float() / (num_levels - 1)  # halves up, as `downsample`


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(_levels(image).byte().permute(1, 2, 0).contiguous().numpy())


def _from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
