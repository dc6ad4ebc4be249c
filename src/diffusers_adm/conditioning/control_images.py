"""
Conditioning images for ControlNets, made from the images themselves: edges, blocks of colour, regions, low resolution.

Training makes them from its targets, and who samples makes them from a picture of their own, with the same functions.
Conditioning images as such: Zhang et al. 2023 (https://huggingface.co/papers/2302.05543); edges: Canny 1986
(doi:10.1109/TPAMI.1986.4767851); blocks of colour: Mou et al. 2023 (https://huggingface.co/papers/2302.08453).
"""

from collections.abc import Callable
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .image_inputs import read_images
from .low_resolution import downsample, upsample


# Edges. Of ITU-R BT.601, as in Pillow's mode "L".
LUMINANCE = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
# Of the Gaussian, in pixels: as little as keeps lines thin; drawings of 32 x 32 pixels have details two pixels apart.
CANNY_SIGMA = 0.6
# Of the Sobel gradient, which is 4 times the step at a sharp border. So edges start at steps of a tenth of the range of
# luminance, and are followed, for closed outlines, to steps of a fortieth.
CANNY_THRESHOLDS = (0.1, 0.4)
# Of a bowl that is added to the luminance: far above rounding errors, far below a step of 8 bits.
TIE_BREAKER = 1e-10
COLOR_BLOCKS = 8  # along the shorter side
MAX_REGION_COLORS = 6
LOW_RESOLUTION_FACTOR = 4


def edges(image: torch.Tensor) -> torch.Tensor:
    r"""
    Edges by scikit-image's Canny on the luminance: white lines, one pixel wide, on black. The outermost pixels never
    are edges.

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
    # The pixels on either side of a sharp border have the same gradient, and rounding errors would decide whether both
    # become edges, or which; now it is one.
    y, x = torch.meshgrid(*map(torch.arange, luminance.shape), indexing="ij")
    luminance += TIE_BREAKER * (y**2 + x**2)
    low, high = CANNY_THRESHOLDS
    found = canny(luminance.numpy(), CANNY_SIGMA, low_threshold=low, high_threshold=high, mode="nearest")
    return torch.from_numpy(found).float().expand(3, -1, -1).contiguous()


def color_blocks(image: torch.Tensor) -> torch.Tensor:
    r"""
    The mean colour of each block of a grid, rounded to 8 bits. The grid has `COLOR_BLOCKS` blocks along the shorter
    side, less for fewer pixels; where they do not divide it, some blocks are a pixel longer than others.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
    """
    shorter = min(image.shape[1:])
    counts = [min(side, round(COLOR_BLOCKS * side / shorter)) for side in image.shape[1:]]
    # The row, and the column, of blocks that each row, and column, of pixels is in.
    rows, columns = (torch.arange(side) * n // side for side, n in zip(image.shape[1:], counts, strict=True))
    in_row, in_column = F.one_hot(rows).double(), F.one_hot(columns).double()  # (height, .), (width, .)
    sums = torch.einsum("chw,hi,wj->cij", _levels(image).double(), in_row, in_column)  # whole numbers, so exact
    means = sums / torch.outer(in_row.sum(dim=0), in_column.sum(dim=0))
    return _from_levels(means)[:, rows][:, :, columns]


def regions(image: torch.Tensor) -> torch.Tensor:
    r"""
    The image in at most `MAX_REGION_COLORS` flat colours, without specks: like the map of a segmentation, in the
    colours of the image.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
    """
    smooth = _to_pil(image).filter(ImageFilter.MedianFilter(3))
    posterised = smooth.quantize(MAX_REGION_COLORS, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    # Soft borders leave lines of colours between those of both sides, a pixel wide.
    return _from_pil(posterised.filter(ImageFilter.ModeFilter(3)).convert("RGB"))


def low_resolution(image: torch.Tensor) -> torch.Tensor:
    r"""
    The image without its details: shrunk by `LOW_RESOLUTION_FACTOR` (block means) and enlarged again (bilinearly).

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): In [0, 1].
    """
    height, width = image.shape[1:]
    # Sides that blocks do not divide are continued by their last pixels.
    padding = (0, -width % LOW_RESOLUTION_FACTOR, 0, -height % LOW_RESOLUTION_FACTOR)
    padded = F.pad(image[None], padding, mode="replicate")
    # Whole numbers times multiples of 1 / 64 are exact, and so are the halves that are rounded up.
    low_res = ((downsample(2 * padded - 1, LOW_RESOLUTION_FACTOR) + 1) * 127.5).round()
    return _from_levels(upsample(low_res, *padded.shape[2:])[0, :, :height, :width])


CONDITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "edges": edges,
    "color_blocks": color_blocks,
    "regions": regions,
    "low_resolution": low_resolution,
}


@overload
def make_condition(image: torch.Tensor, kind: str) -> torch.Tensor: ...
@overload
def make_condition(image: Image.Image, kind: str) -> Image.Image: ...
def make_condition(image: torch.Tensor | Image.Image, kind: str) -> torch.Tensor | Image.Image:
    r"""
    The conditioning image of an image, of its size.

    It depends on the 8-bit values of the image alone, and has such values: pictures, saved or not, and tensors give
    the same.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)` or `PIL.Image.Image`): A tensor is float32, in [0, 1], on
            the CPU; a picture has no transparency.
        kind (`str`): One of `CONDITIONS`: "edges", "color_blocks", "regions", "low_resolution".

    Returns:
        `torch.Tensor` of the same shape, float32, in [0, 1]; for a picture, a `PIL.Image.Image` of mode RGB.

    Raises:
        ValueError: For another kind, shape, dtype or device, values out of range, a picture of a mode that is not RGB
            or grey, or one with transparency.
        ImportError: For edges without scikit-image.
    """
    if kind not in CONDITIONS:
        raise ValueError(f"`kind` is {kind!r}; it must be one of {', '.join(map(repr, CONDITIONS))}.")
    if isinstance(image, Image.Image):
        return _to_pil(CONDITIONS[kind](read_images(image, "image", 3)[0]))
    _check_image(image)
    return CONDITIONS[kind](image)


def _check_image(image: torch.Tensor) -> None:
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"`image` is of type {type(image).__name__}. Pass a tensor or a Pillow image.")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"`image` has shape {tuple(image.shape)}. Pass one image, (3, height, width).")
    if image.dtype != torch.float32 or image.device.type != "cpu":
        raise ValueError(
            f"`image` is {image.dtype} on {image.device}. Pass `image.cpu().float()`; 8-bit values divided by 255."
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"`image` has values from {low:g} to {high:g}. Pass numbers in [0, 1].")


def _levels(image: torch.Tensor) -> torch.Tensor:
    # What is left of 8-bit values after a journey through float32 may differ in the last bit, and with it the stronger
    # of two equal edges: back to whole numbers.
    return (image * 255).round()


def _from_levels(levels: torch.Tensor) -> torch.Tensor:
    return (levels + 0.5).floor().float() / 255  # halves up, as `shrink`


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(_levels(image).byte().permute(1, 2, 0).contiguous().numpy())


def _from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
