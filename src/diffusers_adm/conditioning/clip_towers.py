"""The towers of a CLIP as components of pipelines: checks, and embeddings of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from ..ops.finiteness import count_not_finite
from .image_format import ImageFormat
from .image_inputs import ImageInput, read_images


# What image processors of CLIPs take.
CLIP_FORMAT = ImageFormat("RGB", 3)


def check_clip_tower(kind: Literal["text", "vision"], network: torch.nn.Module, name: str) -> None:
    r"""
    Raises a `ValueError` for a tower of CLIP that gives no embedding.

    Args:
        kind (`str`): `"text"` or `"vision"`.
        network (`torch.nn.Module`), name (`str`): The tower, and what messages call it.
    """
    projection = getattr(network, "visual_projection" if kind == "vision" else "text_projection", None)
    is_whole = hasattr(network, "text_model") and hasattr(network, "vision_model")
    if projection is None or is_whole:
        wanted = "CLIPVisionModelWithProjection" if kind == "vision" else "CLIPTextModelWithProjection"
        why = "which holds both towers" if is_whole else "which gives no embedding, as it has no projection"
        raise ValueError(
            f"`{name}` is a {type(network).__name__}, {why}. Load a `{wanted}` from the same folder: "
            f"`{wanted}.from_pretrained(folder)`."
        )


def read_clip_images(
    image: ImageInput | Sequence[ImageInput], name: str, image_processor: Any, image_format: ImageFormat
) -> torch.Tensor:
    r"""
    Reads images of any size for the vision tower of a CLIP.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): One image or several, also of
            several sizes.
        name (`str`): What messages call `image`.
        image_processor (`CLIPImageProcessor`): Resizes, crops and normalises; gets 8 bits.
        image_format (`ImageFormat`): Format of the images: that of the pipeline, RGB if it is neither grey nor RGB.

    Returns:
        `torch.Tensor` of shape `(number of images, 3, height, width)`: What the tower takes, on the CPU.

    Raises:
        ValueError: For what are no images of this format, and for an empty list.
    """
    given_format = image_format if image_format.channels in (1, 3) else CLIP_FORMAT
    images: list[Image.Image] = []
    each_image: Any = list(image) if isinstance(image, (list, tuple)) else [image]
    for each in each_image:
        is_rgb = isinstance(each, Image.Image) and each.mode in ("P", "RGB")
        fractions = read_images(each, name, CLIP_FORMAT if is_rgb else given_format)
        pixels = (fractions * 255).round().to("cpu", torch.uint8).expand(-1, 3, -1, -1)
        images += [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    if not images:
        raise ValueError(f"`{name}` is empty; pass at least one image.")
    return image_processor(images=images, return_tensors="pt").pixel_values


def embed_clip_images(image_encoder: Any, pixel_values: torch.Tensor, device: torch.device) -> torch.Tensor:
    r"""
    Embeds images. Waits for the device.

    Args:
        image_encoder (`CLIPVisionModelWithProjection`): The vision tower.
        pixel_values (`torch.Tensor` of shape `(number of images, 3, height, width)`): See `read_clip_images`.
        device (`torch.device`): Where the tower runs.

    Returns:
        `torch.Tensor` of shape `(number of images, width)`: Embeddings as CLIP gives them, not normalised.

    Raises:
        ValueError: For embeddings that are not finite.
    """
    embeds = image_encoder(pixel_values.to(device, image_encoder.dtype)).image_embeds
    bad = count_not_finite(embeds, "images")
    if bad is not None:
        raise ValueError(
            f"`image_encoder` gives embeddings that are not finite for {bad}. Use float32 or bfloat16, or another "
            "checkpoint."
        )
    return embeds
