"""
Images with what a ControlNet (Zhang et al. 2023, https://huggingface.co/papers/2302.05543) is shown of them: made from
the image, or read beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..conditioning.control_images import make_condition
from .captions import Captions
from .images import ImageDataset, decode_condition, decode_rgb


if TYPE_CHECKING:
    import datasets


class ControlDataset(ImageDataset):
    r"""
    Examples with `conditions`, float32 of shape `(3, resolution, resolution)` in [0, 1], beside `images`.

    They are made from the cropped and flipped image, or read from the column `conditioning_image`, and resized, cropped
    and flipped as the image is. If either becomes unreadable during training, another example takes the place of both.

    Args:
        dataset, resolution, center_crop, random_flip, seed, background, captions: As for `ImageDataset`.
        condition (`str`, *optional*): A kind of conditioning image (see
            `conditioning.control_images.CONDITIONS`) to make from each image. None reads the column
            `conditioning_image`, of `load_image_dataset(conditioning_image_column=...)`.

    Raises:
        ValueError: Unless there is either `condition` or the column, or if there is no such kind.
        ImportError: For edges without scikit-image.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        background: tuple[int, int, int] = (255, 255, 255),
        captions: Captions | None = None,
        condition: str | None = None,
    ):
        super().__init__(dataset, resolution, center_crop, random_flip, seed, background, captions)
        if (condition is None) == ("conditioning_image" not in dataset.column_names):
            raise ValueError(
                f"`condition` is {condition!r} and the dataset has the columns {', '.join(dataset.column_names)}. Pass "
                "either a `condition` to make, or a dataset with the column `conditioning_image` to read them from."
            )
        if condition is not None:
            make_condition(torch.zeros(3, 1, 1), condition)  # a wrong kind or a missing package shows here
        self.condition = condition

    def _image_tensors(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        image = decode_rgb(example["image"], self.background)
        pixels = self._transform(image, index)
        if self.condition is not None:
            conditions = make_condition(pixels.float() / 255, self.condition)
        else:
            decoded = decode_condition(example["conditioning_image"], image.size)
            conditions = self._transform(decoded, index, source_size=image.size).float() / 255
        return {"images": pixels.float() / 127.5 - 1, "conditions": conditions}
